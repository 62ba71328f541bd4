//! Buffers that direct I/O accepts.
//!
//! A [`BytesMut`] whose first byte is page aligned, made without `unsafe`: a little more is
//! allocated and the unaligned head is cut off. Splitting at multiples of a sector keeps the
//! pieces aligned to a sector.

use bytes::{Bytes, BytesMut};

/// Alignment that every kernel accepts for direct I/O memory.
pub const ALIGN: usize = 4096;

/// A zeroed buffer of `len` bytes that starts on a page boundary.
pub fn aligned(len: usize) -> BytesMut {
    let mut buf = BytesMut::zeroed(len.saturating_add(ALIGN));
    let head = buf.as_ptr().align_offset(ALIGN).min(ALIGN);
    let mut buf = buf.split_off(head);
    buf.truncate(len);
    buf
}

/// Whether `data` starts at a multiple of `align` in memory.
pub fn is_aligned(data: &[u8], align: usize) -> bool {
    (data.as_ptr() as usize).checked_rem(align) == Some(0)
}

/// `len` zero bytes, page aligned, shared where a static page is enough.
pub fn zeros(len: usize) -> Bytes {
    aligned(len).freeze()
}
