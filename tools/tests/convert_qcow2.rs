//! Conversions from and to qcow2 images as a user makes them. QEMU makes what they are made of, and
//! checks and compares what comes of them.

mod common;

use common::tree::{Dice, Disk, can_judge, tool};
use common::{PLOOPCTL, Scratch, fails, json, kill9, noise, ok, text};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A bare image and the name that QEMU has for its format.
#[derive(Debug, Clone)]
struct Image {
    path: PathBuf,
    format: &'static str,
}

impl Image {
    fn new(path: PathBuf, format: &'static str) -> Self {
        Self { path, format }
    }

    fn name(&self) -> &str {
        text(&self.path)
    }

    /// `--format` of ours, which calls parallels ploop.
    fn ours(&self) -> &'static str {
        match self.format {
            "parallels" => "ploop",
            other => other,
        }
    }

    /// QEMU finds neither errors nor leaks, and reads the same as in another one.
    fn judge(&self, like: &Self) {
        if self.format != "raw" {
            // It fails for a leak, too.
            tool("qemu-img", &["check", "-q", "-f", self.format, self.name()]);
        }
        let compare = ["compare", "-q", "-f", like.format, "-F", self.format];
        tool(
            "qemu-img",
            &[&compare[..], &[like.name(), self.name()]].concat(),
        );
    }

    fn info(&self) -> Value {
        let args = ["info", "--output", "json", "-f", self.format, self.name()];
        serde_json::from_slice(&tool("qemu-img", &args).stdout).expect("JSON")
    }

    /// Bytes that it takes on the host.
    fn taken(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(&self.path).expect("stat").blocks() * 512
    }

    /// Makes another of it.
    fn convert(&self, to: &Path, options: &[&str]) -> Value {
        let args = ["convert", "--format", self.ours(), self.name()];
        json(&[&args[..], &["--out-file", text(to)], options].concat())
    }
}

fn img(args: &[&str]) {
    tool("qemu-img", args);
}

fn write(image: &Image, commands: &[String]) {
    let mut args = vec!["-f", image.format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image.name());
    let said = tool("qemu-io", &args);
    let said = String::from_utf8_lossy(&said.stdout).to_string();
    assert!(!said.contains("failed"), "{said}");
}

/// A raw file with data, text, written zeros and holes, of `len` bytes.
fn raw(scratch: &Scratch, name: &str, len: u64) -> Image {
    let path = scratch.path(name);
    let file = File::create(&path).expect("create");
    file.set_len(len).expect("length");
    let line = b"some text that is easily made smaller, ";
    let parts = [
        (0, noise(300_000, 7)),
        (
            400_000,
            line.iter().copied().cycle().take(900_000).collect(),
        ),
        (2 << 20, vec![0; 1 << 20]),
        (5 << 20, noise(70_000, 9)),
        ((7 << 20) + 512, line.repeat(3000)),
    ];
    for (at, bytes) in parts {
        let end = len.saturating_sub(at).min(bytes.len() as u64);
        let bytes = &bytes[..usize::try_from(end).expect("small")];
        file.write_all_at(bytes, at).expect("write");
    }
    if len > 0 {
        file.write_all_at(&[0xEE], len - 1).expect("the end");
    }
    Image::new(path, "raw")
}

#[test]
fn every_format_becomes_every_other_and_reads_the_same_to_qemu() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    // In whole clusters of ploop, which has no others.
    let first = raw(&scratch, "first", 9 << 20);
    let mut last = first.clone();
    let steps: [(&str, &[&str], &str); 12] = [
        ("qcow2", &[], "qcow2"),
        ("qcow2", &["--compress"], "qcow2"),
        ("expanded", &[], "parallels"),
        ("qcow2", &["--compress=zstd", "--cluster", "512"], "qcow2"),
        ("preallocated", &["--format-version", "1"], "parallels"),
        ("qcow2", &["--cluster", "2M", "--preallocate"], "qcow2"),
        (
            "expanded",
            &["--cluster", "1M", "--format-version", "1"],
            "parallels",
        ),
        ("qcow2", &["--cluster", "4K", "--compress=deflate"], "qcow2"),
        ("qcow2", &["--cluster", "2M", "--compress=zstd"], "qcow2"),
        ("raw", &[], "raw"),
        ("expanded", &[], "parallels"),
        ("raw", &["--preallocate"], "raw"),
    ];
    for (n, (form, options, format)) in steps.into_iter().enumerate() {
        let next = Image::new(scratch.path(&format!("step{n}")), format);
        let said = last.convert(&next.path, &[&["--to", form], options].concat());
        assert_eq!(said["form"], form, "{said}");
        assert_eq!(said["path"], next.name(), "{said}");
        assert_eq!(said["source"], last.name(), "{said}");
        next.judge(&first);
        let info = next.info();
        assert_eq!(info["virtual-size"], said["size"], "{options:?}: {info}");
        if let ("qcow2", [.., cluster]) = (format, options)
            && options.contains(&"512")
        {
            assert_eq!(info["cluster-size"], 512, "{cluster}: {info}");
        }
        last = next;
    }
    let names = fs::read_dir(scratch.path("")).expect("list").count();
    assert_eq!(names, 13, "nothing else is left");
}

