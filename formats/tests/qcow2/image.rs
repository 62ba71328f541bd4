//! An open image: what it answers, what it refuses, and how often it reads its file.

use crate::made::{
    CLUSTER, DATA, L1, L2, SIZE, extend, header, image, put32, put64, repeated, stored, zstd,
};
use bytes::{Bytes, BytesMut};
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::Qcow2;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::{Reach, Space, Store, StoreInfo};
use ploop_formats::testkit::exec::now;
use ploop_formats::units::VirtCluster;
use ploop_formats::{Error, Kind, Result};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

const PACKED: u64 = 1 << 62;

fn open(bytes: &[u8]) -> Qcow2<MemStore> {
    now(Qcow2::open_read(MemStore::from_bytes(bytes), None)).unwrap()
}

fn kind<T>(done: Result<T>) -> Option<Kind> {
    done.err().map(|e| e.kind())
}

/// A store that counts what is read of it, and makes a reader wait once where it is told to.
#[derive(Debug, Clone)]
struct Counted {
    store: MemStore,
    reads: Arc<AtomicUsize>,
    slow: Arc<AtomicBool>,
    inside: Arc<AtomicUsize>,
}

impl Counted {
    fn new(bytes: &[u8]) -> Self {
        Self {
            store: MemStore::from_bytes(bytes),
            reads: Arc::default(),
            slow: Arc::default(),
            inside: Arc::default(),
        }
    }

    /// How often it was read since the last call.
    fn reads(&self) -> usize {
        self.reads.swap(0, Ordering::Relaxed)
    }
}

impl Store for Counted {
    fn info(&self) -> StoreInfo {
        self.store.info()
    }
    fn room(&self) -> Result<u64> {
        self.store.room()
    }
    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.slow.load(Ordering::Relaxed) {
            let inside = self.inside.fetch_add(1, Ordering::Relaxed);
            assert_eq!(inside, 0, "read by two at once");
            let mut waited = false;
            poll_fn(|_| match std::mem::replace(&mut waited, true) {
                false => Poll::Pending,
                true => Poll::Ready(()),
            })
            .await;
            self.inside.fetch_sub(1, Ordering::Relaxed);
        }
        self.store.read_at(at, buf).await
    }
    async fn write_at(&self, _: u64, _: Bytes, _: Reach) -> Result<()> {
        Err(Error::invalid("written to"))
    }
    async fn set_len(&self, _: u64) -> Result<()> {
        Err(Error::invalid("cut"))
    }
    async fn punch(&self, _: u64, _: u64, _: Space) -> Result<()> {
        Err(Error::invalid("punched"))
    }
    async fn flush(&self) -> Result<()> {
        Err(Error::invalid("flushed"))
    }
    async fn settle(&self) {}
    async fn extent(&self, at: u64) -> Result<(bool, u64)> {
        self.store.extent(at).await
    }
}

#[test]
fn the_extents_of_a_small_image() {
    let image = open(&image(3));
    let map = |guest, len| now(image.map(guest * CLUSTER, len * CLUSTER)).unwrap();
    let data = |at, len| Extent::Data { at, len };
    assert_eq!(map(0, 8), data(DATA, CLUSTER));
    assert_eq!(map(1, 7), Extent::Absent { len: CLUSTER });
    assert_eq!(map(2, 6), data(DATA + CLUSTER, CLUSTER));
    assert_eq!(map(3, 5), Extent::Zero { len: CLUSTER });
    assert_eq!(map(6, 2), Extent::Absent { len: 2 * CLUSTER });
    assert_eq!(now(image.map(700, 900)).unwrap(), data(DATA + 700, 900));
    assert_eq!(image.geometry().size, SIZE);
}

#[test]
fn an_image_may_be_shared_by_threads() {
    const fn shared<T: Send + Sync>(_: &T) {}
    shared(&open(&image(3)));
}

#[test]
fn an_image_that_is_open_for_reading_is_not_written() {
    let store = Counted::new(&image(3));
    let image = now(Qcow2::open_read(store, None)).unwrap();
    assert_eq!(
        kind(now(image.reserve(VirtCluster(0)))),
        Some(Kind::ReadOnly)
    );
    assert_eq!(
        kind(now(image.release(VirtCluster(0)))),
        Some(Kind::ReadOnly)
    );
    assert_eq!(kind(now(image.sync())), Some(Kind::ReadOnly));
    now(image.close()).unwrap();
}

