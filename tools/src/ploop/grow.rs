//! `grow`: a disk gets a larger size, but not the file system on it.

use super::code::{Code, During, Fault, Step};
use super::disk::{self, Bare};
use super::{Context, size, umount, verb};
use crate::attach::Attached;
use ploop::image::target::Target;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Make a disk larger, but not the file system on it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size of the disk
    #[arg(short, value_parser = size::parse)]
    size: u64,
    /// Device
    #[arg(short, value_name = "DEVICE", conflicts_with = "file")]
    device: Option<PathBuf>,
    /// What an image without a descriptor is
    #[arg(short, value_name = "FORMAT")]
    format: Option<Bare>,
    /// Take no space for a raw image yet: accepted, none is taken
    #[arg(short = 'S', long)]
    sparse: bool,
    /// DiskDescriptor.xml, or an image
    #[arg(value_name = "XML|DELTA", required_unless_present = "device")]
    file: Option<PathBuf>,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    let disk = match (&args.device, &args.file) {
        (Some(device), _) => of_device(device, args.format)?,
        (None, Some(file)) => disk::resolve(file, args.format)?,
        (None, None) => return Err(Fault::new(Code::Param, "grow wants a disk")),
    };
    let said = verb(&words("grow", &disk, args.size)).during(Step::Change)?;
    context.say(format_args!(
        "{} has {} sectors, had {}",
        disk.path().display(),
        sectors(&said["size"]),
        sectors(&said["old_size"])
    ));
    Ok(())
}

/// The disk that a device is of.
pub fn of_device(device: &Path, format: Option<Bare>) -> Result<Target, Fault> {
    let Attached { state, .. } = umount::device(device)?;
    disk::resolve(Path::new(&state.path), format)
}

/// A verb of `ploopctl` that gives a disk a size.
pub fn words(verb: &str, disk: &Target, bytes: u64) -> Vec<OsString> {
    let mut words = vec![verb.into(), disk.path().into(), bytes.to_string().into()];
    if let Target::Bare { format, .. } = disk {
        words.extend(["--format".into(), format.as_str().into()]);
    }
    words
}

/// A size in an answer.
pub fn sectors(bytes: &serde_json::Value) -> u64 {
    bytes.as_u64().unwrap_or_default() / size::SECTOR
}
