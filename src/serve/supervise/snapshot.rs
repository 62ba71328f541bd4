//! Snapshot: how a keeper has the tree of its disk changed while the guest runs.
//!
//! Three processes take part, so that the one that must not fail does little. To freeze the top, in
//! order:
//!
//! 1. A changer makes the new delta and announces the new descriptor. It says that it is prepared.
//! 2. The keeper locks the new delta, makes it a ledger of its own, and passes both to the worker.
//! 3. The worker opens it, holds the guest, seals the old top, and says that it is frozen.
//! 4. The changer commits.
//! 5. The keeper takes the new lock and ledger for the disk's, and the worker goes on.
//!
//! To take a frozen point away, a changer merges it with what stands on it, which the running disk
//! does not notice: what it reads is the same throughout. It commits when told, and the worker is
//! given the files anew.
//!
//! Who dies on the way is replaced or done without. Until the changer was told to commit, its end
//! is the end of the change. From then on only the descriptor says what is. No worker is started
//! while files may come and go under it.

use super::changer::{Changer, Made, Said, Task, Wanted};
use super::child::Worker;
use super::message::{Failure, Order};
use crate::image::chain::Chain;
use crate::image::lock::DiskLocks;
use crate::image::target::Source;
use crate::io::beneath::{self, Access};
use crate::io::lock::Held;
use crate::io::memfd::SharedWords;
use ploop_formats::guid::Guid;
use ploop_formats::ledger::Ledger;
use ploop_formats::{Error, Kind, Result};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// What becomes the disk's with the new top.
#[derive(Debug)]
pub(super) struct Next {
    /// Keeps others off the new top.
    pub top: Held,
    /// What it was answered.
    pub ledger: SharedWords,
    name: String,
}

/// What the keeper is to do next.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing yet.
    Wait,
    /// Take this for the disk's; whether the disk is poisoned because nobody knows what is durable.
    Take(Next, bool),
    /// Nothing: the disk is the old one, or the worker need not know.
    Keep,
    /// Replace the worker: its files may not be those that the descriptor names.
    Renew,
    /// Tell whoever asked how far it is: bytes done, and to do.
    Progress(u64, u64),
}

/// The disk, to whoever changes it.
pub(super) struct Place<'a> {
    /// Its directory.
    pub dir: BorrowedFd<'a>,
    /// Its locks.
    pub locks: &'a DiskLocks,
    /// Whether who looks at images is confined.
    pub sandbox: bool,
}

/// A snapshot under way.
#[derive(Debug)]
pub(super) struct Snapshot {
    changer: Option<Changer>,
    uuid: Guid,
    freezes: bool,
    next: Option<Next>,
    /// The worker waits for word, or will.
    asked: bool,
    /// The changer was told to commit.
    told: bool,
    /// A merge is to be committed once a worker that is starting serves.
    merged: bool,
    /// What came of a removal.
    made: Option<Made>,
    /// What came of it, once that is settled.
    outcome: Option<Result<()>>,
    stall_us: Option<u64>,
    due: Option<Instant>,
}

/// How long it may take to freeze a disk, the guest's waiting included: a storage that hangs must not
/// hold what does not need it.
const PATIENCE: Duration = Duration::from_secs(60);

impl Snapshot {
    /// Begins to freeze the top; `size` and `version` are those of the new one.
    pub fn begin(place: &Place<'_>, uuid: Guid, size: u64, version: u8) -> Result<Self> {
        let wanted = Wanted::Freeze {
            uuid: uuid.to_string(),
            random: random().to_string(),
            version,
            size,
        };
        Self::start(place, uuid, wanted)
    }

    /// Begins to take a point away, copying so many bytes a second at most.
    pub fn begin_removal(place: &Place<'_>, uuid: Guid, rate: Option<u64>) -> Result<Self> {
        let wanted = Wanted::Remove {
            uuid: uuid.to_string(),
            rate,
        };
        Self::start(place, uuid, wanted)
    }

    fn start(place: &Place<'_>, uuid: Guid, wanted: Wanted) -> Result<Self> {
        let lock = place.locks.disk().ok_or_else(bare)?;
        let freezes = matches!(wanted, Wanted::Freeze { .. });
        let sandbox = place.sandbox;
        let task = Task { wanted, sandbox };
        Ok(Self {
            changer: Some(Changer::start(place.dir, lock, &task)?),
            uuid,
            freezes,
            next: None,
            asked: false,
            told: false,
            merged: false,
            made: None,
            outcome: None,
            stall_us: None,
            due: freezes.then(|| Instant::now() + PATIENCE),
        })
    }

