//! Kept trackers: over a clean detach they lose nothing, and after anything else they take all of
//! the disk for written.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, can_mount, child_of, kill};
use common::files::Random;
use common::nbd::Client;
use common::process::{Guard, eventually, fails, ok};
use common::programs::{ploopctl, tool};
use common::serve::{Disk, Server};
use common::tracked::{Copy, ask, done_with, extents, map_of, name, seal, start};
use common::tree::{freeze, remove};
use common::{count, have};
use ploop::Kind;
use ploop::serve::supervise::control::TrackAsk;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const BLOCK: u64 = 4096;

/// The side file of a disk.
fn side(disk: &Disk) -> PathBuf {
    disk.path().join("trackers.bin")
}

/// What the keeper says of the trackers, but for their age.
fn stat(disk: &Disk) -> Value {
    let mut said = ask(disk, &TrackAsk::Stat).unwrap()["trackers"].clone();
    for tracker in said.as_array_mut().unwrap() {
        for generation in tracker["generations"].as_array_mut().unwrap() {
            generation.as_object_mut().unwrap().remove("age_s").unwrap();
        }
    }
    said
}

/// Serves a disk, once what its trackers have can be asked.
fn serve(disk: &Disk) -> Server {
    let server = disk.serve(&[]);
    eventually("a served disk", PATIENCE, || {
        match ask(disk, &TrackAsk::Stat) {
            Err(e) if e.kind() == Kind::Busy => None,
            said => Some(said.unwrap()),
        }
    });
    server
}

fn stop_tracking(disk: &Disk) {
    ask(disk, &TrackAsk::Stop { name: name() }).unwrap();
}

/// Writes at random places.
fn write(server: &Server, random: &mut Random, writes: u64) {
    let mut client = Client::connect(server.socket()).unwrap();
    for _ in 0..writes {
        let at = random.below(SIZE / BLOCK - 4) * BLOCK;
        let len = (1 + random.below(4)) * BLOCK;
        assert_eq!(client.write(at, &random.bytes(len as usize)).unwrap(), 0);
    }
    client.disconnect().unwrap();
}

/// A disk that is detached, with a tracker of it, a generation that nobody has acknowledged, and
/// more that was written since; and a copy that has all but these two.
fn tracked(args: &[&str]) -> (Disk, Copy) {
    let disk = Disk::new("64M", args);
    let copy = track(&disk);
    (disk, copy)
}

fn track(disk: &Disk) -> Copy {
    let (server, mut random) = (serve(disk), Random::new(1));
    write(&server, &mut random, 50);
    start(disk, BLOCK);
    let mut copy = Copy::new(disk);
    copy.take(disk, &server, 0).unwrap();
    done_with(disk, 0);
    write(&server, &mut random, 20);
    assert_eq!(seal(disk).unwrap(), 1);
    write(&server, &mut random, 20);
    server.stop();
    copy
}

/// Copies all that the tracker of a disk has, and demands that the copy is the disk then.
fn catch_up(disk: &Disk, server: &Server, copy: &mut Copy, size: u64) {
    let sealed = seal(disk).unwrap();
    let trackers = stat(disk);
    let generations = trackers[0]["generations"].as_array().unwrap().clone();
    for generation in generations {
        let generation = generation["generation"].as_u64().unwrap();
        assert!(generation <= sealed);
        copy.take(disk, server, generation).unwrap();
        done_with(disk, generation);
    }
    assert_eq!(copy.difference(server, size), None);
}

/// Whether the only tracker of a disk knows what was written; else it has all of the disk.
fn is_exact(disk: &Disk, size: u64) -> bool {
    let stat = stat(disk);
    let tracker = &stat[0];
    match tracker["unknown"].as_bool().unwrap() {
        true => {
            let all = json!({ "name": "b0", "granularity": BLOCK, "recorded": size, "unknown": true,
                "generations": [] });
            assert_eq!(tracker, &all);
            false
        }
        false => {
            assert!(
                tracker["recorded"].as_u64().unwrap() < SIZE / 8,
                "{tracker}"
            );
            assert_eq!(tracker["generations"][0]["generation"], 1, "{tracker}");
            true
        }
    }
}

