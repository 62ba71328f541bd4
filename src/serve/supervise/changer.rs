//! Changer: a process that changes the tree of an attached disk on the keeper's behalf.
//!
//! It does all but the commit of a change, says that it is prepared, and waits. Told to commit, it
//! does, and says what came of it. Left alone, it undoes what it did, or leaves what the next command
//! goes on with. It is confined to the disk's directory before it looks at anything, because a merge
//! reads images.

use super::child::{Aide, Baggage, CONTROL_FD};
use super::inherit;
use super::message::Failure;
use super::packet;
use crate::image::change::{self, Change, Shape, Uncommitted};
use crate::image::grow;
use crate::image::limit;
use crate::image::newfile::NewFile;
use crate::image::replace::{self, Replaced};
use crate::image::snapshot::merge::Readers;
use crate::image::snapshot::parts::may_have_parts;
use crate::image::snapshot::rate::Rate;
use crate::image::snapshot::remove::{self, Way};
use crate::image::snapshot::{copy, create, fold, layers, merge, switch};
use crate::io::exec::{self, Engine};
use crate::io::folder::DirFolder;
use crate::sandbox::{self, Files, Place};
use ploop_formats::descriptor::{Descriptor, Mark};
use ploop_formats::guid::Guid;
use ploop_formats::ploop::header::Version;
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// The disk's directory, in a changer.
const DIR_FD: RawFd = CONTROL_FD + 1;
/// The keeper's lock on the disk, which lasts until both have ended.
const LOCK_FD: RawFd = CONTROL_FD + 2;

/// Time between two words about how far it is.
const TELL_PAUSE: Duration = Duration::from_millis(200);

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    /// The top is frozen, and a new one stands on it.
    Freeze {
        /// GUID of the frozen one.
        uuid: String,
        /// What names the new top's file.
        random: String,
        /// Format version of the new top.
        version: u8,
        /// Its size in bytes.
        size: u64,
        /// Whether the frozen one is temporary.
        temporary: bool,
    },
    /// The top goes, and a new one stands on a frozen point.
    Switch {
        /// GUID of that.
        uuid: String,
        /// What names the new top's file.
        random: String,
    },
    /// A frozen point goes.
    Remove {
        /// Its GUID.
        uuid: String,
        /// Bytes a second to copy at most.
        rate: Option<u64>,
    },
    /// The descriptor says what size the disk has got.
    Resize {
        /// In bytes.
        size: u64,
    },
    /// A frozen point is temporary from now on.
    Mark {
        /// Its GUID.
        uuid: String,
    },
    /// A delta takes no more of the host than this from now on.
    Limit {
        /// In bytes; none for as much as there is.
        bytes: Option<u64>,
    },
    /// A frozen point gets another file.
    Replace {
        /// Its GUID.
        uuid: String,
        /// What names the file in the disk's directory.
        random: String,
        /// Where that is now, absolute.
        file: String,
        /// Bytes a second to compare or copy at most.
        rate: Option<u64>,
    },
}

/// A changer's whole order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// What is wanted.
    pub wanted: Wanted,
    /// Whether it is confined to the disk's directory.
    pub sandbox: bool,
}

/// What a changer says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Said {
    /// How far a merge is, in bytes.
    Progress {
        /// Done.
        done: u64,
        /// To do.
        total: u64,
    },
    /// A freeze lacks nothing but the old top's end and the commit.
    Prepared {
        /// File of the new top.
        top: String,
        /// File of the old one.
        below: String,
    },
    /// A switch lacks nothing but the worker's end and the commit.
    Switchable {
        /// File of the new top.
        top: String,
    },
    /// A merge of the top lacks nothing but its end, its copy and the commit.
    Foldable {
        /// File of the layer below, which is to be the top.
        into: String,
    },
    /// A merge lacks nothing but the commit.
    Merged,
    /// It is the new disk.
    Committed(Made),
    /// It is the old disk.
    Undone(Failure),
    /// Nobody knows which of the two would survive a power cut.
    Unknown(Failure),
}

