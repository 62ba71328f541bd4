//! The crash campaign: the power goes after any store operation, again and again.
//!
//! After every operation of a run some of the possible crash states are made. In each the disk must
//! open without help, its file must be sound, and every sector must hold a value that the model
//! allows. Now and then a state is lived in: its recovery is itself cut anywhere, what was read is
//! what must be read from then on, and a short new workload is cut as well.

use super::report::{Report, Tally};
use super::session::{Session, blind};
use super::subject::{Bench, Setup, Subject, Wish, words};
use crate::device::Device;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Fate, Rules, Sim};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::model::Model;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::workload::Shape;
use ploop_formats::units::SECTOR;
use ploop_formats::{Kind, buf};

/// How hard a crash campaign looks.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// States tried after one operation.
    pub per_point: usize,
    /// One state in this many is lived in.
    pub live_in: u64,
    /// How many lives one after another.
    pub cycles: u32,
}

const EFFORT: Effort = Effort {
    per_point: 6,
    live_in: 800,
    cycles: 3,
};
const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 4,
    max_clusters: 8,
};

/// A run of the campaign and its dice.
pub struct Cuts {
    rng: Rng,
    effort: Effort,
    bench: Bench,
    slots: usize,
    /// What it did so far.
    pub tally: Tally,
}

/// Tries `states` crash states or more.
pub fn campaign<S: Subject>(seed: u64, states: u64) -> Report {
    Report::campaign("crash", seed, states, |seed, tally| {
        run::<S>(seed, tally, &Bench::default())
    })
}

/// One run; barriers and operations break as `bench` says, recovery stays whole.
pub fn run<S: Subject>(seed: u64, tally: &mut Tally, bench: &Bench) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let setup = S::setup(&mut rng, &WISH);
    let mut session = Session::<S>::with_bench(&setup, bench, rng.next());
    let shape = setup.shape(rng.range(6, 40) as usize, 30);
    let depth = *rng.pick(&[1, 2, 4, 8]);
    let ops = shape.make(&mut rng);
    let mut cuts = Cuts::new(&setup, rng.next(), EFFORT);
    let outcome = session.live(ops, depth, &mut |session: &Session<S>| cuts.cut(session, 0));
    tally.states += cuts.tally.states;
    tally.requests += cuts.tally.requests + session.guest().called;
    outcome
}

impl Cuts {
    /// Cuts for sessions over `setup`.
    pub fn new(setup: &Setup, seed: u64, effort: Effort) -> Self {
        let bench = Bench {
            raw_base: setup.raw_base,
            ..Bench::default()
        };
        Self {
            rng: Rng::new(seed),
            effort,
            bench,
            slots: setup.slots,
            tally: Tally::default(),
        }
    }

    /// Cuts the power of `session` now, in several ways. `life` counts lives.
    pub fn cut<S: Subject>(&mut self, session: &Session<S>, life: u32) -> Result<(), String> {
        let guest = session.guest();
        self.cut_against(session, &guest.model, life)
    }

    fn cut_against<S: Subject>(
        &mut self,
        session: &Session<S>,
        model: &Model,
        life: u32,
    ) -> Result<(), String> {
        let max = if life == 0 { self.effort.per_point } else { 1 };
        let fates = session.sim().some_fates(session.top(), max, &mut self.rng);
        for fate in fates {
            let files = session.crash(&fate);
            let named = |e: String| format!("after {fate:?} in life {life}: {e}");
            self.examine(session, files.clone(), model).map_err(named)?;
            if life < self.effort.cycles && self.rng.one_in(self.effort.live_in >> (2 * life)) {
                self.live_on(session, files, model, life + 1)
                    .map_err(|e| self.lived(&fate, e))?;
            }
        }
        Ok(())
    }

    fn lived(&self, fate: &Fate, message: String) -> String {
        format!("lived on after {fate:?}: {message}")
    }

    /// Opens one crash state and judges what is there.
    fn examine<S: Subject>(
        &mut self,
        session: &Session<S>,
        files: Vec<(Pages, Rules)>,
        model: &Model,
    ) -> Result<(), String> {
        self.tally.states += 1;
        if session.is_open() {
            S::audit_open(&files[session.top()].0)?;
        }
        let sim = Sim::of(files, self.rng.next());
        sim.instant(true);
        let chain = self.bench.chain(&sim, session.top(), &words(self.slots));
        let device = now(S::open(chain)).map_err(|e| format!("does not open: {e}"))?;
        S::audit(&sim.stores()[session.top()].pages())?;
        let cluster = session.cluster();
        for first in (0..model.len()).step_by(cluster) {
            let sectors = first..(first + cluster).min(model.len());
            if !sectors.clone().any(|n| model.is_touched(n)) && !self.rng.one_in(16) {
                continue;
            }
            let buf = buf::aligned(sectors.len() * SECTOR as usize);
            let bytes = now(device.read(first as u64 * SECTOR, buf))
                .map_err(|e| format!("reading sector {first}: {e}"))?;
            model.survived(sectors, &bytes)?;
        }
        sim.broken().map_or(Ok(()), Err)
    }

    /// Recovers from one crash state under further cuts, then works and is cut again.
    fn live_on<S: Subject>(
        &mut self,
        old: &Session<S>,
        files: Vec<(Pages, Rules)>,
        model: &Model,
        life: u32,
    ) -> Result<(), String> {
        let seed = self.rng.next();
        let mut session = old.heir(Sim::of(files, seed), words(self.slots), model.clone(), seed);
        session.replace_bench(self.bench.clone());
        {
            let mut guest = session.guest_mut();
            guest.unanswered.clear();
            guest.excused = vec![Kind::NoSpace];
        }
        session.open(&mut |s: &Session<S>| self.cut_against(s, model, life))?;
        let bytes = session.read_all()?;
        model.survived(0..model.len(), &bytes)?;
        session.guest_mut().model = Model::recovered(&bytes);
        let shape = Shape {
            sectors: model.len(),
            cluster: old.cluster(),
            ops: self.rng.range(2, 8) as usize,
            reopens: 50,
        };
        let ops = shape.make(&mut self.rng);
        let depth = self.rng.range(1, 4);
        session.run(ops, depth, &mut |s: &Session<S>| self.cut(s, life))?;
        session.check_all()?;
        session.close(&mut blind)
    }
}
