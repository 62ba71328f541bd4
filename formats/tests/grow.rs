//! Growing a delta: the power goes at every operation, each barrier is taken away and missed.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use ploop_formats::layer::{Below, Extent, Layer, Reservation};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::check;
use ploop_formats::ploop::extension::{Extension, Feature, TRANSIT};
use ploop_formats::ploop::header::CLOSED_V21;
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
use ploop_formats::{Kind, Result, buf};

/// States tried after one operation.
const PER_POINT: usize = 3;

/// An image that is to grow.
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
    /// An image of `from` clusters, some of them there: at its beginning, and at its end.
    fn new(rng: &mut Rng, version: Version, cluster: u64, from: u64, to: u64) -> Self {
        let mut clusters = vec![None; from as usize];
        let mut next = 0;
        for n in (0..3).chain(from.saturating_sub(3)..from) {
            if n < from && !rng.one_in(3) {
                clusters[n as usize] =
                    Some((0..cluster / SECTOR).map(|_| step(&mut next)).collect());
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

    fn size(&self, clusters: u64) -> u64 {
        clusters * self.delta.cluster
    }

    fn rules(&self) -> Rules {
        let size = ClusterSize::new(self.delta.cluster).unwrap();
        let header = Header::new(self.delta.version, self.size(self.to), size).unwrap();
        Rules {
            metadata_end: size.start(header.data_start),
            ..Rules::default()
        }
    }

    /// Judges a closed or crashed image by itself: the size that it has, in clusters.
    fn judge<S: Store>(&self, image: &Ploop<S>) -> std::result::Result<u64, String> {
        let size = image.geometry().size;
        let mut at = 0;
        while at < size {
            let extent = now(image.map(at, size - at)).map_err(|e| e.to_string())?;
            let n = (at / self.delta.cluster) as usize;
            let wanted = self.delta.clusters.get(n).and_then(Option::as_ref);
            match (extent, wanted) {
                (Extent::Data { at: host, .. }, Some(values)) => {
                    let bytes = now(image
                        .store()
                        .read_at(host, buf::aligned(self.delta.cluster as usize)));
                    let bytes = bytes.map_err(|e| e.to_string())?;
                    let mut sector = [0; SECTOR as usize];
                    for (i, found) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                        stamp::fill(&mut sector, at / SECTOR + i as u64, values[i]);
                        if found != sector {
                            return Err(format!("sector {i} of cluster {n} is not what it was"));
                        }
                    }
                    at += self.delta.cluster;
                }
                (Extent::Absent { len }, _) => {
                    let next = (at + len) / self.delta.cluster;
                    let lost = (n as u64..next).find(|n| {
                        self.delta
                            .clusters
                            .get(*n as usize)
                            .is_some_and(Option::is_some)
                    });
                    if let Some(n) = lost {
                        return Err(format!("cluster {n} is gone"));
                    }
                    at += len;
                }
                (extent, _) => return Err(format!("cluster {n} is {extent:?}")),
            }
        }
        Ok(size / self.delta.cluster)
    }

    /// Judges what a cut left, and grows it again.
    fn examine(&self, pages: Pages, done: bool) -> std::result::Result<(), String> {
        if !audit(&pages)?.in_use {
            return Err("it does not say that it is in use".into());
        }
        let read = now(Ploop::open_read(MemStore::from_pages(pages.clone())))
            .map_err(|e| e.to_string())?;
        let size = self.judge(&read)?;
        let from = self.delta.clusters.len() as u64;
        if size != self.to && (done || size != from) {
            return Err(format!("{size} clusters"));
        }
        let store = MemStore::from_pages(pages);
        let grown = now(async {
            let mut image = Ploop::open_write(store.clone(), Ledger::local()).await?;
            image.grow(self.size(self.to)).await?;
            image.close().await
        });
        grown.map_err(|e| format!("grown again: {e}"))?;
        self.closed(&store)
    }

    /// Judges an image that was grown and closed.
    fn closed(&self, store: &MemStore) -> std::result::Result<(), String> {
        let audit = audit(&store.pages())?;
        if audit.in_use {
            return Err("closed, and in use".into());
        }
        let report = now(check(store)).map_err(|e| e.to_string())?;
        if report.errors + report.notices > 0 {
            return Err(format!("{:?}", report.findings));
        }
        let image = now(Ploop::open_read(store.clone())).map_err(|e| e.to_string())?;
        let size = ClusterSize::new(self.delta.cluster).unwrap();
        let like = Header::new(self.delta.version, self.size(self.to), size).unwrap();
        let header = image.header();
        let same = header.data_start == like.data_start
            && (header.heads, header.cylinders) == (like.heads, like.cylinders)
            && header.entries == like.entries;
        match self.judge(&image)? == self.to && same {
            true => Ok(()),
            false => Err(format!("{header:?}")),
        }
    }

    /// Opens and grows the image, and cuts the power after every operation.
    fn run(
        &self,
        seed: u64,
        mutator: &Mutator,
        states: &mut u64,
    ) -> std::result::Result<(), String> {
        let mut rng = Rng::new(seed);
        let sim = Sim::new(seed);
        let rules = self.rules();
        let file = sim.file(self.delta.make(&mut rng), rules);
        let store = MutateStore::new(file, mutator.clone(), rules.metadata_end);
        sim.instant(true);
        let mut image = now(Ploop::open_write(store, Ledger::local())).unwrap();
        sim.instant(false);
        let mut exec = Exec::new(sim.clone(), seed);
        let size = self.size(self.to);
        let done = exec.start(async move { image.grow(size).await.map(|()| image) });
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
        sim.instant(true);
        now(image.close()).map_err(|e| e.to_string())?;
        self.closed(&MemStore::from_pages(image.store().inner().pages()))
    }

    fn cut(
        &self,
        sim: &Sim,
        rng: &mut Rng,
        done: bool,
        states: &mut u64,
    ) -> std::result::Result<(), String> {
        for fate in sim.some_fates(0, PER_POINT, rng) {
            *states += 1;
            let pages = sim.crash(0, &fate).swap_remove(0).0;
            self.examine(pages, done)
                .map_err(|e| format!("after {fate:?}: {e}"))?;
        }
        Ok(())
    }
}

fn step(next: &mut u64) -> u64 {
    *next += 1;
    *next
}

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
fn after_any_cut_a_growing_image_is_the_old_one_or_the_new_one_and_grows_again() {
    let wanted: u64 = std::env::var("PLOOP_GROW_STATES").map_or(4_000, |n| n.parse().unwrap());
    let (mut states, mut seed) = (0, 0);
    while states < wanted {
        let case = case(seed);
        let run = case.run(seed, &Mutator::new(), &mut states);
        let from = case.delta.clusters.len();
        run.unwrap_or_else(|e| panic!("seed {seed}, {from} to {} clusters: {e}", case.to));
        seed += 1;
    }
    println!("COUNT: {seed} images grown, {states} states");
}

#[test]
fn every_barrier_of_growing_is_missed_when_it_is_gone_or_stepped_over() {
    // The first is in front of the header when nothing is in the way; the last makes it durable, and
    // nothing follows that could be moved before it.
    for (how, count) in [(Break::Drop, 4), (Break::Swap, 3)] {
        for number in 0..count {
            let mutator = Mutator::new();
            let (mut states, mut seed) = (0, 4);
            let mut caught = None;
            while caught.is_none() && states < 60_000 {
                let case = case(seed);
                // That of opening comes first.
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

fn write(image: &Ploop<MemStore>, cluster: u32, byte: u8) -> Result<()> {
    now(async {
        let mut reserved = image.reserve().await?;
        reserved.submitted();
        let data = buf::aligned(CLUSTER as usize);
        let data = data.iter().map(|_| byte).collect::<Vec<u8>>();
        let at = reserved.host();
        image
            .store()
            .write_at(at, data.into(), Reach::Cache)
            .await?;
        image.publish(VirtCluster(cluster), reserved, Below::Data);
        image.sync().await
    })
}

#[test]
fn an_image_that_has_grown_is_used_to_its_new_end_at_once() {
    for version in [Version::V1, Version::V2] {
        let mut delta = blank(version, 8000);
        delta.leaks = 3;
        let (store, mut image) = opened(delta.make(&mut Rng::new(1)));
        for n in [0, 1, 7999] {
            write(&image, n, n as u8 + 1).unwrap();
        }
        now(image.grow(20_000 * CLUSTER)).unwrap();
        assert_eq!(image.geometry().size, 20_000 * CLUSTER);
        assert_eq!(image.header().data_start, 3);
        for n in [8000, 8176, 19_999] {
            write(&image, n, 9).unwrap();
        }
        for (n, byte) in [
            (0, 1),
            (1, 2),
            (7999, 64),
            (8000, 9),
            (8176, 9),
            (19_999, 9),
        ] {
            let Extent::Data { at, .. } = now(image.map(n * CLUSTER, 512)).unwrap() else {
                panic!("cluster {n} is not there");
            };
            let found = now(store.read_at(at, buf::aligned(CLUSTER as usize))).unwrap();
            assert!(found.iter().all(|b| *b == byte), "cluster {n}");
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
        write(&image, n, 1).unwrap();
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
    const CLUSTER: u64 = 32 << 10;
    let count = entries(CLUSTER, 1);
    let mut clusters = vec![None; count as usize];
    clusters[0] = Some((1..=CLUSTER / SECTOR).collect());
    let case = Case {
        delta: Delta {
            version: Version::V2,
            cluster: CLUSTER,
            clusters,
            leaks: 0,
            in_use: false,
        },
        to: count,
    };
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
    assert_eq!(case.judge(&image), Ok(count));
}

#[test]
fn nothing_is_moved_to_where_an_entry_behind_the_end_points() {
    const CLUSTER: u64 = 32 << 10;
    let mut clusters = vec![None; 4];
    clusters[0] = Some((1..=CLUSTER / SECTOR).collect());
    let case = Case {
        delta: Delta {
            version: Version::V2,
            cluster: CLUSTER,
            clusters,
            leaks: 1,
            in_use: false,
        },
        to: entries(CLUSTER, 1) + 1,
    };
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
    assert_eq!(case.judge(&image), Ok(case.to));
    let bytes = now(store.read_at(64, buf::aligned(4096))).unwrap();
    assert_eq!(bytes[..4], 3u32.to_le_bytes(), "elsewhere");
}
