//! Disks with a descriptor whose layers are qcow2 images, or some of them: made of an image, changed
//! like any other, and read by QEMU as by us. What an image names itself is never looked for.

mod common;

use common::tree::{CLUSTER, Dice, Disk, SIZE, Server, can_judge, tool};
use common::{Scratch, can_mount, fails, has, json, noise, ok, text};
use std::fs;
use std::path::{Path, PathBuf};

/// Noise, zeros that are stored, a hole, and what is easily compressed.
fn content(len: usize) -> Vec<u8> {
    let mut bytes = noise(len, 7);
    bytes[len / 8..len / 4].fill(0);
    bytes[len / 2..len * 3 / 4].fill(0x5A);
    bytes
}

/// A qcow2 image of these bytes.
fn image(scratch: &Scratch, name: &str, bytes: &[u8], options: &[&str]) -> PathBuf {
    let (raw, image) = (scratch.path("content"), scratch.path(name));
    fs::write(&raw, bytes).expect("write");
    let args = ["convert", "-f", "raw", "-O", "qcow2"];
    let files = [text(&raw), text(&image)];
    tool("qemu-img", &[&args[..], options, &files].concat());
    image
}

/// A disk of that image alone.
fn adopted(scratch: &Scratch, name: &str, options: &[&str]) -> Disk {
    let bytes = content(SIZE);
    let file = image(scratch, "image", &bytes, options);
    // What a snapshot of its own has is not overwritten.
    tool("qemu-img", &["snapshot", "-c", "own", text(&file)]);
    let path = scratch.path(name);
    ok(&["adopt", "--format", "qcow2", text(&file), text(&path)]);
    Disk::of(path, bytes)
}

/// A disk with a snapshot of another format, on which an image of QEMU's stands.
fn grafted(scratch: &Scratch, name: &str, base: &str) -> Disk {
    let mut disk = match base {
        "raw" => {
            let (raw, path) = (scratch.path("image"), scratch.path(name));
            fs::write(&raw, content(SIZE)).expect("write");
            ok(&["adopt", "--format", "raw", text(&raw), text(&path)]);
            Disk::of(path, content(SIZE))
        }
        _ => {
            let mut disk = Disk::new(scratch, name);
            disk.write(&[(0, 3 << 20, 1), (5 << 20, 100 << 10, 2)]);
            disk
        }
    };
    disk.snapshot();
    let top = disk.top_file();
    let size = SIZE.to_string();
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&top), &size],
    );
    let xml = disk.path.join("DiskDescriptor.xml");
    let text = fs::read_to_string(&xml).expect("read");
    let name = top.file_name().and_then(|n| n.to_str()).expect("a name");
    let (before, after) = text.split_at(text.find(name).expect("the top"));
    let (start, kind) = before.rsplit_once("<Type>").expect("its type");
    let (_, rest) = kind.split_once("</Type>").expect("its end");
    fs::write(&xml, format!("{start}<Type>QCow2</Type>{rest}{after}")).expect("write");
    disk
}

/// Points come and go in every way, each judged by QEMU.
fn change(disk: &mut Disk, rounds: usize) {
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut made: Vec<String> = disk.points.keys().cloned().collect();
    for round in 0..rounds {
        if round % 3 == 2 {
            let back = made[dice.below(made.len())].clone();
            disk.switch(&back);
        }
        disk.scribble(&mut dice, 12);
        made.push(disk.snapshot());
        let kind = fs::read(disk.top_file()).expect("read");
        assert_eq!(kind[..4], *b"QFI\xFB", "the new top is like the old one");
    }
    disk.scribble(&mut dice, 12);
    disk.judge("made");
    for (a, b) in [(0, rounds - 1), (rounds - 1, 1)] {
        judge_diff(disk, &made[a], &made[b]);
    }
    while made.len() > 1 {
        let gone = made.swap_remove(dice.below(made.len()));
        disk.delete(&gone);
        disk.judge(&format!("{gone} deleted"));
    }
    disk.switch(&made[0]);
    disk.scribble(&mut dice, 12);
    disk.judge("switched");
    ok(&["check", disk.name()]);
    disk.delete(&made[0]);
    disk.judge("alone");
}

