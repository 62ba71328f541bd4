//! Entries of the two table levels, and what they say of a cluster or a subcluster.
//!
//! Pure values: an entry is decoded, or it breaks a rule of the format and says which. Source:
//! QEMU `docs/interop/qcow2.rst`, "Cluster mapping" and "Extended L2 Entries".

use super::partial::Bits;
use crate::planted::{self, Bug};
use crate::units::ClusterSize;
use crate::{Error, Result};
use std::ops::Range;

/// Refcount is exactly one; with an external data file: this entry names a cluster.
const COPIED: u64 = 1 << 63;
const PACKED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55: a file offset.
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
/// Subclusters of a cluster with extended entries.
pub const SUBCLUSTERS: u32 = 32;

const fn with_copied(word: u64, copied: bool) -> u64 {
    if copied {
        word | COPIED
    } else {
        word & !COPIED
    }
}

/// How the tables of an image are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Unit of allocation, and the length of a second-level table.
    pub cluster: ClusterSize,
    /// Second-level entries have 16 bytes and tell of subclusters.
    pub extended: bool,
    /// Guest data is in another file, every cluster at its guest offset.
    pub external: bool,
    /// Bit 0 of an entry means zeros: version 3.
    pub zero_flag: bool,
}

impl Layout {
    /// Bytes of a second-level entry.
    pub const fn entry_len(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of a second-level table.
    pub const fn entries(self) -> u64 {
        self.cluster
            .bytes()
            .wrapping_shr(if self.extended { 4 } else { 3 })
    }

    /// Guest bytes that one second-level table tells of.
    pub const fn table_covers(self) -> u64 {
        self.entries().wrapping_mul(self.cluster.bytes())
    }

    /// Bytes that are the same for sure: a cluster, or a subcluster.
    pub const fn piece(self) -> u64 {
        if self.extended {
            self.cluster
                .bytes()
                .wrapping_shr(SUBCLUSTERS.trailing_zeros())
        } else {
            self.cluster.bytes()
        }
    }
}

/// An entry of a first-level table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// File offset of the second-level table; none when nothing below it is allocated.
    pub fn table(self, cluster: ClusterSize) -> Result<Option<u64>> {
        if self.0 & !(OFFSET | COPIED) != 0 {
            return Err(Error::damaged(format!(
                "L1 entry {:#018x} has reserved bits",
                self.0
            )));
        }
        let at = self.0 & OFFSET;
        if cluster.within(at) != 0 {
            return Err(Error::damaged(format!(
                "L1 entry {:#018x} names an L2 table at {at:#x}, not the start of a cluster",
                self.0
            )));
        }
        Ok(Some(at).filter(|at| *at != 0))
    }

    /// The entry of a table that nobody else has.
    pub(super) const fn owned(table: u64) -> Self {
        Self(table | COPIED)
    }

    /// The file offset in it, whatever else is wrong with it.
    pub(super) const fn raw_offset(self) -> u64 {
        self.0 & OFFSET
    }

    /// Whether it says that nobody else has the table.
    pub(super) const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same, with another flag.
    pub(super) const fn with_copied(self, copied: bool) -> u64 {
        with_copied(self.0, copied)
    }
}

/// Where a compressed cluster is: any bytes of the file, up to the end of a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Packed {
    /// File offset of its first byte.
    pub at: u64,
    /// Bytes, of which the last may be another's.
    pub len: u64,
}

/// What an entry says of a cluster, or of one of its subclusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Nothing: look below.
    Absent,
    /// Zeros; the file may have space for the cluster.
    Zero {
        /// File offset of the cluster that is taken for it.
        at: Option<u64>,
    },
    /// Data.
    Data {
        /// File offset of the cluster's first byte.
        at: u64,
    },
    /// The whole cluster, compressed.
    Packed(Packed),
}

/// An entry of a second-level table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L2Entry {
    /// The entry, or the first half of an extended one.
    pub word: u64,
    /// Second half of an extended entry: 32 bits "reads as zeros", then 32 bits "allocated", the
    /// first subcluster in the lowest bit. 0 otherwise.
    pub bits: u64,
}

impl L2Entry {
    /// What it says of subcluster `sub`, which is below [`SUBCLUSTERS`], or of the whole cluster
    /// when entries are not extended.
    pub fn mapping(self, layout: Layout, sub: u32) -> Result<Mapping> {
        if self.word & PACKED != 0 {
            return self.packed(layout).map(Mapping::Packed);
        }
        let host = self.host(layout)?;
        if layout.extended {
            return self.subcluster(host, sub);
        }
        match (self.word & ZERO != 0, host) {
            (true, _) if !layout.zero_flag => Err(self.refuse("is a zero cluster in version 2")),
            (true, at) => Ok(Mapping::Zero { at }),
            (false, Some(at)) => Ok(Mapping::Data { at }),
            (false, None) => Ok(Mapping::Absent),
        }
    }

    /// The entry of a cluster that nobody else has, of which so much is there; that of none.
    pub(super) const fn owned(host: Option<u64>, bits: Bits, layout: Layout) -> Self {
        match host {
            None => Self { word: 0, bits: 0 },
            Some(at) => Self {
                word: at | COPIED,
                bits: if layout.extended { bits.word() } else { 0 },
            },
        }
    }

