//! Grow: an open delta gets a larger virtual size, and its table the room that needs.
//!
//! The table lies before the data, so the clusters behind it are in the way of a larger one and go
//! elsewhere first. In order:
//!
//! 1. The file is lengthened to hold the new table and the clusters that go.
//! 2. Each cluster in the way is copied to one that no entry names. Barrier.
//! 3. Their entries are switched. Barrier. Until here each entry may be the old one or the new one
//!    after a cut: both clusters hold the same.
//! 4. All of the table that no guest has seen yet is zeroed, in the space that it keeps, and so is
//!    what lies behind the old end of the disk in its last cluster. Barrier.
//! 5. The header, in sector 0: size, geometry and where the data begins. Barrier. From here on it is
//!    the larger image.
//!
//! The image says that it is in use throughout, so who comes after a cut takes the copies that no
//! entry names for free, and growing is simply begun again. Before step 5 it is the old image to
//! every reader, with its clusters in other places; no cluster is ever named twice.
//!
//! What the format extension said of it was dropped when it was opened, as ever.

use super::alloc::Alloc;
use super::header::Header;
use super::image::{Ploop, lock};
use super::index::{Index, place};
use crate::planted::{self, Bug};
use crate::store::{Reach, Space, Store};
use crate::units::{HostCluster, floor_to};
use crate::update::Update;
use crate::{Error, Kind, Result, limits};
use bytes::{Bytes, BytesMut};
use roaring::RoaringBitmap;

/// Bytes copied in one step.
const STEP: u64 = 1 << 20;

/// A cluster that is in the way.
#[derive(Debug, Clone, Copy)]
struct Move {
    entry: u32,
    from: u32,
    to: u32,
}

/// What growing takes.
#[derive(Debug)]
struct Plan {
    new: Header,
    /// By the places that they leave, ascending; so are those that they get.
    moves: Vec<Move>,
    /// File clusters that entries of the new image name.
    used: RoaringBitmap,
    /// Clusters of the file from step 1 on.
    end: u32,
    /// Entries that a guest has seen.
    visible: u32,
    /// The file cluster that the old disk ended in the midst of, as it is after step 3.
    ragged: Option<u32>,
}

impl<S: Store> Ploop<S> {
    /// Grows the image to `size` bytes, rounded up to a cluster. Nothing is in flight on it, and
    /// nobody else has it open. An image of that size already stays as it is.
    ///
    /// Fails with `Invalid`, and changes nothing, when it is larger or the format ends before. After
    /// any error the image is opened anew, and is as large as before; any but `NoSpace` is final.
    pub async fn grow(&mut self, size: u64) -> Result<()> {
        let new = self.header.grown(size)?;
        if new.sectors == self.header.sectors {
            return Ok(());
        }
        self.may_write()?;
        let done = self.grow_to(new).await;
        done.map_err(|e| {
            if e.kind() != Kind::NoSpace {
                self.poison();
            }
            e.at("growing")
        })
    }

    async fn grow_to(&mut self, new: Header) -> Result<()> {
        if self.has_pending() {
            self.pass(None).await?;
        }
        let plan = self.plan(new).await?;
        self.has_room(&plan)?;
        let end = self.header.cluster.start(plan.end);
        if end > self.store.info().len {
            self.store.set_len(end).await?;
        }
        if planted::is(Bug::TableBeforeMoves) {
            self.clear(&plan).await?;
        }
        if !plan.moves.is_empty() {
            self.copy_away(&plan).await?;
            self.switch_entries(&plan).await?;
        }
        self.clear(&plan).await?;
        self.become_larger(plan).await
    }

    /// Looks at the whole table, and finds places for what is in the way.
    async fn plan(&self, new: Header) -> Result<Plan> {
        let (old, size) = (self.header, self.header.cluster);
        let visible = size.count(old.geometry().size).min(u64::from(old.entries)) as u32;
        let ragged = (size.within(old.geometry().size) != 0).then(|| visible.saturating_sub(1));
        let (mut used, mut moves) = (RoaringBitmap::new(), Vec::new());
        // What an entry behind the end names is nobody's, but no place to go to before step 4.
        let mut taken = RoaringBitmap::new();
        let mut last = None;
        self.each_entry(|n, to| {
            taken.insert(to.0);
            if n < visible {
                used.insert(to.0);
                if to.0 < new.data_start {
                    let (entry, from) = (n, to.0);
                    moves.push(Move { entry, from, to: 0 });
                }
                if Some(n) == ragged {
                    last = Some(to.0);
                }
            }
            Ok(())
        })
        .await?;
        moves.sort_unstable_by_key(|m| m.from);
        let free = (new.data_start..self.last_cluster()).filter(|c| !taken.contains(*c));
        let free: Vec<u32> = free.take(moves.len()).collect();
        if free.len() < moves.len() {
            return Err(Error::new(
                Kind::NoSpace,
                "the file has as many clusters as the format can name",
            ));
        }
        for (m, to) in moves.iter_mut().zip(free) {
            m.to = to;
        }
        used.remove_range(..new.data_start);
        used.extend(moves.iter().map(|m| m.to));
        let moved = |c: u32| moves.iter().find(|m| m.from == c).map_or(c, |m| m.to);
        let end = used.max().map_or(0, |c| c.saturating_add(1));
        let whole = size.whole(self.store.info().len);
        Ok(Plan {
            new,
            visible,
            ragged: last.map(moved),
            end: end
                .max(new.data_start)
                .max(u32::try_from(whole).unwrap_or(u32::MAX)),
            used,
            moves,
        })
    }

