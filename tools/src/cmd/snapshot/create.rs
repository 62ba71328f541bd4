//! `snapshot create`: the disk as it is now can be gone back to.

use super::{cancelled, resolve, work};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::rate::Rate;
use ploop::Result;
use ploop::formats::guid::Guid;
use ploop::image::detached::random_guid;
use ploop::image::snapshot::names::{self, Names};
use serde_json::json;
use std::path::PathBuf;

/// Freeze an unattached disk as it is under a UUID, which is printed
///
/// What is written from then on goes into a new delta. Snapshots that are marked temporary and can
/// go by now are merged away first.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    disk: PathBuf,
    /// UUID of the snapshot, with or without braces; a random one otherwise
    #[arg(long)]
    uuid: Option<Guid>,
    /// What people call it
    #[arg(long)]
    name: Option<String>,
}

const CANCELLED: &str = "no snapshot was made; a merge that was begun is gone on with by the next \
    snapshot, and the disk can be used meanwhile";

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    args.name.as_deref().map_or(Ok(()), names::check)?;
    let cancel = Cancel::on_signals()?;
    let rate = Rate::new(None, &cancel);
    let target = resolve(&args.disk)?;
    let uuid = args.uuid.unwrap_or_else(random_guid);
    let done = work(&target, global, &cancel, &rate, async |folder, work| {
        let disk = super::create(folder, uuid, work).await?;
        let Some(name) = &args.name else {
            return Ok(());
        };
        // The snapshot is there; its name is a remark.
        if let Err(e) = Names::set(folder, &disk, uuid, name).await {
            tracing::warn!("the snapshot is made, but its name is not kept: {e}");
        }
        Ok(())
    });
    done.map_err(|e| cancelled(e, CANCELLED))?;
    Ok(Answer::new(
        uuid.bare(),
        json!({
            "path": target.path().display().to_string(),
            "uuid": uuid.bare(),
            "name": args.name,
            "stall_us": 0,
        }),
    ))
}
