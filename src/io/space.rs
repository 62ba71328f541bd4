//! Which parts of a file are known to have their space on disk.
//!
//! Buffered writes into holes are answered before the file system looks for space; when there is
//! none, the data is lost at writeback. So space is taken before such a write, and this map says
//! where that was done already. It may forget, it must never claim too much.

use roaring::RoaringBitmap;

/// Bytes of a unit: space is taken and remembered in such steps.
pub(super) const UNIT: u64 = 64 << 10;

#[derive(Debug, Default)]
pub(super) struct Backed {
    units: RoaringBitmap,
    /// Counts losses of space: what was taken before the last one proves nothing.
    losses: u64,
}

impl Backed {
    /// Whether all of `at..end` has its space.
    pub(super) fn covers(&self, at: u64, end: u64) -> bool {
        match (u32::try_from(at / UNIT), u32::try_from(end.div_ceil(UNIT))) {
            (Ok(first), Ok(past)) => self.units.contains_range(first..past),
            _ => false,
        }
    }

    /// To be kept while space is being taken, and given to [`Backed::add`].
    pub(super) fn losses(&self) -> u64 {
        self.losses
    }

    /// The whole units within `at..end` got their space; unless some was lost meanwhile. Units
    /// past the 32-bit range are not remembered.
    pub(super) fn add(&mut self, at: u64, end: u64, losses: u64) {
        let past = u32::try_from(end / UNIT).unwrap_or(u32::MAX);
        if let (Ok(first), true) = (u32::try_from(at.div_ceil(UNIT)), losses == self.losses) {
            self.units.insert_range(first..past.max(first));
            if past.saturating_sub(first) > 4096 {
                self.units.optimize();
            }
        }
    }

    /// `at..end` loses its space: to be called before and after.
    pub(super) fn lose(&mut self, at: u64, end: u64) {
        self.losses = self.losses.wrapping_add(1);
        let past = u32::try_from(end.div_ceil(UNIT)).unwrap_or(u32::MAX);
        if let Ok(first) = u32::try_from(at / UNIT) {
            self.units
                .remove_range(first..=past.saturating_sub(1).max(first));
        }
    }

    /// Some space may be lost anywhere.
    pub(super) fn forget(&mut self) {
        self.losses = self.losses.wrapping_add(1);
        self.units.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(at: u64, end: u64) -> Backed {
        let mut backed = Backed::default();
        backed.add(at, end, 0);
        backed
    }

    #[test]
    fn only_whole_units_count_as_backed() {
        let backed = with(UNIT - 1, 3 * UNIT + 1);
        assert!(backed.covers(UNIT, 3 * UNIT) && backed.covers(2 * UNIT + 5, 2 * UNIT + 6));
        assert!(!backed.covers(UNIT - 1, UNIT) && !backed.covers(3 * UNIT, 3 * UNIT + 1));
    }

    #[test]
    fn a_punched_byte_unbacks_its_unit() {
        let mut backed = with(0, 4 * UNIT);
        backed.lose(2 * UNIT - 1, 2 * UNIT);
        assert!(backed.covers(0, UNIT) && !backed.covers(UNIT, UNIT + 1));
        assert!(backed.covers(2 * UNIT, 4 * UNIT));
    }

    #[test]
    fn space_taken_before_a_loss_is_not_believed() {
        let mut backed = Backed::default();
        let before = backed.losses();
        backed.lose(0, 1);
        backed.add(0, UNIT, before);
        assert!(!backed.covers(0, 1));
        backed.add(0, UNIT, backed.losses());
        assert!(backed.covers(0, UNIT));
    }

    #[test]
    fn offsets_past_the_map_are_never_backed() {
        let far = UNIT << 32;
        let mut backed = with(0, u64::MAX);
        assert!(backed.covers(0, far / 2) && !backed.covers(far, far + 1));
        backed.lose(far, far + 1);
        backed.lose(0, u64::MAX);
        assert!(!backed.covers(0, 1));
    }
}
