//! An open qcow2 image: the [`Layer`] over a store.
//!
//! Owns its stores and what it keeps of them in memory: table slices and the last cluster that was
//! unpacked, both bounded. Unpacks one cluster at a time: a lock is held across I/O for that alone.
//! One that is open for writing has a writing half ([`super::writer`]); how it begins and ends is in
//! `start`, where clusters come from in `supply`, and the flush pass in `sync`.

use super::be::u64_at;
use super::cache::Slices;
use super::header::{Header, L1};
use super::open::{read_packed, read_padded, unpack};
use super::partial::Bits;
use super::run::Entries;
use super::table::{L1Entry, L2Entry, Layout, Mapping, Packed};
use super::writer::{Fate, NewTable, Part, Reserved, Writer, lock};
use crate::layer::{Below, Extent, Geometry, Layer, Place};
use crate::pending::To;
use crate::store::Store;
use crate::units::{HostCluster, VirtCluster, floor_to};
use crate::{Error, Kind, Result};
use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Bytes of new tables that wait for a pass, which has them in memory.
const TABLES_MAX: u64 = 16 << 20;

/// An open qcow2 image.
#[derive(Debug)]
pub struct Qcow2<S> {
    header: Header,
    layout: Layout,
    /// What is shown: the active table, or a snapshot's.
    l1: L1,
    size: u64,
    store: S,
    /// The external data file.
    data: Option<S>,
    slices: Slices,
    /// The last compressed cluster that was read, or why it does not unpack: small reads in a row
    /// unpack it once, and many readers never need more memory than one.
    unpacked: Mutex<Option<(Packed, Result<Bytes>)>>,
    /// The writing half; none when it is open for reading.
    writer: Option<Writer>,
}

/// What the first-level table says of a guest offset.
enum Lookup {
    /// So many bytes are in no second-level table.
    Absent(u64),
    /// Second-level entries, from that of the offset to the end of their slice.
    Entries {
        /// File offset of the first.
        at: u64,
        bytes: Bytes,
        /// Nobody else has the table.
        owned: bool,
    },
}

impl<S: Store> Qcow2<S> {
    pub(super) fn assemble(header: Header, layout: Layout, store: S, data: Option<S>) -> Self {
        Self {
            layout,
            l1: header.l1,
            size: header.size,
            slices: Slices::new(header.cluster),
            unpacked: Mutex::new(None),
            writer: None,
            header,
            store,
            data,
        }
    }

    /// Shows another state of the disk.
    pub(super) const fn show(&mut self, l1: L1, size: u64) {
        self.l1 = l1;
        self.size = size;
    }

    /// The header as it was when the image was opened.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Whether a cluster of it may be there in part.
    pub const fn has_subclusters(&self) -> bool {
        self.layout.extended
    }

    /// The store of header and tables.
    pub const fn metadata(&self) -> &S {
        &self.store
    }

    /// How its tables are to be read.
    pub(super) const fn layout(&self) -> Layout {
        self.layout
    }

