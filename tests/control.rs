//! What the keeper of an attached disk tells others: counters, state, events; and that no client of
//! its control socket can hurt it.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{self, Attached, can_mount, kill, listed};
use common::nbd::Client;
use common::process::{Guard, eventually, ok, run_within};
use common::programs::ploopctl;
use common::serve::{Disk, Server};
use ploop::Kind;
use ploop::client::{self, Remote};
use ploop::serve::supervise::control::Ask;
use ploop::serve::supervise::message::{Cache, Event};
use rustix::net::SendFlags;
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open,
};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);

fn run_directory(disk: &Disk) -> PathBuf {
    eventually("a serving disk", SOON, || {
        listed(&disk.path()).filter(|object| object["state"] == "serving")
    });
    attach::run_directory(&disk.path())
}

/// A client that speaks by hand.
struct Hand {
    stream: BufReader<UnixStream>,
}

impl Hand {
    fn connect(disk: &Disk) -> Self {
        let stream = UnixStream::connect(run_directory(disk).join("control")).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut hand = Self {
            stream: BufReader::new(stream),
        };
        let greeting = hand.hear();
        assert_eq!(greeting["proto"], 1, "{greeting}");
        assert!(greeting["version"].is_string(), "{greeting}");
        hand
    }

    fn say(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    fn ask(&mut self, method: &str) -> Value {
        self.say(&format!("{}\n", json!({ "id": 7, "method": method })));
        let answer = self.hear();
        assert_eq!(answer["id"], 7, "{answer}");
        answer["result"].clone()
    }

    fn is_hung_up(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

fn stat(disk: &Disk) -> Value {
    let all = ok(ploopctl().args(["-o", "json", "stat"]).arg(disk.path()));
    serde_json::from_str::<Value>(&all).unwrap()["disks"][0].clone()
}

#[test]
fn requests_are_counted_with_their_bytes_and_times_also_across_a_death_of_the_worker() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut client = Client::connect(server.socket()).unwrap();
    for n in 0..10 {
        assert_eq!(client.write(n * 4096, &[1; 4096]).unwrap(), 0);
    }
    client.read(0, 8192).unwrap();
    client.disconnect().unwrap();
    let before = stat(&disk);
    assert_eq!(before["ops"]["write"]["requests"], 10, "{before}");
    assert_eq!(before["ops"]["write"]["bytes"], 40960, "{before}");
    assert_eq!(before["ops"]["read"]["bytes"], 8192, "{before}");
    assert_eq!(before["in_flight"], 0, "{before}");
    let buckets = before["ops"]["write"]["latency_log2_us"]
        .as_array()
        .unwrap();
    let counted: u64 = buckets.iter().map(|b| b.as_u64().unwrap()).sum();
    assert_eq!(counted, 10, "{before}");

    let worker = listed(&disk.path()).unwrap()["worker_pid"]
        .as_u64()
        .unwrap();
    kill(worker as u32);
    let mut client = eventually("another worker", SOON, || {
        let mut client = Client::connect(server.socket()).ok()?;
        client.read(0, 512).ok().map(|_| client)
    });
    assert_eq!(client.write(0, &[2; 512]).unwrap(), 0);
    let after = stat(&disk);
    assert_eq!(after["ops"]["write"]["requests"], 11, "{after}");
    assert_eq!(after["restarts"], 1, "{after}");
}

#[test]
fn the_control_socket_answers_its_own_user_in_order() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let run = run_directory(&disk);
    for name in ["control", "metrics"] {
        let mode = fs::metadata(run.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let mut hand = Hand::connect(&disk);
    let state = hand.ask("state");
    assert_eq!(state["size"], 64 << 20, "{state}");
    assert_eq!(state["keeper_pid"], server.pid(), "{state}");
    assert_eq!(hand.ask("stat")["in_flight"], 0);
    hand.say("{\"id\":1,\"method\":\"state\"}\n{\"id\":2,\"method\":\"stat\"}\n");
    assert_eq!(
        (hand.hear()["id"].clone(), hand.hear()["id"].clone()),
        (json!(1), json!(2))
    );
}

#[test]
fn what_is_no_request_gets_an_error_and_harms_nobody() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut good = Hand::connect(&disk);
    let mut bad = Hand::connect(&disk);
    for line in ["", "x", "{}", "{\"method\":\"explode\"}", "[1]", "\u{1}"] {
        bad.say(&format!("{line}\n"));
        let answer = bad.hear();
        assert_eq!(answer["error"]["kind"], "invalid", "{line:?}: {answer}");
    }
    assert_eq!(bad.ask("stat")["in_flight"], 0, "it may go on");
    // The server may hang up in the middle of this.
    let _ = bad.stream.get_mut().write_all(&vec![b'x'; 64 << 10]);
    assert!(bad.is_hung_up(), "a line without end");

    let silent: Vec<Hand> = (0..100).map(|_| Hand::connect(&disk)).collect();
    drop(good);
    good = Hand::connect(&disk);
    assert_eq!(good.ask("state")["state"], "serving");
    drop(silent);

    // Somebody who asks and never reads is hung up on, and nobody waits for them.
    for method in ["stat", "counters"] {
        let mut greedy = Hand::connect(&disk);
        let asks = format!("{{\"method\":\"{method}\"}}\n").repeat(1000);
        let mut asked = 0;
        greedy
            .stream
            .get_mut()
            .set_write_timeout(Some(SOON))
            .unwrap();
        while asked < 100 && greedy.stream.get_mut().write_all(asks.as_bytes()).is_ok() {
            asked += 1;
        }
        assert!(
            asked < 100,
            "{method}: 100,000 answers were kept for a client that reads none"
        );
        assert_eq!(good.ask("state")["state"], "serving");
    }
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    assert!(fds.count() < 100, "descriptors were kept for it");
    server.stop();
}

fn signal(server: &Server, signal: Signal) {
    let pid = Pid::from_raw(server.pid().try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn counters_are_watched_without_asking_their_keeper_again() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut remote = Remote::connect(&run_directory(&disk)).unwrap();
    assert_eq!(remote.state().unwrap().keeper_pid, server.pid());
    let watched = remote.watch().unwrap();
    // As many answers before and behind it as there may be.
    remote.watch().unwrap();
    assert_eq!(remote.stat().unwrap().counters, watched.stat());
    drop(remote);
    let mut client = Client::connect(server.socket()).unwrap();
    signal(&server, Signal::STOP);
    for n in 1..=3 {
        assert_eq!(client.write(n * 4096, &[1; 4096]).unwrap(), 0);
        assert_eq!(watched.stat().ops["write"].requests, n);
    }
    signal(&server, Signal::CONT);
    drop(client);
    server.stop();
    assert_eq!(watched.stat().ops["write"].bytes, 3 * 4096, "it stays");
}

#[test]
fn a_keeper_that_hangs_costs_those_who_ask_many_a_bounded_time() {
    let disks = [Disk::new("64M", &[]), Disk::new("64M", &[])];
    let servers = [disks[0].serve(&[]), disks[1].serve(&[])];
    let runs = [&disks[0], &disks[1], &disks[0]].map(run_directory);
    let asks = [Ask::State, Ask::Stat];
    signal(&servers[0], Signal::STOP);
    let start = Instant::now();
    let answers = client::ask_all(&runs, &asks, Duration::from_millis(500));
    assert!(start.elapsed() < Duration::from_secs(5));
    signal(&servers[0], Signal::CONT);
    let kinds = answers
        .iter()
        .map(|a| a.as_ref().err().map(ploop::Error::kind));
    let late = Some(Kind::TimedOut);
    assert_eq!(kinds.collect::<Vec<_>>(), [late, None, late], "{answers:?}");
    let there = answers[1].as_ref().unwrap();
    assert_eq!(there[0]["keeper_pid"], servers[1].pid());
    assert_eq!(there[1]["in_flight"], 0);
    let nobody = client::ask_all(&["/nonexistent"], &asks, SOON);
    assert_eq!(nobody[0].as_ref().unwrap_err().kind(), Kind::NotFound);
    servers.into_iter().for_each(Server::stop);
}

#[test]
fn events_tell_of_a_death_and_end_with_the_disk() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    run_directory(&disk);
    let mut follower = ploopctl()
        .args(["-o", "json", "events", "--follow"])
        .arg(disk.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut next = move || -> Option<Value> {
        let line = lines.next()?.unwrap();
        Some(serde_json::from_str(&line).unwrap())
    };
    let first = next().unwrap();
    assert_eq!(first["disk"]["state"], "serving", "{first}");
    kill(first["disk"]["worker_pid"].as_u64().unwrap() as u32);
    let seen: Vec<Value> = std::iter::from_fn(&mut next)
        .take_while(|e| e["disk"]["state"] != "serving")
        .collect();
    assert!(
        seen.iter().any(|e| e["disk"]["state"] == "recovering"),
        "{seen:?}"
    );
    server.stop();
    while next().is_some() {}
    assert!(follower.wait().unwrap().success());
}

#[test]
fn prometheus_reads_the_counters_over_http() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut client = Client::connect(server.socket()).unwrap();
    assert_eq!(client.write(0, &[1; 4096]).unwrap(), 0);
    let mut stream = UnixStream::connect(run_directory(&disk).join("metrics")).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200"), "{head}");
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    let line = format!(
        "ploop_requests_total{{disk=\"{}\",op=\"write\"}} 1",
        disk.path().display()
    );
    assert!(body.lines().any(|l| l == line), "{body}");
    for line in body.lines().filter(|l| !l.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
}

#[test]
fn a_disk_is_detached_through_its_control_socket() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut hand = Hand::connect(&disk);
    hand.ask("stop");
    eventually("the end", SOON, || {
        listed(&disk.path()).is_none().then_some(())
    });
    drop(server);
    disk.assert_qemu_finds_it_clean();
}

/// Waits until a stopped process has been told to end.
fn is_told_to_end(server: &Server) {
    let status = format!("/proc/{}/status", server.pid());
    eventually("somebody waits for its end", SOON, || {
        let status = fs::read_to_string(&status).ok()?;
        let line = status.lines().find(|line| line.starts_with("ShdPnd:"))?;
        let pending = u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()?;
        (pending >> (Signal::TERM.as_raw() - 1) & 1 == 1).then_some(())
    });
}

#[test]
fn what_a_keeper_leaves_that_dies_while_it_is_waited_for_is_removed_at_once() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let run = run_directory(&disk);
    signal(&server, Signal::STOP);
    let mut umount = Guard::spawn(ploopctl().arg("umount").arg(disk.path()));
    is_told_to_end(&server);
    kill(server.pid());
    let start = Instant::now();
    let status = umount.wait_within(SOON).expect("it ends");
    // Somebody who looks holds the lock for an instant.
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(status.code(), Some(5));
    assert!(!run.exists(), "its run directory is left");
    assert!(!server.socket().exists(), "its socket is left");
}

/// A descriptor of another process; none where that is not allowed.
fn stolen(pid: u64, fd: i32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).ok()
}

