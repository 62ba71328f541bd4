//! The model: which values each sector of a disk may hold, now or after a crash.
//!
//! A sector remembers every write that may still matter, with the times of its call and its answer.
//! A value may be read as long as no other write came wholly after it and was answered; it may
//! survive a power cut as long as no such write was also covered by an answered flush. Requests in
//! flight together have no order. A discard offers zeros and takes nothing away.

use super::stamp::{self, Seen, Value, ZERO};
use crate::units::SECTOR;
use std::ops::Range;

const NEVER: u64 = u64::MAX;
/// The value of a sector that was torn by an earlier power cut.
const TORN: Value = Value::MAX;

#[derive(Debug, Clone, Copy)]
struct Write {
    value: Value,
    asked: u64,
    answered: u64,
    /// Whether it certainly happened, once answered.
    firm: bool,
    /// Superseded and flushed, but a read that began before that may still see it.
    dead: bool,
}

#[derive(Debug, Clone, Default)]
struct Sector {
    writes: Vec<Write>,
    /// Reads in flight.
    readers: u32,
}

/// A request that changes sectors, in flight or answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    at: u64,
    sectors: Range<usize>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It happened.
    Done,
    /// It happened and is durable.
    Durable,
    /// It may or may not have happened, in part or as a whole.
    Failed,
    /// It certainly did not happen.
    Refused,
}

/// All legal contents of a disk.
#[derive(Debug, Clone)]
pub struct Model {
    sectors: Vec<Sector>,
    clock: u64,
    touched: Vec<bool>,
}

impl Model {
    /// A disk that durably holds `values`, one a sector.
    pub fn new(values: impl IntoIterator<Item = Value>) -> Self {
        let first = |value| Write {
            value,
            asked: 0,
            answered: 0,
            firm: true,
            dead: false,
        };
        let sectors: Vec<Sector> = values
            .into_iter()
            .map(|value| Sector {
                writes: vec![first(value)],
                readers: 0,
            })
            .collect();
        let touched = vec![false; sectors.len()];
        Self {
            sectors,
            clock: 0,
            touched,
        }
    }

    /// Sectors of the disk.
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Whether the disk has no sector.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Whether a request has ever changed sector `n`.
    pub fn is_touched(&self, n: usize) -> bool {
        self.touched[n]
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn ask(&mut self, sectors: Range<usize>, value: Value, firm: bool) -> Asked {
        let at = self.tick();
        for n in sectors.clone() {
            let write = Write {
                value,
                asked: at,
                answered: NEVER,
                firm,
                dead: false,
            };
            self.sectors[n].writes.push(write);
            self.touched[n] = true;
        }
        Asked { at, sectors }
    }

    /// A write or zeroing of `sectors` is called.
    pub fn write(&mut self, sectors: Range<usize>, value: Value) -> Asked {
        self.ask(sectors, value, true)
    }

    /// A discard of `sectors` is called.
    pub fn discard(&mut self, sectors: Range<usize>) -> Asked {
        self.ask(sectors, ZERO, false)
    }

    /// A request that changes sectors is answered.
    pub fn answer(&mut self, asked: &Asked, outcome: Outcome) {
        let now = self.tick();
        for sector in &mut self.sectors[asked.sectors.clone()] {
            let Some(i) = sector.writes.iter().position(|w| w.asked == asked.at) else {
                continue;
            };
            if outcome == Outcome::Refused {
                sector.writes.remove(i);
                continue;
            }
            sector.writes[i].answered = now;
            sector.writes[i].firm &= outcome != Outcome::Failed;
            if outcome == Outcome::Durable && sector.writes[i].firm {
                sector.bury(asked.at);
            }
        }
    }

    /// A flush is called; give the time back with its answer.
    pub fn flush(&mut self) -> u64 {
        self.tick()
    }

    /// A flush that was called at `asked` is answered with success.
    pub fn flushed(&mut self, asked: u64) {
        self.tick();
        for sector in self.sectors.iter_mut().filter(|s| s.writes.len() > 1) {
            let covered = |w: &&Write| w.firm && w.answered < asked;
            if let Some(newest) = sector.writes.iter().filter(covered).map(|w| w.asked).max() {
                sector.bury(newest);
            }
        }
    }

    /// A read of `sectors` is called; give the time back with its answer.
    pub fn read(&mut self, sectors: Range<usize>) -> u64 {
        self.sectors[sectors]
            .iter_mut()
            .for_each(|s| s.readers += 1);
        self.tick()
    }

    /// Judges what a read that was called at `asked` returned, or drops it (`None`).
    pub fn was_read(
        &mut self,
        asked: u64,
        sectors: Range<usize>,
        bytes: Option<&[u8]>,
    ) -> Result<(), String> {
        let judged = bytes.map_or(Ok(()), |b| {
            self.judge(sectors.clone(), b, |s| s.live(asked), false)
        });
        for sector in &mut self.sectors[sectors] {
            sector.readers -= 1;
            if sector.readers == 0 {
                sector.writes.retain(|w| !w.dead);
            }
        }
        judged
    }

    /// Judges what is read while nothing else runs.
    pub fn is_read(&self, sectors: Range<usize>, bytes: &[u8]) -> Result<(), String> {
        self.judge(sectors, bytes, |s| s.live(NEVER), false)
    }

    /// Judges what is read after a power cut at this moment.
    pub fn survived(&self, sectors: Range<usize>, bytes: &[u8]) -> Result<(), String> {
        self.judge(
            sectors,
            bytes,
            |s| s.writes.iter().filter(|w| !w.dead).copied().collect(),
            true,
        )
    }

    fn judge(
        &self,
        sectors: Range<usize>,
        bytes: &[u8],
        legal: impl Fn(&Sector) -> Vec<Write>,
        crashed: bool,
    ) -> Result<(), String> {
        let tears = |w: &Write| crashed && w.answered == NEVER && w.firm;
        for (n, bytes) in sectors.zip(bytes.chunks_exact(SECTOR as usize)) {
            let sector = &self.sectors[n];
            let seen = stamp::look(bytes, n as u64);
            if let ([only], Seen::Value(value)) = (&sector.writes[..], &seen)
                && only.value == *value
            {
                continue;
            }
            let legal = legal(sector);
            let fine = match &seen {
                Seen::Value(value) => legal.iter().any(|w| w.value == *value),
                // Only a sector that is being written when the power goes can be torn.
                Seen::Garbage => legal.iter().any(|w| w.value == TORN || tears(w)),
                _ => false,
            };
            if !fine {
                let values: Vec<Value> = legal.iter().map(|w| w.value).collect();
                return Err(format!(
                    "guest sector {n} holds {seen:?}, legal are {values:?}"
                ));
            }
        }
        Ok(())
    }

    /// The disk after a crash and a recovery in which `bytes` were read: they are durable now.
    /// A torn sector, which was judged before, stays torn until it is written.
    pub fn recovered(bytes: &[u8]) -> Self {
        let value = |(n, bytes): (usize, &[u8])| match stamp::look(bytes, n as u64) {
            Seen::Value(value) => value,
            _ => TORN,
        };
        Self::new(bytes.chunks_exact(SECTOR as usize).enumerate().map(value))
    }
}

impl Sector {
    /// Forgets what ended before a durable write was called at `asked`.
    fn bury(&mut self, asked: u64) {
        let readers = self.readers;
        self.writes.retain_mut(|w| {
            w.dead |= w.answered < asked;
            !w.dead || readers > 0
        });
    }

