//! File operations: through the ring where this thread has one, plain system calls elsewhere.
//!
//! One call, one operation: results may be short, errors are the kernel's. Interrupted calls are
//! repeated. A ring operation whose future is dropped is left to land; its witness learns of it.

use super::breathe;
use super::core::{self, Core};
use super::op::{Memory, Op, Orphan, Witness};
use super::stream::count;
use super::uring::Pending;
use bytes::{Bytes, BytesMut};
use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;
use rustix::io::ReadWriteFlags;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// Most bytes of one operation: page aligned and below what the kernel moves in one call.
const LEN_MAX: usize = 1 << 30;

/// The file of an operation and who hears of an abandoned one.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) fd: &'a Arc<OwnedFd>,
    pub(crate) witness: &'a Arc<dyn Witness>,
    /// Makes the call on this thread although it has a ring: for what never waits for a disk, and
    /// what the ring would only hand to a thread of its own.
    pub(crate) here: bool,
}

impl Target<'_> {
    fn raw(&self) -> types::Fd {
        types::Fd(self.fd.as_raw_fd())
    }

    fn ring(&self) -> Option<Rc<Core>> {
        core::current().filter(|core| core.has_ring() && !self.here)
    }

    fn op(&self, memory: Memory) -> Op {
        let orphan = Orphan::Land(Some(Arc::clone(self.witness)));
        Op {
            _fd: Arc::clone(self.fd),
            memory,
            orphan,
        }
    }
}

fn interrupted(result: &io::Result<usize>) -> bool {
    result
        .as_ref()
        .is_err_and(|e| e.kind() == io::ErrorKind::Interrupted)
}

/// Reads into `buf[from..]` at file offset `at`.
pub(crate) async fn read(
    target: Target<'_>,
    mut buf: BytesMut,
    from: usize,
    at: u64,
) -> (BytesMut, io::Result<usize>) {
    loop {
        let result;
        (buf, result) = match target.ring() {
            Some(core) => ring_read(&core, target, buf, from, at).await,
            None => {
                breathe().await;
                let result = rustix::io::pread(target.fd, &mut buf[from..], at);
                (buf, result.map_err(io::Error::from))
            }
        };
        if !interrupted(&result) {
            return (buf, result);
        }
    }
}

async fn ring_read(
    core: &Rc<Core>,
    target: Target<'_>,
    mut buf: BytesMut,
    from: usize,
    at: u64,
) -> (BytesMut, io::Result<usize>) {
    let rest = &mut buf[from..];
    let len = rest.len().min(LEN_MAX) as u32;
    let entry = opcode::Read::new(target.raw(), rest.as_mut_ptr(), len)
        .offset(at)
        .build();
    // SAFETY: the entry names heap memory of the buffer, which moves into the operation.
    let (op, result) = unsafe { Pending::start(core, entry, target.op(Memory::Read(buf))) }.await;
    let Memory::Read(buf) = op.memory else {
        unreachable!("operations keep their memory")
    };
    (buf, count(result))
}

/// Reads into `buf[from..]` what the page cache has, without waiting for the disk.
pub(crate) async fn read_cached(
    target: Target<'_>,
    buf: &mut BytesMut,
    from: usize,
    at: u64,
) -> io::Result<usize> {
    breathe().await;
    let parts = &mut [IoSliceMut::new(&mut buf[from..])];
    Ok(rustix::io::preadv2(
        target.fd,
        parts,
        at,
        ReadWriteFlags::NOWAIT,
    )?)
}

/// Writes `data` at file offset `at`; with `durable`, it is on disk when answered.
pub(crate) async fn write(
    target: Target<'_>,
    data: Bytes,
    at: u64,
    durable: bool,
) -> io::Result<usize> {
    let flags = if durable {
        ReadWriteFlags::DSYNC
    } else {
        ReadWriteFlags::empty()
    };
    loop {
        let result = match target.ring() {
            Some(core) => {
                let len = data.len().min(LEN_MAX) as u32;
                let entry = opcode::Write::new(target.raw(), data.as_ptr(), len)
                    .offset(at)
                    .rw_flags(flags.bits() as i32)
                    .build();
                let op = target.op(Memory::Write {
                    _data: data.clone(),
                });
                // SAFETY: the entry names the data's memory, which does not move and which the
                // operation keeps alive; the kernel only reads it.
                count(unsafe { Pending::start(&core, entry, op) }.await.1)
            }
            None => {
                breathe().await;
                rustix::io::pwritev2(target.fd, &[IoSlice::new(&data)], at, flags)
                    .map_err(io::Error::from)
            }
        };
        if !interrupted(&result) {
            return result;
        }
    }
}

/// fdatasync(2).
pub(crate) async fn fdatasync(target: Target<'_>) -> io::Result<()> {
    let entry = opcode::Fsync::new(target.raw())
        .flags(types::FsyncFlags::DATASYNC)
        .build();
    plain(target, entry, || rustix::fs::fdatasync(target.fd)).await
}

/// fsync(2).
pub(crate) async fn fsync(target: Target<'_>) -> io::Result<()> {
    let entry = opcode::Fsync::new(target.raw()).build();
    plain(target, entry, || rustix::fs::fsync(target.fd)).await
}

/// fallocate(2).
pub(crate) async fn fallocate(
    target: Target<'_>,
    mode: FallocateFlags,
    at: u64,
    len: u64,
) -> io::Result<()> {
    let entry = opcode::Fallocate::new(target.raw(), len)
        .offset(at)
        .mode(mode.bits() as i32)
        .build();
    plain(target, entry, || {
        rustix::fs::fallocate(target.fd, mode, at, len)
    })
    .await
}

/// An operation that names no memory.
async fn plain(
    target: Target<'_>,
    entry: squeue::Entry,
    call: impl Fn() -> rustix::io::Result<()>,
) -> io::Result<()> {
    loop {
        let result = match target.ring() {
            Some(core) => {
                let op = target.op(Memory::None);
                // SAFETY: no caller's entry names memory.
                count(unsafe { Pending::start(&core, entry.clone(), op) }.await.1)
            }
            None => {
                breathe().await;
                call().map(|()| 0).map_err(io::Error::from)
            }
        };
        if !interrupted(&result) {
            return result.map(|_| ());
        }
    }
}
