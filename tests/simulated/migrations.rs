//! Disks on their way from one folder to another, cut anywhere.
//!
//! `PLOOP_MIGRATION_STATES` says how many states are tried, of disks of either kind.

use crate::campaign::{SEED, count, holds};
use ploop::testkit::migrations;
use ploop::testkit::report::Report;
use ploop::testkit::trees::Formats;
use ploop_formats::store::mutate::{Break, Mutation, Mutator};

#[test]
fn a_disk_that_moves_is_on_one_side_and_whole_whatever_is_cut() {
    let states = count("PLOOP_MIGRATION_STATES", 5_000);
    for formats in [Formats::Ploop, Formats::Mixed] {
        holds(migrations::campaign(formats, SEED, states));
    }
}

#[test]
fn a_target_that_was_given_up_never_takes_the_word_of_a_later_one() {
    for seed in SEED..SEED + 40 {
        migrations::changed_its_mind(seed).unwrap();
    }
}

/// Barriers that one disk's way has at least.
const BARRIERS: u64 = 33;
/// Of those, what another covers: the close of a source that was closed, the first name of a delta.
const SPARE: usize = 10;

#[test]
fn each_barrier_of_a_migration_is_missed_when_it_is_not_there() {
    let missed = |number: u64| {
        let mutation = Mutation {
            covers: None,
            how: Break::Drop,
            only: Some(number),
        };
        let found = Report::campaign("planted", SEED, 4_000, |seed, tally| {
            let mutator = Mutator::new();
            mutator.set(Some(mutation));
            migrations::run(seed, tally, Formats::Ploop, &mutator)
        });
        found.failure.map(|failure| failure.message)
    };
    let missed: Vec<String> = (0..BARRIERS).filter_map(missed).collect();
    println!("{} of {BARRIERS} barriers are missed", missed.len());
    assert!(missed.len() + SPARE >= BARRIERS as usize, "{missed:#?}");
    // Both ends of the rule.
    for broken in ["both sides can be used", "nobody has the disk"] {
        assert!(
            missed.iter().any(|message| message.contains(broken)),
            "{broken}: {missed:#?}"
        );
    }
}
