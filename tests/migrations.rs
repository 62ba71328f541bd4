//! Disks that move between two folders by the programs that do it, over links that are cut, and with
//! sides that are killed. QEMU is asked what arrives.
//!
//! `PLOOP_MIGRATION_CUTS` says how many links are cut, and as many sides are killed.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::files::Random;
use common::point::assert_read_alike;
use common::process::{Guard, Said, eventually, fails, ok, run};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{descriptor, freeze, switch};
use common::{count, have};
use md5::{Digest, Md5};
use ploop_formats::descriptor::LayerFormat;
use ploop_formats::guid::Guid;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// Writes to random places of a disk that is served for it, and freezes it so often.
fn fill(disk: &Disk, size: u64, points: u64, random: &mut Random) {
    let server = disk.serve(&[]);
    for n in 0..=points {
        let mut client = common::nbd::Client::connect(server.socket()).unwrap();
        for _ in 0..12 {
            let len = (1 + random.below(32)) * 4096;
            let at = random.below((size - len) / 512) * 512;
            let done = match random.below(8) {
                0 => client.trim(at, len as u32),
                1 => client.write(at, &vec![0; len as usize]),
                _ => client.write(at, &random.bytes(len as usize)),
            };
            assert_eq!(done.unwrap(), 0);
        }
        client.disconnect().unwrap();
        if n < points {
            freeze(disk, n).unwrap();
        }
    }
    server.stop();
}

/// What every point of a disk reads as, to QEMU and to us.
fn contents(disk: &Disk) -> BTreeMap<Guid, Vec<u8>> {
    let points = descriptor(disk).shots().iter().map(|s| s.guid).collect();
    let points: Vec<Guid> = points;
    let read = |point: Guid| {
        let raw = assert_read_alike(disk, point);
        let digest = Md5::digest(fs::read(&raw).unwrap()).to_vec();
        fs::remove_file(raw).unwrap();
        (point, digest)
    };
    points.into_iter().map(read).collect()
}

/// QEMU has nothing against its images, and we have nothing against the disk.
fn assert_sound(disk: &Disk) {
    ok(ploopctl().arg("check").arg(disk.path()));
    for image in descriptor(disk).images() {
        let chain = descriptor(disk).chain(image.guid).unwrap();
        if chain.last().unwrap().format == LayerFormat::Qcow2 {
            let file = disk.path().join(&image.file);
            ok(tool("qemu-img")
                .args(["check", "-q", "-f", "qcow2"])
                .arg(file));
        }
    }
}

/// A place where no disk is yet.
fn nowhere() -> Disk {
    Disk::around(TempDir::new().unwrap())
}

/// In place of arguments: a disk whose base is a raw image.
const RAW: &[&str] = &["raw"];

/// A disk of 24 MiB with frozen points and a branch.
fn a_disk(args: &[&str], random: &mut Random) -> Disk {
    let disk = match args == RAW {
        true => Disk::new("24M", &[]),
        false => Disk::new("24M", args),
    };
    if args == RAW {
        ok(ploopctl().args(["convert", "--to", "raw"]).arg(disk.path()));
    }
    fill(&disk, 24 * MIB, 2, random);
    let points: Vec<Guid> = descriptor(&disk).shots().iter().map(|s| s.guid).collect();
    let frozen = points.into_iter().find(|guid| *guid != Guid::TOP);
    switch(&disk, frozen.unwrap());
    fill(&disk, 24 * MIB, 1, random);
    disk
}

fn side(path: &Path) -> Value {
    let mut command = ploopctl();
    command.args(["migrate", "resolve", "-o", "json"]).arg(path);
    serde_json::from_str(&ok(&mut command)).unwrap()
}

fn resolve(path: &Path, way: &[&str]) -> Value {
    let mut command = ploopctl();
    command.args(["migrate", "resolve", "-o", "json"]).arg(path);
    serde_json::from_str(&ok(command.args(way))).unwrap()
}

