//! Other sizes of closed images: by us and by QEMU in turns, and with the power gone anywhere.

use crate::check::{edit, found, whole};
use crate::made::{CLUSTER, L2, put64};
use crate::qemu::installed;
use crate::repair::{cuts, mend, rules};
use crate::snapshots::Turns;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::resize::{resize, rounded};
use ploop_formats::qcow2::{Qcow2, list_bitmaps, read_header};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::{Break, MutateStore, Mutation, Mutator};
use ploop_formats::store::record::{RecordStore, Recording};
use ploop_formats::store::sim::Fate;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::qcow2::{Held, Image};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Error, Kind};

/// What a place reads as that no image has.
const NOTHING: u8 = 0x5A;

#[test]
fn sizes_by_us_and_by_qemu_show_what_was_there() {
    if !installed("sizes_by_us_and_by_qemu_show_what_was_there") {
        return;
    }
    let kinds = [
        ("cluster_size=64k", true),
        ("cluster_size=512", true),
        ("cluster_size=512,refcount_bits=64", true),
        ("cluster_size=4k,refcount_bits=1", false),
        ("cluster_size=4k,compat=0.10", false),
        ("cluster_size=1k,compression_type=zstd", true),
        ("cluster_size=16k,extended_l2=on", true),
        ("cluster_size=2M,refcount_bits=32", true),
        ("cluster_size=4k,preallocation=metadata", true),
    ];
    let mut done = [0; 4];
    for (n, (kind, snapshots)) in kinds.iter().enumerate() {
        let mut turns = Turns::new(kind, 100 + n as u64);
        let cluster = now(read_header(&MemStore::from_bytes(
            &turns.folder.read("disk"),
        )))
        .unwrap()
        .cluster
        .bytes();
        turns.write();
        for round in 0..10 {
            turns.place = format!("{kind}, round {round}");
            if *snapshots && turns.rng.one_in(4) {
                let by_us = turns.rng.one_in(2);
                turns.make(by_us, &format!("s{round}"));
            }
            let by_us = turns.rng.one_in(2);
            let is = turns.now.len() as u64;
            let to = 512 * turns.rng.range(400, 30_000);
            // QEMU does not zero what it cuts from the last cluster.
            let to = if to < is {
                to.next_multiple_of(cluster)
            } else {
                to
            };
            let to = match by_us {
                true => turns.ours(|store| now(resize(store, None, to, &mut ()))),
                false => {
                    let shrink = if to < is { "--shrink" } else { "" };
                    let line = format!("resize -q -f qcow2 {shrink} disk {to}");
                    turns.folder.img(&line);
                    to
                }
            };
            turns.now.resize(to as usize, 0);
            done[usize::from(by_us) + 2 * usize::from(to < is)] += 1;
            turns.judge();
            turns.write();
            turns.judge_now();
        }
        let bytes = turns.folder.read("disk");
        assert_eq!(found(&bytes).findings, [], "{kind}");
    }
    assert!(done.iter().all(|n| *n > 10), "{done:?}");
}

#[test]
fn what_qemu_left_of_a_cluster_is_not_seen_when_we_make_the_disk_larger() {
    if !installed("what_qemu_left_of_a_cluster_is_not_seen_when_we_make_the_disk_larger") {
        return;
    }
    for kind in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        let mut turns = Turns::new(kind, 7);
        turns.folder.io("disk", &["write -P 7 0 5M".into()]);
        turns.folder.img("resize -q -f qcow2 --shrink disk 1000960");
        turns.now.fill(7);
        turns.now.truncate(1_000_960);
        turns.ours(|store| now(resize(store, None, 3 << 20, &mut ())));
        turns.now.resize(3 << 20, 0);
        turns.judge();
        // Asked for once more, nothing is done.
        let before = turns.folder.read("disk");
        turns.ours(|store| now(resize(store, None, 3 << 20, &mut ())));
        assert!(turns.folder.read("disk") == before);
    }
}

/// What the disk and its snapshots show, and whether bitmaps are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    disk: Vec<u8>,
    shots: Vec<Vec<u8>>,
}

fn bytes_of(image: &Qcow2<MemStore>) -> Result<Vec<u8>, Error> {
    let size = image.geometry().size;
    let mut out = Vec::new();
    while (out.len() as u64) < size {
        let at = out.len() as u64;
        let extent = now(image.map(at, size - at))?;
        let buf = bytes::BytesMut::zeroed(extent.len() as usize);
        match extent {
            Extent::Data { at, .. } => out.extend(now(image.store().read_at(at, buf))?),
            Extent::Packed { .. } => out.extend(now(image.unpack(at, buf))?),
            Extent::Zero { .. } => out.extend(buf),
            Extent::Absent { len } => out.extend(vec![NOTHING; len as usize]),
        }
    }
    Ok(out)
}

fn try_state(store: &MemStore) -> Result<State, Error> {
    let open = || now(Qcow2::open_read(store.clone(), None));
    let shots = now(open()?.snapshots())?;
    let show = |shot| bytes_of(&open()?.at_snapshot(shot)?);
    Ok(State {
        disk: bytes_of(&open()?)?,
        shots: shots.iter().map(show).collect::<Result<_, _>>()?,
    })
}

