//! A host that runs out of space in the middle of a verb: the verb says so, the disk is what it was
//! or the same command goes on with it, its guest goes on, and nothing is left that nobody knows.
//! A suite of its own: it fills file systems.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::can_mount;
use common::files::{Random, assert_same};
use common::have;
use common::host::Host;
use common::nbd::Client;
use common::point::assert_read_alike;
use common::process::{fails, ok, run};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{descriptor, freeze, remove};
use ploop_formats::guid::Guid;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// NBD's number for a lack of space.
const NO_SPACE: u32 = 28;
/// What the host has left when a verb begins, in KiB: from nothing to more than any verb takes.
const LEFT: [u64; 6] = [0, 40, 120, 400, 3000, 300_000];

/// A disk of three points, and what it reads as, away from any small host.
struct Model {
    disk: Disk,
    /// The point that only frozen deltas stand on.
    lower: Guid,
    /// The point that the top stands on.
    upper: Guid,
}

/// The disk's bytes that its guest writes, as its guest knows them.
struct Guest {
    client: Client,
    random: Random,
    known: File,
}

impl Guest {
    fn of(socket: &Path, known: &Path) -> Self {
        Self {
            client: Client::connect(socket).unwrap(),
            random: Random::new(7),
            known: File::options().write(true).open(known).unwrap(),
        }
    }

    /// Writes 32 KiB at an offset in units of that; whether there was space.
    fn write(&mut self, at: u64) -> bool {
        let data = self.random.bytes(32 * KIB as usize);
        match self.client.write(at * 32 * KIB, &data).unwrap() {
            0 => {
                self.known.write_all_at(&data, at * 32 * KIB).unwrap();
                true
            }
            NO_SPACE => false,
            other => panic!("the guest is told error {other}"),
        }
    }

    fn write_all(&mut self, at: impl IntoIterator<Item = u64>) {
        for at in at {
            assert!(self.write(at), "no space at {at}");
        }
        assert_eq!(self.client.flush().unwrap(), 0);
    }
}

impl Model {
    fn new(args: &[&str]) -> Self {
        let args = [&["--cluster", "32K"], args].concat();
        let disk = Disk::new("256M", &args);
        let known = File::create(disk.beside("known")).unwrap();
        known.set_len(256 * MIB).unwrap();
        let server = disk.serve(&[]);
        let mut guest = Guest::of(server.socket(), &disk.beside("known"));
        guest.write_all((0..192).map(|n| n * 3));
        let (lower, _) = freeze(&disk, 0).unwrap();
        guest.write_all((0..128).map(|n| n * 5));
        let (upper, _) = freeze(&disk, 0).unwrap();
        guest.write_all((0..64).map(|n| n * 7));
        guest.client.disconnect().unwrap();
        server.stop();
        Self {
            disk,
            lower: lower.uuid,
            upper: upper.uuid,
        }
    }

    /// The same disk on a host of its own, and beside it what it reads as.
    fn on(&self, host: &Host) -> Disk {
        let folder = TempDir::new_in(host.path()).unwrap();
        let copied = Disk::around(folder);
        let copy = |from: &Path, to: &Path| {
            // Tables keep the space that they have.
            ok(tool("cp").args(["-a", "--sparse=never"]).arg(from).arg(to));
        };
        copy(&self.disk.path(), &copied.path());
        copied
    }
}

