//! Merged map: which of the layers below the top holds a cluster, and where.
//!
//! Those layers are sealed: what they say is true for as long as the stack is open, so it is asked
//! once and kept. A stack of many layers then reads like one of two. Memory is bounded: a page is
//! forgotten when another one wants its slot. No I/O here; the stack asks the layers.

use ploop_formats::units::ClusterSize;
use std::sync::{Arc, PoisonError, RwLock};

/// Clusters that are looked up together.
pub const PER_PAGE: u32 = 128;
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

    const fn new(place: Place) -> Self {
        Self(match place {
            Place::Data { layer, at } => at | (layer as u64) << 2 | Self::DATA,
            Place::Zero { layer } => (layer as u64) << 2 | Self::ZERO,
            Place::Nowhere => Self::NOWHERE,
            Place::Mixed => Self::MIXED,
        })
    }

    const fn place(self) -> Place {
        let layer = (self.0 >> 2 & 0x7F) as usize;
        match self.0 & 3 {
            Self::DATA => Place::Data {
                layer,
                at: self.0 & !0x7FFF,
            },
            Self::ZERO => Place::Zero { layer },
            Self::NOWHERE => Place::Nowhere,
            _ => Place::Mixed,
        }
    }
}

type Page = (u32, Arc<[Word]>);

/// The map of one stack.
#[derive(Debug)]
pub struct Merged {
    slots: RwLock<Vec<Option<Page>>>,
}

impl Default for Merged {
    /// A map that knows nothing yet.
    fn default() -> Self {
        Self {
            slots: RwLock::new(vec![None; SLOTS as usize]),
        }
    }
}

impl Merged {
    /// Where `cluster` is, and how many clusters from it on continue in the same way, at most
    /// `max`; none when its page is not known.
    pub fn find(&self, cluster: u32, max: u64, size: ClusterSize) -> Option<(Place, u64)> {
        let page = cluster / PER_PAGE;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let (number, words) = slots.get((page % SLOTS) as usize)?.as_ref()?;
        if *number != page {
            return None;
        }
        let mut words = words.get((cluster % PER_PAGE) as usize..)?.iter();
        let first = words.next()?.place();
        let more = words
            .zip(1u64..max)
            .take_while(|(word, n)| word.place() == after(first, *n, size));
        Some((first, 1 + more.count() as u64))
    }

    /// Keeps what the layers say of the clusters of `page`, in order.
    pub fn keep(&self, page: u32, places: impl Iterator<Item = Place>) {
        let words: Arc<[Word]> = places.map(Word::new).collect();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut((page % SLOTS) as usize) {
            *slot = Some((page, words));
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
                assert_eq!(Word::new(place).place(), place);
            }
            let zero = Place::Zero { layer };
            assert_eq!(Word::new(zero).place(), zero);
        }
        for place in [Place::Nowhere, Place::Mixed] {
            assert_eq!(Word::new(place).place(), place);
        }
    }

    #[test]
    fn a_run_ends_where_its_file_offsets_jump() {
        let size = ClusterSize::new(CLUSTER_MIN).unwrap();
        let data = |n: u64| Place::Data {
            layer: 1,
            at: n * CLUSTER_MIN,
        };
        let map = Merged::default();
        assert_eq!(map.find(0, 9, size), None);
        let places = [data(5), data(6), data(9), Place::Nowhere, Place::Nowhere];
        map.keep(0, places.into_iter());
        assert_eq!(map.find(0, 9, size), Some((data(5), 2)));
        assert_eq!(map.find(0, 1, size), Some((data(5), 1)));
        assert_eq!(map.find(2, 9, size), Some((data(9), 1)));
        assert_eq!(map.find(3, 9, size), Some((Place::Nowhere, 2)));
        assert_eq!(map.find(PER_PAGE, 9, size), None);
    }

    #[test]
    fn a_page_that_takes_the_slot_of_another_is_not_mistaken_for_it() {
        let size = ClusterSize::new(CLUSTER_MIN).unwrap();
        let map = Merged::default();
        map.keep(3, [Place::Nowhere].into_iter());
        map.keep(3 + SLOTS, [Place::Zero { layer: 2 }].into_iter());
        assert_eq!(map.find(3 * PER_PAGE, 1, size), None);
        let other = (3 + SLOTS) * PER_PAGE;
        assert_eq!(
            map.find(other, 1, size),
            Some((Place::Zero { layer: 2 }, 1))
        );
    }
}
