//! Folds: the running top of an attached disk is merged into the point that it stands on, while its
//! guest works.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, can_mount, changer_of, kill, run_directory};
use common::files::Random;
use common::load::beside_load;
use common::nbd::Client;
use common::process::{Guard, eventually, ok_within};
use common::programs::ploopctl;
use common::serve::{Disk, Server};
use common::tree::{Point, amid, assert_holds, delete, descriptor, freeze, mark, remove};
use common::{count, have};
use ploop::client::Remote;
use ploop::serve::supervise::control::Far;
use ploop_formats::guid::Guid;
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);

/// Takes away what is left, and ends with one delta.
fn merge_all(disk: &Disk) {
    while let Some(shot) = descriptor(disk).shots().iter().find(|s| s.parent.is_none()) {
        if shot.guid == descriptor(disk).top() {
            return;
        }
        remove(disk, shot.guid).unwrap();
    }
}

#[test]
fn the_running_top_is_merged_into_its_point_under_verified_load() {
    let test = "the_running_top_is_merged_into_its_point_under_verified_load";
    if !can_mount(test) || !have(test, &["fio", "mkfs.xfs"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (mut stalls, mut left) = (Vec::new(), 0);
    let mut random = Random::new(5);
    let rounds = count("PLOOP_FOLDS", 10);
    let ((), loads) = beside_load(attached.folder(), || {
        for number in 0..rounds {
            mark(attached.folder(), number);
            let (point, _) = freeze(&disk, number).unwrap();
            if number % 4 == 3 {
                // More than is copied while a guest waits.
                let bulk = File::create(attached.folder().join("bulk")).unwrap();
                (&bulk).write_all(&vec![number as u8; 48 << 20]).unwrap();
                bulk.sync_all().unwrap();
            }
            thread::sleep(Duration::from_millis(random.below(600)));
            let removed = remove(&disk, point.uuid).unwrap();
            stalls.push(removed["stall_us"].as_u64().expect("no worker died"));
            left += u64::from(descriptor(&disk).shots().len() > 1);
            merge_all(&disk);
        }
    });
    merge_all(&disk);
    assert_eq!(descriptor(&disk).shots().len(), 1);
    let files = fs::read_dir(disk.path()).unwrap().flatten();
    let files = files.filter(|f| f.file_name().to_string_lossy().starts_with("root"));
    assert_eq!(files.count(), 1, "files of points that are gone");
    attached.detach();
    stalls.sort_unstable();
    println!(
        "COUNT: {test}: {} points folded, {left} of them with a rest, {loads} verified rounds, \
         longest stall p50 {} us, max {} us",
        stalls.len(),
        stalls[stalls.len() / 2],
        stalls.last().unwrap(),
    );
    assert_holds(&disk, "xfs", rounds - 1);
}

#[test]
fn workers_and_changers_killed_while_the_running_top_is_merged_cost_a_pause_and_nothing_else() {
    let test =
        "workers_and_changers_killed_while_the_running_top_is_merged_cost_a_pause_and_nothing_else";
    if !can_mount(test) || !have(test, &["fio", "mkfs.xfs"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let mut refused = 0;
    let mut random = Random::new(17);
    let rounds = count("PLOOP_FOLD_KILLS", 12);
    let ((), loads) = beside_load(attached.folder(), || {
        for number in 0..rounds {
            mark(attached.folder(), number);
            let kill_one = || match number % 2 {
                0 => attached.kill_worker(),
                _ => changer_of(attached.keeper).into_iter().for_each(kill),
            };
            let (Point { uuid, .. }, _) =
                eventually("a point", PATIENCE, || freeze(&disk, number).ok());
            thread::sleep(Duration::from_millis(random.below(100)));
            let wait = Duration::from_micros(random.below(30_000));
            if amid(wait, kill_one, || remove(&disk, uuid)).is_err() {
                refused += 1;
                // The same command goes on with it, or finds it done.
                eventually("it is gone", PATIENCE, || {
                    let _ = remove(&disk, uuid);
                    descriptor(&disk).shot(uuid).is_none().then_some(())
                });
            }
        }
    });
    eventually("the rest is gone", PATIENCE, || {
        let base = descriptor(&disk);
        let base = *base.shots().iter().find(|s| s.parent.is_none())?;
        let done = base.guid == descriptor(&disk).top();
        let _ = (!done).then(|| remove(&disk, base.guid));
        done.then_some(())
    });
    attached.detach();
    println!("COUNT: {test}: {rounds} folds, {refused} interrupted, {loads} verified rounds");
    assert_holds(&disk, "xfs", rounds - 1);
}

#[test]
fn what_is_discarded_after_a_merge_that_was_cut_does_not_come_back() {
    const BYTES: u32 = 4 << 20;
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    let mut random = Random::new(23);
    let (rounds, mut cut) = (count("PLOOP_FOLD_DISCARDS", 40), 0);
    for number in 0..rounds {
        let (point, _) = freeze(&disk, number).unwrap();
        // The layer below has nothing where the top has this.
        assert_eq!(guest.write(0, &vec![7; BYTES as usize]).unwrap(), 0);
        let wait = Duration::from_micros(random.below(20_000));
        let kill_changer = || changer_of(server.pid()).into_iter().for_each(kill);
        let removed = amid(wait, kill_changer, || remove(&disk, point.uuid));
        assert_eq!(guest.trim(0, BYTES).unwrap(), 0);
        if removed.is_err() {
            cut += 1;
            eventually("it is gone", PATIENCE, || {
                let _ = remove(&disk, point.uuid);
                descriptor(&disk).shot(point.uuid).is_none().then_some(())
            });
        }
        let read = guest.read(0, BYTES).unwrap();
        assert!(
            read.iter().all(|byte| *byte == 0),
            "round {number}, {cut} cut"
        );
    }
    println!("COUNT: merges of the top: {rounds}, {cut} of them cut and done later");
    assert!(cut > 0, "no merge was cut");
    guest.disconnect().unwrap();
    server.stop();
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
}

/// Has a frozen point of 64 MiB merged away, slowly, and kills who does it when half of that is named by the
/// target's table.
fn remove_cut(disk: &Disk, point: Guid, server: &Server) -> Result<Value, String> {
    let mut remote = Remote::connect(&run_directory(&disk.path())).map_err(|e| e.to_string())?;
    let mut look = |far: Option<Far>| {
        if far.is_some_and(|far| far.done > 40 << 20) {
            changer_of(server.pid()).into_iter().for_each(kill);
        }
        Ok(())
    };
    let removed = remote.remove(point.bare(), Some(32 << 20), &mut look);
    removed.map_err(|e| e.to_string())
}

#[test]
fn what_is_discarded_over_a_merge_below_that_was_cut_does_not_come_back() {
    const CHUNK: u32 = 16 << 20;
    const BYTES: u32 = 4 * CHUNK;
    let (rounds, mut cut) = (2, 0);
    for number in 0..rounds {
        let disk = Disk::new("128M", &[]);
        let server = disk.serve(&[]);
        let mut guest = Client::connect(server.socket()).unwrap();
        let (below, _) = freeze(&disk, 0).unwrap();
        // From now on the worker knows that there is nothing.
        assert!(guest.read(0, CHUNK).unwrap().iter().all(|byte| *byte == 0));
        for at in (0..u64::from(BYTES)).step_by(CHUNK as usize) {
            assert_eq!(guest.write(at, &vec![7; CHUNK as usize]).unwrap(), 0);
        }
        let (above, _) = freeze(&disk, 1).unwrap();
        let removed = remove_cut(&disk, below.uuid, &server);
        let is_cut = removed.is_err() && descriptor(&disk).shot(below.uuid).is_some();
        cut += u32::from(is_cut);
        eventually("a fold", PATIENCE, || remove(&disk, above.uuid).ok());
        assert_eq!(guest.trim(0, BYTES).unwrap(), 0);
        assert_eq!(guest.flush().unwrap(), 0);
        guest.disconnect().unwrap();
        server.stop();
        let server = disk.serve(&[]);
        let mut guest = Client::connect(server.socket()).unwrap();
        for at in (0..u64::from(BYTES)).step_by(CHUNK as usize) {
            let read = guest.read(at, CHUNK).unwrap();
            let there = read.iter().position(|byte| *byte != 0);
            assert_eq!(there, None, "round {number}, from {at} on, {cut} cut");
        }
        guest.disconnect().unwrap();
        server.stop();
        if is_cut {
            delete(&disk, below.uuid);
        }
        ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
    }
    println!("COUNT: merges below the top: {rounds}, {cut} of them cut");
    assert!(cut > 0, "no merge was cut");
}

/// Begins to delete a frozen point of an attached disk, so slowly that this tells of itself every
/// few seconds only.
fn delete_slowly(disk: &Disk, point: Guid) -> Guard {
    let mut command = ploopctl();
    command.args(["snapshot", "delete", "--rate", "256K"]);
    command.arg(disk.path()).arg(point.bare());
    let slow = Guard::spawn(&mut command);
    thread::sleep(Duration::from_millis(1500));
    slow
}

#[test]
fn a_merge_below_that_is_cancelled_is_over_when_its_command_is() {
    let disk = Disk::new("128M", &[]);
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    let (below, _) = freeze(&disk, 0).unwrap();
    assert_eq!(guest.write(0, &vec![7; 32 << 20]).unwrap(), 0);
    let (above, _) = freeze(&disk, 1).unwrap();
    let mut slow = delete_slowly(&disk, below.uuid);
    let busy = remove(&disk, above.uuid).unwrap_err();
    assert!(busy.contains("being changed"), "{busy}");
    slow.signal(Signal::INT);
    let status = slow.wait_within(Duration::from_secs(1)).expect("ended");
    assert_eq!(status.code(), Some(10));
    let (top, _) = freeze(&disk, 2).expect("at once");
    // Who dies ends it as well, and cannot wait for that.
    let mut slow = delete_slowly(&disk, below.uuid);
    slow.signal(Signal::KILL);
    slow.wait_within(PATIENCE).expect("dead");
    eventually("the end of it", Duration::from_secs(1), || {
        freeze(&disk, 3).ok()
    });
    assert_eq!(delete(&disk, below.uuid), "merged");
    assert!(descriptor(&disk).shot(top.uuid).is_some());
    assert_eq!(guest.read(0, 32 << 20).unwrap(), vec![7; 32 << 20]);
    guest.disconnect().unwrap();
    server.stop();
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
}