#[test]
fn a_worker_that_never_falls_silent_keeps_nobody_from_its_keeper() {
    let test = "a_worker_that_never_falls_silent_keeps_nobody_from_its_keeper";
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut hand = Hand::connect(&disk);
    let worker = hand.ask("state")["worker_pid"].as_u64().unwrap();
    let Some(voice) = stolen(worker, 3) else {
        return common::skip(test, "may not take another process's descriptors");
    };
    let ready = serde_json::to_vec(&Event::Ready {
        size: 64 << 20,
        engine: "poll".into(),
        cache: Cache::None,
        poisoned: false,
        version: 2,
        limit: None,
    });
    let ready = ready.unwrap();
    let say = move || rustix::net::send(&voice, &ready, SendFlags::NOSIGNAL);
    let talk = std::thread::spawn(move || while say().is_ok() {});
    eventually("the keeper hears it", SOON, || {
        (hand.ask("state")["cache"] == "none").then_some(())
    });
    server.stop();
    talk.join().unwrap();
}

#[test]
fn a_worker_that_prints_without_end_keeps_nobody_from_its_keeper() {
    let test = "a_worker_that_prints_without_end_keeps_nobody_from_its_keeper";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let attached = Attached::device_of(&disk);
    let worker = u64::from(attached.worker().unwrap());
    let Some(output) = stolen(worker, 2) else {
        return common::skip(test, "may not take another process's descriptors");
    };
    let print = std::thread::spawn(move || {
        // It takes longer to log a line than to print one.
        let lines = b"x\n".repeat(32 << 10);
        let start = Instant::now();
        let print = || rustix::io::write(&output, &lines).is_ok();
        while print() && start.elapsed() < Duration::from_secs(3) {}
    });
    let mut hand = Hand::connect(&disk);
    for _ in 0..3 {
        assert_eq!(hand.ask("state")["state"], "serving");
    }
    attached.detach();
    print.join().unwrap();
}

#[test]
fn events_that_end_with_anything_but_the_disk_are_a_failure() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let run = run_directory(&disk);
    let follow = || {
        let mut events = ploopctl();
        let mut follower = Guard::spawn(events.args(["events", "--follow"]).arg(disk.path()));
        let mut out = BufReader::new(follower.child.stdout.take().unwrap());
        out.read_line(&mut String::new()).unwrap();
        (follower, out)
    };
    let (mut follower, _out) = follow();
    let crowd: Vec<Hand> = (0..40).map(|_| Hand::connect(&disk)).collect();
    let status = follower.wait_within(SOON).expect("it ends");
    assert_eq!(status.code(), Some(5), "there was no room for it any more");
    drop(crowd);
    let (mut follower, _out) = follow();
    kill(server.pid());
    let status = follower.wait_within(SOON).expect("it ends");
    assert_eq!(status.code(), Some(5), "the keeper was killed");
    run_within(ploopctl().arg("list"), SOON);
    assert!(!run.exists());
}
