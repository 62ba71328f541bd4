//! Shrinking a delta: the power goes at every operation, its barrier is taken away and missed.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod sizing;

use ploop_formats::Kind;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::check;
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::raw::Raw;
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::Break;
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use sizing::{CLUSTER, Case, assert_missed, blank, byte_of, campaign, entries, opened, write};
use std::collections::BTreeSet;

/// Sizes before and after, in clusters: within a table cluster, across one and across several.
fn sizes(rng: &mut Rng, cluster: u64) -> (u64, u64) {
    let full = entries(cluster, 1);
    match rng.below(5) {
        0 => (rng.range(3, 12), rng.range(1, 2)),
        1 => (full + rng.range(1, 9), full - rng.below(3)),
        2 => (entries(cluster, 2) + rng.below(3), rng.range(1, 9)),
        // The end is on the edge of a table page.
        3 => (full - rng.below(9), (4096 - 64) / 4),
        _ => (entries(cluster, rng.range(2, 6)) + 1, full - rng.below(3)),
    }
}

/// Something may be at the beginning of an image, on both sides of the end that it is to have, and at
/// its end.
fn case(seed: u64) -> Case {
    let places = |from: u64, to: u64| {
        let near = to.saturating_sub(2)..(to + 2).min(from);
        let all = (0..2.min(from)).chain(near);
        let all: BTreeSet<u64> = all.chain(from.saturating_sub(2)..from).collect();
        all.into_iter().collect()
    };
    Case::of_dice(seed, sizes, places)
}

#[test]
fn after_any_cut_a_shrinking_image_is_the_old_one_or_the_new_one_and_shrinks_again() {
    let wanted: u64 = std::env::var("PLOOP_SHRINK_STATES").map_or(3_000, |n| n.parse().unwrap());
    let (images, states) = campaign(wanted, case);
    println!("COUNT: {images} images shrunk, {states} states");
}

#[test]
fn the_barriers_of_shrinking_are_missed_when_they_are_gone_or_stepped_over() {
    // That of the header, and that of closing, behind which the file may be cut at any time but the image
    // must not say before that it is closed. Nothing depends on the one that makes it say so: without it
    // the image is opened as one that was not closed.
    for (number, how) in [(0, Break::Drop), (0, Break::Swap), (1, Break::Drop)] {
        assert_missed(how, number, case);
    }
}

#[test]
fn what_was_answered_is_kept_below_the_new_end_and_what_was_behind_is_zeros_when_it_grows() {
    for version in [Version::V1, Version::V2] {
        let (store, mut image) = opened(blank(version, 20_000).make(&mut Rng::new(1)));
        for n in [0, 9, 10, 8200, 19_999] {
            write(&image, n, n as u8 | 1);
        }
        now(image.shrink(9 * CLUSTER + 1)).unwrap();
        assert_eq!(image.geometry().size, 10 * CLUSTER);
        assert_eq!(image.header().data_start, 1);
        // What is free is used again, and holds nothing of before.
        for n in [1, 2, 3] {
            write(&image, n, 0x44);
        }
        now(image.grow(20_000 * CLUSTER)).unwrap();
        for n in [10, 8200, 19_999] {
            assert_eq!(byte_of(&store, &image, n), None, "{n}");
        }
        for (n, byte) in [(0, 1), (1, 0x44), (2, 0x44), (3, 0x44), (9, 9)] {
            assert_eq!(byte_of(&store, &image, n), Some(byte), "{n}");
        }
        now(image.close()).unwrap();
        assert!(now(check(&store)).unwrap().is_clean());
    }
}

#[test]
fn the_file_is_as_short_as_what_is_left_in_it() {
    let (store, mut image) = opened(blank(Version::V2, 20_000).make(&mut Rng::new(1)));
    for n in [0, 100, 19_000] {
        write(&image, n, 7);
    }
    now(image.shrink(50 * CLUSTER)).unwrap();
    now(image.close()).unwrap();
    let in_front = 3;
    assert_eq!(store.info().len, (in_front + 1) * CLUSTER);
    let blank = |store: &MemStore| now(Ploop::open_read(store.clone())).unwrap().header().flags & 1;
    assert_eq!(blank(&store), 0);
    let (store, mut image) = opened(blank_of(20_000));
    write(&image, 19_000, 7);
    now(image.shrink(CLUSTER)).unwrap();
    now(image.close()).unwrap();
    assert_eq!((store.info().len, blank(&store)), (CLUSTER, 1));
}

fn blank_of(clusters: u64) -> Pages {
    blank(Version::V2, clusters).make(&mut Rng::new(1))
}

#[test]
fn more_than_it_has_or_nothing_is_refused_and_the_cluster_that_it_ends_in_is_what_it_has() {
    let (store, mut image) = opened(blank_of(16));
    let before = store.pages().to_vec();
    for size in [0, 16 * CLUSTER + 1] {
        assert_eq!(now(image.shrink(size)).unwrap_err().kind(), Kind::Invalid);
    }
    now(image.shrink(15 * CLUSTER + 1)).unwrap();
    assert_eq!(image.geometry().size, 16 * CLUSTER);
    assert_eq!(store.pages().to_vec(), before);
    let mut read = now(Ploop::open_read(store)).unwrap();
    assert_eq!(
        now(read.shrink(CLUSTER)).unwrap_err().kind(),
        Kind::ReadOnly
    );
}

#[test]
fn a_disk_that_ended_within_a_cluster_ends_with_a_whole_one() {
    let mut pages = blank_of(4);
    pages.write(0x24, &(3 * 64 + 10u64).to_le_bytes());
    let (_, mut image) = opened(pages);
    now(image.shrink(3 * CLUSTER + 512)).unwrap();
    assert_eq!(image.geometry().size, 3 * CLUSTER + 10 * 512);
    now(image.shrink(3 * CLUSTER)).unwrap();
    assert_eq!(image.geometry().size, 3 * CLUSTER);
}

#[test]
fn a_raw_image_is_cut_to_whole_clusters_and_shows_zeros_when_it_grows() {
    let size = ClusterSize::new(CLUSTER).unwrap();
    let store = MemStore::from_bytes(&vec![7; 3 * CLUSTER as usize + 1024]);
    let open = || Raw::open_write(store.clone(), size, Ledger::local()).unwrap();
    let mut image = open();
    now(image.shrink(3 * CLUSTER + 1)).unwrap();
    assert_eq!(image.geometry().size, 3 * CLUSTER + 1024);
    for size in [0, 4 * CLUSTER + 1] {
        assert_eq!(now(image.shrink(size)).unwrap_err().kind(), Kind::Invalid);
    }
    now(image.shrink(CLUSTER + 1)).unwrap();
    assert_eq!(
        (image.geometry().size, store.info().len),
        (2 * CLUSTER, 2 * CLUSTER)
    );
    now(open().grow(4 * CLUSTER)).unwrap();
    let found = store.pages().to_vec();
    let (old, new) = found.split_at(2 * CLUSTER as usize);
    assert!(old.iter().all(|b| *b == 7) && new.iter().all(|b| *b == 0));
}
