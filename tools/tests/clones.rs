//! Clones of disks that are not attached: what is shared, and that nothing else is.

mod common;

use common::tree::{Dice, Disk, NOBODY, can_judge};
use common::{PLOOPCTL, Scratch, fails, json, ok, skip, text};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

#[test]
fn clones_share_what_is_frozen_and_nothing_else() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut source = Disk::new(&scratch, "src");
    let mut dice = Dice(77);
    source.scribble(&mut dice, 20);
    let below = source.snapshot();
    source.scribble(&mut dice, 20);
    let point = source.snapshot();
    source.scribble(&mut dice, 20);
    let frozen = source.chain(Some(&point));
    let sealed: Vec<Vec<u8>> = frozen.iter().map(|f| fs::read(f).expect("read")).collect();
    let of = format!("{}@{point}", source.name());
    let mut clones: Vec<Disk> = (0..20)
        .map(|n| {
            let path = scratch.path(&format!("clone{n}"));
            let made = json(&["clone", &of, text(&path)]);
            assert_eq!(made["uuid"], point.as_str(), "{made}");
            assert_eq!(
                (&made["path"], &made["source"]),
                (&json!(path), &json!(source.path))
            );
            assert_eq!(
                fs::metadata(&path).expect("there").permissions().mode() & 0o777,
                0o700
            );
            Disk {
                path,
                top: source.points[&point].clone(),
                points: source.points.clone(),
            }
        })
        .collect();
    assert_eq!(json(&["info", source.name()])["shared"], true);
    clones[7].scribble(&mut dice, 20);
    for disk in clones.iter().chain([&source]) {
        disk.judge("one of twenty is written to");
    }
    let now: Vec<Vec<u8>> = frozen.iter().map(|f| fs::read(f).expect("read")).collect();
    assert!(sealed == now, "frozen files are as they were");

    let said = fails(4, &["snapshot", "delete", source.name(), &below]);
    assert!(said.contains("21 disks share it"), "{said}");
    fails(4, &["snapshot", "merge", clones[7].name(), &point]);
    source.judge("nothing was merged");
    for disk in clones.drain(8..) {
        ok(&["delete", disk.name()]);
    }
    source.judge("clones were deleted");
    ok(&["delete", source.name()]);
    for disk in &clones {
        disk.judge("the source was deleted");
    }
    let mut last = clones.swap_remove(7);
    clones
        .iter()
        .for_each(|disk| drop(ok(&["delete", disk.name()])));
    last.delete(&below);
    last.judge("merged once it has its files for itself");
    last.scribble(&mut dice, 20);
    last.delete(&point);
    last.judge("and its last snapshot");
    assert_eq!(json(&["info", last.name()])["snapshots"], 0);
}

#[test]
fn a_clone_without_a_uuid_is_the_disk_as_it_is() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut source = Disk::new(&scratch, "src");
    source.write(&[(0, 1 << 20, 5)]);
    let first = json(&["clone", source.name(), text(&scratch.path("a"))]);
    assert_eq!(source.list().len(), 1, "a snapshot was made for it");
    let second = json(&["clone", source.name(), text(&scratch.path("b"))]);
    assert_eq!(first["uuid"], second["uuid"]);
    assert_eq!(
        source.list().len(),
        1,
        "and none where nothing was written since"
    );
    source.write(&[(0, 512, 6)]);
    let third = json(&["clone", source.name(), text(&scratch.path("c"))]);
    assert_ne!(third["uuid"], second["uuid"]);
    let top = |name: &str| {
        let path = scratch.path(name);
        Disk {
            path,
            top: Vec::new(),
            points: BTreeMap::new(),
        }
        .read(None)
    };
    assert!(top("c") == source.top);
    source.top[..512].fill(5);
    assert!(top("a") == source.top && top("b") == source.top);
}

#[test]
fn a_clone_that_cannot_be_made_leaves_nothing() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let uuid = ok(&["snapshot", "create", text(&disk)]);
    let of = format!("{}@{}", text(&disk), uuid.trim_end());
    let nobody = format!("{}@{NOBODY}", text(&disk));
    let to = scratch.path("new");
    fails(11, &["clone", &nobody, text(&to)]);
    assert!(!to.exists());
    fs::create_dir(&to).expect("mkdir");
    fails(11, &["clone", &nobody, text(&to)]);
    assert_eq!(fs::read_dir(&to).expect("it stays").count(), 0);
    fs::write(to.join("mine"), "precious").expect("write");
    let said = fails(1, &["clone", &of, text(&to)]);
    assert!(said.contains("not empty"), "{said}");
    assert_eq!(fs::read_dir(&to).expect("it stays").count(), 1);
    fails(1, &["clone", &of, text(&disk)]);
    fails(11, &["clone", &of, text(&scratch.path("no/such"))]);

    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else {
        return skip("no /dev/shm");
    };
    let device = |path: &Path| fs::metadata(path).expect("there").dev();
    if device(elsewhere.path()) == device(&disk) {
        return skip("/dev/shm is the file system of the temporary directory");
    }
    let far = elsewhere.path().join("far");
    let said = fails(7, &["clone", &of, text(&far)]);
    assert!(said.contains("another file system"), "{said}");
    assert!(!far.exists());
    fails(7, &["clone", text(&disk), text(&far)]);
    let list = json(&["snapshot", "list", text(&disk)]);
    assert_eq!(
        list["snapshots"].as_array().map(Vec::len),
        Some(1),
        "and no snapshot"
    );
    assert_eq!(
        fs::metadata(disk.join("root.hds")).expect("there").nlink(),
        1
    );
}

/// As a clone that was killed before its descriptor had its name.
fn unmake(clone: &Path) {
    let (name, aside) = ("DiskDescriptor.xml", "DiskDescriptor.xml.tmp");
    fs::rename(clone.join(name), clone.join(aside)).expect("rename");
}

