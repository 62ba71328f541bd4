//! Child: a worker, or an aide, as its keeper sees it.
//!
//! Started from our own binary, with descriptors at fixed numbers and its configuration as the
//! first message on a socket pair. The worker cannot outlive the keeper: the kernel kills it when
//! its parent dies, and the end of the socket pair tells it the same.

use super::message::{Event, Order, WorkerConfig};
use super::packet;
use command_fds::{CommandFdExt, FdMapping};
use ploop_formats::{Error, Kind, Result};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
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

/// A process that does one thing for its keeper, and is left alone when that is not wanted any more.
#[derive(Debug)]
pub struct Aide {
    child: Child,
    pidfd: OwnedFd,
    /// None once it was left alone.
    talk: Option<OwnedFd>,
}

impl Aide {
    /// Starts one with these arguments.
    pub fn start(args: &[&str], bag: Baggage) -> Result<Self> {
        let launched = launch(args, bag, Stdio::inherit())?;
        Ok(Self {
            child: launched.child,
            pidfd: launched.pidfd,
            talk: Some(launched.control),
        })
    }

    /// Becomes readable when it has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Becomes readable when it has said something.
    pub fn spoke(&self) -> Option<BorrowedFd<'_>> {
        self.talk.as_ref().map(AsFd::as_fd)
    }

    /// What it said, if anything.
    pub fn said<T: serde::de::DeserializeOwned>(&mut self) -> Option<T> {
        match packet::receive(self.talk.as_ref()?) {
            Ok(said) => said.map(|(said, _)| said),
            Err(_) => {
                self.talk = None;
                None
            }
        }
    }

    /// Tells it something. Whether it heard that.
    pub fn tell(&self, what: &impl serde::Serialize) -> bool {
        let told = |talk| packet::send(talk, what, &[]).is_ok();
        self.talk.as_ref().is_some_and(told)
    }

    /// Ends it where it is.
    pub fn kill(&mut self) {
        if let Err(e) = self.child.kill() {
            tracing::debug!("{e}");
        }
    }

    /// Says no more to it: it ends by itself, and leaves things as they should be.
    pub fn leave_alone(&mut self) {
        self.talk = None;
    }

    /// Call when [`Aide::ended`] is readable.
    pub fn reap(&mut self) {
        if let Err(e) = self.child.wait() {
            tracing::debug!("{e}");
        }
    }
}

/// A process of our own binary that was just started.
struct Launched {
    child: Child,
    pidfd: OwnedFd,
    /// Our end of a socket pair, whose other end it has at [`CONTROL_FD`].
    control: OwnedFd,
}

/// Starts our own binary.
fn launch(args: &[&str], mut baggage: Baggage, stderr: Stdio) -> Result<Launched> {
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
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        // A terminal's Ctrl-C is for the keeper, which then stops its processes in order.
        .process_group(0)
        .fd_mappings(baggage.mappings)
        .map_err(|e| Error::invalid(e.to_string()))?;
    let child = command.spawn()?;
    drop(command);
    let pid = Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
    Ok(Launched {
        child,
        pidfd: pidfd.map_err(io::Error::from)?,
        control,
    })
}

impl Worker {
    /// Starts a worker. With `capture` what it prints comes through a pipe.
    pub fn start(config: &WorkerConfig, baggage: Baggage, capture: bool) -> Result<Self> {
        let launched = match capture {
            true => launch(&["--worker", "--captured"], baggage, Stdio::piped()),
            false => launch(&["--worker"], baggage, Stdio::inherit()),
        };
        let Launched {
            mut child,
            pidfd,
            control,
        } = launched.map_err(|e| e.at("starting a worker"))?;
        let output = child.stderr.take().map(OwnedFd::from);
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
        worker.tell(config, &[])?;
        Ok(worker)
    }

    fn tell(&self, message: &impl serde::Serialize, fds: &[BorrowedFd<'_>]) -> Result<()> {
        packet::send(&self.control, message, fds).map_err(|e| e.at("telling the worker"))
    }

    /// Gives it an order and what belongs to that.
    pub fn order(&self, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.tell(order, fds)
    }

    /// Tells it, once, to close the image and go. A worker that is dead already is no error: its
    /// exit is seen elsewhere.
    pub fn order_stop(&mut self) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        if let Err(e) = self.order(&Order::Stop, &[]) {
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
        match packet::receive(&self.control) {
            Ok(event) => event.map(|(event, _)| event),
            Err(e) => {
                // What nobody understands is said all the same.
                self.mute = e.kind() != Kind::Invalid;
                None
            }
        }
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