#[test]
fn who_copies_generations_has_the_disk_however_often_it_is_detached() {
    let test = "who_copies_generations_has_the_disk_however_often_it_is_detached";
    if !have(test, &["nbdinfo"]) {
        return;
    }
    for args in [&[][..], &["--format", "qcow2"]] {
        let (disk, mut random) = (Disk::new("64M", args), Random::new(5));
        let mut server = serve(&disk);
        write(&server, &mut random, 100);
        start(&disk, BLOCK);
        let (mut copy, mut points, mut generation) = (Copy::new(&disk), Vec::new(), 0);
        for round in 0..10 {
            write(&server, &mut random, 20);
            // Sealed before the disk is detached, and copied after that.
            let sealed = seal(&disk).unwrap();
            write(&server, &mut random, 20);
            if round % 3 == 1 {
                points.push(freeze(&disk, 0).unwrap().0.uuid);
            }
            let before = stat(&disk);
            assert_eq!(before[0]["unknown"], false);
            let maps =
                |server: &Server| [generation, sealed].map(|n| map_of(server, &format!("b0.{n}")));
            let marked = maps(&server);
            let said = server.stop_and_tell();
            assert!(!said.contains("trackers.bin"), "{said}");
            server = serve(&disk);
            assert_eq!(stat(&disk), before, "round {round}");
            assert_eq!(maps(&server), marked, "round {round}");
            if round % 3 == 2 {
                remove(&disk, points.pop().unwrap()).unwrap();
            }
            for done in [generation, sealed] {
                copy.take(&disk, &server, done).unwrap();
                done_with(&disk, done);
            }
            generation = seal(&disk).unwrap();
            copy.take(&disk, &server, generation).unwrap();
            assert_eq!(copy.difference(&server, SIZE), None, "round {round}");
            assert!(
                generation == 2 * (round + 1),
                "{generation} in round {round}"
            );
        }
        let copied = copy.bytes / MIB;
        assert!(copied < 3 * SIZE / MIB, "{copied} MiB are no increments");
        println!("COUNT: {test}: {args:?}: 10 restarts, {copied} MiB copied");
        server.stop();
    }
}

#[test]
fn a_device_that_is_detached_and_attached_has_the_same_trackers() {
    let test = "a_device_that_is_detached_and_attached_has_the_same_trackers";
    if !can_mount(test) {
        return;
    }
    let (disk, mut random) = (Disk::new("64M", &[]), Random::new(9));
    let write = |attached: &Attached, random: &mut Random| {
        let file = File::options().write(true).open(&attached.device).unwrap();
        for _ in 0..20 {
            let at = random.below(SIZE / BLOCK) * BLOCK;
            file.write_all_at(&random.bytes(BLOCK as usize), at)
                .unwrap();
        }
        file.sync_all().unwrap();
    };
    let mut attached = Attached::device_of(&disk);
    start(&disk, BLOCK);
    done_with(&disk, 0);
    for round in 0..4 {
        write(&attached, &mut random);
        seal(&disk).unwrap();
        write(&attached, &mut random);
        if round == 2 {
            attached.kill_worker();
            freeze(&disk, 0).unwrap();
        }
        let before = stat(&disk);
        attached.detach();
        attached = Attached::device_of(&disk);
        assert_eq!(stat(&disk), before);
    }
    attached.detach();
}

