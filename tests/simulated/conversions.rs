//! Conversions between format versions under power cuts and deaths, on tables of many sectors: a
//! delta that is found by itself is refused or maps what it mapped, and the next command makes the
//! disk the one or the other.
//!
//! `PLOOP_CHANGE_STATES` says how many states are tried.

use crate::campaign::{SEED, caught, count, holds};
use ploop::image::change::settle;
use ploop::image::convert::version::{self, Deltas};
use ploop::image::target::DESCRIPTOR;
use ploop::testkit::report::{Report, Tally};
use ploop::testkit::trees::{CLUSTER, RULES, guid, text};
use ploop_formats::descriptor::{Chs, Descriptor, ImageType, NewDisk};
use ploop_formats::folder::{Access, Folder};
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::ploop::convert::state;
use ploop_formats::ploop::{Header, Ploop, Version};
use ploop_formats::store::fault::Faults;
use ploop_formats::store::mutate::{Break, Mutation, Mutator};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Sim, SimFolder};
use ploop_formats::testkit::exec::{Exec, now};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::{ClusterSize, HostCluster};
use ploop_formats::{Error, Kind};
use std::collections::BTreeMap;

type Checked<T = ()> = Result<T, String>;

/// States tried after one operation.
const PER_POINT: usize = 3;

/// Where each cluster of a delta is.
type Map = Vec<Option<u64>>;

/// A disk whose deltas have tables of several sectors, and what these say.
struct World {
    folder: SimFolder,
    disk: Descriptor,
    maps: BTreeMap<String, Map>,
    to: Version,
}

/// A closed delta with some clusters here and there.
fn delta(rng: &mut Rng, version: Version, entries: u32) -> Pages {
    let cluster = ClusterSize::new(CLUSTER).expect("a legal size");
    let header = Header::new(version, u64::from(entries) * CLUSTER, cluster).expect("a size");
    let mut slots: Vec<u32> = (0..entries).filter(|_| rng.one_in(40)).collect();
    slots.reverse();
    let end = header.data_start + u32::try_from(slots.len()).expect("few");
    let mut pages = Pages::new(cluster.start(end));
    let header = Header {
        flags: u32::from(slots.is_empty()),
        ..header
    };
    pages.write(0, &header.encode());
    for (slot, host) in slots.into_iter().zip(header.data_start..) {
        let entry = header.cluster_to_entry(HostCluster(host)).expect("near");
        pages.write(header.entry_at(slot), &entry.to_le_bytes());
    }
    pages
}

impl World {
    /// A disk of two deltas; above a raw base now and then.
    fn new(rng: &mut Rng, raw: bool) -> Self {
        let (from, to) = match rng.one_in(2) {
            true => (Version::V1, Version::V2),
            false => (Version::V2, Version::V1),
        };
        let entries = u32::try_from(rng.range(300, 900)).expect("few");
        let chs = Chs {
            cylinders: 1,
            heads: 16,
            sectors: 63,
        };
        let mut disk = Descriptor::new_disk(&NewDisk {
            sectors: u64::from(entries) * CLUSTER / 512,
            cluster: ClusterSize::new(CLUSTER).expect("a legal size"),
            kind: if raw {
                ImageType::Plain
            } else {
                ImageType::Compressed
            },
            file: "root.hds",
            preallocated: false,
            chs,
        })
        .expect("a disk");
        for n in 0..1 + u64::from(raw) {
            disk = disk
                .with_snapshot(guid(rng), &format!("root.hds.{n}"))
                .expect("a snapshot");
        }
        let folder = SimFolder::new(Sim::new(rng.next()), Mutator::new(), RULES);
        for image in disk.images() {
            let pages = match raw && image.guid == disk.base().guid {
                true => Pages::new(u64::from(entries) * CLUSTER),
                false => delta(rng, from, entries),
            };
            folder.put(&image.file, pages, RULES);
        }
        folder.put(DESCRIPTOR, text(&disk.encode()), RULES);
        folder.sim().instant(true);
        let deltas = Deltas::of(&disk).expect("deltas");
        let maps = deltas.names().map(|file| {
            let map = now(map(&folder, file)).expect("a delta");
            (file.to_string(), map)
        });
        let maps = maps.collect();
        folder.sim().instant(false);
        Self {
            folder,
            disk,
            maps,
            to,
        }
    }

