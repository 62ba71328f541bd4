//! `freeze`: a command that runs while an attached disk stays as it is.
//!
//! The freeze belongs to this process's connection to the keeper, so whatever becomes of this
//! process, the disk goes on. Nothing is written here meanwhile but for what must be said at once:
//! it might go to the frozen disk.

use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::report::{self, Output};
use ploop::client::{Remote, number};
use ploop::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::{flag, low_level::pipe};
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub const EXAMPLES: &str = "\
Example: ploopctl freeze /var/lib/ct/100 --timeout 30s -- /usr/local/bin/backup-hook

Exit codes besides those of ploopctl: that of COMMAND (128 and the number of the signal that ended it),
126 when it cannot be run, 127 when it is not found, and 9, whatever COMMAND's was, when the disk went
on before COMMAND ended.";

/// What COMMAND is told in its environment.
const DISK: &str = "PLOOP_DISK";
const DEVICE: &str = "PLOOP_DEVICE";
const MOUNTPOINT: &str = "PLOOP_MOUNTPOINT";

/// Run a command while an attached disk stays as it is
///
/// The file system on the disk's device is frozen, if one is mounted: what it holds in memory is
/// written, and who writes to it waits. Other writes to the disk wait as well; reads go on. The
/// disk goes on when COMMAND ends, when the time is over, when this command is killed, and when the
/// disk's server dies. When that is before COMMAND ends, it is said at once.
///
/// COMMAND finds the disk's path in PLOOP_DISK, its device in PLOOP_DEVICE and where that is
/// mounted in PLOOP_MOUNTPOINT, if it is. It must not write to the frozen file system: it would
/// wait for itself. With -o json what it prints goes to standard error.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Disk, device or mount point
    disk: PathBuf,
    /// How long the disk stays as it is at most, as in 10s, 1m or 500ms; 10 minutes are the longest
    #[arg(long, value_name = "TIME", value_parser = time)]
    timeout: Duration,
    /// What is run, and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

fn time(text: &str) -> std::result::Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    match (Duration::from_millis(1)..=Duration::from_secs(600)).contains(&time) {
        true => Ok(time),
        false => Err("1ms to 10m".into()),
    }
}

/// Does it.
pub fn run(args: &Args, output: Output) -> Result<Answer> {
    let disk = attach::find(&args.disk)?;
    let place = |e: Error| e.at(&disk.state.path);
    let signals = Signals::catch()?;
    let mut remote = Remote::connect(&disk.run).map_err(place)?;
    let frozen = remote.freeze(args.timeout).map_err(place)?;
    let child = match command(args, &disk, output).spawn() {
        Ok(child) => child,
        Err(e) => {
            remote.thaw().map_err(place)?;
            return Ok(not_run(&e, args, output));
        }
    };
    let (status, early) = see_to_its_end(child, &mut remote, &signals, &disk.state.path)?;
    if let Some(why) = early {
        return Err(why);
    }
    let thawed = remote.thaw().map_err(|e| match end_of(&mut remote) {
        Some(why) => early_end(&disk.state.path, &why),
        None => place(e),
    })?;
    let code = code_of(status);
    Ok(Answer {
        text: String::new(),
        json: json!({
            "path": disk.state.path,
            "filesystem": frozen["filesystem"],
            "frozen_us": number(&thawed, "frozen_us")?,
            "status": code,
        }),
        code,
    })
}

fn command(args: &Args, disk: &Attached, output: Output) -> Command {
    let words = args.command.split_first();
    let (program, rest) = words.expect("clap demands one");
    let mut command = Command::new(program);
    command.args(rest).env(DISK, &disk.state.path);
    for (name, value) in [
        (DEVICE, &disk.state.device),
        (MOUNTPOINT, &disk.state.mountpoint),
    ] {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    if output == Output::Json {
        command.stdout(Stdio::from(io::stderr()));
    }
    command
}

/// As a shell has it.
fn not_run(e: &io::Error, args: &Args, output: Output) -> Answer {
    let (code, kind) = match e.kind() {
        ErrorKind::NotFound => (127, "not-found"),
        _ => (126, "privilege"),
    };
    let name = args.command.first().map(|name| name.display().to_string());
    let message = format!("{}: {e}", name.unwrap_or_default());
    report::print_error(code, kind, &message, None, output);
    Answer {
        code,
        ..Answer::default()
    }
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Signals, which COMMAND gets and this process outlives.
struct Signals {
    /// Readable when this process was told to end, and not COMMAND.
    came: UnixStream,
}

impl Signals {
    fn catch() -> Result<Self> {
        let (came, theirs) = UnixStream::pair()?;
        came.set_nonblocking(true)?;
        pipe::register(SIGTERM, theirs)?;
        // The terminal sends these to COMMAND as well.
        for signal in [SIGINT, SIGQUIT, SIGHUP] {
            flag::register(signal, Arc::new(AtomicBool::new(false)))?;
        }
        Ok(Self { came })
    }

    /// Passes on what came.
    fn pass_on(&self, child: &OwnedFd) {
        let mut bytes = [0; 64];
        while matches!((&self.came).read(&mut bytes), Ok(n) if n > 0) {}
        // It may just have ended.
        let _ = pidfd_send_signal(child, Signal::TERM);
    }
}

/// Waits for COMMAND: its status, and why the disk had gone on before it ended, which is said at
/// once.
fn see_to_its_end(
    mut child: Child,
    remote: &mut Remote,
    signals: &Signals,
    path: &str,
) -> Result<(ExitStatus, Option<Error>)> {
    let ended =
        pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(io::Error::from)?;
    let mut early = None;
    loop {
        let [over, signal, _] = wait(&ended, &signals.came, early.is_none().then_some(&*remote))?;
        // What ended before COMMAND did is told from what ended with it by asking it first.
        if early.is_none()
            && let Some(why) = end_of(remote)
        {
            let why = early_end(path, &why);
            report::error(&why, Output::Text);
            early = Some(why);
        }
        if over {
            return Ok((child.wait()?, early));
        }
        if signal {
            signals.pass_on(&ended);
        }
    }
}

/// How the freeze ended, if it has.
fn end_of(remote: &mut Remote) -> Option<String> {
    match remote.thawed() {
        Ok(None) => None,
        Ok(Some(said)) => Some(in_words(&said)),
        Err(e) => Some(format!("nobody keeps the disk frozen any more: {e}")),
    }
}

fn early_end(path: &str, why: &str) -> Error {
    Error::new(Kind::TimedOut, format!("{path}: {why}"))
}

fn in_words(said: &Value) -> String {
    let seconds = said["frozen_us"].as_u64().unwrap_or(0) as f64 / 1e6;
    let why = said["why"].as_str().unwrap_or("unknown");
    format!("the disk went on after {seconds:.3} s ({why}), before the command ended")
}

/// Waits until one of them can be read: which.
fn wait(ended: &OwnedFd, signal: &UnixStream, remote: Option<&Remote>) -> Result<[bool; 3]> {
    let fds = [
        Some(ended.as_fd()),
        Some(signal.as_fd()),
        remote.map(AsFd::as_fd),
    ];
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .flatten()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    match poll(&mut polled, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(io::Error::from(e).into()),
    }
    let mut hit = polled.iter().map(|p| !p.revents().is_empty());
    Ok(fds.map(|fd| fd.is_some() && hit.next().unwrap_or(false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit_and_is_at_most_ten_minutes() {
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("1m 30s"), Ok(Duration::from_secs(90)));
        for bad in ["", "10", "0s", "11m", "-1s"] {
            assert!(time(bad).is_err(), "{bad:?}");
        }
    }
}
