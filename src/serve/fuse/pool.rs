//! Large buffers, reused: a fresh megabyte costs its page faults on every request.
//!
//! Each holds one whole request, placed so that the payload of a WRITE starts on a page boundary
//! and can go to a file with direct I/O as it lies. Spare buffers go back to the system when the
//! disk has been quiet; how many are out at once is the server's business.
//!
//! Whatever the kernel copies to or from must be in memory before it does. Where it has to fault a
//! page in for a process that is being killed, it gives up and answers the request with EIO, instead
//! of keeping it for the next worker.

use bytes::{Bytes, BytesMut};
use ploop_formats::buf;
use std::hint;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::WRITE_HEAD;

/// The spare buffers of one server.
#[derive(Debug)]
pub struct Pool {
    payload: usize,
    spares: Mutex<Spares>,
}

#[derive(Debug, Default)]
struct Spares {
    list: Vec<BytesMut>,
    trimmer: bool,
    used: bool,
}

/// A buffer that returns to its pool when it is dropped, frozen or not.
#[derive(Debug)]
pub struct Loan {
    /// [`WRITE_HEAD`] bytes and a payload that starts on a page boundary. May be taken away and put
    /// back; one that was not put back whole is not pooled again.
    pub buf: BytesMut,
    home: Arc<Pool>,
}

impl Pool {
    /// A pool of buffers for payloads up to `payload` bytes.
    pub fn new(payload: usize) -> Arc<Self> {
        give_large_buffers_back();
        Arc::new(Self {
            payload,
            spares: Mutex::default(),
        })
    }

    /// Largest payload in bytes.
    pub fn payload(&self) -> usize {
        self.payload
    }

    /// Bytes of each buffer.
    pub fn buffer_len(&self) -> usize {
        WRITE_HEAD + self.payload
    }

    /// A buffer with unspecified content, all of it in memory.
    pub fn take(self: &Arc<Self>) -> Loan {
        let spare = self.spares().list.pop();
        Loan {
            buf: spare.unwrap_or_else(|| self.fresh()),
            home: Arc::clone(self),
        }
    }

    fn fresh(&self) -> BytesMut {
        let mut buf = buf::aligned(buf::ALIGN + self.payload).split_off(buf::ALIGN - WRITE_HEAD);
        // Not with zeros: those may be had from the system without being written.
        buf.fill(0x5A);
        buf
    }

    /// Whether there are spares and nobody watches over them: then the caller must call
    /// [`Pool::trim`] from time to time until it says true.
    pub fn wants_trimmer(&self) -> bool {
        let mut spares = self.spares();
        let wanted = !spares.trimmer && !spares.list.is_empty();
        spares.trimmer |= wanted;
        wanted
    }

    /// Frees all spares if none came back since the last call; whether it did.
    pub fn trim(&self) -> bool {
        let mut spares = self.spares();
        if mem::take(&mut spares.used) {
            return false;
        }
        *spares = Spares::default();
        true
    }

    fn put(&self, buf: BytesMut) {
        if buf.len() == self.buffer_len() {
            let mut spares = self.spares();
            spares.list.push(buf);
            spares.used = true;
        }
    }

    fn spares(&self) -> MutexGuard<'_, Spares> {
        // No code that can panic runs under the lock.
        self.spares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loan {
    /// The whole buffer, read-only and shareable; it returns when the last share is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        &self.buf
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.home.put(mem::take(&mut self.buf));
    }
}

/// Keeps large buffers out of the heap, whose freed middle stays with the process: glibc would begin
/// to put them there as soon as the first was freed, and an idle disk would hold a megabyte more.
fn give_large_buffers_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) sets a number under the allocator's own lock and touches no memory of ours.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 19);
    }
}

/// Brings every page of `data` into memory, for the kernel to copy from.
pub fn touch(data: &[u8]) {
    for page in data.chunks(buf::ALIGN) {
        hint::black_box(page.first().copied());
    }
    hint::black_box(data.last().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_starts_on_a_page_boundary() {
        let loan = Pool::new(1 << 16).take();
        assert_eq!(loan.buf.len(), WRITE_HEAD + (1 << 16));
        assert!(buf::is_aligned(&loan.buf[WRITE_HEAD..], buf::ALIGN));
    }

    #[test]
    fn a_buffer_is_reused_only_after_its_last_share_is_gone() {
        let pool = Pool::new(1 << 16);
        let loan = pool.take();
        let place = loan.buf.as_ptr();
        let share = loan.freeze().slice(WRITE_HEAD..);
        assert_ne!(pool.take().buf.as_ptr(), place);
        drop(share);
        let again = [pool.take(), pool.take()];
        assert!(again.iter().any(|l| l.buf.as_ptr() == place));
    }

    #[test]
    fn a_buffer_that_was_cut_is_not_lent_again() {
        let pool = Pool::new(1 << 16);
        let mut loan = pool.take();
        loan.buf.truncate(10);
        drop(loan);
        assert_eq!(pool.take().buf.len(), pool.buffer_len());
    }

    #[test]
    fn spares_are_freed_once_the_disk_is_quiet_and_not_before() {
        let pool = Pool::new(1 << 16);
        assert!(!pool.wants_trimmer());
        drop(pool.take());
        assert!(pool.wants_trimmer());
        assert!(!pool.wants_trimmer(), "one is enough");
        assert!(!pool.trim(), "just used");
        assert!(pool.trim());
        assert!(pool.spares().list.is_empty());
        drop(pool.take());
        assert!(pool.wants_trimmer());
    }
}
