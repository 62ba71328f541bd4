//! Errand: a short-lived process that touches the disk's own path on the keeper's behalf.
//!
//! Attaching and detaching the loop device opens and closes a file that our worker serves. If the
//! keeper did that, a worker's death at that moment would block the one process that can replace
//! it. So it sends somebody and goes on watching.

use super::message::Failure;
use crate::serve::loopdev;
use ploop_formats::{Error, Kind, Result};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// Attach a loop device to this file.
    Attach {
        /// The file.
        file: PathBuf,
        /// Whether the device refuses writes.
        read_only: bool,
    },
    /// Have this loop device look at its file, which has another size.
    Resize {
        /// The device.
        device: PathBuf,
        /// Bytes that it must have afterwards.
        size: u64,
    },
    /// Detach this loop device from this file and wait until the kernel has let go.
    Detach {
        /// The device.
        device: PathBuf,
        /// The file it must stand on; another user's device is left alone.
        file: PathBuf,
    },
}

/// What came of it: the device, or why not.
pub type Done = std::result::Result<PathBuf, Failure>;

/// A process on its errand.
#[derive(Debug)]
pub struct Errand {
    child: Child,
    pidfd: OwnedFd,
    /// What it was sent for.
    pub task: Task,
}

impl Errand {
    /// Sends somebody.
    pub fn start(task: Task) -> Result<Self> {
        let text = serde_json::to_string(&task).map_err(io::Error::from)?;
        let child = Command::new("/proc/self/exe")
            .arg0("ploopd")
            .args(["--errand", &text])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|e| Error::from(e).at("starting an errand"))?;
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        Ok(Self {
            child,
            pidfd: pidfd.map_err(io::Error::from)?,
            task,
        })
    }

    /// Becomes readable when it is back.
    pub fn back(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// What came of it; call when [`Errand::back`] is readable.
    pub fn result(mut self) -> Done {
        let mut text = Vec::new();
        if let Some(mut out) = self.child.stdout.take() {
            let _ = out.read_to_end(&mut text);
        }
        let status = self.child.wait();
        serde_json::from_slice(&text).unwrap_or_else(|_| {
            let what = format!("the process for {:?} ended with {status:?}", self.task);
            Err(Failure::from(&Error::new(Kind::Io, what)))
        })
    }
}

/// Carries a task out; this is what the process does.
pub fn run(task: &Task) -> Done {
    let done = match task {
        Task::Attach { file, read_only } => attach(file, *read_only),
        Task::Resize { device, size } => resize(device, *size),
        Task::Detach { device, file } => detach(device, file),
    };
    done.map_err(|e| Failure::from(&e))
}

fn attach(file: &Path, read_only: bool) -> Result<PathBuf> {
    let device = loopdev::attach(&loopdev::Attach {
        backing: file,
        offset: 0,
        size: None,
        block_size: 512,
        read_only,
        direct_io: true,
        autoclear: false,
    })?;
    Ok(device.path())
}

fn resize(device: &Path, size: u64) -> Result<PathBuf> {
    loopdev::set_capacity(number(device)?, size)?;
    Ok(device.to_path_buf())
}

fn number(device: &Path) -> Result<u32> {
    let number = device
        .to_str()
        .and_then(|d| d.strip_prefix("/dev/loop")?.parse().ok());
    number.ok_or_else(|| Error::invalid("not a loop device").at(device.display()))
}

fn detach(device: &Path, file: &Path) -> Result<PathBuf> {
    let number = number(device)?;
    let gone = |e: &Error| e.kind() == Kind::NotFound;
    match loopdev::status(number) {
        Ok(status) if status.backing.starts_with(file) => loopdev::detach(number),
        // Detached by the kernel after its last user, and perhaps attached to something else.
        Ok(_) => Ok(()),
        Err(e) => Err(e),
    }
    .or_else(|e| if gone(&e) { Ok(()) } else { Err(e) })?;
    Ok(device.to_path_buf())
}
