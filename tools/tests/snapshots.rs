//! Snapshots and clones of disks that are not attached, as a user makes them. What a point holds is
//! read by QEMU, from the files and by rules of its own, and compared with a model.

mod common;

use common::{PLOOPCTL, Scratch, eventually, fails, has, json, ok, run, skip, text};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const SIZE: usize = 8 << 20;
const CLUSTER: usize = 64 << 10;

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).expect("64 bits") % n
    }
}

fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output
}

/// The tools that judge are there.
fn can_judge() -> bool {
    has("qemu-img") && has("qemu-io")
}

/// A server in the foreground, ended in order when it goes.
struct Server {
    child: Child,
    uri: String,
}

impl Server {
    fn start(disk: &Path) -> Self {
        let socket = format!("unix:{}.sock", text(disk));
        let mut child = Command::new(PLOOPCTL)
            .args(["serve", text(disk), "--nbd", &socket])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("serve");
        let mut uri = String::new();
        let out = child.stdout.as_mut().expect("piped");
        BufReader::new(out).read_line(&mut uri).expect("a line");
        let uri = uri.trim_end().to_string();
        Self { child, uri }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

/// A disk and what its points should hold.
struct Disk {
    path: PathBuf,
    top: Vec<u8>,
    points: BTreeMap<String, Vec<u8>>,
}

impl Disk {
    fn new(scratch: &Scratch, name: &str) -> Self {
        let path = scratch.disk(name, &["-s", "8M", "--fs", "none"]);
        Self {
            path,
            top: vec![0; SIZE],
            points: BTreeMap::new(),
        }
    }

    fn name(&self) -> &str {
        text(&self.path)
    }

    /// Writes through the served disk, as its guest would: each offset, length and byte.
    fn write(&mut self, writes: &[(usize, usize, u8)]) {
        let server = Server::start(&self.path);
        let mut args = vec!["-f".to_string(), "raw".into()];
        for (at, len, byte) in writes {
            let command = match byte {
                0 => format!("write -z {at} {len}"),
                byte => format!("write -P {byte} {at} {len}"),
            };
            args.extend(["-c".into(), command]);
            self.top[*at..*at + *len].fill(*byte);
        }
        args.push(server.uri.clone());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        tool("qemu-io", &args);
    }

    fn scribble(&mut self, dice: &mut Dice, writes: usize) {
        let one = |dice: &mut Dice| {
            let at = dice.below(SIZE / 512) * 512;
            let len = (1 + dice.below(600)) * 512;
            (
                at,
                len.min(SIZE - at),
                u8::try_from(dice.below(256)).expect("a byte"),
            )
        };
        let writes: Vec<_> = (0..writes).map(|_| one(dice)).collect();
        self.write(&writes);
    }

    fn snapshot(&mut self) -> String {
        let uuid = ok(&["snapshot", "create", self.name()])
            .trim_end()
            .to_string();
        self.points.insert(uuid.clone(), self.top.clone());
        uuid
    }

    fn list(&self) -> Vec<Value> {
        let list = json(&["snapshot", "list", self.name()]);
        list["snapshots"].as_array().expect("snapshots").clone()
    }

    fn entry(&self, uuid: &str) -> Value {
        let list = self.list();
        let found = list.iter().find(|s| s["uuid"] == uuid);
        found.unwrap_or_else(|| panic!("{uuid}: {list:?}")).clone()
    }

    fn switch(&mut self, uuid: &str) {
        ok(&["snapshot", "switch", self.name(), uuid]);
        self.top = self.points[uuid].clone();
    }

    /// Deletes a snapshot; those that are merged away with it, too, are no points any more.
    fn delete(&mut self, uuid: &str) {
        ok(&["snapshot", "delete", self.name(), uuid]);
        self.points.remove(uuid);
    }

    fn top_file(&self) -> PathBuf {
        let info = json(&["info", self.name()]);
        let layers = info["layers"].as_array().expect("layers").clone();
        let top = layers.last().expect("a top")["file"]
            .as_str()
            .expect("a file")
            .to_string();
        self.path.join(top)
    }

    /// Files of a point, the upper ones first; those of the top without one.
    fn chain(&self, point: Option<&str>) -> Vec<PathBuf> {
        let list = self.list();
        let find = |uuid: &Value| list.iter().find(|s| s["uuid"] == *uuid);
        let mut chain = Vec::new();
        let mut next = match point {
            Some(uuid) => find(&json!(uuid)),
            None => {
                chain.push(self.top_file());
                list.iter().find(|s| s["current"] == true)
            }
        };
        while let Some(snapshot) = next {
            chain.push(self.path.join(snapshot["file"].as_str().expect("a file")));
            next = find(&snapshot["parent"]);
        }
        chain
    }

    fn read(&self, point: Option<&str>) -> Vec<u8> {
        read_chain(&self.chain(point))
    }

    /// Every point, the top and every file are what they should be, and there is nothing else.
    fn judge(&self, when: &str) {
        for (uuid, content) in &self.points {
            assert!(self.read(Some(uuid)) == *content, "{when}: {uuid}");
        }
        assert!(self.read(None) == self.top, "{when}: the top");
        let mut files = vec![self.top_file()];
        for snapshot in self.list() {
            assert!(
                snapshot["temporary"] == true
                    || self
                        .points
                        .contains_key(snapshot["uuid"].as_str().expect("a UUID")),
                "{when}: {snapshot}"
            );
            files.push(self.path.join(snapshot["file"].as_str().expect("a file")));
        }
        for file in &files {
            tool("qemu-img", &["check", "-q", "-f", "parallels", text(file)]);
        }
        let images = fs::read_dir(&self.path).expect("list").filter(|e| {
            let name = e.as_ref().expect("an entry").file_name();
            text(Path::new(&name)).starts_with("root.hds")
        });
        assert_eq!(images.count(), files.len(), "{when}");
        let orphans = json(&["list", "--orphans", self.name()]);
        assert_eq!(orphans["files"], json!([]), "{when}");
    }
}

/// What QEMU reads of a chain of files, the upper ones first.
fn read_chain(chain: &[PathBuf]) -> Vec<u8> {
    let mut below = Value::Null;
    for file in chain.iter().rev() {
        let mut node = json!({
            "driver": "parallels",
            "file": { "driver": "file", "filename": text(file) },
        });
        if !below.is_null() {
            node["backing"] = below;
        }
        below = node;
    }
    let out = tempfile::NamedTempFile::new().expect("a file");
    let place = format!("json:{below}");
    tool(
        "qemu-img",
        &["convert", "-O", "raw", &place, text(out.path())],
    );
    fs::read(out.path()).expect("read")
}

fn bytes(number: &Value) -> usize {
    usize::try_from(number.as_u64().expect("a number")).expect("64 bits")
}

/// Parts in which two points differ, as `snapshot diff` tells.
fn diff(disk: &Disk, a: &str, b: &str) -> Vec<(usize, usize, bool)> {
    let said = ok(&["-o", "json", "snapshot", "diff", disk.name(), a, b]);
    let parts = said.lines().map(|line| {
        let part: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(part["schema"], 1, "{part}");
        let zero = part["zero"].as_bool().expect("a truth");
        (bytes(&part["start"]), bytes(&part["length"]), zero)
    });
    let parts: Vec<_> = parts.collect();
    let text: String = parts
        .iter()
        .map(|(start, length, zero)| {
            format!(
                "{start} +{length}  {}\n",
                if *zero { "zero" } else { "data" }
            )
        })
        .collect();
    assert_eq!(ok(&["snapshot", "diff", disk.name(), a, b]), text);
    parts
}

/// Every byte that differs is in a part, and what is said to be zero is.
fn judge_diff(disk: &Disk, a: &str, b: &str) {
    let content = |point: &str| match point {
        "top" => &disk.top,
        uuid => &disk.points[uuid],
    };
    let (old, new) = (content(a), content(b));
    let mut rest = old.clone();
    let mut end = 0;
    for (start, length, zero) in diff(disk, a, b) {
        assert!(start >= end && length > 0, "in order and apart");
        end = start + length;
        assert!(!zero || new[start..end].iter().all(|byte| *byte == 0));
        rest[start..end].copy_from_slice(&new[start..end]);
    }
    assert!(rest == *new, "{a} to {b}: a difference that is not told");
}

#[test]
fn every_point_of_a_tree_reads_as_it_was_through_deletions_merges_and_switches() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut made: Vec<String> = Vec::new();
    for round in 0..12 {
        if round % 3 == 2 {
            let back = made[dice.below(made.len())].clone();
            disk.switch(&back);
        }
        disk.scribble(&mut dice, 12);
        made.push(disk.snapshot());
    }
    disk.scribble(&mut dice, 12);
    disk.judge("twelve snapshots");
    for pair in [(0, 11), (11, 0), (3, 8), (5, 6)] {
        judge_diff(&disk, &made[pair.0], &made[pair.1]);
    }
    judge_diff(&disk, &made[4], "top");
    judge_diff(&disk, "top", &made[9]);

    for _ in 0..6 {
        let gone = made.swap_remove(dice.below(made.len()));
        disk.delete(&gone);
        disk.judge(&format!("{gone} deleted"));
    }
    assert_eq!(disk.points.len(), 6);
    // A merge takes the point below.
    let mut merges = 0;
    loop {
        let list = disk.list();
        let only = |parent: &Value| list.iter().filter(|s| s["parent"] == *parent).count() == 1;
        let current = |uuid: &Value| {
            list.iter()
                .any(|s| s["uuid"] == *uuid && s["current"] == true)
        };
        let ripe = list.iter().find(|s| {
            let parent = &s["parent"];
            !parent.is_null() && only(parent) && !current(parent)
        });
        let Some(found) = ripe.filter(|_| merges < 2) else {
            break;
        };
        let uuid = found["uuid"].as_str().expect("a UUID");
        let merged = json(&["snapshot", "merge", disk.name(), uuid]);
        assert_eq!(merged["gone"], found["parent"], "{merged}");
        disk.points.remove(merged["gone"].as_str().expect("a UUID"));
        disk.judge(&format!("{uuid} merged"));
        merges += 1;
    }
    assert!(merges > 0, "no merge was tried: {:?}", disk.list());
    let back = disk.points.keys().next().expect("a point").clone();
    disk.switch(&back);
    disk.judge("switched");
    disk.scribble(&mut dice, 12);
    disk.judge("written after all");
    ok(&["check", disk.name()]);
    ok(&["delete", disk.name()]);
    assert!(!disk.path.exists());
}

#[test]
fn a_difference_is_what_was_written_and_nothing_else() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    disk.write(&[(0, SIZE, 7)]);
    let a = disk.snapshot();
    let b = disk.snapshot();
    assert_eq!(diff(&disk, &a, &b), []);
    disk.write(&[
        (3 * CLUSTER + 512, 512, 9),
        (4 * CLUSTER, CLUSTER, 0),
        (9 * CLUSTER, 2 * CLUSTER, 1),
    ]);
    let found = diff(&disk, &b, "top");
    assert_eq!(found, diff(&disk, &a, "top"));
    let parts: Vec<(usize, usize)> = found
        .iter()
        .map(|(s, l, _)| (s / CLUSTER, l / CLUSTER))
        .collect();
    let whole: usize = found.iter().map(|(_, length, _)| length).sum();
    assert_eq!(whole, 4 * CLUSTER, "{parts:?}");
    judge_diff(&disk, &a, "top");
    let server = Server::start(&disk.path);
    let said = fails(4, &["snapshot", "diff", disk.name(), &a, "top"]);
    assert!(said.contains("umount"), "{said}");
    assert_eq!(diff(&disk, &a, &b), [], "frozen points of an attached disk");
    drop(server);
    fails(11, &["snapshot", "diff", disk.name(), &a, NOBODY]);
    fails(2, &["snapshot", "diff", disk.name(), &a, "bottom"]);
}

