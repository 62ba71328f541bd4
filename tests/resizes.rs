//! Disks that grow: on order, in use or not, with and without the file systems on them. QEMU judges
//! what is left.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean, can_mount, changer_of, kill, run_directory};
use common::files::Random;
use common::load::beside_load;
use common::nbd::Client;
use common::process::{Guard, eventually, fails, ok};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::sizes::{assert_sound, bytes_of, resized_under_load, room_of, sized};
use common::tree::{amid, delete, descriptor, freeze, mark, remove};
use common::{count, have};
use ploop::client::Remote;
use ploop::image::grow::Wanted;
use serde_json::Value;
use std::fs;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
/// More than the table of one header cluster of 32 KiB can say.
const STEP: u64 = 300 * MIB;

/// Grows a disk by `step` bytes again and again, each time by more than the table of one header cluster
/// can say.
fn grows_in_use(test: &str, fs: &str, (cluster, step): (&str, u64), tools: &[&str]) {
    if !can_mount(test) || !have(test, tools) {
        return;
    }
    let disk = Disk::with_fs("400M", fs, &["--cluster", cluster]);
    let sizes = (1..=count("PLOOP_GROWS", 6)).map(|n| 400 * MIB + n * step);
    let sizes: Vec<u64> = sizes.collect();
    resized_under_load(test, &disk, fs, &sizes, |size, folder| {
        assert!(room_of(folder) > size * 9 / 10);
    });
}

#[test]
fn xfs_grows_with_its_disk_under_verified_load() {
    let test = "xfs_grows_with_its_disk_under_verified_load";
    let tools = ["fio", "mkfs.xfs", "xfs_growfs", "qemu-img"];
    grows_in_use(test, "xfs", ("64K", 1100 * MIB), &tools);
}

#[test]
fn btrfs_grows_with_its_disk_under_verified_load() {
    let test = "btrfs_grows_with_its_disk_under_verified_load";
    let tools = ["fio", "mkfs.btrfs", "qemu-img"];
    grows_in_use(test, "btrfs", ("1M", 300 << 30), &tools);
}

