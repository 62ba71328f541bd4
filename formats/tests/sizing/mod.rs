//! Deltas that get another size: they are made by dice, the power goes at every operation, and what is
//! left is judged.
#![allow(dead_code, reason = "each test file uses its part")]

use ploop_formats::layer::{Below, Extent, Layer, Reservation};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::check;
use ploop_formats::ploop::{Header, Ploop, Version};
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::{Break, MutateStore, Mutation, Mutator};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Rules, Sim};
use ploop_formats::store::{Reach, Store};
use ploop_formats::testkit::exec::{Exec, now};
use ploop_formats::testkit::image::{Delta, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp;
use ploop_formats::units::{ClusterSize, SECTOR, VirtCluster};
use ploop_formats::{Result, buf};

pub type Judged<T> = std::result::Result<T, String>;

/// States tried after one operation.
const PER_POINT: usize = 3;
/// States after which a barrier counts as one that nobody misses.
const MISSED_WITHIN: u64 = 60_000;
/// Cluster of the images that are not made by dice.
pub const CLUSTER: u64 = 32 << 10;

/// An image that is to get another size.
#[derive(Debug, Clone)]
pub struct Case {
    pub delta: Delta,
    /// Guest clusters afterwards.
    pub to: u64,
}

/// How many entries fill so many header clusters.
pub fn entries(cluster: u64, header_clusters: u64) -> u64 {
    (header_clusters * cluster - 64) / 4
}

/// Content of one cluster: the numbers from `next` on.
fn content(cluster: u64, next: &mut u64) -> Vec<u64> {
    let step = || {
        *next += 1;
        *next
    };
    let sectors = std::iter::repeat_with(step);
    sectors.take((cluster / SECTOR) as usize).collect()
}

impl Case {
    /// A case that dice choose: `sizes` of a cluster, before and after, and the `places` where there
    /// may be something. The larger a cluster is, the more a state costs.
    pub fn of_dice(
        seed: u64,
        sizes: impl Fn(&mut Rng, u64) -> (u64, u64),
        places: impl Fn(u64, u64) -> Vec<u64>,
    ) -> Self {
        let mut rng = Rng::new(seed);
        let cluster = match seed % 16 {
            0 => 1 << 20,
            1 => 256 << 10,
            2 | 3 => 64 << 10,
            _ => 32 << 10,
        };
        let version = *rng.pick(&[Version::V1, Version::V2]);
        let (from, to) = sizes(&mut rng, cluster);
        let mut clusters = vec![None; from as usize];
        let mut next = 0;
        for n in places(from, to).into_iter().filter(|n| *n < from) {
            if !rng.one_in(3) {
                clusters[n as usize] = Some(content(cluster, &mut next));
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

    /// An image whose first cluster is there, and whose file has so many that nobody names.
    pub fn with_one(from: u64, to: u64, leaks: u32) -> Self {
        let mut delta = blank(Version::V2, from);
        delta.clusters[0] = Some(content(CLUSTER, &mut 0));
        delta.leaks = leaks;
        Self { delta, to }
    }

    pub fn from(&self) -> u64 {
        self.delta.clusters.len() as u64
    }

    pub fn size(&self, clusters: u64) -> u64 {
        clusters * self.delta.cluster
    }

    fn header(&self, clusters: u64) -> Header {
        let size = ClusterSize::new(self.delta.cluster).unwrap();
        Header::new(self.delta.version, self.size(clusters), size).unwrap()
    }

    fn rules(&self) -> Rules {
        let header = self.header(self.to.max(self.from()));
        Rules {
            metadata_end: header.cluster.start(header.data_start),
            ..Rules::default()
        }
    }

    async fn resize<S: Store>(&self, image: &mut Ploop<S>) -> Result<()> {
        let size = self.size(self.to);
        match self.to > self.from() {
            true => image.grow(size).await,
            false => image.shrink(size).await,
        }
    }

    /// Judges an image by itself, of which the first `kept` clusters are what they were and the others
    /// are not there: how many it has.
    pub fn judge<S: Store>(&self, image: &Ploop<S>, kept: u64) -> Judged<u64> {
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

    /// Judges what a cut left, and does it again.
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
        let again = now(async {
            let mut image = Ploop::open_write(store.clone(), Ledger::local()).await?;
            self.resize(&mut image).await?;
            image.close().await
        });
        again.map_err(|e| format!("once more: {e}"))?;
        self.closed(&store)
    }

    /// Judges an image that has its size and was closed; one that is smaller is grown to what it was.
    fn closed(&self, store: &MemStore) -> Judged<()> {
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
        if self.to > self.from() {
            return Ok(());
        }
        let store = MemStore::from_pages(store.pages().clone());
        let grown = now(async {
            let mut image = Ploop::open_write(store.clone(), Ledger::local()).await?;
            image.grow(self.size(self.from())).await?;
            image.close().await
        });
        grown.map_err(|e| format!("grown again: {e}"))?;
        match self.judge(&sound(&store)?, self.to)? == self.from() {
            true => Ok(()),
            false => Err("it does not grow to what it was".into()),
        }
    }

    /// Opens the image, gives it its size and closes it, and cuts the power after every operation of
    /// the two last.
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
        let case = self.clone();
        let sized = exec.start(async move { case.resize(&mut image).await.map(|()| image) });
        let mut cut = |done: bool| self.cut(&sim, &mut rng, done, states);
        exec.watch(&sized, &mut cut)?;
        let image = sized.take().unwrap().map_err(|e| e.to_string())?;
        cut(true)?;
        let closed = exec.start(async move { image.close().await.map(|()| image) });
        exec.watch(&closed, |_| cut(true))?;
        let image = closed.take().unwrap().map_err(|e| e.to_string())?;
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

fn sound(store: &MemStore) -> Judged<Ploop<MemStore>> {
    if audit(&store.pages())?.in_use {
        return Err("closed, and in use".into());
    }
    let report = now(check(store)).map_err(|e| e.to_string())?;
    if report.errors + report.notices > 0 {
        return Err(format!("{:?}", report.findings));
    }
    now(Ploop::open_read(store.clone())).map_err(|e| e.to_string())
}

/// Tries at least so many states of cases; how many images that were, and states.
pub fn campaign(wanted: u64, case: impl Fn(u64) -> Case) -> (u64, u64) {
    let (mut states, mut seed) = (0, 0);
    while states < wanted {
        let case = case(seed);
        let run = case.run(seed, &Mutator::new(), &mut states);
        let from = case.from();
        run.unwrap_or_else(|e| panic!("seed {seed}, {from} to {} clusters: {e}", case.to));
        seed += 1;
    }
    (seed, states)
}

/// Demands that somebody misses barrier `number`, those of opening not counted.
pub fn assert_missed(how: Break, number: u64, case: impl Fn(u64) -> Case) {
    let mutator = Mutator::new();
    let (mut states, mut seed) = (0, 4);
    let mut caught = None;
    while caught.is_none() && states < MISSED_WITHIN {
        let case = case(seed);
        mutator.set(Some(Mutation {
            covers: None,
            how,
            only: Some(number + 1 + u64::from(case.delta.in_use)),
        }));
        caught = case.run(seed, &mutator, &mut states).err();
        seed += 1;
    }
    println!("{how:?} of {number}: {caught:?} after {states} states");
    assert!(caught.is_some(), "{how:?} of barrier {number}");
}

/// An image without content.
pub fn blank(version: Version, clusters: u64) -> Delta {
    Delta {
        version,
        cluster: CLUSTER,
        clusters: vec![None; clusters as usize],
        leaks: 0,
        in_use: false,
    }
}

pub fn opened(pages: Pages) -> (MemStore, Ploop<MemStore>) {
    let store = MemStore::from_pages(pages);
    let image = now(Ploop::open_write(store.clone(), Ledger::local())).unwrap();
    (store, image)
}

/// Writes a cluster, and makes nothing durable.
pub fn write(image: &Ploop<MemStore>, cluster: u32, byte: u8) {
    now(async {
        let mut reserved = image.reserve(VirtCluster(cluster)).await.unwrap();
        reserved.submitted();
        let data = vec![byte; CLUSTER as usize];
        let at = reserved.host();
        let written = image.store().write_at(at, data.into(), Reach::Cache);
        written.await.unwrap();
        image.publish(VirtCluster(cluster), reserved, Below::Data);
    });
}

/// What a cluster is full of, if it is there.
pub fn byte_of(store: &MemStore, image: &Ploop<MemStore>, cluster: u64) -> Option<u8> {
    let Extent::Data { at, .. } = now(image.map(cluster * CLUSTER, 512)).unwrap() else {
        return None;
    };
    let found = now(store.read_at(at, buf::aligned(CLUSTER as usize))).unwrap();
    assert!(found.iter().all(|byte| *byte == found[0]));
    Some(found[0])
}
