//! The index of an open image in memory: durable table pages and what is not durable yet.
//!
//! A lookup asks, in this order: *pending* entries (answered, not durable), *frozen* entries (being
//! written by the pass that runs now), and durable table pages, which are read on demand and may be
//! forgotten at any time. Page images for the disk are built from durable plus frozen entries only,
//! so that an entry published during a pass is not made durable before its data.
//!
//! Every pending entry also stands in the ledger, written before the guest is answered. No I/O here.

use super::alloc::Alloc;
use super::header::{HEADER_LEN, Header};
use crate::ledger::Ledger;
use crate::limits;
use crate::planted::{self, Bug};
use crate::units::{HostCluster, VirtCluster};
use crate::{Error, Kind, Result};
use bytes::{Bytes, BytesMut};
use lru::LruCache;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;

/// A mapping that is not durable yet.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// File cluster, or `None` when the mapping was dropped.
    to: Option<HostCluster>,
    /// Its word in the ledger.
    slot: usize,
    /// Losing the cluster's data in a crash would show what was there before: no barrier needed.
    fresh: bool,
}

/// Where a cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lookup {
    At(HostCluster),
    Absent,
    /// Table page that must be read first, and the epoch to hand back with it.
    NeedsPage {
        page: u32,
        epoch: u64,
    },
}

/// What one pass writes.
#[derive(Debug, Default)]
pub(super) struct Frozen {
    entries: BTreeMap<u32, Entry>,
    freed: Vec<u32>,
}

impl Frozen {
    /// Whether data must be durable before these entries are written.
    pub(super) fn needs_data_first(&self) -> bool {
        self.entries.values().any(|e| !e.fresh)
    }
}

/// The index of one open image.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) header: Header,
    pub(super) alloc: Alloc,
    pub(super) ledger: Ledger,
    pages: LruCache<u32, Bytes>,
    pending: BTreeMap<u32, Entry>,
    frozen: Frozen,
    freed: Vec<u32>,
    slots: Vec<usize>,
    epoch: u64,
}

/// Table page and byte within it of entry `n`.
pub(super) fn place(header: &Header, n: u32) -> (u32, usize) {
    let at = header.entry_at(n);
    ((at / limits::PAGE) as u32, (at % limits::PAGE) as usize)
}

/// The first entry in a page, and the one past its last.
fn entries_of(page: u32) -> (u32, u32) {
    let start = |page: u64| {
        let entry = page.saturating_mul(limits::PAGE).saturating_sub(HEADER_LEN) / 4;
        u32::try_from(entry).unwrap_or(u32::MAX)
    };
    let page = u64::from(page);
    (start(page), start(page.saturating_add(1)))
}

/// The raw entry at byte `at` of a page.
pub(super) fn raw_entry(page: &[u8], at: usize) -> u32 {
    page.get(at..)
        .and_then(|b| b.first_chunk::<4>())
        .map_or(0, |b| u32::from_le_bytes(*b))
}

