//! Switch: the disk goes back to a frozen point. What was written since is given up.
//!
//! In order: the change is announced, an empty delta above the frozen point is made, the change is
//! committed, the old top's file goes. Nobody has the disk open from the commit on who had it before.

use super::layers;
use crate::image::change::{self, Change};
use ploop_formats::Result;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder::Folder;
use ploop_formats::guid::Guid;

/// Announces that the top goes and an empty delta above the snapshot `to` takes its place, and makes
/// that, as `file`. `old` is what [`change::settle`] gave.
pub async fn prepare<'f, F: Folder>(
    folder: &'f F,
    old: &Descriptor,
    to: Guid,
    file: &str,
) -> Result<Change<'f, F>> {
    let new = old.switched(to, file)?;
    let shape = layers::shape_above(folder, old, to).await?;
    let change = Change::announce(folder, old, new).await?;
    match change.add_delta(file, shape).await {
        Ok(_) => Ok(change),
        Err(e) => {
            let _ = change.undo().await;
            Err(e)
        }
    }
}

/// Goes back to the snapshot `to` of a disk that is not attached.
pub async fn offline<F: Folder>(folder: &F, to: Guid, random: Guid) -> Result<Descriptor> {
    let old = change::settle(folder).await?;
    let file = old.new_file_name(random);
    Ok(prepare(folder, &old, to, &file).await?.commit().await?)
}