const NOBODY: &str = "00000000-1111-4222-8333-444444444444";

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

#[test]
fn what_cannot_be_done_to_a_tree_is_refused_with_its_reason() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let d = text(&disk);
    let raw = scratch.path("x.raw");
    fs::write(&raw, [0; 1 << 16]).expect("write");
    let braced = format!("{{{NOBODY}}}");
    for verb in ["delete", "merge", "switch"] {
        let said = fails(11, &["snapshot", verb, d, NOBODY]);
        assert!(said.contains(NOBODY), "{said}");
        fails(11, &["snapshot", verb, d, &braced]);
        fails(2, &["snapshot", verb, d, "first"]);
        let said = fails(7, &["snapshot", verb, text(&raw), NOBODY]);
        assert!(said.contains("ploopctl adopt"), "{said}");
    }
    for args in [&["snapshot", "create"][..], &["snapshot", "list"]] {
        fails(7, &[args, &[text(&raw)]].concat());
    }
    fails(7, &["clone", text(&raw), text(&scratch.path("new"))]);
    fails(2, &["snapshot", "create", d, "--name", "two\nlines"]);
    fails(2, &["snapshot", "delete", d, NOBODY, "--rate", "0"]);

    assert_eq!(
        ok(&["snapshot", "create", d, "--uuid", &braced]),
        format!("{NOBODY}\n")
    );
    let said = fails(1, &["snapshot", "create", d, "--uuid", NOBODY]);
    assert!(said.contains("already"), "{said}");
    let said = fails(1, &["snapshot", "merge", d, NOBODY]);
    assert!(said.contains("is the base"), "{said}");
    let list = json(&["snapshot", "list", d]);
    assert_eq!(list["snapshots"].as_array().map(Vec::len), Some(1));

    let server = Server::start(&disk);
    let other = text(&scratch.path("new")).to_string();
    for args in [
        &["snapshot", "create", d][..],
        &["snapshot", "delete", d, NOBODY],
        &["snapshot", "merge", d, NOBODY],
        &["snapshot", "switch", d, NOBODY],
        &["clone", d, &other],
    ] {
        let said = fails(4, args);
        assert!(
            said.contains("attached") && said.contains("umount it first"),
            "{said}"
        );
    }
    assert_eq!(
        json(&["snapshot", "list", d])["current"],
        NOBODY,
        "an attached disk is listed"
    );
    drop(server);
    let locked = fs::File::create(disk.join("DiskDescriptor.xml.lck")).expect("lock file");
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).expect("flock");
    fails(4, &["snapshot", "create", d]);
    drop(locked);
    ok(&["snapshot", "create", d]);
}

