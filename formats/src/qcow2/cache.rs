//! Table pages in memory: a bounded number, the least recently used forgotten first.
//!
//! Large tables are kept in slices, so that a far jump costs a page and not a cluster, and no image
//! can make an open take more than a few pages. No I/O here.

use crate::limits;
use crate::units::{ClusterSize, floor_to};
use bytes::Bytes;
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Slices of tables, by their file offsets.
#[derive(Debug)]
pub(super) struct Slices {
    unit: u64,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    slices: LruCache<u64, Bytes>,
    /// Changes with the tables.
    epoch: u64,
}

impl Slices {
    /// An empty cache. Tables begin at clusters, so a slice is never larger than that.
    pub(super) fn new(cluster: ClusterSize) -> Self {
        let count = NonZeroUsize::new(limits::PAGES_CACHED).unwrap_or(NonZeroUsize::MIN);
        Self {
            unit: cluster.bytes().min(limits::PAGE),
            kept: Mutex::new(Kept {
                slices: LruCache::new(count),
                epoch: 0,
            }),
        }
    }

    /// Bytes of a slice.
    pub(super) const fn unit(&self) -> u64 {
        self.unit
    }

    /// The file offset of the slice that holds `at`.
    pub(super) const fn start(&self, at: u64) -> u64 {
        floor_to(at, self.unit)
    }

    /// The slice that begins at `start`, if it is kept.
    pub(super) fn find(&self, start: u64) -> Option<Bytes> {
        self.lock().slices.get(&start).cloned()
    }

    /// Counts changes of the tables: what was read before one is not kept behind it.
    pub(super) fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    /// Tables change.
    pub(super) fn new_epoch(&self) {
        let mut kept = self.lock();
        kept.epoch = kept.epoch.wrapping_add(1);
    }

    /// Keeps a slice that was read while `epoch` was current; one that was read across a change may be
    /// half old, and is left out.
    pub(super) fn keep_read(&self, start: u64, slice: Bytes, epoch: u64) {
        let mut kept = self.lock();
        if kept.epoch == epoch {
            kept.slices.put(start, slice);
        }
    }

    /// Keeps a slice that was written.
    pub(super) fn keep(&self, start: u64, slice: Bytes) {
        self.lock().slices.put(start, slice);
    }

    /// Forgets the slice that begins at `start`.
    pub(super) fn forget(&self, start: u64) {
        self.lock().slices.pop(&start);
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
