//! Detached: a disk that nobody else has, held while its tree is changed.
//!
//! The locks are taken before anything of it is read, and live as long as this value. Which file is
//! the top may change under them; the lock on the descriptor's own file keeps everybody out.

use super::lock::{Access, DiskLocks};
use super::target::{Source, Target};
use crate::io::exec::{self, Engine};
use crate::io::folder::DirFolder;
use ploop_formats::guid::Guid;
use ploop_formats::{Error, Kind, Result};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A disk of one's own.
#[derive(Debug)]
pub struct Detached {
    folder: DirFolder,
    _locks: DiskLocks,
}

/// The image directory that DISK means. `Unsupported` for a bare image: it has no place for more
/// than one file.
pub fn resolve(disk: &Path) -> Result<Target> {
    Target::resolve(disk, None).map_err(|e| match e.kind() {
        Kind::Usage => Error::unsupported(format!(
            "{}: a bare image has no such thing; `ploopctl adopt {0} --format F DIR` makes it a disk that \
             has. Of the snapshots that a qcow2 image keeps in itself there are, with --format qcow2, \
             `snapshot list`, `create`, `switch` and `delete`",
            disk.display()
        )),
        _ => e,
    })
}

/// A GUID that nobody else has.
pub fn random_guid() -> Guid {
    Guid::random(uuid::Uuid::new_v4().into_bytes())
}

impl Detached {
    /// Takes the disk whose directory is open; `Busy` when somebody has it.
    pub fn take(dir: OwnedFd) -> Result<Self> {
        let locks = DiskLocks::take(&dir, &Source::Bundle, Access::Write)?;
        Ok(Self {
            folder: DirFolder::new(dir),
            _locks: locks,
        })
    }

    /// Its files.
    pub const fn folder(&self) -> &DirFolder {
        &self.folder
    }

    /// Does something with them, and waits until all of its I/O is over.
    pub fn run<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        exec::run(Engine::detect().0, work)?
    }
}
