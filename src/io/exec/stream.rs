//! Sockets, pipes and devices: the same promises under both engines.
//!
//! Under the ring, descriptors may be blocking or not. Under poll, sockets are used with
//! MSG_DONTWAIT and keep their mode; listeners, pipes and devices are switched to O_NONBLOCK,
//! which everybody who shares the open file description sees.

use super::core::{self, Core, Yield};
use super::op::{Memory, Op, Orphan, Parts, advance};
use super::poll::Readiness;
use super::uring::Pending;
use bytes::{Bytes, BytesMut};
use io_uring::{opcode, types};
use rustix::event::PollFlags;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// The file position: what read(2) and write(2) use, and all that streams know.
const NO_OFFSET: u64 = u64::MAX;

fn here() -> io::Result<Rc<Core>> {
    core::current().ok_or_else(|| io::Error::other("called outside of an executor"))
}

/// The count in a completion, or its error.
pub(super) fn count(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

fn again(result: &io::Result<usize>) -> bool {
    result
        .as_ref()
        .is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
}

fn interrupted(result: &io::Result<usize>) -> bool {
    result
        .as_ref()
        .is_err_and(|e| e.kind() == io::ErrorKind::Interrupted)
}

fn no_socket(result: &io::Result<usize>) -> bool {
    result
        .as_ref()
        .is_err_and(|e| e.raw_os_error() == Some(libc::ENOTSOCK))
}

/// Waits until `fd` has one of `events`, an error or a hang-up.
pub(super) async fn ready(fd: &Arc<OwnedFd>, events: PollFlags) -> io::Result<()> {
    let core = here()?;
    if !core.has_ring() {
        Readiness::new(&core, fd, events).await;
        return Ok(());
    }
    loop {
        let op = Op {
            _fd: Arc::clone(fd),
            memory: Memory::None,
            orphan: Orphan::Cancel,
        };
        let raw = types::Fd(fd.as_raw_fd());
        let entry = opcode::PollAdd::new(raw, u32::from(events.bits())).build();
        // SAFETY: the entry names no memory.
        let (_, result) = unsafe { Pending::start(&core, entry, op) }.await;
        let result = count(result);
        if !interrupted(&result) {
            return result.map(|_| ());
        }
    }
}

/// See [`super::recv`].
pub(super) async fn recv(fd: &Arc<OwnedFd>, mut buf: BytesMut) -> (BytesMut, io::Result<usize>) {
    let core = match here() {
        Ok(core) => core,
        Err(e) => return (buf, Err(e)),
    };
    loop {
        let result;
        if core.has_ring() {
            (buf, result) = ring_read(&core, fd, buf).await;
        } else {
            // Lets what was read before be worked on: a busy sender must not starve the others.
            Yield::default().await;
            result = read_now(fd, &mut buf);
        }
        if interrupted(&result) {
            continue;
        }
        if !again(&result) {
            return (buf, result);
        }
        if let Err(e) = ready(fd, PollFlags::IN).await {
            return (buf, Err(e));
        }
    }
}

async fn ring_read(
    core: &Rc<Core>,
    fd: &Arc<OwnedFd>,
    mut buf: BytesMut,
) -> (BytesMut, io::Result<usize>) {
    let len = u32::try_from(buf.len()).unwrap_or(u32::MAX);
    let raw = types::Fd(fd.as_raw_fd());
    let entry = opcode::Read::new(raw, buf.as_mut_ptr(), len)
        .offset(NO_OFFSET)
        .build();
    let op = Op {
        _fd: Arc::clone(fd),
        memory: Memory::Read(buf),
        orphan: Orphan::Cancel,
    };
    // SAFETY: the entry names the buffer's heap memory, which moves into the operation.
    let (op, result) = unsafe { Pending::start(core, entry, op) }.await;
    let Memory::Read(buf) = op.memory else {
        unreachable!("operations keep their memory")
    };
    (buf, count(result))
}

fn read_now(fd: &OwnedFd, buf: &mut BytesMut) -> io::Result<usize> {
    match rustix::net::recv(fd, &mut **buf, RecvFlags::DONTWAIT) {
        Ok((n, _)) => return Ok(n),
        Err(Errno::NOTSOCK) => {}
        Err(e) => return Err(e.into()),
    }
    unblock(fd)?;
    Ok(rustix::io::read(fd, &mut **buf)?)
}

fn unblock(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl_getfl(fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(())
}

/// See [`super::send_all`].
pub(super) async fn send_all(fd: &Arc<OwnedFd>, mut parts: Vec<Bytes>) -> io::Result<()> {
    let mut socket = true;
    advance(&mut parts, 0);
    while !parts.is_empty() {
        let result;
        (parts, result) = send_once(fd, parts, socket).await;
        if socket && no_socket(&result) {
            socket = false;
            continue;
        }
        match wait_for_room(fd, result).await? {
            Some(0) => return Err(io::ErrorKind::WriteZero.into()),
            Some(sent) => advance(&mut parts, sent),
            None => {}
        }
    }
    Ok(())
}

/// See [`super::write_vectored`].
pub(super) async fn write_vectored(fd: &Arc<OwnedFd>, mut parts: Vec<Bytes>) -> io::Result<usize> {
    loop {
        let result;
        (parts, result) = send_once(fd, parts, false).await;
        if let Some(written) = wait_for_room(fd, result).await? {
            return Ok(written);
        }
    }
}

/// Turns "not now" into `None`, once there is room.
async fn wait_for_room(fd: &Arc<OwnedFd>, result: io::Result<usize>) -> io::Result<Option<usize>> {
    if again(&result) {
        ready(fd, PollFlags::OUT).await?;
        return Ok(None);
    }
    if interrupted(&result) {
        return Ok(None);
    }
    result.map(Some)
}

async fn send_once(
    fd: &Arc<OwnedFd>,
    parts: Vec<Bytes>,
    socket: bool,
) -> (Vec<Bytes>, io::Result<usize>) {
    let core = match here() {
        Ok(core) => core,
        Err(e) => return (parts, Err(e)),
    };
    if !core.has_ring() {
        let result = send_now(fd, &parts, socket);
        return (parts, result);
    }
    if socket {
        // A socket mostly has room: then this costs half of what the ring does, and the peer
        // starts on its answer before this thread goes on.
        let result = send_now(fd, &parts, socket);
        if !again(&result) {
            return (parts, result);
        }
    }
    let memory = Parts::new(parts);
    let raw = types::Fd(fd.as_raw_fd());
    let entry = if socket {
        // WAITALL: the kernel goes on by itself after a partial send (Linux 5.19).
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        opcode::SendMsg::new(raw, &raw const memory.header)
            .flags(flags as u32)
            .build()
    } else {
        let (iov, len) = memory.iov();
        opcode::Writev::new(raw, iov, len).offset(NO_OFFSET).build()
    };
    let op = Op {
        _fd: Arc::clone(fd),
        memory: Memory::Parts(memory),
        orphan: Orphan::Cancel,
    };
    // SAFETY: the entry names the boxed header and the vectors, all on the heap, and the parts'
    // bytes, which never move; all are owned by the operation.
    let (op, result) = unsafe { Pending::start(&core, entry, op) }.await;
    let Memory::Parts(memory) = op.memory else {
        unreachable!("operations keep their memory")
    };
    (memory.parts, count(result))
}

fn send_now(fd: &OwnedFd, parts: &[Bytes], socket: bool) -> io::Result<usize> {
    let parts: Vec<_> = parts
        .iter()
        .take(super::op::PARTS_MAX)
        .map(|p| IoSlice::new(p))
        .collect();
    send_slices(fd, &parts, socket)
}

fn send_slices(fd: &OwnedFd, parts: &[IoSlice<'_>], socket: bool) -> io::Result<usize> {
    if socket {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut control = SendAncillaryBuffer::default();
        return Ok(rustix::net::sendmsg(fd, parts, &mut control, flags)?);
    }
    unblock(fd)?;
    Ok(rustix::io::writev(fd, parts)?)
}

/// See [`super::try_send`].
pub(super) fn try_send(fd: &OwnedFd, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    let sent = send_slices(fd, parts, true);
    if no_socket(&sent) {
        return send_slices(fd, parts, false);
    }
    sent
}

/// See [`super::accept`].
pub(super) async fn accept(fd: &Arc<OwnedFd>) -> io::Result<OwnedFd> {
    let core = here()?;
    loop {
        let result = if core.has_ring() {
            ring_accept(&core, fd).await
        } else {
            // As in `recv`: a flood of clients must not starve those that are there.
            Yield::default().await;
            accept_now(fd)
        };
        match result {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready(fd, PollFlags::IN).await?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

async fn ring_accept(core: &Rc<Core>, fd: &Arc<OwnedFd>) -> io::Result<OwnedFd> {
    let raw = types::Fd(fd.as_raw_fd());
    let entry = opcode::Accept::new(raw, std::ptr::null_mut(), std::ptr::null_mut())
        .flags(libc::SOCK_CLOEXEC)
        .build();
    let op = Op {
        _fd: Arc::clone(fd),
        memory: Memory::Accepted,
        orphan: Orphan::Cancel,
    };
    // SAFETY: the entry names no memory.
    let (_, result) = unsafe { Pending::start(core, entry, op) }.await;
    count(result)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

fn accept_now(fd: &OwnedFd) -> io::Result<OwnedFd> {
    unblock(fd)?;
    Ok(retry_on_intr(|| {
        rustix::net::accept_with(fd, SocketFlags::CLOEXEC)
    })?)
}
