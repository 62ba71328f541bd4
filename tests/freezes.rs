//! Freezes: a snapshot for which the file system of a mounted disk is kept still.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, can_mount, child_of, kill};
use common::have;
use common::process::{eventually, ok};
use common::programs::ploopctl;
use common::serve::Disk;
use common::tree::{amid, descriptor};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn create(disk: &Disk, args: &[&str]) -> Command {
    let mut create = ploopctl();
    create.args(["-o", "json", "snapshot", "create"]);
    create.arg(disk.path()).args(args);
    create
}

/// What a file holds at a point whose journal is not replayed; none when it is not there.
fn read_unreplayed(disk: &Disk, point: &str, file: &str, clone: &str) -> Option<Vec<u8>> {
    let copy = disk.beside(clone);
    let source = format!("{}@{point}", disk.path().display());
    ok(ploopctl().arg("clone").arg(source).arg(&copy));
    let folder = disk.beside(&format!("{clone}-mounted"));
    fs::create_dir(&folder).unwrap();
    let mut mount = ploopctl();
    mount.args([
        "mount",
        "--read-only",
        "--mount-options",
        "norecovery,nouuid",
    ]);
    ok(mount.arg(&copy).arg(&folder));
    let found = fs::read(folder.join(file)).ok();
    ok(ploopctl().arg("umount").arg(&folder));
    found
}

fn assert_writable(folder: &Path) {
    fs::write(folder.join("after"), b"on").unwrap();
    ok(Command::new("sync").arg("-f").arg(folder));
}

#[test]
fn with_a_freeze_a_point_has_what_was_never_synced_and_needs_no_journal() {
    let test = "with_a_freeze_a_point_has_what_was_never_synced_and_needs_no_journal";
    if !can_mount(test) || !have(test, &["mkfs.xfs"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let data = vec![0x5A; 3 << 20];
    fs::write(attached.folder().join("file"), &data).unwrap();
    let without: Value = serde_json::from_str(&ok(&mut create(&disk, &[]))).unwrap();
    let with: Value = serde_json::from_str(&ok(&mut create(&disk, &["--freeze"]))).unwrap();
    assert!(
        with["frozen_us"].as_u64() >= with["stall_us"].as_u64(),
        "{with}"
    );
    assert_eq!(without["frozen_us"], Value::Null);
    assert_writable(attached.folder());
    let point = |made: &Value| made["uuid"].as_str().unwrap().to_string();
    let read = |made, clone| read_unreplayed(&disk, &point(made), "file", clone);
    assert_ne!(
        read(&without, "a"),
        Some(data.clone()),
        "no freeze was needed"
    );
    assert_eq!(read(&with, "b"), Some(data));
    attached.detach();
}

#[test]
fn a_file_system_whose_freezer_is_killed_goes_on() {
    let test = "a_file_system_whose_freezer_is_killed_goes_on";
    if !can_mount(test) || !have(test, &["mkfs.xfs"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let mut killed = 0;
    for wait in (0..20).map(|n| Duration::from_millis(2 * n)) {
        fs::write(attached.folder().join("file"), vec![1; 1 << 20]).unwrap();
        let kill_freezer = || {
            if let Some(freezer) = child_of(attached.keeper, "--still") {
                kill(freezer);
                killed += 1;
            }
        };
        let made = amid(wait, kill_freezer, || {
            create(&disk, &["--freeze"]).output().unwrap()
        });
        assert!(matches!(made.status.code(), Some(0 | 5)), "{made:?}");
        assert_writable(attached.folder());
    }
    println!("COUNT: {test}: 20 freezes, {killed} of them cut");
    assert!(killed > 0, "no freezer was met");
    attached.detach();
}

#[test]
fn a_file_system_that_is_frozen_by_somebody_else_is_busy_and_left_frozen() {
    let test = "a_file_system_that_is_frozen_by_somebody_else_is_busy_and_left_frozen";
    if !can_mount(test) || !have(test, &["mkfs.xfs", "fsfreeze"]) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    ok(Command::new("fsfreeze").arg("-f").arg(attached.folder()));
    let refused = create(&disk, &["--freeze"]).output().unwrap();
    let points = descriptor(&disk).shots().len();
    // It is frozen still, or this would fail.
    ok(Command::new("fsfreeze").arg("-u").arg(attached.folder()));
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    assert_eq!(points, 1);
    eventually("the next one works", PATIENCE, || {
        create(&disk, &["--freeze"])
            .status()
            .unwrap()
            .success()
            .then_some(())
    });
    attached.detach();
}

#[test]
fn a_freeze_of_a_disk_without_a_mount_is_a_snapshot_and_of_a_served_one_an_error() {
    let disk = Disk::new("64M", &[]);
    ok(&mut create(&disk, &["--freeze"]));
    let server = disk.serve(&[]);
    let refused = create(&disk, &["--freeze"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(7), "{refused:?}");
    server.stop();
}
