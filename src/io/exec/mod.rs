//! The executor: plain `async fn` requests on one thread, over io_uring or poll(2).
//!
//! One executor per thread, started by [`run`]. Futures made here belong to the thread they were
//! first polled on. Wakers may go to any thread, so channels and locks of `tokio::sync` work
//! between executors and with plain threads.
//!
//! Dropping the future of an operation is always safe: its memory and its descriptor stay with
//! the driver until the kernel is done. But bytes may be lost: a dropped [`recv`] may have taken
//! some from the stream, a dropped [`send_all`] may have sent some. Drop them only to give the
//! stream up. A dropped [`accept`] closes a connection that it got too late.
//!
//! Under the ring, 256 operations on streams of one thread are in flight at most; more wait for
//! their turn. File operations have room of their own.

mod core;
pub(crate) mod disk;
mod op;
mod poll;
mod stream;
mod uring;
mod wake;

pub(crate) use op::{Witness, advance};

use bytes::{Bytes, BytesMut};
use rustix::event::PollFlags;
use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

/// What drives a thread's I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring: one ring per thread.
    Ring,
    /// poll(2) for sockets, plain system calls for files.
    Poll,
}

impl Engine {
    /// The best engine that this machine allows, and, when it is not the ring, why.
    pub fn detect() -> (Self, Option<String>) {
        match uring::Ring::new() {
            Ok(_) => (Self::Ring, None),
            Err(e) => (Self::Poll, Some(why_no_ring(&e))),
        }
    }
}

fn why_no_ring(error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => ", refused by seccomp or by sysctl kernel.io_uring_disabled",
        Some(libc::ENOSYS) => ", the kernel has none",
        Some(libc::ENOMEM) => ", the limit of locked memory (ulimit -l) is too low",
        _ => "",
    };
    format!("io_uring cannot be used{hint}: {error}")
}

/// Runs `main` and everything it spawns on this thread until `main` is done; then drops what is
/// left, cancels its operations, waits for every completion and returns. A panic of a task ends
/// the run the same way, and so does an engine that fails. An error: it cannot be started, or the
/// thread runs one already.
pub fn run<F: Future>(engine: Engine, main: F) -> io::Result<F::Output> {
    core::run(engine, main)
}

/// Runs a task on this thread's executor, beside the others. Once `run` is ending, the task is
/// dropped instead.
///
/// # Panics
///
/// Outside of [`run`].
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    core::current()
        .expect("spawn is called inside run")
        .spawn(Box::pin(task));
}

/// Waits.
///
/// # Panics
///
/// Outside of [`run`].
pub async fn sleep(time: Duration) {
    let core = core::current().expect("sleep is called inside run");
    core::Sleep::new(core, time).await;
}

/// The output of `future`, or `None` when it did not come in `time`; it is dropped then.
pub async fn timeout<F: Future>(time: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut clock = pin!(sleep(time));
    std::future::poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        clock.as_mut().poll(cx).map(|()| None)
    })
    .await
}

/// Lets every other ready task run first.
pub async fn yield_now() {
    core::Yield::default().await;
}

/// Waits until a read from `fd` would not block: data, end, error. Also for eventfds and pidfds.
/// Reads nothing.
pub async fn readable(fd: &Arc<OwnedFd>) -> io::Result<()> {
    stream::ready(fd, PollFlags::IN).await
}

/// Reads once into `buf` (up to its length) from a socket, pipe or character device: how many
/// bytes arrived, 0 at the end.
///
/// Under [`Engine::Poll`] a pipe or device is switched to O_NONBLOCK; sockets keep their mode.
pub async fn recv(fd: &Arc<OwnedFd>, buf: BytesMut) -> (BytesMut, io::Result<usize>) {
    stream::recv(fd, buf).await
}

/// Writes all parts, in order, to a socket or pipe. A socket never raises SIGPIPE; for pipes the
/// signal is ignored by every Rust program, so both answer `BrokenPipe`. Concurrent calls on one
/// descriptor may interleave.
///
/// Under [`Engine::Poll`] a pipe is switched to O_NONBLOCK; sockets keep their mode.
pub async fn send_all(fd: &Arc<OwnedFd>, parts: Vec<Bytes>) -> io::Result<()> {
    stream::send_all(fd, parts).await
}

/// Sends what a socket or pipe takes at once of `parts` (at most 1024): how many bytes, or
/// `WouldBlock`. A pipe is switched to O_NONBLOCK.
pub fn try_send(fd: &OwnedFd, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    stream::try_send(fd, parts)
}

/// Waits until [`try_send`] has room, or meets an error.
pub async fn writable(fd: &Arc<OwnedFd>) -> io::Result<()> {
    stream::ready(fd, PollFlags::OUT).await
}

/// Writes all parts with one writev(2), as /dev/fuse wants its replies: at most 1024 parts, of
/// which a device takes all or none.
pub async fn write_vectored(fd: &Arc<OwnedFd>, parts: Vec<Bytes>) -> io::Result<usize> {
    stream::write_vectored(fd, parts).await
}

/// Accepts a connection from a listening socket; close-on-exec, in blocking mode.
///
/// Under [`Engine::Poll`] the listener is switched to O_NONBLOCK.
pub async fn accept(fd: &Arc<OwnedFd>) -> io::Result<OwnedFd> {
    stream::accept(fd).await
}

/// Lets others run now and then between operations that were done without waiting.
pub(crate) async fn breathe() {
    if core::current().is_some_and(|core| core.should_yield()) {
        yield_now().await;
    }
}

/// Whether this thread's files go through a ring.
pub(crate) fn on_ring() -> bool {
    core::current().is_some_and(|core| core.has_ring())
}

#[cfg(test)]
mod tests;
