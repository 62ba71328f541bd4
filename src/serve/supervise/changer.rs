//! Changer: a process that changes the tree of an attached disk on the keeper's behalf.
//!
//! It does all but the commit of a change, says that it is prepared, and waits. Told to commit, it
//! does, and says what came of it. Left alone, it undoes what it did, or leaves what the next command
//! goes on with. It is confined to the disk's directory before it looks at anything, because a merge
//! reads images.

use super::child::CONTROL_FD;
use super::inherit;
use super::message::Failure;
use super::packet;
use crate::image::change::{self, Change, Shape, Uncommitted};
use crate::image::snapshot::{copy, create, layers, merge, remove};
use crate::io::exec::{self, Engine};
use crate::io::folder::DirFolder;
use crate::sandbox;
use command_fds::{CommandFdExt, FdMapping};
use ploop_formats::descriptor::{Descriptor, Mark};
use ploop_formats::guid::Guid;
use ploop_formats::ploop::header::Version;
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The disk's directory, in a changer.
const DIR_FD: RawFd = CONTROL_FD + 1;
/// The keeper's lock on the disk, which lasts until both have ended.
const LOCK_FD: RawFd = CONTROL_FD + 2;

/// Time between two words about how far it is.
const TELL_PAUSE: Duration = Duration::from_millis(200);

/// How long the end of the keeper may go unnoticed.
const BLINK: Duration = Duration::from_millis(50);

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
    },
    /// A frozen point goes.
    Remove {
        /// Its GUID.
        uuid: String,
        /// Bytes a second to copy at most.
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
    /// A leaf is gone.
    Dropped,
    /// So many deltas stand on the point, or the running top does: it is marked temporary.
    Marked(usize),
}

/// What it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// The old top is closed.
    Commit,
}

/// A changer as its keeper sees it.
#[derive(Debug)]
pub struct Changer {
    child: Child,
    pidfd: OwnedFd,
    /// None once it was left alone.
    talk: Option<OwnedFd>,
}

impl Changer {
    /// Starts one for the disk in `dir`, which `lock` keeps to ourselves.
    pub fn start(dir: impl AsFd, lock: impl AsFd, task: &Task) -> Result<Self> {
        let text = serde_json::to_string(task).map_err(io::Error::from)?;
        let pair = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        );
        let (talk, theirs) = pair.map_err(io::Error::from)?;
        let mut command = Command::new("/proc/self/exe");
        let mappings = vec![
            FdMapping {
                parent_fd: theirs,
                child_fd: CONTROL_FD,
            },
            FdMapping {
                parent_fd: dir.as_fd().try_clone_to_owned()?,
                child_fd: DIR_FD,
            },
            FdMapping {
                parent_fd: lock.as_fd().try_clone_to_owned()?,
                child_fd: LOCK_FD,
            },
        ];
        command
            .arg0("ploopd")
            .args(["--change", &text])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0)
            .fd_mappings(mappings)
            .map_err(|e| Error::invalid(e.to_string()))?;
        let child = command.spawn();
        let child = child.map_err(|e| Error::from(e).at("starting a changer"))?;
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        Ok(Self {
            child,
            pidfd: pidfd.map_err(io::Error::from)?,
            talk: Some(talk),
        })
    }

    /// Becomes readable when it has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Becomes readable when it has said something.
    pub fn spoke(&self) -> Option<BorrowedFd<'_>> {
        self.talk.as_ref().map(AsFd::as_fd)
    }

    /// What it said, if anything.
    pub fn said(&mut self) -> Option<Said> {
        match packet::receive(self.talk.as_ref()?) {
            Ok(said) => said.map(|(said, _)| said),
            Err(_) => {
                self.talk = None;
                None
            }
        }
    }

    /// Has it commit. Whether it heard that.
    pub fn commit(&self) -> bool {
        let told = |talk| packet::send(talk, &Told::Commit, &[]).is_ok();
        self.talk.as_ref().is_some_and(told)
    }

    /// Ends it where it is. What it leaves is for the next change.
    pub fn kill(&mut self) {
        if let Err(e) = self.child.kill() {
            tracing::debug!("{e}");
        }
    }

    /// Has it undo what it did, unless it was told to commit.
    pub fn leave_alone(&mut self) {
        self.talk = None;
    }

    /// Call when [`Changer::ended`] is readable.
    pub fn reap(&mut self) {
        if let Err(e) = self.child.wait() {
            tracing::debug!("{e}");
        }
    }
}

