//! qcow2 images as disks: every kind that QEMU makes, with all that it stands on, reads as QEMU reads it,
//! and no image reaches a file that it must not.

mod common;

use common::{PLOOPCTL, Scratch, can_mount, fails, has, json, kill9, noise, ok, run, text};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: usize = 1 << 20;

/// Every byte is asked for, so many at once that they are in thousands of small clusters.
const FLAT: [&str; 2] = ["--no-extents", "--request-size=8388608"];

/// Whether QEMU's tools and those of libnbd are installed.
fn can_compare() -> bool {
    has("qemu-img") && has("qemu-io") && has("nbdcopy")
}

/// A folder in which QEMU makes images.
struct Folder(Scratch);

impl Folder {
    fn new() -> Self {
        Self(Scratch::new())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    /// Runs a program with the words of `line`.
    fn tool(&self, program: &str, line: &str) {
        let mut command = Command::new(program);
        command.args(line.split_whitespace());
        command.current_dir(self.path(""));
        let done = command.output().expect("it is installed");
        let said = [done.stdout, done.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(done.status.success(), "{program} {line}: {said}");
    }

    fn img(&self, line: &str) {
        self.tool("qemu-img", line);
    }

    /// Runs commands of qemu-io on a qcow2 image.
    fn io(&self, name: &str, commands: &[&str]) {
        let mut command = Command::new("qemu-io");
        command.current_dir(self.path(""));
        command.args(["-t", "unsafe", "-f", "qcow2"]);
        for each in commands {
            command.args(["-c", each]);
        }
        let done = command.arg(name).output().expect("it is installed");
        let said = [done.stdout, done.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let failed = said.contains("failed") || said.contains("rror:");
        assert!(done.status.success() && !failed, "{commands:?}: {said}");
    }

    /// A raw file: noise, zeros that are stored, a hole, and what is easily compressed.
    fn content(&self, name: &str, len: usize) {
        let mut bytes = noise(len, len as u64);
        bytes[len / 8..len / 4].fill(0);
        bytes[len / 2..len * 3 / 4].fill(0x5A);
        fs::write(self.path(name), &bytes).expect("write");
    }

    /// Writes places of its own to an image of 8 MiB or more.
    fn scribble(&self, name: &str) {
        self.io(
            name,
            &[
                "write -P 1 0 512",
                "write -P 2 70000 3",
                "write -P 3 1M 200k",
                "write -z 2M 300k",
                "write -z -u 3M 64k",
                "write -P 4 8380k 12k",
                "discard 4M 1M",
            ],
        );
    }

    /// What QEMU reads from an image.
    fn read_by_qemu(&self, name: &str) -> Vec<u8> {
        let raw = format!("{name}.qemu");
        self.img(&format!("convert -f qcow2 -O raw {name} {raw}"));
        let bytes = fs::read(self.path(&raw)).expect("read");
        fs::remove_file(self.path(&raw)).expect("remove");
        bytes
    }

    /// What a client of ours reads, by extents, or each byte.
    fn read_by_us(&self, name: &str, cache: &str, more: &[&str]) -> Vec<u8> {
        self.read_served(name, &["--cache", cache], more)
    }

    /// The same of what is served with these options.
    fn read_served(&self, name: &str, options: &[&str], more: &[&str]) -> Vec<u8> {
        let out = self.path("out");
        let mut command = Command::new("nbdcopy");
        command.args(more).args(["--", "[", PLOOPCTL, "serve"]);
        command.args(["--read-only", "--format", "qcow2"]);
        command
            .args(options)
            .arg(self.path(name))
            .arg("]")
            .arg(&out);
        let done = command.output().expect("nbdcopy runs");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{name}: {said}");
        let bytes = fs::read(&out).expect("read");
        fs::remove_file(&out).expect("remove");
        bytes
    }

    /// Demands that both read the same, whatever way we read.
    fn agree(&self, name: &str) {
        let expected = self.read_by_qemu(name);
        for (cache, more) in [("writeback", &[][..]), ("none", &FLAT[..])] {
            let found = self.read_by_us(name, cache, more);
            assert_eq!(found.len(), expected.len(), "{name} {cache}");
            let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{name} {cache}: the first byte that differs");
        }
        let disk = self.path(name);
        ok(&["map", "--format", "qcow2", text(&disk)]);
        ok(&["check", "--format", "qcow2", text(&disk)]);
    }
}

#[test]
fn an_image_of_any_kind_reads_as_qemu_reads_it() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("content", 6 * MIB);
    let kinds = [
        ("plain", ""),
        ("v2", "-o compat=0.10"),
        ("deflate", "-c"),
        ("zstd", "-c -o compression_type=zstd"),
        ("small", "-o cluster_size=512"),
        ("small-packed", "-c -o cluster_size=512"),
        ("large", "-o cluster_size=2M"),
        (
            "large-packed",
            "-c -o cluster_size=2M,compression_type=zstd",
        ),
        ("extended", "-o extended_l2=on"),
        ("extended-packed", "-c -o extended_l2=on"),
        ("lazy", "-o lazy_refcounts=on"),
        ("outside", "-o data_file=outside.data"),
        ("outside-raw", "-o data_file=raw.data,data_file_raw=on"),
    ];
    for (name, options) in kinds {
        folder.img(&format!("convert -f raw -O qcow2 {options} content {name}"));
        folder.img(&format!("resize -f qcow2 {name} 9M"));
        folder.scribble(name);
        folder.agree(name);
    }
    folder.img("create -f qcow2 empty 64M");
    folder.agree("empty");
    // No block of any storage divides this length.
    let mut ragged = fs::read(folder.path("plain")).expect("read");
    ragged.extend([0x77; 100]);
    fs::write(folder.path("ragged"), &ragged).expect("write");
    folder.agree("ragged");
}

#[test]
fn an_image_reads_through_all_that_it_stands_on() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("odd.raw", 9 * MIB - 300);
    // The middle ends before the base, and before the top.
    folder.img("create -f qcow2 -b odd.raw -F raw -o cluster_size=4k middle 8400k");
    folder.scribble("middle");
    folder.img("create -f qcow2 -b middle -F qcow2 -o extended_l2=on top 12M");
    folder.agree("top");
    folder.scribble("top");
    folder.agree("top");
    folder.img("create -f qcow2 -b odd.raw -F raw over-raw 10M");
    folder.agree("over-raw");
    // A name is seen from the image that says it.
    fs::create_dir(folder.path("sub")).expect("mkdir");
    fs::copy(folder.path("odd.raw"), folder.path("sub/base")).expect("copy");
    folder.img("create -f qcow2 -b base -F raw sub/over 8M");
    folder.img("create -f qcow2 -b ./sub/over -F qcow2 -o cluster_size=2M above 8M");
    folder.agree("above");
    folder.img("convert -c -f raw -O qcow2 odd.raw packed");
    folder.img("create -f qcow2 -b packed -F qcow2 -o cluster_size=1k over-packed 9M");
    folder.scribble("over-packed");
    folder.agree("over-packed");
}

#[test]
fn an_image_reads_through_a_ploop_image() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("content", 8 * MIB);
    let raw = folder.path("content");
    let disk = folder.path("disk");
    let expanded = ["--to", "expanded", "--out", text(&disk)];
    let args = ["convert", "--format", "raw", text(&raw)];
    ok(&[&args[..], &expanded].concat());
    fs::copy(disk.join("root.hds"), folder.path("base")).expect("copy");
    // QEMU knows the format by the name of its own driver.
    folder.img("create -f qcow2 -b base -F parallels top 9M");
    folder.scribble("top");
    folder.agree("top");
}