    /// What to wait for.
    pub fn polled(&self) -> [Option<BorrowedFd<'_>>; 2] {
        let changer = self.changer.as_ref();
        [
            changer.and_then(Changer::spoke),
            changer.map(Changer::ended),
        ]
    }

    /// Whether no worker may be started.
    pub const fn bars_workers(&self) -> bool {
        self.changer.is_some() && self.told
    }

    /// When it has taken too long.
    pub const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It has taken too long: whoever is waited for goes, and what is then is judged as ever.
    pub fn expire(&mut self) -> Turn {
        self.due = None;
        let asked = self.asked;
        let why = "the disk was not frozen in time: its storage may hang";
        self.outcome
            .get_or_insert_with(|| Err(Error::new(Kind::TimedOut, why)));
        if let Some(changer) = &mut self.changer {
            changer.kill();
        }
        match asked {
            true => Turn::Renew,
            false => Turn::Wait,
        }
    }

    /// Whether the disk cannot be let go of yet. A merge can be given up for that.
    pub fn hurry(&mut self) {
        if !self.freezes && !self.told {
            self.give_up(Error::new(Kind::Cancelled, "the disk is being detached"));
        }
    }

    /// Hears the changer.
    pub fn hear(&mut self, dir: impl AsFd, worker: Option<&Worker>) -> Turn {
        let Some(said) = self.changer.as_mut().and_then(Changer::said) else {
            return Turn::Wait;
        };
        match said {
            Said::Prepared { top, below } => {
                if let Err(e) = self.ask(dir, worker, top, below) {
                    self.give_up(e);
                }
                Turn::Wait
            }
            Said::Progress { done, total } => Turn::Progress(done, total),
            Said::Merged => {
                self.merged = true;
                self.serves(worker);
                Turn::Wait
            }
            Said::Committed(Made::Top) => self.committed(false),
            Said::Committed(made) => {
                self.outcome.get_or_insert(Ok(()));
                let knows = match &made {
                    Made::Merged { into } => self.reload(&dir, worker, into),
                    _ => true,
                };
                self.made = Some(made);
                if knows { Turn::Wait } else { Turn::Renew }
            }
            Said::Undone(failure) => self.undone(failure.into()),
            Said::Unknown(failure) => {
                self.outcome = Some(Err(failure.into()));
                match self.freezes {
                    true => self.committed(true),
                    false => Turn::Renew,
                }
            }
        }
    }

    /// Step 2.
    fn ask(
        &mut self,
        dir: impl AsFd,
        worker: Option<&Worker>,
        top: String,
        below: String,
    ) -> Result<()> {
        let worker = worker.ok_or_else(|| Error::new(Kind::Busy, "no worker serves the disk"))?;
        let next = Next {
            top: DiskLocks::lock_next(&dir, &top)?,
            ledger: SharedWords::create(Ledger::WORDS)?,
            name: top.clone(),
        };
        // Descriptions of the worker's own: its fence must not live in this process.
        let file = beneath::open_file(&dir, Path::new(&top), Access::Write)?;
        let old = beneath::open_file(&dir, Path::new(&below), Access::Read)?;
        let fds = [file.as_fd(), next.ledger.as_fd(), old.as_fd()];
        worker.order(&Order::Freeze { top, below }, &fds)?;
        self.asked = true;
        self.next = Some(next);
        Ok(())
    }

    /// Commits a merge, unless a worker is just opening the files that will go.
    pub fn serves(&mut self, worker: Option<&Worker>) {
        if self.merged && worker.is_none_or(|worker| worker.ready.is_some()) {
            self.merged = false;
            self.told = self.changer.as_ref().is_some_and(Changer::commit);
        }
    }

    /// Gives the worker the merged layers anew. One that cannot be told would go on with a layer
    /// that it opened before the merge, which the next merge would bring to light.
    fn reload(&mut self, dir: &impl AsFd, worker: Option<&Worker>, into: &str) -> bool {
        let Some(worker) = worker else {
            return true;
        };
        let ordered = Chain::read(dir, &Source::Bundle).and_then(|chain| {
            let names = chain
                .layers
                .iter()
                .map(|l| l.name.to_string_lossy().into_owned());
            let mut lower: Vec<String> = names.collect();
            lower.pop();
            if !lower.iter().any(|name| name == into) {
                return Ok(false);
            }
            let file = beneath::open_file(dir, Path::new(into), Access::Read)?;
            let merged = into.to_owned();
            worker.order(&Order::Reload { lower, merged }, &[file.as_fd()])?;
            Ok(true)
        });
        match ordered {
            Ok(asked) => {
                self.asked = asked;
                true
            }
            Err(e) => {
                tracing::warn!("the worker cannot be given the merged file: {e}");
                false
            }
        }
    }

