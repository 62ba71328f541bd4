//! Device: what a guest may ask. The only thing that transports know.

use bytes::{Bytes, BytesMut};
use ploop_formats::Result;

/// How a range of a device is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestExtent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// Reads as zeros.
    pub zero: bool,
    /// No layer holds space for it: a write may find no space.
    pub hole: bool,
    /// 1 is the top layer, 2 the one below it, and so on; 0 when no layer knows the range.
    pub depth: u32,
}

/// What a zeroing request may do to space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zero {
    /// Space may be given back.
    MayFree,
    /// Space stays, or becomes, allocated.
    Allocate,
    /// As `MayFree`, but fail with `Unsupported` and change nothing where that is not faster than
    /// writing zeros.
    Fast,
}

/// A virtual disk as its guest sees it.
///
/// Offsets and lengths are bytes; any alignment is accepted. Ranges past [`Device::size`] are
/// refused with `Invalid`. Methods may be called from several tasks and threads at once; requests
/// that overlap and are in flight together may take effect in any order, whole sectors at a time.
/// A write is durable once a [`Device::flush`] that was called after its answer is answered with
/// success, or when `fua` was set. Futures must be run to completion once polled.
#[allow(
    async_fn_in_trait,
    reason = "futures of a ring are not Send; transports are generic"
)]
pub trait Device {
    /// Size in bytes, a multiple of 512. May grow while requests run.
    fn size(&self) -> u64;

    /// Whether writes are refused with `ReadOnly`.
    fn read_only(&self) -> bool;

    /// Bytes that are cheapest to write or discard at once: the cluster.
    fn preferred_block(&self) -> u64;

    /// Fills `buf` from `at`. Its length is at most `limits::TRANSFER_MAX`.
    async fn read(&self, at: u64, buf: BytesMut) -> Result<BytesMut>;

    /// Writes `data` at `at`.
    async fn write(&self, at: u64, data: Bytes, fua: bool) -> Result<()>;

    /// Makes the range read as zeros. Any length.
    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> Result<()>;

    /// Says that the contents of the range no longer matter. They may stay. Any length.
    async fn discard(&self, at: u64, len: u64) -> Result<()>;

    /// Makes everything answered before this call durable.
    async fn flush(&self) -> Result<()>;

    /// How the range is stored: at least one extent, at most `max`, together no longer than `len`.
    /// Neighbours differ.
    async fn extents(&self, at: u64, len: u64, max: usize) -> Result<Vec<GuestExtent>>;
}
