//! The death campaign: the process dies at any moment, and its guest lives on.
//!
//! A successor gets the files, the ledger's words and every unanswered request, in any order.
//! Operations of the dead process land late, until the successor's fence. Whatever a guest was
//! answered must be there, flushed or not. Successors die too, and the power may go afterwards.

use super::crash::{Cuts, Effort};
use super::report::{Report, Tally};
use super::session::Session;
use super::subject::{Bench, Setup, Subject, Wish, copy_words};
use ploop_formats::planted::{self, Bug};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::workload::Shape;

const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 4,
    max_clusters: 6,
};
const EFFORT: Effort = Effort {
    per_point: 2,
    live_in: 400,
    cycles: 1,
};
/// A death at one operation in so many.
const DEATH_IN: u64 = 4;
/// Deaths one after another.
const GENERATIONS: u32 = 3;

/// A run of the campaign and its dice.
pub struct Deaths {
    rng: Rng,
    cuts: Cuts,
    /// Deaths so far.
    pub states: u64,
}

/// Tries `states` deaths or more.
pub fn campaign<S: Subject>(seed: u64, states: u64) -> Report {
    Report::campaign("worker-death", seed, states, |seed, tally| {
        run::<S>(seed, tally, &Bench::default())
    })
}

/// One run; barriers and operations break as `bench` says.
pub fn run<S: Subject>(seed: u64, tally: &mut Tally, bench: &Bench) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let setup = S::setup(&mut rng, &WISH);
    let mut session = Session::<S>::with_bench(&setup, bench, rng.next());
    let shape = setup.shape(rng.range(6, 40) as usize, 30);
    let ops = shape.make(&mut rng);
    let depth = *rng.pick(&[1, 2, 4, 8, 16]);
    let mut deaths = Deaths::new(&setup, rng.next());
    let outcome = session.live(ops, depth, &mut |session: &Session<S>| {
        deaths.maybe(session, 0)
    });
    tally.states += deaths.states;
    tally.requests += session.guest().called;
    outcome
}

impl Deaths {
    /// Deaths of sessions over `setup`.
    pub fn new(setup: &Setup, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        Self {
            cuts: Cuts::new(setup, rng.next(), EFFORT),
            rng,
            states: 0,
        }
    }

    /// Lets the process die now, if dice say so. `generation` counts deaths.
    pub fn maybe<S: Subject>(
        &mut self,
        session: &Session<S>,
        generation: u32,
    ) -> Result<(), String> {
        if generation < GENERATIONS && self.rng.one_in(DEATH_IN << (4 * generation)) {
            return self
                .die(session, generation + 1)
                .map_err(|e| format!("after death {}: {e}", generation + 1));
        }
        Ok(())
    }

    /// What a successor finds if the process dies now.
    fn die<S: Subject>(&mut self, dead: &Session<S>, generation: u32) -> Result<(), String> {
        self.states += 1;
        let seed = self.rng.next();
        let (words, model) = (copy_words(&dead.words()), dead.guest().model.clone());
        let mut heir = dead.heir(dead.sim().fork(seed), words, model, seed);
        let shape = Shape {
            sectors: heir.guest().model.len(),
            cluster: heir.cluster(),
            ops: self.rng.below(6) as usize,
            reopens: 0,
        };
        let ops = shape.make(&mut self.rng);
        let mut hook = |session: &Session<S>| self.maybe(session, generation);
        if !planted::is(Bug::NoFence) {
            heir.fence(&mut hook)?;
        }
        heir.open(&mut hook)?;
        heir.resend(&ops, &mut hook)?;
        heir.check_all()?;
        heir.land_orphans(seed);
        heir.check_all()?;
        if self.rng.one_in(4) {
            self.cuts
                .cut(&heir, 0)
                .map_err(|e| format!("and then a power cut: {e}"))?;
        }
        if self.rng.one_in(2) {
            heir.close(&mut |session: &Session<S>| self.maybe(session, generation))?;
        }
        Ok(())
    }
}
