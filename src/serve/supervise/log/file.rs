//! The log file: `log` in a run directory, at most two times 1 MiB.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Length at which the log is turned over to `log.1`, in bytes.
const TURN: u64 = 1 << 20;

/// A log file that turns itself over. It has one writer.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    len: u64,
    /// This process's standard error goes here, too.
    stderr: bool,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

impl LogFile {
    /// Opens or creates it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let len = file.metadata()?.len();
        let path = path.to_path_buf();
        let stderr = false;
        Ok(Self {
            path,
            file,
            len,
            stderr,
        })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes this process's standard error a second way into it.
    pub(super) fn take_stderr(&mut self) -> io::Result<()> {
        rustix::stdio::dup2_stderr(&self.file)?;
        self.stderr = true;
        Ok(())
    }

    /// Adds a line.
    pub(super) fn line(&mut self, line: &str) -> io::Result<()> {
        if self.len >= TURN {
            // A log that cannot be turned over grows rather than fall silent.
            self.turn_over().unwrap_or_else(|_| self.len = 0);
        }
        self.file.write_all(format!("{line}\n").as_bytes())?;
        self.len = self.len.saturating_add(line.len() as u64 + 1);
        Ok(())
    }

    fn turn_over(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, self.path.with_extension("1"))?;
        self.file = open(&self.path)?;
        self.len = 0;
        match self.stderr {
            true => self.take_stderr(),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_never_grows_beyond_two_files_of_a_mebibyte() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path).expect("open");
        let line = "x".repeat(1000);
        for _ in 0..5000 {
            log.line(&line).expect("write");
        }
        let sizes: Vec<u64> = std::fs::read_dir(dir.path())
            .expect("list")
            .map(|e| e.expect("entry").metadata().expect("metadata").len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|s| *s <= TURN + 1001), "{sizes:?}");
    }

    #[test]
    fn standard_error_follows_a_log_that_is_turned_over() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path).expect("open");
        let before = rustix::io::dup(rustix::stdio::stderr()).expect("a copy");
        log.take_stderr().expect("taken");
        let line = "x".repeat(1000);
        for _ in 0..5000 {
            log.line(&line).expect("write");
        }
        let said = rustix::io::write(rustix::stdio::stderr(), b"a panic\n");
        rustix::stdio::dup2_stderr(&before).expect("given back");
        said.expect("said");
        let text = std::fs::read_to_string(&path).expect("log");
        assert!(text.contains("a panic\n"));
    }
}
