//! Tree: the snapshots of an attached disk, made and taken away as programs do it.

use super::attach::run_directory;
use super::serve::Disk;
use ploop::client::Remote;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::guid::Guid;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

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

/// The disk's descriptor, as it is now.
pub fn descriptor(disk: &Disk) -> Descriptor {
    Descriptor::parse(&fs::read(disk.path().join("DiskDescriptor.xml")).unwrap()).unwrap()
}

/// Freezes the top of an attached disk: the point, and how long requests waited, in microseconds.
pub fn freeze(disk: &Disk, number: u64) -> Result<(Point, Option<u64>), String> {
    let mut remote = Remote::connect(&run_directory(&disk.path())).map_err(|e| e.to_string())?;
    let made = remote.snapshot(None).map_err(|e| e.to_string())?;
    let point = Point {
        uuid: made["uuid"].as_str().unwrap().parse().unwrap(),
        mark: number,
    };
    Ok((point, made["stall_us"].as_u64()))
}

/// Has a frozen point merged away.
pub fn remove(disk: &Disk, point: Guid) -> Result<(), String> {
    let mut remote = Remote::connect(&run_directory(&disk.path())).map_err(|e| e.to_string())?;
    let removed = remote.remove(point.bare(), None, &mut |_| Ok(()));
    let removed = removed.map_err(|e| e.to_string())?;
    assert_eq!(removed["outcome"], "merged", "{removed}");
    Ok(())
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
