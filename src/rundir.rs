//! Run directory: where an attached disk is registered while it is attached.
//!
//! `/run/ploop/<dev>-<inode>/` (without root `$XDG_RUNTIME_DIR/ploop`, else `/tmp/ploop-<uid>`)
//! holds `lock`, `state.json`, the sockets `control` and `metrics`, `disk` (the FUSE mount point) and
//! `log`. The keeper holds an exclusive flock on `lock` for life, so a directory whose lock is free is
//! a leftover. The last thing a keeper writes is its [`Outcome`], into the lock file: who waits for
//! the lock on an open descriptor can read it even after the directory is gone. The log of a disk
//! whose keeper failed is kept beside the directory, as `<dev>-<inode>.log`, until the disk is attached again.
//!
//! Nothing here mounts, unmounts or kills; it must never follow a link that another user made.

use crate::image::target::Identity;
use crate::serve::supervise::message::Failure;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What an attached disk is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not usable yet.
    Starting,
    /// In use.
    Serving,
    /// Its worker died; another is taking over and requests wait.
    Recovering,
    /// Being detached.
    Stopping,
    /// No worker can make durable what is written, or serve at all: writes, or all requests, fail
    /// with EIO until it is recovered or detached.
    Failed,
}

/// One attached disk, as `state.json` and `list -o json` show it. Field names are stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Version of this object: 1.
    pub schema: u32,
    /// The image directory, or the bare image file.
    pub path: String,
    /// UUIDv5 of the disk's device and inode; valid while it is attached, never stored in it.
    pub uuid: String,
    /// Block device (`/dev/loopN`), when there is one.
    pub device: Option<String>,
    /// Where the device is mounted.
    pub mountpoint: Option<String>,
    /// `fuse+loop` or `nbd`.
    pub transport: String,
    /// Where NBD clients connect.
    pub uri: Option<String>,
    /// The unix socket of that, when it is one that we made.
    pub socket: Option<String>,
    /// The process that does the work; absent while one is being replaced.
    pub worker_pid: Option<u32>,
    /// The process that keeps the disk.
    pub keeper_pid: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// What it is doing.
    pub state: Phase,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Name or ID of the snapshot of a bare qcow2 image that it shows, as its user gave it.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// `none` or `writeback`.
    pub cache: String,
    /// What drives its I/O: `io_uring` or `poll`.
    pub engine: Option<String>,
    /// Whether the host is low on space, so that the disk takes no more, or soon will not.
    #[serde(default)]
    pub host_low: bool,
    /// Whether it is kept as it is, so that who writes waits.
    #[serde(default)]
    pub frozen: bool,
    /// How many times a worker died and was replaced.
    pub restarts: u32,
    /// Where it says what happens to it: `journal`, `syslog` or a file; none when that is the
    /// standard error of who started it.
    #[serde(default)]
    pub log: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

/// How a keeper ended: nothing, or what went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Why the image was not closed cleanly.
    pub failure: Option<Failure>,
}

/// A claimed run directory. Only [`RunDir::finish`] removes it.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    lock: File,
}

#[cfg(test)]
impl State {
    /// What a keeper of an older release says of a disk.
    pub(crate) fn sample(path: &str) -> Self {
        let state = serde_json::json!({
            "schema": 1, "path": path, "uuid": "u", "transport": "nbd", "size": 1 << 20,
            "keeper_pid": 1, "state": "serving", "read_only": false, "cache": "none", "restarts": 0,
        });
        serde_json::from_value(state).expect("a state")
    }
}

/// The log, and the part of it that was turned over.
const LOGS: [&str; 2] = ["log", "log.1"];
/// Logs that are kept at most, of all disks.
const KEPT_MAX: usize = 32;

/// How long a claim waits for somebody who is just cleaning up.
const CLAIM_PATIENCE: Duration = Duration::from_secs(5);

/// The directory of run directories, made on demand with mode 0700.
///
/// Fails with `Privilege` when somebody else owns it: a run directory tells us which devices to
/// unmount.
pub fn root() -> Result<PathBuf> {
    let uid = rustix::process::geteuid();
    let path = if uid.is_root() {
        PathBuf::from("/run/ploop")
    } else if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        PathBuf::from(dir).join("ploop")
    } else {
        PathBuf::from(format!("/tmp/ploop-{}", uid.as_raw()))
    };
    make_dir(&path)?;
    let meta = std::fs::symlink_metadata(&path).map_err(|e| Error::from(e).at(path.display()))?;
    if !meta.is_dir() || meta.uid() != uid.as_raw() || meta.mode() & 0o077 != 0 {
        return Err(Error::new(
            Kind::Privilege,
            format!(
                "{}: not a directory of mode 0700 that user {} owns; remove it",
                path.display(),
                uid.as_raw()
            ),
        ));
    }
    Ok(path)
}

