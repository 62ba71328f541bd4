//! `snapshot switch`: back to a frozen point.

use super::{resolve, take};
use crate::answer::Answer;
use crate::size;
use ploop::Result;
use ploop::formats::guid::Guid;
use ploop::image::change;
use ploop::image::detached::random_guid;
use ploop::image::snapshot::{listing, switch};
use serde_json::json;
use std::path::PathBuf;

pub const EXAMPLE: &str = "Example: ploopctl snapshot switch /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a";

/// Go back to a snapshot of an unattached disk
///
/// What was written since the last snapshot is given up; make one first to keep it. All snapshots
/// stay.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    disk: PathBuf,
    /// UUID of the snapshot, with or without braces
    uuid: Guid,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = resolve(&args.disk)?;
    let disk = take(&target)?;
    let done = disk.run(async {
        let folder = disk.folder();
        let old = change::settle(folder).await?;
        let lost = listing::allocated(folder, &old, old.top())?;
        let since = old.shot(old.top()).map(|top| top.parent);
        switch::offline(folder, args.uuid, random_guid()).await?;
        Ok((lost, since.filter(|since| !since.is_none())))
    });
    let (lost, since) = done.map_err(|e| e.at(target.path().display()))?;
    let since = since.map(|since| since.bare());
    let point = since.as_deref().unwrap_or("the disk was made");
    Ok(Answer::new(
        format!(
            "switched to {}; given up: what was written since {point} ({} on the host)",
            args.uuid.bare(),
            size::show(lost)
        ),
        json!({
            "path": target.path().display().to_string(),
            "uuid": args.uuid.bare(),
            "given_up": lost,
            "since": since,
        }),
    ))
}
