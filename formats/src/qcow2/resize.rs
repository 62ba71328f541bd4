//! Resize: the disk of an image that nobody uses gets another size, larger or smaller.
//!
//! Cut anywhere, the disk has the old size or the new one, with leaks at worst; what it shows up to the
//! smaller of the two is what it was. An error of the storage is such a cut. The same call once more
//! goes on with it, and a repair returns the leaks. Snapshots keep their sizes, and bitmaps are marked
//! as in use, as by everybody who writes here: none says of a part that it did not see.
//!
//! Nothing may be named behind the end of a disk that grows, or it would be seen. Smaller, in order:
//!
//! 1. Bitmaps are marked; barrier.
//! 2. One write of the header says the size; barrier.
//! 3. The rest is let go of ([`let_go`]). The first-level table stays as long as it is.
//! 4. An external data file is cut to the size; barrier.
//!
//! Larger:
//!
//! 1. What an earlier shrinking, or somebody else, left behind the end is let go of, and the last
//!    cluster is zeroed behind it; barrier.
//! 2. An external data file is cut to the old size, and lengthened to the new one; barrier.
//! 3. Bitmaps are marked; barrier.
//! 4. A larger first-level table where it is needed: its new entries are zeroed where its last cluster
//!    has room for them, which needs no refcount; else it is written as a whole to new clusters,
//!    whose refcounts were raised before. Barrier.
//! 5. One write of the header says the size, and where the table is; barrier.
//! 6. A repair returns what nobody names any more.
//!
//! So an external data file is never shorter than the disk, whose bytes it has at their guest offsets: a
//! raw one is the disk of either size, with zeros behind the smaller one where a cut left it longer.
//! What it gains are zeros, and what it had behind the end is gone before. No table names what it gains:
//! that reads as zeros in any case.
//!
//! Where nothing is behind the end and the table has room, the refcounts are not even looked at.
//! Source: QEMU `docs/interop/qcow2.rst`, "Header", "Snapshots" and "Bitmap directory".

use super::Qcow2;
use super::be::u64_at;
use super::bitmaps::mark_in_use;
use super::check::{Recount, Span, clean, sound};
use super::header::{CORRUPT, DIRTY, Header, KNOWN_AUTOCLEAR, L1, write_header};
use super::open::{list_snapshots, read_header, read_packed, read_padded, unpack};
use super::run::Entries;
use super::table::{L1Entry, L2Entry, Layout, Mapping};
use super::words::{Appender, read_unit, refuse_blocks, unit, write_unit, write_words};
use crate::layer::Layer;
use crate::progress::Watch;
use crate::store::Store;
use crate::units::floor_to;
use crate::update::Update;
use crate::{Error, Result, limits};
use std::cmp::Ordering;
use std::ops::Range;

/// Bytes of a table that are copied in one step.
const STEP: u64 = 64 << 10;

/// The size in bytes that a disk would get: what is asked for, rounded up to a cluster, but not from
/// below its size to above it. `Invalid` for what the format, or a writer here, cannot say.
pub fn rounded(header: &Header, size: u64) -> Result<u64> {
    let layout = header.layout()?;
    let most = limits::SIZE_MAX.min(
        layout
            .table_covers()
            .saturating_mul(limits::QCOW2_L1_MAX / 8),
    );
    let to = size.checked_next_multiple_of(layout.cluster.bytes());
    let to = to.filter(|to| *to <= most).ok_or_else(|| {
        Error::invalid(format!(
            "a disk of {size} bytes in clusters of {}: at most {most} are possible",
            layout.cluster.bytes()
        ))
    })?;
    let to = if size <= header.size {
        to.min(header.size)
    } else {
        to
    };
    let words = header
        .cluster
        .count(to)
        .saturating_add(entries_for(layout, to));
    match words >= u64::from(u32::MAX) {
        true => Err(Error::invalid(format!(
            "a disk of {size} bytes in clusters of {}: 2^32 clusters or more are not written here",
            layout.cluster.bytes()
        ))),
        false => Ok(to),
    }
}

