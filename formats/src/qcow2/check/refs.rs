//! References: what the entries of tables name, counted, and entries that name nothing that can be.
//!
//! An entry that breaks a rule still counts for the cluster that its offset is in: what it names
//! must not look free.

use super::super::be::u64_at;
use super::super::refcount::Width;
use super::super::table::{L1Entry, L2Entry, Layout, Mapping, Packed};
use super::areas::Areas;
use super::span::{Piece, Span};
use super::{FindingKind, Survey, progress};
use crate::progress::Watch;
use crate::store::Store;
use crate::{Error, Result};

/// Bits of a refcount table entry that name nothing.
const BLOCK_RESERVED: u64 = 0x1FF;
/// The offset in an entry of a bitmap's table, and its mark of a cluster of ones.
const BITS_OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
const BITS_ONES: u64 = 1;

impl Piece {
    /// Second-level entries that are not 0, and their file offsets.
    pub(super) fn entries(&self, layout: Layout) -> impl Iterator<Item = (u64, L2Entry)> {
        let len = layout.entry_len() as usize;
        let at = (self.at..).step_by(len);
        let entries = self.bytes.chunks_exact(len).map(|bytes| L2Entry {
            word: u64_at(bytes, 0),
            bits: u64_at(bytes, 8),
        });
        at.zip(entries)
            .filter(|(_, entry)| entry.word != 0 || entry.bits != 0)
    }
}

