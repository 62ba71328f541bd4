//! The n-th operation fails, for every n: the guest is told, and nothing else is lost.
//!
//! `PLOOP_FAULT_RUNS` says how many faulty runs are tried.

use crate::campaign::{SEED, caught_in_engine, count, holds};
use ploop::testkit::toy::ToySubject;
use ploop::testkit::{Engine, faults};
use ploop_formats::planted::Bug;

#[test]
fn whatever_fails_the_guest_is_told_and_the_image_stays_sound() {
    holds(faults::campaign::<Engine>(
        SEED,
        count("PLOOP_FAULT_RUNS", 4_000),
    ));
}

#[test]
fn a_cluster_whose_write_failed_and_which_is_used_again_at_once_is_caught() {
    caught_in_engine(Bug::ReuseQuarantined);
}

#[test]
fn a_toy_that_is_plainly_right_is_never_accused() {
    holds(faults::campaign::<ToySubject>(SEED, 2_000));
}
