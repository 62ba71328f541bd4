//! Members: which entries of a disk's directory are the disk's own, and which are somebody else's.
//!
//! Looks at names and never through a link. What it does not know is foreign, and stays.

use super::chain::{read_descriptor, read_descriptor_at};
use super::change::{self, LAST, NEXT};
use super::convert::version::copy_name;
use super::kept;
use super::snapshot::names;
use super::target::DESCRIPTOR;
use super::views;
use crate::io::beneath;
use crate::io::exec::{self, Engine};
use crate::io::folder::DirFolder;
use crate::io::lock::{self, DISK_LOCK};
use crate::policy;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::{Error, Result};
use rustix::fs::{AtFlags, FileType, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

/// Where a new descriptor is written before it is renamed. Found without its writer, a draft.
pub const ASIDE: &str = "DiskDescriptor.xml.tmp";
/// A descriptor that is being made anew for images that have lost theirs.
pub const RESTORED: &str = "DiskDescriptor.xml.restored";
/// The descriptor of a disk that is being deleted: no ploop opens it.
pub const DELETED: &str = "DiskDescriptor.xml.deleted";

/// The descriptor of a disk that has gone to another host: no ploop opens it.
pub const SEALED: &str = "DiskDescriptor.xml.migrated";
/// The descriptor of a disk that comes from another host: no ploop opens it.
pub const INCOMING: &str = "DiskDescriptor.xml.incoming";
/// What either side of a migration has written down.
pub const MIGRATION: &str = "migration.json";
/// Where that is written before it is renamed. Found without its writer, a draft.
pub const MIGRATION_ASIDE: &str = "migration.json.tmp";

/// What the disk was when a migration of it began. Whoever is about to write to the disk takes it away
/// first, durably so.
pub const WITNESS: &str = "migration.witness";

/// What the file system was like when it was last unmounted, as ploop keeps it.
pub const STATS: &str = ".statfs";

/// A layer's file as the directory shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: OsString,
    /// Links to it; above one means that other disks share it.
    pub links: u64,
    /// Bytes that it occupies on the host.
    pub allocated: u64,
}

/// What a disk's directory holds.
#[derive(Debug, Clone, Default)]
pub struct Members {
    /// The layers that the descriptor names and that are there, in its order.
    pub layers: Vec<Member>,
    /// What an interrupted command of ours left; worth nothing. Files come before the record of
    /// a change that knows them.
    pub drafts: Vec<OsString>,
    /// Everything that no descriptor names.
    pub foreign: Vec<OsString>,
}

impl Members {
    /// Looks into a directory. `Unsupported` when the descriptor names a file elsewhere.
    pub fn of(dir: impl AsFd, descriptor: &Descriptor) -> Result<Self> {
        let mut found = Self::default();
        for image in descriptor.images() {
            policy::allow(&image.file)?;
            found.layers.extend(layer(&dir, OsStr::new(&image.file))?);
        }
        let changed = changed(&dir, descriptor);
        let copies = copies(descriptor);
        for name in beneath::entries(&dir)? {
            let known = [
                DESCRIPTOR,
                DELETED,
                SEALED,
                DISK_LOCK,
                names::FILE,
                kept::FILE,
                MIGRATION,
                WITNESS,
                STATS,
            ];
            let own = known.iter().any(|k| name == OsStr::new(k))
                || name == OsStr::new(views::FOLDER) && views::are_alone(&dir)?
                || found.layers.iter().any(|l| l.name == name);
            if own {
                continue;
            }
            let aside = [ASIDE, RESTORED, names::ASIDE, kept::ASIDE, MIGRATION_ASIDE]
                .iter()
                .any(|k| name == OsStr::new(k));
            match aside || is_record(&name) || changed.contains(&name) || copies.contains(&name) {
                true => found.drafts.push(name),
                false => found.foreign.push(name),
            }
        }
        found.foreign.sort();
        found.drafts.sort_by_key(|name| is_record(name));
        Ok(found)
    }

