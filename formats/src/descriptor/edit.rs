//! Edit: the changes that operations on a disk make to its descriptor's text.
//!
//! Each step changes only the elements it names, in place; rules among them are checked once, by
//! [`super::Descriptor::edit`], when all steps are done. GUID rotation (ploop reference 2.3) is
//! made of these steps: a snapshot is `rename(top, U)`, `add(TOP, U, file)`, `set_top(TOP)`.

use super::read::View;
use super::tree::Element;
use super::{Chs, ImageType, Mark, Shot};
use crate::guid::Guid;
use crate::{Error, Kind, Result};

const PARAMETERS: &[&str] = &[
    "Disk_size",
    "Max_delta_size",
    "Cylinders",
    "Heads",
    "Sectors",
    "Padding",
    "Encryption",
];
const STORAGE: &[&str] = &["Start", "End", "Blocksize", "Preallocated", "Image"];
const IMAGE: &[&str] = &["GUID", "Type", "File"];
const SNAPSHOTS: &[&str] = &["TopGUID", "Shot"];
const SHOT: &[&str] = &[
    "GUID",
    "ParentGUID",
    "Temporary",
    "TemporaryZero",
    "TemporaryZeroSwap",
];
const ROOT: &[&str] = &["Disk_Parameters", "StorageData", "Snapshots"];

/// Nesting of the children of these elements, for indentation.
const IN_PARAMETERS: usize = 2;
const IN_STORAGE: usize = 3;
const IN_IMAGE: usize = 4;
const IN_SNAPSHOTS: usize = 2;
const IN_SHOT: usize = 3;

/// A descriptor's text under change.
#[derive(Debug)]
pub struct Edit<'a> {
    root: &'a mut Element,
}

impl<'a> Edit<'a> {
    pub(super) const fn new(root: &'a mut Element) -> Self {
        Self { root }
    }

    /// Writes out the top shot that older tools leave to be understood.
    pub(super) fn write_missing_shot(&mut self, view: &View) -> Result<()> {
        let Some(shot) = view.shots.implied() else {
            return Ok(());
        };
        self.add_shot(shot)?;
        self.set_top(shot.guid)
    }

    /// Sets the virtual size, in sectors, and the geometry stated for it.
    pub fn set_size(&mut self, sectors: u64, chs: Chs) -> Result<()> {
        let parameters = self.root.child_mut("Disk_Parameters")?;
        for (name, value) in [
            ("Disk_size", sectors),
            ("Cylinders", chs.cylinders),
            ("Heads", chs.heads),
            ("Sectors", chs.sectors),
        ] {
            parameters.put_text(IN_PARAMETERS, name, &value.to_string(), PARAMETERS);
        }
        self.storage()?
            .put_text(IN_STORAGE, "End", &sectors.to_string(), STORAGE);
        Ok(())
    }

    /// Sets or drops `Max_delta_size`.
    pub fn set_max_delta_size(&mut self, size: Option<u64>) -> Result<()> {
        let parameters = self.root.child_mut("Disk_Parameters")?;
        match size {
            None => parameters.remove(|e| e.name() == "Max_delta_size"),
            Some(size) => {
                let size = size.to_string();
                parameters.put_text(IN_PARAMETERS, "Max_delta_size", &size, PARAMETERS);
            }
        }
        Ok(())
    }

    /// Says whether the base has all its space.
    pub fn set_preallocated(&mut self, preallocated: bool) -> Result<()> {
        let storage = self.storage()?;
        if preallocated {
            storage.put_text(IN_STORAGE, "Preallocated", "1", STORAGE);
        } else {
            storage.remove(|e| e.name() == "Preallocated");
        }
        Ok(())
    }

    /// Adds an image and its shot.
    pub fn add(&mut self, guid: Guid, parent: Guid, file: &str, kind: ImageType) -> Result<()> {
        let mut image = Element::new("Image");
        image.insert(
            IN_IMAGE,
            Element::with_text("GUID", &guid.to_string()),
            IMAGE,
        );
        image.insert(IN_IMAGE, Element::with_text("Type", kind.as_str()), IMAGE);
        image.insert(IN_IMAGE, Element::with_text("File", file), IMAGE);
        self.storage()?.insert(IN_STORAGE, image, STORAGE);
        self.add_shot(&Shot {
            guid,
            parent,
            mark: None,
        })
    }

