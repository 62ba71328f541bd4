//! A disk mounted by `ploopctl mount`, and the search for what a mount might leave behind.

use super::process::{self, eventually, ok, ok_within, run};
use super::programs::{ploopctl, tool};
use super::serve::Disk;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

/// Whether this machine lets a test mount through FUSE and loop; otherwise it is skipped, visibly.
pub fn can_mount(test: &str) -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if !Path::new("/dev/fuse").exists() {
        "no /dev/fuse"
    } else if !Path::new("/dev/loop-control").exists() {
        "no /dev/loop-control"
    } else {
        return true;
    };
    super::skip(test, reason);
    false
}

/// How long a worker may take to come or to go.
const PATIENCE: Duration = Duration::from_secs(60);

/// An attached disk. Dropping it detaches it, however the test ended.
#[derive(Debug)]
pub struct Attached {
    /// The block device.
    pub device: PathBuf,
    /// Where it is mounted, if it is.
    pub mountpoint: Option<PathBuf>,
    /// The process that holds the kernel's descriptors.
    pub keeper: u32,
    disk: PathBuf,
}

impl Attached {
    /// `ploopctl mount DISK`: a block device and nothing more.
    pub fn device_of(disk: &Disk) -> Self {
        Self::device_with(disk, &[])
    }

    /// `ploopctl mount DISK ARGS`.
    pub fn device_with(disk: &Disk, args: &[&str]) -> Self {
        Self::attach(disk, None, args)
    }

    /// `ploopctl mount DISK MOUNTPOINT ARGS`, on a folder beside the disk.
    pub fn mounted(disk: &Disk, args: &[&str]) -> Self {
        let mountpoint = disk.beside("mnt");
        fs::create_dir_all(&mountpoint).unwrap();
        Self::attach(disk, Some(mountpoint), args)
    }

    fn attach(disk: &Disk, mountpoint: Option<PathBuf>, args: &[&str]) -> Self {
        let mut command = ploopctl();
        command
            .arg("mount")
            .arg(disk.path())
            .args(&mountpoint)
            .args(["-o", "json"])
            .args(args);
        let object: Value = serde_json::from_str(&ok(&mut command)).expect("mount -o json");
        assert_eq!(object["path"].as_str(), disk.path().to_str(), "{object}");
        let device = object["device"].as_str().expect("a device").into();
        let keeper = pid(&object, "keeper_pid").expect("a keeper");
        let there = object["mountpoint"].as_str().map(PathBuf::from);
        assert_eq!(there, mountpoint, "{object}");
        Self {
            device,
            mountpoint,
            keeper,
            disk: disk.path(),
        }
    }

    /// The folder where its files are.
    pub fn folder(&self) -> &Path {
        self.mountpoint.as_deref().expect("this disk is mounted")
    }

    /// The worker that serves the disk now, as `list` says; `None` between two workers.
    pub fn worker(&self) -> Option<u32> {
        pid(&listed(&self.disk)?, "worker_pid")
    }

    /// Kills the worker with SIGKILL and returns once another one has served the disk for long enough
    /// that the next kill is none of a series: a keeper gives a disk up whose workers die in a row.
    pub fn kill_worker(&self) {
        let old = self.some_worker();
        kill(old);
        self.await_successor_of(old);
    }

    /// The same of a bare image, at which `look` looks as the dead worker left it: its last writes have
    /// landed, and no other begins while the keeper is stopped.
    pub fn kill_worker_and_look<T>(&self, look: impl FnOnce() -> T) -> T {
        let old = self.some_worker();
        let stopped = Stopped::new(self.keeper);
        kill(old);
        await_last_writes(&self.disk);
        let found = look();
        drop(stopped);
        self.await_successor_of(old);
        found
    }

    fn some_worker(&self) -> u32 {
        eventually("a worker", PATIENCE, || self.worker())
    }

