//! `snapshot delete`: a point that nobody goes back to any more.

use super::{cancelled, merge_temporaries, resolve, work};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::rate::{self, Rate};
use ploop::Result;
use ploop::formats::guid::Guid;
use ploop::image::snapshot::remove::{self, Removed};
use ploop::image::target::Target;
use serde_json::json;
use std::num::NonZeroU64;
use std::path::PathBuf;

pub const EXAMPLE: &str = "Example: ploopctl snapshot delete /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a --rate 50M";

/// Delete a snapshot of an unattached disk; what the disk is now stays as it is
///
/// A snapshot that one delta stands on is merged with that, which takes its time and can be
/// interrupted: the same command goes on with it. One that several stand on is marked temporary, and
/// goes when one is left.
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

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let rate = Rate::new(args.rate, &cancel);
    let target = resolve(&args.disk)?;
    let mut first = None;
    let done = work(&target, global, &cancel, &rate, async |folder, work| {
        first = Some(remove::offline(folder, args.uuid, work).await?);
        merge_temporaries(folder, work).await
    });
    let left = match first {
        None => "the same command goes on with it, and the disk can be used meanwhile",
        Some(_) => "it is deleted; a temporary one that could go, too, goes with the next snapshot",
    };
    let merged = done.map_err(|e| cancelled(e, left))?;
    let removed = first.unwrap_or(Removed::Dropped);
    Ok(answer(&args.uuid.bare(), removed, merged, &target))
}

fn answer(uuid: &str, removed: Removed, merged: usize, target: &Target) -> Answer {
    let (outcome, children) = match removed {
        Removed::Dropped => ("dropped", 0),
        Removed::Merged => ("merged", 0),
        Removed::Marked(children) => ("temporary", children),
    };
    if let Removed::Marked(children) = removed {
        tracing::warn!(
            "{children} deltas stand on {uuid}, so it stays, temporary, until one is left; it \
             cannot be gone back to any more"
        );
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
