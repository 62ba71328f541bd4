//! Shrinking a delta: the power goes at every operation, its barrier is taken away and missed.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use ploop_formats::layer::{Below, Extent, Layer, Reservation};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::check;
use ploop_formats::ploop::{Header, Ploop, Version};
use ploop_formats::raw::Raw;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::{Break, MutateStore, Mutation, Mutator};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Rules, Sim};
use ploop_formats::store::{Reach, Store};
use ploop_formats::testkit::exec::{Exec, Step, now};
use ploop_formats::testkit::image::{Delta, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp;
use ploop_formats::units::{ClusterSize, SECTOR, VirtCluster};
use ploop_formats::{Kind, buf};
use std::collections::BTreeSet;

type Judged<T> = std::result::Result<T, String>;

/// States tried after one operation.
const PER_POINT: usize = 3;

/// An image that is to shrink.
#[derive(Debug, Clone)]
struct Case {
    delta: Delta,
    /// Guest clusters afterwards.
    to: u64,
}

/// How many entries fill so many header clusters.
fn entries(cluster: u64, header_clusters: u64) -> u64 {
    (header_clusters * cluster - 64) / 4
}

impl Case {
    /// An image of `from` clusters, some of them there: at its beginning, on both sides of the end that
    /// it is to have, and at its end.
    fn new(rng: &mut Rng, version: Version, cluster: u64, from: u64, to: u64) -> Self {
        let mut clusters = vec![None; from as usize];
        let near = to.saturating_sub(2)..(to + 2).min(from);
        let places: BTreeSet<u64> = (0..2.min(from))
            .chain(near)
            .chain(from.saturating_sub(2)..from)
            .collect();
        let mut next = 0;
        for n in places {
            if !rng.one_in(3) {
                let step = || {
                    next += 1;
                    next
                };
                let values = std::iter::repeat_with(step).take((cluster / SECTOR) as usize);
                clusters[n as usize] = Some(values.collect());
            }
        }
        let delta = Delta {
            version,
            cluster,
            clusters,
            leaks: rng.below(4) as u32,
            in_use: rng.one_in(3),
        };
        Self { delta, to }
    }

    fn from(&self) -> u64 {
        self.delta.clusters.len() as u64
    }

    fn header(&self, clusters: u64) -> Header {
        let size = ClusterSize::new(self.delta.cluster).unwrap();
        Header::new(self.delta.version, clusters * self.delta.cluster, size).unwrap()
    }

    fn rules(&self) -> Rules {
        let header = self.header(self.from());
        Rules {
            metadata_end: header.cluster.start(header.data_start),
            ..Rules::default()
        }
    }

    /// Judges an image by itself, of which the first `kept` clusters are what they were and the others
    /// are not there: how many it has.
    fn judge<S: Store>(&self, image: &Ploop<S>, kept: u64) -> Judged<u64> {
        let (size, cluster) = (image.geometry().size, self.delta.cluster);
        let there = |n: u64| {
            let values = self.delta.clusters.get(n as usize).and_then(Option::as_ref);
            values.filter(|_| n < kept)
        };
        let mut at = 0;
        while at < size {
            let extent = now(image.map(at, size - at)).map_err(|e| e.to_string())?;
            let n = at / cluster;
            match (extent, there(n)) {
                (Extent::Data { at: host, .. }, Some(values)) => {
                    let bytes = now(image.store().read_at(host, buf::aligned(cluster as usize)));
                    let bytes = bytes.map_err(|e| e.to_string())?;
                    let mut sector = [0; SECTOR as usize];
                    for (i, found) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                        stamp::fill(&mut sector, at / SECTOR + i as u64, values[i]);
                        if found != sector {
                            return Err(format!("sector {i} of cluster {n} is not what it was"));
                        }
                    }
                    at += cluster;
                }
                (Extent::Absent { len }, _) => {
                    let next = (at + len) / cluster;
                    if let Some(n) = (n..next).find(|n| there(*n).is_some()) {
                        return Err(format!("cluster {n} is gone"));
                    }
                    at += len;
                }
                (extent, _) => return Err(format!("cluster {n} is {extent:?}")),
            }
        }
        Ok(size / cluster)
    }

    /// Judges what a cut left, shrinks it again, and grows it to where it came from.
    fn examine(&self, pages: Pages, done: bool) -> Judged<()> {
        if !audit(&pages)?.in_use {
            return match done {
                true => self.closed(&MemStore::from_pages(pages)),
                false => Err("it does not say that it is in use".into()),
            };
        }
        let read = now(Ploop::open_read(MemStore::from_pages(pages.clone())));
        let read = read.map_err(|e| e.to_string())?;
        let has = read.geometry().size / self.delta.cluster;
        if has != self.to && (done || has != self.from()) {
            return Err(format!("{has} clusters"));
        }
        self.judge(&read, has)?;
        let store = MemStore::from_pages(pages);
        let shrunk = now(async {
            let mut image = Ploop::open_write(store.clone(), Ledger::local()).await?;
            image.shrink(self.to * self.delta.cluster).await?;
            image.close().await
        });
        shrunk.map_err(|e| format!("shrunk again: {e}"))?;
        self.closed(&store)
    }

    /// Judges an image that was shrunk and closed, and grows it.
    fn closed(&self, store: &MemStore) -> Judged<()> {
        let sound = |store: &MemStore| -> Judged<Ploop<MemStore>> {
            if audit(&store.pages())?.in_use {
                return Err("closed, and in use".into());
            }
            let report = now(check(store)).map_err(|e| e.to_string())?;
            if report.errors + report.notices > 0 {
                return Err(format!("{:?}", report.findings));
            }
            now(Ploop::open_read(store.clone())).map_err(|e| e.to_string())
        };
        let image = sound(store)?;
        let (like, header) = (self.header(self.to), *image.header());
        let same = (header.data_start, header.entries, header.sectors)
            == (like.data_start, like.entries, like.sectors)
            && (header.heads, header.cylinders) == (like.heads, like.cylinders);
        if self.judge(&image, self.to)? != self.to || !same {
            return Err(format!("{header:?}"));
        }
        let from = header.entry_at(header.entries);
        let mut rest = vec![0; (header.cluster.start(header.data_start) - from) as usize];
        store.pages().read(from, &mut rest);
        if rest.iter().any(|byte| *byte != 0) {
            return Err("entries are left behind the end".into());
        }
        let store = MemStore::from_pages(store.pages().clone());
        let grown = now(async {
            let mut image = Ploop::open_write(store.clone(), Ledger::local()).await?;
            image.grow(self.from() * self.delta.cluster).await?;
            image.close().await
        });
        grown.map_err(|e| format!("grown again: {e}"))?;
        match self.judge(&sound(&store)?, self.to)? == self.from() {
            true => Ok(()),
            false => Err("it does not grow to what it was".into()),
        }
    }

    /// Opens and shrinks the image, and cuts the power after every operation.
    fn run(&self, seed: u64, mutator: &Mutator, states: &mut u64) -> Judged<()> {
        let mut rng = Rng::new(seed);
        let sim = Sim::new(seed);
        let rules = self.rules();
        let file = sim.file(self.delta.make(&mut rng), rules);
        let store = MutateStore::new(file, mutator.clone(), rules.metadata_end);
        sim.instant(true);
        let mut image = now(Ploop::open_write(store, Ledger::local())).unwrap();
        sim.instant(false);
        let mut exec = Exec::new(sim.clone(), seed);
        let size = self.to * self.delta.cluster;
        let done = exec.start(async move { image.shrink(size).await.map(|()| image) });
        let mut clock = sim.clock();
        while !done.is_full() {
            if exec.step() == Step::Stuck {
                return Err("stuck".into());
            }
            if sim.clock() != clock {
                clock = sim.clock();
                self.cut(&sim, &mut rng, done.is_full(), states)?;
            }
        }
        let image = done.take().unwrap().map_err(|e| e.to_string())?;
        self.cut(&sim, &mut rng, true, states)?;
        let done = exec.start(async move { image.close().await.map(|()| image) });
        while !done.is_full() {
            exec.step();
            self.cut(&sim, &mut rng, true, states)?;
        }
        let image = done.take().unwrap().map_err(|e| e.to_string())?;
        self.closed(&MemStore::from_pages(image.store().inner().pages()))
    }

    fn cut(&self, sim: &Sim, rng: &mut Rng, done: bool, states: &mut u64) -> Judged<()> {
        for fate in sim.some_fates(0, PER_POINT, rng) {
            *states += 1;
            let pages = sim.crash(0, &fate).swap_remove(0).0;
            self.examine(pages, done)
                .map_err(|e| format!("after {fate:?}: {e}"))?;
        }
        Ok(())
    }
}

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

