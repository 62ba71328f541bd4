//! A host that runs out of space, for disks with file systems on them: ENOSPC above and nothing
//! else, no damage, and everything goes on when there is space again. And disks that have failed:
//! they answer with errors, and are used again on order. A suite of its own: it fills file systems.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean, can_mount, listed, run_directory};
use common::files::Random;
use common::host::Host;
use common::process::{eventually, fails, ok};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::{count, have};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

fn can_run(test: &str, tools: &[&str]) -> bool {
    can_mount(test) && have(test, &["mkfs.ext4", "mount"]) && have(test, tools)
}

/// A file with contents that its seed tells.
#[derive(Debug, Clone)]
struct Written {
    path: PathBuf,
    seed: u64,
    len: usize,
}

impl Written {
    fn bytes(&self) -> Vec<u8> {
        Random::new(self.seed).bytes(self.len)
    }

    /// Writes and syncs it.
    fn write(&self) -> io::Result<()> {
        let mut file = File::create(&self.path)?;
        file.write_all(&self.bytes())?;
        file.sync_all()
    }

    /// Reads it from the disk, not from the memory of the file system above.
    fn assert_intact(&self) {
        let mut found = Vec::new();
        let mut file = File::open(&self.path).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        file.read_to_end(&mut found).unwrap();
        assert!(found == self.bytes(), "{} has changed", self.path.display());
    }
}

/// Writes synced files of 64 KiB to 2 MiB until one fails: those that were answered, and why.
fn write_until_refused(folder: &Path, random: &mut Random) -> (Vec<Written>, io::Error) {
    let mut written = Vec::new();
    loop {
        let one = Written {
            path: folder.join(format!("f{}", written.len())),
            seed: random.next(),
            len: 65536 << random.below(6),
        };
        match one.write() {
            Ok(()) => written.push(one),
            Err(e) => {
                let _ = fs::remove_file(&one.path);
                return (written, e);
            }
        }
    }
}

/// Returns once a new file can be written; until then it is refused for lack of space only.
fn await_space(folder: &Path, seed: u64) {
    let again = Written {
        path: folder.join("again"),
        seed,
        len: 1 << 20,
    };
    eventually("space", PATIENCE, || {
        let done = again.write();
        if let Err(e) = &done {
            assert_eq!(e.raw_os_error(), Some(libc::ENOSPC), "{e}");
        }
        done.ok()
    });
}

/// Refused for lack of space, for no other reason, and in such a way that all goes on.
fn one_cycle(host: &Host, disk: &Disk, folder: &Path, random: &mut Random) -> usize {
    host.fill_up_to(host.kept() * 3 / 2 + 16 * MIB);
    let (written, why) = write_until_refused(folder, random);
    assert_eq!(why.raw_os_error(), Some(libc::ENOSPC), "{why}");
    let low =
        |expected: bool| move || (listed(&disk.path())?["host_low"] == expected).then_some(());
    eventually("news of a full host", PATIENCE, low(true));
    // What has its place can be written also now.
    if let Some(one) = written.first() {
        let file = OpenOptions::new().write(true).open(&one.path).unwrap();
        file.write_all_at(&one.bytes(), 0).unwrap();
        file.sync_all().unwrap();
    }
    host.relieve();
    await_space(folder, random.next());
    eventually("news of space", PATIENCE, low(false));
    for one in &written {
        one.assert_intact();
        fs::remove_file(&one.path).unwrap();
    }
    give_back(host, folder);
    written.len()
}

/// Returns once the host has the space of removed files again. They are gone for good, and can be
/// trimmed, only after the file system has written that down, and XFS takes its time.
fn give_back(host: &Host, folder: &Path) {
    eventually("the space of removed files", PATIENCE, || {
        // It also tells of writes that were refused before.
        let _ = rustix::fs::syncfs(File::open(folder).unwrap());
        ok(tool("fstrim").arg(folder));
        let (free, size) = host.free_and_size();
        (free > size / 2).then_some(())
    });
}

fn cycles(fs: &str, mkfs: &str) {
    let test = format!("a_full_host_is_only_enospc_to_{fs}");
    if !can_run(&test, &["fstrim", mkfs]) {
        return;
    }
    let host = Host::new(768 * MIB);
    let disk = host.disk("4G", fs);
    some_cycles(&host, &disk, fs);
    assert_fsck_clean(fs, &disk);
    ok(ploopctl().arg("check").arg(disk.path()));
}

