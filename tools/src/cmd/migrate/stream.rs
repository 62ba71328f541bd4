//! Stream: the two ends of bytes that a migration goes over: this process's own, a socket's, or those
//! of a command that was started for it.

use crate::cancel::Cancel;
use ploop::{Error, Kind, Result};
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, IsTerminal, Read, Write, stdin, stdout};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How often a signal is looked for while nobody connects.
const BLINK: Duration = Duration::from_millis(50);

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(PathBuf);

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self(path.into())),
            _ => Err("an address is unix:PATH".into()),
        }
    }
}

/// Two ends.
pub struct Ends {
    /// What comes.
    pub input: Box<dyn Read + Send>,
    /// What goes.
    pub out: Box<dyn Write + Send>,
    /// Standard output is taken: what is to be said goes to standard error.
    pub is_stdout: bool,
}

/// The ends of this process.
pub fn own() -> Result<Ends> {
    if stdin().is_terminal() || stdout().is_terminal() {
        return Err(Error::new(
            Kind::Usage,
            "standard input and output are a terminal, and are to be the link: name a socket, or a \
             command after --",
        ));
    }
    Ok(Ends {
        input: Box::new(File::from(stdin().as_fd().try_clone_to_owned()?)),
        out: Box::new(File::from(stdout().as_fd().try_clone_to_owned()?)),
        is_stdout: true,
    })
}

/// Those of a command, which ends when they do.
pub fn of_command(command: &[String]) -> Result<Ends> {
    let (program, args) = command
        .split_first()
        .ok_or_else(|| Error::new(Kind::Usage, "no command after --"))?;
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|e| Error::from(e).at(program))?;
    let (Some(input), Some(out)) = (child.stdout.take(), child.stdin.take()) else {
        return Err(Error::invalid("a command without ends"));
    };
    Ok(Ends {
        input: Box::new(input),
        out: Box::new(out),
        is_stdout: false,
    })
}

/// Those of a socket that somebody listens on.
pub fn to(address: &Address) -> Result<Ends> {
    let path = &address.0;
    let stream = UnixStream::connect(path);
    of_socket(stream.map_err(|e| Error::from(e).at(path.display()))?)
}

/// Those of the first who connects. The socket is its owner's only, and goes then.
pub fn listen(address: &Address, cancel: &Cancel) -> Result<Ends> {
    let path = &address.0;
    let at = |e: std::io::Error| Error::from(e).at(path.display());
    let listener = UnixListener::bind(path).map_err(at)?;
    let came = accept(&listener, path, cancel);
    let _ = fs::remove_file(path);
    of_socket(came?)
}

fn accept(listener: &UnixListener, path: &PathBuf, cancel: &Cancel) -> Result<UnixStream> {
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                cancel.check()?;
                std::thread::sleep(BLINK);
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Hangs up when it is dropped, although the other end is still read by a thread.
struct Hangup(UnixStream);

impl Write for Hangup {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for Hangup {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn of_socket(stream: UnixStream) -> Result<Ends> {
    Ok(Ends {
        input: Box::new(stream.try_clone()?),
        out: Box::new(Hangup(stream)),
        is_stdout: false,
    })
}
