//! Keeper and worker killed together under load: the host lives on, what was synced is there, and
//! the next command cleans up. A suite of its own, because the kernel's log then tells of failed I/O
//! on loop devices that other tests may get next.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean, assert_nothing_left, can_mount, kill};
use common::serve::Disk;
use common::{count, have};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

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
        assert_nothing_left(&disk.path(), &[worker]);
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
