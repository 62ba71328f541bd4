//! Lock: keeps every other program's hands off the files of an open disk.
//!
//! Three generations of tools guard these files, each in its own way, and all are honoured:
//!
//! | who | what | held here |
//! |---|---|---|
//! | ploop 1.x | flock on `DiskDescriptor.xml.lck` | yes |
//! | ploop 9.x | OFD read lock on bytes 300..305 of the base | yes, never tested again |
//! | QEMU | read locks on permission bytes 100.. and 200.. | yes, on the top |
//! | we | OFD lock on byte 500 of the top | write lock, or read lock to read |
//!
//! Bytes 200..205 of a shared base are left alone: a lock there keeps QEMU from opening it, too.
//! A base is never locked exclusively: other disks may stand on it. The locks live as long as
//! this value, on descriptors of its own that do no I/O.

use super::chain::Chain;
use super::target::{DESCRIPTOR, Source};
use crate::io::beneath;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{FlockOperation, OFlags, flock};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// What the disk is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Others may read, too.
    Read,
    /// Nobody else.
    Write,
}

/// Our own byte, used by neither ploop nor QEMU.
const OURS: i64 = 500;
/// ploop 9.x: a disk is in use.
const PLOOP_LONG: (i64, i64) = (300, 5);
/// QEMU: permission `n` is held while byte `HELD + n` is locked.
const QEMU_HELD: i64 = 100;
/// QEMU: permission `n` is denied to others while byte `DENIED + n` is locked.
const QEMU_DENIED: i64 = 200;
/// QEMU's permissions: to read consistent data, to write, to resize.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks of one open disk.
#[derive(Debug)]
pub struct DiskLocks {
    _held: Vec<OwnedFd>,
}

impl DiskLocks {
    /// Takes every lock, or says `Busy` and whose lock is in the way.
    pub fn take(dir: impl AsFd, source: &Source, access: Access) -> Result<Self> {
        let mut held = Vec::new();
        if *source == Source::Bundle {
            held.extend(lock_directory(&dir, access)?);
        }
        // Read under the first lock: another ploop may have changed the descriptor until then.
        let chain = Chain::read(&dir, source)?;
        let base = beneath::open(&dir, &chain.base().name, OFlags::RDONLY)
            .map_err(|e| e.at(chain.base().display()))?;
        lock(&base, libc::F_RDLCK, PLOOP_LONG).map_err(|e| refuse(e, "ploop"))?;
        let flags = if access == Access::Write { OFlags::RDWR } else { OFlags::RDONLY };
        let top = beneath::open(&dir, &chain.top().name, flags)
            .map_err(|e| e.at(chain.top().display()))?;
        lock_top(&top, access).map_err(|e| e.at(chain.top().display()))?;
        held.extend([base, top]);
        Ok(Self { _held: held })
    }
}

fn lock_directory(dir: impl AsFd, access: Access) -> Result<Option<OwnedFd>> {
    let name = format!("{DESCRIPTOR}.lck");
    let (flags, how) = match access {
        Access::Write => (OFlags::RDWR | OFlags::CREATE, FlockOperation::NonBlockingLockExclusive),
        Access::Read => (OFlags::RDONLY, FlockOperation::NonBlockingLockShared),
    };
    let fd = match beneath::open(dir, &name, flags) {
        // A reader on a read-only medium makes no lock file, and nobody writes there.
        Err(e) if access == Access::Read && e.kind() == Kind::NotFound => return Ok(None),
        other => other.map_err(|e| e.at(&name))?,
    };
    flock(&fd, how).map_err(|e| refuse(e.into(), "ploop").at(&name))?;
    Ok(Some(fd))
}

fn lock_top(top: &OwnedFd, access: Access) -> Result<()> {
    let (kind, held): (_, &[i64]) = match access {
        Access::Write => (libc::F_WRLCK, &[CONSISTENT_READ, WRITE, RESIZE]),
        Access::Read => (libc::F_RDLCK, &[CONSISTENT_READ]),
    };
    lock(top, kind, (OURS, 1)).map_err(|e| refuse(e, "another ploop process"))?;
    let denied = [WRITE, RESIZE];
    for n in held {
        lock(top, libc::F_RDLCK, (QEMU_HELD + n, 1)).map_err(|e| refuse(e, "QEMU"))?;
    }
    for n in denied {
        lock(top, libc::F_RDLCK, (QEMU_DENIED + n, 1)).map_err(|e| refuse(e, "QEMU"))?;
    }
    // As QEMU does: announce first, then look, so that of two newcomers at least one sees the
    // other.
    let clash = held.iter().any(|n| is_locked(top, QEMU_DENIED + n))
        || denied.iter().any(|n| is_locked(top, QEMU_HELD + n));
    match clash {
        false => Ok(()),
        true => Err(Error::new(Kind::Busy, "QEMU has this image open")),
    }
}

fn refuse(e: io::Error, who: &str) -> Error {
    match e.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Error::new(Kind::Busy, format!("{who} has it locked")),
        _ => Error::from(e).at("locking"),
    }
}

fn request(kind: i32, (start, len): (i64, i64)) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 }
}

/// Locks a byte range on this open file description.
fn lock(fd: &OwnedFd, kind: i32, range: (i64, i64)) -> io::Result<()> {
    let wanted = request(kind, range);
    // SAFETY: F_OFD_SETLK reads one `struct flock`, which outlives the call.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &wanted) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether somebody else has a lock of any kind on a byte.
fn is_locked(fd: &OwnedFd, byte: i64) -> bool {
    let mut probe = request(libc::F_WRLCK, (byte, 1));
    // SAFETY: F_OFD_GETLK reads and writes one `struct flock`, which outlives the call.
    let asked = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut probe) };
    asked == 0 && i32::from(probe.l_type) != libc::F_UNLCK
}