/// A case that dice choose. The larger a cluster is, the more a state costs.
fn case(seed: u64) -> Case {
    let mut rng = Rng::new(seed);
    let cluster = match seed % 16 {
        0 => 1 << 20,
        1 => 256 << 10,
        2 | 3 => 64 << 10,
        _ => 32 << 10,
    };
    let version = *rng.pick(&[Version::V1, Version::V2]);
    let (from, to) = sizes(&mut rng, cluster);
    Case::new(&mut rng, version, cluster, from, to)
}

#[test]
fn after_any_cut_a_shrinking_image_is_the_old_one_or_the_new_one_and_shrinks_again() {
    let wanted: u64 = std::env::var("PLOOP_SHRINK_STATES").map_or(3_000, |n| n.parse().unwrap());
    let (mut states, mut seed) = (0, 0);
    while states < wanted {
        let case = case(seed);
        let run = case.run(seed, &Mutator::new(), &mut states);
        let from = case.from();
        run.unwrap_or_else(|e| panic!("seed {seed}, {from} to {} clusters: {e}", case.to));
        seed += 1;
    }
    println!("COUNT: {seed} images shrunk, {states} states");
}

#[test]
fn the_barriers_of_shrinking_are_missed_when_they_are_gone_or_stepped_over() {
    // That of the header, and that of closing, behind which the file may be cut at any time but the image
    // must not say before that it is closed. Nothing depends on the one that makes it say so: without it
    // the image is opened as one that was not closed.
    let all = [(0, Break::Drop), (0, Break::Swap), (1, Break::Drop)];
    for (number, how) in all {
        let mutator = Mutator::new();
        let (mut states, mut seed) = (0, 4);
        let mut caught = None;
        while caught.is_none() && states < 60_000 {
            let case = case(seed);
            // Those of opening come first.
            let only = Some(number + 1 + u64::from(case.delta.in_use));
            let mutation = Mutation {
                covers: None,
                how,
                only,
            };
            mutator.set(Some(mutation));
            caught = case.run(seed, &mutator, &mut states).err();
            seed += 1;
        }
        println!("{how:?} of {number}: {caught:?} after {states} states");
        assert!(caught.is_some(), "{how:?} of barrier {number}");
    }
}

