//! Folder: the names of a disk's files, and which of them survive power loss.
//!
//! The seam beside [`Store`]: a change of a disk makes, renames and removes files, and its order
//! is as much a matter of durability as that of writes. Names are plain, of one directory; no link
//! is ever followed. Methods are `async fn`s for the same reason as a store's.

use crate::store::{Reach, Store};
use crate::{Error, Kind, Result, buf};
use bytes::BytesMut;

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}

/// A directory.
///
/// What is done to names is visible at once, and durable after the next [`Folder::sync`]. Until
/// then a power cut keeps any part of it, each operation whole. What a file holds is durable by its
/// own [`Store::flush`] only, whether or not its name is.
#[allow(
    async_fn_in_trait,
    reason = "futures of a simulated folder are not Send"
)]
pub trait Folder {
    /// An open file; clones are of the same one.
    type File: Store + Clone;

    /// Opens a regular file. `NotFound` when there is none.
    async fn open(&self, name: &str, access: Access) -> Result<Self::File>;

    /// Makes an empty file that only its owner may use, and opens it. `Exists` when the name is
    /// taken.
    async fn create(&self, name: &str) -> Result<Self::File>;

    /// How many names a file has, in whatever folders; none when it is not there.
    async fn links(&self, name: &str) -> Result<Option<u64>>;

    /// Says that a file is shared with other disks, and to be written by nobody; or no longer.
    async fn set_shared(&self, name: &str, shared: bool) -> Result<()>;

    /// Gives a file another name, in place of whatever has it.
    async fn rename(&self, from: &str, to: &str) -> Result<()>;

    /// Gives a file one more name, in a folder of the same file system. `Exists` when it is taken.
    async fn link(&self, name: &str, folder: &Self, new: &str) -> Result<()>;

    /// Takes a name away. A name that is not there is no error.
    async fn remove(&self, name: &str) -> Result<()>;

    /// Ok means: what was done to names before the call survives power loss.
    async fn sync(&self) -> Result<()>;
}

/// All of a small file. `Damaged` when it is longer than `max` bytes.
pub async fn load<F: Folder>(folder: &F, name: &str, max: u64) -> Result<BytesMut> {
    let file = folder.open(name, Access::Read).await?;
    let len = file.info().len;
    if len > max {
        return Err(Error::damaged(format!(
            "{name}: {len} bytes, more than the {max} that are read at all"
        )));
    }
    file.read_at(0, buf::aligned(usize::try_from(len).unwrap_or(0)))
        .await
        .map_err(|e| e.at(name))
}

/// Makes a small file whose content is durable; its name is not yet.
pub async fn save<F: Folder>(folder: &F, name: &str, content: &[u8]) -> Result<()> {
    let file = folder.create(name).await?;
    let saved = async {
        write(&file, content).await?;
        file.flush().await
    };
    saved.await.map_err(|e: Error| e.at(name))
}

/// Writes a small file that was just made; its content is not durable yet.
pub async fn write<S: Store>(file: &S, content: &[u8]) -> Result<()> {
    let mut bytes = buf::aligned(content.len());
    bytes.copy_from_slice(content);
    file.set_len(content.len() as u64).await?;
    file.write_at(0, bytes.freeze(), Reach::Cache).await
}

/// Whether a folder has this name.
pub async fn has<F: Folder>(folder: &F, name: &str) -> Result<bool> {
    match folder.links(name).await {
        Ok(found) => Ok(found.is_some()),
        Err(e) if e.kind() == Kind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