#[test]
fn a_far_jump_costs_a_slice_of_each_table_and_a_near_one_nothing() {
    // Three tables of 8192 entries: 16 slices each.
    let covers = CLUSTER * CLUSTER / 8;
    let mut bytes = header(3);
    put64(&mut bytes, 24, 3 * covers);
    put32(&mut bytes, 36, 3);
    bytes.resize(8 * CLUSTER as usize, 0);
    for n in 0..3 {
        put64(
            &mut bytes,
            (3 * CLUSTER + 8 * n) as usize,
            (4 + n) * CLUSTER,
        );
    }
    let store = Counted::new(&bytes);
    let image = now(Qcow2::open_read(store.clone(), None)).unwrap();
    assert!(store.reads() <= 2, "opening reads the header");
    let read = |guest| {
        now(image.map(guest, 512)).unwrap();
        store.reads()
    };
    assert_eq!(read(0), 2);
    assert_eq!((read(511 * CLUSTER), read(512 * CLUSTER)), (0, 1));
    assert_eq!((read(covers), read(2 * covers), read(covers)), (1, 1, 0));
    assert_eq!(read(3 * covers - 512), 1);
}

#[test]
fn more_slices_than_are_kept_are_read_again() {
    // Of 512-byte clusters each table is a slice: 600 of them.
    let mut bytes = vec![0; 512 * 620];
    bytes[..112].copy_from_slice(&header(3)[..112]);
    put32(&mut bytes, 20, 9);
    put64(&mut bytes, 24, 600 * 64 * 512);
    put32(&mut bytes, 36, 600);
    put64(&mut bytes, 40, 1024);
    put64(&mut bytes, 48, 512);
    for n in 0..600 {
        put64(&mut bytes, 1024 + 8 * n, (19 + n as u64) * 512);
    }
    let store = Counted::new(&bytes);
    let image = now(Qcow2::open_read(store.clone(), None)).unwrap();
    store.reads();
    for _ in 0..2 {
        for n in 0..600 {
            now(image.map(n * 64 * 512, 512)).unwrap();
        }
    }
    let reads = store.reads();
    assert!((1200..=1300).contains(&reads), "{reads} reads");
}

#[test]
fn a_compressed_cluster_is_read_in_pieces_and_unpacked_once() {
    let mut bytes = image(3);
    let content: Vec<u8> = (0..CLUSTER).map(|n| (n / 7) as u8).collect();
    let packed = stored(&content);
    let at = DATA + 100;
    bytes.resize(10 * CLUSTER as usize, 0);
    bytes[at as usize..at as usize + packed.len()].copy_from_slice(&packed);
    let sectors = (at % 512 + packed.len() as u64).div_ceil(512);
    put64(&mut bytes, L2 as usize, PACKED | (sectors - 1) << 54 | at);
    let store = Counted::new(&bytes);
    let image = now(Qcow2::open_read(store.clone(), None)).unwrap();
    let all = now(image.map(0, SIZE)).unwrap();
    assert_eq!(all, Extent::Packed { len: CLUSTER });
    store.reads();
    for from in (0..CLUSTER).step_by(4096) {
        let buf = now(image.unpack(from, BytesMut::zeroed(4096))).unwrap();
        assert!(buf[..] == content[from as usize..from as usize + 4096]);
    }
    assert_eq!(store.reads(), 1);
    let beyond = image.unpack(CLUSTER - 512, BytesMut::zeroed(1024));
    assert_eq!(kind(now(beyond)), Some(Kind::Invalid));
    for guest in [CLUSTER, 3 * CLUSTER] {
        let other = image.unpack(guest, BytesMut::zeroed(512));
        assert_eq!(kind(now(other)), Some(Kind::Invalid), "{guest}");
    }
    // It may have been compressed when it was looked for.
    let Extent::Data { at, .. } = now(image.map(2 * CLUSTER, 512)).unwrap() else {
        panic!("no data");
    };
    let moved = now(image.unpack(2 * CLUSTER, BytesMut::zeroed(512))).unwrap();
    assert!(moved[..] == bytes[at as usize..][..512]);
}