#[test]
fn a_snapshot_that_several_stand_on_goes_when_one_is_left() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    disk.write(&[(0, 1 << 20, 1)]);
    let base = disk.snapshot();
    disk.write(&[(1 << 20, 1 << 20, 2)]);
    let branch = disk.snapshot();
    disk.switch(&base);
    disk.write(&[(2 << 20, 1 << 20, 3)]);
    let said = fails(4, &["snapshot", "merge", disk.name(), &branch]);
    assert!(
        said.contains("needed by") || said.contains("exactly one"),
        "{said}"
    );
    let output = run(&["-o", "json", "snapshot", "delete", disk.name(), &base]);
    let marked: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&marked["outcome"], &marked["children"]),
        (&json!("temporary"), &json!(2))
    );
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("2 deltas stand on"),
        "{output:?}"
    );
    assert!(ok(&["snapshot", "list", disk.name()]).contains("(temporary)"));
    disk.points.remove(&base);
    disk.judge("marked");
    for args in [
        &["snapshot", "switch", disk.name(), &base][..],
        &["snapshot", "diff", disk.name(), &base, &branch],
        &[
            "clone",
            &format!("{}@{base}", disk.name()),
            text(&scratch.path("new")),
        ],
    ] {
        fails(4, args);
    }
    let deleted = json(&["snapshot", "delete", disk.name(), &branch]);
    assert_eq!(deleted["temporaries_merged"], 1, "{deleted}");
    disk.points.remove(&branch);
    assert_eq!(disk.list().len(), 0);
    disk.judge("merged away");
}