    /// The writing half. `ReadOnly` when it is not open for writing.
    pub(super) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(read_only)
    }

    /// Opens it for writing, alone.
    pub(super) fn write_with(&mut self, writer: Writer) {
        self.writer = Some(writer);
    }

    /// Fails when the image may not be written: read-only, or poisoned by an earlier failure.
    pub(super) fn may_write(&self) -> Result<&Writer> {
        match self.writer()? {
            writer if writer.ledger.is_poisoned() => Err(Error::poisoned()),
            writer => Ok(writer),
        }
    }

    /// Whether a failed flush or metadata write forbids further success.
    pub fn is_poisoned(&self) -> bool {
        self.writer.as_ref().is_some_and(|w| w.ledger.is_poisoned())
    }

    /// Forbids further success, to this process and its successors.
    pub fn poison(&self) {
        if let Some(writer) = &self.writer {
            writer.ledger.poison();
        }
    }

    /// Whether answered changes wait for a sync to become durable.
    pub fn has_pending(&self) -> bool {
        let awaits = |w: &Writer| {
            let state = lock(&w.state);
            state.pending.awaits_pass() || !state.tables.is_empty()
        };
        self.writer.as_ref().is_some_and(awaits)
    }

    /// Bytes of a slice.
    pub(super) const fn slice_len(&self) -> u64 {
        self.slices.unit()
    }

    /// What was read before counts no more.
    pub(super) fn new_epoch(&self) {
        self.slices.new_epoch();
    }

    /// Changes with the tables.
    pub(super) fn epoch(&self) -> u64 {
        self.slices.epoch()
    }

    /// Slices that were written are the truth.
    pub(super) fn keep(&self, slices: impl IntoIterator<Item = (u64, Bytes)>) {
        for (at, slice) in slices {
            self.slices.keep(at, slice);
        }
    }

    /// Slices whose writing failed are read again.
    pub(super) fn forget(&self, slices: impl IntoIterator<Item = u64>) {
        slices.into_iter().for_each(|at| self.slices.forget(at));
    }

    /// The slice of metadata that begins at `start`.
    pub(super) async fn slice(&self, start: u64) -> Result<Bytes> {
        if let Some(slice) = self.slices.find(start) {
            return Ok(slice);
        }
        let epoch = self.epoch();
        let slice = read_padded(&self.store, start, self.slices.unit()).await?;
        self.slices.keep_read(start, slice.clone(), epoch);
        Ok(slice)
    }

    /// Table bytes from `at` to the end of their slice, or to the end of the table. `Damaged` when
    /// not all of them are in the file.
    async fn table(&self, at: u64, end: u64) -> Result<Bytes> {
        let start = self.slices.start(at);
        let last = start.saturating_add(self.slices.unit()).min(end);
        let len = len_up_to(&self.store, last)?;
        if last > len {
            return Err(Error::damaged(format!(
                "offset {at:#x}: a table that goes on to {last:#x}, behind the end of the file ({len} bytes)"
            )));
        }
        let slice = self.slice(start).await?;
        let stop = end.saturating_sub(start).min(slice.len() as u64);
        let from = at.saturating_sub(start).min(stop);
        Ok(slice.slice(from as usize..stop as usize))
    }

    /// What the durable tables say of `guest`, as far as one slice of each tells.
    async fn look_up(&self, guest: u64) -> Result<Lookup> {
        loop {
            let epoch = self.epoch();
            let found = self.look_once(guest).await;
            // A table may have moved meanwhile, and another one have its place.
            if epoch == self.epoch() {
                return found;
            }
        }
    }

    async fn look_once(&self, guest: u64) -> Result<Lookup> {
        let covers = self.layout.table_covers();
        let index = guest.checked_div(covers).unwrap_or(0);
        let entries = u64::from(self.l1.entries);
        if index >= entries {
            return Ok(Lookup::Absent(u64::MAX));
        }
        let entry_at = |n: u64| self.l1.at.saturating_add(n.saturating_mul(8));
        let l1 = self.table(entry_at(index), entry_at(entries)).await?;
        let place = |e: Error| e.at(format!("offset {:#x}", entry_at(index)));
        let entry = L1Entry(u64_at(&l1, 0));
        let Some(table) = entry.table(self.layout.cluster).map_err(place)? else {
            let empty = l1.chunks_exact(8).take_while(|e| e.iter().all(|b| *b == 0));
            let tables = (empty.count() as u64).max(1);
            let end = index.saturating_add(tables).saturating_mul(covers);
            return Ok(Lookup::Absent(end.saturating_sub(guest)));
        };
        let n = guest.checked_rem(covers).unwrap_or(0) >> self.layout.cluster.log2();
        let at = table.saturating_add(n.saturating_mul(self.layout.entry_len()));
        let end = table.saturating_add(self.layout.cluster.bytes());
        let bytes = self.table(at, end).await.map_err(|e| e.at("L2 table"))?;
        let owned = entry.copied();
        Ok(Lookup::Entries { at, bytes, owned })
    }

    /// What there is of an extent of data: a file may end inside its last cluster, whose rest reads
    /// as zeros.
    fn cut_to_file(&self, at: u64, len: u64) -> Result<Extent> {
        let cluster = floor_to(at, self.layout.cluster.bytes());
        let end = len_up_to(self.store(), cluster.saturating_add(1))?;
        if cluster >= end {
            return Err(Error::damaged(format!(
                "a cluster at {cluster:#x}, behind the end of the file ({end} bytes)"
            )));
        }
        let rest = end.saturating_sub(at);
        if rest > 0 {
            return Ok(Extent::Data {
                at,
                len: len.min(rest),
            });
        }
        let stop = cluster.saturating_add(self.layout.cluster.bytes());
        Ok(Extent::Zero {
            len: len.min(stop.saturating_sub(at)),
        })
    }

    /// The bytes of a compressed cluster.
    async fn whole(&self, packed: Packed) -> Result<Bytes> {
        let mut last = self.unpacked.lock().await;
        if let Some((_, known)) = last.as_ref().filter(|(at, _)| *at == packed) {
            return copy(known);
        }
        // Not kept when it fails: the storage may give it the next time.
        let bytes = read_packed(&self.store, packed).await?;
        let whole = unpack(&self.header, packed, &bytes).map(Bytes::from);
        let (_, known) = last.insert((packed, whole));
        copy(known)
    }

    /// What was compressed when it was looked for, and has another place by now: somebody else merges
    /// something into this image.
    async fn read_moved(&self, guest: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let len = buf.len() as u64;
        match self.map(guest, len).await? {
            Extent::Data { at, len: found } if found >= len => {
                buf.copy_from_slice(&read_padded(self.store(), at, len).await?);
                Ok(buf)
            }
            _ => Err(Error::invalid("is not compressed")),
        }
    }
}

