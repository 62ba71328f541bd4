//! Holders: which processes keep a mount or a device busy.
//!
//! Read from `/proc`, best effort: processes of other users are visible to root only, and what
//! goes away while we look is not there.

use ploop::serve::supervise::mounts;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, major, makedev, minor, open, statx};
use rustix::io::Errno;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A process that uses something, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Its command's name.
    pub name: String,
    /// What it does there.
    pub how: &'static str,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}, {})", self.name, self.pid, self.how)
    }
}

/// Device numbers of the file that a link in `/proc` leads to: of its file system, and its own
/// when it is a device. Never asks a server that may be dead.
fn numbers(link: &Path) -> Option<(u64, u64)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = statx(CWD, link, flags, StatxFlags::TYPE).ok()?;
    Some((
        makedev(stat.stx_dev_major, stat.stx_dev_minor),
        makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
    ))
}

fn processes() -> impl Iterator<Item = (u32, PathBuf)> {
    let proc = fs::read_dir("/proc").into_iter().flatten().flatten();
    proc.filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path())))
        .filter(|(pid, _)| *pid != std::process::id())
}

fn holder(pid: u32, proc: &Path, how: &'static str) -> Holder {
    let name = fs::read_to_string(proc.join("comm")).unwrap_or_default();
    Holder {
        pid,
        name: name.trim_end().to_string(),
        how,
    }
}

fn open_files(proc: &Path) -> impl Iterator<Item = (u64, u64)> {
    let fds = fs::read_dir(proc.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    fds.filter_map(|fd| numbers(&fd.path()))
}

/// Whether a process has a file of this file system mapped. The line says `major:minor` in hex.
fn maps(proc: &Path, dev: u64) -> bool {
    let wanted = format!("{:02x}:{:02x}", major(dev), minor(dev));
    let maps = fs::read_to_string(proc.join("maps")).unwrap_or_default();
    maps.lines()
        .any(|line| line.split_ascii_whitespace().nth(3) == Some(&wanted))
}

/// Who uses the file system mounted at `point`.
pub fn of_mount(point: &Path) -> Vec<Holder> {
    let Ok(dev) = fs::metadata(point).map(|m| m.dev()) else {
        return Vec::new();
    };
    let there = |link: PathBuf| numbers(&link).is_some_and(|(on, _)| on == dev);
    let use_of = |proc: &Path| {
        if there(proc.join("cwd")) {
            Some("works there")
        } else if there(proc.join("root")) {
            Some("has its root there")
        } else if open_files(proc).any(|(on, _)| on == dev) {
            Some("has files open")
        } else if maps(proc, dev) {
            Some("runs or maps a file")
        } else {
            None
        }
    };
    processes()
        .filter_map(|(pid, proc)| use_of(&proc).map(|how| holder(pid, &proc, how)))
        .collect()
}

/// Who has the block device itself open.
pub fn of_device(device: &Path) -> Vec<Holder> {
    let Ok(rdev) = fs::metadata(device).map(|m| m.rdev()) else {
        return Vec::new();
    };
    processes()
        .filter(|(_, proc)| open_files(proc).any(|(_, own)| own == rdev && rdev != 0))
        .map(|(pid, proc)| holder(pid, &proc, "has the device open"))
        .collect()
}

/// Whether the kernel has the device in use: a mount in whatever namespace, swap, device mapper.
pub fn is_claimed(device: &Path) -> bool {
    let exclusive = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    matches!(open(device, exclusive, Mode::empty()), Err(Errno::BUSY))
}

/// Who keeps it claimed although it is mounted nowhere in our own mount namespace.
pub fn of_claim(device: &Path) -> Vec<Holder> {
    let Ok(rdev) = fs::metadata(device).map(|m| m.rdev()) else {
        return Vec::new();
    };
    let use_of = |proc: &Path| {
        let mounted = mounts::seen_by(proc).unwrap_or_default();
        if mounted
            .iter()
            .any(|m| m.dev == rdev || m.source == device || m.whole.as_deref() == Some(device))
        {
            Some("has it mounted in another mount namespace")
        } else if open_files(proc).any(|(on, _)| on == rdev) {
            Some("has files open on it")
        } else {
            None
        }
    };
    processes()
        .filter_map(|(pid, proc)| use_of(&proc).map(|how| holder(pid, &proc, how)))
        .collect()
}
