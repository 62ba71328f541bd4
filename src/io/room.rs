//! Room: how much more an image may take from the file system that it lies on.
//!
//! A host that is full stops everybody on it. So new space is refused while some is left: enough
//! for logs, for metadata, and for the person who cleans up. Space is looked at when some is wanted,
//! never by a timer, and an image that wants none is never in the way.
//!
//! A file system on the disk is told to take no more while there is some left (see the keeper's
//! brake). But others may use up all the space between two looks, and a file system that is refused
//! the next block of its journal stops for good. So an image that comes upon too little, having
//! seen enough the last time, may take [`GRACE`] beyond the line until there is space again.
//!
//! A disk may also say how much one of its deltas takes at most ([`Limit`]). What a delta may take is
//! then the smaller of the two.

use ploop_formats::{Error, Kind, Result};
use rustix::fs::fstat;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How old an answer of the file system may be. Nobody fills a tenth of a gigabyte in it.
const FRESH: Duration = Duration::from_millis(10);
/// Time between two questions whether writes take space that was granted before.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// What one image may take of what should be kept: a thousand small changes of metadata. At most a
/// sixteenth of that, and never of its lower half.
pub const GRACE: u64 = 16 << 20;

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

    /// What an image may take that found less than `keep` when it had `had` bytes, and now has `has`.
    fn grace(self, keep: u64, had: u64, has: u64) -> u64 {
        let grace = GRACE.min(keep / 16);
        let left = had.saturating_add(grace).saturating_sub(has);
        left.min(self.free.saturating_sub(keep / 2))
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

/// What a delta may take on the host at most, in bytes: `Max_delta_size` of its descriptor (ploop
/// reference 2.1 and 4, where the kernel refuses writes beyond it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(pub u64);

impl Limit {
    /// What may be taken below it by one that `has` so much.
    const fn left(self, has: u64) -> u64 {
        self.0.saturating_sub(has)
    }

    /// What a file system above may still write of its own, once it was told to take no more.
    fn slack(self) -> u64 {
        (self.0 / 8).min(512 << 20)
    }

    /// Whether there is so little left that writes will soon be refused.
    pub fn is_near(self, has: u64) -> bool {
        self.left(has) < self.slack()
    }

    /// Whether there is clearly enough again.
    pub fn is_far(self, has: u64) -> bool {
        self.left(has) >= self.slack() / 4 * 5
    }
}

/// What one image may take.
#[derive(Debug)]
pub struct Room {
    fd: Arc<OwnedFd>,
    keep: KeepFree,
    /// [`Limit`] of it; `u64::MAX` for none.
    limit: AtomicU64,
    seen: Mutex<Seen>,
    low: Notify,
}

#[derive(Debug, Default)]
struct Seen {
    space: Option<(Instant, HostSpace)>,
    /// There was enough, and more, at first or when space was last wanted and given.
    was_easy: bool,
    /// What the image took when there was first too little.
    had: Option<u64>,
    /// Its own limit has been asked for since it was set.
    knows_limit: bool,
    /// What the image took when its limit was set, if that was too much.
    over: Option<u64>,
    /// When it was last asked whether space is taken that was granted before.
    asked: Option<Instant>,
}

impl Room {
    /// Room for the image open as `fd`.
    pub fn new(fd: Arc<OwnedFd>, keep: KeepFree) -> Self {
        let now = HostSpace::of(&fd);
        Self {
            fd,
            keep,
            limit: AtomicU64::new(u64::MAX),
            seen: Mutex::new(Seen {
                was_easy: now.is_ok_and(|space| !space.is_low(keep)),
                ..Seen::default()
            }),
            low: Notify::new(),
        }
    }

    /// From now on the image takes no more than this.
    pub fn set_limit(&self, limit: Option<Limit>) {
        let bytes = limit.map_or(u64::MAX, |limit| limit.0);
        self.limit.store(bytes, Ordering::Relaxed);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.knows_limit, seen.over) = (false, None);
    }

    /// Bytes that may be taken, or `NoSpace`. Where the file system does not tell, it is not asked
    /// for anything.
    pub fn left(&self) -> Result<u64> {
        Ok(self.below_limit()?.min(self.of_host()?))
    }

    /// What the image may take by its own limit.
    fn below_limit(&self) -> Result<u64> {
        let limit = Limit(self.limit.load(Ordering::Relaxed));
        if limit.0 == u64::MAX {
            return Ok(u64::MAX);
        }
        let has = self.taken().unwrap_or(0);
        if limit.is_near(has) {
            self.low.notify_one();
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let first = !std::mem::replace(&mut seen.knows_limit, true);
        let left = match limit.left(has) {
            0 => {
                // Those above have not been told yet.
                if first {
                    seen.over = Some(has);
                }
                let grace = GRACE.min(limit.0 / 16);
                seen.over
                    .map_or(0, |had| had.saturating_add(grace).saturating_sub(has))
            }
            left => {
                seen.over = None;
                left
            }
        };
        match left {
            0 => Err(Error::new(
                Kind::NoSpace,
                format!(
                    "it has {has} bytes of the {} that a delta of this disk may have; see \
                     `ploopctl limit`",
                    limit.0
                ),
            )),
            left => Ok(left),
        }
    }

    fn of_host(&self) -> Result<u64> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(space) = self.look(&mut seen) else {
            return Ok(u64::MAX);
        };
        if space.is_low(self.keep) {
            self.low.notify_one();
        }
        let keep = self.keep.of(space.size);
        let left = match space.free.checked_sub(keep) {
            _ if keep == 0 => u64::MAX,
            Some(left) if left > 0 => {
                (seen.had, seen.was_easy) = (None, !space.is_low(self.keep));
                left
            }
            _ if !seen.was_easy => 0,
            _ => self.taken().map_or(0, |has| {
                space.grace(keep, *seen.had.get_or_insert(has), has)
            }),
        };
        match left {
            0 => Err(Error::new(
                Kind::NoSpace,
                format!("the host is nearly full: {space}"),
            )),
            left => Ok(left),
        }
    }

    /// Before something is written where it was granted a place before: nothing is refused, but
    /// that space `is_taken` although there is little is noticed. That is asked now and then: it
    /// may take long.
    pub fn notice(&self, is_taken: impl FnOnce() -> bool) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let is_low = |space: HostSpace| space.is_low(self.keep);
        let asked_lately = |at: Instant| at.elapsed() < ASK_AGAIN;
        if !self.look(&mut seen).is_some_and(is_low) || seen.asked.is_some_and(asked_lately) {
            return;
        }
        seen.asked = Some(Instant::now());
        drop(seen);
        if is_taken() {
            self.low.notify_one();
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

    /// What the host has, as seen lately; none when it does not tell.
    fn look(&self, seen: &mut Seen) -> Option<HostSpace> {
        let now = Instant::now();
        match seen.space {
            Some((at, space)) if now.duration_since(at) < FRESH => Some(space),
            _ => {
                let space = HostSpace::of(&self.fd).ok().filter(|s| s.size > 0)?;
                seen.space = Some((now, space));
                Some(space)
            }
        }
    }

    /// What the image takes of the host, if that can be told.
    fn taken(&self) -> Option<u64> {
        let stat = fstat(&self.fd).ok()?;
        Some(u64::try_from(stat.st_blocks).ok()?.saturating_mul(512))
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
    fn a_little_is_granted_beyond_the_line_once_and_never_of_its_lower_half() {
        let of = |free, had, has| HostSpace { size: 0, free }.grace(GIB, had, has);
        assert_eq!(of(GIB - 1, 100, 100), GRACE);
        assert_eq!(of(GIB - 1, 100, 100 + GRACE / 2), GRACE / 2);
        assert_eq!(of(GIB - 1, 100, 100 + GRACE), 0);
        assert_eq!(of(GIB / 2 + 5, 100, 100), 5);
        assert_eq!(of(GIB / 2, 100, 100), 0);
        let small = HostSpace { size: 0, free: 999 };
        assert_eq!(small.grace(1600, 0, 0), 100, "a sixteenth");
    }

    #[test]
    fn what_a_delta_may_take_ends_at_its_limit_and_a_file_system_is_told_before() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd = Arc::new(OwnedFd::from(file.reopen().unwrap()));
        let room = Room::new(fd, KeepFree::Bytes(0));
        std::fs::write(file.path(), vec![7; 1 << 20]).unwrap();
        file.as_file().sync_all().unwrap();
        let has = room.taken().unwrap();
        room.set_limit(Some(Limit(has + 5)));
        assert_eq!(room.left().unwrap(), 5);
        // Who comes upon a limit goes on a little, so that those above are told; who grew to it does not.
        room.set_limit(Some(Limit(has)));
        assert_eq!(room.left().unwrap(), has / 16);
        std::fs::write(file.path(), vec![7; 2 << 20]).unwrap();
        file.as_file().sync_all().unwrap();
        let over = room.left().unwrap_err();
        assert_eq!(over.kind(), Kind::NoSpace);
        assert!(over.to_string().contains("ploopctl limit"), "{over}");
        let has = room.taken().unwrap();
        room.set_limit(Some(Limit(has + 5)));
        assert_eq!(room.left().unwrap(), 5);
        std::fs::write(file.path(), vec![7; 3 << 20]).unwrap();
        file.as_file().sync_all().unwrap();
        assert_eq!(room.left().unwrap_err().kind(), Kind::NoSpace);
        room.set_limit(None);
        assert!(room.left().unwrap() > 1 << 20);
        let limit = Limit(8 * GIB);
        let states = [7 * GIB, 15 * GIB / 2 + 1, 7 * GIB + GIB / 2];
        let told = states.map(|has| (limit.is_near(has), limit.is_far(has)));
        assert_eq!(told, [(false, true), (true, false), (false, false)]);
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
