//! The poll(2) driver: readiness of sockets, pipes and devices for hosts without io_uring.
//!
//! It moves no bytes: a task that was told that a descriptor is ready makes the system call
//! itself, non-blocking, and comes back when it was told wrong.

use super::core::Core;
use super::uring::Harvest;
use super::wake::Mailbox;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

#[derive(Default)]
pub(super) struct Poller {
    interests: Vec<Option<Interest>>,
    free: Vec<u32>,
}

struct Interest {
    fd: Arc<OwnedFd>,
    events: PollFlags,
    waker: Waker,
    ready: bool,
}

impl Poller {
    /// Looks which descriptors are ready; with `wait`, sleeps until one is, the bell rings or the
    /// time is over.
    pub(super) fn turn(
        &mut self,
        mail: &Mailbox,
        wait: bool,
        time: Option<Duration>,
        harvest: &mut Harvest,
    ) -> io::Result<()> {
        let waiting = || {
            self.interests
                .iter()
                .enumerate()
                .filter_map(|(i, x)| Some((i, x.as_ref()?)))
        };
        let waiting = || waiting().filter(|(_, interest)| !interest.ready);
        let mut fds = vec![PollFd::new(&*mail.bell, PollFlags::IN)];
        fds.extend(waiting().map(|(_, interest)| PollFd::new(&*interest.fd, interest.events)));
        let slots: Vec<usize> = waiting().map(|(i, _)| i).collect();
        let time = if wait { time } else { Some(Duration::ZERO) };
        match poll(
            &mut fds,
            time.and_then(|t| Timespec::try_from(t).ok()).as_ref(),
        ) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            mail.silence();
        }
        for (slot, _) in slots
            .into_iter()
            .zip(&ready[1..])
            .filter(|(_, ready)| **ready)
        {
            if let Some(interest) = &mut self.interests[slot] {
                interest.ready = true;
                harvest.wakers.push(interest.waker.clone());
            }
        }
        Ok(())
    }

    fn register(&mut self, interest: Interest) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.interests[slot as usize] = Some(interest);
            return slot;
        }
        self.interests.push(Some(interest));
        (self.interests.len() - 1) as u32
    }

    fn is_ready(&mut self, slot: u32, waker: &Waker) -> bool {
        let Some(Some(interest)) = self.interests.get_mut(slot as usize) else {
            return true;
        };
        interest.waker.clone_from(waker);
        interest.ready
    }

    fn remove(&mut self, slot: u32) -> Option<Interest> {
        self.free.push(slot);
        self.interests.get_mut(slot as usize)?.take()
    }
}

/// Ready when poll(2) says so; also on errors and hang-ups, which the system call then tells.
pub(super) struct Readiness {
    core: Rc<Core>,
    fd: Arc<OwnedFd>,
    events: PollFlags,
    slot: Option<u32>,
}

impl Readiness {
    pub(super) fn new(core: &Rc<Core>, fd: &Arc<OwnedFd>, events: PollFlags) -> Self {
        Self {
            core: Rc::clone(core),
            fd: Arc::clone(fd),
            events,
            slot: None,
        }
    }
}

impl Future for Readiness {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(slot) = self.slot {
            let ready = self.core.with_poller(|p| p.is_ready(slot, cx.waker()));
            return if ready {
                Poll::Ready(())
            } else {
                Poll::Pending
            };
        }
        let interest = Interest {
            fd: Arc::clone(&self.fd),
            events: self.events,
            waker: cx.waker().clone(),
            ready: false,
        };
        self.slot = Some(self.core.with_poller(|p| p.register(interest)));
        Poll::Pending
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            drop(self.core.with_poller(|p| p.remove(slot)));
        }
    }
}
