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
/// meanwhile. After a failed flush the disk is what it is after a power cut: what was written and
/// not flushed may be lost, and a file system on it must be unmounted, checked and mounted again.
/// See to the cause first.
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
            Phase::Serving => return Ok(state),
            Phase::Starting | Phase::Recovering => std::thread::sleep(Duration::from_millis(20)),
            Phase::Failed => {
                let why = state.error.unwrap_or_default();
                return Err(Error::new(Kind::Io, format!("it failed again: {why}")));
            }
            Phase::Stopping => return Err(Error::new(Kind::Busy, "it is being detached")),
        }
    }
    Err(Error::new(Kind::TimedOut, "not recovered yet"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::ProgressArg;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    /// What comes of an attempt whose disk is in this state.
    fn outcome_of(state: &str) -> Result<State> {
        let run = tempfile::tempdir().expect("temp dir");
        let listener = UnixListener::bind(run.path().join("control")).expect("bind");
        let mut disk = json!(attach::Attached::sample(run.path(), "/ct/1").state);
        disk["state"] = state.into();
        let keeper = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("a client");
            writeln!(client, "{}", json!({ "proto": 1, "version": "0" })).expect("greeted");
            let mut asked = String::new();
            let mut lines = BufReader::new(client.try_clone().expect("a copy"));
            lines.read_line(&mut asked).expect("asked");
            writeln!(client, "{}", json!({ "id": 1, "result": disk })).expect("answered");
        });
        let cancel = Cancel::never();
        let mut meter = Meter::new(ProgressArg::None, &cancel);
        let mut remote = Remote::connect(run.path()).expect("connected");
        let outcome = outcome(&mut remote, Duration::from_secs(20), &mut meter);
        keeper.join().expect("the keeper");
        outcome
    }

    #[test]
    fn only_a_disk_that_serves_is_recovered() {
        assert!(outcome_of("serving").is_ok());
        let kind = |state| outcome_of(state).map_err(|e| e.kind()).err();
        assert_eq!(kind("stopping"), Some(Kind::Busy));
        assert_eq!(kind("failed"), Some(Kind::Io));
    }
}
