//! Witness: what tells whether the files of a disk are what they were, without reading them.
//!
//! It says that nobody has written to them since: their inodes, lengths and times are the same, and so
//! is the descriptor. After a power cut times may be older than what was written, so whoever is about
//! to write takes a stored witness away first, durably so ([`forget`]). A clock that was set back may
//! deceive it.

use super::members::WITNESS;
use crate::io::beneath::{self, Access};
use ploop_formats::descriptor::Descriptor;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{AtFlags, statat, unlinkat};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

/// What the files of `disk` in `dir` are now.
pub fn of(dir: impl AsFd, disk: &Descriptor) -> Result<String> {
    let mut seen = Sha256::new();
    seen.update(disk.encode());
    for image in disk.images() {
        let stat = statat(&dir, image.file.as_str(), AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(|e| Error::from(io::Error::from(e)).at(&image.file))?;
        let times = [
            stat.st_mtime as i64,
            stat.st_mtime_nsec as i64,
            stat.st_ctime as i64,
            stat.st_ctime_nsec as i64,
        ];
        seen.update(stat.st_ino.to_le_bytes());
        seen.update(stat.st_size.to_le_bytes());
        times
            .iter()
            .for_each(|time| seen.update(time.to_le_bytes()));
    }
    let digest = seen.finalize();
    let hex = digest.iter().map(|byte| format!("{byte:02x}"));
    Ok(hex.collect())
}

/// The stored one; none where there is none.
pub fn stored(dir: impl AsFd) -> Result<Option<String>> {
    let file = match beneath::open_file(dir, Path::new(WITNESS), Access::Read) {
        Err(e) if e.kind() == Kind::NotFound => return Ok(None),
        file => File::from(file?),
    };
    let mut text = String::new();
    // What is longer, or no text, is no witness of ours.
    let read = file.take(1 << 10).read_to_string(&mut text);
    Ok(read.is_ok().then_some(text))
}

/// Takes the stored one away; durable with the next fsync of the directory.
pub fn forget(dir: impl AsFd) -> Result<()> {
    match unlinkat(dir, WITNESS, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(Error::from(io::Error::from(e)).at(WITNESS)),
    }
}
