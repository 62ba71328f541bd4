//! `replace`: a snapshot gets another file that holds the same.

use super::convert::refuse_in_use;
use super::snapshot::{attached, mount};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::rate;
use ploop::formats::guid::Guid;
use ploop::image::change;
use ploop::image::detached::{self, Detached, random_guid};
use ploop::image::newfile::NewFile;
use ploop::image::replace::{self, Replaced, Way};
use ploop::image::snapshot::copy::Work;
use ploop::image::target::Target;
use ploop::sandbox::{self, Files, Place};
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

pub const EXAMPLE: &str = "Example: ploopctl replace /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a /var/lib/ct/copy.hds";

/// Give a snapshot of a disk another file, a copy of the one it has
///
/// Both are read and compared first. The new file is moved into the disk's directory, or copied
/// there from another file system; the old one goes. A disk in use goes on meanwhile.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    disk: PathBuf,
    /// UUID of the snapshot, with or without braces
    uuid: Guid,
    /// The new file
    #[arg(value_name = "NEWFILE")]
    file: PathBuf,
    /// Bytes a second to compare or copy at most
    #[arg(long, value_name = "BYTES", value_parser = rate::parse)]
    rate: Option<NonZeroU64>,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let mut meter = Meter::new(global.progress, &cancel);
    let (uuid, target) = (args.uuid.bare(), detached::resolve(&args.disk)?);
    mount::refuse_view(&target)?;
    let done = match attached::find(&args.disk)? {
        Some(running) => {
            let done = running.replace(args.uuid, &args.file, args.rate, &mut meter);
            return done.map(|done| answer(&target, &uuid, &done)).map_err(left);
        }
        None => {
            refuse_in_use(&target, false)?;
            let pace = rate::limit(args.rate, &cancel);
            offline(args, &target, &mut Work::new(&mut meter, &pace))
        }
    };
    let done = done.map_err(ended)?;
    Ok(answer(&target, &uuid, &done))
}

fn answer(target: &Target, uuid: &str, done: &Replaced) -> Answer {
    let path = target.path().display();
    Answer::new(
        format!("{uuid}: {} in place of {}", done.new, done.old),
        json!({
            "path": path.to_string(),
            "uuid": uuid,
            "old": done.old,
            "new": done.new,
            "way": match done.way {
                Way::Moved => "moved",
                Way::Copied => "copied",
            },
        }),
    )
}

fn offline(args: &Args, target: &Target, work: &mut Work<'_>) -> Result<Replaced> {
    let place = |e: Error| e.at(target.path().display());
    let (new, dir) = (NewFile::open(&args.file)?, target.open_dir()?);
    confine(&dir, &new)?;
    let disk = Detached::take(dir).map_err(place)?;
    let (folder, random) = (disk.folder(), random_guid());
    let done = async {
        let now = change::settle(folder).await?;
        replace::refuse_own(folder, &now, args.uuid, &new).await?;
        let source = new.source(folder)?;
        replace::offline(folder, args.uuid, &source, random, work).await
    };
    disk.run(done).map_err(place)
}

/// What a signal left of a disk in use: whether it came too late nobody says any more.
fn left(e: Error) -> Error {
    match e.kind() {
        Kind::Cancelled => Error::new(
            Kind::Cancelled,
            "cancelled by a signal; the snapshot has the file that it had, or, if all was done but the \
             answer, the new one: `ploopctl check` names its file",
        ),
        _ => e,
    }
}

/// What a signal left of one that nobody uses.
fn ended(e: Error) -> Error {
    match e.kind() {
        Kind::Cancelled => Error::new(
            Kind::Cancelled,
            "cancelled by a signal; nothing was changed",
        ),
        _ => e,
    }
}

/// Leaves this process the disk, and the new file.
fn confine(disk: &OwnedFd, new: &NewFile) -> Result<()> {
    let own = Place {
        dir: disk.as_fd(),
        files: Files::Change,
    };
    let [from, file] = new.places();
    match sandbox::enter_all(&[own, from, file]) {
        Err(e) if e.kind() != Kind::Unsupported => Err(e),
        _ => Ok(()),
    }
}
