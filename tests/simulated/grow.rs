//! Growing: a disk gets a larger size while its guest writes.
//!
//! `PLOOP_GROW_STATES` says how many power cuts and deaths are tried.

use crate::campaign::{SEED, caught_in_engine, count, holds};
use bytes::Bytes;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::stack::{AnyLayer, NewSize};
use ploop::testkit::grows;
use ploop_formats::ledger::Ledger;
use ploop_formats::planted::Bug;
use ploop_formats::ploop::check::check;
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::raw::Raw;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Kind, buf};
use std::pin::{Pin, pin};
use std::task::{Context, Waker};

#[test]
fn a_disk_grows_under_its_guest_and_whatever_ends_it_nothing_is_lost() {
    holds(grows::campaign(SEED, count("PLOOP_GROW_STATES", 20_000)));
}

#[test]
fn a_table_that_is_cleared_before_its_clusters_are_elsewhere_is_caught() {
    caught_in_engine(Bug::TableBeforeMoves);
}

#[test]
fn a_free_cluster_that_counts_as_never_written_once_a_disk_has_grown_is_caught() {
    caught_in_engine(Bug::FreshAfterGrowth);
}

const CLUSTER: u64 = 32 << 10;

/// A delta of so many clusters that holds nothing.
fn blank(clusters: u64) -> MemStore {
    let delta = Delta {
        version: Version::V2,
        cluster: CLUSTER,
        clusters: vec![None; clusters as usize],
        leaks: 1,
        in_use: false,
    };
    MemStore::from_pages(delta.make(&mut Rng::new(1)))
}

fn written(store: &MemStore, ledger: &Ledger) -> AnyLayer<MemStore> {
    AnyLayer::Ploop(now(Ploop::open_write(store.clone(), ledger.clone())).unwrap())
}

fn read(disk: &Disk<MemStore>, at: u64, len: u64) -> Vec<u8> {
    now(disk.read(at, buf::aligned(len as usize)))
        .unwrap()
        .to_vec()
}

#[test]
fn what_is_behind_the_end_of_a_shorter_layer_is_zeros_also_within_a_cluster_and_when_copied() {
    const END: u64 = 2 * CLUSTER + 5 * 512;
    for align in [1, 512, 4096] {
        for middle in [false, true] {
            let mut flat = Pages::new(END);
            flat.fill(0, END, 7);
            let size = ClusterSize::new(CLUSTER).unwrap();
            let raw = Raw::open_read(MemStore::from_pages(flat), size).unwrap();
            let (top, ledger) = (blank(4).aligned_to(align), Ledger::local());
            let mut layers = vec![AnyLayer::Raw(raw)];
            if middle {
                // Three layers have a map of what is below.
                layers.push(AnyLayer::Ploop(now(Ploop::open_read(blank(3))).unwrap()));
            }
            layers.push(written(&top, &ledger));
            let disk = Disk::new(layers, false).unwrap();
            now(now(disk.hold()).resize(NewSize::Larger(9000 * CLUSTER), ledger.clone())).unwrap();
            assert_eq!(disk.size(), 9000 * CLUSTER);
            let judge = |written: u64| {
                let found = read(&disk, 0, 4 * CLUSTER);
                let (seven, rest) = found.split_at(END as usize);
                assert!(seven.iter().all(|b| *b == 7), "align {align}");
                let zeros = rest.len() as u64 - written;
                assert!(
                    rest[..zeros as usize].iter().all(|b| *b == 0),
                    "align {align}"
                );
                assert!(
                    rest[zeros as usize..].iter().all(|b| *b == 9),
                    "align {align}"
                );
            };
            judge(0);
            // The cluster that the base ends in is copied, and one behind it.
            let bytes = |len: u64| Bytes::from(vec![9; len as usize]);
            now(disk.write(3 * CLUSTER - 512, bytes(512), false)).unwrap();
            now(disk.write(3 * CLUSTER, bytes(CLUSTER), false)).unwrap();
            judge(CLUSTER + 512);
            now(disk.write(8999 * CLUSTER + 512, bytes(512), false)).unwrap();
            let found = read(&disk, 8999 * CLUSTER, 2048);
            let nines = |n: usize| (512..1024).contains(&n);
            assert!(
                found
                    .iter()
                    .enumerate()
                    .all(|(n, b)| *b == if nines(n) { 9 } else { 0 })
            );
            now(disk.close()).unwrap();
        }
    }
}