/// Runs futures side by side until all are done.
fn together<F: Future>(futures: Vec<Pin<&mut F>>) -> Vec<F::Output> {
    let mut left: Vec<_> = futures.into_iter().map(Some).collect();
    let mut done: Vec<_> = left.iter().map(|_| None).collect();
    for _ in 0..100 {
        for (slot, out) in left.iter_mut().zip(&mut done) {
            let Some(future) = slot else { continue };
            let context = &mut Context::from_waker(Waker::noop());
            if let Poll::Ready(found) = future.as_mut().poll(context) {
                (*out, *slot) = (Some(found), None);
            }
        }
    }
    done.into_iter().map(Option::unwrap).collect()
}

#[test]
fn readers_unpack_one_after_another_and_a_cluster_once() {
    let packed = [
        stored(&[7; CLUSTER as usize]),
        stored(&[8; CLUSTER as usize]),
    ];
    let mut bytes = image(3);
    bytes.resize(12 * CLUSTER as usize, 0);
    for (n, packed) in packed.iter().enumerate() {
        let at = DATA as usize + n * 2 * CLUSTER as usize;
        bytes[at..at + packed.len()].copy_from_slice(packed);
        put64(
            &mut bytes,
            L2 as usize + 8 * n,
            PACKED | 129 << 54 | at as u64,
        );
    }
    let store = Counted::new(&bytes);
    let image = now(Qcow2::open_read(store.clone(), None)).unwrap();
    now(image.map(0, SIZE)).unwrap();
    store.reads();
    store.slow.store(true, Ordering::Relaxed);
    let read = |n: u64| image.unpack(n * CLUSTER + 512, BytesMut::zeroed(512));
    let (a, b, c) = (pin!(read(0)), pin!(read(0)), pin!(read(1)));
    let found = together(vec![a, b, c]);
    let firsts: Vec<u8> = found.into_iter().map(|part| part.unwrap()[0]).collect();
    assert_eq!((firsts, store.reads()), (vec![7, 7, 8], 2));
}

#[test]
fn a_cluster_that_does_not_unpack_is_tried_once() {
    let mut bytes = image(3);
    put64(&mut bytes, L2 as usize, PACKED | 1 << 54 | DATA);
    let store = Counted::new(&bytes);
    let image = now(Qcow2::open_read(store.clone(), None)).unwrap();
    now(image.map(0, 512)).unwrap();
    store.reads();
    let read = || now(image.unpack(0, BytesMut::zeroed(512))).unwrap_err();
    let (first, second) = (read(), read());
    assert_eq!((first.kind(), store.reads()), (Kind::Damaged, 1));
    assert_eq!(first.to_string(), second.to_string());
}

#[test]
fn a_compressed_cluster_that_is_too_short_is_damage() {
    for (len, fine) in [(CLUSTER, true), (CLUSTER - 1, false), (CLUSTER / 2, false)] {
        let mut bytes = image(3);
        let packed = stored(&vec![7; len as usize]);
        bytes.resize(10 * CLUSTER as usize, 0);
        bytes[DATA as usize..DATA as usize + packed.len()].copy_from_slice(&packed);
        put64(&mut bytes, L2 as usize, PACKED | 129 << 54 | DATA);
        let image = open(&bytes);
        let done = now(image.unpack(0, BytesMut::zeroed(512)));
        assert_eq!(done.is_ok(), fine, "{len} bytes");
        assert!(fine || kind(done) == Some(Kind::Damaged));
    }
}

