//! Recount: the stored refcounts of a closed image, made to say what was counted.
//!
//! Owns the refcount table and its blocks while nobody else uses the image. Clusters are taken at the
//! end of the file, never inside: what looks free there may be what a crash left. Blocks that are
//! missing, or that cannot be what they should be, are made anew there, and a table where the old one
//! is too small or has another use. Never writes to a cluster that is named twice.
//!
//! The ordering of [`Recount::raise`]: the length, refcounts that go up, and new blocks, which nobody
//! names; barrier; then their names, by the old table or by the header; barrier. Cut anywhere, a
//! refcount is at worst too high, and the file too long.

use super::super::header::{Header, KNOWN_AUTOCLEAR, Refcounts, write_header};
use super::super::words::{Appender, read_unit, refuse_blocks, unit, write_unit, write_words};
use super::span::Span;
use super::{CLUSTERS_MAX, Survey, progress};
use crate::progress::Watch;
use crate::store::{Space, Store};
use crate::units::{ClusterSize, floor_to};
use crate::update::Update;
use crate::{Error, Result, limits};
use roaring::RoaringBitmap;

/// A survey whose counts are to be stored.
pub(in super::super) struct Recount<'s, S> {
    pub(super) survey: Survey<'s, S>,
    /// Clusters with a count.
    named: RoaringBitmap,
    /// Clusters of the file when it was surveyed.
    old_clusters: u64,
    /// The clusters of the refcount blocks; 0 where there is none.
    blocks: Vec<u32>,
    /// Entries of the table that are to be written.
    changed: RoaringBitmap,
    /// The table is where something else is.
    misplaced: bool,
}

/// Which refcounts are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Those that are too low.
    Raise,
    /// All that differ.
    Set,
}

/// What was changed.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Changed {
    /// Refcounts.
    pub(super) counts: u64,
    /// Of those, the clusters that are free now.
    pub(super) freed: u64,
    /// Entries of the refcount table.
    pub(super) blocks: u64,
    /// The table has a new place.
    pub(super) table: bool,
}

impl<'s, S: Store> Recount<'s, S> {
    /// Finds the blocks that can be used. `Unsupported` for a store that the format does not fit.
    pub(super) async fn new(survey: Survey<'s, S>) -> Result<Self> {
        refuse_blocks(survey.store, survey.cluster())?;
        let table = survey.refcount_table();
        let mut found = Self {
            named: survey.total.named(),
            old_clusters: survey.clusters,
            blocks: Vec::new(),
            changed: RoaringBitmap::new(),
            misplaced: survey.is_shared(&table),
            survey,
        };
        let mut span = Span::new(found.survey.store, table.clone());
        while let Some(piece) = span.next().await? {
            for (at, word) in piece.words() {
                let index = (at.saturating_sub(table.start) / 8) as u32;
                let block = found.survey.refcount_block(word).ok().flatten();
                match block.filter(|block| found.is_whole(*block)) {
                    Some(block) => found.put(index, block),
                    None => {
                        found.put(index, 0);
                        found.changed.insert(index);
                    }
                }
            }
        }
        Ok(found)
    }

    /// Whether a cluster is all in the file, and has one use.
    fn is_whole(&self, cluster: u32) -> bool {
        let end = self.cluster().start(cluster);
        let end = end.saturating_add(self.cluster().bytes());
        end <= self.survey.len && self.survey.total.get(cluster) == 1
    }

    /// The header, with what was changed.
    pub(in super::super) const fn header(&self) -> &Header {
        &self.survey.header
    }

