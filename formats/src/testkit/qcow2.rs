//! Qcow2 images made byte by byte, by other code than the engine's, and judged by the check.
//!
//! Free clusters of a made image are poison, so that a reader of free space is found out.

use super::exec::now;
use super::rng::Rng;
use super::stamp::{self, Value};
use crate::qcow2::check::check;
use crate::severity::Severity;
use crate::store::mem::MemStore;
use crate::store::pages::Pages;
use crate::store::sim::POISON;
use crate::units::SECTOR;
use std::collections::BTreeMap;

const COPIED: u64 = 1 << 63;
const PACKED: u64 = 1 << 62;

/// What a guest cluster is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// Nothing: look below.
    Nothing,
    /// Zeros; with a place in the file, or without.
    Zero {
        /// Whether a cluster is taken for it.
        place: bool,
    },
    /// Data: one value a sector.
    Data(Vec<Value>),
    /// The same, compressed (in a block that is not).
    Packed(Vec<Value>),
    /// With extended entries: each subcluster by itself is nothing, zeros, or data. One value a sector,
    /// and none of all sectors of a subcluster.
    Parts(Vec<Option<Value>>),
}

/// What to make.
#[derive(Debug, Clone)]
pub struct Image {
    /// Version of the header: 2 or 3.
    pub version: u32,
    /// Whether entries of second-level tables tell of subclusters.
    pub extended: bool,
    /// Sectors of the last cluster that are behind the end of the disk.
    pub behind: u64,
    /// Bytes of a cluster, as a power of two.
    pub log2: u32,
    /// Bits of a refcount, as a power of two.
    pub order: u32,
    /// Each guest cluster, and whether a snapshot has it, too.
    pub clusters: Vec<(Held, bool)>,
    /// Whether there is a snapshot.
    pub snapshot: bool,
    /// Clusters with refcount 0, full of poison.
    pub free: u32,
    /// Clusters that nobody names and whose refcount is 1.
    pub leaks: u32,
    /// Whether the first refcount block is before the data: then the file may end with data.
    pub counted_first: bool,
    /// Clusters that the first refcount blocks would tell of and that are holes, with refcount 0: the
    /// rest of the file is behind them.
    pub skip: u32,
}

/// A file under way.
struct Draft {
    pages: Pages,
    log2: u32,
    counts: Vec<u64>,
}

impl Draft {
    const fn bytes(&self) -> u64 {
        1 << self.log2
    }

    fn at(&self, cluster: u64) -> u64 {
        cluster << self.log2
    }

    /// The next clusters of the file, which somebody names so often.
    fn take(&mut self, clusters: u64, count: u64) -> u64 {
        let first = self.counts.len() as u64;
        self.counts.resize((first + clusters) as usize, count);
        self.pages.set_len(self.at(first + clusters));
        first
    }

    fn word(&mut self, at: u64, word: u64) {
        self.pages.write(at, &word.to_be_bytes());
    }
}

/// The bytes of a guest cluster.
fn data(values: &[Value], first: u64) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * SECTOR as usize];
    for (i, sector) in bytes.chunks_exact_mut(SECTOR as usize).enumerate() {
        stamp::fill(sector, first + i as u64, values[i]);
    }
    bytes
}

/// A deflate stream of one block that is not compressed.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let len = bytes.len() as u16;
    let head = [&[1][..], &len.to_le_bytes(), &(!len).to_le_bytes()].concat();
    [&head, bytes].concat()
}

impl Image {
    const fn sectors(&self) -> u64 {
        (1 << self.log2) / SECTOR
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        ((self.clusters.len() as u64) << self.log2) - self.behind * SECTOR
    }

