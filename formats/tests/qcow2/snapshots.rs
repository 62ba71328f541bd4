//! Snapshots of closed images, by us and by QEMU in turns: each shows what was there when it was
//! made, QEMU's check finds nothing, and after any cut the image is the old one or the new one.

use crate::chain::Chain;
use crate::check::{edit, found, whole};
use crate::made::{CLUSTER, put32, put64};
use crate::qemu::{Folder, installed};
use crate::repair::{cuts, mend, views};
use ploop_formats::Kind;
use ploop_formats::qcow2::Qcow2;
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::create::{Create, create as create_image};
use ploop_formats::qcow2::header::{Compression, Version};
use ploop_formats::qcow2::refcount::Width;
use ploop_formats::qcow2::snapshots::{Wanted, create, delete, revert};
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::{Break, MutateStore, Mutation, Mutator};
use ploop_formats::store::record::{RecordStore, Recording};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Error, Result};

const SIZE: u64 = 5 << 20;

fn wanted(name: &str) -> Wanted {
    Wanted {
        name: name.into(),
        seconds: 1_700_000_000,
        nanoseconds: 5,
    }
}

/// A store that is recorded, and whose barriers can be taken out.
pub type Seen = MutateStore<RecordStore<MemStore>>;
/// What is done to an image.
pub type Work = fn(&Seen) -> Result<()>;

/// A snapshot of a state of the disk.
#[derive(Clone)]
struct Shot {
    id: String,
    name: String,
    was: Vec<u8>,
}

/// An image that QEMU and we work on in turns, and what it must show.
pub struct Turns {
    pub folder: Folder,
    pub now: Vec<u8>,
    shots: Vec<Shot>,
    pub rng: Rng,
    pub place: String,
}

impl Turns {
    pub fn new(options: &str, seed: u64) -> Self {
        let folder = Folder::new();
        folder.img(&format!("create -q -f qcow2 -o {options} disk {SIZE}"));
        Self {
            folder,
            now: vec![0; SIZE as usize],
            shots: Vec::new(),
            rng: Rng::new(seed),
            place: options.into(),
        }
    }

    /// QEMU writes.
    pub fn write(&mut self) {
        let mut lines = Vec::new();
        for _ in 0..1 + self.rng.below(6) {
            let size = self.now.len() as u64;
            let len = 512 * (1 + self.rng.below(300));
            let at = 512 * self.rng.below((size - len) / 512);
            let fill = self.rng.below(255) as u8;
            self.now[at as usize..(at + len) as usize].fill(fill);
            lines.push(match fill {
                0 => format!("write -z {at} {len}"),
                fill => format!("write -P {fill} {at} {len}"),
            });
        }
        self.folder.io("disk", &lines);
    }

    /// We work on the file.
    pub fn ours<T>(&self, work: impl FnOnce(&MemStore) -> Result<T>) -> T {
        let bytes = self.folder.read("disk");
        // QEMU ends files anywhere.
        let align = if bytes.len().is_multiple_of(512) {
            512
        } else {
            1
        };
        let store = MemStore::from_bytes(&bytes).aligned_to(align);
        let done = work(&store).unwrap_or_else(|e| panic!("{}: {e}", self.place));
        let report = now(check(&store)).unwrap();
        assert_eq!(report.findings, [], "{}", self.place);
        std::fs::write(self.folder.path("disk"), store.to_vec()).unwrap();
        done
    }

    pub fn make(&mut self, by_us: bool, name: &str) {
        let id = if by_us {
            let id = self.ours(|store| now(create(store, &wanted(name), &mut ())));
            String::from_utf8(id).unwrap()
        } else {
            self.folder.img(&format!("snapshot -c {name} disk"));
            let ids = self.ours(|store| {
                let image = now(Qcow2::open_read(store.clone(), None))?;
                now(image.snapshots())
            });
            String::from_utf8(ids.last().unwrap().id.clone()).unwrap()
        };
        assert!(self.shots.iter().all(|other| other.id != id));
        self.shots.push(Shot {
            id,
            name: name.into(),
            was: self.now.clone(),
        });
    }

    fn forget(&mut self, by_us: bool) {
        let n = self.rng.below(self.shots.len() as u64) as usize;
        let Shot { id, name, .. } = self.shots.remove(n);
        if by_us {
            self.ours(|store| now(delete(store, id.as_bytes(), &mut ())));
        } else {
            self.folder.img(&format!("snapshot -d {name} disk"));
        }
    }

