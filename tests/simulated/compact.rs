//! Compacting: clusters move to the front of the top's file while a guest writes.
//!
//! `PLOOP_COMPACT_STATES` says how many power cuts and deaths are tried.

use crate::campaign::{SEED, caught_in_engine, count, holds};
use bytes::{Bytes, BytesMut};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::image::snapshot::copy::Work;
use ploop::stack::AnyLayer;
use ploop::testkit::compacts;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::planted::Bug;
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::raw::Raw;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::{Reach, Space, Store, StoreInfo};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Kind, Result, buf};

#[test]
fn a_disk_is_compacted_under_its_guest_and_whatever_ends_it_nothing_is_lost() {
    holds(compacts::campaign(
        SEED,
        count("PLOOP_COMPACT_STATES", 20_000),
    ));
}

#[test]
fn a_cluster_that_is_named_where_it_goes_before_it_is_copied_is_caught() {
    caught_in_engine(Bug::MovedBeforeCopy);
}

#[test]
fn a_moved_cluster_whose_copy_is_not_durable_before_its_index_is_caught() {
    caught_in_engine(Bug::MovedCountsAsFresh);
}

#[test]
fn an_old_place_that_is_used_before_the_new_one_is_durable_is_caught() {
    caught_in_engine(Bug::OldPlaceFreeAtOnce);
}

#[test]
fn a_cluster_that_moves_while_others_use_it_is_caught() {
    caught_in_engine(Bug::MoveUnderShared);
}

const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = (CLUSTER / 512) as usize;

/// A delta of so many clusters, each second of which is there, with as many free ones in between.
fn holed(clusters: u64) -> (Delta, Pages) {
    let values = |n: u64| (0..SECTORS).map(move |i| 1 + n * SECTORS as u64 + i as u64);
    let clusters = (0..clusters).map(|n| (n % 2 == 0).then(|| values(n).collect()));
    let delta = Delta {
        version: Version::V2,
        cluster: CLUSTER,
        clusters: clusters.collect(),
        leaks: 40,
        in_use: false,
    };
    let pages = delta.make(&mut Rng::new(7));
    (delta, pages)
}

/// A store that cannot give space back: zeros are written.
#[derive(Debug, Clone)]
struct Dense(MemStore);

impl Store for Dense {
    fn info(&self) -> StoreInfo {
        StoreInfo {
            punches: false,
            fresh_zero: false,
            ..self.0.info()
        }
    }

    fn room(&self) -> Result<u64> {
        self.0.room()
    }

    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.0.read_at(at, buf).await
    }

    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()> {
        self.0.write_at(at, data, reach).await
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len).await
    }

    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()> {
        self.0.punch(at, len, space).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn settle(&self) {
        self.0.settle().await;
    }

    async fn extent(&self, at: u64) -> Result<(bool, u64)> {
        Ok((true, self.0.info().len.max(at + 1)))
    }
}

fn read<S: Store>(disk: &Disk<S>) -> Vec<u8> {
    let buf = buf::aligned(disk.size() as usize);
    now(disk.read(0, buf)).unwrap().to_vec()
}

/// Compacts and cuts a disk: how many clusters moved, and the length of its file.
fn compact<S: Store + Clone>(disk: &Disk<S>, ledger: &Ledger) -> (u64, u64) {
    let moved = now(disk.pack(&mut Work::new(&mut (), &()))).unwrap();
    now(now(disk.hold()).cut(ledger.clone())).unwrap();
    (moved, disk.stack().top().store().info().len)
}

fn is_packed<S: Store + Clone>(store: S) {
    let (delta, ledger) = (holed(80).0, Ledger::local());
    let used = delta.clusters.iter().flatten().count() as u64;
    let top = now(Ploop::open_write(store, ledger.clone())).unwrap();
    let disk = Disk::new([AnyLayer::Ploop(top)], false).unwrap();
    let before = read(&disk);
    let (moved, len) = compact(&disk, &ledger);
    assert_eq!(len, (1 + used) * CLUSTER);
    assert!((1..=used).contains(&moved), "{moved}");
    assert!(read(&disk) == before, "something else is read");
    assert_eq!(compact(&disk, &ledger), (0, len));
    // What its guest discards goes with the next one.
    now(disk.discard(0, 10 * CLUSTER)).unwrap();
    let (moved, shorter) = compact(&disk, &ledger);
    assert_eq!(shorter, len - 5 * CLUSTER);
    assert!(moved <= 5, "{moved}");
    let after = read(&disk);
    assert!(after[..10 * CLUSTER as usize].iter().all(|byte| *byte == 0));
    assert!(after[10 * CLUSTER as usize..] == before[10 * CLUSTER as usize..]);
    now(disk.close()).unwrap();
}

#[test]
fn a_file_is_as_long_as_what_is_in_use_of_it_also_where_there_are_no_holes() {
    is_packed(MemStore::from_pages(holed(80).1));
    is_packed(MemStore::from_pages(holed(80).1).aligned_to(4096));
    is_packed(Dense(MemStore::from_pages(holed(80).1)));
}

#[test]
fn a_raw_top_and_one_that_is_only_read_are_refused() {
    let size = ClusterSize::new(CLUSTER).unwrap();
    let flat = MemStore::from_pages(Pages::new(4 * CLUSTER));
    let raw = Raw::open_write(flat, size, Ledger::local()).unwrap();
    let disk = Disk::new([AnyLayer::Raw(raw)], false).unwrap();
    let refused = now(disk.pack(&mut Work::new(&mut (), &()))).unwrap_err();
    assert_eq!(refused.kind(), Kind::Unsupported);
    let ploop = now(Ploop::open_read(MemStore::from_pages(holed(8).1))).unwrap();
    let disk = Disk::new([AnyLayer::Ploop(ploop)], true).unwrap();
    let refused = now(disk.pack(&mut Work::new(&mut (), &()))).unwrap_err();
    assert_eq!(refused.kind(), Kind::ReadOnly);
}
