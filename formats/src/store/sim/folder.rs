//! SimFolder: directories that lose power.
//!
//! Each change of a name is visible at once. A crash keeps any of those that no sync covered, in
//! the order in which they were made: what a rename moves is there even where the name it had was
//! never durable.

use super::{Fate, Sim, SimStore};
use crate::folder::{Access, Folder};
use crate::store::fault::{FaultStore, Faults};
use crate::store::mutate::{MutateStore, Mutator};
use crate::store::pages::Pages;
use crate::store::sim::Rules;
use crate::testkit::rng::Rng;
use crate::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

/// Names of a directory, each with its file's place in the world.
pub type Names = BTreeMap<String, usize>;

#[derive(Debug, Clone)]
enum Change {
    Set(String, usize),
    Unset(String),
    Rename(String, String, usize),
}

fn act(names: &mut Names, change: &Change) {
    match change {
        Change::Set(name, file) => {
            names.insert(name.clone(), *file);
        }
        Change::Unset(name) => {
            names.remove(name);
        }
        Change::Rename(from, to, file) => {
            names.remove(from);
            names.insert(to.clone(), *file);
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Dir {
    now: Names,
    durable: Names,
    pending: Vec<Change>,
}

impl Dir {
    fn change(&mut self, change: Change) {
        act(&mut self.now, &change);
        self.pending.push(change);
    }

    fn sync(&mut self) {
        self.durable = self.now.clone();
        self.pending.clear();
    }

    /// The names after a crash: none of what is pending, all, what came before some moment, or
    /// whatever dice keep.
    fn crash(&self, rng: &mut Rng) -> Names {
        let until = rng.below(self.pending.len() as u64 + 1) as usize;
        let way = rng.below(4);
        let mut names = self.durable.clone();
        for (n, change) in self.pending.iter().enumerate() {
            let kept = match way {
                0 => false,
                1 => true,
                2 => n < until,
                _ => rng.one_in(2),
            };
            if kept {
                act(&mut names, change);
            }
        }
        names
    }
}

/// What a crash leaves: the contents of all files, and the names in each directory.
pub type Wreck = (Vec<(Pages, Rules)>, Vec<Names>);

/// A directory in a world of simulated files. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct SimFolder {
    sim: Sim,
    dirs: Arc<Mutex<Vec<Dir>>>,
    own: usize,
    mutator: Mutator,
    faults: Faults,
    rules: Rules,
}

impl SimFolder {
    /// A world of one empty directory. `mutator` breaks barriers, of files and of names alike; new
    /// files promise `rules`.
    pub fn new(sim: Sim, mutator: Mutator, rules: Rules) -> Self {
        let folder = Self {
            sim,
            dirs: Arc::default(),
            own: 0,
            mutator,
            faults: Faults::new(),
            rules,
        };
        folder.lock().push(Dir::default());
        folder
    }

    /// A world as a crash left it, all of it durable; the first of its directories.
    pub fn of(wreck: Wreck, seed: u64, mutator: Mutator, rules: Rules) -> Self {
        let (files, names) = wreck;
        let folder = Self::new(Sim::of(files, seed), mutator, rules);
        *folder.lock() = names
            .into_iter()
            .map(|names| Dir {
                now: names.clone(),
                durable: names,
                pending: Vec::new(),
            })
            .collect();
        folder
    }

    /// The same directory, whose barriers `mutator` breaks and whose operations fail as `faults` say.
    #[must_use]
    pub fn through(&self, mutator: Mutator, faults: Faults) -> Self {
        Self {
            mutator,
            faults,
            ..self.clone()
        }
    }

    /// The same directory after the death of its process: a copy in which every name is what it
    /// was, no more durable than before, and operations in flight are nobody's.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        let dirs = self.lock().clone();
        Self {
            sim: self.sim.fork(seed),
            dirs: Arc::new(Mutex::new(dirs)),
            ..self.clone()
        }
    }

    /// Changes of names that no sync of this directory has covered yet.
    pub fn unsynced(&self) -> usize {
        self.lock().get(self.own).map_or(0, |dir| dir.pending.len())
    }

    /// Another directory of the same world, made when it is not there.
    pub fn sibling(&self, own: usize) -> Self {
        let mut dirs = self.lock();
        while dirs.len() <= own {
            dirs.push(Dir::default());
        }
        drop(dirs);
        Self {
            own,
            ..self.clone()
        }
    }

    /// The world of its files.
    pub const fn sim(&self) -> &Sim {
        &self.sim
    }

    /// The names in it now.
    pub fn names(&self) -> Names {
        self.lock().get(self.own).cloned().unwrap_or_default().now
    }

    /// Durably puts a file there, without any other change.
    pub fn put(&self, name: &str, pages: Pages, rules: Rules) {
        let file = self.sim.file(pages, rules).file;
        let mut dirs = self.lock();
        let dir = &mut dirs[self.own];
        dir.now.insert(name.into(), file);
        dir.durable.insert(name.into(), file);
    }

    /// Durably gives a file of another folder the same name here, without any other change.
    pub fn put_link(&self, from: &Self, name: &str) {
        let file = from.names()[name];
        let mut dirs = self.lock();
        let dir = &mut dirs[self.own];
        dir.now.insert(name.into(), file);
        dir.durable.insert(name.into(), file);
    }

    /// What a reader of a file sees now.
    pub fn pages(&self, name: &str) -> Option<Pages> {
        let file = *self.names().get(name)?;
        self.sim.stores().get(file).map(SimStore::pages)
    }

    /// What a power cut now leaves, as dice choose: often all or nothing of a file.
    pub fn crash(&self, rng: &mut Rng) -> Wreck {
        let count = self.sim.stores().len();
        let focus = rng.below(count as u64) as usize;
        let mut fates = Vec::with_capacity(count);
        for file in 0..count {
            let mut some = self.sim.some_fates(file, 4, rng);
            let plain = [Fate::None, Fate::All, Fate::Random(rng.next())];
            let chosen = match file == focus && !some.is_empty() {
                true => some.swap_remove(rng.below(some.len() as u64) as usize),
                false => *rng.pick(&plain),
            };
            fates.push(chosen);
        }
        let files = self.sim.crash_each(&fates);
        let names = self.lock().iter().map(|dir| dir.crash(rng)).collect();
        (files, names)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Dir>> {
        self.dirs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, name: &str) -> Result<usize> {
        let names = self.names();
        let found = names.get(name).copied();
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("{name}: no such file")))
    }

    fn store(&self, file: usize) -> MutateStore<FaultStore<SimStore>> {
        let store = SimStore {
            sim: self.sim.clone(),
            file,
        };
        let store = FaultStore::new(store, self.faults.clone());
        MutateStore::new(store, self.mutator.clone(), 0)
    }

    /// Changes a name. Where that fails it may have happened nevertheless.
    async fn change(&self, change: Change) -> Result<()> {
        let failed = self.faults.name();
        if !matches!(failed, Err((_, false))) {
            self.lock()[self.own].change(change);
            self.sim.lock().tick();
        }
        self.pause().await;
        failed.map_err(|(e, _)| e)
    }

    fn refuse_taken(&self, name: &str) -> Result<()> {
        match self.names().contains_key(name) {
            true => Err(Error::new(Kind::Exists, format!("{name}: exists"))),
            false => Ok(()),
        }
    }
}

