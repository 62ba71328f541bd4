//! `recover`: a failed disk is used again, without being detached.

use crate::answer::Answer;
use crate::attach;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use ploop::client::Remote;
use ploop::rundir::{Phase, State};
use ploop::serve::supervise::control::Ask;
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Use a failed disk again, without detaching it
///
/// Its image is closed to everybody, looked at as after a crash, and served again; requests wait
/// meanwhile. After a failed flush the disk is what it is after a power cut: what was written and not
/// flushed may be lost, and a file system on it must be unmounted, checked and mounted again. See to the
/// cause first.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Disk, device or mount point
    #[arg(value_name = "DISK|DEVICE|MOUNTPOINT")]
    what: PathBuf,
    /// How long it may take; then exit code 9, and it is still tried
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let mut meter = Meter::new(global.progress, &cancel);
    let attached = attach::find(&args.what)?;
    let place = |e: Error| e.at(&attached.state.path);
    let mut remote = Remote::connect(&attached.run).map_err(place)?;
    remote.ask(Ask::Recover).map_err(place)?;
    let state =
        outcome(&mut remote, Duration::from_secs(args.timeout), &mut meter).map_err(place)?;
    drop(meter);
    let text = match (&state.device, attach::mounted_at(&state).pop()) {
        (Some(_), Some(point)) => format!(
            "{}: serving again; if the file system on {} has stopped, unmount, check and mount it",
            state.path,
            point.display()
        ),
        _ => format!("{}: serving again", state.path),
    };
    Ok(Answer::new(text, json!(state)))
}

/// A signal ends the waiting only.
fn goes_on(_: Error) -> Error {
    Error::new(Kind::Cancelled, "cancelled by a signal; recovering goes on")
}

/// The state once the attempt is over.
fn outcome(remote: &mut Remote, patience: Duration, meter: &mut Meter<'_>) -> Result<State> {
    let start = Instant::now();
    meter.begin("recovering").map_err(goes_on)?;
    while start.elapsed() < patience {
        meter.tick().map_err(goes_on)?;
        let state = remote.state()?;
        match state.state {
            Phase::Recovering => std::thread::sleep(Duration::from_millis(20)),
            Phase::Failed => {
                let why = state.error.unwrap_or_default();
                return Err(Error::new(Kind::Io, format!("it failed again: {why}")));
            }
            _ => return Ok(state),
        }
    }
    Err(Error::new(Kind::TimedOut, "not recovered yet"))
}
