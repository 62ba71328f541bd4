//! The ploop header: 64 bytes, little-endian, at the start of every delta.
//!
//! Source: OpenVZ/ploop `include/ploop1_image.h`, QEMU `docs/interop/parallels.txt`. Parsing gives
//! a value that cannot contradict itself; whether the *file* agrees with it is `check`'s business.

use crate::layer::Geometry;
use crate::limits;
use crate::units::{ClusterSize, HostCluster, SECTOR};
use crate::{Error, Result};
use std::cmp::Ordering;

/// Bytes of the header; the BAT follows at once.
pub const HEADER_LEN: u64 = 64;
const MAGIC_V1: &[u8; 16] = b"WithoutFreeSpace";
const MAGIC_V2: &[u8; 16] = b"WithouFreSpacExt";
/// `m_DiskInUse` while open for writing, and after a crash.
pub const IN_USE: u32 = 0x746F_6E59;
/// `m_DiskInUse` after a close that maintained the format extension (ASCII `v2.1`).
pub const CLOSED_V21: u32 = 0x312E_3276;
/// `m_Flags` bit 0, written for a truly blank delta only and never trusted.
pub const FLAG_EMPTY: u32 = 1;
/// `m_Flags` bit 1: a format version conversion was interrupted.
pub const FLAG_CONVERTING: u32 = 2;

/// Format version: the unit of BAT entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// Entries are sectors; at most 2 TiB.
    V1,
    /// Entries are clusters.
    V2,
}

/// A parsed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Format version.
    pub version: Version,
    /// CHS geometry, informative.
    pub heads: u32,
    /// CHS geometry, informative.
    pub cylinders: u32,
    /// Cluster size (`m_Sectors`, in sectors on disk).
    pub cluster: ClusterSize,
    /// BAT entries (`m_Size`).
    pub entries: u32,
    /// Virtual size in sectors.
    pub sectors: u64,
    /// `m_DiskInUse`, as it is on disk.
    pub in_use: u32,
    /// First data cluster, in clusters (`m_FirstBlockOffset`, in sectors on disk).
    pub data_start: u32,
    /// `m_Flags`.
    pub flags: u32,
    /// Format extension, in sectors; 0 is none. Trusted only when `in_use` is [`CLOSED_V21`].
    pub extension: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk::<4>())
        .map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk::<8>())
        .map_or(0, |b| u64::from_le_bytes(*b))
}

/// File clusters that header and BAT of `entries` entries occupy.
fn table_clusters(entries: u64, cluster: ClusterSize) -> u64 {
    cluster.count(HEADER_LEN.saturating_add(entries.saturating_mul(4)))
}

/// CHS geometry as ploop computes it: heads, sectors per track, cylinders.
///
/// Source: ploop reference 1.6; only heads and cylinders reach the header, the descriptor has all.
pub fn chs(sectors: u64) -> (u32, u32, u32) {
    let clip = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    if sectors > 1_032_192 && sectors < 16_777_216 {
        return (16, 63, clip(sectors / 1008));
    }
    let pick = |n: u64, from: &[u64]| from.iter().copied().find(|d| n.is_multiple_of(*d));
    let Some(track) = pick(sectors, &[63, 32, 16, 8]) else {
        return (1, 1, clip(sectors));
    };
    let rest = sectors.checked_div(track).unwrap_or(0);
    let Some(heads) = pick(rest, &[16, 8, 4, 2]) else {
        return (1, 1, clip(sectors));
    };
    (
        clip(heads),
        clip(track),
        clip(rest.checked_div(heads).unwrap_or(0)),
    )
}

