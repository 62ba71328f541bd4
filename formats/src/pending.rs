//! Pending mappings: what a guest was answered and no table on disk says yet. In memory and in the
//! ledger, no I/O.
//!
//! An entry is *pending* (answered, not durable), then *frozen* (being written by the pass that runs
//! now), then durable and not here any more. Every entry also stands in the ledger, written before the
//! guest is answered. Entries are built into tables from the frozen ones only, so that one that is
//! published during a pass is not made durable before its data.

use crate::ledger::Ledger;
use crate::planted::{self, Bug};
use crate::units::{HostCluster, VirtCluster};
use crate::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::ops::Range;

/// Where a guest cluster will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    /// In a cluster of the file.
    At(HostCluster),
    /// Nowhere: what is below is seen.
    Nowhere,
    /// Nowhere, and it reads as zeros, whatever is below. Only of formats that can say so.
    Zeros,
}

impl To {
    /// The cluster of the file.
    pub(crate) const fn host(self) -> Option<HostCluster> {
        match self {
            Self::At(host) => Some(host),
            Self::Nowhere | Self::Zeros => None,
        }
    }

    /// As a word of the ledger says it.
    const fn number(self) -> u32 {
        match self {
            Self::At(host) => host.0,
            Self::Nowhere => 0,
            Self::Zeros => Ledger::ZEROS,
        }
    }

    const fn of(number: u32) -> Self {
        match number {
            0 => Self::Nowhere,
            Ledger::ZEROS => Self::Zeros,
            n => Self::At(HostCluster(n)),
        }
    }
}

/// A mapping that is not durable yet.
#[derive(Debug, Clone, Copy)]
struct Entry {
    to: To,
    /// Its word in the ledger.
    slot: usize,
    /// Losing the cluster's data in a crash would show what was there before: no barrier needed.
    fresh: bool,
}

/// What one pass writes.
#[derive(Debug, Default)]
struct Frozen {
    entries: BTreeMap<u32, Entry>,
    freed: Vec<u32>,
}

/// The pending mappings of one open image.
#[derive(Debug)]
pub(crate) struct Pending {
    ledger: Ledger,
    later: BTreeMap<u32, Entry>,
    frozen: Frozen,
    freed: Vec<u32>,
    slots: Vec<usize>,
}

impl Pending {
    /// Those of `ledger`, left by a dead predecessor.
    pub(crate) fn new(ledger: Ledger) -> Self {
        let mut later = BTreeMap::new();
        let mut used = vec![false; ledger.slots()];
        for (slot, cluster, to) in ledger.entries() {
            let entry = Entry {
                to: To::of(to),
                slot,
                fresh: false,
            };
            later.insert(cluster.0, entry);
            if let Some(mark) = used.get_mut(slot) {
                *mark = true;
            }
        }
        let free = used.iter().enumerate().rev().filter(|(_, used)| !**used);
        let slots = free.map(|(slot, _)| slot).collect();
        Self {
            ledger,
            later,
            frozen: Frozen::default(),
            freed: Vec::new(),
            slots,
        }
    }

    /// Words of a dead predecessor that name no cluster of a guest, which has `clusters`, but something
    /// else that was promised: number, what it says, and slot of each. They are the caller's from now on.
    pub(crate) fn take_beyond(&mut self, clusters: u32) -> Vec<(u32, u32, usize)> {
        let beyond = self.later.split_off(&clusters);
        let all = beyond.into_iter();
        all.map(|(n, entry)| (n, entry.to.number(), entry.slot))
            .collect()
    }

    /// Says in a word that was taken something that is not about a cluster of a guest.
    pub(crate) fn put_beyond(&self, slot: usize, n: u32, says: u32) {
        self.ledger.put(slot, VirtCluster(n), says);
    }

    /// Empties such a word.
    pub(crate) fn clear_beyond(&mut self, slot: usize) {
        self.ledger.clear(slot);
        self.slots.push(slot);
    }

    /// The ledger behind them.
    pub(crate) const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn entry(&self, n: u32) -> Option<&Entry> {
        self.later.get(&n).or_else(|| self.frozen.entries.get(&n))
    }

    /// Where cluster `n` will be if that is pending.
    pub(crate) fn find(&self, n: u32) -> Option<To> {
        self.entry(n).map(|entry| entry.to)
    }

