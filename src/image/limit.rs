//! Limit: how much a delta of a disk may take on the host.
//!
//! It is `Max_delta_size` of the descriptor (ploop reference 2.1), taken for bytes, and each delta has
//! it anew: a snapshot's new top begins with all of it. Whoever serves the disk holds the guest's
//! writing to it, and nothing else.

use super::change::{self, Change};
use super::snapshot::layers;
use ploop_formats::descriptor::{Descriptor, LayerFormat};
use ploop_formats::folder::Folder;
use ploop_formats::{Error, Result};

/// Announces the limit, in bytes; none when the descriptor says so already. `old` is what
/// [`change::settle`] gave.
pub async fn prepare<'f, F: Folder>(
    folder: &'f F,
    old: &Descriptor,
    bytes: Option<u64>,
) -> Result<Option<Change<'f, F>>> {
    if bytes == Some(0) {
        return Err(Error::invalid("a delta cannot do without space"));
    }
    let top = layers::image(old, old.top())?;
    if bytes.is_some() && top.format == LayerFormat::Raw {
        return Err(Error::unsupported(format!(
            "{}: a raw image, which takes what its guest writes; the deltas on it can be limited, from \
             the first snapshot on",
            top.file
        )));
    }
    if old.max_delta_size() == bytes {
        return Ok(None);
    }
    let new = old.edit(|edit| edit.set_max_delta_size(bytes))?;
    Change::announce(folder, old, new).await.map(Some)
}

/// Limits the deltas of a disk that is not attached; what the limit was.
pub async fn offline<F: Folder>(folder: &F, bytes: Option<u64>) -> Result<Option<u64>> {
    let old = change::settle(folder).await?;
    if let Some(change) = prepare(folder, &old, bytes).await? {
        change.commit().await?;
    }
    Ok(old.max_delta_size())
}
