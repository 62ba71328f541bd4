//! Child: a worker process as its keeper sees it.
//!
//! Started from our own binary, with descriptors at fixed numbers and its configuration as the
//! first message on a socket pair. The worker cannot outlive the keeper: the kernel kills it when
//! its parent dies, and the end of the socket pair tells it the same.

use super::message::{Event, Order, WorkerConfig};
use super::packet;
use command_fds::{CommandFdExt, FdMapping};
use ploop_formats::{Error, Result};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

/// The descriptor of the socket pair in a worker.
pub const CONTROL_FD: RawFd = 3;
/// Longest message in bytes: configuration and errors, never data.
pub const MESSAGE_MAX: usize = 64 << 10;

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    pidfd: OwnedFd,
    control: OwnedFd,
    /// What it prints, when it does not print to our own standard error.
    pub output: Option<OwnedFd>,
    /// When it said that it serves.
    pub ready: Option<Instant>,
    told: bool,
    /// It was killed by us.
    pub condemned: bool,
    /// It closed its end: nothing more will be said, though it may take long to end.
    mute: bool,
}

/// Descriptors on their way into a child, numbered from 4 on.
#[derive(Debug, Default)]
pub struct Baggage {
    mappings: Vec<FdMapping>,
}

impl Baggage {
    /// Packs a copy of `fd`: its number in the child.
    pub fn pack(&mut self, fd: impl AsFd) -> Result<RawFd> {
        let child_fd = CONTROL_FD + 1 + self.mappings.len() as RawFd;
        let parent_fd = fd.as_fd().try_clone_to_owned()?;
        self.mappings.push(FdMapping {
            parent_fd,
            child_fd,
        });
        Ok(child_fd)
    }
}

impl Worker {
    /// Starts a worker. With `capture` what it prints comes through a pipe.
    pub fn start(config: &WorkerConfig, mut baggage: Baggage, capture: bool) -> Result<Self> {
        let (control, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(io::Error::from)?;
        baggage.mappings.push(FdMapping {
            parent_fd: theirs,
            child_fd: CONTROL_FD,
        });
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("ploopd")
            .arg("--worker")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if capture {
                Stdio::piped()
            } else {
                Stdio::inherit()
            })
            // A terminal's Ctrl-C is for the keeper, which then stops the worker in order.
            .process_group(0)
            .fd_mappings(baggage.mappings)
            .map_err(|e| Error::invalid(e.to_string()))?;
        if capture {
            command.arg("--captured");
        }
        let mut child = command
            .spawn()
            .map_err(|e| Error::from(e).at("starting a worker"))?;
        drop(command);
        let pid = Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        let output = child.stderr.take().map(OwnedFd::from);
        let pidfd = pidfd.map_err(io::Error::from)?;
        let worker = Self {
            child,
            pidfd,
            control,
            output,
            ready: None,
            told: false,
            condemned: false,
            mute: false,
        };
        worker.send(config)?;
        Ok(worker)
    }

    fn send(&self, message: &impl serde::Serialize) -> Result<()> {
        self.pass(message, &[])
    }

    fn pass(&self, message: &impl serde::Serialize, fds: &[BorrowedFd<'_>]) -> Result<()> {
        packet::send(&self.control, message, fds).map_err(|e| e.at("telling the worker"))
    }

    /// Gives it an order and what belongs to that.
    pub fn order(&self, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.pass(order, fds)
    }

    /// Tells it, once, to close the image and go. A worker that is dead already is no error: its
    /// exit is seen elsewhere.
    pub fn order_stop(&mut self) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        if let Err(e) = self.send(&Order::Stop) {
            tracing::debug!("{e}");
        }
    }

    /// Ends it at once, to make room for another; nothing it says counts any more.
    pub fn condemn(&mut self) {
        self.condemned = true;
        if let Err(e) = self.child.kill() {
            tracing::debug!("{e}");
        }
    }

    /// Its next message, if one is there.
    pub fn event(&mut self) -> Option<Event> {
        let mut buf = vec![0u8; MESSAGE_MAX];
        let flags = RecvFlags::DONTWAIT;
        let len = match rustix::net::recv(&self.control, buf.as_mut_slice(), flags) {
            Err(Errno::AGAIN | Errno::INTR) => return None,
            done => done.map_or(0, |(_, len)| len),
        };
        self.mute = len == 0;
        serde_json::from_slice(buf.get(..len).filter(|b| !b.is_empty())?).ok()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Becomes readable when it has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Becomes readable when it has said something.
    pub fn spoke(&self) -> Option<BorrowedFd<'_>> {
        (!self.mute).then(|| self.control.as_fd())
    }

    /// How it ended; call when [`Worker::ended`] is readable.
    pub fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}
