//! `replace`: a snapshot gets another file that holds the same, whether the disk is mounted or not.

use super::code::{Code, During, Fault, Step};
use super::disk::{self, Which};
use super::{Context, absent, merge, umount, verb};
use ploop::formats::guid::Guid;
use std::ffi::OsStr;
use std::path::PathBuf;

/// Give a snapshot another file, a copy of the one it has
#[derive(Debug, clap::Args)]
pub struct Args {
    /// UUID of the snapshot
    #[arg(short, conflicts_with = "old")]
    uuid: Option<Guid>,
    /// The file that it has
    #[arg(short, value_name = "CUR")]
    old: Option<PathBuf>,
    /// The new file
    #[arg(short = 'i', value_name = "NEW")]
    new: PathBuf,
    /// Level (not offered)
    #[arg(short, value_name = "LEVEL")]
    level: Option<u32>,
    /// Keep the name of the file (not offered)
    #[arg(short, long)]
    keep_name: bool,
    /// Also the file that is written to (not offered)
    #[arg(short = 'w', long)]
    read_write: bool,
    #[command(flatten)]
    which: Which,
}

impl Args {
    /// What is not offered.
    fn refuse(&self) -> Result<(), Fault> {
        for (given, option, why) in [
            (
                self.level.is_some(),
                "-l",
                "name the snapshot by -u or its file by -o",
            ),
            (
                self.read_write,
                "-w",
                "what is replaced is a snapshot's file; make a snapshot first",
            ),
            (
                self.keep_name,
                "-k",
                "the file gets a name of its own in the directory of the disk",
            ),
        ] {
            if given {
                return Err(absent::option(option, why));
            }
        }
        Ok(())
    }
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    args.refuse()?;
    let param = |what: String| Fault::new(Code::Param, what);
    if args.uuid.is_none() && args.old.is_none() {
        return Err(param("replace wants -u or -o, and a disk".into()));
    }
    let (disk, descriptor) = match &args.which {
        Which {
            device: None,
            mountpoint: None,
            component: None,
            file: Some(file),
        } => disk::with_descriptor(file)?,
        which => disk::with_descriptor(umount::disk_of(&which.attached()?)?.path())?,
    };
    let uuid = match (args.uuid, &args.old) {
        (None, Some(old)) => merge::shot(&disk, &descriptor, old)?,
        (uuid, _) => uuid.unwrap_or(descriptor.top()),
    };
    if descriptor.shot(uuid).is_none() {
        return Err(param(format!("{uuid}: no such snapshot")));
    }
    let bare = uuid.bare();
    let words = [OsStr::new("replace"), disk.path().as_os_str()];
    let said = verb(&[words[0], words[1], OsStr::new(&bare), args.new.as_os_str()]);
    let said = said.during(Step::Change)?;
    let name = |which: &str| said[which].as_str().unwrap_or_default().to_string();
    context.say(format_args!(
        "{} has been replaced by {}",
        disk.dir().join(name("old")).display(),
        disk.dir().join(name("new")).display()
    ));
    Ok(())
}
