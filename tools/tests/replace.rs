//! A lost descriptor, and a snapshot's file that another takes the place of.

mod common;

use common::tree::{Dice, Disk, NOBODY, can_judge};
use common::{Scratch, fails, json, ok, text};
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

fn grown(scratch: &Scratch, points: usize) -> Disk {
    let mut disk = Disk::new(scratch, "d");
    let mut dice = Dice(0xA076_1D64_78BD_642F);
    for _ in 0..points {
        disk.scribble(&mut dice, 6);
        disk.snapshot();
    }
    disk.scribble(&mut dice, 6);
    disk
}

fn lose(disk: &Path) -> String {
    let xml = disk.join("DiskDescriptor.xml");
    let text = fs::read_to_string(&xml).expect("read");
    fs::remove_file(&xml).expect("remove");
    text
}

#[test]
fn a_lost_descriptor_is_made_anew_of_the_files_in_their_order() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = grown(&scratch, 3);
    let mut files: Vec<String> = disk.chain(None).iter().map(|f| name(f)).collect();
    files.reverse();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    lose(&disk.path);
    let place = disk.name().to_string();
    let args = ["restore-descriptor", &place];
    // Which stands on which nobody can know.
    let said = fails(2, &args);
    assert!(said.contains(files[3]), "{said}");
    let turned = [files[3], files[0], files[1], files[2]];
    let said = json(&[&args[..], &files].concat());
    let uuids = said["snapshots"].as_array().expect("snapshots").clone();
    assert_eq!(uuids.len(), 3, "{said}");
    let contents: Vec<Vec<u8>> = disk.chain_contents();
    disk.points = uuids
        .iter()
        .map(|uuid| uuid.as_str().expect("a UUID").to_string())
        .zip(contents)
        .collect();
    disk.judge("restored");
    let mut dice = Dice(3);
    disk.scribble(&mut dice, 3);
    disk.snapshot();
    disk.judge("and used");
    let kept = fs::read(disk.path.join("DiskDescriptor.xml")).expect("read");
    fails(1, &[&args[..], &files].concat());
    fails(1, &[&args[..], &turned].concat());
    let now = fs::read(disk.path.join("DiskDescriptor.xml")).expect("read");
    assert!(now == kept, "a descriptor is never replaced");
}

fn name(file: &Path) -> String {
    text(Path::new(file.file_name().expect("a name"))).to_string()
}

/// What the points hold in the order in which they were made.
trait Contents {
    fn chain_contents(&self) -> Vec<Vec<u8>>;
}

impl Contents for Disk {
    fn chain_contents(&self) -> Vec<Vec<u8>> {
        let chain = self.chain(None);
        let points = (1..chain.len()).rev();
        points
            .map(|n| common::tree::read_chain(&chain[n..]))
            .collect()
    }
}

#[test]
fn what_a_killed_restoration_leaves_is_no_reason_to_remove_images() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let descriptor = disk.join("DiskDescriptor.xml");
    fs::rename(&descriptor, disk.join("DiskDescriptor.xml.restored")).expect("renamed");
    fails(11, &["delete", text(&disk)]);
    assert!(disk.join("root.hds").exists());
    ok(&["restore-descriptor", text(&disk)]);
    ok(&["check", text(&disk)]);
    assert!(!disk.join("DiskDescriptor.xml.restored").exists());
}

#[test]
fn a_file_that_disks_share_does_not_become_a_top() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let clone = scratch.path("clone");
    ok(&["clone", text(&disk), text(&clone)]);
    lose(&clone);
    let said = fails(4, &["restore-descriptor", text(&clone), "root.hds"]);
    assert!(said.contains("2 names lead to it"), "{said}");
    assert!(!clone.join("DiskDescriptor.xml").exists());
}

#[test]
fn a_restored_descriptor_says_what_the_lost_one_said() {
    let scratch = Scratch::new();
    for (name, options) in [
        ("v1", &["--format-version", "1"][..]),
        ("v2", &["--cluster", "1M"]),
        ("full", &["--preallocate"]),
    ] {
        let args = [&["-s", "32M", "--fs", "none"], options].concat();
        let disk = scratch.disk(name, &args);
        let lost = lose(&disk);
        ok(&["restore-descriptor", text(&disk)]);
        let found = fs::read_to_string(disk.join("DiskDescriptor.xml")).expect("read");
        assert_eq!(found, lost, "{name}");
    }
}

#[test]
fn a_raw_base_gets_the_largest_cluster_that_divides_it() {
    let scratch = Scratch::new();
    for (bytes, cluster) in [
        (8 << 20, Some(1 << 20)),
        ((8 << 20) + (96 << 10), Some(32 << 10)),
        ((8 << 20) + 512, None),
    ] {
        let dir = scratch.path(&bytes.to_string());
        fs::create_dir(&dir).expect("mkdir");
        let file = File::create(dir.join("flat")).expect("create");
        file.set_len(bytes).expect("length");
        let args = ["restore-descriptor", "--format", "raw", text(&dir)];
        match cluster {
            Some(cluster) => {
                assert_eq!(json(&args)["cluster"], cluster);
                assert_eq!(json(&["info", text(&dir)])["size"], bytes);
            }
            None => assert!(fails(7, &args).contains("truncate(1)")),
        }
    }
    // What is no ploop image is not taken for one.
    let dir = scratch.path("other");
    fs::create_dir(&dir).expect("mkdir");
    fs::write(dir.join("flat"), vec![1; 1 << 20]).expect("write");
    fails(6, &["restore-descriptor", text(&dir)]);
    assert!(!dir.join("DiskDescriptor.xml").exists());
}

