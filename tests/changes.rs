//! Changes of a disk's tree under power cuts: the campaign, and what it takes to believe it.
//!
//! `PLOOP_CHANGE_STATES` says how many states are tried.

mod campaign;

use campaign::{SEED, caught, count, holds};
use ploop::testkit::changes;
use ploop_formats::store::mutate::{Break, Mutation, Mutator};

#[test]
fn after_any_cut_of_any_change_the_disk_is_the_old_one_or_the_new_one() {
    holds(changes::campaign(
        SEED,
        count("PLOOP_CHANGE_STATES", 20_000),
    ));
}

/// Barriers of each kind of change, and those that protect nothing here: the first, which is about
/// names that a dead process left, when all names are durable; and, when the top was closed or raw,
/// the mark of the recovery, and a pass in which nothing is pending.
const BARRIERS: [(&str, u64, &[u64]); 4] = [
    ("create", 10, &[0, 5, 7]),
    ("switch", 7, &[0]),
    ("remove", 15, &[0]),
    ("clone", 5, &[0]),
];

#[test]
fn every_barrier_of_every_change_is_missed_when_it_is_gone() {
    for (kind, count, idle) in BARRIERS {
        for number in (0..count).filter(|n| !idle.contains(n)) {
            let mutator = Mutator::new();
            let mutation = Mutation {
                covers: None,
                how: Break::Drop,
                only: Some(number),
            };
            caught(200_000, |seed, tally| {
                mutator.set(Some(mutation));
                changes::run(seed, tally, kind, &mutator)
            });
        }
    }
}