/// What is pending of a guest range.
enum Known {
    /// Its first cluster is pending, and this is how it begins.
    Is(Extent),
    /// So much of it is not pending.
    Not { len: u64 },
}

/// The cluster that a guest cluster has to itself, when more of it may be filled.
struct Own {
    host: u32,
    /// What is there of it.
    bits: Bits,
}

impl<S: Store> Qcow2<S> {
    /// What is pending of `guest .. guest + len`.
    fn pending(&self, guest: u64, len: u64) -> Result<Known> {
        let Some(writer) = &self.writer else {
            return Ok(Known::Not { len });
        };
        let size = self.layout.cluster;
        let n = size.cluster_of(guest);
        let n = n.ok_or_else(|| Error::invalid("offset past the tables"))?;
        let within = size.within(guest);
        let here = size.bytes().saturating_sub(within).min(len);
        let state = lock(&writer.state);
        Ok(match state.pending.find(n) {
            Some(To::At(host)) => Known::Is(match state.partial.find(host.0) {
                Some(bits) => self.part_of(host, bits, within, here)?,
                None => {
                    let at = self.data_at(host).saturating_add(within);
                    Extent::Data { at, len: here }
                }
            }),
            Some(To::Nowhere) => Known::Is(Extent::Absent { len: here }),
            Some(To::Zeros) => Known::Is(Extent::Zero { len: here }),
            None => {
                let next = state.pending.next_from(n).map(|next| size.start(next));
                let rest = next.map_or(u64::MAX, |next| next.saturating_sub(guest));
                Known::Not { len: len.min(rest) }
            }
        })
    }

    /// What is said of a range of a cluster that is there in part.
    fn part_of(&self, host: HostCluster, bits: Bits, within: u64, len: u64) -> Result<Extent> {
        let layout = self.layout;
        let entry = L2Entry::owned(Some(self.data_at(host)), bits, layout);
        let bytes = &entry.encode(layout);
        Entries { layout, bytes }.extent(within, len)
    }

