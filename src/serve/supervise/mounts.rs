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
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
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

/// A line of mountinfo; paths in it are bytes.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let numbers = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = numbers.split_once(':')?;
    let dev = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
    let point = unescape(fields.nth(1)?);
    // Options, any number of tags, a dash, the type, the source.
    fields.find(|f| *f == b"-")?;
    let source = unescape(fields.nth(1)?);
    Some(Mount { dev, point, source })
}

/// Everything mounted that this process can see, oldest first.
pub fn all() -> Result<Vec<Mount>> {
    seen_by(Path::new("/proc/self"))
}

/// Everything mounted that a process can see; `proc` is its directory in `/proc`.
pub fn seen_by(proc: &Path) -> Result<Vec<Mount>> {
    let path = proc.join("mountinfo");
    let text = std::fs::read(&path).map_err(|e| Error::from(e).at(path.display()))?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// Where the file system on a block device is mounted, in the order of mounting.
///
/// By the mount's source, not by `st_dev`: btrfs shows devices of its own.
pub fn of_device(device: &Path) -> Result<Vec<PathBuf>> {
    Ok(of(&all()?, device))
}

/// The same, of what was read before.
pub fn of(mounted: &[Mount], device: &Path) -> Vec<PathBuf> {
    let rdev = std::fs::metadata(device).ok().map(|m| m.rdev());
    let same = |m: &&Mount| m.source == device || rdev.is_some_and(|r| r != 0 && r == m.dev);
    let points = mounted.iter().filter(same);
    points.map(|m| m.point.clone()).collect()
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
    fn a_mount_point_with_odd_bytes_is_read_as_it_is() {
        let line = b"36 25 7:3 / /mnt/a\\040b\\134c\xff rw,relatime shared:9 - ext4 /dev/loop3 rw";
        let mount = parse(line).expect("a line of the kernel");
        let point = PathBuf::from(OsString::from_vec(b"/mnt/a b\\c\xff".to_vec()));
        assert_eq!(mount.point, point);
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
