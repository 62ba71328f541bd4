//! Fresh clusters: free ones made ready, or new ones at the end of the file.
//!
//! What is handed out has refcount 1 and reads as zeros, both durably: so a mapping that is published
//! later needs no barrier for its refcount. After a crash what was ready and not used is leaked, at
//! most [`STEP`] bytes a time; a close gives it back. The ordering:
//!
//! - Free clusters: punched, refcounts written, barrier.
//! - New ones: length, new refcount blocks and what changes in the old ones, and a larger refcount table
//!   where it is wanted; barrier; then what names them, an entry of the table or the header; barrier.

use super::blocks::{Blocks, Change, Images, frozen, put};
use super::header::Header;
use super::image::Qcow2;
use super::writer::{Writer, lock};
use crate::limits;
use crate::planted::{self, Bug};
use crate::store::{Space, Store};
use crate::units::ClusterSize;
use crate::update::Update;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use roaring::RoaringBitmap;

/// Bytes of clusters that are made ready at once at most, and clusters.
const STEP: u64 = 16 << 20;
const STEP_CLUSTERS: u64 = 256;
/// Slices of refcounts that are looked at for free clusters before the file is extended.
const SCAN_STEPS: usize = 16;
/// How far behind the end of the file refcounts are looked at that say that clusters are in use.
const BEHIND_MAX: u32 = 64;

/// What an extension of the file will be.
#[derive(Debug)]
pub(super) struct Plan {
    /// The first new cluster, and one past the last.
    start: u32,
    end: u32,
    /// Numbers of refcount blocks that are wanted: they come first.
    blocks: Vec<u64>,
    /// Clusters of a larger refcount table, which comes behind them; 0 when the old one does.
    table: u32,
}

impl Plan {
    /// The refcount blocks: their numbers, and where they are.
    fn places(&self, size: ClusterSize) -> impl Iterator<Item = (u64, u64)> + '_ {
        let at = (self.start..).map(move |cluster| size.start(cluster));
        self.blocks.iter().copied().zip(at)
    }

    /// The first cluster of the refcount table.
    fn table_at(&self) -> u32 {
        self.start.saturating_add(self.blocks.len() as u32)
    }

    /// The first cluster that can be handed out.
    fn fresh(&self) -> u32 {
        self.table_at().saturating_add(self.table)
    }
}

impl<S: Store> Qcow2<S> {
    /// Clusters that are made ready at once.
    fn step(&self) -> u32 {
        let clusters = self.header().cluster.whole(STEP);
        clusters.clamp(1, STEP_CLUSTERS) as u32
    }

    /// A fresh cluster.
    pub(super) async fn take(&self, writer: &Writer) -> Result<u32> {
        self.metadata().room()?;
        loop {
            if let Some(cluster) = lock(&writer.state).alloc.take() {
                return Ok(cluster);
            }
            let supplied = self.supply(writer).await;
            self.unless_final(supplied)?;
        }
    }

    /// Poisons the image when what failed must not be tried again.
    pub(super) fn unless_final<T>(&self, done: Result<T>) -> Result<T> {
        done.inspect_err(|e| {
            if !matches!(e.kind(), Kind::NoSpace | Kind::Pending) {
                self.poison();
            }
        })
    }

    /// Sees to it that there is a fresh cluster.
    async fn supply(&self, writer: &Writer) -> Result<()> {
        let mut blocks = writer.blocks.lock().await;
        if lock(&writer.state).alloc.has_fresh() {
            return Ok(());
        }
        self.settle_quarantine(writer, &mut blocks).await?;
        if blocks.unnamed.is_some() {
            return self.name(writer, &mut blocks).await;
        }
        for _ in 0..SCAN_STEPS {
            if self.reuse(writer, &mut blocks).await? {
                return Ok(());
            }
            if !self.scan(writer, &blocks).await? {
                break;
            }
        }
        self.extend(writer, &mut blocks).await
    }