fn some_cycles(host: &Host, disk: &Disk, fs: &str) {
    let attached = Attached::mounted(disk, &[]);
    let mut random = Random::new(7);
    let cycles = count("PLOOP_FULL_HOST_CYCLES", 5);
    let mut files = 0;
    for _ in 0..cycles {
        files += one_cycle(host, disk, attached.folder(), &mut random);
    }
    attached.detach();
    println!("COUNT: {fs}: {cycles} cycles, {files} synced files found again");
}

#[test]
fn a_full_host_is_only_enospc_to_ext4() {
    cycles("ext4", "mkfs.ext4");
}

#[test]
fn a_full_host_is_only_enospc_to_ext4_on_a_partition() {
    let test = "a_full_host_is_only_enospc_to_ext4_on_a_partition";
    if !can_run(test, &["fstrim"]) {
        return;
    }
    let host = Host::new(768 * MIB);
    let disk = Disk::around(TempDir::new_in(host.path()).unwrap());
    fs::create_dir(disk.path()).unwrap();
    let mut ploop = ploopctl();
    ok(ploop
        .arg0("ploop")
        .args(["init", "-s", "4g"])
        .arg(disk.image()));
    some_cycles(&host, &disk, "a partition");
    let descriptor = disk.path().join("DiskDescriptor.xml");
    ok(ploopctl().arg0("ploop").arg("fscheck").arg(&descriptor));
    ok(ploopctl()
        .arg0("ploop")
        .args(["check", "-f"])
        .arg(&descriptor));
}

fn limit(disk: &Disk, to: &str) {
    ok(ploopctl()
        .arg("limit")
        .arg(disk.path())
        .args(["--delta", to]));
}

/// The host has plenty.
#[test]
fn a_delta_at_its_limit_is_only_enospc_to_ext4() {
    let test = "a_delta_at_its_limit_is_only_enospc_to_ext4";
    if !can_run(test, &["fstrim"]) {
        return;
    }
    let disk = Disk::with_fs("4G", "ext4", &[]);
    limit(&disk, "512M");
    let attached = Attached::mounted(&disk, &[]);
    let (mut random, mut files) = (Random::new(13), 0);
    let is_low = || (listed(&disk.path())?["host_low"] == true).then_some(());
    for cycle in 0..3 {
        let (written, why) = write_until_refused(attached.folder(), &mut random);
        assert_eq!(why.raw_os_error(), Some(libc::ENOSPC), "{why}");
        eventually("news of the limit", PATIENCE, is_low);
        files += written.len();
        if let Some(one) = written.first() {
            let file = OpenOptions::new().write(true).open(&one.path).unwrap();
            file.write_all_at(&one.bytes(), 0).unwrap();
            file.sync_all().unwrap();
        }
        if cycle == 0 {
            limit(&disk, "1G");
            await_space(attached.folder(), random.next());
            limit(&disk, "512M");
        }
        for one in &written {
            one.assert_intact();
            fs::remove_file(&one.path).unwrap();
        }
        eventually("the space of removed files", PATIENCE, || {
            let _ = rustix::fs::syncfs(File::open(attached.folder()).unwrap());
            ok(tool("fstrim").arg(attached.folder()));
            (listed(&disk.path())?["host_low"] == false).then_some(())
        });
        await_space(attached.folder(), random.next());
    }
    attached.detach();
    assert_fsck_clean("ext4", &disk);
    ok(ploopctl().arg("check").arg(disk.path()));
    println!("COUNT: {test}: {files} synced files found again");
}

#[test]
fn a_full_host_is_only_enospc_to_xfs() {
    cycles("xfs", "mkfs.xfs");
}

