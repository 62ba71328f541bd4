//! `convert`: a disk that is not mounted gets another form of image, or another format version.

use super::code::{Code, During, Fault, Step};
use super::{Context, disk, verb};
use ploop::formats::descriptor::{Descriptor, ImageType};
use std::ffi::OsStr;
use std::path::PathBuf;

/// Change what the images of a disk are; what is in it stays as it is
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the image is to be
    #[arg(short, value_name = "FORMAT", conflicts_with = "version")]
    format: Option<FormArg>,
    /// Version of the format
    #[arg(short, value_name = "1|2", value_parser = ["1", "2"])]
    version: Option<String>,
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// `-f`: what an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FormArg {
    /// A ploop image that grows
    #[value(alias = "ploop1")]
    Expanded,
    /// A ploop image that has all its space
    Preallocated,
    /// A flat file
    Raw,
}

impl FormArg {
    const fn name(self) -> &'static str {
        match self {
            Self::Expanded => "expanded",
            Self::Preallocated => "preallocated",
            Self::Raw => "raw",
        }
    }

    /// What the base of a disk is; none of these when it is a qcow2 image.
    fn of(disk: &Descriptor) -> Option<Self> {
        let base = disk.image(disk.base().guid);
        match base.map(|image| image.kind) {
            Some(ImageType::Plain) => Some(Self::Raw),
            Some(ImageType::QCow2) => None,
            _ if disk.preallocated() => Some(Self::Preallocated),
            _ => Some(Self::Expanded),
        }
    }
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    let (disk, descriptor) = disk::with_descriptor(&args.file)?;
    disk::refuse_attached(&disk)?;
    let (option, value) = match (args.format, &args.version) {
        (Some(form), _) if Some(form) == FormArg::of(&descriptor) => {
            context.say(format_args!("The image is {} already", form.name()));
            return Ok(());
        }
        (Some(form), _) => ("--to", form.name()),
        (None, Some(version)) => ("--format-version", version.as_str()),
        (None, None) => return Err(Fault::new(Code::Param, "convert wants -f or -v")),
    };
    let words = [OsStr::new("convert"), disk.path().as_os_str()];
    verb(&[words[0], words[1], OsStr::new(option), OsStr::new(value)]).during(Step::Change)?;
    context.say("The image has been successfully converted");
    Ok(())
}
