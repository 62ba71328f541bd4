//! Log: where the keeper of an attached disk says what happens to it, one line an event.
//!
//! The journal or syslog where one is there, else a file in the run directory, which also takes
//! what a log daemon does not. The keeper is the only writer: what a worker prints (a panic, too)
//! arrives through a pipe, so a worker needs no way to a daemon, and turning the file over needs no
//! agreement. Nobody is waited for.

mod datagram;
mod file;

use super::message::Destination;
use datagram::{Daemon, Language};
use file::LogFile;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where systemd's journal listens.
const JOURNAL: &str = "/run/systemd/journal/socket";
/// Where syslog listens.
const SYSLOG: &str = "/dev/log";
/// Longest event in bytes; the rest is cut off.
const EVENT_MAX: usize = 8 << 10;

/// How much an event matters, with syslog's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Something failed.
    Error = 3,
    /// Something is not as it should be.
    Warning = 4,
    /// Something happened.
    Info = 6,
    /// For developers.
    Debug = 7,
}

impl From<&tracing::Level> for Priority {
    fn from(level: &tracing::Level) -> Self {
        match *level {
            tracing::Level::ERROR => Self::Error,
            tracing::Level::WARN => Self::Warning,
            tracing::Level::INFO => Self::Info,
            _ => Self::Debug,
        }
    }
}

impl Priority {
    /// Puts it in front of a line on its way to [`Log::raw`].
    pub fn mark(self, line: &str) -> String {
        format!("<{}>{}\n", self as u8, one_line(line))
    }

    /// What [`Priority::mark`] made. Unmarked lines come from panics.
    fn split(line: &str) -> (Self, &str) {
        let all = [Self::Error, Self::Warning, Self::Info, Self::Debug];
        let marked = all.into_iter().find_map(|priority| {
            let rest = line.strip_prefix(&format!("<{}>", priority as u8))?;
            Some((priority, rest))
        });
        marked.unwrap_or((Self::Error, line))
    }
}

/// The log of one disk. Clones share it.
#[derive(Debug, Clone)]
pub struct Log(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    disk: String,
    daemon: Option<Daemon>,
    file: LogFile,
    /// The beginning of a line of the worker's.
    partial: Vec<u8>,
}

impl Log {
    /// The log of `disk`, with its file at `file`. A destination that is not there is replaced by
    /// the file, which then says so when it was asked for by name.
    pub fn open(file: &Path, disk: &str, to: Destination) -> io::Result<Self> {
        let journal = || Daemon::connect(JOURNAL.as_ref(), Language::Journal);
        let syslog = || Daemon::connect(SYSLOG.as_ref(), Language::Syslog);
        let (daemon, missing) = match to {
            Destination::File => (None, None),
            Destination::Auto => (journal().or_else(|_| syslog()).ok(), None),
            Destination::Journal => named(JOURNAL, journal()),
            Destination::Syslog => named(SYSLOG, syslog()),
        };
        let log = Self::over(file, disk, daemon)?;
        if let Some(missing) = missing {
            log.event(Priority::Warning, &missing);
        }
        Ok(log)
    }