    fn await_successor_of(&self, old: u32) {
        eventually("another worker", PATIENCE, || {
            let disk = listed(&self.disk)?;
            let new = pid(&disk, "worker_pid").filter(|new| *new != old)?;
            (disk["state"] == "serving").then_some(new)
        });
        thread::sleep(Duration::from_millis(150));
    }

    /// `ploopctl umount DISK`, which must leave nothing.
    pub fn detach(self) {
        ok_within(ploopctl().arg("umount").arg(&self.disk), process::DEADLINE);
        let (disk, keeper) = (self.disk.clone(), self.keeper);
        drop(self);
        assert_nothing_left(&disk, &[keeper]);
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if listed(&self.disk).is_none() {
            return;
        }
        if !run(ploopctl().arg("umount").arg(&self.disk))
            .status
            .success()
        {
            if let Some(folder) = &self.mountpoint {
                let _ = run(tool("umount").arg("--lazy").arg(folder));
            }
            kill(self.keeper);
            let _ = run(ploopctl().args(["list", "-o", "json"]));
        }
    }
}

/// Waits until whoever had an image open for writing, and is dead, has no write on its way to it.
fn await_last_writes(image: &Path) {
    let file = fs::File::open(image).unwrap();
    let fence = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    eventually("the last write of a dead worker", PATIENCE, || {
        rustix::fs::flock(&file, fence).ok()
    });
}

/// A process that does nothing for as long as this is there.
struct Stopped(u32);

impl Stopped {
    fn new(process: u32) -> Self {
        let stopped = Self(process);
        stopped.signal(Signal::STOP);
        eventually("a stopped process", PATIENCE, || {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
            let (_, state) = stat.rsplit_once(')').unwrap();
            state.trim_start().starts_with('T').then_some(())
        });
        stopped
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.0.try_into().unwrap()).expect("not process 0");
        let _ = kill_process(pid, signal);
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
    }
}

/// Checking shares two cores with everything else.
const CHECKER_PATIENCE: Duration = Duration::from_secs(300);

/// The file system's own checker on an unmounted device; it must change nothing and find nothing.
fn checker(fs: &str, device: &Path) -> Command {
    let (name, args): (&str, &[&str]) = match fs {
        "ext4" => ("e2fsck", &["-f", "-n"]),
        "xfs" => ("xfs_repair", &["-n"]),
        "btrfs" => ("btrfs", &["check", "--readonly"]),
        other => unreachable!("no checker for {other}"),
    };
    let mut command = tool(name);
    command.args(args).arg(device);
    command
}

/// Attaches the disk without mounting it, checks it, detaches it.
pub fn assert_fsck_clean(fs: &str, disk: &Disk) {
    assert_fsck_clean_with(fs, disk, &[]);
}

/// The same, of a disk that is mounted with `args`.
pub fn assert_fsck_clean_with(fs: &str, disk: &Disk, args: &[&str]) {
    let attached = Attached::device_with(disk, args);
    ok_within(&mut checker(fs, &attached.device), CHECKER_PATIENCE);
    attached.detach();
}

/// SIGKILL, to a process of this test's disk; it may be gone already.
pub fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).expect("not process 0");
    let _ = kill_process(pid, Signal::KILL);
}

/// The process that changes names for this keeper, while there is one.
pub fn changer_of(keeper: u32) -> Option<u32> {
    child_of(keeper, "--change")
}

/// The child of a process that has this among its arguments, while there is one.
pub fn child_of(parent: u32, argument: &str) -> Option<u32> {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let pid: Option<u32> = entry.file_name().to_string_lossy().parse().ok();
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let its_parent = stat
            .rsplit(')')
            .next()
            .and_then(|s| s.split_whitespace().nth(1));
        let mut words = words.split(|byte| *byte == 0);
        if its_parent == Some(&parent.to_string()) && words.any(|w| w == argument.as_bytes()) {
            return pid;
        }
    }
    None
}

