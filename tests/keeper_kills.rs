//! Keeper and worker killed together under load: the host lives on, what was synced is there, and
//! the next command cleans up. A suite of its own, because the kernel's log then tells of failed I/O
//! on loop devices that other tests may get next.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{
    Attached, assert_fsck_clean, assert_nothing_left, can_mount, kill, run_directory,
};
use common::files::Random;
use common::process::{eventually, ok, ok_within};
use common::programs::ploopctl;
use common::serve::Disk;
use common::tree::{amid, delete, descriptor, freeze, mark, mark_of, remove};
use common::{count, have};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Commands share two cores with everything else.
const CLEANING: Duration = Duration::from_secs(300);

/// Writes files of a round and syncs each, until the disk goes away: the numbers of those that were
/// answered.
fn synced_files(folder: &Path, round: u64) -> Vec<u64> {
    let mut synced = Vec::new();
    for n in 0.. {
        let data = pattern(round, n);
        let written = File::create(folder.join(format!("{round}-{n}")))
            .and_then(|mut file| file.write_all(&data).and_then(|()| file.sync_all()));
        match written {
            Ok(()) => synced.push(n),
            Err(_) => break,
        }
    }
    synced
}

fn pattern(round: u64, n: u64) -> Vec<u8> {
    let words = (0..512 * (1 + n % 16)).flat_map(|i| (round << 40 | n << 20 | i).to_le_bytes());
    words.collect()
}

#[test]
fn what_was_synced_outlives_keeper_and_worker_killed_together() {
    let test = "what_was_synced_outlives_keeper_and_worker_killed_together";
    if !can_mount(test) || !have(test, &["mkfs.ext4"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "ext4", &[]);
    let rounds = count("PLOOP_KEEPER_KILLS", 10);
    let mut files = 0;
    for round in 0..rounds {
        let attached = Attached::mounted(&disk, &[]);
        let worker = attached.worker().expect("a worker");
        let synced = thread::scope(|scope| {
            let writer = scope.spawn(|| synced_files(attached.folder(), round));
            thread::sleep(Duration::from_millis(60 + 23 * (round % 9)));
            kill(attached.keeper);
            kill(worker);
            writer.join().unwrap()
        });
        drop(attached);
        assert_cleaned_up(&disk, worker);
        let attached = Attached::mounted(&disk, &[]);
        for n in &synced {
            let path = attached.folder().join(format!("{round}-{n}"));
            assert!(
                fs::read(&path).unwrap() == pattern(round, *n),
                "{}",
                path.display()
            );
            fs::remove_file(path).unwrap();
        }
        files += synced.len();
        attached.detach();
        if round % 10 == 9 {
            assert_fsck_clean("ext4", &disk);
        }
    }
    println!("COUNT: {test}: {rounds} rounds, {files} synced files found again");
    assert!(files as u64 > rounds, "hardly anything was written");
    disk.assert_qemu_finds_it_clean();
}

/// Kills keeper and worker in the middle of `work`, which is over then: what came of it, once the next
/// command has cleaned up.
fn killed_amid<T: Send>(
    disk: &Disk,
    attached: Attached,
    wait: Duration,
    work: impl FnOnce() -> T + Send,
) -> T {
    let worker = attached.worker().expect("a worker");
    let both = || {
        kill(attached.keeper);
        kill(worker);
    };
    let came = amid(wait, both, work);
    drop(attached);
    assert_cleaned_up(disk, worker);
    came
}

/// Killed is not dead yet: the next command cleans up, or the one after it.
fn assert_cleaned_up(disk: &Disk, worker: u32) {
    let run = run_directory(&disk.path());
    eventually("the next command cleans up", CLEANING, || {
        ok(ploopctl().arg("list"));
        (!run.exists()).then_some(())
    });
    assert_nothing_left(&disk.path(), &[worker]);
}

#[test]
fn a_keeper_killed_while_a_top_is_frozen_leaves_the_old_disk_or_the_new_one() {
    let test = "a_keeper_killed_while_a_top_is_frozen_leaves_the_old_disk_or_the_new_one";
    if !can_mount(test) || !have(test, &["mkfs.xfs", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let mut random = Random::new(5);
    let (mut before, mut made) = (descriptor(&disk).shots().len(), 0);
    for number in 0..count("PLOOP_SNAPSHOT_KILLS", 12) {
        let attached = Attached::mounted(&disk, &[]);
        mark(attached.folder(), number);
        let wait = Duration::from_micros(random.below(30_000));
        let frozen = killed_amid(&disk, attached, wait, || freeze(&disk, number));
        let attached = Attached::mounted(&disk, &[]);
        assert_eq!(mark_of(attached.folder()), number);
        attached.detach();
        let shots = descriptor(&disk).shots().len();
        assert!(
            shots == before || shots == before + 1,
            "{before}, now {shots}"
        );
        if frozen.is_ok() {
            assert_eq!(shots, before + 1, "it was answered");
        }
        made += shots - before;
        before = shots;
    }
    println!("COUNT: {test}: {made} made");
    ok_within(ploopctl().arg("check").arg(disk.path()), CLEANING);
    assert_fsck_clean("xfs", &disk);
}

#[test]
fn a_keeper_killed_while_a_point_is_merged_away_leaves_what_the_same_command_finishes() {
    let test = "a_keeper_killed_while_a_point_is_merged_away_leaves_what_the_same_command_finishes";
    if !can_mount(test) || !have(test, &["mkfs.xfs"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let mut random = Random::new(7);
    let (rounds, mut cut) = (count("PLOOP_SNAPSHOT_KILLS", 12), 0);
    for number in 0..rounds {
        let attached = Attached::mounted(&disk, &[]);
        let bulk = attached.folder().join("bulk");
        let below = freeze(&disk, number).unwrap().0;
        fs::write(&bulk, vec![number as u8; 8 << 20]).unwrap();
        mark(attached.folder(), number);
        let above = freeze(&disk, number).unwrap().0;
        fs::write(&bulk, vec![!number as u8; 8 << 20]).unwrap();
        mark(attached.folder(), number + 1);
        // One carries a frozen delta, the other the running top.
        let (gone, stays) = match number % 2 {
            0 => (below, above),
            _ => (above, below),
        };
        let wait = Duration::from_micros(random.below(60_000));
        let removed = killed_amid(&disk, attached, wait, || remove(&disk, gone.uuid));
        let attached = Attached::mounted(&disk, &[]);
        assert_eq!(mark_of(attached.folder()), number + 1);
        attached.detach();
        if descriptor(&disk).shot(gone.uuid).is_some() {
            assert!(removed.is_err(), "it was answered");
            cut += 1;
            delete(&disk, gone.uuid);
        }
        ok_within(ploopctl().arg("check").arg(disk.path()), CLEANING);
        delete(&disk, stays.uuid);
        assert_eq!(descriptor(&disk).shots().len(), 1);
    }
    println!("COUNT: {test}: {rounds} merges, {cut} cut and finished later");
    assert!(cut > 0, "none was cut");
    assert_fsck_clean("xfs", &disk);
    disk.assert_qemu_finds_it_clean();
}
