//! Scan: the table in bounded steps, and what each of its slots is worth.
//!
//! Owns the reading order, on which the verdicts depend: the first entry that names a cluster has
//! it, later ones are duplicates. Check and repair walk the same way and so judge alike.

use crate::ploop::header::{HEADER_LEN, Header, Version};
use crate::progress::Progress;
use crate::store::Store;
use crate::units::SECTOR;
use crate::{Result, limits};
use bytes::BytesMut;
use roaring::RoaringBitmap;

/// Table bytes read in one step.
const STEP: u64 = 256 << 10;

/// A walk over the table, header page included.
pub(super) struct Table<'s, S> {
    store: &'s S,
    at: u64,
    end: u64,
}

/// Some bytes of the table.
pub(super) struct Chunk {
    /// File offset, a multiple of [`limits::PAGE`].
    pub(super) at: u64,
    pub(super) bytes: BytesMut,
}

impl<'s, S: Store> Table<'s, S> {
    /// A walk over all slots of the header clusters, as far as the file has them.
    pub(super) fn new(store: &'s S, header: &Header) -> Self {
        let len = page_floor(store.info().len);
        Self {
            store,
            at: 0,
            end: header.cluster.start(header.data_start).min(len),
        }
    }

    /// The next part that is no hole; holes are slots of 0.
    pub(super) async fn next(&mut self) -> Result<Option<Chunk>> {
        while self.at < self.end {
            let (data, until) = self.store.extent(self.at).await?;
            let hole_end = page_floor(until);
            if data || hole_end <= self.at {
                let at = self.at;
                let len = STEP.min(self.end.saturating_sub(at));
                let buf = crate::buf::aligned(len as usize);
                let bytes = self.store.read_at(at, buf).await?;
                self.at = at.saturating_add(len);
                return Ok(Some(Chunk { at, bytes }));
            }
            self.at = hole_end;
        }
        Ok(None)
    }

    /// How far the walk is.
    pub(super) const fn progress(&self, phase: &'static str) -> Progress {
        Progress {
            phase,
            done: self.at,
            total: self.end,
        }
    }
}

const fn page_floor(at: u64) -> u64 {
    at & !limits::PAGE.wrapping_sub(1)
}

impl Chunk {
    /// The slots that are not 0: number and entry.
    pub(super) fn slots(&self) -> impl Iterator<Item = (u64, u32)> {
        let words = self
            .bytes
            .chunks_exact(4)
            .map(|b| b.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)));
        let at = (self.at..).step_by(4);
        at.zip(words).filter_map(|(at, raw)| {
            let slot = at.checked_sub(HEADER_LEN)? / 4;
            (raw != 0).then_some((slot, raw))
        })
    }

    /// Changes a slot that is in this part; gives its page.
    pub(super) fn set(&mut self, slot: u64, raw: u32) -> Option<u64> {
        let at = slot.checked_mul(4)?.checked_add(HEADER_LEN)?;
        let from = usize::try_from(at.checked_sub(self.at)?).ok()?;
        let to = self.bytes.get_mut(from..)?.first_chunk_mut::<4>()?;
        *to = raw.to_le_bytes();
        Some(at / limits::PAGE)
    }
}

/// What a slot that is not 0 is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It has this file cluster for itself.
    Good(u32),
    /// This file cluster has another owner, met earlier.
    Duplicate(u32),
    /// Its data starts at this byte, which is no start of a cluster.
    Misaligned(u64),
    /// It names this byte, past the end of the file.
    PastEnd(u64),
    /// It names this byte, in the header clusters.
    InHeader(u64),
    /// No guest cluster belongs to it.
    BeyondDevice,
}

/// Judges slots, one after the other.
pub(super) struct Judge {
    header: Header,
    /// File length.
    len: u64,
    /// Slots that belong to guest clusters.
    device: u64,
    /// File clusters with an owner.
    pub(super) used: RoaringBitmap,
    /// File clusters that misaligned data reaches into, past the end of the file too: what is put
    /// there would become part of it.
    pub(super) overlapped: RoaringBitmap,
}

impl Judge {
    pub(super) fn new(header: Header, len: u64) -> Self {
        let device = header
            .cluster
            .count(header.geometry().size)
            .min(u64::from(header.entries));
        let (used, overlapped) = (RoaringBitmap::new(), RoaringBitmap::new());
        Self {
            header,
            len,
            device,
            used,
            overlapped,
        }
    }

    /// Judges the next slot.
    pub(super) fn slot(&mut self, slot: u64, raw: u32) -> Verdict {
        if slot >= self.device {
            return Verdict::BeyondDevice;
        }
        let size = self.header.cluster;
        let at = match self.header.version {
            Version::V1 => u64::from(raw).saturating_mul(SECTOR),
            Version::V2 => size.start(raw),
        };
        let cluster = match size.cluster_of(at) {
            Some(cluster) if at < self.len && raw != u32::MAX => cluster,
            _ => return Verdict::PastEnd(at),
        };
        if cluster < self.header.data_start {
            return Verdict::InHeader(at);
        }
        if size.within(at) != 0 {
            self.overlapped.insert(cluster);
            self.overlapped.insert(cluster.saturating_add(1));
            return Verdict::Misaligned(at);
        }
        if self.used.insert(cluster) {
            Verdict::Good(cluster)
        } else {
            Verdict::Duplicate(cluster)
        }
    }

    /// Clusters that hold data, misaligned data included.
    pub(super) fn occupied(&self) -> RoaringBitmap {
        &self.used | &self.overlapped
    }
}
