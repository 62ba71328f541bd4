//! `umount`: a disk is detached, and its image closed.

use crate::answer::Answer;
use crate::attach;
use crate::force::{self, Force};
use ploop::Result;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Unmount and detach a disk, and close its image
///
/// Returns once the image is closed and nothing of the attachment is left. A disk that somebody
/// uses stays attached, and the processes that hold it are named.
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

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let attached = attach::find(&args.what)?;
    let patience = Duration::from_secs(args.timeout);
    let force = match args.force {
        true => force::stop(&attached, patience)?,
        false => attach::stop_within(&attached, patience).map(|()| Force::NotNeeded)?,
    };
    let state = attached.state;
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
        }),
    ))
}