impl Index {
    /// An index whose pending entries are those of `ledger`, left by a dead predecessor.
    pub(super) fn new(header: Header, alloc: Alloc, ledger: Ledger) -> Self {
        let mut pending = BTreeMap::new();
        let mut used = vec![false; ledger.slots()];
        for (slot, cluster, to) in ledger.entries() {
            let to = Some(HostCluster(to)).filter(|c| c.0 != 0);
            pending.insert(
                cluster.0,
                Entry {
                    to,
                    slot,
                    fresh: false,
                },
            );
            if let Some(mark) = used.get_mut(slot) {
                *mark = true;
            }
        }
        let slots = used
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, u)| !**u)
            .map(|(i, _)| i)
            .collect();
        let pages = NonZeroUsize::new(limits::PAGES_CACHED).unwrap_or(NonZeroUsize::MIN);
        Self {
            header,
            alloc,
            ledger,
            pages: LruCache::new(pages),
            pending,
            frozen: Frozen::default(),
            freed: Vec::new(),
            slots,
            epoch: 0,
        }
    }

    /// Where `cluster` is, as the guest must see it.
    pub(super) fn lookup(&mut self, cluster: VirtCluster) -> Result<Lookup> {
        let n = cluster.0;
        if n >= self.header.entries {
            return Ok(Lookup::Absent);
        }
        if let Some(entry) = self.pending.get(&n).or_else(|| self.frozen.entries.get(&n)) {
            return Ok(entry.to.map_or(Lookup::Absent, Lookup::At));
        }
        let (page, at) = place(&self.header, n);
        let Some(bytes) = self.pages.get(&page) else {
            return Ok(Lookup::NeedsPage {
                page,
                epoch: self.epoch,
            });
        };
        let raw = raw_entry(bytes, at);
        self.named(n, raw)
            .map(|to| to.map_or(Lookup::Absent, Lookup::At))
    }

    /// How far the mapping that starts with `first` at `cluster` goes on evenly, in clusters, as
    /// far as table pages in memory tell.
    pub(super) fn run(
        &mut self,
        cluster: VirtCluster,
        first: Option<HostCluster>,
        max: u64,
    ) -> u64 {
        let quiet = self.pending.is_empty() && self.frozen.entries.is_empty();
        let mut last: Option<(u32, Bytes)> = None;
        let mut n = 1u64;
        while n < max {
            let next = u32::try_from(n).ok();
            let Some(next) = next.and_then(|n| cluster.0.checked_add(n)) else {
                break;
            };
            let looked = if quiet {
                self.durable(next, &mut last)
            } else {
                self.lookup(VirtCluster(next))
            };
            let even = match (looked, first) {
                (Ok(Lookup::Absent), None) => true,
                (Ok(Lookup::At(host)), Some(first)) => {
                    u64::from(host.0) == u64::from(first.0).saturating_add(n)
                }
                _ => false,
            };
            if !even {
                break;
            }
            n = n.saturating_add(1);
        }
        n
    }

    /// As [`Index::lookup`] where nothing is pending; keeps the page that it looked into in `last`.
    fn durable(&mut self, n: u32, last: &mut Option<(u32, Bytes)>) -> Result<Lookup> {
        if n >= self.header.entries {
            return Ok(Lookup::Absent);
        }
        let (page, at) = place(&self.header, n);
        if last.as_ref().is_none_or(|(number, _)| *number != page) {
            *last = self.pages.get(&page).map(|bytes| (page, bytes.clone()));
        }
        let Some((_, bytes)) = last else {
            return Ok(Lookup::NeedsPage {
                page,
                epoch: self.epoch,
            });
        };
        let to = self.named(n, raw_entry(bytes, at))?;
        Ok(to.map_or(Lookup::Absent, Lookup::At))
    }

    /// The cluster that a durable entry names, checked against the file.
    fn named(&self, n: u32, raw: u32) -> Result<Option<HostCluster>> {
        let place = || format!("BAT entry {n} (offset {:#x})", self.header.entry_at(n));
        let to = self
            .header
            .entry_to_cluster(raw)
            .map_err(|e| e.at(place()))?;
        match to {
            Some(c) if c.0 >= self.alloc.end() => Err(Error::damaged(format!(
                "{}: names cluster {}, past the end of the file ({} clusters); see check --repair",
                place(),
                c.0,
                self.alloc.end()
            ))),
            to => Ok(to),
        }
    }

    /// Keeps a page that was read while `epoch` was current; a page read across a pass may be
    /// half old and is refused, to be read again.
    pub(super) fn keep_page(&mut self, page: u32, epoch: u64, bytes: Bytes) {
        static ZEROS: [u8; limits::PAGE as usize] = [0; limits::PAGE as usize];
        if epoch != self.epoch {
            return;
        }
        // Most pages of most layers: they share one.
        let is_zero = bytes.len() == ZEROS.len() && bytes.iter().all(|byte| *byte == 0);
        let bytes = match is_zero {
            true => Bytes::from_static(&ZEROS),
            false => bytes,
        };
        self.pages.put(page, bytes);
    }

    /// Counts passes; see [`Index::keep_page`].
    pub(super) const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether the mapping of `cluster` is durable. After a failed flush nothing counts as that: a
    /// write that is to be durable must find out.
    pub(super) fn is_durable(&self, cluster: VirtCluster) -> bool {
        let settled = |map: &BTreeMap<u32, Entry>| !map.contains_key(&cluster.0);
        settled(&self.pending) && settled(&self.frozen.entries) && !self.ledger.is_poisoned()
    }

    /// Takes a word of the ledger for a mapping to come.
    pub(super) fn take_slot(&mut self) -> Result<usize> {
        self.slots
            .pop()
            .ok_or_else(|| Error::new(Kind::Pending, "the ledger is full"))
    }

    /// Gives an unused word back.
    pub(super) fn return_slot(&mut self, slot: usize) {
        self.slots.push(slot);
    }

    /// Whether anything awaits a pass.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty() || !self.freed.is_empty()
    }

    /// Whether clusters were taken since the last pass began.
    pub(super) fn allocates(&self) -> bool {
        self.pending.values().any(|e| e.to.is_some())
    }

    /// The word that already speaks for this cluster, if any: one word per cluster, always.
    fn slot_of(&self, n: u32) -> Option<usize> {
        self.pending
            .get(&n)
            .or_else(|| self.frozen.entries.get(&n))
            .map(|e| e.slot)
    }

    /// Makes `cluster` point at `to`, in memory and in the ledger; `spare` is a free word.
    pub(super) fn publish(
        &mut self,
        cluster: VirtCluster,
        to: HostCluster,
        spare: usize,
        fresh: bool,
    ) {
        let slot = match self.slot_of(cluster.0) {
            Some(slot) => {
                self.return_slot(spare);
                slot
            }
            None => spare,
        };
        if !planted::is(Bug::LedgerAfterAnswer) {
            self.ledger.put(slot, cluster, to.0);
        }
        self.pending.insert(
            cluster.0,
            Entry {
                to: Some(to),
                slot,
                fresh,
            },
        );
    }

    /// Makes `cluster`, which is at `from`, point at `to`, into which it was copied. What is at `from`
    /// counts until that is durable.
    pub(super) fn relocate(
        &mut self,
        cluster: VirtCluster,
        from: HostCluster,
        to: HostCluster,
        spare: usize,
    ) {
        self.publish(cluster, to, spare, planted::is(Bug::MovedCountsAsFresh));
        if planted::is(Bug::OldPlaceFreeAtOnce) {
            self.alloc.free(&[from.0]);
        } else {
            self.freed.push(from.0);
        }
    }

    /// Drops the mapping of `cluster`, which is at `from`. A dropped mapping needs no data first.
    pub(super) fn drop_mapping(&mut self, cluster: VirtCluster, from: HostCluster) -> Result<()> {
        let slot = match self.slot_of(cluster.0) {
            Some(slot) => slot,
            None => self.take_slot()?,
        };
        self.ledger.put(slot, cluster, 0);
        self.pending.insert(
            cluster.0,
            Entry {
                to: None,
                slot,
                fresh: true,
            },
        );
        if planted::is(Bug::FreeReusableBeforeSync) {
            self.alloc.free(&[from.0]);
        } else {
            self.freed.push(from.0);
        }
        Ok(())
    }

    /// Begins a pass: what is pending now is what it covers, and what a pass that was given up
    /// half-way left behind, if there was one: whether there was.
    pub(super) fn freeze(&mut self) -> bool {
        let given_up = !self.frozen.entries.is_empty();
        self.pass_undone();
        self.frozen = Frozen {
            entries: std::mem::take(&mut self.pending),
            freed: std::mem::take(&mut self.freed),
        };
        given_up
    }

    /// What the running pass covers.
    pub(super) fn frozen(&self) -> &Frozen {
        &self.frozen
    }

    /// Pages that the running pass writes, ascending.
    pub(super) fn frozen_pages(&self) -> Vec<u32> {
        let mut pages: Vec<u32> = self
            .frozen
            .entries
            .keys()
            .map(|n| place(&self.header, *n).0)
            .collect();
        pages.dedup();
        pages
    }

    /// A page that is in memory.
    pub(super) fn page(&mut self, page: u32) -> Option<Bytes> {
        self.pages.get(&page).cloned()
    }

    /// The image of a page with the frozen entries in it, and nothing later.
    pub(super) fn page_image(&self, page: u32, durable: &[u8]) -> Result<Bytes> {
        let mut image: BytesMut = crate::buf::aligned(durable.len());
        image.copy_from_slice(durable);
        let (first, last) = entries_of(page);
        let later =
            planted::is(Bug::LaterEntriesInPageImage).then(|| self.pending.range(first..last));
        let frozen = self.frozen.entries.range(first..last);
        for (n, entry) in frozen.chain(later.into_iter().flatten()) {
            let raw = match entry.to {
                None => 0,
                Some(to) => self
                    .header
                    .cluster_to_entry(to)
                    .ok_or_else(|| Error::invalid("file cluster outside the format"))?,
            };
            let at = place(&self.header, *n).1;
            if let Some(b) = image.get_mut(at..at.saturating_add(4)) {
                b.copy_from_slice(&raw.to_le_bytes());
            }
        }
        Ok(image.freeze())
    }

    /// The pass is durable: its pages are the truth, its words are empty, its frees are free.
    pub(super) fn pass_done(&mut self, images: Vec<(u32, Bytes)>) {
        for (page, bytes) in images {
            self.pages.put(page, bytes);
        }
        let frozen = std::mem::take(&mut self.frozen);
        for (n, entry) in &frozen.entries {
            if self
                .pending
                .get(n)
                .is_none_or(|later| later.slot != entry.slot)
            {
                self.ledger.clear(entry.slot);
                self.slots.push(entry.slot);
            }
        }
        self.alloc.free(&frozen.freed);
        if planted::is(Bug::FreeReusableAtPassEnd) {
            self.alloc.free(&std::mem::take(&mut self.freed));
        }
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// The pass did not end well: everything it covered is pending again.
    pub(super) fn pass_undone(&mut self) {
        let frozen = std::mem::take(&mut self.frozen);
        for (n, entry) in frozen.entries {
            self.pending.entry(n).or_insert(entry);
        }
        self.freed.extend(frozen.freed);
        self.epoch = self.epoch.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ploop::Version;
    use crate::units::ClusterSize;

    #[test]
    fn every_entry_is_in_the_page_that_is_written_for_it() -> Result<()> {
        let cluster = ClusterSize::new(limits::CLUSTER_MIN)?;
        let size = limits::BAT_ENTRIES_MAX.saturating_mul(cluster.bytes());
        let header = Header::new(Version::V2, size, cluster)?;
        let high = 0xFFFF_FFE0..header.entries;
        for n in (0..2100).chain(high) {
            let (page, _) = place(&header, n);
            let (first, last) = entries_of(page);
            assert!(first <= n && n < last, "entry {n:#x}, page {page}");
        }
        Ok(())
    }
}
