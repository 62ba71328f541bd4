//! Tree: the snapshots of an attached disk, made and taken away as programs do it.

use super::attach::{Attached, assert_fsck_clean, run_directory};
use super::process::{ok, ok_within};
use super::programs::ploopctl;
use super::serve::Disk;
use ploop::client::Remote;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::guid::Guid;
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// A merge shares two cores with everything else.
const PATIENCE: Duration = Duration::from_secs(300);

/// A frozen point and what was synced before it.
pub struct Point {
    /// Its GUID.
    pub uuid: Guid,
    /// The number in the file `mark`.
    pub mark: u64,
}

/// Writes a file of a number, durably.
pub fn mark(folder: &Path, number: u64) {
    let mut file = File::create(folder.join("mark")).unwrap();
    file.write_all(number.to_string().as_bytes()).unwrap();
    file.sync_all().unwrap();
    File::open(folder).unwrap().sync_all().unwrap();
}

/// The number that was written last.
pub fn mark_of(folder: &Path) -> u64 {
    let found = fs::read_to_string(folder.join("mark")).unwrap();
    found.parse().unwrap()
}

/// The disk, which is detached, and its file system are sound, and hold this mark.
pub fn assert_holds(disk: &Disk, fs: &str, last: u64) {
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
    assert_fsck_clean(fs, disk);
    let attached = Attached::mounted(disk, &["--read-only"]);
    let found = mark_of(attached.folder());
    attached.detach();
    assert_eq!(found, last);
}

/// The disk's descriptor, as it is now.
pub fn descriptor(disk: &Disk) -> Descriptor {
    Descriptor::parse(&fs::read(disk.path().join("DiskDescriptor.xml")).unwrap()).unwrap()
}

/// Freezes the top of an attached disk: the point, and how long requests waited, in microseconds.
pub fn freeze(disk: &Disk, number: u64) -> Result<(Point, Option<u64>), String> {
    let mut remote = Remote::connect(&run_directory(&disk.path())).map_err(|e| e.to_string())?;
    let made = remote.snapshot(None, false).map_err(|e| e.to_string())?;
    let point = Point {
        uuid: made["uuid"].as_str().unwrap().parse().unwrap(),
        mark: number,
    };
    Ok((point, made["stall_us"].as_u64()))
}

/// Goes back to a point of a disk that is not attached.
pub fn switch(disk: &Disk, to: Guid) {
    let words = ["snapshot", "switch"];
    ok(ploopctl().args(words).arg(disk.path()).arg(to.bare()));
}

/// `ploopctl snapshot delete`: what came of it.
pub fn delete(disk: &Disk, point: Guid) -> String {
    let said = snapshot(disk, "delete", point);
    said["outcome"].as_str().unwrap().to_string()
}

/// `ploopctl snapshot merge`: the point that is gone for it.
pub fn merge(disk: &Disk, upper: Guid) -> Guid {
    let said = snapshot(disk, "merge", upper);
    said["gone"].as_str().unwrap().parse().unwrap()
}

fn snapshot(disk: &Disk, verb: &str, point: Guid) -> Value {
    let mut command = ploopctl();
    command.args(["snapshot", verb]).arg(disk.path());
    command.arg(point.bare()).args(["-o", "json"]);
    serde_json::from_str(&ok_within(&mut command, PATIENCE)).unwrap()
}

/// Has a frozen point merged away; what its keeper says of it.
pub fn remove(disk: &Disk, point: Guid) -> Result<Value, String> {
    let mut remote = Remote::connect(&run_directory(&disk.path())).map_err(|e| e.to_string())?;
    let removed = remote.remove(point.bare(), None, &mut |_| Ok(()));
    let removed = removed.map_err(|e| e.to_string())?;
    assert_eq!(removed["outcome"], "merged", "{removed}");
    Ok(removed)
}

/// Does `work`, and `blow` in the middle of it.
pub fn amid<T: Send>(wait: Duration, blow: impl FnOnce(), work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let working = scope.spawn(work);
        thread::sleep(wait);
        blow();
        working.join().unwrap()
    })
}