fn state(store: &MemStore) -> State {
    try_state(store).unwrap()
}

/// An image, and the size that it gets.
#[derive(Clone)]
struct Case {
    bytes: Vec<u8>,
    to: u64,
}

impl Case {
    /// A disk of so many clusters of 512 bytes, and a snapshot or none; of the last ones some are data.
    /// With refcounts of 8 bits the snapshot shares all of them, and the tables, too.
    fn new(from: u64, to: u64, snapshot: bool, order: u32) -> Self {
        let held = |n: u64| match n % 7 {
            _ if n + 40 < from && n > 3 => Held::Nothing,
            0 => Held::Nothing,
            1 => Held::Zero { place: true },
            2 => Held::Zero { place: false },
            3 => Held::Packed(vec![n + 1]),
            _ => Held::Data(vec![n + 1]),
        };
        let image = Image {
            version: 3,
            extended: false,
            behind: 0,
            log2: 9,
            order,
            clusters: (0..from)
                .map(|n| (held(n), order == 3 || n % 3 > 0))
                .collect(),
            snapshot,
            free: 1,
            leaks: 0,
            counted_first: false,
            skip: 0,
        };
        let bytes = image.make(&mut Rng::new(from ^ to)).to_vec();
        let mut case = Self {
            bytes,
            to: to * 512,
        };
        case.poison();
        case
    }

    /// What is behind the first-level table in its last cluster means nothing.
    fn poison(&mut self) {
        let word = |at: usize| u64::from_be_bytes(self.bytes[at..at + 8].try_into().unwrap());
        let entries = u32::from_be_bytes(self.bytes[36..40].try_into().unwrap());
        let end = word(40) as usize + 8 * entries as usize;
        self.bytes[end..end.next_multiple_of(512)].fill(0xB7);
    }

    fn expected(&self, old: &State) -> State {
        let mut new = old.clone();
        new.disk.resize(self.to as usize, NOTHING);
        new
    }

    /// The work, recorded, with a barrier that does nothing or with all of them.
    fn recorded(&self, broken: Option<(Break, u64)>) -> (Recording, MemStore) {
        let below = MemStore::from_bytes(&self.bytes);
        let recording = Recording::new(below.pages());
        let mutator = Mutator::new();
        mutator.set(broken.map(|(how, barrier)| Mutation {
            covers: None,
            how,
            only: Some(barrier),
        }));
        let inner = RecordStore::new(below.clone(), recording.clone());
        let seen = MutateStore::new(inner, mutator, 512);
        assert_eq!(now(resize(&seen, None, self.to, &mut ())).unwrap(), self.to);
        (recording, below)
    }

    /// What is wrong with a state that a cut left.
    fn wrong(&self, store: &MemStore, old: &State) -> Result<(), String> {
        let report = now(check(store)).map_err(|e: Error| e.to_string())?;
        if report.errors > 0 {
            return Err(format!("{report:#?}"));
        }
        let is = try_state(store).map_err(|e| e.to_string())?;
        if is != *old && is != self.expected(old) {
            return Err("neither the old disk nor the new one".into());
        }
        let header = now(read_header(store)).map_err(|e| e.to_string())?;
        let bitmaps = now(list_bitmaps(store, &header)).map_err(|e| e.to_string())?;
        let believed = bitmaps.iter().any(|b| !b.in_use);
        match believed && is.disk.len() != old.disk.len() {
            true => Err("a bitmap that is believed, and is of another disk".into()),
            false => Ok(()),
        }
    }

    fn is_noticed(&self, how: Break, barrier: u64) -> bool {
        let old = state(&MemStore::from_bytes(&self.bytes));
        let (recording, _) = self.recorded(Some((how, barrier)));
        let mut noticed = false;
        cuts(&self.bytes, &recording, |_, store| {
            noticed = noticed || self.wrong(&store, &old).is_err();
        });
        noticed
    }
}

/// A table of 64 entries covers 64 clusters; 64 of those fill a cluster of the first-level table.
fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for snapshot in [false, true] {
        for (from, to) in [
            (10, 30),     // The table has room.
            (60, 300),    // Its cluster has.
            (4090, 4200), // It has none.
            (300, 10),    // In the middle of a table,
            (130, 128),   // between two,
            (130, 64),
            (40, 0), // and all of it.
        ] {
            all.push(Case::new(from, to, snapshot, 4));
        }
    }
    all.push(Case::new(4096, 4097, false, 6));
    all.push(with_bitmap(12));
    all.push(with_bitmap(3));
    let mut left = Case::new(130, 200, true, 4);
    // What a shrinking left that was cut is not seen.
    left.bytes[24..32].copy_from_slice(&(70 * 512u64).to_be_bytes());
    all.push(left);
    all.push(Case::new(300, 10, true, 3));
    all.push(Case::new(100, 70, true, 3));
    all
}