#[test]
fn a_zstd_frame_holds_a_cluster_and_nothing_else() {
    let frame = |descriptor: &[u8], blocks: &[Vec<u8>], sum: &[u8]| {
        let start = [&[0x28, 0xB5, 0x2F, 0xFD], descriptor].concat();
        [&start[..], &blocks.concat(), sum].concat()
    };
    let whole = repeated(7, CLUSTER, true);
    let going = repeated(7, CLUSTER, false);
    let (more, none) = (repeated(8, CLUSTER, true), repeated(8, 0, true));
    let sized = |len: u32| [&[0xA0][..], &len.to_le_bytes()].concat();
    // XXH64 with seed 0 of 65536 bytes of 7, its lower half.
    let sum = 0x67DB_20F5_u32.to_le_bytes();
    for (name, bytes, says) in [
        ("whole", frame(&[0, 0x58], from_ref(&whole), &[]), None),
        (
            "an empty block behind",
            frame(&[0, 0x58], &[going.clone(), none], &[]),
            None,
        ),
        (
            "a second cluster",
            frame(&[0, 0x58], &[going.clone(), more], &[]),
            Some("more than a cluster"),
        ),
        (
            "a byte more",
            frame(&[0, 0x58], &[going.clone(), repeated(8, 1, true)], &[]),
            Some("more than a cluster"),
        ),
        (
            "a byte less",
            frame(&[0, 0x58], &[repeated(7, CLUSTER - 1, true)], &[]),
            Some("less than a cluster"),
        ),
        (
            "no end",
            frame(&[0, 0x58], &[going], &[6, 0, 0]),
            Some("not so compressed"),
        ),
        (
            "its checksum",
            frame(&[4, 0x58], from_ref(&whole), &sum),
            None,
        ),
        (
            "another checksum",
            frame(&[4, 0x58], from_ref(&whole), &[0; 4]),
            Some("wrong checksum"),
        ),
        (
            "its size",
            frame(&sized(65536), from_ref(&whole), &[]),
            None,
        ),
        (
            "a larger size",
            frame(&sized(65537), from_ref(&whole), &[]),
            Some("another size"),
        ),
        (
            "a smaller size",
            frame(&[0x60, 0, 0xFE], &[whole], &[]),
            Some("another size"),
        ),
    ] {
        let image = open(&zstd(&bytes));
        let done = now(image.unpack(0, BytesMut::zeroed(CLUSTER as usize)));
        match (done, says) {
            (Ok(found), None) => assert!(found.iter().all(|b| *b == 7), "{name}"),
            (Err(e), Some(says)) => {
                assert_eq!(e.kind(), Kind::Damaged, "{name}: {e}");
                let place = e
                    .to_string()
                    .contains("offset 0x50000: compressed cluster (Zstd)");
                assert!(place && e.to_string().contains(says), "{name}: {e}");
            }
            (done, _) => panic!("{name}: {:?}", done.map(drop)),
        }
    }
}

#[test]
fn a_deflate_stream_of_more_than_a_cluster_is_cut() {
    let content: Vec<u8> = (0..CLUSTER + 5000).map(|n| (n / 7) as u8).collect();
    let packed = stored(&content);
    let mut bytes = image(3);
    bytes.resize(10 * CLUSTER as usize, 0);
    bytes[DATA as usize..DATA as usize + packed.len()].copy_from_slice(&packed);
    put64(&mut bytes, L2 as usize, PACKED | 140 << 54 | DATA);
    let found = now(open(&bytes).unpack(0, BytesMut::zeroed(CLUSTER as usize))).unwrap();
    assert!(found[..] == content[..CLUSTER as usize]);
}

#[test]
fn a_file_that_ends_inside_its_l1_table_is_not_opened() {
    let mut bytes = image(3);
    put64(&mut bytes, 40, 7 * CLUSTER);
    put32(&mut bytes, 36, 3);
    bytes.truncate((7 * CLUSTER + 16) as usize);
    let store = MemStore::from_bytes(&bytes);
    assert_eq!(
        kind(now(Qcow2::open_read(store, None))),
        Some(Kind::Damaged)
    );
}

#[test]
fn a_file_that_ends_inside_an_l2_table_is_damaged_there() {
    for (len, guest, fine) in [
        (4096, 0, true),
        (4096, 512 * CLUSTER, false),
        (4088, 0, false),
        (512, 0, false),
        (CLUSTER, 8191 * CLUSTER, true),
        (CLUSTER - 8, 8191 * CLUSTER, false),
    ] {
        let mut bytes = header(3);
        put64(&mut bytes, 24, 512 << 20);
        bytes.resize((L2 + len) as usize, 0);
        put64(&mut bytes, L1 as usize, L2);
        let done = now(open(&bytes).map(guest, 512));
        let entry = L2 + guest / CLUSTER * 8;
        match done {
            Ok(found) => assert!(fine && found == Extent::Absent { len: 512 }, "{len}"),
            Err(e) => {
                let says = format!("L2 table: offset {entry:#x}: a table that goes on to");
                assert!(!fine && e.to_string().contains(&says), "{len}: {e}");
                assert_eq!(e.kind(), Kind::Damaged);
            }
        }
    }
}

/// The entry of a snapshot, of which so much is the disk.
fn snapshot(l1: u64, entries: u32, size: u64) -> Vec<u8> {
    let mut entry = vec![0; 64];
    put64(&mut entry, 0, l1);
    put32(&mut entry, 8, entries);
    entry[12..16].copy_from_slice(&[0, 1, 0, 4]);
    put32(&mut entry, 36, 16);
    put64(&mut entry, 48, size);
    entry[56..61].copy_from_slice(b"1name");
    entry
}