    fn go_back(&mut self, by_us: bool) {
        let n = self.rng.below(self.shots.len() as u64) as usize;
        let Shot { id, name, was } = self.shots[n].clone();
        if by_us {
            self.ours(|store| now(revert(store, id.as_bytes(), &mut ())));
        } else {
            self.folder.img(&format!("snapshot -a {name} disk"));
        }
        self.now = was;
    }

    /// QEMU finds nothing, and the disk shows what it must.
    pub fn judge_now(&self) {
        let place = &self.place;
        assert_eq!(self.folder.check("disk"), Some((0, 0)), "{place}");
        assert!(self.folder.convert("disk", "flat"));
        assert!(self.folder.read("flat") == self.now, "{place}: the disk");
        let file = |name: &str| self.folder.read(name);
        let ours = Chain::open("disk", &file).unwrap().all().unwrap();
        assert!(ours == self.now, "{place}: the disk as we read it");
    }

    /// The same, and the snapshots show what they must.
    pub fn judge(&self) {
        self.judge_now();
        for Shot { id, was, .. } in &self.shots {
            let place = &self.place;
            let place = format!("{place}: snapshot {id}");
            assert!(self.shot(id) == *was, "{place} as we read it");
            // QEMU shows no other size than the disk's.
            if was.len() == self.now.len() {
                let line = format!("convert -l snapshot.id={id} -f qcow2 -O raw disk flat");
                self.folder.img(&line);
                assert!(self.folder.read("flat") == *was, "{place}");
            }
        }
    }

    /// A snapshot as we read it.
    fn shot(&self, id: &str) -> Vec<u8> {
        let file = |name: &str| self.folder.read(name);
        let mut chain = Chain::open("disk", &file).unwrap();
        let all = now(chain.top.snapshots()).unwrap();
        let snapshot = all.iter().find(|s| s.id == id.as_bytes());
        chain.top = chain.top.at_snapshot(snapshot.unwrap()).unwrap();
        chain.all().unwrap()
    }
}

#[test]
fn snapshots_by_us_and_by_qemu_show_what_was_there() {
    if !installed("snapshots_by_us_and_by_qemu_show_what_was_there") {
        return;
    }
    let kinds = [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=8",
        "cluster_size=4k,compat=0.10",
        "cluster_size=64k,lazy_refcounts=on",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=2M,refcount_bits=32",
        "cluster_size=64k,preallocation=metadata",
    ];
    let mut done = [0; 6];
    for (n, kind) in kinds.iter().enumerate() {
        let mut turns = Turns::new(kind, n as u64);
        turns.write();
        for round in 0..8 {
            let (what, by_us) = (turns.rng.below(8), turns.rng.below(2) > 0);
            turns.place = format!("{kind}, round {round}");
            let index = match what {
                _ if turns.shots.is_empty() => 0,
                0..=2 => 0,
                3..=4 => 1,
                _ => 2,
            };
            match index {
                0 => turns.make(by_us, &format!("s{round}")),
                1 => turns.forget(by_us),
                _ => turns.go_back(by_us),
            }
            done[index + 3 * usize::from(by_us)] += 1;
            turns.place = format!("{}, {index}, by us {by_us}", turns.place);
            turns.judge_now();
            if turns.rng.below(3) > 0 {
                turns.write();
            }
        }
        turns.judge();
        // What was ours is QEMU's to delete, and the other way round.
        while !turns.shots.is_empty() {
            let by_us = turns.shots.len().is_multiple_of(2);
            turns.forget(by_us);
            turns.judge_now();
        }
        let bytes = turns.folder.read("disk");
        assert_eq!(found(&bytes).findings, [], "{kind}");
    }
    assert!(done.iter().all(|n| *n > 2), "{done:?}");
}

#[test]
fn qemu_lists_a_snapshot_of_ours_as_it_was_asked_for() {
    if !installed("qemu_lists_a_snapshot_of_ours_as_it_was_asked_for") {
        return;
    }
    let mut turns = Turns::new("cluster_size=64k", 1);
    turns.make(true, "first");
    let info = turns.folder.info("disk");
    for says in [
        "\"name\": \"first\"",
        "\"id\": \"1\"",
        "\"date-sec\": 1700000000",
        "\"date-nsec\": 5",
        "\"vm-state-size\": 0",
    ] {
        assert!(info.contains(says), "{says}: {info}");
    }
}

