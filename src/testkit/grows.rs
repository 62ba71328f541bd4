//! The grow campaign: a disk gets a larger size while its guest writes, and the power goes or the
//! process dies at any moment.
//!
//! Its table fills the header clusters that it has, so that growing needs more of them, and clusters
//! are in their way. A disk of that size has too many sectors to be judged one by one: the guest sees
//! a few of its clusters, at the beginning, around the old end and near the new one, as a small disk
//! ([`Window`]). Beyond the end that the disk has at the moment its reads find zeros, and its writes
//! are refused.
//!
//! A disk grows live, held while requests wait, or whenever it is opened. In the latter case whatever
//! a cut leaves is grown again by who comes next.

use super::crash::Effort;
use super::engine::audit_mark;
use super::judge::{Judge, Verdict};
use super::report::{Report, Tally};
use super::session::{Ground, Session};
use super::subject::{Bench, BenchStore, Chain, Setup, Subject, Wish};
use crate::device::{Device, GuestExtent, Zero};
use crate::disk::Disk;
use crate::stack::{AnyLayer, NewSize};
use bytes::{Bytes, BytesMut};
use ploop_formats::layer::Layer;
use ploop_formats::ledger::{Ledger, Words};
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::raw::Raw;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::Rules;
use ploop_formats::testkit::image::{Delta, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Value, ZERO};
use ploop_formats::units::SECTOR;
use ploop_formats::{Error, Kind, Result};

const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = (CLUSTER / SECTOR) as usize;
/// Entries beside the header in one cluster, and in two.
const ONE: u64 = (CLUSTER - 64) / 4;
const TWO: u64 = (2 * CLUSTER - 64) / 4;
/// Clusters of the disk at first.
const OLD: u64 = ONE - 1;
/// The clusters that the guest sees, one after another.
const PLACES: [u64; 8] = [0, 1, 2, OLD - 2, OLD - 1, OLD, ONE, TWO];
/// Header clusters at most.
const TABLE_MAX: u64 = 3;
const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 3,
    max_clusters: 0,
};
const EFFORT: Effort = Effort {
    per_point: 3,
    live_in: 800,
    cycles: 1,
};
/// Requests before the disk grows, at most: turns of the others.
const PATIENCE: u64 = 60;

/// A disk that grows whenever it is opened, or only when somebody beside the guest says so.
#[derive(Debug)]
pub struct Grower<const LIVE: bool>;

/// Clusters of a disk as a disk.
#[derive(Debug)]
pub struct Window(Disk<BenchStore>);

/// Clusters that a disk grows to. Who takes it over is to do the same, so the number of its ledger's
/// slots tells it.
const fn target(slots: usize) -> u64 {
    match slots {
        4 => ONE,
        16 => ONE + 1,
        _ => TWO + 1,
    }
}

/// Tries `states` power cuts and deaths or more.
pub fn campaign(seed: u64, states: u64) -> Report {
    Report::campaign("grow", seed, states, |seed, tally| {
        run(seed, tally, &Bench::default())
    })
}

/// One run; barriers break as `bench` says.
pub fn run(seed: u64, tally: &mut Tally, bench: &Bench) -> Verdict {
    match seed % 3 {
        0 => live::<false>(seed, tally, bench),
        _ => live::<true>(seed, tally, bench),
    }
}

fn live<const LIVE: bool>(seed: u64, tally: &mut Tally, bench: &Bench) -> Verdict {
    let mut rng = Rng::new(seed);
    let setup = Grower::<LIVE>::setup(&mut rng, &WISH);
    let mut session = Session::<Grower<LIVE>>::with_bench(&setup, bench, rng.next());
    let mut judge = Judge::new(&setup, &mut rng, EFFORT);
    let mut look = |session: &Session<Grower<LIVE>>| judge.look(session);
    let ops = setup.shape(rng.range(10, 60) as usize, 0).make(&mut rng);
    let depth = rng.range(1, 8);
    let lived = session.open(&mut look).and_then(|()| {
        if LIVE {
            let dice = Rng::new(rng.next());
            session.beside(|ground| grow(ground, dice));
        }
        session.run(ops, depth, &mut look)?;
        session.check_all()?;
        session.close(&mut look)
    });
    judge.count(&session, tally);
    lived
}