#[test]
fn a_snapshot_inside_an_image_changes_nothing_that_is_read() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("content", 8 * MIB);
    folder.img("convert -f raw -O qcow2 content image");
    folder.img("snapshot -c before image");
    folder.img("resize -f qcow2 image 9M");
    folder.scribble("image");
    folder.agree("image");
}

#[test]
fn what_an_image_says_of_itself_is_shown_and_nothing_is_opened_for_it() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("gone.raw", MIB);
    folder.img("create -f qcow2 -b gone.raw -F raw -o compression_type=zstd image 8M");
    folder.img("bitmap --add -g 128k image dirty");
    folder.img("snapshot -c before image");
    fs::remove_file(folder.path("gone.raw")).expect("remove");
    let image = folder.path("image");
    let said = json(&["info", "--format", "qcow2", text(&image)]);
    assert_eq!(
        (&said["size"], &said["cluster"]),
        (&(8 << 20).into(), &65536.into())
    );
    assert_eq!(said["layers"][0]["format"], "qcow2");
    assert_eq!(said["layers"][0]["format_version"], 3);
    let own = &said["qcow2"];
    assert_eq!(
        (&own["backing_file"], &own["backing_format"]),
        (&"gone.raw".into(), &"raw".into())
    );
    assert_eq!(own["compression"], "zstd");
    assert_eq!(
        own["features"],
        serde_json::json!(["compression", "bitmaps"])
    );
    assert_eq!(own["data_file"], serde_json::Value::Null);
    assert_eq!(
        (&own["snapshots"][0]["id"], &own["snapshots"][0]["name"]),
        (&"1".into(), &"before".into())
    );
    assert_eq!(own["snapshots"][0]["size"], 8 << 20);
    let created = own["snapshots"][0]["created"].as_str().expect("a date");
    assert!(
        created.starts_with("20") && created.ends_with('Z'),
        "{created}"
    );
    assert_eq!(
        (
            &own["bitmaps"][0]["name"],
            &own["bitmaps"][0]["granularity"]
        ),
        (&"dirty".into(), &(128 << 10).into())
    );
    let shown = ok(&["info", "--format", "qcow2", text(&image)]);
    for word in ["gone.raw (raw)", "zstd", "1 (before)", "bitmap     dirty"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    folder.img("create -f qcow2 -o data_file=data outside 8M");
    fs::remove_file(folder.path("data")).expect("remove");
    let said = json(&["info", "--format", "qcow2", text(&folder.path("outside"))]);
    assert_eq!(said["qcow2"]["data_file"], "data");
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// The file offset of the first second-level table.
fn first_l2(bytes: &[u8]) -> usize {
    const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
    (u64_at(bytes, u64_at(bytes, 40) as usize) & OFFSET) as usize
}

#[test]
fn a_check_says_what_is_wrong_and_a_repair_mends_what_loses_nothing() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.img("create -f qcow2 image 8M");
    folder.io("image", &["write -P 1 0 128k"]);
    let image = folder.path("image");
    let check = ["check", "--format", "qcow2", text(&image)];
    let said = json(&check);
    assert_eq!(
        (&said["clean"], &said["layers"][0]["errors"]),
        (&true.into(), &0.into())
    );
    let sound = fs::read(&image).expect("read");
    let l2 = first_l2(&sound);
    let mut leaks = sound.clone();
    leaks[l2..l2 + 8].fill(0);
    fs::write(&image, &leaks).expect("write");
    fails(3, &check);
    let repair = ["check", "--repair", "--format", "qcow2", text(&image)];
    ok(&repair);
    ok(&check);
    folder.img("check -q -f qcow2 image");
    let mut broken = sound.clone();
    broken[l2..l2 + 8].copy_from_slice(&(1u64 << 40).to_be_bytes());
    fs::write(&image, &broken).expect("write");
    fails(6, &check);
    let output = run(&["-o", "json", "check", "--format", "qcow2", text(&image)]);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let finding = &said["layers"][0]["findings"][0];
    assert_eq!(
        (&finding["kind"], &finding["repair"]),
        (&"past-end".into(), &"none".into())
    );
    // What an entry named that is wrong nobody knows: nothing is changed.
    fails(6, &repair);
    assert!(fs::read(&image).expect("read") == broken);
}

