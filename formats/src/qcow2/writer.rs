//! What an image that is open for writing knows beyond its file: what is pending, which clusters can
//! be taken, which ones hold metadata, and which tables are about to be put in. No I/O here.

use super::alloc::Alloc;
use super::blocks::Blocks;
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

/// The part that requests share.
#[derive(Debug)]
pub(super) struct State {
    pub(super) pending: Pending,
    pub(super) alloc: Alloc,
    /// Clusters of metadata: guest data is never written there.
    pub(super) metadata: RoaringBitmap,
    /// New second-level tables, by their numbers.
    pub(super) tables: BTreeMap<u32, NewTable>,
}

/// The state, shared with outstanding reservations.
pub(super) type Shared = Arc<Mutex<State>>;

/// Locks the state. A panic elsewhere cannot leave it half changed: no method of it panics.
pub(super) fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
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
    /// Clusters of the file that the guest cluster had.
    pub(super) old: Vec<u32>,
    pub(super) fate: Fate,
    pub(super) state: Shared,
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
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.fate == Fate::Published {
            return;
        }
        let mut state = lock(&self.state);
        state.pending.return_slot(self.slot);
        match self.fate {
            _ if planted::is(Bug::ReuseQuarantined) => state.alloc.give_back(self.cluster.0),
            Fate::Untouched => state.alloc.give_back(self.cluster.0),
            _ => state
                .alloc
                .quarantine(&RoaringBitmap::from([self.cluster.0])),
        }
    }
}
