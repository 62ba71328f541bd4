//! The flush pass and the clean end: how what a guest was answered becomes durable. The ordering, in
//! one place:
//!
//! 1. Freeze: the entries and frees that are pending now are what this pass covers.
//! 2. New second-level tables are written where nobody names them yet. One that takes the place of a
//!    shared table is a copy of it.
//! 3. Data barrier, which covers them, too, and one of an external data file, always. Left out only
//!    when every frozen entry is fresh, its cluster durably read as zeros, which the guest read
//!    there before, and so does what is new of a table.
//! 4. Entries of tables that are there, and first-level entries that name the new ones. Refcounts of
//!    what they name have been durable since it was handed out (`supply`).
//! 5. Metadata barrier. Now the frozen entries are durable, and their words leave the ledger.
//! 6. Refcounts of what is not named any more, which no barrier follows: a cut leaves a leak. What has
//!    none left is free; it is handed out again only with a barrier behind its new refcount.
//!
//! A write of steps 2 to 4 that finds no space leaves everything pending and may be tried again. Every
//! other failure is final and poisons the image.
//!
//! The clean end: a pass; refcounts of what was made ready and not used, and of places that others
//! still read ([`super::Reserved::leave_old`]); barrier; the file is cut to what is used of it, or
//! still read; barrier.

use super::blocks::{Change, Images, frozen, put};
use super::image::Qcow2;
use super::partial::Bits;
use super::table::{L1Entry, L2Entry};
use super::writer::{NewTable, State, Writer, lock};
use crate::pending::To;
use crate::planted::{self, Bug};
use crate::store::Store;
use crate::units::floor_to;
use crate::update::Update;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use std::collections::BTreeSet;

/// What a pass writes.
#[derive(Default)]
struct Plan {
    /// New tables.
    before: Images,
    /// What is durable with the second barrier.
    after: Images,
    /// New tables that get their first-level entries, by their numbers.
    links: Vec<(u32, NewTable)>,
    /// Something must be durable before what names it.
    data_first: bool,
}

impl<S: Store> Qcow2<S> {
    /// Runs one pass. The caller runs one at a time.
    pub(super) async fn pass(&self, writer: &Writer) -> Result<()> {
        let given_up = {
            let mut state = lock(&writer.state);
            state.partial.freeze();
            state.pending.freeze()
        };
        if given_up {
            // Tables of a pass that was given up may still be on their way.
            self.metadata().settle().await;
        }
        self.settle_strays(writer).await;
        self.new_epoch();
        if planted::is(Bug::LowerBeforeDrop) {
            let freed = lock(&writer.state).pending.take_freed();
            let mut blocks = writer.blocks.lock().await;
            self.lower(writer, &mut blocks, freed).await?;
            self.metadata().flush().await?;
        }
        match self.write_frozen(writer).await {
            Ok(links) => self.freed(writer, links).await,
            Err(e) => {
                lock(&writer.state).pending.pass_undone();
                Err(e)
            }
        }
    }

    /// Steps 2 to 5; gives the tables that are named now.
    async fn write_frozen(&self, writer: &Writer) -> Result<Vec<(u32, NewTable)>> {
        if planted::is(Bug::LaterEntriesInPageImage) {
            // Only what is published while the data barrier runs can be wrongly in an image.
            self.metadata().flush().await?;
        }
        let mut plan = self.plan_pass(writer).await?;
        let (before, after) = (frozen(plan.before), frozen(plan.after));
        let mut first = write_all(Update::new(), &before);
        if plan.data_first && !planted::is(Bug::IndexBeforeData) {
            first = first.barrier();
        }
        let then = write_all(Update::new(), &after).barrier();
        let written = async {
            first.apply(self.metadata()).await?;
            if let Some(data) = self
                .data_file()
                .filter(|_| !planted::is(Bug::IndexBeforeData))
            {
                data.flush().await?;
            }
            tried(writer, &plan.links);
            then.apply(self.metadata()).await
        };
        let written = written.await;
        // First: who has read a slice meanwhile does not put it over one that was written.
        self.new_epoch();
        let slices = before.into_iter().chain(after);
        match written {
            Ok(()) => self.keep(slices),
            Err(e) => {
                self.forget(slices.map(|(at, _)| at));
                return Err(e);
            }
        }
        Ok(std::mem::take(&mut plan.links))
    }

