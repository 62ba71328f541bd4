//! Locks: who may use a disk, and when the last process that could write is really gone.
//!
//! Two kinds, both of which belong to an open file description and end with its last descriptor:
//! flock(2) on whole files, and OFD byte-range locks, which meet the fcntl(2) locks of other
//! programs. Process-owned fcntl locks are never taken: closing any descriptor would drop them.
//!
//! | bytes | whose |
//! |---|---|
//! | 100 + n | QEMU: "I use permission n" (read lock) |
//! | 200 + n | QEMU: "nobody else may use permission n" (read lock) |
//! | 200 - 204 | ploop 9.x: a short operation on the base runs |
//! | 300 - 304 | ploop 9.x: a long operation, or a mount, runs |
//! | 400 | ours: the one who writes this top delta |
//!
//! Sources: measured with QEMU's tools and the ploop tools; QEMU documents its permissions as
//! consistent read 0, write 1, write unchanged 2, resize 3.

use ploop_formats::{Error, Kind, Result};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, openat};
use rustix::io::Errno;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

/// Name of the file that ploop 1.x locks, beside the descriptor.
pub const DISK_LOCK: &str = "DiskDescriptor.xml.lck";
/// ploop 9.x holds a read lock here on the base of a mounted disk.
pub const PLOOP_MOUNTED: Range<u64> = 300..305;
/// Our own exclusion: no byte of ploop or of QEMU.
const OWNER: Range<u64> = 400..401;
/// QEMU's permissions that a writer of a disk uses: consistent read, write, resize.
const QEMU_USED: [u64; 3] = [100, 101, 103];
/// And those it wants to be alone with: write, resize.
const QEMU_ALONE: [u64; 2] = [201, 203];

/// How a lock is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// With others that hold it so.
    Shared,
    /// With nobody.
    Exclusive,
}

/// Locks that are held as long as this lives, in whatever process its descriptor is.
#[derive(Debug)]
#[must_use]
pub struct Held(OwnedFd);

impl From<OwnedFd> for Held {
    /// Of a description that is locked.
    fn from(locked: OwnedFd) -> Self {
        Self(locked)
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The locks that keep ploop's own tools, of both generations, from a disk in use.
#[derive(Debug)]
#[must_use]
pub struct DiskLock {
    /// Of ploop 1.x.
    pub descriptor: Held,
    /// Of ploop 9.x.
    pub base: Held,
}

/// Waits until no other description of `file` is locked, and locks this one exclusively.
///
/// `file` is the very description that is used for I/O, and must never be duplicated into a
/// process that outlives the one doing the I/O: then the lock is free only when the kernel is done
/// with everything that was submitted through it, also after a kill. Blocks the thread.
pub fn fence(file: impl AsFd, deadline: Instant) -> Result<()> {
    whole(file, Hold::Exclusive, deadline)
}

/// Locks a whole file by flock(2), waiting until `deadline`. Blocks the thread.
///
/// Errors: `Busy` names the file and, where the kernel tells, the holder; `Unsupported` where the
/// file system has no locks.
pub fn whole(file: impl AsFd, hold: Hold, deadline: Instant) -> Result<()> {
    let fd = file.as_fd();
    let how = match hold {
        Hold::Shared => FlockOperation::NonBlockingLockShared,
        Hold::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    let mut pause = Duration::from_millis(1);
    loop {
        match flock(fd, how) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(Errno::WOULDBLOCK) => return Err(busy(fd, "it is locked", flock_holder(fd))),
            Err(Errno::INTR) => {}
            Err(e) => return Err(failed(fd, e.into())),
        }
    }
}

/// Whether no other description of `file` is locked exclusively; with [`fence`], that whoever wrote
/// through it is gone, and all that it wrote has landed. Never waits.
pub fn is_free(file: impl AsFd) -> Result<bool> {
    let fd = file.as_fd();
    match whole(fd, Hold::Shared, Instant::now()) {
        Ok(()) => {
            flock(fd, FlockOperation::Unlock).map_err(|e| failed(fd, e.into()))?;
            Ok(true)
        }
        Err(e) if e.kind() == Kind::Busy => Ok(false),
        Err(e) => Err(e),
    }
}

/// Locks a byte range, or says who has it; never waits. A shared lock needs a descriptor open for
/// reading, an exclusive one for writing. Replaces what the same description holds there.
pub fn range(file: impl AsFd, bytes: Range<u64>, hold: Hold) -> Result<()> {
    let fd = file.as_fd();
    match ofd(fd, libc::F_OFD_SETLK, &bytes, lock_type(hold)) {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            let why = format!("bytes {} to {} are locked", bytes.start, bytes.end - 1);
            Err(busy(
                fd,
                &why,
                blocker(fd, bytes, hold)?.and_then(|b| b.pid),
            ))
        }
        Err(e) => Err(failed(fd, e)),
    }
}

/// Gives a byte range back.
pub fn release(file: impl AsFd, bytes: Range<u64>) -> Result<()> {
    let fd = file.as_fd();
    ofd(fd, libc::F_OFD_SETLK, &bytes, libc::F_UNLCK)
        .map(|_| ())
        .map_err(|e| failed(fd, e))
}

/// A lock of somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocker {
    /// Its process; unknown when the lock belongs to an open file description.
    pub pid: Option<u32>,
}

