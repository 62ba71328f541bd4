//! Witness: what tells whether the files of a disk are what they were, without reading them.
//!
//! It says that nobody has written to them since: their inodes, lengths and times are the same, and so
//! is the descriptor. A clock that was set back may deceive it.

use ploop_formats::descriptor::Descriptor;
use ploop_formats::{Error, Result};
use rustix::fs::{AtFlags, statat};
use sha2::{Digest, Sha256};
use std::io;
use std::os::fd::AsFd;

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
