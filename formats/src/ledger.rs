//! Ledger: what a guest was answered but no disk holds yet.
//!
//! Answered is stronger than flushed: when a worker process dies, the guest lives on, and every
//! mapping it was answered must survive although no flush ever wrote it. Each pending mapping is
//! one 64-bit word in memory that outlives the worker (a memfd held by its keeper); a successor
//! overlays the words on the durable index and then syncs. One word per cluster, stored whole, so
//! that there is no torn entry and no order between words to get wrong.

use crate::units::VirtCluster;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared words that outlive the process, or a test's idea of it.
pub trait Words: Send + Sync {
    /// How many words there are.
    fn count(&self) -> usize;
    /// Reads word `i`; 0 when there is no such word.
    fn load(&self, i: usize) -> u64;
    /// Writes word `i` in one piece. Ignored when there is no such word.
    fn store(&self, i: usize, value: u64);
}

/// Words in this process only: for read-only disks, tools and tests.
#[derive(Debug)]
pub struct LocalWords(Box<[AtomicU64]>);

impl LocalWords {
    /// `count` empty words.
    pub fn new(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Words for LocalWords {
    fn count(&self) -> usize {
        self.0.len()
    }
    fn load(&self, i: usize) -> u64 {
        self.0.get(i).map_or(0, |w| w.load(Ordering::Acquire))
    }
    fn store(&self, i: usize, value: u64) {
        if let Some(w) = self.0.get(i) {
            w.store(value, Ordering::Release);
        }
    }
}

/// Word 0: the disk failed and must not answer success again until closed and checked.
const POISON: usize = 0;
/// Entries start here.
const FIRST: usize = 1;

/// Pending mappings, one word each: `(virtual cluster + 1) << 32 | file cluster`, 0 when empty.
/// File cluster 0 means that the mapping was dropped, [`Ledger::ZEROS`] that the cluster reads as zeros.
#[derive(Clone)]
pub struct Ledger {
    words: Arc<dyn Words>,
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ledger({} slots)", self.slots())
    }
}

impl Ledger {
    /// No cluster of a file, which has fewer.
    pub const ZEROS: u32 = u32::MAX;
    /// Slots of a ledger made by [`Ledger::local`] and of the keeper's memfd.
    pub const SLOTS: usize = 16384;
    /// Words that so many slots need.
    pub const WORDS: usize = Self::SLOTS + FIRST;

    /// A ledger over shared words.
    pub fn new(words: Arc<dyn Words>) -> Self {
        Self { words }
    }

    /// A ledger that dies with this process.
    pub fn local() -> Self {
        Self::new(Arc::new(LocalWords::new(Self::WORDS)))
    }

    /// How many mappings can be pending.
    pub fn slots(&self) -> usize {
        self.words.count().saturating_sub(FIRST)
    }

    /// Stores a pending mapping in `slot`, replacing what was there.
    pub fn put(&self, slot: usize, cluster: VirtCluster, file_cluster: u32) {
        let word =
            (u64::from(cluster.0).wrapping_add(1)).wrapping_shl(32) | u64::from(file_cluster);
        self.words.store(slot.saturating_add(FIRST), word);
    }

    /// Empties `slot`.
    pub fn clear(&self, slot: usize) {
        self.words.store(slot.saturating_add(FIRST), 0);
    }

    /// Every pending mapping: slot, virtual cluster, file cluster.
    pub fn entries(&self) -> impl Iterator<Item = (usize, VirtCluster, u32)> + '_ {
        (0..self.slots()).filter_map(|slot| {
            let word = self.words.load(slot.saturating_add(FIRST));
            let cluster = u32::try_from((word >> 32).checked_sub(1)?).ok()?;
            Some((slot, VirtCluster(cluster), (word & 0xFFFF_FFFF) as u32))
        })
    }

    /// Marks the disk failed, for this process and its successors.
    pub fn poison(&self) {
        self.words.store(POISON, 1);
    }

    /// Forgets that the disk failed, if it did, and with that every mapping that was answered and
    /// not flushed: the disk is what it is after a power cut. The content of such a mapping may be
    /// lost, and what it took the place of was flushed. Only for who reads the disk anew from the
    /// files, and tells the people above.
    pub fn heal(&self) {
        if !self.is_poisoned() {
            return;
        }
        (0..self.slots()).for_each(|slot| self.clear(slot));
        // Last: who dies half-way leaves a disk that has failed.
        self.words.store(POISON, 0);
    }

    /// Whether the disk failed.
    pub fn is_poisoned(&self) -> bool {
        self.words.load(POISON) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_healed_disk_is_what_it_is_after_a_power_cut_and_a_sound_one_keeps_its_answers() {
        let ledger = Ledger::local();
        ledger.put(3, VirtCluster(7), 9);
        ledger.heal();
        assert!(ledger.entries().eq([(3, VirtCluster(7), 9)]));
        ledger.poison();
        ledger.heal();
        assert!(!ledger.is_poisoned());
        assert_eq!(ledger.entries().count(), 0);
    }
}
