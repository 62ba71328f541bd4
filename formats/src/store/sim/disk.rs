//! One simulated file: what it holds, what is durable, and what lies between.
//!
//! Changes since the last flush are kept in the order in which they took effect. A crash decides
//! for every 512-byte sector alone which of them reached the disk; the length is decided apart.
//! Space that a file gained and did not flush is poison after a crash, so that nobody can count on
//! zeros that nobody promised.

use super::fate::{Fate, Pick, Picker};
use crate::store::pages::Pages;
use crate::testkit::rng::Rng;
use crate::units::SECTOR;
use bytes::{Bytes, BytesMut};

/// What never-written space holds after a crash that it did not deserve to survive.
pub const POISON: u8 = 0xA5;

/// What a simulated file promises.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Required alignment: 1, 512 or 4096.
    pub align: u64,
    /// Bytes below this are metadata, whose sectors are never torn.
    pub metadata_end: u64,
    /// What [`crate::store::StoreInfo::fresh_zero`] says; the file itself does not change.
    pub fresh_zero: bool,
    /// Longer files find no space.
    pub max_len: u64,
    /// Any change is a broken promise of the engine, and remembered as such.
    pub sealed: bool,
}

impl Rules {
    /// Whether a write in flight can leave a sector half written. Storage with blocks larger than
    /// a sector keeps them whole, or a neighbour of a rewritten sector could never be safe.
    fn tears(&self, sector: u64) -> bool {
        self.align <= SECTOR && sector * SECTOR >= self.metadata_end
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            align: 1,
            metadata_end: 0,
            fresh_zero: true,
            max_len: u64::MAX,
            sealed: false,
        }
    }
}

/// What an operation changes.
#[derive(Debug, Clone)]
pub enum Change {
    /// Bytes at an offset.
    Write {
        /// File offset.
        at: u64,
        /// The bytes.
        data: Bytes,
    },
    /// A range that reads as zeros from then on.
    Zero {
        /// File offset.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A new length.
    Len(u64),
}

/// A change that may not be durable.
#[derive(Debug, Clone)]
pub struct Record {
    /// The operation that made it; operations are numbered in order of their calls.
    pub op: u64,
    /// When it took effect, on the same clock as [`Disk::flush`].
    pub done: u64,
    /// What it changed.
    pub change: Change,
}

/// A simulated file.
#[derive(Debug, Clone)]
pub struct Disk {
    now: Pages,
    durable: Pages,
    records: Vec<Record>,
    rules: Rules,
}

fn aligned(at: u64, len: u64) -> (u64, u64) {
    let from = at / SECTOR * SECTOR;
    (from, (at + len).div_ceil(SECTOR) * SECTOR)
}

impl Disk {
    /// A file that durably holds `pages`.
    pub fn new(pages: Pages, rules: Rules) -> Self {
        Self {
            now: pages.clone(),
            durable: pages,
            records: Vec::new(),
            rules,
        }
    }

    /// What a reader sees.
    pub fn now(&self) -> &Pages {
        &self.now
    }

    /// What it promises.
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// Sets whether any change is a broken promise.
    pub fn seal(&mut self, sealed: bool) {
        self.rules.sealed = sealed;
    }

    /// Changes that are not durable yet, oldest first.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Makes `change` visible, and durable at once when `durable` says so.
    pub fn apply(&mut self, op: u64, done: u64, change: Change, durable: bool) {
        for change in self.whole_sectors(change) {
            act(&mut self.now, &change);
            match (&change, durable) {
                (Change::Write { at, data }, true) => self.write_through(*at, data),
                _ => self.records.push(Record { op, done, change }),
            }
        }
    }

    /// A change as whole sectors: what a sector holds is old or new, never half of each.
    pub fn whole_sectors(&self, change: Change) -> Vec<Change> {
        match change {
            Change::Write { at, data } => vec![self.widen(at, data)],
            Change::Zero { at, len } => self.widen_zero(at, len),
            Change::Len(len) => {
                let old = self.now.len();
                let mut changes = self.widen_zero(len, old.saturating_sub(len));
                changes.push(Change::Len(len));
                changes
            }
        }
    }

    fn widen(&self, at: u64, data: Bytes) -> Change {
        let (from, to) = aligned(at, data.len() as u64);
        if (from, to) == (at, at + data.len() as u64) {
            return Change::Write { at, data };
        }
        let mut whole = BytesMut::zeroed((to - from) as usize);
        self.now.read(from, &mut whole);
        let start = (at - from) as usize;
        whole[start..start + data.len()].copy_from_slice(&data);
        Change::Write {
            at: from,
            data: whole.freeze(),
        }
    }

