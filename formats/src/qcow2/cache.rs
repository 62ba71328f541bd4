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
    kept: Mutex<LruCache<u64, Bytes>>,
}

impl Slices {
    /// An empty cache. Tables begin at clusters, so a slice is never larger than that.
    pub(super) fn new(cluster: ClusterSize) -> Self {
        let count = NonZeroUsize::new(limits::PAGES_CACHED).unwrap_or(NonZeroUsize::MIN);
        Self {
            unit: cluster.bytes().min(limits::PAGE),
            kept: Mutex::new(LruCache::new(count)),
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
        self.lock().get(&start).cloned()
    }

    pub(super) fn keep(&self, start: u64, slice: Bytes) {
        self.lock().put(start, slice);
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<u64, Bytes>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
