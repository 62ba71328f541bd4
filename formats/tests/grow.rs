//! Growing a delta: the power goes at every operation, each barrier is taken away and missed.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod sizing;

use ploop_formats::layer::{Extent, Layer};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::check;
use ploop_formats::ploop::extension::{Extension, Feature, TRANSIT};
use ploop_formats::ploop::header::CLOSED_V21;
use ploop_formats::ploop::{Header, Ploop, Version};
use ploop_formats::raw::Raw;
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::Break;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp;
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Kind, buf};
use sizing::{CLUSTER, Case, assert_missed, blank, byte_of, campaign, entries, opened, write};

/// Sizes before and after, in clusters: within a table cluster, across one and across several.
fn sizes(rng: &mut Rng, cluster: u64) -> (u64, u64) {
    let full = entries(cluster, 1);
    let near = |rng: &mut Rng| full - rng.below(3);
    match rng.below(4) {
        0 => (rng.range(1, 6), rng.range(7, 12)),
        1 => (near(rng), full + rng.range(1, 9)),
        2 => (rng.range(3, 9), entries(cluster, 2) + rng.below(3)),
        _ => (near(rng), entries(cluster, rng.range(2, 6)) + 1),
    }
}

/// Something may be at the beginning of an image, and at its end.
fn case(seed: u64) -> Case {
    let places = |from: u64, _| (0..3).chain(from.saturating_sub(3)..from).collect();
    Case::of_dice(seed, sizes, places)
}

#[test]
fn after_any_cut_a_growing_image_is_the_old_one_or_the_new_one_and_grows_again() {
    let wanted: u64 = std::env::var("PLOOP_GROW_STATES").map_or(4_000, |n| n.parse().unwrap());
    let (images, states) = campaign(wanted, case);
    println!("COUNT: {images} images grown, {states} states");
}

#[test]
fn every_barrier_of_growing_is_missed_when_it_is_gone_or_stepped_over() {
    // The first is in front of the header when nothing is in the way; the last makes it durable, and
    // nothing follows that could be moved before it.
    for (how, count) in [(Break::Drop, 4), (Break::Swap, 3)] {
        (0..count).for_each(|number| assert_missed(how, number, case));
    }
}

#[test]
fn an_image_that_has_grown_is_used_to_its_new_end_at_once() {
    for version in [Version::V1, Version::V2] {
        let mut delta = blank(version, 8000);
        delta.leaks = 3;
        let (store, mut image) = opened(delta.make(&mut Rng::new(1)));
        for n in [0, 1, 7999] {
            write(&image, n, n as u8 + 1);
        }
        now(image.grow(20_000 * CLUSTER)).unwrap();
        assert_eq!(image.geometry().size, 20_000 * CLUSTER);
        assert_eq!(image.header().data_start, 3);
        for n in [8000, 8176, 19_999] {
            write(&image, n, 9);
        }
        for (n, byte) in [
            (0, 1),
            (1, 2),
            (7999, 64),
            (8000, 9),
            (8176, 9),
            (19_999, 9),
        ] {
            assert_eq!(byte_of(&store, &image, n), Some(byte), "cluster {n}");
        }
        now(image.close()).unwrap();
        assert!(now(check(&store)).unwrap().is_clean());
    }
}

#[test]
fn less_than_it_has_or_more_than_the_format_can_say_is_refused_and_changes_nothing() {
    let (store, mut image) = opened(blank(Version::V1, 16).make(&mut Rng::new(1)));
    let before = store.pages().to_vec();
    let error = now(image.grow(15 * CLUSTER)).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    let reopen = || now(Ploop::open_write(store.clone(), Ledger::local())).unwrap();
    let error = now(reopen().grow(3 << 40)).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    // Rounded up, that is what it has.
    assert!(now(reopen().grow(15 * CLUSTER + 1)).is_ok());
    assert_eq!(store.pages().to_vec(), before);
    let (_, mut image) = opened(blank(Version::V1, 16).make(&mut Rng::new(1)));
    now(image.grow((2 << 40) - (1 << 20))).unwrap();
    assert_eq!(image.geometry().size, (2 << 40) - (1 << 20));
}

#[test]
fn what_a_table_held_behind_its_disk_is_not_seen_when_that_grows() {
    let mut pages = blank(Version::V2, 4).make(&mut Rng::new(1));
    // Two clusters are there; an entry behind the disk, and one behind the table, name them.
    pages.set_len(3 * CLUSTER);
    pages.fill(CLUSTER, 2 * CLUSTER, 0x77);
    pages.write(0x20, &6u32.to_le_bytes());
    pages.write(64 + 4 * 5, &1u32.to_le_bytes());
    pages.write(64 + 4 * 7, &2u32.to_le_bytes());
    let (store, mut image) = opened(pages);
    now(image.grow(10 * CLUSTER)).unwrap();
    let extent = now(image.map(0, 10 * CLUSTER)).unwrap();
    assert_eq!(extent, Extent::Absent { len: 10 * CLUSTER });
    now(image.close()).unwrap();
    assert!(now(check(&store)).unwrap().is_clean());
}

#[test]
fn a_disk_that_ended_within_a_cluster_reads_zeros_behind_its_old_end() {
    let mut pages = blank(Version::V2, 2).make(&mut Rng::new(1));
    pages.set_len(2 * CLUSTER);
    pages.fill(CLUSTER, CLUSTER, 0x77);
    pages.write(64 + 4, &1u32.to_le_bytes());
    pages.write(0x24, &(64 + 10u64).to_le_bytes());
    let (store, mut image) = opened(pages);
    now(image.grow(9000 * CLUSTER)).unwrap();
    let Extent::Data { at, .. } = now(image.map(CLUSTER, CLUSTER)).unwrap() else {
        panic!("it is gone");
    };
    assert_eq!(at, 2 * CLUSTER);
    let found = now(store.read_at(at, buf::aligned(CLUSTER as usize))).unwrap();
    let (seen, new) = found.split_at(10 * 512);
    assert!(seen.iter().all(|b| *b == 0x77) && new.iter().all(|b| *b == 0));
}

