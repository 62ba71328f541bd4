//! Which file clusters are free, and what is known about them. In memory only, no I/O.
//!
//! A free cluster moves one way: *dirty* (content unknown) -> *punched* (reads as zeros, not yet
//! durably so) -> *fresh* (durably zero and never written since) -> taken. Appended clusters start
//! as fresh once their length is durable. Only fresh clusters are handed out, so a reader never
//! sees what a cluster held before, not even after a crash. A cluster whose write was abandoned is
//! *quarantined* until the store says that nothing can land any more.

use roaring::RoaringBitmap;
use std::ops::Range;

/// Free clusters of one file.
#[derive(Debug)]
pub(super) struct Alloc {
    /// Clusters in the file: its length.
    end: u32,
    /// Clusters below this hold header and BAT.
    start: u32,
    fresh: RoaringBitmap,
    punched: RoaringBitmap,
    dirty: RoaringBitmap,
    quarantined: RoaringBitmap,
}

impl Alloc {
    /// A file of `end` clusters in which everything from `start` is free but for `used`.
    pub(super) fn new(start: u32, end: u32, used: &RoaringBitmap) -> Self {
        let mut dirty = RoaringBitmap::new();
        dirty.insert_range(start..end);
        dirty -= used;
        Self {
            end,
            start,
            fresh: RoaringBitmap::new(),
            punched: RoaringBitmap::new(),
            dirty,
            quarantined: RoaringBitmap::new(),
        }
    }

    /// A file of `end` clusters of which nothing is known to be free.
    pub(super) fn unknown(start: u32, end: u32) -> Self {
        let mut used = RoaringBitmap::new();
        used.insert_range(start..end);
        Self::new(start, end, &used)
    }

    /// Clusters in the file.
    pub(super) const fn end(&self) -> u32 {
        self.end
    }

    /// Takes the lowest cluster that durably reads as zeros: low ones first keep the file short.
    pub(super) fn take(&mut self) -> Option<u32> {
        let cluster = self.fresh.min()?;
        self.fresh.remove(cluster);
        Some(cluster)
    }

    /// As [`Alloc::take`], but only below `limit`.
    pub(super) fn take_below(&mut self, limit: u32) -> Option<u32> {
        let lowest = self.fresh.min().filter(|lowest| *lowest < limit)?;
        self.fresh.remove(lowest);
        Some(lowest)
    }

    /// Whether a cluster below `limit` could be made ready to be taken.
    pub(super) fn could_take_below(&self, limit: u32) -> bool {
        let waiting = [&self.dirty, &self.punched, &self.quarantined];
        let mut lowest = waiting.into_iter().filter_map(RoaringBitmap::min);
        lowest.any(|lowest| lowest < limit)
    }

    /// Where the file would end if nothing in it were free, and how many clusters from there on are
    /// in use.
    pub(super) fn packing(&self) -> (u32, u64) {
        let sets = [&self.dirty, &self.punched, &self.fresh, &self.quarantined];
        let free = |from: u32| {
            let part = sets.map(|set| set.range_cardinality(from..self.end));
            part.into_iter().fold(0u64, u64::saturating_add)
        };
        let all = u64::from(self.end.saturating_sub(self.start));
        let used = u32::try_from(all.saturating_sub(free(self.start))).unwrap_or(u32::MAX);
        let end = self.start.saturating_add(used);
        let behind = u64::from(self.end.saturating_sub(end));
        (end, behind.saturating_sub(free(end)))
    }

    /// Gives back a cluster to which no write was submitted.
    pub(super) fn give_back(&mut self, cluster: u32) {
        self.fresh.insert(cluster);
    }

    /// Sets aside a cluster whose write may still land.
    pub(super) fn quarantine(&mut self, cluster: u32) {
        self.quarantined.insert(cluster);
    }

    /// Frees clusters that no durable index names any more.
    pub(super) fn free(&mut self, clusters: &[u32]) {
        self.dirty.extend(clusters);
    }

    /// Whether [`Alloc::take`] would give a cluster.
    pub(super) fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// How many clusters [`Alloc::take`] would give.
    pub(super) fn fresh(&self) -> u64 {
        self.fresh.len()
    }

    /// Nothing can land any more: quarantined clusters are ordinary free ones.
    pub(super) fn release_quarantine(&mut self, settled: &RoaringBitmap) {
        self.quarantined -= settled;
        self.dirty |= settled;
    }

    /// The clusters in quarantine now.
    pub(super) fn quarantined(&self) -> RoaringBitmap {
        self.quarantined.clone()
    }

    /// Takes dirty clusters, lowest first, at most `max`, as ranges to be punched.
    pub(super) fn take_dirty(&mut self, max: u32) -> Vec<Range<u32>> {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        let (mut dirty, mut left) = (self.dirty.iter(), max);
        // No file has a cluster number u32::MAX, so that an end can always be named.
        while let Some(range) = dirty.next_range().filter(|_| left > 0) {
            let (start, last) = (*range.start(), *range.end());
            let end = last.saturating_add(1).min(start.saturating_add(left));
            left = left.saturating_sub(end.saturating_sub(start));
            ranges.push(start..end);
        }
        for range in &ranges {
            self.dirty.remove_range(range.clone());
        }
        ranges
    }

    /// Puts clusters back that were to be punched and flushed, and were not.
    pub(super) fn dirty_again(&mut self, clusters: impl IntoIterator<Item = u32>) {
        self.dirty.extend(clusters);
    }

    /// The range was punched; it becomes fresh with the next flush.
    pub(super) fn punched(&mut self, range: Range<u32>) {
        self.punched.insert_range(range);
    }

    /// What a flush that starts now will make fresh.
    pub(super) fn take_punched(&mut self) -> RoaringBitmap {
        std::mem::take(&mut self.punched)
    }

    /// A flush that began after these were punched or appended succeeded.
    pub(super) fn now_fresh(&mut self, clusters: RoaringBitmap) {
        self.fresh |= clusters;
    }

    /// The file was extended, and the new length is durable.
    pub(super) fn extended(&mut self, end: u32) {
        self.fresh.insert_range(self.end..end);
        self.end = end;
    }

    /// One past the last cluster that is in use: where a closing file may be cut.
    pub(super) fn used_end(&self) -> u32 {
        let free = (&self.dirty | &self.quarantined) | (&self.fresh | &self.punched);
        // By ranges: a file may have a free tail of hundreds of millions of clusters.
        let mut used = RoaringBitmap::new();
        used.insert_range(self.start..self.end);
        used -= free;
        used.max()
            .map_or(self.start.min(self.end), |c| c.saturating_add(1))
    }
}