    fn over(file: &Path, disk: &str, daemon: Option<Daemon>) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Inner {
            disk: disk.to_string(),
            daemon,
            file: LogFile::open(file)?,
            partial: Vec::new(),
        }))))
    }

    /// Where events go: `journal`, `syslog`, or the path of a file.
    pub fn place(&self) -> String {
        let inner = self.inner();
        match inner.daemon.as_ref().map(Daemon::language) {
            Some(Language::Journal) => "journal".into(),
            Some(Language::Syslog) => "syslog".into(),
            None => inner.file.path().display().to_string(),
        }
    }

    /// The end of a message that sends people to the log of a disk that is about to be detached:
    /// the file will be at `kept`.
    pub fn hint(&self, kept: &Path) -> String {
        let inner = self.inner();
        match inner.daemon.as_ref().map(Daemon::language) {
            Some(Language::Journal) => format!("; see journalctl PLOOP_DISK={}", inner.disk),
            Some(Language::Syslog) => "; see the messages of ploopd in the system's log".into(),
            None => format!("; see {}", kept.display()),
        }
    }

    /// Says what happened.
    pub fn event(&self, priority: Priority, text: &str) {
        self.inner().event(priority, text);
    }

    /// Takes what a worker printed: lines, each as [`Priority::mark`] made it, or as it is.
    pub fn raw(&self, bytes: &[u8]) {
        let mut inner = self.inner();
        inner.partial.extend_from_slice(bytes);
        while let Some(end) = inner.partial.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = inner.partial.drain(..=end).collect();
            inner.line(&line);
        }
        if inner.partial.len() >= EVENT_MAX {
            inner.end_line();
        }
    }

    /// The worker prints no more.
    pub fn end_raw(&self) {
        self.inner().end_line();
    }

    /// Makes this process's standard error a second way into the file, for panics.
    pub fn take_stderr(&self) {
        let taken = self.inner().file.take_stderr();
        if let Err(e) = taken {
            self.event(
                Priority::Warning,
                &format!("standard error stays where it is: {e}"),
            );
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A daemon that was asked for by name, or why it is not there.
fn named(path: &str, daemon: io::Result<Daemon>) -> (Option<Daemon>, Option<String>) {
    match daemon {
        Ok(daemon) => (Some(daemon), None),
        Err(e) => (None, Some(format!("logging here: {path}: {e}"))),
    }
}

impl Inner {
    fn line(&mut self, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        let (priority, text) = Priority::split(line.trim_end());
        if !text.is_empty() {
            self.event(priority, text);
        }
    }

    fn end_line(&mut self) {
        let rest = std::mem::take(&mut self.partial);
        self.line(&rest);
    }

    fn event(&mut self, priority: Priority, text: &str) {
        let text = one_line(text);
        let text = text.strip_prefix(&self.disk).map_or(text.as_str(), |rest| {
            // Most errors name the disk themselves.
            rest.strip_prefix(": ").unwrap_or(&text)
        });
        let text = cut(text, EVENT_MAX);
        let daemon = self.daemon.as_mut();
        if daemon.is_some_and(|d| d.send(priority, &self.disk, text).is_ok()) {
            return;
        }
        let word = format!("{priority:?}").to_uppercase();
        let now = rfc3339(SystemTime::now());
        let line = format!("{now} {word:7} {}: {text}", one_line(&self.disk));
        // There is nobody left to tell.
        let _ = self.file.line(&line);
    }
}

/// Without what would make it two lines.
fn one_line(text: &str) -> String {
    text.trim_end().replace(['\n', '\r'], " ")
}

fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev();
    let end = end.into_iter().find(|n| text.is_char_boundary(*n));
    text.get(..end.unwrap_or(0)).unwrap_or_default()
}

/// A time as RFC 3339 has it, in UTC, to the millisecond.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.{:03}Z",
        second % 60,
        since.subsec_millis()
    )
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let (mut year, mut left) = (1970, days);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in months {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn file_of(dir: &tempfile::TempDir) -> String {
        std::fs::read_to_string(dir.path().join("log")).expect("log")
    }

    #[test]
    fn every_event_is_a_line_with_a_time_a_priority_and_the_disk() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("log");
        let log = Log::over(&path, "/ct/100", None).expect("open");
        assert_eq!(log.place(), path.display().to_string());
        assert_eq!(log.hint("/kept".as_ref()), "; see /kept");
        log.event(Priority::Error, "/ct/100: it\nfailed");
        let marked = Priority::Info.mark("I/O engine: io_uring\n");
        // A pipe cuts where it likes.
        log.raw(&marked.as_bytes()[..7]);
        log.raw(&marked.as_bytes()[7..]);
        log.raw(b"thread 'main' panicked\n\nat home");
        log.end_raw();
        let said = file_of(&dir);
        let lines: Vec<&str> = said.lines().map(|l| &l[25..]).collect();
        assert_eq!(
            lines,
            [
                "ERROR   /ct/100: it failed",
                "INFO    /ct/100: I/O engine: io_uring",
                "ERROR   /ct/100: thread 'main' panicked",
                "ERROR   /ct/100: at home",
            ]
        );
        log.raw(&vec![b'x'; 100_000]);
        assert!(file_of(&dir).len() < 20_000, "a line without end is cut");
    }

    #[test]
    fn what_a_daemon_does_not_take_is_in_the_file() {
        let dir = tempfile::tempdir().expect("temp dir");
        let socket = dir.path().join("socket");
        let listener = UnixDatagram::bind(&socket).expect("bind");
        let daemon = Daemon::connect(&socket, Language::Journal).expect("connect");
        let log = Log::over(&dir.path().join("log"), "/d", Some(daemon)).expect("open");
        assert_eq!(log.place(), "journal");
        log.event(Priority::Info, "one");
        let mut buf = [0; 1000];
        assert!(listener.recv(&mut buf).expect("an event") > 0);
        assert_eq!(file_of(&dir), "");
        drop(listener);
        log.event(Priority::Warning, "two");
        assert!(
            file_of(&dir).ends_with(" WARNING /d: two\n"),
            "{}",
            file_of(&dir)
        );
    }

    #[test]
    fn a_daemon_that_is_wanted_and_missing_is_named_in_the_file() {
        if Path::new(SYSLOG).exists() {
            return;
        }
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("log");
        let log = Log::open(&path, "/d", Destination::Syslog).expect("open");
        assert_eq!(log.place(), path.display().to_string());
        assert!(
            file_of(&dir).contains("/d: logging here: /dev/log: "),
            "{}",
            file_of(&dir)
        );
    }

    #[test]
    fn times_are_written_as_rfc_3339_wants() {
        let at = |s: u64, ms: u64| rfc3339(UNIX_EPOCH + Duration::from_millis(s * 1000 + ms));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400, 7), "2000-02-29T00:00:00.007Z");
        assert_eq!(at(4_107_542_399, 999), "2100-02-28T23:59:59.999Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000Z");
        assert_eq!(at(1_767_225_599, 0), "2025-12-31T23:59:59.000Z");
    }
}
