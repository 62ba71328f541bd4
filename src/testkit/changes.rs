//! The changes campaign: the power goes, or the process dies, after any operation of a change of a
//! disk's tree, on files and on names alike.
//!
//! In each state that may be left the disk is the old one or the new one, every point reads as it
//! must, frozen files are what they were, and no file is there that nobody names. Then the same
//! change is asked for again, and works.

use super::report::{Report, Tally};
use super::trees::{self, RULES, Tree};
use crate::image::change::settle;
use crate::image::clone::clone;
use crate::image::snapshot::copy::Work;
use crate::image::snapshot::{create, remove, switch};
use ploop_formats::descriptor::Descriptor;
use ploop_formats::guid::Guid;
use ploop_formats::store::mutate::Mutator;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{SimFolder, Wreck};
use ploop_formats::testkit::exec::{Exec, Step, now};
use ploop_formats::testkit::rng::Rng;
use std::collections::BTreeMap;

/// States tried after one operation.
const PER_POINT: usize = 3;
/// Points of a disk.
const POINTS: u64 = 6;

/// What is asked of a disk that is not attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Freeze the top.
    Create(Guid),
    /// Go back to a point.
    Switch(Guid),
    /// Take a point away.
    Remove(Guid),
    /// A new disk over a point, beside the first.
    Clone(Guid),
}

/// The kinds of verbs, for those who want one of each.
pub const KINDS: [&str; 4] = ["create", "switch", "remove", "clone"];

impl Verb {
    /// A verb of a kind that the disk allows, if there is one.
    pub fn choose(kind: &str, tree: &Tree, rng: &mut Rng) -> Option<Self> {
        let (disk, top) = (&tree.disk, tree.disk.top());
        let frozen: Vec<Guid> = disk.shots().iter().map(|s| s.guid).collect();
        let frozen: Vec<Guid> = frozen.into_iter().filter(|g| *g != top).collect();
        if kind == "create" {
            return Some(Self::Create(trees::guid(rng)));
        }
        if frozen.is_empty() {
            return None;
        }
        let point = *rng.pick(&frozen);
        Some(match kind {
            "switch" => Self::Switch(point),
            "remove" => Self::Remove(point),
            _ => Self::Clone(point),
        })
    }

    /// Carries it out. A clone is made in the second folder of the world.
    pub async fn carry_out(self, folder: SimFolder, random: Guid) -> ploop_formats::Result<()> {
        let pace = ();
        match self {
            Self::Create(uuid) => create::offline(&folder, uuid, random).await.map(|_| ()),
            Self::Switch(to) => switch::offline(&folder, to, random).await.map(|_| ()),
            Self::Remove(uuid) => {
                let mut work = Work {
                    watch: &mut (),
                    pace: &pace,
                };
                remove::offline(&folder, uuid, &mut work).await.map(|_| ())
            }
            Self::Clone(uuid) => {
                let to = folder.sibling(1);
                let source = settle(&folder).await?;
                clone(&folder, &source, uuid, &to, random).await.map(|_| ())
            }
        }
    }

    /// The disk that it leads to.
    pub fn outcome(self, tree: &Tree) -> Tree {
        let mut after = tree.clone();
        let (disk, top) = (&tree.disk, tree.disk.top());
        after.disk = match self {
            Self::Create(uuid) => {
                after.contents.insert(uuid, tree.contents[&top].clone());
                disk.with_snapshot(uuid, "new").expect("a legal snapshot")
            }
            Self::Switch(to) => {
                after.contents.insert(top, tree.contents[&to].clone());
                disk.switched(to, "new").expect("a legal switch")
            }
            Self::Remove(uuid) => removed(disk, uuid),
            Self::Clone(_) => disk.clone(),
        };
        after
    }
}

fn removed(disk: &Descriptor, uuid: Guid) -> Descriptor {
    let removed = match disk.children(uuid).count() {
        0 => disk.without_leaf(uuid),
        1 => disk.dissolved(uuid),
        _ => return disk.clone(),
    };
    removed.expect("a legal removal")
}

