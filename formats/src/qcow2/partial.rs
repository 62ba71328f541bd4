//! Clusters of which the guest has some subclusters only: what is answered and no table says yet. In
//! memory and in the ledger, no I/O.
//!
//! The word of such a cluster stands for the file cluster and not for the guest's: it is put before the
//! mapping that names the file cluster, so that whoever finds the mapping finds the bits, and bits without
//! a mapping say nothing. A mapping without bits is of a whole cluster.

use crate::pending::Pending;
use crate::planted::{self, Bug};
use std::collections::BTreeMap;

/// What is known of one file cluster.
#[derive(Debug, Clone, Copy)]
struct Partial {
    /// Its word in the ledger.
    slot: usize,
    /// Subclusters that are there, the first in the lowest bit.
    taken: u32,
    /// Those that read as zeros for what the durable entry says.
    zero: u32,
    /// What was there when the pass that runs now began.
    frozen: u32,
    /// No mapping names it any more.
    done: bool,
}

impl Partial {
    const fn new(slot: usize, bits: Bits, frozen: u32) -> Self {
        Self {
            slot,
            taken: bits.taken,
            zero: bits.zero,
            frozen,
            done: false,
        }
    }

    /// With these subclusters there.
    const fn bits(&self, taken: u32) -> Bits {
        Bits {
            taken,
            zero: self.zero & !taken,
        }
    }
}

/// Subclusters of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits {
    /// Those that are there.
    pub(super) taken: u32,
    /// Those that read as zeros.
    pub(super) zero: u32,
}

impl Bits {
    /// All of a cluster.
    pub(super) const ALL: Self = Self {
        taken: u32::MAX,
        zero: 0,
    };

    /// Second half of an extended entry.
    pub(super) const fn word(self) -> u64 {
        (self.zero as u64).wrapping_shl(32) | self.taken as u64
    }

    /// What the second half of an extended entry says.
    pub(super) const fn of(word: u64) -> Self {
        Self {
            taken: word as u32,
            zero: word.wrapping_shr(32) as u32,
        }
    }
}

/// The partial clusters of one open image, by their numbers in the file.
#[derive(Debug, Default)]
pub(super) struct Partials {
    known: BTreeMap<u32, Partial>,
    /// What a word of the ledger calls file cluster 0.
    base: u32,
}

impl Partials {
    /// None, in words from `base` on.
    pub(super) const fn new(base: u32) -> Self {
        Self {
            known: BTreeMap::new(),
            base,
        }
    }

    /// Whether the ledger has a name for this file cluster.
    pub(super) const fn has_name(&self, host: u32) -> bool {
        match self.base.checked_add(host) {
            Some(name) => name < u32::MAX,
            None => false,
        }
    }

    /// What is pending of a file cluster; none when nothing is, or all of it.
    pub(super) fn find(&self, host: u32) -> Option<Bits> {
        let partial = self.known.get(&host).filter(|p| !p.done)?;
        Some(partial.bits(partial.taken))
    }

    /// What the pass that runs now writes of a file cluster.
    pub(super) fn frozen(&self, host: u32) -> Bits {
        let known = self.known.get(&host);
        known.map_or(Bits::ALL, |partial| partial.bits(partial.frozen))
    }

    /// Says what is there of a file cluster, before a mapping says that it is the guest's; `spare` is a
    /// free word.
    pub(super) fn put(&mut self, pending: &mut Pending, host: u32, bits: Bits, spare: usize) {
        let known = self.known.get(&host).copied();
        let slot = known.map_or(spare, |known| {
            pending.return_slot(spare);
            known.slot
        });
        if !planted::is(Bug::BitsUnsaid) {
            pending.put_beyond(slot, self.base.saturating_add(host), bits.taken);
        }
        // What a running pass writes goes by what the durable entry says, whatever was taken since.
        let (frozen, was_zero) = known.map_or((0, 0), |known| (known.frozen, known.zero));
        let zero = bits.zero | was_zero;
        self.known
            .insert(host, Partial::new(slot, Bits { zero, ..bits }, frozen));
    }

    /// What a dead predecessor said of a file cluster.
    pub(super) fn inherit(&mut self, host: u32, bits: Bits, slot: usize) {
        self.known.insert(host, Partial::new(slot, bits, 0));
    }

    /// The file cluster that a word is about.
    pub(super) const fn host(&self, name: u32) -> u32 {
        name.saturating_sub(self.base)
    }

    /// No mapping names a file cluster any more.
    pub(super) fn drop_host(&mut self, host: u32) {
        if let Some(partial) = self.known.get_mut(&host) {
            partial.done = true;
        }
    }

    /// A pass begins: it covers what is there now.
    pub(super) fn freeze(&mut self) {
        for partial in self.known.values_mut() {
            partial.frozen = partial.taken;
        }
    }

    /// The pass is durable, and so are the mappings' words: those of clusters of which nothing came later
    /// are emptied, behind them.
    pub(super) fn pass_done(&mut self, pending: &mut Pending) {
        self.known.retain(|_, partial| {
            let stays = !partial.done && partial.frozen != partial.taken;
            if !stays {
                pending.clear_beyond(partial.slot);
            }
            stays
        });
    }
}