fn make_dir(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::from(e).at(path.display()))
        }
        _ => Ok(()),
    }
}

/// Opens and locks `<dir>/lock`; `None` when it is held, or when the directory went away.
fn try_lock(dir: &Path, create: bool) -> Result<Option<File>> {
    let path = dir.join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).mode(0o600);
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::from(e).at(path.display())),
    };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    // Whoever held it before may have removed the file that we opened.
    let ours = file
        .metadata()
        .map_err(|e| Error::from(e).at(path.display()))?;
    let there = std::fs::symlink_metadata(&path).ok();
    Ok(there
        .filter(|m| m.ino() == ours.ino() && m.dev() == ours.dev())
        .map(|_| file))
}

impl RunDir {
    /// Claims the run directory of a disk, or says `Busy`. `leftover` is called when a dead
    /// keeper's remains are in it and must leave the directory usable.
    pub fn claim(id: &Identity, leftover: impl Fn(&RunDir)) -> Result<Self> {
        let path = root()?.join(id.to_string());
        let start = Instant::now();
        loop {
            make_dir(&path)?;
            if let Some(lock) = try_lock(&path, true)? {
                let claimed = Self { path, lock };
                claimed
                    .lock
                    .set_len(0)
                    .map_err(|e| Error::from(e).at("lock"))?;
                if has_remains(&claimed.path) {
                    leftover(&claimed);
                    claimed.forget();
                }
                return Ok(claimed);
            }
            // Held without a living keeper: somebody is cleaning up, which is soon over.
            let kept = state_in(&path).is_some_and(|s| alive(s.keeper_pid));
            if kept || start.elapsed() > CLAIM_PATIENCE {
                return Err(busy(&path));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says about itself.
    pub fn state(&self) -> Option<State> {
        state_in(&self.path)
    }

    /// Where the FUSE file system is mounted.
    pub fn disk(&self) -> PathBuf {
        self.path.join("disk")
    }

    /// Replaces `state.json` in one step.
    pub fn publish(&self, state: &State) -> Result<()> {
        let tmp = self.path.join("state.json.tmp");
        let at = |e: std::io::Error| Error::from(e).at(tmp.display());
        let text = serde_json::to_vec_pretty(state).map_err(|e| at(e.into()))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&tmp)
            .map_err(at)?;
        file.write_all(&text).map_err(at)?;
        std::fs::rename(&tmp, self.path.join("state.json")).map_err(at)
    }

    /// Leaves the outcome to whoever waits, and removes the directory. Files only: what is
    /// mounted on `disk` was unmounted before. The log of a failure is kept.
    pub fn finish(mut self, outcome: &Outcome) {
        let text = serde_json::to_vec(outcome).unwrap_or_default();
        let written = self
            .lock
            .set_len(0)
            .and_then(|()| self.lock.write_all(&text));
        if let Err(e) = written {
            tracing::warn!("{}: cannot leave the outcome: {e}", self.path.display());
        }
        self.forget();
        for log in LOGS {
            let (here, there) = (self.path.join(log), kept(&self.path, log));
            let says = std::fs::metadata(&here).is_ok_and(|m| m.len() > 0);
            if outcome.failure.is_none() || !says || std::fs::rename(&here, there).is_err() {
                let _ = std::fs::remove_file(&here);
            }
        }
        forget_old_logs(&self.path);
        // The lock goes last: until then a newcomer waits instead of moving in.
        let _ = std::fs::remove_file(self.path.join("lock"));
        if let Err(e) = std::fs::remove_dir(&self.path) {
            tracing::warn!("{}: not removed: {e}", self.path.display());
        }
    }

    /// [`kept_log`] of this disk.
    pub fn kept_log(&self) -> PathBuf {
        kept_log(&self.path)
    }

    /// Removes what was kept of an earlier failure: the disk is in use again.
    pub fn forget_kept_log(&self) {
        for log in LOGS {
            let _ = std::fs::remove_file(kept(&self.path, log));
        }
    }

    /// Removes the files of a former keeper, so that a new one starts from nothing.
    fn forget(&self) {
        for name in ["state.json", "state.json.tmp", "control", "metrics"] {
            let _ = std::fs::remove_file(self.path.join(name));
        }
        let disk = self.disk();
        let _ = std::fs::remove_file(&disk).or_else(|_| std::fs::remove_dir(&disk));
    }
}

/// Where the log of the disk with this run directory is found once its keeper has failed.
pub fn kept_log(dir: &Path) -> PathBuf {
    kept(dir, LOGS[0])
}

fn kept(dir: &Path, log: &str) -> PathBuf {
    dir.with_extension(log)
}

/// Disks that fail and are deleted must not fill the memory that the directories are in.
fn forget_old_logs(dir: &Path) {
    let files = dir.parent().and_then(|root| std::fs::read_dir(root).ok());
    let files = files.into_iter().flatten().flatten().filter_map(|entry| {
        let meta = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some((meta.modified().ok()?, entry.path()))
    });
    let mut files: Vec<_> = files.collect();
    files.sort();
    for (_, old) in files.iter().rev().skip(KEPT_MAX) {
        let _ = std::fs::remove_file(old);
    }
}

/// Whether somebody left more than a lock: a keeper that died early has mounted `disk` and written
/// no state yet. Only names are read, because a dead mount cannot even be looked at.
fn has_remains(dir: &Path) -> bool {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name())
        .any(|name| name != "lock")
}

/// Whether a process runs. One that is dead but not reaped yet does not.
fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
    state.flatten().is_some_and(|c| !matches!(c, 'Z' | 'X'))
}

