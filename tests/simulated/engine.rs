//! The engine over memory, one request at a time: every request means what a flat disk means, with
//! and without a parent, across reopening, and QEMU agrees with the file.

use bytes::{Bytes, BytesMut};
use ploop::device::{Device, Zero};
use ploop::disk::Disk;
use ploop::stack::{AnyLayer, NewSize, Stack};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::extension::{Extension, Feature, NECESSARY, TRANSIT};
use ploop_formats::ploop::header::CLOSED_V21;
use ploop_formats::ploop::{Header, Ploop, Version};
use ploop_formats::qcow2::Qcow2;
use ploop_formats::qcow2::create::{Create, create};
use ploop_formats::raw::Raw;
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::record::{Entry, RecordStore, Recording};
use ploop_formats::units::ClusterSize;
use ploop_formats::{buf, store::Reach};
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

const CLUSTER: u64 = 32 << 10;
const SIZE: u64 = 24 * CLUSTER;

/// Memory never waits, so one poll runs a request to its end.
fn now<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(out) => out,
        Poll::Pending => panic!("a request over memory waits for something"),
    }
}

fn blank(version: Version) -> MemStore {
    blank_of(version, SIZE)
}

fn blank_of(version: Version, size: u64) -> MemStore {
    let store = MemStore::new(0);
    let header = Header::new(version, size, ClusterSize::new(CLUSTER).unwrap()).unwrap();
    now(async {
        store
            .set_len(header.cluster.start(header.data_start))
            .await
            .unwrap();
        let mut page = buf::aligned(4096);
        page[..64].copy_from_slice(&header.encode());
        store
            .write_at(0, page.freeze(), Reach::Cache)
            .await
            .unwrap();
    });
    store
}

