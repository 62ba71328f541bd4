//! Opening for writing. The ordering:
//!
//! 1. The header is judged: one that is corrupt is refused, and nothing is changed. One that is dirty was
//!    left by a writer that counts later, and died: it is repaired as `check --repair` does, in the
//!    order that this has, and refused when it is dirty still. First-level and refcount tables that name
//!    what is no cluster of the file, or metadata twice, are refused, too.
//! 2. The file is lengthened to whole clusters, and an external data file to the disk's size; the header
//!    loses autoclear bits that are not known here, and bitmaps are marked as in use, since nobody records
//!    what is written; barrier.
//! 3. A predecessor that died left its answered mappings in the ledger: they are made durable by an
//!    ordinary pass. The caller holds the fence: nothing of the predecessor can land any more.

use super::alloc::Alloc;
use super::be::u64_at;
use super::bitmaps::mark_in_use;
use super::blocks::Blocks;
use super::check::{Repair, repair};
use super::header::{BITMAPS_VALID, CORRUPT, DIRTY, EXTERNAL_DATA, Header, L1};
use super::image::Qcow2;
use super::open::{list_snapshots, read_header, read_padded, snapshot_l1};
use super::partial::{Bits, Partials};
use super::table::L1Entry;
use super::writer::{NewTable, State, Writer, lock};
use crate::ledger::Ledger;
use crate::pending::{Pending, To};
use crate::store::Store;
use crate::units::{ClusterSize, HostCluster, VirtCluster};
use crate::update::Update;
use crate::{Error, Result};
use bytes::Bytes;
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Bytes of a first-level table that are read at once.
const STEP: u64 = 256 << 10;

impl<S: Store> Qcow2<S> {
    /// Opens an image for writing, alone: the caller holds its locks and, when `ledger` comes from a
    /// dead predecessor, the fence. A poisoned ledger opens for reading what was answered.
    ///
    /// `data` is its external data file, as for [`Qcow2::open_read`]; one that is shorter than the disk is
    /// lengthened.
    ///
    /// `Damaged` for an image that must be repaired first, `Unsupported` for one with more than 2^32
    /// clusters.
    pub async fn open_write(store: S, data: Option<S>, ledger: Ledger) -> Result<Self> {
        let mut header = read_header(&store).await?;
        judge(&header)?;
        let is_dirty = |header: &Header| header.features.incompatible & DIRTY != 0;
        if is_dirty(&header) && !ledger.is_poisoned() {
            header = recounted(&store).await?;
        }
        if is_dirty(&header) {
            return Err(refuse(
                "the image was not closed, and not all of it could be repaired".into(),
            ));
        }
        let mut image = Self::open_read(store, data).await?;
        let size = image.header().cluster;
        let len = image.metadata().info().len;
        let end = u32::try_from(size.count(len))
            .ok()
            .filter(|n| *n < u32::MAX);
        let end = end.ok_or_else(|| Error::unsupported("a file of 2^32 clusters or more"))?;
        let blocks = Blocks::read(&image, end).await?;
        let metadata = image.metadata_clusters(&blocks, end).await?;
        let state = State {
            pending: Pending::new(ledger.clone()),
            alloc: Alloc::new(end),
            metadata,
            tables: BTreeMap::new(),
            partial: Partials::new(image.table_word(image.l1().entries)),
            strays: RoaringBitmap::new(),
            left: Vec::new(),
        };
        let poisoned = ledger.is_poisoned();
        image.write_with(Writer {
            state: Arc::new(Mutex::new(state)),
            ledger,
            blocks: tokio::sync::Mutex::new(blocks),
        });
        if poisoned {
            return Ok(image);
        }
        image.begin(end).await?;
        image.recover().await?;
        Ok(image)
    }

    /// Step 2.
    async fn begin(&self, end: u32) -> Result<()> {
        let header = self.header();
        let len = header.cluster.start(end);
        if len != self.metadata().info().len {
            self.metadata().set_len(len).await?;
        }
        if let Some(data) = self.data_file()
            && data.info().len < header.size
        {
            data.set_len(header.size).await?;
            data.flush().await?;
        }
        mark_in_use(self.metadata(), header).await?;
        let mut update = Update::new();
        let known = header.features.autoclear & BITMAPS_VALID;
        if header.features.autoclear != known {
            let head = self.head_with(|head| Header::put_autoclear(head, known));
            update = update.write(0, head.await?);
        }
        update.barrier().apply(self.metadata()).await
    }

