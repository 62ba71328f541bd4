//! Broken: a device whose every request fails, for a disk that cannot be served any more.
//!
//! Whoever waits for it is told, and goes on; a device that never answers holds its users for ever.

use crate::device::{Device, GuestExtent, Zero};
use bytes::{Bytes, BytesMut};
use ploop_formats::{Error, Kind, Result};

/// The device.
#[derive(Debug, Clone, Copy)]
pub struct Broken {
    /// Size in bytes.
    pub size: u64,
}

fn failed<T>() -> Result<T> {
    Err(Error::new(Kind::Io, "the disk has failed"))
}

impl Device for Broken {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn preferred_block(&self) -> u64 {
        4096
    }

    async fn read(&self, _: u64, _: BytesMut) -> Result<BytesMut> {
        failed()
    }

    async fn write(&self, _: u64, _: Bytes, _: bool) -> Result<()> {
        failed()
    }

    async fn zero(&self, _: u64, _: u64, _: Zero, _: bool) -> Result<()> {
        failed()
    }

    async fn discard(&self, _: u64, _: u64) -> Result<()> {
        failed()
    }

    async fn flush(&self) -> Result<()> {
        failed()
    }

    async fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<GuestExtent>> {
        failed()
    }
}
