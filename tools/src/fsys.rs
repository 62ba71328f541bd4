//! File system: what is on the device of a disk, and the programs that give it another size.
//!
//! ext4, XFS and btrfs, on the whole disk or in its one partition. Where one is not mounted and its
//! programs want it to be, it is mounted aside for as long as they run. No program is ended
//! half-way.

use crate::attach::{self, Attached};
use crate::balloon;
use crate::cancel::Cancel;
use crate::cmd::twin;
use crate::volume::Volume;
use ploop::serve::supervise::mounts;
use ploop::{Error, Kind, Result};
use rustix::thread::CapabilitySet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where a file system is mounted aside, in the run directory.
const ASIDE: &str = "resize";
/// Bytes of a device below which btrfs does not go.
const BTRFS_MIN: u64 = 256 << 20;
/// Where ext4 says how large its blocks are: the power of two above 1024 (superblock: s_log_block_size).
const EXT4_LOG_BLOCK: u64 = 1024 + 24;

/// A file system whose size can be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fs {
    Ext4,
    Xfs,
    Btrfs,
}

/// The file system on a device.
#[derive(Debug)]
pub struct FileSystem<'a> {
    /// Which it is.
    pub kind: Fs,
    /// Where its root can be seen, when it is mounted.
    pub mounted: Option<PathBuf>,
    volume: Volume,
    device: PathBuf,
    /// The disk's run directory, to mount in.
    run: &'a Path,
    cancel: &'a Cancel,
}

impl<'a> FileSystem<'a> {
    /// Looks at what is on the device of an attached disk. What a command left that was killed while
    /// it had mounted it aside, goes.
    pub fn of(device: &Path, attached: &'a Attached, cancel: &'a Cancel) -> Result<Self> {
        let aside = attached.run.join(ASIDE);
        if mounts::of_device(device)?.contains(&aside) {
            mounts::detach(&aside, false)?;
        }
        let mounted = attach::root_of(&attached.state);
        let volume = match mounted {
            Some(_) => Volume::mounted(device)?,
            None => Volume::of(device)?,
        };
        let device = volume.path();
        Ok(Self {
            kind: kind(&device, mounted.as_deref())?,
            mounted,
            volume,
            device,
            run: &attached.run,
            cancel,
        })
    }

    /// Its name.
    pub fn name(&self) -> String {
        format!("{:?}", self.kind).to_lowercase()
    }

    /// Bytes that it would have on a disk of so many.
    pub fn room(&self, disk: u64) -> Result<u64> {
        self.volume.room(disk)
    }

    /// Has its partition, if it is in one, have the room of a disk of so many bytes.
    pub fn follow(&self, disk: u64) -> Result<()> {
        self.volume.resize(disk)
    }