    /// Where a range is written of which nothing is pending, as second-level entries say it.
    fn place_by(&self, guest: u64, len: u64, bytes: &[u8], owned: bool) -> Result<Place> {
        let layout = self.layout;
        let within = layout.cluster.within(guest);
        let entries = Entries { layout, bytes };
        let end = within.saturating_add(len);
        let here = layout.cluster.bytes().saturating_sub(within).min(len);
        let Some((at, run)) = entries.own(end)?.filter(|_| owned) else {
            return match owned && self.is_partly(entries.first_entry())? {
                true => self.place_in(entries.extent(within, here)?),
                false => Ok(Place::New { len: here }),
            };
        };
        let last = at.saturating_add(run).saturating_sub(1);
        self.judge_data(at, last)?;
        if layout.external && at != guest.saturating_sub(within) {
            return Err(elsewhere(at));
        }
        Ok(Place::Here {
            at: at.saturating_add(within),
            len: run.saturating_sub(within).min(len),
        })
    }

    /// Whether an entry in a table that nobody else has names a cluster that may be there in part, and
    /// nobody else has that.
    fn is_partly(&self, entry: L2Entry) -> Result<bool> {
        let packed = matches!(entry.mapping(self.layout, 0)?, Mapping::Packed(_));
        let parted = self.layout.extended && !self.layout.external;
        if !parted || !entry.copied() || packed {
            return Ok(false);
        }
        let host = entry.host(self.layout)?;
        let host = host.and_then(|at| self.layout.cluster.cluster_of(at));
        let writer = self.writer()?;
        Ok(host.is_some_and(|host| lock(&writer.state).partial.has_name(host)))
    }

    /// Where an extent of a cluster is written that nobody else has.
    fn place_in(&self, extent: Extent) -> Result<Place> {
        let Extent::Data { at, len } = extent else {
            return Ok(Place::New { len: extent.len() });
        };
        self.judge_data(at, at.saturating_add(len).saturating_sub(1))?;
        Ok(Place::Here { at, len })
    }

    /// What a cluster for `cluster` is called: its number in the file. One of an external data file, where
    /// every cluster is at its guest offset, is called after the guest's, and one more, because 0 is no
    /// place.
    fn data_name(&self, cluster: VirtCluster) -> HostCluster {
        HostCluster(cluster.0.saturating_add(1))
    }

    /// File offset of a cluster of data.
    pub(super) const fn data_at(&self, host: HostCluster) -> u64 {
        let n = match self.layout.external {
            true => host.0.saturating_sub(1),
            false => host.0,
        };
        self.layout.cluster.start(n)
    }

    /// Refuses bytes of the file that are named as guest data and are not in it, or hold metadata. Those of
    /// an external data file hold nothing else.
    fn judge_data(&self, first: u64, last: u64) -> Result<()> {
        let size = self.layout.cluster;
        if self.layout.external {
            return Ok(());
        }
        let inside = last < self.store.info().len;
        match (size.cluster_of(first), size.cluster_of(last)) {
            (Some(first), Some(last)) if inside => {
                lock(&self.writer()?.state).refuse_metadata(first..=last)
            }
            _ => Err(Error::damaged(format!(
                "a cluster at {first:#x}, behind the end of the file"
            ))),
        }
    }

    /// Clusters of the file that a guest cluster has, each once; none of an external data file, which
    /// counts no users.
    async fn held(&self, cluster: VirtCluster) -> Result<Vec<u32>> {
        if self.layout.external {
            return Ok(Vec::new());
        }
        if let Some(to) = lock(&self.writer()?.state).pending.find(cluster.0) {
            return Ok(to.host().map(|host| host.0).into_iter().collect());
        }
        self.held_durably(cluster).await
    }