#[test]
fn a_snapshot_has_the_size_that_the_disk_had() {
    let covers = CLUSTER * CLUSTER / 8;
    let (table, first, second) = (8 * CLUSTER, 9 * CLUSTER, 10 * CLUSTER);
    for (align, entries, size) in [1, 512, 4096]
        .into_iter()
        .flat_map(|align| [(align, 1, 3 * CLUSTER), (align, 2, covers + 2 * CLUSTER)])
    {
        let mut bytes = image(3);
        bytes.resize(11 * CLUSTER as usize, 0);
        put32(&mut bytes, 60, 1);
        put64(&mut bytes, 64, 11 * CLUSTER);
        bytes.extend(snapshot(table, entries, size));
        bytes.resize(12 * CLUSTER as usize, 0);
        put64(&mut bytes, table as usize, first);
        put64(&mut bytes, table as usize + 8, second);
        put64(&mut bytes, first as usize + 8, DATA);
        put64(&mut bytes, second as usize + 8, DATA + CLUSTER);
        let store = MemStore::from_bytes(&bytes).aligned_to(align);
        let image = now(Qcow2::open_read(store, None)).unwrap();
        let all = now(image.snapshots()).unwrap();
        assert_eq!((all.len(), all[0].size), (1, Some(size)));
        let then = image.at_snapshot(&all[0]).unwrap();
        assert_eq!(then.geometry().size, size);
        let map = |guest| now(then.map(guest, CLUSTER)).unwrap();
        let data = |at| Extent::Data { at, len: CLUSTER };
        assert_eq!(map(0), Extent::Absent { len: CLUSTER });
        assert_eq!(map(CLUSTER), data(DATA));
        if size > covers {
            assert_eq!(map(covers + CLUSTER), data(DATA + CLUSTER));
        }
    }
}

#[test]
fn a_bitmap_that_was_in_use_may_be_of_any_former_size() {
    // A disk of 2^50 bytes has 2^41 sectors, and so more bits than a bitmap may have.
    for (flags, size, fine) in [
        (0, SIZE, true),
        (1, SIZE, true),
        (0, 1 << 50, false),
        (1, 1 << 50, true),
    ] {
        let mut bytes = image(3);
        put64(&mut bytes, 24, size);
        put32(&mut bytes, 36, (size >> 29).max(1) as u32);
        put64(&mut bytes, 40, 16 * CLUSTER);
        put64(&mut bytes, 88, 1);
        let mut directory = vec![0; 24];
        put32(&mut directory, 0, 1);
        put64(&mut directory, 8, 32);
        put64(&mut directory, 16, 8 * CLUSTER);
        extend(&mut bytes, 112, 0x2385_2875, &directory);
        bytes.resize(10 * CLUSTER as usize, 0);
        let at = 8 * CLUSTER as usize;
        put64(&mut bytes, at, DATA);
        let entries = size.div_ceil(1 << 9).div_ceil(8).div_ceil(CLUSTER);
        put32(&mut bytes, at + 8, entries as u32);
        put32(&mut bytes, at + 12, flags);
        bytes[at + 16..at + 20].copy_from_slice(&[1, 9, 0, 4]);
        bytes[at + 24..at + 28].copy_from_slice(b"bits");
        let store = MemStore::from_bytes(&bytes);
        now(store.set_len(1 << 30)).unwrap();
        let image = now(Qcow2::open_read(store, None)).unwrap();
        match now(image.bitmaps()) {
            Ok(all) => assert!(fine && all[0].in_use == (flags == 1), "{flags}, {size}"),
            Err(e) => assert!(!fine && e.to_string().contains("bitmap: a table of"), "{e}"),
        }
    }
}

#[test]
fn an_external_data_file_has_no_snapshots() {
    let mut bytes = image(3);
    put64(&mut bytes, 72, 1 << 2);
    put32(&mut bytes, 60, 1);
    put64(&mut bytes, 64, 8 * CLUSTER);
    bytes.extend(snapshot(L1, 1, SIZE));
    let store = MemStore::from_bytes(&bytes);
    let image = now(Qcow2::open_read(store, Some(MemStore::new(SIZE)))).unwrap();
    let all = now(image.snapshots()).unwrap();
    let e = image.at_snapshot(&all[0]).unwrap_err();
    assert_eq!(e.kind(), Kind::Damaged);
    assert!(e.to_string().contains("external data file"), "{e}");
}

