//! Power cuts: the crash campaign over the engine, and what it takes to believe it.
//!
//! `PLOOP_CRASH_STATES` says how many crash states are tried.

use crate::campaign::{SEED, caught, caught_in_engine, count, holds};
use ploop::testkit::report::Tally;
use ploop::testkit::subject::Bench;
use ploop::testkit::toy::ToySubject;
use ploop::testkit::{Engine, crash, mutate};
use ploop_formats::planted::{Bug, plant};
use ploop_formats::store::mutate::{Break, Covers, Mutation};

#[test]
fn after_any_power_cut_the_disk_opens_and_holds_what_was_flushed() {
    let states = count("PLOOP_CRASH_STATES", 20_000);
    holds(crash::campaign::<Engine>(SEED, states));
}

#[test]
fn one_seed_gives_one_run() {
    let run = |seed| {
        let mut tally = Tally::default();
        crash::run::<Engine>(seed, &mut tally, &Bench::default()).expect("a good run");
        (tally.states, tally.requests)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn a_toy_that_is_plainly_right_is_never_accused() {
    holds(crash::campaign::<ToySubject>(SEED, 20_000));
}

#[test]
fn a_toy_that_writes_its_index_before_its_data_is_caught() {
    let _planted = plant(Bug::IndexBeforeData);
    caught(20_000, |seed, tally| {
        crash::run::<ToySubject>(seed, tally, &Bench::default())
    });
}

#[test]
fn a_toy_that_lacks_its_data_barrier_is_caught() {
    for how in [Break::Drop, Break::Swap] {
        let bench = Bench::default();
        bench.mutator.set(Some(Mutation {
            covers: Some(Covers::Data),
            how,
            only: None,
        }));
        caught(20_000, |seed, tally| {
            crash::run::<ToySubject>(seed, tally, &bench)
        });
    }
}

#[test]
fn every_barrier_is_noticed_when_it_is_gone_or_stepped_over() {
    let mutations = mutate::mutations();
    assert_eq!(mutations.len(), 21);
    for mutation in mutations {
        let catch = mutate::barrier::<Engine>(mutation, SEED, 200_000);
        println!("{catch}");
        assert!(catch.by.is_some(), "{catch}");
    }
}

#[test]
fn an_index_that_is_durable_before_its_data_is_caught() {
    caught_in_engine(Bug::IndexBeforeData);
}

#[test]
fn a_cluster_taken_from_a_length_that_is_not_durable_is_caught() {
    caught_in_engine(Bug::FreshWithoutDurableLength);
}

#[test]
fn a_cluster_freed_during_a_pass_and_used_when_it_ends_is_caught() {
    caught_in_engine(Bug::FreeReusableAtPassEnd);
}

#[test]
fn a_page_image_with_entries_later_than_its_pass_is_caught() {
    caught_in_engine(Bug::LaterEntriesInPageImage);
}

#[test]
fn a_freed_cluster_that_is_used_before_a_flush_is_caught() {
    caught_in_engine(Bug::FreeReusableBeforeSync);
}

#[test]
fn a_flush_that_joins_a_pass_which_has_frozen_is_caught() {
    caught_in_engine(Bug::FlushJoinsFrozenPass);
}

#[test]
fn a_durable_write_whose_index_is_not_durable_is_caught() {
    caught_in_engine(Bug::FuaIgnoresIndex);
}
