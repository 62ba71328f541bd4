//! Chain: which files make up a disk, in which order, and in which format each is.
//!
//! Reads the descriptor and nothing else. Every name that comes out of it has passed the policy.

use super::target::{DESCRIPTOR, Format, Source};
use crate::io::beneath;
use crate::policy;
use ploop_formats::descriptor::{Descriptor, ImageRef};
use ploop_formats::guid::Guid;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Error, Kind, Result, limits};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

/// Unit of a raw image that stands alone, in bytes: nothing in the file says one.
pub const RAW_CLUSTER: u64 = 64 << 10;

/// One layer, as a file beneath the disk's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// Its name in the directory.
    pub name: OsString,
    /// Stated format.
    pub format: Format,
    /// Its name in the descriptor; none for a bare file.
    pub guid: Option<Guid>,
    /// Whether it is to be merged away: what it holds beneath the layers above it is no promise.
    pub marked: bool,
}

impl LayerFile {
    fn of(disk: &Descriptor, image: ImageRef) -> Result<Self> {
        policy::allow(&image.file)?;
        Ok(Self {
            name: image.file.into(),
            format: image.format.into(),
            guid: Some(image.guid),
            marked: disk.shot(image.guid).is_some_and(|s| s.mark.is_some()),
        })
    }

    /// Its name, for messages.
    pub fn display(&self) -> std::path::Display<'_> {
        Path::new(&self.name).display()
    }
}

/// The files of a disk.
#[derive(Debug, Clone)]
pub struct Chain {
    /// Base first; never empty.
    pub layers: Vec<LayerFile>,
    /// Unit of allocation that the descriptor states, or a raw image gets.
    pub cluster: ClusterSize,
    /// The descriptor; none for a bare file.
    pub descriptor: Option<Descriptor>,
}

impl Chain {
    /// Reads which files make up the disk in `dir`.
    pub fn read(dir: impl AsFd, source: &Source) -> Result<Self> {
        match source {
            Source::Bundle => {
                let descriptor = read_descriptor(&dir)?;
                let top = descriptor.top();
                Self::of(descriptor, top).map_err(|e| e.at(DESCRIPTOR))
            }
            Source::Bare { name, format } => {
                refuse_member(&dir, name)?;
                let layer = LayerFile {
                    name: name.clone(),
                    format: *format,
                    guid: None,
                    marked: false,
                };
                let cluster = ClusterSize::new(RAW_CLUSTER)?;
                Ok(Self {
                    layers: vec![layer],
                    cluster,
                    descriptor: None,
                })
            }
        }
    }

    /// The files that make up the content of a shot; it is the top of this chain.
    pub fn of(descriptor: Descriptor, shot: Guid) -> Result<Self> {
        let mut layers = Vec::new();
        for image in descriptor.chain(shot)? {
            layers.push(LayerFile::of(&descriptor, image)?);
        }
        if layers.len() > limits::DEPTH_MAX {
            return Err(Error::unsupported(format!(
                "{} layers, more than {}",
                layers.len(),
                limits::DEPTH_MAX
            )));
        }
        Ok(Self {
            layers,
            cluster: descriptor.cluster(),
            descriptor: Some(descriptor),
        })
    }

    /// The files of all points of the disk: these first, then those that only other points have.
    pub fn tree(&self) -> Result<Vec<LayerFile>> {
        let mut all = self.layers.clone();
        let Some(disk) = &self.descriptor else {
            return Ok(all);
        };
        let own = disk.chain(disk.top())?;
        let is_own = |guid| own.iter().any(|image| image.guid == guid);
        for image in disk.images().iter().filter(|image| !is_own(image.guid)) {
            if let Some(image) = disk.chain(image.guid)?.pop() {
                all.push(LayerFile::of(disk, image).map_err(|e| e.at(DESCRIPTOR))?);
            }
        }
        Ok(all)
    }

    /// The lowest layer.
    pub fn base(&self) -> &LayerFile {
        self.layers.first().expect("a chain has layers")
    }

    /// The writable layer.
    pub fn top(&self) -> &LayerFile {
        self.layers.last().expect("a chain has layers")
    }

    /// The layer that the top may have been about to be merged into when it was last in use.
    pub fn target(&self) -> Option<&LayerFile> {
        let below = self.layers.iter().rev().nth(1);
        below.filter(|layer| layer.marked)
    }
}

/// Reads and parses the descriptor beneath `dir`.
pub fn read_descriptor(dir: impl AsFd) -> Result<Descriptor> {
    read_descriptor_at(dir, DESCRIPTOR)
}

/// The same of a descriptor that has another name.
pub fn read_descriptor_at(dir: impl AsFd, name: &str) -> Result<Descriptor> {
    let fd = beneath::open_file(&dir, Path::new(name), beneath::Access::Read)?;
    let mut bytes = Vec::new();
    File::from(fd)
        // One more than is read at all, so that a longer file is seen and refused.
        .take(limits::DESCRIPTOR_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::from(e).at(name))?;
    Descriptor::parse(&bytes).map_err(|e| e.at(name))
}

/// Refuses a bare file that belongs to the disk beside it: opened alone it would be changed behind
/// the back of its stack.
fn refuse_member(dir: impl AsFd, name: &OsStr) -> Result<()> {
    let descriptor = match read_descriptor(dir) {
        Ok(descriptor) => descriptor,
        Err(e) if e.kind() == Kind::NotFound => return Ok(()),
        Err(e) => {
            tracing::warn!(
                "not known whether {:?} belongs to a disk: {e}",
                Path::new(name)
            );
            return Ok(());
        }
    };
    match descriptor
        .images()
        .iter()
        .any(|i| OsStr::new(&i.file) == name)
    {
        false => Ok(()),
        true => Err(Error::invalid(format!(
            "the {DESCRIPTOR} beside it names this file; use the directory as DISK"
        ))),
    }
}
