//! Changes of a disk's tree under power cuts: the campaign, and what it takes to believe it.
//!
//! `PLOOP_CHANGE_STATES` and `PLOOP_QCOW2_CHANGE_STATES` say how many states are tried.

use crate::campaign::{SEED, caught, count, holds};
use ploop::testkit::changes::{self, Past};
use ploop::testkit::report::{Report, Tally};
use ploop::testkit::trees::Formats;
use ploop_formats::store::mutate::{Break, Mutation, Mutator};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

#[test]
fn after_any_cut_of_any_change_the_disk_is_the_old_one_or_the_new_one() {
    holds(changes::campaign(
        Formats::Ploop,
        SEED,
        count("PLOOP_CHANGE_STATES", 20_000),
    ));
}

#[test]
fn so_it_is_with_qcow2_images_among_its_deltas() {
    holds(changes::campaign(
        Formats::Mixed,
        SEED,
        count("PLOOP_QCOW2_CHANGE_STATES", 20_000),
    ));
}

#[test]
fn an_error_while_a_disk_gets_smaller_leaves_the_larger_one_or_the_smaller_one() {
    let shrinking =
        |seed, tally: &mut Tally| changes::faulty::run(seed, tally, Formats::Ploop, "shrink");
    holds(Report::campaign("shrinking", SEED, 5_000, shrinking));
}

/// Changes that write to a qcow2 image, or make one.
const QCOW2: [&str; 5] = ["create", "switch", "merge", "merge-top", "fold"];

#[test]
fn all_barriers_of_a_change_that_writes_qcow2_images_are_missed() {
    for kind in QCOW2 {
        let mutator = Mutator::new();
        let mutation = Mutation {
            covers: None,
            how: Break::Drop,
            only: None,
        };
        let report = caught(50_000, |seed, tally| {
            mutator.set(Some(mutation));
            let what = (Formats::Mixed, kind);
            changes::run(seed, tally, what, Past::Settled, &mutator)
        });
        println!("{kind} without barriers: {} states", report.states);
    }
}

/// Barriers of each kind of change on a disk that nobody left anything of, and those that protect
/// nothing there: in a "create", when the top was closed or raw, the mark of the recovery, and a
/// pass in which nothing is pending; in a "mark" and at the beginning of a "merge" the names of a
/// change that has made none but its record; before the latter, settling once more; in a
/// "merge-top" that, and all that closes a top whose file goes; in a "fold" the same, but for the
/// settling; in a "grow" and a "shrink" the mark of a top that was closed, and in the latter what
/// is cleared behind the end, at which only other tools look, and its being closed; in a "flatten"
/// the closing of the old top, and that of a new image that says nothing new. Of "convert", whose
/// tables are more than a sector there, see `conversions`.
const BARRIERS: [(&str, u64, &[u64]); 13] = [
    ("settle", 1, &[]),
    ("create", 10, &[5, 7]),
    ("switch", 7, &[]),
    ("drop", 5, &[]),
    ("mark", 4, &[2]),
    ("merge", 14, &[1, 3]),
    ("merge-top", 17, &[1, 2, 3, 4]),
    ("drop-top", 5, &[]),
    ("fold", 16, &[1, 4, 7]),
    ("clone", 5, &[]),
    ("grow", 12, &[1]),
    ("shrink", 9, &[1, 3, 4]),
    ("flatten", 15, &[1, 2, 3, 10]),
];

/// Two kinds are tried side by side: each takes its time.
#[test]
fn every_barrier_of_every_change_is_missed_when_it_is_gone() {
    let next = AtomicUsize::new(0);
    let tries = || {
        while let Some((kind, count, idle)) = BARRIERS.get(next.fetch_add(1, Ordering::Relaxed)) {
            (0..*count)
                .filter(|n| !idle.contains(n))
                .for_each(|number| assert_missed(kind, number));
        }
    };
    thread::scope(|scope| {
        scope.spawn(tries);
        scope.spawn(tries);
    });
}

fn assert_missed(kind: &str, number: u64) {
    // The first is about names that an earlier process left.
    let past = match number {
        0 => Past::Death,
        _ => Past::Settled,
    };
    let mutator = Mutator::new();
    let mutation = Mutation {
        covers: None,
        how: Break::Drop,
        only: Some(number),
    };
    let report = caught(200_000, |seed, tally| {
        mutator.set(Some(mutation));
        changes::run(seed, tally, (Formats::Ploop, kind), past, &mutator)
    });
    println!("{kind} without barrier {number}: {} states", report.states);
}
