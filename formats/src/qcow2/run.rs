//! How far a mapping goes on: from the entries of a table slice to the first extent of a range.

use super::be::u64_at;
use super::table::{L2Entry, Layout, Mapping, SUBCLUSTERS};
use crate::Result;
use crate::layer::Extent;

/// Second-level entries in a row, the first of which tells of the cluster that a range begins in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entries<'a> {
    pub(super) layout: Layout,
    pub(super) bytes: &'a [u8],
}

impl Entries<'_> {
    /// What is said of the whole cluster of the first entry, when it is compressed.
    pub(super) fn first(self) -> Result<Mapping> {
        self.first_entry().mapping(self.layout, 0)
    }

    fn entry(self, n: u64) -> Option<L2Entry> {
        let len = self.layout.entry_len();
        let at = usize::try_from(n.checked_mul(len)?).ok()?;
        let bytes = self.bytes.get(at..)?.get(..len as usize)?;
        let bits = if self.layout.extended {
            u64_at(bytes, 8)
        } else {
            0
        };
        Some(L2Entry {
            word: u64_at(bytes, 0),
            bits,
        })
    }

    /// The entry of the first cluster; none of a table that ends before it.
    pub(super) fn first_entry(self) -> L2Entry {
        self.entry(0).unwrap_or(L2Entry { word: 0, bits: 0 })
    }

    /// Where the cluster of the first entry may be overwritten, and how many bytes from its start go
    /// on like that, up to `max` and some; none when it may not.
    pub(super) fn own(self, max: u64) -> Result<Option<(u64, u64)>> {
        let Some(at) = self.first_entry().own(self.layout)? else {
            return Ok(None);
        };
        let size = self.layout.cluster.bytes();
        let mut len = size;
        while len < max {
            let next = self.entry(self.layout.cluster.whole(len));
            let next = next.and_then(|entry| entry.own(self.layout).ok().flatten());
            if next.is_none() || next != at.checked_add(len) {
                break;
            }
            len = len.saturating_add(size);
        }
        Ok(Some((at, len)))
    }

    /// What is said of piece `n`, counted from the start of the first cluster: where the piece
    /// itself is, not its cluster. None behind the last entry.
    fn piece(self, n: u64) -> Result<Option<Mapping>> {
        let per = if self.layout.extended {
            u64::from(SUBCLUSTERS)
        } else {
            1
        };
        let sub = n.checked_rem(per).unwrap_or(0);
        let Some(entry) = self.entry(n.checked_div(per).unwrap_or(0)) else {
            return Ok(None);
        };
        let within = sub.saturating_mul(self.layout.piece());
        Ok(Some(match entry.mapping(self.layout, sub as u32)? {
            Mapping::Data { at } => Mapping::Data {
                at: at.saturating_add(within),
            },
            other => other,
        }))
    }

    /// The first extent of the range that begins `within` the first cluster: at most `max` bytes,
    /// and no more than the entries tell of. An entry behind it that breaks a rule ends it.
    pub(super) fn extent(self, within: u64, max: u64) -> Result<Extent> {
        let piece = self.layout.piece();
        let first = within.checked_div(piece).unwrap_or(0);
        let from = within.checked_rem(piece).unwrap_or(0);
        let mapping = self.piece(first)?.unwrap_or(Mapping::Absent);
        if let Mapping::Packed(_) = mapping {
            let rest = self.layout.cluster.bytes().saturating_sub(within);
            return Ok(Extent::Packed { len: rest.min(max) });
        }
        let mut count = 1u64;
        while count.saturating_mul(piece).saturating_sub(from) < max {
            let next = self.piece(first.saturating_add(count)).ok().flatten();
            if next.is_none_or(|next| !goes_on(mapping, next, count.saturating_mul(piece))) {
                break;
            }
            count = count.saturating_add(1);
        }
        let len = count.saturating_mul(piece).saturating_sub(from).min(max);
        Ok(match mapping {
            Mapping::Data { at } => Extent::Data {
                at: at.saturating_add(from),
                len,
            },
            Mapping::Zero { .. } => Extent::Zero { len },
            Mapping::Absent | Mapping::Packed(_) => Extent::Absent { len },
        })
    }
}

/// Whether `next`, which begins `after` bytes behind `first`, is of the same extent.
fn goes_on(first: Mapping, next: Mapping, after: u64) -> bool {
    match (first, next) {
        (Mapping::Data { at }, Mapping::Data { at: next }) => at.checked_add(after) == Some(next),
        (Mapping::Zero { .. }, Mapping::Zero { .. }) => true,
        (Mapping::Absent, Mapping::Absent) => true,
        _ => false,
    }
}
