//! Progress of what takes long: for programs a line each, for people a line that is rewritten, and
//! an end on demand.

mod common;

use common::{PLOOPCTL, Scratch, eventually, has, ok, run, text};
use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The progress in what was written to standard error.
fn told(stderr: &[u8]) -> Vec<Value> {
    let text = String::from_utf8_lossy(stderr);
    let objects = text
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok());
    objects.filter(|o| o["progress"].is_object()).collect()
}

#[test]
fn progress_for_programs_counts_up_to_its_total() {
    let scratch = Scratch::new();
    let dir = scratch.path("d");
    let made = run(&[
        "init",
        "-s",
        "3G",
        "--fs",
        "none",
        "--preallocate",
        text(&dir),
        "--progress",
        "json",
    ]);
    assert!(made.status.success(), "{made:?}");
    let all = told(&made.stderr);
    let doc = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OUTPUT.md");
    let doc = fs::read_to_string(doc).expect("docs/OUTPUT.md");
    for object in &all {
        assert_eq!(object["schema"], 1);
        for name in object["progress"].as_object().expect("an object").keys() {
            assert!(doc.contains(&format!("`{name}`")), "{name}");
        }
    }
    let space = all
        .iter()
        .filter(|o| o["progress"]["phase"] == "reserving space");
    let done: Vec<u64> = space
        .map(|o| o["progress"]["done"].as_u64().expect("bytes"))
        .collect();
    assert!(done.is_sorted() && done.len() >= 2, "{all:?}");
    let last = &all.last().expect("progress")["progress"];
    assert_eq!(last["done"], last["total"], "{last}");

    let checked = run(&["check", text(&dir), "--progress", "json", "-o", "json"]);
    let all = told(&checked.stderr);
    assert!(
        !all.is_empty() && all[0]["progress"]["phase"] == "table",
        "{checked:?}"
    );
    assert_eq!(all[0]["progress"]["file"], "root.hds");
    let bare = scratch.path("bare.hds");
    fs::rename(dir.join("root.hds"), &bare).expect("move");
    let new = scratch.path("new");
    let args = [
        "adopt",
        text(&bare),
        "--format",
        "ploop",
        text(&new),
        "--progress",
        "json",
    ];
    let adopted = run(&args);
    assert!(adopted.status.success(), "{adopted:?}");
    assert!(!told(&adopted.stderr).is_empty(), "that of its check");
}

#[test]
fn nobody_who_did_not_ask_is_told_and_short_work_is_silent() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "1G", "--fs", "none", "--preallocate"]);
    assert!(run(&["check", text(&disk)]).stderr.is_empty());
    if !has("script") {
        return;
    }
    // On a terminal, too, there is nothing to say within a second.
    let command = format!("{PLOOPCTL} check {}", text(&disk));
    let output = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .output();
    let said = String::from_utf8_lossy(&output.expect("script").stdout).into_owned();
    assert!(said.contains("sound") && !said.contains('\x1b'), "{said:?}");
}

/// An image whose check takes long: a table of 256 MiB, none of it a hole.
fn long(scratch: &Scratch) -> PathBuf {
    let disk = scratch.disk("long", &["-s", "2T", "--fs", "none", "--cluster", "32K"]);
    let image = File::options()
        .write(true)
        .open(disk.join("root.hds"))
        .expect("open");
    // One entry on each page keeps it from being a hole; behind the file's end, it is an error.
    let len = image.metadata().expect("metadata").len();
    for at in (4096..len).step_by(4096) {
        image
            .write_all_at(&u32::MAX.to_le_bytes(), at)
            .expect("write");
    }
    disk
}