    /// Clusters of the file that a guest cluster has as the tables say it, each once.
    pub(super) async fn held_durably(&self, cluster: VirtCluster) -> Result<Vec<u32>> {
        if self.layout.external {
            return Ok(Vec::new());
        }
        let size = self.layout.cluster;
        let guest = size.start(cluster.0);
        let place = |e: Error| e.at(format!("guest offset {guest:#x}"));
        let Lookup::Entries { at, bytes, .. } = self.look_up(guest).await.map_err(place)? else {
            return Ok(Vec::new());
        };
        let place = |e: Error| place(e.at(format!("offset {at:#x}")));
        let layout = self.layout;
        let entries = Entries {
            layout,
            bytes: &bytes,
        };
        let names = entries.first_entry().names(layout).map_err(place)?;
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let last = names.end.saturating_sub(1);
        // Of a compressed cluster the last sectors may be said to be behind the end.
        let last = last.min(self.store.info().len.saturating_sub(1));
        self.judge_data(names.start, last).map_err(place)?;
        let number = |at: u64| size.cluster_of(at).unwrap_or(u32::MAX);
        Ok((number(names.start)..=number(last)).collect())
    }

    /// The cluster of `cluster` when it is nobody else's and more subclusters of it may be filled.
    async fn own_part(&self, writer: &Writer, cluster: VirtCluster) -> Result<Option<Own>> {
        if !self.layout.extended || self.layout.external {
            return Ok(None);
        }
        let named = |own: &Own| lock(&writer.state).partial.has_name(own.host);
        let pending = lock(&writer.state).pending.find(cluster.0);
        if let Some(to) = pending {
            let Some(HostCluster(host)) = to.host() else {
                return Ok(None);
            };
            let bits = lock(&writer.state).partial.find(host);
            return Ok(bits.map(|bits| Own { host, bits }).filter(named));
        }
        let (host, entry) = self.own_entry(cluster).await?;
        let bits = Bits::of(entry.bits);
        Ok(host.map(|host| Own { host, bits }).filter(named))
    }

    /// The durable entry of `cluster`, and the file cluster in it when nobody else has that.
    pub(super) async fn own_entry(&self, cluster: VirtCluster) -> Result<(Option<u32>, L2Entry)> {
        let size = self.layout.cluster;
        let guest = size.start(cluster.0);
        let place = |e: Error| e.at(format!("guest offset {guest:#x}"));
        let nothing = L2Entry { word: 0, bits: 0 };
        let Lookup::Entries { bytes, owned, .. } = self.look_up(guest).await.map_err(place)? else {
            return Ok((None, nothing));
        };
        let entries = Entries {
            layout: self.layout,
            bytes: &bytes,
        };
        let entry = entries.first_entry();
        let packed = matches!(entries.first().map_err(place)?, Mapping::Packed(_));
        if !owned || !entry.copied() || packed {
            return Ok((None, entry));
        }
        let host = entry.host(self.layout).map_err(place)?;
        let Some(at) = host else {
            return Ok((None, entry));
        };
        let last = at.saturating_add(size.bytes()).saturating_sub(1);
        self.judge_data(at, last).map_err(place)?;
        Ok((size.cluster_of(at), entry))
    }

    /// Takes two words of the ledger: a mapping's, and one for the subclusters of its cluster.
    fn take_slots(&self, writer: &Writer) -> Result<(usize, Option<usize>)> {
        let mut state = lock(&writer.state);
        let slot = state.pending.take_slot()?;
        if !self.layout.extended {
            return Ok((slot, None));
        }
        let second = state.pending.take_slot();
        let second = second.inspect_err(|_| state.pending.return_slot(slot))?;
        Ok((slot, Some(second)))
    }

