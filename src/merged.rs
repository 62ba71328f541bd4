//! Merged map: which of the layers below the top holds a cluster, and where.
//!
//! Those layers are sealed: what they say is true for as long as the stack is open, so it is asked
//! once and kept. A stack of many layers then reads like one of two. Only what was asked is kept, so
//! that to know nothing costs no more than to have no map. Memory is bounded: a page is forgotten
//! when another one wants its slot. No I/O here; the stack asks the layers.

use ploop_formats::units::ClusterSize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

/// Clusters that are forgotten together.
const PER_PAGE: u32 = 128;
/// Pages kept: 512 KiB, which tell of 4 GiB at 64 KiB clusters.
const SLOTS: u32 = 512;

/// Where one cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the file of a layer, counted from the base, at an offset.
    Data {
        /// The layer.
        layer: usize,
        /// Offset of the cluster's first byte, a multiple of its size.
        at: u64,
    },
    /// Zeros, says a layer.
    Zero {
        /// The layer.
        layer: usize,
    },
    /// No layer knows it.
    Nowhere,
    /// Not the same for the whole cluster: the layers must be asked.
    Mixed,
}

/// A place in one word: the offset's low bits are free, as no cluster is smaller than 32 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word(u64);

impl Word {
    const DATA: u64 = 0;
    const ZERO: u64 = 1;
    const NOWHERE: u64 = 2;
    const MIXED: u64 = 3;
    /// Nobody was asked; no place has this word.
    const UNKNOWN: u64 = u64::MAX;

    const fn new(place: Place) -> Self {
        Self(match place {
            Place::Data { layer, at } => at | (layer as u64) << 2 | Self::DATA,
            Place::Zero { layer } => (layer as u64) << 2 | Self::ZERO,
            Place::Nowhere => Self::NOWHERE,
            Place::Mixed => Self::MIXED,
        })
    }

    const fn place(self) -> Option<Place> {
        if self.0 == Self::UNKNOWN {
            return None;
        }
        let layer = (self.0 >> 2 & 0x7F) as usize;
        Some(match self.0 & 3 {
            Self::DATA => Place::Data {
                layer,
                at: self.0 & !0x7FFF,
            },
            Self::ZERO => Place::Zero { layer },
            Self::NOWHERE => Place::Nowhere,
            _ => Place::Mixed,
        })
    }
}

/// What is known of adjacent clusters.
#[derive(Debug)]
struct Page {
    number: u32,
    words: Box<[AtomicU64]>,
}

impl Page {
    fn new(number: u32) -> Self {
        let unknown = || AtomicU64::new(Word::UNKNOWN);
        Self {
            number,
            words: (0..PER_PAGE).map(|_| unknown()).collect(),
        }
    }

    /// The words of `cluster`, which is in this page, and of those behind it.
    fn from(&self, cluster: u32) -> &[AtomicU64] {
        let words = self.words.get((cluster % PER_PAGE) as usize..);
        words.unwrap_or_default()
    }

    fn keep(&self, cluster: u32, places: impl Iterator<Item = Place>) {
        for (word, place) in self.from(cluster).iter().zip(places) {
            word.store(Word::new(place).0, Ordering::Relaxed);
        }
    }
}

/// The map of one stack.
#[derive(Debug)]
pub struct Merged {
    slots: RwLock<Vec<Option<Page>>>,
}

impl Default for Merged {
    /// A map that knows nothing yet.
    fn default() -> Self {
        Self {
            slots: RwLock::new((0..SLOTS).map(|_| None).collect()),
        }
    }
}

impl Merged {
    /// Where `cluster` is, and how many clusters from it on continue in the same way, at most
    /// `max`; none when that is not known.
    pub fn find(&self, cluster: u32, max: u64, size: ClusterSize) -> Option<(Place, u64)> {
        let number = cluster / PER_PAGE;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let page = slots.get((number % SLOTS) as usize)?.as_ref()?;
        if page.number != number {
            return None;
        }
        let words = page.from(cluster).iter();
        let mut words = words.map(|word| Word(word.load(Ordering::Relaxed)).place());
        let first = words.next()??;
        let more = words
            .zip(1u64..max)
            .take_while(|(place, n)| *place == Some(after(first, *n, size)));
        Some((first, 1 + more.count() as u64))
    }

