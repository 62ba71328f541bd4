//! `snapshot create`: the disk as it is now can be gone back to.

use super::attached::{self, Running};
use super::{cancelled, resolve, work};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::rate::Rate;
use ploop::Result;
use ploop::formats::guid::Guid;
use ploop::image::detached::random_guid;
use ploop::image::snapshot::names::{self, Names};
use ploop::image::target::Target;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Freeze a disk as it is under a UUID, which is printed
///
/// What is written from then on goes into a new delta. A disk in use goes on, after a short wait: what
/// was answered is in the snapshot, what its file system still holds in memory is not. Snapshots that are marked temporary and can
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
    let uuid = args.uuid.unwrap_or_else(random_guid);
    if let Some(running) = attached::find(&args.disk)? {
        return freeze(
            args,
            uuid,
            &running,
            &mut Meter::new(global.progress, &cancel),
        );
    }
    let target = resolve(&args.disk)?;
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
    Ok(answer(args, uuid, &target, json!(0)))
}

/// Has the keeper of an attached disk do it.
fn freeze(args: &Args, uuid: Guid, running: &Running, meter: &mut Meter<'_>) -> Result<Answer> {
    let merged = running.remove_temporaries(None, meter);
    merged.map_err(|e| cancelled(e, CANCELLED))?;
    let made = running.freeze(uuid)?;
    if let Some(name) = &args.name
        && let Err(e) = running.set_name(uuid, name)
    {
        tracing::warn!("the snapshot is made, but its name is not kept: {e}");
    }
    let stall = made.get("stall_us").cloned().unwrap_or_default();
    Ok(answer(args, uuid, &running.target, stall))
}

fn answer(args: &Args, uuid: Guid, target: &Target, stall_us: Value) -> Answer {
    Answer::new(
        uuid.bare(),
        json!({
            "path": target.path().display().to_string(),
            "uuid": uuid.bare(),
            "name": args.name,
            "stall_us": stall_us,
        }),
    )
}