    /// Takes words for `cluster`, and the cluster that it has, or another one.
    async fn reserve_one(&self, writer: &Writer, cluster: VirtCluster) -> Result<Reserved> {
        if self.layout.external {
            return self.reserve_outside(writer, cluster).await;
        }
        let own = self.own_part(writer, cluster).await?;
        let old = match &own {
            Some(_) => Vec::new(),
            None => self.held(cluster).await?,
        };
        self.own_table(writer, cluster).await?;
        let is_new = own.is_none();
        let strays = |own: &Own| lock(&writer.state).strays.contains(own.host);
        if own.as_ref().is_some_and(strays) {
            self.settle_strays(writer).await;
        }
        let (slot, second) = self.take_slots(writer)?;
        let own = match own {
            Some(own) => own,
            None => {
                let nothing = Bits { taken: 0, zero: 0 };
                let taken = self.take(writer).await;
                let host = taken.inspect_err(|_| {
                    let mut state = lock(&writer.state);
                    let slots = std::iter::once(slot).chain(second);
                    slots.for_each(|slot| state.pending.return_slot(slot));
                })?;
                Own {
                    host,
                    bits: nothing,
                }
            }
        };
        let part = |slot| {
            let named = lock(&writer.state).partial.has_name(own.host);
            Part {
                slot,
                bits: if named { own.bits } else { Bits::ALL },
                piece: named.then(|| self.layout.piece()),
            }
        };
        Ok(Reserved {
            cluster: HostCluster(own.host),
            host: self.layout.cluster.start(own.host),
            slot,
            part: second.map(part),
            is_new,
            old,
            leaves: false,
            fate: Fate::Untouched,
            state: Arc::clone(&writer.state),
        })
    }

    /// Takes a word for `cluster`, whose place in the external data file is its own always, whatever is
    /// there.
    async fn reserve_outside(&self, writer: &Writer, cluster: VirtCluster) -> Result<Reserved> {
        self.metadata().room()?;
        let name = self.data_name(cluster);
        self.own_table(writer, cluster).await?;
        if lock(&writer.state).strays.contains(name.0) {
            self.settle_strays(writer).await;
        }
        let slot = lock(&writer.state).pending.take_slot()?;
        Ok(Reserved {
            cluster: name,
            host: self.data_at(name),
            slot,
            part: None,
            is_new: false,
            old: Vec::new(),
            leaves: false,
            fate: Fate::Untouched,
            state: Arc::clone(&writer.state),
        })
    }

    /// Writes that were given up to clusters in use land before the next one does.
    pub(super) async fn settle_strays(&self, writer: &Writer) {
        let strays = std::mem::take(&mut lock(&writer.state).strays);
        if !strays.is_empty() {
            self.store().settle().await;
        }
    }

    /// The external data file.
    pub const fn data_file(&self) -> Option<&S> {
        self.data.as_ref()
    }

    /// Takes the mapping of `cluster` away, and frees what it had.
    async fn unmap(&self, writer: &Writer, cluster: VirtCluster, to: To) -> Result<()> {
        let old = self.held(cluster).await?;
        self.own_table(writer, cluster).await?;
        let mut state = lock(&writer.state);
        state.pending.unmap(cluster, to)?;
        for old in old {
            state.give_up(old);
        }
        Ok(())
    }

    /// Whether all of `cluster` is as `is` says.
    async fn is_all(&self, cluster: VirtCluster, is: impl Fn(Extent) -> bool) -> Result<bool> {
        let size = self.layout.cluster;
        let start = size.start(cluster.0);
        let len = size.bytes().min(self.size.saturating_sub(start));
        let extent = self.map(start, len).await?;
        Ok(is(extent) && extent.len() == len)
    }

    /// Sees to it that the table of `cluster` may be written: it is nobody else's, or a new one will
    /// take its place.
    pub(super) async fn own_table(&self, writer: &Writer, cluster: VirtCluster) -> Result<()> {
        let index = u64::from(cluster.0).checked_div(self.layout.entries());
        let index = index.unwrap_or(0) as u32;
        loop {
            if lock(&writer.state).tables.contains_key(&index) {
                return Ok(());
            }
            let epoch = self.epoch();
            let entry = self.l1_entry(index).await?;
            let old = entry.table(self.layout.cluster)?;
            if old.is_some() && entry.copied() {
                return Ok(());
            }
            let slot = {
                let mut state = lock(&writer.state);
                let bytes = self.layout.cluster.bytes();
                let waiting = (state.tables.len() as u64).saturating_mul(bytes);
                if waiting >= TABLES_MAX {
                    let what = "too many tables wait for a flush";
                    return Err(Error::new(Kind::Pending, what));
                }
                state.pending.take_slot()?
            };
            let taken = self.take(writer).await;
            let host = taken.inspect_err(|_| lock(&writer.state).pending.return_slot(slot))?;
            let mut state = lock(&writer.state);
            // It may have been put in meanwhile, or by another.
            if epoch != self.epoch() || state.tables.contains_key(&index) {
                state.alloc.give_back(host);
                state.pending.return_slot(slot);
                continue;
            }
            let word = self.table_word(index);
            state.pending.put_beyond(slot, word, host);
            state.add_table(index, NewTable::new(host, old, slot));
            return Ok(());
        }
    }

