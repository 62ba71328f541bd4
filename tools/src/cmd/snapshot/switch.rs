//! `snapshot switch`: back to a frozen point.

use super::{Point, attached, resolve, take};
use crate::answer::Answer;
use crate::cmd::FormatArg;
use crate::size;
use ploop::Result;
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::change;
use ploop::image::detached::random_guid;
use ploop::image::snapshot::{listing, switch};
use ploop::image::target::Target;
use ploop::io::folder::DirFolder;
use serde_json::json;
use std::path::PathBuf;

pub const EXAMPLE: &str = "Example: ploopctl snapshot switch /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a";

/// Go back to a snapshot of a disk that is not mounted
///
/// What was written since the last snapshot is given up; make one first to keep it. All snapshots
/// stay. The disk may be attached, as a device that nobody uses.
///
/// With --format qcow2 the image, which is not attached, becomes what it was, its size too; what was written
/// since any of its snapshots is given up.
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
}

/// What is given up: its bytes on the host, and the snapshot that it was written since.
type GivenUp = (u64, Option<Guid>);

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let uuid = args.point.uuid()?;
    if let Some(running) = attached::find(&args.disk)? {
        let folder = DirFolder::new(running.target.open_dir()?);
        let lost = given_up(&folder, &running.descriptor()?)?;
        running.switch(uuid)?;
        return Ok(answer(uuid, &running.target, lost));
    }
    let target = resolve(&args.disk)?;
    let disk = take(&target)?;
    let done = disk.run(async {
        let folder = disk.folder();
        let lost = given_up(folder, &change::settle(folder).await?)?;
        switch::offline(folder, uuid, random_guid()).await?;
        Ok(lost)
    });
    let lost = done.map_err(|e| e.at(target.path().display()))?;
    Ok(answer(uuid, &target, lost))
}

fn given_up(folder: &DirFolder, disk: &Descriptor) -> Result<GivenUp> {
    let lost = listing::allocated(folder, disk, disk.top())?;
    let since = disk.shot(disk.top()).map(|top| top.parent);
    Ok((lost, since.filter(|since| !since.is_none())))
}

fn answer(uuid: Guid, target: &Target, (lost, since): GivenUp) -> Answer {
    let since = since.map(|since| since.bare());
    let point = since.as_deref().unwrap_or("the disk was made");
    Answer::new(
        format!(
            "switched to {}; given up: what was written since {point} ({} on the host)",
            uuid.bare(),
            size::show(lost)
        ),
        json!({
            "path": target.path().display().to_string(),
            "uuid": uuid.bare(),
            "given_up": lost,
            "since": since,
        }),
    )
}
