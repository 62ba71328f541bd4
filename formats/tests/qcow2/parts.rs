//! Clusters of extended images that are there in part: what is filled is seen, nothing else, at every
//! moment of a worker's death.

use crate::create::plain;
use bytes::{Bytes, BytesMut};
use ploop_formats::Result;
use ploop_formats::layer::{Below, Extent, Layer, Place, Reservation};
use ploop_formats::ledger::{Ledger, LocalWords, Words};
use ploop_formats::qcow2::Qcow2;
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::create::{Create, create};
use ploop_formats::qcow2::snapshots::{self, Wanted};
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::{Reach, Space, Store, StoreInfo};
use ploop_formats::testkit::exec::now;
use ploop_formats::units::VirtCluster;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

const CLUSTER: u64 = 16 << 10;
const PIECE: u64 = 512;

/// An extended image of 64 clusters.
fn image() -> MemStore {
    let store = MemStore::new(0);
    let wanted = Create {
        extended: true,
        ..plain(14, 64 * CLUSTER)
    };
    now(create(&store, &wanted)).unwrap();
    store
}

fn open(store: &MemStore, ledger: Ledger) -> Qcow2<MemStore> {
    now(Qcow2::open_write(store.clone(), None, ledger)).unwrap()
}

/// Fills pieces of a cluster with a byte.
fn fill<S: Store>(image: &Qcow2<S>, cluster: u32, pieces: std::ops::Range<u64>, byte: u8) {
    let mut reserved = now(image.reserve(VirtCluster(cluster))).unwrap();
    assert_eq!(reserved.piece(), Some(PIECE));
    let (from, to) = (pieces.start * PIECE, pieces.end * PIECE);
    reserved.submitted();
    let bytes = vec![byte; (to - from) as usize].into();
    let host = reserved.host() + from;
    now(image.store().write_at(host, bytes, Reach::Cache)).unwrap();
    reserved.filled(from, to);
    image.publish(VirtCluster(cluster), reserved, Below::Data);
}

/// The first byte of each piece of a cluster; none where it is not there.
fn pieces(image: &Qcow2<MemStore>, cluster: u32) -> Vec<Option<u8>> {
    let start = u64::from(cluster) * CLUSTER;
    let piece = |n| {
        let guest = start + n * PIECE;
        match now(image.map(guest, PIECE)).unwrap() {
            Extent::Data { at, .. } => {
                let buf = vec![0; PIECE as usize].as_slice().into();
                let bytes = now(image.store().read_at(at, buf)).unwrap();
                assert_eq!(
                    now(image.place(guest, PIECE)).unwrap(),
                    Place::Here { at, len: PIECE }
                );
                Some(bytes[0])
            }
            Extent::Absent { .. } => None,
            other => panic!("{other:?}"),
        }
    };
    (0..32).map(piece).collect()
}

fn expected(filled: &[(std::ops::Range<usize>, u8)]) -> Vec<Option<u8>> {
    let mut all = vec![None; 32];
    for (range, byte) in filled {
        all[range.clone()].fill(Some(*byte));
    }
    all
}

#[test]
fn what_is_filled_is_there_before_and_after_a_pass_and_in_the_same_place() {
    let store = image();
    let disk = open(&store, Ledger::local());
    fill(&disk, 3, 0..2, 1);
    fill(&disk, 3, 30..32, 2);
    assert_eq!(pieces(&disk, 3), expected(&[(0..2, 1), (30..32, 2)]));
    now(disk.sync()).unwrap();
    fill(&disk, 3, 5..6, 3);
    let all = expected(&[(0..2, 1), (30..32, 2), (5..6, 3)]);
    assert_eq!(pieces(&disk, 3), all);
    let len = store.info().len;
    now(disk.close()).unwrap();
    assert!(store.info().len <= len);
    assert!(now(check(&store)).unwrap().is_clean());
    let disk = now(Qcow2::open_read(store, None)).unwrap();
    let shown: Vec<_> = (0..32)
        .map(|n| match now(disk.map(3 * CLUSTER + n * PIECE, PIECE)) {
            Ok(Extent::Data { .. }) => true,
            Ok(Extent::Absent { .. }) => false,
            other => panic!("{other:?}"),
        })
        .collect();
    let there: Vec<_> = all.iter().map(Option::is_some).collect();
    assert_eq!(shown, there);
}

#[test]
fn a_cluster_that_is_released_in_part_there_is_nowhere() {
    let store = image();
    let disk = open(&store, Ledger::local());
    fill(&disk, 3, 4..5, 1);
    now(disk.sync()).unwrap();
    fill(&disk, 3, 7..8, 1);
    now(disk.release(VirtCluster(3))).unwrap();
    assert_eq!(pieces(&disk, 3), expected(&[]));
    fill(&disk, 3, 1..2, 9);
    assert_eq!(pieces(&disk, 3), expected(&[(1..2, 9)]));
    now(disk.close()).unwrap();
    assert!(now(check(&store)).unwrap().is_clean());
}

