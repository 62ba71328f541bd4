//! Errand: another ploopctl, which is confined before it looks at an image, for one that may not be,
//! because it starts programs afterwards.

use crate::cancel::Cancel;
use command_fds::{CommandFdExt, FdMapping};
use ploop::serve::supervise::message::Failure;
use ploop::{Error, Kind, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::ffi::OsString;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

/// Number of the lock in the other process.
const LOCK_FD: i32 = 3;
/// How long a signal may go unnoticed.
const BLINK: Duration = Duration::from_millis(2);

/// Runs `ploopctl ARGS` to its end: what it says, or why it failed. What it warns of is passed on. A
/// signal to this process ends it in order. It says little. A `lock` lasts until both have ended.
pub fn run(args: &[OsString], lock: Option<BorrowedFd<'_>>, cancel: &Cancel) -> Result<Value> {
    let program = std::env::current_exe()?;
    let mut command = Command::new(program);
    // Whatever this one is called.
    command
        .arg0("ploopctl")
        .args(["-o", "json", "--progress", "none"])
        .args(args);
    if let Some(lock) = lock {
        let mapping = FdMapping {
            parent_fd: lock.try_clone_to_owned()?,
            child_fd: LOCK_FD,
        };
        let mapped = command.fd_mappings(vec![mapping]).map(|_| ());
        mapped.map_err(|e| Error::invalid(e.to_string()))?;
    }
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::piped());
    let started = quiet.stderr(Stdio::piped()).spawn();
    let mut child = started.map_err(|e| Error::from(e).at("starting ploopctl"))?;
    drop(command);
    // Read meanwhile: a pipe that is full would keep it from ending.
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let mut told = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !told && cancel.check().is_err() {
            told = true;
            // It may have ended by now.
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
        }
        std::thread::sleep(BLINK);
    };
    let drained = |pipe: JoinHandle<Vec<u8>>| pipe.join().unwrap_or_default();
    let (stdout, stderr) = (drained(stdout), drained(stderr));
    let said = String::from_utf8_lossy(&stderr);
    // A check that finds something says what, and ends with a code of its own.
    if !stdout.is_empty() {
        eprint!("{said}");
        let said = serde_json::from_slice(&stdout);
        return said.map_err(|e| Error::invalid(format!("ploopctl {args:?}: {e}")));
    }
    let (warnings, last) = said.trim_end().rsplit_once('\n').unwrap_or(("", &said));
    if !warnings.is_empty() {
        eprintln!("{warnings}");
    }
    cancel.or(Err(failure(last).unwrap_or_else(|| {
        let what = format!("ploopctl {args:?} ended with {status}: {last}");
        Error::new(Kind::Io, what)
    })))
}

/// Reads a pipe to its end.
fn drain(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        // What comes before an error is all there is.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut all));
        all
    })
}

fn failure(line: &str) -> Option<Error> {
    let mut said: Value = serde_json::from_str(line).ok()?;
    let failure: Failure = serde_json::from_value(said["error"].take()).ok()?;
    Some(failure.into())
}