    /// What a word of the ledger calls second-level table `index`.
    pub(super) fn table_word(&self, index: u32) -> u32 {
        self.guest_clusters().saturating_add(index)
    }

    /// Clusters of the guest.
    pub(super) fn guest_clusters(&self) -> u32 {
        u32::try_from(self.layout.cluster.count(self.size)).unwrap_or(u32::MAX)
    }

    /// Entry `index` of the first-level table.
    pub(super) async fn l1_entry(&self, index: u32) -> Result<L1Entry> {
        if index >= self.l1.entries {
            return Err(Error::invalid("a cluster past the L1 table"));
        }
        let at = self.l1_at(index);
        let bytes = self.table(at, at.saturating_add(8)).await?;
        Ok(L1Entry(u64_at(&bytes, 0)))
    }

    /// File offset of entry `index` of the first-level table.
    pub(super) fn l1_at(&self, index: u32) -> u64 {
        self.l1
            .at
            .saturating_add(u64::from(index).saturating_mul(8))
    }

    /// The first-level table.
    pub(super) const fn l1(&self) -> L1 {
        self.l1
    }
}

/// The length of a file, looked at again when it seems to end before `end`: what another process puts into
/// a layer that is merged into meanwhile is behind the end that it had.
fn len_up_to<S: Store>(store: &S, end: u64) -> Result<u64> {
    match store.info().len {
        len if len < end => store.look_at_len(),
        len => Ok(len),
    }
}

fn copy(known: &Result<Bytes>) -> Result<Bytes> {
    match known {
        Ok(bytes) => Ok(bytes.clone()),
        Err(e) => Err(e.duplicate()),
    }
}

/// Why an entry that names another place of an external data file than its own is not used.
fn elsewhere(at: u64) -> Error {
    Error::damaged(format!("is at {at:#x} of the external data file"))
}

fn read_only() -> Error {
    Error::new(Kind::ReadOnly, "this qcow2 image is open read-only")
}

