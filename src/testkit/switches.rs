//! The switch campaign: a disk gets layer upon layer while its guest writes, and the power goes or
//! the process dies at any moment.
//!
//! Beside the guest runs a climber, who holds the disk, seals its top, puts a fresh file above it,
//! changes its mind, or meets an error. Which files make the disk is what it last committed. Sealed
//! files never change again, nobody is answered while the disk is held, and an old stack is gone
//! with its last request.

use super::crash::Effort;
use super::judge::{Judge, Verdict};
use super::report::Tally;
use super::session::{Ground, Head, Session};
use super::subject::{Bench, BenchStore, Setup, Subject, Wish, plain, words};
use super::{Engine, Report};
use crate::device::Device;
use crate::disk::Disk;
use crate::hold::Hold;
use crate::stack::{AnyLayer, Stack};
use ploop_formats::ledger::{Ledger, LocalWords, Words};
use ploop_formats::ploop::Ploop;
use ploop_formats::store::fault::{Faults, Operation, Rule};
use ploop_formats::store::sim::Rules;
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Error, Kind, Result};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 3,
    max_clusters: 6,
};
const EFFORT: Effort = Effort {
    per_point: 2,
    live_in: 800,
    cycles: 1,
};
/// Layers at most.
const DEPTH_MAX: usize = 12;
/// Times that the climber holds the disk in one life.
const CLIMBS: u64 = 8;
/// Turns that others have between two steps of the climber.
const PATIENCE: u64 = 24;

/// A subject whose disk can get another file on top while requests run.
#[allow(async_fn_in_trait, reason = "everything runs on one thread")]
pub trait Stacked: Subject {
    /// Holds the disk and does something with it, mostly that.
    async fn climb(ground: &Ground<Self::Device>, rng: &mut Rng) -> Verdict;

    /// Does what no guest asks for.
    async fn look(device: &Self::Device) -> Result<()>;
}

/// Tries `states` power cuts and deaths or more.
pub fn campaign<S: Stacked>(seed: u64, states: u64) -> Report {
    Report::campaign("switch", seed, states, |seed, tally| {
        run::<S>(seed, tally, &Bench::default())
    })
}

/// One run; barriers break as `bench` says.
pub fn run<S: Stacked>(seed: u64, tally: &mut Tally, bench: &Bench) -> Verdict {
    let mut rng = Rng::new(seed);
    let mut setup = S::setup(&mut rng, &WISH);
    if rng.one_in(3) {
        // Writers wait for flushes, and who holds the disk waits for the writers.
        setup.slots = rng.range(1, 4) as usize;
    }
    let faults = Faults::new();
    let bench = Bench {
        faults: faults.clone(),
        ..bench.clone()
    };
    let mut session = Session::<S>::with_bench(&setup, &bench, rng.next());
    let mut judge = Judge::new(&setup, &mut rng, EFFORT);
    let outcome = match rng.one_in(4) {
        true => judge.fail(&mut session, &setup, &faults, &mut rng),
        false => judge.live(&mut session, &setup, &mut rng),
    };
    judge.count(&session, tally);
    outcome
}

impl Judge {
    /// Two lives of the disk; the second finds what the first has piled up.
    fn live<S: Stacked>(
        &mut self,
        session: &mut Session<S>,
        setup: &Setup,
        rng: &mut Rng,
    ) -> Verdict {
        for _ in 0..2 {
            session.open(&mut |s: &Session<S>| self.look(s))?;
            self.work(session, setup, rng)?;
            session.check_all()?;
            session.close(&mut |s: &Session<S>| self.look(s))?;
        }
        Ok(())
    }