    /// The entry of a cluster that reads as zeros.
    pub(super) const fn zeros(layout: Layout) -> Self {
        if layout.extended {
            Self {
                word: 0,
                bits: (u32::MAX as u64).wrapping_shl(32),
            }
        } else {
            Self {
                word: ZERO,
                bits: 0,
            }
        }
    }

    /// The file offset of the cluster if it may be overwritten: all of it is data, and nobody else
    /// has it.
    pub(super) fn own(self, layout: Layout) -> Result<Option<u64>> {
        let copied = self.copied() || planted::is(Bug::WriteToShared);
        if !copied || layout.extended && self.bits != u64::from(u32::MAX) {
            return Ok(None);
        }
        Ok(match self.mapping(layout, 0)? {
            Mapping::Data { at } => Some(at),
            _ => None,
        })
    }

    /// The bytes of the file that it names, from the first to one past the last; empty when it names
    /// none.
    pub(super) fn names(self, layout: Layout) -> Result<Range<u64>> {
        let (at, len) = match self.mapping(layout, 0)? {
            Mapping::Packed(packed) => (packed.at, packed.len),
            _ => match self.host(layout)? {
                Some(at) => (at, layout.cluster.bytes()),
                None => (0, 0),
            },
        };
        Ok(at..at.saturating_add(len))
    }

    /// Its bytes: 8, or 16 of an extended one.
    pub(super) fn encode(self, layout: Layout) -> Vec<u8> {
        let mut bytes = self.word.to_be_bytes().to_vec();
        if layout.extended {
            bytes.extend(self.bits.to_be_bytes());
        }
        bytes
    }

    /// The file offset in an entry that is not compressed, whatever else is wrong with it.
    pub(super) const fn raw_offset(self) -> Option<u64> {
        match self.word & OFFSET {
            0 => None,
            _ if self.word & PACKED != 0 => None,
            at => Some(at),
        }
    }

    /// Whether it says that nobody else has its cluster.
    pub(super) const fn copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// The entry, or the first half of an extended one, with another flag.
    pub(super) const fn with_copied(self, copied: bool) -> u64 {
        with_copied(self.word, copied)
    }

    /// The cluster that it names, when it is not compressed.
    pub(super) fn host(self, layout: Layout) -> Result<Option<u64>> {
        let flags = if layout.extended {
            COPIED
        } else {
            COPIED | ZERO
        };
        if self.word & !(OFFSET | flags) != 0 {
            return Err(self.refuse("has reserved bits"));
        }
        let at = self.word & OFFSET;
        if layout.cluster.within(at) != 0 {
            return Err(self.refuse("names a place that is not the start of a cluster"));
        }
        // The first cluster is the header's, but not in an external data file.
        let first = layout.external && self.word & COPIED != 0;
        Ok(Some(at).filter(|at| *at != 0 || first))
    }

    fn subcluster(self, host: Option<u64>, sub: u32) -> Result<Mapping> {
        let (zero, taken) = (self.bits.wrapping_shr(32), self.bits & u64::from(u32::MAX));
        if zero & taken != 0 {
            return Err(self.refuse("has a subcluster that is both allocated and zero"));
        }
        if taken != 0 && host.is_none() {
            return Err(self.refuse("has subclusters and no cluster"));
        }
        let is = |set: u64| set.wrapping_shr(sub) & 1 == 1;
        Ok(match host {
            at if is(zero) => Mapping::Zero { at },
            Some(at) if is(taken) => Mapping::Data { at },
            _ => Mapping::Absent,
        })
    }

    fn packed(self, layout: Layout) -> Result<Packed> {
        if layout.external {
            return Err(self.refuse("is compressed in an image with an external data file"));
        }
        if self.bits != 0 {
            return Err(self.refuse("is compressed and has subclusters"));
        }
        // The larger a cluster, the more sectors it may need: 62 - (cluster bits - 8).
        let shift = 70u32.saturating_sub(layout.cluster.log2());
        let word = self.word & (PACKED.wrapping_sub(1));
        let at = word & 1u64.wrapping_shl(shift).wrapping_sub(1);
        let sectors = word.wrapping_shr(shift).saturating_add(1);
        let within = at & 511;
        if at < layout.cluster.bytes() {
            return Err(self.refuse("is compressed data inside the header"));
        }
        Ok(Packed {
            at,
            len: sectors.saturating_mul(512).saturating_sub(within),
        })
    }

