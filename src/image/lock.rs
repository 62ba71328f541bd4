//! Lock: keeps every other program's hands off the files of an open disk.
//!
//! Which bytes belong to whom is written down in [`crate::io::lock`]; here it is decided which of
//! them an open disk needs. The locks live as long as this value, on descriptors of its own that
//! do no I/O. A base is never locked exclusively: other disks may stand on it.

use super::chain::Chain;
use super::target::Source;
use super::witness;
use crate::io::beneath::{self, Access as Open};
use crate::io::lock::{self, DISK_LOCK, Held, Hold};
use ploop_formats::{Error, Kind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the lock of a disk may take: what a keeper that died was changing in it is being undone.
const MOMENT: Duration = Duration::from_secs(1);

/// What the disk is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Others may read, too.
    Read,
    /// Nobody else.
    Write,
}

/// Locks of one open disk.
#[derive(Debug)]
pub struct DiskLocks {
    _directory: Option<OwnedFd>,
    disk: Option<lock::DiskLock>,
    _base: Option<OwnedFd>,
    top: Held,
}

impl DiskLocks {
    /// Takes every lock, or says `Busy` and whose lock is in the way. Waits for a moment at most.
    pub fn take(dir: impl AsFd, source: &Source, access: Access) -> Result<Self> {
        match access {
            Access::Read => Self::to_read(dir, source),
            Access::Write => Self::to_write(dir, source),
        }
    }

    fn to_write(dir: impl AsFd, source: &Source) -> Result<Self> {
        let chain = Chain::read(&dir, source)?;
        let base = beneath::open_file(&dir, Path::new(&chain.base().name), Open::Read)?;
        let (disk, base) = match source {
            Source::Bundle => (
                Some(lock::lock_disk(&dir, base, Instant::now() + MOMENT)?),
                None,
            ),
            Source::Bare { .. } => {
                lock::range(&base, lock::PLOOP_MOUNTED, Hold::Shared)?;
                (None, Some(base))
            }
        };
        // What he did to names may be seen and still be lost with the power; from now on it is not.
        // Nor does anything vouch any more for what was there before we write.
        if matches!(source, Source::Bundle) {
            witness::forget(&dir)?;
            let synced = rustix::fs::fsync(&dir);
            synced
                .map_err(|e| Error::from(std::io::Error::from(e)).at("fsync of the directory"))?;
        }
        // Whoever had the lock until now may have changed which file is the top.
        let chain = Chain::read(&dir, source)?;
        let top = beneath::open_file(&dir, Path::new(&chain.top().name), Open::Write)?;
        let top = lock::own_top(top)?;
        Ok(Self {
            _directory: None,
            disk,
            _base: base,
            top,
        })
    }

    /// The top, on a description of its own, opened before anything of it was written.
    pub fn top(&self) -> impl AsFd + '_ {
        &self.top
    }

    /// What keeps other commands off a disk that is a directory: it is locked as long as anybody has
    /// this description.
    pub fn disk(&self) -> Option<BorrowedFd<'_>> {
        self.disk.as_ref().map(|disk| disk.descriptor.as_fd())
    }

    /// Locks a delta that is to be the top, which nobody knows yet.
    pub fn lock_next(dir: impl AsFd, name: &str) -> Result<Held> {
        lock::own_top(beneath::open_file(&dir, Path::new(name), Open::Write)?)
    }

    /// From now on this is the top.
    pub fn set_top(&mut self, top: Held) {
        self.top = top;
    }

    /// Locks the top that the descriptor names, where that is not the one that is locked: after a
    /// change of which nobody knew whether it was made. What the descriptor says is durable then.
    pub fn follow(&mut self, dir: impl AsFd) -> Result<()> {
        if self.disk.is_none() {
            return Ok(());
        }
        let file = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino));
        rustix::fs::fsync(&dir).map_err(std::io::Error::from)?;
        let chain = Chain::read(&dir, &Source::Bundle)?;
        let top = beneath::open_file(&dir, Path::new(&chain.top().name), Open::Write)?;
        let ours = file(self.top.as_fd()).map_err(std::io::Error::from)?;
        if file(top.as_fd()).map_err(std::io::Error::from)? != ours {
            self.top = lock::own_top(top)?;
        }
        self.follow_base(dir)
    }

    /// Locks the base that the descriptor names, where that is not the one that is locked: it may have
    /// got another file.
    pub fn follow_base(&mut self, dir: impl AsFd) -> Result<()> {
        let Some(disk) = &mut self.disk else {
            return Ok(());
        };
        let chain = Chain::read(&dir, &Source::Bundle)?;
        let base = beneath::open_file(&dir, Path::new(&chain.base().name), Open::Read)?;
        lock::range(&base, lock::PLOOP_MOUNTED, Hold::Shared)?;
        disk.base = base.into();
        Ok(())
    }

    fn to_read(dir: impl AsFd, source: &Source) -> Result<Self> {
        let directory = match source {
            Source::Bundle => lock_directory_shared(&dir)?,
            Source::Bare { .. } => None,
        };
        let chain = Chain::read(&dir, source)?;
        let base = beneath::open_file(&dir, Path::new(&chain.base().name), Open::Read)?;
        lock::range(&base, lock::PLOOP_MOUNTED, Hold::Shared)?;
        let top = beneath::open_file(&dir, Path::new(&chain.top().name), Open::Read)?;
        let top = lock::share_top(top)?;
        Ok(Self {
            _directory: directory,
            disk: None,
            _base: Some(base),
            top,
        })
    }
}

/// A reader makes no lock file: the medium may be read-only, and without the file no ploop 1.x has
/// the disk.
fn lock_directory_shared(dir: impl AsFd) -> Result<Option<OwnedFd>> {
    match beneath::open_file(dir, Path::new(DISK_LOCK), Open::Read) {
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
        Ok(fd) => {
            lock::whole(&fd, Hold::Shared, Instant::now())?;
            Ok::<_, Error>(Some(fd))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::target::DESCRIPTOR;
    use ploop_formats::descriptor::{Chs, Descriptor, ImageType, NewDisk};
    use ploop_formats::units::ClusterSize;

    #[test]
    fn the_lock_follows_the_descriptor_after_a_change_of_which_nobody_knew() {
        let folder = tempfile::tempdir().unwrap();
        let name_top = |file: &str| {
            let disk = Descriptor::new_disk(&NewDisk {
                sectors: 2048,
                cluster: ClusterSize::new(64 << 10).unwrap(),
                kind: ImageType::Compressed,
                file,
                preallocated: false,
                chs: Chs {
                    cylinders: 1,
                    heads: 16,
                    sectors: 63,
                },
            });
            std::fs::write(folder.path().join(DESCRIPTOR), disk.unwrap().encode()).unwrap();
        };
        for file in ["old", "new"] {
            std::fs::write(folder.path().join(file), "x").unwrap();
        }
        let dir = beneath::directory(folder.path()).unwrap();
        let is_locked = |file| match DiskLocks::lock_next(&dir, file) {
            Err(e) if e.kind() == Kind::Busy => true,
            held => held.map(|_| false).unwrap(),
        };
        name_top("old");
        let mut locks = DiskLocks::take(&dir, &Source::Bundle, Access::Write).unwrap();
        locks.follow(&dir).unwrap();
        assert_eq!((is_locked("old"), is_locked("new")), (true, false));
        name_top("new");
        locks.follow(&dir).unwrap();
        assert_eq!((is_locked("old"), is_locked("new")), (false, true));
    }
}
