//! Merge: a delta is copied into the one below it, and takes its place.
//!
//! In order:
//!
//! 1. The lower delta is marked temporary, by a change of its own: from now on it is no point that
//!    anybody may go to, and its content no promise. What is read through the upper one is the same
//!    throughout, because the upper one has everything that is changed below, or what is changed reads as it
//!    did ([`super::parts`]).
//! 2. The lower one is grown to the size of the upper one, the upper one is copied into it, and it is
//!    closed. Nobody may have it open meanwhile whose clusters growing moves.
//! 3. The change in which the upper one has the lower one's file and parent is committed. The upper
//!    one's old file goes.
//!
//! Cut anywhere, the same may be begun again: step 2 writes the same once more.

use super::parts::{Rest, may_have_parts};
use super::{copy, layers};
use crate::image::change::{self, Change};
use crate::image::delta;
use crate::stack::AnyLayer;
use ploop_formats::descriptor::{Descriptor, ImageRef, Mark};
use ploop_formats::folder::{Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};

/// Merges the only delta that stands on `lower` into it, on a disk that is not attached.
pub async fn offline<F: Folder>(
    folder: &F,
    lower: Guid,
    work: &mut copy::Work<'_>,
) -> Result<Descriptor> {
    let old = change::settle(folder).await?;
    if only_child(&old, lower)? == old.top() {
        layers::seal(folder, &old).await?;
    }
    let prepared = prepare(folder, &old, lower, Readers::Nobody, work).await?;
    Ok(prepared.commit().await?)
}

/// Who reads a delta while another one is merged into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Nobody.
    Nobody,
    /// A running disk, which knows where its clusters are.
    Disk,
}

/// Steps 1 and 2, and all of step 3 but its commit. What stands on `lower` is closed. `old` is what
/// [`change::settle`] gave.
pub async fn prepare<'f, F: Folder>(
    folder: &'f F,
    old: &Descriptor,
    lower: Guid,
    readers: Readers,
    work: &mut copy::Work<'_>,
) -> Result<Change<'f, F>> {
    let below = layers::image(old, lower)?;
    let above = layers::image(old, only_child(old, lower)?)?;
    let child = layers::open_read(folder, old, &above).await?;
    layers::refuse_unclosed(&child, &above)?;
    let rest = rest(folder, old, lower, &child).await?;
    let marked = claim(folder, old, lower, &child, readers).await?;
    let new = marked.dissolved(lower)?;
    let filled = async {
        let mut target = open_target(folder, &marked, &below).await?;
        let grown = take_size(&mut target, &child).await;
        grown.map_err(|e| e.at(&below.file))?;
        let copied = copy::copy(&child, &target, &rest, work).await;
        // Also one that was cut gives the space back that it took ahead.
        let closed = target.close().await.map_err(|e| e.at(&below.file));
        copied.and(closed)
    };
    filled.await.map_err(|e| left_marked(e, lower))?;
    Change::announce(folder, &marked, new).await
}

/// What `lower` stands on, where `child` may have a part of a cluster.
async fn rest<F: Folder>(
    folder: &F,
    disk: &Descriptor,
    lower: Guid,
    child: &AnyLayer<F::File>,
) -> Result<Rest<F::File>> {
    let mut below = Vec::new();
    if may_have_parts(child) {
        let mut chain = disk.chain(lower)?;
        chain.pop();
        for image in chain {
            below.push(layers::open_read(folder, disk, &image).await?);
        }
    }
    Rest::new(below)
}

