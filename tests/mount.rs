//! Disks mounted through FUSE and loop: real file systems, a real tree, killed workers. Run as
//! root on a machine with /dev/fuse and loop devices; elsewhere each test says that it skipped.
//!
//! What is demanded is what a container would notice: an I/O error, a changed byte, a file system
//! that its own checker complains about, space that never comes back, or a leftover.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{
    Attached, KernelMark, assert_fsck_clean, assert_nothing_left, can_mount, kernel_complaints,
    kill,
};
use common::files::{assert_tree, copy_system_tree, space_of};
use common::load::{SetOnDrop, verified_load};
use common::process::{eventually, fails, ok, ok_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::{count, have};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Mounting, copying and checking share two cores with everything else.
const PATIENCE: Duration = Duration::from_secs(300);

fn sync_file_system(folder: &Path) {
    ok_within(tool("sync").arg("--file-system").arg(folder), PATIENCE);
}

/// Made, filled with a real tree, unmounted, mounted, compared, checked, emptied and trimmed.
fn holds_a_real_tree(test: &str, fs: &str, mkfs: &str) {
    if !can_mount(test) || !have(test, &[mkfs, "fstrim", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("2G", fs, &[]);
    let empty = space_of(&disk.image());
    let mark = KernelMark::new(test);
    let attached = Attached::mounted(&disk, &[]);
    let tree = attached.folder().join("tree");
    fs::create_dir(&tree).unwrap();
    let digests = copy_system_tree(&tree, count("PLOOP_TREE_MIB", 320) * MIB);
    assert_tree(&tree, &digests);
    attached.detach();

    disk.assert_qemu_finds_it_clean();
    assert_fsck_clean(fs, &disk);
    let attached = Attached::mounted(&disk, &["--read-only"]);
    assert_tree(&attached.folder().join("tree"), &digests);
    attached.detach();

    let attached = Attached::mounted(&disk, &[]);
    sync_file_system(attached.folder());
    let full = space_of(&disk.image());
    fs::remove_dir_all(attached.folder().join("tree")).unwrap();
    // File systems free the space of removed files at their leisure, and trim only what is free.
    eventually("space that comes back", Duration::from_secs(90), || {
        sync_file_system(attached.folder());
        ok_within(tool("fstrim").arg(attached.folder()), PATIENCE);
        let trimmed = space_of(&disk.image());
        (trimmed.saturating_sub(empty) < (full - empty) / 3).then_some(())
    });
    let complaints = kernel_complaints(&attached.device, &mark);
    attached.detach();
    assert_eq!(complaints, [""; 0], "the kernel's log");
    assert_fsck_clean(fs, &disk);
}

#[test]
fn ext4_holds_a_real_tree_and_gives_space_back() {
    holds_a_real_tree(
        "ext4_holds_a_real_tree_and_gives_space_back",
        "ext4",
        "mkfs.ext4",
    );
}

#[test]
fn xfs_holds_a_real_tree_and_gives_space_back() {
    holds_a_real_tree(
        "xfs_holds_a_real_tree_and_gives_space_back",
        "xfs",
        "mkfs.xfs",
    );
}

#[test]
fn btrfs_holds_a_real_tree_and_gives_space_back() {
    holds_a_real_tree(
        "btrfs_holds_a_real_tree_and_gives_space_back",
        "btrfs",
        "mkfs.btrfs",
    );
}

#[test]
fn workers_killed_under_load_cost_a_pause_and_nothing_else() {
    let test = "workers_killed_under_load_cost_a_pause_and_nothing_else";
    if !can_mount(test) || !have(test, &["fio", "fstrim", "mkfs.ext4"]) {
        return;
    }
    let disk = Disk::with_fs("1G", "ext4", &[]);
    let mark = KernelMark::new(test);
    let attached = Attached::mounted(&disk, &[]);
    let kept = attached.folder().join("kept");
    fs::create_dir(&kept).unwrap();
    let digests = copy_system_tree(&kept, 24 * MIB);
    let (done, rounds, kills) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let folder = attached.folder();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _end = SetOnDrop(&done);
            while kills.load(Ordering::Relaxed) < count("PLOOP_WORKER_KILLS", 50) {
                attached.kill_worker();
                kills.fetch_add(1, Ordering::Relaxed);
                // Long enough for new first writes, short enough that few of them were flushed.
                thread::sleep(Duration::from_millis(
                    150 + 37 * (rounds.load(Ordering::Relaxed) % 8),
                ));
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(400));
                ok_within(tool("fstrim").arg(folder), PATIENCE);
            }
        });
        let _end = SetOnDrop(&done);
        while !done.load(Ordering::Relaxed) {
            verified_load(folder, rounds.fetch_add(1, Ordering::Relaxed));
        }
    });
    println!("COUNT: {test}: {kills:?} kills, {rounds:?} verified rounds");
    // What is in the page cache proves nothing.
    attached.detach();
    disk.assert_qemu_finds_it_clean();
    assert_fsck_clean("ext4", &disk);
    let attached = Attached::mounted(&disk, &["--read-only"]);
    assert_tree(&attached.folder().join("kept"), &digests);
    let complaints = kernel_complaints(&attached.device, &mark);
    attached.detach();
    assert_eq!(complaints, [""; 0], "the kernel's log");
}

