//! Chains of qcow2 images, written: the campaigns of power cuts, deaths, errors and long sequences, over
//! parents, with snapshots, compressed clusters and growing refcount tables.
//!
//! `PLOOP_CRASH_STATES`, `PLOOP_DEATH_STATES`, `PLOOP_CHAIN_FAULT_RUNS` and `PLOOP_MODEL_SEQUENCES` say how
//! much is tried.

use crate::campaign::{SEED, count, holds};
use bytes::BytesMut;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::stack::{AnyLayer, Stack};
use ploop::testkit::session::{Session, blind};
use ploop::testkit::subject::{Bench, Subject, Wish};
use ploop::testkit::{Chains, OddChains, crash, death, faults, models, mutate, orders};
use ploop_formats::Kind;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::planted::{Bug, plant};
use ploop_formats::qcow2::Qcow2;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::qcow2::Image;
use ploop_formats::testkit::rng::Rng;
use std::sync::Arc;

/// Disks whose requests are tried in pairs.
const SETUPS: u64 = 4;

#[test]
fn long_sequences_read_as_the_model_says() {
    let sequences = count("PLOOP_MODEL_SEQUENCES", 200);
    holds(models::campaign::<Chains>(SEED, sequences / 2));
    holds(models::campaign::<OddChains>(SEED, sequences / 2));
}

#[test]
fn two_requests_give_what_they_may_in_every_order_of_completion() {
    for tried in [
        orders::campaign::<Chains>(0..SETUPS),
        orders::campaign::<OddChains>(0..SETUPS),
    ] {
        let tried = tried.unwrap();
        println!("COUNT: {tried:?}");
        assert_eq!(tried.whole, tried.pairs);
    }
    let _planted = plant(Bug::CopyUpUnderShared);
    let missed = orders::campaign::<Chains>(0..SETUPS);
    assert!(
        missed.is_err(),
        "requests that are beside each other are not noticed"
    );
}

#[test]
fn after_any_power_cut_the_disk_opens_and_holds_what_was_flushed() {
    let states = count("PLOOP_CRASH_STATES", 20_000);
    holds(crash::campaign::<Chains>(SEED, states / 2));
    holds(crash::campaign::<OddChains>(SEED, states / 2));
}

#[test]
fn after_any_death_every_answered_request_is_visible_to_the_successor() {
    let states = count("PLOOP_DEATH_STATES", 5_000);
    holds(death::campaign::<Chains>(SEED, states / 2));
    holds(death::campaign::<OddChains>(SEED, states / 2));
}

#[test]
fn errors_of_the_storage_lose_nothing_that_was_answered() {
    let runs = count("PLOOP_CHAIN_FAULT_RUNS", 2_000);
    holds(faults::campaign::<Chains>(SEED, runs / 2));
    holds(faults::campaign::<OddChains>(SEED, runs / 2));
}

#[test]
fn a_table_that_may_be_named_is_not_written_before_its_data() {
    // One faulty run of 60,000 shows it: this seed has it.
    let catch = mutate::bug_in_chains(Bug::RewriteNamedTable, 1154, 2_000);
    println!("{catch}");
    assert!(catch.by.is_some(), "{catch}");
}

#[test]
fn every_planted_bug_is_caught() {
    let mut missed = Vec::new();
    for bug in Bug::OF_QCOW2 {
        let catch = mutate::bug_in_chains(bug, SEED, 100_000);
        println!("{catch}");
        if catch.by.is_none() {
            missed.push(bug);
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}

/// What a guest would read from the snapshot of an image.
fn snapshot(pages: &Pages) -> Option<Vec<u8>> {
    let image = now(Qcow2::open_read(MemStore::from_pages(pages.clone()), None)).unwrap();
    let list = now(image.snapshots()).unwrap();
    let image = image.at_snapshot(list.first()?).unwrap();
    let len = image.geometry().size as usize;
    let stack = Stack::of_chain(vec![Arc::new(AnyLayer::Qcow2(Box::new(image)))]).unwrap();
    Some(
        now(stack.read(0, BytesMut::zeroed(len), 1))
            .unwrap()
            .to_vec(),
    )
}

/// Works on disks whose tops have snapshots; how many of them held what they had.
fn snapshots_that_hold<S: Subject>(runs: u64) -> (u64, u64) {
    let wish = Wish {
        min_layers: 1,
        max_layers: 3,
        max_clusters: 0,
    };
    let (mut held, mut all) = (0, 0);
    for seed in 0..runs {
        let mut rng = Rng::new(seed);
        let setup = S::setup(&mut rng, &wish);
        let Some(before) = snapshot(&setup.files.last().unwrap().0) else {
            continue;
        };
        let mut session = Session::<S>::with_bench(&setup, &Bench::default(), seed);
        let ops = setup.shape(60, 8).make(&mut rng);
        session.live(ops, 4, &mut blind).unwrap();
        let after = snapshot(&session.sim().stores()[session.top()].pages());
        all += 1;
        held += u64::from(after.as_ref() == Some(&before));
    }
    (held, all)
}

#[test]
fn what_a_snapshot_holds_is_not_written_to() {
    for (held, all) in [
        snapshots_that_hold::<Chains>(400),
        snapshots_that_hold::<OddChains>(400),
    ] {
        println!("COUNT: {all} snapshots");
        assert!(all > 50 && held == all, "{held} of {all}");
    }
    let _planted = plant(Bug::WriteToShared);
    let (held, all) = snapshots_that_hold::<Chains>(400);
    assert!(held < all, "a write to what is shared is not noticed");
}

#[test]
fn a_disk_that_has_failed_takes_no_write() {
    let pages = Image::of_dice(&mut Rng::new(1), 90, &mut 0).make(&mut Rng::new(1));
    let image = now(Qcow2::open_write(
        MemStore::from_pages(pages),
        None,
        Ledger::local(),
    ))
    .unwrap();
    image.poison();
    let stack = Stack::of_chain(vec![Arc::new(AnyLayer::Qcow2(Box::new(image)))]).unwrap();
    let disk = Disk::over(stack, false);
    let written = now(disk.write(0, vec![1; 512].into(), false));
    assert_eq!(written.unwrap_err().kind(), Kind::Poisoned);
    assert!(disk.stack().is_poisoned());
}