/// Every byte that differs is in a part that `snapshot diff` tells.
fn judge_diff(disk: &Disk, a: &str, b: &str) {
    let mut rest = disk.points[a].clone();
    for line in ok(&["-o", "json", "snapshot", "diff", disk.name(), a, b]).lines() {
        let part: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let number = |field: &str| part[field].as_u64().expect("a number") as usize;
        let range = number("start")..number("start") + number("length");
        rest[range.clone()].copy_from_slice(&disk.points[b][range]);
    }
    assert!(
        rest == disk.points[b],
        "{a} to {b}: a difference that is not told"
    );
}

#[test]
fn a_tree_of_qcow2_images_is_changed_like_any_other() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    for (name, options) in [
        ("plain", &[][..]),
        ("packed", &["-c"]),
        ("v2", &["-o", "compat=0.10"]),
        ("subclusters", &["-o", "extended_l2=on,cluster_size=128k"]),
    ] {
        let mut disk = adopted(&scratch, name, options);
        change(&mut disk, 5);
        let (top, own) = (disk.top_file(), scratch.path("own"));
        let args = ["convert", "-l", "snapshot.name=own", "-O", "raw"];
        let files = [text(&top), text(&own)];
        tool("qemu-img", &[&args[..], &files].concat());
        let found = fs::read(&own).expect("read");
        assert!(found == content(SIZE), "{name}: a snapshot of its own");
        ok(&["delete", disk.name()]);
    }
}

/// Whether QEMU finds subclusters in the top.
fn has_subclusters(disk: &Disk) -> bool {
    let mut info = std::process::Command::new("qemu-img");
    let said = info
        .args(["info", "-U", "-f", "qcow2"])
        .arg(disk.top_file());
    let said = said.output().expect("qemu-img").stdout;
    String::from_utf8_lossy(&said).contains("extended l2: true")
}

#[test]
fn what_stands_on_subclusters_has_subclusters() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    for extended in [true, false] {
        let option = format!("extended_l2={}", if extended { "on" } else { "off" });
        let name = option.as_str();
        let mut disk = adopted(&scratch, name, &["-o", &option]);
        let first = disk.snapshot();
        assert_eq!(has_subclusters(&disk), extended, "{name}");
        let server = Server::start(&disk.path);
        disk.snapshot();
        assert_eq!(has_subclusters(&disk), extended, "{name}, in use");
        disk.delete(&first);
        drop(server);
        disk.judge(name);
        let clone = scratch.path(&format!("clone-{name}"));
        ok(&["clone", disk.name(), text(&clone)]);
        let clone = Disk::of(clone, disk.top.clone());
        assert_eq!(has_subclusters(&clone), extended, "{name}, a clone");
        assert!(clone.read(None) == disk.top, "{name}, a clone");
    }
}

/// Gives a new top entries that tell of subclusters of 2 KiB.
fn extend(disk: &Disk) {
    let (top, size) = (disk.top_file(), SIZE.to_string());
    let options = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on"];
    tool("qemu-img", &[&options[..], &[text(&top), &size]].concat());
}

/// Blocks of 4 KiB here and there; some of them zeros.
fn blocks(disk: &mut Disk, dice: &mut Dice) {
    let one = |dice: &mut Dice| {
        let byte = u8::try_from(dice.below(6)).expect("a byte");
        (dice.below(SIZE / 4096) * 4096, 4096, byte)
    };
    let writes: Vec<_> = (0..60).map(|_| one(dice)).collect();
    disk.write(&writes);
}

