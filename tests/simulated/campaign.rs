//! What the tests of campaigns share: counts, verdicts, planted bugs.

use ploop::testkit::report::{Report, Tally};
use ploop::testkit::{Engine, mutate};
use ploop_formats::planted::Bug;

/// Seed of the first run of every suite. `torture --seed` replays any other.
pub const SEED: u64 = 1;

/// The count that `variable` asks for, or the default of a developer's run.
pub fn count(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|e| panic!("{variable}={text}: {e}")),
        Err(_) => default,
    }
}

/// Prints the closing line of a campaign and demands that nothing was broken.
pub fn holds(report: Report) {
    println!("COUNT: {report}");
    assert!(report.failure.is_none(), "{report}");
}

/// Demands that a run of the campaign finds something within `states` checks; what it took.
pub fn caught(states: u64, mut run: impl FnMut(u64, &mut Tally) -> Result<(), String>) -> Report {
    let report = Report::campaign("planted", SEED, states, &mut run);
    assert!(report.failure.is_some(), "{report}: missed");
    report
}

/// Demands that the campaign that is there for `bug` catches it in the engine.
pub fn caught_in_engine(bug: Bug) {
    let catch = mutate::bug::<Engine>(bug, SEED, 400_000);
    println!("{catch}");
    assert!(catch.by.is_some(), "{catch}");
}