#[test]
fn a_bare_device_keeps_verified_blocks_through_kills_and_trims() {
    let test = "a_bare_device_keeps_verified_blocks_through_kills_and_trims";
    if !can_mount(test) || !have(test, &["fio"]) {
        return;
    }
    let disk = Disk::new("512M", &[]);
    let attached = Attached::device_of(&disk);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                attached.kill_worker();
                thread::sleep(Duration::from_millis(300));
            }
        });
        let _end = SetOnDrop(&done);
        let base = [
            "--name=j",
            "--bs=4k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
        ];
        let job = |args: &[&str]| {
            let mut fio = tool("fio");
            fio.args(base)
                .arg(format!("--filename={}", attached.device.display()))
                .args(args);
            ok_within(fio.arg("--output-format=terse"), PATIENCE);
        };
        // Trimmed and written again, first written, and verified once more at the end.
        job(&[
            "--rw=randwrite",
            "--size=64M",
            "--verify=crc32c",
            "--verify_fatal=1",
        ]);
        job(&["--rw=randtrim", "--offset=64M", "--size=64M", "--bs=64k"]);
        job(&["--rw=trimwrite", "--offset=128M", "--size=64M", "--bs=64k"]);
        job(&[
            "--rw=randread",
            "--size=64M",
            "--verify=crc32c",
            "--verify_fatal=1",
        ]);
    });
    attached.detach();
    disk.assert_qemu_finds_it_clean();
}

