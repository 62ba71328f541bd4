//! The changes campaign: the power goes, the process dies, or an operation fails, at any point of a
//! change of a disk's tree, on files and on names alike.
//!
//! In each state that may be left the disk is the old one or the new one, every point reads as it
//! must, frozen files are what they were, another disk that shares some is whole, and no file is
//! there that nobody names. Then the same change is asked for again, and works.
//!
//! Many changes begin on what an earlier one left: its process died, and all its names are seen but
//! none is durable; or the power went. So what a command does about its predecessor is cut, too.

mod alone;
pub mod faulty;
mod verb;

pub use verb::{KINDS, Verb};

use super::report::{Report, Tally};
use super::trees::{self, Formats, OTHER, Tree};
use crate::image::change::{read, settle};
use crate::image::target::DESCRIPTOR;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::guid::Guid;
use ploop_formats::store::Store;
use ploop_formats::store::fault::Faults;
use ploop_formats::store::mutate::Mutator;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{SimFolder, Wreck};
use ploop_formats::testkit::exec::{Exec, Step, now};
use ploop_formats::testkit::rng::Rng;
use std::collections::BTreeMap;
use verb::Chance;

/// States tried after one operation.
const PER_POINT: usize = 3;
/// Points of a disk.
const POINTS: u64 = 6;
/// Disks that are made until one allows a verb.
const TRIES: usize = 50;
/// Folders of the clones that a change, and one before it, make.
const CLONE: usize = 1;
const EARLIER_CLONE: usize = 2;
/// An earlier change ends after one operation in so many, or after so many on names at most.
const END_IN: u64 = 60;
const NAMES: u64 = 10;

/// What a change begins on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Past {
    /// A disk that nobody left anything of.
    Settled,
    /// What a process left that died.
    Death,
    /// What a power cut left.
    Cut,
}

/// Tries `states` states or more, over verbs of all kinds.
pub fn campaign(formats: Formats, seed: u64, states: u64) -> Report {
    Report::campaign("changes", seed, states, |seed, tally| {
        let kind = KINDS[seed as usize % KINDS.len()];
        let whole = Mutator::new();
        let past = match seed / KINDS.len() as u64 % 4 {
            0 => Past::Settled,
            1 => Past::Death,
            2 => Past::Cut,
            _ => return faulty::run(seed, tally, formats, kind),
        };
        run(seed, tally, (formats, kind), past, &whole)
    })
}

/// One verb of a kind on one disk; its barriers break as `mutator` says, those of recovery and of
/// what went before stay whole.
pub fn run(
    seed: u64,
    tally: &mut Tally,
    (formats, kind): (Formats, &str),
    past: Past,
    mutator: &Mutator,
) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let Some(mut case) = begin(&mut rng, formats, kind, past) else {
        return Ok(());
    };
    let folder = case.folder.through(mutator.clone(), Faults::new());
    let outcome = case.live(&folder, rng.next());
    tally.states += case.states;
    tally.requests += 1;
    outcome.map_err(|e| case.tell(&e))
}

/// A disk that allows a verb of a kind, and that verb.
fn begin(rng: &mut Rng, formats: Formats, kind: &str, past: Past) -> Option<Case> {
    for _ in 0..TRIES {
        let (folder, old) = trees::make(rng, formats, POINTS);
        let (folder, before, earlier) = match past {
            Past::Settled => (folder, vec![old], None),
            _ => {
                let earlier = KINDS[rng.below(KINDS.len() as u64) as usize];
                let earlier = Verb::choose(earlier, &old.disk, &folder, EARLIER_CLONE, rng);
                // What one that shrinks has left, no name tells.
                let tells = |verb: &Verb| !matches!(verb, Verb::Shrink(_));
                let Some(earlier) = earlier.filter(tells) else {
                    continue;
                };
                let (folder, before) = leave(&folder, &old, (formats, earlier), past, rng);
                (folder, before, Some(earlier))
            }
        };
        let seen = before.last()?;
        let Some(verb) = Verb::choose(kind, &seen.disk, &folder, CLONE, rng) else {
            continue;
        };
        // A top may have grown, and no name tells: all of it has its place in what is written anew, and a
        // smaller size is refused.
        match (earlier, verb) {
            (Some(Verb::Grow(_)), Verb::Flatten(_)) => continue,
            (Some(Verb::Grow(was)), Verb::Grow(size)) if size < was => continue,
            _ => {}
        }
        let case = Case::new(folder, before, earlier, verb, rng);
        return Some(Case { formats, ..case });
    }
    None
}