    pub(in super::super) const fn store(&self) -> &'s S {
        self.survey.store
    }

    const fn cluster(&self) -> ClusterSize {
        self.survey.cluster()
    }

    /// How often the cluster of the file that holds byte `at` is named.
    pub(in super::super) fn times(&self, at: u64) -> u64 {
        let cluster = self.survey.cluster_in_file(at);
        cluster.map_or(0, |cluster| self.survey.total.get(cluster))
    }

    /// Changes the header, durably.
    pub(in super::super) async fn change_header(
        &mut self,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        change(&mut self.survey.header);
        self.survey.header.features.autoclear &= KNOWN_AUTOCLEAR;
        write_header(self.store(), &self.survey.header).await
    }

    /// Clusters of a stretch that one block tells of.
    const fn per_block(&self) -> u64 {
        self.survey.width().per_block(self.cluster().bytes())
    }

    fn put(&mut self, index: u32, block: u32) {
        let index = index as usize;
        if self.blocks.len() <= index {
            self.blocks.resize(index.saturating_add(1), 0);
        }
        if let Some(slot) = self.blocks.get_mut(index) {
            *slot = block;
        }
    }

    /// Whether a count is more than a refcount can say.
    pub(in super::super) fn is_above(&self) -> bool {
        self.survey.total.reaches(self.survey.width().bits())
    }

    /// Counts what the first-level table in the bytes `l1` names, and below, once more.
    pub(in super::super) async fn add_tree(
        &mut self,
        l1: std::ops::Range<u64>,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let mut tree = Survey::new(self.store(), self.survey.header.clone())?;
        tree.count_trees(std::iter::once((l1, 1)), watch).await?;
        self.survey.total.add_all(&tree.total);
        self.named |= tree.total.named();
        Ok(())
    }

    /// Takes `count` clusters in a row behind the end of the file, each named once: the file offset
    /// of the first. The file grows when counts are raised.
    pub(in super::super) fn take(&mut self, count: u64) -> Result<u64> {
        let first = self.survey.clusters;
        let end = first.saturating_add(count);
        if end > CLUSTERS_MAX {
            return Err(Error::unsupported(format!(
                "a file of {end} clusters, more than 2^32"
            )));
        }
        for cluster in first..end {
            self.survey.total.add(cluster as u32, 1);
            self.named.insert(cluster as u32);
        }
        self.survey.clusters = end;
        Ok(first.saturating_mul(self.cluster().bytes()))
    }

    /// Gives a block to every stretch of clusters that has counts and none.
    fn add_blocks(&mut self) -> Result<()> {
        let (per, max) = (self.per_block().max(1), limits::QCOW2_REFTABLE_MAX / 8);
        let mut from = Some(0u32);
        // New clusters are behind all others, so no stretch that was passed gets one.
        while let Some(cluster) = from.and_then(|from| self.named.range(from..).next()) {
            let index = u64::from(cluster).checked_div(per).unwrap_or(0);
            if index >= max {
                return Err(Error::unsupported(format!(
                    "cluster {cluster} is behind what refcounts of {} bits can tell of",
                    self.survey.width().bits()
                )));
            }
            let index = index as u32;
            if self
                .blocks
                .get(index as usize)
                .is_none_or(|block| *block == 0)
            {
                let block = self.cluster().whole(self.take(1)?) as u32;
                self.put(index, block);
                self.changed.insert(index);
            }
            let next = u64::from(index).saturating_add(1).saturating_mul(per);
            from = u32::try_from(next).ok();
        }
        Ok(())
    }

    /// A new table, where the old one cannot be used.
    fn add_table(&mut self) -> Result<Option<Refcounts>> {
        let old = self.survey.header.refcounts;
        let size = self.cluster();
        let needed = |blocks: &Vec<u32>| size.count((blocks.len() as u64).saturating_mul(8));
        let count = needed(&self.blocks);
        if !self.misplaced && count <= u64::from(old.clusters) {
            return Ok(None);
        }
        // Half as much again, which is far more than the blocks of the table itself need.
        let clusters = count.saturating_add(count / 2).saturating_add(1);
        let clusters = clusters.min(size.whole(limits::QCOW2_REFTABLE_MAX));
        let at = self.take(clusters)?;
        self.add_blocks()?;
        if needed(&self.blocks) > clusters {
            return Err(Error::unsupported(
                "more refcount blocks than a table of 8 MiB can name",
            ));
        }
        Ok(Some(Refcounts {
            at,
            clusters: clusters as u32,
            width: old.width,
        }))
    }

    /// Raises what is stored to what was counted. `growth_max`: bytes by which the file may grow for
    /// it, or none where nothing may be put behind its end; then only the blocks that are there are
    /// written. `Invalid` before any change when it is too much. Durable when it returns.
    pub(in super::super) async fn raise(
        &mut self,
        growth_max: Option<u64>,
        watch: &mut dyn Watch,
    ) -> Result<Changed> {
        let mut table = None;
        if let Some(max) = growth_max {
            self.add_blocks()?;
            table = self.add_table()?;
            self.refuse_growth(max)?;
        }
        self.clear_unknown().await?;
        let longer = self.survey.clusters > self.old_clusters;
        if longer {
            let end = self.survey.clusters.saturating_mul(self.cluster().bytes());
            self.store().lengthen(end).await?;
            self.survey.len = end;
        }
        let mut changed = self.pass(How::Raise, watch).await?;
        if let Some(table) = table {
            self.write_table(table).await?;
        }
        if longer || changed.counts > 0 {
            Update::new().barrier().apply(self.store()).await?;
        }
        if growth_max.is_some() {
            changed.blocks = self.changed.len();
            changed.table = table.is_some();
            self.name_blocks(table).await?;
        }
        Ok(changed)
    }

    /// Takes away the marks that everybody takes away who writes and does not know them.
    async fn clear_unknown(&mut self) -> Result<()> {
        let features = &mut self.survey.header.features;
        if features.autoclear & !KNOWN_AUTOCLEAR == 0 {
            return Ok(());
        }
        features.autoclear &= KNOWN_AUTOCLEAR;
        write_header(self.store(), &self.survey.header).await
    }

    fn refuse_growth(&self, max: u64) -> Result<()> {
        let more = self.survey.clusters.saturating_sub(self.old_clusters);
        let growth = more.saturating_mul(self.cluster().bytes());
        if growth <= max {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "nothing was changed: refcounts need {growth} more bytes of the file, and {max} are allowed"
        )))
    }

    /// Writes a new table, which nobody names yet.
    async fn write_table(&self, table: Refcounts) -> Result<()> {
        let mut out = Appender::new(self.store(), self.cluster(), table.at);
        for block in &self.blocks {
            out.push(&self.cluster().start(*block).to_be_bytes())
                .await?;
        }
        out.finish().await
    }

    /// Names the new blocks, by the old table or by a new one.
    async fn name_blocks(&mut self, table: Option<Refcounts>) -> Result<()> {
        let old = self.survey.header.refcounts.at;
        let changed = std::mem::take(&mut self.changed);
        if let Some(table) = table {
            self.survey.header.refcounts = table;
            self.misplaced = false;
            return write_header(self.store(), &self.survey.header).await;
        }
        if changed.is_empty() {
            return Ok(());
        }
        let word = |index: u32| {
            let block = self.blocks.get(index as usize).copied().unwrap_or(0);
            let at = old.saturating_add(u64::from(index).saturating_mul(8));
            (at, self.cluster().start(block))
        };
        let words: Vec<(u64, u64)> = changed.iter().map(word).collect();
        write_words(self.store(), self.cluster(), &words).await?;
        Update::new().barrier().apply(self.store()).await
    }

    /// Stores what was counted, and cuts off what nobody names at the end of the file. Counts have
    /// been raised before. Durable when it returns.
    pub(super) async fn lower(&mut self, watch: &mut dyn Watch) -> Result<Changed> {
        let changed = self.pass(How::Set, watch).await?;
        if changed.counts > 0 {
            Update::new().barrier().apply(self.store()).await?;
        }
        let clusters = self
            .named
            .max()
            .map_or(0, |last| u64::from(last).saturating_add(1));
        let end = clusters.saturating_mul(self.cluster().bytes());
        if self.store().info().len > end {
            Update::new().len(end).barrier().apply(self.store()).await?;
        }
        Ok(changed)
    }

    /// Gives the host the space of clusters back that nobody names, from cluster `first` on.
    pub(super) async fn punch_unnamed(&self, first: u32) -> Result<()> {
        let mut at = first;
        for used in self.named.range(first..) {
            if used > at {
                let (start, end) = (self.cluster().start(at), self.cluster().start(used));
                let len = end.saturating_sub(start);
                self.store().punch(start, len, Space::Free).await?;
            }
            at = used.saturating_add(1);
        }
        Ok(())
    }

    /// Goes through all blocks.
    async fn pass(&self, how: How, watch: &mut dyn Watch) -> Result<Changed> {
        let mut all = Changed::default();
        for (index, block) in (0u64..).zip(&self.blocks) {
            let first = index.saturating_mul(self.per_block());
            let (Ok(first), true) = (u32::try_from(first), *block != 0) else {
                continue;
            };
            let done = u64::from(first).min(self.survey.clusters);
            watch.tell(progress("storing refcounts", done, self.survey.clusters))?;
            self.pass_block(how, *block, first, &mut all).await?;
        }
        Ok(all)
    }

    /// The block in cluster `block`, whose first refcount is that of cluster `first`. Its holes are
    /// left alone where nothing is counted.
    async fn pass_block(&self, how: How, block: u32, first: u32, all: &mut Changed) -> Result<()> {
        let (start, unit) = (self.cluster().start(block), unit(self.cluster()));
        let end = start.saturating_add(self.cluster().bytes());
        let end = end.min(self.store().info().len);
        let width = self.survey.width();
        let per = width.per_block(unit);
        let mut at = start;
        while at < end {
            let (data, until) = self.store().extent(at).await?;
            let stop = floor_to(until, unit).min(end);
            let n = at.saturating_sub(start).checked_div(unit).unwrap_or(0);
            let from = u64::from(first).saturating_add(n.saturating_mul(per));
            let Ok(from) = u32::try_from(from) else {
                return Ok(());
            };
            if !data && stop > at {
                match self.next_unit(from, at, stop) {
                    Some(next) if next > at => {
                        at = next;
                        continue;
                    }
                    Some(_) => {}
                    None => {
                        at = stop;
                        continue;
                    }
                }
            }
            self.pass_unit(how, at, from, all).await?;
            at = at.saturating_add(unit);
        }
        Ok(())
    }

    /// The next unit from `at` on, and before `stop`, of which a cluster is counted; the first
    /// refcount at `at` is that of cluster `from`.
    fn next_unit(&self, from: u32, at: u64, stop: u64) -> Option<u64> {
        let unit = unit(self.cluster());
        let per = self.survey.width().per_block(unit).max(1);
        let next = self.named.range(from..).next()?;
        let units = u64::from(next.saturating_sub(from)).checked_div(per)?;
        let next = at.saturating_add(units.saturating_mul(unit));
        (next < stop).then_some(next)
    }

    /// The refcounts in the unit at `at`, from that of cluster `first` on.
    async fn pass_unit(&self, how: How, at: u64, first: u32, all: &mut Changed) -> Result<()> {
        let (unit, width) = (unit(self.cluster()), self.survey.width());
        let mut bytes = read_unit(self.store(), at, unit).await?;
        let mut counts = vec![0; width.per_block(unit) as usize];
        self.survey.total.fill(first, &mut counts);
        let before = all.counts;
        for (n, counted) in counts.iter().enumerate() {
            let stored = width.get(&bytes, n).unwrap_or(0);
            let counted = (*counted).min(width.max());
            if stored == counted || (how == How::Raise && stored > counted) {
                continue;
            }
            width.set(&mut bytes, n, counted)?;
            all.counts = all.counts.saturating_add(1);
            all.freed = all.freed.saturating_add(u64::from(counted == 0));
        }
        match all.counts > before {
            true => write_unit(self.store(), at, bytes).await,
            false => Ok(()),
        }
    }
}
