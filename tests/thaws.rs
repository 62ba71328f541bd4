//! Thaws: a disk that is kept as it is for somebody does not change, can be read, and goes on
//! whatever becomes of whoever froze it.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{
    Attached, assert_fsck_clean, can_mount, child_of, kill, listed, run_directory,
};
use common::have;
use common::load::{SetOnDrop, beside_load};
use common::nbd::Client;
use common::process::{Guard, eventually, ok, ok_within, run};
use common::programs::{ploopctl, tool};
use common::serve::{Disk, Server};
use ploop::client::Remote;
use ploop::serve::supervise::control::TrackAsk;
use ploop::tracker::Name;
use ploop::{Error, Kind, Result};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const MINUTE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// Longer than a write takes that nobody holds.
const WHILE: Duration = Duration::from_millis(700);
/// What a disk may take to go on. Others use this machine as well.
const SOON: Duration = Duration::from_secs(1);

fn connect(disk: &Disk) -> Remote {
    Remote::connect(&run_directory(&disk.path())).unwrap()
}

/// Freezes a disk whose worker may just begin to serve.
fn freeze(disk: &Disk, most: Duration) -> (Remote, Value) {
    let mut remote = connect(disk);
    let said = eventually("a frozen disk", PATIENCE, || match remote.freeze(most) {
        Err(e) if e.kind() == Kind::Busy => None,
        said => Some(said.unwrap()),
    });
    assert_eq!(is_frozen(disk), Some(true));
    (remote, said)
}

fn await_worker(disk: &Disk) {
    eventually("a worker", PATIENCE, || {
        (listed(&disk.path())?["state"] == "serving").then_some(())
    });
}

fn is_frozen(disk: &Disk) -> Option<bool> {
    listed(&disk.path())?["frozen"].as_bool()
}

fn kind<T: std::fmt::Debug>(refused: Result<T>) -> Kind {
    refused.unwrap_err().kind()
}

/// Writes that were begun on the disk and answered, of all kinds.
fn changes(remote: &mut Remote) -> u64 {
    let ops = remote.stat().unwrap().counters.ops;
    let changing = ["write", "zero", "discard"];
    changing.iter().map(|op| ops[*op].requests).sum()
}

/// Everything that a device holds, not from memory of this kernel.
fn content_of(device: &Path) -> Vec<u8> {
    let mut dd = tool("dd");
    dd.args(["bs=1M", "iflag=direct", "status=none"]);
    let said = dd.arg(format!("if={}", device.display())).output().unwrap();
    assert!(said.status.success(), "{said:?}");
    said.stdout
}

/// Something that is done beside the test, once.
struct Doing<T>(JoinHandle<(T, Instant)>);

impl<T: Send + 'static> Doing<T> {
    fn begin(work: impl FnOnce() -> T + Send + 'static) -> Self {
        Self(thread::spawn(move || (work(), Instant::now())))
    }

    fn is_waiting(&self) -> bool {
        !self.0.is_finished()
    }

    fn ends(self) {
        self.end();
    }

    /// What came of it, and when.
    fn end(self) -> (T, Instant) {
        eventually("the end of what waited", PATIENCE, || {
            self.0.is_finished().then_some(())
        });
        self.0.join().unwrap()
    }
}

/// Writes a file durably.
fn write_file(folder: &Path, name: &str) -> Doing<()> {
    let path = folder.join(name);
    Doing::begin(move || {
        let mut file = File::create(path).unwrap();
        file.write_all(&[7; 9000]).unwrap();
        file.sync_all().unwrap();
    })
}

/// Writes a block past the kernel's memory of a device.
fn write_block(device: &Path, at: u64, byte: u8) -> Doing<()> {
    let device = device.to_path_buf();
    Doing::begin(move || {
        let mut options = File::options();
        let direct = OFlags::DIRECT.bits() as i32;
        let file = options
            .write(true)
            .custom_flags(direct)
            .open(device)
            .unwrap();
        let mut block = vec![0u8; 8192];
        let start = block.as_ptr().align_offset(4096);
        block[start..start + 4096].fill(byte);
        file.write_all_at(&block[start..start + 4096], at).unwrap();
    })
}

