//! Snapshots of an image that nobody uses: made, deleted, and reverted to.
//!
//! Only an image in which a check finds no errors is changed: then every count is known, and each
//! of these is the same few steps. Each step ends with a barrier; cut anywhere, the image is the old
//! one or the new one, with leaks at worst.
//!
//! 1. Refcounts go up to what they will be, those of new clusters at the end of the file included.
//! 2. COPIED is taken away from what will be shared: nobody writes it in place any more.
//! 3. New tables are written to the new clusters, which nobody names yet.
//! 4. One write of the header names them.
//! 5. A repair returns what nobody names any more, and gives COPIED back.
//!
//! An error of the storage is such a cut: the call may have done its work all the same.
//!
//! The machine's state that a snapshot may hold is part of its tables, and stays with it. Guest data is
//! never touched. Source: QEMU `docs/interop/qcow2.rst`, "Snapshots".

use super::check::{Flags, Recount, clean, sound};
use super::header::{Header, L1, SnapshotsAt};
use super::open::{read_padded, snapshot_l1};
use super::snapshot::{self, Snapshot};
use super::table::L1Entry;
use super::words::Appender;
use crate::progress::Watch;
use crate::store::Store;
use crate::update::Update;
use crate::{Error, Kind, Result, limits};
use std::ops::Range;

/// Bytes of the longest name that is given: QEMU shows no more of it.
const NAME_MAX: usize = 255;
/// Bytes of tables that are copied in one step.
const STEP: u64 = 64 << 10;

/// A snapshot to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name, 1 to 255 bytes, none of them 0, that no other snapshot of the image has.
    pub name: Vec<u8>,
    /// When it is made, in seconds since 1970.
    pub seconds: u32,
    /// The part of a second behind that, in nanoseconds.
    pub nanoseconds: u32,
}

/// The counts of an image that may have snapshots.
async fn counts<'s, S: Store>(store: &'s S, watch: &mut dyn Watch) -> Result<Recount<'s, S>> {
    let recount = sound(store, watch).await?;
    match recount.header().has_data_file() {
        true => Err(Error::unsupported(
            "snapshots in an image with an external data file, whose bytes have one state only",
        )),
        false => Ok(recount),
    }
}

/// Makes a snapshot of the disk as it is now, durably; its ID. `Exists` when one has its name,
/// `Unsupported` with an external data file and where refcounts are too narrow to share clusters,
/// `Damaged` when the image must be repaired first.
pub async fn create<S: Store>(
    store: &S,
    wanted: &Wanted,
    watch: &mut dyn Watch,
) -> Result<Vec<u8>> {
    let mut recount = counts(store, watch).await?;
    let header = recount.header().clone();
    let listed = List::read(store, &header, &[]).await?;
    refuse_name(wanted, store, &header).await?;
    let id = listed.last_id.saturating_add(1).to_string().into_bytes();
    let l1_at = share(&mut recount, header.l1, watch).await?;
    let entry = snapshot::encode(wanted, &id, l1_at, &header);
    let table = listed.bytes(header.snapshots);
    let list = [table, 0..0];
    let count = header.snapshots.count.saturating_add(1);
    let table_at = take_table(&mut recount, count, &list, &entry)?;
    recount.raise(Some(u64::MAX), watch).await?;
    recount.mark(header.l1, Flags::Clear, watch).await?;
    copy_l1(store, &header, header.l1, l1_at).await?;
    copy_list(store, &header, &list, &entry, table_at).await?;
    let at = SnapshotsAt {
        at: table_at,
        count,
    };
    switch(&mut recount, |header| header.snapshots = at).await?;
    clean(store, watch).await?;
    Ok(id)
}

