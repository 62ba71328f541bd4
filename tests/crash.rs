//! Power cuts: the crash campaign over the engine, and what it takes to believe it.
//!
//! `PLOOP_CRASH_STATES` says how many crash states are tried.

mod campaign;

use campaign::{bench, caught, count, holds};
use ploop::testkit::toy::ToySubject;
use ploop::testkit::{Engine, crash, mutate};
use ploop_formats::planted::{Bug, plant};
use ploop_formats::store::mutate::{Covers, Mutation};

#[test]
fn after_any_power_cut_the_disk_opens_and_holds_what_was_flushed() {
    holds(crash::campaign::<Engine>(1, count("PLOOP_CRASH_STATES", 20_000)));
}

#[test]
fn a_toy_that_is_plainly_right_is_never_accused() {
    holds(crash::campaign::<ToySubject>(1, count("PLOOP_CRASH_STATES", 20_000) / 10));
}

#[test]
fn a_toy_that_writes_its_index_before_its_data_is_caught() {
    let _planted = plant(Bug::IndexBeforeData);
    caught(&["crash"], 5_000, |seed, tally| crash::run::<ToySubject>(seed, tally, &bench(None)));
}

#[test]
fn a_toy_that_lacks_a_barrier_is_caught() {
    let data = Covers { data: true, ..Covers::default() };
    for mutation in [Mutation::Drop(data), Mutation::Swap(data)] {
        let bench = bench(Some(mutation));
        caught(&["crash"], 5_000, |seed, tally| crash::run::<ToySubject>(seed, tally, &bench));
    }
}

#[test]
fn every_barrier_of_the_engine_is_missed_when_it_is_gone_or_stepped_over() {
    let barriers = mutate::barriers::<Engine>(1);
    assert!(barriers.len() >= 4, "{barriers:?}");
    for covers in barriers {
        for mutation in [Mutation::Drop(covers), Mutation::Swap(covers)] {
            let catch = mutate::barrier::<Engine>(mutation, 1, 100_000);
            assert!(catch.by.is_some(), "{catch}");
        }
    }
}