/// Who, if anybody, keeps another description of `file` from taking this lock.
pub fn blocker(file: impl AsFd, bytes: Range<u64>, hold: Hold) -> Result<Option<Blocker>> {
    let fd = file.as_fd();
    let found = ofd(fd, libc::F_OFD_GETLK, &bytes, lock_type(hold)).map_err(|e| failed(fd, e))?;
    let free = i32::from(found.l_type) == libc::F_UNLCK;
    let pid = u32::try_from(found.l_pid).ok().filter(|&pid| pid > 0);
    Ok((!free).then_some(Blocker { pid }))
}

/// Locks a disk for its whole life against the tools of ploop 1.x and 9.x: the lock file in `dir`
/// (made with mode 0600 if absent, and left behind, as ploop does) and bytes of `base`. Disks
/// that share a base do not exclude each other by it.
pub fn lock_disk(dir: impl AsFd, base: OwnedFd, deadline: Instant) -> Result<DiskLock> {
    let descriptor = lock_descriptor(dir, deadline)?;
    range(&base, PLOOP_MOUNTED, Hold::Shared)?;
    Ok(DiskLock {
        descriptor,
        base: Held(base),
    })
}

/// The lock file's part of [`lock_disk`].
pub fn lock_descriptor(dir: impl AsFd, deadline: Instant) -> Result<Held> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(dir.as_fd(), DISK_LOCK, flags, Mode::RUSR | Mode::WUSR).map_err(|e| {
        Error::from(io::Error::from(e))
            .at(DISK_LOCK)
            .at(name(dir.as_fd()))
    })?;
    whole(&file, Hold::Exclusive, deadline)?;
    Ok(Held(file))
}

/// Makes the holder of `top` the only writer of this delta, for us and for QEMU. The description
/// must be open for writing and be one that nobody uses for I/O.
///
/// While it is held, QEMU refuses to write to the file, and those of its tools that want an
/// unchanging image refuse to read it unless told otherwise (`-U`). Bytes 201 and 203 also look
/// like a short operation of ploop 9.x, should the top be a base.
pub fn own_top(top: OwnedFd) -> Result<Held> {
    range(&top, OWNER, Hold::Exclusive)?;
    // As QEMU does: first say what is used, then look what others say.
    for byte in QEMU_USED.into_iter().chain(QEMU_ALONE) {
        range(&top, byte..byte + 1, Hold::Shared)?;
    }
    let unwanted = QEMU_USED.map(|byte| byte + 100).into_iter();
    for byte in unwanted.chain(QEMU_ALONE.map(|byte| byte - 100)) {
        if let Some(found) = blocker(&top, byte..byte + 1, Hold::Exclusive)? {
            let why = format!("QEMU or ploop uses it (a lock on byte {byte})");
            return Err(busy(top.as_fd(), &why, found.pid));
        }
    }
    Ok(Held(top))
}

/// Keeps writers of this delta away, ours and QEMU's, and lets readers in.
pub fn share_top(top: OwnedFd) -> Result<Held> {
    range(&top, OWNER, Hold::Shared)?;
    let [read, write, resize] = QEMU_USED;
    for byte in [read].into_iter().chain(QEMU_ALONE) {
        range(&top, byte..byte + 1, Hold::Shared)?;
    }
    for byte in [read + 100, write, resize] {
        if let Some(found) = blocker(&top, byte..byte + 1, Hold::Exclusive)? {
            let why = format!("QEMU or ploop uses it (a lock on byte {byte})");
            return Err(busy(top.as_fd(), &why, found.pid));
        }
    }
    Ok(Held(top))
}

fn lock_type(hold: Hold) -> i32 {
    match hold {
        Hold::Shared => libc::F_RDLCK,
        Hold::Exclusive => libc::F_WRLCK,
    }
}

fn ofd(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    bytes: &Range<u64>,
    kind: i32,
) -> io::Result<libc::flock> {
    let offset = |n: u64| libc::off_t::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
    if bytes.is_empty() {
        // The kernel would take a length of 0 for "up to the end".
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: flock is plain data for which all zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = offset(bytes.start)?;
    lock.l_len = offset(bytes.end - bytes.start)?;
    // SAFETY: the descriptor is borrowed for the call, and the kernel reads and writes the one
    // structure behind the pointer.
    match unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock),
    }
}

fn busy(fd: BorrowedFd<'_>, why: &str, pid: Option<u32>) -> Error {
    let by = pid.map_or(String::new(), |pid| format!(" by process {pid}"));
    Error::new(Kind::Busy, format!("{why}{by}")).at(name(fd))
}

fn failed(fd: BorrowedFd<'_>, error: io::Error) -> Error {
    if matches!(
        error.raw_os_error(),
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS)
    ) {
        let why = "its file system cannot lock (NFS with nolock, or without its lock service?); \
                   without locks two processes could write at once, so it is refused";
        return Error::unsupported(why).at(name(fd));
    }
    Error::from(error).at("locking").at(name(fd))
}

/// The name of an open file, as far as the kernel tells.
fn name(fd: BorrowedFd<'_>) -> String {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    match std::fs::read_link(link) {
        Ok(path) => path.display().to_string(),
        Err(_) => format!("descriptor {}", fd.as_raw_fd()),
    }
}

/// The process that made a flock on this file, as /proc/locks tells.
fn flock_holder(fd: BorrowedFd<'_>) -> Option<u32> {
    let stat = fstat(fd).ok()?;
    let (major, minor) = (
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev),
    );
    let file = format!("{major:02x}:{minor:02x}:{}", stat.st_ino);
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        // 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
        let mut words = line.split_whitespace().skip(1);
        let is_flock = words.next()? == "FLOCK";
        let pid = words.nth(2)?.parse().ok()?;
        (is_flock && words.next()? == file && pid > 0).then_some(pid)
    })
}

#[cfg(test)]
mod tests;