#[test]
fn features_that_ask_to_be_kept_outlive_growing_and_what_the_extension_said_is_dropped() {
    let mut pages = blank(Version::V2, 8).make(&mut Rng::new(1));
    let feature = |magic, flags| Feature {
        magic,
        flags,
        data: vec![5; 8],
    };
    let size = ClusterSize::new(CLUSTER).unwrap();
    let extension = Extension {
        features: vec![feature(7, TRANSIT), feature(8, 0)],
    };
    pages.set_len(2 * CLUSTER);
    pages.write(CLUSTER, &extension.build(size).unwrap());
    pages.write(0x38, &(CLUSTER / 512).to_le_bytes());
    pages.write(0x2C, &CLOSED_V21.to_le_bytes());
    let (store, mut image) = opened(pages);
    now(image.grow(9000 * CLUSTER)).unwrap();
    now(image.close()).unwrap();
    let mut head = vec![0; 64];
    store.pages().read(0, &mut head);
    let header = Header::parse(&head).unwrap();
    assert_eq!((header.in_use, header.data_start), (CLOSED_V21, 2));
    let mut bytes = vec![0; CLUSTER as usize];
    store.pages().read(header.extension * 512, &mut bytes);
    assert_eq!(
        Extension::parse(&bytes).unwrap().features,
        [feature(7, TRANSIT)]
    );
    assert!(now(check(&store)).unwrap().is_clean());
}

#[test]
fn an_image_of_sixteen_tebibytes_costs_the_clusters_that_were_in_the_way() {
    let (store, mut image) = opened(blank(Version::V2, 16).make(&mut Rng::new(1)));
    for n in 0..4 {
        write(&image, n, 1);
    }
    now(image.grow(16 << 40)).unwrap();
    now(image.close()).unwrap();
    let header = *now(Ploop::open_read(store.clone())).unwrap().header();
    let table = u64::from(header.data_start) * CLUSTER;
    assert_eq!(
        table,
        ((16u64 << 40) / CLUSTER * 4 + 64).next_multiple_of(CLUSTER)
    );
    assert_eq!(store.info().len, table + 4 * CLUSTER);
    let mut image = now(Ploop::open_write(store, Ledger::local())).unwrap();
    now(image.grow(64 << 40)).unwrap();
    assert_eq!(image.geometry().size, 64 << 40);
}

#[test]
fn a_raw_image_grows_to_whole_clusters_of_zeros_and_never_shrinks() {
    let size = ClusterSize::new(CLUSTER).unwrap();
    let store = MemStore::from_bytes(&[7; 1000]);
    let open = || Raw::open_write(store.clone(), size, Ledger::local()).unwrap();
    let mut image = open();
    now(image.grow(CLUSTER + 1)).unwrap();
    assert_eq!(image.geometry().size, 2 * CLUSTER);
    let found = store.pages().to_vec();
    assert_eq!(found[..1000], [7; 1000]);
    assert!(found[1000..].iter().all(|b| *b == 0));
    assert_eq!(now(open().grow(CLUSTER)).unwrap_err().kind(), Kind::Invalid);
    assert!(now(open().grow(CLUSTER + 1)).is_ok());
}

#[test]
fn data_behind_a_full_table_stays_when_the_disk_ends_with_its_last_cluster() {
    let count = entries(CLUSTER, 1);
    let case = Case::with_one(count, count, 0);
    let mut pages = case.delta.make(&mut Rng::new(1));
    let sectors = count * CLUSTER / SECTOR - 8;
    pages.write(0x24, &sectors.to_le_bytes());
    let store = MemStore::from_pages(pages);
    now(async {
        let mut image = Ploop::open_write(store.clone(), Ledger::local())
            .await
            .unwrap();
        assert_eq!(image.geometry().size, sectors * SECTOR);
        image.grow(case.size(count)).await.unwrap();
        image.close().await.unwrap();
    });
    let image = now(Ploop::open_read(store)).unwrap();
    assert_eq!(case.judge(&image, count), Ok(count));
}

#[test]
fn nothing_is_moved_to_where_an_entry_behind_the_end_points() {
    let case = Case::with_one(4, entries(CLUSTER, 1) + 1, 1);
    let mut pages = case.delta.make(&mut Rng::new(1));
    // The table has a fifth entry, which names the cluster behind the one that is in the way.
    pages.write(0x20, &5u32.to_le_bytes());
    pages.write(64, &1u32.to_le_bytes());
    pages.write(64 + 4 * 4, &2u32.to_le_bytes());
    let mut first = vec![0; CLUSTER as usize];
    for (n, sector) in first.chunks_exact_mut(SECTOR as usize).enumerate() {
        stamp::fill(sector, n as u64, n as u64 + 1);
    }
    pages.write(CLUSTER, &first);
    let store = MemStore::from_pages(pages);
    let mut image = now(Ploop::open_write(store.clone(), Ledger::local())).unwrap();
    now(image.grow(case.size(case.to))).unwrap();
    assert_eq!(case.judge(&image, case.to), Ok(case.to));
    let bytes = now(store.read_at(64, buf::aligned(4096))).unwrap();
    assert_eq!(bytes[..4], 3u32.to_le_bytes(), "elsewhere");
}
