//! What a disk's file system is like: from its mount, else as it was when it was last unmounted.
//!
//! `.statfs` beside the base holds the latter as ploop keeps it: five little-endian numbers of 64
//! bits: block size, blocks, free blocks, inodes, free inodes. It is a remark that may be lost.

use ploop::image::members::STATS;
use ploop::image::target::Target;
use rustix::fs::statvfs;
use std::fs;
use std::path::Path;

/// Usage of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    block: u64,
    blocks: u64,
    blocks_free: u64,
    inodes: u64,
    inodes_free: u64,
}

impl Stats {
    /// Of a mounted file system.
    pub fn of_mount(point: &Path) -> Option<Self> {
        let fs = statvfs(point).ok()?;
        Some(Self {
            block: fs.f_frsize,
            blocks: fs.f_blocks,
            blocks_free: fs.f_bfree,
            inodes: fs.f_files,
            inodes_free: fs.f_ffree,
        })
    }

    /// As it was.
    pub fn read(disk: &Target) -> Option<Self> {
        let bytes = fs::read(disk.dir().join(STATS)).ok()?;
        let bytes: &[u8; 40] = bytes.as_slice().try_into().ok()?;
        let (numbers, _) = bytes.as_chunks::<8>();
        let mut numbers = numbers.iter().map(|n| u64::from_le_bytes(*n));
        let mut next = || numbers.next();
        Some(Self {
            block: next()?,
            blocks: next()?,
            blocks_free: next()?,
            inodes: next()?,
            inodes_free: next()?,
        })
    }

    /// Keeps it; a remark that is not written is no failure.
    pub fn keep(&self, disk: &Target) {
        let all = [
            self.block,
            self.blocks,
            self.blocks_free,
            self.inodes,
            self.inodes_free,
        ];
        let bytes: Vec<u8> = all.iter().flat_map(|n| n.to_le_bytes()).collect();
        if let Target::Bundle { dir } = disk {
            let _ = fs::write(dir.join(STATS), bytes);
        }
    }

    /// Forgets what it was: from now on it changes.
    pub fn forget(disk: &Target) {
        if let Target::Bundle { dir } = disk {
            let _ = fs::remove_file(dir.join(STATS));
        }
    }

    /// As `ploop info` shows it.
    pub fn table(&self) -> String {
        let kib = |blocks: u64| blocks.saturating_mul(self.block) / 1024;
        let row = |name: &str, size: u64, free: u64| {
            format!("{name:>11} {size:>14} {:>14}\n", size.saturating_sub(free))
        };
        format!("{:>11} {:>14} {:>14}\n", "resource", "Size", "Used")
            + &row("1k-blocks", kib(self.blocks), kib(self.blocks_free))
            + &row("inodes", self.inodes, self.inodes_free)
    }
}