#[test]
fn a_disk_that_cannot_grow_goes_on_as_it_was() {
    let (store, ledger) = (blank(8), Ledger::local());
    let disk = Disk::new(vec![written(&store, &ledger)], false).unwrap();
    let smaller = now(now(disk.hold()).resize(NewSize::Larger(7 * CLUSTER), ledger.clone()));
    assert_eq!(smaller.unwrap_err().kind(), Kind::Invalid);
    now(disk.write(0, Bytes::from(vec![1; 512]), false)).unwrap();
    now(now(disk.hold()).resize(NewSize::Larger(8 * CLUSTER), ledger)).unwrap();
    assert_eq!(disk.size(), 8 * CLUSTER);
    now(disk.close()).unwrap();
}

/// Whether something has begun, and has to wait.
fn waits(work: Pin<&mut impl Future>) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    work.poll(&mut context).is_pending()
}

#[test]
fn a_disk_that_shrinks_refuses_what_waited_for_it_behind_its_end_and_shows_zeros_when_it_grows() {
    for version in [Version::V1, Version::V2] {
        let delta = Delta {
            version,
            cluster: CLUSTER,
            clusters: vec![None; 9000],
            leaks: 1,
            in_use: false,
        };
        let (store, ledger) = (
            MemStore::from_pages(delta.make(&mut Rng::new(1))),
            Ledger::local(),
        );
        let disk = Disk::new(vec![written(&store, &ledger)], false).unwrap();
        for at in [0, 9, 10, 8999] {
            now(disk.write(at * CLUSTER, Bytes::from(vec![7; 512]), false)).unwrap();
        }
        let hold = now(disk.hold());
        let mut late = pin!(disk.write(8998 * CLUSTER, Bytes::from(vec![8; 4096]), true));
        let mut read = pin!(disk.read(8999 * CLUSTER, buf::aligned(512)));
        let mut inside = pin!(disk.write(9 * CLUSTER + 512, Bytes::from(vec![9; 512]), true));
        assert!(waits(late.as_mut()) && waits(read.as_mut()) && waits(inside.as_mut()));
        now(hold.resize(NewSize::Smaller(9 * CLUSTER + 1), ledger.clone())).unwrap();
        let (late, read) = (now(late), now(read));
        now(inside).unwrap();
        assert_eq!(late.unwrap_err().kind(), Kind::Invalid);
        assert_eq!(read.unwrap_err().kind(), Kind::Invalid);
        assert_eq!(disk.size(), 10 * CLUSTER);
        now(now(disk.hold()).resize(NewSize::Larger(9000 * CLUSTER), ledger)).unwrap();
        for (at, byte) in [(0, 7), (9, 7), (10, 0), (8998, 0), (8999, 0)] {
            let found = now(disk.read(at * CLUSTER, buf::aligned(512))).unwrap();
            assert!(found.iter().all(|b| *b == byte), "{at}");
        }
        let found = now(disk.read(9 * CLUSTER + 512, buf::aligned(512))).unwrap();
        assert!(found.iter().all(|b| *b == 9));
        now(disk.close()).unwrap();
        assert!(now(check(&store)).unwrap().is_clean());
    }
}

#[test]
fn a_disk_does_not_get_smaller_than_what_is_below_and_a_lower_layer_that_is_small_stays() {
    let (lower, ledger) = (blank(8), Ledger::local());
    let (store, ledger) = (blank(8), ledger);
    let base = AnyLayer::Ploop(now(Ploop::open_read(lower)).unwrap());
    let disk = Disk::new(vec![base, written(&store, &ledger)], false).unwrap();
    let resize = |to| now(now(disk.hold()).resize(to, ledger.clone()));
    let refused = resize(NewSize::Smaller(7 * CLUSTER)).unwrap_err();
    assert!(refused.to_string().contains("--flatten"), "{refused}");
    assert_eq!(disk.size(), 8 * CLUSTER);
    resize(NewSize::Larger(20 * CLUSTER)).unwrap();
    now(disk.write(19 * CLUSTER, Bytes::from(vec![1; 512]), false)).unwrap();
    resize(NewSize::Smaller(8 * CLUSTER)).unwrap();
    assert_eq!(disk.size(), 8 * CLUSTER);
    let larger = resize(NewSize::Smaller(9 * CLUSTER)).unwrap_err();
    assert_eq!(larger.kind(), Kind::Invalid);
    now(disk.close()).unwrap();
}
