//! Listen: the sockets that clients connect to, made and owned by the keeper.
//!
//! Sockets live as long as the disk is attached, not as long as a worker: a client that connects
//! while one is being replaced waits in the backlog. Nobody but the owner may ever reach a unix
//! socket, and TCP leaves the machine only where TLS is required. The credentials for it are read
//! here, once, so that every worker has them, whatever became of the files.

use super::message::{Listen, Tls};
use crate::io::memfd;
use crate::serve::nbd::credentials::Credentials;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};
use std::fs;
use std::io::{self, IsTerminal};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Sockets of one disk.
#[derive(Debug, Default)]
pub struct Sockets {
    /// First, so that the name is gone before nobody listens: a newcomer who finds a dead socket
    /// replaces it, and the replacement may get the number of the inode that we would remove.
    made: Option<Made>,
    /// Listening sockets.
    pub listeners: Vec<OwnedFd>,
    /// One established connection, until a worker has it: where requests come from and where
    /// replies go.
    pub connection: Option<(OwnedFd, OwnedFd)>,
    /// Where clients connect, as an NBD URI without the export's name.
    pub uri: Option<Uri>,
    /// The credentials for TLS, in a memfd.
    pub credentials: Option<OwnedFd>,
}

/// An address in the form of NBD URIs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uri {
    /// `nbd+unix:///EXPORT?socket=PATH`, with TLS `nbds+unix:`
    Unix(PathBuf),
    /// `nbd://ADDR:PORT/EXPORT`, with TLS `nbds:`
    Tcp(SocketAddr),
}

impl Uri {
    /// The URI of an export, for clients that must, or need not, use TLS.
    pub fn of(&self, export: &str, tls: bool) -> String {
        let export = escape(export, "");
        let scheme = if tls { "nbds" } else { "nbd" };
        match self {
            Uri::Unix(path) => {
                format!(
                    "{scheme}+unix:///{export}?socket={}",
                    escape(&path.to_string_lossy(), "/")
                )
            }
            Uri::Tcp(addr) => format!("{scheme}://{addr}/{export}"),
        }
    }
}

/// Percent-encodes what a URI reserves.
fn escape(text: &str, plain: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || plain.contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// A unix socket in the file system; dropping it removes the socket that is still ours.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Drop for Made {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path).ok();
        if there.is_some_and(|m| m.dev() == self.dev && m.ino() == self.ino) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Sockets {
    /// Makes or takes the sockets that `listen` asks for, once the credentials for `tls` are
    /// read. `inherited` hands out descriptors that this process was started with.
    pub fn open(
        listen: &Listen,
        tls: Option<&Tls>,
        inherited: impl Fn(i32) -> Result<OwnedFd>,
    ) -> Result<Self> {
        let credentials = tls.map(credentials).transpose()?;
        let required = tls.is_some_and(|tls| tls.required);
        let sockets = match listen {
            Listen::Unix(path) => unix(path)?,
            Listen::Tcp(addr) => tcp(*addr, required)?,
            Listen::Stdio => stdio(required)?,
            Listen::Inherited(count) => {
                let fds = (0..*count as i32).map(|n| listening(inherited(n + 3)?, required));
                Self {
                    listeners: fds.collect::<Result<_>>()?,
                    ..Self::default()
                }
            }
        };
        Ok(Self {
            credentials,
            ..sockets
        })
    }

    /// The unix socket in the file system, when there is one.
    pub fn path(&self) -> Option<&Path> {
        self.made.as_ref().map(|m| m.path.as_path())
    }

    /// Whether the server ends with its last client.
    pub fn ends_with_clients(listen: &Listen) -> bool {
        matches!(listen, Listen::Stdio | Listen::Inherited(_))
    }
}

fn credentials(tls: &Tls) -> Result<OwnedFd> {
    let credentials = Credentials::read(&tls.folder)?;
    if !credentials.asks_clients() {
        tracing::warn!(
            "{}: no ca-cert.pem, so clients are not asked for certificates: whoever can connect \
             can use the disk",
            tls.folder.display()
        );
    }
    let text = serde_json::to_vec(&credentials).map_err(io::Error::from)?;
    memfd::sealed("ploop-credentials", &text)
}

fn unix(path: &Path) -> Result<Sockets> {
    let at = |e: io::Error| Error::from(e).at(path.display());
    make_room(path)?;
    // The mask makes bind(2) create it with mode 0600; nobody can connect in between.
    let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(mask);
    let listener = bound.map_err(at)?;
    let meta = fs::symlink_metadata(path).map_err(at)?;
    let made = Made {
        path: path.to_path_buf(),
        dev: meta.dev(),
        ino: meta.ino(),
    };
    let path = path.to_path_buf();
    Ok(Sockets {
        listeners: vec![listener.into()],
        uri: Some(Uri::Unix(path)),
        made: Some(made),
        ..Sockets::default()
    })
}

/// Removes a socket that nobody serves; refuses everything else that is in the way.
fn make_room(path: &Path) -> Result<()> {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(Error::new(
            Kind::Exists,
            format!(
                "{}: exists and is not a socket; it is left alone",
                path.display()
            ),
        ));
    }
    match is_dead(path) {
        true => fs::remove_file(path).map_err(|e| Error::from(e).at(path.display())),
        false => Err(Error::new(
            Kind::Busy,
            format!("{}: another server listens on this socket", path.display()),
        )),
    }
}

/// Whether nobody listens on a unix socket any more. Never waits: a server with a full backlog is
/// alive.
pub(super) fn is_dead(path: &Path) -> bool {
    let refused = || {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)
    };
    refused() == Err(Errno::CONNREFUSED)
}