    /// Frees clusters with abandoned writes, which cannot land any more.
    async fn settle_quarantine(&self, writer: &Writer, blocks: &mut Blocks) -> Result<()> {
        let waiting = lock(&writer.state).alloc.take_quarantined();
        if waiting.is_empty() {
            return Ok(());
        }
        self.metadata().settle().await;
        let lowered = self.lower(writer, blocks, &waiting).await;
        lowered.inspect_err(|_| lock(&writer.state).alloc.quarantine(&waiting))
    }

    /// Looks at the next slice of refcounts; false when all were looked at.
    async fn scan(&self, writer: &Writer, blocks: &Blocks) -> Result<bool> {
        let (from, end) = {
            let state = lock(&writer.state);
            match state.alloc.unscanned() {
                Some(from) => (from, state.alloc.end()),
                None => return Ok(false),
            }
        };
        let slice = blocks.slice_from(from);
        let range = slice.start..slice.end.min(end);
        let free = self.uncounted(blocks, range.clone()).await?;
        let mut state = lock(&writer.state);
        if !free.is_disjoint(&state.metadata) {
            return Err(Error::damaged(
                "metadata has refcount 0: detach the disk and run check --repair",
            ));
        }
        state.alloc.scan(range, &free);
        Ok(true)
    }

    /// Makes a batch of free clusters fresh; false when there are none.
    async fn reuse(&self, writer: &Writer, blocks: &mut Blocks) -> Result<bool> {
        let taken = lock(&writer.state).alloc.take_free(self.step());
        if taken.is_empty() {
            return Ok(false);
        }
        let done = self.make_fresh(blocks, &taken).await;
        let mut state = lock(&writer.state);
        match &done {
            Ok(()) => state.alloc.now_fresh(&taken),
            Err(_) => state.alloc.free(&taken),
        }
        done.map(|()| true)
    }

    async fn make_fresh(&self, blocks: &mut Blocks, clusters: &RoaringBitmap) -> Result<()> {
        if !planted::is(Bug::FreshForReused) {
            self.punch(clusters).await?;
        }
        let mut images = Images::new();
        self.count(blocks, clusters, Change::Take, &mut images)
            .await?;
        let barrier = !planted::is(Bug::CountAfterUse);
        self.apply(blocks, Update::new(), images, barrier).await
    }

    /// Punches clusters.
    async fn punch(&self, clusters: &RoaringBitmap) -> Result<()> {
        let size = self.header().cluster;
        let mut ranges = clusters.iter();
        while let Some(range) = ranges.next_range() {
            let (first, last) = (*range.start(), *range.end());
            let end = size.start(last).saturating_add(size.bytes());
            let len = end.saturating_sub(size.start(first));
            let store = self.metadata();
            store.punch(size.start(first), len, Space::Free).await?;
        }
        Ok(())
    }

    /// Applies an update and writes images behind it, then a barrier if that is asked for. The images
    /// are the truth from then on.
    pub(super) async fn apply(
        &self,
        blocks: &mut Blocks,
        update: Update,
        images: Images,
        barrier: bool,
    ) -> Result<()> {
        let images = frozen(images);
        let mut update = images
            .iter()
            .fold(update, |update, (at, data)| update.write(*at, data.clone()));
        if barrier {
            update = update.barrier();
        }
        update.apply(self.metadata()).await?;
        blocks.written(&images);
        self.keep(images);
        Ok(())
    }

    /// Clusters lose a user; those that have none any more are free, and their space goes back to the
    /// host where it can. What named them is gone durably.
    pub(super) async fn lower(
        &self,
        writer: &Writer,
        blocks: &mut Blocks,
        clusters: impl IntoIterator<Item = u32>,
    ) -> Result<()> {
        let mut images = Images::new();
        let counted = self.count(blocks, clusters, Change::Drop, &mut images);
        let free = counted.await?;
        self.apply(blocks, Update::new(), images, false).await?;
        if self.metadata().info().punches {
            // Best effort: a free cluster that keeps its space is free.
            let _ = self.punch(&free).await;
        }
        let mut state = lock(&writer.state);
        let tables = &state.metadata & &free;
        state.metadata -= &free;
        // What they held is not what the next one finds who has them.
        self.forget_clusters(&tables);
        state.alloc.free(&free);
        Ok(())
    }