    /// A life in which one operation on the first top fails, or one and all later ones.
    fn fail<S: Stacked>(
        &mut self,
        session: &mut Session<S>,
        setup: &Setup,
        faults: &Faults,
        rng: &mut Rng,
    ) -> Verdict {
        session.open(&mut |s: &Session<S>| self.look(s))?;
        let rule = Rule {
            only: rng.one_in(2).then(|| *rng.pick(&Operation::ALL)),
            after: rng.below(60),
            error: *rng.pick(&[Kind::Io, Kind::NoSpace]),
            forever: rng.one_in(2),
        };
        let excused = vec![rule.error, Kind::Io, Kind::Poisoned, Kind::NoSpace];
        session.guest_mut().excused = excused;
        faults.set(Some(rule));
        self.kills = false;
        let worked = self.work(session, setup, rng);
        faults.set(None);
        worked.map_err(|e| format!("{rule:?}: {e}"))?;
        session.check_all()?;
        self.cuts.cut(session, 0)
    }

    /// Guest and climber, side by side.
    fn work<S: Stacked>(
        &mut self,
        session: &mut Session<S>,
        setup: &Setup,
        rng: &mut Rng,
    ) -> Verdict {
        let ops = setup.shape(rng.range(20, 80) as usize, 0).make(rng);
        let depth = rng.range(1, 8);
        let mut dice = Rng::new(rng.next());
        session.beside(async move |ground| {
            for _ in 0..dice.range(1, CLIMBS) {
                pause(&mut dice).await;
                S::climb(&ground, &mut dice).await?;
            }
            Ok(())
        });
        let mut dice = Rng::new(rng.next());
        session.beside(async move |ground| {
            for _ in 0..dice.below(4) {
                pause(&mut dice).await;
                let seen = S::look(&*ground.device).await;
                ground.guest.borrow().excuse(seen)?;
            }
            Ok(())
        });
        session.run(ops, depth, &mut |s: &Session<S>| self.look(s))
    }
}

/// Lets others go first, as often as dice say.
async fn pause(rng: &mut Rng) {
    pause_for(rng, PATIENCE).await;
}

