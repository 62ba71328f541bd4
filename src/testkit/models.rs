//! The model campaign: long random sequences at every depth against the model, without accidents.

use super::report::{Report, Tally};
use super::session::{Session, blind};
use super::subject::{Bench, Subject, Wish};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::workload::Shape;

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
    let shape = Shape {
        sectors: setup.values.len(),
        cluster: setup.cluster,
        ops: OPS,
        reopens: 8,
    };
    let ops = shape.make(&mut rng);
    let depth = rng.range(1, 32);
    let outcome = (|| {
        session.open(&mut blind)?;
        session.run(ops, depth, &mut blind)?;
        session.check_all()?;
        session.close(&mut blind)?;
        session.open(&mut blind)?;
        session.check_all()?;
        session.close(&mut blind)
    })();
    tally.states += 1;
    tally.requests += session.guest().called;
    outcome
}