#[test]
fn images_of_any_size_and_cluster_have_no_fault_and_no_leak() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let sizes = [
        512,
        1000,
        65_536,
        1 << 20,
        (3 << 20) + 512,
        (6 << 20) + 70_001,
    ];
    for (n, len) in sizes.into_iter().enumerate() {
        let source = raw(&scratch, &format!("raw{n}"), len);
        for cluster in ["512", "1K", "4K", "64K", "2M"] {
            for how in [
                None,
                Some("--compress=deflate"),
                Some("--compress=zstd"),
                Some("--preallocate"),
            ] {
                let made = Image::new(scratch.path("made"), "qcow2");
                let options = ["--to", "qcow2", "--cluster", cluster];
                let said = source.convert(&made.path, &[&options, how.as_slice()].concat());
                assert_eq!(said["size"], len.next_multiple_of(512), "{said}");
                made.judge(&source);
                let again = Image::new(scratch.path("again"), "raw");
                made.convert(&again.path, &["--to", "raw"]);
                let mut wanted = fs::read(&source.path).expect("read");
                wanted.resize(
                    usize::try_from(len.next_multiple_of(512)).expect("small"),
                    0,
                );
                assert!(
                    fs::read(&again.path).expect("read") == wanted,
                    "{len} {cluster}"
                );
                for one in [made, again] {
                    fs::remove_file(one.path).expect("remove");
                }
            }
        }
    }
}

#[test]
fn zeros_and_holes_take_no_space_unless_they_are_to_have_it() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("sparse");
    let file = File::create(&path).expect("create");
    file.set_len(64 << 30).expect("length");
    file.write_all_at(&noise(100_000, 3), 50 << 30)
        .expect("write");
    file.write_all_at(&vec![0; 4 << 20], 1 << 30)
        .expect("zeros");
    let sparse = Image::new(path, "raw");
    let made = Image::new(scratch.path("made"), "qcow2");
    sparse.convert(&made.path, &["--to", "qcow2"]);
    made.judge(&sparse);
    assert!(made.taken() < 1 << 20, "{} bytes", made.taken());
    let back = Image::new(scratch.path("back"), "raw");
    made.convert(&back.path, &["--to", "raw"]);
    assert!(back.taken() < 1 << 20, "{} bytes", back.taken());
    back.judge(&sparse);

    let small = raw(&scratch, "small", 16 << 20);
    for form in ["qcow2", "raw"] {
        let full = Image::new(scratch.path(&format!("full.{form}")), form);
        small.convert(&full.path, &["--to", form, "--preallocate"]);
        full.judge(&small);
        assert!(full.taken() >= 16 << 20, "{form}: {} bytes", full.taken());
    }
    let text = Image::new(scratch.path("text"), "qcow2");
    small.convert(&text.path, &["--to", "qcow2", "--compress"]);
    assert!(text.taken() < 1 << 20, "{} bytes", text.taken());
}

