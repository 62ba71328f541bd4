//! A session: one process that serves a disk to a guest, with the model beside it.
//!
//! Workers take requests from one queue; the executor's dice decide how they mix. Between any two
//! steps a hook may look at the world: cut the power, kill the process, and judge what is left. The
//! session itself never notices.

use super::subject::{Bench, Setup, Subject, words};
use crate::device::{Device, Zero};
use ploop_formats::ledger::LocalWords;
use ploop_formats::store::Store;
use ploop_formats::store::fault::Faults;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Fate, Rules, Sim};
use ploop_formats::testkit::exec::{Exec, Slot, Step, now};
use ploop_formats::testkit::model::{Asked, Model, Outcome};
use ploop_formats::testkit::order::Order;
use ploop_formats::testkit::stamp::{self, Value, ZERO};
use ploop_formats::testkit::workload::{Op, ZeroSpace};
use ploop_formats::units::SECTOR;
use ploop_formats::{Error, Kind, buf};
use std::cell::{Ref, RefCell, RefMut};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

/// Values of guest writes start here; below are those of the first images.
pub const FIRST_VALUE: Value = 1 << 32;

/// A request that was called, as the model and the guest know it.
#[derive(Debug, Clone)]
pub struct Request {
    number: u64,
    op: Op,
    value: Value,
    asked: Asking,
    /// Whether what it promises had become impossible before it was called.
    after_failure: bool,
    /// Whether it may have been carried out before, on other layers than those of now.
    elsewhere: bool,
}

#[derive(Debug, Clone)]
enum Asking {
    Change(Asked),
    Flush(u64),
    Read(u64),
}

/// What a guest knows, and what it makes of errors.
#[derive(Debug)]
pub struct Guest {
    /// All legal contents.
    pub model: Model,
    /// Requests that were called and not answered.
    pub unanswered: Vec<Request>,
    /// Errors that requests were answered with.
    pub errors: Vec<Kind>,
    /// Errors that are no violation.
    pub excused: Vec<Kind>,
    /// Requests called so far.
    pub called: u64,
    /// Requests answered so far.
    pub answered: u64,
    queue: VecDeque<Op>,
    next_value: Value,
    violation: Option<String>,
    faults: Faults,
}

impl Guest {
    fn call(&mut self, op: Op) -> Request {
        self.called += 1;
        let mut value = ZERO;
        let asked = match &op {
            Op::Write { sectors, .. } => {
                self.next_value += 1;
                value = self.next_value;
                Asking::Change(self.model.write(sectors.clone(), value))
            }
            Op::Zero { sectors, .. } => Asking::Change(self.model.write(sectors.clone(), ZERO)),
            Op::Discard { sectors } => Asking::Change(self.model.discard(sectors.clone())),
            Op::Read { sectors } => Asking::Read(self.model.read(sectors.clone())),
            Op::Flush | Op::Reopen => Asking::Flush(self.model.flush()),
        };
        // A write in place may be durable while a pass that has just failed is not over.
        let after_failure = match &op {
            Op::Flush | Op::Reopen => self.faults.is_final(),
            _ => self.faults.flush_failed(),
        };
        let request = Request {
            number: self.called,
            op,
            value,
            asked,
            after_failure,
            elsewhere: false,
        };
        self.unanswered.push(request.clone());
        request
    }

