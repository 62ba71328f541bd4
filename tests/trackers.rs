//! Trackers: generations have what was written and no more, stock tools are told the same, and who copies
//! them has the disk, whatever happens to it meanwhile.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, can_mount, child_of, kill, run_directory};
use common::files::Random;
use common::nbd::Client;
use common::process::eventually;
use common::serve::{Disk, Server};
use common::tracked::{Copy, ask, blocks_of, done_with, extents, map_of, name, seal, start};
use common::tree::{freeze, remove};
use common::{count, have};
use ploop::client::Remote;
use ploop::image::grow::Wanted;
use ploop::serve::supervise::control::TrackAsk;
use ploop_formats::guid::Guid;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// A write that was answered, when it was asked for, and when it was answered.
struct Written {
    range: Range<u64>,
    asked: Instant,
    answered: Instant,
}

/// Writes or discards a range, and what came of it.
fn change(client: &mut Client, random: &mut Random, size: u64) -> (Range<u64>, io::Result<u32>) {
    let len = (1 + random.below(128)) * SECTOR;
    let at = random.below((size - len) / SECTOR) * SECTOR;
    let error = match random.below(8) {
        0 => client.trim(at, len as u32),
        _ => client.write(at, &random.bytes(len as usize)),
    };
    (at..at + len, error)
}

/// Does so at random places until it is told to stop.
fn write_on(socket: &Path, seed: u64, size: u64, stop: &AtomicBool) -> Vec<Written> {
    let (mut random, mut journal) = (Random::new(seed), Vec::new());
    let mut client = Client::connect(socket).unwrap();
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let (range, error) = change(&mut client, &mut random, size);
        assert_eq!(error.unwrap(), 0);
        journal.push(Written {
            range,
            asked,
            answered: Instant::now(),
        });
        thread::sleep(Duration::from_micros(random.below(3000)));
    }
    client.disconnect().unwrap();
    journal
}

#[test]
fn what_is_sealed_is_what_was_written_and_stock_tools_say_the_same() {
    let test = "what_is_sealed_is_what_was_written_and_stock_tools_say_the_same";
    if !have(test, &["nbdinfo"]) {
        return;
    }
    let (seals, mut writes, mut random) = (30, 0, Random::new(7));
    for granularity in [4096, 64 << 10, MIB] {
        let size = 512 * MIB;
        let disk = Disk::new("512M", &[]);
        let server = disk.serve(&[]);
        start(&disk, granularity);
        done_with(&disk, 0);
        let stop = AtomicBool::new(false);
        let mut sealed: Vec<(Instant, Instant, BTreeSet<u64>)> = Vec::new();
        let journal: Vec<Written> = thread::scope(|scope| {
            let writer = |seed| {
                let (socket, stop) = (server.socket(), &stop);
                scope.spawn(move || write_on(socket, seed, size, stop))
            };
            let writers: Vec<_> = (0..4).map(writer).collect();
            for n in 0..seals {
                thread::sleep(Duration::from_millis(random.below(60)));
                if n + 1 == seals {
                    stop.store(true, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(200));
                }
                let began = Instant::now();
                let generation = seal(&disk).unwrap();
                let ended = Instant::now();
                let found = extents(&disk, generation, 1 + random.below(600) as u32).unwrap();
                let joined = map_of(&server, "b0");
                assert_eq!(joined, map_of(&server, &format!("b0.{generation}")));
                let blocks = |ranges: &[Range<u64>]| -> BTreeSet<u64> {
                    let blocks = ranges.iter().cloned();
                    blocks.flat_map(|r| blocks_of(r, granularity)).collect()
                };
                let ranges: Vec<Range<u64>> = found.into_iter().map(|(r, _)| r).collect();
                assert_eq!(blocks(&ranges), blocks(&joined), "generation {generation}");
                sealed.push((began, ended, blocks(&ranges)));
                done_with(&disk, generation);
            }
            let all = writers.into_iter().flat_map(|w| w.join().unwrap());
            all.collect()
        });
        for (n, (began, ended, blocks)) in sealed.iter().enumerate() {
            let before = n.checked_sub(1).map(|n| (sealed[n].0, sealed[n].1));
            let (mut least, mut most) = (BTreeSet::new(), BTreeSet::new());
            for write in &journal {
                let touched = blocks_of(write.range.clone(), granularity);
                let is_later = before.is_none_or(|(_, ended)| write.asked > ended);
                if is_later && write.answered < *began {
                    least.extend(touched.clone());
                }
                let may_be = before.is_none_or(|(began, _)| write.answered > began);
                if may_be && write.asked < *ended {
                    most.extend(touched);
                }
            }
            assert!(
                least.is_subset(blocks),
                "generation {n} lacks what was written"
            );
            assert!(blocks.is_subset(&most), "generation {n} has what was not");
        }
        writes += journal.len();
        server.stop();
    }
    println!("COUNT: {test}: {writes} writes, {seals} seals for each of 3 granularities");
}