/// Ends a change somewhere: the folder that it leaves, and the disks that a power cut might show
/// then. The last of them is the one that is seen.
fn leave(
    folder: &SimFolder,
    old: &Tree,
    (formats, verb): (Formats, Verb),
    past: Past,
    rng: &mut Rng,
) -> (SimFolder, Vec<Tree>) {
    let mut exec = Exec::new(folder.sim().clone(), rng.next());
    let done = exec.start(verb.carry_out(folder.clone(), Chance::new(rng)));
    let (mut unsynced, mut names) = (0, rng.range(1, NAMES));
    while !done.is_full() && names > 0 && !rng.one_in(END_IN) && exec.step() == Step::Moved {
        names -= u64::from(folder.unsynced() != unsynced);
        unsynced = folder.unsynced();
    }
    let left = match past {
        Past::Cut => {
            let wreck = folder.crash(rng);
            SimFolder::of(wreck, rng.next(), Mutator::new(), formats.rules())
        }
        _ => folder.fork(rng.next()),
    };
    left.sim().instant(true);
    for store in left.sim().stores() {
        now(store.settle());
    }
    let seen = now(read(&left, DESCRIPTOR)).expect("a descriptor, whatever happened");
    left.sim().instant(false);
    let mut path = verb.path(old);
    let place = path.iter().position(|tree| is(&tree.disk, &seen));
    path.truncate(place.expect("a disk that was asked for") + 1);
    path.last_mut().expect("the one that is seen").disk = seen;
    if past == Past::Cut {
        path.drain(..path.len() - 1);
    }
    (left, path)
}

/// Whether a disk that was foretold is the one that is there. Two may have the same tree, but not
/// the same top.
fn is(foretold: &Descriptor, there: &Descriptor) -> bool {
    let top = |disk: &Descriptor| disk.image(disk.top()).map(|image| image.file.clone());
    let is_new = top(foretold).is_some_and(|file| file.starts_with(verb::NEW));
    trees::shape(foretold) == trees::shape(there) && (is_new || top(foretold) == top(there))
}

struct Case {
    folder: SimFolder,
    formats: Formats,
    /// What a power cut may show as long as the verb has settled nothing.
    before: Vec<Tree>,
    earlier: Option<Verb>,
    verb: Verb,
    /// What it leads through, from the disk that is seen at its beginning.
    path: Vec<Tree>,
    sealed: Vec<(usize, BTreeMap<String, Pages>)>,
    /// What each delta holds, when it is not to change although its bytes do.
    alone: BTreeMap<String, alone::Delta>,
    rng: Rng,
    states: u64,
}

impl Case {
    fn new(
        folder: SimFolder,
        before: Vec<Tree>,
        earlier: Option<Verb>,
        verb: Verb,
        rng: &mut Rng,
    ) -> Self {
        for own in [CLONE, EARLIER_CLONE, OTHER] {
            folder.sibling(own);
        }
        let seen = before.last().expect("a disk");
        let mut own = trees::sealed(&folder, &seen.disk);
        let earlier_targets = match earlier {
            // Undoing it takes the bytes back.
            Some(Verb::Convert(_)) => earlier.map(|verb| verb.targets(&seen.disk)),
            _ => None,
        };
        let targets = verb.targets(&seen.disk).into_iter();
        for target in targets.chain(earlier_targets.into_iter().flatten()) {
            let file = seen.disk.image(target).map(|image| &image.file);
            file.and_then(|file| own.remove(file));
        }
        let other = folder.sibling(OTHER);
        let shared = other.names().into_keys();
        let shared = shared.filter_map(|name| Some((name.clone(), other.pages(&name)?)));
        let alone = match (verb, before.len(), earlier) {
            (Verb::Convert(_), 1, None) => alone::all(&folder, &seen.disk),
            _ => BTreeMap::new(),
        };
        Self {
            sealed: vec![(0, own), (OTHER, shared.collect())],
            alone,
            path: verb.path(seen),
            formats: Formats::Ploop,
            folder,
            before,
            earlier,
            verb,
            rng: Rng::new(rng.next()),
            states: 0,
        }
    }