/// Makes base.raw, an ext4 file system with a file; what is in that.
fn file_system(folder: &Folder) -> Vec<u8> {
    let (tree, data) = (folder.path("tree"), noise(3 * MIB, 5));
    fs::create_dir(&tree).expect("mkdir");
    fs::write(tree.join("file"), &data).expect("write");
    folder.tool("mkfs.ext4", "-q -d tree base.raw 64M");
    data
}

#[test]
fn a_file_system_in_an_image_is_mounted_to_be_read() {
    if !can_compare() || !can_mount() || !has("mkfs.ext4") {
        return;
    }
    let folder = Folder::new();
    let data = file_system(&folder);
    folder.img("convert -c -f raw -O qcow2 base.raw base");
    folder.img("create -f qcow2 -b base -F qcow2 image");
    let (image, point) = (folder.path("image"), folder.0.mountpoint());
    let mount = ["mount", "--format", "qcow2", text(&image), text(&point)];
    ok(&[&mount[..], &["--read-only"]].concat());
    assert!(fs::read(point.join("file")).expect("read") == data);
    assert!(fs::write(point.join("other"), "x").is_err());
    // Its base is locked as well: QEMU does not write to it meanwhile.
    let mut qemu = Command::new("qemu-io");
    qemu.args([
        "-f",
        "qcow2",
        "-c",
        "write 0 512",
        text(&folder.path("base")),
    ]);
    let said = qemu.output().expect("it is installed");
    assert!(
        String::from_utf8_lossy(&said.stderr).contains("lock"),
        "{said:?}"
    );
    ok(&["umount", text(&point)]);
}