impl Header {
    /// The header of a new, blank delta of `size` bytes, rounded up to a cluster (down where the
    /// format ends).
    pub fn new(version: Version, size: u64, cluster: ClusterSize) -> Result<Self> {
        let max = match version {
            Version::V1 => cluster.whole(limits::V1_SECTORS_MAX * SECTOR),
            Version::V2 => limits::BAT_ENTRIES_MAX,
        };
        let wanted = cluster.count(size);
        let fits_if_cut = cluster.whole(size) <= max;
        if size == 0 || (wanted > max && !fits_if_cut) {
            return Err(Error::invalid(format!(
                "size {size} is not from 1 byte to {} bytes, the limit of ploop format {version:?} with {}-byte clusters",
                max.saturating_mul(cluster.bytes()),
                cluster.bytes()
            )));
        }
        let entries = wanted.min(max);
        let sectors = entries.saturating_mul(cluster.sectors());
        let (heads, _, cylinders) = chs(sectors);
        Ok(Self {
            version,
            heads,
            cylinders,
            cluster,
            entries: u32::try_from(entries).map_err(|_| Error::invalid("too many clusters"))?,
            sectors,
            in_use: 0,
            data_start: u32::try_from(table_clusters(entries, cluster))
                .map_err(|_| Error::invalid("table too large"))?,
            flags: FLAG_EMPTY,
            extension: 0,
        })
    }

    /// This header with a virtual size of `size` bytes, rounded as in [`Header::new`]; the same when
    /// it has that already. `Invalid` for less than it has.
    pub fn grown(&self, size: u64) -> Result<Self> {
        let new = Self::new(self.version, size, self.cluster)?;
        if new.sectors < self.sectors {
            return Err(Error::invalid(format!(
                "{size} bytes are less than the {} that it has",
                self.geometry().size
            )));
        }
        // Foreign tables may be longer than their disk needs.
        let entries = new.entries.max(self.entries);
        let start = table_clusters(u64::from(entries), self.cluster);
        Ok(Self {
            entries,
            data_start: u32::try_from(start).map_err(|_| Error::invalid("table too large"))?,
            in_use: self.in_use,
            flags: self.flags & !FLAG_EMPTY,
            extension: self.extension,
            ..new
        })
    }

    /// This header with a virtual size of `size` bytes, rounded as in [`Header::new`], and with the
    /// table of an image that is made with that; the same when the disk ends in that cluster already.
    /// `Invalid` for more than it has, and for nothing.
    pub fn shrunk(&self, size: u64) -> Result<Self> {
        let new = Self::new(self.version, size, self.cluster)?;
        let has = self.cluster.count(self.geometry().size);
        match u64::from(new.entries).cmp(&has) {
            Ordering::Greater => Err(Error::invalid(format!(
                "{size} bytes are more than the {} that it has",
                self.geometry().size
            ))),
            Ordering::Equal => Ok(*self),
            Ordering::Less => Ok(Self {
                in_use: self.in_use,
                flags: self.flags & !FLAG_EMPTY,
                extension: self.extension,
                ..new
            }),
        }
    }

