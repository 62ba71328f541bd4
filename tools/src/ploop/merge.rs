//! `snapshot-merge` and `merge`: deltas and those below them become one.

use super::code::{Code, During, Fault, Step};
use super::{Context, absent, disk, snapshot};
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::target::Target;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Merge a snapshot, or the disk as it is now, into the one below it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// UUID of the snapshot; otherwise what the disk is now
    #[arg(short, conflicts_with = "all")]
    uuid: Option<Guid>,
    /// All of the disk becomes one image
    #[arg(short = 'A')]
    all: bool,
    /// File of the result (not offered)
    #[arg(short, value_name = "DELTA")]
    new: Option<PathBuf>,
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

const NEW: (&str, &str) = ("-n", "the result has the file of the lower one");

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    if args.new.is_some() {
        return Err(absent::option(NEW.0, NEW.1));
    }
    let (disk, descriptor) = disk::with_descriptor(&args.file)?;
    let uuid = args.uuid.unwrap_or(descriptor.top());
    merge(&disk, uuid, context)?;
    while args.all && depth(&disk)? > 1 {
        merge(&disk, disk::descriptor(&disk)?.top(), context)?;
    }
    Ok(())
}

fn depth(disk: &Target) -> Result<usize, Fault> {
    let descriptor = disk::descriptor(disk)?;
    let chain = descriptor.chain(descriptor.top());
    chain.map(|chain| chain.len()).during(Step::Descriptor)
}

fn merge(disk: &Target, uuid: Guid, context: &Context) -> Result<(), Fault> {
    snapshot::one("merge", disk, uuid).during(Step::Merge)?;
    context.say(format_args!(
        "ploop snapshot {uuid} has been successfully merged"
    ));
    Ok(())
}

/// Merge images of a disk with a descriptor, the highest first, into the last
#[derive(Debug, clap::Args)]
pub struct Files {
    /// Device (not offered)
    #[arg(short, value_name = "DEVICE")]
    device: Option<PathBuf>,
    /// Levels (not offered)
    #[arg(short, value_name = "LEVEL[..TOP]")]
    level: Option<String>,
    /// File of the result (not offered)
    #[arg(short, value_name = "DELTA")]
    new: Option<PathBuf>,
    /// What the lowest image is: accepted, the descriptor knows
    #[arg(short, value_name = "FORMAT")]
    format: Option<disk::Bare>,
    /// The images, the highest first
    #[arg(value_name = "DELTA")]
    files: Vec<PathBuf>,
}

/// Does it.
pub fn files(args: &Files, context: &Context) -> Result<(), Fault> {
    if args.device.is_some() || args.level.is_some() {
        return Err(absent::option(
            "-d and -l",
            "use snapshot-merge, which knows the tree",
        ));
    }
    if args.new.is_some() {
        return Err(absent::option(NEW.0, NEW.1));
    }
    let [first, _, ..] = args.files.as_slice() else {
        return Err(Fault::new(Code::Param, "merge wants two images or more"));
    };
    let (disk, descriptor) = disk::with_descriptor(first)?;
    let guids: Vec<Guid> = args
        .files
        .iter()
        .map(|f| shot(&disk, &descriptor, f))
        .collect::<Result<_, _>>()?;
    let below = |pair: &[Guid]| matches!(pair, [upper, lower] if parent(&descriptor, *upper) == Some(*lower));
    if !guids.windows(2).all(below) {
        let what = "each image must stand on the one that is named after it";
        return Err(Fault::new(Code::Param, what));
    }
    // The result keeps the name of the upper one, and so stands on what the lower one stood on.
    for _ in guids.iter().skip(1) {
        merge(&disk, guids[0], context)?;
    }
    Ok(())
}

fn parent(descriptor: &Descriptor, guid: Guid) -> Option<Guid> {
    descriptor.shot(guid).map(|shot| shot.parent)
}

/// The shot of an image of this disk.
pub fn shot(disk: &Target, descriptor: &Descriptor, file: &Path) -> Result<Guid, Fault> {
    let same = disk::resolve(file, None)? == *disk;
    let mut images = descriptor.images().iter();
    let found = images.find(|i| same && file.file_name() == Some(OsStr::new(&i.file)));
    found.map(|image| image.guid).ok_or_else(|| {
        let what = format!("{}: no image of {}", file.display(), disk.path().display());
        Fault::new(Code::Param, what)
    })
}
