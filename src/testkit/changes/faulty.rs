//! Changes one of whose operations fails: on a file or on a name, once or from then on.
//!
//! The verb says so, or it is done. Either way the disk is the old one or the new one, for the
//! next command and for one after a power cut.

use super::{Case, Chance, KINDS, Past, begin};
use crate::testkit::report::Tally;
use crate::testkit::trees::Formats;
use ploop_formats::Kind;
use ploop_formats::store::fault::{Faults, Rule};
use ploop_formats::store::mutate::Mutator;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;

/// A verb that still fails at this operation is not going to end.
const OPERATIONS_MAX: u64 = 5000;

/// Every operation of one verb fails, one in each try.
pub fn run(seed: u64, tally: &mut Tally, formats: Formats, kind: &str) -> Result<(), String> {
    debug_assert!(KINDS.contains(&kind), "{kind}");
    let mut rng = Rng::new(seed);
    let past = *rng.pick(&[Past::Settled, Past::Death]);
    let Some(mut case) = begin(&mut rng, formats, kind, past) else {
        return Ok(());
    };
    let error = *rng.pick(&[Kind::Io, Kind::NoSpace]);
    let forever = rng.one_in(2);
    for after in 0..OPERATIONS_MAX {
        let rule = Rule {
            only: None,
            after,
            error,
            forever,
        };
        tally.requests += 1;
        let failed = once(&mut case, rule);
        tally.states += std::mem::take(&mut case.states);
        if !failed.map_err(|e| case.tell(&format!("{rule:?}: {e}")))? {
            return Ok(());
        }
    }
    Err(format!("more than {OPERATIONS_MAX} operations"))
}

/// One try; whether anything failed.
fn once(case: &mut Case, rule: Rule) -> Result<bool, String> {
    let faults = Faults::new();
    faults.set(Some(rule));
    let world = case.folder.fork(case.rng.next());
    world.sim().instant(true);
    let chance = Chance::new(&mut case.rng);
    let folder = world.through(Mutator::new(), faults.clone());
    let outcome = now(case.verb.carry_out(folder, chance));
    let failed = faults.failed() > 0;
    let done = match outcome {
        Ok(()) => true,
        Err(e) if !failed => return Err(format!("nothing failed, but: {e}")),
        Err(e) if e.kind() == rule.error || e.kind() == Kind::Io => false,
        Err(e) => return Err(format!("it showed as {:?}: {e}", e.kind())),
    };
    let wreck = world.crash(&mut case.rng);
    case.judge(&world, done)?;
    case.examine(wreck, done)
        .map_err(|e| format!("and then a power cut: {e}"))?;
    Ok(failed)
}
