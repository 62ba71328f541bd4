//! Repair: making a damaged delta whole without losing anything that can be read.
//!
//! The ordering, in one place. Each step ends with a barrier and leaves an image that is no worse
//! than before; whoever is interrupted starts again and goes on from there.
//!
//! 1. A file that ends inside its table gets the table's length; the slots behind read 0.
//! 2. A format extension that cannot be trusted, or whose bitmap would miss what step 3 changes,
//!    is taken out of the header, before its clusters can be reused.
//! 3. Entries with nothing readable behind them are cleared. Before the file grows: they would
//!    come to name what is put there.
//! 4. The file ends with its last cluster in use: longer when that one is cut short, else shorter.
//! 5. Data that shares a cluster, or is misaligned, is copied to new clusters at the end. Barrier.
//!    Then the entries that name the copies.
//! 6. Space that nothing names is given back, now that no durable entry names it.
//! 7. The header says clean, last.
//!
//! An interrupted format conversion and an extension that demands unknown software are left
//! alone: nothing true can be said about such an image.

use super::report::Place;
use super::scan::{Chunk, Judge, Table, Verdict};
use super::{AT_EXTENSION, AT_FLAGS, AT_IN_USE, FindingKind, Kept, Report, Survey, space};
use crate::ploop::header::{CLOSED_V21, FLAG_EMPTY, HEADER_LEN, Header};
use crate::progress::Watch;
use crate::store::{Reach, Space, Store};
use crate::units::HostCluster;
use crate::update::Update;
use crate::{Error, Result, limits};
use bytes::BytesMut;
use roaring::RoaringBitmap;
use std::collections::BTreeSet;

/// Bytes copied in one step; smaller steps keep more holes.
const COPY_STEP: u64 = 256 << 10;

/// What a repair may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repair {
    /// Bytes by which the file may grow for copies of shared clusters. A hostile table can share
    /// one cluster a billion times.
    pub growth_max: u64,
    /// Whether findings of [`Grade::Loss`](super::Grade::Loss) are mended. If not, an image that has
    /// one is not changed: what comes after step 3 wants it done.
    pub give_up: bool,
}

impl Default for Repair {
    fn default() -> Self {
        Self {
            growth_max: 1 << 30,
            give_up: false,
        }
    }
}

/// Repairs a delta. The report tells what was done and what is still wrong afterwards. Fails
/// before any change when the repair would grow the file too much, and in the middle when the
/// storage fails; then it may be run again.
pub async fn repair<S: Store>(store: &S, allowed: &Repair) -> Result<Report> {
    repair_watched(store, allowed, &mut ()).await
}

/// The same, for somebody who may end it in the middle; then it may be run again.
pub async fn repair_watched<S: Store>(
    store: &S,
    allowed: &Repair,
    watch: &mut dyn Watch,
) -> Result<Report> {
    let mut survey = Survey::take(store, watch).await?;
    if survey.is_converting() || survey.extension == Kept::Unknown {
        return Ok(survey.report);
    }
    let loses = survey.cleared > 0 || survey.len < table_end(&survey.header);
    if loses && !allowed.give_up {
        return Ok(survey.report);
    }
    refuse_growth(&survey, allowed)?;
    let mut done = Report::default();
    if survey.len < table_end(&survey.header) {
        Update::new()
            .len(table_end(&survey.header))
            .barrier()
            .apply(store)
            .await?;
        let text = "the rest of the table was added, without entries".into();
        done.done(FindingKind::ShortFile, Place::Byte(survey.len), text);
        survey = Survey::take(store, watch).await?;
    }
    let header = survey.header;
    let used = survey.judge.used.clone();
    let mut work = Work {
        store,
        header,
        survey,
        done,
        used,
        left: 0,
        watch,
    };
    work.drop_extension().await?;
    work.clear_entries().await?;
    work.fit_length().await?;
    work.separate().await?;
    work.return_space().await?;
    work.finish_header().await?;
    let after = Survey::take(store, work.watch).await?.report;
    let omitted = after.omitted.saturating_add(work.done.omitted);
    Ok(Report {
        repaired: work.done.repaired,
        omitted,
        ..after
    })
}

fn table_end(header: &Header) -> u64 {
    header.cluster.start(header.data_start)
}

