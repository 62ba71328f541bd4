//! Conversions as a user makes them. What comes of one is read by QEMU, and compared with a model.

mod common;

use common::tree::{Dice, Disk, SIZE, can_judge, read_chain, tool};
use common::{PLOOPCTL, Scratch, can_mount, fails, json, kill9, noise, ok, run, text};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The layers of a disk, as `info` shows them.
fn layers(disk: &Path) -> Vec<Value> {
    let info = json(&["info", text(disk)]);
    info["layers"].as_array().expect("layers").clone()
}

/// What a disk of one image holds.
fn content(disk: &Path) -> Vec<u8> {
    let layers = layers(disk);
    assert_eq!(layers.len(), 1, "{layers:?}");
    let file = disk.join(layers[0]["file"].as_str().expect("a file"));
    match layers[0]["format"].as_str() {
        Some("raw") => fs::read(file).expect("read"),
        _ => {
            tool("qemu-img", &["check", "-q", "-f", "parallels", text(&file)]);
            read_chain(&[file])
        }
    }
}

/// Names in a directory, but for locks.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("list").map(|e| {
        let name = e.expect("an entry").file_name();
        name.into_string().expect("UTF-8")
    });
    let mut names: Vec<String> = entries.filter(|n| !n.ends_with(".lck")).collect();
    names.sort();
    names
}

#[test]
fn a_disk_reads_the_same_to_qemu_through_every_form() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    disk.scribble(&mut Dice(0x51_7CC1_B727_220A), 9);
    let steps: [(&[&str], &str, Option<u64>); 9] = [
        (&["--format-version", "1"], "same", Some(1)),
        (&["--to", "preallocated"], "preallocated", Some(1)),
        (&["--format-version", "2"], "same", Some(2)),
        (&["--to", "raw"], "raw", None),
        (&["--to", "raw"], "raw", None),
        (
            &["--to", "expanded", "--format-version", "1"],
            "expanded",
            Some(1),
        ),
        (&["--flatten"], "expanded", Some(1)),
        (
            &["--to", "preallocated", "--format-version", "2"],
            "preallocated",
            Some(2),
        ),
        (&["--to", "expanded"], "expanded", Some(2)),
    ];
    for (options, form, version) in steps {
        let args = [&["convert", disk.name()], options].concat();
        let said = json(&args);
        assert_eq!(said["changed"], true, "{said}");
        assert_eq!(said["format_version"], json!(version), "{said}");
        if form != "same" {
            assert_eq!(
                (&said["form"], &said["size"]),
                (&json!(form), &json!(SIZE)),
                "{said}"
            );
        }
        assert!(content(&disk.path) == disk.top, "{options:?}");
        assert_eq!(layers(&disk.path)[0]["format_version"], json!(version));
        assert_eq!(json(&["check", disk.name()])["clean"], true, "{options:?}");
        assert_eq!(names(&disk.path).len(), 2, "{:?}", names(&disk.path));
        let xml = fs::read_to_string(disk.path.join("DiskDescriptor.xml")).expect("read");
        if form != "same" {
            let stated = xml.contains("<Preallocated>1</Preallocated>");
            assert_eq!(stated, form == "preallocated", "{xml}");
        }
    }
    // It can be used as before.
    disk.write(&[(1 << 20, 4096, 0xAB)]);
    assert!(content(&disk.path) == disk.top);
    let said = json(&["convert", disk.name(), "--format-version", "2"]);
    assert_eq!(said["changed"], false, "{said}");
}

#[test]
fn all_points_of_a_tree_change_their_version_and_read_as_they_did() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    let mut dice = Dice(0x2545_F491_4F6C_DD1D);
    let mut made = Vec::new();
    for _ in 0..4 {
        disk.scribble(&mut dice, 5);
        made.push(disk.snapshot());
    }
    disk.switch(&made[1]);
    disk.scribble(&mut dice, 5);
    for version in ["1", "2", "1"] {
        ok(&["convert", disk.name(), "--format-version", version]);
        disk.judge(version);
        for layer in layers(&disk.path) {
            assert_eq!(layer["format_version"].to_string(), version, "{layer}");
        }
    }
    // A new delta is of the version of those below it.
    disk.snapshot();
    assert_eq!(
        layers(&disk.path).pop().expect("a top")["format_version"],
        1
    );
    disk.judge("a snapshot of the converted one");
}

