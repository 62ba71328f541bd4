//! Tracked: a device whose writes are marked.

use super::recorder::Recorder;
use crate::device::{Device, GuestExtent, Zero};
use crate::io::memfd::SharedWords;
use bytes::{Bytes, BytesMut};
use ploop_formats::Result;
use std::sync::Arc;

/// A device, and what is recorded of it.
#[derive(Debug)]
pub struct Tracked<D> {
    device: Arc<D>,
    recorder: Arc<Recorder<SharedWords>>,
}

impl<D> Tracked<D> {
    /// Marks what is written to `device`.
    pub const fn new(device: Arc<D>, recorder: Arc<Recorder<SharedWords>>) -> Self {
        Self { device, recorder }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }
}

impl<D: Device> Device for Tracked<D> {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn preferred_block(&self) -> u64 {
        self.device.preferred_block()
    }

    async fn read(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.device.read(at, buf).await
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> Result<()> {
        let _marking = self.begin(at, data.len() as u64);
        self.device.write(at, data, fua).await
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> Result<()> {
        let _marking = self.begin(at, len);
        self.device.zero(at, len, how, fua).await
    }

    async fn discard(&self, at: u64, len: u64) -> Result<()> {
        let _marking = self.begin(at, len);
        self.device.discard(at, len).await
    }

    async fn flush(&self) -> Result<()> {
        self.device.flush().await
    }

    async fn extents(&self, at: u64, len: u64, max: usize) -> Result<Vec<GuestExtent>> {
        self.device.extents(at, len, max).await
    }
}

impl<D: Device> Tracked<D> {
    /// Marks what a write may touch. What is not on the device is refused by it.
    fn begin(&self, at: u64, len: u64) -> Option<super::Marking<'_, SharedWords>> {
        let len = len.min(self.size().saturating_sub(at));
        (len > 0).then(|| self.recorder.begin(at, len))
    }
}
