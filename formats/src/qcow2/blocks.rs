//! Refcounts of an open image: where their blocks are, what they say, and how they change.
//!
//! The refcount table is in memory, the blocks are read and written in slices. Who changes a refcount
//! holds the [`Blocks`], across I/O: a slice is read, changed and written by one at a time. The order
//! among writes is the business of the caller. Source: QEMU `docs/interop/qcow2.rst`, "Host cluster
//! management".

use super::be::u64_at;
use super::image::Qcow2;
use super::open::read_padded;
use super::refcount::Width;
use super::supply::Plan;
use crate::store::Store;
use crate::units::{ClusterSize, floor_to};
use crate::{Error, Result, limits};
use bytes::{Bytes, BytesMut};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

/// Where the refcounts of a file are.
#[derive(Debug)]
pub(super) struct Blocks {
    /// File offset of the table, and its clusters.
    pub(super) at: u64,
    pub(super) clusters: u32,
    /// File offsets of the blocks, 0 where there is none; none behind the last.
    table: Vec<u64>,
    width: Width,
    cluster: ClusterSize,
    /// Bytes of a slice.
    unit: u64,
    /// Slices that are being changed, or whose writing failed, as they were before: what the disk has of
    /// them is not known, and is not what the next change goes out from.
    before: BTreeMap<u64, Bytes>,
    /// An extension of the file that is durable but for what names its blocks or its table.
    pub(super) unnamed: Option<Plan>,
}

/// How refcounts change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// From 0 to 1.
    Take,
    /// One less.
    Drop,
}

/// Slices of metadata to be written, by their file offsets.
pub(super) type Images = BTreeMap<u64, BytesMut>;

impl Blocks {
    /// Reads the table, 8 MiB at most. Refuses blocks that are no clusters of the file, which has
    /// `end`.
    pub(super) async fn read<S: Store>(image: &Qcow2<S>, end: u32) -> Result<Self> {
        let header = image.header();
        let (cluster, refcounts) = (header.cluster, header.refcounts);
        let mut blocks = Self {
            at: refcounts.at,
            clusters: refcounts.clusters,
            table: Vec::new(),
            width: refcounts.width,
            cluster,
            unit: cluster.bytes().min(limits::PAGE),
            before: BTreeMap::new(),
            unnamed: None,
        };
        let len = blocks.entries().saturating_mul(8);
        let rest = image.metadata().info().len.saturating_sub(refcounts.at);
        let bytes = read_padded(image.metadata(), refcounts.at, len.min(rest)).await?;
        blocks.table = bytes.chunks_exact(8).map(|b| u64_at(b, 0)).collect();
        let used = blocks.table.iter().rposition(|at| *at != 0);
        blocks
            .table
            .truncate(used.map_or(0, |last| last.saturating_add(1)));
        for (n, at) in blocks.table.iter().enumerate() {
            let inside = cluster.cluster_of(*at).is_some_and(|n| n < end);
            if cluster.within(*at) != 0 || !inside {
                return Err(Error::damaged(format!(
                    "refcount table entry {n} names a block at {at:#x}, which is no cluster of the file"
                )));
            }
        }
        Ok(blocks)
    }

    /// Clusters that one block tells of.
    pub(super) fn per_block(&self) -> u64 {
        self.width.per_block(self.cluster.bytes()).max(1)
    }

    /// Entries that the table has room for.
    pub(super) fn entries(&self) -> u64 {
        u64::from(self.clusters)
            .saturating_mul(self.cluster.bytes())
            .wrapping_shr(3)
    }

    /// The clusters of the blocks.
    pub(super) fn places(&self) -> impl Iterator<Item = u32> + '_ {
        let there = self.table.iter().filter(|at| **at != 0);
        there.filter_map(|at| self.cluster.cluster_of(*at))
    }

    /// The block that tells of `cluster`, by its number.
    pub(super) fn block_of(&self, cluster: u32) -> u64 {
        u64::from(cluster)
            .checked_div(self.per_block())
            .unwrap_or(0)
    }

    /// File offset of block `n`, if it is there.
    pub(super) fn block(&self, n: u64) -> Option<u64> {
        let at = usize::try_from(n).ok().and_then(|n| self.table.get(n));
        at.copied().filter(|at| *at != 0)
    }

    /// Block `n` is at `at`.
    pub(super) fn set_block(&mut self, n: u64, at: u64) {
        let n = n as usize;
        if self.table.len() <= n {
            self.table.resize(n.saturating_add(1), 0);
        }
        if let Some(entry) = self.table.get_mut(n) {
            *entry = at;
        }
    }

    /// The table as it is on disk, but for the zeros behind the last block.
    pub(super) fn encode(&self) -> Vec<u8> {
        self.table.iter().flat_map(|at| at.to_be_bytes()).collect()
    }

    /// Clusters that a slice of a block tells of.
    fn per_slice(&self) -> u64 {
        self.width.per_block(self.unit).max(1)
    }

    /// The slice that tells of `cluster`, by its file offset, and the number in it; none where there
    /// is no block.
    fn place(&self, cluster: u32) -> Option<(u64, usize)> {
        let block = self.block(self.block_of(cluster))?;
        let n = u64::from(cluster)
            .checked_rem(self.per_block())
            .unwrap_or(0);
        let slice = n.checked_div(self.per_slice()).unwrap_or(0);
        let within = n.checked_rem(self.per_slice()).unwrap_or(0);
        let at = block.saturating_add(slice.saturating_mul(self.unit));
        Some((at, within as usize))
    }

    /// The clusters from `cluster` on that the same slice tells of.
    pub(super) fn slice_from(&self, cluster: u32) -> Range<u32> {
        let per = self.per_slice();
        let n = u64::from(cluster).checked_div(per).unwrap_or(0);
        let end = n.saturating_add(1).saturating_mul(per);
        cluster..u32::try_from(end).unwrap_or(u32::MAX)
    }

    /// These slices were written.
    pub(super) fn written(&mut self, images: &[(u64, Bytes)]) {
        for (at, _) in images {
            self.before.remove(at);
        }
    }

    /// A new block, whole, in which all refcounts are 0, in slices.
    pub(super) fn fresh_block(&self, at: u64, images: &mut Images) {
        let slices = self.cluster.bytes().checked_div(self.unit).unwrap_or(1);
        for n in 0..slices {
            let slice = at.saturating_add(n.saturating_mul(self.unit));
            images.insert(slice, crate::buf::aligned(self.unit as usize));
        }
    }
}