/// Gives the disk another size, [`rounded`], durably; that size in bytes. Whoever makes it smaller
/// vouches that nobody wants what is behind its end; whoever makes it larger, that no image below is
/// longer than the disk is: what that has would be seen.
///
/// `data` is its external data file, given exactly when the header says that there is one
/// ([`Header::has_data_file`]): it has as many bytes as the disk afterwards.
///
/// Refused, and nothing was changed, but for what was behind the end: `Invalid` as by [`rounded`],
/// `Damaged` when the image must be repaired first, `Unsupported` with snapshots that do not say their
/// size, and where bytes behind the end cannot be zeroed because a snapshot has them, too.
pub async fn resize<S: Store>(
    store: &S,
    data: Option<&S>,
    size: u64,
    watch: &mut dyn Watch,
) -> Result<u64> {
    let header = read_header(store).await?;
    let to = rounded(&header, size)?;
    judge(store, &header).await?;
    if header.has_data_file() != data.is_some() {
        return Err(Error::invalid(
            "an external data file is given exactly when there is one",
        ));
    }
    match to.cmp(&header.size) {
        Ordering::Less => shrink(store, to, watch).await?,
        Ordering::Equal => tidy(store, &header, watch).await?,
        Ordering::Greater => {
            tidy(store, &header, watch).await?;
            fit(data, header.size, to).await?;
            let header = read_header(store).await?;
            grow(store, header, to, watch).await?;
        }
    }
    fit(data, to, to).await?;
    Ok(to)
}

/// Gives an external data file `size` bytes, of which those from `old` on are zeros, durably.
async fn fit<S: Store>(data: Option<&S>, old: u64, size: u64) -> Result<()> {
    let Some(data) = data else { return Ok(()) };
    let has = data.info().len;
    let kept = old.min(size);
    if has == size && kept == size {
        return Ok(());
    }
    if has > kept {
        data.set_len(kept).await?;
    }
    if kept < size {
        data.lengthen(size).await?;
    }
    data.flush().await.map_err(Error::into_final)
}

impl<S: Store> Qcow2<S> {
    /// The size in bytes that the disk would get, [`rounded`]. `Invalid` also for one that is the other
    /// way.
    pub fn resized(&self, size: u64, larger: bool) -> Result<u64> {
        let (old, to) = (self.geometry().size, rounded(self.header(), size)?);
        if larger && to < old {
            return Err(Error::invalid(format!(
                "{size} bytes are less than the {old} that it has"
            )));
        }
        if !larger && to > old {
            return Err(Error::invalid(format!(
                "{size} bytes are more than the {old} that it has"
            )));
        }
        Ok(to)
    }

    /// Gives an image that was just opened for writing, and is nobody else's, another size, refused as by
    /// [`Self::resized`]: it is closed, resized ([`resize`]) and opened anew. After an error it is not to be
    /// used: the caller opens it anew.
    pub async fn resize(&mut self, size: u64, larger: bool) -> Result<()>
    where
        S: Clone,
    {
        self.resized(size, larger)?;
        let (store, ledger) = (self.metadata().clone(), self.writer()?.ledger.clone());
        let data = self.data_file().cloned();
        self.close().await?;
        resize(&store, data.as_ref(), size, &mut ()).await?;
        *self = Self::open_write(store, data, ledger).await?;
        Ok(())
    }
}

/// Refuses what is not written before it was repaired, or cannot be resized.
async fn judge<S: Store>(store: &S, header: &Header) -> Result<()> {
    refuse_blocks(store, header.cluster)?;
    if header.features.incompatible & (DIRTY | CORRUPT) != 0 {
        return Err(Error::damaged(
            "the image was not closed, or is marked corrupt: it must be repaired first",
        ));
    }
    let (snapshots, _) = list_snapshots(store, header).await?;
    if header.has_data_file() && !snapshots.is_empty() {
        return Err(Error::damaged(
            "snapshots in an image with an external data file, whose bytes have one state only",
        ));
    }
    match snapshots.iter().find(|snapshot| snapshot.size.is_none()) {
        Some(snapshot) => Err(Error::unsupported(format!(
            "snapshot {} does not say its size, so the disk keeps its own: delete it first",
            snapshot.printable()
        ))),
        None => Ok(()),
    }
}

