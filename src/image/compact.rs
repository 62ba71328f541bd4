//! Compact: the file of a disk that is not attached gets shorter.
//!
//! Its top is opened as the disk that it is without the layers below it, which it takes nothing
//! from: [`crate::disk::Disk::pack`] moves its clusters, and the close cuts it. A top that cannot
//! be compacted to the end is closed all the same.

use super::chain::Chain;
use super::change;
use super::open;
use super::snapshot::copy::Work;
use super::snapshot::layers;
use super::target::Format;
use crate::compact::raw;
use crate::disk::Disk;
use crate::stack::AnyLayer;
use ploop_formats::Result;
use ploop_formats::folder::Folder;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Ploop;
use ploop_formats::store::Store;
use std::os::fd::AsFd;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compacted {
    /// Clusters that moved.
    pub moved: u64,
    /// Bytes of the file now.
    pub length: u64,
}

/// Compacts a disk that is not attached.
pub async fn offline<F: Folder>(folder: &F, work: &mut Work<'_>) -> Result<Compacted> {
    let disk = change::settle(folder).await?;
    let image = layers::image(&disk, disk.top())?;
    let compacted = match layers::open_write(folder, &disk, &image).await {
        Ok(top) => compact(top, work).await,
        Err(e) => Err(e),
    };
    compacted.map_err(|e| e.at(&image.file))
}

/// Compacts a disk that is one file and not attached. The caller holds its locks.
pub async fn bare(dir: impl AsFd, chain: &Chain, work: &mut Work<'_>) -> Result<Compacted> {
    let top = chain.top();
    if top.format == Format::Raw {
        return Err(raw().at(top.display()));
    }
    let store = open::alone(dir, top)?;
    let compacted = match Ploop::open_write(store.clone(), Ledger::local()).await {
        Ok(ploop) => compact(AnyLayer::Ploop(ploop), work).await,
        Err(e) => Err(e),
    };
    // What was asked of the file lands before its lock goes.
    store.settle().await;
    compacted.map_err(|e| e.at(top.display()))
}

async fn compact<S: Store>(top: AnyLayer<S>, work: &mut Work<'_>) -> Result<Compacted> {
    let disk = Disk::new([top], false)?;
    let packed = disk.pack(work).await;
    let closed = disk.close().await;
    let moved = packed?;
    closed?;
    let length = disk.stack().top().store().info().len;
    Ok(Compacted { moved, length })
}
