//! qcow2 images that get another size while their file system is used. QEMU judges what is left.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean_with, can_mount};
use common::have;
use common::load::beside_load;
use common::process::ok_within;
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::sizes::{bytes_of, room_of};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(300);
const QCOW2: [&str; 2] = ["--format", "qcow2"];
const MIB: u64 = 1 << 20;

fn qemu_img(folder: &Path, line: &str) -> String {
    let mut command = tool("qemu-img");
    command.args(line.split(' ')).current_dir(folder);
    ok_within(&mut command, PATIENCE)
}

fn resized(disk: &Disk, size: u64) -> Value {
    let mut command = ploopctl();
    command.args(["resize", "-o", "json"]).args(QCOW2);
    command.arg(disk.path()).arg(size.to_string());
    serde_json::from_str(&ok_within(&mut command, PATIENCE)).unwrap()
}

/// Gives an image with clusters of 4 KiB, made with more options, one size in MiB after another under load:
/// the first fits in its first-level table, from 1 GiB on it needs others.
fn resizes_in_use(test: &str, fs: &str, options: &str, sizes: &[u64]) {
    if !can_mount(test) || !have(test, &["fio", &format!("mkfs.{fs}"), "qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    qemu_img(folder.path(), "create -q -f raw base 500M");
    let mut make = tool(&format!("mkfs.{fs}"));
    ok_within(make.arg("-q").arg(folder.path().join("base")), PATIENCE);
    let line = format!("convert -f raw -O qcow2 -o cluster_size=4k{options} base disk");
    qemu_img(folder.path(), &line);
    let disk = Disk::around(folder);
    let attached = Attached::mounted(&disk, &QCOW2);
    let mut stalls = Vec::new();
    let ((), rounds) = beside_load(attached.folder(), || {
        let mut old = 500 * MIB;
        for size in sizes.iter().map(|size| size * MIB) {
            let said = resized(&disk, size);
            assert_eq!(said["old_size"].as_u64(), Some(old), "{said}");
            assert_eq!(said["size"].as_u64(), Some(size), "{said}");
            assert_eq!(bytes_of(&attached.device), size);
            assert!(room_of(attached.folder()) > size * 8 / 10);
            if let Ok(data) = fs::metadata(disk.beside("disk.data")) {
                assert_eq!(data.len(), size);
            }
            stalls.push(said["stall_us"].as_u64().unwrap());
            std::thread::sleep(Duration::from_millis(300));
            old = size;
        }
    });
    println!("COUNT: {test}: {rounds} verified rounds, waits {stalls:?} us");
    attached.detach();
    let said = qemu_img(disk.beside("").as_path(), "check -f qcow2 disk");
    assert!(said.contains("No errors were found"), "{said}");
    assert_fsck_clean_with(fs, &disk, &QCOW2);
}

#[test]
fn xfs_grows_with_its_image_under_verified_load() {
    let test = "xfs_grows_with_its_image_under_verified_load";
    resizes_in_use(test, "xfs", "", &[900, 1100, 3000, 9000]);
}

#[test]
fn btrfs_grows_and_shrinks_with_its_image_under_verified_load() {
    let test = "btrfs_grows_and_shrinks_with_its_image_under_verified_load";
    resizes_in_use(test, "btrfs", "", &[900, 3000, 1000, 2000]);
}

#[test]
fn so_it_does_with_its_data_in_another_file() {
    let test = "so_it_does_with_its_data_in_another_file";
    let options = ",data_file=disk.data,data_file_raw=on";
    resizes_in_use(test, "btrfs", options, &[900, 3000, 1000, 2000]);
}
