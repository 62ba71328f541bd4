//! Containers that live on our disks: what they wrote is found again, their limits hold, and what
//! serves their disk is none of theirs. Run as root with runc and podman; elsewhere each test says
//! that it skipped.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../common/mod.rs"]
mod common;
mod engine;

use common::attach::{Attached, assert_fsck_clean, can_mount};
use common::have;
use common::process::eventually;
use common::serve::Disk;
use engine::{Engine, Kind, MEMORY, PIDS};
use std::fs::{self, File};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One container at a time: a new mount namespace begins with copies of all that is mounted, and
/// for that moment keeps the disks of other tests busy.
static TURN: Mutex<()> = Mutex::new(());

/// The turn of a test that can run here.
fn able(test: &str, kind: Kind) -> Option<MutexGuard<'static, ()>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    (can_mount(test) && have(test, kind.tools())).then_some(turn)
}

fn disk(size: &str) -> (Disk, Attached) {
    let disk = Disk::with_fs(size, "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    (disk, attached)
}

/// Writes files of 64 KiB that repeat their number, syncs each, and says so.
const WRITER: &str = "i=0; while :; do i=$((i+1)); \
    yes $i | head -c 65536 | dd of=/data/$i bs=64k iflag=fullblock conv=fsync 2>/dev/null \
    && echo $i; done";

/// Compares the files up to a number with what they must hold.
fn reader(last: u64) -> String {
    format!(
        "for i in $(seq {last}); do yes $i | head -c 65536 | cmp - /data/$i || exit 1; done; \
         echo all {last}"
    )
}

/// Killed in the middle of writing, after its disk's worker was: what it had synced is there, on a
/// disk that was taken away and given back in between.
fn finds_what_it_synced(kind: Kind, test: &str) {
    let Some(_turn) = able(test, kind) else {
        return;
    };
    let (disk, attached) = disk("512M");
    let engine = Engine::new(kind, attached.folder());
    let container = engine.start(WRITER);
    assert_eq!(container.line(), "1");
    attached.kill_worker();
    let mut last = 1;
    while last < 60 {
        last = container.line().parse().expect("a number");
    }
    for line in container.kill() {
        last = line.parse().unwrap_or(last);
    }
    attached.detach();
    assert_fsck_clean("ext4", &disk);

    let attached = Attached::mounted(&disk, &[]);
    assert_eq!(attached.folder(), disk.beside("mnt"));
    let said = engine.ok(&reader(last));
    assert!(said.contains(&format!("all {last}")), "{said}");
    drop(engine);
    attached.detach();
    println!("COUNT: {test}: {last} synced files found again");
    assert_fsck_clean("ext4", &disk);
}

#[test]
fn a_runc_container_finds_what_it_synced_before_it_was_killed() {
    let test = "a_runc_container_finds_what_it_synced_before_it_was_killed";
    finds_what_it_synced(Kind::Runc, test);
}

#[test]
fn a_podman_container_finds_what_it_synced_before_it_was_killed() {
    let test = "a_podman_container_finds_what_it_synced_before_it_was_killed";
    finds_what_it_synced(Kind::Podman, test);
}

/// Ten times its memory goes through the disk; more memory than it may have ends it, and more
/// processes than it may have are refused. The disk serves on.
fn keeps_its_limits(kind: Kind, test: &str) {
    let Some(_turn) = able(test, kind) else {
        return;
    };
    let (disk, attached) = disk("768M");
    let engine = Engine::new(kind, attached.folder());
    let much = (MEMORY * 10) >> 20;
    engine.ok(&format!(
        "dd if=/dev/zero of=/data/big bs=1M count={much} conv=fsync"
    ));
    // tail keeps its last line, and zeros have no end of line.
    let (code, said) = engine.run(&format!(
        "head -c {} /dev/zero | tail -n 1 >/dev/null",
        MEMORY * 2
    ));
    assert_eq!(code, Some(137), "killed for its memory: {said}");
    let (_, said) = engine.run(&format!(
        "for i in $(seq {}); do sleep 30 & done; echo all of them run",
        PIDS * 2
    ));
    assert!(
        said.contains("can't fork") && !said.contains("all of them"),
        "{said}"
    );
    engine.ok("echo alive >/data/after && sync");
    assert_eq!(
        fs::read_to_string(attached.folder().join("data/after")).unwrap(),
        "alive\n"
    );
    drop(engine);
    attached.detach();
    assert_fsck_clean("ext4", &disk);
}

#[test]
fn a_runc_container_keeps_its_limits_on_our_disk() {
    keeps_its_limits(Kind::Runc, "a_runc_container_keeps_its_limits_on_our_disk");
}

#[test]
fn a_podman_container_keeps_its_limits_on_our_disk() {
    keeps_its_limits(
        Kind::Podman,
        "a_podman_container_keeps_its_limits_on_our_disk",
    );
}

#[test]
fn a_container_that_fills_its_disk_fills_no_other() {
    let test = "a_container_that_fills_its_disk_fills_no_other";
    let Some(_turn) = able(test, Kind::Runc) else {
        return;
    };
    let ((small, full), (other, neighbour)) = (disk("64M"), disk("64M"));
    let engine = Engine::new(Kind::Runc, full.folder());
    let beside = Engine::new(Kind::Runc, neighbour.folder());
    let (code, said) = engine.run("dd if=/dev/zero of=/data/big bs=1M count=100 conv=fsync");
    assert!(
        code != Some(0) && said.contains("No space left on device"),
        "{code:?}: {said}"
    );
    let image = fs::metadata(small.image()).unwrap().len();
    assert!(
        image < 72 << 20,
        "the image of a disk of 64 MiB has {image} bytes"
    );
    beside.ok("dd if=/dev/zero of=/data/file bs=1M count=20 conv=fsync");
    // Full is not broken: what is freed can be written again.
    engine.ok("rm /data/big && sync && dd if=/dev/zero of=/data/again bs=1M count=20 conv=fsync");
    drop((engine, beside));
    for (disk, attached) in [(small, full), (other, neighbour)] {
        attached.detach();
        assert_fsck_clean("ext4", &disk);
    }
}

/// The control groups that a process is in, one a line.
fn groups(pid: u32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn write_synced(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}

#[test]
fn keeper_and_worker_are_in_no_group_of_the_container_and_serve_while_it_is_frozen() {
    let test = "keeper_and_worker_are_in_no_group_of_the_container_and_serve_while_it_is_frozen";
    let Some(_turn) = able(test, Kind::Runc) else {
        return;
    };
    let (disk, attached) = disk("128M");
    let engine = Engine::new(Kind::Runc, attached.folder());
    let container =
        engine.start("echo up; i=0; while :; do i=$((i+1)); echo $i >/data/turn; sync; done");
    assert_eq!(container.line(), "up");
    let ours = |line: &String| line.contains(&engine.name);
    assert!(
        groups(engine.pid()).iter().any(ours),
        "the container has groups"
    );
    // Also a worker that was started while the container ran.
    for _ in 0..2 {
        let worker = eventually("a worker", Duration::from_secs(20), || attached.worker());
        for pid in [attached.keeper, worker] {
            assert!(!groups(pid).iter().any(ours), "{pid}: {:?}", groups(pid));
        }
        attached.kill_worker();
    }
    engine.pause();
    attached.kill_worker();
    write_synced(
        &attached.folder().join("data/host"),
        "written while it was frozen",
    );
    engine.resume();
    container.kill();
    let host = fs::read_to_string(attached.folder().join("data/host")).unwrap();
    assert_eq!(host, "written while it was frozen");
    drop(engine);
    attached.detach();
    assert_fsck_clean("ext4", &disk);
}
