//! Descriptor: DiskDescriptor.xml, which says which files make a disk and in which order.
//!
//! A [`Descriptor`] is a text and what it means: it exists only when all rules of ploop hold, so
//! whoever has one may trust its chains. It is changed by [`Descriptor::edit`], which gives a new
//! one or an error and never a half-changed one. It opens no file: names found inside are only
//! looked at, and resolving them beneath the disk's directory is the caller's business.
//!
//! The element names and their order are those of ploop reference 2.1 (OpenVZ/ploop `lib/xml.c`,
//! QEMU `docs/interop/prl-xml.txt`):
//!
//! ```text
//! Parallels_disk_image                 any root name is read; new files get this one
//!   Disk_Parameters
//!     Disk_size                        sectors
//!     Max_delta_size                   optional
//!     Cylinders Heads Sectors Padding
//!   StorageData
//!     Volume                           optional, its GUIDs are left alone
//!     Storage                          exactly one
//!       Start End Blocksize            sectors
//!       Preallocated                   optional, 1
//!       Image*                         GUID Type File
//!   Snapshots
//!     TopGUID
//!     Shot*                            GUID ParentGUID [Temporary...]
//! ```

mod edit;
mod read;
mod rotation;
mod shots;
mod tree;

pub use edit::Edit;

use crate::guid::Guid;
use crate::units::ClusterSize;
use crate::{Error, Kind, Result};
use quick_xml::escape::escape;
use read::View;
use tree::Document;

/// What the descriptor says of an image's format. On the upper images of a disk `Plain` means
/// nothing: ploop writes it there too, and the files are ploop images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageType {
    /// A ploop image.
    Compressed,
    /// A raw base, or a ploop image above one.
    Plain,
    /// A qcow2 image.
    QCow2,
}

impl ImageType {
    /// The text of the `Type` element.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Compressed => "Compressed",
            Self::Plain => "Plain",
            Self::QCow2 => "QCow2",
        }
    }
}

/// How the file of an image is to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerFormat {
    /// Guest bytes at their own offsets.
    Raw,
    /// A ploop delta.
    Ploop,
    /// A qcow2 image.
    Qcow2,
}

/// Why a shot is not an ordinary snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mark {
    /// To be merged away when nothing uses it.
    Temporary,
    /// A reverse merge was interrupted while it emptied table entries of the base.
    TemporaryZero,
    /// A reverse merge was interrupted while it swapped the two files.
    TemporaryZeroSwap,
}

impl Mark {
    const ALL: [Self; 3] = [
        Self::Temporary,
        Self::TemporaryZero,
        Self::TemporaryZeroSwap,
    ];

    /// The name of the empty element that says so.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Temporary => "Temporary",
            Self::TemporaryZero => "TemporaryZero",
            Self::TemporaryZeroSwap => "TemporaryZeroSwap",
        }
    }
}

/// One `Image` element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Names the image; its shot has the same.
    pub guid: Guid,
    /// Stated type.
    pub kind: ImageType,
    /// File name, relative to the descriptor's directory: not empty, not absolute, without
    /// control characters and without `..`.
    pub file: String,
}

/// One `Shot` element: a node of the snapshot tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shot {
    /// Names the shot; its image has the same.
    pub guid: Guid,
    /// The shot below; [`Guid::NONE`] for the base.
    pub parent: Guid,
    /// Temporary or not.
    pub mark: Option<Mark>,
}

/// One layer of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef {
    /// Which image.
    pub guid: Guid,
    /// How to open it.
    pub format: LayerFormat,
    /// File name, under the rules of [`Image::file`].
    pub file: String,
}

/// CHS geometry; informative, and its product need not be the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u64,
    /// Heads.
    pub heads: u64,
    /// Sectors per track.
    pub sectors: u64,
}

/// What a new disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDisk<'a> {
    /// Virtual size in sectors, not 0.
    pub sectors: u64,
    /// Cluster of its images.
    pub cluster: ClusterSize,
    /// Type of its base.
    pub kind: ImageType,
    /// File name of its base, under the rules of [`Image::file`].
    pub file: &'a str,
    /// Whether every cluster of the base has its place already.
    pub preallocated: bool,
    /// Geometry to state.
    pub chs: Chs,
}

/// A descriptor that keeps all rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    document: Document,
    view: View,
}

