//! `umount`: a disk is detached, and its image closed.

use super::snapshot::{mount, views};
use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::force::{self, Force};
use ploop::Result;
use ploop::image::target::Target;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Unmount and detach a disk, and close its image
///
/// Returns once the image is closed and nothing of the attachment is left. A disk that somebody
/// uses stays attached, and the processes that hold it are named. A view of a snapshot goes with all
/// that was made for it, and a temporary snapshot with its view.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The disk, its device, or where it is mounted
    #[arg(value_name = "DISK|DEVICE|MOUNTPOINT")]
    what: PathBuf,
    /// Take it from whoever uses it: no process is killed, but from now on its I/O fails, and what
    /// the file system has not written may be lost
    #[arg(long)]
    force: bool,
    /// How long closing may take; then exit code 9, and closing goes on
    #[arg(long, value_name = "SECONDS", default_value_t = attach::CLOSE_PATIENCE.as_secs(),
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
}

/// What becomes of a temporary snapshot whose view ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// It goes as well.
    Removed,
    /// It stays, marked, and goes with the next snapshot or deletion.
    Left,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let attached = attach::find(&args.what)?;
    end(attached, args, Point::Removed)
}

/// Ends an attachment within the patience that ploop has, and leaves temporary snapshots marked.
pub fn leave_point(attached: Attached) -> Result<()> {
    let args = Args {
        what: PathBuf::from(&attached.state.path),
        force: false,
        timeout: attach::CLOSE_PATIENCE.as_secs(),
    };
    end(attached, &args, Point::Left).map(drop)
}

fn end(attached: Attached, args: &Args, temporary: Point) -> Result<Answer> {
    let patience = Duration::from_secs(args.timeout);
    let stopped = match args.force {
        true => force::stop(&attached, patience),
        false => attach::stop_within(&attached, patience).map(|()| Force::NotNeeded),
    };
    let state = attached.state;
    let path = Path::new(&state.path);
    let (view_of, point) = match ploop::image::views::of(path) {
        None => (None, None),
        Some((disk, name)) => (Some(disk), Some(name.point.bare())),
    };
    let settled = Target::resolve(view_of.unwrap_or(path), None);
    if stopped.is_err() {
        // A view whose keeper died has nothing to lose.
        let _ = settled.as_ref().map(views::settle);
    }
    let force = stopped?;
    let outcome = mount::end(path, temporary)?;
    let _ = settled.as_ref().map(views::settle);
    let text = match force {
        Force::NotNeeded => String::new(),
        Force::CutOff => format!(
            "{}: taken from its users; what its file system had not written may be lost",
            state.path
        ),
    };
    Ok(Answer::new(
        text,
        json!({
            "path": state.path,
            "uuid": state.uuid,
            "device": state.device,
            "cut_off": force == Force::CutOff,
            "view_of": view_of.map(|disk| disk.display().to_string()),
            "snapshot": point,
            "outcome": outcome,
        }),
    ))
}