#[test]
fn zeros_are_said_without_space() {
    let store = image();
    let disk = open(&store, Ledger::local());
    fill(&disk, 3, 0..32, 1);
    now(disk.sync()).unwrap();
    for pass in [false, true] {
        assert!(now(disk.zero(VirtCluster(3))).unwrap());
        if pass {
            now(disk.sync()).unwrap();
        }
        let all = now(disk.map(3 * CLUSTER, CLUSTER)).unwrap();
        assert_eq!(all, Extent::Zero { len: CLUSTER });
    }
    fill(&disk, 3, 2..3, 7);
    let found = now(disk.map(3 * CLUSTER + 2 * PIECE, PIECE)).unwrap();
    assert!(matches!(found, Extent::Data { .. }), "{found:?}");
    now(disk.close()).unwrap();
    assert!(now(check(&store)).unwrap().is_clean());
}

/// Words, and what they were before each change.
struct Watched {
    words: LocalWords,
    before: Mutex<Vec<Vec<u64>>>,
}

impl Words for Watched {
    fn count(&self) -> usize {
        self.words.count()
    }
    fn load(&self, i: usize) -> u64 {
        self.words.load(i)
    }
    fn store(&self, i: usize, value: u64) {
        let now = (0..self.count()).map(|i| self.load(i)).collect();
        self.before.lock().unwrap().push(now);
        self.words.store(i, value);
    }
}

#[test]
fn who_dies_between_two_words_shows_nothing_that_was_not_filled() {
    let store = image();
    let watched = Arc::new(Watched {
        words: LocalWords::new(64),
        before: Mutex::default(),
    });
    let disk = open(&store, Ledger::new(watched.clone()));
    fill(&disk, 3, 0..2, 1);
    now(disk.sync()).unwrap();
    fill(&disk, 3, 5..6, 2);
    fill(&disk, 4, 9..10, 3);
    now(disk.release(VirtCluster(3))).unwrap();
    fill(&disk, 3, 8..9, 4);
    let moments = std::mem::take(&mut *watched.before.lock().unwrap());
    assert!(moments.len() > 8, "{}", moments.len());
    for (n, moment) in moments.iter().enumerate() {
        let words = LocalWords::new(64);
        for (i, word) in moment.iter().enumerate() {
            words.store(i, *word);
        }
        let disk = open(&store.copy(), Ledger::new(Arc::new(words)));
        for (cluster, may) in [
            (3, expected(&[(0..2, 1), (5..6, 2), (8..9, 4)])),
            (4, expected(&[(9..10, 3)])),
        ] {
            for (piece, found) in pieces(&disk, cluster).into_iter().enumerate() {
                assert!(
                    found.is_none() || found == may[piece],
                    "word {n}, cluster {cluster}, piece {piece}: {found:?}"
                );
            }
        }
    }
}

/// What happens at the next read.
type Next = Rc<RefCell<Option<Box<dyn FnOnce()>>>>;

/// A store in which something else happens at the next read.
#[derive(Clone)]
struct Interrupted {
    inner: MemStore,
    next: Next,
}

impl Store for Interrupted {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }
    fn room(&self) -> Result<u64> {
        self.inner.room()
    }
    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        let next = self.next.take();
        if let Some(next) = next {
            next();
        }
        self.inner.read_at(at, buf).await
    }
    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()> {
        self.inner.write_at(at, data, reach).await
    }
    async fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len).await
    }
    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()> {
        self.inner.punch(at, len, space).await
    }
    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
    async fn settle(&self) {
        self.inner.settle().await;
    }
    async fn extent(&self, at: u64) -> Result<(bool, u64)> {
        self.inner.extent(at).await
    }
}

#[test]
fn what_is_filled_while_a_pass_runs_is_not_in_what_it_writes() {
    // The second table is not the snapshot's: it is written after the first was copied.
    let (first, second) = (3, 1024 + 3);
    let store = MemStore::new(0);
    let wanted = Create {
        extended: true,
        ..plain(14, 2048 * CLUSTER)
    };
    now(create(&store, &wanted)).unwrap();
    let disk = open(&store, Ledger::local());
    fill(&disk, first, 0..1, 1);
    now(disk.close()).unwrap();
    let snapshot = Wanted {
        name: b"one".to_vec(),
        seconds: 1,
        nanoseconds: 0,
    };
    now(snapshots::create(&store, &snapshot, &mut ())).unwrap();
    let disk = open(&store, Ledger::local());
    fill(&disk, second, 0..1, 1);
    now(disk.close()).unwrap();

    let next = Next::default();
    let interrupted = Interrupted {
        inner: store.clone(),
        next: Rc::clone(&next),
    };
    let disk = Qcow2::open_write(interrupted, None, Ledger::local());
    let disk = Rc::new(now(disk).unwrap());
    fill(&disk, first, 1..2, 2);
    fill(&disk, second, 1..2, 2);
    let late = Rc::clone(&disk);
    *next.borrow_mut() = Some(Box::new(move || fill(&late, second, 2..3, 3)));
    now(disk.sync()).unwrap();
    assert!(next.borrow().is_none(), "it happened");
    let after_a_cut = || pieces(&open(&store.copy(), Ledger::local()), second);
    assert_eq!(after_a_cut(), expected(&[(0..1, 1), (1..2, 2)]));
    now(disk.sync()).unwrap();
    assert_eq!(after_a_cut(), expected(&[(0..1, 1), (1..2, 2), (2..3, 3)]));
}
