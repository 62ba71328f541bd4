//! Opening names that were found inside of images and descriptors.
//!
//! Such a name may reach one regular file strictly beneath a given directory, and nothing else:
//! no absolute name, no "..", no symbolic link on the way or at the end, no device, no FIFO. Two
//! ways lead there, openat2(2) and a walk; they must answer alike.

use ploop_formats::{Error, Kind, Result};
use rustix::fs::{
    Dir, FileType, Mode, OFlags, ResolveFlags, fcntl_getfl, fcntl_setfl, fstat, open, openat,
};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// What the file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}

/// Opens a directory to look beneath. Its own path is trusted: a person or program stated it.
pub fn directory(path: &Path) -> Result<OwnedFd> {
    open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| Error::from(std::io::Error::from(e)).at(path.display()))
}

/// The names in a directory, in no order.
pub fn entries(dir: impl AsFd) -> Result<Vec<OsString>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(dir).map_err(io::Error::from)? {
        let entry = entry.map_err(io::Error::from)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            found.push(OsStr::from_bytes(name).to_os_string());
        }
    }
    Ok(found)
}

/// Opens the regular file `name` strictly beneath `dir`.
pub fn open_file(dir: impl AsFd, name: &Path, access: Access) -> Result<OwnedFd> {
    open_with(dir.as_fd(), name, access, resolve)
}

type Opener = fn(BorrowedFd<'_>, &Path, OFlags) -> std::result::Result<OwnedFd, Errno>;

fn open_with(dir: BorrowedFd<'_>, name: &Path, access: Access, opener: Opener) -> Result<OwnedFd> {
    let name = clean(name)?;
    let mode = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
    };
    // Without NONBLOCK the open of a FIFO would wait for its other end.
    let flags = mode | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let fd = opener(dir, &name, flags).map_err(|e| explain(e, &name))?;
    let told = |e: Errno| explain(e, &name);
    if FileType::from_raw_mode(fstat(&fd).map_err(told)?.st_mode) != FileType::RegularFile {
        return Err(refused(&name, "is not a regular file"));
    }
    let flags = fcntl_getfl(&fd).map_err(told)?;
    fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(told)?;
    Ok(fd)
}

/// The plain components of a name that stays beneath.
fn clean(name: &Path) -> Result<PathBuf> {
    let mut clean = PathBuf::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => clean.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err(refused(name, "contains \"..\"")),
            Component::RootDir | Component::Prefix(_) => {
                return Err(refused(name, "is an absolute name"));
            }
        }
    }
    if clean.as_os_str().is_empty() {
        return Err(refused(name, "names no file"));
    }
    if clean.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(refused(name, "contains a zero byte"));
    }
    Ok(clean)
}

fn refused(name: &Path, why: &str) -> Error {
    Error::invalid(format!(
        "{} {why}; only regular files beneath the disk's directory are opened, without links",
        name.display()
    ))
}

fn explain(error: Errno, name: &Path) -> Error {
    match error {
        Errno::LOOP => refused(name, "is or goes through a symbolic link"),
        Errno::XDEV => refused(name, "leads out of the directory"),
        Errno::ISDIR | Errno::NXIO | Errno::NODEV => refused(name, "is not a regular file"),
        Errno::NOENT => Error::new(Kind::NotFound, format!("{}: no such file", name.display())),
        e => Error::from(std::io::Error::from(e)).at(name.display()),
    }
}

/// By openat2(2); by a walk where the kernel (before 5.6) or a filter has no such call.
fn resolve(dir: BorrowedFd<'_>, name: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    match by_openat2(dir, name, flags) {
        Err(Errno::NOSYS | Errno::PERM) => by_walk(dir, name, flags),
        result => result,
    }
}

fn by_openat2(
    dir: BorrowedFd<'_>,
    name: &Path,
    flags: OFlags,
) -> std::result::Result<OwnedFd, Errno> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(dir, name, flags, Mode::empty(), how) {
            // Something was renamed meanwhile.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}

fn by_walk(dir: BorrowedFd<'_>, name: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let (Some(parent), Some(last)) = (name.parent(), name.file_name()) else {
        return Err(Errno::NOENT);
    };
    let mut at = dir.try_clone_to_owned().map_err(|_| Errno::MFILE)?;
    for part in parent {
        at = step(&at, part)?;
    }
    rustix::io::retry_on_intr(|| openat(&at, last, flags | OFlags::NOFOLLOW, Mode::empty()))
}

