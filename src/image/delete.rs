//! Delete: a disk goes for good, and at no moment is there half a disk that somebody could open.
//!
//! In order: the locks, a look for files that are not the disk's, the descriptor's rename to a name
//! that no ploop opens, the directory's fsync, the layers from the top down, the rest, the renamed
//! descriptor last, the directory. Cut anywhere after the rename, the same command finishes it.
//! A disk that was only half made goes the same way: its descriptor aside is the last.
//! Names are unlinked beneath the open directory; a link is never followed, and a file that other
//! disks share only loses a name.

use super::chain::read_descriptor_at;
use super::kept;
use super::lock::{Access, DiskLocks};
use super::members::{self, ASIDE, DELETED, MIGRATION, Member, Members, STATS, WITNESS};
use super::snapshot::names;
use super::target::{DESCRIPTOR, Source, Target};
use super::views;
use crate::io::beneath::{self, Access as Open};
use crate::io::lock::{self, DISK_LOCK, Held, Hold};
use ploop_formats::descriptor::Descriptor;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{AtFlags, fstat, fsync, renameat, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

/// Foreign names that an error lists.
const NAMED: usize = 5;

/// What went.
#[derive(Debug, Clone, Default)]
pub struct Deleted {
    /// Image files whose last name went.
    pub removed: Vec<OsString>,
    /// Image files that other disks still have.
    pub shared: Vec<OsString>,
    /// Bytes that the host got back.
    pub freed: u64,
}

impl Deleted {
    fn count(&mut self, member: Member) {
        match member.links {
            0 | 1 => {
                self.freed = self.freed.saturating_add(member.allocated);
                self.removed.push(member.name);
            }
            _ => self.shared.push(member.name),
        }
    }
}

/// The disk whose deletion, or whose making, was interrupted, if `dir` is one.
pub fn interrupted(dir: &Path) -> Option<Target> {
    let dir = dir.canonicalize().ok()?;
    let is_file = |name| std::fs::symlink_metadata(dir.join(name)).is_ok_and(|m| m.is_file());
    let begun = || is_file(ASIDE) || is_file(DISK_LOCK);
    let found = !is_file(DESCRIPTOR) && (is_file(DELETED) || begun());
    found.then_some(Target::Bundle { dir })
}

/// Deletes a disk that is not attached.
///
/// `Busy` when somebody uses it, `Exists` when the directory holds files that are not the disk's:
/// then nothing was changed.
pub fn delete(target: &Target) -> Result<Deleted> {
    let done = match target.source() {
        Source::Bundle => bundle(target.path()),
        Source::Bare { ref name, .. } => bare(target, name),
    };
    done.map_err(|e| e.at(target.path().display()))
}

fn bare(target: &Target, name: &OsStr) -> Result<Deleted> {
    let dir = target.open_dir()?;
    let _locks = DiskLocks::take(&dir, &target.source(), Access::Write)?;
    let member = members::layer(&dir, name)?
        .ok_or_else(|| Error::invalid("no longer a regular file; nothing was deleted"))?;
    remove(&dir, name)?;
    sync(&dir)?;
    let mut deleted = Deleted::default();
    deleted.count(member);
    Ok(deleted)
}

fn bundle(path: &Path) -> Result<Deleted> {
    let dir = beneath::directory(path)?;
    let _disk = lock::lock_descriptor(&dir, Instant::now())?;
    let descriptor = match descriptor(&dir) {
        Err(e) if e.kind() == Kind::NotFound => return half_made(path, &dir),
        found => found?,
    };
    refuse_viewed(&dir)?;
    let members = Members::of(&dir, &descriptor)?;
    let _layers = lock_layers(&dir, &descriptor)?;
    refuse_foreign(&members.foreign)?;
    match renameat(&dir, DESCRIPTOR, &dir, DELETED) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(Error::from(io::Error::from(e)).at(DESCRIPTOR)),
    }
    // Before the first layer goes: a descriptor must not come back without its layers.
    sync(&dir)?;
    let mut deleted = Deleted::default();
    for member in members.layers.into_iter().rev() {
        remove(&dir, &member.name)?;
        deleted.count(member);
    }
    for draft in &members.drafts {
        remove(&dir, draft)?;
    }
    sync(&dir)?;
    let own = [names::FILE, kept::FILE, STATS, MIGRATION, WITNESS];
    for name in own.into_iter().chain([DISK_LOCK, DELETED]) {
        remove(&dir, OsStr::new(name))?;
    }
    remove_directory(path, &dir)?;
    Ok(deleted)
}