    /// What is there before any command: no delta is read as something else.
    fn nobody_is_misled(&self, folder: &SimFolder) -> Checked {
        for (file, was) in &self.maps {
            match now(map(folder, file)) {
                Ok(is) if is == *was => {}
                Ok(_) => return Err(format!("{file} is opened and maps something else")),
                Err(e) if e.kind() == Kind::Damaged && e.to_string().contains("conversion") => {}
                Err(e) => return Err(format!("{file}: {e}")),
            }
        }
        Ok(())
    }

    /// Whether the deciding delta looks converted.
    fn seems_done(&self) -> bool {
        let deltas = Deltas::of(&self.disk).expect("deltas");
        let file = deltas.names().next_back().expect("a delta");
        self.folder.sim().instant(true);
        let seen = now(async { state(&self.folder.open(file, Access::Read).await?).await });
        self.folder.sim().instant(false);
        seen.is_ok_and(|seen| seen == (self.to, false))
    }

    /// What the next command makes of it.
    fn judge(&self, folder: &SimFolder, done: bool) -> Checked {
        folder.sim().instant(true);
        self.nobody_is_misled(folder)?;
        now(settle(folder)).map_err(|e| format!("settling: {e}"))?;
        self.is_whole(folder, done.then_some(self.to))?;
        now(version::offline(folder, self.to, &mut ())).map_err(|e| format!("again: {e}"))?;
        self.is_whole(folder, Some(self.to))
    }

    fn is_whole(&self, folder: &SimFolder, wanted: Option<Version>) -> Checked {
        let mut found = wanted;
        for (file, was) in &self.maps {
            let is = now(map(folder, file)).map_err(|e| format!("{file}: {e}"))?;
            if is != *was {
                return Err(format!("{file} maps something else"));
            }
            let version = now(async { state(&folder.open(file, Access::Read).await?).await });
            let version = version.map_err(|e: Error| e.to_string())?.0;
            if *found.get_or_insert(version) != version {
                return Err(format!("{file} is {version:?}, where all are {found:?}"));
            }
        }
        let names = folder.names().into_keys();
        let images = self.disk.images();
        let mut strange = names.filter(|n| n != DESCRIPTOR && images.iter().all(|i| i.file != *n));
        strange
            .next()
            .map_or(Ok(()), |name| Err(format!("{name} is left")))
    }

    /// Cuts the power here, some times.
    fn cut(&self, folder: &SimFolder, done: bool, rng: &mut Rng, tally: &mut Tally) -> Checked {
        for _ in 0..PER_POINT {
            tally.states += 1;
            let wreck = folder.crash(rng);
            let wreck = SimFolder::of(wreck, rng.next(), Mutator::new(), RULES);
            self.judge(&wreck, done)?;
        }
        Ok(())
    }
}

async fn map(folder: &SimFolder, file: &str) -> ploop_formats::Result<Map> {
    let layer = Ploop::open_read(folder.open(file, Access::Read).await?).await?;
    let size = layer.geometry().size;
    let mut found = Vec::new();
    for at in (0..size).step_by(usize::try_from(CLUSTER).expect("small")) {
        found.push(match layer.map(at, CLUSTER).await? {
            Extent::Data { at, .. } => Some(at),
            _ => None,
        });
    }
    Ok(found)
}

/// Does something in a folder, and looks in between.
fn step_by_step(
    folder: &SimFolder,
    seed: u64,
    work: impl Future<Output = ploop_formats::Result<()>> + 'static,
    mut look: impl FnMut(bool) -> Checked,
) -> Checked {
    let mut exec = Exec::new(folder.sim().clone(), seed);
    let done = exec.start(work);
    exec.watch(&done, &mut look)?;
    let outcome = done.take().map_or(Ok(()), |done| done);
    outcome.map_err(|e| e.to_string())?;
    look(true)
}

