//! Refcounts: how many users a cluster of the file has, packed with 1 to 64 bits each.
//!
//! Only the numbers in one block; where blocks are is not known here. Source: QEMU
//! `docs/interop/qcow2.rst`, "Host cluster management".

use crate::{Error, Result};

/// The width of a refcount: a power of two, 1 to 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Width {
    order: u8,
}

impl Default for Width {
    /// 16 bits, which is all that version 2 has.
    fn default() -> Self {
        Self { order: 4 }
    }
}

impl Width {
    /// The width of 2^`order` bits; `Damaged` above 2^6.
    pub fn new(order: u32) -> Result<Self> {
        match u8::try_from(order) {
            Ok(order @ 0..=6) => Ok(Self { order }),
            _ => Err(Error::damaged(format!("refcounts of 2^{order} bits"))),
        }
    }

    /// The power of two, as a header says it.
    pub const fn order(self) -> u32 {
        self.order as u32
    }

    /// Bits of one refcount.
    pub const fn bits(self) -> u32 {
        1u32.wrapping_shl(self.order as u32)
    }

    /// The largest refcount.
    pub const fn max(self) -> u64 {
        u64::MAX.wrapping_shr(64u32.wrapping_sub(self.bits()))
    }

    /// Refcounts in a block of `len` bytes.
    pub const fn per_block(self, len: u64) -> u64 {
        len.wrapping_shl(3).wrapping_shr(self.order as u32)
    }

    /// First byte of refcount `n`, its bytes, and how far it is shifted in the one byte that it
    /// shares with others: the first refcount is in the lowest bits.
    const fn place(self, n: usize) -> (usize, usize, u32) {
        if self.order >= 3 {
            let bytes = (self.bits() as usize) / 8;
            return (n.wrapping_mul(bytes), bytes, 0);
        }
        let bit = n.wrapping_shl(self.order as u32);
        (bit / 8, 1, (bit % 8) as u32)
    }

    /// Refcount `n` of a block; none behind its end.
    pub fn get(self, block: &[u8], n: usize) -> Option<u64> {
        let (at, len, shift) = self.place(n);
        let bytes = block.get(at..)?.get(..len)?;
        let join = |word: u64, byte: &u8| word.wrapping_shl(8) | u64::from(*byte);
        Some(bytes.iter().fold(0, join).wrapping_shr(shift) & self.max())
    }

    /// Sets refcount `n` of a block. `Invalid` behind its end, and for more than the width holds:
    /// a refcount never wraps.
    pub fn set(self, block: &mut [u8], n: usize, count: u64) -> Result<()> {
        if count > self.max() {
            return Err(Error::invalid(format!(
                "a refcount of {count} in {} bits",
                self.bits()
            )));
        }
        let (at, len, shift) = self.place(n);
        let bytes = block.get_mut(at..).and_then(|b| b.get_mut(..len));
        let Some(bytes) = bytes else {
            return Err(Error::invalid(format!("refcount {n} behind its block")));
        };
        let mask = self.max().wrapping_shl(shift);
        let mut word = count.wrapping_shl(shift);
        for byte in bytes.iter_mut().rev() {
            let keep = if self.order < 3 { !(mask as u8) } else { 0 };
            *byte = *byte & keep | word as u8;
            word = word.wrapping_shr(8);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::rng::Rng;

    fn width(order: u32) -> Width {
        Width::new(order).unwrap()
    }

    #[test]
    fn each_width_holds_what_was_set_and_nothing_spills() {
        for order in 0..=6 {
            let width = width(order);
            let mut block = vec![0u8; 64];
            let per = width.per_block(64) as usize;
            assert_eq!(per, 512 >> order);
            let mut rng = Rng::new(u64::from(order));
            let mut model = vec![0u64; per];
            for _ in 0..4 * per {
                let n = rng.below(per as u64) as usize;
                model[n] = rng.next() & width.max();
                width.set(&mut block, n, model[n]).unwrap();
            }
            let all: Vec<u64> = (0..per).map(|n| width.get(&block, n).unwrap()).collect();
            assert_eq!(all, model, "order {order}");
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let mut block = [0u8; 8];
        width(0).set(&mut block, 0, 1).unwrap();
        width(0).set(&mut block, 9, 1).unwrap();
        assert_eq!(block[..2], [0b1, 0b10]);
        let mut block = [0u8; 8];
        width(1).set(&mut block, 3, 2).unwrap();
        width(2).set(&mut block, 2, 5).unwrap();
        assert_eq!(block[..2], [0b1000_0000, 5]);
        let mut block = [0u8; 8];
        width(4).set(&mut block, 1, 0x0102).unwrap();
        assert_eq!(block[..4], [0, 0, 1, 2]);
        width(6).set(&mut block, 0, u64::MAX - 1).unwrap();
        assert_eq!(block, [255, 255, 255, 255, 255, 255, 255, 254]);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        for order in 0..=6 {
            let width = width(order);
            let mut block = vec![0xA5u8; 16];
            if order < 6 {
                assert!(width.set(&mut block, 0, width.max() + 1).is_err());
            }
            let per = width.per_block(16) as usize;
            assert!(width.set(&mut block, per, 1).is_err());
            assert!(width.set(&mut block, usize::MAX >> 6, 1).is_err());
            assert_eq!(width.get(&block, per), None);
            assert_eq!(block, [0xA5; 16]);
        }
        assert!(Width::new(7).is_err() && Width::new(u32::MAX).is_err());
    }
}