    /// The clusters of guests that are pending.
    pub(crate) fn clusters(&self) -> impl Iterator<Item = u32> + '_ {
        self.later.keys().chain(self.frozen.entries.keys()).copied()
    }

    /// The next cluster from `n` on that is pending.
    pub(crate) fn next_from(&self, n: u32) -> Option<u32> {
        let first = |map: &BTreeMap<u32, Entry>| map.range(n..).next().map(|(n, _)| *n);
        let both = [first(&self.later), first(&self.frozen.entries)];
        both.into_iter().flatten().min()
    }

    /// Whether no mapping at all is pending.
    pub(crate) fn is_quiet(&self) -> bool {
        self.later.is_empty() && self.frozen.entries.is_empty()
    }

    /// Whether the mapping of `cluster` is durable. After a failed flush nothing counts as that: a
    /// write that is to be durable must find out.
    pub(crate) fn is_durable(&self, cluster: VirtCluster) -> bool {
        self.entry(cluster.0).is_none() && !self.ledger.is_poisoned()
    }

    /// Whether anything awaits a pass.
    pub(crate) fn awaits_pass(&self) -> bool {
        !self.later.is_empty() || !self.freed.is_empty()
    }

    /// Whether clusters were taken since the last pass began.
    pub(crate) fn allocates(&self) -> bool {
        self.later.values().any(|e| e.to.host().is_some())
    }

    /// Takes a word of the ledger for a mapping to come. `Pending` when there is none.
    pub(crate) fn take_slot(&mut self) -> Result<usize> {
        self.slots
            .pop()
            .ok_or_else(|| Error::new(Kind::Pending, "the ledger is full"))
    }

    /// Gives an unused word back.
    pub(crate) fn return_slot(&mut self, slot: usize) {
        self.slots.push(slot);
    }

    /// The word that already speaks for this cluster, if any: one word per cluster, always.
    fn slot_of(&self, n: u32) -> Option<usize> {
        self.entry(n).map(|e| e.slot)
    }

    /// Makes `cluster` point at `to`, in memory and in the ledger; `spare` is a free word.
    pub(crate) fn publish(
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
        let to = To::At(to);
        self.later.insert(cluster.0, Entry { to, slot, fresh });
    }

    /// Takes the mapping of `cluster` away: `to` is no place. Such a mapping needs no data first.
    /// `Pending` when there is no word for it.
    pub(crate) fn unmap(&mut self, cluster: VirtCluster, to: To) -> Result<()> {
        let slot = match self.slot_of(cluster.0) {
            Some(slot) => slot,
            None => self.take_slot()?,
        };
        self.ledger.put(slot, cluster, to.number());
        let fresh = true;
        self.later.insert(cluster.0, Entry { to, slot, fresh });
        Ok(())
    }

    /// A file cluster is free once the next pass is durable.
    pub(crate) fn free_later(&mut self, cluster: u32) {
        self.freed.push(cluster);
    }

    /// Begins a pass: what is pending now is what it covers, and what a pass that was given up
    /// half-way left behind, if there was one: whether there was.
    pub(crate) fn freeze(&mut self) -> bool {
        let given_up = !self.frozen.entries.is_empty();
        self.pass_undone();
        self.frozen = Frozen {
            entries: std::mem::take(&mut self.later),
            freed: std::mem::take(&mut self.freed),
        };
        given_up
    }

    /// What the running pass frees, which it then does not.
    pub(crate) fn take_freed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.frozen.freed)
    }

    /// Whether data must be durable before what is frozen is written.
    pub(crate) fn needs_data_first(&self) -> bool {
        self.frozen.entries.values().any(|e| !e.fresh)
    }

    /// The clusters whose mappings the running pass writes, ascending.
    pub(crate) fn frozen(&self) -> impl Iterator<Item = u32> + '_ {
        self.frozen.entries.keys().copied()
    }

    /// What the running pass writes for the clusters in a range, and nothing later.
    pub(crate) fn frozen_in(&self, range: Range<u32>) -> impl Iterator<Item = (u32, To)> + '_ {
        let later =
            planted::is(Bug::LaterEntriesInPageImage).then(|| self.later.range(range.clone()));
        let frozen = self.frozen.entries.range(range);
        let all = frozen.chain(later.into_iter().flatten());
        all.map(|(n, entry)| (*n, entry.to))
    }

    /// The pass is durable: its words are empty. Gives what it freed.
    pub(crate) fn pass_done(&mut self) -> Vec<u32> {
        let frozen = std::mem::take(&mut self.frozen);
        for (n, entry) in &frozen.entries {
            let later = self.later.get(n);
            if later.is_none_or(|later| later.slot != entry.slot) {
                self.ledger.clear(entry.slot);
                self.slots.push(entry.slot);
            }
        }
        let mut freed = frozen.freed;
        if planted::is(Bug::FreeReusableAtPassEnd) {
            freed.append(&mut self.freed);
        }
        freed
    }

    /// The pass did not end well: everything it covered is pending again.
    pub(crate) fn pass_undone(&mut self) {
        let frozen = std::mem::take(&mut self.frozen);
        for (n, entry) in frozen.entries {
            self.later.entry(n).or_insert(entry);
        }
        self.freed.extend(frozen.freed);
    }
}
