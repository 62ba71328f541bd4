//! Layers: opening the deltas of a disk that is not attached, each by its stated type.

use super::parts::may_have_parts;
use crate::image::change::Shape;
use crate::image::delta;
use crate::stack::AnyLayer;
use ploop_formats::descriptor::{Descriptor, ImageRef};
use ploop_formats::folder::{Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::header::Version;
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};

/// Refuses, in the words of `refusal`, a file that has several names: who knows another one may read
/// or write it.
pub async fn refuse_names<F: Folder>(
    folder: &F,
    file: &str,
    refusal: impl FnOnce(u64) -> Error,
) -> Result<()> {
    match folder.links(file).await? {
        None => Err(Error::new(Kind::NotFound, format!("{file}: no such file"))),
        Some(0 | 1) => Ok(()),
        Some(names) => Err(refusal(names)),
    }
}

/// Opens a delta for reading.
pub async fn open_read<F: Folder>(
    folder: &F,
    disk: &Descriptor,
    image: &ImageRef,
) -> Result<AnyLayer<F::File>> {
    let file = folder.open(&image.file, Access::Read).await?;
    let opened = delta::read(file, image.format.into(), disk.cluster()).await;
    opened.map_err(|e| e.at(&image.file))
}

/// Opens the top for writing, after whatever end.
pub async fn open_write<F: Folder>(
    folder: &F,
    disk: &Descriptor,
    image: &ImageRef,
) -> Result<AnyLayer<F::File>> {
    let file = folder.open(&image.file, Access::Write).await?;
    let (format, ledger) = (image.format.into(), Ledger::local());
    let opened = delta::write(file, format, disk.cluster(), ledger).await;
    opened.map_err(|e| e.at(&image.file))
}

/// The image of a shot and how to open it.
pub fn image(disk: &Descriptor, shot: Guid) -> Result<ImageRef> {
    let mut chain = disk.chain(shot)?;
    chain
        .pop()
        .ok_or_else(|| Error::damaged("a chain without images"))
}

/// Closes the top of a disk that is not attached, so that it may be frozen: an unclean end is
/// recovered.
pub async fn seal<F: Folder>(folder: &F, disk: &Descriptor) -> Result<()> {
    let top = image(disk, disk.top())?;
    let layer = open_write(folder, disk, &top).await?;
    layer.close().await.map_err(|e| e.at(&top.file))
}

/// What a delta is itself.
pub fn shape_of<S: Store>(layer: &AnyLayer<S>) -> Shape {
    Shape {
        version: match layer {
            AnyLayer::Ploop(ploop) => ploop.header().version,
            AnyLayer::Raw(_) | AnyLayer::Qcow2(_) => Version::V2,
        },
        size: layer.geometry().size,
        subclusters: may_have_parts(layer),
    }
}

/// Snapshots that a qcow2 image keeps in itself.
pub fn inner_snapshots<S: Store>(layer: &AnyLayer<S>) -> u64 {
    match layer {
        AnyLayer::Qcow2(image) => u64::from(image.header().snapshots.count),
        AnyLayer::Ploop(_) | AnyLayer::Raw(_) => 0,
    }
}

/// What a delta above `shot` has to be, once all layers below it are fit to be read.
pub async fn shape_above<F: Folder>(folder: &F, disk: &Descriptor, shot: Guid) -> Result<Shape> {
    let mut shape = Shape {
        version: Version::V2,
        size: super::super::change::size(disk),
        subclusters: false,
    };
    for image in disk.chain(shot)? {
        let layer = open_read(folder, disk, &image).await?;
        let geometry = layer.geometry();
        if geometry.cluster != disk.cluster() {
            return Err(Error::damaged(format!(
                "{}: clusters of {} bytes, where the descriptor says {}",
                image.file,
                geometry.cluster.bytes(),
                disk.cluster().bytes()
            )));
        }
        shape.size = shape.size.max(geometry.size);
        shape.subclusters = may_have_parts(&layer);
        match &layer {
            AnyLayer::Ploop(ploop) => shape.version = ploop.header().version,
            AnyLayer::Raw(_) => refuse_ragged(&image, geometry.size, disk)?,
            AnyLayer::Qcow2(_) => {}
        }
        if shot != disk.top() {
            refuse_unclosed(&layer, &image)?;
        }
    }
    Ok(shape)
}

/// Nothing can stand on a raw image that ends within a cluster (ploop reference 1.8).
fn refuse_ragged(image: &ImageRef, size: u64, disk: &Descriptor) -> Result<()> {
    let cluster = disk.cluster();
    match cluster.within(size) {
        0 => Ok(()),
        _ => Err(Error::unsupported(format!(
            "{}: a raw image of {size} bytes, which is no multiple of its cluster ({} bytes), \
             carries no snapshot; lengthen it with truncate(1)",
            image.file,
            cluster.bytes()
        ))),
    }
}

/// A frozen delta that was not closed may lack what stands on it was written over.
pub fn refuse_unclosed<S: Store>(layer: &AnyLayer<S>, image: &ImageRef) -> Result<()> {
    match delta::is_unclosed(layer) {
        true => Err(Error::damaged(format!(
            "{}: this frozen delta was not closed; check it first",
            image.file
        ))),
        false => Ok(()),
    }
}