/// What a change made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Made {
    /// A new top.
    Top,
    /// One delta of two: in this file.
    Merged {
        /// The file.
        into: String,
    },
    /// A top of what was the top and the point below it.
    Folded,
    /// A leaf is gone.
    Dropped,
    /// A descriptor that says its disk's size.
    Sized,
    /// A descriptor that says what a delta may take.
    Limited(Option<u64>),
    /// A point that has another file.
    Replaced {
        /// File that it had.
        old: String,
        /// File that it has.
        new: String,
        /// Whether that was copied; else it was moved.
        copied: bool,
    },
    /// So many deltas stand on the point: it is marked temporary.
    Marked(usize),
    /// The running top stands on the point, which is marked temporary, and has too much to be copied
    /// while the guest waits.
    TooMuch,
}

/// What it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// The old top is closed.
    Commit,
}

/// Starts one for the disk in `dir`, which `lock` keeps to ourselves. Left alone, it undoes what it
/// did, unless it was told to commit; killed, it leaves that to the next change.
pub fn start(dir: impl AsFd, lock: impl AsFd, task: &Task) -> Result<Aide> {
    let text = serde_json::to_string(task).map_err(io::Error::from)?;
    let mut bag = Baggage::default();
    // In the order of their numbers there.
    bag.pack(dir)?;
    bag.pack(lock)?;
    Aide::start(&["--change", &text], bag).map_err(|e| e.at("starting a changer"))
}

/// Changes a disk; this is what the process does.
pub fn run(task: &str) -> Result<()> {
    let task: Task =
        serde_json::from_str(task).map_err(|e| Error::invalid(format!("--change: {e}")))?;
    let (talk, dir) = (inherit::take(CONTROL_FD)?, inherit::take(DIR_FD)?);
    let _lock = inherit::take(LOCK_FD)?;
    let said = begin(task, dir, &talk).unwrap_or_else(|e| Said::Undone(Failure::from(&e)));
    // Who is not there any more reads the descriptor.
    let _ = packet::send(&talk, &said, &[]);
    Ok(())
}

/// Is confined, and does it.
fn begin(task: Task, dir: OwnedFd, talk: &OwnedFd) -> Result<Said> {
    let new = match &task.wanted {
        Wanted::Replace { file, .. } => Some(NewFile::open(Path::new(file))?),
        _ => None,
    };
    if task.sandbox {
        let mut places = vec![Place {
            dir: dir.as_fd(),
            files: Files::Change,
        }];
        places.extend(new.iter().flat_map(NewFile::places));
        sandbox::enter_all(&places)?;
    }
    let folder = DirFolder::new(dir);
    exec::run(Engine::detect().0, change(&folder, task.wanted, new, talk))?
}

async fn change(
    folder: &DirFolder,
    wanted: Wanted,
    new: Option<NewFile>,
    talk: &OwnedFd,
) -> Result<Said> {
    match wanted {
        Wanted::Freeze {
            uuid,
            random,
            version,
            size,
            temporary,
        } => {
            let mark = temporary.then_some(Mark::Temporary);
            let version = match version {
                1 => Version::V1,
                _ => Version::V2,
            };
            freeze(folder, &uuid, &random, (version, size), mark, talk).await
        }
        Wanted::Switch { uuid, random } => switch(folder, &uuid, &random, talk).await,
        Wanted::Mark { uuid } => mark(folder, &uuid).await,
        Wanted::Resize { size } => resize(folder, size).await,
        Wanted::Limit { bytes } => limit(folder, bytes).await,
        Wanted::Remove { uuid, rate } => remove(folder, &uuid, rate, talk).await,
        Wanted::Replace {
            uuid, random, rate, ..
        } => {
            let new = new.ok_or_else(|| Error::invalid("no file"))?;
            replace(folder, &uuid, &random, &new, rate, talk).await
        }
    }
}

