//! Promises of locks, towards ourselves, QEMU and the tools of ploop.

use super::*;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const SOON: Duration = Duration::from_millis(100);
const LATE: Duration = Duration::from_secs(20);

fn open(path: &Path) -> OwnedFd {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
        .into()
}

fn disk() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("root.hds");
    File::create(&top).unwrap().set_len(1 << 20).unwrap();
    (dir, top)
}

/// A process that holds a flock on `path` until it is killed.
fn locked_elsewhere(path: &Path) -> Child {
    let mut child = Command::new("flock");
    let child = child
        .arg("-xF")
        .arg(path)
        .args(["sleep", "60"])
        .spawn()
        .unwrap();
    let mine = open(path);
    let start = Instant::now();
    while flock(&mine, FlockOperation::NonBlockingLockShared).is_ok() {
        flock(&mine, FlockOperation::Unlock).unwrap();
        assert!(start.elapsed() < LATE, "the other process never locks");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_fence_names_the_process_it_waits_for_and_opens_when_that_is_killed() {
    let (_dir, top) = disk();
    let mut other = locked_elsewhere(&top);
    let mine = open(&top);
    let start = Instant::now();
    let error = fence(&mine, Instant::now() + SOON).unwrap_err();
    assert!(start.elapsed() >= SOON);
    assert_eq!(error.kind(), Kind::Busy);
    let message = error.to_string();
    assert!(message.contains("root.hds"), "{message}");
    assert!(
        message.contains(&format!("process {}", other.id())),
        "{message}"
    );
    let killer = thread::spawn(move || {
        thread::sleep(SOON);
        other.kill().unwrap();
        other.wait().unwrap();
    });
    let start = Instant::now();
    fence(&mine, Instant::now() + LATE).unwrap();
    assert!(start.elapsed() >= SOON / 2);
    killer.join().unwrap();
}

#[test]
fn a_fence_belongs_to_the_description_and_not_to_the_process() {
    let (_dir, top) = disk();
    let first = open(&top);
    fence(&first, Instant::now()).unwrap();
    assert_eq!(
        fence(open(&top), Instant::now()).unwrap_err().kind(),
        Kind::Busy
    );
    let copy = first.try_clone().unwrap();
    drop(first);
    assert!(fence(open(&top), Instant::now()).is_err());
    drop(copy);
    fence(open(&top), Instant::now()).unwrap();
}

#[test]
fn shared_locks_live_together_and_shut_an_exclusive_one_out() {
    let (_dir, top) = disk();
    let (a, b, c) = (open(&top), open(&top), open(&top));
    whole(&a, Hold::Shared, Instant::now()).unwrap();
    whole(&b, Hold::Shared, Instant::now()).unwrap();
    assert!(whole(&c, Hold::Exclusive, Instant::now()).is_err());
    range(&a, 5..7, Hold::Shared).unwrap();
    range(&b, 6..9, Hold::Shared).unwrap();
    assert!(range(&c, 0..6, Hold::Exclusive).is_err());
    range(&c, 0..5, Hold::Exclusive).unwrap();
    release(&a, 5..7).unwrap();
    range(&c, 0..6, Hold::Exclusive).unwrap();
    assert!(range(&c, 3..3, Hold::Shared).is_err());
}

#[test]
fn a_disk_is_locked_against_both_generations_of_ploop_tools() {
    let (dir, base) = disk();
    let folder = open_dir(dir.path());
    let held = lock_disk(&folder, open(&base), Instant::now()).unwrap();
    let file = dir.path().join(DISK_LOCK);
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let outside = Command::new("flock")
        .arg("-xn")
        .arg(&file)
        .arg("true")
        .status()
        .unwrap();
    assert!(!outside.success());
    // What ploop 9.x asks before it touches a base.
    let probe = open(&base);
    for byte in 300..305 {
        assert!(
            blocker(&probe, byte..byte + 1, Hold::Exclusive)
                .unwrap()
                .is_some()
        );
    }
    assert_eq!(blocker(&probe, 0..300, Hold::Exclusive).unwrap(), None);
    assert_eq!(blocker(&probe, 305..9999, Hold::Exclusive).unwrap(), None);
    let error = lock_disk(&folder, open(&base), Instant::now()).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    drop(held);
    let _again = lock_disk(&folder, open(&base), Instant::now()).unwrap();
}

#[test]
fn disks_that_share_a_base_do_not_exclude_each_other() {
    let (one, base) = disk();
    let (two, _) = disk();
    let linked = two.path().join("base.hds");
    std::fs::hard_link(&base, &linked).unwrap();
    let _first = lock_disk(open_dir(one.path()), open(&base), Instant::now()).unwrap();
    let _second = lock_disk(open_dir(two.path()), open(&linked), Instant::now()).unwrap();
}

fn open_dir(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

#[test]
fn a_top_has_one_owner() {
    let (_dir, top) = disk();
    let first = own_top(open(&top)).unwrap();
    let error = own_top(open(&top)).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains("root.hds"), "{error}");
    drop(first);
    let _second = own_top(open(&top)).unwrap();
}

/// Runs a tool of QEMU on a raw image; `None` where it is not installed.
fn qemu(tool: &str, words: &[&str], path: &Path) -> Option<(bool, String)> {
    let out = Command::new(tool).args(words).arg(path).output().ok()?;
    Some((
        out.status.success(),
        String::from_utf8_lossy(&out.stderr).into_owned(),
    ))
}

#[test]
fn qemu_does_not_write_to_an_owned_top_and_its_reads_must_tolerate_a_writer() {
    let (dir, top) = disk();
    let write = ["-f", "raw", "-c", "write 0 4k"];
    let read = ["-f", "raw", "-r", "-U", "-c", "read 0 4k"];
    if qemu("qemu-io", &write, &top).is_none() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let owner = own_top(open(&top)).unwrap();
    let (fine, message) = qemu("qemu-io", &write, &top).unwrap();
    assert!(!fine && message.contains("lock"), "{message}");
    let to = dir.path().join("copy");
    let steady = ["convert", "-f", "raw", "-O", "raw", top.to_str().unwrap()];
    let (fine, message) = qemu("qemu-img", &steady, &to).unwrap();
    assert!(!fine && message.contains("lock"), "{message}");
    let (fine, message) = qemu("qemu-io", &read, &top).unwrap();
    assert!(fine, "{message}");
    drop(owner);
    let (fine, message) = qemu("qemu-io", &write, &top).unwrap();
    assert!(fine, "{message}");
}

#[test]
fn a_top_that_qemu_writes_to_is_not_owned() {
    let (_dir, top) = disk();
    let mut writer = Command::new("qemu-io");
    writer
        .args(["-f", "raw"])
        .arg(&top)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let Ok(mut child) = writer.spawn() else {
        eprintln!("skipped: qemu-io is not installed");
        return;
    };
    let probe = open(&top);
    let start = Instant::now();
    while blocker(&probe, 101..102, Hold::Exclusive)
        .unwrap()
        .is_none()
    {
        assert!(start.elapsed() < LATE, "QEMU never locks");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(own_top(open(&top)).unwrap_err().kind(), Kind::Busy);
    child.kill().unwrap();
    child.wait().unwrap();
    let _mine = own_top(open(&top)).unwrap();
}
