//! Who competes: our server and its peers, started for a run or for a table.

use super::Cache;
use crate::common::process::{Guard, eventually, ok, ok_within, run};
use crate::common::programs::{installed, tool};
use crate::common::serve::Disk;
use crate::common::skip;
use std::any::Any;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

/// Where fio finds a server.
#[derive(Debug, Clone)]
pub enum Place {
    /// Over NBD.
    Uri(String),
    /// A block device.
    Device(PathBuf),
}

/// A server that runs for as long as this is held.
#[derive(Clone)]
pub struct Target {
    /// Where it is.
    pub place: Place,
    /// The root of its processes; none where the kernel serves.
    pub pid: Option<u32>,
    _held: Rc<dyn Any>,
}

/// A name and a way to a server.
pub struct Contender {
    /// As the table says it.
    pub name: String,
    start: Box<dyn Fn() -> Target>,
}

impl Contender {
    /// One server for the whole table.
    pub fn lasting(name: &str, target: Target) -> Self {
        Self::fresh(name, move || target.clone())
    }

    /// A fresh image and a fresh server for each run.
    pub fn fresh(name: &str, start: impl Fn() -> Target + 'static) -> Self {
        Self {
            name: name.into(),
            start: Box::new(start),
        }
    }

    /// A server to measure.
    pub fn target(&self) -> Target {
        (self.start)()
    }
}

/// Whether every tool of a peer is there; otherwise it is skipped, visibly.
pub fn have(peer: &str, tools: &[&str]) -> bool {
    let missing: Vec<&str> = tools.iter().copied().filter(|t| !installed(t)).collect();
    if !missing.is_empty() {
        skip(peer, &format!("{} not installed", missing.join(", ")));
    }
    missing.is_empty()
}

/// Our server on a disk that it keeps.
pub fn ours(disk: Disk, cache: Cache) -> Target {
    serve(disk, &["--cache", cache.name()])
}

/// The same, for reading only: the disk may share layers with another.
pub fn ours_read_only(disk: Disk, cache: Cache) -> Target {
    serve(disk, &["--read-only", "--cache", cache.name()])
}

/// The same on a qcow2 image, of which the disk is the name.
pub fn ours_qcow2(disk: Disk, cache: Cache) -> Target {
    serve(disk, &["--format", "qcow2", "--cache", cache.name()])
}

fn serve(disk: Disk, args: &[&str]) -> Target {
    let server = disk.serve(args);
    Target {
        place: Place::Uri(server.uri()),
        pid: Some(server.pid()),
        _held: Rc::new((server, disk)),
    }
}

/// A device that somebody else keeps.
pub fn device(path: PathBuf, pid: Option<u32>, held: impl Any) -> Target {
    Target {
        place: Place::Device(path),
        pid,
        _held: Rc::new(held),
    }
}

/// `nbdkit file` on a raw file: the page cache, there is no other mode.
pub fn nbdkit(folder: &Path, raw: &Path) -> Option<Contender> {
    if !have("nbdkit file", &["nbdkit"]) {
        return None;
    }
    let target = nbdkit_on(&folder.join("nbdkit.sock"), raw, ());
    Some(Contender::lasting("nbdkit file (raw)", target))
}

/// `nbdkit file`, which is there, on a raw file that `held` keeps.
pub fn nbdkit_on(socket: &Path, raw: &Path, held: impl Any) -> Target {
    let mut command = tool("nbdkit");
    command.args(["-f", "-U"]).arg(socket).arg("file").arg(raw);
    listening(&mut command, socket.to_owned(), held)
}

/// `qemu-nbd` on an image, which `held` keeps.
pub fn qemu(format: &str, image: &Path, cache: Cache, held: impl Any) -> Target {
    let socket = image.with_extension("sock");
    listening(
        &mut qemu_command(format, image, &socket, cache),
        socket,
        held,
    )
}

/// The command for [`qemu`].
pub fn qemu_command(format: &str, image: &Path, socket: &Path, cache: Cache) -> Command {
    let mut command = tool("qemu-nbd");
    command
        .args(["-t", "-e", "16", "-f", format, "-k"])
        .arg(socket);
    // QEMU's defaults are its best for the page cache, and io_uring is for direct I/O.
    if cache == Cache::None {
        command.args(["--cache=none", "--aio=io_uring"]);
    }
    command.arg(image);
    command
}

