//! An open ploop delta: the [`Layer`] over a store.
//!
//! Owns the index, the free clusters and sector 0 of its file. Never holds a lock across I/O.
//! Opening and closing are in `open`, the flush pass in `sync`.

use super::extension::Extension;
use super::header::Header;
use super::index::{Index, Lookup};
use crate::layer::{Below, Extent, Geometry, Layer, Reservation};
use crate::ledger::Ledger;
use crate::limits;
use crate::planted::{self, Bug};
use crate::store::{Space, Store};
use crate::units::{HostCluster, SECTOR, VirtCluster};
use crate::{Error, Kind, Result};
use bytes::BytesMut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of free clusters that are punched for reuse in one step.
const REUSE_STEP: u64 = 64 << 20;
/// The file is extended by an eighth of its size, or by all of it, within these bounds.
const EXTEND_MIN: u64 = 4 << 20;
const EXTEND_MAX: u64 = 256 << 20;

/// The index, shared with outstanding reservations.
pub(super) type Shared = Arc<Mutex<Index>>;

/// Locks the index. A panic elsewhere cannot leave it half changed: no method of it panics.
pub(super) fn lock(shared: &Shared) -> MutexGuard<'_, Index> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open ploop delta.
#[derive(Debug)]
pub struct Ploop<S> {
    pub(super) store: S,
    pub(super) header: Header,
    pub(super) index: Shared,
    /// The index's ledger, to ask for poison without its lock.
    pub(super) ledger: Ledger,
    pub(super) writable: bool,
    /// Features of the format extension that are written again at close.
    pub(super) kept: Extension,
    /// Held while free clusters are being made.
    pub(super) supply: tokio::sync::Mutex<()>,
}

/// The file was extended to `end` clusters, which is not durable yet; nobody else extends it.
pub(super) struct Ahead<'a> {
    pub(super) end: u32,
    _supply: tokio::sync::MutexGuard<'a, ()>,
}

/// A cluster taken for one guest cluster, with its word in the ledger.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its cluster back"]
pub struct Reserved {
    cluster: HostCluster,
    host: u64,
    slot: usize,
    state: State,
    index: Shared,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Untouched,
    Submitted,
    Published,
}

impl Reservation for Reserved {
    fn host(&self) -> u64 {
        self.host
    }

    fn submitted(&mut self) {
        self.state = State::Submitted;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.state == State::Published {
            return;
        }
        let mut index = lock(&self.index);
        index.pending.return_slot(self.slot);
        match self.state {
            _ if planted::is(Bug::ReuseQuarantined) => index.alloc.give_back(self.cluster.0),
            State::Untouched => index.alloc.give_back(self.cluster.0),
            _ => index.alloc.quarantine(self.cluster.0),
        }
    }
}

impl Reserved {
    /// It is published: its cluster, and its word in the ledger.
    pub(super) fn settle(mut self) -> (HostCluster, usize) {
        self.state = State::Published;
        (self.cluster, self.slot)
    }
}

impl<S: Store> Ploop<S> {
    /// The header as it was when the image was opened.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Whether a failed flush or metadata write forbids further success.
    pub fn is_poisoned(&self) -> bool {
        self.ledger.is_poisoned()
    }

    /// Forbids further success, to this process and its successors.
    pub fn poison(&self) {
        self.ledger.poison();
    }

    /// Whether answered changes wait for a sync to become durable.
    pub fn has_pending(&self) -> bool {
        lock(&self.index).pending.awaits_pass()
    }

    /// Fails when the image may not be written: read-only, or poisoned by an earlier failure.
    pub(super) fn may_write(&self) -> Result<()> {
        if !self.writable {
            return Err(Error::new(Kind::ReadOnly, "this delta is open read-only"));
        }
        if self.is_poisoned() {
            return Err(Error::poisoned());
        }
        Ok(())
    }

    /// A table page as it is on disk, padded with zeros past the end of a short file.
    pub(super) async fn read_page(&self, page: u32) -> Result<bytes::Bytes> {
        let at = u64::from(page).saturating_mul(limits::PAGE);
        let len = self.store.info().len.saturating_sub(at).min(limits::PAGE);
        let mut buf = crate::buf::aligned(limits::PAGE as usize);
        if len > 0 {
            let rest = buf.split_off(len as usize);
            buf = self.store.read_at(at, buf).await?;
            buf.unsplit(rest);
        }
        Ok(buf.freeze())
    }

    /// Where `cluster` is; reads the table page when it is not in memory.
    async fn find(&self, cluster: VirtCluster) -> Result<Option<HostCluster>> {
        self.find_run(cluster, 1).await.map(|(host, _)| host)
    }