fn open(stores: &[MemStore]) -> Disk<MemStore> {
    let (top, lower) = stores.split_last().unwrap();
    let mut layers: Vec<_> = lower
        .iter()
        .map(|s| AnyLayer::Ploop(now(Ploop::open_read(s.clone())).unwrap()))
        .collect();
    layers.push(AnyLayer::Ploop(
        now(Ploop::open_write(top.clone(), Ledger::local())).unwrap(),
    ));
    Disk::new(layers, false).unwrap()
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn read(disk: &Disk<MemStore>, at: u64, len: usize) -> BytesMut {
    now(disk.read(at, buf::aligned(len))).unwrap()
}

fn step(disk: &Disk<MemStore>, model: &mut [u8], rng: &mut Rng, unit: u64) {
    let at = rng.below(SIZE / unit) * unit;
    let len = (1 + rng.below(3 * CLUSTER / unit)).min((SIZE - at) / unit) * unit;
    let range = at as usize..(at + len) as usize;
    match rng.below(8) {
        0..=3 => {
            let fill = rng.below(255) as u8 + 1;
            let mut data = buf::aligned(len as usize);
            data.fill(fill);
            now(disk.write(at, data.freeze(), rng.below(4) == 0)).unwrap();
            model[range].fill(fill);
        }
        4 => {
            let how = [Zero::MayFree, Zero::Allocate][rng.below(2) as usize];
            now(disk.zero(at, len, how, false)).unwrap();
            model[range].fill(0);
        }
        5 => {
            now(disk.discard(at, len)).unwrap();
            let after = read(disk, at, len as usize);
            for (now, old) in after.iter().zip(&mut model[range]) {
                assert!(
                    *now == *old || *now == 0,
                    "a discard shows neither old bytes nor zeros"
                );
                *old = *now;
            }
        }
        6 => now(disk.flush()).unwrap(),
        _ => assert_eq!(&read(disk, at, len as usize)[..], &model[range]),
    }
}

#[test]
fn a_stack_is_a_flat_disk_whatever_is_done_to_it() {
    for seed in 1..=60u64 {
        let version = if seed % 2 == 0 {
            Version::V1
        } else {
            Version::V2
        };
        let unit = if seed % 3 == 0 { 100 } else { 512 };
        let unit = if SIZE.is_multiple_of(unit) { unit } else { 96 };
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut model = vec![0u8; SIZE as usize];
        let mut stores = vec![blank(version)];
        for depth in 0..4 {
            for _ in 0..3 {
                let disk = open(&stores);
                for _ in 0..60 {
                    step(&disk, &mut model, &mut rng, unit);
                }
                now(disk.close()).unwrap();
            }
            let disk = open(&stores);
            assert_eq!(
                &read(&disk, 0, SIZE as usize)[..],
                &model[..],
                "seed {seed} depth {depth}"
            );
            now(disk.close()).unwrap();
            stores.push(blank(version));
        }
    }
}

#[test]
fn steady_overwrite_does_not_grow_the_file() {
    let store = blank(Version::V2);
    let disk = open(std::slice::from_ref(&store));
    let whole = || Bytes::from(vec![7u8; SIZE as usize]);
    now(disk.write(0, whole(), false)).unwrap();
    now(disk.flush()).unwrap();
    let len = store.info().len;
    for _ in 0..10 {
        now(disk.write(0, whole(), false)).unwrap();
        now(disk.flush()).unwrap();
        assert_eq!(store.info().len, len);
    }
    now(disk.close()).unwrap();
    assert_eq!(
        store.info().len,
        CLUSTER + SIZE,
        "a clean close leaves no unused tail"
    );
}

#[test]
fn a_flush_of_first_writes_is_one_barrier_also_while_the_file_grows() {
    let store = blank_of(Version::V2, 2048 * CLUSTER);
    let recording = Recording::new(Pages::default());
    let store = RecordStore::new(store, recording.clone());
    let top = AnyLayer::Ploop(now(Ploop::open_write(store, Ledger::local())).unwrap());
    let disk = Disk::new(vec![top], false).unwrap();
    let barriers = || {
        let is_flush = |entry: &&Entry| matches!(entry, Entry::Flush { .. });
        recording.entries().iter().filter(is_flush).count()
    };
    let write = |n: u64| {
        let data = Bytes::from(vec![1u8; 4096]);
        now(disk.write(n * CLUSTER, data, false)).unwrap();
    };
    // The very first cluster finds a file without room.
    write(0);
    now(disk.flush()).unwrap();
    let before = barriers();
    for pass in 1..128 {
        (0..16).for_each(|n| write(16 * pass + n));
        now(disk.flush()).unwrap();
    }
    assert_eq!(barriers() - before, 127);
}

#[test]
fn a_bad_entry_of_a_lower_layer_costs_its_own_cluster_alone() {
    let stores: Vec<MemStore> = (0..4).map(|_| blank(Version::V2)).collect();
    let base = open(&stores[..1]);
    now(base.write(0, Bytes::from(vec![7u8; SIZE as usize]), false)).unwrap();
    now(base.close()).unwrap();
    let bad = 5u64;
    now(async {
        let mut page = stores[0].read_at(0, buf::aligned(4096)).await.unwrap();
        page[64 + 4 * bad as usize..][..4].copy_from_slice(&9999u32.to_le_bytes());
        let page = page.freeze();
        stores[0].write_at(0, page, Reach::Cache).await.unwrap();
    });
    let disk = open(&stores);
    for n in 0..SIZE / CLUSTER {
        let got = now(disk.read(n * CLUSTER, buf::aligned(4096)));
        assert_eq!(got.is_err(), n == bad, "cluster {n}");
    }
}

#[test]
fn zeros_at_the_ends_of_what_is_copied_up_take_no_space() {
    let (base, top) = (blank(Version::V2), blank(Version::V2));
    let below = open(std::slice::from_ref(&base));
    now(below.write(8192, Bytes::from(vec![7u8; 4096]), false)).unwrap();
    now(below.close()).unwrap();
    let recording = Recording::new(Pages::default());
    let upper = RecordStore::new(top, recording.clone());
    let lower = RecordStore::new(base, Recording::default());
    let layers = vec![
        AnyLayer::Ploop(now(Ploop::open_read(lower)).unwrap()),
        AnyLayer::Ploop(now(Ploop::open_write(upper, Ledger::local())).unwrap()),
    ];
    let disk = Disk::new(layers, false).unwrap();
    let before = recording.entries().len();
    now(disk.write(16384, Bytes::from(vec![9u8; 4096]), false)).unwrap();
    let entries = recording.entries();
    let written: Vec<usize> = entries[before..]
        .iter()
        .filter_map(|entry| match entry {
            Entry::Write { data, .. } => Some(data.len()),
            _ => None,
        })
        .collect();
    assert_eq!(
        written,
        [12288],
        "the data, the zeros between, the new bytes"
    );
    let mut expected = vec![0u8; CLUSTER as usize];
    expected[8192..12288].fill(7);
    expected[16384..20480].fill(9);
    assert_eq!(
        now(disk.read(0, buf::aligned(CLUSTER as usize))).unwrap(),
        expected
    );
}

#[test]
fn discarded_space_is_used_again_and_reads_as_zeros() {
    let store = blank(Version::V2);
    let disk = open(std::slice::from_ref(&store));
    for round in 0..20u8 {
        let data = Bytes::from(vec![round + 1; SIZE as usize]);
        now(disk.write(0, data, false)).unwrap();
        now(disk.flush()).unwrap();
        now(disk.discard(0, SIZE)).unwrap();
        now(disk.flush()).unwrap();
        now(disk.flush()).unwrap();
        now(disk.write(CLUSTER + 512, Bytes::from(vec![9u8; 512]), false)).unwrap();
        assert!(read(&disk, CLUSTER, 512).iter().all(|b| *b == 0));
    }
    now(disk.close()).unwrap();
    assert_eq!(store.info().len, 2 * CLUSTER, "one cluster of data is left");
}

#[test]
#[should_panic(expected = "inside header and table")]
fn no_guest_write_reaches_header_or_table() {
    let store = blank(Version::V2);
    let disk = open(std::slice::from_ref(&store));
    let _ = now(disk
        .stack()
        .write_data(CLUSTER - 512, Bytes::from(vec![1u8; 512]), Reach::Cache));
}

/// A blank image whose format extension holds one feature.
fn with_feature(magic: u64, flags: u64) -> MemStore {
    let store = blank(Version::V2);
    let feature = Feature {
        magic,
        flags,
        data: vec![5; 16],
    };
    let size = ClusterSize::new(CLUSTER).unwrap();
    let cluster = Extension {
        features: vec![feature],
    }
    .build(size)
    .unwrap();
    now(async {
        let page = store.read_at(0, buf::aligned(4096)).await.unwrap();
        let mut header = Header::parse(&page).unwrap();
        header.in_use = CLOSED_V21;
        header.extension = CLUSTER / 512;
        let mut page = page;
        page[..64].copy_from_slice(&header.encode());
        store.set_len(2 * CLUSTER).await.unwrap();
        store
            .write_at(0, page.freeze(), Reach::Cache)
            .await
            .unwrap();
        store
            .write_at(CLUSTER, cluster.into(), Reach::Cache)
            .await
            .unwrap();
    });
    store
}

#[test]
fn an_unknown_feature_is_kept_dropped_or_refused_as_its_flags_say() {
    for (flags, kept) in [(0, false), (TRANSIT, true)] {
        let store = with_feature(0x1234, flags);
        let disk = open(std::slice::from_ref(&store));
        now(disk.write(0, Bytes::from(vec![1u8; 512]), false)).unwrap();
        now(disk.close()).unwrap();
        let page = now(store.read_at(0, buf::aligned(4096))).unwrap();
        let header = Header::parse(&page).unwrap();
        assert_eq!(
            (header.in_use == CLOSED_V21, header.extension != 0),
            (kept, kept)
        );
        if kept {
            let at = header.extension * 512;
            let cluster = now(store.read_at(at, buf::aligned(CLUSTER as usize))).unwrap();
            assert_eq!(
                Extension::parse(&cluster).unwrap().features[0].data,
                vec![5; 16]
            );
        }
        let disk = open(std::slice::from_ref(&store));
        assert_eq!(read(&disk, 0, 512)[..], [1u8; 512]);
    }
    let store = with_feature(0x1234, NECESSARY);
    let before = store.to_vec();
    assert!(now(Ploop::open_write(store.clone(), Ledger::local())).is_err());
    assert!(now(Ploop::open_read(store.clone())).is_err());
    assert_eq!(store.to_vec(), before, "a refused image is untouched");
}

/// A stack whose top wants `align`, over a full parent of `sectors` sectors.
fn over_a_parent(sectors: u64, align: u64) -> (Disk<MemStore>, Vec<u8>) {
    let make = || {
        let store = blank(Version::V2);
        now(async {
            let mut page = store.read_at(0, buf::aligned(4096)).await.unwrap();
            let mut header = Header::parse(&page).unwrap();
            header.sectors = sectors;
            page[..64].copy_from_slice(&header.encode());
            store
                .write_at(0, page.freeze(), Reach::Cache)
                .await
                .unwrap();
        });
        store
    };
    let base = make();
    let below = open(std::slice::from_ref(&base));
    let model: Vec<u8> = (0..sectors * 512).map(|i| (i / 512 + 1) as u8).collect();
    now(below.write(0, Bytes::from(model.clone()), false)).unwrap();
    now(below.close()).unwrap();
    (open(&[base, make().aligned_to(align)]), model)
}

#[test]
fn a_write_that_is_aligned_to_nothing_gets_its_clusters_over_a_parent() {
    for (align, at) in [(512, 100), (4096, 512), (4096, 100)] {
        let (disk, mut model) = over_a_parent(SIZE / 512, align);
        let mut data = buf::aligned(3 * CLUSTER as usize);
        data.fill(0xEE);
        model[at..at + data.len()].fill(0xEE);
        now(disk.write(at as u64, data.freeze(), false)).unwrap();
        now(disk.flush()).unwrap();
        assert!(
            read(&disk, 0, model.len())[..] == model[..],
            "align {align}, at {at}"
        );
    }
}

#[test]
fn a_size_that_no_block_divides_is_served_to_its_last_sector() {
    for align in [1, 512, 4096] {
        for sectors in [SIZE / 512 - 63, SIZE / 512 - 1] {
            let (disk, mut model) = over_a_parent(sectors, align);
            let last = model.len() - 512;
            assert!(read(&disk, 0, model.len())[..] == model[..]);
            assert!(read(&disk, last as u64, 512)[..] == model[last..]);
            let mut data = buf::aligned(512);
            data.fill(0xEE);
            now(disk.write(last as u64, data.freeze(), true)).unwrap();
            model[last..].fill(0xEE);
            assert!(read(&disk, 0, model.len())[..] == model[..]);
            let mut data = buf::aligned(model.len());
            data.fill(0xDD);
            now(disk.write(0, data.freeze(), true)).unwrap();
            model.fill(0xDD);
            assert!(read(&disk, 0, model.len())[..] == model[..]);
            now(disk.zero(0, model.len() as u64, Zero::MayFree, true)).unwrap();
            assert!(read(&disk, 0, model.len()).iter().all(|b| *b == 0));
            now(disk.close()).unwrap();
        }
        let (disk, mut model) = over_a_parent(SIZE / 512 - 1, align);
        let tail = model.len() - CLUSTER as usize;
        now(disk.zero(tail as u64, CLUSTER, Zero::Allocate, true)).unwrap();
        model[tail..].fill(0);
        assert!(read(&disk, 0, model.len())[..] == model[..]);
    }
}

#[test]
fn only_what_waits_for_a_flush_wakes_who_writes_back() {
    let disk = open(&[blank(Version::V2)]);
    let woken = || now(futures_util::future::poll_immediate(disk.changed())).is_some();
    let write = |at: u64| {
        let mut data = buf::aligned(512);
        data.fill(1);
        now(disk.write(at, data.freeze(), false)).unwrap();
    };
    assert!(!woken(), "nothing happened yet");
    write(0);
    assert!(woken() && !woken(), "a first write, told once");
    now(disk.write_back()).unwrap();
    write(512);
    now(disk.flush()).unwrap();
    read(&disk, 0, 512);
    assert!(
        !woken(),
        "a rewrite in place, a flush and a read leave nothing behind"
    );
    now(disk.zero(0, CLUSTER, Zero::MayFree, false)).unwrap();
    assert!(woken(), "a cluster that was freed");
}

/// Layers of a backing chain: an empty top with small clusters, a short image with large ones whose
/// second cluster has data, and a raw file, full of 7, that is the largest and ends within a sector.
fn chain() -> Vec<AnyLayer<MemStore>> {
    let large = ClusterSize::new(2 * CLUSTER).unwrap();
    let middle = MemStore::new(0);
    let header = Header::new(Version::V2, 8 * CLUSTER, large).unwrap();
    now(async {
        let len = header.cluster.start(header.data_start);
        middle.set_len(len).await.unwrap();
        let mut page = buf::aligned(4096);
        page[..64].copy_from_slice(&header.encode());
        let done = middle.write_at(0, page.freeze(), Reach::Cache);
        done.await.unwrap();
    });
    let layer = now(Ploop::open_write(middle.clone(), Ledger::local())).unwrap();
    let disk = Disk::new([AnyLayer::Ploop(layer)], false).unwrap();
    let nine = Bytes::from(vec![9; 2 * CLUSTER as usize]);
    now(disk.write(2 * CLUSTER, nine, false)).unwrap();
    now(disk.close()).unwrap();
    let base = MemStore::from_bytes(&vec![7; (SIZE + 8 * CLUSTER) as usize - 300]);
    vec![
        AnyLayer::Raw(Raw::open_backing(base, large)),
        AnyLayer::Ploop(now(Ploop::open_read(middle)).unwrap()),
        AnyLayer::Ploop(now(Ploop::open_read(blank(Version::V2))).unwrap()),
    ]
}

#[test]
fn a_backing_chain_ends_where_the_image_ends_that_it_is_seen_through() {
    assert!(Stack::new(chain()).is_err(), "no descriptor may say so");
    let layers = chain().into_iter().map(Into::into).collect();
    let disk = Disk::over(Stack::of_chain(layers).unwrap(), true);
    let mut expected = vec![0; SIZE as usize];
    expected[..8 * CLUSTER as usize].fill(7);
    expected[2 * CLUSTER as usize..4 * CLUSTER as usize].fill(9);
    assert!(read(&disk, 0, SIZE as usize)[..] == expected);
    let (at, len) = (4 * CLUSTER - 512, 4 * CLUSTER as usize + 1024);
    assert!(read(&disk, at, len)[..] == expected[at as usize..][..len]);
    let extents = now(disk.extents(0, SIZE, 9)).unwrap();
    let found: Vec<_> = extents.iter().map(|e| (e.len, e.zero, e.depth)).collect();
    let (data, small) = (2 * CLUSTER, 4 * CLUSTER);
    let zeros = SIZE - 8 * CLUSTER;
    assert_eq!(
        found,
        [
            (data, false, 3),
            (data, false, 2),
            (small, false, 3),
            (zeros, true, 0)
        ]
    );
}

/// Two qcow2 images of one size, the lower first.
fn qcow2_layers() -> Vec<AnyLayer<MemStore>> {
    let wanted = Create::new(SIZE, ClusterSize::new(CLUSTER).unwrap());
    let stores = [MemStore::default(), MemStore::default()];
    stores.iter().for_each(|s| now(create(s, &wanted)).unwrap());
    let [below, top] = stores;
    let below = now(Qcow2::open_read(below, None)).unwrap();
    let top = now(Qcow2::open_write(top, None, Ledger::local())).unwrap();
    [below, top].map(|i| AnyLayer::Qcow2(Box::new(i))).into()
}

#[test]
fn a_disk_gets_no_smaller_than_a_snapshot_below_whatever_the_format() {
    let smaller = NewSize::Smaller(SIZE / 2);
    let disk = Stack::new(qcow2_layers()).unwrap();
    let refused = disk.resized(smaller).unwrap_err();
    assert!(refused.to_string().contains("snapshot"), "{refused}");
    assert_eq!(disk.resized(NewSize::Larger(2 * SIZE)).unwrap(), 2 * SIZE);
    // One over a backing file may, and does not grow again.
    let chain = qcow2_layers().into_iter().map(Into::into).collect();
    let chain = Stack::of_chain(chain).unwrap();
    assert_eq!(chain.resized(smaller).unwrap(), SIZE / 2);
}

#[test]
fn a_backing_file_that_ends_within_a_sector_is_read_to_its_last_byte() {
    let base = MemStore::from_bytes(&[7; 1000]);
    let mut layers = vec![AnyLayer::Raw(Raw::open_backing(
        base,
        ClusterSize::new(CLUSTER).unwrap(),
    ))];
    layers.push(chain().pop().unwrap());
    let layers = layers.into_iter().map(Into::into).collect();
    let disk = Disk::over(Stack::of_chain(layers).unwrap(), true);
    let found = read(&disk, 0, 4096);
    assert!(found[..1000].iter().all(|b| *b == 7) && found[1000..].iter().all(|b| *b == 0));
    let extents = now(disk.extents(0, SIZE, 9)).unwrap();
    assert_eq!((extents[0].len, extents[0].zero), (1024, false));
}