/// Starts a server and waits until it listens.
pub fn listening(command: &mut Command, socket: PathBuf, held: impl Any) -> Target {
    let guard = Guard::spawn(command);
    eventually("a listening server", Duration::from_secs(20), || {
        UnixStream::connect(&socket).ok()
    });
    Target {
        place: Place::Uri(format!("nbd+unix:///?socket={}", socket.display())),
        pid: Some(guard.child.id()),
        _held: Rc::new((guard, held)),
    }
}

/// Asks a process to end; it may be gone already.
pub fn end(pid: u32) {
    use rustix::process::{Pid, Signal, kill_process};
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let _ = kill_process(pid.expect("not process 0"), Signal::TERM);
}

/// A loop device on a file, detached when dropped.
pub struct Loop {
    /// The device.
    pub path: PathBuf,
}

impl Loop {
    /// Attaches a file, past the page cache.
    pub fn attach(file: &Path) -> Self {
        let mut command = tool("losetup");
        command.args(["--find", "--show", "--direct-io=on"]);
        let said = ok(command.arg(file));
        Self {
            path: said.trim().into(),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(tool("losetup").arg("--detach").arg(&self.path));
    }
}

/// A FUSE export of `qemu-storage-daemon`, ended and unmounted when dropped.
pub struct FuseExport {
    guard: Guard,
    /// The exported file.
    pub file: PathBuf,
}

impl FuseExport {
    /// Exports a qcow2 image with O_DIRECT as a file beside it.
    pub fn start(image: &Path) -> Self {
        let file = image.with_extension("fuse");
        File::create(&file).expect("a file to mount on");
        let mut command = tool("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=f,filename={},cache.direct=on,aio=io_uring,discard=unmap",
            image.display()
        ));
        command.args([
            "--blockdev",
            "driver=qcow2,node-name=q,file=f,discard=unmap",
        ]);
        command.arg("--export").arg(format!(
            "type=fuse,id=e,node-name=q,mountpoint={},writable=on",
            file.display()
        ));
        let guard = Guard::spawn(&mut command);
        eventually("a FUSE export", Duration::from_secs(20), || {
            let len = file.metadata().ok()?.len();
            (len > 0).then_some(())
        });
        Self { guard, file }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.guard.child.id()
    }
}

impl Drop for FuseExport {
    fn drop(&mut self) {
        self.guard.signal(rustix::process::Signal::TERM);
        let _ = self.guard.wait_within(Duration::from_secs(10));
        let _ = run(tool("umount").arg("--lazy").arg(&self.file));
    }
}

/// What a server serves as a file in a folder, ended and unmounted when dropped.
pub struct NbdFile {
    guard: Guard,
    folder: PathBuf,
}

impl NbdFile {
    /// The only export of a server.
    pub fn of(target: &Target, folder: &Path) -> Self {
        let Place::Uri(uri) = &target.place else {
            panic!("it is a device already");
        };
        let guard = Guard::spawn(tool("nbdfuse").arg(folder).arg(uri));
        let made = Self {
            guard,
            folder: folder.into(),
        };
        let there = || made.file().exists().then_some(());
        eventually("a file", Duration::from_secs(20), there);
        made
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.folder.join("nbd")
    }
}

impl Drop for NbdFile {
    fn drop(&mut self) {
        self.guard.signal(rustix::process::Signal::TERM);
        let _ = self.guard.wait_within(Duration::from_secs(10));
        let _ = run(tool("umount").args(["--lazy", "--quiet"]).arg(&self.folder));
    }
}

/// Makes a fully allocated image of a raw one.
pub fn convert(format: &str, raw: &Path, image: &Path) {
    let cluster = format!("cluster_size={}", super::images::CLUSTER);
    let how = ["convert", "-f", "raw", "-O", format, "-o", &cluster];
    let mut command = tool("qemu-img");
    command.args(how).arg(raw).arg(image);
    ok_within(&mut command, Duration::from_secs(300));
}
