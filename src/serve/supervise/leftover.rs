//! Leftover: what a dead keeper leaves behind, and its removal by the next command.
//!
//! Keeper and worker die together, the FUSE session dies with them, and everything on top answers
//! EIO. The image itself is as after a crash and needs nothing: the next open recovers it.

use super::message::Failure;
use super::{listen, mounts};
use crate::rundir::{self, Entry, Outcome, RunDir};
use crate::serve::{fuse, loopdev};
use ploop_formats::{Error, Kind, Result};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a dead keeper's worker may still listen: the kernel kills it, but not in an instant.
const WORKER_PATIENCE: Duration = Duration::from_secs(1);

/// Cleans up after every dead keeper of this user, and says in the log what it removed.
pub fn sweep() -> Result<()> {
    for entry in rundir::entries()? {
        if let Entry::Leftover(run) = entry {
            clean(&run);
            let died = Error::new(Kind::Io, "the keeper died; its leftovers were removed");
            run.finish(&Outcome {
                failure: Some(Failure::from(&died)),
            });
        }
    }
    Ok(())
}

/// Undoes everything that stands on a dead keeper's run directory.
pub fn clean(run: &RunDir) {
    tracing::info!("{}: cleaning up after a dead keeper", run.path().display());
    let disk = run.disk();
    for device in loopdev::attached_under(&disk).unwrap_or_default() {
        let path = PathBuf::from(format!("/dev/loop{}", device.number));
        let points = mounts::of_device(&path).unwrap_or_default();
        for point in points.iter().rev() {
            warn(mounts::detach(point, true));
        }
        warn(loopdev::detach(device.number));
    }
    let mounted = mounts::all().unwrap_or_default();
    for _ in mounted.iter().filter(|m| m.point == disk) {
        warn(fuse::unmount(&disk, true));
    }
    if let Some(socket) = run.state().and_then(|s| s.socket) {
        remove_socket(Path::new(&socket));
    }
}

fn warn(done: Result<()>) {
    if let Err(e) = done {
        tracing::warn!("{e}");
    }
}

fn remove_socket(path: &Path) {
    let is_socket = || std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let start = Instant::now();
    while is_socket() && start.elapsed() < WORKER_PATIENCE {
        if listen::is_dead(path) {
            let _ = std::fs::remove_file(path);
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