#[test]
fn a_revert_brings_the_size_back() {
    if !installed("a_revert_brings_the_size_back") {
        return;
    }
    let mut turns = Turns::new("cluster_size=4k", 2);
    turns.write();
    turns.make(true, "small");
    turns.folder.img("resize -q -f qcow2 disk 40M");
    turns.now.resize(40 << 20, 0);
    turns.write();
    turns.judge();
    turns.make(true, "large");
    turns.shots.swap(0, 1);
    for size in [SIZE, 40 << 20, SIZE] {
        let which = turns.shots.iter().position(|s| s.was.len() as u64 == size);
        let shot = turns.shots.remove(which.unwrap());
        turns.ours(|store| now(revert(store, shot.id.as_bytes(), &mut ())));
        turns.now.clone_from(&shot.was);
        turns.shots.push(shot);
        turns.judge();
        turns.write();
        turns.judge();
    }
}

/// A small image with a snapshot, without compressed data and bitmaps.
fn small() -> Vec<u8> {
    let mut bytes = whole();
    edit(
        &mut bytes,
        &[
            (4 * CLUSTER + 48, 8, 0),
            (4 * CLUSTER + 56, 8, 0),
            (88, 8, 0),
        ],
    );
    // The bitmap is forgotten with its clusters.
    put64(&mut bytes, 112, 0);
    let store = MemStore::from_bytes(&bytes);
    let report = mend(&store);
    assert_eq!(report.findings, []);
    store.to_vec()
}

fn making(store: &Seen) -> Result<()> {
    now(create(store, &wanted("new"), &mut ())).map(drop)
}

fn deleting(store: &Seen) -> Result<()> {
    now(delete(store, b"1", &mut ()))
}

fn reverting(store: &Seen) -> Result<()> {
    now(revert(store, b"1", &mut ()))
}

/// Images that there are: with one snapshot, with two, where no refcount block tells of what is behind
/// the end, and with a flag in the tables of the snapshot that is not true any more.
fn images() -> Vec<Vec<u8>> {
    let one = small();
    let store = MemStore::from_bytes(&one);
    now(create(&store, &wanted("other"), &mut ())).unwrap();
    // Nobody asks for the flags of a snapshot until it is reverted to.
    let mut stale = one.clone();
    put64(
        &mut stale,
        (10 * CLUSTER + 16) as usize,
        (6 * CLUSTER) | 1 << 63,
    );
    assert!(found(&stale).is_clean());
    vec![one, store.to_vec(), tight(), stale]
}

/// An image of clusters of 512 bytes with refcounts of 64 bits and a snapshot. Of its file, so many
/// clusters are there before its refcount blocks are made for them.
fn full(clusters: u64) -> Vec<u8> {
    let image = Create {
        version: Version::V3,
        size: 4 << 20,
        cluster: ClusterSize::of_qcow2(9).unwrap(),
        width: Width::new(6).unwrap(),
        extended: false,
        lazy: false,
        compression: Compression::Deflate,
        backing: None,
    };
    let store = MemStore::default();
    now(create_image(&store, &image)).unwrap();
    now(create(&store, &wanted("empty"), &mut ())).unwrap();
    let mut bytes = store.to_vec();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
    let first = bytes.len() as u64 / 512;
    bytes.resize(clusters as usize * 512, 7);
    // A second-level table, the 64 clusters that it names, and so on.
    for (n, cluster) in (first..clusters).enumerate() {
        let (group, within) = (n as u64 / 65, n as u64 % 65);
        let table = (first + group * 65) * 512;
        let word = (cluster * 512) | 1 << 63;
        if within == 0 {
            bytes[table as usize..table as usize + 512].fill(0);
            put64(&mut bytes, (l1 + 8 * group) as usize, word);
        } else {
            put64(&mut bytes, (table + 8 * (within - 1)) as usize, word);
        }
    }
    let store = MemStore::from_bytes(&bytes);
    assert_eq!(mend(&store).findings, []);
    store.to_vec()
}

/// One whose refcount block tells of its file, and of no cluster more.
fn tight() -> Vec<u8> {
    let bytes = full(64);
    assert_eq!(bytes.len(), 64 * 512);
    bytes
}

/// One whose refcount table names as many blocks as it can, all of them full.
fn tightest() -> Vec<u8> {
    let bytes = full(4096 - 63);
    assert_eq!(bytes.len(), 4096 * 512);
    bytes
}

