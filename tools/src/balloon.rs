//! Balloon: a file inside a mounted file system that takes the space which its users are not to have.
//!
//! It is where OpenVZ's ploop has it, in the root of the file system and under the same name, belongs to
//! root, and cannot be changed by accident where the file system knows immutable files. Its space is
//! reserved and never written: once what is free has been trimmed, which comes first, the host has it.
//!
//! The file system belongs to others, who may have put anything in its place: what is not a regular
//! file of root's with one name is left alone.

use ploop::{Error, Result};
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, IFlags, Mode, OFlags, ResolveFlags, Stat, fallocate, fsync,
    ftruncate, ioctl_getflags, ioctl_setflags, open, openat2, statat, statvfs, unlinkat,
};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// The name (OpenVZ/ploop `include/libploop.h`: `BALLOON_FNAME`).
pub const NAME: &str = ".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8";

/// Bytes that the balloon of the file system on `root` takes; 0 when there is none.
pub fn show(root: &Path) -> Result<u64> {
    let dir = directory(root)?;
    match statat(&dir, NAME, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => taken(&stat),
        Err(Errno::NOENT) => Ok(0),
        Err(e) => Err(failed(e)),
    }
}

/// Gives the balloon this size in bytes; 0 takes it away. Returns how much it took before. Nothing is
/// trimmed: what the balloon takes is not free any more, so that comes before.
///
/// `Invalid`, and nothing was done, where that much is not free: it says how much can be taken.
pub fn set(root: &Path, bytes: u64) -> Result<u64> {
    let old = show(root)?;
    if bytes > old {
        refuse_more_than_free(root, old, bytes)?;
    }
    let dir = directory(root)?;
    let Some(file) = open_to_change(&dir, bytes > 0)? else {
        return Ok(old);
    };
    let sized = resize(&file, old, bytes);
    let left = if sized.is_ok() { bytes } else { old };
    if left == 0 {
        unlinkat(&dir, NAME, AtFlags::empty()).map_err(failed)?;
        fsync(&dir).map_err(failed)?;
    } else {
        fsync(&file).map_err(failed)?;
        set_immutable(&file, true)?;
    }
    sized.map(|()| old)
}

/// Takes the balloon away; how many bytes it took.
pub fn release(root: &Path) -> Result<u64> {
    set(root, 0)
}

fn directory(root: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(root, flags, Mode::empty()).map_err(|e| Error::from(io::Error::from(e)).at(root.display()))
}

fn failed(e: Errno) -> Error {
    Error::from(io::Error::from(e)).at(NAME)
}

/// What a balloon takes. One that was cut short while it was made has a length that says more.
fn taken(stat: &Stat) -> Result<u64> {
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !regular || stat.st_uid != 0 || stat.st_nlink != 1 {
        return Err(Error::invalid(format!(
            "{NAME}: in the place of a space limit is something else, and not a regular file of \
             root's with one name; remove it"
        )));
    }
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(len.min(blocks.saturating_mul(512)))
}

fn open_name(dir: &OwnedFd, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(dir, NAME, flags, mode, resolve)
}

/// Opens it for writing, and makes it where that is wanted and there is none. What has the name may be a
/// device of the host's, so it is judged before it is opened.
fn open_to_change(dir: &OwnedFd, make: bool) -> Result<Option<OwnedFd>> {
    let found = match open_name(dir, OFlags::PATH, Mode::empty()) {
        Err(Errno::NOENT) if make => {
            let mode = Mode::RUSR | Mode::WUSR;
            let made = open_name(dir, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, mode);
            return made.map(Some).map_err(failed);
        }
        Err(Errno::NOENT) => return Ok(None),
        found => found.map_err(failed)?,
    };
    judge(&found)?;
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    let reopen = |access| open(again.as_str(), access | OFlags::CLOEXEC, Mode::empty());
    let opened = match reopen(OFlags::RDWR) {
        Err(Errno::PERM) => {
            set_immutable(&reopen(OFlags::RDONLY).map_err(failed)?, false)?;
            reopen(OFlags::RDWR)
        }
        opened => opened,
    };
    opened.map(Some).map_err(failed)
}

fn judge(file: &OwnedFd) -> Result<()> {
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    taken(&stat).map(drop)
}

/// Not every file system has such files.
fn set_immutable(file: &OwnedFd, immutable: bool) -> Result<()> {
    let Ok(mut flags) = ioctl_getflags(file) else {
        return Ok(());
    };
    flags.set(IFlags::IMMUTABLE, immutable);
    match ioctl_setflags(file, flags) {
        Err(Errno::OPNOTSUPP | Errno::NOTTY) | Ok(()) => Ok(()),
        Err(Errno::PERM) if immutable => {
            tracing::warn!("{NAME} can be removed by accident: CAP_LINUX_IMMUTABLE is missing");
            Ok(())
        }
        Err(e) => Err(failed(e)),
    }
}

fn resize(file: &OwnedFd, old: u64, bytes: u64) -> Result<()> {
    if bytes <= old {
        return ftruncate(file, bytes).map_err(failed);
    }
    // All of it: one that was cut short has holes.
    fallocate(file, FallocateFlags::empty(), 0, bytes).map_err(|e| {
        match (e, ftruncate(file, old)) {
            (Errno::NOSPC, Ok(())) => Error::invalid(format!(
                "{NAME}: the file system has no {} bytes left to take",
                bytes - old
            )),
            (e, Ok(())) | (_, Err(e)) => failed(e),
        }
    })
}

/// Bytes that the balloon could take now.
pub fn most(root: &Path) -> Result<u64> {
    Ok(show(root)?.saturating_add(free(root)?))
}

fn free(root: &Path) -> Result<u64> {
    let fs = statvfs(root).map_err(|e| Error::from(io::Error::from(e)).at(root.display()))?;
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
}

fn refuse_more_than_free(root: &Path, old: u64, bytes: u64) -> Result<()> {
    let free = free(root)?;
    match bytes - old <= free {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{}: {} bytes were to be taken, and {free} are free",
            root.display(),
            bytes - old
        ))),
    }
}
