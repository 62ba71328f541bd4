//! Incoming: the directory in which a disk from another host comes to be.
//!
//! It is new, or empty, or holds what an earlier link of the same migration left. Its lock keeps out
//! whoever wants to make a disk in the same place. Dropped before anything was written down, it goes.

use crate::image::members::{INCOMING, MIGRATION, MIGRATION_ASIDE};
use crate::image::snapshot::names;
use crate::io::beneath;
use crate::io::folder::DirFolder;
use crate::io::lock::{self, DISK_LOCK, Held};
use crate::sandbox::{Files, Place};
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{AtFlags, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What may be there without a record: who died before the first was written left it.
const DRAFTS: [&str; 4] = [INCOMING, names::FILE, MIGRATION_ASIDE, DISK_LOCK];

/// It, open and locked.
#[derive(Debug)]
pub struct Incoming {
    path: PathBuf,
    name: OsString,
    folder: DirFolder,
    parent: OwnedFd,
    made: bool,
    _lock: Held,
}

impl Incoming {
    /// Makes the directory, durably so, or takes one that is there. `Exists` when it holds anything
    /// else.
    pub fn new(path: &Path) -> Result<Self> {
        let at = |e: io::Error| Error::from(e).at(path.display());
        let made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(at(e)),
        };
        let path = path.canonicalize().map_err(at)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::invalid(format!("{}: no place", path.display())));
        };
        let dir = beneath::directory(&path)?;
        let incoming = Self {
            name: name.to_os_string(),
            parent: beneath::directory(parent)?,
            _lock: lock::lock_descriptor(&dir, Instant::now())?,
            folder: DirFolder::new(dir),
            made,
            path: path.clone(),
        };
        incoming.refuse_others().map_err(|e| e.at(path.display()))?;
        File::open(parent)
            .and_then(|dir| dir.sync_all())
            .map_err(at)?;
        Ok(incoming)
    }

    fn refuse_others(&self) -> Result<()> {
        let there = beneath::entries(&self.folder)?;
        let is = |name: &OsString, known: &str| name == OsStr::new(known);
        let is_draft = |name: &OsString| DRAFTS.iter().any(|draft| is(name, draft));
        if there.iter().any(|name| is(name, MIGRATION)) || there.iter().all(is_draft) {
            return Ok(());
        }
        let what = "not empty; a disk that comes from another host needs a new place";
        Err(Error::new(Kind::Exists, what))
    }

    /// The directory, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files.
    pub const fn folder(&self) -> &DirFolder {
        &self.folder
    }

    /// What is left to do with files once this is open.
    pub fn places(&self) -> [Place<'_>; 2] {
        let place = |dir, files| Place { dir, files };
        [
            place(self.folder.as_fd(), Files::Change),
            place(self.parent.as_fd(), Files::Directories),
        ]
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let is_alone = || {
            let there = beneath::entries(&self.folder).unwrap_or_default();
            there.iter().all(|name| name == OsStr::new(DISK_LOCK))
        };
        if self.made && is_alone() {
            let _ = unlinkat(&self.folder, DISK_LOCK, AtFlags::empty());
            let _ = unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR);
        }
    }
}
