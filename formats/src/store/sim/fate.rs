//! Fates: which of the changes that were not durable survive a crash.
//!
//! Where few sectors are undecided every combination is tried. Where there are many, the ones that
//! find bugs are: nothing, everything, each operation alone kept or lost, the order in which they
//! were asked for cut anywhere, torn halves, single metadata sectors, and seeded dice.

use super::disk::{Change, Disk, Record};
use crate::testkit::rng::Rng;
use crate::units::SECTOR;
use std::ops::Range;

/// Up to this many undecided sectors every combination is tried.
pub const EXHAUSTIVE_SECTORS: usize = 12;
/// Up to this many combinations, that is.
const EXHAUSTIVE_STATES: u64 = 4096;
/// Newest operations and sectors that are kept or lost alone.
const ALONE: usize = 6;

/// One outcome of a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Only what was durable.
    None,
    /// Everything, unanswered operations included.
    All,
    /// Of everything unflushed, this operation only.
    OnlyOp(u64),
    /// Everything but this operation.
    LoseOp(u64),
    /// Operations up to this one, in the order of their calls.
    UpTo(u64),
    /// Operations from this one on.
    From(u64),
    /// Of everything unflushed, this sector only.
    OnlySector(u64),
    /// Everything but this sector.
    LoseSector(u64),
    /// Everything; of this operation the first half, with a torn sector in the middle.
    TornHead(u64),
    /// Everything; of this operation the second half, with a torn sector in the middle.
    TornTail(u64),
    /// This number in the list of all combinations.
    Exact(u64),
    /// Dice with this seed, for each sector and the length.
    Random(u64),
}

/// What becomes of one sector of one change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pick {
    Keep,
    Lose,
    Garbage,
}

/// A fate being carried out.
pub(super) struct Picker {
    fate: Fate,
    rng: Rng,
    /// Of eight dice, how many keep.
    odds: u64,
}

impl Picker {
    pub fn new(fate: &Fate) -> Self {
        let seed = if let Fate::Random(seed) = fate {
            *seed
        } else {
            0
        };
        let mut rng = Rng::new(seed);
        let odds = *rng.pick(&[1, 4, 4, 7]);
        Self {
            fate: *fate,
            rng,
            odds,
        }
    }

    /// The order in which unanswered operations took effect.
    pub fn order<'a>(&mut self, flying: &'a [Record]) -> Vec<&'a Record> {
        let mut order: Vec<&Record> = flying.iter().collect();
        if let Fate::Random(_) = self.fate {
            for i in (1..order.len()).rev() {
                order.swap(i, self.rng.below(i as u64 + 1) as usize);
            }
        }
        order
    }

    pub fn keep_len(&mut self, op: u64) -> bool {
        match self.fate {
            Fate::OnlySector(_) => false,
            Fate::LoseSector(_) | Fate::TornHead(_) | Fate::TornTail(_) => true,
            Fate::Random(_) => self.rng.one_in(2),
            _ => self.whole(op).unwrap_or(true),
        }
    }

    /// The decision for an operation as a whole, if there is one.
    pub fn whole(&self, op: u64) -> Option<bool> {
        match self.fate {
            Fate::None => Some(false),
            Fate::All => Some(true),
            Fate::OnlyOp(n) => Some(op == n),
            Fate::LoseOp(n) => Some(op != n),
            Fate::UpTo(n) => Some(op <= n),
            Fate::From(n) => Some(op >= n),
            Fate::TornHead(n) | Fate::TornTail(n) if op != n => Some(true),
            _ => None,
        }
    }

    pub fn sector(&mut self, op: u64, sector: u64, span: &Range<u64>, tearable: bool) -> Pick {
        let middle = span.start + (span.end - span.start) / 2;
        let keep = match self.fate {
            Fate::OnlySector(n) => sector == n,
            Fate::LoseSector(n) => sector != n,
            Fate::TornHead(n) | Fate::TornTail(n) if op == n && tearable && sector == middle => {
                return Pick::Garbage;
            }
            Fate::TornHead(_) => sector < middle,
            Fate::TornTail(_) => sector > middle,
            _ if tearable && self.rng.one_in(16) => return Pick::Garbage,
            _ => self.rng.below(8) < self.odds,
        };
        if keep { Pick::Keep } else { Pick::Lose }
    }
}

impl Disk {
    /// Outcomes worth trying for a crash now, with `random` of them left to dice.
    pub fn fates(&self, flying: &[Record], random: usize, rng: &mut Rng) -> Vec<Fate> {
        match self.combinations(flying) {
            Some(states) => (0..states).map(Fate::Exact).collect(),
            None => self.likely_fates(flying, random, rng),
        }
    }

    /// At most `max` outcomes: all combinations where that is enough, dice among them otherwise.
    pub fn some_fates(&self, flying: &[Record], max: usize, rng: &mut Rng) -> Vec<Fate> {
        match self.combinations(flying) {
            Some(states) if states <= max as u64 => (0..states).map(Fate::Exact).collect(),
            Some(states) => (0..max).map(|_| Fate::Exact(rng.below(states))).collect(),
            None => {
                let mut fates = self.likely_fates(flying, max / 2, rng);
                while fates.len() > max {
                    fates.swap_remove(rng.below(fates.len() as u64) as usize);
                }
                fates
            }
        }
    }

    /// How many combinations there are, where they are few.
    fn combinations(&self, flying: &[Record]) -> Option<u64> {
        let choices = self.choices(flying, EXHAUSTIVE_SECTORS);
        let few = choices.sectors.len() <= EXHAUSTIVE_SECTORS;
        few.then(|| choices.states())
            .filter(|states| *states <= EXHAUSTIVE_STATES)
    }

    fn likely_fates(&self, flying: &[Record], random: usize, rng: &mut Rng) -> Vec<Fate> {
        let mut fates = vec![Fate::None, Fate::All];
        for op in newest(self.records().iter().chain(flying).map(|r| r.op)) {
            fates.extend([
                Fate::OnlyOp(op),
                Fate::LoseOp(op),
                Fate::UpTo(op),
                Fate::From(op),
            ]);
        }
        for op in newest(flying.iter().map(|r| r.op)) {
            fates.extend([Fate::TornHead(op), Fate::TornTail(op)]);
        }
        let metadata = |r: &Record| match r.change {
            Change::Write { at, .. } if at < self.rules().metadata_end => Some(at / SECTOR),
            _ => None,
        };
        for sector in newest(self.records().iter().chain(flying).filter_map(metadata)) {
            fates.extend([Fate::OnlySector(sector), Fate::LoseSector(sector)]);
        }
        fates.extend((0..random).map(|_| Fate::Random(rng.next())));
        fates
    }
}

/// The highest few of `numbers`, each once.
fn newest(numbers: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut all: Vec<u64> = numbers.collect();
    all.sort_unstable();
    all.dedup();
    all.split_off(all.len().saturating_sub(ALONE))
}
