//! Disk: what ploop's ways to name one mean: a DiskDescriptor.xml, an image, a device, a mount point,
//! a component.

use super::code::{Code, During, Fault, Step};
use super::names;
use crate::attach::{self, Attached};
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::chain::read_descriptor;
use ploop::image::target::{DESCRIPTOR, Format, Target};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What `-f` says of images without a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Bare {
    /// An image of the ploop format
    #[value(alias = "expanded")]
    Ploop1,
    /// A flat file
    Raw,
}

impl From<Bare> for Format {
    fn from(bare: Bare) -> Self {
        match bare {
            Bare::Ploop1 => Format::Ploop,
            Bare::Raw => Format::Raw,
        }
    }
}

/// The disk that a descriptor or one of its images names, or an image that stands alone.
pub fn resolve(file: &Path, format: Option<Bare>) -> Result<Target, Fault> {
    let meta = std::fs::metadata(file).map_err(|e| ploop::Error::from(e).at(file.display()));
    let is_dir = meta.during(Step::Find)?.is_dir();
    if is_dir || file.file_name() == Some(OsStr::new(DESCRIPTOR)) {
        let target = Target::resolve(file, None).during(Step::Find)?;
        descriptor(&target)?;
        return Ok(target);
    }
    if file.extension() == Some(OsStr::new("xml")) {
        let what = format!("{}: a descriptor is called {DESCRIPTOR}", file.display());
        return Err(Fault::new(Code::DiskDescr, what));
    }
    let alone = format.unwrap_or(Bare::Ploop1).into();
    let alone = Target::resolve(file, Some(alone)).during(Step::Find)?;
    Ok(owner(&alone).unwrap_or(alone))
}

/// The disk whose descriptor lies beside an image, if that names it.
fn owner(image: &Target) -> Option<Target> {
    let disk = Target::resolve(&image.dir(), None).ok()?;
    let names = |d: &Descriptor| {
        let images = d.images().iter();
        let name = image.path().file_name();
        images.map(|i| OsStr::new(&i.file)).any(|f| Some(f) == name)
    };
    descriptor(&disk).is_ok_and(|d| names(&d)).then_some(disk)
}

/// A disk with a descriptor: snapshots have no other place.
pub fn with_descriptor(file: &Path) -> Result<(Target, Descriptor), Fault> {
    let disk = resolve(file, None)?;
    match disk {
        Target::Bundle { .. } => descriptor(&disk).map(|read| (disk, read)),
        Target::Bare { .. } => Err(Fault::new(
            Code::Param,
            format!("{}: no {DESCRIPTOR} names it", file.display()),
        )),
    }
}

/// What a disk's descriptor says.
pub fn descriptor(disk: &Target) -> Result<Descriptor, Fault> {
    let dir = disk.open_dir().during(Step::Find)?;
    let read = read_descriptor(dir).map_err(|e| e.at(disk.path().display()));
    read.during(Step::Descriptor)
}

/// A snapshot that may be called `base`.
pub fn point(descriptor: &Descriptor, name: &str) -> Result<Guid, Fault> {
    match name {
        "base" => Ok(descriptor.base().guid),
        _ => name
            .parse()
            .map_err(|e| Fault::new(Code::Param, format!("'{name}': {e}"))),
    }
}

/// How an attached disk is named.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Which {
    /// Device
    #[arg(short, value_name = "DEVICE")]
    pub device: Option<PathBuf>,
    /// Where it is mounted
    #[arg(short, value_name = "DIR")]
    pub mountpoint: Option<PathBuf>,
    /// Name that it was mounted by
    #[arg(short, value_name = "COMPONENT")]
    pub component: Option<String>,
    /// DiskDescriptor.xml, or one of its images
    #[arg(value_name = "XML")]
    pub file: Option<PathBuf>,
}

impl Which {
    /// The attached disk that is meant.
    pub fn attached(&self) -> Result<Attached, Fault> {
        let not = |what: &Path| {
            let what = format!("{} is not mounted", what.display());
            Fault::new(Code::NotMounted, what)
        };
        match (&self.device, &self.mountpoint, &self.component, &self.file) {
            (Some(what), None, None, None) | (None, Some(what), None, None) => {
                attach::find(what).during(Step::Umount)
            }
            (None, None, Some(name), None) => {
                let path = names::component(name).ok_or_else(|| not(Path::new(name)))?;
                attach::find(&path).during(Step::Umount)
            }
            (None, None, None, Some(file)) => of(&resolve(file, None)?)?.ok_or_else(|| not(file)),
            // A component tells apart what is mounted of one disk.
            (None, None, Some(name), Some(_)) => {
                let path = names::component(name).ok_or_else(|| not(Path::new(name)))?;
                attach::find(&path).during(Step::Umount)
            }
            _ => Err(Fault::new(
                Code::Param,
                "name one disk: by -d, -m, -c or its descriptor",
            )),
        }
    }
}

/// The attachment of a disk.
pub fn of(disk: &Target) -> Result<Option<Attached>, Fault> {
    let found = disk.identity().and_then(|id| attach::by_identity(&id));
    found.during(Step::Find)
}

/// Refuses a disk that is attached.
pub fn refuse_attached(disk: &Target) -> Result<(), Fault> {
    match of(disk)? {
        None => Ok(()),
        Some(attached) => {
            let device = attached.state.device.unwrap_or_default();
            let what = format!("{}: in use by device {device}", disk.path().display());
            Err(Fault::new(Code::Ebusy, what))
        }
    }
}
