//! SimStore: files that lose power, answer in any order, and outlive their process.
//!
//! A [`Sim`] is a small world of files. Operations on them wait in flight until the world lands
//! them, one at a time, in an order that the caller's dice choose ([`Sim::land`]); or at once, when
//! the world is [`Sim::instant`]. At any moment the world can show what a power cut would leave
//! ([`Sim::crash`]) or be copied as the death of the process would leave it ([`Sim::fork`]): there
//! the operations in flight are nobody's, and land late or never until [`Store::settle`].
//!
//! No threads, no clock: the same calls with the same seeds give the same bytes.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test instrument stops at the first surprise"
)]

mod disk;
mod fate;
mod folder;

pub use disk::{Change, Choice, Choices, Disk, POISON, Record, Rules};
pub use fate::{EXHAUSTIVE_SECTORS, Fate};
pub use folder::{Names, SimFolder, Wreck};

use super::mem::{admit, admit_memory};
use super::pages::Pages;
use super::{Reach, Space, Store, StoreInfo};
use crate::testkit::rng::Rng;
use crate::{Error, Kind, Result};
use bytes::{Bytes, BytesMut};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Keeps a world's own dice apart from an executor's that start from the same seed.
const SALT: u64 = 0x6F72_7068_616E_7321;

/// What was asked of a file.
#[derive(Debug, Clone)]
enum Ask {
    Read { at: u64, buf: BytesMut },
    Change(Change, Reach),
    Flush,
    Settle,
}

/// Whom an operation in flight will answer.
#[derive(Debug)]
enum Asker {
    Waiting(Option<Waker>),
    /// Its future was dropped, or its process died.
    Nobody,
}

#[derive(Debug)]
struct Flight {
    op: u64,
    file: usize,
    ask: Ask,
    asker: Asker,
}

#[derive(Debug, Default)]
struct World {
    files: Vec<Disk>,
    flights: Vec<Flight>,
    answers: Vec<(u64, Result<BytesMut>)>,
    clock: u64,
    instant: bool,
    rng: Option<Rng>,
    broken: Option<String>,
}

/// A world of simulated files; clones are handles to the same world.
#[derive(Debug, Clone, Default)]
pub struct Sim(Arc<Mutex<World>>);

/// A file of a [`Sim`]; clones are handles to the same file.
#[derive(Debug, Clone)]
pub struct SimStore {
    sim: Sim,
    file: usize,
}

impl World {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Lets an operation take effect, and answers it.
    fn land(&mut self, index: usize) -> Option<Waker> {
        let flight = self.flights.swap_remove(index);
        let done = self.tick();
        let orphan = matches!(flight.asker, Asker::Nobody);
        let answer = self.effect(flight.file, flight.op, done, flight.ask, orphan);
        match flight.asker {
            Asker::Waiting(waker) => {
                self.answers.push((flight.op, answer));
                waker
            }
            Asker::Nobody => None,
        }
    }

    fn effect(
        &mut self,
        file: usize,
        op: u64,
        done: u64,
        ask: Ask,
        orphan: bool,
    ) -> Result<BytesMut> {
        let disk = &mut self.files[file];
        match ask {
            Ask::Read { at, mut buf } => {
                admit(at, buf.len() as u64, 1, Some(disk.now().len()))?;
                disk.now().read(at, &mut buf);
                return Ok(buf);
            }
            Ask::Change(change, reach) => {
                if disk.rules().sealed {
                    self.broken =
                        Some(format!("file {file} is sealed and was changed: {change:?}"));
                }
                grow_under(disk, op, done, &change, orphan)?;
                disk.apply(op, done, change, reach == Reach::Durable);
            }
            // Operations are numbered by the clock, so a flush covers what landed before its call.
            Ask::Flush => disk.flush(op),
            Ask::Settle => self.settle(file),
        }
        Ok(BytesMut::new())
    }

    /// Orphans of `file` land now or never.
    fn settle(&mut self, file: usize) {
        let orphan = |f: &Flight| f.file == file && matches!(f.asker, Asker::Nobody);
        while let Some(index) = self.flights.iter().position(orphan) {
            if self.rng.get_or_insert_with(|| Rng::new(0)).one_in(2) {
                self.land(index);
            } else {
                self.flights.swap_remove(index);
            }
        }
    }

    fn flying(&self, file: usize) -> Vec<Record> {
        let disk = &self.files[file];
        let mut out = Vec::new();
        for flight in self.flights.iter().filter(|f| f.file == file) {
            let Ask::Change(change, _) = &flight.ask else {
                continue;
            };
            let changes = disk.whole_sectors(change.clone());
            let record = |change| Record {
                op: flight.op,
                done: u64::MAX,
                change,
            };
            out.extend(changes.into_iter().map(record));
        }
        out.sort_by_key(|r| r.op);
        out
    }
}

