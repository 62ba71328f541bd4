//! The executor of one thread: its tasks, its ready queue, its timers, its driver.
//!
//! Every task that is ready runs before the kernel is entered again, so that what they ask for,
//! and what they answer, travels in one batch. No borrow of this state is held while foreign code
//! (a task, a waker, a destructor) runs.

use super::Engine;
use super::poll::Poller;
use super::uring::{Harvest, Ring};
use super::wake::{Mailbox, TaskWaker, pair};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::io;
use std::mem;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Polls between two looks at the kernel when tasks keep each other busy.
const BATCH: usize = 256;
/// Slot of the future given to `run`.
const MAIN: u32 = 0;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

/// The executor of this thread, if `run` is on its stack.
pub(super) fn current() -> Option<Rc<Core>> {
    CURRENT.try_with(|c| c.borrow().clone()).ok().flatten()
}

/// Queues `slot` if the executor that `mail` belongs to is this thread's.
pub(super) fn ready_here(mail: &Arc<Mailbox>, slot: u32) -> bool {
    let here = |core: &Rc<Core>| {
        let same = Arc::ptr_eq(&core.mail, mail);
        if same {
            core.ready.borrow_mut().push_back(slot);
        }
        same
    };
    CURRENT
        .try_with(|c| c.borrow().as_ref().is_some_and(here))
        .unwrap_or(false)
}

pub(super) struct Core {
    mail: Arc<Mailbox>,
    driver: Driver,
    tasks: RefCell<Tasks>,
    ready: RefCell<VecDeque<u32>>,
    timers: RefCell<Timers>,
    closing: Cell<bool>,
    inline: Cell<u32>,
}

#[allow(clippy::large_enum_variant, reason = "one for each thread")]
enum Driver {
    Ring(Box<RefCell<Ring>>),
    Poll(RefCell<Poller>),
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Default)]
struct Tasks {
    slots: Vec<TaskSlot>,
    free: Vec<u32>,
}

struct TaskSlot {
    task: Option<Task>,
    flag: Arc<TaskWaker>,
    waker: Waker,
}

/// Deadlines with the number that tells equal ones apart.
#[derive(Default)]
struct Timers {
    due: BTreeMap<(Instant, u64), Waker>,
    number: u64,
}

impl Core {
    fn new(engine: Engine) -> io::Result<Rc<Self>> {
        let driver = match engine {
            Engine::Ring => Driver::Ring(Box::new(RefCell::new(Ring::new()?))),
            Engine::Poll => Driver::Poll(RefCell::default()),
        };
        let core = Rc::new(Self {
            mail: Arc::new(Mailbox::new()?),
            driver,
            tasks: RefCell::default(),
            ready: RefCell::default(),
            timers: RefCell::default(),
            closing: Cell::new(false),
            inline: Cell::new(0),
        });
        core.new_slot();
        Ok(core)
    }

    fn new_slot(&self) -> u32 {
        let mut tasks = self.tasks.borrow_mut();
        let slot = tasks.slots.len() as u32;
        let (flag, waker) = pair(slot, &self.mail);
        tasks.slots.push(TaskSlot {
            task: None,
            flag,
            waker,
        });
        slot
    }

    pub(super) fn spawn(&self, task: Task) {
        if self.closing.get() {
            return;
        }
        let free = self.tasks.borrow_mut().free.pop();
        let slot = free.unwrap_or_else(|| self.new_slot());
        let mut tasks = self.tasks.borrow_mut();
        let place = &mut tasks.slots[slot as usize];
        place.task = Some(task);
        let waker = place.waker.clone();
        drop(tasks);
        waker.wake();
    }

