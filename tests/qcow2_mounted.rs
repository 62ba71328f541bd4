//! File systems on qcow2 images that are written, over a raw and a ploop base, whose workers are
//! killed under load: it costs a pause, and in the image leaks at worst, which a repair returns.
//! QEMU looks at the image after each death, before there is another worker.
//!
//! `PLOOP_QCOW2_KILLS` says how many workers are killed on each.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean_with, can_mount};
use common::load::beside_load;
use common::process::{ok, ok_within, run_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::{count, have};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(120);
const QCOW2: [&str; 2] = ["--format", "qcow2"];

fn qemu_img(folder: &Path, line: &str) -> String {
    let mut command = tool("qemu-img");
    command.args(line.split(' ')).current_dir(folder);
    ok_within(&mut command, PATIENCE)
}

/// A qcow2 image, made with these options, over a base with an ext4.
fn over(folder: &TempDir, base: &str, options: &str) {
    let folder = folder.path();
    match base {
        "raw" => {
            qemu_img(folder, "create -q -f raw base 512M");
            ok(tool("mkfs.ext4").arg("-q").arg(folder.join("base")));
        }
        _ => {
            let made = Disk::with_fs("512M", "ext4", &[]);
            fs::copy(made.image(), folder.join("base")).unwrap();
        }
    }
    qemu_img(
        folder,
        &format!("create -q -f qcow2 -o {options} -b base -F {base} disk 512M"),
    );
}

/// QEMU's check, of an image that nobody writes, though a keeper may have it locked.
fn check(disk: &Disk) -> Command {
    let mut check = tool("qemu-img");
    check.args(["check", "-U", "-f", "qcow2"]).arg(disk.path());
    // Where QEMU looks for a data file.
    check.current_dir(disk.path().parent().unwrap());
    check
}

/// Demands an image with leaks at worst; whether there are some.
fn leaks_at_worst(disk: &Disk) -> bool {
    let said = run_within(&mut check(disk), PATIENCE);
    match said.status.code() {
        Some(0) => false,
        Some(3) => true,
        _ => panic!("{}{}", said.out, said.err),
    }
}

/// Demands an image with leaks at worst, and none once it was repaired.
fn repaired(disk: &Disk) -> bool {
    let leaks = leaks_at_worst(disk);
    let mut repair = ploopctl();
    repair
        .args(["check", "--repair"])
        .args(QCOW2)
        .arg(disk.path());
    ok_within(&mut repair, PATIENCE);
    ok_within(&mut check(disk), PATIENCE);
    leaks
}

fn killed_under_load(test: &str, base: &str, options: &str) {
    if !can_mount(test) || !have(test, &["fio", "mkfs.ext4", "qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    over(&folder, base, options);
    let disk = Disk::around(folder);
    let kills = count("PLOOP_QCOW2_KILLS", 6);
    let attached = Attached::mounted(&disk, &QCOW2);
    let before = disk.beside("base");
    let digest = fs::read(&before).unwrap();
    let (leaky, rounds) = beside_load(attached.folder(), || {
        let mut leaky = 0;
        for n in 0..kills {
            leaky += u64::from(attached.kill_worker_and_look(|| leaks_at_worst(&disk)));
            std::thread::sleep(Duration::from_millis(37 * (n % 8)));
            if n % 4 == 0 {
                ok_within(tool("fstrim").arg(attached.folder()), PATIENCE);
            }
        }
        leaky
    });
    fs::write(attached.folder().join("last"), "word").unwrap();
    attached.detach();
    let leaks = repaired(&disk);
    println!(
        "COUNT: {test}: {kills} kills, {leaky} of them with leaks, {rounds} verified rounds, leaks in the end: {leaks}"
    );
    assert_fsck_clean_with("ext4", &disk, &QCOW2);
    let attached = Attached::mounted(&disk, &["--format", "qcow2", "--read-only"]);
    let last = fs::read_to_string(attached.folder().join("last")).unwrap();
    attached.detach();
    assert_eq!(last, "word");
    assert!(
        fs::read(&before).unwrap() == digest,
        "the base was written to"
    );
}

#[test]
fn workers_killed_over_a_raw_base_cost_a_pause_and_leaks_at_worst() {
    killed_under_load(
        "workers_killed_over_a_raw_base_cost_a_pause_and_leaks_at_worst",
        "raw",
        "extended_l2=on,cluster_size=128k",
    );
}

#[test]
fn workers_killed_over_a_ploop_base_cost_a_pause_and_leaks_at_worst() {
    killed_under_load(
        "workers_killed_over_a_ploop_base_cost_a_pause_and_leaks_at_worst",
        "parallels",
        "cluster_size=64k",
    );
}

#[test]
fn workers_killed_over_a_data_file_cost_a_pause_and_leaks_at_worst() {
    killed_under_load(
        "workers_killed_over_a_data_file_cost_a_pause_and_leaks_at_worst",
        "raw",
        "data_file=disk.data",
    );
}
