//! Deltas by themselves, as somebody finds them who looks at one file and knows nothing of a disk:
//! what each holds, and in which format version.

use crate::image::change::read;
use crate::image::convert::version::Deltas;
use crate::image::target::DESCRIPTOR;
use bytes::BytesMut;
use ploop_formats::descriptor::{Descriptor, ImageType};
use ploop_formats::folder::{Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::ploop::convert::state;
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::store::Store;
use ploop_formats::store::sim::SimFolder;
use ploop_formats::testkit::exec::now;
use ploop_formats::{Kind, Result, buf};
use std::collections::BTreeMap;

/// The clusters of a delta; none where it has none.
pub type Delta = Vec<Option<BytesMut>>;

/// What each ploop delta of a disk holds.
pub fn all(folder: &SimFolder, disk: &Descriptor) -> BTreeMap<String, Delta> {
    let files = Deltas::of(disk).expect("a disk");
    let held = |file: &str| now(held(folder, file)).expect("a delta");
    folder.sim().instant(true);
    let all = files.names().map(|file| (file.into(), held(file)));
    let all = all.collect();
    folder.sim().instant(false);
    all
}

async fn held(folder: &SimFolder, file: &str) -> Result<Delta> {
    let layer = Ploop::open_read(folder.open(file, Access::Read).await?).await?;
    let geometry = layer.geometry();
    let (cluster, mut clusters) = (geometry.cluster.bytes(), Vec::new());
    for at in (0..geometry.size).step_by(cluster as usize) {
        clusters.push(match layer.map(at, cluster).await? {
            Extent::Data { at, .. } => {
                let bytes = buf::aligned(cluster as usize);
                Some(layer.store().read_at(at, bytes).await?)
            }
            _ => None,
        });
    }
    Ok(clusters)
}

/// Each of these deltas is refused as one that is being converted, or holds what it held.
pub fn nobody_is_misled(
    folder: &SimFolder,
    deltas: &BTreeMap<String, Delta>,
) -> std::result::Result<(), String> {
    for (file, was) in deltas {
        match now(held(folder, file)) {
            Ok(is) if is == *was => {}
            Ok(_) => return Err(format!("{file} is opened and reads as something else")),
            Err(e) if e.kind() == Kind::Damaged && e.to_string().contains("conversion") => {}
            Err(e) => return Err(format!("{file}: {e}")),
        }
    }
    Ok(())
}

/// All deltas of the disk have the same format version, and this one where it is given. Above a base
/// that has none each branch may have its own.
pub fn have_one_version(
    folder: &SimFolder,
    wanted: Option<Version>,
) -> std::result::Result<(), String> {
    let disk = now(read(folder, DESCRIPTOR)).map_err(|e| e.to_string())?;
    let found = versions(folder, &disk)?;
    let base = disk.image(disk.base().guid).map(|image| image.kind);
    if wanted.is_none() && base != Some(ImageType::Compressed) {
        return Ok(());
    }
    let first = wanted.or(found.first().copied());
    match found.iter().all(|version| Some(*version) == first) {
        true => Ok(()),
        false => Err(format!("format versions {found:?}, not all {first:?}")),
    }
}

/// The version that a disk's deltas have not, if it has any.
pub fn other_version(folder: &SimFolder, disk: &Descriptor) -> Option<Version> {
    folder.sim().instant(true);
    let found = versions(folder, disk).ok();
    folder.sim().instant(false);
    found?.first().map(|version| match version {
        Version::V1 => Version::V2,
        Version::V2 => Version::V1,
    })
}

fn versions(folder: &SimFolder, disk: &Descriptor) -> std::result::Result<Vec<Version>, String> {
    let files = Deltas::of(disk).map_err(|e| e.to_string())?;
    let version = async |file: &str| state(&folder.open(file, Access::Read).await?).await;
    let version = |file| Ok(now(version(file)).map_err(|e| e.to_string())?.0);
    files.names().map(version).collect()
}

/// The descriptor of a disk that is one file.
pub fn top_only(disk: &Descriptor, file: &str) -> Result<Descriptor> {
    let shots = disk.shots().iter().map(|shot| shot.guid);
    disk.edit(|e| {
        for guid in shots.filter(|guid| *guid != disk.top()) {
            e.remove(guid)?;
        }
        e.set_parent(disk.top(), Guid::NONE)?;
        e.set_file(disk.top(), file)
    })
}