    /// The model hears the answer; what must not be is remembered.
    fn answer(&mut self, request: &Request, outcome: Result<Option<bytes::BytesMut>, Error>) {
        self.answered += 1;
        self.unanswered.retain(|r| r.number != request.number);
        let error = outcome.as_ref().err().map(Error::kind);
        if let (Some(kind), Err(e)) = (error, &outcome) {
            self.errors.push(kind);
            let refused = kind == Kind::Unsupported && request.op.is_fast();
            if !refused && !self.excused.contains(&kind) {
                self.violation(format!("{:?} failed: {e}", request.op));
            }
        }
        if error.is_none() && request.after_failure && request.op.promises() {
            self.violation(format!("{:?} succeeded after a final failure", request.op));
        }
        match (&request.asked, &outcome) {
            (Asking::Change(asked), _) => {
                let outcome = match request.op.outcome(error) {
                    // What is fast depends on the layers; on those of before it was.
                    Outcome::Refused if request.elsewhere => Outcome::Failed,
                    outcome => outcome,
                };
                self.model.answer(asked, outcome);
            }
            (Asking::Flush(asked), Ok(_)) => self.model.flushed(*asked),
            (Asking::Flush(_), Err(_)) => {}
            (Asking::Read(asked), outcome) => {
                let Op::Read { sectors } = &request.op else {
                    return;
                };
                let bytes = outcome.as_ref().ok().and_then(|b| b.as_deref());
                if let Err(e) = self.model.was_read(*asked, sectors.clone(), bytes) {
                    self.violation(e);
                }
            }
        }
    }

    /// Whether what somebody beside the guest was told is no violation.
    pub fn excuse(&self, outcome: Result<(), Error>) -> Result<(), String> {
        match outcome {
            Err(e) if !self.excused.contains(&e.kind()) => Err(format!("beside the guest: {e}")),
            _ => Ok(()),
        }
    }

    fn violation(&mut self, message: String) {
        self.violation.get_or_insert(message);
    }
}

/// What a session needs to know about requests.
trait OpExt {
    fn is_fast(&self) -> bool;
    fn promises(&self) -> bool;
    fn outcome(&self, error: Option<Kind>) -> Outcome;
}

impl OpExt for Op {
    fn is_fast(&self) -> bool {
        matches!(
            self,
            Op::Zero {
                space: ZeroSpace::Fast,
                ..
            }
        )
    }

    /// Whether success says that something is durable.
    fn promises(&self) -> bool {
        matches!(
            self,
            Op::Flush | Op::Write { fua: true, .. } | Op::Zero { fua: true, .. }
        )
    }

    fn outcome(&self, error: Option<Kind>) -> Outcome {
        match error {
            Some(Kind::Unsupported) if self.is_fast() => Outcome::Refused,
            Some(_) => Outcome::Failed,
            None if self.promises() => Outcome::Durable,
            None => Outcome::Done,
        }
    }
}

fn bytes_of(sectors: &Range<usize>) -> (u64, u64) {
    (sectors.start as u64 * SECTOR, sectors.len() as u64 * SECTOR)
}

async fn carry_out<D: Device>(
    device: &D,
    request: &Request,
) -> Result<Option<bytes::BytesMut>, Error> {
    match &request.op {
        Op::Write { sectors, fua } => {
            let data = stamp::run(sectors.start as u64, sectors.len() as u64, request.value);
            device.write(bytes_of(sectors).0, data, *fua).await?;
        }
        Op::Zero {
            sectors,
            space,
            fua,
        } => {
            let (at, len) = bytes_of(sectors);
            let how = match space {
                ZeroSpace::Free => Zero::MayFree,
                ZeroSpace::Keep => Zero::Allocate,
                ZeroSpace::Fast => Zero::Fast,
            };
            device.zero(at, len, how, *fua).await?;
        }
        Op::Discard { sectors } => {
            let (at, len) = bytes_of(sectors);
            device.discard(at, len).await?;
        }
        Op::Read { sectors } => {
            let (at, len) = bytes_of(sectors);
            return device.read(at, buf::aligned(len as usize)).await.map(Some);
        }
        Op::Flush | Op::Reopen => device.flush().await?,
    }
    Ok(None)
}

async fn serve<D: Device>(device: Rc<D>, guest: Rc<RefCell<Guest>>, request: Request) {
    let outcome = carry_out(&*device, &request).await;
    guest.borrow_mut().answer(&request, outcome);
}

async fn work<D: Device>(device: Rc<D>, guest: Rc<RefCell<Guest>>) {
    loop {
        let request = {
            let mut guest = guest.borrow_mut();
            let Some(op) = guest.queue.pop_front() else {
                return;
            };
            guest.call(op)
        };
        serve(device.clone(), guest.clone(), request).await;
    }
}