#[test]
fn a_chain_of_qemus_is_one_image_afterwards() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let base = raw(&scratch, "base.raw", (5 << 20) + 512);
    let middle = Image::new(scratch.path("middle.qcow2"), "qcow2");
    let top = Image::new(scratch.path("top.qcow2"), "qcow2");
    let over = |image: &Image, below: &Image, options: &str, size: &str| {
        let args = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "-F",
            below.format,
        ];
        let name = below.path.file_name().expect("a name");
        let rest = ["-b", name.to_str().expect("UTF-8"), image.name(), size];
        img(&[&args[..], &rest].concat());
    };
    over(&middle, &base, "cluster_size=4k", "8M");
    write(
        &middle,
        &[
            "write -P 1 1M 100k".into(),
            "write -z 2M 300k".into(),
            "write -c -P 2 6M 64k".into(),
        ],
    );
    over(&top, &middle, "extended_l2=on,cluster_size=64k", "7M");
    write(
        &top,
        &["write -P 3 512 1k".into(), "write -z 1040k 20k".into()],
    );
    // A snapshot in it stays behind.
    img(&["snapshot", "-q", "-c", "kept", top.name()]);
    write(&top, &["write -P 4 3M 5k".into()]);
    let before = fs::read(&top.path).expect("read");
    for (form, format) in [
        ("qcow2", "qcow2"),
        ("raw", "raw"),
        ("expanded", "parallels"),
    ] {
        let flat = Image::new(scratch.path(&format!("flat.{form}")), format);
        top.convert(&flat.path, &["--to", form]);
        flat.judge(&top);
        assert!(flat.info()["backing-filename"].is_null());
    }
    let disk = scratch.path("disk");
    ok(&[
        "convert",
        "--format",
        "qcow2",
        top.name(),
        "--to",
        "expanded",
        "--out",
        text(&disk),
    ]);
    Image::new(disk.join("root.hds"), "parallels").judge(&top);
    assert!(fs::read(&top.path).expect("read") == before);
}

#[test]
fn a_disk_with_snapshots_becomes_a_file_of_what_it_is_now() {
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
    let flat = Image::new(scratch.path("flat"), "raw");
    fs::write(&flat.path, &disk.top).expect("write");
    for options in [&[][..], &["--compress"], &["--preallocate"]] {
        let made = Image::new(scratch.path("made"), "qcow2");
        let args = [
            "convert",
            disk.name(),
            "--to",
            "qcow2",
            "--out-file",
            made.name(),
        ];
        ok(&[&args[..], options].concat());
        made.judge(&flat);
        fs::remove_file(&made.path).expect("remove");
    }
    disk.judge("its source stays");
}

#[test]
fn a_disk_becomes_a_qcow2_image_in_its_directory_and_back() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    disk.scribble(&mut Dice(0x51_7CC1_B727_220A), 9);
    let flat = Image::new(scratch.path("flat"), "raw");
    fs::write(&flat.path, &disk.top).expect("write");
    let image = |dir: &Path, format| {
        let info = json(&["info", text(dir)]);
        let file = info["layers"][0]["file"]
            .as_str()
            .expect("a file")
            .to_string();
        Image::new(dir.join(file), format)
    };
    for options in [&["--to", "qcow2"][..], &["--to", "qcow2", "--compress"]] {
        let said = json(&[&["convert", disk.name()], options].concat());
        assert_eq!(
            (&said["form"], &said["format_version"]),
            (&json!("qcow2"), &Value::Null)
        );
        image(&disk.path, "qcow2").judge(&flat);
        let xml = fs::read_to_string(disk.path.join("DiskDescriptor.xml")).expect("read");
        assert!(xml.contains("<Type>QCow2</Type>"), "{xml}");
    }
    let other = scratch.path("other");
    ok(&[
        "convert",
        disk.name(),
        "--out",
        text(&other),
        "--cluster",
        "1M",
    ]);
    let made = image(&other, "qcow2");
    made.judge(&flat);
    assert_eq!(made.info()["cluster-size"], 1 << 20);
    ok(&["convert", disk.name(), "--to", "expanded"]);
    image(&disk.path, "parallels").judge(&flat);
    disk.write(&[(1 << 20, 4096, 0xAB)]);
    disk.judge("a ploop image again");
}

