//! What the kernel has mounted, read from `/proc/self/mountinfo`, and undoing it.
//!
//! The kernel is asked each time: a mount point written down somewhere is a guess.

use ploop_formats::{Error, Result};
use rustix::fs::{major, minor};
use rustix::mount::{UnmountFlags, unmount};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Device of the file system, `st_dev` of its files.
    pub dev: u64,
    /// Where it is mounted.
    pub point: PathBuf,
    /// What was mounted, as the kernel tells it (`/dev/loop3`).
    pub source: PathBuf,
}

/// Undoes the octal escapes of mountinfo.
fn unescape(field: &str) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match octal {
            Some(decoded) => {
                out.push(decoded);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

fn parse(line: &str) -> Option<Mount> {
    let (fixed, tail) = line.split_once(" - ")?;
    let mut fields = fixed.split(' ');
    let (major, minor) = fields.nth(2)?.split_once(':')?;
    let dev = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
    let point = unescape(fields.nth(1)?);
    let source = unescape(tail.split(' ').nth(1)?);
    Some(Mount { dev, point, source })
}

/// Everything mounted that this process can see, oldest first.
pub fn all() -> Result<Vec<Mount>> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read(path).map_err(|e| Error::from(e).at(path))?;
    Ok(String::from_utf8_lossy(&text)
        .lines()
        .filter_map(parse)
        .collect())
}

/// Where the file system on a block device is mounted, in the order of mounting.
///
/// By the mount's source, not by `st_dev`: btrfs shows devices of its own.
pub fn of_device(device: &Path) -> Result<Vec<PathBuf>> {
    let rdev = std::fs::metadata(device).ok().map(|m| m.rdev());
    let same = |m: &Mount| m.source == device || rdev.is_some_and(|r| r != 0 && r == m.dev);
    Ok(all()?.into_iter().filter(same).map(|m| m.point).collect())
}

/// Unmounts the file system on top of `point`.
pub fn detach(point: &Path, lazy: bool) -> Result<()> {
    let flags = UnmountFlags::NOFOLLOW;
    let flags = if lazy {
        flags | UnmountFlags::DETACH
    } else {
        flags
    };
    unmount(point, flags).map_err(|e| Error::from(std::io::Error::from(e)).at(point.display()))
}

/// `<major>:<minor>` of a device number, as sysfs writes it.
pub fn numbers(dev: u64) -> String {
    format!("{}:{}", major(dev), minor(dev))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read_as_it_is() {
        let line = "36 25 7:3 / /mnt/a\\040b\\134c rw,relatime shared:9 - ext4 /dev/loop3 rw";
        let mount = parse(line).expect("a line of the kernel");
        assert_eq!(mount.point, Path::new("/mnt/a b\\c"));
        assert_eq!(mount.source, Path::new("/dev/loop3"));
        assert_eq!(numbers(mount.dev), "7:3");
    }

    #[test]
    fn the_root_file_system_is_found() {
        assert!(
            all()
                .expect("proc")
                .iter()
                .any(|m| m.point == Path::new("/"))
        );
    }
}