#[test]
fn a_name_is_a_remark_that_may_be_lost() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let d = text(&disk);
    let names = || -> Vec<Value> {
        let list = json(&["snapshot", "list", d]);
        let list = list["snapshots"].as_array().expect("snapshots").clone();
        list.iter().map(|s| s["name"].clone()).collect()
    };
    let first = ok(&["snapshot", "create", d, "--name", "before upgrade"]);
    ok(&["snapshot", "create", d]);
    assert_eq!(names(), [json!("before upgrade"), Value::Null]);
    let file = disk.join("snapshots.json");
    assert_eq!(
        fs::metadata(&file).expect("there").permissions().mode() & 0o777,
        0o600
    );
    ok(&["snapshot", "delete", d, first.trim_end()]);
    assert_eq!(names(), [Value::Null]);
    ok(&["snapshot", "create", d, "--name", "after"]);
    let kept = fs::read_to_string(&file).expect("read");
    assert!(
        !kept.contains("upgrade") && kept.contains("after"),
        "{kept}"
    );
    for damage in ["", "{", "[1]", "{\"x\":\"y\"}"] {
        fs::write(&file, damage).expect("write");
        assert_eq!(names(), [Value::Null, Value::Null], "{damage}");
    }
    let uuid = ok(&["snapshot", "create", d]);
    fs::write(&file, json!({ uuid.trim_end(): "\x1b[2Jgone" }).to_string()).expect("write");
    assert_eq!(
        names(),
        [Value::Null, Value::Null, Value::Null],
        "no escapes for a terminal"
    );
    fs::remove_file(&file).expect("remove");
    ok(&["snapshot", "create", d, "--name", "again"]);
    assert_eq!(names().last(), Some(&json!("again")));
    ok(&["delete", d]);
    assert!(!disk.exists());
}

