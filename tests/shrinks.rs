//! Disks that get smaller, with the file systems on them, and file systems that may use less of theirs.
//! QEMU and the file systems' own checkers judge what is left.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean, can_mount, changer_of, kill, listed};
use common::files::{Random, space_of};
use common::load::beside_load;
use common::process::{Guard, eventually, fails, ok, ok_within, run_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::sizes::{assert_sound, bytes_of, info, resized_under_load, room_of, sized};
use common::tree::{amid, descriptor, mark, mark_of};
use common::{count, have};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const BALLOON: &str = ".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8";
/// What this machine may lack.
const EXT4: [&str; 4] = ["mkfs.ext4", "resize2fs", "debugfs", "qemu-img"];
const XFS: [&str; 4] = ["mkfs.xfs", "xfs_growfs", "fstrim", "qemu-img"];
const BTRFS: [&str; 3] = ["mkfs.btrfs", "btrfs", "qemu-img"];

fn resize(disk: &Disk, size: impl ToString) -> Command {
    let mut command = ploopctl();
    command.arg("resize").arg(disk.path()).arg(size.to_string());
    command
}

/// Bytes that whoever is not root may still write.
fn available(folder: &Path) -> u64 {
    let stat = rustix::fs::statvfs(folder).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// Bytes that `info` says a file system is limited to.
fn limit(disk: &Disk) -> Option<u64> {
    info(disk)["limit"].as_u64()
}

/// Writes a file of one byte, and demands that those of before hold theirs.
fn keep_a_file(folder: &Path, round: u8, bytes: usize) {
    for old in 0..round {
        let found = fs::read(folder.join(format!("file-{old}"))).unwrap();
        assert!(
            found.len() == bytes && found.iter().all(|byte| *byte == old),
            "{old}"
        );
    }
    fs::write(folder.join(format!("file-{round}")), vec![round; bytes]).unwrap();
}

fn shrinks_while_nobody_uses_it(test: &str, fs: &str, tools: &[&str]) {
    if !can_mount(test) || !have(test, tools) {
        return;
    }
    let disk = Disk::with_fs("700M", fs, &["--cluster", "32K"]);
    let sizes = [400, 900, 350, 600, 320];
    for (round, size) in sizes.into_iter().enumerate() {
        let attached = Attached::mounted(&disk, &[]);
        keep_a_file(attached.folder(), round as u8, 10 << 20);
        attached.detach();
        let before = fs::metadata(disk.image()).unwrap().len();
        let said = sized("resize", &disk.path(), &format!("{size}M"));
        assert_eq!(said["size"].as_u64(), Some(size * MIB), "{said}");
        assert_sound(&disk, size * MIB);
        assert_fsck_clean(fs, &disk);
        let attached = Attached::mounted(&disk, &["--read-only"]);
        assert_eq!(bytes_of(&attached.device), size * MIB);
        let room = room_of(attached.folder());
        assert!(room <= size * MIB && room > size * MIB * 9 / 10, "{room}");
        attached.detach();
        println!(
            "{size}M: {before} bytes, then {}",
            fs::metadata(disk.image()).unwrap().len()
        );
    }
    let attached = Attached::mounted(&disk, &[]);
    keep_a_file(attached.folder(), sizes.len() as u8, 10 << 20);
    attached.detach();
}

#[test]
fn ext4_gets_smaller_and_larger_while_nobody_uses_it_and_keeps_its_files() {
    let test = "ext4_gets_smaller_and_larger_while_nobody_uses_it_and_keeps_its_files";
    shrinks_while_nobody_uses_it(test, "ext4", &EXT4);
}

#[test]
fn btrfs_gets_smaller_and_larger_while_nobody_uses_it_and_keeps_its_files() {
    let test = "btrfs_gets_smaller_and_larger_while_nobody_uses_it_and_keeps_its_files";
    shrinks_while_nobody_uses_it(test, "btrfs", &BTRFS);
}

#[test]
fn btrfs_gets_smaller_and_larger_under_verified_load() {
    let test = "btrfs_gets_smaller_and_larger_under_verified_load";
    if !can_mount(test) || !have(test, &BTRFS) || !have(test, &["fio"]) {
        return;
    }
    // The table of one header cluster says a little less than 1 GiB.
    let disk = Disk::with_fs("1500M", "btrfs", &["--cluster", "64K"]);
    let sizes =
        (0..count("PLOOP_SHRINKS", 6)).map(|n| [900, 1700, 1000, 800][n as usize % 4] * MIB);
    let sizes: Vec<u64> = sizes.collect();
    resized_under_load(test, &disk, "btrfs", &sizes, |size, folder| {
        assert_eq!(room_of(folder), size);
    });
}

#[test]
fn workers_and_changers_killed_while_a_disk_gets_smaller_cost_a_pause_and_nothing_else() {
    let test =
        "workers_and_changers_killed_while_a_disk_gets_smaller_cost_a_pause_and_nothing_else";
    if !can_mount(test) || !have(test, &BTRFS) || !have(test, &["fio"]) {
        return;
    }
    let disk = Disk::with_fs("1500M", "btrfs", &["--cluster", "32K"]);
    let attached = Attached::mounted(&disk, &[]);
    let mut random = Random::new(37);
    let rounds = count("PLOOP_SHRINK_KILLS", 9);
    let (mut size, mut refused) = (0, 0);
    let ((), loads) = beside_load(attached.folder(), || {
        for number in 0..rounds {
            mark(attached.folder(), number);
            size = [900, 1200, 800, 1500][number as usize % 4] * MIB;
            let go = || {
                run_within(&mut resize(&disk, size), PATIENCE)
                    .status
                    .success()
            };
            let kill_one = || match number % 3 {
                2 => changer_of(attached.keeper).into_iter().for_each(kill),
                _ => attached.kill_worker(),
            };
            let wait = Duration::from_micros(random.below(400_000));
            if !amid(wait, kill_one, go) {
                refused += 1;
                eventually("it has its size", PATIENCE, || go().then_some(()));
            }
            eventually("its device has the size", PATIENCE, || {
                (bytes_of(&attached.device) == size).then_some(())
            });
            eventually("its descriptor, too", PATIENCE, || {
                (descriptor(&disk).sectors() * 512 == size).then_some(())
            });
        }
    });
    assert_eq!(room_of(attached.folder()), size);
    attached.detach();
    println!("COUNT: {test}: {rounds} times, {refused} interrupted, {loads} verified rounds");
    assert_sound(&disk, size);
    assert_fsck_clean("btrfs", &disk);
}

fn limited_under_load(test: &str, fs: &str, tools: &[&str]) {
    if !can_mount(test) || !have(test, tools) || !have(test, &["fio", "fstrim"]) {
        return;
    }
    let disk = Disk::with_fs("900M", fs, &["--cluster", "32K"]);
    let attached = Attached::mounted(&disk, &[]);
    let folder = attached.folder();
    let free = available(folder);
    // Space that the host has given, and that nobody uses any more.
    let ballast = folder.join("ballast");
    fs::write(&ballast, vec![1; 300 << 20]).unwrap();
    fs::File::open(&ballast).unwrap().sync_all().unwrap();
    let full = space_of(&disk.image());
    assert!(full > 300 * MIB, "{full}");
    fs::remove_file(&ballast).unwrap();
    let rounds = count("PLOOP_LIMITS", 5);
    let ((), loads) = beside_load(folder, || {
        for number in 0..rounds {
            mark(folder, number);
            let to = [500, 700, 400, 450][number as usize % 4] * MIB;
            let said = sized("resize", &disk.path(), &to.to_string());
            assert_eq!(said["limit"].as_u64(), Some(to), "{said}");
            assert_eq!(said["size"].as_u64(), Some(900 * MIB), "{said}");
            assert_eq!(limit(&disk), Some(to));
            // What the load has written meanwhile is free now and then.
            let gone = 900 * MIB - to;
            eventually("that much is not free any more", PATIENCE, || {
                let now = available(folder);
                (now <= free - gone && now + 200 * MIB > free - gone).then_some(())
            });
            let said = fails(&mut resize(&disk, "20M"));
            assert!(said.err.contains("and not to less"), "{}", said.err);
            assert_eq!(limit(&disk), Some(to));
            thread::sleep(Duration::from_millis(200));
        }
        eventually("the host has its space", PATIENCE, || {
            (space_of(&disk.image()) < full - 100 * MIB).then_some(())
        });
    });
    let said = sized("resize", &disk.path(), "900M");
    assert!(said["limit"].is_null(), "{said}");
    assert!(limit(&disk).is_none() && !folder.join(BALLOON).exists());
    assert!(available(folder) + 150 * MIB > free);
    assert_eq!(mark_of(folder), rounds - 1);
    attached.detach();
    println!("COUNT: {test}: {rounds} limits, {loads} verified rounds");
    assert_sound(&disk, 900 * MIB);
    assert_fsck_clean(fs, &disk);
}

#[test]
fn a_mounted_ext4_is_limited_under_verified_load_and_the_host_has_the_space() {
    let test = "a_mounted_ext4_is_limited_under_verified_load_and_the_host_has_the_space";
    limited_under_load(test, "ext4", &EXT4);
}

#[test]
fn a_mounted_xfs_is_limited_under_verified_load_and_the_host_has_the_space() {
    let test = "a_mounted_xfs_is_limited_under_verified_load_and_the_host_has_the_space";
    limited_under_load(test, "xfs", &XFS);
}

#[test]
fn a_limit_outlives_its_mount_and_goes_with_a_larger_size_and_with_a_smaller_disk() {
    let test = "a_limit_outlives_its_mount_and_goes_with_a_larger_size_and_with_a_smaller_disk";
    if !can_mount(test) || !have(test, &EXT4) || !have(test, &XFS) {
        return;
    }
    for (fs, smaller) in [("ext4", true), ("xfs", false)] {
        let disk = Disk::with_fs("600M", fs, &["--cluster", "32K"]);
        let attached = Attached::mounted(&disk, &[]);
        sized("resize", &disk.path(), "350M");
        // A part of it is given back.
        sized("resize", &disk.path(), "+50M");
        assert_eq!(limit(&disk), Some(400 * MIB));
        let flags = ok(tool("lsattr").arg("-a").arg(attached.folder()));
        let flags = flags.lines().find(|line| line.contains(BALLOON)).unwrap();
        assert!(
            flags.split_whitespace().next().unwrap().contains('i'),
            "{flags}"
        );
        attached.detach();
        assert_eq!(limit(&disk), None, "not known");
        let attached = Attached::mounted(&disk, &[]);
        assert_eq!(limit(&disk), Some(400 * MIB));
        attached.detach();
        if smaller {
            // A size that does not do changes nothing, not even the limit.
            let said = fails(&mut resize(&disk, "2M"));
            assert!(said.err.contains("do not hold what is in"), "{}", said.err);
            let attached = Attached::mounted(&disk, &[]);
            assert_eq!(limit(&disk), Some(400 * MIB));
            attached.detach();
            sized("resize", &disk.path(), "300M");
        } else {
            // More than the limit, of what is the limit.
            sized("resize", &disk.path(), "+300M");
        }
        let has = if smaller { 300 } else { 700 } * MIB;
        assert_sound(&disk, has);
        assert_fsck_clean(fs, &disk);
        let attached = Attached::mounted(&disk, &[]);
        assert!(!attached.folder().join(BALLOON).exists());
        assert!(room_of(attached.folder()) > has * 9 / 10 - 32 * MIB);
        attached.detach();
    }
}

#[test]
fn what_somebody_put_in_the_place_of_a_limit_is_left_alone() {
    let test = "what_somebody_put_in_the_place_of_a_limit_is_left_alone";
    if !can_mount(test) || !have(test, &XFS) {
        return;
    }
    let disk = Disk::with_fs("400M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let place = attached.folder().join(BALLOON);
    let other = disk.beside("other");
    fs::write(&other, "precious").unwrap();
    let kinds: [&dyn Fn(); 4] = [
        &|| std::os::unix::fs::symlink(&other, &place).unwrap(),
        &|| fs::create_dir(&place).unwrap(),
        &|| drop(ok(tool("mkfifo").arg(&place))),
        &|| {
            fs::write(attached.folder().join("file"), "precious").unwrap();
            fs::hard_link(attached.folder().join("file"), &place).unwrap();
        },
    ];
    for (number, put) in kinds.into_iter().enumerate() {
        put();
        for size in ["300M", "400M"] {
            let said = fails(&mut resize(&disk, size));
            assert!(
                said.err.contains("something else"),
                "{number}: {}",
                said.err
            );
        }
        assert!(limit(&disk).is_none());
        match number {
            1 => fs::remove_dir(&place).unwrap(),
            _ => fs::remove_file(&place).unwrap(),
        }
    }
    assert_eq!(fs::read(&other).unwrap(), b"precious");
    assert_eq!(
        fs::read(attached.folder().join("file")).unwrap(),
        b"precious"
    );
    sized("resize", &disk.path(), "300M");
    attached.detach();
}

#[test]
fn what_cannot_get_smaller_is_refused_before_anything_with_what_can_be_done() {
    let test = "what_cannot_get_smaller_is_refused_before_anything_with_what_can_be_done";
    if !can_mount(test) || !have(test, &EXT4) || !have(test, &XFS) {
        return;
    }
    let disk = Disk::with_fs("400M", "xfs", &[]);
    let said = fails(&mut resize(&disk, "350M"));
    assert!(said.err.contains("space limit"), "{}", said.err);
    assert_sound(&disk, 400 * MIB);
    let disk = Disk::with_fs("400M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    fs::write(attached.folder().join("file"), vec![1; 100 << 20]).unwrap();
    attached.detach();
    let said = fails(&mut resize(&disk, "60M"));
    assert!(said.err.contains("or more"), "{}", said.err);
    assert_sound(&disk, 400 * MIB);
    ok(ploopctl().args(["snapshot", "create"]).arg(disk.path()));
    let said = fails(&mut resize(&disk, "300M"));
    assert!(said.err.contains("--flatten"), "{}", said.err);
    assert_sound(&disk, 400 * MIB);
    assert_fsck_clean("ext4", &disk);
    assert!(listed(&disk.path()).is_none());
    // A limit, it can be given all the same.
    let attached = Attached::mounted(&disk, &[]);
    sized("resize", &disk.path(), "300M");
    assert_eq!(limit(&disk), Some(300 * MIB));
    attached.detach();
}

#[test]
fn a_disk_on_which_resize_is_killed_has_its_size_after_the_same_command() {
    let test = "a_disk_on_which_resize_is_killed_has_its_size_after_the_same_command";
    if !can_mount(test) || !have(test, &EXT4) {
        return;
    }
    let disk = Disk::with_fs("500M", "ext4", &["--cluster", "32K"]);
    let attached = Attached::mounted(&disk, &[]);
    keep_a_file(attached.folder(), 0, 30 << 20);
    keep_a_file(attached.folder(), 1, 30 << 20);
    attached.detach();
    let mut random = Random::new(41);
    let (mut left, rounds) = (0, count("PLOOP_SHRINK_ENDS", 12));
    for number in 0..rounds {
        let to = [300, 450, 260, 700][number as usize % 4] * MIB;
        let guard = Guard::spawn(&mut resize(&disk, to));
        thread::sleep(Duration::from_micros(random.below(500_000)));
        kill(guard.child.id());
        drop(guard);
        // What it had started may still be at work.
        eventually("the same command goes on", PATIENCE, || {
            let said = run_within(&mut resize(&disk, to), PATIENCE);
            said.status.success().then_some(())
        });
        if listed(&disk.path()).is_some() {
            left += 1;
            ok_within(ploopctl().arg("umount").arg(disk.path()), PATIENCE);
        }
        assert_sound(&disk, to);
        assert_fsck_clean("ext4", &disk);
        let attached = Attached::mounted(&disk, &["--read-only"]);
        assert_eq!(bytes_of(&attached.device), to);
        let room = room_of(attached.folder());
        assert!(room * 100 > to * 88, "{room} of {to}");
        for old in 0..2_u8 {
            let found = fs::read(attached.folder().join(format!("file-{old}"))).unwrap();
            assert!(found.len() == 30 << 20 && found.iter().all(|byte| *byte == old));
        }
        attached.detach();
    }
    println!("COUNT: {test}: {rounds} killed, {left} were left attached");
}

#[test]
fn a_limit_whose_command_is_killed_is_what_it_was_to_be_after_the_same_command() {
    let test = "a_limit_whose_command_is_killed_is_what_it_was_to_be_after_the_same_command";
    if !can_mount(test) || !have(test, &XFS) {
        return;
    }
    let disk = Disk::with_fs("900M", "xfs", &["--cluster", "32K"]);
    let attached = Attached::mounted(&disk, &[]);
    let mut random = Random::new(43);
    for number in 0..count("PLOOP_LIMIT_ENDS", 12) {
        let to = [500, 900, 400, 700][number as usize % 4] * MIB;
        let guard = Guard::spawn(&mut resize(&disk, to));
        thread::sleep(Duration::from_micros(random.below(80_000)));
        kill(guard.child.id());
        drop(guard);
        ok_within(&mut resize(&disk, to), PATIENCE);
        assert_eq!(limit(&disk), Some(to).filter(|to| *to < 900 * MIB));
    }
    attached.detach();
    assert_sound(&disk, 900 * MIB);
    assert_fsck_clean("xfs", &disk);
}

#[test]
fn a_flat_file_gets_smaller_with_its_file_system() {
    let test = "a_flat_file_gets_smaller_with_its_file_system";
    if !can_mount(test) || !have(test, &EXT4) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let raw = disk.beside("flat.raw");
    fs::File::create(&raw).unwrap().set_len(300 * MIB).unwrap();
    ok(tool("mkfs.ext4").arg("-q").arg(&raw));
    for size in [200, 320, 150] {
        ok_within(
            ploopctl()
                .args(["resize", "--format", "raw"])
                .arg(&raw)
                .arg(format!("{size}M")),
            PATIENCE,
        );
        assert_eq!(fs::metadata(&raw).unwrap().len(), size * MIB);
        ok(tool("e2fsck").args(["-f", "-n"]).arg(&raw));
    }
}
