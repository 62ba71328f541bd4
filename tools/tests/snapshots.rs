//! Snapshots of disks that are not attached, as a user makes them. What a point holds is read by
//! QEMU, from the files and by rules of its own, and compared with a model.

mod common;

use common::tree::{CLUSTER, Dice, Disk, NOBODY, SIZE, Server, can_judge};
use common::{PLOOPCTL, Scratch, eventually, fails, json, ok, run, text};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

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
    let said = fails(7, &["snapshot", "switch", d, NOBODY]);
    assert!(said.contains("stop serving it first"), "{said}");
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
