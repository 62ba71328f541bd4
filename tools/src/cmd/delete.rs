//! `delete`: a disk goes for good.

use super::FormatArg;
use super::snapshot::views;
use crate::answer::Answer;
use crate::{attach, size};
use ploop::image::delete;
use ploop::image::target::Target;
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Delete an unattached disk, its images and its directory
///
/// A directory that holds anything else is left as it is. Images that other disks share stay with
/// those. Interrupted, the same command finishes it. A disk or clone whose making was interrupted goes
/// the same way.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = Target::resolve(&args.disk, args.format.map(Into::into))
        .or_else(|e| delete::interrupted(&args.disk).ok_or(e))?;
    attach::refuse(&target)?;
    views::settle(&target);
    if let Some(view) = views::in_use(&target)?.first() {
        let what = format!(
            "{}: snapshot {} of it is mounted at {place}; `ploopctl umount {place}` first",
            target.path().display(),
            view.point.bare(),
            place = view.place()
        );
        return Err(Error::new(Kind::Busy, what));
    }
    let deleted = delete::delete(&target)?;
    let path = target.path().display();
    let shared = match deleted.shared.len() {
        0 => String::new(),
        n => format!(", {n} images stay with other disks"),
    };
    let freed = size::show(deleted.freed);
    Ok(Answer::new(
        format!("{path}: deleted, {freed} freed{shared}"),
        json!({
            "path": path.to_string(),
            "removed": shown(&deleted.removed),
            "shared": shown(&deleted.shared),
            "freed": deleted.freed,
        }),
    ))
}

fn shown(names: &[OsString]) -> Vec<String> {
    names
        .iter()
        .map(|n| Path::new(n).display().to_string())
        .collect()
}