/// Changes a disk; this is what the process does.
pub fn run(task: &str) -> Result<()> {
    let task: Task =
        serde_json::from_str(task).map_err(|e| Error::invalid(format!("--change: {e}")))?;
    let (talk, dir) = (inherit::take(CONTROL_FD)?, inherit::take(DIR_FD)?);
    let _lock = inherit::take(LOCK_FD)?;
    if task.sandbox {
        sandbox::enter(&dir, sandbox::Files::Change)?;
    }
    let folder = DirFolder::new(dir);
    let said = exec::run(Engine::detect().0, async {
        let done = match task.wanted {
            Wanted::Freeze {
                uuid,
                random,
                version,
                size,
            } => freeze(&folder, &uuid, &random, version, size, &talk).await,
            Wanted::Remove { uuid, rate } => remove(&folder, &uuid, rate, &talk).await,
        };
        done.unwrap_or_else(|e| Said::Undone(Failure::from(&e)))
    })?;
    // Who is not there any more reads the descriptor.
    let _ = packet::send(&talk, &said, &[]);
    Ok(())
}

async fn freeze(
    folder: &DirFolder,
    uuid: &str,
    random: &str,
    version: u8,
    size: u64,
    talk: &OwnedFd,
) -> Result<Said> {
    let version = match version {
        1 => Version::V1,
        _ => Version::V2,
    };
    let old = change::settle(folder).await?;
    let file = old.new_file_name(random.parse()?);
    let below = old.image(old.top()).map(|image| image.file.clone());
    let below = below.ok_or_else(|| Error::damaged("the top has no image"))?;
    let shape = Shape { version, size };
    let prepared = create::prepare(folder, &old, uuid.parse()?, &file, shape).await?;
    let said = Said::Prepared { top: file, below };
    if packet::send(talk, &said, &[]).is_err() || !told_to_commit(talk) {
        prepared.undo().await?;
        return Err(Error::new(Kind::Cancelled, "the snapshot was given up"));
    }
    settled(folder, prepared.commit().await.map(|_| Made::Top)).await
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
    if old.shot(uuid).is_none() {
        return Err(remove::unknown(uuid));
    }
    let children = old.children(uuid).count();
    let new = match (merge::only_child(&old, uuid), children) {
        (Ok(child), _) if child != old.top() => {
            return merge_away(folder, &old, uuid, rate, talk).await;
        }
        (_, 0) => (old.without_leaf(uuid)?, Made::Dropped),
        (_, n) => (old.marked(uuid, Some(Mark::Temporary))?, Made::Marked(n)),
    };
    let change = Change::announce(folder, &old, new.0).await?;
    settled(folder, change.commit().await.map(|_| new.1)).await
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
    let pace = Rate::new(rate, talk);
    let mut work = copy::Work {
        watch: &mut watch,
        pace: &pace,
    };
    let change = merge::prepare(folder, old, uuid, &mut work).await?;
    if packet::send(talk, &Said::Merged, &[]).is_err() || !told_to_commit(talk) {
        change.undo().await?;
        return Err(Error::new(Kind::Cancelled, "the merge was given up"));
    }
    settled(folder, change.commit().await.map(|_| Made::Merged { into })).await
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
            return Err(Error::new(Kind::Cancelled, "the merge was given up"));
        }
        Ok(())
    }
}

/// A limit of bytes a second, or none.
struct Rate<'a> {
    limit: Option<u64>,
    due: Cell<Instant>,
    talk: &'a OwnedFd,
}

impl<'a> Rate<'a> {
    fn new(limit: Option<u64>, talk: &'a OwnedFd) -> Self {
        Self {
            limit: limit.filter(|limit| *limit > 0),
            due: Cell::new(Instant::now()),
            talk,
        }
    }
}

impl copy::Pace for Rate<'_> {
    fn wait(&self, bytes: u64) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async move {
            let Some(limit) = self.limit else {
                return;
            };
            let cost = Duration::from_secs_f64(bytes as f64 / limit as f64);
            let due = self.due.get().max(Instant::now()) + cost;
            self.due.set(due);
            // Whoever wants it to end is heard meanwhile.
            while Instant::now() < due && packet::receive::<Told>(self.talk).is_ok() {
                let left = due.saturating_duration_since(Instant::now());
                exec::sleep(left.min(BLINK)).await;
            }
        })
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
