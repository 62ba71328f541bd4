//! Sizes: of a disk, of its device, and of the file system on it.

use super::process::{ok, ok_within};
use super::programs::{ploopctl, tool};
use super::serve::Disk;
use super::tree::descriptor;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);

/// `ploopctl VERB DISK SIZE`: what it says.
pub fn sized(verb: &str, disk: &Path, size: &str) -> Value {
    let mut command = ploopctl();
    command.args([verb, "-o", "json"]).arg(disk).arg(size);
    serde_json::from_str(&ok_within(&mut command, PATIENCE)).unwrap()
}

/// Bytes of a block device.
pub fn bytes_of(device: &Path) -> u64 {
    let said = ok(tool("blockdev").arg("--getsize64").arg(device));
    said.trim().parse().unwrap()
}

/// Bytes that a mounted file system says that it has.
pub fn room_of(folder: &Path) -> u64 {
    let stat = rustix::fs::statvfs(folder).unwrap();
    stat.f_blocks * stat.f_frsize
}

/// The disk, which is detached, is sound to us and to QEMU, and as large as its descriptor says.
pub fn assert_sound(disk: &Disk, size: u64) {
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
    if descriptor(disk).images().len() == 1 {
        disk.assert_qemu_finds_it_clean();
    }
    assert_eq!(descriptor(disk).sectors() * 512, size);
    let said = info(disk);
    assert_eq!(said["size"].as_u64(), Some(size), "{said}");
}

/// What `info` says of a disk.
pub fn info(disk: &Disk) -> Value {
    let said = ok(ploopctl().args(["info", "-o", "json"]).arg(disk.path()));
    serde_json::from_str(&said).unwrap()
}