    fn add_shot(&mut self, shot: &Shot) -> Result<()> {
        let mut element = Element::new("Shot");
        element.insert(
            IN_SHOT,
            Element::with_text("GUID", &shot.guid.to_string()),
            SHOT,
        );
        element.insert(
            IN_SHOT,
            Element::with_text("ParentGUID", &shot.parent.to_string()),
            SHOT,
        );
        self.snapshots()?.insert(IN_SNAPSHOTS, element, SNAPSHOTS);
        Ok(())
    }

    /// Removes an image and its shot. Children and the top must be looked after by other steps.
    pub fn remove(&mut self, guid: Guid) -> Result<()> {
        self.image(guid)?;
        self.storage()?
            .remove(|e| e.name() == "Image" && holds(e, "GUID", guid));
        self.snapshots()?
            .remove(|e| e.name() == "Shot" && holds(e, "GUID", guid));
        Ok(())
    }

    /// Gives an image and its shot another GUID, wherever it is used: children and top included.
    pub fn rename(&mut self, from: Guid, to: Guid) -> Result<()> {
        self.image(from)?;
        for image in self
            .storage()?
            .elements_mut()
            .filter(|e| e.name() == "Image")
        {
            replace(image, "GUID", from, to)?;
        }
        let snapshots = self.snapshots()?;
        for shot in snapshots.elements_mut().filter(|e| e.name() == "Shot") {
            replace(shot, "GUID", from, to)?;
            replace(shot, "ParentGUID", from, to)?;
        }
        if holds(snapshots, "TopGUID", from) {
            replace(snapshots, "TopGUID", from, to)?;
        }
        Ok(())
    }

    /// Moves a shot onto another parent.
    pub fn set_parent(&mut self, guid: Guid, parent: Guid) -> Result<()> {
        self.shot(guid)?
            .child_mut("ParentGUID")?
            .set_text(&parent.to_string());
        Ok(())
    }

    /// Says which file holds an image.
    pub fn set_file(&mut self, guid: Guid, file: &str) -> Result<()> {
        self.image(guid)?.child_mut("File")?.set_text(file);
        Ok(())
    }

    /// Says of which type an image is.
    pub fn set_type(&mut self, guid: Guid, kind: ImageType) -> Result<()> {
        self.image(guid)?.child_mut("Type")?.set_text(kind.as_str());
        Ok(())
    }

    /// Marks a shot temporary, or ordinary again.
    pub fn set_mark(&mut self, guid: Guid, mark: Option<Mark>) -> Result<()> {
        let shot = self.shot(guid)?;
        shot.remove(|e| Mark::ALL.iter().any(|mark| mark.as_str() == e.name()));
        if let Some(mark) = mark {
            shot.insert(IN_SHOT, Element::new(mark.as_str()), SHOT);
        }
        Ok(())
    }

    /// Says which shot is the writable top.
    pub fn set_top(&mut self, guid: Guid) -> Result<()> {
        self.snapshots()?
            .put_text(IN_SNAPSHOTS, "TopGUID", &guid.to_string(), SNAPSHOTS);
        Ok(())
    }

    fn storage(&mut self) -> Result<&mut Element> {
        self.root.child_mut("StorageData")?.child_mut("Storage")
    }

    fn snapshots(&mut self) -> Result<&mut Element> {
        if self.root.child("Snapshots")?.is_none() {
            self.root.insert(1, Element::new("Snapshots"), ROOT);
        }
        self.root.child_mut("Snapshots")
    }

    fn image(&mut self, guid: Guid) -> Result<&mut Element> {
        find(self.storage()?, "Image", guid)
    }

    fn shot(&mut self, guid: Guid) -> Result<&mut Element> {
        find(self.snapshots()?, "Shot", guid)
    }
}

fn guid_in(element: &Element, name: &str) -> Option<Guid> {
    let text = element.child(name).ok()??.text().ok()?;
    Guid::parse(text.trim()).ok()
}

fn holds(element: &Element, name: &str, guid: Guid) -> bool {
    guid_in(element, name) == Some(guid)
}

fn replace(element: &mut Element, name: &str, from: Guid, to: Guid) -> Result<()> {
    if holds(element, name, from) {
        element.child_mut(name)?.set_text(&to.to_string());
    }
    Ok(())
}

fn find<'e>(parent: &'e mut Element, name: &str, guid: Guid) -> Result<&'e mut Element> {
    parent
        .elements_mut()
        .find(|e| e.name() == name && holds(e, "GUID", guid))
        .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no snapshot {guid}")))
}