/// Step 1: `lower` can take in `child`, is marked, and no other disk has its file. The descriptor
/// that says so.
pub async fn claim<F: Folder>(
    folder: &F,
    old: &Descriptor,
    lower: Guid,
    child: &AnyLayer<F::File>,
    readers: Readers,
) -> Result<Descriptor> {
    let below = layers::image(old, lower)?;
    refuse_shared(folder, &below.file).await?;
    let judged = layers::open_read(folder, old, &below).await?;
    refuse_size(&judged, child, readers).map_err(|e| e.at(&below.file))?;
    if old.shot(lower).is_some_and(|shot| shot.mark.is_some()) {
        // Cut in the middle, it may say that it is in use. A clone never has what is marked.
        return Ok(old.clone());
    }
    layers::refuse_unclosed(&judged, &below)?;
    drop(judged);
    let marked = old.marked(lower, Some(Mark::Temporary))?;
    let change = Change::announce(folder, old, marked).await?;
    let marked = change.commit().await?;
    // A clone looks for the mark after it has made its links, we for links after the mark.
    if let Err(e) = refuse_shared(folder, &below.file).await {
        let unmark = Change::announce(folder, &marked, old.clone()).await?;
        unmark.commit().await?;
        return Err(e);
    }
    Ok(marked)
}

/// Says what is left of a point that could not be merged away.
pub fn left_marked(e: Error, lower: Guid) -> Error {
    let left = format!(
        "{e}; {} is temporary now and cannot be gone back to; the same command goes on with it",
        lower.bare()
    );
    Error::new(e.kind(), left)
}

/// The delta that stands on `lower`, if it is one.
pub fn only_child(disk: &Descriptor, lower: Guid) -> Result<Guid> {
    let mut children = disk.children(lower);
    match (children.next(), children.next()) {
        (Some(child), None) => Ok(child.guid),
        _ => Err(Error::new(
            Kind::Busy,
            format!("{} does not carry exactly one delta", lower.bare()),
        )),
    }
}

/// Opens a marked delta to be merged into ([`delta::target`]).
pub async fn open_target<F: Folder>(
    folder: &F,
    disk: &Descriptor,
    image: &ImageRef,
) -> Result<AnyLayer<F::File>> {
    folder.set_shared(&image.file, false).await?;
    let file = folder.open(&image.file, Access::Write).await?;
    let (format, ledger) = (image.format.into(), Ledger::local());
    let opened = delta::target(file, format, disk.cluster(), ledger).await;
    opened.map_err(|e| e.at(&image.file))
}

/// What other disks read is written by nobody.
pub async fn refuse_shared<F: Folder>(folder: &F, file: &str) -> Result<()> {
    layers::refuse_names(folder, file, |n| {
        let what = format!(
            "{file}: {n} disks share it, so nothing may be merged into it (or a `replace` was cut that \
             moved it here, and its old name is to be removed)"
        );
        Error::new(Kind::Busy, what)
    })
    .await
}

/// A delta that was made before the disk grew is as large as the one that it takes in.
pub async fn take_size<S: Store + Clone>(
    lower: &mut AnyLayer<S>,
    upper: &AnyLayer<S>,
) -> Result<()> {
    let size = upper.geometry().size;
    match lower.geometry().size < size {
        true => lower.grow(size).await,
        false => Ok(()),
    }
}

/// Whether a delta can take in another one, by the clusters and sizes of the two.
fn refuse_size<S: Store>(lower: &AnyLayer<S>, upper: &AnyLayer<S>, readers: Readers) -> Result<()> {
    let (was, is) = (lower.geometry(), upper.geometry());
    if was.cluster != is.cluster {
        return Err(Error::damaged(
            "its clusters are not of the size of those above it",
        ));
    }
    if was.size >= is.size {
        return Ok(());
    }
    let grown = lower.grown(is.size)?;
    if grown != is.size {
        return Err(Error::unsupported(format!(
            "to take in what stands on it, it has to grow from {} to {grown} bytes, a whole cluster, \
             and the disk has {}: grow the disk to that first",
            was.size, is.size
        )));
    }
    let moves = match lower {
        AnyLayer::Ploop(ploop) => {
            ploop.header().grown(is.size)?.data_start != ploop.header().data_start
        }
        AnyLayer::Raw(_) => false,
        // Its first-level table may, and what becomes free of that is used for others.
        AnyLayer::Qcow2(_) => true,
    };
    match readers {
        Readers::Disk if moves => Err(Error::unsupported(format!(
            "made before the disk grew from {} to {} bytes; to take in what stands on it, it needs a \
             larger table, and the running disk reads what is moved for that: the same command does it \
             once the disk is detached",
            was.size, is.size
        ))),
        _ => Ok(()),
    }
}