#[test]
fn ext4_grows_with_its_disk_while_nobody_uses_it_and_keeps_its_files() {
    let test = "ext4_grows_with_its_disk_while_nobody_uses_it_and_keeps_its_files";
    if !can_mount(test) || !have(test, &["mkfs.ext4", "resize2fs", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("200M", "ext4", &["--cluster", "32K"]);
    let mut size = 200 * MIB;
    for round in 0..4u8 {
        let attached = Attached::mounted(&disk, &[]);
        for old in 0..round {
            let file = attached.folder().join(format!("file-{old}"));
            let found = fs::read(file).unwrap();
            assert!(found.len() == 20 << 20 && found.iter().all(|byte| *byte == old));
        }
        let file = attached.folder().join(format!("file-{round}"));
        fs::write(file, vec![round; 20 << 20]).unwrap();
        let before = room_of(attached.folder());
        attached.detach();
        sized("resize", &disk.path(), "+300M");
        size += STEP;
        assert_sound(&disk, size);
        assert_fsck_clean("ext4", &disk);
        let attached = Attached::mounted(&disk, &["--read-only"]);
        assert!(room_of(attached.folder()) > before + STEP * 9 / 10);
        attached.detach();
    }
}

#[test]
fn a_mounted_ext4_needs_a_capability_that_the_refusal_names_and_nothing_is_done() {
    let test = "a_mounted_ext4_needs_a_capability_that_the_refusal_names_and_nothing_is_done";
    if !can_mount(test) || !have(test, &["mkfs.ext4", "setpriv"]) {
        return;
    }
    let disk = Disk::with_fs("64M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let mut without = tool("setpriv");
    without.args([
        "--bounding-set",
        "-sys_resource",
        "--inh-caps",
        "-sys_resource",
    ]);
    without.arg("--").arg(ploopctl().get_program());
    let said = fails(without.args(["resize"]).arg(disk.path()).arg("128M"));
    assert_eq!(said.status.code(), Some(8), "{}", said.err);
    assert!(said.err.contains("CAP_SYS_RESOURCE"), "{}", said.err);
    assert!(!said.err.contains("hint"), "{}", said.err);
    assert_eq!(bytes_of(&attached.device), 64 * MIB);
    attached.detach();
    assert_sound(&disk, 64 * MIB);
}

#[test]
fn workers_and_changers_killed_while_a_disk_grows_cost_a_pause_and_nothing_else() {
    let test = "workers_and_changers_killed_while_a_disk_grows_cost_a_pause_and_nothing_else";
    if !can_mount(test) || !have(test, &["fio", "mkfs.xfs", "qemu-img"]) {
        return;
    }
    let disk = Disk::with_fs("400M", "xfs", &["--cluster", "32K"]);
    let attached = Attached::mounted(&disk, &[]);
    let mut random = Random::new(29);
    let rounds = count("PLOOP_GROW_KILLS", 12);
    let (mut size, mut refused) = (400 * MIB, 0);
    let ((), loads) = beside_load(attached.folder(), || {
        for number in 0..rounds {
            mark(attached.folder(), number);
            size += STEP;
            let grow = || {
                let mut remote = Remote::connect(&run_directory(&disk.path())).unwrap();
                remote.grow(Wanted::To(size))
            };
            let kill_one = || match number % 3 {
                2 => changer_of(attached.keeper).into_iter().for_each(kill),
                _ => attached.kill_worker(),
            };
            let wait = Duration::from_micros(random.below(30_000));
            if amid(wait, kill_one, grow).is_err() {
                refused += 1;
                eventually("it grows", PATIENCE, || grow().ok());
            }
            eventually("its device has the size", PATIENCE, || {
                (bytes_of(&attached.device) == size).then_some(())
            });
            eventually("its descriptor, too", PATIENCE, || {
                (descriptor(&disk).sectors() * 512 == size).then_some(())
            });
        }
    });
    sized("resize", &disk.path(), &size.to_string());
    assert!(room_of(attached.folder()) > size * 9 / 10);
    attached.detach();
    println!("COUNT: {test}: {rounds} times, {refused} interrupted, {loads} verified rounds");
    assert_sound(&disk, size);
    assert_fsck_clean("xfs", &disk);
}

#[test]
fn a_disk_whose_growing_is_killed_is_as_before_or_has_grown_and_grows_again() {
    let disk = Disk::new("200M", &["--cluster", "32K"]);
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    for n in 0..40u8 {
        assert_eq!(guest.write(u64::from(n) * MIB, &[n + 1; 4096]).unwrap(), 0);
    }
    guest.disconnect().unwrap();
    server.stop();
    let mut random = Random::new(31);
    let mut size = 200 * MIB;
    for _ in 0..count("PLOOP_GROW_ENDS", 12) {
        size += STEP;
        let mut command = ploopctl();
        command.arg("grow").arg(disk.path()).arg(size.to_string());
        let guard = Guard::spawn(&mut command);
        thread::sleep(Duration::from_micros(random.below(60_000)));
        kill(guard.child.id());
        drop(guard);
        sized("grow", &disk.path(), &size.to_string());
        assert_sound(&disk, size);
    }
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    for n in 0..40u8 {
        let found = guest.read(u64::from(n) * MIB, 4096).unwrap();
        assert!(found.iter().all(|byte| *byte == n + 1), "{n}");
    }
    guest.disconnect().unwrap();
    server.stop();
}

#[test]
fn who_is_connected_goes_on_and_who_connects_sees_the_new_size() {
    let test = "who_is_connected_goes_on_and_who_connects_sees_the_new_size";
    if !have(test, &["nbdinfo"]) {
        return;
    }
    let disk = Disk::new("200M", &["--cluster", "32K"]);
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    assert_eq!(guest.write(0, &[1; 65536]).unwrap(), 0);
    assert_eq!(guest.write(200 * MIB - 65536, &[2; 65536]).unwrap(), 0);
    let said = sized("grow", &disk.path(), "600M");
    assert_eq!(said["old_size"].as_u64(), Some(200 * MIB));
    let said = ok(tool("nbdinfo").arg("--size").arg(server.uri()));
    assert_eq!(said.trim(), (600 * MIB).to_string());
    assert_eq!(guest.read(0, 65536).unwrap(), [1; 65536]);
    let mut newcomer = Client::connect(server.socket()).unwrap();
    let found = newcomer.read(200 * MIB - 65536, 131_072).unwrap();
    assert!(found[..65536].iter().all(|b| *b == 2) && found[65536..].iter().all(|b| *b == 0));
    assert_eq!(newcomer.write(600 * MIB - 4096, &[3; 4096]).unwrap(), 0);
    guest.disconnect().unwrap();
    newcomer.disconnect().unwrap();
    server.stop();
    assert_sound(&disk, 600 * MIB);
}

#[test]
fn points_of_before_a_disk_grew_are_read_and_merged_as_ever() {
    let disk = Disk::new("200M", &["--cluster", "32K"]);
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    assert_eq!(guest.write(0, &[1; 65536]).unwrap(), 0);
    let (first, _) = freeze(&disk, 0).unwrap();
    sized("grow", &disk.path(), "600M");
    let mut guest = Client::connect(server.socket()).unwrap();
    assert_eq!(guest.write(300 * MIB + 512, &[2; 512]).unwrap(), 0);
    let (second, _) = freeze(&disk, 1).unwrap();
    assert_eq!(guest.write(500 * MIB, &[3; 4096]).unwrap(), 0);
    // Clusters of the first point would have to be moved under the running disk.
    let refused = remove(&disk, first.uuid).unwrap_err();
    assert!(refused.contains("detached"), "{refused}");
    let judge = |guest: &mut Client| {
        assert_eq!(guest.read(0, 65536).unwrap(), [1; 65536]);
        let found = guest.read(300 * MIB, 2048).unwrap();
        let there: Vec<bool> = found.iter().map(|byte| *byte == 2).collect();
        assert!(
            there
                .iter()
                .enumerate()
                .all(|(n, two)| *two == (512..1024).contains(&n))
        );
        assert_eq!(guest.read(500 * MIB, 4096).unwrap(), [3; 4096]);
    };
    judge(&mut guest);
    // The running top is merged into a point that has its size, and then both into the old one.
    remove(&disk, second.uuid).unwrap();
    judge(&mut guest);
    remove(&disk, first.uuid).unwrap();
    judge(&mut guest);
    guest.disconnect().unwrap();
    server.stop();
    assert_eq!(descriptor(&disk).images().len(), 1);
    assert_sound(&disk, 600 * MIB);

    let server = disk.serve(&[]);
    // Who is answered knows that it serves.
    let early = Client::connect(server.socket()).unwrap();
    let (first, _) = freeze(&disk, 0).unwrap();
    early.disconnect().unwrap();
    sized("grow", &disk.path(), "1G");
    let mut guest = Client::connect(server.socket()).unwrap();
    assert_eq!(guest.write(900 * MIB, &[4; 4096]).unwrap(), 0);
    let (second, _) = freeze(&disk, 1).unwrap();
    assert_eq!(guest.write(500 * MIB, &[5; 4096]).unwrap(), 0);
    guest.disconnect().unwrap();
    server.stop();
    assert_eq!(delete(&disk, first.uuid), "merged");
    assert_eq!(delete(&disk, second.uuid), "merged");
    assert_sound(&disk, 1 << 30);
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    assert_eq!(guest.read(0, 65536).unwrap(), [1; 65536]);
    assert_eq!(guest.read(900 * MIB, 4096).unwrap(), [4; 4096]);
    assert_eq!(guest.read(500 * MIB, 4096).unwrap(), [5; 4096]);
    guest.disconnect().unwrap();
    server.stop();
}

#[test]
fn bare_images_grow_and_grow_makes_nothing_smaller() {
    let disk = Disk::new("64M", &[]);
    let raw = disk.beside("flat.raw");
    fs::File::create(&raw).unwrap().set_len(MIB + 512).unwrap();
    let mut command = ploopctl();
    command
        .args(["grow", "-o", "json", "--format", "raw"])
        .arg(&raw)
        .arg("+1M");
    let said: Value = serde_json::from_str(&ok(&mut command)).unwrap();
    assert_eq!(said["size"].as_u64(), Some(2 * MIB + 65536), "{said}");
    assert_eq!(fs::metadata(&raw).unwrap().len(), 2 * MIB + 65536);
    let bare = disk.beside("alone.hds");
    fs::copy(disk.image(), &bare).unwrap();
    ok(ploopctl()
        .args(["grow", "--format", "ploop"])
        .arg(&bare)
        .arg("16T"));
    let said = ok(tool("qemu-img")
        .args(["check", "-f", "parallels"])
        .arg(&bare));
    assert!(said.contains("No errors"), "{said}");
    let said = fails(ploopctl().arg("grow").arg(disk.path()).arg("32M"));
    assert!(said.err.contains("`ploopctl resize`"), "{}", said.err);
    let said = sized("grow", &disk.path(), "64M");
    assert_eq!(said["old_size"], said["size"]);
    assert_sound(&disk, 64 * MIB);
}