#[test]
fn what_may_be_the_lost_descriptor_is_pointed_out() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "32M", "--fs", "none"]);
    let xml = disk.join("DiskDescriptor.xml");
    for record in ["next", "last", "tmp", "deleted"] {
        let aside = disk.join(format!("DiskDescriptor.xml.{record}"));
        fs::rename(&xml, &aside).expect("rename");
        let said = fails(1, &["restore-descriptor", text(&disk)]);
        assert!(said.contains(text(Path::new(&name(&aside)))), "{said}");
        assert!(!xml.exists());
        fs::rename(&aside, &xml).expect("rename");
    }
}

#[test]
fn a_snapshot_gets_another_file_only_when_that_holds_the_same() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = grown(&scratch, 3);
    for n in 1..4 {
        let old = disk.chain(None)[n].clone();
        let list = disk.list();
        let entry = list.iter().find(|s| s["file"] == name(&old).as_str());
        let uuid = entry.expect("a snapshot")["uuid"]
            .as_str()
            .expect("a UUID")
            .to_string();
        let new = scratch.path("copy.hds");
        fs::copy(&old, &new).expect("copy");
        let said = json(&["replace", disk.name(), &uuid, text(&new)]);
        assert_eq!(said["way"], "moved", "{said}");
        assert_eq!(said["old"], name(&old), "{said}");
        assert!(!new.exists() && !old.exists());
        disk.judge("replaced");
        // One sector that differs.
        let now = disk.path.join(said["new"].as_str().expect("a file"));
        fs::copy(&now, &new).expect("copy");
        let file = File::options().write(true).open(&new).expect("open");
        let len = file.metadata().expect("stat").len();
        file.write_all_at(&[0x77; 512], len - 512).expect("write");
        let said = fails(1, &["replace", disk.name(), &uuid, text(&new)]);
        assert!(said.contains("guest offset"), "{said}");
        assert!(new.exists());
        disk.judge("not replaced");
        fs::remove_file(&new).expect("remove");
    }
    disk.scribble(&mut Dice(5), 3);
    disk.snapshot();
    disk.judge("used");
}

#[test]
fn a_file_that_is_somebody_elses_takes_no_snapshots_place() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let disk = grown(&scratch, 1);
    let (uuid, base) = (
        disk.points.keys().next().expect("one"),
        disk.chain(None).pop(),
    );
    let base = base.expect("a base");
    let new = scratch.path("copy.hds");
    fs::copy(&base, &new).expect("copy");
    fails(11, &["replace", disk.name(), NOBODY, text(&new)]);
    fails(
        11,
        &["replace", disk.name(), uuid, text(&scratch.path("nothing"))],
    );
    let top = disk.list()[0]["current"].clone();
    assert_eq!(top, json!(true));
    let said = fails(
        1,
        &[
            "replace",
            disk.name(),
            "5fbaabe3-6958-40ff-92a7-860e329aab41",
            text(&new),
        ],
    );
    assert!(said.contains("top"), "{said}");
    let said = fails(1, &["replace", disk.name(), uuid, text(&base)]);
    assert!(said.contains("DiskDescriptor.xml"), "{said}");
    fs::hard_link(&new, scratch.path("other")).expect("link");
    fails(7, &["replace", disk.name(), uuid, text(&new)]);
    fs::remove_file(scratch.path("other")).expect("remove");
    // Of another shape.
    ok(&[
        "convert",
        "--format",
        "ploop",
        "--format-version",
        "1",
        text(&new),
    ]);
    let said = fails(1, &["replace", disk.name(), uuid, text(&new)]);
    assert!(said.contains("version"), "{said}");
    disk.judge("as it was");
    let server = common::tree::Server::start(&disk.path);
    let said = fails(1, &["replace", disk.name(), uuid, text(&new)]);
    assert!(said.contains("version"), "of a disk in use: {said}");
    drop(server);
}

#[test]
fn a_copy_on_another_file_system_is_copied_and_stays() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let Ok(far) = tempfile::tempdir_in("/dev/shm") else {
        common::skip("no /dev/shm");
        return;
    };
    let disk = grown(&scratch, 2);
    let (device, here) = (fs::metadata(far.path()), fs::metadata(&disk.path));
    use std::os::unix::fs::MetadataExt;
    if device.expect("stat").dev() == here.expect("stat").dev() {
        common::skip("no other file system");
        return;
    }
    let base = disk.chain(None).pop().expect("a base");
    let list = disk.list();
    let entry = list.iter().find(|s| s["file"] == name(&base).as_str());
    let uuid = entry.expect("a snapshot")["uuid"]
        .as_str()
        .expect("a UUID")
        .to_string();
    let new = far.path().join("copy.hds");
    fs::copy(&base, &new).expect("copy");
    let said = json(&["replace", disk.name(), &uuid, text(&new)]);
    assert_eq!(said["way"], "copied", "{said}");
    assert!(new.exists() && !base.exists());
    disk.judge("replaced");
}
