//! Store: bytes at rest, which may or may not be durable.
//!
//! The lowest seam. Everything a format knows about durability is said here; everything a test
//! wants to break is broken behind it. Methods are `async fn`s whose futures are plain `std`
//! futures and may be `!Send`: a blocking file is always ready, a ring is not, and the simulator
//! decides.

#[cfg(feature = "testkit")]
pub mod fault;
pub mod mem;
#[cfg(feature = "testkit")]
pub mod mutate;
pub mod pages;
#[cfg(feature = "testkit")]
pub mod record;
#[cfg(feature = "testkit")]
pub mod sim;

use crate::Result;
use bytes::{Bytes, BytesMut};

/// When a write counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Readable by everyone; durable after the next [`Store::flush`].
    Cache,
    /// This write's bytes, and nothing else, survive power loss once it is answered.
    Durable,
}

/// What becomes of the space under a zeroed range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Give it back where the storage can; a later write may find none.
    Free,
    /// Keep it reserved: a later write to the range never fails for lack of space.
    Keep,
}

/// What a store is, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreInfo {
    /// Length in bytes.
    pub len: u64,
    /// Offsets, lengths and buffer addresses must be multiples of this (1, 512 or 4096).
    pub align: u64,
    /// Bytes between an old and a new, flushed length read as zeros after any crash, and so do
    /// punched ranges after a flush, until the first write to them. False for block devices and
    /// for caches that may write back in any order.
    pub fresh_zero: bool,
    /// A punch gives space back. Where it cannot, the zeros are written, which nobody should ask
    /// for without need.
    pub punches: bool,
}

/// Bytes at rest.
///
/// Every method may be called from several tasks and threads at once. Overlapping operations have
/// no order among themselves unless one was answered before the other was called. Dropping a
/// future abandons its answer, not the operation: it may still land until [`Store::settle`] returns.
#[allow(
    async_fn_in_trait,
    reason = "futures of a ring are not Send; the engine is generic"
)]
pub trait Store {
    /// Length, alignment and promises. Never blocks.
    fn info(&self) -> StoreInfo;

    /// The length, where somebody else may have made the file longer since it was opened, which is read
    /// here only. [`Store::info`] says it from then on. May wait for as long as a look at a file takes.
    fn look_at_len(&self) -> Result<u64> {
        Ok(self.info().len)
    }

    /// Bytes that may still be taken from the storage, asked before any is. `NoSpace` when it
    /// shall give no more, although it may have some. Never waits.
    fn room(&self) -> Result<u64>;

    /// Fills `buf` exactly from offset `at`, or fails: a short read is an error, also at the end.
    /// `at`, the length and the address are aligned to [`StoreInfo::align`].
    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut>;

    /// Writes all of `data` at `at`, within the current length. After an error any part of the
    /// range may hold old bytes, new bytes or, until rewritten, garbage. Alignment as for reads.
    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()>;

    /// Sets the length. New bytes read as zeros. Volatile until the next flush.
    async fn set_len(&self, len: u64) -> Result<()>;

    /// As [`Store::set_len`] to no less than there is, but no space is taken ahead for the new bytes:
    /// each takes its own when it is written.
    async fn lengthen(&self, len: u64) -> Result<()> {
        self.set_len(len).await
    }

    /// Makes the range read as zeros. Any alignment. Volatile until the next flush.
    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()>;

    /// Ok means: every write, punch and length answered before the call survives power loss.
    /// An error is final: no later flush of this store succeeds.
    async fn flush(&self) -> Result<()>;

    /// Returns once no abandoned operation can land any more.
    async fn settle(&self);

    /// Whether the bytes at `at` may hold data (`true`) or are a hole that reads as zeros, and
    /// where that stops being so (an offset above `at`, at most the length). Stores that do not
    /// know say data up to the end. `at` is below the length.
    async fn extent(&self, at: u64) -> Result<(bool, u64)>;
}
