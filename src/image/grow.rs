//! Grow: a disk gets another size.
//!
//! In order: the top's file gets it, then the descriptor says so ([`describe`]). Lower deltas stay as
//! they are; what is read beyond their ends is zeros, and a disk does not get smaller than they are.
//! Cut between the two, the descriptor says less than the top has, or more. Everybody goes by the
//! top, and the same size once more mends it.
//!
//! A base that was made with all its space has it no more: the new part takes its space as it is
//! written to.

use super::chain::{Chain, LayerFile};
use super::change::{self, Change, Uncommitted};
use super::open;
use super::snapshot::layers;
use super::target::Format;
use super::{backing, delta};
use crate::io::file::Cache;
use crate::stack::{AnyLayer, NewSize, Stack};
use ploop_formats::descriptor::{Chs, Descriptor};
use ploop_formats::folder::Folder;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::header::chs;
use ploop_formats::store::Store;
use ploop_formats::units::SECTOR;
use ploop_formats::{Error, Kind, Result, qcow2};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// Bytes of a disk before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Before.
    pub old: u64,
    /// After: what was asked for, rounded up to a cluster.
    pub new: u64,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// So many bytes.
    To(u64),
    /// So many bytes more than there are.
    By(u64),
    /// So many bytes, which are fewer than there are: who asks vouches that nobody wants what is
    /// behind them.
    Down(u64),
}

impl Wanted {
    /// What that is for a disk that has so many bytes now.
    pub fn of(self, now: u64) -> Result<NewSize> {
        match self {
            Self::To(size) => Ok(NewSize::Larger(size)),
            Self::Down(size) => Ok(NewSize::Smaller(size)),
            Self::By(more) => now
                .checked_add(more)
                .map(NewSize::Larger)
                .ok_or_else(|| Error::invalid(format!("{more} bytes more are too many"))),
        }
    }
}

/// Gives a disk another size that is not attached.
pub async fn offline<F: Folder>(folder: &F, wanted: Wanted) -> Result<Sizes> {
    let old = change::settle(folder).await?;
    let image = layers::image(&old, old.top())?;
    if let Wanted::Down(size) = wanted {
        refuse_lower(folder, &old, size).await?;
    }
    let open = async || layers::open_write(folder, &old, &image).await;
    let sizes = grow_file(open, wanted)
        .await
        .map_err(|e| e.at(&image.file))?;
    describe(folder, &old, sizes.new).await?;
    Ok(sizes)
}

/// The same of a disk that is one file. The caller holds its locks.
pub async fn bare(dir: impl AsFd, chain: &Chain, wanted: Wanted) -> Result<Sizes> {
    let top = chain.top();
    if top.format == Format::Qcow2 {
        return qcow2(dir.as_fd(), top, wanted).await;
    }
    let store = open::alone(dir, top)?;
    let open = async || {
        let ledger = Ledger::local();
        delta::write(store.clone(), top.format, chain.cluster, ledger).await
    };
    let grown = grow_file(open, wanted).await;
    // What was asked of the file lands before its lock goes.
    store.settle().await;
    grown.map_err(|e| e.at(top.display()))
}

/// The same of a qcow2 image, which is not opened for it, and of its external data file. What it stands on
/// says what is possible.
async fn qcow2(dir: BorrowedFd<'_>, top: &LayerFile, wanted: Wanted) -> Result<Sizes> {
    let name = Path::new(&top.name);
    let stack = backing::open_read(dir, name, Cache::Writeback).await?;
    let old = stack.top().geometry().size;
    let to = wanted.of(old)?;
    let place = |e: Error| e.at(top.display());
    let new = stack.resized(to).map_err(place)?;
    drop(stack);
    // A smaller size may have been cut, and goes on.
    if new == old && matches!(to, NewSize::Larger(_)) {
        return Ok(Sizes { old, new });
    }
    let store = open::alone(dir, top)?;
    let before = store.info().len;
    let header = qcow2::read_header(&store).await.map_err(place)?;
    let data = backing::open_data(dir, name, &header, open::PATIENCE).map_err(place)?;
    let resized = qcow2::resize::resize(&store, data.as_ref(), to.bytes(), &mut ()).await;
    if resized.as_ref().is_err_and(|e| e.kind() == Kind::NoSpace)
        && let Err(e) = qcow2::check::give_back(&store, before).await
    {
        tracing::warn!("clusters are leaked, which `check --repair` returns: {e}");
    }
    store.settle().await;
    if let Some(data) = data {
        data.settle().await;
    }
    let new = resized.map_err(place)?;
    Ok(Sizes { old, new })
}

/// Refuses a size that a delta below the top exceeds.
async fn refuse_lower<F: Folder>(folder: &F, disk: &Descriptor, size: u64) -> Result<()> {
    let mut layers = Vec::new();
    for image in disk.chain(disk.top())? {
        layers.push(layers::open_read(folder, disk, &image).await?);
    }
    Stack::new(layers)?
        .resized(NewSize::Smaller(size))
        .map(drop)
}

/// Opens a file for writing, gives it another size and closes it.
async fn grow_file<S: Store + Clone>(
    open: impl AsyncFn() -> Result<AnyLayer<S>>,
    wanted: Wanted,
) -> Result<Sizes> {
    let mut top = open().await?;
    let old = top.geometry().size;
    let grown = match wanted.of(old) {
        Ok(to) => top.resize(to).await,
        Err(e) => Err(e),
    };
    if let Err(e) = grown {
        drop(top);
        // As it was, but in use: what cannot be closed is with the next command. So is one whose storage
        // failed: the page cache may believe in what that never got, and closing cuts the file.
        let intact = matches!(e.kind(), Kind::NoSpace | Kind::Invalid | Kind::Unsupported);
        if intact && let Ok(top) = open().await {
            let _ = top.close().await;
        }
        return Err(e);
    }
    let new = top.geometry().size;
    top.close().await?;
    Ok(Sizes { old, new })
}

/// Has the descriptor say how large the disk is, if it does not yet. `old` is what
/// [`change::settle`] gave.
pub async fn describe<F: Folder>(
    folder: &F,
    old: &Descriptor,
    size: u64,
) -> std::result::Result<(), Uncommitted> {
    if change::size(old) == size {
        return Ok(());
    }
    let announced = match described(old, size) {
        Ok(new) => Change::announce(folder, old, new).await,
        Err(e) => Err(e),
    };
    let committed = announced.map_err(Uncommitted::Old)?.commit().await;
    committed.map(|_| ())
}

/// The descriptor of the same disk with another size.
fn described(old: &Descriptor, size: u64) -> Result<Descriptor> {
    let sectors = size / SECTOR;
    let (heads, track, cylinders) = chs(sectors);
    // What it loses takes no space of what is left.
    let alone = old.base().guid == old.top() && sectors > old.sectors();
    old.edit(|edit| {
        let chs = Chs {
            cylinders: u64::from(cylinders),
            heads: u64::from(heads),
            sectors: u64::from(track),
        };
        edit.set_size(sectors, chs)?;
        match alone {
            true => edit.set_preallocated(false),
            false => Ok(()),
        }
    })
}