fn links(disk: &Path) -> u64 {
    fs::metadata(disk.join("root.hds")).expect("there").nlink()
}

#[test]
fn a_clone_that_was_killed_is_deleted_like_a_disk_and_shares_nothing_any_more() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let uuid = ok(&["snapshot", "create", text(&disk)]);
    let uuid = uuid.trim_end();
    let of = format!("{}@{uuid}", text(&disk));
    let to = scratch.path("new");
    let make = || {
        ok(&["clone", &of, text(&to)]);
        unmake(&to);
        assert_eq!(links(&disk), 2);
    };
    make();
    let said = fails(11, &["info", text(&to)]);
    assert!(said.contains("ploopctl delete"), "{said}");
    fs::write(to.join("mine"), "precious").expect("write");
    fails(1, &["delete", text(&to)]);
    assert_eq!(links(&disk), 2, "nothing was deleted");
    fs::remove_file(to.join("mine")).expect("remove");
    let gone = json(&["delete", text(&to)]);
    assert_eq!(gone["shared"], json!(["root.hds"]), "{gone}");
    assert!(!to.exists());
    assert_eq!(links(&disk), 1);
    // Killed before its fsync, the record is worth nothing, and nothing else is there yet.
    make();
    fs::write(to.join("DiskDescriptor.xml.tmp"), "").expect("write");
    fails(1, &["delete", text(&to)]);
    fs::read_dir(&to).expect("a directory").for_each(|file| {
        let file = file.expect("an entry").path();
        if file.to_string_lossy().contains("root.hds") {
            fs::remove_file(file).expect("remove");
        }
    });
    ok(&["delete", text(&to)]);
    assert!(!to.exists());
    fs::create_dir(&to).expect("mkdir");
    fs::write(to.join("root.hds"), "precious").expect("write");
    fails(11, &["delete", text(&to)]);
    assert!(to.join("root.hds").exists(), "nobody's record names it");
}

#[test]
fn a_clone_killed_at_any_moment_is_a_disk_or_can_be_deleted() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let uuid = ok(&["snapshot", "create", text(&disk)]);
    let of = format!("{}@{}", text(&disk), uuid.trim_end());
    let to = scratch.path("new");
    let mut dice = Dice(3);
    let (mut half, mut tries) = (0, 0);
    while half < 5 || tries < 60 {
        tries += 1;
        assert!(tries < 1000, "{half} of {tries} were killed half-way");
        let mut child = Command::new(PLOOPCTL)
            .args(["clone", &of, text(&to)])
            .stdout(Stdio::null())
            .spawn()
            .expect("ploopctl starts");
        thread::sleep(Duration::from_micros(dice.below(12_000) as u64));
        let _ = child.kill();
        child.wait().expect("it ends");
        half += usize::from(to.exists() && !to.join("DiskDescriptor.xml").exists());
        // An empty directory is nobody's.
        if to.exists() && fs::remove_dir(&to).is_err() {
            ok(&["delete", text(&to)]);
        }
        assert_eq!((to.exists(), links(&disk)), (false, 1));
    }
    println!(
        "COUNT: a_clone_killed_at_any_moment_is_a_disk_or_can_be_deleted: {half} of {tries} half made"
    );
}

#[test]
fn a_hundred_clones_come_and_go_and_the_golden_image_stays_as_it_is() {
    let scratch = Scratch::new();
    let golden = scratch.disk("golden", &["-s", "1G", "--fs", "none"]);
    let uuid = ok(&["snapshot", "create", text(&golden)]);
    let of = format!("{}@{}", text(&golden), uuid.trim_end());
    let base = golden.join("root.hds");
    let before = fs::read(&base).expect("the base");
    let clones: Vec<_> = (0..100).map(|n| scratch.path(&format!("c{n}"))).collect();
    for clone in &clones {
        ok(&["clone", &of, text(clone)]);
    }
    assert_eq!(fs::metadata(&base).expect("there").nlink(), 101);
    for clone in &clones {
        let own = fs::read_dir(clone).expect("a clone").flatten();
        let own = own.map(|entry| entry.metadata().expect("a file"));
        let own = own.filter(|file| file.nlink() == 1);
        let bytes: u64 = own.map(|file| file.blocks() * 512).sum();
        let header = before.len() as u64;
        assert!(
            bytes <= header + 8192,
            "{bytes} bytes, a table has {header}"
        );
    }
    assert_eq!(
        json(&["snapshot", "list", text(&golden)])["snapshots"][0]["uuid"],
        uuid.trim_end()
    );
    for clone in &clones {
        ok(&["delete", text(clone)]);
    }
    assert_eq!(fs::metadata(&base).expect("there").nlink(), 1);
    assert!(fs::read(&base).expect("the base") == before);
}

#[test]
fn when_a_file_can_have_no_more_names_a_clone_says_so_and_leaves_nothing() {
    let scratch = Scratch::new();
    let golden = scratch.disk("golden", &["-s", "8M", "--fs", "none"]);
    let uuid = ok(&["snapshot", "create", text(&golden)]);
    let of = format!("{}@{}", text(&golden), uuid.trim_end());
    let names = scratch.path("names");
    fs::create_dir(&names).expect("mkdir");
    let base = golden.join("root.hds");
    let name = |n: u32| names.join(n.to_string());
    if (0..65_000).all(|n| fs::hard_link(&base, name(n)).is_ok()) {
        return skip("this file system gives a file more than 65000 names");
    }
    let to = scratch.path("new");
    let said = fails(7, &["clone", &of, text(&to)]);
    assert!(said.contains("no more disks can share it"), "{said}");
    assert!(!to.exists());
}
