//! Stored refcounts against counted references, and clusters that have two uses.
//!
//! Goes through the clusters of the file in order. Where there is no refcount block, and in the holes
//! of one, the stored refcounts are 0. A block that is named twice is read once: what the second
//! name says of its clusters is damage that has been told, and no refcount.

use super::span::{Piece, Span};
use super::{FindingKind, Survey, progress};
use crate::progress::Watch;
use crate::store::Store;
use crate::{Result, limits};
use roaring::RoaringBitmap;

/// How far the comparison is.
struct Compared {
    /// The first cluster that was not compared.
    next: u64,
    /// Clusters that somebody names.
    named: RoaringBitmap,
    /// Blocks that were read.
    blocks: RoaringBitmap,
    /// Room for the counts of a step.
    counts: Vec<u64>,
}

impl<S: Store> Survey<'_, S> {
    /// Compares, and finds leaks and refcounts that are too low.
    pub(super) async fn look_at_refcounts(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let table = self.refcount_table();
        let per_block = self.width().per_block(self.cluster().bytes());
        let mut compared = Compared {
            next: 0,
            named: self.total.named(),
            blocks: RoaringBitmap::new(),
            counts: Vec::new(),
        };
        self.report.used_clusters = compared.named.len();
        let mut span = Span::new(self.store, table.clone());
        while let Some(piece) = span.next().await? {
            for (at, word) in piece.words() {
                let first = (at.saturating_sub(table.start) / 8).saturating_mul(per_block);
                if first >= self.clusters {
                    break;
                }
                let done = first.saturating_mul(self.cluster().bytes());
                watch.tell(progress("refcounts", done, self.len))?;
                self.without_refcount(&mut compared, first);
                match self.refcount_block(word) {
                    Ok(Some(block)) if compared.blocks.insert(block) => {
                        self.compare_block(&mut compared, block, first).await?;
                        let end = first.saturating_add(per_block);
                        self.without_refcount(&mut compared, end);
                    }
                    // Told already; its refcounts are not known.
                    _ => compared.next = first.saturating_add(per_block),
                }
            }
        }
        self.without_refcount(&mut compared, self.clusters);
        Ok(())
    }

    /// The clusters up to `end` have a refcount of 0.
    fn without_refcount(&mut self, compared: &mut Compared, end: u64) {
        let end = end.min(self.clusters);
        let first = u32::try_from(compared.next).ok();
        let last = end.checked_sub(1).and_then(|last| u32::try_from(last).ok());
        if let (Some(first), Some(last)) = (first, last.filter(|_| compared.next < end)) {
            for cluster in compared.named.range(first..=last) {
                self.compare(cluster, 0, self.total.get(cluster));
            }
        }
        compared.next = compared.next.max(end);
    }

    /// Compares what a block says, whose first refcount is that of cluster `first`.
    async fn compare_block(
        &mut self,
        compared: &mut Compared,
        block: u32,
        first: u64,
    ) -> Result<()> {
        let (size, width) = (self.cluster(), self.width());
        let start = size.start(block);
        let mut span = Span::new(self.store, start..start.saturating_add(size.bytes()));
        while let Some(Piece { at, bytes }) = span.next().await? {
            let from = width.per_block(at.saturating_sub(start));
            let mut cluster = first.saturating_add(from);
            for step in bytes.chunks(limits::PAGE as usize) {
                self.without_refcount(compared, cluster);
                self.compare_step(compared, step);
                cluster = cluster.saturating_add(width.per_block(step.len() as u64));
            }
        }
        Ok(())
    }

    /// Compares the refcounts in `step`, of the clusters that come next.
    fn compare_step(&mut self, compared: &mut Compared, step: &[u8]) {
        let width = self.width();
        let rest = self.clusters.saturating_sub(compared.next);
        let count = width.per_block(step.len() as u64).min(rest);
        let Ok(first) = u32::try_from(compared.next) else {
            return;
        };
        compared.counts.resize(count as usize, 0);
        self.total.fill(first, &mut compared.counts);
        for (n, counted) in compared.counts.iter().enumerate() {
            let stored = width.get(step, n).unwrap_or(0);
            if stored != *counted {
                self.compare(first.saturating_add(n as u32), stored, *counted);
            }
        }
        compared.next = compared.next.saturating_add(count);
    }

    fn compare(&mut self, cluster: u32, stored: u64, counted: u64) {
        let (at, bytes) = (self.cluster().start(cluster), self.cluster().bytes());
        let text =
            || format!("cluster {cluster} has refcount {stored}, and is named {counted} times");
        if stored < counted {
            self.report.find(FindingKind::RefcountLow, at, text);
        } else if stored > counted {
            self.report.find(FindingKind::Leak, at, text);
            if counted == 0 {
                self.report.leaked_bytes = self.report.leaked_bytes.saturating_add(bytes);
            } else {
                self.too_high.insert(cluster);
            }
        }
    }

    /// Finds clusters that cannot have all the uses that they have.
    pub(super) fn look_at_overlaps(&mut self) {
        let mut found = &self.plain & &self.packed;
        found.extend(self.single.iter().filter(|n| self.total.get(*n) != 1));
        let tables = self.tables.named();
        let shared = |n: &u32| self.total.get(*n) != self.tables.get(*n);
        found.extend(tables.iter().filter(shared));
        self.overlaps = found.len();
        for cluster in &found {
            let uses = [
                (self.single.contains(cluster), "metadata"),
                (tables.contains(cluster), "an L2 table"),
                (self.plain.contains(cluster), "guest data"),
                (self.packed.contains(cluster), "compressed data"),
            ];
            let names: Vec<&str> = uses.iter().filter(|u| u.0).map(|u| u.1).collect();
            let times = self.total.get(cluster);
            self.report.find(
                FindingKind::Overlap,
                self.header.cluster.start(cluster),
                || {
                    format!(
                        "cluster {cluster} is named {times} times: {}",
                        names.join(", ")
                    )
                },
            );
        }
    }
}
