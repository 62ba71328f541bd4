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
//! given the files anew. When it is the top that stands on it, the worker holds the guest and copies
//! that itself, and the same happens as with a freeze, but that the point's file is the new top.
//! [`super::removal`] has the steps.
//!
//! A merge that is not committed may have put something into its target. What the worker knows of that file is
//! older, and what stands on it may be the top before the merge is done: a top forgets what is discarded
//! where nothing below has anything. So the worker is given the file anew then, too, once nothing more can
//! land in it, and no worker is started before; after a minute it is replaced.
//!
//! To go back to a frozen point, the worker is ended in place of step 3: what it holds is given up.
//! Nobody has the device mounted ([`super::still`]). The next worker finds the new top.
//!
//! Who dies on the way is replaced or done without. Until the changer was told to commit, its end
//! is the end of the change. From then on only the descriptor says what is. No worker is started
//! while files may come and go under it.

use super::changer::{self, Made, Said, Task, Told, Wanted};
use super::child::{Aide, Worker};
use super::message::{Failure, Order};
use super::removal::{Removal, Step};
use crate::image::chain::{Chain, read_descriptor};
use crate::image::detached::random_guid;
use crate::image::lock::DiskLocks;
use crate::image::snapshot::merge;
use crate::image::target::Source;
use crate::io::beneath::{self, Access};
use crate::io::lock::{self, Held};
use crate::io::memfd::SharedWords;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::guid::Guid;
use ploop_formats::ledger::Ledger;
use ploop_formats::{Error, Kind, Result};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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

impl Next {
    /// Locks what is to be the top, and makes its ledger.
    fn hold(dir: impl AsFd, name: String) -> Result<Self> {
        Ok(Self {
            top: DiskLocks::lock_next(dir, &name)?,
            ledger: SharedWords::create(Ledger::WORDS)?,
            name,
        })
    }
}

/// The target of a merge that was cut, while what was written to it may be on its way.
#[derive(Debug)]
struct Landing {
    name: String,
    /// Nobody has it for himself once all has landed.
    file: OwnedFd,
    /// When that has taken too long.
    until: Instant,
}

impl Landing {
    /// That of this point's merge: none when it has not begun, for it would be marked.
    fn of(dir: impl AsFd, disk: &Descriptor, uuid: Guid) -> Result<Option<Self>> {
        let marked = disk.shot(uuid).filter(|shot| shot.mark.is_some());
        let Some(image) = marked.and_then(|_| disk.image(uuid)) else {
            return Ok(None);
        };
        Ok(Some(Self {
            file: beneath::open_file(dir, Path::new(&image.file), Access::Read)?,
            name: image.file.clone(),
            until: Instant::now() + PATIENCE,
        }))
    }
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
    /// Tell the worker what a delta may take of the host.
    Limit(Option<u64>),
}

/// The disk, to whoever changes it.
pub(super) struct Place<'a> {
    /// Its directory.
    pub dir: BorrowedFd<'a>,
    /// Its locks.
    pub locks: &'a DiskLocks,
    /// Whether who looks at images is confined.
    pub sandbox: bool,
    /// Format version of a delta that would stand on the top.
    pub version: u8,
    /// Its size in bytes.
    pub size: u64,
}

/// What is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// The top is frozen.
    Freeze,
    /// A point goes of which the guest need not know.
    Remove,
    /// The descriptor says something else of a point, or of the disk.
    Word,
    /// The top is merged into what it stands on.
    Fold,
    /// The top goes, and another one stands on a frozen point.
    Switch,
}

impl What {
    fn freezes(self) -> bool {
        !matches!(self, Self::Remove | Self::Word)
    }
}

/// What there is to do when nothing is under way any more.
pub(super) enum End {
    /// To tell whoever asked.
    Answer(Result<Value>),
    /// To go on with another step.
    Begun(Box<Snapshot>),
}

/// A snapshot under way.
#[derive(Debug)]
pub(super) struct Snapshot {
    changer: Option<Aide>,
    uuid: Guid,
    what: What,
    /// The removal that this is a step of.
    removal: Option<Removal>,
    next: Option<Next>,
    /// The worker waits for word, or will.
    asked: bool,
    /// The changer was told to commit.
    told: bool,
    /// A merge is to be committed once a worker that is starting serves.
    merged: bool,
    /// A merge was cut, and may not have landed.
    landing: Option<Landing>,
    /// What the changer made.
    made: Option<Made>,
    /// What came of it, once that is settled.
    outcome: Option<Result<()>>,
    stall_us: Option<u64>,
    due: Option<Instant>,
}