/// Nobody asked the disk for space while another program took what the host had.
#[test]
fn ext4_on_an_idle_disk_survives_a_host_that_another_fills() {
    let test = "ext4_on_an_idle_disk_survives_a_host_that_another_fills";
    if !can_run(test, &[]) {
        return;
    }
    let host = Host::new(768 * MIB);
    let disk = host.disk("4G", "ext4");
    let attached = Attached::mounted(&disk, &[]);
    host.fill_up_to(host.kept() * 3 / 4);
    // Its journal has no place in the file yet, and is written to.
    for n in 0..200 {
        let mode = fs::Permissions::from_mode(0o700 + n % 8);
        fs::set_permissions(attached.folder(), mode).unwrap();
        File::open(attached.folder()).unwrap().sync_all().unwrap();
    }
    let mut random = Random::new(3);
    let (_, why) = write_until_refused(attached.folder(), &mut random);
    assert_eq!(why.raw_os_error(), Some(libc::ENOSPC), "{why}");
    // A sixteenth more than it should, and what the host writes down about that.
    let (free, kept) = (host.free_and_size().0, host.kept());
    assert!(
        free >= kept * 3 / 4 - kept / 16 - 2 * MIB,
        "{free} bytes are left of {kept}"
    );
    host.relieve();
    await_space(attached.folder(), 5);
    attached.detach();
    assert_fsck_clean("ext4", &disk);
}

/// Lines of a disk's log that tell of a host without space.
fn lines_about_space(disk: &Disk) -> Vec<String> {
    let log = fs::read_to_string(run_directory(&disk.path()).join("log")).unwrap();
    let about = |l: &&str| ["low on", "No space", "full"].iter().any(|w| l.contains(w));
    log.lines().filter(about).map(String::from).collect()
}

#[test]
fn thirty_disks_share_a_full_host_and_each_says_so_once() {
    let test = "thirty_disks_share_a_full_host_and_each_says_so_once";
    if !can_run(test, &["mkfs.xfs"]) {
        return;
    }
    let count = count("PLOOP_FULL_HOST_DISKS", 6) as usize;
    let host = Host::new(1280 * MIB);
    let fs = |n: usize| if n % 10 == 9 { "xfs" } else { "ext4" };
    let disks: Vec<Disk> = (0..count).map(|n| host.disk("2G", fs(n))).collect();
    let attached: Vec<Attached> = disks.iter().map(|d| Attached::mounted(d, &[])).collect();
    host.fill_up_to(host.kept() * 3 / 2 + 64 * MIB);
    let written: Vec<Vec<Written>> = thread::scope(|scope| {
        let writers: Vec<_> = attached
            .iter()
            .enumerate()
            .map(|(n, disk)| {
                scope.spawn(move || write_until_refused(disk.folder(), &mut Random::new(n as u64)))
            })
            .collect();
        let ends = writers.into_iter().map(|w| w.join().unwrap());
        ends.map(|(written, why)| {
            assert_eq!(why.raw_os_error(), Some(libc::ENOSPC), "{why}");
            written
        })
        .collect()
    });
    let (free, size) = host.free_and_size();
    assert!(free >= size / 10, "{free} bytes of {} are left", host.size);
    host.relieve();
    for (disk, attached) in disks.iter().zip(&attached) {
        await_space(attached.folder(), 1);
        let lines = lines_about_space(disk);
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
    written.iter().flatten().for_each(Written::assert_intact);
    for (n, (disk, attached)) in disks.iter().zip(attached).enumerate() {
        attached.detach();
        assert_fsck_clean(fs(n), disk);
    }
    let files: usize = written.iter().map(Vec::len).sum();
    println!("COUNT: {count} disks, {files} synced files found again");
}

#[test]
fn a_served_disk_leaves_the_host_what_it_is_told_to() {
    let test = "a_served_disk_leaves_the_host_what_it_is_told_to";
    if !can_run(test, &["qemu-io"]) {
        return;
    }
    let host = Host::new(256 * MIB);
    let disk = host.disk("1G", "none");
    let write = |args: &[&str], offset: &str| {
        let server = disk.serve(args);
        let uri = format!("nbd+unix:///?socket={}", server.socket().display());
        let command = format!("write -P 7 {offset} 1M");
        let said = common::process::run(tool("qemu-io").args(["-f", "raw", &uri, "-c", &command]));
        server.stop();
        said.out + &said.err
    };
    let refused = write(&["--keep-free", "100%"], "0");
    assert!(refused.contains("No space left"), "{refused}");
    let refused = write(&["--keep-free", "1T"], "0");
    assert!(refused.contains("No space left"), "{refused}");
    let done = write(&["--keep-free", "0"], "0");
    assert!(done.contains("wrote 1048576"), "{done}");
    // What is there already is written whatever is free.
    let done = write(&["--keep-free", "100%"], "0");
    assert!(done.contains("wrote 1048576"), "{done}");
}

/// Writes a pattern around every cache above and syncs it.
fn write_device(device: &Path, at: u64, byte: u8, len: usize) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(device)?;
    file.seek(SeekFrom::Start(at))?;
    file.write_all(&vec![byte; len])?;
    file.sync_all()
}

