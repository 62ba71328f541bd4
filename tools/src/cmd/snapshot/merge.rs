//! `snapshot merge`: a delta and the one below it become one.

use super::attached::{self, Running};
use super::{cancelled, resolve, work};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::rate::{self, Rate};
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::change;
use ploop::image::snapshot::merge::{self, only_child};
use ploop::image::snapshot::remove;
use ploop::image::target::Target;
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::num::NonZeroU64;
use std::path::PathBuf;

pub const EXAMPLE: &str = "Example: ploopctl snapshot merge /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a";

/// Merge a snapshot into the one below it, which goes
///
/// The result keeps the UUID that is given. It takes its time and can be interrupted: the same
/// command goes on with it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    disk: PathBuf,
    /// UUID of the snapshot, with or without braces
    uuid: Guid,
    /// Bytes a second to copy at most
    #[arg(long, value_name = "BYTES", value_parser = rate::parse)]
    rate: Option<NonZeroU64>,
}

const CANCELLED: &str = "the same command goes on with it, and the disk can be used meanwhile";

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let rate = Rate::new(args.rate, &cancel);
    if let Some(running) = attached::find(&args.disk)? {
        return running_disk(args, &running, &mut Meter::new(global.progress, &cancel));
    }
    let target = resolve(&args.disk)?;
    let done = work(&target, global, &cancel, &rate, async |folder, work| {
        let parent = parent(&change::settle(folder).await?, args.uuid)?;
        merge::offline(folder, parent, work).await?;
        Ok(parent)
    });
    let parent = done.map_err(|e| cancelled(e, CANCELLED))?;
    Ok(answer(args.uuid, parent, &target))
}

/// Has the keeper of an attached disk do it.
fn running_disk(args: &Args, running: &Running, meter: &mut Meter<'_>) -> Result<Answer> {
    let disk = running.descriptor()?;
    let parent = parent(&disk, args.uuid)?;
    if args.uuid == disk.top() {
        let what = "the running top; delete the snapshot below it, or detach the disk first";
        return Err(Error::new(
            Kind::Busy,
            format!("{}: {what}", args.uuid.bare()),
        ));
    }
    only_child(&disk, parent)?;
    let removed = running.remove(parent, args.rate, meter);
    removed.map_err(|e| cancelled(e, CANCELLED))?;
    Ok(answer(args.uuid, parent, &running.target))
}

fn answer(uuid: Guid, parent: Guid, target: &Target) -> Answer {
    let (uuid, parent) = (uuid.bare(), parent.bare());
    Answer::new(
        format!("{uuid}: merged with {parent}, which is gone"),
        json!({
            "path": target.path().display().to_string(),
            "uuid": uuid,
            "gone": parent,
        }),
    )
}

fn parent(disk: &Descriptor, uuid: Guid) -> Result<Guid> {
    let shot = disk.shot(uuid).ok_or_else(|| remove::unknown(uuid))?;
    match shot.parent.is_none() {
        false => Ok(shot.parent),
        true => Err(Error::invalid(format!(
            "{} is the base: there is nothing below it that it could be merged into",
            uuid.bare()
        ))),
    }
}
