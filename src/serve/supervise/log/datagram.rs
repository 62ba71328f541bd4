//! Datagram: one event to a log daemon of this host.
//!
//! The journal's own protocol (fields, one a line, of systemd's "Native Journal Protocol"), and
//! syslog's (RFC 3164, without a time: the receiver supplies it, section 4.3.2). Nothing here waits:
//! a daemon that does not take an event does not get it.

use super::Priority;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// What we are called.
const NAME: &str = "ploopd";
/// syslog's number for system daemons.
const FACILITY: u8 = 3;

/// The language of a log daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Language {
    /// Fields.
    Journal,
    /// A line.
    Syslog,
}

/// A way to a log daemon.
#[derive(Debug)]
pub(super) struct Daemon {
    path: PathBuf,
    language: Language,
    socket: UnixDatagram,
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

impl Daemon {
    /// Connects. Fails when no daemon listens there.
    pub(super) fn connect(path: &Path, language: Language) -> io::Result<Self> {
        Ok(Self {
            socket: connect(path)?,
            path: path.to_path_buf(),
            language,
        })
    }

    /// What it speaks.
    pub(super) const fn language(&self) -> Language {
        self.language
    }

    /// Sends an event of a disk.
    pub(super) fn send(&mut self, priority: Priority, disk: &str, text: &str) -> io::Result<()> {
        let message = match self.language {
            Language::Journal => fields(priority, disk, text),
            Language::Syslog => line(priority, disk, text),
        };
        match self.socket.send(&message) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(e),
            // It was restarted: its old socket is dead, and there is a new one.
            Err(_) => {
                self.socket = connect(&self.path)?;
                self.socket.send(&message).map(drop)
            }
            Ok(_) => Ok(()),
        }
    }
}

fn fields(priority: Priority, disk: &str, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let message = format!("{disk}: {text}");
    let priority = (priority as u8).to_string();
    let all = [
        ("MESSAGE", message.as_str()),
        ("PRIORITY", &priority),
        ("SYSLOG_IDENTIFIER", NAME),
        ("PLOOP_DISK", disk),
    ];
    for (name, value) in all {
        out.extend_from_slice(name.as_bytes());
        // A length in place of "=", so that no value can be taken for another field.
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
        out.extend_from_slice(value.as_bytes());
        out.push(b'\n');
    }
    out
}

fn line(priority: Priority, disk: &str, text: &str) -> Vec<u8> {
    let (number, pid) = (FACILITY << 3 | priority as u8, std::process::id());
    let disk = super::one_line(disk);
    format!("<{number}>{NAME}[{pid}]: {disk}: {text}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Listener {
        _dir: tempfile::TempDir,
        path: PathBuf,
        socket: UnixDatagram,
    }

    impl Listener {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("temp dir");
            let path = dir.path().join("socket");
            let socket = UnixDatagram::bind(&path).expect("bind");
            Self {
                _dir: dir,
                path,
                socket,
            }
        }

        fn hear(&self) -> Vec<u8> {
            let mut buf = vec![0; 4096];
            let n = self.socket.recv(&mut buf).expect("a datagram");
            buf.truncate(n);
            buf
        }
    }

    /// Reads what the journal would.
    fn parsed(mut data: &[u8]) -> Vec<(String, String)> {
        let mut found = Vec::new();
        while !data.is_empty() {
            let end = data.iter().position(|b| *b == b'\n').expect("a name");
            let (name, rest) = data.split_at(end);
            let (len, rest) = rest[1..].split_at(8);
            let len = u64::from_le_bytes(len.try_into().expect("8 bytes")) as usize;
            let (value, rest) = rest.split_at(len);
            assert_eq!(rest[0], b'\n');
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
            found.push((text(name), text(value)));
            data = &rest[1..];
        }
        found
    }

    #[test]
    fn the_journal_gets_fields_that_no_disks_name_can_forge() {
        let listener = Listener::new();
        let mut daemon = Daemon::connect(&listener.path, Language::Journal).expect("connect");
        let disk = "/ct/100\nPRIORITY=0";
        daemon
            .send(Priority::Warning, disk, "it is late")
            .expect("sent");
        let fields = parsed(&listener.hear());
        let field = |name: &str| {
            let values: Vec<&str> = fields
                .iter()
                .filter(|f| f.0 == name)
                .map(|f| f.1.as_str())
                .collect();
            assert_eq!(values.len(), 1, "{name}: {fields:?}");
            values[0]
        };
        assert_eq!(field("MESSAGE"), format!("{disk}: it is late"));
        assert_eq!((field("PRIORITY"), field("PLOOP_DISK")), ("4", disk));
        assert_eq!(field("SYSLOG_IDENTIFIER"), "ploopd");
    }

    #[test]
    fn syslog_gets_a_line_with_facility_priority_and_process() {
        let listener = Listener::new();
        let mut daemon = Daemon::connect(&listener.path, Language::Syslog).expect("connect");
        daemon
            .send(Priority::Error, "/ct/1\n<0>00", "gone")
            .expect("sent");
        let said = String::from_utf8(listener.hear()).expect("UTF-8");
        let pid = std::process::id();
        assert_eq!(said, format!("<27>ploopd[{pid}]: /ct/1 <0>00: gone"));
    }

    #[test]
    fn a_daemon_that_was_restarted_is_found_and_one_that_is_full_is_not_waited_for() {
        let listener = Listener::new();
        let mut daemon = Daemon::connect(&listener.path, Language::Syslog).expect("connect");
        std::fs::remove_file(&listener.path).expect("remove");
        let again = UnixDatagram::bind(&listener.path).expect("bind");
        drop(listener.socket);
        daemon.send(Priority::Info, "d", "hello").expect("sent");
        let mut buf = [0; 100];
        assert!(again.recv(&mut buf).is_ok());
        let full = (0..100_000).find_map(|_| daemon.send(Priority::Info, "d", "more").err());
        assert_eq!(full.map(|e| e.kind()), Some(io::ErrorKind::WouldBlock));
        drop(again);
        assert!(daemon.send(Priority::Info, "d", "nobody").is_err());
    }
}
