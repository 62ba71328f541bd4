//! Tracking: the trackers of an attached disk as its keeper has them, who outlives the workers that mark.
//!
//! Every set is memory of the keeper. A worker is told which to mark in, and says when one that it
//! marks in no more is complete; until then a generation is not there. A worker that dies before
//! has marked in the old set or the new one, and what it has not answered may land: both together
//! go on recording, and nothing was sealed.
//!
//! What outlives the attachment, and when it is believed, is in [`crate::image::kept`].
//!
//! Where what the disk holds changes without a write of its guest, every tracker takes all of it
//! for written: after a failure, and when it goes back to a frozen point.

use super::child::{Baggage, Worker};
use super::control::{Asker, TrackAsk};
use super::message::{Event, Order, Track, WorkerSet, WorkerTracker};
use crate::image::kept::Kept;
use crate::io::memfd::SharedWords;
use crate::tracker::stored::{
    GENERATIONS_MAX, Generation, Noted, Resting, TRACKERS_MAX, WORDS_MAX,
};
use crate::tracker::{Blocks, LOG2, Name, Set, gone, words_for};
use ploop_formats::{Error, Kind, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Requests that a worker has not answered.
const ASKED_MAX: usize = 64;
/// Bytes of a block, as a power of two, when nobody says how many.
const LOG2_DEFAULT: u32 = 16;
/// Extents in an answer.
const EXTENTS_MAX: u32 = 512;

/// A generation that is complete.
#[derive(Debug)]
struct Sealed {
    set: Set,
    bytes: u64,
    since: SystemTime,
}

/// One tracker.
#[derive(Debug)]
struct Tracker {
    /// Tells it from its namesakes.
    id: u64,
    recording: Set,
    /// What a worker was told to mark in instead, and the number of its answer.
    successor: Option<(u64, Set)>,
    sealed: BTreeMap<u64, Sealed>,
    next: u64,
}

/// What a worker was asked.
#[derive(Debug)]
enum Asked {
    Start(Name),
    Seal(Name),
    Extents,
}

/// What became of a request.
#[derive(Debug)]
pub(super) struct Answered {
    pub asker: Asker,
    pub answer: Result<Value>,
    /// The tracker that was started, and what tells it from its namesakes.
    pub started: Option<(Name, u64)>,
}

/// The trackers of a disk.
#[derive(Debug, Default)]
pub(super) struct Tracking {
    trackers: BTreeMap<Name, Tracker>,
    asked: BTreeMap<u64, (Asker, Asked)>,
    count: u64,
    /// Bytes of the disk if what was kept of its trackers is right.
    kept: Option<u64>,
}

fn unknown(name: &Name) -> Error {
    Error::new(Kind::NotFound, format!("there is no tracker {name}"))
}

impl Tracking {
    /// Goes on with what was kept.
    pub fn resume(kept: Kept) -> Self {
        let one = |resting: Resting<SharedWords>| {
            let sealed = resting.sealed.into_iter().map(|generation| {
                let since = UNIX_EPOCH.checked_add(Duration::from_secs(generation.since));
                let sealed = Sealed {
                    set: generation.set,
                    bytes: generation.bytes,
                    since: since.unwrap_or(UNIX_EPOCH),
                };
                (generation.number, sealed)
            });
            let tracker = Tracker {
                id: 0,
                recording: resting.recording,
                successor: None,
                sealed: sealed.collect(),
                next: resting.noted.next,
            };
            (resting.noted.name, tracker)
        };
        Self {
            trackers: kept.trackers.into_iter().map(one).collect(),
            kept: kept.size,
            ..Self::default()
        }
    }

    /// What there is to be written down while nobody knows more.
    pub fn names(&self) -> Vec<Noted> {
        let each = self.trackers.iter();
        each.map(|(name, tracker)| tracker.noted(name)).collect()
    }

    /// What is to be kept, once nobody marks any more.
    pub fn rest(&self) -> Vec<Resting<SharedWords>> {
        let generation = |(number, sealed): (&u64, &Sealed)| {
            let since = sealed.since.duration_since(UNIX_EPOCH);
            Generation {
                number: *number,
                bytes: sealed.bytes,
                since: since.unwrap_or_default().as_secs(),
                set: Arc::clone(&sealed.set),
            }
        };
        let one = |(name, tracker): (&Name, &Tracker)| Resting {
            noted: tracker.noted(name),
            recording: Arc::clone(&tracker.recording),
            sealed: tracker.sealed.iter().map(generation).collect(),
        };
        self.trackers.iter().map(one).collect()
    }

    /// Does what is asked of a disk of so many bytes; none when a worker was asked, and is heard of.
    pub fn ask(
        &mut self,
        asker: Asker,
        ask: TrackAsk,
        worker: Option<&Worker>,
        size: u64,
    ) -> Result<Option<Value>> {
        // One that does not serve yet was told what there was when it began: it hears what changes, later.
        let serves = worker.filter(|worker| worker.ready.is_some());
        let serving = || serves.ok_or_else(|| Error::new(Kind::Busy, "no worker serves the disk"));
        match ask {
            TrackAsk::Start { name, granularity } => {
                self.start(asker, name, granularity, serving()?, size)?;
                Ok(None)
            }
            TrackAsk::Seal { name } => {
                self.seal(asker, name, serving()?, size)?;
                Ok(None)
            }
            TrackAsk::Extents {
                name,
                generation,
                from,
                max,
            } => {
                let worker = serving()?;
                if !self.tracker(&name)?.sealed.contains_key(&generation) {
                    return Err(gone(&name, generation));
                }
                let ask = self.expect(asker, Asked::Extents)?;
                let max = max.unwrap_or(EXTENTS_MAX).clamp(1, EXTENTS_MAX);
                let order = Track::Extents {
                    ask,
                    name,
                    generation,
                    from,
                    max,
                };
                self.order(worker, ask, order, &[])?;
                Ok(None)
            }
            TrackAsk::Ack { name, generation } => {
                self.remove(worker, &name, generation)?;
                Ok(Some(json!({})))
            }
            TrackAsk::Nack { name, generation } => {
                self.give_back(worker, &name, generation)?;
                Ok(Some(json!({})))
            }
            TrackAsk::Stat => Ok(Some(self.stat(size))),
            TrackAsk::Stop { name } => {
                self.tracker(&name)?;
                self.stop(worker, name);
                Ok(Some(json!({})))
            }
        }
    }

    fn stop(&mut self, worker: Option<&Worker>, name: Name) {
        self.trackers.remove(&name);
        tell(worker, Track::Stop { name });
    }

    /// Stops a tracker that was started in vain, if it is still that one.
    pub fn give_up(&mut self, worker: Option<&Worker>, name: Name, id: u64) {
        if self.tracker(&name).is_ok_and(|tracker| tracker.id == id) {
            self.stop(worker, name);
        }
    }

    fn tracker(&mut self, name: &Name) -> Result<&mut Tracker> {
        self.trackers.get_mut(name).ok_or_else(|| unknown(name))
    }

    /// A new set, if there is room for it beside the others.
    fn new_set(&self, size: u64, log2: u32) -> Result<Set> {
        let words = words_for(size, log2)?;
        let of = |tracker: &Tracker| {
            let each = tracker.sealed.values().map(|sealed| &sealed.set);
            let sets = each.chain([&tracker.recording, tracker.latest()]);
            sets.map(|set| set.words().len()).sum::<usize>()
        };
        let taken: usize = self.trackers.values().map(of).sum();
        if taken + words > WORDS_MAX {
            return Err(Error::new(
                Kind::Busy,
                "its trackers may not take more memory; acknowledge generations, or use larger blocks",
            ));
        }
        Ok(Arc::new(Blocks::new(SharedWords::create(words)?, log2)?))
    }

    fn start(
        &mut self,
        asker: Asker,
        name: Name,
        granularity: Option<u64>,
        worker: &Worker,
        size: u64,
    ) -> Result<()> {
        if self.trackers.contains_key(&name) {
            let what = format!("there is a tracker {name} already");
            return Err(Error::new(Kind::Exists, what));
        }
        if self.trackers.len() >= TRACKERS_MAX {
            let what = format!("{TRACKERS_MAX} trackers record already; stop one");
            return Err(Error::new(Kind::Busy, what));
        }
        let log2 = match granularity {
            None => LOG2_DEFAULT,
            Some(bytes) if bytes.is_power_of_two() && LOG2.contains(&bytes.trailing_zeros()) => {
                bytes.trailing_zeros()
            }
            Some(bytes) => {
                return Err(Error::invalid(format!(
                    "{bytes} bytes are no granularity: it is a power of two from 4K to 1M"
                )));
            }
        };
        let (recording, all) = (self.new_set(size, log2)?, self.new_set(size, log2)?);
        all.add_all();
        let ask = self.expect(asker, Asked::Start(name.clone()))?;
        let order = Track::Start {
            ask,
            name: name.clone(),
            log2,
        };
        self.order(worker, ask, order, &[&recording, &all])?;
        let first = Sealed {
            set: all,
            bytes: size,
            since: SystemTime::now(),
        };
        let tracker = Tracker {
            id: ask,
            recording,
            successor: None,
            sealed: BTreeMap::from([(0, first)]),
            next: 1,
        };
        self.trackers.insert(name, tracker);
        Ok(())
    }

    fn seal(&mut self, asker: Asker, name: Name, worker: &Worker, size: u64) -> Result<()> {
        let tracker = self.tracker(&name)?;
        if tracker.successor.is_some() {
            let what = format!("tracker {name} is being sealed; try again");
            return Err(Error::new(Kind::Busy, what));
        }
        if tracker.sealed.len() >= GENERATIONS_MAX {
            let what = format!(
                "tracker {name} has {GENERATIONS_MAX} generations; acknowledge one, or give it back"
            );
            return Err(Error::new(Kind::Busy, what));
        }
        let (log2, generation) = (tracker.recording.log2(), tracker.next);
        let successor = self.new_set(size, log2)?;
        let ask = self.expect(asker, Asked::Seal(name.clone()))?;
        let order = Track::Seal {
            ask,
            name: name.clone(),
            generation,
            log2,
        };
        self.order(worker, ask, order, &[&successor])?;
        self.tracker(&name)?.successor = Some((ask, successor));
        Ok(())
    }

    fn expect(&mut self, asker: Asker, asked: Asked) -> Result<u64> {
        if self.asked.len() >= ASKED_MAX {
            let what = "too much is asked of its trackers at once; try again";
            return Err(Error::new(Kind::Busy, what));
        }
        self.count += 1;
        self.asked.insert(self.count, (asker, asked));
        Ok(self.count)
    }

    fn order(&mut self, worker: &Worker, ask: u64, order: Track, sets: &[&Set]) -> Result<()> {
        let fds: Vec<_> = sets.iter().map(|set| set.words().as_fd()).collect();
        let told = worker.order(&Order::Track(order), &fds);
        told.inspect_err(|_| drop(self.asked.remove(&ask)))
    }

    fn remove(&mut self, worker: Option<&Worker>, name: &Name, generation: u64) -> Result<Set> {
        let sealed = self.tracker(name)?.sealed.remove(&generation);
        let sealed = sealed.ok_or_else(|| gone(name, generation))?;
        let name = name.clone();
        tell(worker, Track::Forget { name, generation });
        Ok(sealed.set)
    }

    /// What a worker said, if that is about trackers. Who asked for a set to be sealed and is not there
    /// any more has never heard of the generation: it is given back.
    pub fn heard(
        &mut self,
        event: Event,
        worker: Option<&Worker>,
        is_wanted: impl Fn(Asker) -> bool,
        size: u64,
    ) -> Option<Answered> {
        let (ask, said) = match event {
            Event::Tracked { ask } => (ask, Ok(json!({}))),
            Event::NotTracked { ask, why } => (ask, Err(why)),
            Event::Extents { ask, extents, next } => {
                (ask, Ok(json!({ "extents": extents, "next": next })))
            }
            _ => return None,
        };
        let (asker, asked) = self.asked.remove(&ask)?;
        let mut started = None;
        let answer = match (asked, said) {
            (Asked::Start(name), Err(why)) => {
                self.trackers.remove(&name);
                Err(why.into())
            }
            (Asked::Seal(name), Err(why)) => {
                self.unseal(&name, ask);
                Err(why.into())
            }
            (Asked::Extents, said) => said.map_err(Error::from),
            (Asked::Start(name), Ok(_)) => {
                let answer = self.started(&name, size);
                started = Some((name, ask));
                Ok(answer)
            }
            (Asked::Seal(name), Ok(_)) => {
                let sealed = self.sealed(&name, ask, size);
                sealed.and_then(|(generation, said)| match is_wanted(asker) {
                    true => Ok(said),
                    false => {
                        self.give_back(worker, &name, generation)?;
                        let why = "given up: what was sealed is recorded again";
                        Err(Error::new(Kind::Cancelled, why))
                    }
                })
            }
        };
        Some(Answered {
            asker,
            answer,
            started,
        })
    }

    fn started(&self, name: &Name, size: u64) -> Value {
        let tracker = self.trackers.get(name);
        let log2 = tracker.map_or(LOG2_DEFAULT, |tracker| tracker.recording.log2());
        json!({ "name": name, "granularity": 1u64 << log2, "generation": 0, "bytes": size })
    }

    /// A set is complete: its generation. A tracker that was stopped meanwhile may have a namesake.
    fn sealed(&mut self, name: &Name, ask: u64, size: u64) -> Result<(u64, Value)> {
        let tracker = self.tracker(name)?;
        let successor = tracker.successor.take_if(|(asked, _)| *asked == ask);
        let (_, successor) = successor.ok_or_else(|| unknown(name))?;
        let set = std::mem::replace(&mut tracker.recording, successor);
        let (generation, bytes) = (tracker.next, set.bytes(size));
        let since = SystemTime::now();
        let sealed = Sealed { set, bytes, since };
        tracker.sealed.insert(generation, sealed);
        tracker.next += 1;
        let said = json!({ "generation": generation, "bytes": bytes });
        Ok((generation, said))
    }

    /// A seal came to nothing: what was marked in the one set or the other is recorded.
    fn unseal(&mut self, name: &Name, ask: u64) {
        if let Ok(tracker) = self.tracker(name)
            && let Some((_, successor)) = tracker.successor.take_if(|(asked, _)| *asked == ask)
        {
            tracker.recording.add_those_of(&successor);
        }
    }

    /// Records what a generation has again.
    fn give_back(&mut self, worker: Option<&Worker>, name: &Name, generation: u64) -> Result<()> {
        let set = self.remove(worker, name, generation)?;
        self.tracker(name)?.latest().add_those_of(&set);
        Ok(())
    }

    /// The worker is gone: what it was asked comes to nothing.
    pub fn lost_worker(&mut self) -> Vec<Answered> {
        let asked = std::mem::take(&mut self.asked);
        let answer = |(ask, (asker, asked)): (u64, (Asker, Asked))| {
            match &asked {
                Asked::Start(name) => drop(self.trackers.remove(name)),
                Asked::Seal(name) => self.unseal(name, ask),
                Asked::Extents => {}
            }
            let why = "the worker ended meanwhile, and nothing came of it; try again";
            Answered {
                asker,
                answer: Err(Error::new(Kind::Io, why)),
                started: None,
            }
        };
        asked.into_iter().map(answer).collect()
    }

    /// What a new worker is to know.
    pub fn pack(&self, bag: &mut Baggage) -> Result<Vec<WorkerTracker>> {
        let mut pack = |set: &Set| -> Result<WorkerSet> {
            let fd = bag.pack(set.words())?;
            let log2 = set.log2();
            Ok(WorkerSet { fd, log2 })
        };
        let mut trackers = Vec::new();
        for (name, tracker) in &self.trackers {
            let each = tracker.sealed.iter();
            let sealed = each.map(|(n, sealed)| Ok((*n, pack(&sealed.set)?)));
            trackers.push(WorkerTracker {
                name: name.clone(),
                sealed: sealed.collect::<Result<_>>()?,
                recording: pack(&tracker.recording)?,
            });
        }
        Ok(trackers)
    }

    /// The disk does not hold what was written to it, or nobody knows.
    pub fn doubt(&self) {
        for tracker in self.trackers.values() {
            tracker.latest().add_all();
        }
    }

    /// The disk has another size. Where it got smaller, what was behind its end is not there any more.
    pub fn resized(&mut self, old: u64, new: u64) {
        if self.kept.take().is_some_and(|kept| kept != new) {
            self.doubt();
        }
        if new >= old {
            return;
        }
        for tracker in self.trackers.values() {
            tracker.latest().add(new, old - new);
        }
    }

    fn stat(&self, size: u64) -> Value {
        let one = |(name, tracker): (&Name, &Tracker)| {
            let each = tracker.sealed.iter();
            let generations: Vec<Value> = each.map(|(n, sealed)| sealed.stat(*n)).collect();
            json!({
                "name": name,
                "granularity": 1u64 << tracker.recording.log2(),
                "recorded": tracker.recording.bytes(size),
                "unknown": tracker.recording.is_all(),
                "generations": generations,
            })
        };
        json!({ "trackers": self.trackers.iter().map(one).collect::<Vec<_>>() })
    }
}

impl Tracker {
    fn noted(&self, name: &Name) -> Noted {
        Noted {
            name: name.clone(),
            log2: self.recording.log2(),
            next: self.next,
        }
    }

    /// What a worker marks in now, or will.
    fn latest(&self) -> &Set {
        let successor = self.successor.as_ref();
        successor.map_or(&self.recording, |(_, set)| set)
    }
}

impl Sealed {
    fn stat(&self, generation: u64) -> Value {
        json!({
            "generation": generation,
            "bytes": self.bytes,
            "age_s": self.since.elapsed().unwrap_or_default().as_secs(),
        })
    }
}

fn tell(worker: Option<&Worker>, order: Track) {
    if let Some(Err(e)) = worker.map(|worker| worker.order(&Order::Track(order), &[])) {
        // Its end is seen elsewhere, and the next one knows what there is.
        tracing::debug!("{e}");
    }
}
