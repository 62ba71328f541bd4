//! The executor: plain `async fn` requests on one thread, over io_uring or poll(2).
//!
//! SKELETON: the signatures below are the contract; bodies follow.

use bytes::{Bytes, BytesMut};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
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
        unimplemented!()
    }
}

/// Runs `main` and everything it spawns on this thread until `main` is done; then drops what is
/// left, cancels its operations, waits for every completion and returns.
pub fn run<F: Future>(engine: Engine, main: F) -> io::Result<F::Output> {
    let _ = (engine, main);
    unimplemented!()
}

/// Runs a task on this thread's executor, beside the others.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    let _ = task;
    unimplemented!()
}

/// Waits.
pub async fn sleep(time: Duration) {
    let _ = time;
    unimplemented!()
}

/// Reads once into `buf` (up to its length) from a socket, pipe or character device: how many
/// bytes arrived, 0 at the end.
pub async fn recv(fd: &Arc<OwnedFd>, buf: BytesMut) -> (BytesMut, io::Result<usize>) {
    let _ = (fd, buf);
    unimplemented!()
}

/// Writes all parts, in order, to a socket or pipe; never raises SIGPIPE.
pub async fn send_all(fd: &Arc<OwnedFd>, parts: Vec<Bytes>) -> io::Result<()> {
    let _ = (fd, parts);
    unimplemented!()
}

/// Writes all parts with one writev(2), as /dev/fuse wants its replies.
pub async fn write_vectored(fd: &Arc<OwnedFd>, parts: Vec<Bytes>) -> io::Result<usize> {
    let _ = (fd, parts);
    unimplemented!()
}

/// Accepts a connection from a listening socket.
pub async fn accept(fd: &Arc<OwnedFd>) -> io::Result<OwnedFd> {
    let _ = fd;
    unimplemented!()
}

/// Runs `work` for at most `time`; `None` when it did not end.
pub async fn timeout<F: Future>(time: Duration, work: F) -> Option<F::Output> {
    let _ = (time, work);
    unimplemented!()
}