/// Asks for something over a connection of its own.
fn over_nbd(
    server: &Server,
    work: impl FnOnce(&mut Client) -> io::Result<u32> + Send + 'static,
) -> Doing<()> {
    let mut client = Client::connect(server.socket()).unwrap();
    Doing::begin(move || assert_eq!(work(&mut client).unwrap(), 0))
}

/// What was copied of a frozen device is a sound file system.
fn assert_copy_is_sound(fs: &str, copy: &Path, mountpoint: &Path) {
    match fs {
        // All of its journal is in its place.
        "ext4" => drop(ok_within(
            tool("e2fsck").args(["-f", "-n"]).arg(copy),
            PATIENCE,
        )),
        // It is frozen with a log to be looked through by who mounts it.
        _ => {
            fs::create_dir_all(mountpoint).unwrap();
            ok(tool("mount")
                .args(["-o", "loop,nouuid"])
                .arg(copy)
                .arg(mountpoint));
            ok(tool("umount").arg(mountpoint));
            ok_within(tool("xfs_repair").arg("-n").arg(copy), PATIENCE);
        }
    }
}

fn a_mounted_file_system_stays_as_it_is_under_load(test: &str, fs: &str, size: &str) {
    if !can_mount(test) || !have(test, &["fio", &format!("mkfs.{fs}"), "e2fsck"]) {
        return;
    }
    let disk = Disk::with_fs(size, fs, &[]);
    let attached = Attached::mounted(&disk, &[]);
    fs::write(attached.folder().join("known"), vec![5; 1 << 20]).unwrap();
    let (freezes, copy) = (3, disk.beside("copy"));
    let (waits, loads) = beside_load(attached.folder(), || {
        let mut waits = Vec::new();
        for round in 0..freezes {
            thread::sleep(Duration::from_millis(1500));
            let (mut remote, said) = freeze(&disk, MINUTE);
            assert_eq!(said["filesystem"], true, "{said}");
            let before = changes(&mut remote);
            let writing = write_file(attached.folder(), &format!("file-{round}"));
            let first = content_of(&attached.device);
            assert_eq!(
                fs::read(attached.folder().join("known")).unwrap(),
                vec![5; 1 << 20]
            );
            thread::sleep(WHILE);
            let second = content_of(&attached.device);
            assert!(first == second, "round {round}: it changed");
            assert!(writing.is_waiting(), "round {round}: a file was written");
            assert_eq!(
                changes(&mut remote),
                before,
                "round {round}: writes were answered"
            );
            fs::write(&copy, second).unwrap();
            let said = remote.thaw().unwrap();
            assert!(
                said["frozen_us"].as_u64() >= Some(WHILE.as_micros() as u64),
                "{said}"
            );
            let thawed = Instant::now();
            let (_, written) = writing.end();
            waits.push(written.saturating_duration_since(thawed));
            assert_eq!(is_frozen(&disk), Some(false));
            assert_copy_is_sound(fs, &copy, &disk.beside("copied"));
        }
        waits
    });
    println!(
        "COUNT: {test}: {freezes} freezes under {loads} verified rounds; writes waited {waits:?} more"
    );
    attached.detach();
    assert_fsck_clean(fs, &disk);
}

#[test]
fn a_frozen_ext4_does_not_change_is_clean_and_goes_on_under_verified_load() {
    let test = "a_frozen_ext4_does_not_change_is_clean_and_goes_on_under_verified_load";
    a_mounted_file_system_stays_as_it_is_under_load(test, "ext4", "256M");
}

#[test]
fn a_frozen_xfs_does_not_change_is_sound_and_goes_on_under_verified_load() {
    let test = "a_frozen_xfs_does_not_change_is_sound_and_goes_on_under_verified_load";
    a_mounted_file_system_stays_as_it_is_under_load(test, "xfs", "384M");
}

/// A change that was answered.
struct Answered {
    asked: Instant,
    answered: Instant,
}

/// Changes something again and again until it is told to stop.
fn change_on(socket: &Path, kind: u64, stop: &AtomicBool) -> Vec<Answered> {
    let mut client = Client::connect(socket).unwrap();
    let mut journal = Vec::new();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let (asked, at) = (Instant::now(), 4 * MIB * kind + n % 64 * 65536);
        let error = match kind {
            0 => client.zero(at, 65536),
            1 => client.trim(at, 65536),
            _ => client.write(at, &[n as u8; 65536]),
        };
        assert_eq!(error.unwrap(), 0);
        journal.push(Answered {
            asked,
            answered: Instant::now(),
        });
        n += 1;
    }
    journal
}

