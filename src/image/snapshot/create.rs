//! Create: the top is frozen under a GUID, and an empty delta above it is the top.
//!
//! In order: the change is announced, the new delta is made, the old top is sealed (everything it
//! was answered is durable in it and it says that it is closed), the change is committed. Between
//! the seal and the commit nobody writes to the disk.

use super::layers;
use crate::image::change::{self, Change, Shape, Uncommitted};
use ploop_formats::Result;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder::Folder;
use ploop_formats::guid::Guid;

/// A snapshot that is about to be made: everything is there but its commit.
#[derive(Debug)]
#[must_use = "a prepared snapshot is committed or undone"]
pub struct Prepared<'f, F: Folder> {
    change: Change<'f, F>,
    /// The new, empty top.
    pub delta: F::File,
}

/// Announces the descriptor `new`, in which the top is frozen, and makes the new top `file`. The old
/// top is still written to.
pub async fn prepare<'f, F: Folder>(
    folder: &'f F,
    old: &Descriptor,
    new: Descriptor,
    file: &str,
    shape: Shape,
) -> Result<Prepared<'f, F>> {
    let change = Change::announce(folder, old, new).await?;
    match change.add_delta(file, shape).await {
        Ok(delta) => Ok(Prepared { change, delta }),
        Err(e) => {
            // What cannot be removed now is with the next command.
            let _ = change.undo().await;
            Err(e)
        }
    }
}

impl<F: Folder> Prepared<'_, F> {
    /// Makes the new delta the top. The old one is sealed.
    pub async fn commit(self) -> std::result::Result<Descriptor, Uncommitted> {
        self.change.commit().await
    }

    /// As if nothing had been asked.
    pub async fn undo(self) -> Result<()> {
        self.change.undo().await
    }
}

/// Makes a snapshot of a disk that is not attached.
pub async fn offline<F: Folder>(folder: &F, uuid: Guid, random: Guid) -> Result<Descriptor> {
    let old = change::settle(folder).await?;
    let file = old.new_file_name(random);
    let shape = layers::shape_above(folder, &old, old.top()).await?;
    let new = old.with_snapshot(uuid, &file)?;
    let prepared = prepare(folder, &old, new, &file, shape).await?;
    match layers::seal(folder, &old).await {
        Ok(()) => Ok(prepared.commit().await?),
        Err(e) => {
            let _ = prepared.undo().await;
            Err(e)
        }
    }
}