#[test]
fn an_image_grows_and_reads_as_qemu_reads_it() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("base.raw", 8 * MIB);
    folder.img("convert -c -f raw -O qcow2 -o cluster_size=1k base.raw image");
    let image = folder.path("image");
    let grow = |size: &str| json(&["grow", "--format", "qcow2", text(&image), size]);
    for (size, has, old) in [
        ("9M", 9, 8),
        ("+1M", 10, 9),
        ("3G", 3072, 10),
        ("3G", 3072, 3072),
    ] {
        let said = grow(size);
        assert_eq!(said["size"], has * MIB, "{said}");
        assert_eq!(said["old_size"], old * MIB, "{said}");
        folder.img("check -q -f qcow2 image");
        folder.img("compare -q -f raw -F qcow2 base.raw image");
    }
    let said = fails(1, &["grow", "--format", "qcow2", text(&image), "1M"]);
    assert!(said.contains("ploopctl resize"), "{said}");
    // What is behind its end below would be seen.
    folder.img("create -f qcow2 -b image -F qcow2 over 8M");
    let over = folder.path("over");
    let said = fails(1, &["grow", "--format", "qcow2", text(&over), "9M"]);
    assert!(said.contains("stands on"), "{said}");
}

#[test]
fn an_image_with_a_data_file_grows_and_that_with_it() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("base.raw", 8 * MIB);
    for (name, kind) in [("plain", ""), ("raw", ",data_file_raw=on")] {
        let options = format!("data_file={name}.data{kind}");
        let line = format!("convert -f raw -O qcow2 -o {options} base.raw {name}");
        folder.img(&line);
        let (image, data) = (folder.path(name), folder.path(&format!("{name}.data")));
        // What somebody left behind the end is not seen.
        let mut bytes = fs::read(&data).expect("read");
        bytes.resize(8 * MIB + 5000, 7);
        fs::write(&data, &bytes).expect("write");
        for (size, has) in [("9M", 9), ("+1M", 10), ("60M", 60)] {
            let said = json(&["grow", "--format", "qcow2", text(&image), size]);
            assert_eq!(said["size"], has * MIB, "{said}");
            assert_eq!(fs::metadata(&data).expect("data").len(), (has * MIB) as u64);
            folder.img(&format!("check -q -f qcow2 {name}"));
            folder.img(&format!("compare -q -f raw -F qcow2 base.raw {name}"));
            if name == "raw" {
                folder.img("compare -q -f raw -F raw base.raw raw.data");
            }
        }
        let socket = format!("unix:{}", text(&folder.path("socket")));
        let args = ["serve", "--format", "qcow2", text(&image), "--nbd", &socket];
        let mut server = std::process::Command::new(common::PLOOPCTL)
            .args(args)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("serve");
        let out = server.stdout.as_mut().expect("piped");
        let mut uri = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut uri).expect("a line");
        let said = json(&["grow", "--format", "qcow2", text(&image), "70M"]);
        assert_eq!(said["size"], 70 * MIB, "{said}");
        assert_eq!(fs::metadata(&data).expect("data").len(), 70 * MIB as u64);
        ok(&["umount", text(&image)]);
        server.wait().expect("its end");
        folder.img(&format!("check -q -f qcow2 {name}"));
        folder.img(&format!("compare -q -f raw -F qcow2 base.raw {name}"));
    }
}