fn step(at: &OwnedFd, part: &OsStr) -> std::result::Result<OwnedFd, Errno> {
    // Opens a link itself, so that it can be told from a missing directory.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let next = rustix::io::retry_on_intr(|| openat(at, part, flags, Mode::empty()))?;
    match FileType::from_raw_mode(fstat(&next)?.st_mode) {
        FileType::Directory => Ok(next),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::NOTDIR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::mknodat;
    use std::os::unix::ffi::OsStrExt;

    const WAYS: [(&str, Opener); 2] = [("openat2", by_openat2), ("walk", by_walk)];

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join("disk").join(name);
        std::fs::create_dir_all(path("sub/deep")).unwrap();
        std::fs::write(dir.path().join("outside"), "secret").unwrap();
        std::fs::write(path("root.hds"), "root").unwrap();
        std::fs::write(path("sub/deep/top.hds"), "top").unwrap();
        std::os::unix::fs::symlink("root.hds", path("link")).unwrap();
        std::os::unix::fs::symlink("sub", path("sublink")).unwrap();
        std::os::unix::fs::symlink("../outside", path("outlink")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path("abslink")).unwrap();
        std::os::unix::fs::symlink("/proc/self/root", path("magic")).unwrap();
        let node = |name: &str, kind, dev| {
            let cwd = rustix::fs::CWD;
            mknodat(cwd, path(name), kind, Mode::from_raw_mode(0o600), dev)
        };
        node("fifo", FileType::Fifo, 0).unwrap();
        // Only root may make devices.
        let _ = node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        dir
    }

    /// A name, and what opening it must give: the content or a word of the error.
    const TABLE: &[(&str, std::result::Result<&str, &str>)] = &[
        ("root.hds", Ok("root")),
        ("./root.hds", Ok("root")),
        ("sub/deep/top.hds", Ok("top")),
        ("sub//deep/./top.hds", Ok("top")),
        ("", Err("names no file")),
        (".", Err("names no file")),
        ("/", Err("absolute")),
        ("/etc/passwd", Err("absolute")),
        ("..", Err("\"..\"")),
        ("../outside", Err("\"..\"")),
        ("sub/../root.hds", Err("\"..\"")),
        ("sub/../../outside", Err("\"..\"")),
        ("link", Err("symbolic link")),
        ("sublink/deep/top.hds", Err("symbolic link")),
        ("outlink", Err("symbolic link")),
        ("abslink", Err("symbolic link")),
        ("magic/etc/passwd", Err("symbolic link")),
        ("sub", Err("not a regular file")),
        ("fifo", Err("not a regular file")),
        ("null", Err("not a regular file")),
        ("socket", Err("not a regular file")),
        ("missing", Err("no such file")),
        ("missing/top.hds", Err("no such file")),
        ("root.hds/top.hds", Err("Not a directory")),
        ("root.hds\0", Err("zero byte")),
    ];

    #[test]
    fn both_ways_open_what_is_beneath_and_refuse_the_rest_alike() {
        let tree = tree();
        let dir = directory(&tree.path().join("disk")).unwrap();
        for (way, opener) in WAYS {
            for access in [Access::Read, Access::Write] {
                for (name, expected) in TABLE {
                    if *name == "null" && !rustix::process::getuid().is_root() {
                        continue;
                    }
                    let got = open_with(dir.as_fd(), Path::new(name), access, opener)
                        .map(|fd| std::io::read_to_string(std::fs::File::from(fd)).unwrap())
                        .map_err(|e| e.to_string());
                    let right = match (&got, expected) {
                        (Ok(got), Ok(expected)) => got == expected,
                        (Err(got), Err(expected)) => got.contains(expected),
                        _ => false,
                    };
                    assert!(
                        right,
                        "{way} {access:?} {name:?}: {got:?}, not {expected:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn names_that_are_not_utf8_are_names_too() {
        let tree = tree();
        let name = Path::new(OsStr::from_bytes(b"top-\xFF.hds"));
        std::fs::write(tree.path().join(name), "x").unwrap();
        let dir = directory(tree.path()).unwrap();
        for (_, opener) in WAYS {
            open_with(dir.as_fd(), name, Access::Read, opener).unwrap();
        }
    }

    #[test]
    fn the_opened_file_is_in_blocking_mode_and_writable_as_asked() {
        let tree = tree();
        let dir = directory(&tree.path().join("disk")).unwrap();
        let fd = open_file(&dir, Path::new("root.hds"), Access::Write).unwrap();
        let flags = fcntl_getfl(&fd).unwrap();
        assert!(flags.contains(OFlags::RDWR) && !flags.contains(OFlags::NONBLOCK));
        let fd = open_file(&dir, Path::new("root.hds"), Access::Read).unwrap();
        assert!(rustix::io::write(&fd, b"x").is_err());
    }
}
