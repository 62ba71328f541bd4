//! `fscheck`: is the file system of a disk sound, whether the disk is in use or not.
//!
//! In order: a temporary snapshot, mounted so that its journal is replayed; unmounted, and checked
//! without writing; taken away.

use super::code::{Code, During, Fault, Step};
use super::{Context, disk, verb};
use crate::volume::Volume;
use ploop::serve::supervise::mounts;
use ploop::{Error, Kind};
use rustix::fs::statfs;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What statfs(2) says of XFS.
const XFS: u64 = 0x5846_5342;

/// Check the file system of a disk, without changing it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    let (disk, _) = disk::with_descriptor(&args.file)?;
    let point = PathBuf::from(format!("/run/ploop.fscheck.{}", std::process::id()));
    let made = std::fs::create_dir(&point).map_err(|e| Error::from(e).at(point.display()));
    made.during(Step::Snapshot)?;
    let words = ["snapshot", "create", "--temporary"].map(OsStr::new);
    let words: Vec<&OsStr> = words
        .into_iter()
        .chain([point.as_os_str(), disk.path().as_os_str()])
        .collect();
    let said = verb(&words).during(Step::Snapshot);
    let checked = said.and_then(|said| {
        let text = |name: &str| said["view"][name].as_str().unwrap_or_default().to_string();
        let checked = check(Path::new(&text("device")), &point);
        let ended = verb(&["umount", &text("path")]).during(Step::Umount);
        checked
            .during(Step::Fsck)
            .and_then(|said| ended.map(|_| said))
    });
    let _ = std::fs::remove_dir(&point);
    let (sound, said) = checked?;
    context.say(said.trim_end());
    match sound {
        true => Ok(()),
        false => Err(Fault::new(
            Code::Fsck,
            format!("{}: its file system is damaged", disk.path().display()),
        )),
    }
}

/// Unmounts the file system and has its own checker look; whether it is sound, and what was said.
fn check(device: &Path, point: &Path) -> ploop::Result<(bool, String)> {
    let kind = statfs(point).map_err(std::io::Error::from)?.f_type as u64;
    mounts::detach(point, false)?;
    let volume = Volume::of(device)?;
    let (program, options) = match kind {
        XFS => ("xfs_repair", "-n"),
        _ => ("fsck", "-nf"),
    };
    let ran = Command::new(program)
        .arg(options)
        .arg(volume.path())
        .output();
    let output = ran.map_err(|e| Error::new(Kind::NotFound, format!("{program}: {e}")))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok((output.status.success(), said))
}
