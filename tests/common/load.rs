//! Load: verified work on a mounted disk, beside which a test does something else.

use super::process::ok_within;
use super::programs::tool;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// A round of work shares two cores with everything else.
const LOAD_PATIENCE: Duration = Duration::from_secs(300);

/// fio writes fresh files and verifies them; trims and removals go on beside it; flushes are few.
pub fn verified_load(folder: &Path, round: u64) {
    let file = folder.join(format!("load-{}", round % 4));
    let _ = fs::remove_file(&file);
    let mut fio = tool("fio");
    fio.args([
        "--name=load",
        "--rw=randwrite",
        "--bs=4k",
        "--size=24M",
        "--direct=1",
    ]);
    fio.args([
        "--ioengine=libaio",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
    ]);
    fio.args(["--fallocate=none", "--fsync=1000", "--output-format=terse"]);
    fio.arg(format!("--filename={}", file.display()))
        .arg(format!("--randseed={round}"));
    ok_within(&mut fio, LOAD_PATIENCE);
}

/// Does `work` beside verified load on a mounted disk: what came of it, and how many rounds of that.
pub fn beside_load<T>(folder: &Path, work: impl FnOnce() -> T) -> (T, u64) {
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let worked = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                verified_load(folder, rounds.fetch_add(1, Ordering::Relaxed));
            }
        });
        let _end = SetOnDrop(&done);
        work()
    });
    (worked, rounds.into_inner())
}

/// Ends the other threads of a test when one of them ends, also by a panic.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
