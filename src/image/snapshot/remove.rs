//! Remove: a snapshot goes, by the rules of ploop (reference 2.3).
//!
//! A leaf's file is removed. One that carries a single delta is merged into by that delta. One that
//! carries several cannot go yet: it is marked temporary, and goes when one is left.

use super::{copy, layers, merge};
use crate::image::change::{self, Change};
use ploop_formats::descriptor::{Descriptor, Mark};
use ploop_formats::folder::Folder;
use ploop_formats::guid::Guid;
use ploop_formats::{Error, Kind, Result};

/// What became of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// Its file is gone.
    Dropped,
    /// What stood on it took its place.
    Merged,
    /// So many deltas stand on it: it stays, marked, until one is left.
    Marked(usize),
}

/// How a point goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Nothing stands on it: its file goes.
    Drop,
    /// One delta stands on it, and is merged into it.
    Merge,
    /// The top of a running disk does, and nothing else.
    Fold,
    /// So many do: it is marked temporary.
    Mark(usize),
}

/// The way that a point of a disk goes, which is running or not. `NotFound` when there is none.
pub fn way(disk: &Descriptor, uuid: Guid, running: bool) -> Result<Way> {
    if disk.shot(uuid).is_none() {
        return Err(unknown(uuid));
    }
    let mut children = disk.children(uuid).map(|shot| shot.guid);
    Ok(match (children.next(), children.count()) {
        (None, _) => Way::Drop,
        (Some(child), 0) if running && child == disk.top() => Way::Fold,
        (Some(_), 0) => Way::Merge,
        (Some(_), others) => Way::Mark(others.saturating_add(1)),
    })
}

/// A temporary point that can go while nobody waits, and was not tried yet.
pub fn ripe(disk: &Descriptor, tried: &[Guid], running: bool) -> Option<Guid> {
    let can_go = |guid| matches!(way(disk, guid, running), Ok(Way::Drop | Way::Merge));
    let marked = disk.shots().iter();
    let marked = marked.filter(|shot| shot.mark == Some(Mark::Temporary));
    let mut marked = marked.map(|shot| shot.guid);
    marked.find(|guid| !tried.contains(guid) && can_go(*guid))
}

/// Removes a snapshot of a disk that is not attached, or its top.
pub async fn offline<F: Folder>(
    folder: &F,
    uuid: Guid,
    work: &mut copy::Work<'_>,
) -> Result<Removed> {
    let old = change::settle(folder).await?;
    match way(&old, uuid, false)? {
        Way::Drop if uuid == old.top() => drop_top(folder, &old).await,
        Way::Drop => {
            let new = old.without_leaf(uuid)?;
            Change::announce(folder, &old, new).await?.commit().await?;
            Ok(Removed::Dropped)
        }
        Way::Merge | Way::Fold => {
            merge::offline(folder, uuid, work).await?;
            Ok(Removed::Merged)
        }
        Way::Mark(n) => {
            if let Some(change) = mark(folder, &old, uuid).await? {
                change.commit().await?;
            }
            Ok(Removed::Marked(n))
        }
    }
}

/// Announces that a point is temporary; none when it is so already. `old` is what
/// [`change::settle`] gave.
pub async fn mark<'f, F: Folder>(
    folder: &'f F,
    old: &Descriptor,
    uuid: Guid,
) -> Result<Option<Change<'f, F>>> {
    let shot = old.shot(uuid).filter(|shot| shot.guid != old.top());
    match shot.ok_or_else(|| unknown(uuid))?.mark {
        Some(_) => Ok(None),
        None => {
            let new = old.marked(uuid, Some(Mark::Temporary))?;
            Change::announce(folder, old, new).await.map(Some)
        }
    }
}

/// The snapshot below becomes the top again: it must be written by nobody else.
async fn drop_top<F: Folder>(folder: &F, old: &Descriptor) -> Result<Removed> {
    let new = old.without_top()?;
    let parent = layers::image(&new, new.top())?;
    merge::refuse_shared(folder, &parent.file).await?;
    // It may have been shared with a clone that is gone.
    folder.set_shared(&parent.file, false).await?;
    let change = Change::announce(folder, old, new).await?;
    // A clone looks for the record after it has made its links, we for links after the record.
    if let Err(e) = merge::refuse_shared(folder, &parent.file).await {
        change.undo().await?;
        return Err(e);
    }
    change.commit().await?;
    Ok(Removed::Dropped)
}

/// There is no such snapshot.
pub fn unknown(uuid: Guid) -> Error {
    Error::new(
        Kind::NotFound,
        format!("there is no snapshot {}", uuid.bare()),
    )
}

/// Takes away what is marked temporary and can go. Tried for each; the first error of any is given
/// when all were tried.
pub async fn temporaries<F: Folder>(folder: &F, work: &mut copy::Work<'_>) -> Result<usize> {
    let mut done = 0usize;
    let mut failed = None;
    let mut tried = Vec::new();
    loop {
        let disk = change::settle(folder).await?;
        let Some(guid) = ripe(&disk, &tried, false) else {
            return failed.map_or(Ok(done), Err);
        };
        tried.push(guid);
        match offline(folder, guid, work).await {
            Ok(_) => done = done.saturating_add(1),
            Err(e) if e.kind() == Kind::Cancelled => return Err(e),
            Err(e) => {
                failed.get_or_insert(e);
            }
        }
    }
}
