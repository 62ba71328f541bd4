//! Listing: the tree of snapshots, for people and programs.
//!
//! Reads the descriptor, the names and what the host says of files, and opens no image: it works on
//! an attached disk as well.

use super::names::Names;
use crate::image::change;
use crate::image::target::DESCRIPTOR;
use crate::image::views::{self, View};
use crate::io::folder::DirFolder;
use crate::policy;
use ploop_formats::descriptor::{Descriptor, Shot};
use ploop_formats::guid::Guid;
use ploop_formats::{Error, Result};
use rustix::fs::{AtFlags, Statx, StatxFlags, statx};
use std::ffi::OsStr;
use std::io;
use std::time::{Duration, SystemTime};

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// It.
    pub uuid: Guid,
    /// The one below; none for the base.
    pub parent: Option<Guid>,
    /// How many are below it.
    pub depth: usize,
    /// The top stands on it.
    pub current: bool,
    /// It is about to be merged away.
    pub temporary: bool,
    /// What people call it.
    pub name: Option<String>,
    /// When it was made: since then the oldest delta that stands on it exists. None when none does.
    pub created: Option<SystemTime>,
    /// Its file.
    pub file: String,
    /// Bytes of that on the host.
    pub allocated: u64,
    /// Other disks have the file, too.
    pub shared: bool,
}

/// The snapshots of a disk, each before those that stand on it. `views` are those of the disk.
pub async fn list(folder: &DirFolder, views: &[View]) -> Result<Vec<Entry>> {
    let disk = change::read(folder, DESCRIPTOR).await?;
    let names = Names::read(folder).await;
    let mut all = Vec::new();
    let mut next = vec![(*disk.base(), 0)];
    while let Some((shot, depth)) = next.pop() {
        if shot.guid != disk.top() {
            all.push(entry(folder, &disk, &names, views, &shot, depth)?);
        }
        let mut children: Vec<Shot> = disk.children(shot.guid).copied().collect();
        children.reverse();
        next.extend(children.into_iter().map(|child| (child, depth + 1)));
    }
    Ok(all)
}

fn entry(
    folder: &DirFolder,
    disk: &Descriptor,
    names: &Names,
    views: &[View],
    shot: &Shot,
    depth: usize,
) -> Result<Entry> {
    let file = file(disk, shot.guid)?;
    let stat = look(folder, file)?;
    let mut created = None;
    for child in disk.children(shot.guid) {
        let born = born(&look(folder, self::file(disk, child.guid)?)?);
        created = Some(created.map_or(born, |first: SystemTime| first.min(born)));
    }
    let current = disk.shot(disk.top()).map(|top| top.parent);
    Ok(Entry {
        uuid: shot.guid,
        parent: (!shot.parent.is_none()).then_some(shot.parent),
        depth,
        current: current == Some(shot.guid),
        temporary: shot.mark.is_some(),
        name: names.name(shot.guid).map(str::to_string),
        created,
        file: file.to_string(),
        allocated: bytes(&stat),
        shared: u64::from(stat.stx_nlink) > 1 + views::links(views, OsStr::new(file)),
    })
}

/// Bytes that the file of a shot takes on the host.
pub fn allocated(folder: &DirFolder, disk: &Descriptor, shot: Guid) -> Result<u64> {
    Ok(bytes(&look(folder, file(disk, shot)?)?))
}

const fn bytes(stat: &Statx) -> u64 {
    stat.stx_blocks.saturating_mul(512)
}

fn file(disk: &Descriptor, shot: Guid) -> Result<&str> {
    let image = disk.image(shot);
    let image = image.ok_or_else(|| Error::damaged(format!("{shot} has no image")))?;
    policy::allow(&image.file)?;
    Ok(&image.file)
}

fn look(folder: &DirFolder, file: &str) -> Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    statx(folder, file, AtFlags::SYMLINK_NOFOLLOW, wanted)
        .map_err(|e| Error::from(io::Error::from(e)).at(file))
}

/// When a file was made; where the host does not know, when it was last written.
fn born(stat: &Statx) -> SystemTime {
    let known = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
    let time = if known {
        stat.stx_btime
    } else {
        stat.stx_mtime
    };
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
    SystemTime::UNIX_EPOCH + seconds
}
