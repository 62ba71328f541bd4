//! Which clusters of the file can be taken, and what is known about them. In memory only, no I/O.
//!
//! A free cluster moves one way: *free* (its refcount is 0, its content unknown) -> *fresh* (its
//! refcount is 1 and it reads as zeros, both durably) -> taken. Only fresh clusters are handed out, so
//! that whoever names one needs no barrier for its refcount, and no reader sees what it held before. A
//! cluster whose write was abandoned is *quarantined* until the store says that nothing can land any
//! more. What is not known yet, because refcounts were not looked at, counts as used.

use roaring::RoaringBitmap;
use std::ops::Range;

/// The clusters of one file.
#[derive(Debug)]
pub(super) struct Alloc {
    /// Clusters in the file: its length.
    end: u32,
    /// Refcounts of the clusters below were looked at.
    scanned: u32,
    free: RoaringBitmap,
    fresh: RoaringBitmap,
    quarantined: RoaringBitmap,
}

impl Alloc {
    /// A file of `end` clusters of which nothing is known.
    pub(super) fn new(end: u32) -> Self {
        Self {
            end,
            scanned: 0,
            free: RoaringBitmap::new(),
            fresh: RoaringBitmap::new(),
            quarantined: RoaringBitmap::new(),
        }
    }

    /// Clusters in the file.
    pub(super) const fn end(&self) -> u32 {
        self.end
    }

    /// The first cluster whose refcount was not looked at; none when all were.
    pub(super) fn unscanned(&self) -> Option<u32> {
        Some(self.scanned).filter(|n| *n < self.end)
    }

    /// The refcounts of a range, which begins where the last one ended, were looked at: those of
    /// `free` are 0.
    pub(super) fn scan(&mut self, range: Range<u32>, free: &RoaringBitmap) {
        self.scanned = range.end.max(self.scanned);
        self.free |= free;
    }

    /// Takes the lowest fresh cluster: low ones first keep the file short.
    pub(super) fn take(&mut self) -> Option<u32> {
        let cluster = self.fresh.min()?;
        self.fresh.remove(cluster);
        Some(cluster)
    }

    /// Whether [`Alloc::take`] would give a cluster.
    pub(super) fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// Gives back a cluster to which no write was submitted.
    pub(super) fn give_back(&mut self, cluster: u32) {
        self.fresh.insert(cluster);
    }

    /// Sets aside clusters to which a write may still land.
    pub(super) fn quarantine(&mut self, clusters: &RoaringBitmap) {
        self.quarantined |= clusters;
    }

    /// The clusters in quarantine, which are nobody's from now on.
    pub(super) fn take_quarantined(&mut self) -> RoaringBitmap {
        std::mem::take(&mut self.quarantined)
    }

    /// The fresh clusters, which are nobody's from now on.
    pub(super) fn take_fresh(&mut self) -> RoaringBitmap {
        std::mem::take(&mut self.fresh)
    }

    /// Refcounts of clusters became 0.
    pub(super) fn free(&mut self, clusters: &RoaringBitmap) {
        self.free |= clusters;
    }

    /// Takes free clusters, the lowest first, at most `max`.
    pub(super) fn take_free(&mut self, max: u32) -> RoaringBitmap {
        let taken: RoaringBitmap = self.free.iter().take(max as usize).collect();
        self.free -= &taken;
        taken
    }

    /// Clusters read as zeros, and their refcounts are 1, both durably.
    pub(super) fn now_fresh(&mut self, clusters: &RoaringBitmap) {
        self.fresh |= clusters;
    }

    /// The file was extended, durably. What is new of it and not fresh is used.
    pub(super) fn extended(&mut self, end: u32) {
        if self.unscanned().is_none() {
            self.scanned = end;
        }
        self.end = end;
    }

    /// Where the file can be cut: behind the last cluster that is not known to be free.
    pub(super) fn used_end(&self) -> u32 {
        let mut end = self.end;
        while let Some(last) = end.checked_sub(1).filter(|last| self.free.contains(*last)) {
            end = last;
        }
        end
    }
}