/// Writes at random places, beginning anew when the connection ends, until it is told to stop.
fn write_whatever(socket: &Path, seed: u64, size: u64, stop: &AtomicBool) -> u64 {
    let (mut random, mut writes) = (Random::new(seed), 0);
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut client) = Client::connect(socket) else {
            thread::sleep(Duration::from_millis(5));
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            match change(&mut client, &mut random, size).1 {
                Ok(error) => assert_eq!(error, 0),
                // What was asked for may have been done or not.
                Err(_) => break,
            }
            writes += 1;
            thread::sleep(Duration::from_micros(random.below(500)));
        }
    }
    writes
}

/// One thing that happens to a disk while it is copied; how many workers that killed.
fn happen(disk: &Disk, server: &Server, random: &mut Random, points: &mut Vec<Guid>) -> u64 {
    match random.below(4) {
        0 => {
            if let Ok((point, _)) = freeze(disk, 0) {
                points.push(point.uuid);
            }
            0
        }
        1 if !points.is_empty() => {
            let uuid = points.remove(random.below(points.len() as u64) as usize);
            let _ = remove(disk, uuid);
            0
        }
        _ => match child_of(server.pid(), "--worker") {
            Some(worker) => {
                kill(worker);
                1
            }
            None => 0,
        },
    }
}

#[test]
fn who_copies_generations_has_the_disk_whatever_happened_to_it() {
    let test = "who_copies_generations_has_the_disk_whatever_happened_to_it";
    let (chains, rounds) = (count("PLOOP_TRACK_CHAINS", 3), 20);
    let (killed, mut writes, mut copied) = (AtomicU64::new(0), 0, 0);
    for chain in 0..chains {
        let (size, mut random) = (96 * MIB, Random::new(chain + 100));
        let disk = Disk::new("96M", &[]);
        let server = disk.serve(&[]);
        // Larger blocks would all be written all the time.
        let granularity = 4096 << (2 * random.below(3));
        start(&disk, granularity);
        let mut copy = Copy::new(&disk);
        let (stop, points) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            let writer = |seed| {
                let (socket, stop) = (server.socket(), &stop);
                scope.spawn(move || write_whatever(socket, seed, size, stop))
            };
            let writers: Vec<_> = (0..4).map(|n| writer(chain * 10 + n)).collect();
            let mut generation = 0;
            for round in 0..rounds {
                let last = round + 1 == rounds;
                if last {
                    stop.store(true, Ordering::Relaxed);
                } else {
                    // In the middle of the copy and of the seal, and of neither.
                    let wait = Duration::from_millis(random.below(80));
                    let mut random = Random::new(chain * 1000 + round);
                    let (disk, server, points, killed) = (&disk, &server, &points, &killed);
                    scope.spawn(move || {
                        thread::sleep(wait);
                        let mut points = points.lock().unwrap();
                        let count = happen(disk, server, &mut random, &mut points);
                        killed.fetch_add(count, Ordering::Relaxed);
                    });
                }
                match random.below(5) {
                    // Given back, it is part of a later one.
                    0 if generation > 0 => {
                        let name = name();
                        ask(&disk, &TrackAsk::Nack { name, generation }).unwrap();
                    }
                    _ => {
                        eventually("a copy", PATIENCE, || {
                            copy.take(&disk, &server, generation).ok()
                        });
                        done_with(&disk, generation);
                    }
                }
                generation = eventually("a seal", PATIENCE, || seal(&disk).ok());
            }
            writes += writers.into_iter().map(|w| w.join().unwrap()).sum::<u64>();
            // Nothing is written any more: one for what was on its way, and that is all.
            for _ in 0..2 {
                eventually("a copy", PATIENCE, || {
                    copy.take(&disk, &server, generation).ok()
                });
                generation = eventually("a seal", PATIENCE, || seal(&disk).ok());
            }
        });
        let wrong = copy.difference(&server, size);
        assert_eq!(wrong, None, "chain {chain}, blocks of {granularity}");
        copied += copy.bytes / MIB;
        server.stop();
    }
    let killed = killed.into_inner();
    println!(
        "COUNT: {test}: {chains} chains of {rounds} rounds, {writes} writes, {killed} workers killed, {copied} MiB copied"
    );
    assert!(killed > 0, "no worker was killed");
}

#[test]
fn a_tracker_that_was_stopped_leaves_nothing_to_its_namesake() {
    let test = "a_tracker_that_was_stopped_leaves_nothing_to_its_namesake";
    if !have(test, &["nbdinfo"]) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    for round in 0..6 {
        start(&disk, 64 << 10);
        for _ in 0..3 {
            seal(&disk).unwrap();
        }
        assert_eq!(map_of(&server, "b0"), []);
        // The next worker is told of it, or hears nothing of it, or hears of its end.
        kill(eventually("a worker", PATIENCE, || {
            child_of(server.pid(), "--worker")
        }));
        thread::sleep(Duration::from_millis(5 * round));
        done_with(&disk, 3);
        ask(&disk, &TrackAsk::Stop { name: name() }).unwrap();
        start(&disk, 64 << 10);
        let (map, all) = (map_of(&server, "b0"), 0..64 * MIB);
        assert_eq!(map.first(), Some(&all), "round {round}");
        ask(&disk, &TrackAsk::Stop { name: name() }).unwrap();
    }
    // Who asks in vain, and often, is in nobody's way.
    start(&disk, 64 << 10);
    for _ in 0..3 {
        kill(eventually("a worker", PATIENCE, || {
            child_of(server.pid(), "--worker")
        }));
        for _ in 0..50 {
            let _ = extents(&disk, 0, 5);
        }
    }
    eventually("a seal", PATIENCE, || seal(&disk).ok());
    server.stop();
}