    /// Bytes of a second-level entry.
    const fn entry(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// The file, its clusters in an order that dice choose.
    pub fn make(&self, rng: &mut Rng) -> Pages {
        let mut draft = Draft {
            pages: Pages::new(0),
            log2: self.log2,
            counts: Vec::new(),
        };
        let per_table = draft.bytes() / self.entry();
        let entries = (self.clusters.len() as u64).div_ceil(per_table).max(1);
        let l1_clusters = (entries * 8).div_ceil(draft.bytes());
        draft.take(1, 1);
        let reftable = draft.take(1, 1);
        let block = self.counted_first.then(|| draft.take(1, 1));
        draft.take(u64::from(self.skip), 0);
        let l1 = draft.take(l1_clusters, 1);
        let snapshots = self
            .snapshot
            .then(|| (draft.take(1, 1), draft.take(l1_clusters, 1)));
        for index in 0..entries {
            let first = (index * per_table) as usize;
            let group =
                &self.clusters[first..(first + per_table as usize).min(self.clusters.len())];
            if group.iter().all(|(held, _)| *held == Held::Nothing) && rng.one_in(2) {
                continue;
            }
            let all_shared = self.snapshot && group.iter().all(|(_, shared)| *shared);
            let table = draft.take(1, if all_shared { 2 } else { 1 });
            let flag = if all_shared { 0 } else { COPIED };
            let entry = draft.at(table) | flag;
            draft.word(draft.at(l1) + index * 8, entry);
            self.fill_table(&mut draft, rng, table, first as u64, group);
            if let Some((_, l1)) = snapshots {
                let mine = match all_shared {
                    true => table,
                    false => self.snapshot_table(&mut draft, table, group),
                };
                draft.word(draft.at(l1) + index * 8, draft.at(mine));
            }
            self.spread(&mut draft, rng);
        }
        for _ in 0..self.leaks {
            draft.take(1, 1);
        }
        if let Some((table, l1)) = snapshots {
            self.list_snapshot(&mut draft, table, l1, entries);
        }
        self.count(&mut draft, reftable, block);
        self.head(
            &mut draft,
            reftable,
            l1,
            entries,
            snapshots.map(|(table, _)| table),
        );
        draft.pages
    }

    /// Free clusters in between.
    fn spread(&self, draft: &mut Draft, rng: &mut Rng) {
        for _ in 0..rng.below(u64::from(self.free) + 1) {
            let free = draft.take(1, 0);
            draft.pages.fill(draft.at(free), draft.bytes(), POISON);
        }
    }

    fn fill_table(
        &self,
        draft: &mut Draft,
        rng: &mut Rng,
        table: u64,
        first: u64,
        group: &[(Held, bool)],
    ) {
        let mut order: Vec<usize> = (0..group.len()).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        for n in order {
            let (held, shared) = &group[n];
            let shared = self.snapshot && *shared;
            let (count, flag) = if shared { (2, 0) } else { (1, COPIED) };
            let sector = (first + n as u64) * self.sectors();
            let all = u64::from(u32::MAX);
            let zero = if self.extended {
                (0, all << 32)
            } else {
                (1, 0)
            };
            let (entry, bits) = match held {
                Held::Nothing => (0, 0),
                Held::Zero { place: false } => zero,
                Held::Zero { place: true } => (poisoned(draft, count) | flag | zero.0, zero.1),
                Held::Data(values) => {
                    let host = draft.take(1, count);
                    draft.pages.write(draft.at(host), &data(values, sector));
                    (draft.at(host) | flag, all)
                }
                Held::Packed(values) => (self.pack(draft, rng, &data(values, sector), count), 0),
                Held::Parts(parts) => {
                    let host = poisoned(draft, count);
                    (host | flag, lay(draft, host, parts, sector))
                }
            };
            let at = draft.at(table) + n as u64 * self.entry();
            draft.word(at, entry);
            if self.extended {
                draft.word(at + 8, bits);
            }
        }
    }

    /// Puts a compressed cluster into clusters of its own, not at their start; its entry.
    fn pack(&self, draft: &mut Draft, rng: &mut Rng, bytes: &[u8], count: u64) -> u64 {
        let bytes = stored(bytes);
        // The smallest clusters may take two sectors, and no more.
        let within = rng.below(draft.bytes() - 8);
        let clusters = (within + bytes.len() as u64).div_ceil(draft.bytes());
        let first = draft.take(clusters, count);
        let at = draft.at(first) + within;
        draft.pages.write(at, &bytes);
        let sectors = (at + bytes.len() as u64 - 1) / SECTOR - at / SECTOR;
        // What the last sector is of is there.
        let shift = 70 - self.log2;
        PACKED | sectors << shift | at
    }

    /// A snapshot's own table, of the clusters that it shares.
    fn snapshot_table(&self, draft: &mut Draft, table: u64, group: &[(Held, bool)]) -> u64 {
        let mine = draft.take(1, 1);
        for (n, _) in group.iter().enumerate().filter(|(_, (_, shared))| *shared) {
            let mut entry = vec![0; self.entry() as usize];
            let within = n as u64 * self.entry();
            draft.pages.read(draft.at(table) + within, &mut entry);
            let to = draft.at(mine) + within;
            draft.pages.write(to, &entry);
        }
        mine
    }

    fn list_snapshot(&self, draft: &mut Draft, table: u64, l1: u64, entries: u64) {
        let at = draft.at(table);
        draft.word(at, draft.at(l1));
        let mut entry = Vec::new();
        entry.extend((entries as u32).to_be_bytes());
        entry.extend(1u16.to_be_bytes());
        entry.extend(1u16.to_be_bytes());
        entry.extend([0; 20]);
        entry.extend(24u32.to_be_bytes());
        entry.extend([0; 8]);
        entry.extend(self.size().to_be_bytes());
        entry.extend(u64::MAX.to_be_bytes());
        entry.extend(b"1s");
        draft.pages.write(at + 8, &entry);
    }

    /// Refcount blocks, which count themselves; the first one may have its place.
    fn count(&self, draft: &mut Draft, reftable: u64, first: Option<u64>) {
        let per_block = (draft.bytes() * 8) >> self.order;
        let mut blocks: BTreeMap<u64, u64> = first.into_iter().map(|block| (0, block)).collect();
        loop {
            let needed = |n: &u64| {
                let first = (n * per_block) as usize;
                let last = (first + per_block as usize).min(draft.counts.len());
                draft.counts[first..last].iter().any(|count| *count > 0)
            };
            let all = (draft.counts.len() as u64).div_ceil(per_block);
            let Some(n) = (0..all).filter(needed).find(|n| !blocks.contains_key(n)) else {
                break;
            };
            let block = draft.take(1, 1);
            blocks.insert(n, block);
        }
        for (n, block) in &blocks {
            draft.word(draft.at(reftable) + n * 8, draft.at(*block));
            let mut bytes = vec![0u8; draft.bytes() as usize];
            let first = (n * per_block) as usize;
            for (i, count) in draft
                .counts
                .iter()
                .skip(first)
                .take(per_block as usize)
                .enumerate()
            {
                set(&mut bytes, self.order, i, *count);
            }
            draft.pages.write(draft.at(*block), &bytes);
        }
    }

    fn head(&self, draft: &mut Draft, reftable: u64, l1: u64, entries: u64, list: Option<u64>) {
        let mut head = Vec::new();
        head.extend(0x5146_49FBu32.to_be_bytes());
        head.extend(self.version.to_be_bytes());
        head.extend([0; 12]);
        head.extend(self.log2.to_be_bytes());
        head.extend(self.size().to_be_bytes());
        head.extend([0; 4]);
        head.extend((entries as u32).to_be_bytes());
        head.extend(draft.at(l1).to_be_bytes());
        head.extend(draft.at(reftable).to_be_bytes());
        head.extend(1u32.to_be_bytes());
        head.extend(u32::from(list.is_some()).to_be_bytes());
        head.extend(list.map_or(0, |n| draft.at(n)).to_be_bytes());
        if self.version == 3 {
            head.extend((u64::from(self.extended) << 4).to_be_bytes());
            head.extend([0; 16]);
            head.extend(self.order.to_be_bytes());
            head.extend(104u32.to_be_bytes());
            head.extend([0; 8]);
        }
        draft.pages.write(0, &head);
    }
}

/// Takes a cluster for somebody, full of poison; where it is.
fn poisoned(draft: &mut Draft, count: u64) -> u64 {
    let host = draft.take(1, count);
    draft.pages.fill(draft.at(host), draft.bytes(), POISON);
    draft.at(host)
}

/// Puts what is data of `parts` into the cluster at `host`; the second half of their entry.
fn lay(draft: &mut Draft, host: u64, parts: &[Option<Value>], first: u64) -> u64 {
    let mut bits = 0;
    let piece = parts.len().div_ceil(32);
    for (n, part) in parts.chunks(piece).enumerate() {
        let values: Vec<Value> = part.iter().copied().flatten().collect();
        if values.is_empty() {
            continue;
        }
        if values.iter().all(|value| *value == stamp::ZERO) {
            bits |= 1 << (32 + n);
            continue;
        }
        bits |= 1 << n;
        let sector = (n * piece) as u64;
        let at = host + sector * SECTOR;
        draft.pages.write(at, &data(&values, first + sector));
    }
    bits
}

/// Sets refcount `n`.
fn set(block: &mut [u8], order: u32, n: usize, count: u64) {
    if order < 3 {
        let bit = n << order;
        block[bit / 8] |= (count as u8) << (bit % 8);
        return;
    }
    let len = 1usize << (order - 3);
    block[n * len..(n + 1) * len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
}

/// Judges an image: nothing worse than leaks, and how many there are.
pub fn audit(pages: &Pages) -> Result<u64, String> {
    let store = MemStore::from_pages(pages.clone());
    let report = now(check(&store)).map_err(|e| e.to_string())?;
    let bad = report.findings.iter().find(|f| f.severity > Severity::Leak);
    match bad {
        Some(finding) => Err(finding.text.clone()),
        None => Ok(report.leaks),
    }
}

/// What dice decide of a whole image before its clusters.
struct Kind {
    version: u32,
    extended: bool,
    packed: bool,
}

impl Kind {
    /// What a guest cluster of `sectors` sectors is.
    fn cluster(&self, rng: &mut Rng, sectors: u64, value: &mut Value) -> Held {
        let mut one = |_| {
            *value += 1;
            *value
        };
        match rng.below(10) {
            0..=3 => Held::Nothing,
            4 if self.version == 3 => Held::Zero {
                place: rng.one_in(2),
            },
            5 if self.packed => Held::Packed((0..sectors).map(one).collect()),
            6..=7 if self.extended => {
                let part = |n| match rng.below(3) {
                    0 => None,
                    1 => Some(stamp::ZERO),
                    _ => Some(one(n)),
                };
                Held::Parts((0..sectors).map(part).collect())
            }
            _ => Held::Data((0..sectors).map(one).collect()),
        }
    }
}

impl Image {
    /// An image that dice choose, of at most `sectors` sectors; its values count on from `value`.
    pub fn of_dice(rng: &mut Rng, sectors: u64, value: &mut Value) -> Self {
        Self::dice(rng, sectors, value, false)
    }

    /// The same of a rarer kind: of version 2, with extended entries, of a size that no cluster divides.
    pub fn odd_of_dice(rng: &mut Rng, sectors: u64, value: &mut Value) -> Self {
        Self::dice(rng, sectors, value, true)
    }

    fn dice(rng: &mut Rng, sectors: u64, value: &mut Value, odd: bool) -> Self {
        let (version, extended) = match odd {
            true => *rng.pick(&[(2, false), (3, true), (3, false)]),
            false => (3, false),
        };
        // Also clusters of more than one slice. Of 16 KiB sectors are subclusters.
        let log2 = match extended {
            true => 14,
            false => *rng.pick(&[9, 9, 9, 10, 12, 13]),
        };
        let per = (1u64 << log2) / SECTOR;
        let count = rng.range(1, (sectors / per).max(1));
        let packed = rng.one_in(2);
        let (snapshot, order) = match packed {
            true => (rng.one_in(2), *rng.pick(&[2, 3, 4, 4, 6])),
            false => (false, rng.below(7) as u32),
        };
        let order = if version == 2 { 4 } else { order };
        let shared_in = *rng.pick(&[1, 2, 4]);
        let kind = Kind {
            version,
            extended,
            packed,
        };
        let clusters = (0..count)
            .map(|_| (kind.cluster(rng, per, value), rng.one_in(shared_in)))
            .collect();
        // The table of refcounts is one cluster: now and then it is nearly used up.
        let most = (1u64 << log2) / 8 * ((8 << log2) >> order);
        let near = log2 == 9 && order == 6 && rng.one_in(2);
        Self {
            version,
            extended,
            behind: if odd { rng.below(per) } else { 0 },
            log2,
            order,
            clusters,
            snapshot,
            free: rng.below(3) as u32,
            leaks: if rng.one_in(4) { 2 } else { 0 },
            counted_first: false,
            skip: if near { most as u32 - 600 } else { 0 },
        }
    }

    /// What a guest reads through it when it read `values` below; below its end.
    pub fn overlay(&self, values: &mut [Value]) {
        let per = self.sectors() as usize;
        for (to, (held, _)) in values.chunks_mut(per).zip(&self.clusters) {
            match held {
                Held::Nothing => {}
                Held::Zero { .. } => to.fill(stamp::ZERO),
                Held::Data(values) | Held::Packed(values) => {
                    to.copy_from_slice(&values[..to.len()]);
                }
                Held::Parts(parts) => {
                    for (to, part) in to.iter_mut().zip(parts) {
                        *to = part.unwrap_or(*to);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_image_is_healthy_and_its_leaks_are_counted() {
        for seed in 0..400 {
            let mut rng = Rng::new(seed);
            let image = Image::dice(&mut rng, 90, &mut 0, seed % 2 == 1);
            let leaks = audit(&image.make(&mut rng));
            assert_eq!(leaks, Ok(u64::from(image.leaks)), "seed {seed}");
        }
    }
}