impl<S: Store> Survey<'_, S> {
    /// Counts the areas.
    pub(super) fn count_areas(&mut self, areas: &Areas) {
        let counts = areas.clusters.counts();
        self.single = counts.named();
        self.total.add_all(&counts);
    }

    /// Counts what is named in the areas, and below.
    pub(super) async fn count_refs(&mut self, areas: &Areas, watch: &mut dyn Watch) -> Result<()> {
        self.count_refcount_blocks(watch).await?;
        for (range, times) in areas.bitmaps.stretches() {
            let mut span = Span::new(self.store, range);
            while let Some(piece) = span.next().await? {
                watch.tell(progress("bitmaps", piece.at, self.len))?;
                for (at, word) in piece.words() {
                    self.bitmap_entry(at, word, times);
                }
            }
        }
        self.count_trees(areas.l1.stretches(), watch).await
    }

    /// Counts what first-level tables name, and below, as often as is said.
    pub(super) async fn count_trees(
        &mut self,
        l1: impl Iterator<Item = (std::ops::Range<u64>, u64)>,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        for (range, times) in l1 {
            let mut span = Span::new(self.store, range);
            while let Some(piece) = span.next().await? {
                watch.tell(progress("L1 tables", piece.at, self.len))?;
                for (at, word) in piece.words() {
                    self.l1_entry(at, L1Entry(word), times);
                }
            }
        }
        self.count_tables(watch).await
    }

    async fn count_refcount_blocks(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let hopeless = self.hopeless;
        let mut span = Span::new(self.store, self.refcount_table());
        while let Some(piece) = span.next().await? {
            watch.tell(progress("refcount table", piece.at, self.len))?;
            for (at, word) in piece.words() {
                match self.refcount_block(word) {
                    Ok(Some(cluster)) => {
                        self.single.insert(cluster);
                        self.total.add(cluster, 1);
                    }
                    Ok(None) => self.past_end(at, word),
                    Err(e) => self.bad_entry(at, &e),
                }
            }
        }
        // Blocks can be made anew.
        self.hopeless = hopeless;
        Ok(())
    }

    /// The cluster that an entry of the refcount table names; none when it is not in the file.
    pub(super) fn refcount_block(&self, word: u64) -> Result<Option<u32>> {
        if word & BLOCK_RESERVED != 0 || self.cluster().within(word) != 0 {
            return Err(Error::damaged(format!(
                "refcount table entry {word:#018x} is not the start of a cluster"
            )));
        }
        Ok(self.cluster_in_file(word))
    }

    fn bitmap_entry(&mut self, at: u64, word: u64, times: u64) {
        let offset = word & BITS_OFFSET;
        let marked = word & BITS_ONES != 0 && offset != 0;
        let reserved = word & !(BITS_OFFSET | BITS_ONES) != 0;
        if marked || reserved || self.cluster().within(offset) != 0 {
            let e = Error::damaged(format!("bitmap table entry {word:#018x} breaks a rule"));
            self.bad_entry(at, &e);
        }
        if let Some(cluster) = self.reference(at, offset, times) {
            self.single.insert(cluster);
        }
    }

    /// A table is looked into when its place can be told, whatever else the entry says.
    fn l1_entry(&mut self, at: u64, entry: L1Entry, times: u64) {
        if let Err(e) = entry.table(self.cluster()) {
            self.bad_entry(at, &e);
        }
        let offset = entry.raw_offset();
        if self.cluster().within(offset) != 0 {
            self.reference(at, offset, times);
        } else if let Some(cluster) = self.cluster_in_file(offset) {
            if offset != 0 {
                self.tables.add(cluster, times);
            }
        } else {
            self.past_end(at, offset);
        }
    }

    /// Walks all second-level tables, in the order of the file.
    async fn count_tables(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let tables = std::mem::take(&mut self.tables);
        self.total.add_all(&tables);
        let named = tables.named();
        let size = self.cluster();
        let total = named.len().saturating_mul(size.bytes());
        let mut done = 0u64;
        for table in &named {
            let times = tables.get(table);
            let start = size.start(table);
            let end = start.saturating_add(size.bytes());
            if end > self.len {
                self.find_hopeless(FindingKind::PastEnd, start, || {
                    format!("an L2 table ends at {end:#x}, behind the end of the file")
                });
            }
            let mut span = Span::new(self.store, start..end);
            while let Some(piece) = span.next().await? {
                watch.tell(progress("L2 tables", done, total))?;
                for (at, entry) in piece.entries(self.layout) {
                    self.l2_entry(at, entry, times);
                }
            }
            done = done.saturating_add(size.bytes());
        }
        self.tables = tables;
        Ok(())
    }

    fn l2_entry(&mut self, at: u64, entry: L2Entry, times: u64) {
        match entry.mapping(self.layout, 0) {
            Ok(Mapping::Packed(packed)) => {
                if entry.copied() {
                    self.report.find(FindingKind::Copied, at, || {
                        format!(
                            "L2 entry {:#018x} is compressed and says COPIED",
                            entry.word
                        )
                    });
                }
                self.packed_data(at, packed, times);
                return;
            }
            Ok(_) => {}
            Err(e) => self.bad_entry(at, &e),
        }
        // Data in an external file has no refcount.
        let Some(offset) = entry.raw_offset().filter(|_| !self.layout.external) else {
            return;
        };
        if let Some(cluster) = self.reference(at, offset, times) {
            self.plain.insert(cluster);
        }
    }

    /// Every cluster that compressed data touches is named once.
    fn packed_data(&mut self, at: u64, packed: Packed, times: u64) {
        let size = self.cluster();
        let first = size.whole(packed.at);
        let end = size.count(packed.at.saturating_add(packed.len));
        if end > self.clusters {
            self.past_end(at, packed.at);
        }
        for cluster in first..end.min(self.clusters) {
            if let Ok(cluster) = u32::try_from(cluster) {
                self.packed.insert(cluster);
                self.total.add(cluster, times);
            }
        }
    }

    /// Counts an entry that names `offset`, if that is not 0; gives the cluster.
    fn reference(&mut self, at: u64, offset: u64, times: u64) -> Option<u32> {
        if offset == 0 {
            return None;
        }
        let cluster = self.cluster_in_file(offset);
        match cluster {
            Some(cluster) => self.total.add(cluster, times),
            None => self.past_end(at, offset),
        }
        cluster
    }

    fn past_end(&mut self, at: u64, offset: u64) {
        let len = self.len;
        self.find_hopeless(FindingKind::PastEnd, at, || {
            format!("names {offset:#x}, behind the end of the file ({len} bytes)")
        });
    }

    fn bad_entry(&mut self, at: u64, e: &Error) {
        self.find_hopeless(FindingKind::BadEntry, at, || e.to_string());
    }

    /// The bytes of the refcount table.
    pub(super) fn refcount_table(&self) -> std::ops::Range<u64> {
        let table = self.header.refcounts;
        let len = u64::from(table.clusters).saturating_mul(self.cluster().bytes());
        table.at..table.at.saturating_add(len)
    }

    /// The width of a stored refcount.
    pub(super) const fn width(&self) -> Width {
        self.header.refcounts.width
    }
}
