//! Payload buffers of one connection: page aligned, reused last in first out.
//!
//! A buffer that was just used is warm in the processor's cache and needs no zeroing; making a new
//! one costs as much as copying into it. Bounded in bytes; an idle connection empties it.

use super::limits;
use bytes::{Bytes, BytesMut};
use ploop_formats::buf;

/// Smallest size kept, and the alignment of all.
const SMALLEST: usize = buf::ALIGN;
/// Powers of two from the smallest to the largest payload.
const CLASSES: usize = limits::PAYLOAD_MAX.ilog2() as usize - SMALLEST.ilog2() as usize + 1;

/// Buffers by size class.
#[derive(Debug, Default)]
pub struct Pool {
    classes: [Vec<BytesMut>; CLASSES],
    bytes: usize,
}

impl Pool {
    /// A page-aligned buffer of `len` bytes, at most the payload limit. What it holds is
    /// arbitrary: whoever takes it fills it.
    pub fn take(&mut self, len: usize) -> BytesMut {
        let class = class(len);
        let Some(mut buf) = self.classes.get_mut(class).and_then(Vec::pop) else {
            let mut buf = buf::aligned(size(class));
            buf.truncate(len);
            return buf;
        };
        self.bytes -= size(class);
        buf.resize(len, 0);
        buf
    }

    /// Takes a buffer back, if it is one of ours, nobody else holds it and there is room.
    pub fn give(&mut self, data: Bytes) {
        let class = class(data.len());
        let Ok(buf) = data.try_into_mut() else { return };
        let ours = buf::is_aligned(&buf, buf::ALIGN) && buf.capacity() >= size(class);
        if !ours || self.bytes + size(class) > limits::POOL_BYTES {
            return;
        }
        if let Some(kept) = self.classes.get_mut(class) {
            kept.push(buf);
            self.bytes += size(class);
        }
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Gives everything back to the allocator.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

fn class(len: usize) -> usize {
    (len.max(SMALLEST).next_power_of_two().ilog2() - SMALLEST.ilog2()) as usize
}

fn size(class: usize) -> usize {
    SMALLEST << class
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_lent_again_without_moving() {
        let mut pool = Pool::default();
        for len in [1, 4096, 4097, 100_000, limits::POOL_BYTES] {
            let first = pool.take(len);
            assert_eq!(first.len(), len);
            assert!(buf::is_aligned(&first, 4096));
            let address = first.as_ptr();
            pool.give(first.freeze());
            let again = pool.take(len);
            assert_eq!((again.as_ptr(), again.len()), (address, len));
        }
    }

    #[test]
    fn a_buffer_grows_within_its_class_in_place() {
        let mut pool = Pool::default();
        let short = pool.take(5000);
        let address = short.as_ptr();
        pool.give(short.freeze());
        let long = pool.take(8192);
        assert_eq!((long.as_ptr(), long.len()), (address, 8192));
    }

    #[test]
    fn buffers_that_are_shared_foreign_or_too_many_are_not_kept() {
        let mut pool = Pool::default();
        let held = pool.take(4096).freeze();
        pool.give(held.clone());
        pool.give(Bytes::from_static(&[0; 4096]));
        pool.give(Bytes::from(vec![0; 4097]).slice(1..));
        pool.give(Bytes::new());
        let largest = pool.take(limits::PAYLOAD_MAX as usize);
        pool.give(largest.freeze());
        assert!(pool.is_empty());
        let many = limits::POOL_BYTES / 4096 + 3;
        let buffers: Vec<_> = (0..many).map(|_| pool.take(4096)).collect();
        buffers.into_iter().for_each(|buf| pool.give(buf.freeze()));
        assert_eq!(pool.bytes, limits::POOL_BYTES);
        pool.clear();
        assert!(pool.is_empty());
    }
}