#[test]
fn an_image_keeps_snapshots_in_itself_as_qemu_does() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.content("base.raw", 9 * MIB);
    folder.img("convert -f raw -O qcow2 base.raw image");
    let image = folder.path("image");
    let of = |verb: &str, more: &[&str]| {
        let mut args = vec!["snapshot", verb, "--format", "qcow2", text(&image)];
        args.extend(more);
        json(&args)
    };
    let names = || -> Vec<String> {
        let said = of("list", &[]);
        let all = said["snapshots"].as_array().expect("a list");
        let name = |s: &serde_json::Value| s["name"].as_str().expect("a name").to_string();
        all.iter().map(name).collect()
    };
    assert!(names().is_empty());
    let made = of("create", &["--name", "first"]);
    assert_eq!(
        (made["id"].as_str(), made["name"].as_str()),
        (Some("1"), Some("first"))
    );
    folder.scribble("image");
    folder.img("snapshot -c second image");
    let ours = of("create", &["--name", "third"]);
    assert_eq!(names(), ["first", "second", "third"]);
    assert_eq!(of("list", &[])["snapshots"][0]["size"], 9 * MIB);
    // QEMU finds ours, and nothing that is wrong.
    folder.img("check -q -f qcow2 image");
    folder.img("convert -l snapshot.name=first -f qcow2 -O raw image first.raw");
    folder.img("compare -q -f raw -F raw base.raw first.raw");
    of("switch", &["first"]);
    folder.img("compare -q -f raw -F qcow2 base.raw image");
    of("delete", &["second"]);
    of("delete", &[ours["id"].as_str().expect("an ID")]);
    assert_eq!(names(), ["first"]);
    folder.img("check -q -f qcow2 image");
    folder.img("snapshot -d first image");
    assert!(names().is_empty());
    let refused = |code, verb, more: &[&str]| {
        let mut args = vec!["snapshot", verb, "--format", "qcow2", text(&image)];
        args.extend(more);
        fails(code, &args)
    };
    refused(11, "switch", &["first"]);
    refused(11, "delete", &["7"]);
    refused(2, "create", &[]);
    of("create", &["--name", "twice"]);
    refused(1, "create", &["--name", "twice"]);
    fails(
        2,
        &[
            "snapshot",
            "list",
            "--format",
            "raw",
            text(&folder.path("base.raw")),
        ],
    );
}

#[test]
fn an_image_is_served_as_it_was_at_a_snapshot_of_its_own() {
    if !can_compare() {
        return;
    }
    for (n, options) in [
        "cluster_size=4k",
        "extended_l2=on",
        "cluster_size=2M",
        "compat=0.10",
    ]
    .into_iter()
    .enumerate()
    {
        let folder = Folder::new();
        folder.content("base.raw", 7 * MIB);
        folder.img(&format!(
            "create -f qcow2 -b base.raw -F raw -o {options} image 9M"
        ));
        let image = folder.path("image");
        let then = |point: &str, cache: &str, more: &[&str]| {
            folder.read_served("image", &["--snapshot", point, "--cache", cache], more)
        };
        let mut shots = Vec::new();
        // A name counts before an ID: the first is called as the second is numbered.
        for (by_us, name, id) in [(true, "2", "1"), (false, "later", "2"), (true, "last", "3")] {
            if by_us {
                let words = ["snapshot", "create", "--format", "qcow2", "--name", name];
                ok(&[&words[..], &[text(&image)]].concat());
            } else {
                folder.img(&format!("snapshot -c {name} image"));
            }
            shots.push((name, id, folder.read_by_qemu("image")));
            let fill = 0x40 + shots.len() * 4 + n;
            folder.scribble("image");
            let more = format!("write -P {fill} {}k 900k", shots.len() * 300);
            folder.io("image", &[&more]);
        }
        for (name, id, was) in &shots {
            folder.img(&format!(
                "convert -l snapshot.id={id} -f qcow2 -O raw image then"
            ));
            assert!(fs::read(folder.path("then")).expect("read") == *was);
            assert!(then(name, "none", &FLAT) == *was, "{options}: {name}");
        }
        assert!(
            then("3", "writeback", &[]) == shots[2].2,
            "{options}: by ID"
        );
        if options != "compat=0.10" {
            // Each has the size that the disk had.
            let words = ["grow", "--format", "qcow2", text(&image), "12M"];
            ok(&words);
            assert!(then("later", "writeback", &[]) == shots[1].2, "{options}");
        }
        let now = folder.read_by_qemu("image");
        assert!(folder.read_by_us("image", "none", &[]) == now, "{options}");
        folder.img("check -q -f qcow2 image");
    }
}

