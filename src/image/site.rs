//! Site: the directory in which a clone comes to be. Dropped unfinished, what was made in it goes.
//!
//! Its lock keeps out whoever wants to make a disk in the same place. All that is removed is known
//! by name beforehand, and removed beneath open directories: the site can be cleaned up by a process
//! that may not reach anything else any more.

use super::init::make_dir;
use super::members::ASIDE;
use super::target::DESCRIPTOR;
use crate::io::beneath;
use crate::io::folder::DirFolder;
use crate::io::lock::{self, DISK_LOCK, Held};
use futures_util::future::join;
use ploop_formats::folder::Folder;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{AtFlags, fstat, fsync, unlinkat};
use std::cell::Cell;
use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A directory without a descriptor.
#[derive(Debug)]
#[must_use = "without finish() what was made is removed"]
pub struct Site {
    path: PathBuf,
    name: OsString,
    folder: DirFolder,
    parent: DirFolder,
    made_dir: bool,
    files: Vec<String>,
    /// Its own name is durable.
    named: Cell<bool>,
    finished: bool,
    _lock: Held,
}

impl Site {
    /// Makes the directory, or takes an empty one.
    pub fn new(path: &Path) -> Result<Self> {
        let made_dir = make_dir(path)?;
        Self::take(path, made_dir).inspect_err(|_| {
            if made_dir {
                let _ = std::fs::remove_dir(path);
            }
        })
    }

    fn take(path: &Path, made_dir: bool) -> Result<Self> {
        let at = |e: io::Error| Error::from(e).at(path.display());
        let path = path.canonicalize().map_err(at)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::invalid(format!("{}: no place", path.display())));
        };
        let dir = beneath::directory(&path)?;
        let mut site = Self {
            name: name.to_os_string(),
            parent: DirFolder::new(beneath::directory(parent)?),
            _lock: lock::lock_descriptor(&dir, Instant::now())?,
            folder: DirFolder::new(dir),
            made_dir,
            files: Vec::new(),
            named: Cell::new(false),
            finished: false,
            path: path.clone(),
        };
        // Somebody may have made a disk of it before it was locked.
        for entry in std::fs::read_dir(&path).map_err(at)? {
            if entry.map_err(at)?.file_name() != DISK_LOCK {
                // What is there is not ours to remove.
                site.finished = true;
                let what = format!(
                    "{}: not empty; a new disk needs a new place",
                    path.display()
                );
                return Err(Error::new(Kind::Exists, what));
            }
        }
        Ok(site)
    }

    /// Refuses a file system other than that of `source`: hard links do not leave theirs.
    pub fn refuse_elsewhere(&self, source: impl AsFd) -> Result<()> {
        let device = |fd: BorrowedFd<'_>| fstat(fd).map_err(io::Error::from);
        if device(self.folder.as_fd())?.st_dev == device(source.as_fd())?.st_dev {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "{}: on another file system than its source; a clone shares the files of its source by \
             hard links, so name a directory beside it",
            self.path.display()
        )))
    }

    /// The directory, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files.
    pub const fn folder(&self) -> &DirFolder {
        &self.folder
    }

    /// The directory that it is in.
    pub fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }

    /// Tells which files are going to be made, besides the descriptor.
    pub fn expect(&mut self, files: impl IntoIterator<Item = String>) {
        self.files.extend(files);
    }

    /// Does the work that makes the disk. Meanwhile the directory's own name becomes durable: it
    /// need not wait for what is in it.
    pub async fn fill<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let (done, named) = join(work, self.parent.sync()).await;
        named.map_err(|e| e.at(self.path.display()))?;
        self.named.set(true);
        done
    }

    /// It is a disk now, and its own name is durable, too.
    pub fn finish(mut self) -> Result<()> {
        if !self.named.get() {
            let synced = fsync(&self.parent).map_err(io::Error::from);
            synced.map_err(|e| Error::from(e).at(self.path.display()))?;
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The descriptor first: what loses its files must be no disk before.
        let first = [DESCRIPTOR, ASIDE].into_iter();
        let files = first.chain(self.files.iter().map(String::as_str));
        for name in files.chain([DISK_LOCK]) {
            let _ = unlinkat(&self.folder, name, AtFlags::empty());
        }
        if self.made_dir {
            let _ = unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR);
        }
    }
}
