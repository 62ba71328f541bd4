//! Space: what an image takes on the host beside what the file system on it uses, after archives were
//! unpacked and half of their files removed, again and again; ours, and qcow2 with discard.

use crate::common::attach::{Attached, can_mount};
use crate::common::files::{Random, copy_system_tree, space_of};
use crate::common::process::{ok, ok_within};
use crate::common::programs::tool;
use crate::harness::images::{self, CLUSTER};
use crate::harness::peers::{self, Loop, NbdFile};
use crate::harness::{Cache, Options};
use std::fmt::{self, Display, Formatter};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Archives unpacked.
const ROUNDS: u64 = 8;
/// Work shares the machine with everything else.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longer than frees wait for a pass that nobody asks for.
const PASS: Duration = Duration::from_secs(6);
const MIB: u64 = 1 << 20;

/// Both are mounted through FUSE and a loop device, and take the same files. QEMU's own FUSE export takes
/// no trim that is not whole clusters, so its image is served over NBD, and that as a file.
pub fn run(options: &Options) {
    let tools = ["qemu-nbd", "qemu-img", "nbdfuse", "tar", "fstrim"];
    if !can_mount("space") || !peers::have("space", &tools) {
        return;
    }
    let folder = options.on_disk();
    let at = folder.path();
    let archive = pack(at, options.size / 4);
    println!(
        "\nSpace after {ROUNDS} archives of {} MiB were unpacked and half of the files of each removed; \
         clusters of {CLUSTER}, mounted without discard, then trimmed\n",
        archive.metadata().expect("an archive").len() / MIB,
    );
    println!(
        "| file system | it uses, MiB | ours, MiB | theirs, MiB | ours to its use: before a trim, after, \
         closed | theirs | ours to theirs | wanted | |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"
    );
    for fs in ["ext4", "xfs"] {
        if !peers::have("space", &[&format!("mkfs.{fs}")]) {
            continue;
        }
        let ours = ours(at, &archive, fs, options.size * 4);
        let theirs = theirs(at, &archive, fs, options.size * 4);
        let ratio = ours.closed / theirs.closed;
        println!(
            "| {fs} | {:.0} | {:.0} | {:.0} | {ours} | {theirs} | {ratio:.2} | 1 x | {} |",
            ours.used,
            ours.closed * ours.used,
            theirs.closed * theirs.used,
            if ratio <= 1.0 { "met" } else { "missed" },
        );
    }
}

/// What was seen of one image.
struct Seen {
    /// MiB that the file system does not call free.
    used: f64,
    /// What the image took of that before it was trimmed.
    churned: f64,
    /// And afterwards.
    trimmed: f64,
    /// And once nobody served it: nothing is taken ahead of writes any more.
    closed: f64,
}

impl Seen {
    fn closed(self, image: &Path) -> Self {
        let closed = space_of(image) as f64 / MIB as f64 / self.used;
        Self { closed, ..self }
    }
}

impl Display for Seen {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            churned,
            trimmed,
            closed,
            ..
        } = self;
        write!(f, "{churned:.2}, {trimmed:.2}, {closed:.2}")
    }
}

/// An archive of about so many bytes of the running system.
fn pack(at: &Path, bytes: u64) -> PathBuf {
    let (tree, archive) = (at.join("tree"), at.join("archive.tar"));
    fs::create_dir(&tree).expect("a folder");
    copy_system_tree(&tree, bytes);
    let mut tar = tool("tar");
    ok_within(
        tar.arg("-C").arg(&tree).arg("-cf").arg(&archive).arg("."),
        PATIENCE,
    );
    fs::remove_dir_all(&tree).expect("ours");
    archive
}

fn ours(at: &Path, archive: &Path, fs: &str, size: u64) -> Seen {
    let disk = images::fresh(at, size);
    let attached = Attached::device_of(&disk);
    let image = disk.image();
    let seen = churn(at, archive, fs, &attached.device, &image);
    attached.detach();
    seen.closed(&image)
}

fn theirs(at: &Path, archive: &Path, fs: &str, size: u64) -> Seen {
    let image = at.join("qcow2");
    let cluster = format!("cluster_size={CLUSTER}");
    let mut create = tool("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", &cluster]);
    ok(create.arg(&image).arg(size.to_string()));
    let (socket, folder) = (image.with_extension("sock"), at.join("nbd"));
    let mut server = peers::qemu_command("qcow2", &image, &socket, Cache::Writeback);
    server.args(["--discard=unmap", "--detect-zeroes=unmap"]);
    let server = peers::listening(&mut server, socket, ());
    fs::create_dir_all(&folder).expect("a folder");
    let served = NbdFile::of(&server, &folder);
    let device = Loop::attach(&served.file());
    let seen = churn(at, archive, fs, &device.path, &image);
    drop((device, served, server));
    let seen = seen.closed(&image);
    fs::remove_file(&image).expect("ours");
    seen
}

/// Makes a file system on a device, has it live, and looks at the image below it.
fn churn(at: &Path, archive: &Path, fs: &str, device: &Path, image: &Path) -> Seen {
    ok_within(tool(&format!("mkfs.{fs}")).arg("-q").arg(device), PATIENCE);
    let folder = at.join("mnt");
    fs::create_dir_all(&folder).expect("a folder");
    ok(tool("mount").arg(device).arg(&folder));
    let mut random = Random::new(7);
    for round in 0..ROUNDS {
        let here = folder.join(round.to_string());
        fs::create_dir(&here).expect("a folder");
        let mut tar = tool("tar");
        ok_within(tar.arg("-C").arg(&here).arg("-xf").arg(archive), PATIENCE);
        remove_half(&here, &mut random);
        sync(&folder);
    }
    let used = || {
        let stat = rustix::fs::statvfs(&folder).expect("statvfs");
        (size_of(device) - stat.f_bfree * stat.f_frsize) as f64
    };
    let takes = || space_of(image) as f64;
    thread::sleep(PASS);
    let churned = takes() / used();
    // What a first trim waits for in the file system is freed by a second.
    for _ in 0..2 {
        ok_within(tool("fstrim").arg(&folder), PATIENCE);
        sync(&folder);
        thread::sleep(PASS);
    }
    let seen = Seen {
        used: used() / MIB as f64,
        churned,
        trimmed: takes() / used(),
        closed: 0.0,
    };
    ok_within(tool("umount").arg(&folder), PATIENCE);
    let mut check = match fs {
        "xfs" => tool("xfs_repair"),
        _ => tool(&format!("fsck.{fs}")),
    };
    ok_within(check.arg("-n").arg(device), PATIENCE);
    seen
}

fn size_of(device: &Path) -> u64 {
    let said = ok(tool("blockdev").arg("--getsize64").arg(device));
    said.trim().parse().expect("a size")
}

/// Removes every second file below a folder, chosen by chance.
fn remove_half(folder: &Path, random: &mut Random) {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    // Folders do not tell their files in the same order on every file system.
    paths.sort();
    for path in paths {
        match path.symlink_metadata().expect("it is there").is_dir() {
            true => remove_half(&path, random),
            false if random.below(2) == 0 => fs::remove_file(&path).expect("ours"),
            false => {}
        }
    }
}

fn sync(folder: &Path) {
    let folder = File::open(folder).expect("a folder");
    rustix::fs::syncfs(folder).expect("syncfs");
}