const CLUSTER: u64 = 32 << 10;

fn blank(version: Version, clusters: u64) -> Delta {
    Delta {
        version,
        cluster: CLUSTER,
        clusters: vec![None; clusters as usize],
        leaks: 0,
        in_use: false,
    }
}

fn opened(pages: Pages) -> (MemStore, Ploop<MemStore>) {
    let store = MemStore::from_pages(pages);
    let image = now(Ploop::open_write(store.clone(), Ledger::local())).unwrap();
    (store, image)
}

/// Writes a cluster, and makes nothing durable.
fn write(image: &Ploop<MemStore>, cluster: u32, byte: u8) {
    now(async {
        let mut reserved = image.reserve().await.unwrap();
        reserved.submitted();
        let data = vec![byte; CLUSTER as usize];
        let at = reserved.host();
        let written = image.store().write_at(at, data.into(), Reach::Cache);
        written.await.unwrap();
        image.publish(VirtCluster(cluster), reserved, Below::Data);
    });
}

fn byte_of(store: &MemStore, image: &Ploop<MemStore>, cluster: u64) -> Option<u8> {
    let Extent::Data { at, .. } = now(image.map(cluster * CLUSTER, 512)).unwrap() else {
        return None;
    };
    let found = now(store.read_at(at, buf::aligned(CLUSTER as usize))).unwrap();
    assert!(found.iter().all(|byte| *byte == found[0]));
    Some(found[0])
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