/// A base of a kind, with layers on it, every other of which has clusters in part.
fn parted(scratch: &Scratch, kind: &str, dice: &mut Dice) -> (Disk, Vec<String>) {
    let mut disk = match kind {
        "packed" => adopted(scratch, kind, &["-c"]),
        "subclusters" => {
            let mut disk = adopted(scratch, kind, &["-o", "extended_l2=on"]);
            blocks(&mut disk, dice);
            disk
        }
        base => grafted(scratch, base, base),
    };
    let mut made: Vec<String> = disk.points.keys().cloned().collect();
    for round in 0..5 {
        made.push(disk.snapshot());
        if round % 3 == 2 {
            disk.scribble(dice, 12);
        } else {
            extend(&disk);
            blocks(&mut disk, dice);
        }
    }
    disk.judge("made");
    (disk, made)
}

#[test]
fn clusters_that_are_there_in_part_are_merged_with_what_they_stand_on() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut dice = Dice(0x2545_F491_4F6C_DD1D);
    for kind in ["packed", "subclusters", "raw", "ploop"] {
        let (mut disk, mut made) = parted(&scratch, kind, &mut dice);
        while !made.is_empty() {
            let last = made.len() - 1;
            // One in the middle, what the top stands on, and so on; both also while the disk is in use.
            let gone = match last % 2 {
                _ if last == 0 => made.remove(0),
                1 => made.remove(last / 2 + 1),
                _ => made.remove(last),
            };
            let in_use = last / 2 % 2 == 0;
            let server = in_use.then(|| Server::start(&disk.path));
            disk.delete(&gone);
            drop(server);
            disk.judge(&format!("{kind}: {gone} deleted, in use: {in_use}"));
            blocks(&mut disk, &mut dice);
        }
        ok(&["check", disk.name()]);
        disk.judge("alone");
    }
}

#[test]
fn a_part_of_a_compressed_cluster_is_merged_below_a_running_disk_that_reads_it() {
    if !can_judge() || !has("nbdcopy") {
        return;
    }
    let scratch = Scratch::new();
    let bytes = content(SIZE);
    let file = image(&scratch, "image", &bytes, &["-c"]);
    let path = scratch.path("d");
    ok(&["adopt", "--format", "qcow2", text(&file), text(&path)]);
    let mut disk = Disk::of(path, bytes);
    let first = disk.snapshot();
    extend(&disk);
    let middle = SIZE / 2;
    for n in 0..32 {
        disk.write(&[(middle + n * CLUSTER + 4096, 4096, 1)]);
    }
    disk.snapshot();
    let server = Server::start(&disk.path);
    let read = || {
        let copy = scratch.path("copy");
        tool("nbdcopy", &[&server.uri, text(&copy)]);
        fs::read(copy).expect("read")
    };
    // It knows from now on where the rest of these clusters was.
    assert!(read() == disk.top, "before");
    disk.delete(&first);
    assert!(read() == disk.top, "after");
    drop(server);
    disk.judge("merged");
}

#[test]
fn so_is_one_on_a_base_of_another_format() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    for base in ["raw", "ploop"] {
        let mut disk = grafted(&scratch, base, base);
        change(&mut disk, 5);
    }
}

/// No block of direct I/O divides its size.
const ODD: usize = SIZE + 512;

#[test]
fn a_running_top_is_merged_into_an_image_whose_size_no_block_divides() {
    if !can_judge() || !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let mut bytes = content(ODD);
    let file = image(&scratch, "image", &bytes, &[]);
    let path = scratch.path("d");
    ok(&["adopt", "--format", "qcow2", text(&file), text(&path)]);
    let device = json(&["mount", text(&path)])["device"].clone();
    let device = PathBuf::from(device.as_str().expect("a device"));
    for round in 1..3u8 {
        let uuid = ok(&["snapshot", "create", text(&path)]);
        for at in [0, 3 * CLUSTER + 512, ODD - 512] {
            bytes[at..at + 512].fill(round);
            write_sector(&device, at, round);
        }
        ok(&["snapshot", "delete", text(&path), uuid.trim_end()]);
    }
    ok(&["umount", text(&path)]);
    let disk = Disk::of(path, bytes);
    disk.judge("merged twice");
}

