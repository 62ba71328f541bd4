//! `snapshot merge`: a delta and the one below it become one.

use super::attached::{self, Running};
use super::{cancelled, resolve, work};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::rate;
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::change;
use ploop::image::snapshot::merge::{self, only_child};
use ploop::image::snapshot::remove;
use ploop::image::target::Target;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::num::NonZeroU64;
use std::path::PathBuf;

pub const EXAMPLE: &str = "Example: ploopctl snapshot merge /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a";

/// Merge a snapshot, or the disk as it is now, into the one below it, which goes
///
/// The result keeps the UUID that is given. It takes its time and can be interrupted: the same
/// command goes on with it. What a guest writes meanwhile is merged as well, after a short wait.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    pub(super) disk: PathBuf,
    /// UUID of the snapshot, with or without braces; what the disk is now otherwise
    pub(super) uuid: Option<Guid>,
    /// Bytes a second to copy at most
    #[arg(long, value_name = "BYTES", value_parser = rate::parse)]
    rate: Option<NonZeroU64>,
}

const CANCELLED: &str = "the same command goes on with it, and the disk can be used meanwhile";

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let pace = rate::limit(args.rate, &cancel);
    if let Some(running) = attached::find(&args.disk)? {
        return running_disk(args, &running, &mut Meter::new(global.progress, &cancel));
    }
    let target = resolve(&args.disk)?;
    let done = work(&target, global, &cancel, &pace, async |folder, work| {
        let disk = change::settle(folder).await?;
        let uuid = args.uuid.unwrap_or(disk.top());
        let parent = parent(&disk, uuid)?;
        merge::offline(folder, parent, work).await?;
        Ok((uuid, parent))
    });
    let (uuid, parent) = done.map_err(|e| cancelled(e, CANCELLED))?;
    Ok(answer(uuid, parent, &target))
}

/// Has the keeper of an attached disk do it.
fn running_disk(args: &Args, running: &Running, meter: &mut Meter<'_>) -> Result<Answer> {
    let disk = running.descriptor()?;
    let uuid = args.uuid.unwrap_or(disk.top());
    let parent = parent(&disk, uuid)?;
    only_child(&disk, parent)?;
    let removed = running.remove(parent, args.rate, meter);
    let said = removed.map_err(|e| cancelled(e, CANCELLED))?;
    if said.get("outcome").and_then(Value::as_str) != Some("merged") {
        let what = format!(
            "{}: several deltas stand on it by now; it is temporary, and goes when one is left",
            parent.bare()
        );
        return Err(Error::new(Kind::Busy, what));
    }
    Ok(answer(uuid, parent, &running.target))
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