/// Grows a disk after a while.
async fn grow(ground: Ground<Window>, mut rng: Rng) -> Verdict {
    super::switches::pause_for(&mut rng, PATIENCE).await;
    let disk = &ground.device.0;
    let words = ground.head.borrow().words.clone();
    let size = target(words.count() - 1) * CLUSTER;
    let hold = disk.hold().await;
    ground.head.borrow_mut().ending = true;
    let asked = ground.guest.borrow_mut().model.flush();
    let grown = hold.resize(NewSize::Larger(size), Ledger::new(words)).await;
    ground.head.borrow_mut().ending = false;
    let mut guest = ground.guest.borrow_mut();
    match grown {
        Ok(()) if disk.size() != size => Err(format!("{} bytes", disk.size())),
        Ok(()) => {
            guest.model.flushed(asked);
            Ok(())
        }
        Err(e) => guest.excuse(Err(e)),
    }
}

/// Rewrites the clusters of a file for a guest that sees them elsewhere.
fn renumber(pages: &mut Pages, version: Option<Version>, clusters: &[Option<Vec<Value>>]) {
    for (window, place) in PLACES.iter().enumerate() {
        let Some(Some(values)) = clusters.get(*place as usize) else {
            continue;
        };
        let at = match version {
            None => place * CLUSTER,
            Some(version) => {
                let mut entry = [0; 4];
                pages.read(64 + 4 * place, &mut entry);
                let unit = match version {
                    Version::V1 => SECTOR,
                    Version::V2 => CLUSTER,
                };
                u64::from(u32::from_le_bytes(entry)) * unit
            }
        };
        for (i, value) in values.iter().enumerate() {
            let sector = (window * SECTORS + i) as u64;
            pages.write(at + i as u64 * SECTOR, &stamp::run(sector, 1, *value));
        }
    }
}

/// Clusters of a layer of so many: those that the guest sees are there once in `one_in` times.
fn layer(rng: &mut Rng, size: u64, one_in: u64, next: &mut Value) -> Vec<Option<Vec<Value>>> {
    let mut clusters = vec![None; size as usize];
    for place in PLACES.iter().filter(|place| **place < size) {
        if rng.one_in(one_in) {
            let values = (0..SECTORS).map(|_| {
                *next += 1;
                if rng.one_in(8) { ZERO } else { *next }
            });
            clusters[*place as usize] = Some(values.collect());
        }
    }
    clusters
}

fn overlay(values: &mut [Value], layer: &[Option<Vec<Value>>]) {
    for (to, place) in values.chunks_mut(SECTORS).zip(PLACES) {
        if let Some(Some(cluster)) = layer.get(place as usize) {
            to.copy_from_slice(cluster);
        }
    }
}

impl<const LIVE: bool> Subject for Grower<LIVE> {
    type Device = Window;

    fn setup(rng: &mut Rng, wish: &Wish) -> Setup {
        let version = *rng.pick(&[Version::V1, Version::V2]);
        let align = *rng.pick(&[1, 512, 4096]);
        let layers = rng.range(wish.min_layers, wish.max_layers);
        let raw_base = layers > 1 && rng.one_in(4);
        let mut values = vec![ZERO; PLACES.len() * SECTORS];
        let (mut files, mut next, mut below) = (Vec::new(), 0, 1);
        for n in 1..=layers {
            let top = n == layers;
            // A lower layer may be shorter than those above it.
            below = match top || rng.one_in(2) {
                true => OLD,
                false => *rng.pick(&[below, below.max(2), below.max(OLD - 1)]),
            };
            let clusters = layer(rng, below, if top { 2 } else { 1 }, &mut next);
            overlay(&mut values, &clusters);
            let flat = raw_base && n == 1;
            let delta = Delta {
                version,
                cluster: CLUSTER,
                clusters,
                leaks: rng.below(4) as u32,
                in_use: top && rng.one_in(4),
            };
            let mut pages = match flat {
                true => Pages::new(below * CLUSTER),
                false => delta.make(rng),
            };
            renumber(&mut pages, (!flat).then_some(version), &delta.clusters);
            let tight = pages.len() + rng.range(2, 8) * CLUSTER;
            let rules = Rules {
                align,
                metadata_end: TABLE_MAX * CLUSTER,
                fresh_zero: !rng.one_in(4),
                max_len: if rng.one_in(4) { tight } else { u64::MAX },
                sealed: !top,
            };
            files.push((pages, rules));
        }
        Setup {
            files,
            raw_base,
            values,
            cluster: SECTORS,
            slots: *rng.pick(&[4, 16, 64]),
        }
    }