#[test]
fn what_an_interrupted_change_left_is_a_draft_and_goes_with_its_files() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let d = text(&disk);
    let leave = || {
        let xml = fs::read_to_string(disk.join("DiskDescriptor.xml")).expect("read");
        let next = xml.replace("root.hds", "root.hds.new");
        fs::write(disk.join("DiskDescriptor.xml.next"), next).expect("write");
        fs::write(disk.join("root.hds.new"), "half").expect("write");
        fs::write(disk.join("snapshots.json.tmp"), "half").expect("write");
    };
    leave();
    let files = |orphans: Value| -> Vec<String> {
        let files = orphans["files"].as_array().expect("files").clone();
        files
            .iter()
            .map(|f| {
                format!(
                    "{} {}",
                    f["file"].as_str().expect("a name"),
                    f["kind"].as_str().expect("a kind")
                )
            })
            .collect()
    };
    let mut listed = files(json(&["list", "--orphans", d]));
    assert_eq!(
        listed.pop().as_deref(),
        Some("DiskDescriptor.xml.next draft"),
        "the record last"
    );
    listed.sort();
    assert_eq!(listed, ["root.hds.new draft", "snapshots.json.tmp draft"]);
    ok(&["list", "--orphans", d, "--remove"]);
    assert!(files(json(&["list", "--orphans", d])).is_empty());
    assert!(!disk.join("root.hds.new").exists());
    ok(&["check", d]);
    leave();
    ok(&["snapshot", "create", d]);
    assert!(
        !disk.join("root.hds.new").exists(),
        "the next change settles it"
    );
    leave();
    ok(&["delete", d]);
    assert!(!disk.exists());
}

/// A disk of 64 MiB whose only snapshot takes eight seconds to delete at 4 MiB a second.
fn long(scratch: &Scratch) -> (Disk, String) {
    let path = scratch.disk("long", &["-s", "64M", "--fs", "none"]);
    let mut disk = Disk {
        path,
        top: vec![0; 64 << 20],
        points: BTreeMap::new(),
    };
    disk.write(&[(0, 40 << 20, 1)]);
    let base = disk.snapshot();
    disk.write(&[(8 << 20, 32 << 20, 2)]);
    disk.snapshot();
    disk.write(&[(0, 1 << 20, 3)]);
    (disk, base)
}

/// Starts to delete it, and waits until some of it is copied.
fn begin(disk: &Disk, uuid: &str) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = Command::new(PLOOPCTL)
        .args([
            "--progress",
            "json",
            "snapshot",
            "delete",
            disk.name(),
            uuid,
            "--rate",
            "4M",
        ])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("delete");
    let mut said = BufReader::new(child.stderr.take().expect("piped"));
    for _ in 0..6 {
        let mut line = String::new();
        said.read_line(&mut line).expect("progress");
        assert!(line.contains("\"merging\""), "{line}");
    }
    assert!(child.try_wait().expect("wait").is_none(), "it takes long");
    (child, said)
}