#[test]
fn a_chain_becomes_one_image_here_or_elsewhere() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    for _ in 0..3 {
        disk.scribble(&mut dice, 5);
        disk.snapshot();
    }
    disk.scribble(&mut dice, 5);
    let said = fails(7, &["convert", disk.name(), "--to", "raw"]);
    assert!(said.contains("--flatten"), "{said}");
    for (name, options) in [
        ("raw", &["--to", "raw"][..]),
        ("v1", &["--format-version", "1"]),
        ("full", &["--to", "preallocated"]),
    ] {
        let out = scratch.path(name);
        let args = ["convert", disk.name(), "--flatten", "--out", text(&out)];
        let said = json(&[&args[..], options].concat());
        assert_eq!(said["source"], disk.name(), "{said}");
        assert!(content(&out) == disk.top, "{options:?}");
        assert_eq!(names(&out), ["DiskDescriptor.xml", "root.hds"]);
        ok(&["check", text(&out)]);
    }
    fails(
        1,
        &[
            "convert",
            disk.name(),
            "--flatten",
            "--out",
            text(&scratch.path("raw")),
        ],
    );
    disk.judge("its source stays");
    ok(&["convert", disk.name(), "--flatten"]);
    disk.points.clear();
    disk.judge("one image");
}

#[test]
fn holes_and_zeros_of_a_raw_image_are_not_stored() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let file = scratch.path("flat.raw");
    let raw = File::create(&file).expect("create");
    // Not a whole number of clusters.
    raw.set_len((64 << 20) + 512).expect("length");
    let data = noise(300_000, 7);
    raw.write_all_at(&data, 5 << 20).expect("write");
    raw.write_all_at(&vec![0; 4 << 20], 20 << 20)
        .expect("zeros");
    raw.write_all_at(&[1; 512], 64 << 20).expect("the end");
    let out = scratch.path("d");
    let args = [
        "convert",
        "--format",
        "raw",
        text(&file),
        "--to",
        "expanded",
    ];
    fails(2, &args);
    let said = json(&[&args[..], &["--out", text(&out)]].concat());
    assert_eq!(said["size"], (64 << 20) + (64 << 10), "rounded up: {said}");
    let mut wanted = fs::read(&file).expect("read");
    wanted.resize((64 << 20) + (64 << 10), 0);
    assert!(content(&out) == wanted);
    let stored = fs::metadata(out.join("root.hds")).expect("stat").len();
    assert!(stored <= 512 << 10, "{stored} bytes of 300000");
    // And back: a raw image has all its space, as ploop makes it.
    ok(&["convert", text(&out), "--to", "raw"]);
    assert!(content(&out) == wanted);
}

#[test]
fn what_cannot_be_converted_is_refused_and_stays_as_it_is() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let big = scratch.disk("big", &["-s", "4T", "--fs", "none", "--cluster", "1M"]);
    let before = fs::read(disk.join("root.hds")).expect("read");
    let said = fails(7, &["convert", text(&big), "--format-version", "1"]);
    assert!(said.contains("version 1 ends at"), "{said}");
    fails(
        7,
        &[
            "convert",
            text(&big),
            "--to",
            "expanded",
            "--format-version",
            "1",
        ],
    );
    fails(
        2,
        &[
            "convert",
            text(&disk),
            "--to",
            "raw",
            "--format-version",
            "1",
        ],
    );
    fails(
        2,
        &[
            "convert",
            text(&disk),
            "--format-version",
            "1",
            "--rate",
            "1M",
        ],
    );
    fails(2, &["convert", text(&disk), "--format-version", "3"]);
    fails(11, &["convert", text(&scratch.path("nothing"))]);
    // What others share is written by nobody.
    ok(&["clone", text(&disk), text(&scratch.path("twin"))]);
    for one in [&disk, &scratch.path("twin")] {
        let said = fails(7, &["convert", text(one), "--format-version", "1"]);
        assert!(said.contains("--flatten --out DIR"), "{said}");
    }
    assert!(fs::read(disk.join("root.hds")).expect("read") == before);
    ok(&[
        "convert",
        text(&scratch.path("twin")),
        "--flatten",
        "--format-version",
        "1",
    ]);
    assert_eq!(names(&big), ["DiskDescriptor.xml", "root.hds"]);
    // Now it is shared no more.
    ok(&["convert", text(&disk), "--format-version", "1"]);
    assert_eq!(json(&["check", text(&disk)])["clean"], true);
}

#[test]
fn an_attached_disk_is_not_converted() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let disk = Disk::new(&scratch, "d");
    let server = common::tree::Server::start(&disk.path);
    for options in [
        &["--format-version", "1"][..],
        &["--to", "raw"],
        &["--to", "raw", "--out", "/nowhere"],
        &[],
    ] {
        let said = fails(4, &[&["convert", disk.name()], options].concat());
        assert!(said.contains("attached"), "{said}");
    }
    drop(server);
    ok(&["convert", disk.name(), "--format-version", "1"]);
}

/// Begins a slow conversion, and comes back when it copies.
fn begin(disk: &Path, options: &[&str]) -> Child {
    let child = Command::new(PLOOPCTL)
        .args(["convert", text(disk), "--rate", "1M"])
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("convert");
    common::eventually("the new image is there", || {
        fs::read_dir(disk).expect("list").any(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("UTF-8");
            name.starts_with("root.hds.") && entry.metadata().is_ok_and(|m| m.len() > 200_000)
        })
    });
    child
}