    /// Forgets the slices of clusters.
    fn forget_clusters(&self, clusters: &RoaringBitmap) {
        let size = self.header().cluster;
        for cluster in clusters {
            let start = size.start(cluster);
            let end = start.saturating_add(size.bytes());
            self.forget((start..end).step_by(self.slice_len() as usize));
        }
    }

    /// Extends the file by a step, or by the largest that finds space.
    async fn extend(&self, writer: &Writer, blocks: &mut Blocks) -> Result<()> {
        let mut step = self.step();
        loop {
            let plan = self.plan(writer, blocks, step).await?;
            match self.carry_out(writer, blocks, plan).await {
                Err(e) if e.kind() == Kind::NoSpace && blocks.unnamed.is_none() && step > 1 => {
                    step /= 2;
                }
                done => return done,
            }
        }
    }

    /// Where the file goes on, and what its refcounts need.
    async fn plan(&self, writer: &Writer, blocks: &Blocks, step: u32) -> Result<Plan> {
        let start = self.unused_end(writer, blocks, step).await?;
        let mut plan = Plan {
            start,
            end: start.saturating_add(step),
            blocks: Vec::new(),
            table: 0,
        };
        // More clusters may need another block: at most a few times.
        loop {
            let last = blocks.block_of(plan.end.saturating_sub(1));
            let wanted = blocks.block_of(start)..=last;
            plan.blocks = wanted.filter(|n| blocks.block(*n).is_none()).collect();
            if last >= blocks.entries() {
                let bytes = last.saturating_add(1).saturating_mul(2 * 8);
                plan.table = self.header().cluster.count(bytes) as u32;
            }
            let end = plan.fresh().saturating_add(step);
            if end == u32::MAX
                || u64::from(plan.table).saturating_mul(self.header().cluster.bytes())
                    > limits::QCOW2_REFTABLE_MAX
            {
                let what = "the file has as many clusters as its refcounts can tell of";
                return Err(Error::new(Kind::NoSpace, what));
            }
            if end == plan.end {
                return Ok(plan);
            }
            plan.end = end;
        }
    }

    /// The first cluster at or behind the end of the file from which on refcounts are 0 for a step, and
    /// what it needs in addition.
    async fn unused_end(&self, writer: &Writer, blocks: &Blocks, step: u32) -> Result<u32> {
        let end = lock(&writer.state).alloc.end();
        let (mut start, mut at) = (end, end);
        for _ in 0..BEHIND_MAX {
            let slice = blocks.slice_from(at);
            let known = blocks.block(blocks.block_of(at)).is_some();
            if known {
                let free = self.uncounted(blocks, slice.clone()).await?;
                let mut used = RoaringBitmap::new();
                used.insert_range(slice.clone());
                used -= free;
                start = used.max().map_or(start, |last| last.saturating_add(1));
            }
            at = slice.end;
            if u64::from(at) > u64::from(start).saturating_add(2 * u64::from(step)) {
                return Ok(start);
            }
        }
        Ok(start)
    }

    async fn carry_out(&self, writer: &Writer, blocks: &mut Blocks, plan: Plan) -> Result<()> {
        let size = self.header().cluster;
        let mut images = Images::new();
        // As if they were there: when they cannot be written, they are not.
        for (n, at) in plan.places(size) {
            blocks.fresh_block(at, &mut images);
            blocks.set_block(n, at);
        }
        if let Err(e) = self.lengthen(writer, blocks, &plan, images).await {
            for (n, _) in plan.places(size) {
                blocks.set_block(n, 0);
            }
            return Err(e);
        }
        {
            let mut state = lock(&writer.state);
            state.metadata.insert_range(plan.start..plan.fresh());
            state.alloc.extended(plan.end);
        }
        blocks.unnamed = Some(plan);
        self.name(writer, blocks).await
    }

