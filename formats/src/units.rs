//! Units that must not be mixed: cluster numbers of the guest, of the file, and their size.
//!
//! Byte offsets stay `u64` and say in their name whose they are (`guest`, `host`); cluster numbers
//! are types, because a ploop table is nothing but one kind of cluster number indexed by another.

use crate::{Error, Result, limits};

/// Bytes in a sector, the unit of every size that ploop writes (reference: ploop header).
pub const SECTOR: u64 = 512;

/// The largest multiple of `unit`, a power of two, that is not above `n`.
pub const fn floor_to(n: u64, unit: u64) -> u64 {
    n & !unit.wrapping_sub(1)
}

/// A cluster size: a power of two, 32 KiB to 64 MiB for ploop, 512 bytes to 2 MiB for qcow2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterSize {
    log2: u8,
}

impl ClusterSize {
    /// A legal ploop cluster size in bytes.
    pub fn new(bytes: u64) -> Result<Self> {
        if (limits::CLUSTER_MIN..=limits::CLUSTER_MAX).contains(&bytes) && bytes.is_power_of_two() {
            return Ok(Self {
                log2: bytes.trailing_zeros() as u8,
            });
        }
        Err(Error::invalid(format!(
            "cluster size {bytes} is not a power of two from {} to {} bytes",
            limits::CLUSTER_MIN,
            limits::CLUSTER_MAX
        )))
    }

    /// A legal qcow2 cluster size, as the power of two that a header says.
    pub fn of_qcow2(log2: u32) -> Result<Self> {
        let legal = limits::QCOW2_BITS_MIN..=limits::QCOW2_BITS_MAX;
        match u8::try_from(log2) {
            Ok(log2) if legal.contains(&log2) => Ok(Self { log2 }),
            _ => Err(Error::invalid(format!(
                "a cluster of 2^{log2} bytes is not from 2^{} to 2^{}",
                limits::QCOW2_BITS_MIN,
                limits::QCOW2_BITS_MAX
            ))),
        }
    }

    /// The power of two that it is.
    pub const fn log2(self) -> u32 {
        self.log2 as u32
    }

    /// Bytes in a cluster.
    pub const fn bytes(self) -> u64 {
        1u64.wrapping_shl(self.log2 as u32)
    }

    /// Sectors in a cluster.
    pub const fn sectors(self) -> u64 {
        self.bytes() >> 9
    }

    /// The cluster that holds byte `at`, or `None` past the largest table.
    pub fn cluster_of(self, at: u64) -> Option<u32> {
        u32::try_from(at >> self.log2).ok()
    }

    /// The offset of `at` within its cluster.
    pub const fn within(self, at: u64) -> u64 {
        at & self.bytes().wrapping_sub(1)
    }

    /// The first byte of cluster `n`; cannot overflow: 2^32 clusters of 2^26 bytes.
    pub const fn start(self, n: u32) -> u64 {
        (n as u64).wrapping_shl(self.log2 as u32)
    }

    /// Whole clusters that fit in `bytes`.
    pub const fn whole(self, bytes: u64) -> u64 {
        bytes >> self.log2
    }

    /// Whole clusters needed for `bytes`.
    pub const fn count(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}

/// A cluster number of the guest: an index into the BAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VirtCluster(pub u32);

/// A cluster number of the file: what a BAT entry names. Never 0, which is the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostCluster(pub u32);