async fn freeze(
    folder: &DirFolder,
    uuid: &str,
    random: &str,
    (version, size): (Version, u64),
    mark: Option<Mark>,
    talk: &OwnedFd,
) -> Result<Said> {
    let uuid: Guid = uuid.parse()?;
    let old = change::settle(folder).await?;
    let file = old.new_file_name(random.parse()?);
    let top = layers::image(&old, old.top())?;
    let shape = Shape {
        version,
        size,
        subclusters: may_have_parts(&layers::open_read(folder, &old, &top).await?),
    };
    let below = top.file;
    let new = old.with_snapshot(uuid, &file)?.marked(uuid, mark)?;
    let prepared = create::prepare(folder, &old, new, &file, shape).await?;
    let said = Said::Prepared { top: file, below };
    if packet::send(talk, &said, &[]).is_err() || !told_to_commit(talk) {
        prepared.undo().await?;
        return Err(Error::new(Kind::Cancelled, "the snapshot was given up"));
    }
    settled(folder, prepared.commit().await.map(|_| Made::Top)).await
}

async fn switch(folder: &DirFolder, uuid: &str, random: &str, talk: &OwnedFd) -> Result<Said> {
    let old = change::settle(folder).await?;
    let top = old.new_file_name(random.parse()?);
    let change = switch::prepare(folder, &old, uuid.parse()?, &top).await?;
    if packet::send(talk, &Said::Switchable { top }, &[]).is_err() || !told_to_commit(talk) {
        change.undo().await?;
        return Err(Error::new(Kind::Cancelled, "the switch was given up"));
    }
    settled(folder, change.commit().await.map(|_| Made::Top)).await
}

/// What came of a commit.
async fn settled(
    folder: &DirFolder,
    outcome: std::result::Result<Made, Uncommitted>,
) -> Result<Said> {
    Ok(match outcome {
        Ok(made) => Said::Committed(made),
        Err(Uncommitted::Old(e)) => {
            change::settle(folder).await?;
            Said::Undone(Failure::from(&e))
        }
        Err(Uncommitted::Unknown(e)) => Said::Unknown(Failure::from(&e)),
    })
}

async fn remove(folder: &DirFolder, uuid: &str, rate: Option<u64>, talk: &OwnedFd) -> Result<Said> {
    let uuid: Guid = uuid.parse()?;
    let old = change::settle(folder).await?;
    let (new, made) = match remove::way(&old, uuid, true)? {
        Way::Merge => return merge_away(folder, &old, uuid, rate, talk).await,
        Way::Fold => return fold_top(folder, &old, uuid, talk).await,
        Way::Drop => (old.without_leaf(uuid)?, Made::Dropped),
        Way::Mark(_) => return mark_temporary(folder, &old, uuid).await,
    };
    let change = Change::announce(folder, &old, new).await?;
    settled(folder, change.commit().await.map(|_| made)).await
}

async fn resize(folder: &DirFolder, size: u64) -> Result<Said> {
    let old = change::settle(folder).await?;
    settled(
        folder,
        grow::describe(folder, &old, size)
            .await
            .map(|()| Made::Sized),
    )
    .await
}

async fn limit(folder: &DirFolder, bytes: Option<u64>) -> Result<Said> {
    let old = change::settle(folder).await?;
    let made = Made::Limited(bytes);
    match limit::prepare(folder, &old, bytes).await? {
        None => Ok(Said::Committed(made)),
        Some(change) => settled(folder, change.commit().await.map(|_| made)).await,
    }
}

async fn mark(folder: &DirFolder, uuid: &str) -> Result<Said> {
    let uuid: Guid = uuid.parse()?;
    let old = change::settle(folder).await?;
    mark_temporary(folder, &old, uuid).await
}

async fn mark_temporary(folder: &DirFolder, old: &Descriptor, uuid: Guid) -> Result<Said> {
    let made = Made::Marked(old.children(uuid).count());
    match remove::mark(folder, old, uuid).await? {
        None => Ok(Said::Committed(made)),
        Some(change) => settled(folder, change.commit().await.map(|_| made)).await,
    }
}

