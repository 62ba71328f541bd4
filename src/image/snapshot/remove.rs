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

/// Removes a snapshot of a disk that is not attached, or its top.
pub async fn offline<F: Folder>(
    folder: &F,
    uuid: Guid,
    work: &mut copy::Work<'_>,
) -> Result<Removed> {
    let old = change::settle(folder).await?;
    let children = old.children(uuid).count();
    if old.shot(uuid).is_none() {
        return Err(unknown(uuid));
    }
    match children {
        0 if uuid == old.top() => drop_top(folder, &old).await,
        0 => {
            let new = old.without_leaf(uuid)?;
            Change::announce(folder, &old, new).await?.commit().await?;
            Ok(Removed::Dropped)
        }
        1 => {
            merge::offline(folder, uuid, work).await?;
            Ok(Removed::Merged)
        }
        n => {
            let new = old.marked(uuid, Some(Mark::Temporary))?;
            Change::announce(folder, &old, new).await?.commit().await?;
            Ok(Removed::Marked(n))
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
    Change::announce(folder, old, new).await?.commit().await?;
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
        let ripe = disk.shots().iter().find(|shot| {
            let few = disk.children(shot.guid).count() <= 1;
            shot.mark == Some(Mark::Temporary) && few && !tried.contains(&shot.guid)
        });
        let Some(shot) = ripe else {
            return failed.map_or(Ok(done), Err);
        };
        tried.push(shot.guid);
        match offline(folder, shot.guid, work).await {
            Ok(_) => done = done.saturating_add(1),
            Err(e) if e.kind() == Kind::Cancelled => return Err(e),
            Err(e) => {
                failed.get_or_insert(e);
            }
        }
    }
}