    async fn open(mut chain: Chain) -> Result<Window> {
        let store = chain.stores.pop().expect("a disk has a file");
        let size = target(chain.ledger.slots()) * CLUSTER;
        let ledger = chain.ledger;
        let mut top = Ploop::open_write(store.clone(), ledger.clone()).await?;
        if !LIVE {
            match top.grow(size).await {
                Err(e) if e.kind() == Kind::NoSpace => {
                    top = Ploop::open_write(store, ledger).await?;
                }
                grown => grown?,
            }
        }
        let mut layers = Vec::new();
        for (n, store) in chain.stores.into_iter().enumerate() {
            layers.push(if chain.raw_base && n == 0 {
                AnyLayer::Raw(Raw::open_read(store, top.geometry().cluster)?)
            } else {
                AnyLayer::Ploop(Ploop::open_read(store).await?)
            });
        }
        layers.push(AnyLayer::Ploop(top));
        Disk::new(layers, false).map(Window)
    }

    async fn close(device: &Window) -> Result<()> {
        device.0.close().await
    }

    fn audit(top: &Pages) -> Verdict {
        audit(top).map(|_| ())
    }

    fn audit_open(top: &Pages) -> Verdict {
        audit_mark(top, true)
    }

    fn audit_closed(top: &Pages) -> Verdict {
        audit_mark(top, false)
    }
}

impl Window {
    /// The parts of a range, one a cluster: where each is in the disk, and its length.
    fn parts(at: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
        let (mut at, end) = (at, at + len);
        std::iter::from_fn(move || {
            let within = at % CLUSTER;
            let part = (CLUSTER - within).min(end - at);
            let place = *PLACES.get((at / CLUSTER) as usize)?;
            at += part;
            (part > 0).then_some((place * CLUSTER + within, part))
        })
    }

    /// Refuses what changes a place behind the end.
    fn check(&self, at: u64, len: u64) -> Result<()> {
        match Self::parts(at, len).any(|(at, len)| at + len > self.0.size()) {
            true => Err(Error::new(Kind::NoSpace, "behind the end, as it is now")),
            false => Ok(()),
        }
    }
}

impl Device for Window {
    fn size(&self) -> u64 {
        PLACES.len() as u64 * CLUSTER
    }

    fn read_only(&self) -> bool {
        false
    }

    fn preferred_block(&self) -> u64 {
        CLUSTER
    }

    async fn read(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        let mut rest = buf;
        let mut whole = rest.split_to(0);
        for (at, len) in Self::parts(at, rest.len() as u64) {
            let mut part = rest.split_to(len as usize);
            if at + len <= self.0.size() {
                part = self.0.read(at, part).await?;
            } else {
                part.fill(0);
            }
            whole.unsplit(part);
        }
        Ok(whole)
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> Result<()> {
        self.check(at, data.len() as u64)?;
        let mut rest = data;
        for (at, len) in Self::parts(at, rest.len() as u64) {
            self.0.write(at, rest.split_to(len as usize), fua).await?;
        }
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> Result<()> {
        // A part of it would be done, or not, by itself.
        if how == Zero::Fast && at / CLUSTER != (at + len - 1) / CLUSTER {
            return Err(Error::unsupported("not in one piece"));
        }
        self.check(at, len)?;
        for (at, len) in Self::parts(at, len) {
            self.0.zero(at, len, how, fua).await?;
        }
        Ok(())
    }

    async fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.check(at, len)?;
        for (at, len) in Self::parts(at, len) {
            self.0.discard(at, len).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn extents(&self, at: u64, len: u64, max: usize) -> Result<Vec<GuestExtent>> {
        let (at, part) = Self::parts(at, len).next().unwrap_or_default();
        self.0.extents(at, part, max).await
    }
}
