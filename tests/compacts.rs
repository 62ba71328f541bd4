//! Disks whose files get shorter: in use or not, under load, while workers are killed and while somebody
//! changes his mind. QEMU and the file systems' own checkers judge what is left.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean, can_mount};
use common::files::{Digests, Random, assert_tree, digests, space_of};
use common::load::beside_load;
use common::process::{Guard, Said, ok, ok_within, run_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{amid, descriptor, freeze};
use common::{count, have};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;

fn compact(disk: &Disk, args: &[&str]) -> Command {
    let mut command = ploopctl();
    command.args(["compact", "-o", "json"]).args(args);
    command.arg(disk.path());
    command
}

/// Compacts a disk: what the command says.
fn compacted(disk: &Disk) -> Value {
    serde_json::from_str(&ok_within(&mut compact(disk, &[]), PATIENCE)).unwrap()
}

fn code(said: &Said) -> Option<i32> {
    said.status.code()
}

fn sync(folder: &Path) {
    rustix::fs::syncfs(File::open(folder).unwrap()).unwrap();
}

/// Writes files of 1 MiB into a folder of their own and removes each second one, all on disk.
fn fragment(folder: &Path, name: &str, files: u64) -> (PathBuf, Digests) {
    let folder = folder.join(name);
    fs::create_dir(&folder).unwrap();
    let mut random = Random::new(files);
    let path = |n: u64| folder.join(format!("{n}"));
    for n in 0..files {
        fs::write(path(n), random.bytes(MIB as usize)).unwrap();
    }
    sync(&folder);
    for n in (0..files).step_by(2) {
        fs::remove_file(path(n)).unwrap();
    }
    sync(&folder);
    let wanted = digests(&folder);
    (folder, wanted)
}

/// Bytes that a mounted file system says that it uses.
fn used(folder: &Path) -> u64 {
    let stat = rustix::fs::statvfs(folder).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

/// Bytes of the clusters of which ext4 uses any part: more than it says that it uses, where files are in
/// pieces.
fn touched(device: &Path) -> u64 {
    const CLUSTER: u64 = 64 << 10;
    const BLOCKS: u64 = CLUSTER / 4096;
    let said = ok(tool("dumpe2fs").arg(device));
    let number = |text: &str| text.trim().parse::<u64>().unwrap();
    let blocks = said.lines().find_map(|l| l.strip_prefix("Block count:"));
    let mut free = vec![0; number(blocks.unwrap()).div_ceil(BLOCKS) as usize];
    let ranges = said
        .lines()
        .filter_map(|l| l.strip_prefix("  Free blocks: "));
    for range in ranges.flat_map(|l| l.split(", ")).filter(|r| !r.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        for block in number(first)..=number(last) {
            free[(block / BLOCKS) as usize] += 1;
        }
    }
    free.iter().filter(|free| **free < BLOCKS).count() as u64 * CLUSTER
}

/// The disk's top file.
fn top(disk: &Disk) -> PathBuf {
    let descriptor = descriptor(disk);
    let top = descriptor.chain(descriptor.top()).unwrap().pop().unwrap();
    disk.path().join(top.file)
}

/// No more than a fiftieth longer than what its file system uses. XFS does not count its log.
fn assert_short(length: u64, used: u64, fs: &str) {
    let log = if fs == "xfs" { 64 * MIB } else { 0 };
    let most = used + used / 50 + log;
    assert!(length <= most, "{length} bytes, {used} are in use");
}

fn assert_sound(disk: &Disk, fs: &str) {
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
    if descriptor(disk).images().len() == 1 {
        disk.assert_qemu_finds_it_clean();
    }
    assert_fsck_clean(fs, disk);
}

fn gets_shorter(test: &str, fs: &str, tools: &[&str]) {
    if !can_mount(test) || !have(test, tools) {
        return;
    }
    let files = count("PLOOP_COMPACT_MIB", 1024);
    let disk = Disk::with_fs("3G", fs, &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (folder, wanted) = fragment(attached.folder(), "files", files);
    let before = space_of(&disk.image());
    assert!(before > files * MIB);
    let said = compacted(&disk);
    let length = said["length"].as_u64().unwrap();
    assert_short(length, used(attached.folder()), fs);
    assert!(said["moved"].as_u64().unwrap() > 0, "{said}");
    assert!(said["old_length"].as_u64().unwrap() > length, "{said}");
    assert_eq!(said["trimmed"], true, "{said}");
    assert!(said["allocated"].as_u64().unwrap() <= length, "{said}");
    assert!(said["old_allocated"].as_u64().unwrap() >= before, "{said}");
    assert_eq!(said["image"], "root.hds");
    assert_tree(&folder, &wanted);
    let bytes = used(attached.folder());
    attached.detach();
    let len = fs::metadata(disk.image()).unwrap().len();
    assert_short(len, bytes, fs);
    println!("COUNT: {test}: {said}");
    assert_sound(&disk, fs);
    let attached = Attached::mounted(&disk, &["--read-only"]);
    assert_tree(&attached.folder().join("files"), &wanted);
    let refused = run_within(&mut compact(&disk, &[]), PATIENCE);
    assert_eq!(code(&refused), Some(1), "{refused:?}");
    attached.detach();
}

#[test]
fn ext4_has_a_file_no_longer_than_what_it_uses() {
    let test = "ext4_has_a_file_no_longer_than_what_it_uses";
    gets_shorter(test, "ext4", &["mkfs.ext4", "qemu-img"]);
}

#[test]
fn xfs_has_a_file_no_longer_than_what_it_uses() {
    let test = "xfs_has_a_file_no_longer_than_what_it_uses";
    gets_shorter(test, "xfs", &["mkfs.xfs", "qemu-img"]);
}

#[test]
fn under_verified_load_nobody_reads_anything_else_and_the_file_gets_shorter() {
    let test = "under_verified_load_nobody_reads_anything_else_and_the_file_gets_shorter";
    if !can_mount(test) || !have(test, &["fio", "mkfs.ext4", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("3G", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let rounds = count("PLOOP_COMPACT_ROUNDS", 5);
    let mut kept = Vec::new();
    let ((), loads) = beside_load(attached.folder(), || {
        for round in 0..rounds {
            kept.push(fragment(attached.folder(), &format!("files-{round}"), 100));
            let said = compacted(&disk);
            // What is written and removed meanwhile is in the file, or is not any more.
            assert_short(
                said["length"].as_u64().unwrap(),
                used(attached.folder()) + 100 * MIB,
                "ext4",
            );
            assert!(said["moved"].as_u64().unwrap() > 0, "{said}");
        }
    });
    let last = compacted(&disk)["length"].as_u64().unwrap();
    assert_short(last, used(attached.folder()), "ext4");
    for (folder, wanted) in &kept {
        assert_tree(folder, wanted);
    }
    attached.detach();
    println!("COUNT: {test}: {rounds} times, {loads} verified rounds");
    assert_sound(&disk, "ext4");
}

#[test]
fn a_worker_that_is_killed_in_the_middle_loses_nothing_and_the_same_command_goes_on() {
    let test = "a_worker_that_is_killed_in_the_middle_loses_nothing_and_the_same_command_goes_on";
    if !can_mount(test) || !have(test, &["fio", "mkfs.ext4", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("2G", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (folder, wanted) = fragment(attached.folder(), "files", 400);
    let kills = count("PLOOP_COMPACT_KILLS", 14);
    let mut random = Random::new(3);
    let mut cut = 0;
    let ((), loads) = beside_load(attached.folder(), || {
        for _ in 0..kills {
            let wait = Duration::from_millis(300 + random.below(500));
            let said = amid(
                wait,
                || attached.kill_worker(),
                || run_within(&mut compact(&disk, &["--rate", "12M"]), PATIENCE),
            );
            if code(&said) == Some(0) {
                // There was nothing left to move: more is made.
                let _ = fs::remove_dir_all(attached.folder().join("more"));
                fragment(attached.folder(), "more", 60);
                continue;
            }
            assert!(said.err.contains("the same command goes on"), "{said:?}");
            assert_eq!(code(&said), Some(5), "{said:?}");
            cut += 1;
        }
    });
    assert!(cut * 2 >= kills, "{cut} of {kills} were in the middle");
    let length = compacted(&disk)["length"].as_u64().unwrap();
    sync(attached.folder());
    assert_short(length, touched(&attached.device), "ext4");
    assert_tree(&folder, &wanted);
    attached.detach();
    println!("COUNT: {test}: {kills} kills, {cut} in the middle, {loads} verified rounds");
    assert_sound(&disk, "ext4");
}

#[test]
fn a_disk_that_nobody_uses_is_compacted_over_its_snapshots_and_not_trimmed() {
    let test = "a_disk_that_nobody_uses_is_compacted_over_its_snapshots_and_not_trimmed";
    if !can_mount(test) || !have(test, &["mkfs.ext4", "fstrim"]) {
        return;
    }
    let disk = Disk::with_fs("1G", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (below, frozen) = fragment(attached.folder(), "below", 60);
    freeze(&disk, 0).unwrap();
    let (folder, wanted) = fragment(attached.folder(), "files", 120);
    ok(tool("fstrim").arg(attached.folder()));
    let base = fs::read(disk.image()).unwrap();
    attached.detach();
    let before = fs::metadata(top(&disk)).unwrap().len();
    let said = compacted(&disk);
    assert!(said["moved"].as_u64().unwrap() > 0, "{said}");
    assert_eq!(said["old_length"].as_u64(), Some(before));
    let length = said["length"].as_u64().unwrap();
    assert_eq!(fs::metadata(top(&disk)).unwrap().len(), length);
    assert!(length + 40 * MIB < before, "{said}");
    assert!(said["trimmed"] == false && said["untrimmed"].is_string());
    assert!(fs::read(disk.image()).unwrap() == base, "the base changed");
    assert_sound(&disk, "ext4");
    let attached = Attached::mounted(&disk, &[]);
    assert_tree(&folder, &wanted);
    assert_tree(&below, &frozen);
    attached.detach();
}

#[test]
fn a_signal_ends_it_and_what_has_moved_has_moved() {
    let test = "a_signal_ends_it_and_what_has_moved_has_moved";
    if !can_mount(test) || !have(test, &["mkfs.ext4", "qemu-img", "fstrim"]) {
        return;
    }
    let disk = Disk::with_fs("1G", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (folder, wanted) = fragment(attached.folder(), "files", 120);
    ok(tool("fstrim").arg(attached.folder()));
    let interrupted = |after: u64| {
        let mut slow = Guard::spawn(&mut compact(&disk, &["--rate", "8M"]));
        thread::sleep(Duration::from_millis(after));
        slow.signal(Signal::INT);
        let status = slow.wait_within(Duration::from_secs(10)).unwrap();
        assert_eq!(status.code(), Some(10));
    };
    interrupted(1500);
    // Its keeper has heard of that, and is free for others.
    freeze(&disk, 0).expect("at once");
    assert_tree(&folder, &wanted);
    attached.detach();
    assert_sound(&disk, "ext4");
    // The same for a disk that nobody uses.
    let attached = Attached::mounted(&disk, &[]);
    let (more, other) = fragment(attached.folder(), "more", 120);
    ok(tool("fstrim").arg(attached.folder()));
    attached.detach();
    interrupted(1500);
    let moved = compacted(&disk)["moved"].as_u64().unwrap();
    assert!(moved > 0, "nothing was left");
    assert_sound(&disk, "ext4");
    let attached = Attached::mounted(&disk, &[]);
    assert_tree(&folder, &wanted);
    assert_tree(&more, &other);
    attached.detach();
}

#[test]
fn beside_it_no_other_change_is_begun_and_a_detach_ends_it() {
    let test = "beside_it_no_other_change_is_begun_and_a_detach_ends_it";
    if !can_mount(test) || !have(test, &["mkfs.ext4", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("1G", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    fragment(attached.folder(), "files", 120);
    let mut slow = Guard::spawn(&mut compact(&disk, &["--rate", "2M"]));
    thread::sleep(Duration::from_millis(1500));
    for words in [["snapshot", "create"].as_slice(), &["compact"]] {
        let refused = run_within(ploopctl().args(words).arg(disk.path()), PATIENCE);
        assert_eq!(code(&refused), Some(4), "{refused:?}");
        assert!(refused.err.contains("being compacted"), "{refused:?}");
    }
    let grown = run_within(ploopctl().arg("grow").arg(disk.path()).arg("+1G"), PATIENCE);
    assert_eq!(code(&grown), Some(4), "{grown:?}");
    attached.detach();
    let status = slow.wait_within(Duration::from_secs(10)).unwrap();
    assert_eq!(status.code(), Some(10));
    assert_sound(&disk, "ext4");
}

#[test]
fn a_raw_disk_has_nothing_to_compact() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("flat");
    File::create(&image).unwrap().set_len(MIB).unwrap();
    let mut compact = ploopctl();
    compact.args(["compact", "--format", "raw"]).arg(&image);
    let refused = run_within(&mut compact, PATIENCE);
    assert_eq!(code(&refused), Some(7), "{refused:?}");
    assert!(refused.err.contains("nothing to compact"), "{refused:?}");
}