    /// Parses the first 64 bytes of a file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let magic = bytes
            .get(..16)
            .filter(|_| bytes.len() >= HEADER_LEN as usize)
            .ok_or_else(|| Error::damaged("shorter than the 64-byte ploop header"))?;
        let version = match magic {
            m if m == MAGIC_V1 => Version::V1,
            m if m == MAGIC_V2 => Version::V2,
            _ => return Err(Error::damaged("offset 0: no ploop signature")),
        };
        let kind = u32_at(bytes, 0x10);
        if kind != 2 {
            return Err(Error::damaged(format!("offset 0x10: type {kind} is not 2")));
        }
        let cluster = ClusterSize::new(u64::from(u32_at(bytes, 0x1C)).saturating_mul(SECTOR))
            .map_err(|e| Error::damaged(format!("offset 0x1C: {e}")))?;
        let entries = u32_at(bytes, 0x20);
        if u64::from(entries) > limits::BAT_ENTRIES_MAX {
            return Err(Error::damaged(format!(
                "offset 0x20: {entries} BAT entries, above the format's limit"
            )));
        }
        let sectors = match version {
            Version::V1 => u64::from(u32_at(bytes, 0x24)),
            Version::V2 => u64_at(bytes, 0x24),
        };
        if sectors == 0 || sectors > limits::SIZE_MAX / SECTOR {
            return Err(Error::damaged(format!(
                "offset 0x24: a size of {sectors} sectors"
            )));
        }
        let needed = table_clusters(u64::from(entries), cluster);
        let first = u64::from(u32_at(bytes, 0x30));
        let start = match first {
            0 if version == Version::V1 => needed,
            n if n.checked_rem(cluster.sectors()) == Some(0) => {
                n.checked_div(cluster.sectors()).unwrap_or(0)
            }
            n => {
                return Err(Error::damaged(format!(
                    "offset 0x30: first data sector {n} is not a multiple of the cluster ({} sectors)",
                    cluster.sectors()
                )));
            }
        };
        if start < needed {
            return Err(Error::damaged(format!(
                "offset 0x30: data starts in cluster {start}, inside the BAT, which ends at cluster {needed}"
            )));
        }
        let flags = u32_at(bytes, 0x34);
        if flags == u32::MAX {
            return Err(Error::damaged("offset 0x34: flags 0xFFFFFFFF"));
        }
        let extension = u64_at(bytes, 0x38);
        Ok(Self {
            version,
            heads: u32_at(bytes, 0x14),
            cylinders: u32_at(bytes, 0x18),
            cluster,
            entries,
            sectors,
            in_use: u32_at(bytes, 0x2C),
            data_start: u32::try_from(start).map_err(|_| Error::damaged("offset 0x30: too far"))?,
            flags,
            extension,
        })
    }

    /// The 64 bytes on disk.
    pub fn encode(&self) -> [u8; 64] {
        let magic = match self.version {
            Version::V1 => MAGIC_V1,
            Version::V2 => MAGIC_V2,
        };
        let first = u64::from(self.data_start).saturating_mul(self.cluster.sectors());
        let fields: [&[u8]; 11] = [
            magic,
            &2u32.to_le_bytes(),
            &self.heads.to_le_bytes(),
            &self.cylinders.to_le_bytes(),
            &(self.cluster.sectors() as u32).to_le_bytes(),
            &self.entries.to_le_bytes(),
            &self.sectors.to_le_bytes(),
            &self.in_use.to_le_bytes(),
            &(u32::try_from(first).unwrap_or(u32::MAX)).to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.extension.to_le_bytes(),
        ];
        let mut out = [0u8; 64];
        for (to, from) in out.iter_mut().zip(fields.iter().flat_map(|f| f.iter())) {
            *to = *from;
        }
        out
    }

    /// Virtual size and cluster.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            size: self.sectors.saturating_mul(SECTOR),
            cluster: self.cluster,
        }
    }

    /// Whether the BAT has an entry for every cluster of the virtual size.
    pub fn covers_size(&self) -> bool {
        self.cluster.count(self.geometry().size) <= u64::from(self.entries)
    }

    /// File offset of BAT entry `n`.
    pub fn entry_at(&self, n: u32) -> u64 {
        HEADER_LEN.saturating_add(u64::from(n).saturating_mul(4))
    }

    /// The file cluster that a BAT entry names: `None` for 0, an error for a v1 entry that is not
    /// cluster aligned or an entry inside the header clusters. The file's end is not looked at.
    pub fn entry_to_cluster(&self, entry: u32) -> Result<Option<HostCluster>> {
        if entry == 0 {
            return Ok(None);
        }
        let cluster = match self.version {
            Version::V2 => entry,
            Version::V1 => {
                let sectors = self.cluster.sectors() as u32;
                if entry.checked_rem(sectors) != Some(0) {
                    return Err(Error::damaged(format!(
                        "BAT entry {entry} is not a multiple of the cluster ({sectors} sectors)"
                    )));
                }
                entry.checked_div(sectors).unwrap_or(0)
            }
        };
        if cluster < self.data_start {
            return Err(Error::damaged(format!(
                "BAT entry {entry} points into the header clusters (data starts at cluster {})",
                self.data_start
            )));
        }
        Ok(Some(HostCluster(cluster)))
    }

    /// The BAT entry that names a file cluster; `None` when it does not fit the format.
    pub fn cluster_to_entry(&self, cluster: HostCluster) -> Option<u32> {
        match self.version {
            Version::V2 => Some(cluster.0).filter(|c| *c != u32::MAX),
            Version::V1 => cluster.0.checked_mul(self.cluster.sectors() as u32),
        }
    }
}