const fn entries_for(layout: Layout, size: u64) -> u64 {
    let covers = layout.table_covers();
    size.div_ceil(if covers == 0 { 1 } else { covers })
}

async fn barrier<S: Store>(store: &S) -> Result<()> {
    Update::new().barrier().apply(store).await
}

/// Marks the bitmaps durably, if there are any.
async fn mark_bitmaps<S: Store>(store: &S, header: &Header) -> Result<()> {
    if header.bitmaps().is_none() {
        return Ok(());
    }
    mark_in_use(store, header).await?;
    barrier(store).await
}

async fn shrink<S: Store>(store: &S, to: u64, watch: &mut dyn Watch) -> Result<()> {
    let mut recount = sound(store, watch).await?;
    mark_bitmaps(store, recount.header()).await?;
    recount.change_header(|header| header.size = to).await?;
    let behind = Behind::find(store, recount.header()).await?;
    let_go(recount, &behind, watch).await
}

/// Lets go of what is behind the end, if anything is.
async fn tidy<S: Store>(store: &S, header: &Header, watch: &mut dyn Watch) -> Result<()> {
    let behind = Behind::find(store, header).await?;
    match behind.is_nothing() {
        true => Ok(()),
        false => let_go(sound(store, watch).await?, &behind, watch).await,
    }
}

async fn grow<S: Store>(
    store: &S,
    mut header: Header,
    to: u64,
    watch: &mut dyn Watch,
) -> Result<()> {
    let needed = entries_for(header.layout()?, to).max(u64::from(header.l1.entries));
    let entries = u32::try_from(needed).unwrap_or(u32::MAX);
    let old = header.l1.bytes();
    let new = old.start..old.start.saturating_add(needed.saturating_mul(8));
    let whole = header.cluster.count(old.end.saturating_sub(old.start));
    let room = old
        .start
        .saturating_add(whole.saturating_mul(header.cluster.bytes()));
    if new.end > room.min(store.info().len) && new.end > old.end {
        return move_table(store, to, entries, watch).await;
    }
    mark_bitmaps(store, &header).await?;
    if new.end > old.end {
        zero(store, &header, old.end..new.end).await?;
        barrier(store).await?;
    }
    header.l1.entries = entries;
    header.size = to;
    header.features.autoclear &= KNOWN_AUTOCLEAR;
    write_header(store, &header).await
}

/// Grows the disk with a first-level table in another place.
async fn move_table<S: Store>(
    store: &S,
    to: u64,
    entries: u32,
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut recount = sound(store, watch).await?;
    mark_bitmaps(store, recount.header()).await?;
    let old = recount.header().l1.bytes();
    let len = u64::from(entries).saturating_mul(8);
    let at = recount.take(recount.header().cluster.count(len))?;
    recount.raise(Some(u64::MAX), watch).await?;
    let mut out = Appender::new(store, recount.header().cluster, at);
    out.copy(old.clone(), STEP).await?;
    let had = old.end.saturating_sub(old.start);
    out.zeros(len.saturating_sub(had)).await?;
    out.finish().await?;
    barrier(store).await?;
    let change = |header: &mut Header| {
        header.l1 = L1 { at, entries };
        header.size = to;
    };
    recount.change_header(change).await?;
    clean(store, watch).await
}

/// What is named, or held, behind the end of a disk. It is empty, but for what a shrinking that was cut
/// or other software left: QEMU keeps the machine's state there for a while.
#[derive(Debug)]
struct Behind {
    /// First-level entries, as bytes of the file.
    l1: Range<u64>,
    /// The second-level table that the end is in, when entries of it are behind the end.
    table: Option<Table>,
    /// Bytes of the file that are the last cluster behind the end, where they are not zeros.
    rest: Vec<Range<u64>>,
    /// The last cluster is compressed, and holds something behind the end.
    packed: bool,
}