fn refuse_growth(survey: &Survey, allowed: &Repair) -> Result<()> {
    let copies = survey.moved.saturating_mul(survey.header.cluster.bytes());
    let table = table_end(&survey.header).saturating_sub(survey.len);
    let growth = copies.saturating_add(table);
    if growth <= allowed.growth_max {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "nothing was repaired: {} clusters must be copied and {table} bytes of the table added, \
         which takes up to {growth} bytes, more than the {} allowed",
        survey.moved, allowed.growth_max
    )))
}

/// A repair under way.
struct Work<'s, S> {
    store: &'s S,
    header: Header,
    survey: Survey,
    done: Report,
    /// Clusters that entries name.
    used: RoaringBitmap,
    /// Errors that stay.
    left: u64,
    watch: &'s mut dyn Watch,
}

/// An entry whose data goes to a new cluster.
struct Move {
    slot: u64,
    /// File offset of the data.
    from: u64,
    kind: FindingKind,
}

impl<S: Store> Work<'_, S> {
    /// Step 2.
    async fn drop_extension(&mut self) -> Result<()> {
        let text = match self.survey.extension {
            Kept::Stale => "the pointer to the format extension was cleared",
            Kept::Valid(_) if self.survey.cleared > 0 => {
                "the format extension was dropped: its bitmap would miss the entries cleared here"
            }
            _ => return Ok(()),
        };
        self.header.extension = 0;
        if self.header.in_use == CLOSED_V21 {
            self.header.in_use = 0;
        }
        self.write_header().await?;
        self.survey.extension = Kept::None;
        self.done
            .done(FindingKind::StaleExtension, AT_EXTENSION, text.into());
        Ok(())
    }

    /// Step 3.
    async fn clear_entries(&mut self) -> Result<()> {
        let mut judge = Judge::new(self.header, self.store.info().len);
        let mut table = Table::new(self.store, &self.header);
        let mut changed = false;
        while let Some(mut chunk) = table.next().await? {
            self.watch.tell(table.progress("clearing"))?;
            let bad: Vec<(u64, FindingKind)> = chunk
                .slots()
                .filter_map(|(slot, raw)| Some((slot, hopeless(judge.slot(slot, raw))?)))
                .collect();
            for (slot, kind) in &bad {
                self.done
                    .done(*kind, Place::Slot(*slot), cleared_text(*kind).into());
            }
            let clear = bad.iter().map(|(slot, _)| (*slot, 0));
            let update = entry_update(&mut chunk, clear);
            changed |= !update.steps().is_empty();
            update.apply(self.store).await?;
        }
        if changed {
            self.store.flush().await
        } else {
            Ok(())
        }
    }

    /// Step 4.
    async fn fit_length(&mut self) -> Result<()> {
        let (len, size) = (self.store.info().len, self.header.cluster);
        let fit = self.survey.occupied_end().saturating_mul(size.bytes());
        if fit == len {
            return Ok(());
        }
        Update::new().len(fit).barrier().apply(self.store).await?;
        let (kind, text) = if fit > len {
            (
                FindingKind::RaggedTail,
                format!("the last cluster was completed with zeros, to {fit} bytes"),
            )
        } else {
            (
                FindingKind::TailLeak,
                format!("the file was cut to its last cluster in use, {fit} bytes"),
            )
        };
        self.done.done(kind, Place::Byte(len.min(fit)), text);
        Ok(())
    }

    /// Step 5.
    async fn separate(&mut self) -> Result<()> {
        if self.survey.moved == 0 {
            return Ok(());
        }
        // Copies are made from what is there now, never from what is appended on the way.
        let old_len = self.store.info().len;
        let mut judge = Judge::new(self.header, old_len);
        let mut table = Table::new(self.store, &self.header);
        while let Some(mut chunk) = table.next().await? {
            self.watch.tell(table.progress("copying"))?;
            let moves: Vec<Move> = chunk
                .slots()
                .filter_map(|(slot, raw)| self.needed_move(slot, judge.slot(slot, raw)))
                .collect();
            if !moves.is_empty() {
                let placed = self.move_data(&moves, old_len).await?;
                self.used.extend(placed.iter().map(|(_, to)| to.0));
                self.name_copies(&mut chunk, &placed).await?;
            }
        }
        Ok(())
    }

    fn needed_move(&self, slot: u64, verdict: Verdict) -> Option<Move> {
        match verdict {
            Verdict::Duplicate(cluster) => {
                let from = self.header.cluster.start(cluster);
                Some(Move {
                    slot,
                    from,
                    kind: FindingKind::Duplicate,
                })
            }
            Verdict::Misaligned(from) => Some(Move {
                slot,
                from,
                kind: FindingKind::Misaligned,
            }),
            _ => None,
        }
    }

    /// Copies data to new clusters at the end, durably. Moves for which the format has no cluster
    /// number left are not made.
    async fn move_data(&mut self, moves: &[Move], old_len: u64) -> Result<Vec<(u64, HostCluster)>> {
        let size = self.header.cluster;
        let first = size.count(self.store.info().len);
        let mut placed = Vec::new();
        for (step, to) in moves.iter().zip(first..) {
            let to = u32::try_from(to).ok().map(HostCluster);
            let Some(to) = to.filter(|to| self.header.cluster_to_entry(*to).is_some()) else {
                self.left = self.left.saturating_add(1);
                continue;
            };
            self.store
                .set_len(size.start(to.0).saturating_add(size.bytes()))
                .await?;
            self.copy_cluster(step.from, size.start(to.0), old_len)
                .await?;
            let text = format!("its data was copied to a cluster of its own, {}", to.0);
            self.done.done(step.kind, Place::Slot(step.slot), text);
            placed.push((step.slot, to));
        }
        self.store.flush().await?;
        Ok(placed)
    }

    async fn name_copies(&self, chunk: &mut Chunk, placed: &[(u64, HostCluster)]) -> Result<()> {
        let entries = placed
            .iter()
            .filter_map(|(slot, to)| Some((*slot, self.header.cluster_to_entry(*to)?)));
        entry_update(chunk, entries)
            .barrier()
            .apply(self.store)
            .await
    }

    /// Copies a cluster's worth of bytes from `from`, which may be misaligned and end at `end`, to
    /// a cluster that reads as zeros. Holes stay holes.
    async fn copy_cluster(&self, from: u64, to: u64, end: u64) -> Result<()> {
        let cluster = self.header.cluster.bytes();
        let mut done = 0u64;
        while done < cluster && from.saturating_add(done) < end {
            let at = from.saturating_add(done);
            let len = COPY_STEP
                .min(cluster.saturating_sub(done))
                .min(end.saturating_sub(at));
            let (data, until) = self.store.extent(at).await?;
            if data || until < at.saturating_add(len) {
                let bytes = read_span(self.store, at, len).await?;
                let to = to.saturating_add(done);
                self.store
                    .write_at(to, bytes.freeze(), Reach::Cache)
                    .await?;
            }
            done = done.saturating_add(len);
        }
        Ok(())
    }

    /// Step 6.
    async fn return_space(&mut self) -> Result<()> {
        let size = self.header.cluster;
        let mut occupied = self.used.clone();
        if let Kept::Valid(clusters) = &self.survey.extension {
            occupied |= clusters;
        }
        if self.left > 0 {
            // Something misaligned may have stayed where it is.
            occupied |= &self.survey.judge.overlapped;
        }
        let mut changed = false;
        for gap in space::gaps(&occupied, self.header.data_start) {
            let lost = space::data_bytes(self.store, size, &gap).await?;
            if lost == 0 {
                continue;
            }
            let (at, len) = (
                size.start(gap.start),
                (gap.len() as u64).saturating_mul(size.bytes()),
            );
            self.store.punch(at, len, Space::Free).await?;
            let text = format!("{lost} bytes that no entry names were given back");
            self.done
                .done(FindingKind::MiddleLeak, Place::Byte(at), text);
            changed = true;
        }
        if changed {
            self.store.flush().await
        } else {
            Ok(())
        }
    }

    /// Step 7.
    async fn finish_header(&mut self) -> Result<()> {
        let was = self.header;
        self.raise_entries();
        if self.used.is_empty() {
            self.header.flags |= FLAG_EMPTY;
        } else if self.used.len() < u64::from(self.header.entries) {
            self.header.flags &= !FLAG_EMPTY;
        }
        if self.left == 0 && !matches!(self.survey.extension, Kept::Valid(_)) {
            self.header.in_use = 0;
        }
        if self.survey.page.get(..HEADER_LEN as usize) == Some(&self.header.encode()) {
            return Ok(());
        }
        self.write_header().await?;
        if self.header.in_use != was.in_use {
            let text = "the image was marked closed".into();
            self.done.done(FindingKind::Unclean, AT_IN_USE, text);
        }
        if self.header.flags != was.flags {
            self.done.done(
                FindingKind::EmptyFlag,
                AT_FLAGS,
                "the Empty flag was corrected".into(),
            );
        }
        Ok(())
    }

    /// Gives every cluster of the size its entry, where the header clusters have room for the
    /// slots; step 3 has cleared them.
    fn raise_entries(&mut self) {
        if self.header.covers_size() {
            return;
        }
        let needed = self.header.cluster.count(self.header.geometry().size);
        let room = table_end(&self.header).saturating_sub(HEADER_LEN) / 4;
        match u32::try_from(needed) {
            Ok(entries) if needed <= room.min(limits::BAT_ENTRIES_MAX) => {
                self.header.entries = entries;
                let text = format!("the table was given the {needed} entries that the size needs");
                self.done
                    .done(FindingKind::ShortTable, super::AT_ENTRIES, text);
            }
            _ => self.left = self.left.saturating_add(1),
        }
    }

    /// Writes the header into the first page as it is now, and a barrier.
    async fn write_header(&self) -> Result<()> {
        let buf = crate::buf::aligned(limits::PAGE as usize);
        let mut page = self.store.read_at(0, buf).await?;
        if let Some(to) = page.get_mut(..HEADER_LEN as usize) {
            to.copy_from_slice(&self.header.encode());
        }
        Update::new()
            .write(0, page.freeze())
            .barrier()
            .apply(self.store)
            .await
    }
}

