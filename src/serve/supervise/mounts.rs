//! What the kernel has mounted, read from `/proc/self/mountinfo`, and undoing it.
//!
//! The kernel is asked each time: a mount point written down somewhere is a guess.

use crate::serve::loopdev;
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
    /// The kernel's number of it.
    pub id: u64,
    /// Device of the file system, `st_dev` of its files.
    pub dev: u64,
    /// The directory of the file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// What was mounted, as the kernel tells it (`/dev/loop3`).
    pub source: PathBuf,
    /// The device that the source shows a part of, a partition.
    pub whole: Option<PathBuf>,
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
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let numbers = std::str::from_utf8(fields.nth(1)?).ok()?;
    let (major, minor) = numbers.split_once(':')?;
    let dev = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    // Options, any number of tags, a dash, the type, the source.
    fields.find(|f| *f == b"-")?;
    let source = unescape(fields.nth(1)?);
    Some(Mount {
        id,
        dev,
        root,
        point,
        source,
        whole: None,
    })
}

/// The same, with the device that its source is a part of.
fn placed(mut mount: Mount) -> Mount {
    mount.whole = loopdev::whole(&mount.source);
    mount
}

/// Everything mounted that this process can see, oldest first.
pub fn all() -> Result<Vec<Mount>> {
    seen_by(Path::new("/proc/self"))
}

/// Everything mounted that a process can see; `proc` is its directory in `/proc`.
pub fn seen_by(proc: &Path) -> Result<Vec<Mount>> {
    let path = proc.join("mountinfo");
    let text = std::fs::read(&path).map_err(|e| Error::from(e).at(path.display()))?;
    let mounts = text.split(|b| *b == b'\n').filter_map(parse);
    Ok(mounts.map(placed).collect())
}

/// Where the file system on a block device, or on a partition of it, is mounted, in the order of
/// mounting.
///
/// By the mount's source, not by `st_dev`: btrfs shows devices of its own.
pub fn of_device(device: &Path) -> Result<Vec<PathBuf>> {
    Ok(of(&all()?, device).map(|m| m.point.clone()).collect())
}

/// Where all of it can be seen, from its root on; the oldest mount where none shows that.
pub fn whole(device: &Path) -> Result<Option<PathBuf>> {
    let all = all()?;
    let mounts: Vec<&Mount> = of(&all, device).collect();
    let shows_all = mounts.iter().find(|m| m.root == Path::new("/"));
    let found = shows_all.or(mounts.first());
    Ok(found.map(|m| m.point.clone()))
}

/// The same, of what was read before.
pub fn of<'m>(
    mounted: &'m [Mount],
    device: &'m Path,
) -> impl DoubleEndedIterator<Item = &'m Mount> {
    let rdev = std::fs::metadata(device).ok().map(|m| m.rdev());
    let same = move |m: &&Mount| {
        m.source == device
            || m.whole.as_deref() == Some(device)
            || rdev.is_some_and(|r| r != 0 && r == m.dev)
    };
    mounted.iter().filter(same)
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
        assert_eq!((mount.id, &mount.point), (36, &point));
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