/// A second-level table of which a part is behind the end.
#[derive(Debug)]
struct Table {
    /// File offset of its first-level entry.
    named_at: u64,
    /// The bytes of the file that tell of the disk, and those behind them.
    head: Range<u64>,
    tail: Range<u64>,
}

impl Behind {
    const fn is_nothing(&self) -> bool {
        self.l1.start >= self.l1.end && self.table.is_none() && self.rest.is_empty() && !self.packed
    }

    async fn find<S: Store>(store: &S, header: &Header) -> Result<Self> {
        let (layout, size, l1) = (header.layout()?, header.size, header.l1.bytes());
        let first = l1
            .start
            .saturating_add(entries_for(layout, size).saturating_mul(8));
        let mut found = Self {
            l1: first..l1.end,
            table: None,
            rest: Vec::new(),
            packed: false,
        };
        if is_zero(store, first..l1.end).await? {
            found.l1 = l1.end..l1.end;
        }
        let Some(table) = Table::find(store, header).await? else {
            return Ok(found);
        };
        // An external data file is cut instead.
        if layout.cluster.within(size) > 0 && !layout.external {
            found.look_at_last(store, header, &table).await?;
        }
        if !is_zero(store, table.tail.clone()).await? {
            found.table = Some(table);
        }
        Ok(found)
    }

    /// Looks behind the end in the cluster that it is in, the last that `table` tells of.
    async fn look_at_last<S: Store>(
        &mut self,
        store: &S,
        header: &Header,
        table: &Table,
    ) -> Result<()> {
        let layout = header.layout()?;
        let at = table.head.end.saturating_sub(layout.entry_len());
        let bytes = &read_padded(store, at, layout.entry_len()).await?;
        let entry = Entries { layout, bytes }.first_entry();
        let (within, piece) = (layout.cluster.within(header.size), layout.piece().max(1));
        let place = |e: Error| e.at(format!("offset {at:#x}"));
        if let Mapping::Packed(packed) = entry.mapping(layout, 0).map_err(place)? {
            let whole = unpack(header, packed, &read_packed(store, packed).await?)?;
            self.packed = whole.iter().skip(within as usize).any(|b| *b != 0);
            return Ok(());
        }
        for start in (floor_to(within, piece)..layout.cluster.bytes()).step_by(piece as usize) {
            let sub = start.checked_div(piece).unwrap_or(0) as u32;
            if let Mapping::Data { at } = entry.mapping(layout, sub).map_err(place)? {
                let end = at.saturating_add(start).saturating_add(piece);
                let range = at.saturating_add(start.max(within))..end;
                if !is_zero(store, range.clone()).await? {
                    self.rest.push(range);
                }
            }
        }
        Ok(())
    }
}

impl Table {
    /// The table that the end of the disk is in; none when it is between two, or nothing is there.
    async fn find<S: Store>(store: &S, header: &Header) -> Result<Option<Self>> {
        let (layout, size) = (header.layout()?, header.size);
        let covers = layout.table_covers().max(1);
        let index = size.checked_div(covers).unwrap_or(0);
        let within = size.checked_rem(covers).unwrap_or(0);
        if within == 0 || index >= u64::from(header.l1.entries) {
            return Ok(None);
        }
        let named_at = header.l1.at.saturating_add(index.saturating_mul(8));
        let entry = L1Entry(u64_at(&read_padded(store, named_at, 8).await?, 0));
        let Some(at) = entry.table(layout.cluster)? else {
            return Ok(None);
        };
        let used = layout
            .cluster
            .count(within)
            .saturating_mul(layout.entry_len());
        let middle = at.saturating_add(used);
        Ok(Some(Self {
            named_at,
            head: at..middle,
            tail: middle..at.saturating_add(layout.cluster.bytes()),
        }))
    }
}