    fn refuse(self, what: &str) -> Error {
        Error::damaged(format!("L2 entry {:#018x} {what}", self.word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(log2: u32) -> Layout {
        Layout {
            cluster: ClusterSize::of_qcow2(log2).unwrap(),
            extended: false,
            external: false,
            zero_flag: true,
        }
    }

    const fn plain(word: u64) -> L2Entry {
        L2Entry { word, bits: 0 }
    }

    fn damaged<T: std::fmt::Debug>(done: Result<T>, says: &str) {
        let e = done.unwrap_err();
        assert_eq!(e.kind(), crate::Kind::Damaged, "{e}");
        assert!(e.to_string().contains(says), "{e}: does not say {says:?}");
    }

    #[test]
    fn the_kinds_of_a_standard_entry() {
        let l = layout(16);
        let say = |word| plain(word).mapping(l, 0);
        assert_eq!(say(0).unwrap(), Mapping::Absent);
        assert_eq!(say(COPIED).unwrap(), Mapping::Absent);
        assert_eq!(say(1).unwrap(), Mapping::Zero { at: None });
        assert_eq!(
            say(0x5_0001 | COPIED).unwrap(),
            Mapping::Zero { at: Some(0x5_0000) }
        );
        assert_eq!(say(0x5_0000).unwrap(), Mapping::Data { at: 0x5_0000 });
        for (word, says) in [
            (0x5_0200, "not the start of a cluster"),
            (0x5_0002, "reserved bits"),
            (0x5_0000 | 1 << 56, "reserved bits"),
            (1 << 61, "reserved bits"),
            (2, "reserved bits"),
        ] {
            damaged(say(word), says);
        }
        let v2 = Layout {
            zero_flag: false,
            ..l
        };
        damaged(plain(0x5_0001).mapping(v2, 0), "in version 2");
    }

    #[test]
    fn the_first_cluster_of_an_external_file_is_named_by_a_flag_alone() {
        let l = Layout {
            external: true,
            ..layout(16)
        };
        assert_eq!(
            plain(COPIED).mapping(l, 0).unwrap(),
            Mapping::Data { at: 0 }
        );
        assert_eq!(plain(0).mapping(l, 0).unwrap(), Mapping::Absent);
        damaged(plain(PACKED | 0x5_0000).mapping(l, 0), "external data");
    }

    #[test]
    fn a_compressed_descriptor_is_split_where_the_cluster_size_says() {
        for (log2, shift) in [(9, 61), (12, 58), (16, 54), (21, 49)] {
            let at = 0x123_4567_u64;
            let word = PACKED | 1 << shift | at;
            let found = plain(word).mapping(layout(log2), 0);
            let len = 1024 - (at & 511);
            assert_eq!(
                found.unwrap(),
                Mapping::Packed(Packed { at, len }),
                "2^{log2}"
            );
        }
        let most = plain(!COPIED).mapping(layout(21), 0).unwrap();
        let Mapping::Packed(packed) = most else {
            panic!("{most:?}")
        };
        assert_eq!(
            packed,
            Packed {
                at: (1 << 49) - 1,
                len: (8192 * 512) - 511
            }
        );
        damaged(
            plain(PACKED | 100).mapping(layout(16), 0),
            "inside the header",
        );
    }

    #[test]
    fn each_subcluster_is_data_zeros_or_nothing() {
        let l = Layout {
            extended: true,
            ..layout(16)
        };
        let at = 0x7_0000;
        let entry = L2Entry {
            word: at | COPIED,
            bits: (0b100 << 32) | 0b1 | 1 << 31,
        };
        let kinds: Vec<Mapping> = (0..32).map(|n| entry.mapping(l, n).unwrap()).collect();
        for (n, kind) in kinds.iter().enumerate() {
            let expected = match n {
                0 | 31 => Mapping::Data { at },
                2 => Mapping::Zero { at: Some(at) },
                _ => Mapping::Absent,
            };
            assert_eq!(*kind, expected, "subcluster {n}");
        }
        let empty = L2Entry {
            word: 0,
            bits: 0b10 << 32,
        };
        assert_eq!(empty.mapping(l, 1).unwrap(), Mapping::Zero { at: None });
        assert_eq!(empty.mapping(l, 0).unwrap(), Mapping::Absent);
    }

    #[test]
    fn an_extended_entry_that_contradicts_itself_is_refused() {
        let l = Layout {
            extended: true,
            ..layout(16)
        };
        for (word, bits, says) in [
            (0x7_0000, 1 | 1 << 32, "both allocated and zero"),
            (0, 1, "subclusters and no cluster"),
            (0x7_0001, 1, "reserved bits"),
            (PACKED | 0x7_0000, 1, "compressed and has subclusters"),
            (0x7_0000 | 1 << 60, 0, "reserved bits"),
        ] {
            damaged(L2Entry { word, bits }.mapping(l, 5), says);
        }
    }

    #[test]
    fn an_l1_entry_names_a_cluster_or_nothing() {
        let cluster = ClusterSize::of_qcow2(16).unwrap();
        assert_eq!(L1Entry(0).table(cluster).unwrap(), None);
        assert_eq!(
            L1Entry(COPIED | 0x3_0000).table(cluster).unwrap(),
            Some(0x3_0000)
        );
        for (word, says) in [
            (0x3_0200, "not the start of a cluster"),
            (0x3_0001, "reserved bits"),
            (0x3_0000 | 1 << 62, "reserved bits"),
            (1 << 56, "reserved bits"),
        ] {
            damaged(L1Entry(word).table(cluster), says);
        }
    }
}
