//! Wakes: how any thread makes a task of one executor run again.
//!
//! A wake from the executor's own thread goes straight into its ready queue. A wake from another
//! thread goes into the mailbox, under a lock that also says whether the executor sleeps: that is
//! what makes it impossible to lose a wake between the last look into the mailbox and the sleep.
//! Nothing here may run a task.

use super::core;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

/// Where other threads leave the numbers of tasks to run.
#[derive(Debug)]
pub(super) struct Mailbox {
    inner: Mutex<Inner>,
    /// Readable when somebody wrote to a mailbox whose executor slept.
    pub(super) bell: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct Inner {
    tasks: Vec<u32>,
    asleep: bool,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            inner: Mutex::default(),
            bell: Arc::new(bell),
        })
    }

    /// Takes what is there. With `sleepy`, and nothing there, the executor counts as asleep from
    /// now on: the next wake rings the bell.
    pub(super) fn take(&self, sleepy: bool, into: &mut Vec<u32>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.asleep = sleepy && inner.tasks.is_empty();
        into.append(&mut inner.tasks);
    }

    /// Silences the bell after it rang.
    pub(super) fn silence(&self) {
        // A failure means that it did not ring: nothing to silence.
        let _ = rustix::io::read(&*self.bell, &mut [0u8; 8]);
    }

    fn put(&self, task: u32) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.tasks.push(task);
        let ring = std::mem::take(&mut inner.asleep);
        drop(inner);
        if ring {
            // Any number but 0 rings. Fails only when the counter is about to overflow: then the
            // bell rings already.
            let _ = rustix::io::write(&*self.bell, &[1u8; 8]);
        }
    }
}

/// The one waker of a task slot. It outlives the tasks in the slot, so a late wake may hit the
/// next one: tasks bear being polled for nothing.
#[derive(Debug)]
pub(super) struct TaskWaker {
    slot: u32,
    /// Whether the slot waits in a queue already; set by wakes, cleared just before polling.
    queued: AtomicBool,
    mail: Arc<Mailbox>,
}

impl TaskWaker {
    pub(super) fn new(slot: u32, mail: Arc<Mailbox>) -> Arc<Self> {
        Arc::new(Self {
            slot,
            queued: AtomicBool::new(false),
            mail,
        })
    }

    /// Must come before the poll: a wake during the poll queues the task again. Acquires what
    /// the waking thread wrote before it woke.
    pub(super) fn start_poll(&self) {
        self.queued.swap(false, Ordering::AcqRel);
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) && !core::ready_here(&self.mail, self.slot) {
            self.mail.put(self.slot);
        }
    }
}

/// The waker and the flag behind it.
pub(super) fn pair(slot: u32, mail: &Arc<Mailbox>) -> (Arc<TaskWaker>, Waker) {
    let flag = TaskWaker::new(slot, Arc::clone(mail));
    let waker = Waker::from(Arc::clone(&flag));
    (flag, waker)
}
