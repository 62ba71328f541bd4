//! Host: what the file system that holds a disk's files has left, and what the disk takes of it.
//!
//! The keeper waits for nobody, also not for a file server: it looks through [`Look`].

use crate::io::look::Look;
use crate::io::room::{HostSpace, KeepFree, Limit};
use rustix::fs::{Mode, OFlags, fstat, open};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Space on the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// Left on the host's file system, for those who are not root.
    pub host_free: u64,
    /// Its size.
    pub host_size: u64,
    /// What the top layer's file takes there.
    pub allocated: u64,
}

impl Footprint {
    /// Space of the host.
    pub(super) const fn host(self) -> HostSpace {
        HostSpace {
            size: self.host_size,
            free: self.host_free,
        }
    }

    /// Whether there is clearly enough, on the host and below the top's own limit.
    pub(super) fn is_ample(self, keep: KeepFree, limit: Option<Limit>) -> bool {
        self.host().is_ample(keep) && limit.is_none_or(|limit| limit.is_far(self.allocated))
    }
}

/// A way to look at a directory's file system and at a file in it.
///
/// The descriptions of both are not kept: a lock on one would be held by a look that hangs.
pub(super) fn footprint(dir: impl AsFd, top: impl AsFd) -> io::Result<Look<Footprint>> {
    let anew = |fd: BorrowedFd<'_>| {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        open(path.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
    };
    let (dir, top) = (anew(dir.as_fd())?, anew(top.as_fd())?);
    Ok(Look::new(move || of(&dir, &top)))
}

fn of(dir: &OwnedFd, top: &OwnedFd) -> Option<Footprint> {
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
    use rustix::fs::{FlockOperation, flock};
    use std::fs::File;
    use std::io::Write;

    #[test]
    fn what_a_file_takes_is_seen_and_its_lock_is_not_held() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("top");
        let mut file = File::create(&path).expect("create");
        let here = File::open(dir.path()).expect("directory");
        flock(&file, FlockOperation::LockExclusive).expect("lock");
        let look = footprint(&here, &file).expect("descriptors");
        let now = || {
            let mut looks = std::iter::repeat_with(|| look.now()).take(100);
            looks
                .find_map(|seen| seen)
                .expect("a local file system answers")
        };
        let before = now();
        assert!(before.host_size >= before.host_free && before.allocated == 0);
        file.write_all(&[7; 1 << 20]).expect("write");
        file.sync_all().expect("sync");
        let mut looks = std::iter::repeat_with(now).take(100);
        assert!(looks.any(|f| f.allocated >= 1 << 20));
        drop(file);
        let other = File::open(&path).expect("open");
        flock(&other, FlockOperation::NonBlockingLockExclusive).expect("nobody holds it");
    }
}