#[test]
fn a_conversion_that_is_killed_or_cancelled_leaves_the_disk_as_it_was() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    disk.write(&[(0, 7 << 20, 0x5A)]);
    let mut child = begin(&disk.path, &["--to", "raw"]);
    kill9(child.id().into());
    child.wait().expect("wait");
    assert!(names(&disk.path).len() > 2, "{:?}", names(&disk.path));
    ok(&["convert", disk.name()]);
    disk.judge("killed");
    assert_eq!(names(&disk.path).len(), 2, "{:?}", names(&disk.path));

    let child = begin(&disk.path, &["--to", "preallocated"]);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("interrupt");
    let output = child.wait_with_output().expect("wait");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(10), "{said}");
    assert!(said.contains("the disk is what it was"), "{said}");
    disk.judge("cancelled");
    assert_eq!(names(&disk.path).len(), 2, "{:?}", names(&disk.path));
}

/// A disk as ploop leaves it when it dies while it converts an image from version 2 to 1: the table
/// is beside it, the image says so, and a part of the entries is in the other unit.
fn interrupt(image: &Path) -> PathBuf {
    let bytes = fs::read(image).expect("read");
    let table = 64 << 10;
    let copy = PathBuf::from(format!("{}.idx", text(image)));
    fs::write(&copy, &bytes[..table]).expect("copy");
    let file = File::options().write(true).open(image).expect("open");
    file.write_all_at(&0x746F_6E59_u32.to_le_bytes(), 0x2C)
        .expect("in use");
    file.write_all_at(&2_u32.to_le_bytes(), 0x34).expect("flag");
    for slot in 0..40 {
        let at = 64 + slot * 4;
        let entry = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        let sectors = (entry * 128).to_le_bytes();
        file.write_all_at(&sectors, at as u64).expect("an entry");
    }
    copy
}

#[test]
fn what_ploop_left_in_the_middle_is_undone_before_anybody_reads_it() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    let mut dice = Dice(0x0DDB_1A5E_5BAD_5EED);
    disk.scribble(&mut dice, 9);
    disk.snapshot();
    disk.scribble(&mut dice, 9);
    let files = disk.chain(None);
    let begin = || {
        let copies: Vec<PathBuf> = files.iter().map(|file| interrupt(file)).collect();
        for verb in ["check", "map"] {
            let output = run(&[verb, disk.name()]);
            assert_eq!(output.status.code(), Some(6), "{verb}: {output:?}");
        }
        copies
    };
    let undone = |copies: Vec<PathBuf>, how: &str| {
        assert!(!copies.iter().any(|copy| copy.exists()), "{how}");
        disk.judge(how);
    };
    for how in [
        &["convert"][..],
        &["check", "--repair"],
        &["snapshot", "create"],
        &["list", "--orphans", "--remove"],
    ] {
        let copies = begin();
        ok(&[how, &[disk.name()]].concat());
        if how[0] == "snapshot" {
            ok(&["snapshot", "merge", disk.name()]);
        }
        undone(copies, how[0]);
    }
    let copies = begin();
    drop(common::tree::Server::start(&disk.path));
    undone(copies, "serve");
    // A copy that is of another image is not believed.
    let copies = begin();
    File::options()
        .write(true)
        .open(&copies[0])
        .and_then(|file| file.write_all_at(&[9], 0x20))
        .expect("write");
    let said = fails(6, &["convert", disk.name()]);
    assert!(said.contains("not of this image"), "{said}");
}

#[test]
fn a_bare_image_changes_its_version_where_it_is() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    disk.scribble(&mut Dice(77), 9);
    let file = scratch.path("bare.hds");
    fs::copy(disk.path.join("root.hds"), &file).expect("copy");
    let bare = ["--format", "ploop", text(&file)];
    for version in ["1", "2"] {
        ok(&[&["convert", "--format-version", version], &bare[..]].concat());
        let info = json(&[&["info"], &bare[..]].concat());
        assert_eq!(info["layers"][0]["format_version"].to_string(), version);
        assert!(read_chain(std::slice::from_ref(&file)) == disk.top);
    }
    let copy = interrupt(&file);
    ok(&[&["check", "--repair"], &bare[..]].concat());
    assert!(!copy.exists());
    assert!(read_chain(std::slice::from_ref(&file)) == disk.top);
    fails(2, &[&["convert", "--to", "raw"], &bare[..]].concat());
    let out = scratch.path("out");
    ok(&[&["convert", "--to", "raw", "--out", text(&out)], &bare[..]].concat());
    assert!(content(&out) == disk.top);
}

#[test]
fn a_mount_finds_no_half_converted_image() {
    if !can_judge() || !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    fs::write(point.join("file"), "content").expect("write");
    ok(&["umount", text(&point)]);
    let copy = interrupt(&disk.join("root.hds"));
    ok(&["mount", text(&disk), text(&point)]);
    assert!(!copy.exists());
    assert_eq!(fs::read(point.join("file")).expect("read"), b"content");
    ok(&["umount", text(&point)]);
}
