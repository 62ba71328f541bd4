//! Puts the one-file FUSE file system over an empty file, and takes it away.
//!
//! Never serves a request: between [`mount()`] and a worker's first answer everyone who touches the
//! path waits, the caller included.

use crate::{Error, Kind, Result};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use super::session::MAX_TRANSFER;

/// How to mount.
#[derive(Debug, Clone)]
pub struct Mount<'a> {
    /// An existing, empty, regular file.
    pub target: &'a Path,
    /// What the mount table shows as the source: the disk's name. Commas are fine.
    pub source: &'a str,
    /// The kernel refuses writes by itself.
    pub read_only: bool,
}

/// Opens `/dev/fuse` and mounts it. The descriptor is closed on exec and does not block, so that
/// several readers of one session never wait inside the kernel.
///
/// Fails with `Invalid` when the target is not an empty regular file, with `Privilege` without
/// CAP_SYS_ADMIN, with `Unsupported` where the kernel has no FUSE. Nothing is left on failure.
pub fn mount(how: &Mount<'_>) -> Result<OwnedFd> {
    let place = |e: Error| e.at(format_args!("mounting on {}", how.target.display()));
    check_target(how.target).map_err(place)?;
    let fd = open_device()?;
    let options = CString::new(options(&fd)).expect("the options hold numbers only");
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    flags.set(MountFlags::RDONLY, how.read_only);
    rustix::mount::mount(
        how.source,
        how.target,
        "fuse.ploop",
        flags,
        options.as_c_str(),
    )
    .map_err(|e| place(refused(e)))?;
    Ok(fd)
}

/// Unmounts. Without `lazy` a file that is still open (by a loop device) fails with `Busy`; with it
/// the name goes at once and the session ends with the last user.
pub fn unmount(target: &Path, lazy: bool) -> Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    rustix::mount::unmount(target, flags)
        .map_err(|e| refused(e).at(format_args!("unmounting {}", target.display())))
}

/// Ends the session under whoever uses it: every request, waiting or yet to come, fails, and its
/// server is told. The name stays until [`unmount`], unless nobody used it.
pub fn abort(target: &Path) -> Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::FORCE) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(e) => Err(refused(e).at(format_args!("aborting {}", target.display()))),
    }
}

fn check_target(target: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(target)?;
    if !meta.file_type().is_file() {
        return Err(Error::invalid("the mount point must be a regular file"));
    }
    if meta.len() != 0 {
        return Err(Error::invalid(format!(
            "the mount point must be empty, or a mount would hide its {} bytes; \
             if a disk is mounted there already, unmount it first",
            meta.len()
        )));
    }
    Ok(())
}

fn open_device() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(|e| match e {
        rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::NXIO => {
            Error::unsupported("/dev/fuse: this kernel has no FUSE; try `modprobe fuse`")
        }
        e => Error::from(io::Error::from(e)).at("opening /dev/fuse"),
    })
}

fn options(fd: &OwnedFd) -> String {
    format!(
        "fd={},rootmode=100600,user_id={},group_id={},max_read={MAX_TRANSFER}",
        fd.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    )
}

fn refused(errno: rustix::io::Errno) -> Error {
    if errno == rustix::io::Errno::PERM {
        return Error::new(Kind::Privilege, "mount and umount need CAP_SYS_ADMIN");
    }
    io::Error::from(errno).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_never_hides_data_or_covers_something_else_than_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let full = dir.path().join("full");
        fs::write(&full, b"data").unwrap();
        for (target, kind) in [
            (full.as_path(), Kind::Invalid),
            (dir.path(), Kind::Invalid),
            (&dir.path().join("absent"), Kind::NotFound),
        ] {
            let error = mount(&Mount {
                target,
                source: "x",
                read_only: false,
            })
            .unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(
                error.to_string().contains(&target.display().to_string()),
                "{error}"
            );
        }
    }
}