/// How long it may take to freeze a disk, the guest's waiting included: a storage that hangs must not
/// hold what does not need it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Time between two looks whether what a dead changer wrote has landed.
const LOOK: Duration = Duration::from_millis(5);

impl Snapshot {
    /// Begins to freeze the top.
    pub fn begin(place: &Place<'_>, uuid: Guid) -> Result<Self> {
        Self::freeze(place, uuid, false)
    }

    /// Begins to take a point away, copying so many bytes a second at most.
    pub fn begin_removal(place: &Place<'_>, uuid: Guid, rate: Option<u64>) -> Result<Self> {
        let removal = Removal::new(uuid, rate);
        let mut first = Self::step(place, removal.first())?;
        first.removal = Some(removal);
        Ok(first)
    }

    /// Begins to go back to a point.
    pub fn begin_switch(place: &Place<'_>, uuid: Guid) -> Result<Self> {
        let wanted = Wanted::Switch {
            uuid: uuid.to_string(),
            random: random_guid().to_string(),
        };
        Self::start(place, uuid, What::Switch, wanted)
    }

    /// Begins to mark a point temporary.
    pub fn begin_mark(place: &Place<'_>, uuid: Guid) -> Result<Self> {
        let wanted = Wanted::Mark {
            uuid: uuid.to_string(),
        };
        Self::start(place, uuid, What::Word, wanted)
    }

    /// Begins to say what a delta may take of the host, in bytes.
    pub fn begin_limit(place: &Place<'_>, bytes: Option<u64>) -> Result<Self> {
        let wanted = Wanted::Limit { bytes };
        Self::start(place, Guid::NONE, What::Word, wanted)
    }

    /// Begins to give a point another file, comparing so many bytes a second at most.
    pub fn begin_replace(
        place: &Place<'_>,
        uuid: Guid,
        file: String,
        rate: Option<u64>,
    ) -> Result<Self> {
        let wanted = Wanted::Replace {
            uuid: uuid.to_string(),
            random: random_guid().to_string(),
            file,
            rate,
        };
        Self::start(place, uuid, What::Remove, wanted)
    }

    fn step(place: &Place<'_>, step: Step) -> Result<Self> {
        match step {
            Step::Freeze(uuid) => Self::freeze(place, uuid, true),
            Step::Remove(uuid, rate) => {
                let wanted = Wanted::Remove {
                    uuid: uuid.to_string(),
                    rate,
                };
                Self::start(place, uuid, What::Remove, wanted)
            }
        }
    }

    fn freeze(place: &Place<'_>, uuid: Guid, temporary: bool) -> Result<Self> {
        let wanted = Wanted::Freeze {
            uuid: uuid.to_string(),
            random: random_guid().to_string(),
            version: place.version,
            size: place.size,
            temporary,
        };
        Self::start(place, uuid, What::Freeze, wanted)
    }

    fn start(place: &Place<'_>, uuid: Guid, what: What, wanted: Wanted) -> Result<Self> {
        let lock = place.locks.disk().ok_or_else(bare)?;
        let sandbox = place.sandbox;
        let task = Task { wanted, sandbox };
        Ok(Self {
            changer: Some(changer::start(place.dir, lock, &task)?),
            uuid,
            what,
            removal: None,
            next: None,
            asked: false,
            told: false,
            merged: false,
            landing: None,
            made: None,
            outcome: None,
            stall_us: None,
            due: what.freezes().then(|| Instant::now() + PATIENCE),
        })
    }

    /// Whether the guest is to wait for it.
    fn freezes(&self) -> bool {
        self.what.freezes()
    }

    /// Whether the disk is to hold again what it held at a frozen point.
    pub fn goes_back(&self) -> bool {
        self.what == What::Switch
    }

    /// What to wait for.
    pub fn polled(&self) -> [Option<BorrowedFd<'_>>; 2] {
        let changer = self.changer.as_ref();
        [changer.and_then(Aide::spoke), changer.map(Aide::ended)]
    }

    /// Whether no worker may be started.
    pub const fn bars_workers(&self) -> bool {
        self.changer.is_some() && self.told || self.landing.is_some()
    }