#[test]
fn a_new_disk_is_a_qcow2_image() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    for (n, options) in [
        &[][..],
        &["--preallocate"],
        &["--cluster", "2M", "--preallocate"],
    ]
    .into_iter()
    .enumerate()
    {
        let dir = scratch.path(&format!("d{n}"));
        let args = [
            "init",
            text(&dir),
            "-s",
            "40M",
            "--fs",
            "none",
            "--format",
            "qcow2",
        ];
        let said = json(&[&args[..], options].concat());
        assert_eq!(
            (&said["format"], &said["format_version"]),
            (&json!("qcow2"), &Value::Null)
        );
        let empty = Image::new(scratch.path("empty"), "raw");
        File::create(&empty.path)
            .and_then(|f| f.set_len(40 << 20))
            .expect("zeros");
        let image = Image::new(dir.join("root.hds"), "qcow2");
        image.judge(&empty);
        let has_all = image.taken() >= 40 << 20;
        assert_eq!(has_all, options.contains(&"--preallocate"), "{options:?}");
        let out = Image::new(scratch.path(&format!("raw{n}")), "raw");
        ok(&[
            "convert",
            text(&dir),
            "--to",
            "raw",
            "--out-file",
            out.name(),
        ]);
        out.judge(&empty);
    }
    let dir = scratch.path("refused");
    let init = [
        "init",
        text(&dir),
        "-s",
        "40M",
        "--fs",
        "none",
        "--format",
        "qcow2",
    ];
    for options in [["--cluster", "4M"], ["--format-version", "2"]] {
        fails(2, &[&init[..], &options].concat());
        assert!(!dir.exists());
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_is_overwritten() {
    let scratch = Scratch::new();
    let source = raw(&scratch, "source", 1 << 20);
    let there = scratch.path("there");
    fs::write(&there, "mine").expect("write");
    let args = ["convert", "--format", "raw", source.name(), "--out-file"];
    let to = |file: &Path, more: &[&str]| -> Vec<String> {
        let all = [&args[..], &[text(file)], more].concat();
        all.into_iter().map(String::from).collect()
    };
    let refused = |code: i32, args: &[String]| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        fails(code, &args)
    };
    let said = refused(1, &to(&there, &["--to", "qcow2"]));
    assert!(said.contains("nothing is overwritten"), "{said}");
    assert_eq!(fs::read(&there).expect("read"), b"mine");
    let new = scratch.path("new");
    for more in [
        &["--to", "raw", "--compress"][..],
        &["--to", "raw", "--cluster", "64K"],
        &["--to", "expanded", "--preallocate"],
        &["--to", "expanded", "--compress"],
        &["--to", "qcow2", "--format-version", "2"],
        &["--to", "qcow2", "--cluster", "4M"],
        &["--to", "qcow2", "--cluster", "3K"],
        &["--to", "expanded", "--cluster", "4K"],
        &["--to", "qcow2", "--compress", "--preallocate"],
        &["--to", "qcow2", "--compress=lz4"],
        &["--to", "qcow2", "--out", "/nowhere"],
    ] {
        refused(2, &to(&new, more));
        assert_eq!(
            fs::read_dir(scratch.path("")).expect("list").count(),
            2,
            "{more:?}"
        );
    }
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    for options in [
        &["--to", "qcow2", "--cluster", "64K"][..],
        &["--to", "raw", "--preallocate"],
        &["--compress"],
        &["--format-version", "1", "--cluster", "64K"],
    ] {
        fails(2, &[&["convert", text(&disk)], options].concat());
    }
    fails(
        2,
        &[
            "convert",
            "--format",
            "qcow2",
            source.name(),
            "--format-version",
            "1",
        ],
    );
    let said = fails(
        6,
        &[
            "convert",
            "--format",
            "qcow2",
            source.name(),
            "--out-file",
            text(&new),
        ],
    );
    assert!(said.contains("signature"), "{said}");
    assert!(!new.exists());
}

/// Begins a slow conversion, and comes back when it writes.
fn begin(source: &Image, to: &Path) -> Child {
    let child = Command::new(PLOOPCTL)
        .args(["convert", "--format", "raw", source.name(), "--to", "qcow2"])
        .args(["--out-file", text(to), "--rate", "1M"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("convert");
    let name = to
        .file_name()
        .and_then(|name| name.to_str())
        .expect("UTF-8");
    let aside = to.with_file_name(format!(".{name}.new"));
    common::eventually("the new image is there", || {
        fs::metadata(&aside).is_ok_and(|m| m.len() > 200_000)
    });
    child
}

#[test]
fn a_file_of_a_killed_or_cancelled_conversion_never_gets_its_name() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let source = Image::new(scratch.path("source"), "raw");
    fs::write(&source.path, noise(40 << 20, 5)).expect("write");
    let made = Image::new(scratch.path("made"), "qcow2");
    let left = || {
        let all = fs::read_dir(scratch.path("")).expect("list");
        all.count() - 1
    };
    let child = begin(&source, &made.path);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("interrupt");
    let output = child.wait_with_output().expect("wait");
    assert_eq!(output.status.code(), Some(10), "{output:?}");
    assert_eq!(left(), 0);

    let mut child = begin(&source, &made.path);
    let args = ["convert", "--format", "raw", source.name(), "--to", "qcow2"];
    let args = [&args[..], &["--out-file", made.name()]].concat();
    fails(4, &args);
    kill9(child.id().into());
    child.wait().expect("wait");
    assert!(!made.path.exists());
    // The next one takes away what it left.
    ok(&args);
    made.judge(&source);
    assert_eq!(left(), 1);
}
