//! Spot: where a bare image comes to be. Nobody sees it under its name before it is complete.
//!
//! Until then it is a hidden file beside that name, which is locked as long as somebody makes it:
//! whoever finds one that is not locked knows that its maker is dead, and takes it away. Dropped
//! unfinished, the hidden file goes. What has the name already is never touched.

use crate::image::target::parent;
use crate::io::beneath::{self, Access};
use crate::io::folder::DirFolder;
use crate::io::lock::{self, Held};
use crate::policy;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{AtFlags, Mode, OFlags, fstat, openat, unlinkat};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Tries to make the hidden file: others may be cleaning up in the same place.
const TRIES: usize = 8;

/// A name that no file has, and a hidden file beside it.
#[derive(Debug)]
#[must_use = "dropped, the hidden file goes"]
pub struct Spot {
    path: PathBuf,
    folder: DirFolder,
    file: String,
    aside: String,
    finished: bool,
    _lock: Held,
}

impl Spot {
    /// Makes the hidden file. `Exists` when the name is taken, `Busy` when somebody is making the same
    /// image.
    pub fn new(path: &Path) -> Result<Self> {
        let at = |e: io::Error| Error::from(e).at(path.display());
        let file = path.file_name().and_then(|name| name.to_str());
        let file = file.ok_or_else(|| {
            Error::unsupported(format!("{}: not a name in UTF-8", path.display()))
        })?;
        let parent = parent(path).canonicalize().map_err(at)?;
        if path.symlink_metadata().is_ok() {
            let what = format!(
                "{}: it is there, and nothing is overwritten",
                path.display()
            );
            return Err(Error::new(Kind::Exists, what));
        }
        let dir = beneath::directory(&parent)?;
        let aside = format!(".{file}.new");
        policy::allow(&aside)?;
        let lock = make(&dir, &aside).map_err(|e| e.at(path.display()))?;
        Ok(Self {
            path: parent.join(file),
            folder: DirFolder::new(dir),
            file: file.to_string(),
            aside,
            finished: false,
            _lock: lock,
        })
    }

    /// The name, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory.
    pub const fn folder(&self) -> &DirFolder {
        &self.folder
    }

    /// The names there: of the hidden file, and the one that it is to get.
    pub fn names(&self) -> (&str, &str) {
        (&self.aside, &self.file)
    }

    /// The image has got its name, and the hidden file is gone.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Spot {
    fn drop(&mut self) {
        if !self.finished {
            let _ = unlinkat(&self.folder, &self.aside, AtFlags::empty());
        }
    }
}

/// Makes and locks the hidden file; one whose maker died is made anew.
fn make(dir: &OwnedFd, aside: &str) -> Result<Held> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    for _ in 0..TRIES {
        match openat(dir, aside, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => {
                // Who takes it for a dead one's has locked it, or has taken it away by now.
                if let Some(held) = lock_named(fd)? {
                    return Ok(held);
                }
            }
            Err(Errno::EXIST) => {
                let dead = beneath::open_file(dir, Path::new(aside), Access::Write);
                let held = match dead {
                    Err(e) if e.kind() == Kind::NotFound => continue,
                    dead => lock_named(dead?)?,
                };
                if held.is_some() {
                    unlinkat(dir, aside, AtFlags::empty()).map_err(io::Error::from)?;
                }
            }
            Err(e) => return Err(io::Error::from(e).into()),
        }
    }
    Err(Error::new(Kind::Busy, "somebody is making the same image"))
}

/// Locks a file, if it still has a name.
fn lock_named(fd: OwnedFd) -> Result<Option<Held>> {
    let busy = |e: Error| match e.kind() {
        Kind::Busy => Error::new(Kind::Busy, "somebody is making the same image"),
        _ => e,
    };
    let held = lock::own_top(fd).map_err(busy)?;
    let stat = fstat(held.as_fd()).map_err(io::Error::from)?;
    Ok((stat.st_nlink > 0).then_some(held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_maker_left_is_made_anew_and_what_a_living_one_has_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.qcow2");
        std::fs::write(dir.path().join(".x.qcow2.new"), "left").unwrap();
        let spot = Spot::new(&path).unwrap();
        let aside = dir.path().join(spot.names().0);
        assert_eq!(std::fs::read(&aside).unwrap(), b"");
        let second = Spot::new(&path).map(drop).unwrap_err();
        assert_eq!(second.kind(), Kind::Busy, "{second}");
        assert!(aside.exists());
        drop(spot);
        assert!(!aside.exists());
        std::fs::write(&path, "mine").unwrap();
        let taken = Spot::new(&path).map(drop).unwrap_err();
        assert_eq!(taken.kind(), Kind::Exists, "{taken}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