/// Whether a process is the keeper of a run directory: the one that holds its lock, and no
/// successor, nobody who cleans up, and nobody who merely got its number.
pub fn is_kept_by(dir: &Path, pid: u32) -> bool {
    let Ok(lock) = std::fs::symlink_metadata(dir.join("lock")) else {
        return false;
    };
    let (holder, inode) = (pid.to_string(), format!(":{}", lock.ino()));
    let Ok(locks) = std::fs::read_to_string("/proc/locks") else {
        // Nobody can tell; its state names it.
        return state_in(dir).is_some_and(|state| state.keeper_pid == pid);
    };
    locks.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(1) == Some("FLOCK")
            && words.nth(2) == Some(&holder)
            && words.next().is_some_and(|file| file.ends_with(&inode))
    })
}

fn busy(dir: &Path) -> Error {
    let what = match state_in(dir) {
        Some(s) => format!("{}: attached already (keeper {})", s.path, s.keeper_pid),
        None => format!("{}: another command is working on this disk", dir.display()),
    };
    Error::new(Kind::Busy, what)
}

fn state_in(dir: &Path) -> Option<State> {
    serde_json::from_slice(&std::fs::read(dir.join("state.json")).ok()?).ok()
}

/// A run directory that exists.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a handful live, briefly")]
pub enum Entry {
    /// A keeper holds it. Without a state it is only just starting.
    Attached {
        /// The run directory.
        path: PathBuf,
        /// What it says about itself.
        state: Option<State>,
    },
    /// Its keeper is dead; it is locked here until it is finished or dropped.
    Leftover(RunDir),
}

/// Every run directory, leftovers locked for cleaning.
pub fn entries() -> Result<Vec<Entry>> {
    let root = root()?;
    let listing = std::fs::read_dir(&root).map_err(|e| Error::from(e).at(root.display()))?;
    let mut found = Vec::new();
    for item in listing.flatten() {
        let path = item.path();
        if item.file_type().is_ok_and(|t| t.is_file()) {
            // A log that was kept.
            continue;
        }
        if !path.join("lock").exists() && !has_remains(&path) {
            // Between making the directory and its lock, or between removing both.
            let _ = std::fs::remove_dir(&path);
            continue;
        }
        found.extend(look(path)?);
    }
    Ok(found)
}

