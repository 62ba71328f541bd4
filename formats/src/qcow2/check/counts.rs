//! Counts: how often each cluster of a file is named, and how often each place is covered.
//!
//! Bit n of all counts is one set of clusters. Most clusters are named once, so most images need one
//! set, and those that nobody names cost nothing.

use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::ops::Range;

/// Bits of the largest count. All tables that there can be name a cluster less often.
const BITS: u32 = u64::BITS;

/// A count for each cluster.
#[derive(Debug, Default)]
pub(super) struct Counts {
    bits: Vec<RoaringBitmap>,
}

impl Counts {
    /// The counts of ranges that do not overlap.
    pub(super) fn of(ranges: impl Iterator<Item = (Range<u32>, u64)>) -> Self {
        let mut counts = Self::default();
        for (range, times) in ranges {
            for n in 0..BITS {
                let rest = times.wrapping_shr(n);
                if rest == 0 {
                    break;
                }
                if let (1, Some(set)) = (rest & 1, counts.bit(n)) {
                    set.insert_range(range.clone());
                }
            }
        }
        counts
    }

    /// The set of a bit, made where it is not there.
    fn bit(&mut self, n: u32) -> Option<&mut RoaringBitmap> {
        if self.bits.len() <= n as usize {
            self.bits
                .resize_with((n as usize).saturating_add(1), RoaringBitmap::new);
        }
        self.bits.get_mut(n as usize)
    }

    /// Names a cluster so many times more.
    pub(super) fn add(&mut self, cluster: u32, times: u64) {
        let mut carry = false;
        for n in 0..BITS {
            let rest = times.wrapping_shr(n);
            if rest == 0 && !carry {
                return;
            }
            let (Some(set), true) = (self.bit(n), (rest & 1 == 1) != carry) else {
                continue;
            };
            carry = !set.insert(cluster);
            if carry {
                set.remove(cluster);
            }
        }
    }

    /// Adds the counts of another.
    pub(super) fn add_all(&mut self, other: &Self) {
        let mut carry = RoaringBitmap::new();
        for n in 0..BITS {
            let more = other.bits.get(n as usize);
            if more.is_none() && carry.is_empty() {
                return;
            }
            let none = RoaringBitmap::new();
            let more = more.unwrap_or(&none);
            let Some(set) = self.bit(n) else {
                return;
            };
            let both = &*set & more;
            let either = &*set ^ more;
            *set = &either ^ &carry;
            carry = both | (either & carry);
        }
    }

    /// How often a cluster is named.
    pub(super) fn get(&self, cluster: u32) -> u64 {
        let bits = (0..BITS).zip(&self.bits);
        let set = bits.filter(|(_, set)| set.contains(cluster));
        set.fold(0, |sum, (n, _)| sum | 1u64.wrapping_shl(n))
    }

    /// Puts the counts of the clusters from `first` on into `out`.
    pub(super) fn fill(&self, first: u32, out: &mut [u64]) {
        out.fill(0);
        let Some(last) = (out.len() as u64).checked_sub(1) else {
            return;
        };
        let last = u64::from(first).saturating_add(last);
        let last = u32::try_from(last).unwrap_or(u32::MAX);
        for (n, set) in (0..BITS).zip(&self.bits) {
            for cluster in set.range(first..=last) {
                let at = cluster.saturating_sub(first) as usize;
                if let Some(count) = out.get_mut(at) {
                    *count |= 1u64.wrapping_shl(n);
                }
            }
        }
    }

    /// Whether a count has a bit from `bits` on.
    pub(super) fn reaches(&self, bits: u32) -> bool {
        let mut high = self.bits.iter().skip(bits as usize);
        high.any(|set| !set.is_empty())
    }

    /// The clusters that are named at all.
    pub(super) fn named(&self) -> RoaringBitmap {
        self.bits.iter().fold(RoaringBitmap::new(), |a, b| a | b)
    }
}

/// Ranges that may overlap: how many of them cover each place.
#[derive(Debug, Default)]
pub(super) struct Cover {
    /// Where ranges begin and end: how many more, or less, there are from there on.
    edges: BTreeMap<u64, i64>,
}

impl Cover {
    /// Adds a range.
    pub(super) fn add(&mut self, range: &Range<u64>) {
        for (at, step) in [(range.start, 1), (range.end, -1)] {
            let edge = self.edges.entry(at).or_insert(0);
            *edge = edge.saturating_add(step);
        }
    }

    /// The stretches that are covered, in order, and how often each is.
    pub(super) fn stretches(&self) -> impl Iterator<Item = (Range<u64>, u64)> {
        let ends = self.edges.keys().skip(1);
        let mut depth = 0i64;
        self.edges
            .iter()
            .zip(ends)
            .filter_map(move |((start, step), end)| {
                depth = depth.saturating_add(*step);
                let depth = u64::try_from(depth).ok().filter(|depth| *depth > 0)?;
                Some((*start..*end, depth))
            })
    }

    /// The same of ranges of clusters.
    pub(super) fn counts(&self) -> Counts {
        let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let ranges = self.stretches();
        Counts::of(ranges.map(|(range, times)| (number(range.start)..number(range.end), times)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::rng::Rng;

    #[test]
    fn counts_are_those_of_a_plain_list() {
        let mut rng = Rng::new(1);
        let mut model = vec![0u64; 300];
        let mut counts = Counts::default();
        for round in 0..3000 {
            let cluster = rng.below(300);
            let times = if round % 3 == 0 {
                rng.below(1 << 20)
            } else {
                1
            };
            counts.add(cluster as u32, times);
            model[cluster as usize] += times;
            if round % 100 == 0 {
                let mut cover = Cover::default();
                for _ in 0..8 {
                    let (from, to) = (rng.below(300), rng.below(300));
                    let range = from.min(to)..from.max(to);
                    cover.add(&range);
                    model[range.start as usize..range.end as usize]
                        .iter_mut()
                        .for_each(|n| *n += 1);
                }
                counts.add_all(&cover.counts());
            }
        }
        let single: Vec<u64> = (0..300).map(|n| counts.get(n)).collect();
        assert_eq!(single, model);
        let mut filled = vec![9; 200];
        counts.fill(50, &mut filled);
        assert_eq!(filled, model[50..250]);
        assert_eq!(
            counts.named().len(),
            model.iter().filter(|n| **n > 0).count() as u64
        );
    }

    #[test]
    fn the_last_cluster_there_can_be_is_counted() {
        let mut counts = Counts::default();
        counts.add(u32::MAX, 3);
        let mut out = [0; 5];
        counts.fill(u32::MAX - 1, &mut out);
        assert_eq!(out, [0, 3, 0, 0, 0]);
    }
}