#[test]
fn a_snapshot_is_shown_to_who_only_reads_and_of_a_qcow2_image_alone() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.img("create -f qcow2 image 8M");
    folder.img("create -f raw flat 8M");
    folder.img("snapshot -c twice image");
    let (image, flat) = (folder.path("image"), folder.path("flat"));
    let refused = |code: i32, disk: &Path, words: &[&str], why: &str| {
        for verb in [&["serve", "--nbd", "-"][..], &["mount"]] {
            let said = fails(
                code,
                &[verb, &["--snapshot"], words, &[text(disk)]].concat(),
            );
            assert!(said.contains(why), "{said}");
        }
    };
    let only_reads = ["other", "--read-only", "--format", "qcow2"];
    refused(2, &image, &["twice", "--format", "qcow2"], "--read-only");
    let of_raw = ["twice", "--read-only", "--format", "raw"];
    refused(2, &flat, &of_raw, "--format qcow2");
    refused(2, &image, &["twice", "--read-only"], "--format qcow2");
    let serve = [&["serve", "--nbd", "-", "--snapshot"], &only_reads[..]].concat();
    let said = fails(11, &[&serve[..], &[text(&image)]].concat());
    assert!(said.contains("no snapshot other"), "{said}");
}

#[test]
fn a_file_system_is_mounted_as_it_was_at_a_snapshot_of_its_image() {
    if !can_compare() || !can_mount() || !has("mkfs.ext4") {
        return;
    }
    let folder = Folder::new();
    let data = file_system(&folder);
    folder.img("convert -f raw -O qcow2 base.raw image");
    let (image, point) = (folder.path("image"), folder.0.mountpoint());
    let create = ["snapshot", "create", "--format", "qcow2", text(&image)];
    ok(&[&create[..], &["--name", "closed"]].concat());
    let attach = ["mount", "--format", "qcow2", text(&image), text(&point)];
    ok(&attach);
    fs::write(point.join("file"), "other").expect("write");
    ok(&["umount", text(&point)]);
    let then = |name| [&attach[..], &["--read-only", "--snapshot", name]].concat();
    let said = json(&then("closed"));
    assert_eq!(
        (&said["snapshot"], &said["read_only"]),
        (&"closed".into(), &true.into())
    );
    assert_eq!(folder.0.attached()[0]["snapshot"], "closed");
    assert!(fs::read(point.join("file")).expect("read") == data);
    assert!(fs::write(point.join("other"), "x").is_err());
    // Nobody writes to the image meanwhile, whoever it is.
    fails(4, &[&create[..], &["--name", "other"]].concat());
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "qcow2", "-c", "write 0 512", text(&image)]);
    let said = qemu.output().expect("it is installed");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("lock"), "{said}");
    // Whoever serves it after another still shows that snapshot.
    let worker = folder.0.attached()[0]["worker_pid"].as_u64();
    kill9(worker.expect("a worker"));
    assert!(fs::read(point.join("file")).expect("read") == data);
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root may");
    assert!(fs::read(point.join("file")).expect("read") == data);
    ok(&["umount", text(&point)]);
    ok(&[&attach[..], &["--read-only"]].concat());
    assert_eq!(folder.0.attached()[0]["snapshot"], serde_json::Value::Null);
    assert_eq!(fs::read(point.join("file")).expect("read"), b"other");
    ok(&["umount", text(&point)]);
}