impl<S: Store> Layer for Qcow2<S> {
    type Store = S;
    type Reservation = Reserved;

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size,
            cluster: self.layout.cluster,
        }
    }

    fn store(&self) -> &S {
        self.data.as_ref().unwrap_or(&self.store)
    }

    async fn map(&self, guest: u64, len: u64) -> Result<Extent> {
        let len = match self.pending(guest, len)? {
            Known::Is(extent) => return Ok(extent),
            Known::Not { len } => len,
        };
        let place = |e: Error| e.at(format!("guest offset {guest:#x}"));
        let (entry, bytes) = match self.look_up(guest).await.map_err(place)? {
            Lookup::Absent(rest) => return Ok(Extent::Absent { len: len.min(rest) }),
            Lookup::Entries { at, bytes, .. } => (at, bytes),
        };
        let place = |e: Error| place(e.at(format!("offset {entry:#x}")));
        let layout = self.layout;
        let within = layout.cluster.within(guest);
        let entries = Entries {
            layout,
            bytes: &bytes,
        };
        let extent = entries.extent(within, len).map_err(place)?;
        let Extent::Data { at, len } = extent else {
            return Ok(extent);
        };
        if layout.external && at != guest {
            return Err(place(elsewhere(at)));
        }
        self.cut_to_file(at, len).map_err(place)
    }

    async fn unpack(&self, guest: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let place = |e: Error| e.at(format!("guest offset {guest:#x}"));
        let found = self.look_up(guest).await.map_err(place)?;
        let Lookup::Entries { at, bytes, .. } = found else {
            return Err(place(Error::invalid("is not compressed")));
        };
        let layout = self.layout;
        let entries = Entries {
            layout,
            bytes: &bytes,
        };
        let first = entries
            .first()
            .map_err(|e| place(e.at(format!("offset {at:#x}"))));
        let Mapping::Packed(packed) = first? else {
            return self.read_moved(guest, buf).await.map_err(place);
        };
        let whole = self.whole(packed).await.map_err(place)?;
        let within = layout.cluster.within(guest) as usize;
        match whole.get(within..).and_then(|rest| rest.get(..buf.len())) {
            Some(part) => buf.copy_from_slice(part),
            None => return Err(place(Error::invalid("goes beyond its cluster"))),
        }
        Ok(buf)
    }

    async fn place(&self, guest: u64, len: u64) -> Result<Place> {
        let len = match self.pending(guest, len)? {
            Known::Is(Extent::Data { at, len }) => return Ok(Place::Here { at, len }),
            Known::Is(extent) => return Ok(Place::New { len: extent.len() }),
            Known::Not { len } => len,
        };
        let place = |e: Error| e.at(format!("guest offset {guest:#x}"));
        match self.look_up(guest).await.map_err(place)? {
            Lookup::Absent(rest) => Ok(Place::New { len: len.min(rest) }),
            Lookup::Entries { at, bytes, owned } => {
                let place = |e: Error| place(e.at(format!("offset {at:#x}")));
                self.place_by(guest, len, &bytes, owned).map_err(place)
            }
        }
    }

    fn is_durable(&self, cluster: VirtCluster) -> bool {
        let durable = |w: &Writer| lock(&w.state).pending.is_durable(cluster);
        self.writer.as_ref().is_none_or(durable)
    }

    async fn reserve(&self, cluster: VirtCluster) -> Result<Reserved> {
        self.reserve_one(self.may_write()?, cluster).await
    }

    fn publish(&self, cluster: VirtCluster, mut reserved: Reserved, below: Below) {
        let clean = reserved.is_new && self.store.info().fresh_zero;
        reserved.fate = Fate::Published;
        let mut state = lock(&reserved.state);
        let state = &mut *state;
        let (to, slot) = (reserved.cluster, reserved.slot);
        // Before the mapping: without them it is of a whole cluster.
        reserved.put_bits(state);
        let fresh = clean && below == Below::Zeros;
        state.pending.publish(cluster, to, slot, fresh);
        for old in &reserved.old {
            match reserved.leaves {
                true => state.leave(*old),
                false => state.give_up(*old),
            }
        }
    }

    async fn release(&self, cluster: VirtCluster) -> Result<()> {
        let writer = self.may_write()?;
        let absent = |extent| matches!(extent, Extent::Absent { .. });
        match self.is_all(cluster, absent).await? {
            true => Ok(()),
            false => self.unmap(writer, cluster, To::Nowhere).await,
        }
    }

    async fn zero(&self, cluster: VirtCluster) -> Result<bool> {
        let writer = self.may_write()?;
        if !self.layout.zero_flag {
            return Ok(false);
        }
        let zero = |extent| matches!(extent, Extent::Zero { .. });
        if !self.is_all(cluster, zero).await? {
            self.unmap(writer, cluster, To::Zeros).await?;
        }
        Ok(true)
    }

    async fn sync(&self) -> Result<()> {
        let writer = self.may_write()?;
        self.unless_final(self.pass(writer).await)
    }

    async fn close(&self) -> Result<()> {
        match self.writer {
            None => Ok(()),
            Some(_) => self.unless_final(self.shut(self.may_write()?).await),
        }
    }
}
