//! The model campaign: long random sequences at every depth against the model, without accidents.

use super::report::{Report, Tally};
use super::session::{Session, blind};
use super::subject::{Bench, Subject, Wish};
use ploop_formats::testkit::rng::Rng;

const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 4,
    max_clusters: 16,
};
/// Requests in one sequence.
const OPS: usize = 200;

/// Tries `sequences` sequences.
pub fn campaign<S: Subject>(seed: u64, sequences: u64) -> Report {
    Report::campaign("model", seed, sequences, |seed, tally| {
        run::<S>(seed, tally, &Bench::default())
    })
}

/// One sequence.
pub fn run<S: Subject>(seed: u64, tally: &mut Tally, bench: &Bench) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let setup = S::setup(&mut rng, &WISH);
    let mut session = Session::<S>::with_bench(&setup, bench, rng.next());
    let shape = setup.shape(OPS, 8);
    let ops = shape.make(&mut rng);
    let depth = rng.range(1, 32);
    let lived = session.live(ops, depth, &mut blind);
    let outcome = lived.and_then(|()| session.live(Vec::new(), 1, &mut blind));
    tally.states += 1;
    tally.requests += session.guest().called;
    outcome
}