#[test]
fn a_merge_that_is_killed_is_finished_by_the_next_command() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let (mut disk, base) = long(&scratch);
    disk.points.remove(&base);
    for _ in 0..2 {
        let (mut child, _said) = begin(&disk, &base);
        child.kill().expect("kill");
        child.wait().expect("wait");
        assert_eq!(disk.entry(&base)["temporary"], true);
        for (uuid, content) in &disk.points {
            assert!(
                disk.read(Some(uuid)) == *content,
                "through the half merged one"
            );
        }
    }
    // It can be used meanwhile.
    disk.write(&[(50 << 20, 1 << 20, 9), (9 << 20, 1 << 20, 8)]);
    assert!(disk.read(None) == disk.top);
    ok(&["snapshot", "create", disk.name(), "--uuid", NOBODY]);
    disk.points.insert(NOBODY.into(), disk.top.clone());
    assert_eq!(disk.list().len(), 2, "a snapshot finishes it first");
    disk.judge("finished");
    ok(&["check", disk.name()]);
}

#[test]
fn a_merge_that_is_cancelled_says_what_is_left_and_goes_on() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let (mut disk, base) = long(&scratch);
    disk.points.remove(&base);
    let (mut child, mut said) = begin(&disk, &base);
    kill_process(Pid::from_child(&child), Signal::INT).expect("interrupt");
    let start = std::time::Instant::now();
    let mut rest = String::new();
    said.read_to_string(&mut rest).expect("the rest");
    assert_eq!(child.wait().expect("wait").code(), Some(10), "{rest}");
    assert!(
        start.elapsed().as_secs() < 3,
        "a rate does not hold up the end"
    );
    assert!(rest.contains("the same command goes on with it"), "{rest}");
    assert!(disk.read(None) == disk.top);
    disk.delete(&base);
    disk.judge("gone on with");
}

#[test]
fn a_rate_is_kept_to() {
    if !can_judge() {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = Disk::new(&scratch, "d");
    disk.write(&[(0, 4 << 20, 1)]);
    let base = disk.snapshot();
    disk.write(&[(0, 4 << 20, 2)]);
    let start = std::time::Instant::now();
    ok(&["snapshot", "delete", disk.name(), &base, "--rate", "2M"]);
    let took = start.elapsed().as_secs_f64();
    assert!(took > 1.8, "4 MiB at 2 MiB a second took {took} s");
    disk.points.clear();
    disk.judge("merged");
}

#[test]
fn every_name_in_what_these_verbs_print_is_documented() {
    let doc = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OUTPUT.md");
    let doc = fs::read_to_string(doc).expect("docs/OUTPUT.md");
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "8M", "--fs", "none"]);
    let d = text(&disk);
    let mut said = vec![json(&["snapshot", "create", d, "--uuid", NOBODY])];
    let second = ok(&["snapshot", "create", d]);
    said.push(json(&["snapshot", "list", d]));
    said.push(json(&["clone", d, text(&scratch.path("c"))]));
    ok(&["delete", text(&scratch.path("c"))]);
    said.push(json(&["snapshot", "switch", d, NOBODY]));
    said.push(json(&["snapshot", "delete", d, second.trim_end()]));
    said.push(json(&[
        "snapshot",
        "merge",
        d,
        "5fbaabe3-6958-40ff-92a7-860e329aab41",
    ]));
    said.push(json(&["info", d]));
    let mut names = Vec::new();
    while let Some(value) = said.pop() {
        match value {
            Value::Object(fields) => fields.into_iter().for_each(|(name, value)| {
                names.push(name);
                said.push(value);
            }),
            Value::Array(items) => said.extend(items),
            _ => {}
        }
    }
    let missing: Vec<_> = names
        .iter()
        .filter(|n| !doc.contains(&format!("`{n}`")))
        .collect();
    assert!(names.len() > 30 && missing.is_empty(), "{missing:?}");
    eventually("nothing is attached", || scratch.attached().is_empty());
}