    /// The worker holds the guest: step 4.
    pub fn frozen(&mut self, worker: Option<&Worker>) {
        let waited_for = self.freezes && self.asked && !self.told;
        if waited_for && self.next.is_some() {
            self.told = self.changer.as_ref().is_some_and(Changer::commit);
        }
        if waited_for && !self.told {
            go(worker, false);
        }
    }

    /// The worker could not, and holds nobody.
    pub fn not_frozen(&mut self, why: Failure) {
        self.asked = false;
        self.give_up(why.into());
    }

    /// The guest goes on.
    pub fn went(&mut self, stall_us: u64) {
        self.stall_us = Some(stall_us);
        self.asked = false;
    }

    /// The worker died: nobody is held any more.
    pub fn lost_worker(&mut self) {
        self.asked = false;
        if self.freezes && !self.told {
            let why = "the worker died before the disk was frozen; try again";
            self.give_up(Error::new(Kind::Io, why));
        }
    }

    fn give_up(&mut self, why: Error) {
        self.outcome.get_or_insert(Err(why));
        if let Some(changer) = &mut self.changer {
            match self.freezes {
                true => changer.leave_alone(),
                // A merge that is cut is begun again; one that sleeps would not hear.
                false => changer.kill(),
            }
        }
    }

    fn committed(&mut self, unknown: bool) -> Turn {
        self.outcome.get_or_insert(Ok(()));
        match self.next.take() {
            Some(next) => Turn::Take(next, unknown),
            None => Turn::Keep,
        }
    }

    fn undone(&mut self, why: Error) -> Turn {
        self.outcome.get_or_insert(Err(why));
        self.next = None;
        Turn::Keep
    }

    /// The changer has ended: what is not known by now is read.
    pub fn changer_ended(&mut self, dir: impl AsFd) -> Turn {
        if let Some(mut changer) = self.changer.take() {
            changer.reap();
        }
        if self.next.is_none() {
            let why = || {
                Err(Error::new(
                    Kind::Io,
                    "the process that changes the disk died",
                ))
            };
            self.outcome.get_or_insert_with(why);
            let untold = self.freezes || !self.told || self.made.is_some();
            return if untold { Turn::Keep } else { Turn::Renew };
        }
        let top = match self.told {
            false => Ok(None),
            true => Chain::read(&dir, &Source::Bundle).map(|chain| Some(chain.top().name.clone())),
        };
        let renamed = |next: &Next, top: &OsStr| top == OsStr::new(&next.name);
        match (top, &self.next) {
            (Ok(Some(top)), Some(next)) if renamed(next, &top) => {
                let synced = rustix::fs::fsync(&dir);
                self.committed(synced.is_err())
            }
            (Ok(_), _) => {
                let why = "the process that changes the disk died, and it is as it was";
                self.undone(Error::new(Kind::Io, why))
            }
            (Err(e), _) => {
                self.outcome.get_or_insert(Err(e));
                self.committed(true)
            }
        }
    }

    /// Lets the worker go on, if it waits.
    pub fn let_go(&self, worker: Option<&Worker>, new: bool) {
        if self.asked {
            go(worker, new);
        }
    }

    /// The answer, once nothing is under way any more.
    pub fn answer(&mut self) -> Option<Result<Value>> {
        if self.changer.is_some() || self.asked {
            return None;
        }
        let outcome = self.outcome.take()?;
        let (uuid, stall) = (self.uuid.bare(), self.stall_us);
        let (did, children) = match &self.made {
            None | Some(Made::Top) => {
                return Some(outcome.map(|()| json!({ "uuid": uuid, "stall_us": stall })));
            }
            Some(Made::Merged { .. }) => ("merged", 0),
            Some(Made::Dropped) => ("dropped", 0),
            Some(Made::Marked(n)) => ("temporary", *n),
        };
        Some(outcome.map(
            |()| json!({ "uuid": uuid, "outcome": did, "children": children, "stall_us": stall }),
        ))
    }
}

fn bare() -> Error {
    Error::unsupported("a disk that is one file has no snapshots; see `ploopctl adopt`")
}

fn go(worker: Option<&Worker>, new: bool) {
    if let Some(Err(e)) = worker.map(|worker| worker.order(&Order::Go { new }, &[])) {
        // Its end is seen elsewhere.
        tracing::debug!("{e}");
    }
}

/// A GUID that nobody has.
pub(super) fn random() -> Guid {
    Guid::random(uuid::Uuid::new_v4().into_bytes())
}
