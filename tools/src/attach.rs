//! Attach and detach: starting ploopd, and ending it.
//!
//! Whether a disk is usable, and whether it was closed cleanly, is never guessed from here: the
//! keeper says both, through a pipe at the start and through its lock file at the end.

use crate::holders;
use crate::persona::names;
use command_fds::{CommandFdExt, FdMapping};
use ploop::client;
use ploop::image::target::{Identity, Target};
use ploop::rundir::{self, Departure, Entry, State};
use ploop::serve::supervise::control::Ask;
use ploop::serve::supervise::message::{Announce, KeeperConfig, Report};
use ploop::serve::supervise::{leftover, mounts};
use ploop::{Error, Kind, Result};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Number of the report's pipe in ploopd.
const REPORT_FD: i32 = 3;
/// How long a keeper may take to close an image.
pub const CLOSE_PATIENCE: Duration = Duration::from_secs(120);

/// How long a keeper may take to understand that it is to stop, before it gets a signal.
const ASK_PATIENCE: Duration = Duration::from_secs(1);

/// How long somebody may have a device open without it counting as use.
pub const PROBE_PATIENCE: Duration = Duration::from_secs(2);

/// An attached disk: its run directory, and what it says.
#[derive(Debug, Clone)]
pub struct Attached {
    /// The run directory.
    pub run: PathBuf,
    /// Its state, with today's mount point.
    pub state: State,
}

#[cfg(test)]
impl Attached {
    /// What a keeper of an older release says of a disk.
    pub(crate) fn sample(run: impl Into<PathBuf>, path: &str) -> Self {
        let state = serde_json::json!({
            "schema": 1, "path": path, "uuid": "u", "transport": "nbd", "size": 1 << 20,
            "keeper_pid": 1, "state": "serving", "read_only": false, "cache": "none", "restarts": 0,
        });
        Self {
            run: run.into(),
            state: serde_json::from_value(state).expect("a state"),
        }
    }
}

/// Cleans up after dead keepers, then lists the living, in the order of their paths.
pub fn all() -> Result<Vec<Attached>> {
    leftover::sweep()?;
    registered()
}

/// Lists the living without cleaning up, in the order of their paths. No keeper is asked.
pub fn registered() -> Result<Vec<Attached>> {
    let mounted = mounts::all().unwrap_or_default();
    let mut found = Vec::new();
    for entry in rundir::entries()? {
        if let Entry::Attached {
            path,
            state: Some(mut state),
        } = entry
        {
            let device = state.device.as_deref().map(Path::new);
            let last = device.and_then(|d| mounts::of(&mounted, d).next_back());
            state.mountpoint = last.map(|mount| mount.point.display().to_string());
            found.push(Attached { run: path, state });
        }
    }
    found.sort_by(|a, b| a.state.path.cmp(&b.state.path));
    Ok(found)
}

/// Where a disk's device is mounted, in the order of mounting.
pub fn mounted_at(state: &State) -> Vec<PathBuf> {
    let device = state.device.as_deref().map(Path::new);
    device
        .and_then(|d| mounts::of_device(d).ok())
        .unwrap_or_default()
}

/// Where the root of the file system on a disk's device can be seen.
pub fn root_of(state: &State) -> Option<PathBuf> {
    let device = state.device.as_deref().map(Path::new);
    device.and_then(|d| mounts::whole(d).ok()?)
}

/// The attached disk that DISK, DEVICE or MOUNTPOINT means; `NotFound` when there is none.
pub fn find(what: &Path) -> Result<Attached> {
    let all = all()?;
    let not_attached = || {
        // Whoever forgot sudo should not believe that the disk is gone.
        let whose = match rustix::process::geteuid().is_root() {
            true => "`ploopctl list` shows what is attached",
            false => "`ploopctl list` shows what this user has attached; root's is seen by root",
        };
        let what = format!(
            "{}: no attached disk is known by that; {whose}",
            what.display()
        );
        Error::new(Kind::NotFound, what)
    };
    if let Ok(path) = what.canonicalize() {
        let by_point = |a: &&Attached| mounted_at(&a.state).contains(&path);
        if let Some(found) = all.iter().find(by_point) {
            return Ok(found.clone());
        }
        let meta = std::fs::metadata(&path).map_err(|e| Error::from(e).at(path.display()))?;
        if meta.file_type().is_block_device() {
            let same = |a: &&Attached| {
                let device = a
                    .state
                    .device
                    .as_deref()
                    .and_then(|d| std::fs::metadata(d).ok());
                device.is_some_and(|d| d.rdev() == meta.rdev())
            };
            return all.iter().find(same).cloned().ok_or_else(not_attached);
        }
        let name = Identity::of(&path)?.to_string();
        let by_identity = |a: &&Attached| a.run.ends_with(&name);
        return all
            .iter()
            .find(by_identity)
            .cloned()
            .ok_or_else(not_attached);
    }
    // A disk whose directory is gone is still known by its path.
    let by_path = |a: &&Attached| Path::new(&a.state.path) == what;
    all.iter().find(by_path).cloned().ok_or_else(not_attached)
}