/// Deletes the snapshot with an ID, durably. `NotFound` when there is none; otherwise as [`create`].
pub async fn delete<S: Store>(store: &S, id: &[u8], watch: &mut dyn Watch) -> Result<()> {
    let mut recount = counts(store, watch).await?;
    let header = recount.header().clone();
    let listed = List::read(store, &header, id).await?;
    let (_, entry) = listed.found(id)?;
    let table = listed.bytes(header.snapshots);
    let list = [table.start..entry.start, entry.end..table.end];
    let count = header.snapshots.count.saturating_sub(1);
    let mut at = SnapshotsAt { at: 0, count };
    if count > 0 {
        at.at = take_table(&mut recount, count, &list, &[])?;
    }
    recount.raise(Some(u64::MAX), watch).await?;
    if count > 0 {
        copy_list(store, &header, &list, &[], at.at).await?;
    }
    switch(&mut recount, |header| header.snapshots = at).await?;
    clean(store, watch).await
}

/// Makes the disk what it was at the snapshot with an ID, its size included, durably. What it is now
/// is lost; the snapshot stays. `NotFound` when there is none, `Unsupported` in an image with bitmaps,
/// which would not tell what changed; otherwise as [`create`].
pub async fn revert<S: Store>(store: &S, id: &[u8], watch: &mut dyn Watch) -> Result<()> {
    let mut recount = counts(store, watch).await?;
    let header = recount.header().clone();
    if header.bitmaps().is_some() {
        return Err(Error::unsupported(
            "the image has bitmaps, which would not tell what a revert changes: `qemu-img bitmap --remove FILE \
             NAME` removes them",
        ));
    }
    let listed = List::read(store, &header, id).await?;
    let (snapshot, _) = listed.found(id)?;
    let (old, size) = snapshot_l1(store, &header, &snapshot)?;
    let at = share(&mut recount, old, watch).await?;
    recount.raise(Some(u64::MAX), watch).await?;
    recount.mark(old, Flags::Clear, watch).await?;
    copy_l1(store, &header, old, at).await?;
    let l1 = L1 {
        at,
        entries: old.entries,
    };
    switch(&mut recount, |header| {
        header.l1 = l1;
        header.size = size;
    })
    .await?;
    clean(store, watch).await
}

/// Counts what a first-level table names once more, and takes clusters for a copy of it.
async fn share<S: Store>(
    recount: &mut Recount<'_, S>,
    l1: L1,
    watch: &mut dyn Watch,
) -> Result<u64> {
    recount.add_tree(l1.bytes(), watch).await?;
    if recount.is_above() {
        return Err(Error::unsupported(format!(
            "refcounts of {} bits do not say how often clusters would be shared",
            recount.header().refcounts.width.bits()
        )));
    }
    let range = l1.bytes();
    let len = range.end.saturating_sub(range.start);
    match recount.header().cluster.count(len) {
        0 => Ok(0),
        count => recount.take(count),
    }
}

/// Takes clusters for a table of `count` snapshots: parts of the old one, and an entry.
fn take_table<S: Store>(
    recount: &mut Recount<'_, S>,
    count: u32,
    list: &[Range<u64>],
    entry: &[u8],
) -> Result<u64> {
    let lengths = list.iter().map(|part| part.end.saturating_sub(part.start));
    let len = lengths.fold(entry.len() as u64, u64::saturating_add);
    if len > limits::QCOW2_DIRECTORY_MAX || count > limits::QCOW2_SNAPSHOTS_MAX {
        return Err(Error::unsupported(format!(
            "{count} snapshots in a table of {len} bytes, more than there may be"
        )));
    }
    let clusters = recount.header().cluster.count(len);
    recount.take(clusters)
}

/// Writes a table of snapshots: parts of the old one, and an entry. Nobody names it yet.
async fn copy_list<S: Store>(
    store: &S,
    header: &Header,
    list: &[Range<u64>],
    entry: &[u8],
    to: u64,
) -> Result<()> {
    let mut out = Appender::new(store, header.cluster, to);
    for part in list {
        out.copy(part.clone(), STEP).await?;
    }
    out.push(entry).await?;
    out.finish().await
}

