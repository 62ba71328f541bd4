//! Drives the binaries as a user does, and cleans up whatever a failed test leaves attached.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod place;
pub mod tree;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The command line under test.
pub const PLOOPCTL: &str = env!("CARGO_BIN_EXE_ploopctl");
/// Built with it and started by it.
pub const PLOOPD: &str = env!("CARGO_BIN_EXE_ploopd");

/// A scratch directory whose disks are detached when it goes.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Self {
        // Keepers outlive the ploopctl that started them; their remains should outlive nobody.
        let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
        let dir = tempfile::Builder::new()
            .prefix("ploop-test-")
            .tempdir()
            .expect("temp dir");
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A directory to mount on.
    pub fn mountpoint(&self) -> PathBuf {
        let point = self.path("mnt");
        std::fs::create_dir_all(&point).expect("mount point");
        point
    }

    /// Makes a disk and gives its path.
    pub fn disk(&self, name: &str, options: &[&str]) -> PathBuf {
        let disk = self.path(name);
        let mut args = vec!["init"];
        args.extend(options);
        args.push(text(&disk));
        ok(&args);
        disk
    }

    /// The attached disks below this directory.
    pub fn attached(&self) -> Vec<Value> {
        let list = json(&["list"]);
        let disks = list["disks"].as_array().expect("disks").clone();
        let below = |d: &Value| {
            d["path"]
                .as_str()
                .is_some_and(|p| p.starts_with(text(self.dir.path())))
        };
        disks.into_iter().filter(below).collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for disk in self.attached() {
            let device = disk["device"].as_str().unwrap_or_default().to_string();
            let path = disk["path"].as_str().unwrap_or_default().to_string();
            eprintln!("cleaning up {path} ({device})");
            run(&["umount", &path]);
        }
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

pub fn run(args: &[&str]) -> Output {
    Command::new(PLOOPCTL)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("ploopctl runs")
}

/// Runs it, expects success, gives standard output.
pub fn ok(args: &[&str]) -> String {
    let output = run(args);
    assert!(
        output.status.success(),
        "ploopctl {args:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs it, expects an exit code, gives standard error.
pub fn fails(code: i32, args: &[&str]) -> String {
    let output = run(args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        output.status.code(),
        Some(code),
        "ploopctl {args:?}: {said}"
    );
    said
}

/// Runs it with JSON output, expects success.
pub fn json(args: &[&str]) -> Value {
    let all: Vec<&str> = ["-o", "json"].iter().chain(args).copied().collect();
    let value: Value = serde_json::from_str(&ok(&all)).expect("JSON");
    assert_eq!(value["schema"], 1, "{value}");
    value
}

/// Says that a test did not run, where a person and a counter see it.
pub fn skip(reason: &str) {
    println!("SKIP: {reason}");
    eprintln!("SKIP: {reason}");
}

/// Whether devices can be attached here; says so when not.
pub fn can_mount() -> bool {
    if !rustix::process::geteuid().is_root() {
        skip("attaching devices needs root");
        return false;
    }
    for node in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(node).exists() {
            skip(&format!("no {node}"));
            return false;
        }
    }
    true
}

/// Whether a program is installed; says so when not.
pub fn has(program: &str) -> bool {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join(program).exists());
    if !found {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Waits until something is so.
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "not within 20 s: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends one process at once.
pub fn kill9(pid: u64) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
}

/// Bytes that repeat nowhere near.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.to_le_bytes());
    }
    out.truncate(len);
    out
}