    /// What is new of the file, with refcounts and blocks, durably but for what names these.
    async fn lengthen(
        &self,
        writer: &Writer,
        blocks: &mut Blocks,
        plan: &Plan,
        mut images: Images,
    ) -> Result<()> {
        let size = self.header().cluster;
        let clusters = plan.start..plan.end;
        self.count(blocks, clusters, Change::Take, &mut images)
            .await?;
        let mut update = Update::new();
        let end = size.start(lock(&writer.state).alloc.end());
        if self.metadata().info().len > end {
            // What an attempt left that found no space would be taken for zeros.
            update = update.len(end);
        }
        update = update.len(size.start(plan.end));
        if plan.table > 0 {
            let mut table = crate::buf::aligned(size.start(plan.table) as usize);
            let known = blocks.encode();
            table
                .iter_mut()
                .zip(known)
                .for_each(|(to, from)| *to = from);
            update = update.write(size.start(plan.table_at()), table.freeze());
        }
        let early = planted::is(Bug::BlockBeforeCounts) || planted::is(Bug::CountAfterUse);
        self.apply(blocks, update, images, !early).await
    }

    /// Names the new blocks of an extension, or the new table, durably; its clusters are fresh then. Where
    /// that finds no space, some of them may be named, and nothing is handed out before it was tried again.
    pub(super) async fn name(&self, writer: &Writer, blocks: &mut Blocks) -> Result<()> {
        let Some(plan) = blocks.unnamed.take() else {
            return Ok(());
        };
        if let Err(e) = self.write_names(blocks, &plan).await {
            blocks.unnamed = Some(plan);
            return Err(e);
        }
        let mut fresh = RoaringBitmap::new();
        fresh.insert_range(plan.fresh()..plan.end);
        lock(&writer.state).alloc.now_fresh(&fresh);
        match plan.table {
            0 => Ok(()),
            _ => self.drop_old_table(writer, blocks, &plan).await,
        }
    }

    async fn write_names(&self, blocks: &Blocks, plan: &Plan) -> Result<()> {
        let (mut update, mut slices) = (Update::new(), Vec::new());
        if plan.table > 0 {
            update = update.write(0, self.head_with_table(plan).await?);
        } else {
            slices = self.table_slices(blocks, plan).await?;
            for (at, data) in &slices {
                update = update.write(*at, data.clone());
            }
        }
        if !update.steps().is_empty() {
            update.barrier().apply(self.metadata()).await?;
            self.keep(slices);
        }
        Ok(())
    }

    /// Slices of the refcount table with new blocks in them.
    async fn table_slices(&self, blocks: &Blocks, plan: &Plan) -> Result<Vec<(u64, Bytes)>> {
        let mut images = Images::new();
        for (n, block) in plan.places(self.header().cluster) {
            let entry = blocks.at.saturating_add(n.saturating_mul(8));
            self.image_of(entry, &mut images).await?;
            put(&mut images, self.slice_len(), entry, &block.to_be_bytes());
        }
        Ok(frozen(images))
    }

    /// The first slice of the file, whose header says where a larger refcount table is.
    async fn head_with_table(&self, plan: &Plan) -> Result<Bytes> {
        let at = self.header().cluster.start(plan.table_at());
        self.head_with(|head| Header::put_refcounts(head, at, plan.table))
            .await
    }

    /// Frees a refcount table that the header does not name any more.
    async fn drop_old_table(
        &self,
        writer: &Writer,
        blocks: &mut Blocks,
        plan: &Plan,
    ) -> Result<()> {
        let size = self.header().cluster;
        let first = size.cluster_of(blocks.at).unwrap_or(u32::MAX);
        let old = first..first.saturating_add(blocks.clusters);
        blocks.at = size.start(plan.table_at());
        blocks.clusters = plan.table;
        self.lower(writer, blocks, old).await
    }
}
