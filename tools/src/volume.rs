//! Volume: the device that holds the file system of a disk, which is the disk or a partition of it.
//!
//! The kernel may know no partition tables, so a partition is a loop device on the disk's own. It
//! claims that, and goes by itself when its last user does: the mount that it was made for.

use crate::gpt;
use ploop::serve::loopdev::{self, Attach, Loop};
use ploop::serve::supervise::mounts;
use ploop::{Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// The device of a file system, for as long as this is kept or somebody uses it.
#[derive(Debug)]
pub struct Volume {
    device: PathBuf,
    partition: Option<Part>,
}

/// The device of a partition.
#[derive(Debug)]
enum Part {
    Ours(Loop),
    /// Somebody has mounted it.
    Theirs(u32),
}

impl Part {
    fn number(&self) -> u32 {
        match self {
            Self::Ours(part) => part.number(),
            Self::Theirs(number) => *number,
        }
    }
}

impl Volume {
    /// Looks at what is on a disk's device. `Unsupported` where it is not one file system, or one
    /// partition of a GPT.
    pub fn of(device: &Path) -> Result<Self> {
        let whole = || Self {
            device: device.to_path_buf(),
            partition: None,
        };
        let Some(number) = loopdev::number(device) else {
            return Ok(whole());
        };
        let disk = loopdev::status(number)?;
        let file = File::open(device).map_err(|e| Error::from(e).at(device.display()))?;
        let found = gpt::read(&file, disk.size / gpt::SECTOR);
        let Some(found) = found.map_err(|e| e.at(device.display()))? else {
            return Ok(whole());
        };
        let [partition] = found.as_slice() else {
            return Err(Error::unsupported(format!(
                "{}: has {} partitions, and which is meant is not known; attach it without mounting \
                 it",
                device.display(),
                found.len()
            )));
        };
        let part = loopdev::attach(&Attach {
            backing: device,
            offset: partition.first.saturating_mul(gpt::SECTOR),
            size: Some(partition.sectors().saturating_mul(gpt::SECTOR)),
            block_size: gpt::SECTOR as u32,
            read_only: disk.read_only,
            direct_io: true,
            autoclear: true,
        })?;
        Ok(Self {
            device: device.to_path_buf(),
            partition: Some(Part::Ours(part)),
        })
    }

    /// The same of a disk whose file system is mounted.
    pub fn mounted(device: &Path) -> Result<Self> {
        let all = mounts::all()?;
        let partition = mounts::of(&all, device).find(|m| m.whole.is_some());
        let number = partition.and_then(|m| loopdev::number(&m.source));
        Ok(Self {
            device: device.to_path_buf(),
            partition: number.map(Part::Theirs),
        })
    }

    /// Bytes that the file system would have on a disk of `bytes`.
    pub fn room(&self, bytes: u64) -> Result<u64> {
        let (Some(_), Some(disk)) = (&self.partition, loopdev::number(&self.device)) else {
            return Ok(bytes);
        };
        let has = loopdev::status(disk)?.size / gpt::SECTOR;
        let file = File::open(&self.device);
        let file = file.map_err(|e| Error::from(e).at(self.device.display()))?;
        let fitted = gpt::fitted(&file, has, bytes / gpt::SECTOR);
        let fitted = fitted.map_err(|e| e.at(self.device.display()))?;
        Ok(fitted.sectors().saturating_mul(gpt::SECTOR))
    }

    /// Has a partition end where a disk of `bytes` has room for it, and so its device.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        let (Some(part), Some(disk)) = (&self.partition, loopdev::number(&self.device)) else {
            return Ok(());
        };
        let has = loopdev::status(disk)?.size / gpt::SECTOR;
        let file = File::options().read(true).write(true).open(&self.device);
        let file = file.map_err(|e| Error::from(e).at(self.device.display()))?;
        let new = gpt::resize(&file, has, bytes / gpt::SECTOR);
        let new = new.map_err(|e| e.at(self.device.display()))?;
        loopdev::set_size_limit(part.number(), new.sectors().saturating_mul(gpt::SECTOR))
    }

    /// What can be mounted.
    pub fn path(&self) -> PathBuf {
        let part = self.partition.as_ref().map(Part::number);
        part.map_or_else(|| self.device.clone(), loopdev::node)
    }
}