#[test]
fn a_disk_of_every_form_arrives_with_all_its_points() {
    let test = "a_disk_of_every_form_arrives_with_all_its_points";
    if !have(test, &["qemu-img"]) {
        return;
    }
    let mut random = Random::new(1);
    let forms: [&[&str]; 5] = [
        &[],
        &["--format-version", "1", "--cluster", "1M"],
        &["--cluster", "32K", "--preallocate"],
        RAW,
        &["--format", "qcow2"],
    ];
    for form in forms {
        let (source, target) = (a_disk(form, &mut random), nowhere());
        let wanted = contents(&source);
        let mut send = ploopctl();
        send.args(["migrate", "send", "-o", "json"])
            .arg(source.path());
        send.arg("--").arg(common::programs::ploopctl_path());
        let said = ok(send.args(["migrate", "receive"]).arg(target.path()));
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["deltas"], wanted.len(), "{form:?} {said}");
        assert_eq!(contents(&target), wanted, "{form:?}");
        assert_sound(&target);
        // The source is no disk any more, and can go.
        let refused = fails(ploopctl().arg("info").arg(source.path()));
        assert!(
            refused.err.contains("gone to another host"),
            "{}",
            refused.err
        );
        fails(ploopctl().arg("delete").arg(source.path()));
        assert_eq!(side(&source.path())["side"], "moved");
        resolve(&source.path(), &["--delete"]);
        assert!(!source.path().exists());
        // It goes on from where it is now.
        let next = nowhere();
        let mut send = ploopctl();
        send.args(["migrate", "send"]).arg(target.path()).arg("--");
        send.arg(common::programs::ploopctl_path());
        ok(send.args(["migrate", "receive"]).arg(next.path()));
        assert_eq!(contents(&next), wanted, "{form:?}");
    }
}

/// What happens when so many bytes have gone over the link, in both directions together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Cut,
    KillSource,
    KillTarget,
}

/// Two sides and the link between them.
struct Way {
    source: Disk,
    target: Disk,
    wanted: BTreeMap<Guid, Vec<u8>>,
}

impl Way {
    fn new(random: &mut Random) -> Self {
        let form: &[&str] = match random.below(2) {
            0 => &[],
            _ => &["--format", "qcow2"],
        };
        let source = a_disk(form, random);
        Self {
            wanted: contents(&source),
            source,
            target: nowhere(),
        }
    }

    /// One attempt; `blow` comes after so many bytes. What both sides said, and how many bytes went.
    fn attempt(&self, blow: Option<(Blow, u64)>) -> (Option<Said>, Option<Said>, u64) {
        let (near, far) = (self.source.beside("near"), self.target.beside("far"));
        let _ = (fs::remove_file(&near), fs::remove_file(&far));
        let listener = UnixListener::bind(&near).unwrap();
        let mut receive = ploopctl();
        receive.args(["migrate", "receive"]).arg(self.target.path());
        receive.arg(format!("--listen=unix:{}", far.display()));
        let mut receiver = Guard::spawn(&mut receive);
        let mut send = ploopctl();
        send.args(["migrate", "send"]).arg(self.source.path());
        send.arg(format!("--to=unix:{}", near.display()));
        let mut sender = Guard::spawn(&mut send);
        let (here, _) = listener.accept().unwrap();
        let there = eventually("the receiver listens", PATIENCE, || {
            UnixStream::connect(&far).ok()
        });
        let went = Arc::new(AtomicU64::new(0));
        let limit = blow.map_or(u64::MAX, |(_, after)| after);
        let relays = [(&here, &there), (&there, &here)].map(|(from, to)| {
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let went = Arc::clone(&went);
            thread::spawn(move || relay(from, to, &went, limit))
        });
        if let Some((blow, after)) = blow {
            let began = Instant::now();
            while went.load(Ordering::SeqCst) < after
                && began.elapsed() < PATIENCE
                && sender.child.try_wait().unwrap().is_none()
            {
                thread::sleep(Duration::from_micros(50));
            }
            match blow {
                Blow::Cut => {}
                Blow::KillSource => sender.child.kill().unwrap(),
                Blow::KillTarget => receiver.child.kill().unwrap(),
            }
            // What was sent before a blow may arrive.
            let _ = (
                here.shutdown(Shutdown::Both),
                there.shutdown(Shutdown::Both),
            );
        }
        let ended = [sender, receiver].map(|mut guard| end(&mut guard));
        relays.into_iter().for_each(|relay| relay.join().unwrap());
        let [sent, received] = ended;
        (sent, received, went.load(Ordering::SeqCst))
    }