    /// Where `cluster` is, and how many clusters from it on continue evenly, at most `max`, as far
    /// as table pages in memory tell.
    async fn find_run(&self, cluster: VirtCluster, max: u64) -> Result<(Option<HostCluster>, u64)> {
        loop {
            let (page, epoch) = {
                let mut index = lock(&self.index);
                match index.lookup(cluster)? {
                    Lookup::At(host) => {
                        return Ok((Some(host), index.run(cluster, Some(host), max)));
                    }
                    Lookup::Absent => return Ok((None, index.run(cluster, None, max))),
                    Lookup::NeedsPage { page, epoch } => (page, epoch),
                }
            };
            let bytes = self.read_page(page).await?;
            lock(&self.index).keep_page(page, epoch, bytes);
        }
    }

    /// Sees to it that there is a fresh cluster to take.
    async fn supply(&self) -> Result<()> {
        let _one = self.supply.lock().await;
        if lock(&self.index).alloc.has_fresh() {
            return Ok(());
        }
        self.settle_quarantine().await;
        if self.reuse().await? {
            return Ok(());
        }
        self.extend().await
    }

    /// Makes free clusters ready to be taken, the lowest first: as many as one step does. False when
    /// there are none that could be.
    pub(super) async fn reclaim(&self) -> Result<bool> {
        let _one = self.supply.lock().await;
        self.settle_quarantine().await;
        self.reuse().await
    }

    /// A cluster that was taken, with a word of the ledger.
    pub(super) fn reserved(&self, cluster: u32, slot: usize) -> Reserved {
        Reserved {
            cluster: HostCluster(cluster),
            host: self.header.cluster.start(cluster),
            slot,
            state: State::Untouched,
            index: Arc::clone(&self.index),
        }
    }

    /// Turns clusters with abandoned writes into ordinary free ones.
    async fn settle_quarantine(&self) {
        let waiting = lock(&self.index).alloc.quarantined();
        if !waiting.is_empty() {
            self.store.settle().await;
            lock(&self.index).alloc.release_quarantine(&waiting);
        }
    }

    /// Punches a batch of free clusters and makes that durable; false when there are none.
    async fn reuse(&self) -> Result<bool> {
        let max = self.header.cluster.whole(REUSE_STEP).max(1) as u32;
        let punched = self.punch_free(max).await?;
        let ranges = lock(&self.index).alloc.take_punched();
        if !punched && ranges.is_empty() {
            return Ok(false);
        }
        self.barrier().await?;
        lock(&self.index).alloc.now_fresh(ranges);
        Ok(true)
    }

    /// Gives the space of up to `max` free clusters back to the host: they read as zeros, and are
    /// reusable after a flush. False when there were none.
    pub(super) async fn punch_free(&self, max: u32) -> Result<bool> {
        let ranges = lock(&self.index).alloc.take_dirty(max);
        let size = self.header.cluster;
        for (i, range) in ranges.iter().enumerate() {
            let len = size
                .start(range.end)
                .saturating_sub(size.start(range.start));
            if planted::is(Bug::FreshForReused) {
                lock(&self.index).alloc.now_fresh(range.clone().collect());
                continue;
            }
            if let Err(e) = self
                .store
                .punch(size.start(range.start), len, Space::Free)
                .await
            {
                let left = ranges.iter().skip(i).cloned().flatten();
                lock(&self.index).alloc.dirty_again(left);
                return Err(e);
            }
            lock(&self.index).alloc.punched(range.clone());
        }
        Ok(!ranges.is_empty())
    }

    /// Extends the file by a large durable step, or by the largest that finds space.
    async fn extend(&self) -> Result<()> {
        let end = lock(&self.index).alloc.end();
        let mut step = self.extension(end)?;
        if step == 0 {
            return Err(Error::new(
                Kind::NoSpace,
                "the file has as many clusters as the format can name",
            ));
        }
        loop {
            let new_end = end.saturating_add(step);
            match self.store.set_len(self.header.cluster.start(new_end)).await {
                Ok(()) => {
                    if !planted::is(Bug::FreshWithoutDurableLength) {
                        self.barrier().await?;
                    }
                    lock(&self.index).alloc.extended(new_end);
                    return Ok(());
                }
                Err(e) if e.kind() == Kind::NoSpace && step > 1 => step /= 2,
                Err(e) => return Err(e),
            }
        }
    }