    /// What a read may return that is called at `asked` and answered now.
    fn live(&self, asked: u64) -> Vec<Write> {
        let replaces =
            |new: &Write, old: &Write| new.firm && new.answered < asked && new.asked > old.answered;
        let alive = |w: &&Write| !self.writes.iter().any(|new| replaces(new, w));
        self.writes.iter().filter(alive).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(model: &Model, crashed: bool) -> Vec<Value> {
        let may = |v: &Value| {
            let bytes = stamp::run(0, 1, *v);
            if crashed {
                model.survived(0..1, &bytes)
            } else {
                model.is_read(0..1, &bytes)
            }
            .is_ok()
        };
        (0..9).filter(may).collect()
    }

    #[test]
    fn a_flush_takes_away_what_was_replaced_before_it_was_called() {
        let mut model = Model::new([1]);
        let two = model.write(0..1, 2);
        model.answer(&two, Outcome::Done);
        assert_eq!(
            (values(&model, false), values(&model, true)),
            (vec![2], vec![1, 2])
        );
        let flush = model.flush();
        let three = model.write(0..1, 3);
        model.answer(&three, Outcome::Done);
        model.flushed(flush);
        assert_eq!(
            (values(&model, false), values(&model, true)),
            (vec![3], vec![2, 3])
        );
    }

    #[test]
    fn writes_in_flight_together_have_no_order() {
        let mut model = Model::new([1]);
        let two = model.write(0..1, 2);
        let three = model.write(0..1, 3);
        assert_eq!(values(&model, false), [1, 2, 3]);
        model.answer(&three, Outcome::Done);
        assert_eq!(
            values(&model, false),
            [2, 3],
            "the old value was replaced by an answered one"
        );
        model.answer(&two, Outcome::Durable);
        assert_eq!(values(&model, true), [2, 3]);
    }

    #[test]
    fn a_discard_offers_zeros_and_a_failed_write_is_possible() {
        let mut model = Model::new([1]);
        let gone = model.discard(0..1);
        model.answer(&gone, Outcome::Done);
        assert_eq!(values(&model, false), [0, 1]);
        let two = model.write(0..1, 2);
        model.answer(&two, Outcome::Failed);
        assert_eq!(values(&model, false), [0, 1, 2]);
        let three = model.write(0..1, 3);
        model.answer(&three, Outcome::Refused);
        assert_eq!(values(&model, false), [0, 1, 2]);
    }

    #[test]
    fn a_read_may_return_what_was_current_when_it_was_called() {
        let mut model = Model::new([1]);
        let read = model.read(0..1);
        let two = model.write(0..1, 2);
        model.answer(&two, Outcome::Done);
        let flush = model.flush();
        model.flushed(flush);
        assert_eq!(values(&model, true), [2]);
        assert!(
            model
                .was_read(read, 0..1, Some(&stamp::run(0, 1, 1)))
                .is_ok()
        );
        let read = model.read(0..1);
        assert!(
            model
                .was_read(read, 0..1, Some(&stamp::run(0, 1, 1)))
                .is_err()
        );
    }

    #[test]
    fn torn_bytes_are_excused_by_a_write_in_flight_and_a_power_cut_only() {
        let mut model = Model::new([1]);
        let mut torn = stamp::run(0, 1, 1).to_vec();
        torn[100] ^= 1;
        assert!(model.survived(0..1, &torn).is_err());
        let two = model.write(0..1, 2);
        assert!(model.survived(0..1, &torn).is_ok());
        assert!(model.is_read(0..1, &torn).is_err());
        model.answer(&two, Outcome::Done);
        assert!(model.survived(0..1, &torn).is_err());
    }
}
