//! Switches: an open disk gets other layers while requests run.
//!
//! `PLOOP_SWITCH_STATES` says how many power cuts and deaths are tried.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod campaign;

use campaign::{SEED, caught_in_engine, count, holds};
use ploop::testkit::{Engine, switches};
use ploop_formats::planted::Bug;

#[test]
fn layer_upon_layer_while_the_guest_writes_and_whatever_ends_it_nothing_is_lost() {
    let states = count("PLOOP_SWITCH_STATES", 20_000);
    holds(switches::campaign::<Engine>(SEED, states));
}

#[test]
fn a_switch_from_a_top_that_was_not_sealed_is_caught() {
    caught_in_engine(Bug::SwitchWithoutSeal);
}

#[test]
fn a_flush_that_runs_while_the_disk_is_held_is_caught() {
    caught_in_engine(Bug::HoldWithoutFlushes);
}

#[test]
fn a_request_on_the_stack_of_before_its_admission_is_caught() {
    caught_in_engine(Bug::StackBeforeAdmission);
}
