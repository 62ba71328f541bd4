//! Changer: a process that changes the names in an attached disk's directory on the keeper's behalf.
//!
//! It makes a snapshot's new delta and descriptor, has the file system above frozen where that is
//! asked for, says that all is prepared, and waits. Told to commit, it does, and says what came of
//! it. Left alone, it undoes what it did. It opens no image that has content: the new delta is the
//! only one.

use super::child::CONTROL_FD;
use super::inherit;
use super::message::Failure;
use super::packet;
use crate::image::change::{self, Shape, Uncommitted};
use crate::image::snapshot::create;
use crate::io::exec::{self, Engine};
use crate::io::folder::DirFolder;
use command_fds::{CommandFdExt, FdMapping};
use ploop_formats::guid::Guid;
use ploop_formats::ploop::header::Version;
use ploop_formats::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// The disk's directory, in a changer.
const DIR_FD: RawFd = CONTROL_FD + 1;
/// The keeper's lock on the disk, which lasts until both have ended.
const LOCK_FD: RawFd = CONTROL_FD + 2;

/// The snapshot that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Its GUID.
    pub uuid: String,
    /// What names the new top's file.
    pub random: String,
    /// Format version of the new top.
    pub version: u8,
    /// Its size in bytes.
    pub size: u64,
}

/// What a changer says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Said {
    /// All is there but the commit.
    Prepared {
        /// File of the new top.
        top: String,
        /// File of the old one.
        below: String,
    },
    /// It is the new disk.
    Committed,
    /// It is the old disk.
    Undone(Failure),
    /// Nobody knows which of the two would survive a power cut.
    Unknown(Failure),
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
    pub fn start(dir: impl AsFd, lock: impl AsFd, wanted: &Wanted) -> Result<Self> {
        let text = serde_json::to_string(wanted).map_err(io::Error::from)?;
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
pub fn run(wanted: &str) -> Result<()> {
    let wanted: Wanted =
        serde_json::from_str(wanted).map_err(|e| Error::invalid(format!("what is wanted: {e}")))?;
    let (talk, dir) = (inherit::take(CONTROL_FD)?, inherit::take(DIR_FD)?);
    let _lock = inherit::take(LOCK_FD)?;
    let folder = DirFolder::new(dir);
    let said = exec::run(Engine::Poll, async {
        match snapshot(&folder, &wanted, &talk).await {
            Ok(said) => said,
            Err(e) => Said::Undone(Failure::from(&e)),
        }
    })?;
    // Who is not there any more reads the descriptor.
    let _ = packet::send(&talk, &said, &[]);
    Ok(())
}

async fn snapshot(folder: &DirFolder, wanted: &Wanted, talk: &OwnedFd) -> Result<Said> {
    let version = match wanted.version {
        1 => Version::V1,
        _ => Version::V2,
    };
    let shape = Shape {
        version,
        size: wanted.size,
    };
    let old = change::settle(folder).await?;
    let file = old.new_file_name(wanted.random.parse()?);
    let below = old.image(old.top()).map(|image| image.file.clone());
    let below = below.ok_or_else(|| Error::damaged("the top has no image"))?;
    let uuid: Guid = wanted.uuid.parse()?;
    let prepared = create::prepare(folder, &old, uuid, &file, shape).await?;
    let said = Said::Prepared { top: file, below };
    if packet::send(talk, &said, &[]).is_err() || !told_to_commit(talk) {
        prepared.undo().await?;
        return Err(Error::new(Kind::Cancelled, "the snapshot was given up"));
    }
    Ok(match prepared.commit().await {
        Ok(_) => Said::Committed,
        Err(Uncommitted::Old(e)) => {
            change::settle(folder).await?;
            Said::Undone(Failure::from(&e))
        }
        Err(Uncommitted::Unknown(e)) => Said::Unknown(Failure::from(&e)),
    })
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