    /// Keeps what the layers say of `cluster`: it and so many behind it are at `first` and behind.
    /// What is beyond its page is left out.
    pub fn keep(&self, cluster: u32, first: Place, count: u64, size: ClusterSize) {
        let places = (0..count).map(|n| after(first, n, size));
        let number = cluster / PER_PAGE;
        let index = (number % SLOTS) as usize;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Some(page)) = slots.get(index)
            && page.number == number
        {
            return page.keep(cluster, places);
        }
        drop(slots);
        let page = Page::new(number);
        page.keep(cluster, places);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(index) {
            *slot = Some(page);
        }
    }
}

/// Where the `n`th cluster after one at `first` is, if all is even.
const fn after(first: Place, n: u64, size: ClusterSize) -> Place {
    match first {
        Place::Data { layer, at } => Place::Data {
            layer,
            at: at.wrapping_add(n.wrapping_mul(size.bytes())),
        },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop_formats::limits::{CLUSTER_MIN, DEPTH_MAX};

    #[test]
    fn a_place_survives_its_word() {
        let far = (i64::MAX as u64) / CLUSTER_MIN * CLUSTER_MIN;
        for layer in [0, 1, DEPTH_MAX - 1] {
            for at in [0, CLUSTER_MIN, far] {
                let place = Place::Data { layer, at };
                assert_eq!(Word::new(place).place(), Some(place));
            }
            let zero = Place::Zero { layer };
            assert_eq!(Word::new(zero).place(), Some(zero));
        }
        for place in [Place::Nowhere, Place::Mixed] {
            assert_eq!(Word::new(place).place(), Some(place));
        }
        assert_eq!(Word(Word::UNKNOWN).place(), None);
    }

    const fn data(n: u64) -> Place {
        Place::Data {
            layer: 1,
            at: n * CLUSTER_MIN,
        }
    }

    #[test]
    fn a_run_ends_where_its_file_offsets_jump_and_where_nobody_was_asked() {
        let size = ClusterSize::new(CLUSTER_MIN).unwrap();
        let map = Merged::default();
        assert_eq!(map.find(0, 9, size), None);
        map.keep(0, data(5), 2, size);
        map.keep(2, data(9), 1, size);
        map.keep(3, Place::Nowhere, 2, size);
        assert_eq!(map.find(0, 9, size), Some((data(5), 2)));
        assert_eq!(map.find(1, 9, size), Some((data(6), 1)));
        assert_eq!(map.find(0, 1, size), Some((data(5), 1)));
        assert_eq!(map.find(2, 9, size), Some((data(9), 1)));
        assert_eq!(map.find(3, 9, size), Some((Place::Nowhere, 2)));
        assert_eq!(map.find(5, 9, size), None);
        assert_eq!(map.find(PER_PAGE, 9, size), None);
    }

    #[test]
    fn what_is_beyond_a_page_is_asked_again() {
        let size = ClusterSize::new(CLUSTER_MIN).unwrap();
        let map = Merged::default();
        map.keep(PER_PAGE - 1, data(0), 3, size);
        assert_eq!(map.find(PER_PAGE - 1, 9, size), Some((data(0), 1)));
        assert_eq!(map.find(PER_PAGE, 9, size), None);
    }

    #[test]
    fn a_page_that_takes_the_slot_of_another_is_not_mistaken_for_it() {
        let size = ClusterSize::new(CLUSTER_MIN).unwrap();
        let map = Merged::default();
        let (one, other) = (3 * PER_PAGE, (3 + SLOTS) * PER_PAGE);
        let zero = Place::Zero { layer: 2 };
        map.keep(one, Place::Nowhere, 1, size);
        map.keep(other, zero, 1, size);
        assert_eq!(map.find(one, 1, size), None);
        assert_eq!(map.find(other, 1, size), Some((zero, 1)));
    }
}