/// Removes what a disk was to be made of: its descriptor never got its name. What is aside names
/// all that was made after it.
fn half_made(path: &Path, dir: &OwnedFd) -> Result<Deleted> {
    let members = match read_descriptor_at(dir, ASIDE) {
        Ok(descriptor) => Members::of(dir, &descriptor)?,
        // A kill leaves nothing but this, because it comes first. After a power cut it may be lost
        // where what it names is not: then nobody knows whose that is, and it is refused below.
        Err(e) if matches!(e.kind(), Kind::Damaged | Kind::NotFound) => {
            Members::only(dir, &[ASIDE, DISK_LOCK])?
        }
        Err(e) => return Err(e),
    };
    refuse_foreign(&members.foreign)?;
    let mut deleted = Deleted::default();
    for member in members.layers {
        remove(dir, &member.name)?;
        deleted.count(member);
    }
    sync(dir)?;
    for name in [ASIDE, DISK_LOCK] {
        remove(dir, OsStr::new(name))?;
    }
    remove_directory(path, dir)?;
    Ok(deleted)
}

/// Views of its points go before the disk: whoever looks at one is not to lose it unasked.
fn refuse_viewed(dir: &OwnedFd) -> Result<()> {
    // Their points go with the disk.
    views::sweep(dir, |_| Ok(()))?;
    match views::all(dir)?.first() {
        None => Ok(()),
        Some(view) => Err(Error::new(
            Kind::Busy,
            format!(
                "snapshot {} is mounted as {}/{}; `ploopctl umount` that first",
                view.name.point.bare(),
                views::FOLDER,
                view.name
            ),
        )),
    }
}

/// The descriptor, or what an interrupted deletion made of it.
fn descriptor(dir: impl AsFd) -> Result<Descriptor> {
    match read_descriptor_at(&dir, DESCRIPTOR) {
        Err(e) if e.kind() == Kind::NotFound => read_descriptor_at(&dir, DELETED),
        found => found,
    }
}

/// Nobody else may use the top, nor, unless other disks share it, the base. A layer that is gone
/// needs no lock.
fn lock_layers(dir: impl AsFd, descriptor: &Descriptor) -> Result<Option<Held>> {
    let chain = descriptor.chain(descriptor.top())?;
    let open = |file: &str, access| match beneath::open_file(&dir, Path::new(file), access) {
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        opened => opened.map(Some),
    };
    if let Some(base) = chain
        .first()
        .map(|l| open(&l.file, Open::Read))
        .transpose()?
        .flatten()
    {
        refuse_mounted(&base)?;
    }
    let top = chain.last().map(|l| open(&l.file, Open::Write));
    top.transpose()?.flatten().map(lock::own_top).transpose()
}

fn refuse_mounted(base: &OwnedFd) -> Result<()> {
    let shared = fstat(base).map_err(io::Error::from)?.st_nlink > 1;
    match lock::blocker(base, lock::PLOOP_MOUNTED, Hold::Exclusive)? {
        Some(found) if !shared => {
            let by = found
                .pid
                .map_or(String::new(), |pid| format!(" (process {pid})"));
            let what = format!("its base is in use by another ploop{by}; unmount it there first");
            Err(Error::new(Kind::Busy, what))
        }
        _ => Ok(()),
    }
}

fn refuse_foreign(foreign: &[OsString]) -> Result<()> {
    if foreign.is_empty() {
        return Ok(());
    }
    let names = foreign
        .iter()
        .take(NAMED)
        .map(|n| format!("{:?}", Path::new(n)));
    let names = names.collect::<Vec<_>>().join(", ");
    let more = match foreign.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    Err(Error::new(
        Kind::Exists,
        format!(
            "holds what no descriptor names: {names}{more}; nothing was deleted; move that away, \
             or delete it yourself, and try again"
        ),
    ))
}

fn remove(dir: impl AsFd, name: &OsStr) -> Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(Error::from(io::Error::from(e)).at(Path::new(name).display())),
    }
}

fn sync(dir: impl AsFd) -> Result<()> {
    fsync(dir).map_err(|e| Error::from(io::Error::from(e)).at("fsync of the directory"))
}

/// Removes the empty directory, unless something else has its name by now.
fn remove_directory(path: &Path, dir: &OwnedFd) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let parent = beneath::directory(parent)?;
    let removed = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).and_then(|there| {
        let ours = fstat(dir)?;
        match (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino) {
            true => unlinkat(&parent, name, AtFlags::REMOVEDIR),
            false => Err(Errno::NOENT),
        }
    });
    removed.map_err(|e| {
        Error::from(io::Error::from(e)).at("the disk is deleted, its empty directory is not")
    })?;
    sync(&parent)
}