async fn merge_away(
    folder: &DirFolder,
    old: &Descriptor,
    uuid: Guid,
    rate: Option<u64>,
    talk: &OwnedFd,
) -> Result<Said> {
    let into = layers::image(old, uuid)?.file;
    let mut watch = Teller::new(talk);
    // Whoever wants it to end is heard meanwhile.
    let goes_on = || packet::receive::<Told>(talk).is_ok();
    let pace = Rate::new(rate.and_then(NonZeroU64::new), goes_on);
    let mut work = copy::Work::new(&mut watch, &pace);
    let change = merge::prepare(folder, old, uuid, Readers::Disk, &mut work).await?;
    if packet::send(talk, &Said::Merged, &[]).is_err() || !told_to_commit(talk) {
        change.undo().await?;
        return Err(Error::new(Kind::Cancelled, "the merge was given up"));
    }
    settled(folder, change.commit().await.map(|_| Made::Merged { into })).await
}

async fn replace(
    folder: &DirFolder,
    uuid: &str,
    random: &str,
    new: &NewFile,
    rate: Option<u64>,
    talk: &OwnedFd,
) -> Result<Said> {
    let uuid: Guid = uuid.parse()?;
    let old = change::settle(folder).await?;
    replace::refuse_own(folder, &old, uuid, new).await?;
    let source = new.source(folder)?;
    let mut watch = Teller::new(talk);
    let goes_on = || packet::receive::<Told>(talk).is_ok();
    let pace = Rate::new(rate.and_then(NonZeroU64::new), goes_on);
    let mut work = copy::Work::new(&mut watch, &pace);
    let prepared =
        replace::prepare(folder, &old, uuid, &source, random.parse()?, &mut work).await?;
    if packet::send(talk, &Said::Merged, &[]).is_err() || !told_to_commit(talk) {
        prepared.change.undo().await?;
        return Err(Error::new(Kind::Cancelled, "the replacement was given up"));
    }
    let committed = prepared.change.commit().await;
    let said = settled(folder, committed.map(|_| prepared.replaced.into())).await?;
    if matches!(said, Said::Committed(_)) {
        source.leave().await;
    }
    Ok(said)
}

impl From<Replaced> for Made {
    fn from(done: Replaced) -> Self {
        Self::Replaced {
            old: done.old,
            new: done.new,
            copied: done.way == replace::Way::Copied,
        }
    }
}

async fn fold_top(
    folder: &DirFolder,
    old: &Descriptor,
    uuid: Guid,
    talk: &OwnedFd,
) -> Result<Said> {
    let Some(prepared) = fold::prepare(folder, old, uuid).await? else {
        return Ok(Said::Committed(Made::TooMuch));
    };
    let into = prepared.into;
    if packet::send(talk, &Said::Foldable { into }, &[]).is_err() || !told_to_commit(talk) {
        prepared.change.undo().await?;
        let why = Error::new(Kind::Cancelled, "the merge was given up");
        return Err(merge::left_marked(why, uuid));
    }
    let committed = prepared.change.commit().await;
    settled(folder, committed.map(|_| Made::Folded)).await
}

/// Tells the keeper how far it is, and ends the work when that has left.
struct Teller<'a> {
    talk: &'a OwnedFd,
    next: Instant,
}

impl<'a> Teller<'a> {
    fn new(talk: &'a OwnedFd) -> Self {
        Self {
            talk,
            next: Instant::now(),
        }
    }
}

impl Watch for Teller<'_> {
    fn tell(&mut self, progress: Progress) -> Result<()> {
        if Instant::now() < self.next {
            return Ok(());
        }
        self.next = Instant::now() + TELL_PAUSE;
        let Progress { done, total, .. } = progress;
        let said = packet::send(self.talk, &Said::Progress { done, total }, &[]);
        let heard = packet::receive::<Told>(self.talk);
        if said.is_err() || heard.is_err() {
            return Err(Error::new(Kind::Cancelled, "it was given up"));
        }
        Ok(())
    }
}

/// Waits for word from the keeper, however long it takes: the worker is asked to be quick.
fn told_to_commit(talk: &OwnedFd) -> bool {
    loop {
        let _ = poll(&mut [PollFd::new(talk, PollFlags::IN)], None);
        match packet::receive::<Told>(talk) {
            Ok(None) => {}
            Ok(Some((Told::Commit, _))) => return true,
            Err(_) => return false,
        }
    }
}
