//! Snapshots of attached disks: the top is frozen while its guest works, and nothing but a short
//! wait is noticed. QEMU is asked what each frozen point holds.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{
    Attached, KernelMark, assert_fsck_clean, can_mount, changer_of, kernel_complaints, kill,
};
use common::files::Random;
use common::load::beside_load;
use common::mixed;
use common::point::assert_read_alike;
use common::process::{eventually, ok, ok_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{Point, amid, delete, descriptor, freeze, mark, merge, remove, switch};
use common::{count, have};
use ploop_formats::descriptor::{LayerFormat, Shot};
use ploop_formats::guid::Guid;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(300);

/// A point reads alike to QEMU and to us.
fn assert_holds_its_bytes(disk: &Disk, point: &Point) {
    fs::remove_file(assert_read_alike(disk, point.uuid)).unwrap();
}

/// A point is a file system that mounts, and holds the mark that was synced before it was frozen.
fn assert_holds_its_mark(disk: &Disk, point: &Point) {
    let raw = assert_read_alike(disk, point.uuid);
    let folder = disk.beside("view");
    fs::create_dir_all(&folder).unwrap();
    ok(tool("mount")
        .args(["-o", "loop,nouuid"])
        .arg(&raw)
        .arg(&folder));
    let found = fs::read_to_string(folder.join("mark"));
    ok(tool("umount").arg(&folder));
    fs::remove_file(&raw).unwrap();
    assert_eq!(found.unwrap(), point.mark.to_string());
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

/// The points of a disk that can be gone back to, and what was done to it.
struct Tree<'a> {
    disk: &'a Disk,
    points: Vec<Point>,
    stalls: Vec<u64>,
    random: Random,
    /// How points went, by outcome and by how many were below them.
    went: BTreeMap<String, u64>,
    depths: BTreeMap<usize, u64>,
}

impl Tree<'_> {
    /// Freezes the top of an attached disk.
    fn freeze(&mut self, folder: &Path) {
        let number = self.stalls.len() as u64;
        mark(folder, number);
        let (point, stall) = freeze(self.disk, number).unwrap();
        self.points.push(point);
        self.stalls.push(stall.expect("no worker died"));
    }

    /// Branches: the disk goes back to some point, and on from there, a few times.
    fn branch(&mut self, branches: u64, points: u64) {
        for _ in 0..branches {
            let attached = Attached::mounted(self.disk, &[]);
            for _ in 0..points {
                self.freeze(attached.folder());
            }
            attached.detach();
            let back = self.random.below(self.points.len() as u64) as usize;
            switch(self.disk, self.points[back].uuid);
        }
    }

    fn note(&mut self, how: &str, depth: usize) {
        *self.went.entry(how.into()).or_default() += 1;
        *self.depths.entry(depth).or_default() += 1;
    }

    /// Some point goes by turns in one way and in the other. The newest carries the running top,
    /// and stays.
    fn take_away(&mut self) {
        let merges = self.went.values().sum::<u64>() % 2 == 1;
        match self.uppers().as_slice() {
            all if merges && !all.is_empty() => {
                let upper = all[self.random.below(all.len() as u64) as usize];
                let depth = descriptor(self.disk).chain(upper).unwrap().len() - 2;
                let gone = merge(self.disk, upper);
                self.points.retain(|point| point.uuid != gone);
                self.note("merge", depth);
            }
            _ => {
                let place = self.random.below(self.points.len() as u64 - 1) as usize;
                let gone = self.points.remove(place).uuid;
                let depth = descriptor(self.disk).chain(gone).unwrap().len() - 1;
                let outcome = delete(self.disk, gone);
                self.note(&format!("delete: {outcome}"), depth);
            }
        }
    }

    /// Frozen points that can be merged into what they stand on.
    fn uppers(&self) -> Vec<Guid> {
        let disk = descriptor(self.disk);
        let alone = |shot: &&Shot| {
            let only = disk.children(shot.parent).count() == 1;
            only && !shot.parent.is_none() && shot.guid != disk.top()
        };
        disk.shots().iter().filter(alone).map(|s| s.guid).collect()
    }

    /// Everybody finds the same at each point, and where looked what its guest had synced.
    fn judge(&self) {
        for (n, point) in self.points.iter().enumerate() {
            match n % (1 + self.points.len() / 5) {
                0 => assert_holds_its_mark(self.disk, point),
                _ => assert_holds_its_bytes(self.disk, point),
            }
        }
    }
}

/// Bytes of a disk.
const SIZE: u64 = 512 << 20;

/// Whether disks can be mounted here, loaded and judged.
fn can_judge(test: &str) -> bool {
    can_mount(test) && have(test, &["fio", "mkfs.xfs", "qemu-img"])
}

#[test]
fn points_are_made_deleted_and_merged_under_verified_load_and_read_alike_to_qemu() {
    let test = "points_are_made_deleted_and_merged_under_verified_load_and_read_alike_to_qemu";
    if can_judge(test) {
        let disk = Disk::with_fs(&SIZE.to_string(), "xfs", &[]);
        change_under_load(test, &disk, count("PLOOP_SNAPSHOTS", 20));
    }
}

#[test]
fn so_are_points_of_qcow2_images() {
    let test = "so_are_points_of_qcow2_images";
    if can_judge(test) {
        let disk = mixed::disk(SIZE, "xfs", LayerFormat::Qcow2);
        change_under_load(test, &disk, count("PLOOP_QCOW2_SNAPSHOTS", 20));
    }
}

