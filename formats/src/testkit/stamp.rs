//! Stamps: sectors that say where they belong and which write made them.
//!
//! A sector that turns up at another address, an older one that was replaced, free space and torn
//! bytes are all told apart from what a guest may see. A value is the number of the write that made
//! the sector; 0 is a sector of zeros.

use super::rng::mix;
use crate::buf;
use crate::units::SECTOR;
use bytes::Bytes;

/// What a guest sector holds: the number of the write, or [`ZERO`].
pub type Value = u64;
/// A sector of zeros.
pub const ZERO: Value = 0;

const WORDS: usize = SECTOR as usize / 8;
const MARK: u64 = 0x706C_6F6F_7073_746D;

/// What was found in a sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// A value that was once meant for this address.
    Value(Value),
    /// A value of another address: its sector number and value.
    Elsewhere(u64, Value),
    /// Bytes of free space.
    Poison,
    /// Bytes that nobody wrote.
    Garbage,
}

fn words(sector: u64, value: Value) -> impl Iterator<Item = u64> {
    let seed = mix(sector.rotate_left(40) ^ value);
    let rest = (2..WORDS as u64).map(move |i| seed.wrapping_add(i.wrapping_mul(MARK)));
    [sector ^ MARK, value].into_iter().chain(rest)
}

/// Fills one sector, number `sector` of the guest.
pub fn fill(bytes: &mut [u8], sector: u64, value: Value) {
    if value == ZERO {
        return bytes.fill(0);
    }
    for (to, word) in bytes.chunks_exact_mut(8).zip(words(sector, value)) {
        to.copy_from_slice(&word.to_le_bytes());
    }
}

/// `count` sectors from number `first` on, all of `value`, in aligned memory.
pub fn run(first: u64, count: u64, value: Value) -> Bytes {
    let mut all = buf::aligned((count * SECTOR) as usize);
    for (i, sector) in all.chunks_exact_mut(SECTOR as usize).enumerate() {
        fill(sector, first + i as u64, value);
    }
    all.freeze()
}

/// What the bytes of sector number `sector` say.
pub fn look(bytes: &[u8], sector: u64) -> Seen {
    let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
    let (home, value) = (word(0) ^ MARK, word(1));
    let intact = |home| {
        bytes
            .chunks_exact(8)
            .zip(words(home, value))
            .all(|(b, w)| *b == w.to_le_bytes())
    };
    match bytes.first() {
        Some(0) if bytes.iter().all(|b| *b == 0) => Seen::Value(ZERO),
        Some(&first) if bytes.iter().all(|b| *b == first) => Seen::Poison,
        _ if !intact(home) => Seen::Garbage,
        _ if home == sector => Seen::Value(value),
        _ => Seen::Elsewhere(home, value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_its_value_its_place_and_whether_it_is_whole() {
        let two = run(7, 2, 99);
        assert_eq!(look(&two[..512], 7), Seen::Value(99));
        assert_eq!(look(&two[512..], 8), Seen::Value(99));
        assert_eq!(look(&two[512..], 7), Seen::Elsewhere(8, 99));
        let mut torn = two[..512].to_vec();
        torn[300] ^= 1;
        assert_eq!(look(&torn, 7), Seen::Garbage);
        assert_eq!(look(&[0xA5; 512], 7), Seen::Poison);
        assert_eq!(look(&run(7, 1, ZERO), 7), Seen::Value(ZERO));
    }
}
