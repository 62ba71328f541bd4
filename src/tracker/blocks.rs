//! Blocks: a set of blocks of a disk, a bit each, to which is only added.
//!
//! The words may be shared with other processes. Word 0 says what the others cannot: that every
//! block is in it, or every one behind the last bit, for a disk may get larger than its set.

use ploop_formats::{Error, Result};
use std::ops::Range;

/// Bytes of a block, as powers of two: 4 KiB to 1 MiB.
pub const LOG2: std::ops::RangeInclusive<u32> = 12..=20;
/// Words that a set has at most: 64 MiB of memory, should all of it be touched.
pub(super) const SET_WORDS_MAX: u64 = 8 << 20;
/// Every block is in the set.
const ALL: u64 = 1;
/// Every block behind the last bit is.
const BEHIND: u64 = 2;

/// Words that are only added to.
pub trait Words {
    /// How many.
    fn count(&self) -> usize;
    /// A word; 0 when there is none of that number.
    fn load(&self, i: usize) -> u64;
    /// Sets bits of a word.
    fn add(&self, i: usize, bits: u64);
}

/// A set of blocks.
#[derive(Debug)]
pub struct Blocks<W> {
    words: W,
    log2: u32,
}

/// Words for the blocks of so many bytes, of `1 << log2` bytes each. `Invalid` when such blocks
/// are too small or too large.
pub fn words_for(size: u64, log2: u32) -> Result<usize> {
    if !LOG2.contains(&log2) {
        return Err(Error::invalid(
            "a tracker's blocks have 4 KiB to 1 MiB, a power of two",
        ));
    }
    let words = (size >> log2).div_ceil(64).saturating_add(2);
    if words > SET_WORDS_MAX {
        return Err(Error::invalid(format!(
            "blocks of {} bytes are too small for a disk of {size} bytes: a set of them would take {} \
             bytes of memory; use larger ones",
            1u64 << log2,
            words.saturating_mul(8)
        )));
    }
    Ok(words as usize)
}

impl<W: Words> Blocks<W> {
    /// The set in these words, of blocks of `1 << log2` bytes.
    pub fn new(words: W, log2: u32) -> Result<Self> {
        if !LOG2.contains(&log2) || words.count() < 2 {
            return Err(Error::invalid("no words of a tracker"));
        }
        Ok(Self { words, log2 })
    }

    /// Its words.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// Bytes of a block, as a power of two.
    pub const fn log2(&self) -> u32 {
        self.log2
    }

    /// Blocks that have a bit.
    fn bits(&self) -> u64 {
        (self.words.count() as u64 - 1) * 64
    }

    /// Adds the blocks of a byte range, which is not empty.
    pub fn add(&self, at: u64, len: u64) {
        let (first, last) = (at >> self.log2, (at + (len - 1)) >> self.log2);
        let end = last + 1;
        let mut block = first;
        while block < end.min(self.bits()) {
            let to = end.min((block | 63) + 1);
            let bits = (u64::MAX >> (63 - (to - 1 - block))) << (block % 64);
            self.put((block / 64) as usize + 1, bits);
            block = to;
        }
        if end > self.bits() {
            self.put(0, BEHIND);
        }
    }

    /// Adds every block.
    pub fn add_all(&self) {
        self.put(0, ALL);
    }

    /// Adds what another set has.
    pub fn add_those_of(&self, other: &Self) {
        if other.words.count() == self.words.count() && other.log2 == self.log2 {
            for i in 0..other.words.count() {
                match other.words.load(i) {
                    0 => {}
                    bits => self.put(i, bits),
                }
            }
            return;
        }
        // Nobody can tell the one that knows of less what the other has behind.
        let end = other.bits().max(1) << other.log2;
        for run in other.runs(0..end) {
            self.add(run.start, run.end - run.start);
        }
        let flags = other.words.load(0);
        if flags != 0 {
            self.put(0, flags);
            if flags & BEHIND != 0 && self.bits() << self.log2 > end {
                self.add(end, (self.bits() << self.log2) - end);
            }
        }
    }

    /// Most are there already, and a look is cheaper for all processors.
    fn put(&self, i: usize, bits: u64) {
        if self.words.load(i) & bits != bits {
            self.words.add(i, bits);
        }
    }

    /// Whether every block is in it, known or not.
    pub fn is_all(&self) -> bool {
        self.words.load(0) & ALL != 0
    }

    /// Whether the block that holds this byte is in it.
    pub fn holds(&self, at: u64) -> bool {
        let (block, flags) = (at >> self.log2, self.words.load(0));
        if flags & ALL != 0 {
            return true;
        }
        match block < self.bits() {
            true => self.words.load((block / 64) as usize + 1) >> (block % 64) & 1 != 0,
            false => flags & BEHIND != 0,
        }
    }

    /// The bytes within a range that are in its blocks, in order; neighbours are joined.
    pub fn runs(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = within.start;
        std::iter::from_fn(move || {
            let start = self.find(at..within.end, true)?;
            let end = self.find(start..within.end, false).unwrap_or(within.end);
            at = end;
            Some(start..end)
        })
    }

    /// Bytes of a disk of `size` that are in its blocks; the last one may be counted as a whole.
    pub fn bytes(&self, size: u64) -> u64 {
        let flags = self.words.load(0);
        if flags & ALL != 0 {
            return size;
        }
        let blocks = size.div_ceil(1 << self.log2).min(self.bits());
        let words = (0..blocks.div_ceil(64)).map(|n| {
            let word = self.words.load(n as usize + 1);
            let used = (blocks - n * 64).min(64);
            u64::from((word & (u64::MAX >> (64 - used))).count_ones())
        });
        let behind = match flags & BEHIND {
            0 => 0,
            _ => size.saturating_sub(self.bits() << self.log2),
        };
        ((words.sum::<u64>() << self.log2) + behind).min(size)
    }

    /// The first byte of a range whose block is in the set, or is not.
    fn find(&self, within: Range<u64>, wanted: bool) -> Option<u64> {
        let flags = self.words.load(0);
        let mut at = within.start;
        while at < within.end {
            let block = at >> self.log2;
            if flags & ALL != 0 || block >= self.bits() {
                return (self.holds(at) == wanted).then_some(at);
            }
            let word = self.words.load((block / 64) as usize + 1);
            let word = (if wanted { word } else { !word }) >> (block % 64);
            let skipped = match word {
                0 => 64 - block % 64,
                _ => u64::from(word.trailing_zeros()),
            };
            at = at.max((block + skipped) << self.log2);
            if word != 0 {
                return (at < within.end).then_some(at);
            }
        }
        None
    }
}