#[test]
fn while_a_served_disk_is_frozen_no_change_is_answered_and_reads_and_flushes_are() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let stop = AtomicBool::new(false);
    let (frozen, journals) = thread::scope(|scope| {
        let changer = |kind| {
            let (socket, stop) = (server.socket(), &stop);
            scope.spawn(move || change_on(socket, kind, stop))
        };
        let changers: Vec<_> = (0..4).map(changer).collect();
        let end = SetOnDrop(&stop);
        let mut frozen = Vec::new();
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(100));
            let (mut remote, said) = freeze(&disk, MINUTE);
            assert_eq!(said["filesystem"], false, "{said}");
            let began = Instant::now();
            let mut reader = Client::connect(server.socket()).unwrap();
            let first = reader.read(0, 16 << 20).unwrap();
            assert_eq!(reader.flush().unwrap(), 0);
            thread::sleep(Duration::from_millis(100));
            assert!(first == reader.read(0, 16 << 20).unwrap(), "it changed");
            frozen.push((began, Instant::now()));
            remote.thaw().unwrap();
        }
        thread::sleep(Duration::from_millis(200));
        drop(end);
        let journals: Vec<_> = changers.into_iter().map(|c| c.join().unwrap()).collect();
        (frozen, journals)
    });
    let mut waited = 0;
    for (kind, journal) in journals.iter().enumerate() {
        for (began, ended) in &frozen {
            let within = |change: &Answered| change.answered > *began && change.answered < *ended;
            assert!(
                !journal.iter().any(within),
                "a change of kind {kind} was answered"
            );
            let over = |change: &Answered| change.asked < *began && change.answered > *ended;
            waited += journal.iter().filter(|change| over(change)).count();
        }
        assert!(journal.last().unwrap().answered > frozen.last().unwrap().1);
    }
    let all: usize = journals.iter().map(Vec::len).sum();
    println!("COUNT: 10 freezes, {all} changes, {waited} of them waited");
    assert!(waited >= 30, "{waited}");
    server.stop();
}

fn b0() -> Name {
    "b0".parse().unwrap()
}

/// The blocks of 64 KiB that a new generation has.
fn sealed(remote: &mut Remote) -> Vec<u64> {
    let began = Instant::now();
    let said = remote.track(TrackAsk::Seal { name: b0() }).unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    let generation = said["generation"].as_u64().unwrap();
    let said = remote.track(TrackAsk::Extents {
        name: b0(),
        generation,
        from: 0,
        max: None,
    });
    let said = said.unwrap();
    let extents = said["extents"].as_array().unwrap().iter();
    let blocks = extents.flat_map(|extent| {
        let first = extent["offset"].as_u64().unwrap() >> 16;
        first..first + (extent["length"].as_u64().unwrap() >> 16)
    });
    blocks.collect()
}

#[test]
fn a_set_is_sealed_while_writers_wait_and_has_what_was_written_before() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let (mut before, mut client) = (connect(&disk), Client::connect(server.socket()).unwrap());
    let start = TrackAsk::Start {
        name: b0(),
        granularity: None,
    };
    before.track(start).unwrap();
    let ack = TrackAsk::Ack {
        name: b0(),
        generation: 0,
    };
    before.track(ack).unwrap();
    for block in [3, 5, 6] {
        assert_eq!(client.write(block << 16, &[1; 65536]).unwrap(), 0);
    }
    let (mut remote, _) = freeze(&disk, Duration::from_secs(30));
    let writers: Vec<_> = (100..108)
        .map(|block: u64| over_nbd(&server, move |c| c.write(block << 16, &[2; 65536])))
        .collect();
    thread::sleep(WHILE);
    assert_eq!(sealed(&mut remote), [3, 5, 6]);
    assert_eq!(sealed(&mut before), [0u64; 0], "nothing was written since");
    assert!(writers.iter().all(Doing::is_waiting));
    remote.thaw().unwrap();
    writers.into_iter().for_each(Doing::ends);
    assert_eq!(sealed(&mut remote), (100..108).collect::<Vec<_>>());
    server.stop();
}

/// Hears what the end of a freeze is told by.
fn end_of(remote: &mut Remote) -> Value {
    eventually("the end of a freeze", PATIENCE, || remote.thawed().unwrap())
}

