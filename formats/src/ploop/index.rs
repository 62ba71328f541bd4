//! The index of an open image in memory: durable table pages and what is not durable yet.
//!
//! A lookup asks, in this order: *pending* entries (answered, not durable), *frozen* entries (being
//! written by the pass that runs now), and durable table pages, which are read on demand and may be
//! forgotten at any time. Page images for the disk are built from durable plus frozen entries only,
//! so that an entry published during a pass is not made durable before its data.
//!
//! Pending and frozen entries are in [`crate::pending`]. No I/O here.

use super::alloc::Alloc;
use super::header::{HEADER_LEN, Header};
use crate::ledger::Ledger;
use crate::limits;
use crate::pending::{Pending, To};
use crate::planted::{self, Bug};
use crate::units::{HostCluster, VirtCluster};
use crate::{Error, Result};
use bytes::{Bytes, BytesMut};
use lru::LruCache;
use std::num::NonZeroUsize;

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

/// The index of one open image.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) header: Header,
    pub(super) alloc: Alloc,
    pub(super) pending: Pending,
    pages: LruCache<u32, Bytes>,
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
        let pages = NonZeroUsize::new(limits::PAGES_CACHED).unwrap_or(NonZeroUsize::MIN);
        Self {
            header,
            alloc,
            pending: Pending::new(ledger),
            pages: LruCache::new(pages),
            epoch: 0,
        }
    }

    /// Where `cluster` is, as the guest must see it.
    pub(super) fn lookup(&mut self, cluster: VirtCluster) -> Result<Lookup> {
        let n = cluster.0;
        if n >= self.header.entries {
            return Ok(Lookup::Absent);
        }
        if let Some(to) = self.pending.find(n) {
            return Ok(to.host().map_or(Lookup::Absent, Lookup::At));
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
        let quiet = self.pending.is_quiet();
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

    /// Makes `cluster`, which is at `from`, point at `to`, into which it was copied. What is at `from`
    /// counts until that is durable.
    pub(super) fn relocate(
        &mut self,
        cluster: VirtCluster,
        from: HostCluster,
        to: HostCluster,
        spare: usize,
    ) {
        let fresh = planted::is(Bug::MovedCountsAsFresh);
        self.pending.publish(cluster, to, spare, fresh);
        if planted::is(Bug::OldPlaceFreeAtOnce) {
            self.alloc.free(&[from.0]);
        } else {
            self.pending.free_later(from.0);
        }
    }

    /// Drops the mapping of `cluster`, which is at `from`.
    pub(super) fn drop_mapping(&mut self, cluster: VirtCluster, from: HostCluster) -> Result<()> {
        self.pending.unmap(cluster, To::Nowhere)?;
        if planted::is(Bug::FreeReusableBeforeSync) {
            self.alloc.free(&[from.0]);
        } else {
            self.pending.free_later(from.0);
        }
        Ok(())
    }

    /// Begins a pass: whether an earlier one was given up half-way.
    pub(super) fn freeze(&mut self) -> bool {
        self.epoch = self.epoch.wrapping_add(1);
        self.pending.freeze()
    }

    /// Pages that the running pass writes, ascending.
    pub(super) fn frozen_pages(&self) -> Vec<u32> {
        let frozen = self.pending.frozen();
        let mut pages: Vec<u32> = frozen.map(|n| place(&self.header, n).0).collect();
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
        for (n, to) in self.pending.frozen_in(first..last) {
            let raw = match to.host() {
                None => 0,
                Some(to) => self
                    .header
                    .cluster_to_entry(to)
                    .ok_or_else(|| Error::invalid("file cluster outside the format"))?,
            };
            let at = place(&self.header, n).1;
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
        let freed = self.pending.pass_done();
        self.alloc.free(&freed);
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// The pass did not end well: everything it covered is pending again.
    pub(super) fn pass_undone(&mut self) {
        self.pending.pass_undone();
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