    async fn plan_pass(&self, writer: &Writer) -> Result<Plan> {
        let per = u32::try_from(self.layout().entries()).unwrap_or(u32::MAX);
        let (tables, data_first) = {
            let state = lock(&writer.state);
            let table = |n: u32| n.checked_div(per).unwrap_or(0);
            let mut tables: BTreeSet<u32> = state.pending.frozen().map(table).collect();
            // Also those that nobody needed after all: they do not wait for ever.
            tables.extend(state.tables.keys());
            (tables, state.pending.needs_data_first())
        };
        let mut plan = Plan {
            data_first,
            ..Plan::default()
        };
        for index in tables {
            let (entries, new) = {
                let state = lock(&writer.state);
                let first = index.saturating_mul(per);
                let range = first..first.saturating_add(per);
                let entries = state.pending.frozen_in(range);
                let entries: Vec<_> = entries
                    .map(|(n, to)| (n.saturating_sub(first), self.entry(&state, to)))
                    .collect();
                (entries, state.tables.get(&index).copied())
            };
            match new {
                None => self.change_table(index, &entries, &mut plan).await?,
                Some(new) => self.new_table(index, new, &entries, &mut plan).await?,
            }
        }
        Ok(plan)
    }

    /// Entries of a table that is named already.
    async fn change_table(
        &self,
        index: u32,
        entries: &[(u32, L2Entry)],
        plan: &mut Plan,
    ) -> Result<()> {
        let table = self.l1_entry(index).await?.table(self.layout().cluster)?;
        let table = table.ok_or_else(|| Error::damaged("an L2 table that was there is not"))?;
        self.change_entries(table, entries, plan).await
    }

    async fn change_entries(
        &self,
        table: u64,
        entries: &[(u32, L2Entry)],
        plan: &mut Plan,
    ) -> Result<()> {
        for (n, _) in entries {
            self.image_of(self.entry_at(table, *n), &mut plan.after)
                .await?;
        }
        self.put_entries(table, entries, &mut plan.after);
        Ok(())
    }

    /// A table that nobody names yet, and the entry that will.
    async fn new_table(
        &self,
        index: u32,
        new: NewTable,
        entries: &[(u32, L2Entry)],
        plan: &mut Plan,
    ) -> Result<()> {
        let size = self.layout().cluster;
        let (table, unit) = (size.start(new.host), self.slice_len());
        plan.links.push((index, new));
        if new.tried {
            // What it gets now must not be seen before its data is durable.
            self.change_entries(table, entries, plan).await?;
            return self.link(index, table, plan).await;
        }
        let zeros = || crate::buf::aligned(unit as usize);
        if new.old.is_some() || !self.metadata().info().fresh_zero {
            plan.data_first |= !planted::is(Bug::TableBeforeCopy);
            for at in (0..size.bytes()).step_by(unit as usize) {
                let image = match new.old {
                    Some(old) => self.copy_of(old.saturating_add(at)).await?,
                    None => zeros(),
                };
                plan.before.insert(table.saturating_add(at), image);
            }
        }
        for (n, _) in entries {
            let slice = floor_to(self.entry_at(table, *n), unit);
            plan.before.entry(slice).or_insert_with(zeros);
        }
        self.put_entries(table, entries, &mut plan.before);
        self.link(index, table, plan).await
    }

    /// The first-level entry of a new table.
    async fn link(&self, index: u32, table: u64, plan: &mut Plan) -> Result<()> {
        let at = self.l1_at(index);
        self.image_of(at, &mut plan.after).await?;
        let entry = L1Entry::owned(table).0.to_be_bytes();
        put(&mut plan.after, self.slice_len(), at, &entry);
        Ok(())
    }