#[test]
fn a_frozen_disk_goes_on_when_the_time_is_over_and_says_so() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    for (time, is_told) in [(500, true), (900, false)] {
        let time = Duration::from_millis(time);
        let asked = Instant::now();
        let (mut remote, _) = freeze(&disk, time);
        let frozen = Instant::now();
        let writing = over_nbd(&server, |c| c.write(0, &[1; 4096]));
        let (_, written) = writing.end();
        assert!(written - asked >= time, "{:?}", written - asked);
        assert!(written - frozen < time + SOON, "{:?}", written - frozen);
        if is_told {
            let said = end_of(&mut remote);
            assert_eq!(
                (&said["event"], &said["why"]),
                (&json!("thawed"), &json!("timeout"))
            );
            assert_eq!(said["disk"]["frozen"], false, "{said}");
        }
        let refused: Error = remote.thaw().unwrap_err();
        assert_eq!(refused.kind(), Kind::TimedOut);
        assert!(
            refused.to_string().contains("its time was over"),
            "{refused}"
        );
        // It may do so again.
        remote.freeze(time).unwrap();
        remote.thaw().unwrap();
        assert_eq!(kind(remote.thaw()), Kind::Invalid);
    }
    for bad in [Duration::ZERO, Duration::from_secs(601)] {
        assert_eq!(kind(connect(&disk).freeze(bad)), Kind::Invalid);
    }
    server.stop();
}