    /// Clusters by which a file of `end` clusters is extended. Where that takes no space it is
    /// doubled: each extension has a barrier that a guest waits for.
    fn extension(&self, end: u32) -> Result<u32> {
        let size = self.header.cluster;
        let len = size.start(end);
        // The step may take space before anybody needs it: never much of what the host has left.
        let most = EXTEND_MAX.min(self.store.room()? / 16).max(EXTEND_MIN);
        let wanted = if self.store.info().fresh_zero {
            len
        } else {
            len / 8
        };
        let least = size.whole(EXTEND_MIN).max(1) as u32;
        let step = size.whole(wanted.min(most)) as u32;
        let step = step.min(self.enough().saturating_sub(end)).max(least);
        Ok(step.min(self.last_cluster().saturating_sub(end)))
    }

    /// The end of a file in which every cluster of the guest has one. More are needed only while
    /// some that were freed cannot be used again yet.
    fn enough(&self) -> u32 {
        self.header.data_start.saturating_add(self.header.entries)
    }

    /// Extends the file when clusters are being taken and run low, to be made durable by a barrier
    /// that comes anyway. `None` when that is not needed, somebody else is at it, or it fails:
    /// whoever needs a cluster finds out.
    async fn extend_ahead(&self) -> Option<Ahead<'_>> {
        let supply = self.supply.try_lock().ok()?;
        let (end, fresh, allocates) = {
            let index = lock(&self.index);
            (
                index.alloc.end(),
                index.alloc.fresh(),
                index.pending.allocates(),
            )
        };
        if !allocates {
            return None;
        }
        let step = self.extension(end).ok()?;
        if end >= self.enough() || fresh >= u64::from(step / 2) {
            return None;
        }
        let end = end.saturating_add(step);
        let extended = self.store.set_len(self.header.cluster.start(end)).await;
        extended.ok().map(|()| Ahead {
            end,
            _supply: supply,
        })
    }

    /// One past the last file cluster that a BAT entry can name.
    pub(super) fn last_cluster(&self) -> u32 {
        match self.header.version {
            super::header::Version::V2 => u32::MAX,
            super::header::Version::V1 => {
                self.header.cluster.whole(limits::V1_SECTORS_MAX * SECTOR) as u32
            }
        }
    }

    /// A flush outside a pass. Its failure is as final as any.
    async fn barrier(&self) -> Result<()> {
        self.store
            .flush()
            .await
            .inspect_err(|_| lock(&self.index).pending.ledger().poison())
    }
}

impl<S: Store> Layer for Ploop<S> {
    type Store = S;
    type Reservation = Reserved;

    fn geometry(&self) -> Geometry {
        self.header.geometry()
    }

    fn store(&self) -> &S {
        &self.store
    }

    async fn map(&self, guest: u64, len: u64) -> Result<Extent> {
        let size = self.header.cluster;
        let within = size.within(guest);
        let cluster = size
            .cluster_of(guest)
            .ok_or_else(|| Error::invalid("offset past the table"))?;
        let max = size.count(within.saturating_add(len));
        let (first, clusters) = self.find_run(VirtCluster(cluster), max).await?;
        let len = clusters
            .saturating_mul(size.bytes())
            .saturating_sub(within)
            .min(len);
        Ok(match first {
            None => Extent::Absent { len },
            Some(host) => Extent::Data {
                at: size.start(host.0).saturating_add(within),
                len,
            },
        })
    }

    async fn unpack(&self, guest: u64, _buf: BytesMut) -> Result<BytesMut> {
        Err(Error::invalid(format!(
            "guest offset {guest:#x}: a ploop delta compresses nothing"
        )))
    }

    fn is_durable(&self, cluster: VirtCluster) -> bool {
        lock(&self.index).pending.is_durable(cluster)
    }

    async fn reserve(&self, _cluster: VirtCluster) -> Result<Reserved> {
        self.may_write()?;
        self.store.room()?;
        let slot = lock(&self.index).pending.take_slot()?;
        loop {
            let taken = lock(&self.index).alloc.take();
            if let Some(cluster) = taken {
                return Ok(self.reserved(cluster, slot));
            }
            if let Err(e) = self.supply().await {
                lock(&self.index).pending.return_slot(slot);
                return Err(e);
            }
        }
    }

    fn publish(&self, cluster: VirtCluster, reserved: Reserved, below: Below) {
        let fresh = below == Below::Zeros && self.store.info().fresh_zero;
        let (to, slot) = reserved.settle();
        lock(&self.index).pending.publish(cluster, to, slot, fresh);
    }

    async fn release(&self, cluster: VirtCluster) -> Result<()> {
        self.may_write()?;
        match self.find(cluster).await? {
            Some(from) => lock(&self.index).drop_mapping(cluster, from),
            None => Ok(()),
        }
    }

    async fn sync(&self) -> Result<()> {
        self.may_write()?;
        let ahead = self.extend_ahead().await;
        self.pass(ahead).await
    }

    async fn close(&self) -> Result<()> {
        self.shut().await
    }
}
