//! Clusters in part that are merged: into a file whose blocks are larger than subclusters, what is around them
//! is what it was; and a running disk that reads both meanwhile reads the same throughout.

use ploop::image::snapshot::copy::{Work, copy};
use ploop::image::snapshot::parts::Rest;
use ploop::stack::{AnyLayer, Stack};
use ploop::testkit::trees;
use ploop_formats::buf;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::planted::{Bug, plant};
use ploop_formats::qcow2::Qcow2;
use ploop_formats::raw::Raw;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::record::{Entry, RecordStore, Recording};
use ploop_formats::store::{Space, Store};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::qcow2::{Held, Image, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Seen, Value, ZERO};
use ploop_formats::units::{ClusterSize, SECTOR};

const CLUSTER: u64 = 32 << 10;
const CLUSTERS: u64 = 3;
const SECTORS: u64 = CLUSTERS * CLUSTER / SECTOR;

fn image(extended: bool, clusters: Vec<(Held, bool)>) -> Image {
    Image {
        version: 3,
        extended,
        behind: 0,
        log2: CLUSTER.trailing_zeros(),
        order: 4,
        snapshot: clusters.iter().any(|(_, shared)| *shared),
        clusters,
        free: 1,
        leaks: 0,
        counted_first: true,
        skip: 4,
    }
}

/// A cluster of which dice choose what each subcluster of two sectors is.
fn parts(rng: &mut Rng, value: &mut Value) -> Held {
    let mut part = || match rng.below(3) {
        0 => [None; 2],
        1 => [Some(ZERO); 2],
        _ => {
            *value += 2;
            [Some(*value - 1), Some(*value)]
        }
    };
    Held::Parts((0..32).flat_map(|_| part()).collect())
}

/// An image of which dice choose what each subcluster is.
fn upper(rng: &mut Rng) -> Image {
    let mut value = 1000;
    let mut cluster = || (parts(rng, &mut value), false);
    image(true, (0..CLUSTERS).map(|_| cluster()).collect())
}

/// A raw file that has something else in each sector.
fn flat() -> (Pages, Vec<Value>) {
    let values: Vec<Value> = (1..=SECTORS).collect();
    let mut pages = Pages::new(SECTORS * SECTOR);
    for (n, value) in (0..).zip(&values) {
        pages.write(n * SECTOR, &stamp::run(n, 1, *value));
    }
    (pages, values)
}

#[test]
fn what_is_around_a_subcluster_in_a_larger_block_stays() {
    for seed in 0..100 {
        let mut rng = Rng::new(seed);
        let (pages, mut wanted) = flat();
        let image = upper(&mut rng);
        let child = MemStore::from_pages(image.make(&mut rng));
        let child = AnyLayer::Qcow2(Box::new(now(Qcow2::open_read(child, None)).unwrap()));
        let file = MemStore::from_pages(pages);
        let cluster = ClusterSize::new(CLUSTER).unwrap();
        let align = *rng.pick(&[512, 4096]);
        let lower = Raw::open_write(file.clone().aligned_to(align), cluster, Ledger::local());
        let lower = AnyLayer::Raw(lower.unwrap());
        let rest = Rest::new(Vec::<AnyLayer<MemStore>>::new()).unwrap();
        let mut watch = ();
        let mut work = Work::new(&mut watch, &());
        let copied = copy(&child, &lower, &rest, &mut work);
        assert_eq!(now(copied).unwrap(), SECTORS * SECTOR, "seed {seed}");
        image.overlay(&mut wanted);
        let bytes = file.to_vec();
        let sectors = bytes.chunks_exact(SECTOR as usize).zip(0..);
        let found: Vec<Seen> = sectors.map(|(sector, n)| stamp::look(sector, n)).collect();
        let wanted: Vec<Seen> = wanted.into_iter().map(Seen::Value).collect();
        assert!(found == wanted, "seed {seed}, blocks of {align}");
    }
}

/// The same, but some clusters are whole, or nothing.
fn mixed(rng: &mut Rng) -> Image {
    let mut value = 1000;
    let mut cluster = || {
        let first = value + 1;
        let held = match rng.below(6) {
            0 => Held::Nothing,
            1 => Held::Zero {
                place: rng.one_in(2),
            },
            2 => {
                value += CLUSTER / SECTOR;
                Held::Data((first..=value).collect())
            }
            _ => parts(rng, &mut value),
        };
        (held, false)
    };
    image(true, (0..CLUSTERS).map(|_| cluster()).collect())
}

/// An image to be merged into: what it has, a snapshot inside may have, too.
fn lower(rng: &mut Rng) -> Image {
    let mut value = 10_000;
    let extended = rng.one_in(2);
    let shares = rng.one_in(3);
    let mut cluster = || {
        let kind = rng.below(if extended { 6 } else { 4 });
        let mut whole = || {
            let first = value + 1;
            value += CLUSTER / SECTOR;
            (first..=value).collect()
        };
        let held = match kind {
            0 => Held::Nothing,
            1 => Held::Data(whole()),
            2 => Held::Packed(whole()),
            3 => Held::Zero { place: true },
            _ => parts(rng, &mut value),
        };
        (held, shares && rng.one_in(2))
    };
    image(extended, (0..CLUSTERS).map(|_| cluster()).collect())
}

