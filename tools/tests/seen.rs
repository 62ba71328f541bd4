//! What an operator sees of attached disks: how they are, what they are asked, what they take. Some
//! tests here stop keepers for a while, which makes others' `list` wait.

mod common;
#[path = "../src/nbd.rs"]
#[allow(dead_code, reason = "the tour uses all of it")]
mod nbd;

use common::{PLOOPCTL, Scratch, can_mount, eventually, fails, has, json, noise, ok, text};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Every name in what a program reads is in its documentation.
fn documented(value: &Value) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OUTPUT.md");
    let doc = fs::read_to_string(path).expect("docs/OUTPUT.md");
    let mut left = vec![value];
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    assert!(doc.contains(&format!("`{name}`")), "{name}");
                    left.push(value);
                }
            }
            Value::Array(items) => left.extend(items),
            _ => {}
        }
    }
}

/// A disk that is served over NBD, until the end of its test.
struct Served {
    disk: PathBuf,
    socket: PathBuf,
    server: Child,
}

impl Served {
    fn new(scratch: &Scratch, name: &str) -> Self {
        let disk = scratch.disk(name, &["-s", "64M", "--fs", "none"]);
        let socket = scratch.path(&format!("{name}.sock"));
        let server = Command::new(PLOOPCTL)
            .args(["serve", text(&disk), "--nbd"])
            .arg(format!("unix:{}", text(&socket)))
            .stdout(Stdio::null())
            .spawn()
            .expect("serve");
        eventually("it serves", || UnixStream::connect(&socket).is_ok());
        let served = Self {
            disk,
            socket,
            server,
        };
        eventually("it says so", || served.listed()["state"] == "serving");
        served
    }

    fn listed(&self) -> Value {
        of(&json(&["list"]), &self.disk)
    }

    fn client(&self) -> nbd::Client {
        nbd::Client::connect(&self.socket).expect("connect")
    }