/// What outlives a process: which files make the disk, and what the written one's guest was answered.
#[derive(Debug, Clone)]
pub struct Head {
    /// The written file's place among the files.
    pub top: usize,
    /// The words of its ledger.
    pub words: Arc<LocalWords>,
    /// Whether it is another one than at first.
    pub moved: bool,
    /// Its end has begun, so it need not say that it is in use.
    pub ending: bool,
}

/// What somebody needs who works on a disk beside its guest.
#[derive(Debug)]
pub struct Ground<D> {
    /// The disk.
    pub device: Rc<D>,
    /// The world.
    pub sim: Sim,
    /// What stands between the disk and its files.
    pub bench: Bench,
    /// What the guest knows.
    pub guest: Rc<RefCell<Guest>>,
    /// What outlives the process, to be changed.
    pub head: Rc<RefCell<Head>>,
}

/// One process that serves a disk.
pub struct Session<S: Subject> {
    exec: Exec,
    guest: Rc<RefCell<Guest>>,
    head: Rc<RefCell<Head>>,
    bench: Bench,
    cluster: usize,
    device: Option<Rc<S::Device>>,
    clock: u64,
}

/// Looks at a session between two steps.
pub type Hook<'a, S> = dyn FnMut(&Session<S>) -> Result<(), String> + 'a;

/// A hook that does not look.
pub fn blind<S: Subject>(_: &Session<S>) -> Result<(), String> {
    Ok(())
}

impl<S: Subject> Session<S> {
    /// A session over new files. Nothing is open yet.
    pub fn new(setup: &Setup, seed: u64) -> Self {
        Self::with_bench(setup, &Bench::default(), seed)
    }

    /// A session over new files whose operations and barriers break as `bench` says.
    pub fn with_bench(setup: &Setup, bench: &Bench, seed: u64) -> Self {
        let bench = Bench {
            raw_base: setup.raw_base,
            ..bench.clone()
        };
        let model = Model::new(setup.values.iter().copied());
        let head = Head {
            top: setup.files.len() - 1,
            words: words(setup.slots),
            moved: false,
            ending: false,
        };
        Self::over(
            Sim::of(setup.files.clone(), seed),
            bench,
            head,
            model,
            setup.cluster,
            seed,
        )
    }

    fn over(sim: Sim, bench: Bench, head: Head, model: Model, cluster: usize, seed: u64) -> Self {
        // Whoever comes next writes it.
        sim.seal(head.top, false);
        let clock = sim.clock();
        let guest = Guest {
            model,
            unanswered: Vec::new(),
            errors: Vec::new(),
            excused: vec![Kind::NoSpace],
            called: 0,
            answered: 0,
            queue: VecDeque::new(),
            next_value: FIRST_VALUE,
            violation: None,
            faults: bench.faults.clone(),
        };
        let guest = Rc::new(RefCell::new(guest));
        Self {
            exec: Exec::new(sim, seed),
            guest,
            head: Rc::new(RefCell::new(head)),
            bench,
            cluster,
            device: None,
            clock,
        }
    }

    /// Another process over the files of `sim`, with the same guest, whose words are `words`.
    /// Requests that are unanswered here can be sent again there ([`Session::resend`]).
    pub fn heir(&self, sim: Sim, words: Arc<LocalWords>, model: Model, seed: u64) -> Self {
        let head = Head {
            top: self.top(),
            words,
            moved: self.head.borrow().moved,
            ending: false,
        };
        let heir = Self::over(sim, self.bench.clone(), head, model, self.cluster, seed);
        {
            let (old, mut new) = (self.guest(), heir.guest_mut());
            new.next_value = old.next_value;
            new.called = old.called;
            new.excused.clone_from(&old.excused);
            new.unanswered.clone_from(&old.unanswered);
        }
        heir
    }

    /// From the next opening on, operations and barriers break as `bench` says.
    pub fn replace_bench(&mut self, bench: Bench) {
        self.guest_mut().faults = bench.faults.clone();
        self.bench = bench;
    }