    fn sides(&self) -> (Option<String>, Option<String>) {
        let side = |path: PathBuf| {
            let mut command = ploopctl();
            command.args(["migrate", "resolve", "-o", "json"]).arg(path);
            let said = run(&mut command);
            let said: Option<Value> = serde_json::from_str(&said.out).ok();
            said.and_then(|said| Some(said["side"].as_str()?.to_string()))
        };
        (side(self.source.path()), side(self.target.path()))
    }

    /// What a human does who reads what `resolve` says; ends with the disk on one side.
    fn lead_out(&self, random: &mut Random) {
        let (source, target) = (self.source.path(), self.target.path());
        let word = |path: &Path| side(path)["word"].as_str().unwrap().to_string();
        match random.below(2) {
            0 => {
                resolve(&target, &["--go", &word(&source)]);
                assert_eq!(
                    resolve(&source, &["--gone", &word(&target)])["side"],
                    "moved"
                );
            }
            _ => {
                let go = word(&source);
                let said = resolve(&target, &["--discard"]);
                let back = said["word"].as_str().unwrap();
                fails(
                    ploopctl()
                        .args(["migrate", "resolve", "--go", &go])
                        .arg(&target),
                );
                assert_eq!(resolve(&source, &["--back", back])["side"], "usable");
            }
        }
    }
}

fn end(guard: &mut Guard) -> Option<Said> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = guard.wait_within(PATIENCE)?;
    guard.child.stdout.take()?.read_to_end(&mut out).ok()?;
    guard.child.stderr.take()?.read_to_end(&mut err).ok()?;
    let [out, err] = [out, err].map(|said| String::from_utf8_lossy(&said).into_owned());
    Some(Said { status, out, err })
}

