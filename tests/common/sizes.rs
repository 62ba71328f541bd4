//! Sizes: of a disk, of its device, and of the file system on it.

use super::attach::{Attached, assert_fsck_clean};
use super::load::beside_load;
use super::process::{ok, ok_within};
use super::programs::{ploopctl, tool};
use super::serve::Disk;
use super::tree::{descriptor, mark, mark_of};
use serde_json::Value;
use std::path::Path;
use std::thread;
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

/// Gives a disk one size after another, in bytes, with verified load on its file system; `look` sees
/// each, and where it is mounted.
pub fn resized_under_load(
    test: &str,
    disk: &Disk,
    fs: &str,
    sizes: &[u64],
    mut look: impl FnMut(u64, &Path),
) {
    let attached = Attached::mounted(disk, &[]);
    let mut size = bytes_of(&attached.device);
    let mut stalls = Vec::new();
    let ((), loads) = beside_load(attached.folder(), || {
        for (number, to) in sizes.iter().enumerate() {
            mark(attached.folder(), number as u64);
            let said = sized("resize", &disk.path(), &to.to_string());
            assert_eq!(said["old_size"].as_u64(), Some(size), "{said}");
            assert_eq!(said["size"].as_u64(), Some(*to), "{said}");
            size = *to;
            assert_eq!(bytes_of(&attached.device), size);
            look(size, attached.folder());
            stalls.push(said["stall_us"].as_u64().unwrap());
            thread::sleep(Duration::from_millis(300));
        }
    });
    assert_eq!(mark_of(attached.folder()), sizes.len() as u64 - 1);
    attached.detach();
    let rounds = sizes.len();
    println!("COUNT: {test}: {rounds} times, {loads} verified rounds, waits {stalls:?} us");
    assert_sound(disk, size);
    assert_fsck_clean(fs, disk);
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