/// Reads from the disk itself.
fn read_device(device: &Path, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buf = vec![0u8; len + 4096];
    let skip = buf.as_ptr().align_offset(4096);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    let aligned = buf.get_mut(skip..skip + len).unwrap();
    file.read_exact_at(aligned, at)?;
    Ok(aligned.to_vec())
}

fn state_is(disk: &Disk, expected: &str) {
    eventually(expected, PATIENCE, || {
        (listed(&disk.path())?["state"] == expected).then_some(())
    });
}

#[test]
fn a_disk_that_no_worker_can_open_answers_with_errors_until_it_is_recovered() {
    let test = "a_disk_that_no_worker_can_open_answers_with_errors_until_it_is_recovered";
    if !can_run(test, &[]) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let attached = Attached::device_of(&disk);
    let device = attached.device.clone();
    write_device(&device, 0, 0xA5, 1 << 20).unwrap();
    let said = fails(ploopctl().arg("recover").arg(disk.path()));
    assert!(said.err.contains("has not failed"), "{}", said.err);

    let image = OpenOptions::new()
        .read(true)
        .write(true)
        .open(disk.image())
        .unwrap();
    let mut magic = [0u8; 16];
    image.read_exact_at(&mut magic, 0).unwrap();
    image.write_all_at(&[0u8; 16], 0).unwrap();
    image.sync_all().unwrap();
    let worker = attached.worker().unwrap();
    common::attach::kill(worker);
    state_is(&disk, "failed");
    let error = read_device(&device, 0, 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    // Trying does not help, and does not harm.
    let said = fails(ploopctl().arg("recover").arg(disk.path()));
    assert!(said.err.contains("failed again"), "{}", said.err);
    assert!(read_device(&device, 0, 4096).is_err());

    image.write_all_at(&magic, 0).unwrap();
    image.sync_all().unwrap();
    ok(ploopctl().arg("recover").arg(&device));
    state_is(&disk, "serving");
    assert!(
        read_device(&device, 0, 1 << 20)
            .unwrap()
            .iter()
            .all(|b| *b == 0xA5)
    );
    write_device(&device, 1 << 20, 0x5A, 1 << 20).unwrap();
    attached.detach();
    ok(ploopctl().arg("check").arg(disk.path()));
}

#[test]
fn a_failed_disk_can_be_detached() {
    let test = "a_failed_disk_can_be_detached";
    if !can_run(test, &[]) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let attached = Attached::device_of(&disk);
    let image = OpenOptions::new().write(true).open(disk.image()).unwrap();
    image.write_all_at(&[0u8; 16], 0).unwrap();
    common::attach::kill(attached.worker().unwrap());
    state_is(&disk, "failed");
    let said = fails(ploopctl().arg("umount").arg(disk.path()));
    assert!(said.err.contains("root.hds"), "{}", said.err);
    common::attach::assert_nothing_left(&disk.path(), &[attached.keeper]);
}

/// The bytes of a host in memory of a size that can be changed.
struct Memory(TempDir);

impl Memory {
    fn new(size: &str) -> Self {
        let memory = Self(TempDir::new().unwrap());
        let options = format!("size={size}");
        ok(tool("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(memory.0.path()));
        memory
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        ok(tool("mount").args(["-o", &options]).arg(self.0.path()));
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = common::process::run(tool("umount").arg("--lazy").arg(self.0.path()));
    }
}

#[test]
fn a_disk_whose_flush_failed_says_so_and_is_used_again_on_order() {
    let test = "a_disk_whose_flush_failed_says_so_and_is_used_again_on_order";
    if !can_run(test, &[]) {
        return;
    }
    // A host that believes in more space than its own storage has: a flush finds out.
    let memory = Memory::new("96M");
    let folder = TempDir::new_in(memory.0.path()).unwrap();
    let host = Host::on(folder, 512 * MIB, &["-m", "0", "-O", "^has_journal"]);
    let disk = host.disk("256M", "none");
    let folder = disk.path();
    let server = disk.serve(&["--keep-free", "0"]);
    let uri = format!("nbd+unix:///?socket={}", server.socket().display());
    let io = |commands: &[&str]| {
        let commands = commands.iter().flat_map(|c| ["-c", c]);
        let said = common::process::run(tool("qemu-io").args(["-f", "raw", &uri]).args(commands));
        said.out + &said.err
    };
    let done = io(&["write -P 1 0 4M", "flush"]);
    assert!(!done.contains("failed"), "{done}");
    let failed = io(&["write -P 2 4M 128M", "flush"]);
    assert!(
        failed.contains("failed") || failed.contains("error"),
        "{failed}"
    );
    eventually("failed", PATIENCE, || {
        let state = listed(&folder)?;
        let told = state["error"]
            .as_str()
            .is_some_and(|e| e.contains("recover"));
        (state["state"] == "failed" && told).then_some(())
    });
    let refused = io(&["write -P 3 0 64k"]);
    assert!(refused.contains("failed"), "{refused}");
    assert!(io(&["read -P 1 0 4M"]).contains("read 4194304"));

    memory.resize("1G");
    ok(ploopctl().arg("recover").arg(&folder));
    let elsewhere = TempDir::new().unwrap();
    let copy = |name: &str| {
        let copy = elsewhere.path().join(name);
        ok(tool("qemu-img")
            .args(["convert", "-f", "raw", "-O", "raw", &uri])
            .arg(&copy));
        fs::read(copy).unwrap()
    };
    let now = copy("now");
    // It also tells of what was lost before.
    let _ = rustix::fs::syncfs(File::open(disk.image()).unwrap());
    let image = File::open(disk.image()).unwrap();
    rustix::fs::fadvise(&image, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert!(now == copy("later"), "what is read is on the disk");
    let done = io(&[
        "read -P 1 0 4M",
        "write -P 4 4M 16M",
        "flush",
        "read -P 4 4M 16M",
    ]);
    assert!(
        !done.contains("failed") && !done.contains("error"),
        "{done}"
    );
    server.stop();
    ok(ploopctl().arg("check").arg(&folder));
}

#[test]
fn a_compaction_that_finds_no_space_says_so_and_goes_on_when_there_is() {
    let test = "a_compaction_that_finds_no_space_says_so_and_goes_on_when_there_is";
    if !can_run(test, &["fstrim"]) {
        return;
    }
    let host = Host::new(1024 * MIB);
    let disk = host.disk("2G", "ext4");
    let attached = Attached::mounted(&disk, &[]);
    let mut random = Random::new(11);
    let files: Vec<Written> = (0..240)
        .map(|n| Written {
            path: attached.folder().join(format!("f{n}")),
            seed: random.next(),
            len: MIB as usize,
        })
        .collect();
    files.iter().for_each(|file| file.write().unwrap());
    let (kept, removed): (Vec<_>, Vec<_>) = files.chunks(2).map(|two| (&two[0], &two[1])).unzip();
    for file in removed {
        fs::remove_file(&file.path).unwrap();
    }
    give_back(&host, attached.folder());
    let compact = || {
        let mut compact = ploopctl();
        compact.args(["compact", "-o", "json", "--rate", "16M"]);
        compact.arg(disk.path());
        compact
    };
    let slow = thread::scope(|scope| {
        let slow = scope.spawn(|| fails(&mut compact()));
        thread::sleep(Duration::from_millis(1500));
        host.fill_up_to(4 * MIB);
        slow.join().unwrap()
    });
    assert!(slow.err.contains("\"kind\":\"no-space\""), "{slow:?}");
    assert!(slow.err.contains("the same command goes on"), "{slow:?}");
    kept.iter().for_each(|file| file.assert_intact());
    host.relieve();
    await_space(attached.folder(), 1);
    let before = fs::metadata(disk.image()).unwrap().len();
    let said: serde_json::Value = serde_json::from_str(&ok(&mut compact())).unwrap();
    let now = said["length"].as_u64().unwrap();
    assert!(now + 40 * MIB < before, "{said}, {before} before");
    kept.iter().for_each(|file| file.assert_intact());
    attached.detach();
    assert_fsck_clean("ext4", &disk);
    ok(ploopctl().arg("check").arg(disk.path()));
}
