//! Host: what the file system that holds a disk's files has left, and what the disk takes of it.
//!
//! Looked at by a thread: on a network file system a look may hang, and the keeper must not. Who
//! asks while one hangs is told what was seen last.

use crate::io::room::HostSpace;
use rustix::fs::{Mode, OFlags, fstat, open};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a look is waited for; on a local file system it takes microseconds.
const PATIENCE: Duration = Duration::from_millis(20);

/// What a look shows, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// Left on the host's file system, for those who are not root.
    pub host_free: u64,
    /// Its size.
    pub host_size: u64,
    /// What the top layer's file takes there.
    pub allocated: u64,
}

/// A disk's directory and top layer, to be looked at.
#[derive(Debug)]
pub(super) struct Host {
    files: Arc<(OwnedFd, OwnedFd)>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    last: Option<Footprint>,
    /// A look that did not come back in time.
    late: Option<Receiver<Option<Footprint>>>,
}

impl Host {
    /// Of a directory and a file in it. Their descriptions are not kept: a lock on one would be
    /// held by a look that hangs.
    pub(super) fn new(dir: impl AsFd, top: impl AsFd) -> std::io::Result<Self> {
        let anew = |fd: BorrowedFd<'_>| {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            open(path.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        };
        Ok(Self {
            files: Arc::new((anew(dir.as_fd())?, anew(top.as_fd())?)),
            seen: Mutex::default(),
        })
    }

    /// What there is now, or was when it last could be seen.
    pub(super) fn footprint(&self) -> Option<Footprint> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (look, patience) = match seen.late.take() {
            Some(late) => (late, Duration::ZERO),
            None => (self.look(), PATIENCE),
        };
        match look.recv_timeout(patience) {
            Ok(footprint) => seen.last = footprint,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => seen.late = Some(look),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {}
        }
        seen.last
    }

    fn look(&self) -> Receiver<Option<Footprint>> {
        let (to, from) = channel();
        let files = Arc::clone(&self.files);
        let look = move || to.send(footprint(&files.0, &files.1));
        // Without a thread there is no news, which the closed channel says.
        let _ = std::thread::Builder::new().spawn(look);
        from
    }
}

fn footprint(dir: &OwnedFd, top: &OwnedFd) -> Option<Footprint> {
    let (host, file) = (HostSpace::of(dir).ok()?, fstat(top).ok()?);
    let blocks = u64::try_from(file.st_blocks).unwrap_or(0);
    Some(Footprint {
        host_free: host.free,
        host_size: host.size,
        allocated: blocks.saturating_mul(512),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    #[test]
    fn what_a_file_takes_and_leaves_is_seen_as_it_changes() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut file = File::create(dir.path().join("top")).expect("create");
        let here = File::open(dir.path()).expect("directory");
        let host = Host::new(&here, &file).expect("descriptors");
        let before = host.footprint().expect("a local file system answers");
        assert!(before.host_size >= before.host_free && before.allocated == 0);
        file.write_all(&[7; 1 << 20]).expect("write");
        file.sync_all().expect("sync");
        let after = host.footprint().expect("a local file system answers");
        assert!(after.allocated >= 1 << 20, "{after:?}");
    }

    #[test]
    fn a_look_that_hangs_is_waited_for_once_and_its_news_come_later() {
        let dir = tempfile::tempdir().expect("temp dir");
        let here = File::open(dir.path()).expect("directory");
        let host = Host::new(&here, &here).expect("descriptors");
        let (to, late) = channel();
        host.seen.lock().expect("lock").late = Some(late);
        assert_eq!(host.footprint(), None);
        let news = Footprint {
            host_free: 1,
            host_size: 2,
            allocated: 3,
        };
        to.send(Some(news)).expect("somebody waits");
        assert_eq!(host.footprint(), Some(news));
        assert_ne!(host.footprint(), Some(news), "the next look is a new one");
    }
}