    /// Step 3.
    async fn recover(&self) -> Result<()> {
        let writer = self.writer()?;
        let parts_from = self.table_word(self.l1().entries);
        let (mut tables, left) = {
            let mut state = lock(&writer.state);
            let tables = state.pending.take_beyond(self.guest_clusters());
            let left: Vec<u32> = state.pending.clusters().collect();
            (tables, left)
        };
        if tables.is_empty() && left.is_empty() {
            return Ok(());
        }
        let parts = tables.extract_if(.., |(word, ..)| *word >= parts_from);
        let parts: Vec<_> = parts.collect();
        let recover = async {
            self.inherit_parts(writer, &left, parts).await?;
            for (word, host, slot) in tables {
                self.inherit_table(writer, word, host, slot).await?;
            }
            for cluster in left {
                self.replaced(writer, cluster).await?;
                self.own_table(writer, VirtCluster(cluster)).await?;
            }
            self.pass(writer).await
        };
        let done = self.unless_final(recover.await);
        done.map_err(|e| e.at("recovering what the last worker had answered"))
    }

    /// Which subclusters a dead predecessor had of the clusters in `left`, which are pending. What it said
    /// of others says nothing.
    async fn inherit_parts(
        &self,
        writer: &Writer,
        left: &[u32],
        parts: Vec<(u32, u32, usize)>,
    ) -> Result<()> {
        let mut zeros = BTreeMap::new();
        for cluster in left {
            let to = lock(&writer.state).pending.find(*cluster);
            if let Some(HostCluster(host)) = to.and_then(To::host) {
                let (durable, entry) = self.own_entry(VirtCluster(*cluster)).await?;
                let same = durable == Some(host);
                zeros.insert(host, if same { Bits::of(entry.bits).zero } else { 0 });
            }
        }
        let mut state = lock(&writer.state);
        for (word, taken, slot) in parts {
            let host = state.partial.host(word);
            match zeros.get(&host) {
                Some(zero) => state
                    .partial
                    .inherit(host, Bits { taken, zero: *zero }, slot),
                None => state.pending.clear_beyond(slot),
            }
        }
        Ok(())
    }

    /// Goes on with a new second-level table of a dead predecessor, unless it is named already.
    async fn inherit_table(
        &self,
        writer: &Writer,
        word: u32,
        host: u32,
        slot: usize,
    ) -> Result<()> {
        let index = word.saturating_sub(self.guest_clusters());
        let old = self.l1_entry(index).await?.table(self.header().cluster)?;
        let mut state = lock(&writer.state);
        let host = Some(host).filter(|host| *host != 0);
        match host.filter(|host| old != Some(self.header().cluster.start(*host))) {
            None => state.pending.clear_beyond(slot),
            Some(host) => state.add_table(index, NewTable::new(host, old, slot)),
        }
        Ok(())
    }

    /// What a guest cluster has durably, and not by the word of a dead predecessor, has a user less
    /// once that is durable.
    async fn replaced(&self, writer: &Writer, cluster: u32) -> Result<()> {
        let to = lock(&writer.state).pending.find(cluster).and_then(To::host);
        let had = self.held_durably(VirtCluster(cluster)).await?;
        let mut state = lock(&writer.state);
        for old in had {
            if Some(HostCluster(old)) != to {
                state.pending.free_later(old);
            }
        }
        Ok(())
    }

    /// The first slice of the file with a changed header.
    pub(super) async fn head_with(&self, change: impl FnOnce(&mut [u8])) -> Result<Bytes> {
        let old = read_padded(self.metadata(), 0, self.slice_len()).await?;
        let mut head = crate::buf::aligned(old.len());
        head.copy_from_slice(&old);
        change(&mut head);
        Ok(head.freeze())
    }
}

/// Clusters of metadata, each once.
struct Metadata {
    clusters: RoaringBitmap,
    /// Clusters of the file.
    end: u32,
    cluster: ClusterSize,
}