fn write_sector(device: &Path, at: usize, byte: u8) {
    use std::os::unix::fs::FileExt;
    let device = fs::File::options().write(true).open(device).expect("open");
    device.write_all_at(&[byte; 512], at as u64).expect("write");
    device.sync_all().expect("sync");
}

#[test]
fn what_was_frozen_before_a_disk_grew_takes_in_what_stands_on_it() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    for (name, options) in [
        ("plain", &[][..]),
        ("subclusters", &["-o", "extended_l2=on,cluster_size=128k"]),
    ] {
        let mut disk = adopted(&scratch, name, options);
        let point = disk.snapshot();
        ok(&["grow", disk.name(), "16M"]);
        let refused = fails(1, &["grow", disk.name(), "12M"]);
        assert!(refused.contains("less than"), "{refused}");
        disk.top.resize(2 * SIZE, 0);
        disk.write(&[(12 << 20, 100 << 10, 9), (1 << 20, 4096, 8)]);
        disk.judge("grown");
        disk.delete(&point);
        disk.judge("merged");
        ok(&["check", disk.name()]);
    }
}

#[test]
fn snapshots_inside_an_image_go_only_when_that_is_said() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let disk = adopted(&scratch, "d", &[]);
    let refused = fails(7, &["convert", disk.name(), "--to", "expanded"]);
    let helps = refused.contains("1 snapshots inside") && refused.contains("--flatten");
    assert!(helps, "{refused}");
    ok(&["convert", disk.name(), "--to", "expanded", "--flatten"]);
    assert!(disk.read(None) == disk.top);
}

#[test]
fn a_mounted_disk_of_qcow2_images_is_looked_at_cloned_and_gone_back_with() {
    if !can_judge() || !can_mount() || !has("mkfs.ext4") {
        return;
    }
    let scratch = Scratch::new();
    let raw = scratch.path("raw");
    fs::File::create(&raw)
        .and_then(|f| f.set_len(64 << 20))
        .expect("a file");
    tool("mkfs.ext4", &["-q", text(&raw)]);
    let file = scratch.path("image");
    tool(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            text(&raw),
            text(&file),
        ],
    );
    let path = scratch.path("d");
    let (d, point) = (text(&path), scratch.mountpoint());
    ok(&["adopt", "--format", "qcow2", text(&file), d]);
    ok(&["mount", d, text(&point)]);
    fs::write(point.join("file"), "first").expect("write");
    let first = ok(&["snapshot", "create", "--freeze", d]);
    let first = first.trim_end();
    fs::write(point.join("file"), "second").expect("write");
    let view = scratch.path("view");
    fs::create_dir(&view).expect("mkdir");
    ok(&["snapshot", "mount", d, first, text(&view)]);
    assert_eq!(
        fs::read_to_string(view.join("file")).expect("read"),
        "first"
    );
    ok(&["umount", text(&view)]);
    let clone = scratch.path("clone");
    ok(&["clone", &format!("{d}@{first}"), text(&clone)]);
    ok(&["limit", d, "--delta", "1G"]);
    ok(&["grow", d, "128M"]);
    assert_eq!(json(&["info", d])["size"], 128 << 20);
    let refused = fails(7, &["compact", d]);
    assert!(refused.contains("qcow2"), "{refused}");
    assert_eq!(
        scratch.attached()[0]["restarts"],
        0,
        "a refusal costs nobody"
    );
    assert_eq!(
        fs::read_to_string(point.join("file")).expect("read"),
        "second"
    );
    ok(&["umount", text(&point)]);
    ok(&["mount", text(&clone), text(&point)]);
    assert_eq!(
        fs::read_to_string(point.join("file")).expect("read"),
        "first"
    );
    fs::write(point.join("own"), "own").expect("write");
    ok(&["umount", text(&point)]);
    ok(&["snapshot", "switch", d, first]);
    ok(&["mount", d, text(&point)]);
    assert_eq!(
        fs::read_to_string(point.join("file")).expect("read"),
        "first"
    );
    assert!(!point.join("own").exists());
    ok(&["umount", text(&point)]);
    for disk in [d, text(&clone)] {
        ok(&["check", disk]);
        let info = json(&["info", disk]);
        for layer in info["layers"].as_array().expect("layers") {
            assert_eq!(layer["format"], "qcow2", "{info}");
            let file = Path::new(disk).join(layer["file"].as_str().expect("a name"));
            tool("qemu-img", &["check", "-q", "-f", "qcow2", text(&file)]);
        }
    }
}

