//! What an image that is open for writing knows beyond its file: what is pending, which clusters can
//! be taken, which ones hold metadata, and which tables are about to be put in. No I/O here.

use super::alloc::Alloc;
use super::blocks::Blocks;
use super::partial::{Bits, Partials};
use super::table::SUBCLUSTERS;
use crate::layer::Reservation;
use crate::ledger::Ledger;
use crate::pending::Pending;
use crate::planted::{self, Bug};
use crate::units::HostCluster;
use crate::{Error, Result};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A second-level table that no first-level entry names yet: where it will be, and what it takes the
/// place of. It has a word in the ledger, whose number is its own behind those of the guest's clusters: a
/// successor that finds a full host needs no other.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewTable {
    /// File cluster; it reads as zeros until it is written.
    pub(super) host: u32,
    /// File offset of the table that others have, too, and of which this one is a copy.
    pub(super) old: Option<u64>,
    /// Its word in the ledger.
    pub(super) slot: usize,
    /// It was written, and a pass began to name it: whether it is named is not known.
    pub(super) tried: bool,
}

impl NewTable {
    /// One of which nothing was written.
    pub(super) const fn new(host: u32, old: Option<u64>, slot: usize) -> Self {
        Self {
            host,
            old,
            slot,
            tried: false,
        }
    }
}

/// The part that requests share.
#[derive(Debug)]
pub(super) struct State {
    pub(super) pending: Pending,
    pub(super) alloc: Alloc,
    /// Clusters of metadata: guest data is never written there.
    pub(super) metadata: RoaringBitmap,
    /// New second-level tables, by their numbers.
    pub(super) tables: BTreeMap<u32, NewTable>,
    /// Clusters that are there in part.
    pub(super) partial: Partials,
    /// Clusters in use to which a write was given up.
    pub(super) strays: RoaringBitmap,
    /// Places that guest clusters had, and that others still read by older tables: each keeps its bytes to the
    /// end.
    pub(super) left: Vec<u32>,
}

/// The state, shared with outstanding reservations.
pub(super) type Shared = Arc<Mutex<State>>;

/// Locks the state. A panic elsewhere cannot leave it half changed: no method of it panics.
pub(super) fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Table `index` will be at a new place.
    pub(super) fn add_table(&mut self, index: u32, new: NewTable) {
        self.metadata.insert(new.host);
        self.tables.insert(index, new);
    }

    /// A file cluster has no mapping any more, and is free once that is durable.
    pub(super) fn give_up(&mut self, cluster: u32) {
        self.partial.drop_host(cluster);
        self.pending.free_later(cluster);
    }

    /// A file cluster has no mapping any more, but others may still read it.
    pub(super) fn leave(&mut self, cluster: u32) {
        self.partial.drop_host(cluster);
        self.left.push(cluster);
    }

    /// Refuses clusters that hold metadata: what names them as data is wrong.
    pub(super) fn refuse_metadata(&self, clusters: RangeInclusive<u32>) -> Result<()> {
        let (first, last) = (*clusters.start(), *clusters.end());
        match self.metadata.range_cardinality(clusters) {
            0 => Ok(()),
            _ => Err(Error::damaged(format!(
                "clusters {first} to {last} of the file, which hold metadata, are named as guest data: \
                 detach the disk and run check"
            ))),
        }
    }
}

/// An image's writing half.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) state: Shared,
    /// To ask for poison without the lock of the state.
    pub(super) ledger: Ledger,
    /// Held while refcounts change and fresh clusters are made.
    pub(super) blocks: tokio::sync::Mutex<Blocks>,
}

/// A cluster taken for one guest cluster, with its word in the ledger.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its cluster back"]
pub struct Reserved {
    pub(super) cluster: HostCluster,
    pub(super) host: u64,
    pub(super) slot: usize,
    /// What of it is there, where that may be a part.
    pub(super) part: Option<Part>,
    /// Whether it is another one than the guest cluster has.
    pub(super) is_new: bool,
    /// Clusters of the file that the guest cluster had.
    pub(super) old: Vec<u32>,
    /// Whether others go on reading those.
    pub(super) leaves: bool,
    pub(super) fate: Fate,
    pub(super) state: Shared,
}

/// The subclusters of a reserved cluster.
#[derive(Debug)]
pub(super) struct Part {
    /// A word of the ledger for them.
    pub(super) slot: usize,
    pub(super) bits: Bits,
    /// Bytes of one; none when the cluster is filled as a whole.
    pub(super) piece: Option<u64>,
}

impl Reserved {
    /// Says that others have older tables, and go on reading what the guest cluster had. That is not written to
    /// or cut off as long as the image is open; it is counted as free when the image is closed. Without a close
    /// it is leaked.
    pub fn leave_old(&mut self) {
        self.leaves = !planted::is(Bug::LeftPlaceFree);
    }

    /// Says which subclusters are there, unless all of a new cluster are.
    pub(super) fn put_bits(&self, state: &mut State) {
        let Some(part) = &self.part else { return };
        let State {
            pending, partial, ..
        } = state;
        if self.is_new && part.bits == Bits::ALL {
            pending.return_slot(part.slot);
        } else {
            partial.put(pending, self.cluster.0, part.bits, part.slot);
        }
    }
}

/// What became of a reservation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Untouched,
    Submitted,
    Published,
}

impl Reservation for Reserved {
    fn host(&self) -> u64 {
        self.host
    }

    fn submitted(&mut self) {
        self.fate = Fate::Submitted;
    }

    fn piece(&self) -> Option<u64> {
        self.part.as_ref().and_then(|part| part.piece)
    }

    fn is_new(&self) -> bool {
        self.is_new
    }

    fn filled(&mut self, from: u64, to: u64) {
        let Some((part, piece)) = self.part.as_mut().and_then(|p| p.piece.map(|n| (p, n))) else {
            return;
        };
        for n in 0..SUBCLUSTERS {
            let at = piece.saturating_mul(u64::from(n));
            if (from..to).contains(&at) {
                part.bits.taken |= 1u32.wrapping_shl(n);
            }
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.fate == Fate::Published {
            return;
        }
        let mut state = lock(&self.state);
        state.pending.return_slot(self.slot);
        if let Some(part) = &self.part {
            state.pending.return_slot(part.slot);
        }
        match self.fate {
            Fate::Submitted if !self.is_new => {
                state.strays.insert(self.cluster.0);
            }
            _ if !self.is_new => {}
            _ if planted::is(Bug::ReuseQuarantined) => state.alloc.give_back(self.cluster.0),
            Fate::Untouched => state.alloc.give_back(self.cluster.0),
            _ => state
                .alloc
                .quarantine(&RoaringBitmap::from([self.cluster.0])),
        }
    }
}