/// Tries `states` states or more, over verbs of all kinds.
pub fn campaign(seed: u64, states: u64) -> Report {
    Report::campaign("changes", seed, states, |seed, tally| {
        let kind = KINDS[seed as usize % KINDS.len()];
        run(seed, tally, kind, &Mutator::new())
    })
}

/// One verb of a kind on one disk; barriers break as `mutator` says, recovery stays whole.
pub fn run(seed: u64, tally: &mut Tally, kind: &str, mutator: &Mutator) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let (folder, old) = trees::make(&mut rng, POINTS, mutator.clone());
    folder.sibling(1);
    let Some(verb) = Verb::choose(kind, &old, &mut rng) else {
        return Ok(());
    };
    let new = verb.outcome(&old);
    let mut case = Case {
        sealed: trees::sealed(&folder, &old.disk),
        old,
        new,
        verb,
        rng: Rng::new(rng.next()),
        states: 0,
    };
    let outcome = case.live(&folder, rng.next());
    tally.states += case.states;
    tally.requests += 1;
    outcome.map_err(|e| format!("{verb:?} of {:?}: {e}", case.old.disk.shots()))
}

struct Case {
    old: Tree,
    new: Tree,
    sealed: BTreeMap<String, Pages>,
    verb: Verb,
    rng: Rng,
    states: u64,
}

impl Case {
    fn live(&mut self, folder: &SimFolder, seed: u64) -> Result<(), String> {
        let mut exec = Exec::new(folder.sim().clone(), seed);
        let random = trees::guid(&mut self.rng);
        let done = exec.start(self.verb.carry_out(folder.clone(), random));
        let mut clock = folder.sim().clock();
        while !done.is_full() {
            if exec.step() == Step::Stuck {
                return Err("nothing can move any more".into());
            }
            if folder.sim().clock() != clock {
                clock = folder.sim().clock();
                self.cut(folder, done.is_full())?;
            }
        }
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

    /// Judges what was left, and asks for the same again.
    fn examine(&mut self, wreck: Wreck, done: bool) -> Result<(), String> {
        self.states += 1;
        let folder = SimFolder::of(wreck, self.rng.next(), Mutator::new(), RULES);
        folder.sim().instant(true);
        let legal = [&self.new, &self.old];
        let legal = if done { &legal[..1] } else { &legal };
        let is_new = now(trees::judge(&folder, legal))? == 0;
        self.untouched(&folder)?;
        if let Verb::Clone(point) = self.verb {
            self.cloned(&folder.sibling(1), point, done)?;
        }
        if !is_new {
            self.again(&folder)?;
        }
        Ok(())
    }

    fn untouched(&self, folder: &SimFolder) -> Result<(), String> {
        for (name, pages) in &self.sealed {
            let target = match self.verb {
                Verb::Remove(uuid) => self.old.disk.image(uuid),
                _ => None,
            };
            if target.is_some_and(|image| image.file == *name) {
                continue;
            }
            let there = folder.pages(name);
            if there.is_some_and(|there| !trees::same(&there, pages)) {
                return Err(format!("{name} was frozen, and changed"));
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
        match read == self.old.contents[&point] {
            true => Ok(()),
            false => Err("the clone reads otherwise than its source".into()),
        }
    }

    fn again(&mut self, folder: &SimFolder) -> Result<(), String> {
        let random = trees::guid(&mut self.rng);
        if let Verb::Clone(_) = self.verb {
            // What is half made is removed with its folder.
            return Ok(());
        }
        let again = self.verb.carry_out(folder.clone(), random);
        now(again).map_err(|e| format!("asked again: {e}"))?;
        let trees = [&self.new];
        now(trees::judge(folder, &trees)).map_err(|e| format!("asked again: {e}"))?;
        Ok(())
    }
}