/// The attached disk of this identity, if it is attached.
pub fn by_identity(id: &Identity) -> Result<Option<Attached>> {
    Ok(all()?.into_iter().find(|a| a.run.ends_with(id.to_string())))
}

/// `Busy` while the disk is attached, for what is done only to one that is not.
pub fn refuse(target: &Target) -> Result<()> {
    match by_identity(&target.identity()?)? {
        Some(attached) => Err(Error::new(
            Kind::Busy,
            format!("{}: attached; umount it first", attached.state.path),
        )),
        None => Ok(()),
    }
}

/// Where ploopd is: beside ploopctl, else wherever the path finds it.
pub fn ploopd() -> PathBuf {
    let beside = std::env::current_exe()
        .ok()
        .map(|p| p.with_file_name("ploopd"));
    beside
        .filter(|p| p.exists())
        .unwrap_or_else(|| PathBuf::from("ploopd"))
}

/// Why ploopd could not be started.
pub fn not_started(program: &Path, e: std::io::Error) -> Error {
    Error::from(e).at(format!(
        "starting {}, looked for beside ploopctl and on the PATH",
        program.display()
    ))
}

/// Starts a keeper of its own session and waits until the disk can be used.
pub fn start(mut config: KeeperConfig) -> Result<State> {
    leftover::sweep()?;
    let kept = kept_log(&config);
    config.detached = true;
    config.announce = Announce::Pipe(REPORT_FD);
    let (mut reader, writer) = std::io::pipe()?;
    let text = serde_json::to_string(&config).map_err(|e| Error::invalid(e.to_string()))?;
    let mapping = FdMapping {
        parent_fd: writer.into(),
        child_fd: REPORT_FD,
    };
    let program = ploopd();
    let mut command = Command::new(&program);
    command
        .args(["--config", &text])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .fd_mappings(vec![mapping])
        .map_err(|e| Error::invalid(e.to_string()))?;
    let mut child = command.spawn().map_err(|e| not_started(&program, e))?;
    drop(command);
    let mut report = Vec::new();
    reader.read_to_end(&mut report)?;
    match serde_json::from_slice(&report) {
        Ok(Report::Ready(state)) => {
            // Names that the device, or this disk, had in an earlier life mean somebody else.
            names::forget(
                state.device.as_deref().map(Path::new),
                Path::new(&state.path),
            );
            Ok(*state)
        }
        Ok(Report::Failed(failure)) => {
            let _ = child.wait();
            Err(failure.into())
        }
        Err(_) => {
            let how = child
                .wait()
                .map_or_else(|e| e.to_string(), |s| s.to_string());
            leftover::sweep()?;
            let what = format!(
                "{} ended before it said anything ({how}){}",
                program.display(),
                see_kept(kept.as_deref())
            );
            Err(Error::new(Kind::Io, what))
        }
    }
}

/// Where the log of the disk that is to be attached would be kept.
fn kept_log(config: &KeeperConfig) -> Option<PathBuf> {
    let target = Target::resolve(&config.disk, config.format).ok()?;
    let run = rundir::root()
        .ok()?
        .join(target.identity().ok()?.to_string());
    Some(rundir::kept_log(&run))
}

/// The end of a message about a keeper that died.
fn see_kept(log: Option<&Path>) -> String {
    let log = log.filter(|log| log.exists());
    log.map_or_else(String::new, |log| format!("; see {}", log.display()))
}

/// Unmounts, detaches and waits until the image is closed. `Busy` names who holds it, and leaves
/// everything as it was.
pub fn stop(attached: &Attached) -> Result<()> {
    stop_within(attached, CLOSE_PATIENCE)
}

/// The same; `TimedOut` when the image is not closed within `patience`.
pub fn stop_within(attached: &Attached, patience: Duration) -> Result<()> {
    if let Some(device) = &attached.state.device {
        unmount_all(attached, Path::new(device))?;
    }
    close(attached, patience)
}