/// 512 bytes at an address that direct I/O accepts, inside a larger buffer.
struct Sector {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Sector {
    fn new(len: usize, fill: u8) -> Self {
        let bytes = vec![fill; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start, len }
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

fn open_direct(device: &Path) -> File {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(direct)
        .open(device)
        .unwrap()
}

#[test]
fn four_neighbouring_direct_sectors_written_at_once_arrive_intact() {
    let test = "four_neighbouring_direct_sectors_written_at_once_arrive_intact";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::new("256M", &[]);
    let attached = Attached::device_of(&disk);
    let rounds = 400u64;
    // First writes of new clusters, and neighbours in a cluster that exists.
    let at = |round: u64| {
        if round.is_multiple_of(2) {
            round * 65536
        } else {
            60 * 4096 + round * 4096
        }
    };
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for writer in 0..4u64 {
            let (device, start) = (&attached.device, &start);
            scope.spawn(move || {
                let file = open_direct(device);
                for round in 0..rounds {
                    let sector = Sector::new(512, value(round, writer));
                    start.wait();
                    file.write_all_at(sector.as_slice(), at(round) + writer * 512)
                        .unwrap();
                }
            });
        }
    });
    let file = open_direct(&attached.device);
    let mut block = Sector::new(4096, 0);
    for round in 0..rounds {
        file.read_exact_at(block.as_mut_slice(), at(round)).unwrap();
        for writer in 0..4 {
            let sector = &block.as_slice()[writer * 512..][..512];
            let expected = [value(round, writer as u64); 512];
            assert!(
                sector == expected,
                "round {round}, writer {writer}: {:?}",
                &sector[..16]
            );
        }
        assert!(
            block.as_slice()[2048..] == [0; 2048],
            "round {round}: what nobody wrote"
        );
    }
    drop(file);
    attached.detach();
    disk.assert_qemu_finds_it_clean();
}

fn value(round: u64, writer: u64) -> u8 {
    (1 + (round * 4 + writer) % 255) as u8
}

#[test]
fn a_failed_mount_leaves_nothing() {
    if !can_mount("a_failed_mount_leaves_nothing") {
        return;
    }
    // No file system on it, a mount point that is not there, an image that is none.
    let disk = Disk::new("64M", &[]);
    let folder = disk.beside("mnt");
    fs::create_dir(&folder).unwrap();
    fails(ploopctl().arg("mount").arg(disk.path()).arg(&folder));
    assert_nothing_left(&disk.path(), &[]);
    let said = fails(
        ploopctl()
            .arg("mount")
            .arg(disk.path())
            .arg(disk.beside("nowhere")),
    );
    assert!(said.err.contains("nowhere"), "{}", said.err);
    assert_nothing_left(&disk.path(), &[]);
    disk.assert_qemu_finds_it_clean();
    fs::write(disk.image(), [0x5A; 4096]).unwrap();
    let said = fails(ploopctl().arg("mount").arg(disk.path()).arg(&folder));
    let damaged = 6;
    assert_eq!(said.status.code(), Some(damaged), "{}", said.err);
    assert!(said.err.contains("root.hds"), "{}", said.err);
    assert_nothing_left(&disk.path(), &[]);
}

#[test]
fn a_second_mount_is_refused_and_the_first_lives_on() {
    if !can_mount("a_second_mount_is_refused_and_the_first_lives_on") {
        return;
    }
    let disk = Disk::with_fs("256M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    fs::write(attached.folder().join("file"), "before").unwrap();
    let said = fails(ploopctl().arg("mount").arg(disk.path()));
    let busy = 4;
    assert_eq!(said.status.code(), Some(busy), "{}", said.err);
    assert_eq!(
        fs::read_to_string(attached.folder().join("file")).unwrap(),
        "before"
    );
    attached.detach();
}

#[test]
fn umount_names_who_holds_a_busy_mount_and_works_afterwards() {
    if !can_mount("umount_names_who_holds_a_busy_mount_and_works_afterwards") {
        return;
    }
    let disk = Disk::with_fs("256M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let held = File::create(attached.folder().join("held")).unwrap();
    let said = fails(ploopctl().arg("umount").arg(attached.folder()));
    let busy = 4;
    assert_eq!(said.status.code(), Some(busy), "{}", said.err);
    let me = std::process::id().to_string();
    assert!(
        said.err.contains(&me),
        "process {me} holds it: {}",
        said.err
    );
    drop(held);
    attached.detach();
}

#[test]
fn a_disk_is_unmounted_by_its_device_and_by_its_mount_point() {
    if !can_mount("a_disk_is_unmounted_by_its_device_and_by_its_mount_point") {
        return;
    }
    let disk = Disk::with_fs("256M", "ext4", &[]);
    for by_device in [true, false] {
        let attached = Attached::mounted(&disk, &[]);
        let name = if by_device {
            attached.device.clone()
        } else {
            attached.folder().into()
        };
        ok(ploopctl().arg("umount").arg(name));
        assert_nothing_left(&disk.path(), &[attached.keeper]);
    }
}

#[test]
fn a_killed_keeper_is_cleaned_up_after_by_the_next_command() {
    if !can_mount("a_killed_keeper_is_cleaned_up_after_by_the_next_command") {
        return;
    }
    let disk = Disk::with_fs("256M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let file = attached.folder().join("file");
    fs::write(&file, "synced").unwrap();
    File::open(&file).unwrap().sync_all().unwrap();
    let worker = attached.worker().expect("a worker");
    let keeper = attached.keeper;
    kill(keeper);
    // The worker ends without its keeper; it must not go on writing to an image nobody guards.
    eventually("the worker's end", Duration::from_secs(20), || {
        (!Path::new(&format!("/proc/{worker}")).exists()).then_some(())
    });
    eventually("a clean machine", Duration::from_secs(30), || {
        common::attach::listed(&disk.path()).is_none().then_some(())
    });
    drop(attached);
    assert_nothing_left(&disk.path(), &[keeper, worker]);
    let attached = Attached::mounted(&disk, &[]);
    assert_eq!(
        fs::read_to_string(attached.folder().join("file")).unwrap(),
        "synced"
    );
    attached.detach();
    assert_fsck_clean("ext4", &disk);
}

/// A control group with a limit of memory, removed when dropped.
struct SmallGroup(PathBuf);

impl SmallGroup {
    /// With either version of control groups; `None` where neither can be used.
    fn new(name: &str, limit: u64) -> Option<Self> {
        let name = format!("ploop-test-{name}-{}", std::process::id());
        let places = [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
        ];
        places.into_iter().find_map(|(root, file)| {
            let group = Self(Path::new(root).join(&name));
            fs::create_dir(&group.0).ok()?;
            fs::write(group.0.join(file), limit.to_string()).ok()?;
            Some(group)
        })
    }
}

impl Drop for SmallGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_process_with_little_memory_writes_ten_times_as_much_without_a_hang() {
    let test = "a_process_with_little_memory_writes_ten_times_as_much_without_a_hang";
    if !can_mount(test) || !have(test, &["mkfs.ext4", "dd"]) {
        return;
    }
    let Some(group) = SmallGroup::new("memory", 48 * MIB) else {
        return common::skip(test, "no control group for memory can be made");
    };
    let disk = Disk::with_fs("1G", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (procs, file) = (group.0.join("cgroup.procs"), attached.folder().join("file"));
    let script = format!(
        "echo $$ > {} && exec dd if=/dev/zero of={} bs=1M count=480 conv=fsync",
        procs.display(),
        file.display()
    );
    ok_within(tool("sh").args(["-c", &script]), PATIENCE);
    assert_eq!(fs::metadata(&file).unwrap().len(), 480 * MIB);
    attached.detach();
    drop(group);
    assert_fsck_clean("ext4", &disk);
}

#[test]
fn a_read_only_mount_refuses_writes_and_changes_no_byte() {
    if !can_mount("a_read_only_mount_refuses_writes_and_changes_no_byte") {
        return;
    }
    let disk = Disk::with_fs("256M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    fs::write(attached.folder().join("file"), "kept").unwrap();
    attached.detach();
    let before = fs::read(disk.image()).unwrap();
    let attached = Attached::mounted(&disk, &["--read-only"]);
    assert_eq!(
        fs::read_to_string(attached.folder().join("file")).unwrap(),
        "kept"
    );
    let error = fs::write(attached.folder().join("other"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    attached.detach();
    assert!(
        fs::read(disk.image()).unwrap() == before,
        "the image changed"
    );
}

#[test]
fn mount_options_reach_the_kernel() {
    if !can_mount("mount_options_reach_the_kernel") {
        return;
    }
    let disk = Disk::with_fs("256M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &["--mount-options", "noatime,nodev"]);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let folder = attached.folder().to_str().unwrap();
    let line = mounts
        .lines()
        .find(|l| l.contains(folder))
        .expect("it is mounted");
    assert!(line.contains("noatime") && line.contains("nodev"), "{line}");
    attached.detach();
}

#[test]
fn the_tour_runs_and_leaves_nothing() {
    if !can_mount("the_tour_runs_and_leaves_nothing") {
        return;
    }
    let scratch = tempfile::TempDir::new().unwrap();
    ok_within(
        ploopctl().arg("tour").env("TMPDIR", scratch.path()),
        PATIENCE,
    );
    let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().collect();
    assert!(left.is_empty(), "files are left: {left:?}");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(scratch.path().to_str().unwrap()),
        "still mounted: {mounts}"
    );
}

/// A loop device reports the sizes that a container expects.
#[test]
fn the_device_has_the_disks_size_and_512_byte_sectors() {
    if !can_mount("the_device_has_the_disks_size_and_512_byte_sectors") {
        return;
    }
    let disk = Disk::new("100M", &[]);
    let attached = Attached::device_of(&disk);
    let sizes = ok(tool("blockdev")
        .args(["--getsize64", "--getss"])
        .arg(&attached.device));
    assert_eq!(
        sizes.split_whitespace().collect::<Vec<_>>(),
        ["104857600", "512"]
    );
    let meta = fs::metadata(disk.image()).unwrap();
    assert!(
        meta.blocks() * 512 < 4 * MIB,
        "an empty disk costs little: {}",
        meta.blocks()
    );
    attached.detach();
}