    fn drive<F: Future>(&self, mut main: Pin<&mut F>) -> F::Output {
        let (flag, waker) = {
            let tasks = self.tasks.borrow();
            (
                Arc::clone(&tasks.slots[0].flag),
                tasks.slots[0].waker.clone(),
            )
        };
        let (mut harvest, mut mail) = (Harvest::default(), Vec::new());
        waker.wake_by_ref();
        loop {
            for _ in 0..BATCH {
                let Some(slot) = self.next_ready() else { break };
                if slot != MAIN {
                    self.poll_task(slot);
                    continue;
                }
                flag.start_poll();
                if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                    return output;
                }
            }
            let turned = self.turn(&mut mail, &mut harvest);
            // Requests are under way, and nobody will ever hear of them.
            turned.unwrap_or_else(|e| panic!("the I/O engine failed: {e}"));
        }
    }

    fn next_ready(&self) -> Option<u32> {
        self.ready.borrow_mut().pop_front()
    }

    fn poll_task(&self, slot: u32) {
        let mut tasks = self.tasks.borrow_mut();
        let place = &mut tasks.slots[slot as usize];
        place.flag.start_poll();
        // A wake may come late, when its task is done: then there is none.
        let Some(mut task) = place.task.take() else {
            return;
        };
        let waker = place.waker.clone();
        drop(tasks);
        let done = task
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        if done {
            drop(task);
            self.tasks.borrow_mut().free.push(slot);
        } else {
            self.tasks.borrow_mut().slots[slot as usize].task = Some(task);
        }
    }

    /// Looks at mail, kernel and clock; sleeps when no task is ready.
    fn turn(&self, mail: &mut Vec<u32>, harvest: &mut Harvest) -> io::Result<()> {
        let idle = self.ready.borrow().is_empty();
        self.mail.take(idle, mail);
        let wait = idle && mail.is_empty();
        self.ready.borrow_mut().extend(mail.drain(..));
        let time = self.until_next_timer();
        let result = match &self.driver {
            Driver::Ring(ring) => ring.borrow_mut().turn(&self.mail, wait, time, harvest),
            Driver::Poll(poller) => poller.borrow_mut().turn(&self.mail, wait, time, harvest),
        };
        if wait {
            self.mail.take(false, mail);
            self.ready.borrow_mut().extend(mail.drain(..));
        }
        self.take_due(&mut harvest.wakers);
        harvest.finish();
        result
    }

    fn until_next_timer(&self) -> Option<Duration> {
        let timers = self.timers.borrow();
        let (&(at, _), _) = timers.due.first_key_value()?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    fn take_due(&self, wakers: &mut Vec<Waker>) {
        let mut timers = self.timers.borrow_mut();
        if timers.due.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(first) = timers.due.first_entry() {
            if first.key().0 > now {
                break;
            }
            wakers.push(first.remove());
        }
    }

    /// True once in a while: an operation that was done at once should let others run.
    pub(super) fn should_yield(&self) -> bool {
        self.inline.set(self.inline.get().wrapping_add(1));
        self.inline.get().is_multiple_of(16)
    }

    pub(super) fn has_ring(&self) -> bool {
        matches!(self.driver, Driver::Ring(_))
    }

    /// The ring; only for cores that have one.
    pub(super) fn with_ring<T>(&self, f: impl FnOnce(&mut Ring) -> T) -> T {
        let Driver::Ring(ring) = &self.driver else {
            unreachable!("asked for a ring under poll")
        };
        f(&mut ring.borrow_mut())
    }

    /// The poller; only for cores that have no ring.
    pub(super) fn with_poller<T>(&self, f: impl FnOnce(&mut Poller) -> T) -> T {
        let Driver::Poll(poller) = &self.driver else {
            unreachable!("asked to poll under a ring")
        };
        f(&mut poller.borrow_mut())
    }

    fn drop_tasks(&self) {
        self.closing.set(true);
        // One at a time, outside the borrow: a destructor may do anything but spawn.
        let take = |i: usize| {
            self.tasks
                .borrow_mut()
                .slots
                .get_mut(i)
                .map(|slot| slot.task.take())
        };
        let mut i = 0;
        while let Some(task) = take(i) {
            drop(task);
            i += 1;
        }
    }

    fn drain(&self) {
        if let Driver::Ring(ring) = &self.driver {
            let mut harvest = Harvest::default();
            ring.borrow_mut().drain(&self.mail, &mut harvest);
            harvest.finish();
        }
    }
}

/// `run` is on the stack. Leaving it, also by a panic, drops the tasks, then waits for the kernel.
struct Stage(Rc<Core>);

impl Stage {
    fn enter(core: Rc<Core>) -> io::Result<Self> {
        CURRENT.with(|current| {
            if current.borrow().is_some() {
                return Err(io::Error::other("this thread runs an executor already"));
            }
            *current.borrow_mut() = Some(Rc::clone(&core));
            Ok(Self(core))
        })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The kernel is waited for even if a task's destructor panics.
        let _last = Leave(&self.0);
        self.0.drop_tasks();
    }
}

struct Leave<'a>(&'a Core);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.drain();
        CURRENT.with(|current| current.borrow_mut().take());
    }
}

pub(super) fn run<F: Future>(engine: Engine, main: F) -> io::Result<F::Output> {
    let stage = Stage::enter(Core::new(engine)?)?;
    let core = Rc::clone(&stage.0);
    // After the stage, so that it is dropped before it.
    let main = pin!(main);
    Ok(core.drive(main))
}

/// Ready at a point in time.
pub(super) struct Sleep {
    core: Rc<Core>,
    at: Instant,
    number: Option<u64>,
}

impl Sleep {
    pub(super) fn new(core: Rc<Core>, time: Duration) -> Self {
        // A time past the end of the clock is for ever: a century does.
        let far = Duration::from_secs(100 * 365 * 86400);
        Self {
            core,
            at: Instant::now() + time.min(far),
            number: None,
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let mut timers = self.core.timers.borrow_mut();
        let number = self.number.unwrap_or_else(|| {
            timers.number += 1;
            timers.number
        });
        let old = timers.due.insert((self.at, number), cx.waker().clone());
        drop(timers);
        drop(old);
        self.number = Some(number);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let waker = self.core.timers.borrow_mut().due.remove(&(self.at, number));
            drop(waker);
        }
    }
}

/// Pending once.
#[derive(Default)]
pub(super) struct Yield(bool);

impl Future for Yield {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