    /// When it has taken too long, or is looked at again.
    pub const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It is time to look again whether what a dead changer wrote has landed; or it has taken too long:
    /// whoever is waited for goes, and what is then is judged as ever.
    pub fn expire(&mut self, dir: impl AsFd, worker: Option<&Worker>) -> Turn {
        self.due = None;
        if let Some(landing) = self.landing.take() {
            return self.land(dir, worker, landing);
        }
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

    /// Gives it up for this reason, if that still can be: a merge before its commit.
    pub fn hurry(&mut self, why: &str) {
        if self.what == What::Remove && !self.told {
            self.give_up(Error::new(Kind::Cancelled, why));
        }
    }

    /// Hears the changer.
    pub fn hear(&mut self, dir: impl AsFd, worker: Option<&Worker>) -> Turn {
        let Some(said) = self.changer.as_mut().and_then(Aide::said) else {
            return Turn::Wait;
        };
        match said {
            Said::Prepared { top, below } => {
                let order = Order::Freeze {
                    top: top.clone(),
                    below: below.clone(),
                };
                self.ask(dir, worker, &order, top, &below)
            }
            Said::Switchable { top } => self.end_worker(dir, worker, top),
            // It was given up, and the changer heard that too late.
            Said::Foldable { .. } if self.outcome.is_some() => Turn::Wait,
            Said::Foldable { into } => {
                self.what = What::Fold;
                self.due = Some(Instant::now() + PATIENCE);
                let order = Order::Fold { into: into.clone() };
                self.ask(dir, worker, &order, into.clone(), &into)
            }
            Said::Progress { done, total } => Turn::Progress(done, total),
            Said::Merged => {
                self.merged = true;
                self.serves(worker);
                Turn::Wait
            }
            Said::Committed(made) => {
                self.outcome.get_or_insert(Ok(()));
                let turn = match &made {
                    Made::Top | Made::Folded => self.committed(false),
                    Made::Merged { into: file } | Made::Replaced { new: file, .. }
                        if !self.reload(&dir, worker, file) =>
                    {
                        Turn::Renew
                    }
                    Made::Limited(bytes) => Turn::Limit(*bytes),
                    _ => Turn::Wait,
                };
                self.made = Some(made);
                turn
            }
            Said::Undone(failure) => self.undone(failure.into()),
            Said::Unknown(failure) => {
                self.outcome = Some(Err(failure.into()));
                match self.freezes() {
                    true => self.committed(true),
                    false => Turn::Renew,
                }
            }
        }
    }

    /// Step 2, with the file that is to be the top, and one that is not.
    fn ask(
        &mut self,
        dir: impl AsFd,
        worker: Option<&Worker>,
        order: &Order,
        top: String,
        below: &str,
    ) -> Turn {
        if let Err(e) = self.try_ask(dir, worker, order, top, below) {
            self.give_up(e);
        }
        Turn::Wait
    }

    fn try_ask(
        &mut self,
        dir: impl AsFd,
        worker: Option<&Worker>,
        order: &Order,
        top: String,
        below: &str,
    ) -> Result<()> {
        let worker = worker.ok_or_else(|| Error::new(Kind::Busy, "no worker serves the disk"))?;
        let next = Next::hold(&dir, top)?;
        // Descriptions of the worker's own: its fence must not live in this process.
        let file = beneath::open_file(&dir, Path::new(&next.name), Access::Write)?;
        let old = beneath::open_file(&dir, Path::new(below), Access::Read)?;
        worker.order(order, &[file.as_fd(), next.ledger.as_fd(), old.as_fd()])?;
        self.asked = true;
        self.next = Some(next);
        Ok(())
    }

    /// Has the worker end, so that what it holds is given up.
    fn end_worker(&mut self, dir: impl AsFd, worker: Option<&Worker>, top: String) -> Turn {
        match Next::hold(dir, top) {
            Ok(next) => self.next = Some(next),
            Err(e) => {
                self.give_up(e);
                return Turn::Wait;
            }
        }
        if worker.is_some() {
            return Turn::Renew;
        }
        self.commit();
        Turn::Wait
    }

    /// Commits a merge, unless a worker is just opening the files that will go.
    pub fn serves(&mut self, worker: Option<&Worker>) {
        if self.merged && worker.is_none_or(|worker| worker.ready.is_some()) {
            self.merged = false;
            self.commit();
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
        let waited_for = self.freezes() && self.asked && !self.told;
        if waited_for && self.next.is_some() {
            self.commit();
        }
        if waited_for && !self.told {
            go(worker, false);
        }
    }

    fn commit(&mut self) {
        let told = |changer: &Aide| changer.tell(&Told::Commit);
        self.told = self.changer.as_ref().is_some_and(told);
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
        if self.what == What::Switch {
            // What it had is to be given up. It may also have died before anybody wanted it to.
            if self.next.is_some() && !self.told {
                self.commit();
            }
        } else if self.freezes() && !self.told {
            let why = "the worker died before the disk was frozen; try again";
            self.give_up(Error::new(Kind::Io, why));
        }
    }

    /// Whoever kept others off the device is gone: what is not committed is not done.
    pub fn abandon(&mut self) {
        if self.what == What::Switch && !self.told {
            let why = "the process that kept others off the device died; try again";
            self.give_up(Error::new(Kind::Io, why));
        }
    }

    fn give_up(&mut self, why: Error) {
        let why = match self.what {
            What::Fold => merge::left_marked(why, self.uuid),
            _ => why,
        };
        self.outcome.get_or_insert(Err(why));
        let freezes = self.freezes();
        if let Some(changer) = &mut self.changer {
            match freezes {
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

    /// A changer is gone before it made anything that it could tell of: a merge was not committed,
    /// and its target is looked at anew. Of one that was given up, a point on which nothing stands
    /// may be gone.
    fn cut(&mut self, dir: impl AsFd, worker: Option<&Worker>) -> Turn {
        let landing = read_descriptor(&dir).and_then(|disk| {
            let cancelled = |e: &Error| e.kind() == Kind::Cancelled;
            let given_up = self
                .outcome
                .as_ref()
                .is_some_and(|o| o.as_ref().is_err_and(cancelled));
            if given_up && self.removal.is_some() && disk.shot(self.uuid).is_none() {
                self.made = Some(Made::Dropped);
                self.outcome = Some(Ok(()));
            }
            Landing::of(&dir, &disk, self.uuid)
        });
        match landing {
            Ok(None) => Turn::Keep,
            Ok(Some(landing)) => self.land(dir, worker, landing),
            Err(e) => {
                tracing::warn!("what a merge has left cannot be looked at: {e}");
                Turn::Renew
            }
        }
    }

    /// Gives the worker the target of a merge anew, once nothing more can land in it.
    fn land(&mut self, dir: impl AsFd, worker: Option<&Worker>, landing: Landing) -> Turn {
        match lock::is_free(&landing.file) {
            Ok(false) if Instant::now() < landing.until => {
                self.due = Some(Instant::now() + LOOK);
                self.landing = Some(landing);
                Turn::Wait
            }
            Ok(true) if self.reload(&dir, worker, &landing.name) => Turn::Wait,
            _ => Turn::Renew,
        }
    }

    /// The changer has ended: what is not known by now is read.
    pub fn changer_ended(&mut self, dir: impl AsFd, worker: Option<&Worker>) -> Turn {
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
            return match self.made {
                None if !self.freezes() && self.told => Turn::Renew,
                None if !self.freezes() => self.cut(dir, worker),
                _ => Turn::Keep,
            };
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

    /// What there is to do, once nothing is under way any more. A removal goes on if it may.
    pub fn end(&mut self, place: &Place<'_>, goes_on: bool) -> Option<End> {
        if self.changer.is_some() || self.asked || self.landing.is_some() {
            return None;
        }
        let outcome = self.outcome.take()?;
        let Some(mut removal) = self.removal.take() else {
            return Some(End::Answer(outcome.map(|()| self.answer())));
        };
        let begun = outcome.and_then(|()| {
            // A changer that died before it could say so may have committed all the same.
            let committed = match self.what {
                What::Freeze | What::Switch => Made::Top,
                What::Fold | What::Remove | What::Word => Made::Folded,
            };
            let made = self.made.take().unwrap_or(committed);
            match removal.next(made, self.stall_us) {
                None => Ok(None),
                Some(_) if !goes_on => Err(unfinished()),
                Some(step) => Self::step(place, step).map(Some),
            }
        });
        Some(match begun {
            Ok(None) => End::Answer(Ok(removal.answer())),
            Ok(Some(mut next)) => {
                next.removal = Some(removal);
                End::Begun(Box::new(next))
            }
            Err(e) => End::Answer(removal.failed(e)),
        })
    }
}

impl Snapshot {
    /// What came of one that is no removal.
    fn answer(&self) -> Value {
        let (uuid, stall_us) = (self.uuid.bare(), self.stall_us);
        match &self.made {
            Some(Made::Replaced { old, new, copied }) => json!({
                "uuid": uuid,
                "old": old,
                "new": new,
                "way": if *copied { "copied" } else { "moved" },
                "stall_us": stall_us,
            }),
            Some(Made::Limited(bytes)) => json!({ "delta_limit": bytes }),
            _ => json!({ "uuid": uuid, "stall_us": stall_us }),
        }
    }
}

fn unfinished() -> Error {
    let why = "the disk does not serve any more, or nobody waits: the same command goes on with it";
    Error::new(Kind::Cancelled, why)
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