/// Lets whoever watches the world look at it between two changes.
struct Pause(bool);

impl Future for Pause {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl SimFolder {
    async fn pause(&self) {
        if !self.sim.lock().instant {
            Pause(false).await;
        }
    }
}

impl Folder for SimFolder {
    type File = MutateStore<FaultStore<SimStore>>;

    async fn open(&self, name: &str, _: Access) -> Result<Self::File> {
        self.faults.look()?;
        Ok(self.store(self.file(name)?))
    }

    async fn create(&self, name: &str) -> Result<Self::File> {
        self.refuse_taken(name)?;
        let file = self.sim.file(Pages::new(0), self.rules).file;
        self.change(Change::Set(name.into(), file)).await?;
        Ok(self.store(file))
    }

    async fn links(&self, name: &str) -> Result<Option<u64>> {
        self.faults.look()?;
        let Ok(file) = self.file(name) else {
            return Ok(None);
        };
        let dirs = self.lock();
        let all = dirs.iter().flat_map(|dir| dir.now.values());
        Ok(Some(all.filter(|one| **one == file).count() as u64))
    }

    async fn set_shared(&self, name: &str, _: bool) -> Result<()> {
        self.file(name).map(|_| ())
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        let file = self.file(from)?;
        self.change(Change::Rename(from.into(), to.into(), file))
            .await
    }

    async fn link(&self, name: &str, folder: &Self, new: &str) -> Result<()> {
        folder.refuse_taken(new)?;
        let file = self.file(name)?;
        folder.change(Change::Set(new.into(), file)).await
    }

    async fn remove(&self, name: &str) -> Result<()> {
        match self.file(name) {
            Ok(_) => self.change(Change::Unset(name.into())).await,
            Err(_) => Ok(()),
        }
    }

    async fn sync(&self) -> Result<()> {
        self.faults.sync_names()?;
        if self.mutator.barrier() {
            self.lock()[self.own].sync();
        }
        self.sim.lock().tick();
        self.pause().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::{load, save};
    use crate::testkit::exec::now;

    fn world() -> SimFolder {
        let sim = Sim::new(1);
        sim.instant(true);
        SimFolder::new(sim, Mutator::new(), Rules::default())
    }

    fn wrecks(folder: &SimFolder) -> Vec<Vec<String>> {
        let mut rng = Rng::new(7);
        let mut all: Vec<_> = (0..200)
            .map(|_| folder.crash(&mut rng).1.swap_remove(0))
            .map(|names| names.into_keys().collect())
            .collect();
        all.sort();
        all.dedup();
        all
    }

    #[test]
    fn a_name_may_be_lost_until_its_folder_is_synced() {
        let folder = world();
        now(save(&folder, "a", b"x")).unwrap();
        assert_eq!(wrecks(&folder), [vec![], vec!["a".to_string()]]);
        now(folder.sync()).unwrap();
        assert_eq!(wrecks(&folder), [["a"]]);
        now(folder.rename("a", "b")).unwrap();
        assert_eq!(wrecks(&folder), [["a"], ["b"]]);
        assert_eq!(now(load(&folder, "b", 9)).unwrap(), b"x"[..]);
    }

    #[test]
    fn names_that_were_made_together_are_lost_one_by_one() {
        let folder = world();
        now(save(&folder, "a", b"x")).unwrap();
        now(folder.link("a", &folder, "b")).unwrap();
        assert_eq!(now(folder.links("a")).unwrap(), Some(2));
        assert_eq!(wrecks(&folder).len(), 4);
    }
}