#[test]
fn after_an_unclean_stop_all_counts_as_written_and_no_number_has_two_meanings() {
    let (disk, mut copy) = tracked(&[]);
    let mut last = 2;
    for round in 0..4 {
        let server = serve(&disk);
        // At first it goes on with what was kept, and from then on with what it knows since.
        assert_eq!(is_exact(&disk, SIZE), round == 0, "round {round}");
        write(&server, &mut Random::new(round), 20);
        if round % 2 == 1 {
            let generation = seal(&disk).unwrap();
            assert!(generation > last, "{generation} after {last}");
            last = generation;
        }
        server.kill();
    }
    let server = serve(&disk);
    assert!(!is_exact(&disk, SIZE));
    let generation = seal(&disk).unwrap();
    assert!(generation > last, "{generation} after {last}");
    let found = extents(&disk, generation, 512).unwrap();
    let bytes: u64 = found.iter().map(|(range, _)| range.end - range.start).sum();
    assert_eq!(bytes, SIZE, "the map is full");
    catch_up(&disk, &server, &mut copy, SIZE);
    // What was copied since is exact again, and kept.
    write(&server, &mut Random::new(50), 5);
    let before = stat(&disk);
    assert_eq!(before[0]["unknown"], false);
    server.stop();
    let server = serve(&disk);
    assert_eq!(stat(&disk), before);
    catch_up(&disk, &server, &mut copy, SIZE);
    // Those that are started or stopped are known as soon as that is answered.
    stop_tracking(&disk);
    server.kill();
    let server = serve(&disk);
    assert_eq!(stat(&disk), json!([]));
    start(&disk, 64 << 10);
    server.kill();
    let server = serve(&disk);
    let tracker = &stat(&disk)[0];
    assert_eq!(
        (&tracker["unknown"], &tracker["granularity"]),
        (&json!(true), &json!(64 << 10))
    );
    server.stop();
}

/// What may happen to a disk while nobody has it attached.
struct Event {
    name: &'static str,
    happen: fn(&Disk),
    /// Bytes of the disk afterwards.
    size: u64,
    /// Whether its trackers go on, which they may only if no guest could see a difference.
    exact: bool,
}

const fn unknown(name: &'static str, happen: fn(&Disk)) -> Event {
    let (size, exact) = (SIZE, false);
    Event {
        name,
        happen,
        size,
        exact,
    }
}

const fn exact(name: &'static str, happen: fn(&Disk)) -> Event {
    let (size, exact) = (SIZE, true);
    Event {
        name,
        happen,
        size,
        exact,
    }
}

/// `ploopctl WORDS DISK MORE`.
fn verb(disk: &Disk, words: &[&str], more: &[&str]) -> String {
    ok(ploopctl().args(words).arg(disk.path()).args(more))
}

/// The top's file.
fn top(disk: &Disk) -> PathBuf {
    let top = common::tree::descriptor(disk);
    let image = top.chain(top.top()).unwrap().pop().unwrap();
    disk.path().join(image.file)
}

