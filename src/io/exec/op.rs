//! Operations: what the kernel may still be using, owned until it is done with it.
//!
//! An operation owns its descriptor and its memory. It must never borrow: the future that waits
//! for it can be dropped at any time, the kernel goes on.

use bytes::{Bytes, BytesMut};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

/// Most parts that one vectored call takes (the kernel's UIO_MAXIOV).
pub(super) const PARTS_MAX: usize = 1024;

/// Learns what became of an operation whose future was dropped.
pub(crate) trait Witness: Send + Sync {
    /// The future is gone; the operation may still land.
    fn abandoned(&self);
    /// The abandoned operation is over, with this result (a negative errno on failure).
    fn landed(&self, result: i32);
}

/// An operation in flight.
pub(super) struct Op {
    /// Kept open, and its number unused by others, until the completion.
    pub(super) _fd: Arc<OwnedFd>,
    pub(super) memory: Memory,
    pub(super) orphan: Orphan,
}

/// What to do with an operation whose future was dropped.
pub(super) enum Orphan {
    /// Ask the kernel to stop it: it may wait for ever.
    Cancel,
    /// Let it land and tell the witness.
    Land(Option<Arc<dyn Witness>>),
}

/// Memory that the kernel reads or writes.
pub(super) enum Memory {
    None,
    Read(BytesMut),
    Write {
        _data: Bytes,
    },
    Parts(Box<Parts>),
    /// The result is a new descriptor.
    Accepted,
}

impl Op {
    /// Releases what a result carries when nobody waits for it any more.
    pub(super) fn discard(self, result: i32) {
        if matches!(self.memory, Memory::Accepted) && result >= 0 {
            // SAFETY: a successful accept returns a descriptor that nobody else knows.
            drop(unsafe { OwnedFd::from_raw_fd(result) });
        }
        if let Orphan::Land(Some(witness)) = self.orphan {
            witness.landed(result);
        }
    }
}

/// Bytes in parts, and the system's description of them.
pub(super) struct Parts {
    pub(super) parts: Vec<Bytes>,
    iov: Vec<libc::iovec>,
    pub(super) header: libc::msghdr,
}

impl Parts {
    /// Describes the first [`PARTS_MAX`] parts.
    pub(super) fn new(parts: Vec<Bytes>) -> Box<Self> {
        let iov = parts
            .iter()
            .take(PARTS_MAX)
            .map(|p| libc::iovec {
                iov_base: p.as_ptr() as *mut _,
                iov_len: p.len(),
            })
            .collect();
        // SAFETY: msghdr is plain data for which all zeros mean "nothing".
        let header = unsafe { std::mem::zeroed() };
        let mut new = Box::new(Self { parts, iov, header });
        new.header.msg_iov = new.iov.as_mut_ptr();
        new.header.msg_iovlen = new.iov.len() as _;
        new
    }

    pub(super) fn iov(&self) -> (*const libc::iovec, u32) {
        (self.iov.as_ptr(), self.iov.len() as u32)
    }
}

/// Cuts `sent` bytes off the front; empty parts vanish.
pub(crate) fn advance(parts: &mut Vec<Bytes>, mut sent: usize) {
    let mut whole = 0;
    for part in parts.iter_mut() {
        let cut = sent.min(part.len());
        bytes::Buf::advance(part, cut);
        sent -= cut;
        if !part.is_empty() {
            break;
        }
        whole += 1;
    }
    parts.drain(..whole);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_send_leaves_exactly_the_rest() {
        let all: Vec<Bytes> = ["", "abc", "", "de", "fghi"]
            .iter()
            .map(|s| Bytes::from_static(s.as_bytes()))
            .collect();
        for sent in 0..=9 {
            let mut parts = all.clone();
            advance(&mut parts, sent);
            assert_eq!(parts.concat(), b"abcdefghi"[sent..]);
            assert!(parts.first().is_none_or(|p| !p.is_empty()));
        }
    }
}
