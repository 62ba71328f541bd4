//! Log: one file per attached disk, `log` in its run directory, at most two times 1 MiB.
//!
//! The keeper is the only writer: what a worker prints (a panic, too) arrives through a pipe, so
//! that turning the file over needs no agreement.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Length at which the log is turned over to `log.1`, in bytes.
const TURN: u64 = 1 << 20;

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: File,
    len: u64,
}

/// A log file that turns itself over. Clones share it.
#[derive(Debug, Clone)]
pub struct Log {
    open: Arc<Mutex<Open>>,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

impl Log {
    /// Opens or creates the log.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let len = file.metadata()?.len();
        let path = path.to_path_buf();
        Ok(Self {
            open: Arc::new(Mutex::new(Open { path, file, len })),
        })
    }
}

impl Log {
    /// Makes this process's standard error a second way into the log, for panics.
    pub fn take_stderr(&self) {
        let log = self.open.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(e) = rustix::stdio::dup2_stderr(&log.file) {
            tracing::warn!("standard error stays where it is: {e}");
        }
    }
}

impl Open {
    fn turn_over(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, self.path.with_extension("1"))?;
        self.file = open(&self.path)?;
        self.len = 0;
        Ok(())
    }
}

impl Write for Log {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut log = self.open.lock().unwrap_or_else(|e| e.into_inner());
        if log.len >= TURN {
            // A log that cannot be turned over grows rather than fall silent.
            log.turn_over().unwrap_or_else(|_| log.len = 0);
        }
        let n = log.file.write(buf)?;
        log.len = log.len.saturating_add(n as u64);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_never_grows_beyond_two_files_of_a_mebibyte() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("log");
        let mut log = Log::open(&path).expect("open");
        let line = [b'x'; 1000];
        for _ in 0..5000 {
            log.write_all(&line).expect("write");
        }
        let sizes: Vec<u64> = std::fs::read_dir(dir.path())
            .expect("list")
            .map(|e| e.expect("entry").metadata().expect("metadata").len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|s| *s <= TURN + 1000), "{sizes:?}");
    }
}