    fn end(mut self) {
        ok(&["umount", text(&self.disk)]);
        assert!(self.server.wait().expect("wait").success());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A disk in an array `disks`.
fn of(all: &Value, disk: &Path) -> Value {
    let disks = all["disks"].as_array().expect("disks");
    let found = disks.iter().find(|d| d["path"] == text(disk));
    found.cloned().unwrap_or_default()
}

fn signal(pid: &Value, signal: Signal) {
    let pid = pid.as_i64().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("kill");
}

#[test]
fn a_keeper_that_does_not_answer_is_shown_and_holds_nobody_up() {
    let scratch = Scratch::new();
    let (stopped, other) = (Served::new(&scratch, "a"), Served::new(&scratch, "b"));
    let keeper = stopped.listed()["keeper_pid"].clone();
    signal(&keeper, Signal::STOP);
    let start = Instant::now();
    let listed = json(&["list"]);
    assert!(start.elapsed() < Duration::from_secs(8));
    let table = ok(&["list"]);
    let said = fails(9, &["stat", text(&stopped.disk)]);
    let all = json(&["stat"]);
    let rounds = ok(&["-o", "json", "top", "-n", "5", "-d", "0.1"]);
    signal(&keeper, Signal::CONT);
    let (silent, well) = (of(&listed, &stopped.disk), of(&listed, &other.disk));
    documented(&listed);
    assert_eq!(
        (&silent["health"], &silent["answers"]),
        (&"silent".into(), &false.into())
    );
    assert_eq!(
        (&silent["hung"], &silent["state"]),
        (&Value::Null, &"serving".into())
    );
    assert_eq!(
        (&well["health"], &well["answers"]),
        (&"serving".into(), &true.into())
    );
    eventually("the host's space is seen", || {
        other.listed()["host_free"].as_u64() > Some(0)
    });
    assert!(
        table.contains("silent") && table.contains(" disks: "),
        "{table}"
    );
    assert!(said.contains("does not answer"), "{said}");
    assert_eq!(of(&all, &stopped.disk), Value::Null);
    assert_eq!(of(&all, &other.disk)["in_flight"], 0, "{all}");
    let rounds = rounds.lines().map(serde_json::from_str);
    let rounds: Vec<Value> = rounds.collect::<Result<_, _>>().expect("JSON");
    let round = rounds.last().expect("a round");
    assert_eq!(of(round, &stopped.disk)["answers"], false, "{round}");
    // Who did not answer is not waited for in every round.
    let quickest = rounds.iter().filter_map(|r| r["seconds"].as_f64());
    assert!(quickest.fold(60.0, f64::min) < 0.5, "{rounds:?}");
    stopped.end();
    other.end();
}

/// A file system whose writers hang until the end of this.
struct Frozen(PathBuf);

impl Frozen {
    fn new(point: &Path) -> Self {
        let frozen = Self(point.to_path_buf());
        frozen.turn("--freeze");
        frozen
    }

    fn turn(&self, how: &str) {
        let status = Command::new("fsfreeze").arg(how).arg(&self.0).status();
        assert!(status.expect("fsfreeze").success(), "{how}");
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.turn("--unfreeze");
    }
}

#[test]
fn io_that_hangs_is_counted_and_shown_with_its_age() {
    if !can_mount() || !has("fsfreeze") {
        return;
    }
    let scratch = Scratch::new();
    let (below, point) = (scratch.disk("below", &["-s", "256M"]), scratch.mountpoint());
    ok(&["mount", text(&below), text(&point)]);
    let served = Served::new(&scratch, "mnt/a");
    let mut client = served.client();
    client.write(0, &[1; 4096]).expect("write");
    let frozen = Frozen::new(&point);
    let blocked = std::thread::spawn(move || client.write(0, &[2; 4096]).is_ok());
    eventually("it hangs", || served.listed()["hung"] == 1);
    let seen = served.listed();
    assert!(
        (10..30).contains(&seen["oldest_s"].as_u64().expect("an age")),
        "{seen}"
    );
    let row = ok(&["list"]);
    let row = row.lines().find(|l| l.ends_with(text(&served.disk)));
    assert!(row.is_some_and(|r| r.contains("  1 1")), "{row:?}");
    let round = ok(&["-o", "json", "top", "-n", "1", "-d", "0.2"]);
    let round: Value = serde_json::from_str(&round).expect("JSON");
    assert_eq!(of(&round, &served.disk)["hung"], 1);
    let metrics = ok(&["stat", text(&served.disk), "--prometheus"]);
    let gauge = metrics.lines().find(|l| l.starts_with("ploop_hung_io{"));
    assert!(gauge.is_some_and(|l| l.ends_with(" 1")), "{metrics}");
    drop(frozen);
    assert!(blocked.join().expect("client"), "it was late, and no error");
    assert_eq!(served.listed()["hung"], 0);
    served.end();
    ok(&["umount", text(&point)]);
}

#[test]
fn info_tells_what_is_virtual_used_exclusive_and_shared() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let sizes = |disk: &Path| {
        let info = json(&["info", text(disk)]);
        documented(&info);
        let sizes = info["sizes"].clone();
        let sum = sizes["exclusive"].as_u64().zip(sizes["shared"].as_u64());
        assert_eq!(
            sum.map(|(a, b)| a + b),
            info["allocated"].as_u64(),
            "{info}"
        );
        sizes
    };
    let alone = sizes(&disk);
    assert_eq!(
        (&alone["virtual"], &alone["used"]),
        (&(64 << 20).into(), &Value::Null)
    );
    assert!(
        alone["exclusive"].as_u64() > Some(0) && alone["shared"] == 0,
        "{alone}"
    );
    fs::hard_link(disk.join("root.hds"), scratch.path("other")).expect("link");
    let both = sizes(&disk);
    assert_eq!(
        (&both["exclusive"], &both["shared"]),
        (&0.into(), &alone["exclusive"])
    );
    // Also what stands on a point that one went back from.
    let point = || {
        let made = json(&["snapshot", "create", text(&disk)]);
        made["uuid"].as_str().expect("a UUID").to_string()
    };
    let (first, _other) = (point(), point());
    ok(&["snapshot", "switch", text(&disk), &first]);
    let files = fs::read_dir(&disk).expect("list").flatten();
    let images = files.filter(|f| f.file_name().to_string_lossy().starts_with("root"));
    let images: Vec<u64> = images
        .map(|f| f.metadata().expect("stat").blocks() * 512)
        .collect();
    assert_eq!(images.len(), 3);
    let info = json(&["info", text(&disk)]);
    assert_eq!(info["allocated"], images.iter().sum::<u64>());
    let said = ok(&["info", text(&disk)]);
    for word in ["virtual", "used", "exclusive", "shared", "not mounted"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn a_mounted_disk_shows_what_its_files_take_in_it_and_on_the_host() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "128M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    let used = || {
        json(&["info", text(&disk)])["sizes"]["used"]
            .as_u64()
            .expect("mounted")
    };
    let before = used();
    let allocated = of(&json(&["list"]), &disk)["allocated"].as_u64();
    let file = fs::File::create(point.join("file")).expect("create");
    fs::write(point.join("file"), noise(32 << 20, 5)).expect("write");
    file.sync_all().expect("sync");
    assert!(
        (32 << 20..40 << 20).contains(&(used() - before)),
        "{before} {}",
        used()
    );
    // A busy host may show what it saw before; and the file system goes on writing.
    for verb in ["list", "stat"] {
        eventually("the file's space is seen", || {
            let now = of(&json(&[verb]), &disk)["allocated"].as_u64();
            now >= allocated.map(|a| a + (31 << 20)) && now.is_some()
        });
    }
    let metrics = ok(&["stat", text(&disk), "--prometheus"]);
    for name in [
        "ploop_hung_io",
        "ploop_alloc_bytes",
        "ploop_host_free_bytes",
        "ploop_failed",
    ] {
        assert!(metrics.contains(&format!("\n{name}{{disk=")), "{metrics}");
    }
    drop(file);
    ok(&["umount", text(&point)]);
}

#[test]
fn top_shows_what_is_asked_in_each_round_and_wakes_no_keeper() {
    let scratch = Scratch::new();
    let (busy, idle) = (
        Served::new(&scratch, "busy"),
        Served::new(&scratch, "a-idle"),
    );
    let mut client = busy.client();
    let mut top = Command::new(PLOOPCTL)
        .args(["-o", "json", "top", "-d", "0.3"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("top");
    let mut lines = BufReader::new(top.stdout.take().expect("piped")).lines();
    let mut round = move || -> Value {
        let line = lines.next().expect("a round").expect("a line");
        serde_json::from_str(&line).expect("JSON")
    };
    round();
    let keeper = idle.listed()["keeper_pid"].clone();
    let slept = |pid: &Value| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let line = status
            .lines()
            .find(|l| l.starts_with("voluntary_ctxt_switches"));
        line.expect("a count").to_string()
    };
    // Others who list wake it as well: it has to sleep through one of many attempts.
    eventually("a keeper sleeps through three rounds", || {
        let before = slept(&keeper);
        (0..3).for_each(|_| drop(round()));
        slept(&keeper) == before
    });
    let mut rounds = 0;
    eventually("writes are seen", || {
        for n in 0..100 {
            client.write(n * 4096, &[7; 4096]).expect("write");
        }
        rounds += 1;
        let round = round();
        documented(&round);
        let (first, second) = (of(&round, &busy.disk), of(&round, &idle.disk));
        assert_eq!(second["iops"], 0, "{second}");
        let order = |path: &Path| {
            let disks = round["disks"].as_array().expect("disks");
            disks.iter().position(|d| d["path"] == text(path))
        };
        let seen = first["ops"]["write"]["iops"].as_u64() > Some(0);
        if seen {
            assert!(order(&busy.disk) < order(&idle.disk), "{round}");
            assert!(first["bytes_per_s"].as_u64() >= first["iops"].as_u64().map(|n| n * 4096));
            assert!(first["p99_us"].as_u64() > Some(0) && first["mean_us"].as_u64() > Some(0));
        }
        seen
    });
    busy.end();
    eventually("a disk that went is no longer shown", || {
        of(&round(), &idle.disk) != Value::Null
            && of(&round(), Path::new(text(&scratch.path("busy")))) == Value::Null
    });
    let pid = Pid::from_child(&top);
    kill_process(pid, Signal::INT).expect("Ctrl-C");
    assert!(top.wait().expect("wait").success());
    idle.end();
}

#[test]
fn top_for_people_is_a_table_without_control_characters_when_it_is_no_terminal() {
    let scratch = Scratch::new();
    let served = Served::new(&scratch, "a");
    let said = ok(&["top", "-n", "2", "-d", "0.1"]);
    assert!(!said.contains('\x1b'), "{said:?}");
    assert_eq!(said.matches("IOPS  BYTES/S").count(), 2, "{said}");
    assert!(said.contains(text(&served.disk)), "{said}");
    // Who stops reading ends it.
    let script = "\"$0\" top -d 0.1 | head -n 1";
    let output = Command::new("sh").args(["-c", script, PLOOPCTL]).output();
    let output = output.expect("sh");
    assert!(output.stderr.is_empty(), "{output:?}");
    fails(2, &["top", "-n", "0"]);
    fails(2, &["top", "-d", "0"]);
    served.end();
}