#[test]
fn a_file_system_with_a_journal_at_a_snapshot_is_mounted_without_it() {
    if !can_compare() || !can_mount() || !has("mkfs.ext4") || !has("debugfs") {
        return;
    }
    let folder = Folder::new();
    folder.tool("mkfs.ext4", "-q base.raw 64M");
    let mut mark = Command::new("debugfs");
    mark.args(["-w", "-R", "feature needs_recovery"]);
    let done = mark.arg(folder.path("base.raw")).output();
    assert!(done.expect("it is installed").status.success());
    folder.img("convert -f raw -O qcow2 base.raw image");
    folder.img("snapshot -c in-use image");
    let (image, point) = (folder.path("image"), folder.0.mountpoint());
    let mount = ["mount", "--read-only", "--snapshot", "in-use"];
    let mount = [&mount[..], &["--format", "qcow2", text(&image)]].concat();
    let mount = [&mount[..], &[text(&point)]].concat();
    fails(1, &mount);
    assert!(folder.0.attached().is_empty());
    ok(&[&mount[..], &["--mount-options", "noload"]].concat());
    assert!(point.join("lost+found").is_dir());
    ok(&["umount", text(&point)]);
}

#[test]
fn what_is_not_done_with_an_image_is_refused() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    folder.img("create -f qcow2 image 8M");
    let before = fs::read(folder.path("image")).expect("read");
    let image = folder.path("image");
    let refused = fails(7, &["compact", text(&image), "--format", "qcow2"]);
    assert!(refused.contains("qcow2"), "{refused}");
    assert!(fs::read(&image).expect("read") == before);
}

/// A folder that nobody may look into, and a watch that tells who did.
struct Canary(OwnedFd);

impl Canary {
    fn plant(folder: &Path) -> Self {
        fs::create_dir(folder).expect("mkdir");
        fs::write(folder.join("secret"), vec![0x53; MIB]).expect("write");
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).expect("inotify");
        inotify::add_watch(&watch, folder, WatchFlags::ALL_EVENTS).expect("a watch");
        Self(watch)
    }

    /// Whether anything happened in it since the last call.
    fn heard(&self) -> bool {
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.0, &mut room);
        let mut heard = false;
        while events.next().is_ok() {
            heard = true;
        }
        heard
    }
}

/// Demands that an image is not served, that the refusal says `word`, and that no process of ours
/// opened what is outside.
fn is_refused(disk: &Path, canary: &Canary, word: &str) {
    let args = ["--read-only", "--format", "qcow2", "--nbd", "-", text(disk)];
    let output = run(&[&["serve"][..], &args].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains(word),
        "{word}: {said}"
    );
    run(&["map", "--format", "qcow2", text(disk)]);
    run(&["info", "--format", "qcow2", text(disk)]);
    run(&["check", "--format", "qcow2", text(disk)]);
    assert!(!canary.heard(), "{word}: something was opened");
}

#[test]
fn a_name_in_an_image_reaches_no_file_elsewhere() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    let outside = folder.path("outside");
    let canary = Canary::plant(&outside);
    drop(fs::File::open(outside.join("secret")).expect("open"));
    assert!(canary.heard(), "the watch sees nothing");
    let disk = folder.path("disk");
    fs::create_dir(&disk).expect("mkdir");
    let (secret, inside) = (outside.join("secret"), |name: &str| disk.join(name));
    std::os::unix::fs::symlink(&secret, inside("link")).expect("symlink");
    std::os::unix::fs::symlink(&outside, inside("folder-link")).expect("symlink");
    fs::create_dir(inside("folder")).expect("mkdir");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        inside("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .expect("a FIFO");
    let absolute = text(&secret);
    let json = format!("json:{{\"driver\":\"raw\",\"file.filename\":\"{absolute}\"}}");
    let by_file = format!("file:{absolute}");
    let names = [
        (absolute, "is absolute"),
        ("../outside/secret", "leads up"),
        ("folder/../../outside/secret", "leads up"),
        ("link", "symbolic link"),
        ("folder-link/secret", "symbolic link"),
        (&json, "would be no file"),
        (&by_file, "would be no file"),
        ("nbd://localhost/x", "would be no file"),
        ("fifo", "not a regular file"),
        ("folder", "not a regular file"),
        ("missing", "no such file"),
        ("image", "comes back"),
        ("./folder/../image", "leads up"),
    ];
    folder.img("create -f qcow2 -u -b NAME -F raw disk/template 8M");
    let template = fs::read(inside("template")).expect("read");
    let (at, image) = (u64_at(&template, 8) as usize, inside("image"));
    for (name, word) in names {
        let mut bytes = template.clone();
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        fs::write(&image, &bytes).expect("write");
        is_refused(&image, &canary, word);
    }
    // The same names of a data file, in the extension that says it.
    folder.img("create -f qcow2 -o data_file=disk/NAME disk/data-template 8M");
    let template = fs::read(inside("data-template")).expect("read");
    let at = template
        .windows(4)
        .position(|w| w == b"DATA")
        .expect("the extension");
    for (name, word) in names {
        let mut bytes = template.clone();
        // Nothing is behind it but an end.
        bytes[at + 4..at + 8].copy_from_slice(&(name.len() as u32).to_be_bytes());
        bytes[at + 8..at + 512].fill(0);
        bytes[at + 8..at + 8 + name.len()].copy_from_slice(name.as_bytes());
        fs::write(&image, &bytes).expect("write");
        is_refused(&image, &canary, word);
    }
}