    /// Who failed, and on what.
    fn tell(&self, e: &str) -> String {
        let disk = self.before.last().map(|tree| trees::shape(&tree.disk));
        format!("{:?} after {:?} of {disk:?}: {e}", self.verb, self.earlier)
    }

    fn live(&mut self, folder: &SimFolder, seed: u64) -> Result<(), String> {
        let mut exec = Exec::new(folder.sim().clone(), seed);
        let chance = Chance::new(&mut self.rng);
        let done = exec.start(self.verb.carry_out(folder.clone(), chance));
        exec.watch(&done, |done| self.cut(folder, done))?;
        done.take()
            .map_or(Ok(()), |outcome| outcome.map_err(|e| e.to_string()))?;
        for _ in 0..PER_POINT {
            self.cut(folder, true)?;
        }
        Ok(())
    }

    fn cut(&mut self, folder: &SimFolder, done: bool) -> Result<(), String> {
        for _ in 0..PER_POINT {
            let wreck = folder.crash(&mut self.rng);
            self.examine(wreck, done)?;
        }
        Ok(())
    }

    /// Judges what a power cut left.
    fn examine(&mut self, wreck: Wreck, done: bool) -> Result<(), String> {
        let rules = self.formats.rules();
        let folder = SimFolder::of(wreck, self.rng.next(), Mutator::new(), rules);
        self.judge(&folder, done)
    }

    /// Judges what is there, and asks for the same again. It must be the new disk if the verb was
    /// `done`.
    fn judge(&mut self, folder: &SimFolder, done: bool) -> Result<(), String> {
        self.states += 1;
        folder.sim().instant(true);
        self.untouched(folder)?;
        alone::nobody_is_misled(folder, &self.alone)?;
        let last = self.path.len() - 1;
        let legal: Vec<&Tree> = match done {
            true => vec![&self.path[last]],
            false => self.path.iter().chain(&self.before).collect(),
        };
        let found = now(trees::judge(folder, &legal))?;
        if let Verb::Clone(point, own) = self.verb {
            self.cloned(&folder.sibling(own), point, done)?;
        }
        if let Some(Verb::Clone(point, own)) = self.earlier {
            self.cloned(&folder.sibling(own), point, false)?;
        }
        let to = match self.verb {
            Verb::Convert(to) if done => Some(to),
            _ => None,
        };
        alone::have_one_version(folder, to)?;
        // The new disk of a conversion looks like the old one.
        let is_new = found == last && !matches!(self.verb, Verb::Convert(_));
        match done || is_new {
            true => Ok(()),
            false => self.again(folder, &legal[found].clone()),
        }
    }

    fn untouched(&self, folder: &SimFolder) -> Result<(), String> {
        for (own, files) in &self.sealed {
            for (name, pages) in files {
                let there = folder.sibling(*own).pages(name);
                if there.is_some_and(|there| !trees::same(&there, pages)) {
                    return Err(format!("{name} was frozen, and changed"));
                }
            }
        }
        Ok(())
    }

    fn cloned(&self, folder: &SimFolder, point: Guid, done: bool) -> Result<(), String> {
        if !now(trees::is_disk(folder)) {
            return match done {
                true => Err("the clone was answered and is no disk".into()),
                false => Ok(()),
            };
        }
        let disk = now(settle(folder)).map_err(|e| e.to_string())?;
        let read = now(trees::content(folder, &disk, disk.top())).map_err(|e| e.to_string())?;
        match trees::agree(&read, &self.path[0].contents[&point]) {
            true => Ok(()),
            false => Err("the clone reads otherwise than its source".into()),
        }
    }

    fn again(&mut self, folder: &SimFolder, found: &Tree) -> Result<(), String> {
        let chance = Chance::new(&mut self.rng);
        // What is half made of a clone is removed with its folder. A cut may have taken away what
        // an earlier change had made for this one.
        if matches!(self.verb, Verb::Clone(..)) || !self.verb.is_legal(&found.disk, folder) {
            return Ok(());
        }
        let path = self.verb.path(found);
        let again = self.verb.carry_out(folder.clone(), chance);
        now(again).map_err(|e| format!("asked again: {e}"))?;
        now(trees::judge(folder, &[&path[path.len() - 1]]))
            .map_err(|e| format!("asked again: {e}"))?;
        match self.verb {
            Verb::Convert(to) => alone::have_one_version(folder, Some(to)),
            _ => Ok(()),
        }
    }
}