    /// Refuses, before anything is done, to grow where this process may not do that.
    pub fn refuse_growth(&self) -> Result<()> {
        let held = || {
            rustix::thread::capabilities(None)
                .is_ok_and(|c| c.effective.contains(CapabilitySet::SYS_RESOURCE))
        };
        match (&self.mounted, self.kind) {
            (Some(point), Fs::Ext4) if !held() => Err(Error::new(
                Kind::Privilege,
                format!(
                    "ext4 is mounted on {}, and is made larger there only with the capability \
                     CAP_SYS_RESOURCE; unmount it and run the same command, or `ploopctl grow` makes \
                     the disk larger, and not the file system",
                    point.display()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Checks it, where it is not mounted and its programs want that.
    pub fn check(&self) -> Result<()> {
        if (self.kind, &self.mounted) != (Fs::Ext4, &None) {
            return Ok(());
        }
        let words = ["-f", "-p"].map(OsStr::new);
        // 1: what was wrong is mended.
        let checked = self.call("e2fsck", &words, &self.device, &[0, 1]);
        checked.map(drop)
    }

    /// Bytes that a space limit takes in it.
    pub fn limit(&self) -> Result<u64> {
        match (self.kind, &self.mounted) {
            (Fs::Ext4, None) => {
                let stat = format!("stat /{}", balloon::NAME);
                let words = [OsStr::new("-R"), OsStr::new(&stat)];
                let said = self.call("debugfs", &words, &self.device, &[0])?;
                let number = |field| number_after(&said, field).unwrap_or(0);
                let ours = said.contains("Type: regular")
                    && number_after(&said, "User:") == Some(0)
                    && number("Links:") == 1;
                let blocks = number("Blockcount:").saturating_mul(512);
                Ok(if ours { number("Size:").min(blocks) } else { 0 })
            }
            _ => self.at(balloon::show),
        }
    }

    /// Takes a space limit away.
    pub fn release(&self) -> Result<()> {
        self.at(balloon::release)?;
        self.check()
    }

    /// Has a space limit take so many bytes in it, more than before.
    pub fn take(&self, bytes: u64) -> Result<()> {
        match bytes {
            0 => Ok(()),
            bytes => self.at(|point| balloon::set(point, bytes)).map(drop),
        }
    }

    /// Makes it as large as its device.
    pub fn grow(&self) -> Result<()> {
        let done = match self.kind {
            Fs::Ext4 => self.call("resize2fs", &[], &self.device, &[0]),
            Fs::Xfs => self.at(|point| self.call("xfs_growfs", &[], point, &[0])),
            Fs::Btrfs => self.at(|point| self.btrfs(&["filesystem", "resize", "max"], point)),
        };
        done.map(drop)
    }

    /// Bytes that it needs at least, by its own programs' estimate.
    pub fn minimum(&self) -> Result<u64> {
        let odd = || Error::new(Kind::Io, "its programs do not say how small it can get");
        match self.kind {
            Fs::Ext4 => {
                let words = ["-P"].map(OsStr::new);
                let said = self.call("resize2fs", &words, &self.device, &[0])?;
                let blocks = number_after(&said, "filesystem:").ok_or_else(odd)?;
                Ok(blocks.saturating_mul(ext4_block(&self.device)?))
            }
            Fs::Xfs => Err(Error::unsupported(
                "XFS does not get smaller: mounted, the same command gives it a space limit; or make a \
                 disk of that size, and copy what is on it",
            )),
            Fs::Btrfs => {
                let words = ["inspect-internal", "min-dev-size"];
                let said = self.at(|point| self.btrfs(&words, point))?;
                Ok(number_after(&said, "").ok_or_else(odd)?.max(BTRFS_MIN))
            }
        }
    }

    /// Makes it smaller than its device.
    pub fn shrink(&self, bytes: u64) -> Result<()> {
        match self.kind {
            Fs::Ext4 => {
                let size = format!("{}K", bytes / 1024);
                let words = [self.device.as_os_str(), OsStr::new(&size)];
                self.run("resize2fs", &words, &[0])
            }
            Fs::Xfs => self.minimum().map(|_| String::new()),
            Fs::Btrfs => {
                let bytes = bytes.to_string();
                self.at(|point| self.btrfs(&["filesystem", "resize", &bytes], point))
            }
        }
        .map(drop)
    }

    /// Does something where it is mounted, or mounted aside meanwhile.
    fn at<T>(&self, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        if let Some(point) = &self.mounted {
            return work(point);
        }
        let point = self.run.join(ASIDE);
        std::fs::create_dir_all(&point).map_err(|e| Error::from(e).at(point.display()))?;
        let option = twin::option(&self.device)?.unwrap_or("rw");
        let words = ["-o", option].map(OsStr::new);
        let words = [
            words[0],
            words[1],
            self.device.as_os_str(),
            point.as_os_str(),
        ];
        let done = self.run("mount", &words, &[0]).and_then(|_| work(&point));
        let left = mounts::of_device(&self.device)?;
        let unmounted = match left.contains(&point) {
            true => mounts::detach(&point, false),
            false => Ok(()),
        };
        let _ = std::fs::remove_dir(&point);
        done.and_then(|done| unmounted.map(|()| done))
    }

    fn btrfs(&self, words: &[&str], point: &Path) -> Result<String> {
        let words: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
        self.call("btrfs", &words, point, &[0])
    }

    /// Runs a program with words and what they are for.
    fn call(&self, program: &str, words: &[&OsStr], of: &Path, good: &[i32]) -> Result<String> {
        let words: Vec<&OsStr> = words.iter().copied().chain([of.as_os_str()]).collect();
        self.run(program, &words, good)
    }

    /// Runs a program that must end with one of these codes: what it says. A signal does not end it
    /// half-way: what comes after it is not begun.
    fn run(&self, program: &str, words: &[&OsStr], good: &[i32]) -> Result<String> {
        self.cancel.check()?;
        let mut command = Command::new(program);
        let output = command.args(words).process_group(0).output();
        let output = output.map_err(|e| Error::from(e).at(program))?;
        match output.status.code() {
            Some(code) if good.contains(&code) => {
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            }
            _ => {
                let said = String::from_utf8_lossy(&output.stderr);
                let said = said.trim().replace('\n', " ");
                Err(Error::new(Kind::Io, format!("{program} failed: {said}")))
            }
        }
    }
}

/// Which file system is on a device. Of one that is mounted the kernel knows: its superblock may be half
/// written when it is looked at.
fn kind(device: &Path, mounted: Option<&Path>) -> Result<Fs> {
    let (program, args, of) = match mounted {
        Some(point) => ("findmnt", ["-n", "-f", "-o", "FSTYPE", "-M"], point),
        None => ("blkid", ["-p", "-o", "value", "-s", "TYPE"], device),
    };
    let said = Command::new(program).args(args).arg(of).output();
    let said = said.map_err(|e| Error::from(e).at(program))?;
    match String::from_utf8_lossy(&said.stdout).trim() {
        "ext4" => Ok(Fs::Ext4),
        "xfs" => Ok(Fs::Xfs),
        "btrfs" => Ok(Fs::Btrfs),
        other => Err(Error::unsupported(format!(
            "{} on the device, where ext4, xfs or btrfs can be given another size; `ploopctl grow` \
             makes the disk larger and leaves the rest to you",
            if other.is_empty() {
                "no file system"
            } else {
                other
            }
        ))),
    }
}

/// The first number behind a word.
fn number_after(text: &str, word: &str) -> Option<u64> {
    let (_, rest) = text.split_once(word)?;
    let digits: String = rest
        .trim_start()
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().ok()
}

fn ext4_block(device: &Path) -> Result<u64> {
    let mut log = [0; 4];
    let file = File::open(device).map_err(|e| Error::from(e).at(device.display()))?;
    file.read_exact_at(&mut log, EXT4_LOG_BLOCK)?;
    let block = 1024_u64.checked_shl(u32::from_le_bytes(log));
    block
        .filter(|block| *block <= 65536)
        .ok_or_else(|| Error::damaged("ext4 with blocks of more than 64 KiB").at(device.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_say_is_read_as_numbers_or_not_at_all() {
        let said = "Estimated minimum size of the filesystem: 1740\n";
        assert_eq!(number_after(said, "filesystem:"), Some(1740));
        assert_eq!(
            number_after("313524224 bytes (299.00MiB)", ""),
            Some(313_524_224)
        );
        let said = "Inode: 12   Type: regular\nUser:     0   Size: 1048576\nFile ACL: 0";
        assert_eq!(number_after(said, "Size:"), Some(1 << 20));
        for said in ["", "Size:", "Size: none"] {
            assert_eq!(number_after(said, "Size:"), None);
        }
    }
}
