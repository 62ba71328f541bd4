//! NewFile: a file that is to become a disk's, where it is now.
//!
//! Somebody named its path; from then on it is reached beneath its directory. Who gives it to a disk
//! is confined to the file itself, and may take its name away, but reads nothing else there.

use super::chain::Chain;
use super::lock::{Access, DiskLocks};
use super::replace::{Source, Way};
use super::target::{Format, Source as Named, parent};
use crate::io::beneath;
use crate::io::folder::DirFolder;
use crate::sandbox::{Files, Place};
use ploop_formats::{Error, Result};
use rustix::fs::{Stat, fstat};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// It, open, and locked against everybody else.
#[derive(Debug)]
pub struct NewFile {
    folder: DirFolder,
    file: OwnedFd,
    name: String,
    _locks: DiskLocks,
}

fn stat(fd: impl AsFd) -> Result<Stat> {
    Ok(fstat(fd).map_err(io::Error::from)?)
}

impl NewFile {
    /// Opens and locks it. `Invalid` when it is no regular file, or one that a descriptor beside it
    /// names; `Busy` when somebody uses it.
    pub fn open(file: &Path) -> Result<Self> {
        let at = |e: io::Error| Error::from(e).at(file.display());
        let seen = std::fs::symlink_metadata(file).map_err(at)?;
        let name = file.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|_| seen.is_file()) else {
            return Err(Error::invalid(format!(
                "{}: not a regular file with a name in UTF-8",
                file.display()
            )));
        };
        let dir = beneath::directory(&parent(file).canonicalize().map_err(at)?)?;
        let named = Named::Bare {
            name: name.into(),
            // What it is, is compared with what it replaces.
            format: Format::Raw,
        };
        let place = |e: Error| e.at(file.display());
        Chain::read(&dir, &named).map_err(place)?;
        let locks = DiskLocks::take(&dir, &named, Access::Write).map_err(place)?;
        Ok(Self {
            file: beneath::open_file(&dir, Path::new(name), beneath::Access::Read)?,
            folder: DirFolder::new(dir),
            name: name.to_string(),
            _locks: locks,
        })
    }

    /// What the process that does it may do with it.
    pub fn places(&self) -> [Place<'_>; 2] {
        [
            Place {
                dir: self.folder.as_fd(),
                files: Files::Leave,
            },
            Place {
                dir: self.file.as_fd(),
                files: Files::One,
            },
        ]
    }

    /// How it comes to the disk in `dir`: by one more name where that is of the same file system.
    pub fn source(&self, dir: impl AsFd) -> Result<Source<'_, DirFolder>> {
        let way = match stat(dir)?.st_dev == stat(&self.file)?.st_dev {
            true => Way::Moved,
            false => Way::Copied,
        };
        Ok(Source {
            from: &self.folder,
            name: &self.name,
            way,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is this file of a disk already: who gave it to that died before the old name was
    /// taken away.
    pub fn is(&self, dir: impl AsFd, file: &str) -> Result<bool> {
        let there = beneath::open_file(dir, Path::new(file), beneath::Access::Read)?;
        let (here, there) = (stat(&self.file)?, stat(&there)?);
        Ok((here.st_dev, here.st_ino) == (there.st_dev, there.st_ino))
    }
}