impl Descriptor {
    /// Reads a descriptor of any ploop generation. Fails with `Damaged` when a rule is broken and
    /// with `Unsupported` for disks split into several files.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Self::of(Document::parse(bytes)?)
    }

    /// The descriptor of a new disk with one image, which is base and top.
    pub fn new_disk(disk: &NewDisk<'_>) -> Result<Self> {
        let NewDisk { sectors, chs, .. } = disk;
        let (blocks, kind, file) = (
            disk.cluster.sectors(),
            disk.kind.as_str(),
            escape(disk.file),
        );
        let (top, none) = (Guid::TOP, Guid::NONE);
        let preallocated = if disk.preallocated {
            "\n      <Preallocated>1</Preallocated>"
        } else {
            ""
        };
        let Chs {
            cylinders,
            heads,
            sectors: track,
        } = chs;
        let text = format!(
            r#"<?xml version="1.0"?>
<Parallels_disk_image>
  <Disk_Parameters>
    <Disk_size>{sectors}</Disk_size>
    <Cylinders>{cylinders}</Cylinders>
    <Heads>{heads}</Heads>
    <Sectors>{track}</Sectors>
    <Padding>0</Padding>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>{sectors}</End>
      <Blocksize>{blocks}</Blocksize>{preallocated}
      <Image>
        <GUID>{top}</GUID>
        <Type>{kind}</Type>
        <File>{file}</File>
      </Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{top}</TopGUID>
    <Shot>
      <GUID>{top}</GUID>
      <ParentGUID>{none}</ParentGUID>
    </Shot>
  </Snapshots>
</Parallels_disk_image>
"#
        );
        // What would be damage in a file that was read is here the caller's argument.
        Self::parse(text.as_bytes()).map_err(|e| Error::invalid(e.to_string()))
    }

    fn of(document: Document) -> Result<Self> {
        let view = View::read(&document.root)?;
        Ok(Self { document, view })
    }

    /// The file's content. What was read and not changed comes back byte for byte.
    pub fn encode(&self) -> Vec<u8> {
        self.document.write().into_bytes()
    }

    /// Virtual size in sectors.
    pub fn sectors(&self) -> u64 {
        self.view.sectors
    }

    /// Cluster of the images (`Blocksize`).
    pub fn cluster(&self) -> ClusterSize {
        self.view.cluster
    }

    /// Whether the base was made with all its space.
    pub fn preallocated(&self) -> bool {
        self.view.preallocated
    }

    /// `Max_delta_size`, believed to be bytes: ploop hands it to its kernel unchanged. Others may have
    /// written 0, and meant none.
    pub fn max_delta_size(&self) -> Option<u64> {
        self.view.max_delta_size.filter(|bytes| *bytes > 0)
    }

    /// Stated geometry, when all of it is there.
    pub fn chs(&self) -> Option<Chs> {
        self.view.chs
    }

    /// All images, in the order of the file.
    pub fn images(&self) -> &[Image] {
        &self.view.images
    }

    /// All shots, in the order of the file.
    pub fn shots(&self) -> &[Shot] {
        self.view.shots.all()
    }

    /// The writable top. Usually [`Guid::TOP`]; a foreign one becomes that with the next edit.
    pub fn top(&self) -> Guid {
        self.view.shots.top()
    }

    /// The parentless shot.
    pub fn base(&self) -> &Shot {
        self.view.shots.base()
    }

    /// The image of this name, if there is one.
    pub fn image(&self, guid: Guid) -> Option<&Image> {
        self.images().iter().find(|image| image.guid == guid)
    }

    /// The shot of this name, if there is one.
    pub fn shot(&self, guid: Guid) -> Option<&Shot> {
        self.shots().iter().find(|shot| shot.guid == guid)
    }

    /// The shots right above this one.
    pub fn children(&self, guid: Guid) -> impl Iterator<Item = &Shot> {
        self.shots().iter().filter(move |shot| shot.parent == guid)
    }

    /// The images that make up the content of a shot, base first. Fails with `NotFound`.
    pub fn chain(&self, guid: Guid) -> Result<Vec<ImageRef>> {
        let mut chain = Vec::new();
        let mut next = guid;
        loop {
            let (Some(shot), Some(image)) = (self.shot(next), self.image(next)) else {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("there is no snapshot {next}"),
                ));
            };
            chain.push(layer(shot, image));
            if shot.parent.is_none() {
                chain.reverse();
                return Ok(chain);
            }
            next = shot.parent;
        }
    }

    /// A changed descriptor, or an error and no change. The closure edits the text; the result
    /// must keep all rules, whatever the steps in between looked like.
    ///
    /// Two habits of other tools end here, as they do in ploop: a missing top shot is written
    /// out, and a foreign top GUID is renamed to [`Guid::TOP`], unless the disk has a `Volume`.
    pub fn edit(&self, change: impl FnOnce(&mut Edit<'_>) -> Result<()>) -> Result<Self> {
        let mut document = self.document.clone();
        let mut edit = Edit::new(&mut document.root);
        edit.write_missing_shot(&self.view)?;
        change(&mut edit)?;
        let changed = Self::of(document)?;
        if changed.top() == Guid::TOP || changed.view.has_volume {
            return Ok(changed);
        }
        changed.with_standard_top()
    }

    fn with_standard_top(self) -> Result<Self> {
        let (foreign, mut document) = (self.top(), self.document);
        if self.view.shots.find(Guid::TOP).is_some() {
            return Err(Error::unsupported(format!(
                "the top is {foreign} while another snapshot has the GUID reserved for the top, {}",
                Guid::TOP
            )));
        }
        Edit::new(&mut document.root).rename(foreign, Guid::TOP)?;
        Self::of(document)
    }
}

/// Only the parentless image of a `Plain` disk is raw.
fn layer(shot: &Shot, image: &Image) -> ImageRef {
    let format = match image.kind {
        ImageType::QCow2 => LayerFormat::Qcow2,
        ImageType::Plain if shot.parent.is_none() => LayerFormat::Raw,
        ImageType::Plain | ImageType::Compressed => LayerFormat::Ploop,
    };
    ImageRef {
        guid: image.guid,
        format,
        file: image.file.clone(),
    }
}