/// The same, with fewer turns than `most`.
pub(super) async fn pause_for(rng: &mut Rng, most: u64) {
    for _ in 0..rng.below(most) {
        let mut turn = false;
        poll_fn(|cx| {
            cx.waker().wake_by_ref();
            match std::mem::replace(&mut turn, true) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }
}

/// Who holds the disk of the engine.
struct Climber<'a> {
    ground: &'a Ground<Disk<BenchStore>>,
    rng: &'a mut Rng,
    /// The file that was the top when the climb began.
    below: usize,
    /// Answers that the guest had when the disk was held.
    answered: u64,
}

impl Stacked for Engine {
    async fn climb(ground: &Ground<Disk<BenchStore>>, rng: &mut Rng) -> Verdict {
        if ground.device.stack().depth() >= DEPTH_MAX {
            return Ok(());
        }
        let below = ground.head.borrow().top;
        let mut climber = Climber {
            ground,
            rng,
            below,
            answered: 0,
        };
        climber.climb().await
    }

    async fn look(disk: &Disk<BenchStore>) -> Result<()> {
        disk.extents(0, disk.size(), 8).await?;
        disk.write_back().await
    }
}

impl Climber<'_> {
    async fn climb(&mut self) -> Verdict {
        let disk = &*self.ground.device;
        let slots = self.ground.head.borrow().words.count() - 1;
        let (file, words) = (self.fresh_file(), words(slots));
        let top = self.open_fresh(file, &words).await.map_err(text)?;
        if self.rng.one_in(2) {
            let flushed = disk.flush().await;
            self.ground.guest.borrow().excuse(flushed)?;
        }
        let hold = disk.hold().await;
        self.answered = self.ground.guest.borrow().answered;
        if self.rng.one_in(6) {
            pause(self.rng).await;
            return self.alone();
        }
        self.ground.head.borrow_mut().ending = true;
        let asked = self.ground.guest.borrow_mut().model.flush();
        let sealed = hold.seal().await;
        if sealed.is_ok() {
            self.ground.guest.borrow_mut().model.flushed(asked);
            self.ground.sim.seal(self.below, true);
            pause(self.rng).await;
        }
        if sealed.is_err() || self.rng.one_in(6) {
            let resumed = self.resume(hold, sealed).await;
            return self.ground.guest.borrow().excuse(resumed);
        }
        let store = self.ground.sim.stores().swap_remove(self.below);
        Engine::audit_closed(&store.pages())?;
        let old = Ploop::open_read(plain(store)).await.map_err(text)?;
        *self.ground.head.borrow_mut() = Head {
            top: file,
            words,
            moved: true,
            ending: false,
        };
        pause(self.rng).await;
        self.alone()?;
        self.switch(hold, vec![old, top]).map_err(text)
    }

    /// Whether nobody was answered since the disk is held.
    fn alone(&self) -> Verdict {
        match self.ground.guest.borrow().answered - self.answered {
            0 => Ok(()),
            n => Err(format!(
                "{n} requests were answered while the disk was held"
            )),
        }
    }

    /// A file to put on top: a new one, or one that was not needed the last time.
    fn fresh_file(&mut self) -> usize {
        let spare = self.below + 1;
        if spare < self.ground.sim.stores().len() {
            return spare;
        }
        let stack = self.ground.device.stack();
        let AnyLayer::Ploop(below) = stack.top() else {
            unreachable!("the engine's top is a delta");
        };
        let header = below.header();
        // A disk may grow with a layer.
        let clusters = header.entries as usize + usize::from(self.rng.one_in(4));
        let delta = Delta {
            version: header.version,
            cluster: header.cluster.bytes(),
            clusters: vec![None; clusters],
            leaks: self.rng.below(3) as u32,
            in_use: false,
        };
        let rng = &mut *self.rng;
        let pages = delta.make(rng);
        let rules = Rules {
            align: self.ground.sim.stores()[self.below].rules().align,
            metadata_end: header.cluster.bytes(),
            fresh_zero: !rng.one_in(4),
            max_len: match rng.one_in(4) {
                true => pages.len() + rng.range(1, clusters as u64) * header.cluster.bytes(),
                false => u64::MAX,
            },
            sealed: false,
        };
        self.ground.sim.file(pages, rules);
        spare
    }

    /// Opens the file that will be the top. Planned failures concern the first top only: what
    /// happens to a file that is not needed in the end is nobody's loss.
    async fn open_fresh(&self, file: usize, words: &Arc<LocalWords>) -> Result<Ploop<BenchStore>> {
        let bench = Bench {
            faults: Faults::new(),
            ..self.ground.bench.clone()
        };
        let store = bench.written(&self.ground.sim, file);
        Ploop::open_write(store, Ledger::new(words.clone())).await
    }

    /// Goes on with the top that was there.
    async fn resume(&self, hold: Hold<'_, BenchStore>, sealed: Result<()>) -> Result<()> {
        let ground = self.ground;
        if !hold.is_sealed() {
            ground.head.borrow_mut().ending = false;
            return sealed;
        }
        if let Err(e) = sealed
            && e.kind() != Kind::NoSpace
        {
            return Err(e);
        }
        ground.sim.seal(self.below, false);
        let words = ground.head.borrow().words.clone();
        let store = ground.bench.written(&ground.sim, self.below);
        let top = Ploop::open_write(store, Ledger::new(words)).await?;
        ground.head.borrow_mut().ending = false;
        self.switch(hold, vec![top])
    }

    /// Switches to `upper` over the layers below the old top, which is gone with all that it had.
    fn switch(&self, hold: Hold<'_, BenchStore>, upper: Vec<Ploop<BenchStore>>) -> Result<()> {
        let disk = &*self.ground.device;
        let old = disk.stack();
        let lower = old.layers().iter().take(old.depth() - 1).cloned();
        let upper = upper.into_iter().map(|l| Arc::new(AnyLayer::Ploop(l)));
        let stack = Stack::new(lower.chain(upper))?;
        let gone = Arc::downgrade(&old);
        drop(old);
        hold.switch(stack)?;
        match gone.upgrade() {
            None => Ok(()),
            Some(_) => Err(Error::invalid("somebody keeps the old stack")),
        }
    }
}

fn text(e: Error) -> String {
    e.to_string()
}
