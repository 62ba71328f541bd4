//! `snapshot delete`: a point that nobody goes back to any more.

use super::attached::{self, Running};
use super::{Point, cancelled, merge_temporaries, resolve, work};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::cmd::FormatArg;
use crate::global::Global;
use crate::meter::Meter;
use crate::rate;
use ploop::Result;
use ploop::formats::guid::Guid;
use ploop::image::snapshot::remove::{self, Removed};
use ploop::image::target::Target;
use serde_json::{Value, json};
use std::num::NonZeroU64;
use std::path::PathBuf;

pub const EXAMPLE: &str = "Example: ploopctl snapshot delete /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a --rate 50M";

/// Delete a snapshot; what the disk is now stays as it is
///
/// A snapshot that one delta stands on is merged with that, which takes its time and can be
/// interrupted: the same command goes on with it. A disk in use goes on meanwhile. One that several
/// stand on is marked temporary, and goes when one is left. With --format qcow2 it is one that the image
/// keeps in itself, and the image is not attached.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare qcow2 image
    pub(super) disk: PathBuf,
    /// UUID of the snapshot, with or without braces; of a bare image its name or ID
    #[arg(value_name = "UUID")]
    pub(super) point: Point,
    /// Format of a bare image file: qcow2, whose own snapshots these are
    #[arg(long)]
    pub(super) format: Option<FormatArg>,
    /// Bytes a second to copy at most
    #[arg(long, value_name = "BYTES", value_parser = rate::parse, conflicts_with = "format")]
    rate: Option<NonZeroU64>,
}

const DELETED: &str =
    "it is deleted; a temporary one that could go, too, goes with the next snapshot";

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let uuid = args.point.uuid()?;
    let cancel = Cancel::on_signals()?;
    let pace = rate::limit(args.rate, &cancel);
    if let Some(running) = attached::find(&args.disk)? {
        return running_disk(
            uuid,
            args.rate,
            &running,
            &mut Meter::new(global.progress, &cancel),
        );
    }
    let target = resolve(&args.disk)?;
    let mut first = None;
    let done = work(&target, global, &cancel, &pace, async |folder, work| {
        first = Some(remove::offline(folder, uuid, work).await?);
        merge_temporaries(folder, work).await
    });
    let left = match first {
        None => "the same command goes on with it, and the disk can be used meanwhile",
        Some(_) => DELETED,
    };
    let merged = done.map_err(|e| cancelled(e, left))?;
    let removed = first.unwrap_or(Removed::Dropped);
    Ok(answer(&uuid.bare(), removed, merged, &target))
}

/// Has the keeper of an attached disk do it.
fn running_disk(
    uuid: Guid,
    rate: Option<NonZeroU64>,
    running: &Running,
    meter: &mut Meter<'_>,
) -> Result<Answer> {
    let left = "the same command goes on with it";
    let removed = running.remove(uuid, rate, meter);
    let said = removed.map_err(|e| cancelled(e, left))?;
    let removed = match said.get("outcome").and_then(Value::as_str) {
        Some("merged") => Removed::Merged,
        Some("temporary") => {
            let children = said.get("children").and_then(Value::as_u64);
            Removed::Marked(usize::try_from(children.unwrap_or(1)).unwrap_or(usize::MAX))
        }
        _ => Removed::Dropped,
    };
    let merged = running.remove_temporaries(rate, meter);
    let merged = merged.map_err(|e| cancelled(e, DELETED))?;
    Ok(answer(&uuid.bare(), removed, merged, &running.target))
}

fn answer(uuid: &str, removed: Removed, merged: usize, target: &Target) -> Answer {
    let (outcome, children) = match removed {
        Removed::Dropped => ("dropped", 0),
        Removed::Merged => ("merged", 0),
        Removed::Marked(children) => ("temporary", children),
    };
    match removed {
        Removed::Marked(children) => tracing::warn!(
            "{children} deltas stand on {uuid}, so it stays, temporary, until one is left; it \
             cannot be gone back to any more"
        ),
        Removed::Dropped | Removed::Merged => {}
    }
    let others = match merged {
        0 => String::new(),
        n => format!(", and {n} temporary ones with it"),
    };
    let text = match removed {
        Removed::Marked(_) => format!("{uuid}: temporary{others}"),
        _ => format!("{uuid}: deleted{others}"),
    };
    Answer::new(
        text,
        json!({
            "path": target.path().display().to_string(),
            "uuid": uuid,
            "outcome": outcome,
            "children": children,
            "temporaries_merged": merged,
        }),
    )
}