/// A write past the end fails; an orphan's, whose file was cut meanwhile, grows the file instead,
/// as a late write of a dead process does.
fn grow_under(disk: &mut Disk, op: u64, done: u64, change: &Change, orphan: bool) -> Result<()> {
    let Change::Write { at, data } = change else {
        return Ok(());
    };
    let end = at.saturating_add(data.len() as u64);
    if orphan && end > disk.now().len() {
        disk.apply(op, done, Change::Len(end), false);
    }
    admit(*at, data.len() as u64, 1, Some(disk.now().len()))
}

/// Lands one operation, and then wakes who waits for it.
fn land_in(mut world: MutexGuard<'_, World>, index: usize) {
    let waker = world.land(index);
    drop(world);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl Sim {
    /// A world whose own dice (for what nobody waits for) start from `seed`.
    pub fn new(seed: u64) -> Self {
        let sim = Self::default();
        sim.lock().rng = Some(Rng::new(seed ^ SALT));
        sim
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a file that durably holds `pages`.
    pub fn file(&self, pages: Pages, rules: Rules) -> SimStore {
        let mut world = self.lock();
        world.files.push(Disk::new(pages, rules));
        SimStore {
            sim: self.clone(),
            file: world.files.len() - 1,
        }
    }

    /// The files, in the order of their making.
    pub fn stores(&self) -> Vec<SimStore> {
        let count = self.lock().files.len();
        (0..count)
            .map(|file| SimStore {
                sim: self.clone(),
                file,
            })
            .collect()
    }

    /// From now on operations land as soon as they are asked for, or no longer.
    pub fn instant(&self, instant: bool) {
        self.lock().instant = instant;
    }

    /// Counts calls and landings: between two equal readings a crash finds nothing new.
    pub fn clock(&self) -> u64 {
        self.lock().clock
    }

    /// Operations in flight that somebody waits for, and orphans.
    pub fn in_flight(&self) -> (usize, usize) {
        let world = self.lock();
        let orphans = world
            .flights
            .iter()
            .filter(|f| matches!(f.asker, Asker::Nobody))
            .count();
        (world.flights.len() - orphans, orphans)
    }

    /// Lands one operation that dice choose; false when none is in flight. Orphans are late: dice
    /// that fall on one mostly choose somebody who waits, or nothing.
    pub fn land(&self, rng: &mut Rng) -> bool {
        let world = self.lock();
        if world.flights.is_empty() {
            return false;
        }
        let mut index = rng.below(world.flights.len() as u64) as usize;
        let waiting = |f: &Flight| matches!(f.asker, Asker::Waiting(_));
        if !waiting(&world.flights[index]) && !rng.one_in(8) {
            match world.flights.iter().position(waiting) {
                Some(other) => index = other,
                None => return true,
            }
        }
        land_in(world, index);
        true
    }

    /// Lands one operation that `choose` picks of so many that are in flight, orphans too; false when
    /// none is.
    pub fn land_chosen(&self, choose: impl FnOnce(usize) -> usize) -> bool {
        let world = self.lock();
        if world.flights.is_empty() {
            return false;
        }
        let index = choose(world.flights.len());
        land_in(world, index);
        true
    }

    /// A promise that somebody broke: a change of a sealed file.
    pub fn broken(&self) -> Option<String> {
        self.lock().broken.clone()
    }

    /// The same world after the death of its process: a copy whose operations in flight are
    /// orphans. This one goes on as if nothing had happened.
    pub fn fork(&self, seed: u64) -> Self {
        let world = self.lock();
        let orphan = |f: &Flight| Flight {
            op: f.op,
            file: f.file,
            ask: f.ask.clone(),
            asker: Asker::Nobody,
        };
        let changes = |f: &&Flight| matches!(f.ask, Ask::Change(..));
        Self(Arc::new(Mutex::new(World {
            files: world.files.clone(),
            flights: world.flights.iter().filter(changes).map(orphan).collect(),
            answers: Vec::new(),
            clock: world.clock,
            instant: world.instant,
            rng: Some(Rng::new(seed ^ SALT)),
            broken: world.broken.clone(),
        })))
    }

    /// From now on any change of `file` is a broken promise, or no longer.
    pub fn seal(&self, file: usize, sealed: bool) {
        self.lock().files[file].seal(sealed);
    }

    /// What every file holds after a power cut in which `file` met `fate` and the others kept what
    /// was durable.
    pub fn crash(&self, file: usize, fate: &Fate) -> Vec<(Pages, Rules)> {
        let world = self.lock();
        let after = |(n, disk): (usize, &Disk)| {
            let pages = if n == file {
                disk.crash(&world.flying(n), fate)
            } else {
                disk.crash(&[], &Fate::None)
            };
            (pages, disk.rules())
        };
        world.files.iter().enumerate().map(after).collect()
    }

    /// What every file holds after a power cut in which each met its own fate.
    pub fn crash_each(&self, fates: &[Fate]) -> Vec<(Pages, Rules)> {
        let world = self.lock();
        let files = world.files.iter().zip(fates).enumerate();
        let after = |(n, (disk, fate)): (usize, (&Disk, &Fate))| {
            (disk.crash(&world.flying(n), fate), disk.rules())
        };
        files.map(after).collect()
    }

    /// A world of these files, all of it durable.
    pub fn of(files: Vec<(Pages, Rules)>, seed: u64) -> Self {
        let sim = Self::new(seed);
        for (pages, rules) in files {
            sim.file(pages, rules);
        }
        sim
    }

    /// At most `max` outcomes of a crash of `file` now; see [`Disk::some_fates`].
    pub fn some_fates(&self, file: usize, max: usize, rng: &mut Rng) -> Vec<Fate> {
        let world = self.lock();
        world.files[file].some_fates(&world.flying(file), max, rng)
    }

    /// Outcomes of a crash of `file` worth trying now; see [`Disk::fates`].
    pub fn fates(&self, file: usize, random: usize, rng: &mut Rng) -> Vec<Fate> {
        let world = self.lock();
        world.files[file].fates(&world.flying(file), random, rng)
    }
}

/// An operation: asked for at its first poll, abandoned when dropped before its answer.
struct Operation<'a> {
    store: &'a SimStore,
    ask: Option<Ask>,
    op: Option<u64>,
}

impl Future for Operation<'_> {
    type Output = Result<BytesMut>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut world = self.store.sim.lock();
        let file = self.store.file;
        if let Some(ask) = self.ask.take() {
            let op = world.tick();
            if world.instant {
                let done = world.tick();
                return Poll::Ready(world.effect(file, op, done, ask, false));
            }
            let asker = Asker::Waiting(Some(cx.waker().clone()));
            world.flights.push(Flight {
                op,
                file,
                ask,
                asker,
            });
            self.op = Some(op);
            return Poll::Pending;
        }
        let op = self
            .op
            .expect("an operation that is not in flight was answered");
        if let Some(index) = world.answers.iter().position(|(n, _)| *n == op) {
            let (_, answer) = world.answers.swap_remove(index);
            self.op = None;
            return Poll::Ready(answer);
        }
        if let Some(flight) = world.flights.iter_mut().find(|f| f.op == op) {
            flight.asker = Asker::Waiting(Some(cx.waker().clone()));
        }
        Poll::Pending
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        let Some(op) = self.op else { return };
        let mut world = self.store.sim.lock();
        world.answers.retain(|(n, _)| *n != op);
        if let Some(index) = world.flights.iter().position(|f| f.op == op) {
            if matches!(world.flights[index].ask, Ask::Change(..)) {
                world.flights[index].asker = Asker::Nobody;
            } else {
                world.flights.swap_remove(index);
            }
        }
    }
}

