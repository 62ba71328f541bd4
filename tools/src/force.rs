//! Force: takes a disk away from whoever uses it.
//!
//! No process is killed. In order: what the file system holds is asked to be written, for as long
//! as patience allows; every mount is undone, lazily where it is in use; the keeper is told to
//! stop; and where somebody goes on using the device, its requests are made to fail, so that the
//! image can be closed. What was answered before that is in the image.

use crate::attach::{self, Attached};
use crate::holders;
use ploop::Result;
use ploop::rundir::Departure;
use ploop::serve::fuse;
use ploop::serve::supervise::{leftover, mounts};
use rustix::fs::{fsync, syncfs};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Part of the patience that an orderly end may take.
const ORDERLY: u32 = 2;

/// Whether somebody was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// Nobody used it.
    NotNeeded,
    /// Requests of its users fail, and what they had not synced may be lost.
    CutOff,
}

/// Unmounts, detaches and closes a disk within `patience`, whoever uses it.
pub fn stop(attached: &Attached, patience: Duration) -> Result<Force> {
    let start = Instant::now();
    let left = || patience.saturating_sub(start.elapsed());
    let in_use = match &attached.state.device {
        Some(device) => release(attached, Path::new(device), left() / ORDERLY)?,
        None => false,
    };
    let Some(mut departure) = Departure::of(&attached.run) else {
        leftover::sweep()?;
        return Ok(Force::NotNeeded);
    };
    attach::terminate(attached)?;
    // Who still uses it would only be waited for.
    let orderly = if in_use {
        Duration::ZERO
    } else {
        left() / ORDERLY
    };
    let ended = !matches!(departure.wait(orderly), Ok(None));
    if !ended && attached.state.device.is_some() {
        fuse::abort(&attached.run.join("disk"))?;
    }
    attach::see_off(attached, departure, left())?;
    Ok(match in_use || !ended {
        true => Force::CutOff,
        false => Force::NotNeeded,
    })
}

/// Undoes every mount; whether somebody still uses the device.
fn release(attached: &Attached, device: &Path, patience: Duration) -> Result<bool> {
    let points = attach::mounted_at(&attached.state);
    write_out(&points, device, patience);
    for point in points.iter().rev() {
        if mounts::detach(point, false).is_err() {
            mounts::detach(point, true)?;
        }
    }
    // Looks that others take at a device last an instant, and are no use.
    let start = Instant::now();
    let in_use = || holders::is_claimed(device) || !holders::of_device(device).is_empty();
    while in_use() {
        if start.elapsed() > attach::PROBE_PATIENCE.min(patience) {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(false)
}

/// Asks for what is dirty to be written. A server that hangs must not hang us: who waits too long
/// is left waiting, until its request is made to fail.
fn write_out(points: &[PathBuf], device: &Path, patience: Duration) {
    let (done, all_done) = mpsc::channel();
    let (points, device) = (points.to_vec(), device.to_path_buf());
    std::thread::spawn(move || {
        for point in points {
            let _ = File::open(point).map(syncfs);
        }
        let _ = File::open(device).map(fsync);
        let _ = done.send(());
    });
    let _ = all_done.recv_timeout(patience);
}