/// The finding of a slot with nothing readable behind it.
const fn hopeless(verdict: Verdict) -> Option<FindingKind> {
    match verdict {
        Verdict::PastEnd(_) => Some(FindingKind::PastEnd),
        Verdict::InHeader(_) => Some(FindingKind::InHeader),
        Verdict::BeyondDevice => Some(FindingKind::BeyondDevice),
        Verdict::Good(_) | Verdict::Duplicate(_) | Verdict::Misaligned(_) => None,
    }
}

const fn cleared_text(kind: FindingKind) -> &'static str {
    match kind {
        FindingKind::BeyondDevice => "cleared; no guest could read it",
        _ => "cleared; the range reads as zeros, or as the image below where there is one",
    }
}

/// Changes slots of a part of the table; writes only the pages they are in.
fn entry_update(chunk: &mut Chunk, entries: impl Iterator<Item = (u64, u32)>) -> Update {
    let pages: BTreeSet<u64> = entries
        .filter_map(|(slot, raw)| chunk.set(slot, raw))
        .collect();
    pages.into_iter().fold(Update::new(), |update, page| {
        let at = page.saturating_mul(limits::PAGE);
        let from = at.saturating_sub(chunk.at) as usize;
        let mut bytes = crate::buf::aligned(limits::PAGE as usize);
        match chunk
            .bytes
            .get(from..from.saturating_add(limits::PAGE as usize))
        {
            Some(source) => bytes.copy_from_slice(source),
            None => return update,
        }
        update.write(at, bytes.freeze())
    })
}

/// Reads `len` bytes from `at`, neither of which need be aligned, into a buffer whose length is:
/// the rest of it is zeros. The file length is aligned.
async fn read_span<S: Store>(store: &S, at: u64, len: u64) -> Result<BytesMut> {
    let align = store.info().align.max(1);
    let ragged = at.checked_rem(align).unwrap_or(0);
    let wide = crate::buf::aligned(len.saturating_add(ragged).next_multiple_of(align) as usize);
    let mut wide = store.read_at(at.saturating_sub(ragged), wide).await?;
    if ragged == 0 && wide.len() as u64 == len {
        return Ok(wide);
    }
    let inner = wide.split_off(ragged as usize);
    let mut out = crate::buf::aligned(len.next_multiple_of(align) as usize);
    for (to, from) in out.iter_mut().zip(inner).take(len as usize) {
        *to = from;
    }
    Ok(out)
}