#[test]
fn compressed_data_is_read_on_a_store_of_blocks() {
    let content: Vec<u8> = (0..CLUSTER).map(|n| (n / 7) as u8).collect();
    let packed = stored(&content);
    for (align, within) in [(512, 100), (512, 511), (4096, 100), (4096, 4000)] {
        let at = DATA + within;
        let mut bytes = image(3);
        bytes.resize(10 * CLUSTER as usize, 0);
        bytes[at as usize..at as usize + packed.len()].copy_from_slice(&packed);
        put64(&mut bytes, L2 as usize, PACKED | 129 << 54 | at);
        let store = MemStore::from_bytes(&bytes).aligned_to(align);
        let image = now(Qcow2::open_read(store, None)).unwrap();
        let found = now(image.unpack(0, BytesMut::zeroed(CLUSTER as usize))).unwrap();
        assert!(found[..] == content, "{align}, {within}");
    }
}

#[test]
fn what_a_file_lacks_of_its_last_cluster_reads_as_zeros() {
    for kept in [512, 4096, CLUSTER - 512] {
        let mut bytes = image(3);
        put64(&mut bytes, L2 as usize + 48, 7 * CLUSTER);
        put64(&mut bytes, L2 as usize + 40, 8 * CLUSTER);
        bytes.truncate((7 * CLUSTER + kept) as usize);
        let image = open(&bytes);
        let start = 6 * CLUSTER;
        let first = now(image.map(start, CLUSTER)).unwrap();
        assert_eq!(
            first,
            Extent::Data {
                at: 7 * CLUSTER,
                len: kept
            }
        );
        let rest = now(image.map(start + kept, 2 * CLUSTER)).unwrap();
        assert_eq!(
            rest,
            Extent::Zero {
                len: CLUSTER - kept
            }
        );
        let gone = now(image.map(5 * CLUSTER, 512));
        assert_eq!(kind(gone), Some(Kind::Damaged));
    }
}

#[test]
fn a_store_of_blocks_is_read_where_the_file_keeps_to_them() {
    let bytes = image(3);
    for align in [512, 4096] {
        let store = MemStore::from_bytes(&bytes).aligned_to(align);
        let image = now(Qcow2::open_read(store, None)).unwrap();
        let extent = now(image.map(2 * CLUSTER, CLUSTER)).unwrap();
        assert!(matches!(extent, Extent::Data { .. }));
        let ragged = MemStore::from_bytes(&bytes[..bytes.len() - 100]).aligned_to(align);
        let ragged = now(Qcow2::open_read(ragged, None));
        assert_eq!(kind(ragged), Some(Kind::Unsupported));
    }
    let mut small = image(3);
    put32(&mut small, 20, 9);
    put64(&mut small, 24, 512);
    let store = MemStore::from_bytes(&small).aligned_to(4096);
    assert_eq!(
        kind(now(Qcow2::open_read(store, None))),
        Some(Kind::Unsupported)
    );
}

#[test]
fn an_external_data_file_is_given_exactly_when_there_is_one() {
    let inside = MemStore::from_bytes(&image(3));
    let data = || Some(MemStore::new(SIZE));
    assert_eq!(
        kind(now(Qcow2::open_read(inside, data()))),
        Some(Kind::Invalid)
    );
    let mut bytes = image(3);
    put64(&mut bytes, 72, 1 << 2);
    // A cluster at its place, the first one, and one elsewhere.
    put64(&mut bytes, L2 as usize, 1 << 63);
    put64(&mut bytes, L2 as usize + 16, (1 << 63) | (2 * CLUSTER));
    put64(&mut bytes, L2 as usize + 40, (1 << 63) | (6 * CLUSTER));
    let outside = MemStore::from_bytes(&bytes);
    assert_eq!(
        kind(now(Qcow2::open_read(outside.clone(), None))),
        Some(Kind::Invalid)
    );
    let image = now(Qcow2::open_read(outside, data())).unwrap();
    for guest in [0, 2 * CLUSTER] {
        let extent = now(image.map(guest, CLUSTER)).unwrap();
        assert_eq!(
            extent,
            Extent::Data {
                at: guest,
                len: CLUSTER
            }
        );
    }
    assert_eq!(kind(now(image.map(5 * CLUSTER, 512))), Some(Kind::Damaged));
    assert_eq!(image.store().info().len, SIZE);
}