/// Whether clients of this address may go without TLS.
fn check_exposure(addr: SocketAddr, required: bool) -> Result<()> {
    match required || addr.ip().is_loopback() {
        true => Ok(()),
        false => Err(Error::unsupported(format!(
            "{addr} is not a loopback address: NBD without TLS would show the disk to the \
             network; require it with --tls-creds, or serve on 127.0.0.1 and forward the port \
             through ssh"
        ))),
    }
}

/// The same for a socket that somebody else made; others than of TCP stay on the machine.
fn check_socket(fd: impl AsFd, required: bool) -> Result<()> {
    let addr = rustix::net::getsockname(fd).ok();
    match addr.and_then(|addr| SocketAddr::try_from(addr).ok()) {
        Some(addr) => check_exposure(addr, required),
        None => Ok(()),
    }
}

fn tcp(addr: SocketAddr, required: bool) -> Result<Sockets> {
    check_exposure(addr, required)?;
    let listener = TcpListener::bind(addr).map_err(|e| Error::from(e).at(addr))?;
    let addr = listener.local_addr().map_err(|e| Error::from(e).at(addr))?;
    Ok(Sockets {
        listeners: vec![listener.into()],
        uri: Some(Uri::Tcp(addr)),
        ..Sockets::default()
    })
}

/// Takes the client from standard input and output and leaves nothing of it here, so that it sees
/// the end when the worker ends.
fn stdio(required: bool) -> Result<Sockets> {
    let at = |e: rustix::io::Errno| Error::from(io::Error::from(e)).at("standard input and output");
    let (stdin, stdout) = (io::stdin(), io::stdout());
    if stdin.is_terminal() || stdout.is_terminal() {
        return Err(Error::invalid(
            "--nbd - speaks NBD on standard input and output, and one of them is a terminal",
        ));
    }
    check_socket(&stdin, required)?;
    check_socket(&stdout, required)?;
    let input = rustix::io::fcntl_dupfd_cloexec(&stdin, 3).map_err(at)?;
    let output = rustix::io::fcntl_dupfd_cloexec(&stdout, 3).map_err(at)?;
    let null = rustix::fs::openat(CWD, "/dev/null", rustix::fs::OFlags::RDWR, Mode::empty());
    let null = null.map_err(at)?;
    rustix::stdio::dup2_stdin(&null).map_err(at)?;
    rustix::stdio::dup2_stdout(&null).map_err(at)?;
    Ok(Sockets {
        connection: Some((input, output)),
        ..Sockets::default()
    })
}

fn listening(fd: OwnedFd, required: bool) -> Result<OwnedFd> {
    check_socket(&fd, required)?;
    match sockopt::socket_acceptconn(fd.as_fd()) {
        Ok(true) => Ok(fd),
        _ => Err(Error::invalid(
            "LISTEN_FDS: an inherited descriptor is not a listening socket",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn unix_at(path: &Path) -> Result<Sockets> {
        Sockets::open(&Listen::Unix(path.to_path_buf()), None, |_| unreachable!())
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).expect("bind"));
        let ours = unix_at(&path).expect("replaces the stale one");
        let mode = fs::metadata(&path).expect("socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(unix_at(&path).map_err(|e| e.kind()).err(), Some(Kind::Busy));
        drop(ours);
        assert!(!path.exists());
        fs::write(&path, "precious").expect("write");
        assert_eq!(
            unix_at(&path).map_err(|e| e.kind()).err(),
            Some(Kind::Exists)
        );
        assert_eq!(fs::read(&path).expect("read"), b"precious");
    }

    #[test]
    fn a_server_that_accepts_nobody_is_alive_and_not_waited_for() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bind");
        rustix::net::listen(&listener, 0).expect("a short backlog");
        let address = SocketAddrUnix::new(&path).expect("address");
        let flags = SocketFlags::NONBLOCK;
        let waiting: Vec<_> = std::iter::from_fn(|| {
            let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            let client = client.expect("socket");
            connect(&client, &address).ok().map(|()| client)
        })
        .collect();
        assert!(!waiting.is_empty());
        let (done, outcome) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(unix_at(&path).map_err(|e| e.kind()).err()));
        let outcome = outcome.recv_timeout(std::time::Duration::from_secs(10));
        assert_eq!(outcome, Ok(Some(Kind::Busy)));
    }

    #[test]
    fn an_address_off_the_machine_is_refused() {
        let addr = "0.0.0.0:0".parse().expect("address");
        let refused = Sockets::open(&Listen::Tcp(addr), None, |_| unreachable!());
        let refused = refused.expect_err("everybody could connect");
        assert_eq!(refused.kind(), Kind::Unsupported);
        assert!(refused.to_string().contains("--tls-creds"), "{refused}");
        assert!(tcp(addr, true).is_ok(), "TLS protects it");
    }

    #[test]
    fn an_inherited_socket_off_the_machine_is_refused() {
        for (addr, required, good) in [
            ("0.0.0.0:0", false, false),
            ("[::]:0", false, false),
            ("0.0.0.0:0", true, true),
            ("127.0.0.1:0", false, true),
        ] {
            let Ok(socket) = TcpListener::bind(addr) else {
                continue;
            };
            assert_eq!(listening(socket.into(), required).is_ok(), good, "{addr}");
        }
    }

    #[test]
    fn a_uri_survives_odd_names() {
        let uri = Uri::Unix("/tmp/a b".into());
        assert_eq!(uri.of("x y", false), "nbd+unix:///x%20y?socket=/tmp/a%20b");
        assert_eq!(uri.of("", false), "nbd+unix:///?socket=/tmp/a%20b");
        assert_eq!(uri.of("", true), "nbds+unix:///?socket=/tmp/a%20b");
        let uri = Uri::Tcp("[::1]:10809".parse().expect("address"));
        assert_eq!(uri.of("x", true), "nbds://[::1]:10809/x");
    }
}
