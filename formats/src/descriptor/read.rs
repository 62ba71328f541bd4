//! Read: the typed view of a descriptor's tree, which exists only when all rules hold.
//!
//! Owns what each element may contain; the rules among shots are in `shots`. Changes nothing.

use super::shots::Shots;
use super::tree::Element;
use super::{Chs, Image, ImageType, Mark, Shot};
use crate::guid::Guid;
use crate::units::{ClusterSize, SECTOR};
use crate::{Error, Result, limits};
use std::collections::HashSet;

/// What a descriptor means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    pub(super) sectors: u64,
    pub(super) cluster: ClusterSize,
    pub(super) preallocated: bool,
    pub(super) max_delta_size: Option<u64>,
    pub(super) chs: Option<Chs>,
    pub(super) has_volume: bool,
    pub(super) images: Vec<Image>,
    pub(super) shots: Shots,
}

impl View {
    pub(super) fn read(root: &Element) -> Result<Self> {
        let parameters = root.required("Disk_Parameters")?;
        let data = root.required("StorageData")?;
        let storage = only_storage(data)?;
        let images = images(storage)?;
        let shots = shots(root.child("Snapshots")?, &images)?;
        Ok(Self {
            sectors: sectors(parameters)?,
            cluster: cluster(storage)?,
            preallocated: number(storage, "Preallocated")?.unwrap_or(0) != 0,
            max_delta_size: number(parameters, "Max_delta_size")?,
            chs: chs(parameters)?,
            has_volume: data.child("Volume")?.is_some(),
            images,
            shots,
        })
    }
}

/// The number in a child, if there is one; an empty child counts as none.
fn number(parent: &Element, name: &str) -> Result<Option<u64>> {
    let Some(child) = parent.child(name)? else {
        return Ok(None);
    };
    let text = child.text()?;
    match text.trim() {
        "" => Ok(None),
        digits => digits
            .parse()
            .map(Some)
            .map_err(|e| Error::damaged(format!("element {name}: {digits:?}: {e}"))),
    }
}

fn required_number(parent: &Element, name: &str) -> Result<u64> {
    parent.required(name)?;
    number(parent, name)?.ok_or_else(|| Error::damaged(format!("element {name} is empty")))
}

fn sectors(parameters: &Element) -> Result<u64> {
    let sectors = required_number(parameters, "Disk_size")?;
    if sectors == 0 || sectors > limits::SIZE_MAX / SECTOR {
        return Err(Error::damaged(format!(
            "Disk_size of {sectors} sectors is not a disk"
        )));
    }
    Ok(sectors)
}

fn cluster(storage: &Element) -> Result<ClusterSize> {
    let sectors = required_number(storage, "Blocksize")?;
    ClusterSize::new(sectors.saturating_mul(SECTOR))
        .map_err(|e| Error::damaged(format!("Blocksize of {sectors} sectors: {e}")))
}

fn chs(parameters: &Element) -> Result<Option<Chs>> {
    let part = |name| number(parameters, name);
    let (cylinders, heads, sectors) = (part("Cylinders")?, part("Heads")?, part("Sectors")?);
    Ok(match (cylinders, heads, sectors) {
        (Some(cylinders), Some(heads), Some(sectors)) => Some(Chs {
            cylinders,
            heads,
            sectors,
        }),
        _ => None,
    })
}

/// The one storage: a disk split into several has its halves in files of their own.
fn only_storage(data: &Element) -> Result<&Element> {
    if data.elements().filter(|e| e.name() == "Storage").count() > 1 {
        return Err(Error::unsupported(
            "the disk is split into several Storage elements; join it with the tool that made it",
        ));
    }
    let storage = data.required("Storage")?;
    match number(storage, "Start")? {
        None | Some(0) => Ok(storage),
        Some(start) => Err(Error::unsupported(format!(
            "the Storage element starts at sector {start}: a part of a split disk"
        ))),
    }
}

fn images(storage: &Element) -> Result<Vec<Image>> {
    let images: Vec<Image> = storage
        .elements()
        .filter(|e| e.name() == "Image")
        .map(image)
        .collect::<Result<_>>()?;
    let (mut guids, mut files) = (HashSet::new(), HashSet::new());
    for image in &images {
        if !guids.insert(image.guid) {
            return Err(Error::damaged(format!(
                "two images have the GUID {}",
                image.guid
            )));
        }
        // Two layers in one file would overwrite each other.
        if !files.insert(canonical(&image.file)) {
            return Err(Error::damaged(format!(
                "two images name the file {:?}",
                image.file
            )));
        }
    }
    Ok(images)
}

fn image(element: &Element) -> Result<Image> {
    let guid = guid(element, "GUID")?;
    let place = |e: Error| e.at(format_args!("image {guid}"));
    let kind = element
        .required("Type")
        .and_then(|e| e.text())
        .map_err(place)?;
    let kind = match kind.trim() {
        "Compressed" => ImageType::Compressed,
        "Plain" => ImageType::Plain,
        "QCow2" => ImageType::QCow2,
        other => {
            return Err(Error::unsupported(format!(
                "image {guid}: type {other:?} is neither Compressed nor Plain nor QCow2"
            )));
        }
    };
    let file = element
        .required("File")
        .and_then(|e| e.text())
        .map_err(place)?;
    check_file_name(&file).map_err(place)?;
    Ok(Image { guid, kind, file })
}

/// The rules of syntax for a file name; whether it stays beneath the disk's directory, links
/// included, is decided where it is opened.
pub(super) fn check_file_name(file: &str) -> Result<()> {
    let rule = if file.is_empty() {
        "is empty"
    } else if file.contains(char::is_control) {
        "contains a control character, which XML cannot carry"
    } else if file.starts_with('/') {
        "is absolute: images live beneath the directory of their descriptor"
    } else if file.split('/').any(|part| part == "..") {
        "leaves the directory of its descriptor by .."
    } else if canonical(file).is_empty() {
        "names a directory"
    } else {
        return Ok(());
    };
    Err(Error::damaged(format!("file name {file:?} {rule}")))
}

/// A file name without its empty and `.` components.
pub(super) fn canonical(file: &str) -> String {
    let parts: Vec<&str> = file
        .split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    parts.join("/")
}

fn guid(parent: &Element, name: &str) -> Result<Guid> {
    let text = parent.required(name)?.text()?;
    Guid::parse(text.trim())
        .map_err(|e| Error::damaged(format!("element {}/{name}: {e}", parent.name())))
}

fn shots(snapshots: Option<&Element>, images: &[Image]) -> Result<Shots> {
    let Some(snapshots) = snapshots else {
        return Shots::new(Vec::new(), None, images);
    };
    let top = match snapshots.child("TopGUID")? {
        Some(_) => Some(guid(snapshots, "TopGUID")?),
        None => None,
    };
    let shots: Vec<Shot> = snapshots
        .elements()
        .filter(|e| e.name() == "Shot")
        .map(shot)
        .collect::<Result<_>>()?;
    Shots::new(shots, top, images)
}

fn shot(element: &Element) -> Result<Shot> {
    let guid_of = |name| guid(element, name);
    let mut marks = Mark::ALL
        .into_iter()
        .filter(|mark| element.elements().any(|e| e.name() == mark.as_str()));
    let shot = Shot {
        guid: guid_of("GUID")?,
        parent: guid_of("ParentGUID")?,
        mark: marks.next(),
    };
    match marks.next() {
        None => Ok(shot),
        Some(_) => Err(Error::damaged(format!(
            "shot {} has more than one Temporary mark",
            shot.guid
        ))),
    }
}