/// Starts a check, ends it by Ctrl-C after its first progress; exit code and last words.
fn ended(disk: &Path, options: &[&str]) -> (Option<i32>, Value) {
    // Its first progress fills the pipe: it cannot come to its end before it is told to.
    let (mut said, mut stderr) = std::io::pipe().expect("a pipe");
    let size = fcntl_setpipe_size(&stderr, 4096).expect("a short pipe");
    let filled = size - 64;
    stderr.write_all(&vec![b'\n'; filled]).expect("filled");
    let mut child = Command::new(PLOOPCTL)
        .args(["-o", "json", "--progress", "json", "check", text(disk)])
        .args(options)
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .expect("check");
    eventually("its first progress", || {
        ioctl_fionread(&said).expect("a pipe") > filled as u64
    });
    kill_process(Pid::from_child(&child), Signal::INT).expect("Ctrl-C");
    let mut text = String::new();
    said.read_to_string(&mut text).expect("the rest");
    let last = text.lines().last().unwrap_or_default();
    let code = child.wait().expect("wait").code();
    (code, serde_json::from_str(last).unwrap_or_default())
}

#[test]
fn a_check_ends_when_it_is_told_to_and_says_what_it_left() {
    let scratch = Scratch::new();
    let disk = long(&scratch);
    let (code, last) = ended(&disk, &[]);
    assert_eq!(
        (code, &last["error"]["kind"]),
        (Some(10), &"cancelled".into()),
        "{last}"
    );
    let said = last["error"]["message"].as_str().expect("a message");
    assert!(said.contains("nothing was changed"), "{said}");
    let (code, last) = ended(&disk, &["--repair"]);
    assert_eq!(code, Some(10), "{last}");
    let said = last["error"]["message"].as_str().expect("a message");
    assert!(
        said.contains("the next --repair goes on from there"),
        "{said}"
    );
    ok(&["check", "--repair", "--force", text(&disk)]);
    ok(&["check", text(&disk)]);
}

/// Processes that a process has started.
fn children(pid: u32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(path).unwrap_or_default();
    let pids = text.split_whitespace();
    pids.map(|pid| pid.parse().expect("a pid")).collect()
}

#[test]
fn a_signal_to_nobody_but_adopt_ends_its_check_and_moves_nothing() {
    let scratch = Scratch::new();
    let bare = scratch.path("bare.hds");
    fs::rename(long(&scratch).join("root.hds"), &bare).expect("move");
    let new = scratch.path("new");
    let mut adopt = Command::new(PLOOPCTL)
        .args(["adopt", text(&bare), "--format", "ploop", text(&new)])
        .stderr(Stdio::null())
        .spawn()
        .expect("adopt");
    let mut check = Vec::new();
    eventually("its check runs", || {
        check = children(adopt.id());
        // Before that it is a copy of who starts it, and who starts it waits.
        let line = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/cmdline"));
        let first = check.first().and_then(|pid| line(pid).ok());
        first.is_some_and(|line| line.split('\0').any(|word| word == "check"))
    });
    // One that hangs says nothing and ends never.
    let pid = check.first().and_then(|pid| Pid::from_raw(*pid));
    let pid = pid.expect("a process");
    kill_process(pid, Signal::STOP).expect("stop");
    kill_process(Pid::from_child(&adopt), Signal::TERM).expect("terminate");
    let start = Instant::now();
    while adopt.try_wait().expect("wait").is_none() && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // A failed test leaves nobody stopped behind.
    let _ = kill_process(pid, Signal::CONT);
    let _ = adopt.kill();
    assert_eq!(adopt.wait().expect("wait").code(), Some(10));
    assert!(bare.exists() && !new.exists());
}

#[test]
fn a_disk_whose_making_is_ended_leaves_nothing() {
    let scratch = Scratch::new();
    let dir = scratch.path("d");
    let mut child = Command::new(PLOOPCTL)
        .args(["--progress", "json", "init", "-s", "8T", "--fs", "none"])
        .args(["--cluster", "32K", "--preallocate", text(&dir)])
        .stderr(Stdio::piped())
        .spawn()
        .expect("init");
    let mut said = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("progress");
    if !line.contains("progress") {
        // The host has no such file, and says so.
        assert!(line.contains("root.hds"), "{line}");
    }
    let _ = kill_process(Pid::from_child(&child), Signal::INT);
    said.read_to_string(&mut line).expect("the rest");
    let code = child.wait().expect("wait").code();
    assert!(matches!(code, Some(5 | 10)), "{code:?}: {line}");
    assert!(!dir.exists());
}