    /// What the running pass writes of a mapping.
    fn entry(&self, state: &State, to: To) -> L2Entry {
        let layout = self.layout();
        match to {
            To::Zeros => L2Entry::zeros(layout),
            To::Nowhere => L2Entry::owned(None, Bits::ALL, layout),
            To::At(host) => {
                let bits = state.partial.frozen(host.0);
                L2Entry::owned(Some(self.data_at(host)), bits, layout)
            }
        }
    }

    /// File offset of entry `n` of the table at `table`.
    fn entry_at(&self, table: u64, n: u32) -> u64 {
        table.saturating_add(u64::from(n).saturating_mul(self.layout().entry_len()))
    }

    /// Puts entries of the table at `table` into images of its slices.
    fn put_entries(&self, table: u64, entries: &[(u32, L2Entry)], images: &mut Images) {
        for (n, entry) in entries {
            let bytes = entry.encode(self.layout());
            put(images, self.slice_len(), self.entry_at(table, *n), &bytes);
        }
    }

    /// The pass is durable: what it replaced has a user less.
    async fn freed(&self, writer: &Writer, links: Vec<(u32, NewTable)>) -> Result<()> {
        let size = self.layout().cluster;
        let mut freed = {
            let mut state = lock(&writer.state);
            for (index, new) in &links {
                state.tables.remove(index);
                state.pending.clear_beyond(new.slot);
            }
            let freed = state.pending.pass_done();
            let State {
                pending, partial, ..
            } = &mut *state;
            partial.pass_done(pending);
            freed
        };
        let old = links.iter().filter_map(|(_, new)| new.old);
        freed.extend(old.filter_map(|at| size.cluster_of(at)));
        if freed.is_empty() {
            return Ok(());
        }
        let mut blocks = writer.blocks.lock().await;
        match self.lower(writer, &mut blocks, freed.iter().copied()).await {
            Err(e) if e.kind() == Kind::NoSpace => {
                let mut state = lock(&writer.state);
                freed.into_iter().for_each(|n| state.pending.free_later(n));
                Ok(())
            }
            done => done,
        }
    }

    /// The clean end. Nothing runs any more.
    pub(super) async fn shut(&self, writer: &Writer) -> Result<()> {
        self.pass(writer).await?;
        // Writes that were given up land before their clusters are anybody's.
        self.metadata().settle().await;
        let mut blocks = writer.blocks.lock().await;
        self.name(writer, &mut blocks).await?;
        let (unused, left) = {
            let mut state = lock(&writer.state);
            let unused = state.alloc.take_fresh() | state.alloc.take_quarantined();
            (unused, std::mem::take(&mut state.left))
        };
        let mut images = Images::new();
        let dropped = unused.into_iter().chain(left.iter().copied());
        let counted = self.count(&mut blocks, dropped, Change::Drop, &mut images);
        let free = counted.await?;
        self.apply(&mut blocks, Update::new(), images, true).await?;
        let end = {
            let mut state = lock(&writer.state);
            state.alloc.free(&free);
            let left = left.iter().map(|n| n.saturating_add(1)).max();
            state.alloc.used_end().max(left.unwrap_or(0))
        };
        let cut = Update::new()
            .len(self.layout().cluster.start(end))
            .barrier();
        cut.apply(self.metadata()).await
    }
}

/// From now on nobody knows whether these tables are named.
fn tried(writer: &Writer, links: &[(u32, NewTable)]) {
    let mut state = lock(&writer.state);
    for (index, _) in links {
        if let Some(new) = state.tables.get_mut(index) {
            new.tried = !planted::is(Bug::RewriteNamedTable);
        }
    }
}

fn write_all(update: Update, images: &[(u64, Bytes)]) -> Update {
    let write = |update: Update, (at, data): &(u64, Bytes)| update.write(*at, data.clone());
    images.iter().fold(update, write)
}
