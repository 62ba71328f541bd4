//! Registry: the trackers of a disk as whoever serves it knows them, by name.

use super::blocks::Blocks;
use super::recorder::Recorder;
use super::sync::lock;
use crate::io::memfd::SharedWords;
use ploop_formats::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

/// A set in shared memory.
pub type Set = Arc<Blocks<SharedWords>>;

/// Name of a tracker: 1 to 64 letters, digits, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        match (1..=64).contains(&name.len()) && name.chars().all(fits) {
            true => Ok(Self(name)),
            false => Err(Error::new(
                Kind::Invalid,
                format!("{name:?} names no tracker: 1 to 64 letters, digits, - and _ do"),
            )),
        }
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl std::str::FromStr for Name {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::try_from(name.to_string())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// That a tracker has no such generation.
pub fn gone(name: &Name, generation: u64) -> Error {
    let what = format!("tracker {name} has no generation {generation}");
    Error::new(Kind::NotFound, what)
}

/// What one tracker has.
#[derive(Debug, Clone)]
struct Known {
    id: u64,
    recording: Set,
    sealed: BTreeMap<u64, Set>,
}

/// The trackers of a disk.
#[derive(Debug, Default)]
pub struct Registry {
    recorder: Arc<Recorder<SharedWords>>,
    known: Mutex<BTreeMap<Name, Known>>,
}

impl Registry {
    /// What marks for them.
    pub fn recorder(&self) -> Arc<Recorder<SharedWords>> {
        Arc::clone(&self.recorder)
    }

    /// A tracker begins to record in this set, in place of any of that name. `id` tells the two apart.
    pub fn begin(&self, name: &Name, id: u64, recording: Set) {
        let mut known = lock(&self.known);
        let sealed = BTreeMap::new();
        let tracker = Known {
            id,
            recording,
            sealed,
        };
        known.insert(name.clone(), tracker);
        self.tell(&known);
    }

    /// Records in this set from now on: the `id` of the tracker, and the set that it recorded in
    /// before, which is complete once the recorder is settled. None when there is no such tracker.
    pub fn replace(&self, name: &Name, set: Set) -> Option<(u64, Set)> {
        let mut known = lock(&self.known);
        let tracker = known.get_mut(name)?;
        let old = std::mem::replace(&mut tracker.recording, set);
        let id = tracker.id;
        self.tell(&known);
        Some((id, old))
    }

    /// A generation that is complete, of the tracker of that `id`: it may have been stopped, and
    /// have a namesake.
    pub fn add(&self, name: &Name, id: u64, generation: u64, set: Set) {
        let mut known = lock(&self.known);
        if let Some(tracker) = known.get_mut(name).filter(|tracker| tracker.id == id) {
            tracker.sealed.insert(generation, set);
        }
    }

    /// Forgets a generation.
    pub fn forget(&self, name: &Name, generation: u64) {
        if let Some(tracker) = lock(&self.known).get_mut(name) {
            tracker.sealed.remove(&generation);
        }
    }

    /// Records for `name` no more, and forgets its generations.
    pub fn stop(&self, name: &Name) {
        let mut known = lock(&self.known);
        known.remove(name);
        self.tell(&known);
    }

    fn tell(&self, known: &BTreeMap<Name, Known>) {
        let sets = known.values().map(|tracker| Arc::clone(&tracker.recording));
        self.recorder.replace(sets.collect());
    }

    /// A generation.
    pub fn generation(&self, name: &Name, generation: u64) -> Result<Set> {
        let known = lock(&self.known);
        let found = known.get(name).and_then(|t| t.sealed.get(&generation));
        found.map(Arc::clone).ok_or_else(|| gone(name, generation))
    }

    /// The generations there are, by the names that NBD clients ask for: the newest of a tracker by its
    /// name, and each by that, a dot and its number.
    pub fn bitmaps(&self) -> Vec<(String, Set)> {
        let known = lock(&self.known);
        let mut bitmaps = Vec::new();
        for (name, tracker) in known.iter() {
            if let Some((_, newest)) = tracker.sealed.last_key_value() {
                bitmaps.push((name.to_string(), Arc::clone(newest)));
            }
            let each = tracker.sealed.iter();
            bitmaps.extend(each.map(|(n, set)| (format!("{name}.{n}"), Arc::clone(set))));
        }
        bitmaps
    }
}
