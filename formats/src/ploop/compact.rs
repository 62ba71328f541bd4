//! Compact: guest clusters of an open delta get places further down in its file, so that its end
//! can be cut off.
//!
//! A cluster that moves is one that is written anew, over what it had. In order:
//!
//! 1. [`Ploop::reserve_below`]: a free cluster that durably reads as zeros, low enough.
//! 2. The caller, who has the guest's cluster to himself, copies what is there.
//! 3. [`Ploop::relocate`]: the ledger's word, and the entry in memory. It is never fresh: what the old
//!    place holds was perhaps flushed, so the copy is durable before the table names it.
//! 4. A flush pass makes the entry durable. Until that is over the old place keeps its content, because
//!    after a power cut it is the one that counts. Then it is a free one like any.
//!
//! So a cut finds each cluster in its old place or in its new one, with what was flushed, and a
//! worker's successor finds it in its new one. Nothing is noted down: whoever goes on counts again.

use super::header::HEADER_LEN;
use super::image::{Ploop, Reserved, lock};
use super::index::raw_entry;
use super::open::SCAN_STEP;
use crate::limits;
use crate::store::Store;
use crate::units::{HostCluster, VirtCluster, floor_to};
use crate::{Error, Result};

/// How an image would be packed, by what it has at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// One past the last file cluster, were there no free ones before it.
    pub end: HostCluster,
    /// Clusters in use from there on: as many free ones are before it.
    pub misplaced: u64,
}

impl<S: Store> Ploop<S> {
    /// How it would be packed. Clusters that a guest is about to take or to free count as used.
    pub fn packing(&self) -> Packing {
        let (end, misplaced) = lock(&self.index).alloc.packing();
        let end = HostCluster(end);
        Packing { end, misplaced }
    }

    /// Takes a free file cluster below `limit` that reads as zeros, as [`crate::layer::Layer::reserve`]
    /// does; `None` when there is none that can be used before the next sync.
    pub async fn reserve_below(&self, limit: HostCluster) -> Result<Option<Reserved>> {
        self.may_write()?;
        self.store.room()?;
        let slot = lock(&self.index).pending.take_slot()?;
        let taken = self.take_below(limit.0).await;
        match taken {
            Ok(Some(cluster)) => Ok(Some(self.reserved(cluster, slot))),
            Ok(None) => {
                lock(&self.index).pending.return_slot(slot);
                Ok(None)
            }
            Err(e) => {
                lock(&self.index).pending.return_slot(slot);
                Err(e)
            }
        }
    }

    async fn take_below(&self, limit: u32) -> Result<Option<u32>> {
        loop {
            {
                let mut index = lock(&self.index);
                if let Some(cluster) = index.alloc.take_below(limit) {
                    return Ok(Some(cluster));
                }
                if !index.alloc.could_take_below(limit) {
                    return Ok(None);
                }
            }
            if !self.reclaim().await? {
                return Ok(None);
            }
        }
    }

    /// Makes `cluster`, which is at file offset `from`, point at the reserved cluster, into which its
    /// content was copied successfully. Returns once a later `map` sees it and a successor process
    /// would, too. The old place is used again only after a sync. The caller has the cluster to
    /// himself and has asked where it is since.
    pub fn relocate(&self, cluster: VirtCluster, from: u64, reserved: Reserved) -> Result<()> {
        let from = self.header.cluster.cluster_of(from).map(HostCluster);
        let from = from.filter(|from| from.0 >= self.header.data_start);
        let from = from.ok_or_else(|| Error::invalid("a place outside the data"))?;
        let (to, slot) = reserved.settle();
        lock(&self.index).relocate(cluster, from, to, slot);
        Ok(())
    }

    /// Guest clusters that the table on disk has at `limit` or behind it, and where to look
    /// further, from entry `from` on; `None` at the end. One step, of bounded length and memory.
    /// What changes meanwhile may be missed, or be elsewhere by now; what makes no sense is left to
    /// [`crate::layer::Layer::map`].
    pub async fn placed_from(
        &self,
        from: VirtCluster,
        limit: HostCluster,
    ) -> Result<(Vec<VirtCluster>, Option<VirtCluster>)> {
        let header = &self.header;
        let end = header.entry_at(header.entries).min(self.store.info().len);
        let first = header.entry_at(from.0);
        let at = floor_to(first, limits::PAGE);
        if first >= end {
            return Ok((Vec::new(), None));
        }
        let (data, until) = self.store.extent(at).await?;
        let hole_end = floor_to(until, limits::PAGE);
        let len = self.store.info().len.saturating_sub(at);
        let step = floor_to(SCAN_STEP.min(len), limits::PAGE);
        let (found, next) = match (!data && hole_end > at, step) {
            (true, _) => (Vec::new(), hole_end),
            (false, 0) => return Ok((Vec::new(), None)),
            (false, step) => {
                let bytes = self.store.read_at(at, crate::buf::aligned(step as usize));
                let found = self.beyond(at, &bytes.await?, from, limit);
                (found, at.saturating_add(step))
            }
        };
        let next = (next < end)
            .then(|| u32::try_from(next.saturating_sub(HEADER_LEN) / 4).ok())
            .flatten();
        Ok((found, next.map(VirtCluster)))
    }

    /// Entries from `from` on, in table bytes read from `at`, that name `limit` or more.
    fn beyond(
        &self,
        at: u64,
        bytes: &[u8],
        from: VirtCluster,
        limit: HostCluster,
    ) -> Vec<VirtCluster> {
        let header = &self.header;
        let skip = if at == 0 { HEADER_LEN } else { 0 };
        let entries = (skip..bytes.len() as u64).step_by(4);
        entries
            .filter_map(|byte| {
                let n = at.saturating_add(byte).saturating_sub(HEADER_LEN) / 4;
                let n = u32::try_from(n).ok().filter(|n| *n < header.entries)?;
                let to = header.entry_to_cluster(raw_entry(bytes, byte as usize));
                let beyond = matches!(to, Ok(Some(to)) if to >= limit);
                (beyond && n >= from.0).then_some(VirtCluster(n))
            })
            .collect()
    }
}
