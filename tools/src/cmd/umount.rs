//! `umount`: a disk is detached, and its image closed.

use crate::answer::Answer;
use crate::attach;
use ploop::Result;
use serde_json::json;
use std::path::PathBuf;

/// Unmount and detach a disk, and close its image
///
/// Returns once the image is closed and nothing of the attachment is left. A disk that somebody
/// uses stays attached, and the processes that hold it are named.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The disk, its device, or where it is mounted
    #[arg(value_name = "DISK|DEVICE|MOUNTPOINT")]
    what: PathBuf,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let attached = attach::find(&args.what)?;
    attach::stop(&attached)?;
    let state = attached.state;
    Ok(Answer::new(
        "",
        json!({ "path": state.path, "uuid": state.uuid, "device": state.device }),
    ))
}
