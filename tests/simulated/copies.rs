//! Copies that are kept by what a tracker says, and deaths of the process that marks.
//!
//! `PLOOP_COPY_STATES` says how many deaths are tried.

use crate::campaign::{SEED, caught, count, holds};
use ploop::testkit::copies::{self, Keeper};
use ploop_formats::planted::{Bug, plant};

#[test]
fn what_a_copy_lacks_is_known_after_any_death() {
    let states = count("PLOOP_COPY_STATES", 5_000);
    holds(copies::campaign(SEED, states));
}

#[test]
fn a_set_that_is_sealed_while_writes_hold_it_is_caught() {
    let keeper = Keeper {
        waits: false,
        ..Keeper::WHOLE
    };
    println!(
        "{}",
        caught(50_000, |seed, tally| copies::run(seed, tally, keeper))
    );
}

#[test]
fn a_set_that_was_being_sealed_and_is_not_joined_is_caught() {
    let keeper = Keeper {
        joins: false,
        ..Keeper::WHOLE
    };
    println!(
        "{}",
        caught(50_000, |seed, tally| copies::run(seed, tally, keeper))
    );
}

#[test]
fn a_write_that_is_marked_only_when_it_is_over_is_caught() {
    let _planted = plant(Bug::MarkOnlyAfter);
    println!(
        "{}",
        caught(50_000, |seed, tally| copies::run(
            seed,
            tally,
            Keeper::WHOLE
        ))
    );
}
