//! Workloads: seeded sequences of guest requests that favour the edges where bugs live.

use super::rng::Rng;
use std::ops::Range;

/// What a guest asks, in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Write stamps.
    Write {
        /// Where.
        sectors: Range<usize>,
        /// Durable when answered.
        fua: bool,
    },
    /// Write zeros.
    Zero {
        /// Where.
        sectors: Range<usize>,
        /// What may become of the space.
        space: ZeroSpace,
        /// Durable when answered.
        fua: bool,
    },
    /// Give up contents.
    Discard {
        /// Where.
        sectors: Range<usize>,
    },
    /// Make everything answered durable.
    Flush,
    /// Read and compare.
    Read {
        /// Where.
        sectors: Range<usize>,
    },
    /// Close the disk and open it again; nothing else is in flight then.
    Reopen,
}

/// What a zeroing request says about space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroSpace {
    /// It may be given back.
    Free,
    /// It stays or becomes allocated.
    Keep,
    /// Only when that is faster than writing.
    Fast,
}

/// The shape of a workload.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Sectors of the disk.
    pub sectors: usize,
    /// Sectors of a cluster.
    pub cluster: usize,
    /// Requests.
    pub ops: usize,
    /// Of a thousand requests, how many are a reopening.
    pub reopens: u64,
}

impl Shape {
    /// A workload of this shape.
    pub fn make(&self, rng: &mut Rng) -> Vec<Op> {
        // A run has a temper, so that some runs are all flushes and others all discards.
        let writes = rng.range(4, 16);
        let wipes = rng.range(0, 6);
        let flushes = rng.range(0, 6);
        let total = writes + wipes + flushes + 2;
        (0..self.ops)
            .map(|_| {
                if rng.below(1000) < self.reopens {
                    return Op::Reopen;
                }
                match rng.below(total) {
                    n if n < writes => Op::Write {
                        sectors: self.range(rng),
                        fua: rng.one_in(6),
                    },
                    n if n < writes + wipes => self.wipe(rng),
                    n if n < writes + wipes + flushes => Op::Flush,
                    _ => Op::Read {
                        sectors: self.range(rng),
                    },
                }
            })
            .collect()
    }

    fn wipe(&self, rng: &mut Rng) -> Op {
        let sectors = if rng.one_in(2) {
            self.whole(rng)
        } else {
            self.range(rng)
        };
        if rng.one_in(2) {
            return Op::Discard { sectors };
        }
        let space = *rng.pick(&[
            ZeroSpace::Free,
            ZeroSpace::Free,
            ZeroSpace::Keep,
            ZeroSpace::Fast,
        ]);
        Op::Zero {
            sectors,
            space,
            fua: rng.one_in(8),
        }
    }

    /// Whole clusters, mostly one.
    fn whole(&self, rng: &mut Rng) -> Range<usize> {
        let clusters = self.sectors.div_ceil(self.cluster);
        let first = rng.below(clusters as u64) as usize;
        let count = if rng.one_in(4) { 2 } else { 1 };
        first * self.cluster..((first + count) * self.cluster).min(self.sectors)
    }

    /// Any range, mostly short, often at the edge of a cluster.
    fn range(&self, rng: &mut Rng) -> Range<usize> {
        if rng.one_in(8) {
            return self.whole(rng);
        }
        let len = match rng.below(8) {
            0..=3 => rng.range(1, 4),
            4..=6 => rng.range(1, 16),
            _ => rng.range(1, self.cluster as u64 + 4),
        };
        let at = if rng.one_in(2) {
            let edge = rng.below(self.sectors.div_ceil(self.cluster) as u64) * self.cluster as u64;
            (edge + rng.below(5)).saturating_sub(rng.below(len + 2))
        } else {
            rng.below(self.sectors as u64)
        };
        let at = (at as usize).min(self.sectors - 1);
        at..(at + len as usize).min(self.sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_inside_the_disk_and_every_kind_is_made() {
        let shape = Shape {
            sectors: 300,
            cluster: 64,
            ops: 3000,
            reopens: 10,
        };
        let ops: Vec<Op> = (0..20)
            .flat_map(|seed| shape.make(&mut Rng::new(seed)))
            .collect();
        let mut kinds = std::collections::HashSet::new();
        for op in &ops {
            kinds.insert(std::mem::discriminant(op));
            if let Op::Write { sectors, .. }
            | Op::Zero { sectors, .. }
            | Op::Discard { sectors }
            | Op::Read { sectors } = op
            {
                assert!(sectors.start < sectors.end && sectors.end <= 300, "{op:?}");
            }
        }
        assert_eq!(kinds.len(), 6);
    }
}