    fn widen_zero(&self, at: u64, len: u64) -> Vec<Change> {
        let (from, to) = (at.div_ceil(SECTOR) * SECTOR, (at + len) / SECTOR * SECTOR);
        let edge = |at: u64, len: u64| self.widen(at, Bytes::from(vec![0; len as usize]));
        if len == 0 {
            return Vec::new();
        }
        if from > to {
            return vec![edge(at, len)];
        }
        let head = (from > at).then(|| edge(at, from - at));
        let tail = (at + len > to).then(|| edge(to, at + len - to));
        let body = (to > from).then_some(Change::Zero {
            at: from,
            len: to - from,
        });
        head.into_iter().chain(body).chain(tail).collect()
    }

    /// A write that bypasses every cache: no older version of its sectors can come back.
    fn write_through(&mut self, at: u64, data: &Bytes) {
        let end = at + data.len() as u64;
        let mut left = Vec::with_capacity(self.records.len());
        for record in self.records.drain(..) {
            without(record, at, end, &mut left);
        }
        self.records = left;
        let old = self.durable.len();
        if end > old {
            self.durable.set_len(end);
            self.durable.fill(old, end - old, POISON);
            self.records
                .retain(|r| !matches!(r.change, Change::Len(len) if len < end));
        }
        self.durable.write(at, data);
    }

    /// Makes durable what took effect before `asked`.
    pub fn flush(&mut self, asked: u64) {
        let covered = self.records.iter().take_while(|r| r.done < asked).count();
        for record in self.records.drain(..covered) {
            act(&mut self.durable, &record.change);
        }
    }

    /// The file after a crash in which `flying` had been asked for and not answered.
    pub fn crash(&self, flying: &[Record], fate: &Fate) -> Pages {
        if let Fate::Exact(n) = fate {
            return self.exact(flying, *n);
        }
        let mut picker = Picker::new(fate);
        let flying = picker.order(flying);
        let all = || {
            self.records
                .iter()
                .map(|r| (r, false))
                .chain(flying.iter().map(|r| (*r, true)))
        };
        let mut len = self.durable.len();
        for (record, _) in all() {
            if let Change::Len(n) = record.change
                && picker.keep_len(record.op)
            {
                len = n;
            }
        }
        let mut out = self.base(len);
        for (record, flying) in all() {
            self.survive(&mut out, record, flying, &mut picker);
        }
        out.set_len(len);
        out
    }

    /// What is durable, cut or grown to `len`, with room above it.
    fn base(&self, len: u64) -> Pages {
        let mut out = self.durable.clone();
        out.set_len(len);
        if len > self.durable.len() {
            out.fill(self.durable.len(), len - self.durable.len(), POISON);
        }
        out.set_len(u64::MAX);
        out
    }

    fn survive(&self, out: &mut Pages, record: &Record, flying: bool, picker: &mut Picker) {
        let (at, len) = match &record.change {
            Change::Write { at, data } => (*at, data.len() as u64),
            Change::Zero { at, len } => (*at, *len),
            Change::Len(_) => return,
        };
        match picker.whole(record.op) {
            Some(true) => act(out, &record.change),
            Some(false) => {}
            None => {
                let span = sectors(at, len);
                let torn = flying && matches!(record.change, Change::Write { .. });
                for sector in span.clone() {
                    let tearable = torn && self.rules.tears(sector);
                    match picker.sector(record.op, sector, &span, tearable) {
                        Pick::Lose => {}
                        Pick::Keep => keep(out, &record.change, sector),
                        Pick::Garbage => garbage(out, record.op, sector),
                    }
                }
            }
        }
    }

    /// Crash state number `n` of all those there are.
    fn exact(&self, flying: &[Record], n: u64) -> Pages {
        let choices = self.choices(flying, usize::MAX);
        let mut rest = n;
        let mut digit = |options: usize| {
            let digit = (rest % options as u64) as usize;
            rest /= options as u64;
            digit
        };
        let len = choices.lens[digit(choices.lens.len())];
        let mut out = self.base(len);
        for choice in &choices.sectors {
            match digit(choice.options()) {
                0 => {}
                n if n <= choice.records.len() => {
                    keep(&mut out, &choice.records[n - 1].change, choice.sector);
                }
                _ => garbage(&mut out, n, choice.sector),
            }
        }
        out.set_len(len);
        out
    }