/// The object of an attached disk in `ploopctl list -o json`.
pub fn listed(disk: &Path) -> Option<Value> {
    let all: Value =
        serde_json::from_str(&ok(ploopctl().args(["list", "-o", "json"]))).expect("list -o json");
    assert!(
        all["schema"].is_number() || all["schema"].is_string(),
        "no schema: {all}"
    );
    let disks = all["disks"].as_array().expect("a list of disks");
    disks
        .iter()
        .find(|d| d["path"].as_str() == disk.to_str())
        .cloned()
}

fn pid(object: &Value, field: &str) -> Option<u32> {
    object[field]
        .as_u64()
        .filter(|pid| *pid > 0)
        .map(|pid| pid as u32)
}

/// Demands that no loop device, mount, process or run directory of the disk is left.
/// `processes` are those that were seen to serve it.
pub fn assert_nothing_left(disk: &Path, processes: &[u32]) {
    let folder = disk.parent().unwrap_or(disk).to_str().unwrap().to_owned();
    let run = run_directory(disk);
    eventually(
        "the end of every process of the disk",
        Duration::from_secs(20),
        || remains_in_proc(&folder, processes).is_empty().then_some(()),
    );
    // After a keeper that was killed another process's command may just be cleaning up.
    eventually(
        "the end of the run directory",
        Duration::from_secs(20),
        || (!run.exists()).then_some(()),
    );
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mine: Vec<&str> = mounts
        .lines()
        .filter(|l| of_disk(l, &folder, &run))
        .collect();
    assert!(mine.is_empty(), "mounts are left: {mine:?}");
    let loops = ok(tool("losetup").args(["--list", "--noheadings", "--output", "NAME,BACK-FILE"]));
    let mine: Vec<&str> = loops
        .lines()
        .filter(|l| of_disk(l, &folder, &run))
        .collect();
    assert!(mine.is_empty(), "loop devices are left: {mine:?}");
}

fn of_disk(line: &str, folder: &str, run: &Path) -> bool {
    let run = run.to_str().unwrap();
    let mut words = line.split(|c: char| c.is_whitespace());
    line.contains(folder) || words.any(|word| word.starts_with(&format!("{run}/")))
}

/// Where a disk is registered while it is attached.
pub fn run_directory(disk: &Path) -> PathBuf {
    let meta = fs::metadata(disk).unwrap();
    Path::new("/run/ploop").join(format!("{}-{}", meta.dev(), meta.ino()))
}

fn remains_in_proc(folder: &str, processes: &[u32]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let Ok(words) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        // A zombie has no command line: it is dead, whoever has yet to notice.
        let named = words.contains("ploopd") && words.contains(folder);
        if named || (processes.contains(&pid) && words.contains("ploopd")) {
            found.push(format!("{pid}: {words}"));
        }
    }
    found
}

/// Lines of the kernel's log that tell of failed I/O on a device since the mark.
pub fn kernel_complaints(device: &Path, since: &KernelMark) -> Vec<String> {
    let name = device.file_name().unwrap().to_str().unwrap().to_owned();
    let bad = [
        "I/O error",
        "critical",
        "Buffer I/O",
        "shutdown",
        "Corruption",
        "EXT4-fs error",
    ];
    let lines = ok(&mut tool("dmesg"));
    let new = lines
        .rsplit_once(&since.0)
        .map_or(lines.as_str(), |(_, new)| new)
        .lines();
    let whole_name = |line: &str| {
        line.split(|c: char| !c.is_ascii_alphanumeric())
            .any(|word| word == name)
    };
    new.filter(|l| whole_name(l) && bad.iter().any(|b| l.contains(b)))
        .map(str::to_owned)
        .collect()
}

/// A line of our own in the kernel's log: what follows it happened afterwards.
#[derive(Debug)]
pub struct KernelMark(String);

impl KernelMark {
    /// Writes the mark.
    pub fn new(test: &str) -> Self {
        let text = format!("ploop test {test} {}", std::process::id());
        let _ = fs::write("/dev/kmsg", &text);
        Self(text)
    }
}