#[test]
fn a_file_system_goes_on_when_the_time_is_over_or_its_freezer_is_killed() {
    let test = "a_file_system_goes_on_when_the_time_is_over_or_its_freezer_is_killed";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::with_fs("128M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (mut remote, _) = freeze(&disk, Duration::from_millis(800));
    let frozen = Instant::now();
    let writing = write_file(attached.folder(), "a");
    let (_, written) = writing.end();
    assert!(written - frozen < Duration::from_millis(800) + SOON);
    assert_eq!(end_of(&mut remote)["why"], "timeout");

    let (mut remote, _) = freeze(&disk, MINUTE);
    let writing = write_file(attached.folder(), "b");
    thread::sleep(WHILE);
    assert!(writing.is_waiting());
    let freezer = eventually("a freezer", PATIENCE, || {
        child_of(attached.keeper, "--still")
    });
    kill(freezer);
    let killed = Instant::now();
    let (_, written) = writing.end();
    assert!(written - killed < SOON, "{:?}", written - killed);
    assert_eq!(end_of(&mut remote)["why"], "file-system");
    assert_eq!(kind(remote.thaw()), Kind::Io);

    // What somebody else has frozen is busy, and left frozen.
    ok(tool("fsfreeze").arg("-f").arg(attached.folder()));
    let refused = kind(remote.freeze(MINUTE));
    ok(tool("fsfreeze").arg("-u").arg(attached.folder()));
    assert_eq!(refused, Kind::Busy);
    attached.detach();
}

/// A process that does nothing for as long as this is there.
struct Stopped(Pid);

impl Stopped {
    fn new(process: u32) -> Self {
        let process = Pid::from_raw(process.try_into().unwrap()).unwrap();
        kill_process(process, Signal::STOP).unwrap();
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

#[test]
fn a_disk_whose_keeper_hangs_goes_on_when_the_time_is_over() {
    let test = "a_disk_whose_keeper_hangs_goes_on_when_the_time_is_over";
    let time = Duration::from_millis(1500);
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let (mut remote, _) = freeze(&disk, time);
    let frozen = Instant::now();
    let writing = over_nbd(&server, |c| c.write(0, &[1; 4096]));
    let stopped = Stopped::new(server.pid());
    let (_, written) = writing.end();
    assert!(written - frozen < time + SOON, "{:?}", written - frozen);
    drop(stopped);
    assert_eq!(kind(remote.thaw()), Kind::TimedOut);
    server.stop();

    if !can_mount(test) {
        return;
    }
    let disk = Disk::with_fs("128M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (mut remote, _) = freeze(&disk, time);
    let frozen = Instant::now();
    let writing = write_file(attached.folder(), "file");
    let stopped = Stopped::new(attached.keeper);
    let (_, written) = writing.end();
    assert!(written - frozen < time + SOON, "{:?}", written - frozen);
    drop(stopped);
    assert_eq!(kind(remote.thaw()), Kind::TimedOut);
    attached.detach();
}

#[test]
fn what_a_frozen_disk_holds_is_durable() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut client = Client::connect(server.socket()).unwrap();
    assert_eq!(client.write(MIB, &[6; 65536]).unwrap(), 0);
    let (remote, _) = freeze(&disk, MINUTE);
    // What was answered and is not durable ends with the keeper.
    server.kill();
    drop((client, remote));
    let server = disk.serve(&[]);
    let mut client = Client::connect(server.socket()).unwrap();
    assert!(client.read(MIB, 65536).unwrap() == [6; 65536]);
    drop(client);
    server.stop();
}

/// `ploopctl freeze DISK --timeout 60s -- sleep 60`, once the disk is frozen.
fn sleep_on(disk: &Disk) -> Guard {
    await_worker(disk);
    let mut command = ploopctl();
    command.arg("freeze").arg(disk.path());
    let freezing = Guard::spawn(command.args(["--timeout", "60s", "--", "sleep", "60"]));
    eventually("a frozen disk", PATIENCE, || {
        is_frozen(disk).filter(|frozen| *frozen)
    });
    freezing
}

/// Kills it, and what it has started.
fn cut(freezing: &mut Guard) -> Instant {
    let pid = freezing.child.id();
    let command = eventually("the command", PATIENCE, || child_of(pid, "60"));
    kill(pid);
    let killed = Instant::now();
    kill(command);
    freezing.child.wait().unwrap();
    killed
}

#[test]
fn a_disk_goes_on_within_a_second_when_whoever_froze_it_is_killed() {
    let test = "a_disk_goes_on_within_a_second_when_whoever_froze_it_is_killed";
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut freezing = sleep_on(&disk);
    let writing = over_nbd(&server, |c| c.write(0, &[1; 4096]));
    thread::sleep(WHILE);
    assert!(writing.is_waiting());
    let killed = cut(&mut freezing);
    let (_, written) = writing.end();
    assert!(written - killed < SOON, "{:?}", written - killed);
    server.stop();

    if !can_mount(test) {
        return;
    }
    let disk = Disk::with_fs("128M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let mut freezing = sleep_on(&disk);
    let writing = write_file(attached.folder(), "file");
    thread::sleep(WHILE);
    assert!(writing.is_waiting());
    let killed = cut(&mut freezing);
    let (_, written) = writing.end();
    assert!(written - killed < SOON, "{:?}", written - killed);
    attached.detach();
}

#[test]
fn a_device_that_is_used_raw_is_read_while_it_is_frozen_and_a_killed_worker_thaws_it() {
    let test = "a_device_that_is_used_raw_is_read_while_it_is_frozen_and_a_killed_worker_thaws_it";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let attached = Attached::device_of(&disk);
    write_block(&attached.device, 0, 1).end();
    for round in 2..6u8 {
        let (mut remote, said) = freeze(&disk, MINUTE);
        assert_eq!(said["filesystem"], false, "{said}");
        let writers: Vec<_> = (0..8)
            .map(|n| write_block(&attached.device, n << 16, round))
            .collect();
        thread::sleep(WHILE);
        assert!(content_of(&attached.device)[..4096] == [round - 1; 4096]);
        assert!(writers.iter().all(Doing::is_waiting));
        attached.kill_worker();
        writers.into_iter().for_each(Doing::ends);
        let found = content_of(&attached.device);
        assert!(
            (0..8).all(|n| found[n << 16..][..4096] == [round; 4096]),
            "round {round}"
        );
        assert_eq!(end_of(&mut remote)["why"], "worker");
        assert_eq!(is_frozen(&disk), Some(false));
        let refused = remote.thaw().unwrap_err();
        assert!(refused.to_string().contains("worker died"), "{refused}");
    }
    attached.detach();
}

#[test]
fn a_file_system_goes_on_when_the_worker_dies_under_it() {
    let test = "a_file_system_goes_on_when_the_worker_dies_under_it";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::with_fs("128M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    for round in 0..4 {
        let (mut remote, _) = freeze(&disk, MINUTE);
        let writing = write_file(attached.folder(), &format!("file-{round}"));
        thread::sleep(WHILE);
        assert!(writing.is_waiting());
        attached.kill_worker();
        writing.end();
        assert_eq!(end_of(&mut remote)["why"], "worker");
    }
    attached.detach();
    assert_fsck_clean("ext4", &disk);
}

#[test]
fn a_frozen_disk_is_not_changed_otherwise_and_one_that_is_being_changed_is_not_frozen() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut client = Client::connect(server.socket()).unwrap();
    for at in 0..16 {
        assert_eq!(client.write(at * MIB, &[1; MIB as usize]).unwrap(), 0);
    }
    assert_eq!(client.trim(0, 8 * MIB as u32).unwrap(), 0);
    assert_eq!(client.flush().unwrap(), 0);
    let (mut remote, _) = freeze(&disk, MINUTE);
    let mut other = connect(&disk);
    assert_eq!(kind(other.snapshot(None, false)), Kind::Busy);
    assert_eq!(kind(other.compact(None, &mut |_| Ok(()))), Kind::Busy);
    assert_eq!(kind(other.limit(None)), Kind::Busy);
    assert_eq!(kind(other.freeze(MINUTE)), Kind::Busy);
    assert_eq!(kind(remote.freeze(MINUTE)), Kind::Busy);
    assert_eq!(kind(other.thaw()), Kind::Invalid, "it is not the other's");
    assert_eq!(is_frozen(&disk), Some(true));
    remote.thaw().unwrap();
    other.snapshot(None, false).unwrap();

    for at in 16..32 {
        assert_eq!(client.write(at * MIB, &[1; MIB as usize]).unwrap(), 0);
    }
    assert_eq!(client.trim(16 * MIB, 8 * MIB as u32).unwrap(), 0);
    assert_eq!(client.flush().unwrap(), 0);
    let mut refused = None;
    let ended = other.compact(Some(256 << 10), &mut |far| {
        if far.is_some() {
            refused = Some(kind(remote.freeze(MINUTE)));
            return Err(Error::new(Kind::Cancelled, "enough"));
        }
        Ok(())
    });
    assert_eq!(kind(ended), Kind::Cancelled);
    assert_eq!(refused, Some(Kind::Busy));
    server.stop();
}

#[test]
fn a_frozen_disk_that_is_to_end_ends_and_who_waits_is_answered() {
    let test = "a_frozen_disk_that_is_to_end_ends_and_who_waits_is_answered";
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let (remote, _) = freeze(&disk, MINUTE);
    let writing = over_nbd(&server, |c| c.write(0, &[9; 4096]));
    thread::sleep(WHILE);
    server.stop();
    writing.end();
    drop(remote);
    let server = disk.serve(&[]);
    let mut client = Client::connect(server.socket()).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [9; 4096]);
    drop(client);
    server.stop();

    if !can_mount(test) {
        return;
    }
    // What is mounted and frozen is in use.
    let disk = Disk::with_fs("128M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (mut remote, _) = freeze(&disk, MINUTE);
    let refused = run(ploopctl().arg("umount").arg(attached.folder()));
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    remote.thaw().unwrap();
    attached.detach();
}

#[test]
fn who_follows_a_disk_is_told_that_it_is_frozen_and_why_it_goes_on() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let (mut remote, _) = freeze(&disk, MINUTE);
    remote.thaw().unwrap();
    let mut command = ploopctl();
    let mut following = Guard::spawn(command.args(["events", "-f"]).arg(disk.path()));
    let lines = BufReader::new(following.child.stdout.take().unwrap()).lines();
    let (said, heard) = mpsc::channel();
    thread::spawn(move || lines.for_each(|line| drop(said.send(line.unwrap()))));
    let hear = |wanted: &str| {
        while !heard.recv_timeout(PATIENCE).unwrap().contains(wanted) {}
    };
    hear("serving");
    remote.freeze(MINUTE).unwrap();
    hear(" frozen");
    let list = ok(ploopctl().arg("list"));
    let row = list
        .lines()
        .find(|line| line.ends_with(disk.path().to_str().unwrap()));
    assert!(row.unwrap().contains(" frozen "), "{list}");
    remote.thaw().unwrap();
    hear("(asked)");
    remote.freeze(MINUTE).unwrap();
    drop(remote);
    hear("(hang-up)");
    let worker = child_of(server.pid(), "--worker").unwrap();
    let (_remote, _) = freeze(&disk, MINUTE);
    kill(worker);
    hear("(worker)");
    drop(following);
    server.stop();
}

/// `ploopctl freeze DISK ARGS`.
fn freezing(disk: &Disk, args: &[&str]) -> Command {
    let mut command = ploopctl();
    command.arg("freeze").arg(disk.path()).args(args);
    command
}

#[test]
fn a_command_is_run_on_a_frozen_disk_and_its_end_is_that_of_ours() {
    let disk = Disk::new("64M", &[]);
    let not_attached = run(&mut freezing(&disk, &["--timeout", "10s", "--", "true"]));
    assert_eq!(not_attached.status.code(), Some(11), "{not_attached:?}");
    let server = disk.serve(&[]);
    await_worker(&disk);
    let sh = |script: &str| {
        run(&mut freezing(
            &disk,
            &["--timeout", "30s", "--", "sh", "-c", script],
        ))
    };
    let list = format!(
        "{} list -o json",
        common::programs::ploopctl_path().display()
    );
    let said = sh(&format!(
        "echo $PLOOP_DISK; echo ${{PLOOP_DEVICE-none}}; {list}; exit 7"
    ));
    assert_eq!(said.status.code(), Some(7), "{said:?}");
    assert!(
        said.out
            .starts_with(&format!("{}\nnone\n", disk.path().display())),
        "{said:?}"
    );
    assert!(said.out.contains("\"health\":\"frozen\""), "{said:?}");
    assert_eq!(is_frozen(&disk), Some(false));
    assert_eq!(sh("kill -9 $$").status.code(), Some(137));
    for (program, code) in [("/no/such/program", 127), ("/etc/passwd", 126)] {
        let said = run(&mut freezing(&disk, &["--timeout", "30s", "--", program]));
        assert_eq!(said.status.code(), Some(code), "{said:?}");
        assert!(said.err.contains(program), "{said:?}");
    }
    assert_eq!(is_frozen(&disk), Some(false));
    for bad in [
        &["--", "true"][..],
        &["--timeout", "10", "--", "true"],
        &["--timeout", "10s"],
    ] {
        assert_eq!(
            run(&mut freezing(&disk, bad)).status.code(),
            Some(2),
            "{bad:?}"
        );
    }
    let said = run(&mut freezing(
        &disk,
        &["-o", "json", "--timeout", "30s", "--", "echo", "word"],
    ));
    let object: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(
        (&object["status"], &object["filesystem"]),
        (&json!(0), &json!(false)),
        "{object}"
    );
    let doc = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/OUTPUT.md");
    let doc = fs::read_to_string(doc).unwrap();
    for name in object.as_object().unwrap().keys() {
        assert!(doc.contains(&format!("`{name}`")), "{name}");
    }
    assert!(
        object["frozen_us"].as_u64() > Some(0) && object["schema"] == 1,
        "{object}"
    );
    assert!(said.err.contains("word"), "{said:?}");
    server.stop();
}

#[test]
fn a_command_that_outlasts_the_freeze_is_told_so_at_once_and_fails_whatever_it_did() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    await_worker(&disk);
    let mut command = freezing(&disk, &["--timeout", "500ms", "--", "sleep", "4"]);
    let began = Instant::now();
    let mut guard = Guard::spawn(&mut command);
    let mut line = String::new();
    let mut errors = BufReader::new(guard.child.stderr.take().unwrap());
    errors.read_line(&mut line).unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    assert!(line.contains("timeout"), "{line}");
    let status = guard.wait_within(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(9));
    assert!(
        began.elapsed() >= Duration::from_secs(4),
        "it was not waited for"
    );
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();

    let mut guard = Guard::spawn(&mut freezing(
        &disk,
        &["--timeout", "60s", "--", "sleep", "60"],
    ));
    eventually("a frozen disk", PATIENCE, || {
        is_frozen(&disk).filter(|frozen| *frozen)
    });
    guard.signal(Signal::INT);
    thread::sleep(WHILE);
    assert_eq!(is_frozen(&disk), Some(true), "Ctrl-C is for the command");
    guard.signal(Signal::TERM);
    let status = guard.wait_within(Duration::from_secs(20)).unwrap();
    assert_eq!(
        status.code(),
        Some(128 + 15),
        "what only we are told is passed on"
    );
    assert_eq!(is_frozen(&disk), Some(false));
    server.stop();
}
