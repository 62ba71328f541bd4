//! Deaths of the process: whatever a guest was answered is there for its successor.
//!
//! `PLOOP_DEATH_STATES` says how many deaths are tried.

use crate::campaign::{SEED, caught, caught_in_engine, count, holds};
use ploop::testkit::subject::Bench;
use ploop::testkit::toy::ToySubject;
use ploop::testkit::{Engine, death};
use ploop_formats::planted::{Bug, plant};

#[test]
fn after_any_death_every_answered_request_is_visible_to_the_successor() {
    let states = count("PLOOP_DEATH_STATES", 5_000);
    holds(death::campaign::<Engine>(SEED, states));
}

#[test]
fn a_toy_that_is_plainly_right_is_never_accused() {
    holds(death::campaign::<ToySubject>(SEED, 5_000));
}

#[test]
fn a_toy_without_a_ledger_or_a_fence_is_caught() {
    for bug in [Bug::LedgerAfterAnswer, Bug::NoFence] {
        let _planted = plant(bug);
        caught(20_000, |seed, tally| {
            death::run::<ToySubject>(seed, tally, &Bench::default())
        });
    }
}

#[test]
fn a_mapping_published_before_its_data_is_caught() {
    caught_in_engine(Bug::PublishBeforeData);
}

#[test]
fn an_answer_that_is_not_in_the_ledger_is_caught() {
    caught_in_engine(Bug::LedgerAfterAnswer);
}

#[test]
fn a_successor_that_does_not_wait_for_the_fence_is_caught() {
    caught_in_engine(Bug::NoFence);
}

#[test]
fn an_image_marked_clean_before_its_index_is_durable_is_caught() {
    caught_in_engine(Bug::CleanMarkBeforeSync);
}

#[test]
fn a_file_cut_before_the_ledger_is_laid_over_its_index_is_caught() {
    caught_in_engine(Bug::CutBeforeOverlay);
}
