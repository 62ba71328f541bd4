//! Chains of qcow2 images, written: the campaigns of power cuts, deaths, errors and long sequences, over
//! parents, with snapshots, compressed clusters and growing refcount tables.
//!
//! `PLOOP_CRASH_STATES`, `PLOOP_DEATH_STATES`, `PLOOP_FAULT_RUNS` and `PLOOP_MODEL_SEQUENCES` say how much
//! is tried.

mod campaign;

use campaign::{SEED, count, holds};
use ploop::testkit::{Chains, crash, death, faults, models};

#[test]
fn long_sequences_read_as_the_model_says() {
    let sequences = count("PLOOP_MODEL_SEQUENCES", 200);
    holds(models::campaign::<Chains>(SEED, sequences));
}

#[test]
fn after_any_power_cut_the_disk_opens_and_holds_what_was_flushed() {
    let states = count("PLOOP_CRASH_STATES", 20_000);
    holds(crash::campaign::<Chains>(SEED, states));
}

#[test]
fn after_any_death_every_answered_request_is_visible_to_the_successor() {
    let states = count("PLOOP_DEATH_STATES", 5_000);
    holds(death::campaign::<Chains>(SEED, states));
}

#[test]
fn errors_of_the_storage_lose_nothing_that_was_answered() {
    let runs = count("PLOOP_FAULT_RUNS", 2_000);
    holds(faults::campaign::<Chains>(SEED, runs));
}