/// The work recorded on an image, with a barrier that does nothing or with all of them, and the image
/// that it makes.
pub fn recorded(bytes: &[u8], work: Work, without: Option<u64>) -> (Recording, Vec<u8>) {
    let below = MemStore::from_bytes(bytes);
    let recording = Recording::new(below.pages());
    let mutator = Mutator::new();
    mutator.set(without.map(|barrier| Mutation {
        covers: None,
        how: Break::Drop,
        only: Some(barrier),
    }));
    let inner = RecordStore::new(below.clone(), recording.clone());
    work(&MutateStore::new(inner, mutator, CLUSTER)).unwrap();
    (recording, below.to_vec())
}

/// What is wrong with a state that a cut left, when the image was `old` and became `new`.
fn wrong(store: &MemStore, old: &[u8], new: &[u8]) -> std::result::Result<(), String> {
    let report = now(check(store)).map_err(|e: Error| e.to_string())?;
    if report.errors > 0 {
        return Err(format!("{report:#?}"));
    }
    let (old, new) = (MemStore::from_bytes(old), MemStore::from_bytes(new));
    let is = views(store);
    match is == views(&old) || is == views(&new) {
        true => Ok(()),
        false => Err("neither the old image nor the new one".into()),
    }
}

#[test]
fn a_change_of_snapshots_may_be_cut_anywhere() {
    let mut states = 0;
    for (n, bytes) in images().iter().enumerate() {
        for (w, work) in [making, deleting, reverting].into_iter().enumerate() {
            let (recording, new) = recorded(bytes, work, None);
            let place = format!("image {n}, work {w}");
            assert!(found(&new).is_clean() && new != *bytes, "{place}");
            cuts(bytes, &recording, |cut, store| {
                let place = format!("{place}, {cut}");
                wrong(&store, bytes, &new).unwrap_or_else(|e| panic!("{place}: {e}"));
                let report = mend(&store);
                assert!(report.is_clean(), "{place}: {report:#?}");
                wrong(&store, bytes, &new).unwrap_or_else(|e| panic!("{place}, mended: {e}"));
                states += 1;
            });
        }
    }
    assert!(states > 500, "{states}");
}

#[test]
fn a_refcount_table_that_is_full_gets_a_larger_one_wherever_that_is_cut() {
    let bytes = tightest();
    let (recording, new) = recorded(&bytes, making, None);
    let clusters = |bytes: &[u8]| u32::from_be_bytes(bytes[56..60].try_into().unwrap());
    assert!(found(&new).is_clean() && clusters(&new) > clusters(&bytes));
    let mut states = 0;
    cuts(&bytes, &recording, |cut, store| {
        states += 1;
        // All of them would take minutes.
        if states % 11 == 0 {
            wrong(&store, &bytes, &new).unwrap_or_else(|e| panic!("{cut}: {e}"));
            assert!(mend(&store).is_clean(), "{cut}");
        }
    });
    let store = MemStore::from_bytes(&new);
    now(delete(&store, b"2", &mut ())).unwrap();
    now(delete(&store, b"1", &mut ())).unwrap();
    assert!(found(&store.to_vec()).is_clean());
    if installed("a_refcount_table_that_is_full_gets_a_larger_one_wherever_that_is_cut") {
        let folder = Folder::new();
        for bytes in [new, store.to_vec()] {
            std::fs::write(folder.path("disk"), bytes).unwrap();
            assert_eq!(folder.check("disk"), Some((0, 0)));
        }
    }
}

/// Whether some cut of the work is wrong when barrier number `barrier` does nothing.
fn notices(work: Work, barrier: u64) -> bool {
    images().iter().any(|bytes| {
        let (recording, new) = recorded(bytes, work, Some(barrier));
        let mut noticed = false;
        cuts(bytes, &recording, |_, store| {
            noticed = noticed || wrong(&store, bytes, &new).is_err();
        });
        noticed
    })
}

#[test]
fn a_missing_barrier_of_a_snapshot_would_be_noticed() {
    for (work, needed) in [(making as Work, 4), (deleting, 2), (reverting, 3)] {
        let noticed: Vec<u64> = (0..6).filter(|n| notices(work, *n)).collect();
        assert!(noticed.len() >= needed, "{needed}: only {noticed:?}");
    }
}