#[test]
fn what_stands_on_what_the_descriptor_says_alone() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let disk = adopted(&scratch, "d", &[]);
    let top = disk.top_file();
    let sound = fs::read(&top).expect("read");
    fs::write(scratch.path("d/secret"), noise(SIZE, 3)).expect("write");
    tool(
        "qemu-img",
        &[
            "rebase",
            "-u",
            "-f",
            "qcow2",
            "-b",
            "secret",
            "-F",
            "raw",
            text(&top),
        ],
    );
    for args in [
        &["map", disk.name()][..],
        &["snapshot", "create", disk.name()],
        &["serve", disk.name(), "--nbd", "-"],
    ] {
        let refused = fails(7, args);
        let helps = refused.contains("secret") && refused.contains("qemu-img rebase -u -b");
        assert!(helps, "{args:?}: {refused}");
    }
    tool(
        "qemu-img",
        &["rebase", "-u", "-f", "qcow2", "-b", "", text(&top)],
    );
    assert!(disk.read(None) == disk.top);
    ok(&["snapshot", "create", disk.name()]);
    // The descriptor says which clusters there are.
    let xml = disk.path.join("DiskDescriptor.xml");
    let said = fs::read_to_string(&xml).expect("read");
    fs::write(&xml, said.replace("<Blocksize>128<", "<Blocksize>256<")).expect("write");
    let refused = fails(6, &["map", disk.name()]);
    assert!(
        refused.contains("65536") && refused.contains("131072"),
        "{refused}"
    );
    fs::write(&xml, said).expect("write");
    fs::write(&top, &sound).expect("write");
    drop(Server::start(&disk.path));
}

#[test]
fn an_image_that_cannot_be_a_disk_of_its_own_is_not_adopted() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let create = |options: &[&str]| {
        let file = scratch.path("image");
        let _ = fs::remove_file(&file);
        let args = ["create", "-q", "-f", "qcow2"];
        tool(
            "qemu-img",
            &[&args[..], options, &[text(&file), "8M"]].concat(),
        );
        file
    };
    let refused = |code: i32, file: &Path, word: &str| {
        let before = fs::read(file).expect("read");
        let dir = scratch.path("d");
        let said = fails(
            code,
            &["adopt", "--format", "qcow2", text(file), text(&dir)],
        );
        assert!(said.contains(word), "{said}");
        assert!(fs::read(file).expect("read") == before && !dir.exists());
    };
    fs::write(scratch.path("base"), vec![0; SIZE]).expect("write");
    refused(
        7,
        &create(&["-b", "base", "-F", "raw"]),
        "stands on another file",
    );
    let data = format!("data_file={}", text(&scratch.path("data")));
    refused(7, &create(&["-o", &data]), "data in another file");
    let unnamed = create(&["-o", &data]);
    let amend = ["amend", "-f", "qcow2", "-o", "data_file="];
    tool("qemu-img", &[&amend[..], &[text(&unnamed)]].concat());
    refused(7, &unnamed, "which it does not name");
    refused(
        7,
        &create(&["-o", "cluster_size=16k"]),
        "clusters of 16384 bytes",
    );
    let file = create(&[]);
    let mut bytes = fs::read(&file).expect("read");
    bytes[24..32].copy_from_slice(&(SIZE as u64 + 100).to_be_bytes());
    fs::write(&file, &bytes).expect("write");
    refused(1, &file, "qemu-img resize");
}
