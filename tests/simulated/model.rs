//! Random sequences at every queue depth against the model.
//!
//! `PLOOP_MODEL_SEQUENCES` says how many sequences of 200 requests are tried.

use crate::campaign::{SEED, caught_in_engine, count, holds};
use ploop::testkit::toy::ToySubject;
use ploop::testkit::{Engine, models, orders};
use ploop_formats::planted::Bug;

#[test]
fn every_read_holds_what_some_order_of_the_requests_would_give() {
    let sequences = count("PLOOP_MODEL_SEQUENCES", 200);
    holds(models::campaign::<Engine>(SEED, sequences));
}

#[test]
fn two_requests_give_what_they_may_in_every_order_of_completion() {
    let tried = orders::campaign::<Engine>(0..6).unwrap();
    println!("COUNT: {tried:?}");
    assert_eq!(tried.whole, tried.pairs);
}

#[test]
fn a_toy_that_is_plainly_right_is_never_accused() {
    holds(models::campaign::<ToySubject>(SEED, 200));
}

#[test]
fn a_reused_cluster_that_still_holds_old_bytes_is_caught() {
    caught_in_engine(Bug::FreshForReused);
}

#[test]
fn a_copy_up_beside_other_writes_to_its_cluster_is_caught() {
    caught_in_engine(Bug::CopyUpUnderShared);
}

#[test]
fn a_discard_that_lets_a_lower_layer_shine_through_is_caught() {
    caught_in_engine(Bug::DiscardExposesParent);
}