#[test]
fn so_are_points_of_qcow2_images_on_a_raw_base() {
    let test = "so_are_points_of_qcow2_images_on_a_raw_base";
    if can_judge(test) {
        let disk = mixed::disk(SIZE, "xfs", LayerFormat::Raw);
        change_under_load(test, &disk, count("PLOOP_QCOW2_SNAPSHOTS", 20));
    }
}

#[test]
fn so_are_points_of_qcow2_images_on_a_ploop_base() {
    let test = "so_are_points_of_qcow2_images_on_a_ploop_base";
    if can_judge(test) {
        let disk = mixed::disk(SIZE, "xfs", LayerFormat::Ploop);
        change_under_load(test, &disk, count("PLOOP_QCOW2_SNAPSHOTS", 20));
    }
}

fn change_under_load(test: &str, disk: &Disk, many: u64) {
    let log = KernelMark::new(test);
    let mut tree = Tree {
        disk,
        points: Vec::new(),
        stalls: Vec::new(),
        random: Random::new(3),
        went: BTreeMap::new(),
        depths: BTreeMap::new(),
    };
    tree.branch(5, (many / 20).max(2));
    let attached = Attached::mounted(disk, &[]);
    let ((), rounds) = beside_load(attached.folder(), || {
        while (tree.stalls.len() as u64) < many {
            tree.freeze(attached.folder());
            if tree.points.len() as u64 > many / 2 || tree.stalls.len().is_multiple_of(4) {
                tree.take_away();
            }
        }
    });
    attached.detach();
    let (start, left) = (Instant::now(), tree.points.len());
    tree.judge();
    let judged = start.elapsed().as_secs();
    let attached = Attached::mounted(disk, &[]);
    let ((), more) = beside_load(attached.folder(), || {
        while tree.points.len() > 1 {
            tree.take_away();
        }
    });
    attached.detach();
    tree.judge();
    tree.stalls.sort_unstable();
    println!(
        "COUNT: {test}: {many} points made, {left} read alike in {judged} s, {} verified rounds, \
         stall p50 {} us, p99 {} us; went {:?}, at depths {:?}",
        rounds + more,
        percentile(&tree.stalls, 50),
        percentile(&tree.stalls, 99),
        tree.went,
        tree.depths
    );
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
    mixed::assert_clean(disk);
    assert_fsck_clean("xfs", disk);
    let attached = Attached::mounted(disk, &["--read-only"]);
    let complaints = kernel_complaints(&attached.device, &log);
    attached.detach();
    assert_eq!(complaints, [""; 0], "the kernel's log");
}

#[test]
fn workers_and_changers_killed_while_the_tree_changes_cost_a_pause_and_nothing_else() {
    let test = "workers_and_changers_killed_while_the_tree_changes_cost_a_pause_and_nothing_else";
    if can_judge(test) {
        let disk = Disk::with_fs(&SIZE.to_string(), "xfs", &[]);
        kill_while_changing(test, &disk, count("PLOOP_SNAPSHOT_KILLS", 12));
    }
}

#[test]
fn so_they_do_on_a_disk_of_qcow2_images() {
    let test = "so_they_do_on_a_disk_of_qcow2_images";
    if can_judge(test) {
        let disk = mixed::disk(SIZE, "xfs", LayerFormat::Qcow2);
        kill_while_changing(test, &disk, count("PLOOP_QCOW2_SNAPSHOT_KILLS", 12));
    }
}

fn kill_while_changing(test: &str, disk: &Disk, kills: u64) {
    let attached = Attached::mounted(disk, &[]);
    let (mut points, mut refused, mut finished) = (Vec::new(), 0, 0);
    let mut random = Random::new(11);
    let ((), rounds) = beside_load(attached.folder(), || {
        for number in 0..kills {
            mark(attached.folder(), number);
            let kill_one = || match number % 2 {
                0 => attached.kill_worker(),
                _ => changer_of(attached.keeper).into_iter().for_each(kill),
            };
            let wait = Duration::from_micros(random.below(40_000));
            if number % 4 < 2 {
                match amid(wait, kill_one, || freeze(disk, number)) {
                    Ok((point, _)) => points.push(point),
                    Err(_) => refused += 1,
                }
                continue;
            }
            points.push(eventually("a point", PATIENCE, || freeze(disk, number).ok()).0);
            let gone = points
                .remove(random.below(points.len() as u64) as usize)
                .uuid;
            points.push(eventually("a point", PATIENCE, || freeze(disk, number).ok()).0);
            if amid(wait, kill_one, || remove(disk, gone)).is_err() {
                refused += 1;
                // The same command goes on with it, or finds it done.
                eventually("it is gone", PATIENCE, || {
                    let _ = remove(disk, gone);
                    descriptor(disk).shot(gone).is_none().then_some(())
                });
                finished += 1;
            }
        }
    });
    attached.detach();
    println!(
        "COUNT: {test}: {} points, {refused} interrupted, {finished} merges finished later, \
         {rounds} verified rounds",
        points.len(),
    );
    // Of a qcow2 image a dead worker may leave leaks.
    let mut check = ploopctl();
    check.args(["check", "--repair"]).arg(disk.path());
    ok_within(&mut check, PATIENCE);
    mixed::assert_clean(disk);
    assert_fsck_clean("xfs", disk);
    for (n, point) in points.iter().enumerate() {
        match n % (1 + points.len() / 4) {
            0 => assert_holds_its_mark(disk, point),
            _ => assert_holds_its_bytes(disk, point),
        }
    }
}
