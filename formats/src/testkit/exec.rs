//! A deterministic executor on one thread: dice choose which task runs and which store operation
//! lands next, and one seed replays all of it.
//!
//! It owns tasks and nothing else; what they wait for is in a [`Sim`].

use super::order::Order;
use super::rng::Rng;
use crate::store::sim::Sim;
use std::cell::RefCell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Runs a future that never waits, such as one over a memory store or an instant simulation.
///
/// Panics when it does wait: nothing here could wake it.
pub fn now<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(out) => out,
        Poll::Pending => panic!("a future that should not wait is waiting"),
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Ready = Arc<Mutex<Vec<usize>>>;

struct TaskWaker {
    id: usize,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if !ready.contains(&self.id) {
            ready.push(self.id);
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A task ran, or an operation landed.
    Moved,
    /// Every task is done.
    Done,
    /// Tasks are left, and nothing can ever wake them.
    Stuck,
}

/// The executor.
pub struct Exec {
    sim: Sim,
    rng: Rng,
    /// Tasks run as soon as they can, and this says what lands: no dice.
    order: Option<Rc<RefCell<Order>>>,
    tasks: Vec<Option<(Task, Waker)>>,
    left: usize,
    ready: Ready,
}

impl Exec {
    /// An executor whose dice start from `seed`, over the files of `sim`.
    pub fn new(sim: Sim, seed: u64) -> Self {
        Self {
            sim,
            rng: Rng::new(seed),
            order: None,
            tasks: Vec::new(),
            left: 0,
            ready: Ready::default(),
        }
    }

    /// The world it lands operations of.
    pub fn sim(&self) -> &Sim {
        &self.sim
    }

    /// From now on operations land as `order` says, or as dice say again.
    pub fn follow(&mut self, order: Option<Rc<RefCell<Order>>>) {
        self.order = order;
    }

    /// Adds a task.
    pub fn spawn(&mut self, task: impl Future<Output = ()> + 'static) {
        let id = self.tasks.len();
        let waker = Waker::from(Arc::new(TaskWaker {
            id,
            ready: self.ready.clone(),
        }));
        waker.wake_by_ref();
        self.tasks.push(Some((Box::pin(task), waker)));
        self.left += 1;
    }

    /// Runs one task or lands one operation.
    pub fn step(&mut self) -> Step {
        if self.left == 0 {
            return Step::Done;
        }
        let ready = self
            .ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len();
        if let Some(order) = self.order.clone() {
            return self.ordered(ready, &mut order.borrow_mut());
        }
        if ready > 0 && (self.rng.one_in(2) || !self.sim.land(&mut self.rng)) {
            self.run_one(ready);
        } else if ready == 0 && !self.sim.land(&mut self.rng) {
            return Step::Stuck;
        }
        Step::Moved
    }

    /// A step without dice.
    fn ordered(&mut self, ready: usize, order: &mut Order) -> Step {
        if ready > 0 {
            self.run_chosen(0);
        } else if !self.sim.land_chosen(|of| order.choose(of)) {
            return Step::Stuck;
        }
        Step::Moved
    }

    fn run_one(&mut self, ready: usize) {
        let chosen = self.rng.below(ready as u64) as usize;
        self.run_chosen(chosen);
    }

    fn run_chosen(&mut self, chosen: usize) {
        let id = self
            .ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .swap_remove(chosen);
        let Some((task, waker)) = &mut self.tasks[id] else {
            return;
        };
        let waker = waker.clone();
        if task
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready()
        {
            self.tasks[id] = None;
            self.left -= 1;
        }
    }

    /// Runs until every task is done; false when some can never be.
    #[must_use]
    pub fn run(&mut self) -> bool {
        loop {
            match self.step() {
                Step::Moved => {}
                Step::Done => return true,
                Step::Stuck => return false,
            }
        }
    }

    /// Adds a task whose output appears in the slot that is given back.
    pub fn start<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> Slot<T> {
        let slot = Slot::default();
        let out = slot.clone();
        self.spawn(async move {
            let value = future.await;
            *out.0.borrow_mut() = Some(value);
        });
        slot
    }

    /// Runs until a task that was started is done. Whenever an operation of its store has changed
    /// something, `look` is called, and told whether the task is done.
    pub fn watch<T>(
        &mut self,
        done: &Slot<T>,
        mut look: impl FnMut(bool) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut clock = self.sim.clock();
        while !done.is_full() {
            if self.step() == Step::Stuck {
                return Err("nothing can move any more".into());
            }
            if self.sim.clock() != clock {
                clock = self.sim.clock();
                look(done.is_full())?;
            }
        }
        Ok(())
    }

    /// Runs `future` beside the other tasks and gives its output; `None` when it can never end.
    pub fn block_on<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> Option<T> {
        let slot = self.start(future);
        while !slot.is_full() {
            if self.step() != Step::Moved && !slot.is_full() {
                return None;
            }
        }
        slot.take()
    }
}

/// Where the output of a task appears.
#[derive(Debug)]
pub struct Slot<T>(Rc<RefCell<Option<T>>>);

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(Rc::new(RefCell::new(None)))
    }
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Slot<T> {
    /// Whether the task is done and its output still here.
    pub fn is_full(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// The output, once.
    pub fn take(&self) -> Option<T> {
        self.0.borrow_mut().take()
    }
}