/// One conversion, cut everywhere; its barriers break as `mutator` says.
fn conversion(seed: u64, tally: &mut Tally, raw: bool, mutator: &Mutator) -> Checked {
    let mut rng = Rng::new(seed);
    let world = World::new(&mut rng, raw);
    let folder = world.folder.through(mutator.clone(), Faults::new());
    let (seed, to) = (rng.next(), world.to);
    let work = folder.clone();
    let work = async move { version::offline(&work, to, &mut ()).await.map(drop) };
    step_by_step(&folder, seed, work, |done| {
        world.cut(&folder, done, &mut rng, tally)
    })
}

/// When the process of a conversion dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    /// At any moment.
    Anytime,
    /// When it is done for all that can be seen, but for the last flush.
    Late,
}

/// A conversion whose process dies, and the next command, cut everywhere; the barriers of that break
/// as `mutator` says.
fn recovery(seed: u64, tally: &mut Tally, raw: bool, death: Death, mutator: &Mutator) -> Checked {
    let mut rng = Rng::new(seed);
    let world = World::new(&mut rng, raw);
    let (seed, to, work) = (rng.next(), world.to, world.folder.clone());
    let work = async move { version::offline(&work, to, &mut ()).await.map(drop) };
    let (mut left, mut dead) = (rng.range(1, 60), None);
    step_by_step(&world.folder, seed, work, |_| {
        left = left.saturating_sub(1);
        let now = match death {
            Death::Anytime => left == 0,
            Death::Late => world.seems_done(),
        };
        if now && dead.is_none() {
            dead = Some(world.folder.fork(rng.next()));
        }
        Ok(())
    })?;
    let Some(dead) = dead else { return Ok(()) };
    dead.sim().instant(true);
    for store in dead.sim().stores() {
        now(ploop_formats::store::Store::settle(&store));
    }
    dead.sim().instant(false);
    let folder = dead.through(mutator.clone(), Faults::new());
    let (seed, work) = (rng.next(), folder.clone());
    let work = async move { settle(&work).await.map(drop) };
    step_by_step(&folder, seed, work, |_| {
        world.cut(&folder, false, &mut rng, tally)
    })
}

#[test]
fn a_conversion_that_is_cut_misleads_nobody_and_is_done_or_undone() {
    let states = count("PLOOP_CHANGE_STATES", 20_000);
    holds(Report::campaign(
        "conversions",
        SEED,
        states,
        |seed, tally| {
            let whole = Mutator::new();
            match seed % 4 {
                0 | 1 => conversion(seed, tally, seed % 8 > 3, &whole),
                2 => recovery(seed, tally, seed % 8 > 3, Death::Anytime, &whole),
                _ => recovery(seed, tally, seed % 8 > 3, Death::Late, &whole),
            }
        },
    ));
}

fn without(number: u64) -> Mutation {
    Mutation {
        covers: None,
        how: Break::Drop,
        only: Some(number),
    }
}

/// The barriers of a conversion of two closed deltas that protect something: of the record and its
/// name, of both copies and their names, of both marks and of both tables. Before them the top is
/// closed, which it is; what follows is flushed once more before the copies go.
const BARRIERS: std::ops::RangeInclusive<u64> = 4..=12;

#[test]
fn every_barrier_of_a_conversion_is_missed_when_it_is_gone() {
    for number in BARRIERS {
        let mutator = Mutator::new();
        let report = caught(50_000, |seed, tally| {
            mutator.set(Some(without(number)));
            conversion(seed, tally, false, &mutator)
        });
        println!(
            "a conversion without barrier {number}: {} states",
            report.states
        );
    }
}

/// The barrier of the command that comes after a late death: that of the deciding delta.
const FLUSH: u64 = 2;

#[test]
fn what_only_seems_to_be_converted_is_flushed_before_its_copy_goes() {
    let mutator = Mutator::new();
    let report = caught(50_000, |seed, tally| {
        mutator.set(Some(without(FLUSH)));
        recovery(seed, tally, false, Death::Late, &mutator)
    });
    println!("without it: {} states", report.states);
}