    /// What a crash may choose from; stops looking above `max` sectors.
    pub fn choices<'a>(&'a self, flying: &'a [Record], max: usize) -> Choices<'a> {
        let mut out = Choices {
            lens: vec![self.durable.len()],
            sectors: Vec::new(),
        };
        let all = self
            .records
            .iter()
            .map(|r| (r, false))
            .chain(flying.iter().map(|r| (r, true)));
        for (record, flying) in all {
            let (at, len) = match &record.change {
                Change::Write { at, data } => (*at, data.len() as u64),
                Change::Zero { at, len } => (*at, *len),
                Change::Len(len) => {
                    out.lens.push(*len);
                    continue;
                }
            };
            let torn = flying && matches!(record.change, Change::Write { .. });
            for sector in sectors(at, len) {
                if out.sectors.len() > max {
                    return out;
                }
                out.add(
                    sector,
                    record,
                    torn && sector * SECTOR >= self.rules.metadata_end,
                );
            }
        }
        out
    }
}

/// What one crash may choose from.
#[derive(Debug)]
pub struct Choices<'a> {
    /// Lengths; the durable one first.
    pub lens: Vec<u64>,
    /// Sectors that are not settled.
    pub sectors: Vec<Choice<'a>>,
}

/// What one sector may hold besides its durable bytes.
#[derive(Debug)]
pub struct Choice<'a> {
    /// Sector number in the file.
    pub sector: u64,
    /// Changes that cover it.
    pub records: Vec<&'a Record>,
    /// Whether it may hold bytes that nobody wrote.
    pub garbage: bool,
}

impl Choice<'_> {
    fn options(&self) -> usize {
        1 + self.records.len() + usize::from(self.garbage)
    }
}

impl<'a> Choices<'a> {
    fn add(&mut self, sector: u64, record: &'a Record, garbage: bool) {
        match self.sectors.iter_mut().find(|c| c.sector == sector) {
            Some(choice) => {
                choice.records.push(record);
                choice.garbage |= garbage;
            }
            None => self.sectors.push(Choice {
                sector,
                records: vec![record],
                garbage,
            }),
        }
    }

    /// How many crash states there are.
    pub fn states(&self) -> u64 {
        let sectors = self.sectors.iter().map(|c| c.options() as u64);
        sectors.fold(self.lens.len() as u64, u64::saturating_mul)
    }
}

fn sectors(at: u64, len: u64) -> std::ops::Range<u64> {
    at / SECTOR..(at + len).div_ceil(SECTOR)
}

fn act(pages: &mut Pages, change: &Change) {
    match change {
        Change::Write { at, data } => pages.write(*at, data),
        Change::Zero { at, len } => pages.zero(*at, *len),
        Change::Len(len) => pages.set_len(*len),
    }
}

fn keep(out: &mut Pages, change: &Change, sector: u64) {
    match change {
        Change::Write { at, data } => {
            let start = (sector * SECTOR - at) as usize;
            out.write(sector * SECTOR, &data[start..start + SECTOR as usize]);
        }
        Change::Zero { .. } => out.zero(sector * SECTOR, SECTOR),
        Change::Len(_) => {}
    }
}

fn garbage(out: &mut Pages, seed: u64, sector: u64) {
    let mut rng = Rng::new(seed ^ sector.rotate_left(32));
    let mut bytes = [0u8; SECTOR as usize];
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&rng.next().to_le_bytes());
    }
    out.write(sector * SECTOR, &bytes);
}

/// What is left of a record without the bytes `from .. to`.
fn without(record: Record, from: u64, to: u64, left: &mut Vec<Record>) {
    let (start, len) = match &record.change {
        Change::Write { at, data } => (*at, data.len() as u64),
        Change::Zero { at, len } => (*at, *len),
        Change::Len(_) => return left.push(record),
    };
    let end = start + len;
    for (a, b) in [(start, end.min(from)), (start.max(to), end)] {
        if a >= b {
            continue;
        }
        let change = match &record.change {
            Change::Write { data, .. } => Change::Write {
                at: a,
                data: data.slice((a - start) as usize..(b - start) as usize),
            },
            _ => Change::Zero { at: a, len: b - a },
        };
        left.push(Record { change, ..record });
    }
}
