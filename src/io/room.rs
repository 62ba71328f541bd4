//! Room: how much more an image may take from the file system that it lies on.
//!
//! A host that is full stops everybody on it. So new space is refused while some is left: enough
//! for logs, for metadata, and for the person who cleans up. Space is looked at when some is wanted,
//! never by a timer, and an image that wants none is never in the way.

use ploop_formats::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How old an answer of the file system may be. Nobody fills a tenth of a gigabyte in it.
const FRESH: Duration = Duration::from_millis(10);

/// Free space that images leave to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum KeepFree {
    /// 1 GiB or a hundredth, whichever is more, but at most an eighth of the file system.
    #[default]
    Auto,
    /// So many bytes; 0 refuses nothing.
    Bytes(u64),
    /// So many hundredths of the file system.
    Percent(u8),
}

impl KeepFree {
    /// In bytes, for a file system of `size` bytes.
    pub fn of(self, size: u64) -> u64 {
        match self {
            KeepFree::Auto => (1 << 30).max(size / 100).min(size / 8),
            KeepFree::Bytes(bytes) => bytes,
            KeepFree::Percent(n) => size / 100 * u64::from(n),
        }
    }
}

/// Space of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSpace {
    /// Its size.
    pub size: u64,
    /// What is free, as df(1) shows it: without what is set aside for root.
    pub free: u64,
}

impl HostSpace {
    /// Of the file system that `fd` is on.
    pub fn of(fd: impl AsFd) -> Result<Self> {
        let stat = rustix::fs::fstatvfs(fd).map_err(io::Error::from)?;
        Ok(Self {
            size: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    /// Whether there is so little that space will soon be refused: half as much again as is kept.
    /// In between, a file system above can still write its metadata.
    pub fn is_low(self, keep: KeepFree) -> bool {
        let keep = keep.of(self.size);
        self.free < keep.saturating_add(keep / 2)
    }

    /// Whether there is clearly enough again.
    pub fn is_ample(self, keep: KeepFree) -> bool {
        let keep = keep.of(self.size);
        self.free >= keep.saturating_add(keep / 8 * 5)
    }
}

impl fmt::Display for HostSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB free of {}", self.free >> 20, self.size >> 20)
    }
}

/// What one image may take.
#[derive(Debug)]
pub struct Room {
    fd: Arc<OwnedFd>,
    keep: KeepFree,
    seen: Mutex<Option<(Instant, HostSpace)>>,
    low: Notify,
}

impl Room {
    /// Room for the image open as `fd`.
    pub fn new(fd: Arc<OwnedFd>, keep: KeepFree) -> Self {
        Self {
            fd,
            keep,
            seen: Mutex::default(),
            low: Notify::new(),
        }
    }

    /// Bytes that may be taken, or `NoSpace`.
    pub fn left(&self) -> Result<u64> {
        let space = self.space()?;
        if space.is_low(self.keep) {
            self.low.notify_one();
        }
        match space.free.checked_sub(self.keep.of(space.size)) {
            Some(left) if left > 0 => Ok(left),
            _ => Err(Error::new(
                Kind::NoSpace,
                format!("the host is nearly full: {space}"),
            )),
        }
    }

    /// The storage had less than it promised: a quota, or another who took it.
    pub fn ran_out(&self) {
        self.low.notify_one();
    }

    /// Returns when space was wanted of a host that is low on it, or has none.
    pub async fn low(&self) {
        self.low.notified().await;
    }

    fn space(&self) -> Result<HostSpace> {
        let now = Instant::now();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match *seen {
            Some((at, space)) if now.duration_since(at) < FRESH => Ok(space),
            _ => {
                let space = HostSpace::of(&self.fd)?;
                *seen = Some((now, space));
                Ok(space)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_host_keeps_a_gibibyte_or_a_hundredth_but_a_small_one_can_be_used() {
        let keep = |size| KeepFree::Auto.of(size);
        assert_eq!(keep(GIB / 2), GIB / 16);
        assert_eq!(keep(8 * GIB), GIB);
        assert_eq!(keep(100 * GIB), GIB);
        assert_eq!(keep(1000 * GIB), 10 * GIB);
    }

    #[test]
    fn a_host_is_low_before_anything_is_refused_and_ample_only_when_clearly_not_low() {
        let at = |free| {
            let space = HostSpace {
                size: 100 * GIB,
                free,
            };
            let keep = KeepFree::Bytes(2 * GIB);
            (space.is_low(keep), space.is_ample(keep))
        };
        assert_eq!(at(3 * GIB - 1), (true, false));
        assert_eq!(at(3 * GIB), (false, false));
        assert_eq!(at(4 * GIB), (false, true));
    }

    #[test]
    fn what_is_left_is_refused_when_it_is_wanted_by_others() {
        let dir = Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
        let room = |keep| Room::new(Arc::clone(&dir), keep).left();
        let free = HostSpace::of(&dir).unwrap().free;
        assert!(room(KeepFree::Bytes(0)).unwrap() > free / 2);
        let refused = room(KeepFree::Percent(100)).unwrap_err();
        assert_eq!(refused.kind(), Kind::NoSpace);
    }
}