/// Lets go of what is behind the end. In order:
///
/// 1. A second-level table that a snapshot has, too, is copied as far as it tells of the disk, to a new
///    cluster, whose refcount was raised before; barrier.
/// 2. What names the rest becomes zeros, and so do bytes behind the end; barrier.
/// 3. A repair lowers the refcounts of what nobody names any more.
async fn let_go<S: Store>(
    mut recount: Recount<'_, S>,
    behind: &Behind,
    watch: &mut dyn Watch,
) -> Result<()> {
    let store = recount.store();
    let header = recount.header().clone();
    for rest in &behind.rest {
        if recount.times(rest.start) != 1 {
            return Err(behind_is_shared());
        }
    }
    if behind.packed {
        return Err(behind_is_shared());
    }
    let mut link = None;
    if let Some(table) = &behind.table {
        if recount.times(table.head.start) > 1 {
            let at = recount.take(1)?;
            recount.raise(Some(u64::MAX), watch).await?;
            copy_table(store, &header, table, at).await?;
            barrier(store).await?;
            link = Some((table.named_at, L1Entry::owned(at).0));
        } else {
            zero(store, &header, table.tail.clone()).await?;
        }
    }
    for rest in &behind.rest {
        zero_bytes(store, &header, rest.clone()).await?;
    }
    write_words(store, header.cluster, link.as_slice()).await?;
    zero(store, &header, behind.l1.clone()).await?;
    barrier(store).await?;
    clean(store, watch).await
}

fn behind_is_shared() -> Error {
    Error::unsupported(
        "the last cluster holds something behind the end of the disk, and is compressed, or a snapshot \
         has it, too: write to it, or delete the snapshots first",
    )
}

/// Copies what a table says of the disk; others have all of it, too. Nobody names the copy yet.
async fn copy_table<S: Store>(store: &S, header: &Header, table: &Table, to: u64) -> Result<()> {
    let entry_len = header.layout()?.entry_len();
    let Range { start: mut at, end } = table.head.clone();
    let mut out = Appender::new(store, header.cluster, to);
    while at < end {
        let bytes = read_padded(store, at, end.saturating_sub(at).min(STEP)).await?;
        for entry in bytes.chunks_exact(entry_len as usize) {
            let word = L2Entry {
                word: u64_at(entry, 0),
                bits: 0,
            };
            out.push(&word.with_copied(false).to_be_bytes()).await?;
            out.push(entry.get(8..).unwrap_or_default()).await?;
        }
        at = at.saturating_add(bytes.len() as u64);
    }
    out.zeros(table.tail.end.saturating_sub(table.tail.start))
        .await?;
    out.finish().await
}

/// Whether a range of the file is zeros. It begins at a multiple of 8, or all of its sector is asked of.
async fn is_zero<S: Store>(store: &S, range: Range<u64>) -> Result<bool> {
    let mut span = Span::new(store, range);
    while let Some(piece) = span.next().await? {
        if piece.bytes.iter().any(|b| *b != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Zeroes the numbers of 8 bytes in a range of a table.
async fn zero<S: Store>(store: &S, header: &Header, range: Range<u64>) -> Result<()> {
    let mut span = Span::new(store, range);
    while let Some(piece) = span.next().await? {
        let words: Vec<_> = piece.words().map(|(at, _)| (at, 0)).collect();
        write_words(store, header.cluster, &words).await?;
    }
    Ok(())
}

/// Zeroes bytes of a cluster of guest data, of which nobody sees any.
async fn zero_bytes<S: Store>(store: &S, header: &Header, range: Range<u64>) -> Result<()> {
    let unit = unit(header.cluster);
    let end = range.end.min(store.info().len);
    for at in (floor_to(range.start, unit)..end).step_by(unit as usize) {
        let mut bytes = read_unit(store, at, unit).await?;
        let skip = range.start.saturating_sub(at) as usize;
        bytes.iter_mut().skip(skip).for_each(|b| *b = 0);
        write_unit(store, at, bytes).await?;
    }
    Ok(())
}