/// Passes bytes on until `limit` have gone both ways together.
fn relay(mut from: UnixStream, mut to: UnixStream, went: &AtomicU64, limit: u64) {
    let mut buf = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buf) {
        let before = went.fetch_add(n as u64, Ordering::SeqCst);
        let left = limit.saturating_sub(before).min(n as u64) as usize;
        if to.write_all(&buf[..left]).is_err() || left < n {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn a_link_that_is_cut_anywhere_goes_on_where_it_ended() {
    let test = "a_link_that_is_cut_anywhere_goes_on_where_it_ended";
    if !have(test, &["qemu-img"]) {
        return;
    }
    let (cuts, mut random) = (count("PLOOP_MIGRATION_CUTS", 8), Random::new(2));
    let (_, _, all) = Way::new(&mut Random::new(2)).attempt(None);
    let way = Way::new(&mut Random::new(2));
    let mut done = 0;
    while done < cuts {
        let (sent, received, _) = way.attempt(Some((Blow::Cut, random.below(all / 2))));
        let (sent, received) = (sent.unwrap(), received.unwrap());
        if sent.status.success() && received.status.success() {
            break;
        }
        let doubt = sent.err.contains("migrate resolve");
        assert!(
            doubt || sent.err.contains("goes on where this ended"),
            "{}",
            sent.err
        );
        done += 1;
        if way.sides().0.as_deref() != Some("usable") {
            break;
        }
    }
    match way.sides() {
        (Some(source), _) if source == "usable" => {
            let (sent, received, _) = way.attempt(None);
            let (sent, received) = (sent.unwrap(), received.unwrap());
            assert!(sent.status.success(), "{}", sent.err);
            assert!(received.status.success(), "{}", received.err);
        }
        (Some(source), Some(_)) if source == "moved" => {}
        _ => {
            let go = side(&way.source.path())["word"]
                .as_str()
                .unwrap()
                .to_string();
            if side(&way.target.path())["side"] == "ready" {
                resolve(&way.target.path(), &["--go", &go]);
            }
        }
    }
    println!("COUNT: {test}: {done} links cut");
    assert_eq!(contents(&way.target), way.wanted);
    assert_sound(&way.target);
}

#[test]
fn whoever_is_killed_one_side_at_most_can_be_used_and_one_has_all() {
    let test = "whoever_is_killed_one_side_at_most_can_be_used_and_one_has_all";
    if !have(test, &["qemu-img"]) {
        return;
    }
    let (kills, mut random) = (count("PLOOP_MIGRATION_CUTS", 8), Random::new(3));
    let mut found: BTreeMap<String, u64> = BTreeMap::new();
    // The last bytes are those of the handing over.
    let (_, _, bytes) = Way::new(&mut Random::new(4)).attempt(None);
    for n in 0..kills {
        let way = Way::new(&mut Random::new(4));
        let after = match n % 3 {
            0 => random.below(bytes),
            _ => bytes - random.below(400),
        };
        let blow = [Blow::KillSource, Blow::KillTarget, Blow::Cut][random.below(3) as usize];
        way.attempt(Some((blow, after)));
        let sides = way.sides();
        *found.entry(format!("{sides:?}")).or_default() += 1;
        let (source, target) = (sides.0.unwrap(), sides.1.unwrap_or_default());
        match (source.as_str(), target.as_str()) {
            ("usable", "usable") => panic!("both can be used"),
            ("usable", _) => assert_eq!(contents(&way.source), way.wanted),
            (_, "usable") => assert_eq!(contents(&way.target), way.wanted),
            ("sealed", "ready") => {
                way.lead_out(&mut random);
                let there = [&way.source, &way.target]
                    .into_iter()
                    .filter(|disk| side(&disk.path())["side"] == "usable");
                let there: Vec<&Disk> = there.collect();
                assert_eq!(there.len(), 1);
                assert_eq!(contents(there[0]), way.wanted);
            }
            sides => panic!("nobody has the disk: {sides:?}"),
        }
    }
    println!("COUNT: {test}: {kills} blows, {found:?}");
}

#[test]
fn what_is_not_a_migration_is_refused_and_loses_nothing() {
    let mut random = Random::new(5);
    let source = a_disk(&[], &mut random);
    let target = nowhere();
    // Nothing comes, or something else.
    let junk: [&[u8]; 3] = [b"", b"GET / HTTP/1.1\r\n\r\n", &[0xFF; 4096]];
    for junk in junk {
        let mut receive = ploopctl();
        receive.args(["migrate", "receive"]).arg(target.path());
        let mut receiver = Guard::spawn(receive.stdin(std::process::Stdio::piped()));
        let _ = receiver.child.stdin.take().unwrap().write_all(junk);
        let said = end(&mut receiver).unwrap();
        assert!(
            !said.status.success() && !said.err.is_empty(),
            "{}",
            said.err
        );
        assert!(!target.path().exists());
    }
    // A place that is somebody's.
    fs::create_dir(target.path()).unwrap();
    fs::write(target.path().join("mine"), "x").unwrap();
    let mut receive = ploopctl();
    let refused = fails(receive.args(["migrate", "receive"]).arg(target.path()));
    assert!(refused.err.contains("not empty"), "{}", refused.err);
    assert_eq!(fs::read(target.path().join("mine")).unwrap(), b"x");
    // A disk that is attached, one that is marked, and a link that is nobody's.
    let server = source.serve(&[]);
    let mut send = ploopctl();
    send.args(["migrate", "send"]).arg(source.path());
    let refused = fails(send.args(["--", "cat"]));
    assert_eq!(refused.status.code(), Some(4), "{}", refused.err);
    server.stop();
    let mut send = ploopctl();
    send.args(["migrate", "send"]).arg(source.path());
    let refused = fails(send.args(["--", "cat"]));
    assert!(
        refused.err.contains("the disk stays here"),
        "{}",
        refused.err
    );
    assert_eq!(side(&source.path())["side"], "usable");
    fails(
        ploopctl()
            .args(["migrate", "resolve", "--go", "x"])
            .arg(source.path()),
    );
    fails(
        ploopctl()
            .args(["migrate", "resolve", "--back", "x"])
            .arg(source.path()),
    );
    fails(
        ploopctl()
            .args(["migrate", "resolve", "--discard"])
            .arg(source.path()),
    );
    fails(
        ploopctl()
            .args(["migrate", "resolve", "--delete"])
            .arg(source.path()),
    );
    ok(ploopctl().arg("check").arg(source.path()));
}