impl<S: Store> Qcow2<S> {
    /// Sees to it that the slice which holds `at` is among the images, as it is on disk.
    pub(super) async fn image_of(&self, at: u64, images: &mut Images) -> Result<()> {
        let slice = floor_to(at, self.slice_len());
        if let Entry::Vacant(place) = images.entry(slice) {
            place.insert(self.copy_of(slice).await?);
        }
        Ok(())
    }

    /// A slice as it is on disk, to be changed.
    pub(super) async fn copy_of(&self, slice: u64) -> Result<BytesMut> {
        let old = self.slice(slice).await?;
        let mut copy = crate::buf::aligned(old.len());
        copy.copy_from_slice(&old);
        Ok(copy)
    }

    /// Of the clusters in `range`, all of one slice, those whose refcounts are 0. Where there is no
    /// block, none is known to be.
    pub(super) async fn uncounted(
        &self,
        blocks: &Blocks,
        range: Range<u32>,
    ) -> Result<RoaringBitmap> {
        let mut free = RoaringBitmap::new();
        let Some((at, first)) = blocks.place(range.start) else {
            return Ok(free);
        };
        let slice = self.counts(blocks, at).await?;
        for (n, cluster) in range.enumerate() {
            if blocks.width.get(&slice, first.saturating_add(n)) == Some(0) {
                free.insert(cluster);
            }
        }
        Ok(free)
    }

    /// A slice of a refcount block.
    async fn counts(&self, blocks: &Blocks, at: u64) -> Result<Bytes> {
        match blocks.before.get(&at) {
            Some(slice) => Ok(slice.clone()),
            None => self.slice(at).await,
        }
    }

    /// Changes the refcounts of `clusters` in `images`; those that become 0. `Damaged`, and some of the
    /// images are changed, when a refcount is not what it must be before.
    pub(super) async fn count(
        &self,
        blocks: &mut Blocks,
        clusters: impl IntoIterator<Item = u32>,
        change: Change,
        images: &mut Images,
    ) -> Result<RoaringBitmap> {
        let mut zero = RoaringBitmap::new();
        for cluster in clusters {
            let (at, n) = blocks.place(cluster).ok_or_else(|| wrong(cluster, 0))?;
            let image = match images.entry(at) {
                Entry::Occupied(image) => image.into_mut(),
                Entry::Vacant(place) => {
                    let slice = self.counts(blocks, at).await?;
                    let mut image = crate::buf::aligned(slice.len());
                    image.copy_from_slice(&slice);
                    blocks.before.insert(at, slice);
                    place.insert(image)
                }
            };
            let was = blocks.width.get(image, n).unwrap_or(0);
            let is = match (change, was) {
                (Change::Take, 0) => 1,
                (Change::Drop, 1..) => was.saturating_sub(1),
                _ => return Err(wrong(cluster, was)),
            };
            blocks.width.set(image, n, is)?;
            if is == 0 {
                zero.insert(cluster);
            }
        }
        Ok(zero)
    }
}

/// The bytes of images, in order.
pub(super) fn frozen(images: Images) -> Vec<(u64, Bytes)> {
    let all = images.into_iter();
    all.map(|(at, image)| (at, image.freeze())).collect()
}

/// Puts bytes at a file offset into the image of their slice.
pub(super) fn put(images: &mut Images, unit: u64, at: u64, bytes: &[u8]) {
    let slice = floor_to(at, unit);
    let within = at.saturating_sub(slice) as usize;
    let to = images.get_mut(&slice).and_then(|i| i.get_mut(within..));
    if let Some(to) = to {
        to.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }
}

fn wrong(cluster: u32, count: u64) -> Error {
    Error::damaged(format!(
        "cluster {cluster} of the file has refcount {count}, which contradicts its use: detach the disk \
         and run check --repair"
    ))
}
