//! Clone: a new disk over the frozen deltas of another, which both have from then on.
//!
//! In order:
//!
//! 1. The clone's descriptor is written aside: it names all that may be there, so that what a killed
//!    process leaves can be removed.
//! 2. Each frozen file gets one more name, in the clone's folder. The source is looked at again.
//! 3. An empty delta is made. Three barriers at once, because none needs another: of the delta, of the
//!    descriptor, of the folder with all these names.
//! 4. The descriptor gets its name, and the folder is fsynced.
//!
//! A folder without a descriptor is no disk to anyone. The source is not changed, but that its
//! shared files are read-only from now on.
//!
//! A file with several names is written by nobody, and each disk may go or move without the others.

use super::change::{self, NEXT, fill_delta};
use super::delta;
use super::members::ASIDE;
use super::snapshot::layers;
use super::target::DESCRIPTOR;
use futures_util::future::try_join3;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder::{self, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};

/// Makes a disk in `to`, an empty folder of the same file system, over snapshot `uuid` of `from`,
/// whose descriptor is `source`, durably so. Others may change that disk meanwhile. After an error `to` is no
/// disk, and to be removed with what is in it.
pub async fn clone<F: Folder>(
    from: &F,
    source: &Descriptor,
    uuid: Guid,
    to: &F,
    random: Guid,
) -> Result<Descriptor> {
    let file = source.new_file_name(random);
    let disk = source.cloned(uuid, &file)?;
    let shape = layers::shape_above(from, source, uuid).await?;
    let aside = to.create(ASIDE).await?;
    folder::write(&aside, &disk.encode())
        .await
        .map_err(|e| e.at(ASIDE))?;
    for image in source.chain(uuid)? {
        from.set_shared(&image.file, true).await?;
        let linked = from.link(&image.file, to, &image.file).await;
        linked.map_err(|e| explain(e, &image.file))?;
    }
    // A merge looks for links after it has marked what it will write, we for marks after the links.
    refuse_changed(source, &change::read(from, DESCRIPTOR).await?, uuid)?;
    if folder::has(from, NEXT).await? {
        let what = "the disk is being changed; try again, or make a snapshot of it first";
        return Err(Error::new(Kind::Busy, what));
    }
    let delta = to.create(&file).await?;
    let delta = async {
        fill_delta(&delta, &disk, shape)
            .await
            .map_err(|e| e.at(&file))
    };
    let aside = async { aside.flush().await.map_err(|e| e.at(ASIDE)) };
    try_join3(delta, aside, to.sync()).await?;
    to.rename(ASIDE, DESCRIPTOR).await?;
    to.sync().await?;
    Ok(disk)
}

/// Refuses a source whose chain is not what it was, or is being merged.
fn refuse_changed(was: &Descriptor, is: &Descriptor, uuid: Guid) -> Result<()> {
    let is_marked = |guid| is.shot(guid).is_none_or(|shot| shot.mark.is_some());
    let chain = was.chain(uuid)?;
    match is.chain(uuid) {
        Ok(now) if now == chain && !chain.iter().any(|image| is_marked(image.guid)) => Ok(()),
        _ => Err(Error::new(
            Kind::Busy,
            format!("snapshot {} is being changed; try again", uuid.bare()),
        )),
    }
}

/// The files that a clone of snapshot `uuid` gets, when it is made with the same `random`.
pub fn files(source: &Descriptor, uuid: Guid, random: Guid) -> Result<Vec<String>> {
    let chain = source.chain(uuid)?.into_iter();
    let files = chain.map(|image| image.file);
    Ok(files.chain([source.new_file_name(random)]).collect())
}

/// The snapshot that is the disk as it is now: the top was closed, holds nothing and stands on one.
pub async fn as_it_is<F: Folder>(folder: &F, disk: &Descriptor) -> Result<Option<Guid>> {
    let top = layers::image(disk, disk.top())?;
    let parent = disk.shot(top.guid).map(|shot| shot.parent);
    let can_be_shared = |guid| disk.shot(guid).is_some_and(|shot| shot.mark.is_none());
    let Some(parent) = parent.filter(|parent| can_be_shared(*parent)) else {
        return Ok(None);
    };
    let layer = layers::open_read(folder, disk, &top).await?;
    if delta::is_unclosed(&layer) {
        return Ok(None);
    }
    let (size, mut at) = (layer.geometry().size, 0);
    while at < size {
        match layer.map(at, size - at).await? {
            Extent::Absent { len } => at += len,
            _ => return Ok(None),
        }
    }
    Ok(Some(parent))
}

fn explain(e: Error, file: &str) -> Error {
    match e.kind() {
        Kind::Exists => e,
        Kind::Unsupported => Error::unsupported(format!(
            "{e}; no more disks can share it: clone a copy of the source's directory"
        )),
        _ => e.at(format!(
            "giving {file} one more name (a clone shares its files, so it is made on the file \
             system of its source)"
        )),
    }
}