/// Names in a disk's directory.
fn names(disk: &Path) -> BTreeSet<String> {
    let all = fs::read_dir(disk).unwrap();
    all.map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Nothing lies in a disk's directory that its descriptor does not name, but drafts that are known.
fn assert_nothing_foreign(disk: &Path) {
    let said = ok(ploopctl()
        .args(["list", "--orphans", "-o", "json"])
        .arg(disk));
    let said: Value = serde_json::from_str(&said).unwrap();
    for file in said["files"].as_array().unwrap() {
        assert_eq!(file["kind"], "draft", "{said}");
    }
}

/// Demands that a disk that is not attached reads as `known`, sound to us and to QEMU.
fn assert_content(disk: &Disk, known: &Path) {
    let raw = assert_read_alike(disk, descriptor(disk).top());
    let larger = fs::metadata(&raw).unwrap().len();
    let all = File::options().write(true).open(known).unwrap();
    let was = all.metadata().unwrap().len();
    all.set_len(larger.max(was)).unwrap();
    assert_same(&raw, known);
    all.set_len(was).unwrap();
    fs::remove_file(raw).unwrap();
    ok(ploopctl().arg("check").arg(disk.path()));
    for image in descriptor(disk).images() {
        let file = disk.path().join(&image.file);
        if descriptor(disk)
            .chain(image.guid)
            .unwrap()
            .last()
            .unwrap()
            .format
            == ploop_formats::descriptor::LayerFormat::Ploop
        {
            let mut check = tool("qemu-img");
            ok(check.args(["check", "-q", "-f", "parallels"]).arg(file));
        }
    }
}

/// What a verb says that found no space: which file, and what was done with it.
fn assert_says_no_space(said: &common::process::Said) {
    assert_eq!(said.status.code(), Some(5), "{}", said.err);
    let space = ["No space left", "nearly full", "the host has"];
    assert!(space.iter().any(|s| said.err.contains(s)), "{}", said.err);
    let files = [
        "root.hds",
        "DiskDescriptor.xml",
        "ploop-",
        "host/",
        "image.qcow2",
    ];
    assert!(files.iter().any(|f| said.err.contains(f)), "{}", said.err);
    println!("said: {}", said.err.lines().next().unwrap_or_default());
}

fn can_run(test: &str) -> bool {
    can_mount(test) && have(test, &["mkfs.ext4", "mount", "qemu-img"])
}

/// Has a verb run out of space everywhere: it is refused or done, and done when there is space.
fn squeeze(test: &str, args: &[&str], verb: impl Fn(&Model, &Disk) -> Command) {
    squeeze_to(test, args, |_| None, verb);
}

/// The same of a verb that makes another disk, at the place that `other` tells.
fn squeeze_to(
    test: &str,
    args: &[&str],
    other: impl Fn(&Disk) -> Option<PathBuf>,
    verb: impl Fn(&Model, &Disk) -> Command,
) {
    if !can_run(test) {
        return;
    }
    let model = Model::new(args);
    let known = model.disk.beside("known");
    let (mut refused, mut done) = (0, 0);
    for left in LEFT {
        let host = Host::new(448 * MIB);
        let disk = model.on(&host);
        let before = names(&disk.path());
        host.fill_up_to(left * KIB);
        let said = run(&mut verb(&model, &disk));
        if said.status.success() {
            done += 1;
            host.relieve();
        } else {
            refused += 1;
            assert_says_no_space(&said);
            let after = names(&disk.path());
            let new: Vec<_> = after.difference(&before).collect();
            assert!(new.iter().all(|n| n.ends_with(".lck")), "{left}: {new:?}");
            assert_nothing_foreign(&disk.path());
            if let Some(made) = other(&disk) {
                assert!(!made.exists(), "{} is left", made.display());
            }
            host.relieve();
            assert_content(&disk, &known);
            ok(&mut verb(&model, &disk));
        }
        assert_nothing_foreign(&disk.path());
        assert_content(&disk, &known);
        if let Some(made) = other(&disk) {
            ok(ploopctl().arg("check").arg(made));
        }
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
    println!("COUNT: {test}: {refused} times no space, {done} times enough");
}

fn verb(words: &[&str], disk: &Disk) -> Command {
    let mut command = ploopctl();
    command.args(words).arg(disk.path());
    command
}

#[test]
fn growing_on_a_full_host_leaves_the_disk_as_it_was() {
    let test = "growing_on_a_full_host_leaves_the_disk_as_it_was";
    squeeze(test, &[], |_, disk| {
        let mut grow = verb(&["grow"], disk);
        grow.arg("768M");
        grow
    });
}

#[test]
fn another_format_version_on_a_full_host_is_all_or_nothing() {
    let test = "another_format_version_on_a_full_host_is_all_or_nothing";
    squeeze(test, &[], |_, disk| {
        verb(&["convert", "--format-version", "1"], disk)
    });
}

#[test]
fn a_flat_file_on_a_full_host_is_made_or_nothing_is_left_of_it() {
    let test = "a_flat_file_on_a_full_host_is_made_or_nothing_is_left_of_it";
    squeeze(test, &[], |_, disk| {
        verb(&["convert", "--flatten", "--to", "raw"], disk)
    });
}

#[test]
fn one_image_of_all_on_a_full_host_is_made_or_nothing_is_left_of_it() {
    let test = "one_image_of_all_on_a_full_host_is_made_or_nothing_is_left_of_it";
    squeeze(test, &[], |_, disk| verb(&["convert", "--flatten"], disk));
}

#[test]
fn a_merge_on_a_full_host_is_gone_on_with_when_there_is_space() {
    let test = "a_merge_on_a_full_host_is_gone_on_with_when_there_is_space";
    squeeze(test, &[], |model, disk| {
        let mut delete = verb(&["snapshot", "delete"], disk);
        delete.arg(model.lower.bare());
        delete
    });
}

#[test]
fn a_snapshot_on_a_full_host_is_made_or_nothing_is_left_of_it() {
    let test = "a_snapshot_on_a_full_host_is_made_or_nothing_is_left_of_it";
    squeeze(test, &[], |_, disk| verb(&["snapshot", "create"], disk));
}

#[test]
fn a_clone_on_a_full_host_is_made_or_nothing_is_left_of_it() {
    let test = "a_clone_on_a_full_host_is_made_or_nothing_is_left_of_it";
    let made = |disk: &Disk| Some(disk.beside("clone"));
    squeeze_to(test, &[], made, |model, disk| {
        let mut clone = ploopctl();
        let source = format!("{}@{}", disk.path().display(), model.upper.bare());
        clone.arg("clone").arg(source).arg(disk.beside("clone"));
        clone
    });
}

#[test]
fn a_file_that_is_copied_to_a_full_host_replaces_another_or_is_not_left() {
    let test = "a_file_that_is_copied_to_a_full_host_replaces_another_or_is_not_left";
    squeeze(test, &[], |model, disk| {
        let disk_now = descriptor(&model.disk);
        let file = &disk_now.image(model.lower).unwrap().file;
        let new = model.disk.beside("new.hds");
        fs::copy(model.disk.path().join(file), &new).unwrap();
        let mut replace = verb(&["replace"], disk);
        replace.arg(model.lower.bare()).arg(new);
        replace
    });
}

#[test]
fn all_space_of_an_image_is_reserved_on_a_full_host_or_nothing_is_left_of_it() {
    let test = "all_space_of_an_image_is_reserved_on_a_full_host_or_nothing_is_left_of_it";
    if !can_run(test) {
        return;
    }
    let model = Model::new(&[]);
    for left in [0, 40, 400, 9000] {
        let host = Host::new(320 * MIB);
        let disk = model.on(&host);
        let before = names(&disk.path());
        host.fill_up_to(left * KIB);
        let words = ["convert", "--flatten", "--to", "preallocated"];
        assert_says_no_space(&fails(&mut verb(&words, &disk)));
        assert_eq!(names(&disk.path()), before);
        host.relieve();
        assert_content(&disk, &model.disk.beside("known"));
        ok(&mut verb(&words, &disk));
        assert_content(&disk, &model.disk.beside("known"));
    }
}

#[test]
fn a_raw_image_grows_on_a_full_host_and_takes_no_space_for_it() {
    let test = "a_raw_image_grows_on_a_full_host_and_takes_no_space_for_it";
    if !can_run(test) {
        return;
    }
    let host = Host::new(64 * MIB);
    let folder = TempDir::new_in(host.path()).unwrap();
    let disk = Disk::around(folder);
    let raw = disk.beside("raw");
    File::create(&raw).unwrap().set_len(8 * MIB).unwrap();
    ok(ploopctl()
        .arg("adopt")
        .arg(&raw)
        .args(["--format", "raw"])
        .arg(disk.path()));
    host.fill_up_to(MIB);
    let free = || host.free_and_size().0;
    ok(verb(&["grow"], &disk).arg("1G"));
    assert!(free() > MIB / 2, "{} bytes are left", free());
    let server = disk.serve(&["--keep-free", "0"]);
    // Once a client is served, the disk can be changed.
    let early = Client::connect(server.socket()).unwrap();
    early.disconnect().unwrap();
    ok(verb(&["grow"], &disk).arg("2G"));
    assert!(free() > MIB / 2, "{} bytes are left", free());
    let mut guest = Client::connect(server.socket()).unwrap();
    assert_eq!(guest.write(1500 * MIB, &[7; 4096]).unwrap(), 0);
    assert_eq!(guest.flush().unwrap(), 0);
    guest.disconnect().unwrap();
    server.stop();
    assert_eq!(
        fs::metadata(disk.path().join("root.hds")).unwrap().len(),
        2 << 30
    );
}

/// Has a command that makes something in an empty place run out of space everywhere: it makes that, or
/// leaves nothing, and makes it when there is space.
fn squeeze_making(test: &str, make: impl Fn(&Path) -> Command, judge: impl Fn(&Path)) {
    let (mut refused, mut done) = (0, 0);
    for left in LEFT {
        let host = Host::new(96 * MIB);
        host.fill_up_to(left * KIB);
        let before = names(&host.path());
        let said = run(&mut make(&host.path()));
        if said.status.success() {
            done += 1;
        } else {
            refused += 1;
            assert_says_no_space(&said);
            assert_eq!(names(&host.path()), before, "{left}");
            host.relieve();
            ok(&mut make(&host.path()));
        }
        judge(&host.path());
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
    println!("COUNT: {test}: {refused} times no space, {done} times enough");
}

fn assert_qemu_finds_nothing(image: &Path) {
    ok(tool("qemu-img")
        .args(["check", "-q", "-f", "qcow2"])
        .arg(image));
}

fn assert_holds(image: &Path, flat: &Path) {
    let mut compare = tool("qemu-img");
    compare.args(["compare", "-q", "-f", "raw", "-F", "qcow2"]);
    ok(compare.arg(flat).arg(image));
}

/// A flat file with noise at both ends of it.
fn flat(folder: &TempDir, len: u64) -> PathBuf {
    let path = folder.path().join("flat");
    let file = File::create(&path).unwrap();
    file.set_len(len).unwrap();
    let noise = Random::new(len).bytes(len as usize / 3);
    file.write_all_at(&noise, 0).unwrap();
    file.write_all_at(&noise, len - noise.len() as u64).unwrap();
    path
}

#[test]
fn a_qcow2_image_on_a_full_host_is_made_or_nothing_is_left_of_it() {
    let test = "a_qcow2_image_on_a_full_host_is_made_or_nothing_is_left_of_it";
    if !can_run(test) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let flat = flat(&folder, 24 * MIB);
    for option in [None, Some("--compress"), Some("--preallocate")] {
        let make = |place: &Path| {
            let mut convert = ploopctl();
            convert.args(["convert", "--format", "raw", "--to", "qcow2"]);
            convert.args(option).arg(&flat).arg("--out-file");
            convert.arg(place.join("image.qcow2"));
            convert
        };
        squeeze_making(test, make, |place| {
            assert_qemu_finds_nothing(&place.join("image.qcow2"));
            assert_holds(&place.join("image.qcow2"), &flat);
        });
    }
}

#[test]
fn a_new_disk_of_qcow2_on_a_full_host_is_made_or_nothing_is_left_of_it() {
    let test = "a_new_disk_of_qcow2_on_a_full_host_is_made_or_nothing_is_left_of_it";
    if !can_run(test) {
        return;
    }
    for options in [
        &["--fs", "none"][..],
        &["--fs", "none", "--preallocate"],
        &["--fs", "ext4"],
    ] {
        let make = |place: &Path| {
            let mut init = ploopctl();
            init.args(["init", "--format", "qcow2", "-s", "32M"]);
            init.args(options).arg(place.join("disk"));
            init
        };
        squeeze_making(test, make, |place| {
            assert_qemu_finds_nothing(&place.join("disk/root.hds"));
            ok(ploopctl().arg("check").arg(place.join("disk")));
        });
    }
}

#[test]
fn a_qcow2_image_that_finds_no_space_to_grow_is_what_it_was() {
    let test = "a_qcow2_image_that_finds_no_space_to_grow_is_what_it_was";
    if !can_run(test) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let flat = flat(&folder, 6 * MIB);
    let (mut refused, mut done) = (0, 0);
    for left in LEFT {
        let host = Host::new(96 * MIB);
        let image = host.path().join("image.qcow2");
        let mut convert = tool("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2", "-o"]);
        ok(convert.arg("cluster_size=512").arg(&flat).arg(&image));
        let size = || fs::metadata(&image).unwrap().blocks();
        let before = size();
        host.fill_up_to(left * KIB);
        // Its table of the first level is 15 MiB then.
        let mut grow = ploopctl();
        grow.args(["grow", "--format", "qcow2"]);
        grow.arg(&image).arg("60G");
        let said = run(&mut grow);
        if said.status.success() {
            done += 1;
        } else {
            refused += 1;
            assert_says_no_space(&said);
            assert_qemu_finds_nothing(&image);
            assert_holds(&image, &flat);
            let after = size();
            // It may have got blocks of refcounts, 77 KiB at most.
            assert!(
                after < before + 240,
                "{left}: {before} before, {after} after"
            );
            host.relieve();
            ok(&mut grow);
        }
        assert_qemu_finds_nothing(&image);
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
    println!("COUNT: {test}: {refused} times no space, {done} times enough");
}

/// Has what is done to a running disk run out of space everywhere. The guest overwrites meanwhile,
/// and what it was answered is there afterwards.
fn squeeze_running(test: &str, change: impl Fn(&Model, &Disk) -> Result<(), String>) {
    if !can_run(test) {
        return;
    }
    let model = Model::new(&[]);
    let (mut refused, mut done) = (0, 0);
    for (n, left) in LEFT.into_iter().enumerate() {
        let host = Host::new(448 * MIB);
        let disk = model.on(&host);
        let known = model.disk.beside("known-now");
        fs::copy(model.disk.beside("known"), &known).unwrap();
        let before = names(&disk.path());
        let cache = ["none", "writeback"][n % 2];
        let server = disk.serve(&["--keep-free", "0", "--cache", cache]);
        let mut guest = Guest::of(server.socket(), &known);
        host.fill_up_to(left * KIB);
        let changed = change(&model, &disk);
        // What has its place can be written now, unless the top is new.
        let written = guest.write(0);
        match changed {
            Ok(()) => done += 1,
            Err(why) => {
                refused += 1;
                println!("said: {why}");
                assert!(
                    why.contains("No space") || why.contains("the host has"),
                    "{why}"
                );
                assert!(written, "{left}: the guest does not go on");
                assert_eq!(guest.client.flush().unwrap(), 0);
                let new: Vec<_> = names(&disk.path()).difference(&before).cloned().collect();
                assert!(new.iter().all(|n| n.ends_with(".lck")), "{left}: {new:?}");
                assert_nothing_foreign(&disk.path());
            }
        }
        host.relieve();
        // Clusters that nobody has, too.
        guest.write_all((0..64).map(|n| n * 97));
        if refused > 0 {
            let again = change(&model, &disk);
            let gone = |why: &String| why.contains("there is no snapshot");
            assert!(again.as_ref().err().is_none_or(gone), "{again:?}");
        }
        guest.write_all((0..16).map(|n| n * 101));
        guest.client.disconnect().unwrap();
        server.stop();
        assert_content(&disk, &known);
        assert_nothing_foreign(&disk.path());
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
    println!("COUNT: {test}: {refused} times no space, {done} times enough");
}

fn remote(disk: &Disk) -> ploop::client::Remote {
    ploop::client::Remote::connect(&common::attach::run_directory(&disk.path())).unwrap()
}

#[test]
fn a_running_disk_that_cannot_be_frozen_for_lack_of_space_goes_on() {
    let test = "a_running_disk_that_cannot_be_frozen_for_lack_of_space_goes_on";
    squeeze_running(test, |_, disk| freeze(disk, 0).map(drop));
}

#[test]
fn a_running_disk_that_cannot_grow_for_lack_of_space_goes_on() {
    let test = "a_running_disk_that_cannot_grow_for_lack_of_space_goes_on";
    squeeze_running(test, |_, disk| {
        let grown = remote(disk).grow(ploop::image::grow::Wanted::To(768 * MIB));
        grown.map(drop).map_err(|e| e.to_string())
    });
}

#[test]
fn a_running_disk_whose_point_cannot_be_merged_for_lack_of_space_goes_on() {
    let test = "a_running_disk_whose_point_cannot_be_merged_for_lack_of_space_goes_on";
    squeeze_running(test, |model, disk| remove(disk, model.lower).map(drop));
}

#[test]
fn a_running_top_that_cannot_be_merged_for_lack_of_space_goes_on() {
    let test = "a_running_top_that_cannot_be_merged_for_lack_of_space_goes_on";
    squeeze_running(test, |model, disk| remove(disk, model.upper).map(drop));
}
