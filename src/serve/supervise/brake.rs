//! Brake: tells an ext4 on our device to give out no more space.
//!
//! A file system above believes in the space that the disk promised. When the host cannot keep the
//! promise, writes of data *and of metadata* fail at some point, and ext4 then stops altogether. So
//! it is told first: blocks that it holds in reserve (`reserved_clusters` in sysfs) are given to
//! nobody, and whoever wants one gets ENOSPC at once, from write(2). What it owns already it goes on
//! writing. The setting is in memory only and ends with the mount.
//!
//! Other file systems have no such setting. XFS tries metadata again until there is space.
//!
//! Never touches the file system itself, which may be waiting for us.

use crate::serve::loopdev;
use std::path::{Path, PathBuf};

/// Where the kernel has a folder for the device of each ext4 that is mounted.
const MOUNTED: &str = "/sys/fs/ext4";

/// A file system that gives out no space.
#[derive(Debug)]
pub(super) struct Brake {
    setting: PathBuf,
    before: u64,
    now: u64,
}

impl Brake {
    /// Stops the ext4 on this device, or on a partition of it; none when there is none.
    pub(super) fn pull(device: &Path) -> Option<Self> {
        Self::pull_on(device).or_else(|| Self::pull_on(&mounted_part(device)?))
    }

    fn pull_on(device: &Path) -> Option<Self> {
        let name = device.file_name()?;
        let setting = Path::new(MOUNTED).join(name).join("reserved_clusters");
        let before = read(&setting)?;
        let now = most(before, |value| write(&setting, value))?;
        Some(Self {
            setting,
            before,
            now,
        })
    }

    /// Whether it still does: a new mount starts afresh, and people may know better.
    pub(super) fn holds(&self) -> bool {
        read(&self.setting) == Some(self.now)
    }

    /// Lets it go on.
    pub(super) fn release(self) {
        if self.holds() {
            write(&self.setting, self.before);
        }
    }
}

/// The partition of this device that an ext4 is mounted from.
fn mounted_part(device: &Path) -> Option<PathBuf> {
    let all = std::fs::read_dir(MOUNTED).ok()?.flatten();
    let mut all = all.map(|e| Path::new("/dev").join(e.file_name()));
    all.find(|part| loopdev::whole(part).as_deref() == Some(device))
}

/// The largest value that is taken, which is then set: everything that the file system has. It
/// tells nobody how much that is.
fn most(at_least: u64, mut set: impl FnMut(u64) -> bool) -> Option<u64> {
    let (mut taken, mut refused) = (at_least, 1u64 << 48);
    while refused - taken > 1 {
        let middle = taken + (refused - taken) / 2;
        match set(middle) {
            true => taken = middle,
            false => refused = middle,
        }
    }
    set(taken).then_some(taken)
}

fn read(setting: &Path) -> Option<u64> {
    std::fs::read_to_string(setting).ok()?.trim().parse().ok()
}

fn write(setting: &Path, value: u64) -> bool {
    std::fs::write(setting, value.to_string()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_that_is_taken_is_found_and_set() {
        for size in [5, 4096, 4097, 1 << 40] {
            let mut set = 4;
            let found = most(4, |value| {
                let fits = value < size;
                set = if fits { value } else { set };
                fits
            });
            assert_eq!((found, set), (Some(size - 1), size - 1));
        }
        assert_eq!(most(4, |_| false), None);
    }
}