    /// Looks into a directory that has no layers, and no files of its own but these.
    pub fn only(dir: impl AsFd, own: &[&str]) -> Result<Self> {
        let mut foreign = beneath::entries(&dir)?;
        foreign.retain(|name| !own.iter().any(|own| name == OsStr::new(own)));
        foreign.sort();
        Ok(Self {
            foreign,
            ..Self::default()
        })
    }
}

/// Whether a file of this name says which files an interrupted change leaves.
fn is_record(name: &OsStr) -> bool {
    [NEXT, LAST].iter().any(|record| name == OsStr::new(record))
}

/// Files that an interrupted change made, or was about to remove.
fn changed(dir: impl AsFd, descriptor: &Descriptor) -> Vec<OsString> {
    let records = [NEXT, LAST].into_iter();
    let records = records.filter_map(|record| read_descriptor_at(&dir, record).ok());
    let files = records.flat_map(|record| {
        let gone = record
            .files_not_in(descriptor)
            .filter(|f| policy::allow(f).is_ok());
        gone.map(OsString::from).collect::<Vec<_>>()
    });
    files.collect()
}

/// Where an interrupted conversion left the tables of images.
fn copies(descriptor: &Descriptor) -> Vec<OsString> {
    let files = descriptor.images().iter().map(|image| &image.file);
    files.map(|file| copy_name(file).into()).collect()
}

/// Removes the drafts of a disk that nobody works on, and says which; `Busy` when somebody does.
pub fn remove_drafts(dir: impl AsFd) -> Result<Vec<OsString>> {
    let _disk = lock::lock_descriptor(&dir, Instant::now())?;
    let disk = read_descriptor(&dir)?;
    let (drafts, copies) = (Members::of(&dir, &disk)?.drafts, copies(&disk));
    let is_needed = |name: &OsString| is_record(name) || copies.contains(name);
    if drafts.iter().any(is_needed) {
        let folder = DirFolder::new(dir.as_fd().try_clone_to_owned()?);
        exec::run(Engine::Poll, change::settle(&folder))??;
    }
    for name in &drafts {
        match unlinkat(&dir, name, AtFlags::empty()) {
            // A change that was settled takes its own along.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(Error::from(io::Error::from(e)).at(Path::new(name).display())),
        }
    }
    Ok(drafts)
}

/// A regular file of this name; anything else is not a layer, whatever the descriptor says.
pub(super) fn layer(dir: impl AsFd, name: &OsStr) -> Result<Option<Member>> {
    let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        stat => stat.map_err(|e| Error::from(io::Error::from(e)).at(Path::new(name).display()))?,
    };
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    Ok(regular.then(|| Member {
        name: name.to_os_string(),
        links: stat.st_nlink,
        allocated: u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop_formats::descriptor::{Chs, ImageType, NewDisk};
    use ploop_formats::units::ClusterSize;

    fn names(all: &[OsString]) -> Vec<&str> {
        all.iter().filter_map(|n| n.to_str()).collect()
    }

    #[test]
    fn only_a_regular_file_that_the_descriptor_names_is_a_layer() {
        let descriptor = Descriptor::new_disk(&NewDisk {
            sectors: 2048,
            cluster: ClusterSize::new(64 << 10).unwrap(),
            kind: ImageType::Compressed,
            file: "root.hds",
            preallocated: false,
            chs: Chs {
                cylinders: 1,
                heads: 16,
                sectors: 63,
            },
        })
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in [DESCRIPTOR, DELETED, DISK_LOCK, ASIDE, "target", ".hidden"] {
            std::fs::write(path(name), "x").unwrap();
        }
        let look = || {
            let fd = crate::io::beneath::directory(dir.path()).unwrap();
            Members::of(fd, &descriptor).unwrap()
        };
        std::fs::write(path("root.hds"), "x").unwrap();
        let found = look();
        assert_eq!(found.layers.len(), 1);
        assert_eq!(names(&found.drafts), [ASIDE]);
        assert_eq!(names(&found.foreign), [".hidden", "target"]);

        std::fs::remove_file(path("root.hds")).unwrap();
        std::os::unix::fs::symlink("target", path("root.hds")).unwrap();
        let found = look();
        assert!(found.layers.is_empty());
        assert_eq!(names(&found.foreign), [".hidden", "root.hds", "target"]);
    }
}