    /// The world.
    pub fn sim(&self) -> &Sim {
        self.exec.sim()
    }

    /// The words of the ledger.
    pub fn words(&self) -> Arc<LocalWords> {
        self.head.borrow().words.clone()
    }

    /// What stands between the subject and its files.
    pub fn bench(&self) -> &Bench {
        &self.bench
    }

    /// What the guest knows.
    pub fn guest(&self) -> Ref<'_, Guest> {
        self.guest.borrow()
    }

    /// What the guest knows, to be changed.
    pub fn guest_mut(&self) -> RefMut<'_, Guest> {
        self.guest.borrow_mut()
    }

    /// Whether the disk was opened, and neither its close nor its top's end has begun.
    pub fn is_open(&self) -> bool {
        self.device.is_some() && !self.head.borrow().ending
    }

    /// Sectors of a cluster.
    pub fn cluster(&self) -> usize {
        self.cluster
    }

    /// The written file's place among the files.
    pub fn top(&self) -> usize {
        self.head.borrow().top
    }

    /// What a power cut leaves of the disk's files if the written one meets `fate`.
    pub fn crash(&self, fate: &Fate) -> Vec<(Pages, Rules)> {
        let top = self.top();
        let mut files = self.sim().crash(top, fate);
        files.truncate(top + 1);
        // It may have been sealed, but is the one that is written again.
        files[top].1.sealed = false;
        files
    }

    /// Adds a task beside the guest's requests; an open disk.
    pub fn beside<F: Future<Output = Result<(), String>> + 'static>(
        &mut self,
        task: impl FnOnce(Ground<S::Device>) -> F,
    ) {
        let ground = Ground {
            device: self.device.clone().expect("an open disk"),
            sim: self.sim().clone(),
            bench: self.bench.clone(),
            guest: self.guest.clone(),
            head: self.head.clone(),
        };
        let guest = self.guest.clone();
        let task = task(ground);
        self.exec.spawn(async move {
            if let Err(message) = task.await {
                guest.borrow_mut().violation(message);
            }
        });
    }

    /// Steps until `done`, showing every change of the world to `hook`.
    fn pump(&mut self, done: impl Fn() -> bool, hook: &mut Hook<'_, S>) -> Result<(), String> {
        loop {
            let step = self.exec.step();
            if let Some(message) = self.guest().violation.clone() {
                return Err(message);
            }
            if let Some(message) = self.sim().broken() {
                return Err(message);
            }
            let clock = self.sim().clock();
            if clock != self.clock {
                self.clock = clock;
                hook(self)?;
            }
            match step {
                _ if done() => return Ok(()),
                Step::Moved => {}
                Step::Done => return Ok(()),
                Step::Stuck => {
                    let waiting = &self.guest().unanswered;
                    return Err(format!(
                        "nothing can move any more; unanswered: {waiting:?}"
                    ));
                }
            }
        }
    }

    fn finish<T: 'static>(&mut self, slot: Slot<T>, hook: &mut Hook<'_, S>) -> Result<T, String> {
        self.pump(|| slot.is_full(), hook)?;
        slot.take()
            .ok_or_else(|| "a task ended without its output".into())
    }

    /// Waits until nothing of a predecessor can land any more.
    pub fn fence(&mut self, hook: &mut Hook<'_, S>) -> Result<(), String> {
        let stores = self.sim().stores();
        let slot = self.exec.start(async move {
            for store in &stores {
                store.settle().await;
            }
        });
        self.finish(slot, hook)
    }

    /// Opens the disk; an error of the subject is the inner one.
    pub fn try_open(&mut self, hook: &mut Hook<'_, S>) -> Result<Result<(), Error>, String> {
        let chain = self.bench.chain(self.sim(), self.top(), &self.words());
        let slot = self.exec.start(S::open(chain));
        Ok(self
            .finish(slot, hook)?
            .map(|device| self.device = Some(Rc::new(device))))
    }

    /// Opens the disk, which must work.
    pub fn open(&mut self, hook: &mut Hook<'_, S>) -> Result<(), String> {
        self.try_open(hook)?
            .map_err(|e| format!("does not open: {e}"))
    }

    /// Closes the disk; an error of the subject is the inner one. A close that succeeds is as good
    /// as a flush.
    pub fn try_close(&mut self, hook: &mut Hook<'_, S>) -> Result<Result<(), Error>, String> {
        let device = self.device.take().expect("an open disk");
        let asked = self.guest_mut().model.flush();
        let slot = self.exec.start(async move { S::close(&device).await });
        let outcome = self.finish(slot, hook)?;
        if outcome.is_ok() {
            self.guest_mut().model.flushed(asked);
            S::audit_closed(&self.sim().stores()[self.top()].pages())
                .map_err(|e| format!("after a close: {e}"))?;
        }
        Ok(outcome)
    }

    /// Closes the disk, which must work.
    pub fn close(&mut self, hook: &mut Hook<'_, S>) -> Result<(), String> {
        self.try_close(hook)?
            .map_err(|e| format!("does not close: {e}"))
    }

    /// Carries out `ops`, up to `depth` at once, from an open disk to an open disk.
    pub fn run(&mut self, ops: Vec<Op>, depth: u64, hook: &mut Hook<'_, S>) -> Result<(), String> {
        for part in ops.split(|op| *op == Op::Reopen).enumerate() {
            let (n, ops) = part;
            if n > 0 {
                self.close(hook)?;
                self.open(hook)?;
            }
            self.enqueue(ops);
            self.work(depth);
            self.pump(|| false, hook)?;
        }
        Ok(())
    }

    fn enqueue(&self, ops: &[Op]) {
        self.guest_mut().queue.extend(ops.iter().cloned());
    }

    fn work(&mut self, depth: u64) {
        let device = self.device.clone().expect("an open disk");
        for _ in 0..depth {
            self.exec.spawn(work(device.clone(), self.guest.clone()));
        }
    }

    /// Sends unanswered requests again, all at once, with `ops` behind them.
    pub fn resend(&mut self, ops: &[Op], hook: &mut Hook<'_, S>) -> Result<(), String> {
        let device = self.device.clone().expect("an open disk");
        let requests = self.guest().unanswered.clone();
        let elsewhere = self.head.borrow().moved;
        for request in requests {
            let request = Request {
                elsewhere,
                ..request
            };
            self.exec
                .spawn(serve(device.clone(), self.guest.clone(), request));
        }
        self.enqueue(ops);
        self.work(1);
        self.pump(|| false, hook)
    }

    /// Everything the guest can read, while nothing runs and without the dice.
    pub fn read_all(&self) -> Result<Vec<u8>, String> {
        let device = self.device.as_ref().expect("an open disk");
        self.sim().instant(true);
        let len = self.guest().model.len() * SECTOR as usize;
        let bytes = now(device.read(0, buf::aligned(len)));
        self.sim().instant(false);
        bytes
            .map(|b| b.to_vec())
            .map_err(|e| format!("reading everything: {e}"))
    }

    /// A whole life of the disk, from a closed one to a closed one.
    pub fn live(&mut self, ops: Vec<Op>, depth: u64, hook: &mut Hook<'_, S>) -> Result<(), String> {
        self.open(hook)?;
        self.run(ops, depth, hook)?;
        self.check_all()?;
        self.close(hook)
    }

    /// Reads everything and judges it.
    pub fn check_all(&self) -> Result<(), String> {
        let bytes = self.read_all()?;
        let guest = self.guest();
        guest.model.is_read(0..guest.model.len(), &bytes)
    }

    /// From now on operations land as `order` says, or as dice say again.
    pub fn follow(&mut self, order: Option<Rc<RefCell<Order>>>) {
        self.exec.follow(order);
    }

    /// Lets everything land that nobody waits for.
    pub fn land_orphans(&self, seed: u64) {
        let mut rng = ploop_formats::testkit::rng::Rng::new(seed);
        while self.sim().land(&mut rng) {}
    }
}