/// Copies a first-level table, all of whose entries are shared. Nobody names the copy yet.
async fn copy_l1<S: Store>(store: &S, header: &Header, l1: L1, to: u64) -> Result<()> {
    let Range { start: mut at, end } = l1.bytes();
    let mut out = Appender::new(store, header.cluster, to);
    while at < end {
        let len = end.saturating_sub(at).min(STEP);
        let bytes = read_padded(store, at, len).await?;
        for word in bytes.chunks_exact(8) {
            let entry = L1Entry(super::be::u64_at(word, 0));
            out.push(&entry.with_copied(false).to_be_bytes()).await?;
        }
        at = at.saturating_add(len);
    }
    out.finish().await
}

/// Step 4: what was written becomes durable, and then the header that names it.
async fn switch<S: Store>(
    recount: &mut Recount<'_, S>,
    change: impl FnOnce(&mut Header),
) -> Result<()> {
    Update::new().barrier().apply(recount.store()).await?;
    recount.change_header(change).await
}

/// Refuses a name that cannot be given, or that a snapshot has.
async fn refuse_name<S: Store>(wanted: &Wanted, store: &S, header: &Header) -> Result<()> {
    let name = wanted.name.as_slice();
    if !(1..=NAME_MAX).contains(&name.len()) || name.contains(&0) {
        return Err(Error::invalid(format!(
            "a snapshot with a name of {} bytes: 1 to {NAME_MAX} are possible, none of them 0",
            name.len()
        )));
    }
    let mut same = false;
    each(store, header, |snapshot, _| same |= snapshot.name == name).await?;
    match same {
        true => Err(Error::new(
            Kind::Exists,
            format!(
                "snapshot {} is there already",
                super::extension::printable(name)
            ),
        )),
        false => Ok(()),
    }
}

/// What is looked for in the table of snapshots.
struct List {
    /// The largest number that is an ID.
    last_id: u64,
    /// The first snapshot with the ID, and the bytes of the file that its entry is.
    found: Option<(Snapshot, Range<u64>)>,
    /// File offset where the table ends.
    end: u64,
}

impl List {
    async fn read<S: Store>(store: &S, header: &Header, id: &[u8]) -> Result<Self> {
        let (mut last_id, mut found) = (0u64, None);
        let end = each(store, header, |snapshot, entry| {
            let text = std::str::from_utf8(&snapshot.id).unwrap_or_default();
            last_id = last_id.max(text.parse().unwrap_or(0));
            if snapshot.id == id && found.is_none() {
                found = Some((snapshot, entry));
            }
        })
        .await?;
        Ok(Self {
            last_id,
            found,
            end,
        })
    }

    fn found(&self, id: &[u8]) -> Result<(Snapshot, Range<u64>)> {
        self.found.clone().ok_or_else(|| {
            let id = super::extension::printable(id);
            Error::new(Kind::NotFound, format!("there is no snapshot with ID {id}"))
        })
    }

    /// The bytes of the file that the table is.
    const fn bytes(&self, table: SnapshotsAt) -> Range<u64> {
        match table.count {
            0 => 0..0,
            _ => table.at..self.end,
        }
    }
}

/// Goes through the table; the file offset where it ends.
async fn each<S: Store>(
    store: &S,
    header: &Header,
    mut visit: impl FnMut(Snapshot, Range<u64>),
) -> Result<u64> {
    let mut at = header.snapshots.at;
    for _ in 0..header.snapshots.count {
        let rest = store.info().len.saturating_sub(at).max(1);
        let bytes = read_padded(store, at, rest.min(snapshot::ENTRY_MAX as u64)).await?;
        let (found, len) = Snapshot::parse(&bytes)?;
        let end = at.saturating_add(len as u64);
        visit(found, at..end);
        at = end;
    }
    Ok(at)
}
