//! A disk of our own, served by `ploopctl serve`.

use super::process::{Guard, ok, run_within};
use super::programs::{ploopctl, ploopctl_path};
use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a server may take to start, and to stop with everything on disk.
const PATIENCE: Duration = Duration::from_secs(30);

/// A fresh disk without a file system in a folder of its own, removed with it.
#[derive(Debug)]
pub struct Disk {
    folder: TempDir,
}

impl Disk {
    /// `ploopctl init -s SIZE --fs none ARGS DIR`.
    pub fn new(size: &str, args: &[&str]) -> Self {
        Self::with_fs(size, "none", args)
    }

    /// `ploopctl init -s SIZE --fs FS ARGS DIR`.
    pub fn with_fs(size: &str, fs: &str, args: &[&str]) -> Self {
        Self::in_folder(TempDir::new().expect("a temporary folder"), size, fs, args)
    }

    /// The same, where the caller says.
    pub fn in_folder(folder: TempDir, size: &str, fs: &str, args: &[&str]) -> Self {
        let disk = Self { folder };
        ok(ploopctl()
            .args(["init", "-s", size, "--fs", fs])
            .args(args)
            .arg(disk.path()));
        disk
    }

    /// A disk that the caller has made in `folder`/disk.
    pub fn around(folder: TempDir) -> Self {
        Self { folder }
    }

    /// The disk's folder, which holds DiskDescriptor.xml.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// The disk's only image.
    pub fn image(&self) -> PathBuf {
        self.path().join("root.hds")
    }

    /// A name beside the disk for anything else that a test needs; gone with it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Serves the disk on a unix socket beside it.
    pub fn serve(&self, args: &[&str]) -> Server {
        let socket = self.beside("socket");
        Server::start(
            &mut self.serve_command(&format!("unix:{}", socket.display()), args),
            socket,
        )
    }

    /// `ploopctl serve DISK --nbd WHERE ARGS`, not started.
    pub fn serve_command(&self, on: &str, args: &[&str]) -> Command {
        let mut command = ploopctl();
        command
            .arg("serve")
            .arg(self.path())
            .args(["--nbd", on])
            .args(args);
        command
    }

    /// What QEMU's checker says about the image, and that it finds nothing to complain about.
    pub fn assert_qemu_finds_it_clean(&self) {
        let said = ok(super::programs::tool("qemu-img")
            .args(["check", "-f", "parallels"])
            .arg(self.image()));
        assert!(said.contains("No errors were found"), "{said}");
    }
}

/// A running `ploopctl serve`.
#[derive(Debug)]
pub struct Server {
    guard: Guard,
    socket: PathBuf,
}

impl Server {
    fn start(command: &mut Command, socket: PathBuf) -> Self {
        let mut guard = Guard::spawn(command);
        let start = Instant::now();
        // Connecting, not looking for the file: a socket may exist before anyone listens.
        while UnixStream::connect(&socket).is_err() {
            if guard.child.try_wait().unwrap().is_some() || start.elapsed() > PATIENCE {
                drop(guard.child.kill());
                panic!("{command:?} does not serve: {}", last_words(&mut guard));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { guard, socket }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The URI of the default export, as libnbd, QEMU and fio understand it.
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// The URI of a named export.
    pub fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// The process that was started: the keeper of the disk.
    pub fn pid(&self) -> u32 {
        self.guard.child.id()
    }

    /// Asks the server to stop, and demands that it stops cleanly and takes its socket along.
    pub fn stop(self) {
        self.stop_and_tell();
    }

    /// The same: what it has said.
    pub fn stop_and_tell(mut self) -> String {
        self.guard.signal(rustix::process::Signal::TERM);
        let status = self.guard.wait_within(PATIENCE);
        let words = last_words(&mut self.guard);
        let status = status.unwrap_or_else(|| panic!("no end within {PATIENCE:?}: {words}"));
        assert_eq!(status.code(), Some(0), "a clean stop exits with 0: {words}");
        assert!(
            !self.socket.exists(),
            "{} was left behind",
            self.socket.display()
        );
        words
    }

    /// Kills the keeper, and its worker with it, and waits until both are gone.
    pub fn kill(mut self) {
        let worker = super::attach::child_of(self.pid(), "--worker");
        self.guard.signal(rustix::process::Signal::KILL);
        self.guard.wait_within(PATIENCE);
        // A zombie has no command line: it is dead, whoever has yet to notice.
        let words = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_there = |pid: u32| !words(pid).is_empty();
        super::process::eventually("the worker's end", PATIENCE, || {
            (!worker.is_some_and(is_there)).then_some(())
        });
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// What a child that has ended wrote to its standard error.
fn last_words(guard: &mut Guard) -> String {
    use std::io::Read;
    let mut text = String::new();
    if let Some(mut pipe) = guard.child.stderr.take() {
        let _ = pipe.read_to_string(&mut text);
    }
    text
}

/// Runs a libnbd tool in its captive form: it starts the server itself, hands it a listening
/// socket (LISTEN_FDS) and ends it afterwards. `args` is the command line with `[]` where the
/// bracketed server command goes.
pub fn captive(tool: &str, args: &[&OsStr], disk: &Disk, serve_args: &[&str]) -> String {
    let mut command = super::programs::tool(tool);
    // Options inside the brackets are the server's.
    command.arg("--");
    for arg in args {
        if *arg == OsStr::new("[]") {
            command
                .arg("[")
                .arg(ploopctl_path())
                .arg("serve")
                .arg(disk.path());
            command.args(serve_args).arg("]");
        } else {
            command.arg(arg);
        }
    }
    let said = run_within(&mut command, super::process::DEADLINE);
    assert!(
        said.status.success(),
        "{}",
        super::process::describe(&command, &said)
    );
    said.out
}
