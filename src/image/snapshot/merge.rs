//! Merge: a delta is copied into the one below it, and takes its place.
//!
//! In order:
//!
//! 1. The lower delta is marked temporary, by a change of its own: from now on it is no point that
//!    anybody may go to, and its content no promise. What is read through the upper one is the same
//!    throughout, because the upper one has everything that is changed below.
//! 2. The upper one is copied into it, and it is closed.
//! 3. The change in which the upper one has the lower one's file and parent is committed. The upper
//!    one's old file goes.
//!
//! Cut anywhere, the same may be begun again: step 2 writes the same once more.

use super::{copy, layers};
use crate::image::change::{self, Change};
use crate::stack::AnyLayer;
use ploop_formats::descriptor::{Descriptor, ImageRef, LayerFormat, Mark};
use ploop_formats::folder::{Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Ploop;
use ploop_formats::raw::Raw;
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
    Ok(prepare(folder, &old, lower, work).await?.commit().await?)
}

/// Steps 1 and 2, and all of step 3 but its commit. What stands on `lower` is closed. `old` is what
/// [`change::settle`] gave.
pub async fn prepare<'f, F: Folder>(
    folder: &'f F,
    old: &Descriptor,
    lower: Guid,
    work: &mut copy::Work<'_>,
) -> Result<Change<'f, F>> {
    let below = layers::image(old, lower)?;
    let above = layers::image(old, only_child(old, lower)?)?;
    refuse_shared(folder, &below.file).await?;
    let child = layers::open_read(folder, old, &above).await?;
    let judged = layers::open_read(folder, old, &below).await?;
    layers::refuse_unclosed(&judged, &below)?;
    layers::refuse_unclosed(&child, &above)?;
    refuse_smaller(&judged, &child, &below)?;
    drop(judged);
    let marked = match old.shot(lower).and_then(|shot| shot.mark) {
        Some(_) => old.clone(),
        None => {
            let marked = old.marked(lower, Some(Mark::Temporary))?;
            Change::announce(folder, old, marked)
                .await?
                .commit()
                .await?
        }
    };
    let new = marked.dissolved(lower)?;
    // A clone looks for the mark after it has made its links, we for links after the mark.
    if let Err(e) = refuse_shared(folder, &below.file).await {
        if marked != *old {
            let unmark = Change::announce(folder, &marked, old.clone()).await?;
            unmark.commit().await?;
        }
        return Err(e);
    }
    let filled = async {
        let target = open_target(folder, &marked, &below).await?;
        let copied = copy::copy(&child, &target, work).await;
        // Also one that was cut gives the space back that it took ahead.
        let closed = target.close().await.map_err(|e| e.at(&below.file));
        copied.and(closed)
    };
    filled.await.map_err(|e| left_marked(e, lower))?;
    Change::announce(folder, &marked, new).await
}

/// Says what is left of a point that could not be merged away.
fn left_marked(e: Error, lower: Guid) -> Error {
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

/// Opens a marked delta to be merged into. It does not say that it is in use: it is below others,
/// and a merge that is cut leaves it as good as it was.
pub async fn open_target<F: Folder>(
    folder: &F,
    disk: &Descriptor,
    image: &ImageRef,
) -> Result<AnyLayer<F::File>> {
    folder.set_shared(&image.file, false).await?;
    let file = folder.open(&image.file, Access::Write).await?;
    let opened = match image.format {
        LayerFormat::Raw => {
            Raw::open_write(file, disk.cluster(), Ledger::local()).map(AnyLayer::Raw)
        }
        _ => Ploop::open_target(file).await.map(AnyLayer::Ploop),
    };
    opened.map_err(|e| e.at(&image.file))
}

/// What other disks read is written by nobody.
pub async fn refuse_shared<F: Folder>(folder: &F, file: &str) -> Result<()> {
    match folder.links(file).await? {
        None => Err(Error::new(Kind::NotFound, format!("{file}: no such file"))),
        Some(0 | 1) => Ok(()),
        Some(n) => Err(Error::new(
            Kind::Busy,
            format!("{file}: {n} disks share it, so nothing may be merged into it"),
        )),
    }
}

fn refuse_smaller<S: ploop_formats::store::Store>(
    lower: &AnyLayer<S>,
    upper: &AnyLayer<S>,
    image: &ImageRef,
) -> Result<()> {
    if lower.geometry().cluster != upper.geometry().cluster {
        return Err(Error::damaged(format!(
            "{}: its clusters are not of the size of those above it",
            image.file
        )));
    }
    let (lower, upper) = (lower.geometry().size, upper.geometry().size);
    if lower >= upper {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "{}: a delta of {lower} bytes, made before the disk grew, cannot take in one of {upper}",
        image.file
    )))
}
