//! Trim: a mounted file system says what it does not use, so that its disk can free it.
//!
//! In steps, so that somebody hears how far it is and can end it. They are smaller than an allocation
//! group of XFS: asked for a whole one, Linux 6.18 tells of one of the longest free extents and passes over
//! the others of that length. A file system that cannot be asked is no failure of anything: what it does
//! not use stays where it is.

use super::still::root_of;
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::{Error, Result};
use rustix::fs::{fstat, fstatvfs, major, minor, syncfs};
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Updater};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of a file system that are looked at in one step.
const STEP: u64 = 64 << 20;
/// How long a device may take to pass on what it was told; one that is in use is never idle.
const PATIENCE: Duration = Duration::from_secs(2);
const BLINK: Duration = Duration::from_millis(5);
const FITRIM: Opcode = ioctl::opcode::read_write::<Range>(b'X', 121);

/// A range of a file system. What the kernel puts into `len` depends on the file system, and is not
/// always how much was not in use. Layout of `struct fstrim_range` in `linux/fs.h`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
    minlen: u64,
}

/// What came of it.
#[derive(Debug)]
pub enum Trimmed {
    /// What is not in use is free.
    Done,
    /// Nothing is mounted from the device.
    NotMounted,
    /// The kernel does not do it, for this reason.
    Refused(String),
}

/// A file system that is mounted.
#[derive(Debug)]
pub struct Mounted {
    root: OwnedFd,
    /// How many requests are in flight on the disk's device, and on that of the file system.
    in_flight: [PathBuf; 2],
}

impl Mounted {
    /// The one that is mounted from a device, or from a partition of it, in whatever mount namespace.
    pub fn from(device: &Path) -> Result<Option<Self>> {
        let Some(root) = root_of(device)? else {
            return Ok(None);
        };
        let name = device.file_name().unwrap_or_default();
        let dev = fstat(&root).map_err(io::Error::from)?.st_dev;
        let own = format!("/sys/dev/block/{}:{}", major(dev), minor(dev));
        let below = Path::new("/sys/block").join(name);
        let in_flight = [below, PathBuf::from(own)].map(|device| device.join("inflight"));
        Ok(Some(Self { root, in_flight }))
    }

    /// Has it written back: what was removed is free only once its journal says so.
    pub fn sync(&self) -> Result<()> {
        let synced = syncfs(&self.root).map_err(io::Error::from);
        synced.map_err(|e| Error::from(e).at("writing the file system back"))
    }

    /// Trims it. An error is one of `watch`, or of the machine.
    pub fn trim(&self, watch: &mut dyn Watch) -> Result<Trimmed> {
        let fs = fstatvfs(&self.root).map_err(io::Error::from)?;
        // This leaves out what the file system needs itself: the last step goes to its end, wherever
        // that is.
        let size = fs.f_blocks.saturating_mul(fs.f_frsize);
        let mut at = 0u64;
        loop {
            watch.tell(Progress {
                phase: "trimming",
                done: at,
                total: size,
            })?;
            let last = at.saturating_add(STEP) >= size;
            let len = if last { u64::MAX - at } else { STEP };
            if let Err(e) = step(&self.root, at, len) {
                return refused(e).map(Trimmed::Refused);
            }
            if last {
                self.settle();
                return Ok(Trimmed::Done);
            }
            at = at.saturating_add(STEP);
        }
    }

    /// Waits until nothing is in flight. XFS does not wait for what it says by the way.
    fn settle(&self) {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end && self.in_flight.iter().any(|device| is_busy(device)) {
            thread::sleep(BLINK);
        }
    }
}

/// Whether a device has requests; one that does not say so has none.
fn is_busy(in_flight: &Path) -> bool {
    let text = std::fs::read_to_string(in_flight).unwrap_or_default();
    text.split_whitespace().any(|number| number != "0")
}

fn step(root: &OwnedFd, start: u64, len: u64) -> rustix::io::Result<()> {
    let mut range = Range {
        start,
        len,
        minlen: 0,
    };
    // SAFETY: FITRIM reads and writes a `struct fstrim_range`, whose layout `Range` has.
    let trim = unsafe { Updater::<FITRIM, Range>::new(&mut range) };
    // SAFETY: as above; the range lives as long as the call.
    unsafe { ioctl::ioctl(root, trim) }
}

/// Why a file system is not trimmed, when that is no failure.
fn refused(e: Errno) -> Result<String> {
    match e {
        Errno::OPNOTSUPP | Errno::NOTTY => {
            Ok("its file system or device does not support it".into())
        }
        Errno::PERM => Ok("that takes CAP_SYS_ADMIN".into()),
        Errno::ROFS => Ok("it is mounted read-only".into()),
        e => Err(Error::from(io::Error::from(e)).at("trimming the file system")),
    }
}