impl SimStore {
    /// The world it is in.
    pub fn sim(&self) -> &Sim {
        &self.sim
    }

    /// What a reader sees now.
    pub fn pages(&self) -> Pages {
        self.sim.lock().files[self.file].now().clone()
    }

    /// What it promises.
    pub fn rules(&self) -> Rules {
        self.sim.lock().files[self.file].rules()
    }

    fn admit(&self, at: u64, data: &[u8]) -> Result<()> {
        let info = self.info();
        admit(at, data.len() as u64, info.align, Some(info.len))?;
        admit_memory(data, info.align)
    }

    fn ask(&self, ask: Ask) -> Operation<'_> {
        Operation {
            store: self,
            ask: Some(ask),
            op: None,
        }
    }
}

impl Store for SimStore {
    fn info(&self) -> StoreInfo {
        let world = self.sim.lock();
        let disk = &world.files[self.file];
        let Rules {
            align, fresh_zero, ..
        } = disk.rules();
        StoreInfo {
            len: disk.now().len(),
            align,
            fresh_zero,
            punches: true,
        }
    }

    fn room(&self) -> Result<u64> {
        Ok(u64::MAX)
    }

    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.admit(at, &buf)?;
        self.ask(Ask::Read { at, buf }).await
    }

    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()> {
        self.admit(at, &data)?;
        self.ask(Ask::Change(Change::Write { at, data }, reach))
            .await?;
        Ok(())
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        let max = self.sim.lock().files[self.file].rules().max_len;
        if len > max.max(self.info().len) {
            return Err(Error::new(
                Kind::NoSpace,
                format!("no space for {len} bytes, only {max}"),
            ));
        }
        self.ask(Ask::Change(Change::Len(len), Reach::Cache))
            .await?;
        Ok(())
    }

    async fn punch(&self, at: u64, len: u64, _: Space) -> Result<()> {
        let end = self.info().len;
        let stop = at
            .checked_add(len)
            .ok_or_else(|| Error::invalid("range too large"))?;
        let (at, stop) = (at.min(end), stop.min(end));
        self.ask(Ask::Change(
            Change::Zero { at, len: stop - at },
            Reach::Cache,
        ))
        .await?;
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.ask(Ask::Flush).await?;
        Ok(())
    }

    async fn settle(&self) {
        // Settling cannot fail: it only waits.
        let _ = self.ask(Ask::Settle).await;
    }

    async fn extent(&self, at: u64) -> Result<(bool, u64)> {
        Ok(self.sim.lock().files[self.file].now().extent(at))
    }
}

#[cfg(test)]
mod tests;
