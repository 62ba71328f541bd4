//! Adopt: a bare image gets a directory and a descriptor, and so becomes a disk with a stack.
//!
//! In order: the locks, the directory, the image's rename into it, then the descriptor as a new
//! disk gets it (aside, fsync, rename, fsync). Every failure undoes what was done. A cut between
//! the renames leaves the image under its new name in a directory that is no disk to anyone.

use super::init::{IMAGE, make_dir, sync_dir, write_descriptor};
use super::lock::{Access, DiskLocks};
use super::members::ASIDE;
use super::target::{DESCRIPTOR, Format, Target};
use ploop_formats::descriptor::{Chs, Descriptor, NewDisk};
use ploop_formats::ploop::header::chs;
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A bare image as it was before anybody looked into it.
#[derive(Debug)]
pub struct Candidate {
    target: Target,
    format: Format,
    seen: Metadata,
}

/// What looking into it showed.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Virtual size in bytes.
    pub size: u64,
    /// Unit of allocation; of a raw image that of the layers that will stand on it.
    pub cluster: ClusterSize,
}

impl Candidate {
    /// A file that may be adopted: no link, and nobody else's.
    pub fn new(file: &Path, format: Format) -> Result<Self> {
        let at = |e: io::Error| Error::from(e).at(file.display());
        if fs::symlink_metadata(file).map_err(at)?.is_symlink() {
            return Err(Error::invalid(format!(
                "{}: a symbolic link; name the file that it leads to",
                file.display()
            )));
        }
        if fs::metadata(file).map_err(at)?.is_dir() {
            let what = "a directory; what is adopted is one image file";
            return Err(Error::new(Kind::Usage, what).at(file.display()));
        }
        let target = Target::resolve(file, Some(format))?;
        let seen = fs::metadata(target.path()).map_err(at)?;
        if seen.nlink() > 1 {
            return Err(Error::unsupported(format!(
                "{}: {} links to it, so other disks share it and it must not be written; adopt a \
                 copy",
                file.display(),
                seen.nlink()
            )));
        }
        Ok(Self {
            target,
            format,
            seen,
        })
    }

    /// The file, absolute.
    pub fn file(&self) -> &Path {
        self.target.path()
    }

    /// Makes the disk `dir`, which is absent or empty and on the same file system.
    ///
    /// `Busy` when somebody uses the image, or changed it since [`Candidate::new`].
    pub fn adopt(&self, dir: &Path, shape: Shape) -> Result<PathBuf> {
        let file = self.target.path();
        let descriptor = self.describe(shape).map_err(|e| e.at(file.display()))?;
        let beneath = self.target.open_dir()?;
        let _locks = DiskLocks::take(&beneath, &self.target.source(), Access::Write)
            .map_err(|e| e.at(file.display()))?;
        self.refuse_changed()?;
        let mut draft = Draft::new(file, dir)?;
        draft.refuse_elsewhere(&self.seen)?;
        draft.take()?;
        write_descriptor(&draft.dir, &descriptor)?;
        sync_dir(&self.target.dir())?;
        draft.finished = true;
        Ok(draft.dir.clone())
    }

    fn describe(&self, shape: Shape) -> Result<Descriptor> {
        if !shape.size.is_multiple_of(SECTOR) || shape.size == 0 {
            return Err(Error::invalid(format!(
                "{} bytes are not a whole number of sectors of {SECTOR}; lengthen it with {}",
                shape.size,
                match self.format {
                    Format::Qcow2 => "`qemu-img resize`",
                    Format::Ploop | Format::Raw => "truncate(1)",
                }
            )));
        }
        let sectors = shape.size / SECTOR;
        let (heads, track, cylinders) = chs(sectors);
        Descriptor::new_disk(&NewDisk {
            sectors,
            cluster: shape.cluster,
            kind: self.format.image_type(),
            file: IMAGE,
            preallocated: false,
            chs: Chs {
                cylinders: u64::from(cylinders),
                heads: u64::from(heads),
                sectors: u64::from(track),
            },
        })
    }

    fn refuse_changed(&self) -> Result<()> {
        let file = self.target.path();
        let now = fs::symlink_metadata(file).map_err(|e| Error::from(e).at(file.display()))?;
        let of = |m: &Metadata| (m.dev(), m.ino(), m.len(), m.mtime(), m.mtime_nsec());
        match of(&now) == of(&self.seen) {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Busy,
                format!("{}: changed while it was checked", file.display()),
            )),
        }
    }
}

/// A directory on its way to be a disk; dropped unfinished, everything is as before.
struct Draft<'a> {
    file: &'a Path,
    dir: PathBuf,
    made_dir: bool,
    taken: bool,
    finished: bool,
}

impl<'a> Draft<'a> {
    fn new(file: &'a Path, dir: &Path) -> Result<Self> {
        let made_dir = make_dir(dir)?;
        let absolute = dir.canonicalize();
        Ok(Self {
            file,
            dir: absolute.map_err(|e| Error::from(e).at(dir.display()))?,
            made_dir,
            taken: false,
            finished: false,
        })
    }

    fn refuse_elsewhere(&self, file: &Metadata) -> Result<()> {
        let there = fs::metadata(&self.dir).map_err(|e| Error::from(e).at(self.dir.display()))?;
        if there.dev() == file.dev() {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "{} is on another file system than {}; name a directory beside the image, or copy the \
             image there first (cp --sparse=always)",
            self.dir.display(),
            self.file.display()
        )))
    }

    fn take(&mut self) -> Result<()> {
        let image = self.dir.join(IMAGE);
        let place = || format!("moving {} to {}", self.file.display(), image.display());
        fs::rename(self.file, &image).map_err(|e| Error::from(e).at(place()))?;
        self.taken = true;
        Ok(())
    }

    fn give_back(&self) {
        let image = self.dir.join(IMAGE);
        let back = renameat_with(CWD, &image, CWD, self.file, RenameFlags::NOREPLACE);
        if let Err(e) = back {
            tracing::error!(
                "{}: not given back, it stays as {}: {e}",
                self.file.display(),
                image.display()
            );
        }
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The descriptor first: what loses its image must be no disk before.
        for name in [DESCRIPTOR, ASIDE] {
            let _ = fs::remove_file(self.dir.join(name));
        }
        if self.taken {
            self.give_back();
        }
        if self.made_dir {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}
