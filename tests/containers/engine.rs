//! Two container engines behind one face: `runc` by itself, and `podman run --rootfs`. What they keep
//! of a container lives in a folder of the test's, and goes with it.

use crate::common::process::{Guard, ok, run, run_within};
use crate::common::programs::tool;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// What every container here may use.
pub const MEMORY: u64 = 48 << 20;
/// Processes in a container at most.
pub const PIDS: u64 = 24;
/// Starting, running and ending a container shares two cores with everything else.
const PATIENCE: Duration = Duration::from_secs(120);

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `runc run` on a bundle.
    Runc,
    /// `podman run --rootfs`.
    Podman,
}

impl Kind {
    /// What must be installed.
    pub fn tools(self) -> &'static [&'static str] {
        match self {
            Self::Runc => &["runc", "busybox", "mkfs.ext4"],
            Self::Podman => &["podman", "runc", "conmon", "busybox", "mkfs.ext4"],
        }
    }
}

/// An engine that runs containers on one root file system.
#[derive(Debug)]
pub struct Engine {
    kind: Kind,
    root: PathBuf,
    folder: TempDir,
    /// Names the container and its control group.
    pub name: String,
}

impl Engine {
    /// Makes a root file system of busybox in `root`, unless there is one.
    pub fn new(kind: Kind, root: &Path) -> Self {
        make_root(root);
        let folder = TempDir::new().unwrap();
        let name = format!(
            "ploop-test-{}",
            folder.path().file_name().unwrap().to_str().unwrap()
        );
        let name = name.replace("-.", "-");
        let root = root.to_path_buf();
        Self {
            kind,
            root,
            folder,
            name,
        }
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The engine's program with the options that keep it in this test's folder.
    fn program(&self) -> Command {
        let mut command = match self.kind {
            Kind::Runc => tool("runc"),
            Kind::Podman => tool("podman"),
        };
        // A container that runs out of memory gets a file about it in the current folder.
        command.current_dir(self.folder.path());
        command.arg("--root").arg(self.beside("root"));
        if self.kind == Kind::Podman {
            command
                .arg("--runroot")
                .arg(self.beside("run"))
                .arg("--tmpdir")
                .arg(self.beside("tmp"));
            command.args(["--storage-driver=vfs", "--cgroup-manager=cgroupfs"]);
            command.args(["--events-backend=file", "--runtime=runc"]);
        }
        command
    }

    /// The command that runs `script` in a container of this name.
    fn command(&self, script: &str) -> Command {
        let mut command = self.program();
        if self.kind == Kind::Runc {
            self.write_bundle(script);
            command
                .args(["run", "--bundle"])
                .arg(self.folder.path())
                .arg(&self.name);
            return command;
        }
        command.args(["run", "--rm", "--network=none", "--name", &self.name]);
        command.arg(format!("--cgroup-parent=/{}", self.name));
        command
            .arg(format!("--memory={MEMORY}"))
            .arg(format!("--pids-limit={PIDS}"));
        // Machines for tests may not raise limits, and podman's own are high.
        command.args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000"]);
        command
            .arg("--rootfs")
            .arg(&self.root)
            .args(["sh", "-c", script]);
        command
    }

    fn write_bundle(&self, script: &str) {
        let config = self.beside("config.json");
        let _ = fs::remove_file(&config);
        ok(tool("runc").arg("spec").current_dir(self.folder.path()));
        let mut spec: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = json!(["sh", "-c", script]);
        spec["root"] = json!({ "path": self.root, "readonly": false });
        spec["linux"]["cgroupsPath"] = format!("/{}", self.name).into();
        spec["linux"]["resources"]["memory"] = json!({ "limit": MEMORY });
        spec["linux"]["resources"]["pids"] = json!({ "limit": PIDS });
        fs::write(config, spec.to_string()).unwrap();
    }

    /// Runs a script to its end: exit code and what it said.
    pub fn run(&self, script: &str) -> (Option<i32>, String) {
        let said = run_within(&mut self.command(script), PATIENCE);
        (said.status.code(), said.out + &said.err)
    }

    /// Runs a script that must succeed, and returns what it said.
    pub fn ok(&self, script: &str) -> String {
        let (code, said) = self.run(script);
        assert_eq!(code, Some(0), "{script}: {said}");
        said
    }

    /// Starts a script; its lines can be waited for.
    pub fn start(&self, script: &str) -> Running<'_> {
        let mut guard = Guard::spawn(self.command(script).stdin(Stdio::null()));
        let (sender, lines) = mpsc::channel();
        let pipe = BufReader::new(guard.child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in pipe.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Running {
            engine: self,
            guard,
            lines,
        }
    }

    /// The container's first process, as the host numbers it.
    pub fn pid(&self) -> u32 {
        let said = match self.kind {
            Kind::Runc => ok(self.program().arg("state").arg(&self.name)),
            Kind::Podman => ok(self.program().args(["inspect", &self.name])),
        };
        let state: Value = serde_json::from_str(&said).unwrap();
        let pid = match self.kind {
            Kind::Runc => &state["pid"],
            Kind::Podman => &state[0]["State"]["Pid"],
        };
        pid.as_u64().expect("a running container has a process") as u32
    }

    /// Stops all of the container's processes where they are.
    pub fn pause(&self) {
        ok(self.program().arg("pause").arg(&self.name));
    }

    /// Lets them go on.
    pub fn resume(&self) {
        let verb = if self.kind == Kind::Runc {
            "resume"
        } else {
            "unpause"
        };
        ok(self.program().arg(verb).arg(&self.name));
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = run(self
            .program()
            .args(["kill", &self.name, "KILL"])
            .stderr(Stdio::null()));
        let verb = if self.kind == Kind::Runc {
            "delete"
        } else {
            "rm"
        };
        let _ = run(self.program().args([verb, "--force", &self.name]));
        // The parent group that podman was told to use.
        for controller in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(controller.path().join(&self.name));
        }
    }
}

/// A container that runs.
#[derive(Debug)]
pub struct Running<'a> {
    engine: &'a Engine,
    guard: Guard,
    lines: Receiver<String>,
}

impl Running<'_> {
    /// The next line that the container says.
    pub fn line(&self) -> String {
        self.lines
            .recv_timeout(PATIENCE)
            .expect("a line from the container")
    }

    /// SIGKILL to the container; returns the lines it had said and nobody had read.
    pub fn kill(mut self) -> Vec<String> {
        let mut kill = self.engine.program();
        match self.engine.kind {
            Kind::Runc => kill.args(["kill", &self.engine.name, "KILL"]),
            Kind::Podman => kill.args(["kill", "--signal=KILL", &self.engine.name]),
        };
        ok(&mut kill);
        let status = self
            .guard
            .wait_within(PATIENCE)
            .expect("a killed container ends");
        assert!(!status.success(), "{status}");
        self.lines.iter().collect()
    }
}

/// busybox under every name that a script here uses, and the folders that an engine mounts on.
fn make_root(root: &Path) {
    for folder in ["bin", "data", "dev", "etc", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let busybox = root.join("bin/busybox");
    if busybox.exists() {
        return;
    }
    let ours = crate::common::programs::search_path();
    let ours = ours
        .iter()
        .map(|folder| folder.join("busybox"))
        .find(|path| path.is_file());
    fs::copy(ours.expect("busybox is installed"), &busybox).unwrap();
    for name in [
        "sh", "cat", "cmp", "dd", "head", "ls", "rm", "seq", "sleep", "sync", "tail", "yes",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
}