/// A stack of a raw base and two qcow2 images, open to be read.
fn reader(base: &MemStore, lower: &MemStore, upper: &MemStore) -> Stack<MemStore> {
    let open = |file: &MemStore| {
        let image = now(Qcow2::open_read(file.clone(), None)).unwrap();
        AnyLayer::Qcow2(Box::new(image))
    };
    let cluster = ClusterSize::new(CLUSTER).unwrap();
    let base = AnyLayer::Raw(Raw::open_read(base.clone(), cluster).unwrap());
    Stack::new([base, open(lower), open(upper)]).unwrap()
}

/// Says which of some sectors is not what is wanted.
fn look(disk: &Stack<MemStore>, first: u64, sectors: u64, wanted: &[Value]) -> Result<(), String> {
    let len = (sectors * SECTOR) as usize;
    let bytes = now(disk.read_any(first * SECTOR, buf::aligned(len)));
    let bytes = bytes.map_err(|e| e.to_string())?;
    for (n, sector) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
        let (found, wanted) = (stamp::look(sector, n), Seen::Value(wanted[n as usize]));
        if found != wanted {
            return Err(format!("sector {n}: {found:?} and not {wanted:?}"));
        }
    }
    Ok(())
}

fn apply(entry: &Entry, file: &MemStore) {
    now(async {
        match entry.clone() {
            Entry::Write { at, data, reach } => file.write_at(at, data, reach).await,
            Entry::Punch { at, len } => file.punch(at, len, Space::Free).await,
            Entry::SetLen(len) => file.set_len(len).await,
            Entry::Flush { .. } => Ok(()),
        }
    })
    .unwrap();
}

/// Merges two images of dice, and has a disk that was opened before read between any two operations: what
/// it asked for earlier, it knows from then. How many operations there were.
fn merged_below(seed: u64) -> Result<usize, String> {
    let mut rng = Rng::new(seed);
    let (flat, mut wanted) = flat();
    let (below, above) = (lower(&mut rng), mixed(&mut rng));
    below.overlay(&mut wanted);
    above.overlay(&mut wanted);
    let [base, old, top] =
        [flat, below.make(&mut rng), above.make(&mut rng)].map(MemStore::from_pages);
    let disk = reader(&base, &old, &top);
    let file = old.copy();
    let recording = Recording::new(file.pages());
    let file = RecordStore::new(file, recording.clone());
    let open = |file: &MemStore| RecordStore::new(file.clone(), Recording::default());
    let child = now(Qcow2::open_read(open(&top), None)).unwrap();
    let child = AnyLayer::Qcow2(Box::new(child));
    let target = now(Qcow2::open_write(file, None, Ledger::local())).unwrap();
    let target = AnyLayer::Qcow2(Box::new(target));
    let cluster = ClusterSize::new(CLUSTER).unwrap();
    let rest = Raw::open_read(open(&base), cluster).unwrap();
    let rest = Rest::new([AnyLayer::Raw(rest)]).unwrap();
    let (mut watch, window) = ((), trees::window(&mut rng));
    let mut work = Work::new(&mut watch, &()).within(window);
    now(copy(&child, &target, &rest, &mut work)).unwrap();
    now(target.close()).unwrap();
    let entries = recording.entries();
    for (n, entry) in entries.iter().enumerate() {
        let first = rng.below(SECTORS);
        let sectors = rng.range(1, 40).min(SECTORS - first);
        let read = look(&disk, first, sectors, &wanted);
        read.map_err(|e| format!("seed {seed}, before operation {n}: {e}"))?;
        apply(entry, &old);
    }
    for (disk, when) in [(disk, "after it"), (reader(&base, &old, &top), "anew")] {
        let read = look(&disk, 0, SECTORS, &wanted);
        read.map_err(|e| format!("seed {seed}, {when}: {e}"))?;
    }
    match audit(&old.pages())? {
        0 => Ok(entries.len()),
        leaks => Err(format!("seed {seed}: {leaks} leaks")),
    }
}

const MERGES: u64 = 2000;

#[test]
fn a_disk_that_reads_both_meanwhile_reads_the_same_throughout() {
    let merged = |seed| merged_below(seed).unwrap();
    let operations: usize = (0..MERGES).map(merged).sum();
    println!("COUNT: parts: {MERGES} merges below a disk that reads, {operations} operations");
}

#[test]
fn places_that_are_given_to_others_meanwhile_are_found() {
    let _planted = plant(Bug::LeftPlaceFree);
    let found = (0..MERGES).filter_map(|seed| merged_below(seed).err());
    let found: Vec<String> = found.collect();
    println!(
        "COUNT: parts: {} of {MERGES} merges found, first {:?}",
        found.len(),
        found.first()
    );
    assert!(!found.is_empty());
}