#[test]
fn a_backing_file_whose_format_is_not_known_is_refused_with_the_way_out() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    let canary = Canary::plant(&folder.path("outside"));
    folder.content("base", MIB);
    folder.img("create -f qcow2 -b base -F raw image");
    let image = folder.path("image");
    let mut bytes = fs::read(&image).expect("read");
    let at = bytes
        .windows(4)
        .position(|w| w == 0xE279_2ACAu32.to_be_bytes());
    let at = at.expect("the extension that says the format");
    let mut other = bytes.clone();
    other[at + 8..at + 11].copy_from_slice(b"vdi");
    fs::write(&image, &other).expect("write");
    is_refused(&image, &canary, "of format \"vdi\"");
    bytes[at..at + 4].copy_from_slice(&0x1122_3344u32.to_be_bytes());
    fs::write(&image, &bytes).expect("write");
    is_refused(&image, &canary, "qemu-img rebase -u");
    folder.img("rebase -u -f qcow2 -b base -F raw image");
    folder.agree("image");
}

#[test]
fn a_chain_that_goes_in_a_circle_or_too_deep_is_refused() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    let canary = Canary::plant(&folder.path("outside"));
    folder.img("create -f qcow2 -u -b b -F qcow2 a 8M");
    folder.img("create -f qcow2 -u -b c -F qcow2 b 8M");
    folder.img("create -f qcow2 -u -b a -F qcow2 c 8M");
    is_refused(&folder.path("a"), &canary, "comes back");
    // Another name of the same file is the same file.
    fs::remove_file(folder.path("c")).expect("remove");
    fs::hard_link(folder.path("a"), folder.path("c")).expect("link");
    is_refused(&folder.path("a"), &canary, "comes back");
    folder.img("create -f qcow2 -u -b 000 -F qcow2 template 8M");
    let template = fs::read(folder.path("template")).expect("read");
    let at = u64_at(&template, 8) as usize;
    for n in 0..128u32 {
        let mut bytes = template.clone();
        bytes[at..at + 3].copy_from_slice(format!("{:03}", n + 1).as_bytes());
        fs::write(folder.path(&format!("{n:03}")), &bytes).expect("write");
    }
    folder.img("create -f qcow2 128 8M");
    is_refused(&folder.path("000"), &canary, "more than 126");
    is_refused(&folder.path("001"), &canary, "more than 126");
    folder.agree("002");
}

#[test]
fn what_is_not_known_of_an_image_is_refused_by_name() {
    if !can_compare() {
        return;
    }
    let folder = Folder::new();
    let canary = Canary::plant(&folder.path("outside"));
    folder.img("create -f qcow2 image 8M");
    let image = folder.path("image");
    let sound = fs::read(&image).expect("read");
    let mut bytes = sound.clone();
    bytes[32..36].copy_from_slice(&2u32.to_be_bytes());
    fs::write(&image, &bytes).expect("write");
    is_refused(&image, &canary, "encrypted (LUKS)");
    let mut bytes = sound.clone();
    bytes[72] = 0x80;
    fs::write(&image, &bytes).expect("write");
    is_refused(&image, &canary, "bit 63");
    fs::write(&image, b"no image").expect("write");
    is_refused(&image, &canary, "qcow2");
}
