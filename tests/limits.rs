//! Limits: what a delta may take on the host, and what its users are told at the end of that.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::files::space_of;
use common::nbd::Client;
use common::process::{eventually, fails, ok};
use common::programs::ploopctl;
use common::serve::Disk;
use common::tree::{descriptor, freeze};
use serde_json::Value;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const PIECE: u64 = 64 << 10;
/// NBD's number for a lack of space.
const NO_SPACE: u32 = 28;
/// What is taken ahead at most, and is under way.
const AHEAD: u64 = 5 * MIB;

fn limit(disk: &Disk, to: &str) -> String {
    ok(ploopctl()
        .arg("limit")
        .arg(disk.path())
        .args(["--delta", to]))
}

fn info(disk: &Disk) -> Value {
    let said = ok(ploopctl().args(["info", "-o", "json"]).arg(disk.path()));
    serde_json::from_str(&said).unwrap()
}

/// What the top takes on the host.
fn top(disk: &Disk) -> u64 {
    let now = descriptor(disk);
    space_of(&disk.path().join(&now.image(now.top()).unwrap().file))
}

/// Writes new clusters from `from` on until one is refused; which that is.
fn fill(guest: &mut Client, from: u64) -> u64 {
    for n in from.. {
        match guest.write(n * PIECE, &[7; PIECE as usize]).unwrap() {
            0 => {}
            NO_SPACE => return n,
            other => panic!("error {other}"),
        }
    }
    unreachable!("a disk has an end")
}

#[test]
fn a_delta_ends_at_its_limit_and_its_users_go_on_when_that_is_raised() {
    for cache in ["none", "writeback"] {
        let disk = Disk::new("256M", &[]);
        assert!(limit(&disk, "24M").contains("no limit"), "what it was");
        assert_eq!(info(&disk)["delta_limit"], 24 * MIB);
        let server = disk.serve(&["--cache", cache]);
        let mut guest = Client::connect(server.socket()).unwrap();
        let first = fill(&mut guest, 0);
        assert_eq!(guest.flush().unwrap(), 0);
        let has = top(&disk);
        assert!(has <= 24 * MIB + AHEAD, "{cache}: {has} bytes");
        assert!(first * PIECE + AHEAD >= 24 * MIB, "{cache}: only {first}");
        // What has its place is written as ever.
        assert_eq!(guest.write(0, &[8; PIECE as usize]).unwrap(), 0);
        // What is given back can be taken again.
        assert_eq!(guest.trim(PIECE, 16 * PIECE as u32).unwrap(), 0);
        assert_eq!(guest.flush().unwrap(), 0);
        let place = first * PIECE;
        eventually("space that came back", Duration::from_secs(20), || {
            assert_eq!(guest.flush().unwrap(), 0);
            let told = guest.write(place, &[9; PIECE as usize]).unwrap();
            (told == 0).then_some(())
        });
        // A snapshot's top begins with all of it.
        freeze(&disk, 0).unwrap();
        let second = fill(&mut guest, first + 1);
        assert!((second - first) * PIECE + AHEAD >= 24 * MIB);
        // At once, with whoever writes.
        assert!(limit(&disk, "40M").contains("was 24M"));
        let third = fill(&mut guest, second);
        assert!((third - second) * PIECE + AHEAD >= 16 * MIB);
        // Growing is not held to it.
        ok(ploopctl().arg("grow").arg(disk.path()).arg("512M"));
        // What was taken ahead was given back for it.
        let fourth = fill(&mut guest, third);
        assert!((fourth - third) * PIECE <= AHEAD, "{third} to {fourth}");
        assert_eq!(guest.write(fourth * PIECE, &[1; 512]).unwrap(), NO_SPACE);
        limit(&disk, "none");
        assert_eq!(guest.write(fourth * PIECE, &[1; 512]).unwrap(), 0);
        assert_eq!(info(&disk)["delta_limit"], Value::Null);
        assert_eq!(guest.read(0, 1).unwrap(), [8]);
        guest.disconnect().unwrap();
        server.stop();
        ok(ploopctl().arg("check").arg(disk.path()));
    }
}

#[test]
fn a_limit_outlives_the_worker_and_says_itself_what_is_wrong_with_one() {
    let disk = Disk::new("64M", &[]);
    let mut none = ploopctl();
    none.arg("limit").arg(disk.path()).args(["--delta", "0"]);
    assert!(fails(&mut none).err.contains("without space"));
    limit(&disk, "8M");
    assert!(limit(&disk, "8M").contains("already"));
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    let first = fill(&mut guest, 0);
    let listed = common::attach::listed(&disk.path()).unwrap();
    assert_eq!(listed["host_low"], true, "{listed}");
    let worker = u32::try_from(listed["worker_pid"].as_u64().unwrap()).unwrap();
    common::attach::kill(worker);
    let mut guest = eventually("another worker", Duration::from_secs(20), || {
        let mut guest = Client::connect(server.socket()).ok()?;
        (guest.flush().ok()? == 0).then_some(guest)
    });
    // What was taken ahead went with it.
    let second = fill(&mut guest, first);
    assert!((second - first) * PIECE <= AHEAD, "{first} to {second}");
    assert!(top(&disk) <= 8 * MIB + AHEAD);
    guest.disconnect().unwrap();
    server.stop();
}