/// Detaches without asking who uses the device: for a disk that nobody was told of yet.
pub fn abandon(attached: &Attached) -> Result<()> {
    for point in mounted_at(&attached.state).iter().rev() {
        mounts::detach(point, true)?;
    }
    close(attached, CLOSE_PATIENCE)
}

fn close(attached: &Attached, patience: Duration) -> Result<()> {
    let Some(departure) = Departure::of(&attached.run) else {
        return leftover::sweep();
    };
    terminate(attached)?;
    see_off(attached, departure, patience)
}

/// Waits for a keeper that was told to stop, and passes on how it ended.
pub fn see_off(attached: &Attached, mut departure: Departure, patience: Duration) -> Result<()> {
    let outcome = departure.wait(patience);
    if outcome.is_err() {
        // It died: what it left behind goes now, not with the next command.
        leftover::sweep()?;
    }
    let outcome = outcome.map_err(|e| {
        let log = rundir::kept_log(&attached.run);
        Error::new(e.kind(), format!("{e}{}", see_kept(Some(&log))))
    });
    match outcome? {
        None => Err(Error::new(
            Kind::TimedOut,
            format!(
                "{}: not closed in time; closing goes on{}",
                attached.state.path,
                see_log(&attached.state)
            ),
        )),
        Some(outcome) => match outcome.failure {
            None => Ok(()),
            Some(failure) => Err(Error::from(failure).at(&attached.state.path)),
        },
    }
}

/// Where a disk's keeper says more.
fn see_log(state: &State) -> String {
    match state.log.as_deref() {
        None => String::new(),
        Some("journal") => format!("; see journalctl PLOOP_DISK={}", state.path),
        Some("syslog") => "; see the messages of ploopd in the system's log".into(),
        Some(file) => format!("; see {file}"),
    }
}

fn unmount_all(attached: &Attached, device: &Path) -> Result<()> {
    // Looks like udev's probe, after a write, last an instant.
    let start = Instant::now();
    let mut openers = holders::of_device(device);
    while !openers.is_empty() {
        if start.elapsed() > PROBE_PATIENCE {
            return Err(busy(device, &openers));
        }
        std::thread::sleep(Duration::from_millis(20));
        openers = holders::of_device(device);
    }
    let points = mounted_at(&attached.state);
    // Before the first is undone: a disk that is in use keeps all its mounts.
    for point in &points {
        let users = holders::of_mount(point);
        if !users.is_empty() {
            return Err(busy(point, &users));
        }
    }
    for point in points.iter().rev() {
        if let Err(e) = mounts::detach(point, false) {
            let users = holders::of_mount(point);
            return Err(if e.kind() == Kind::Busy {
                busy(point, &users)
            } else {
                e
            });
        }
    }
    // Told to stop now, the keeper would wait for whoever else has claimed the device. A partition
    // of it is let go of an instant after it was unmounted.
    let start = Instant::now();
    while holders::is_claimed(device) && start.elapsed() < PROBE_PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    match holders::is_claimed(device) {
        true => Err(busy(device, &holders::of_claim(device))),
        false => Ok(()),
    }
}

fn busy(what: &Path, users: &[holders::Holder]) -> Error {
    let names: Vec<String> = users.iter().map(ToString::to_string).collect();
    let who = match names.is_empty() {
        true => {
            "something mounted on it, a mount namespace out of sight, or the kernel".to_string()
        }
        false => names.join(", "),
    };
    let way_out = "end that, or take it away with `umount --force`";
    let what = format!("{} is in use by {who}; {way_out}", what.display());
    Error::new(Kind::Busy, what)
}

/// Asks the keeper to stop: on its control socket, else by a signal. A process that merely got its
/// number is never signalled.
pub fn terminate(attached: &Attached) -> Result<()> {
    let asked = client::ask_all(&[&attached.run], &[Ask::Stop], ASK_PATIENCE);
    if asked.iter().all(Result::is_ok) {
        return Ok(());
    }
    let pid = i32::try_from(attached.state.keeper_pid)
        .ok()
        .and_then(Pid::from_raw);
    let pid =
        pid.ok_or_else(|| Error::damaged(format!("{}: no keeper", attached.run.display())))?;
    let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    // Held now, the lock was held for as long as the descriptor has meant this process.
    if !rundir::is_kept_by(&attached.run, attached.state.keeper_pid) {
        return Ok(());
    }
    rustix::process::pidfd_send_signal(&process, Signal::TERM)
        .map_err(|e| Error::from(std::io::Error::from(e)).at(format!("stopping process {pid:?}")))
}
