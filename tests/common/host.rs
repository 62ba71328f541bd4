//! Host: a small file system of its own that disks lie on, to be filled.

use super::process::{ok, run};
use super::programs::tool;
use super::serve::Disk;
use std::fs::{self, File};
use std::path::PathBuf;
use tempfile::TempDir;

/// What a file system gives at least.
const BLOCK: u64 = 4096;

/// A small file system of its own, as the host of disks.
pub struct Host {
    folder: TempDir,
    /// Bytes of it.
    pub size: u64,
}

impl Host {
    /// Of so many bytes, an ext4.
    pub fn new(size: u64) -> Self {
        Self::on(TempDir::new().unwrap(), size, &["-m", "0"])
    }

    /// With its bytes in a file in `folder`.
    pub fn on(folder: TempDir, size: u64, mkfs: &[&str]) -> Self {
        let bytes = folder.path().join("bytes");
        File::create(&bytes).unwrap().set_len(size).unwrap();
        ok(tool("mkfs.ext4").arg("-q").args(mkfs).arg(&bytes));
        let host = Self { folder, size };
        fs::create_dir(host.path()).unwrap();
        ok(tool("mount")
            .args(["-o", "loop"])
            .arg(&bytes)
            .arg(host.path()));
        host
    }

    /// Its root.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("host")
    }

    /// A disk on it.
    pub fn disk(&self, size: &str, fs: &str) -> Disk {
        Disk::in_folder(TempDir::new_in(self.path()).unwrap(), size, fs, &[])
    }

    /// What disks leave to it: an eighth, because it is small.
    pub fn kept(&self) -> u64 {
        self.free_and_size().1 / 8
    }

    /// Bytes that are free, and all.
    pub fn free_and_size(&self) -> (u64, u64) {
        let stat = rustix::fs::statvfs(self.path()).unwrap();
        (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize)
    }

    /// Leaves so many bytes free.
    pub fn fill_up_to(&self, left: u64) {
        let ballast = File::create(self.ballast()).unwrap();
        let mode = rustix::fs::FallocateFlags::empty();
        let (mut at, mut most) = (0, u64::MAX);
        // The file system writes down what it gives, in what it has.
        while most >= BLOCK {
            let len = self.free_and_size().0.saturating_sub(left).min(most);
            match rustix::fs::fallocate(&ballast, mode, at, len.max(1)) {
                Ok(()) if len == 0 => return,
                Ok(()) => at += len,
                Err(_) => most = len / 2,
            }
        }
    }

    /// Gives all back that was taken.
    pub fn relieve(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = run(tool("umount").arg("--lazy").arg(self.path()));
    }
}
