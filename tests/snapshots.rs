//! Snapshots of attached disks: the top is frozen while its guest works, and nothing but a short
//! wait is noticed. QEMU is asked what each frozen point holds.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, KernelMark, assert_fsck_clean, can_mount, kernel_complaints, kill};
use common::files::Random;
use common::load::{SetOnDrop, verified_load};
use common::process::{eventually, ok, ok_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{Point, amid, descriptor, freeze, mark, remove};
use common::{count, have};
use ploop_formats::descriptor::LayerFormat;
use ploop_formats::guid::Guid;
use serde_json::json;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);

/// How QEMU opens a point: each layer by its stated format, in a chain that we tell it.
fn qemu_chain(disk: &Disk, point: Guid) -> String {
    let mut node = None;
    for image in descriptor(disk).chain(point).unwrap() {
        let driver = match image.format {
            LayerFormat::Raw => "raw",
            _ => "parallels",
        };
        let file = disk.path().join(&image.file);
        let mut next = json!({
            "driver": driver,
            "file": { "driver": "file", "filename": file },
        });
        if let Some(below) = node {
            next["backing"] = below;
        }
        node = Some(next);
    }
    format!("json:{}", node.unwrap())
}

/// What QEMU reads at a point, as a raw file.
fn read_by_qemu(disk: &Disk, point: Guid) -> PathBuf {
    let raw = disk.beside("point.raw");
    let _ = fs::remove_file(&raw);
    let mut convert = tool("qemu-img");
    convert.args(["convert", "-O", "raw"]);
    convert.arg(qemu_chain(disk, point)).arg(&raw);
    ok_within(&mut convert, PATIENCE);
    raw
}

/// A point is a file system that mounts, and holds the mark that was synced before it was frozen.
fn assert_holds_its_mark(disk: &Disk, point: &Point) {
    let raw = read_by_qemu(disk, point.uuid);
    let folder = disk.beside("view");
    fs::create_dir_all(&folder).unwrap();
    ok(tool("mount")
        .args(["-o", "loop,nouuid"])
        .arg(&raw)
        .arg(&folder));
    let found = fs::read_to_string(folder.join("mark"));
    ok(tool("umount").arg(&folder));
    assert_eq!(found.unwrap(), point.mark.to_string());
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

#[test]
fn points_are_made_and_merged_away_under_verified_load_and_hold_what_was_synced() {
    let test = "points_are_made_and_merged_away_under_verified_load_and_hold_what_was_synced";
    if !can_mount(test) || !have(test, &["fio", "mkfs.xfs", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let log = KernelMark::new(test);
    let attached = Attached::mounted(&disk, &[]);
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut points, mut stalls) = (Vec::new(), Vec::new());
    let mut random = Random::new(3);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                verified_load(attached.folder(), rounds.fetch_add(1, Ordering::Relaxed));
            }
        });
        let _end = SetOnDrop(&done);
        for number in 0..count("PLOOP_SNAPSHOTS", 20) {
            mark(attached.folder(), number);
            let (point, stall) = freeze(&disk, number).unwrap();
            points.push(point);
            stalls.push(stall.expect("no worker died"));
            if number % 2 == 1 {
                // The newest carries the running top, and stays.
                let gone = points.remove(random.below(points.len() as u64 - 1) as usize);
                remove(&disk, gone.uuid).unwrap();
            }
        }
    });
    attached.detach();
    stalls.sort_unstable();
    println!(
        "COUNT: {test}: {} points made, {} left, {rounds:?} verified rounds, stall p50 {} us, p99 {} us",
        stalls.len(),
        points.len(),
        percentile(&stalls, 50),
        percentile(&stalls, 99)
    );
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
    assert_fsck_clean("xfs", &disk);
    for point in points.iter().step_by(1 + points.len() / 5) {
        assert_holds_its_mark(&disk, point);
    }
    let attached = Attached::mounted(&disk, &["--read-only"]);
    let complaints = kernel_complaints(&attached.device, &log);
    attached.detach();
    assert_eq!(complaints, [""; 0], "the kernel's log");
}

/// The process that changes names for this keeper, while there is one.
fn changer_of(keeper: u32) -> Option<u32> {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let pid: Option<u32> = entry.file_name().to_string_lossy().parse().ok();
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|s| s.split_whitespace().nth(1));
        if parent == Some(&keeper.to_string()) && words.windows(8).any(|w| w == b"--change") {
            return pid;
        }
    }
    None
}

#[test]
fn workers_and_changers_killed_while_the_tree_changes_cost_a_pause_and_nothing_else() {
    let test = "workers_and_changers_killed_while_the_tree_changes_cost_a_pause_and_nothing_else";
    if !can_mount(test) || !have(test, &["fio", "mkfs.xfs", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut points, mut refused, mut finished) = (Vec::new(), 0, 0);
    let mut random = Random::new(11);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                verified_load(attached.folder(), rounds.fetch_add(1, Ordering::Relaxed));
            }
        });
        let _end = SetOnDrop(&done);
        for number in 0..count("PLOOP_SNAPSHOT_KILLS", 12) {
            mark(attached.folder(), number);
            let kill_one = || match number % 2 {
                0 => attached.kill_worker(),
                _ => changer_of(attached.keeper).into_iter().for_each(kill),
            };
            let wait = Duration::from_micros(random.below(40_000));
            if number % 4 < 2 {
                match amid(wait, kill_one, || freeze(&disk, number)) {
                    Ok((point, _)) => points.push(point),
                    Err(_) => refused += 1,
                }
                continue;
            }
            points.push(eventually("a point", PATIENCE, || freeze(&disk, number).ok()).0);
            let gone = points
                .remove(random.below(points.len() as u64) as usize)
                .uuid;
            points.push(eventually("a point", PATIENCE, || freeze(&disk, number).ok()).0);
            if amid(wait, kill_one, || remove(&disk, gone)).is_err() {
                refused += 1;
                // The same command goes on with it, or finds it done.
                eventually("it is gone", PATIENCE, || {
                    let _ = remove(&disk, gone);
                    descriptor(&disk).shot(gone).is_none().then_some(())
                });
                finished += 1;
            }
        }
    });
    attached.detach();
    println!(
        "COUNT: {test}: {} points, {refused} interrupted, {finished} merges finished later, \
         {rounds:?} verified rounds",
        points.len(),
    );
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
    assert_fsck_clean("xfs", &disk);
    for point in points.iter().step_by(1 + points.len() / 4) {
        assert_holds_its_mark(&disk, point);
    }
}