/// What a run directory is; nothing when it goes away while we look.
fn look(path: PathBuf) -> Result<Option<Entry>> {
    let start = Instant::now();
    loop {
        // The lock goes last: remains without one could not be removed, and are a leftover, too.
        let stuck = !path.join("lock").exists() && has_remains(&path);
        if let Some(lock) = try_lock(&path, stuck)? {
            return Ok(Some(Entry::Leftover(RunDir { path, lock })));
        }
        if !path.join("lock").exists() {
            return Ok(None);
        }
        let state = state_in(&path);
        // Locked although its keeper is dead: another command is cleaning it up, or a new keeper
        // is about to register. Either is over soon.
        let settled = state.as_ref().is_none_or(|s| alive(s.keeper_pid));
        if settled || start.elapsed() > CLAIM_PATIENCE {
            return Ok(Some(Entry::Attached { path, state }));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until a keeper is gone.
#[derive(Debug)]
pub struct Departure {
    lock: File,
    path: PathBuf,
}

impl Departure {
    /// Prepares to wait for the keeper of `dir`; call before telling it to go. `None` when it is
    /// gone already.
    pub fn of(dir: &Path) -> Option<Self> {
        let lock = File::open(dir.join("lock")).ok()?;
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => None,
            Err(_) => Some(Self {
                lock,
                path: dir.to_path_buf(),
            }),
        }
    }

    /// Waits up to `patience` for the end. `Ok(None)` means that the time was up; a keeper that
    /// died without a word is an `Io` error.
    pub fn wait(&mut self, patience: Duration) -> Result<Option<Outcome>> {
        let start = Instant::now();
        while flock(&self.lock, FlockOperation::NonBlockingLockShared).is_err() {
            if start.elapsed() > patience {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut text = Vec::new();
        let _ = self
            .lock
            .rewind()
            .and_then(|()| self.lock.read_to_end(&mut text));
        // Held on to, it would keep even ourselves from cleaning up.
        let _ = flock(&self.lock, FlockOperation::Unlock);
        serde_json::from_slice(&text).map(Some).map_err(|_| {
            Error::new(
                Kind::Io,
                format!(
                    "{}: the keeper died before it closed the image",
                    self.path.display()
                ),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// The run directory of a disk that nobody else has, with a keeper's early remains in it.
    fn early_death() -> (tempfile::TempDir, Identity, PathBuf) {
        let disk = tempfile::tempdir().expect("temp dir");
        let id = Identity::of(disk.path()).expect("identity");
        let dir = root().expect("root").join(id.to_string());
        make_dir(&dir).expect("run directory");
        std::fs::write(dir.join("disk"), "").expect("mount point");
        (disk, id, dir)
    }

    #[test]
    fn a_keeper_that_died_before_it_wrote_its_state_is_cleaned_up_after() {
        let (_disk, id, dir) = early_death();
        let cleaned = Cell::new(0);
        let run = RunDir::claim(&id, |_| cleaned.set(cleaned.get() + 1)).expect("claimed");
        assert_eq!(cleaned.get(), 1);
        assert!(!dir.join("disk").exists());
        run.finish(&Outcome { failure: None });
        let run = RunDir::claim(&id, |_| cleaned.set(cleaned.get() + 1)).expect("claimed");
        assert_eq!(cleaned.get(), 1, "nothing was left");
        run.finish(&Outcome { failure: None });
        assert!(!dir.exists());
    }

    #[test]
    fn the_log_of_a_failure_outlives_the_run_directory_until_the_disk_is_used_again() {
        let (_disk, id, dir) = early_death();
        let leave = |failure: Option<Error>| {
            let run = RunDir::claim(&id, |_| ()).expect("claimed");
            std::fs::write(dir.join("log"), "why").expect("log");
            let failure = failure.map(|e| Failure::from(&e));
            run.finish(&Outcome { failure });
            assert!(!dir.exists());
            std::fs::read(kept_log(&dir)).ok()
        };
        assert_eq!(leave(None), None);
        assert_eq!(leave(Some(Error::poisoned())), Some(b"why".to_vec()));
        entries().expect("a kept log is no run directory");
        assert_eq!(leave(None), Some(b"why".to_vec()), "nobody used it yet");
        let run = RunDir::claim(&id, |_| ()).expect("claimed");
        run.forget_kept_log();
        run.finish(&Outcome { failure: None });
        assert!(!kept_log(&dir).exists());
    }

    #[test]
    fn the_keeper_is_the_process_that_holds_the_lock() {
        let (_disk, id, dir) = early_death();
        let own = std::process::id();
        let run = RunDir::claim(&id, |_| ()).expect("claimed");
        assert!(is_kept_by(&dir, own) && !is_kept_by(&dir, own + 1));
        run.finish(&Outcome { failure: None });
        assert!(!is_kept_by(&dir, own));
    }

    #[test]
    fn who_has_seen_a_keeper_die_can_clean_up_after_it_at_once() {
        let (_disk, id, dir) = early_death();
        let run = RunDir::claim(&id, |_| ()).expect("claimed");
        let mut departure = Departure::of(&dir).expect("it lives");
        drop(run);
        departure
            .wait(Duration::ZERO)
            .expect_err("it died without a word");
        // Others clean up, too.
        let free = || try_lock(&dir, false).expect("a lock").is_some() || !dir.exists();
        let start = Instant::now();
        while !free() {
            assert!(start.elapsed() < CLAIM_PATIENCE, "we hold the lock");
        }
        let _ = std::fs::remove_dir_all(&dir);
    }

    #[test]
    fn remains_that_lost_their_lock_are_a_leftover() {
        let (_disk, _, dir) = early_death();
        let left = entries()
            .expect("entries")
            .into_iter()
            .find_map(|e| match e {
                Entry::Leftover(run) if run.path() == dir => Some(run),
                _ => None,
            });
        left.expect("found").finish(&Outcome { failure: None });
        assert!(!dir.exists());
    }
}