/// Flips a byte of an image's data.
fn flip(image: &Path) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let (at, mut byte) = (file.metadata().unwrap().len() - 100, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Gives a file's name to a copy of it that has the same times.
fn copy_in_place(file: &Path) {
    let aside = file.with_extension("aside");
    ok(tool("cp").arg("--preserve=all").arg(file).arg(&aside));
    fs::rename(aside, file).unwrap();
}

fn points(disk: &Disk) -> Vec<String> {
    let said = verb(disk, &["snapshot", "list", "-o", "json"], &[]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let points = said["snapshots"].as_array().unwrap().iter();
    let uuid = |point: &Value| point["uuid"].as_str().unwrap().to_string();
    points.map(uuid).collect()
}

/// The disk has two frozen points.
const EVENTS: &[Event] = &[
    exact("nothing", |_| ()),
    exact("it is looked at", |disk| {
        for words in [&["info"][..], &["check"], &["map"], &["snapshot", "list"]] {
            verb(disk, words, &[]);
        }
    }),
    exact("it is served read-only", |disk| {
        let before = fs::read(side(disk)).unwrap();
        let server = disk.serve(&["--read-only"]);
        assert_eq!(fs::read(side(disk)).unwrap(), before);
        assert_eq!(
            ask(disk, &TrackAsk::Stat).unwrap_err().kind(),
            Kind::ReadOnly
        );
        server.stop();
    }),
    exact("it is cloned", |disk| {
        let (clone, point) = (disk.beside("clone"), points(disk).remove(0));
        let source = format!("{}@{point}", disk.path().display());
        ok(ploopctl().arg("clone").arg(source).arg(&clone));
        assert!(!clone.join("trackers.bin").exists());
    }),
    exact("a point of it gets a name", |disk| {
        fs::write(disk.path().join("snapshots.json"), "{}").unwrap();
    }),
    exact("its directory is moved away and back", |disk| {
        let away = disk.beside("away");
        fs::rename(disk.path(), &away).unwrap();
        fs::rename(&away, disk.path()).unwrap();
    }),
    unknown("its directory is copied", |disk| {
        let copy = disk.beside("copied");
        ok(tool("cp").arg("--archive").arg(disk.path()).arg(&copy));
        fs::remove_dir_all(disk.path()).unwrap();
        fs::rename(&copy, disk.path()).unwrap();
    }),
    unknown("another program flips a byte of its top", |disk| {
        flip(&top(disk))
    }),
    unknown("another program flips a byte of its base", |disk| {
        flip(&disk.image())
    }),
    unknown("qemu-io writes to its top", |disk| {
        let mut command = tool("qemu-io");
        command.args(["-f", "parallels", "-c", "write -P 9 5M 64k"]);
        ok(command.arg(top(disk)));
    }),
    unknown("its top is another file", |disk| copy_in_place(&top(disk))),
    unknown("its base is another file", |disk| {
        copy_in_place(&disk.image())
    }),
    unknown("its descriptor is another file", |disk| {
        copy_in_place(&disk.path().join("DiskDescriptor.xml"));
    }),
    unknown("its descriptor is touched", |disk| {
        let file = File::options()
            .append(true)
            .open(disk.path().join("DiskDescriptor.xml"));
        std::io::Write::write_all(&mut file.unwrap(), b"\n").unwrap();
    }),
    unknown("a point is made", |disk| {
        drop(verb(disk, &["snapshot", "create"], &[]))
    }),
    unknown("it goes back to a point", |disk| {
        let point = points(disk).remove(0);
        verb(disk, &["snapshot", "switch"], &[&point]);
    }),
    unknown("a point is merged away", |disk| {
        let point = points(disk).remove(0);
        verb(disk, &["snapshot", "delete"], &[&point]);
    }),
    unknown("its top is merged", |disk| {
        let point = points(disk).pop().unwrap();
        verb(disk, &["snapshot", "delete"], &[&point]);
    }),
    Event {
        name: "it grows",
        happen: |disk| drop(verb(disk, &["grow"], &["80M"])),
        size: 80 * MIB,
        exact: false,
    },
    unknown("it gets a limit", |disk| {
        drop(verb(disk, &["limit", "--delta", "10G"], &[]))
    }),
    unknown("it is compacted", |disk| {
        // So that there is something to move.
        let server = serve(disk);
        let mut client = Client::connect(server.socket()).unwrap();
        assert_eq!(client.trim(0, 32 << 20).unwrap(), 0);
        server.stop();
        verb(disk, &["compact"], &[]);
    }),
    unknown("its format version is another", |disk| {
        verb(disk, &["convert", "--format-version", "1"], &[]);
    }),
    unknown("its content is written anew", |disk| {
        verb(disk, &["convert", "--to", "preallocated", "--flatten"], &[]);
    }),
    unknown("it is repaired", |disk| {
        let file = File::options().append(true).open(top(disk)).unwrap();
        std::io::Write::write_all(&mut &file, &[7; 700]).unwrap();
        verb(disk, &["check", "--repair"], &[]);
    }),
    unknown("it was attached and killed", |disk| serve(disk).kill()),
    unknown("an earlier side file is put back after a crash", |disk| {
        let file = fs::read(side(disk)).unwrap();
        let server = serve(disk);
        write(&server, &mut Random::new(77), 3);
        server.kill();
        fs::write(side(disk), file).unwrap();
    }),
    unknown(
        "an earlier side file is put back after a clean detach",
        |disk| {
            let file = fs::read(side(disk)).unwrap();
            let server = serve(disk);
            write(&server, &mut Random::new(77), 3);
            server.stop();
            fs::write(side(disk), file).unwrap();
        },
    ),
];

#[test]
fn whatever_happens_to_a_disk_meanwhile_its_trackers_are_exact_or_take_all_for_written() {
    let test =
        "whatever_happens_to_a_disk_meanwhile_its_trackers_are_exact_or_take_all_for_written";
    if !have(test, &["qemu-io"]) {
        return;
    }
    for event in EVENTS {
        let disk = Disk::new("64M", &[]);
        let server = serve(&disk);
        for round in 0..2 {
            write(&server, &mut Random::new(90 + round), 20);
            freeze(&disk, 0).unwrap();
        }
        server.stop();
        let mut copy = track(&disk);
        (event.happen)(&disk);
        let server = serve(&disk);
        assert_eq!(is_exact(&disk, event.size), event.exact, "{}", event.name);
        write(&server, &mut Random::new(3), 10);
        catch_up(&disk, &server, &mut copy, event.size);
        let said = server.stop_and_tell();
        assert_eq!(
            said.contains("trackers.bin: "),
            !event.exact,
            "{}: {said}",
            event.name
        );
    }
    println!("COUNT: {test}: {} events", EVENTS.len());
}

#[test]
fn whatever_is_in_the_place_of_the_side_file_is_refused_by_its_name_and_the_disk_is_served() {
    let (disk, _) = tracked(&[]);
    let whole = fs::read(side(&disk)).unwrap();
    let mut random = Random::new(4);
    let mut files: Vec<Vec<u8>> = [0, 1, 8, 15, 40, whole.len() / 2, whole.len() - 1]
        .map(|len| whole[..len].to_vec())
        .into();
    files.push([&whole[..], &[0]].concat());
    files.push(random.bytes(1 << 20));
    files.push(vec![0; 4096]);
    for _ in 0..count("PLOOP_KEPT_MUTATIONS", 10) {
        let mut mutated = whole.clone();
        let at = random.below(mutated.len() as u64) as usize;
        mutated[at] ^= 1 << random.below(8);
        files.push(mutated);
    }
    let served = || {
        let server = serve(&disk);
        assert_eq!(stat(&disk), json!([]));
        let said = server.stop_and_tell();
        assert!(said.contains("trackers.bin: "), "{said}");
        assert!(!side(&disk).exists());
    };
    for file in &files {
        fs::write(side(&disk), file).unwrap();
        served();
    }
    // As large as no disk's can be, and nothing in it.
    fs::write(side(&disk), &whole).unwrap();
    let file = File::options().write(true).open(side(&disk)).unwrap();
    file.set_len(1 << 40).unwrap();
    served();
    std::os::unix::fs::symlink("root.hds", side(&disk)).unwrap();
    served();
    assert!(disk.image().exists());
    // A directory is nobody's to remove.
    fs::create_dir(side(&disk)).unwrap();
    let on = format!("unix:{}", disk.beside("socket").display());
    let no = fails(&mut disk.serve_command(&on, &[])).err;
    assert!(
        no.contains("trackers.bin: ") && no.contains("irectory"),
        "{no}"
    );
    fs::remove_dir(side(&disk)).unwrap();
    serve(&disk).stop();
}

#[test]
fn a_cut_at_any_step_of_writing_leaves_what_was_or_what_is_to_be() {
    let (first, _) = tracked(&[]);
    let server = serve(&first);
    let in_use = fs::read(side(&first)).unwrap();
    server.kill();
    // The beginning of an attachment is cut, or its end, with so much aside.
    for (begins, len) in [
        (true, 0),
        (true, 20),
        (true, in_use.len()),
        (false, 0),
        (false, 99),
        (false, usize::MAX),
    ] {
        let (disk, mut copy) = tracked(&[]);
        let aside = disk.path().join("trackers.bin.tmp");
        let at_rest = fs::read(side(&disk)).unwrap();
        let (file, other) = match begins {
            true => (&at_rest, &in_use),
            false => (&in_use, &at_rest),
        };
        fs::write(side(&disk), file).unwrap();
        fs::write(&aside, &other[..len.min(other.len())]).unwrap();
        let server = serve(&disk);
        assert_eq!(is_exact(&disk, SIZE), begins, "{len} bytes aside");
        assert!(!aside.exists() && !says_at_rest(&disk));
        catch_up(&disk, &server, &mut copy, SIZE);
        server.stop();
        assert!(!aside.exists() && says_at_rest(&disk));
    }
}

#[test]
fn a_side_file_of_a_disk_of_another_size_makes_all_unknown() {
    let (disk, mut copy) = tracked(&[]);
    let mut file = fs::read(side(&disk)).unwrap();
    file[16..24].copy_from_slice(&(SIZE + MIB).to_le_bytes());
    let end = file.len() - 4;
    let sum = crc32fast::hash(&file[..end]);
    file[end..].copy_from_slice(&sum.to_le_bytes());
    fs::write(side(&disk), file).unwrap();
    let server = serve(&disk);
    assert_eq!(stat(&disk)[0]["unknown"], true);
    catch_up(&disk, &server, &mut copy, SIZE);
    server.stop();
}

/// What a side file says: whether it is believed, should the disk be as it was.
fn says_at_rest(disk: &Disk) -> bool {
    fs::read(side(disk)).unwrap()[12] == 1
}

#[test]
fn nothing_is_written_to_a_disk_whose_side_file_is_still_believed() {
    let test = "nothing_is_written_to_a_disk_whose_side_file_is_still_believed";
    let (disk, mut copy) = tracked(&[]);
    let (kills, mut random) = (count("PLOOP_KEPT_KILLS", 20), Random::new(8));
    let (mut believed, mut doubted) = (0, 0);
    for _ in 0..kills {
        let server = serve(&disk);
        catch_up(&disk, &server, &mut copy, SIZE);
        write(&server, &mut random, 3);
        server.stop();
        assert!(says_at_rest(&disk));
        let times = |disk: &Disk| {
            let meta = fs::metadata(top(disk)).unwrap();
            (
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec(),
            )
        };
        let before = times(&disk);
        let on = format!("unix:{}", disk.beside("other").display());
        let mut guard = Guard::spawn(&mut disk.serve_command(&on, &[]));
        thread::sleep(Duration::from_micros(random.below(60_000)));
        guard.child.kill().unwrap();
        guard.child.wait().unwrap();
        match says_at_rest(&disk) {
            true => {
                believed += 1;
                assert_eq!(
                    times(&disk),
                    before,
                    "written to while its sets are believed"
                );
            }
            false => doubted += 1,
        }
        let _ = fs::remove_file(disk.beside("other"));
        let server = eventually("the disk's locks", PATIENCE, || Some(serve(&disk)));
        catch_up(&disk, &server, &mut copy, SIZE);
        server.stop();
    }
    println!(
        "COUNT: {test}: {kills} keepers killed, {believed} times before and {doubted} times after"
    );
    assert!(doubted > 0, "killed too early, always");
}

#[test]
fn a_disk_that_was_given_up_keeps_nothing_but_names() {
    let (disk, mut copy) = tracked(&[]);
    let on = format!("unix:{}", disk.beside("other").display());
    let mut guard = Guard::spawn(&mut disk.serve_command(&on, &[]));
    let keeper = guard.child.id();
    // Its workers die as soon as they are there, until it starts no more.
    let ended = eventually("the end of a disk whose workers die", PATIENCE, || {
        child_of(keeper, "--worker").into_iter().for_each(kill);
        guard.child.try_wait().unwrap()
    });
    assert_ne!(ended.code(), Some(0));
    let server = serve(&disk);
    assert!(!is_exact(&disk, SIZE));
    catch_up(&disk, &server, &mut copy, SIZE);
    server.stop();
}

#[test]
fn a_tracker_that_cannot_be_written_down_is_not_started() {
    let disk = Disk::new("64M", &[]);
    let server = serve(&disk);
    fs::create_dir_all(side(&disk).join("x")).unwrap();
    let mut command = ploopctl();
    let no = fails(command.args(["track", "start"]).arg(disk.path()).arg("b0")).err;
    assert!(
        no.contains("written down") && no.contains("trackers.bin"),
        "{no}"
    );
    assert_eq!(stat(&disk), json!([]));
    fs::remove_dir_all(side(&disk)).unwrap();
    start(&disk, BLOCK);
    // To stop one is done in any case.
    fs::remove_file(side(&disk)).unwrap();
    fs::create_dir_all(side(&disk).join("x")).unwrap();
    stop_tracking(&disk);
    assert_eq!(stat(&disk), json!([]));
    fs::remove_dir_all(side(&disk)).unwrap();
    start(&disk, BLOCK);
    server.stop();
}

#[test]
fn the_side_file_goes_with_its_disk_and_is_nobody_elses() {
    let (disk, _) = tracked(&[]);
    let names = || {
        let all = fs::read_dir(disk.path()).unwrap();
        let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<BTreeSet<_>>()
    };
    let orphans = || ok(ploopctl().args(["list", "--orphans"]).arg(disk.path()));
    let aside = disk.path().join("trackers.bin.tmp");
    assert!(!orphans().contains("trackers.bin"), "{}", orphans());
    fs::write(&aside, "half").unwrap();
    assert!(orphans().contains("trackers.bin.tmp"), "{}", orphans());
    // A point's new file may be named anything but this.
    let descriptor = disk.path().join("DiskDescriptor.xml");
    let before = fs::read(&descriptor).unwrap();
    fs::remove_file(&descriptor).unwrap();
    let mut restore = ploopctl();
    restore.arg("restore-descriptor").arg(disk.path());
    ok(restore.args(["--format", "ploop"]));
    assert!(names().contains("trackers.bin"));
    fs::write(&descriptor, before).unwrap();
    verb(&disk, &["delete"], &[]);
    assert!(!disk.path().exists());
}

#[test]
fn trackers_of_a_bare_file_end_with_its_attachment_and_leave_nothing_beside_it() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let socket = folder.path().join("socket");
    let serve = || {
        let mut command = ploopctl();
        command.arg("serve").arg(&image).args(["--format", "raw"]);
        command
            .arg("--nbd")
            .arg(format!("unix:{}", socket.display()));
        let guard = Guard::spawn(&mut command);
        eventually("a served image", PATIENCE, || Client::connect(&socket).ok());
        guard
    };
    let track = |words: &[&str]| ok(ploopctl().arg("track").args(words).arg(&image));
    let mut guard = serve();
    ok(ploopctl().args(["track", "start"]).arg(&image).arg("b0"));
    assert!(track(&["stat"]).contains("b0"));
    guard.signal(rustix::process::Signal::TERM);
    assert!(guard.wait_within(PATIENCE).unwrap().success());
    let left = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1, "nothing but the image");
    let mut guard = serve();
    assert_eq!(track(&["stat"]), "no trackers\n");
    guard.signal(rustix::process::Signal::TERM);
    assert!(guard.wait_within(PATIENCE).unwrap().success());
}