#[test]
fn what_a_snapshot_took_is_given_back() {
    let bytes = crate::made::image(3);
    let store = MemStore::from_bytes(&bytes);
    let id = now(create(&store, &wanted("new"), &mut ())).unwrap();
    assert!(store.to_vec().len() > bytes.len());
    now(delete(&store, &id, &mut ())).unwrap();
    assert!(store.to_vec() == bytes);
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let taken = |name: &str| wanted(name);
    let whole_image = whole();
    let edited = |edits: &[(u64, usize, u64)]| {
        let mut bytes = small();
        edit(&mut bytes, edits);
        bytes
    };
    let refused = |bytes: &[u8], work: &dyn Fn(&MemStore) -> Result<()>, kind| {
        let store = MemStore::from_bytes(bytes);
        let e = work(&store).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(store.to_vec() == bytes, "{e}: changed");
    };
    let make = |name: &'static str| {
        move |store: &MemStore| now(create(store, &taken(name), &mut ())).map(drop)
    };
    let long: &'static str = "a234567890".repeat(26).leak();
    refused(&small(), &make("name"), Kind::Exists);
    refused(&small(), &make(""), Kind::Invalid);
    refused(&small(), &make(long), Kind::Invalid);
    refused(&small(), &make("a\0b"), Kind::Invalid);
    for work in [delete_of, revert_to] {
        refused(&small(), &|store| work(store, "7"), Kind::NotFound);
        refused(
            &edited(&[(72, 8, 1)]),
            &|store| work(store, "1"),
            Kind::Damaged,
        );
        let broken = [(4 * CLUSTER, 8, 5)];
        refused(&edited(&broken), &|store| work(store, "1"), Kind::Damaged);
    }
    refused(&edited(&[(72, 8, 1)]), &make("new"), Kind::Damaged);
    refused(&edited(&[(72, 8, 2)]), &make("new"), Kind::Damaged);
    refused(
        &whole_image,
        &|store| revert_to(store, "1"),
        Kind::Unsupported,
    );
    // A refcount of one bit cannot say that two share a cluster.
    let mut narrow = crate::made::image(3);
    put32(&mut narrow, 96, 0);
    narrow[2 * CLUSTER as usize..3 * CLUSTER as usize].fill(0);
    narrow[2 * CLUSTER as usize] = 0xFF;
    assert!(found(&narrow).is_clean());
    refused(&narrow, &make("new"), Kind::Unsupported);
}

fn delete_of(store: &MemStore, id: &str) -> Result<()> {
    now(delete(store, id.as_bytes(), &mut ()))
}

fn revert_to(store: &MemStore, id: &str) -> Result<()> {
    now(revert(store, id.as_bytes(), &mut ()))
}

#[test]
fn an_external_data_file_has_no_snapshots() {
    if !installed("an_external_data_file_has_no_snapshots") {
        return;
    }
    let folder = Folder::new();
    folder.img("create -q -f qcow2 -o data_file=data disk 1M");
    let store = MemStore::from_bytes(&folder.read("disk"));
    let e = now(create(&store, &wanted("new"), &mut ())).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
}

/// Where an image lists its snapshots.
fn list(bytes: &[u8]) -> usize {
    u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize
}

#[test]
fn what_others_wrote_of_a_snapshot_stays_with_it() {
    let mut bytes = small();
    // The machine's state and clock, and more extra data than is known here.
    let at = list(&bytes);
    bytes[at + 16..at + 36].fill(0x77);
    put32(&mut bytes, at + 36, 40);
    put64(&mut bytes, at + 40, 123);
    put64(&mut bytes, at + 48, 8 * CLUSTER);
    bytes[at + 56..at + 80].fill(0x99);
    bytes[at + 80..at + 88].copy_from_slice(b"1name\0\0\0");
    let entry = bytes[at..at + 88].to_vec();
    let store = MemStore::from_bytes(&bytes);
    for name in ["two", "three"] {
        now(create(&store, &wanted(name), &mut ())).unwrap();
    }
    delete_of(&store, "2").unwrap();
    revert_to(&store, "3").unwrap();
    let after = store.to_vec();
    assert_eq!(after[list(&after)..list(&after) + 88], entry);
    let image = now(Qcow2::open_read(store, None)).unwrap();
    let names: Vec<Vec<u8>> = now(image.snapshots())
        .unwrap()
        .into_iter()
        .map(|s| s.name)
        .collect();
    assert_eq!(names, [b"name".to_vec(), b"three".to_vec()]);
}