    /// Refuses to begin what the host has no space for.
    fn has_room(&self, plan: &Plan) -> Result<()> {
        let size = self.header.cluster;
        let table = plan.new.data_start.saturating_sub(self.header.data_start);
        let grows = size.start(table.saturating_add(plan.moves.len() as u32));
        let room = self.store.room()?;
        if room >= grows {
            return Ok(());
        }
        Err(Error::new(
            Kind::NoSpace,
            format!("the larger table needs {grows} bytes, and the host has {room} to give"),
        ))
    }

    /// Step 2.
    async fn copy_away(&self, plan: &Plan) -> Result<()> {
        let size = self.header.cluster;
        let follows = |a: &Move, b: &Move| {
            a.from.checked_add(1) == Some(b.from) && a.to.checked_add(1) == Some(b.to)
        };
        for run in plan.moves.chunk_by(follows) {
            let Some(first) = run.first() else { continue };
            let (from, to) = (size.start(first.from), size.start(first.to));
            let len = size.start(run.len() as u32);
            let mut done = 0;
            while done < len {
                let step = STEP.min(len.saturating_sub(done));
                let buf = crate::buf::aligned(step as usize);
                let data = self.store.read_at(from.saturating_add(done), buf).await?;
                let at = to.saturating_add(done);
                self.store.write_at(at, data.freeze(), Reach::Cache).await?;
                done = done.saturating_add(step);
            }
        }
        self.store.flush().await.map_err(Error::into_final)
    }

    /// Step 3.
    async fn switch_entries(&self, plan: &Plan) -> Result<()> {
        let mut moves = plan.moves.clone();
        moves.sort_unstable_by_key(|m| m.entry);
        let page_of = |m: &Move| place(&self.header, m.entry).0;
        for in_page in moves.chunk_by(|a, b| page_of(a) == page_of(b)) {
            let Some(page) = in_page.first().map(page_of) else {
                continue;
            };
            let mut image = own(&self.read_page(page).await?);
            for m in in_page {
                let raw = self
                    .header
                    .cluster_to_entry(HostCluster(m.to))
                    .ok_or_else(|| Error::invalid("file cluster outside the format"))?;
                let at = place(&self.header, m.entry).1;
                if let Some(entry) = image.get_mut(at..at.saturating_add(4)) {
                    entry.copy_from_slice(&raw.to_le_bytes());
                }
            }
            let at = u64::from(page).saturating_mul(limits::PAGE);
            self.store
                .write_at(at, image.freeze(), Reach::Cache)
                .await?;
        }
        self.store.flush().await.map_err(Error::into_final)
    }

    /// Step 4.
    async fn clear(&self, plan: &Plan) -> Result<()> {
        let size = self.header.cluster;
        if let Some(cluster) = plan.ragged {
            let within = size.within(self.header.geometry().size);
            let at = size.start(cluster).saturating_add(within);
            let rest = size.bytes().saturating_sub(within);
            self.store.punch(at, rest, Space::Keep).await?;
        }
        self.clear_entries(plan.visible, plan.new.data_start)
            .await?;
        self.store.flush().await.map_err(Error::into_final)
    }

    /// Zeroes the table from entry `first` to cluster `end` of the file, where its data begins.
    pub(super) async fn clear_entries(&self, first: u32, end: u32) -> Result<()> {
        let end = self.header.cluster.start(end);
        let from = self.clear_page_of(first, end).await?;
        if from < end {
            let len = end.saturating_sub(from);
            self.store.punch(from, len, Space::Keep).await?;
        }
        Ok(())
    }

    /// Zeroes entries from `first` on in the page that it is in; where the next page begins. A table that
    /// is full is followed by data, at `end`.
    pub(super) async fn clear_page_of(&self, first: u32, end: u64) -> Result<u64> {
        let seen = self.header.entry_at(first);
        let page = floor_to(seen, limits::PAGE);
        if page < end {
            self.clear_rest((page / limits::PAGE) as u32, (seen % limits::PAGE) as usize)
                .await?;
        }
        Ok(page.saturating_add(limits::PAGE))
    }

    /// Zeroes a table page from byte `at` on, where it is not zero there.
    async fn clear_rest(&self, page: u32, at: usize) -> Result<()> {
        let durable = self.read_page(page).await?;
        let rest = durable.get(at..).unwrap_or_default();
        if rest.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let mut image = own(&durable);
        if let Some(rest) = image.get_mut(at..) {
            rest.fill(0);
        }
        let at = u64::from(page).saturating_mul(limits::PAGE);
        self.store.write_at(at, image.freeze(), Reach::Cache).await
    }

    /// Step 5. What is in memory agrees with it afterwards: nothing is known of a free cluster.
    async fn become_larger(&mut self, plan: Plan) -> Result<()> {
        let page = self.first_page(&plan.new).await?;
        let header = Update::new().write(0, page).barrier();
        header.apply(&self.store).await?;
        self.header = plan.new;
        let mut alloc = Alloc::new(plan.new.data_start, plan.end, &plan.used);
        if planted::is(Bug::FreshAfterGrowth) {
            let free = alloc.take_dirty(u32::MAX);
            alloc.now_fresh(free.into_iter().flatten().collect());
        }
        *lock(&self.index) = Index::new(plan.new, alloc, self.ledger.clone());
        Ok(())
    }
}

/// A page to be changed.
fn own(page: &Bytes) -> BytesMut {
    let mut image = crate::buf::aligned(page.len());
    image.copy_from_slice(page);
    image
}
