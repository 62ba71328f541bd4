//! DirFolder: the files of one directory, reached beneath its descriptor.
//!
//! The path that led to the directory may mean another one by now; the descriptor does not. Every
//! name passes the policy, and nothing is reached through a link. Who opens a file to write it waits
//! until the last writes of a dead process have landed, and takes the file as the disk has it, not
//! as the page cache believes. Blocks, but for an fsync where there is a ring.

use super::beneath;
use super::exec::{Witness, disk};
use super::file::{Cache, FileStore};
use super::lock;
use crate::policy;
use ploop_formats::folder::{Access, Folder};
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, fchmod, linkat, openat, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the last writes of a dead process may take to land.
const FENCE: Duration = Duration::from_secs(30);
/// Of a file that its disk writes.
const OWN: Mode = Mode::from_raw_mode(0o600);
/// Of a file that several disks read.
const SHARED: Mode = Mode::from_raw_mode(0o444);

/// A directory.
#[derive(Debug)]
pub struct DirFolder(Arc<OwnedFd>);

/// Of an fsync that nobody waits for any more: what it was to make durable was never promised.
struct Nobody;

impl Witness for Nobody {
    fn abandoned(&self) {}

    fn landed(&self, _: i32) {}
}

impl DirFolder {
    /// The directory that `fd` has open.
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    fn file(&self, name: &str, access: beneath::Access) -> Result<OwnedFd> {
        beneath::open_file(&self.0, Path::new(name), access)
    }
}

impl AsFd for DirFolder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn place(name: &str) -> impl Fn(Errno) -> Error {
    move |e| Error::from(io::Error::from(e)).at(name)
}

fn store(fd: OwnedFd, name: &str) -> Result<FileStore> {
    FileStore::new(fd, Path::new(name), Cache::Writeback)
}

impl Folder for DirFolder {
    type File = FileStore;

    async fn open(&self, name: &str, access: Access) -> Result<FileStore> {
        policy::allow(name)?;
        match access {
            Access::Read => store(self.file(name, beneath::Access::Read)?, name),
            Access::Write => {
                let fd = self.file(name, beneath::Access::Write)?;
                lock::fence(&fd, Instant::now() + FENCE)?;
                let store = store(fd, name)?;
                store.forget_cache()?;
                Ok(store)
            }
        }
    }

    async fn create(&self, name: &str) -> Result<FileStore> {
        policy::allow(name)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = openat(&self.0, name, flags | OFlags::NOFOLLOW, OWN).map_err(place(name))?;
        // The umask may have taken something away.
        fchmod(&fd, OWN).map_err(place(name))?;
        store(fd, name)
    }

    async fn links(&self, name: &str) -> Result<Option<u64>> {
        policy::allow(name)?;
        let stat = match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            stat => stat.map_err(place(name))?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(Some(stat.st_nlink)),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("{name}: not a regular file"),
            )),
        }
    }

    async fn set_shared(&self, name: &str, shared: bool) -> Result<()> {
        policy::allow(name)?;
        let fd = self.file(name, beneath::Access::Read)?;
        fchmod(&fd, if shared { SHARED } else { OWN }).map_err(place(name))
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        policy::allow(from)?;
        policy::allow(to)?;
        renameat(&self.0, from, &self.0, to).map_err(place(from))
    }

    async fn link(&self, name: &str, folder: &Self, new: &str) -> Result<()> {
        policy::allow(name)?;
        policy::allow(new)?;
        let linked = linkat(&self.0, name, &folder.0, new, AtFlags::empty());
        linked.map_err(|e| match e {
            Errno::MLINK => Error::unsupported(format!(
                "{name}: it has as many names as its file system gives a file (65000 on ext4)"
            )),
            Errno::PERM | Errno::OPNOTSUPP => Error::unsupported(format!(
                "{new}: its file system gives a file one name only, and this needs two: use another one"
            )),
            Errno::EXIST => place(new)(e),
            e => place(name)(e),
        })
    }

    async fn remove(&self, name: &str) -> Result<()> {
        policy::allow(name)?;
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            removed => removed.map_err(place(name)),
        }
    }

    async fn sync(&self) -> Result<()> {
        let witness: Arc<dyn Witness> = Arc::new(Nobody);
        let synced = disk::fsync(disk::Target {
            fd: &self.0,
            witness: &witness,
            here: false,
        });
        synced
            .await
            .map_err(|e| Error::from(e).at("fsync of the directory"))
    }
}
