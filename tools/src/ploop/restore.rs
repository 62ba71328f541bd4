//! `restore-descriptor`: the DiskDescriptor.xml of an image that lost its own.

use super::code::{Code, During, Fault, Step};
use super::disk::Bare;
use super::{Context, absent, size, verb};
use ploop::image::target::DESCRIPTOR;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Make a DiskDescriptor.xml for one base image
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the image is
    #[arg(short, value_name = "FORMAT", default_value = "ploop1")]
    format: Bare,
    /// Cluster, in sectors (not offered)
    #[arg(short = 'b', value_name = "SECTORS", value_parser = size::parse)]
    block: Option<u64>,
    /// Directory of the image
    dir: PathBuf,
    /// The image
    delta: PathBuf,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    if args.block.is_some() {
        let why =
            "an image of the ploop format says it, and a raw one gets the largest that divides it";
        return Err(absent::option("-b", why));
    }
    let format = match args.format {
        Bare::Ploop1 => "ploop",
        Bare::Raw => "raw",
    };
    let (verb_name, dir, name) = (
        OsStr::new("restore-descriptor"),
        args.dir.as_os_str(),
        name(args)?,
    );
    let words = [OsStr::new("--format"), OsStr::new(format)];
    verb(&[verb_name, dir, name, words[0], words[1]]).during(Step::Change)?;
    context.say(format_args!(
        "Storing {}",
        args.dir.join(DESCRIPTOR).display()
    ));
    Ok(())
}

/// The name of the image in its directory.
fn name(args: &Args) -> Result<&OsStr, Fault> {
    let parent = args.delta.parent().filter(|p| !p.as_os_str().is_empty());
    let real = |path: &Path| path.canonicalize().ok();
    let inside = parent.is_none_or(|parent| real(parent) == real(&args.dir));
    let name = args.delta.file_name().filter(|_| inside);
    name.ok_or_else(|| {
        let what = format!(
            "{}: no image in {}",
            args.delta.display(),
            args.dir.display()
        );
        Fault::new(Code::Param, what)
    })
}
