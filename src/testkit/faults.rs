//! The fault campaign: the n-th operation fails, for every n until a run has no failure.
//!
//! Whatever fails: the guest is told, with the right error; nothing it reads is wrong; nothing
//! promises durability after a failed flush; the file is sound and opens after a power cut; and
//! when a full host has space again, writes work.

use super::crash::{Cuts, Effort};
use super::report::{Report, Tally};
use super::session::{Session, blind};
use super::subject::{Bench, Setup, Subject, Wish};
use ploop_formats::Kind;
use ploop_formats::store::fault::{Faults, Operation, Rule};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::workload::Op;

const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 3,
    max_clusters: 6,
};
const EFFORT: Effort = Effort {
    per_point: 4,
    live_in: 16,
    cycles: 1,
};
/// A run that still fails at this operation is not going to end.
const OPERATIONS_MAX: u64 = 5000;

/// Tries `runs` faulty runs or more.
pub fn campaign<S: Subject>(seed: u64, runs: u64) -> Report {
    Report::campaign("faults", seed, runs, run::<S>)
}

/// Everything that can fail in one workload.
pub fn run<S: Subject>(seed: u64, tally: &mut Tally) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let setup = S::setup(&mut rng, &WISH);
    let shape = setup.shape(rng.range(8, 24) as usize, 60);
    let (ops, depth) = (shape.make(&mut rng), rng.range(1, 6));
    let load = Load {
        setup,
        ops,
        depth,
        seed: rng.next(),
    };
    for only in [None].into_iter().chain(Operation::ALL.map(Some)) {
        for error in [Kind::Io, Kind::NoSpace] {
            let senseless = matches!(
                (only, error),
                (Some(Operation::Read), Kind::NoSpace) | (Some(Operation::Room), Kind::Io)
            );
            if senseless {
                continue;
            }
            for forever in [false, true] {
                load.until_clean::<S>(only, error, forever, tally)?;
            }
        }
    }
    Ok(())
}

struct Load {
    setup: Setup,
    ops: Vec<Op>,
    depth: u64,
    seed: u64,
}

impl Load {
    fn until_clean<S: Subject>(
        &self,
        only: Option<Operation>,
        error: Kind,
        forever: bool,
        tally: &mut Tally,
    ) -> Result<(), String> {
        for after in 0..OPERATIONS_MAX {
            let rule = Rule {
                only,
                after,
                error,
                forever,
            };
            tally.states += 1;
            let failed = self
                .once::<S>(rule, tally)
                .map_err(|e| format!("{rule:?}: {e}"))?;
            if !failed {
                return Ok(());
            }
        }
        Err(format!("more than {OPERATIONS_MAX} operations"))
    }

    /// One run under `rule`; whether anything failed.
    fn once<S: Subject>(&self, rule: Rule, tally: &mut Tally) -> Result<bool, String> {
        let faults = Faults::new();
        faults.set(Some(rule));
        let bench = Bench {
            faults: faults.clone(),
            ..Bench::default()
        };
        let mut session = Session::<S>::with_bench(&self.setup, &bench, self.seed);
        session.guest_mut().excused = vec![rule.error, Kind::Io, Kind::Poisoned, Kind::NoSpace];
        let alive = self.work(&mut session)?;
        let failed = faults.failed() > 0;
        check_errors(&session, rule, &faults)?;
        faults.set(None);
        if alive {
            self.afterwards(&mut session, rule, &faults)?;
        }
        tally.requests += session.guest().called;
        let mut cuts = Cuts::new(&self.setup, self.seed, EFFORT);
        cuts.cut(&session, 0)
            .map_err(|e| format!("and then a power cut: {e}"))?;
        Ok(failed)
    }

    /// Carries the workload out as far as openings and closings work; whether the disk is open.
    fn work<S: Subject>(&self, session: &mut Session<S>) -> Result<bool, String> {
        let mut parts = self.ops.split(|op| *op == Op::Reopen).peekable();
        while let Some(ops) = parts.next() {
            if let Err(e) = session.try_open(&mut blind)? {
                session.guest_mut().errors.push(e.kind());
                return Ok(false);
            }
            session.run(ops.to_vec(), self.depth, &mut blind)?;
            if parts.peek().is_none() {
                return Ok(true);
            }
            if let Err(e) = session.try_close(&mut blind)? {
                session.guest_mut().errors.push(e.kind());
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Nothing fails any more: reads are right, and a disk that was only full works again.
    fn afterwards<S: Subject>(
        &self,
        session: &mut Session<S>,
        rule: Rule,
        faults: &Faults,
    ) -> Result<(), String> {
        session.check_all()?;
        let full = rule.error == Kind::NoSpace && !faults.flush_failed();
        if !full {
            return session.run(vec![Op::Flush, Op::Flush], 1, &mut blind);
        }
        session.guest_mut().excused = Vec::new();
        if self.setup.is_roomy() {
            let len = session.guest().model.len();
            let rewrite = Op::Write {
                sectors: 0..len,
                fua: false,
            };
            session
                .run(vec![rewrite, Op::Flush], 1, &mut blind)
                .map_err(|e| format!("with space again: {e}"))?;
            session.check_all()?;
        }
        session.close(&mut blind)
    }
}

/// Whether errors reached the guest as what they are.
fn check_errors<S: Subject>(
    session: &Session<S>,
    rule: Rule,
    faults: &Faults,
) -> Result<(), String> {
    let guest = session.guest();
    let full = rule.error == Kind::NoSpace && !faults.flush_failed();
    match guest
        .errors
        .iter()
        .find(|k| full && **k != Kind::NoSpace && **k != Kind::Unsupported)
    {
        Some(kind) => Err(format!("a full host showed as {kind:?}")),
        None => Ok(()),
    }
}