fn with_bitmap(clusters: u64) -> Case {
    let mut bytes = whole();
    // What is compressed there is none of its compressor's.
    edit(&mut bytes, &[(L2 + 48, 8, 0), (L2 + 56, 8, 0)]);
    let store = MemStore::from_bytes(&bytes);
    assert!(mend(&store).is_clean());
    Case {
        bytes: store.to_vec(),
        to: clusters * CLUSTER,
    }
}

#[test]
fn a_new_size_may_be_cut_anywhere_and_the_same_call_goes_on() {
    let mut states = 0;
    for (n, case) in cases().iter().enumerate() {
        let old = state(&MemStore::from_bytes(&case.bytes));
        let (recording, new) = case.recorded(None);
        assert_eq!(state(&new), case.expected(&old), "case {n}");
        assert!(found(&new.to_vec()).is_clean(), "case {n}");
        // Of the large ones each state takes long.
        let each = if old.disk.len() > 1 << 20 { 7 } else { 1 };
        let mut count = n;
        cuts(&case.bytes, &recording, |cut, store| {
            count += 1;
            if count % each > 0 {
                return;
            }
            let place = format!("case {n}, {cut}");
            case.wrong(&store, &old)
                .unwrap_or_else(|e| panic!("{place}: {e}"));
            now(resize(&store, None, case.to, &mut ())).unwrap_or_else(|e| panic!("{place}: {e}"));
            let report = now(check(&store)).unwrap();
            assert_eq!(report.errors, 0, "{place}: {report:#?}");
            assert!(state(&store) == case.expected(&old), "{place}");
            assert!(mend(&store).is_clean(), "{place}");
            states += 1;
        });
        let durable = recording.cut(recording.entries().len(), rules(), &Fate::None);
        assert!(
            state(&MemStore::from_pages(durable)) == state(&new),
            "case {n}"
        );
    }
    println!("COUNT: {states} states");
    assert!(states > 600, "{states}");
}

#[test]
fn every_barrier_of_a_new_size_is_missed_when_it_is_gone() {
    for (n, needed) in NEEDED {
        let case = &cases()[*n];
        let noticed: Vec<u64> = (0..7)
            .filter(|b| case.is_noticed(Break::Drop, *b))
            .collect();
        assert_eq!(noticed, *needed, "case {n}");
    }
}

/// Barriers of some cases without which a cut would leave something wrong.
const NEEDED: &[(usize, &[u64])] = &[
    (1, &[0]),
    (2, &[1, 2]),
    (3, &[0, 1]),
    (10, &[0, 1]),
    (14, &[1, 2]),
    (15, &[0]),
    (16, &[0, 1, 2]),
    (17, &[0, 2]),
    (18, &[0, 1]),
    (19, &[2, 3]),
];

#[test]
fn what_cannot_be_done_changes_nothing() {
    let refused = |bytes: &[u8], size: u64, kind| {
        let store = MemStore::from_bytes(bytes);
        let e = now(resize(&store, None, size, &mut ())).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(store.to_vec() == bytes, "{e}: changed");
    };
    let edited = |edits: &[(u64, usize, u64)]| {
        let mut bytes = whole();
        edit(&mut bytes, edits);
        bytes
    };
    refused(&whole(), u64::MAX, Kind::Invalid);
    refused(
        &whole(),
        (32 << 20) / 8 * CLUSTER / 8 * CLUSTER + 1,
        Kind::Invalid,
    );
    refused(&edited(&[(72, 8, 1)]), 20 * CLUSTER, Kind::Damaged);
    refused(&edited(&[(72, 8, 2)]), 20 * CLUSTER, Kind::Damaged);
    // A snapshot that does not say its size has the disk's.
    let silent = edited(&[
        (8 * CLUSTER + 36, 4, 0),
        (8 * CLUSTER + 40, 8, u64::from_be_bytes(*b"1name\0\0\0")),
    ]);
    refused(&silent, 20 * CLUSTER, Kind::Unsupported);
    // An error anywhere: what is to be let go of is not known.
    let broken = edited(&[(L2 + 8, 8, 5)]);
    refused(&broken, 2 * CLUSTER, Kind::Damaged);
    let header = now(read_header(&MemStore::from_bytes(&whole()))).unwrap();
    assert_eq!(rounded(&header, 8 * CLUSTER + 1).unwrap(), 9 * CLUSTER);
}

#[test]
fn bytes_behind_the_end_that_a_snapshot_has_too_are_not_shown() {
    // Guest cluster 2 is shared with the snapshot; the disk ends within it.
    let mut bytes = whole();
    put64(&mut bytes, 24, 2 * CLUSTER + 512);
    for guest in [5, 6, 7] {
        put64(&mut bytes, (L2 + 8 * guest) as usize, 0);
    }
    put64(&mut bytes, 88, 0);
    let store = MemStore::from_bytes(&bytes);
    crate::repair::mend(&store);
    let bytes = store.to_vec();
    let e = now(resize(&store, None, 8 * CLUSTER, &mut ())).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported, "{e}");
    assert!(store.to_vec() == bytes);
    // Smaller it may get.
    now(resize(&store, None, CLUSTER, &mut ())).unwrap();
    assert!(found(&store.to_vec()).is_clean());
}