/// Copies what is sealed from the device, however often it takes.
fn copy_from(device: &Path, disk: &Disk, copy: &File) {
    let generation = eventually("a seal", PATIENCE, || seal(disk).ok());
    let found = eventually("extents", PATIENCE, || extents(disk, generation, 512).ok());
    let device = File::open(device).unwrap();
    for (range, _) in found {
        let mut data = vec![0; (range.end - range.start) as usize];
        device.read_exact_at(&mut data, range.start).unwrap();
        copy.write_all_at(&data, range.start).unwrap();
    }
    done_with(disk, generation);
}

#[test]
fn who_copies_a_disk_that_goes_back_has_what_it_went_back_to() {
    let test = "who_copies_a_disk_that_goes_back_has_what_it_went_back_to";
    if !can_mount(test) {
        return;
    }
    let (disk, mut random) = (Disk::new("16M", &[]), Random::new(3));
    let attached = Attached::device_of(&disk);
    let device = &attached.device;
    let write = |random: &mut Random| {
        let file = File::options().write(true).open(device).unwrap();
        for _ in 0..50 {
            let at = random.below(15 * MIB / 4096) * 4096;
            file.write_all_at(&random.bytes(8192), at).unwrap();
        }
        file.sync_all().unwrap();
    };
    write(&mut random);
    start(&disk, 4096);
    done_with(&disk, 0);
    let copy = File::create_new(disk.beside("copy")).unwrap();
    copy.set_len(16 * MIB).unwrap();
    std::io::copy(&mut File::open(device).unwrap(), &mut &copy).unwrap();
    let mut remote = Remote::connect(&run_directory(&disk.path())).unwrap();
    for _ in 0..5 {
        let (point, _) = freeze(&disk, 0).unwrap();
        write(&mut random);
        thread::scope(|scope| {
            let copier = scope.spawn(|| (0..8).for_each(|_| copy_from(device, &disk, &copy)));
            thread::sleep(Duration::from_millis(random.below(60)));
            remote.switch(point.uuid.bare()).unwrap();
            copier.join().unwrap();
        });
        copy_from(device, &disk, &copy);
        common::files::assert_same(device, &disk.beside("copy"));
    }
    attached.detach();
}

#[test]
fn growth_is_told_of_and_a_point_that_is_gone_back_to_makes_all_unknown() {
    let test = "growth_is_told_of_and_a_point_that_is_gone_back_to_makes_all_unknown";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let attached = Attached::device_of(&disk);
    start(&disk, 64 << 10);
    done_with(&disk, 0);
    let mut remote = Remote::connect(&run_directory(&disk.path())).unwrap();
    remote.grow(Wanted::To(256 * MIB)).unwrap();
    let device = File::options().write(true).open(&attached.device).unwrap();
    device.write_all_at(&[1; 4096], 200 * MIB).unwrap();
    device.sync_all().unwrap();
    let generation = seal(&disk).unwrap();
    let found = extents(&disk, generation, 512).unwrap();
    let holds =
        |(range, kind): &(Range<u64>, String)| range.contains(&(200 * MIB)) && kind == "data";
    assert!(found.iter().any(holds), "{found:?}");
    assert!(
        found.iter().all(|(range, _)| range.start >= 64 * MIB),
        "{found:?}"
    );
    device.write_all_at(&[2; 4096], 100 * MIB).unwrap();
    device.sync_all().unwrap();
    let generation = seal(&disk).unwrap();
    let found = extents(&disk, generation, 512).unwrap();
    let wanted = [(100 * MIB..100 * MIB + 4096, "data".to_string())];
    assert_eq!(found.first(), wanted.first(), "exact again");
    drop(device);
    let (point, _) = freeze(&disk, 0).unwrap();
    let stat = || ask(&disk, &TrackAsk::Stat).unwrap()["trackers"][0].clone();
    assert_eq!(
        (&stat()["unknown"], &stat()["recorded"]),
        (&json!(false), &json!(0))
    );
    remote.switch(point.uuid.bare()).unwrap();
    assert_eq!(stat()["unknown"], true);
    let generation = eventually("another worker", PATIENCE, || seal(&disk).ok());
    let found = extents(&disk, generation, 512).unwrap();
    assert_eq!(
        found.iter().map(|(r, _)| r.end - r.start).sum::<u64>(),
        256 * MIB
    );
    assert_eq!(stat()["unknown"], false);
    attached.detach();
}