impl Metadata {
    /// Adds the clusters of a range of bytes, of which none is there yet.
    fn add(&mut self, what: &str, at: u64, len: u64) -> Result<()> {
        let last = at.saturating_add(len).saturating_sub(1);
        let number = |at: u64| self.cluster.cluster_of(at).filter(|n| *n < self.end);
        let (Some(first), Some(last)) = (number(at), number(last)) else {
            return Err(refuse(format!("{what} at {at:#x}: is not in the file")));
        };
        let count = u64::from(last.saturating_sub(first)).saturating_add(1);
        if self.clusters.insert_range(first..=last) != count {
            return Err(refuse(format!(
                "{what} at {at:#x}: other metadata is there, too"
            )));
        }
        Ok(())
    }
}

impl<S: Store> Qcow2<S> {
    /// Every cluster that holds metadata of the active image, or lists of snapshots and bitmaps.
    async fn metadata_clusters(&self, blocks: &Blocks, end: u32) -> Result<RoaringBitmap> {
        let header = self.header();
        let cluster = header.cluster;
        let mut all = Metadata {
            clusters: RoaringBitmap::new(),
            end,
            cluster,
        };
        all.add("the header", 0, 1)?;
        let table = cluster.start(blocks.clusters);
        all.add("refcount table", blocks.at, table)?;
        for block in blocks.places() {
            all.add("refcount block", cluster.start(block), 1)?;
        }
        if header.snapshots.count > 0 {
            let (snapshots, end) = list_snapshots(self.metadata(), header).await?;
            let at = header.snapshots.at;
            all.add("snapshot table", at, end.saturating_sub(at))?;
            for snapshot in &snapshots {
                let (l1, _) = snapshot_l1(self.metadata(), header, snapshot)?;
                self.add_l1(&mut all, l1)?;
            }
        }
        if let Some(bitmaps) = header.bitmaps() {
            all.add("bitmap directory", bitmaps.at, bitmaps.len)?;
        }
        self.add_l1(&mut all, self.l1())?;
        self.add_tables(&mut all).await?;
        Ok(all.clusters)
    }

    fn add_l1(&self, all: &mut Metadata, l1: L1) -> Result<()> {
        match l1.entries {
            0 => Ok(()),
            n => all.add("L1 table", l1.at, u64::from(n).saturating_mul(8)),
        }
    }

    /// The second-level tables of the active image.
    async fn add_tables(&self, all: &mut Metadata) -> Result<()> {
        let l1 = self.l1();
        let len = u64::from(l1.entries).saturating_mul(8);
        for from in (0..len).step_by(STEP as usize) {
            let at = l1.at.saturating_add(from);
            let bytes =
                read_padded(self.metadata(), at, STEP.min(len.saturating_sub(from))).await?;
            for (n, entry) in bytes.chunks_exact(8).enumerate() {
                let place = at.saturating_add((n as u64).saturating_mul(8));
                let entry = L1Entry(u64_at(entry, 0)).table(all.cluster);
                let entry =
                    entry.map_err(|e| refuse(e.at(format!("offset {place:#x}")).to_string()))?;
                if let Some(table) = entry {
                    all.add("L2 table", table, 1)?;
                }
            }
        }
        Ok(())
    }
}

/// Counts anew who names what; the header as it is then.
async fn recounted<S: Store>(store: &S) -> Result<Header> {
    let allowed = Repair {
        errors: true,
        ..Repair::default()
    };
    repair(store, &allowed).await?;
    read_header(store).await
}

/// Refuses what is not written before it was repaired, or cannot be written here.
fn judge(header: &Header) -> Result<()> {
    let features = header.features.incompatible;
    if features & CORRUPT != 0 {
        return Err(refuse("the image is marked corrupt".into()));
    }
    if features & EXTERNAL_DATA != 0 && header.snapshots.count > 0 {
        return Err(refuse(
            "snapshots in an image with an external data file, whose bytes have one state only"
                .into(),
        ));
    }
    let clusters = header.cluster.count(header.size);
    match clusters.saturating_add(u64::from(header.l1.entries)) >= u64::from(u32::MAX) {
        true => Err(Error::unsupported("a disk of 2^32 clusters or more")),
        false => Ok(()),
    }
}

fn refuse(what: String) -> Error {
    Error::damaged(format!(
        "{what}; not opened for writing: run check --repair"
    ))
}
