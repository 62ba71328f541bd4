//! Packer: a new image written from its beginning to its end, whose clusters come in guest order.
//!
//! The file grows by what comes, and nothing in it is written twice: clusters of data, bytes of
//! compressed clusters one behind the other, a second-level table behind what it names, a block of
//! refcounts behind what it counts. The first-level table, the refcount table and the last blocks end
//! the file. In memory are one table, one block, the first-level table and where blocks are, so that an
//! image of any size costs no more than its largest tables. Nobody else has the file meanwhile.
//!
//! Ordering: everything, a barrier, the header, a barrier. A file in which the header can be read
//! therefore has all that it names. Never used on an image that is there: only on an empty file.
//! Source: QEMU `docs/interop/qcow2.rst`, "Cluster mapping", "Compressed Clusters Descriptor" and "Host
//! cluster management".

use super::create::Create;
use super::header::{Header, L1, Refcounts};
use super::partial::Bits;
use super::table::{L1Entry, L2Entry, Layout, Packed};
use crate::store::{Reach, Space, Store};
use crate::units::ClusterSize;
use crate::update::Update;
use crate::{Error, Result, buf, limits};
use bytes::Bytes;
use std::collections::VecDeque;

/// Bytes that are written at once.
const BATCH: usize = 1 << 20;

/// An image that is being written. Dropped unfinished, the file is no image and is to be removed.
#[derive(Debug)]
#[must_use = "without finish() the file is no image"]
pub struct Packer<'a, S> {
    create: &'a Create,
    header: Header,
    layout: Layout,
    out: Out<'a, S>,
    counts: Counts,
    /// The first cluster of the file that nobody has.
    next: u64,
    /// Guest offset behind the last cluster that came.
    end: u64,
    /// The second-level table of what comes, by its number in the first-level one.
    table: Option<(usize, Vec<u64>)>,
    l1: Vec<u64>,
    open: Option<Open>,
}

/// The cluster of the file that takes compressed bytes.
#[derive(Debug)]
struct Open {
    cluster: u64,
    bytes: Vec<u8>,
}

impl<'a, S: Store> Packer<'a, S> {
    /// Begins an image in an empty store. `Invalid` for what the format cannot hold, and for a
    /// backing file or extended entries, which it has not; `Unsupported` when the blocks of the
    /// store are larger than a cluster.
    pub fn new(store: &'a S, create: &'a Create) -> Result<Self> {
        let info = store.info();
        if info.len > 0 || create.backing.is_some() || create.extended {
            return Err(Error::invalid(
                "an image is packed into an empty file, by itself, with standard entries",
            ));
        }
        if info.align > create.cluster.bytes() {
            return Err(Error::unsupported(format!(
                "clusters of {} bytes on storage blocks of {}",
                create.cluster.bytes(),
                info.align
            )));
        }
        let header = create.header()?;
        let mut packer = Self {
            create,
            layout: header.layout()?,
            out: Out::new(store),
            counts: Counts::new(&header),
            next: 0,
            end: 0,
            table: None,
            l1: vec![0; header.l1.entries as usize],
            open: None,
            header,
        };
        // The header's.
        packer.count_next()?;
        Ok(packer)
    }

    /// Writes clusters of data from guest offset `guest` on: whole ones, behind all that came before.
    pub async fn data(&mut self, guest: u64, bytes: Bytes) -> Result<()> {
        self.admit(guest, bytes.len() as u64)?;
        let mut rest = bytes;
        let mut guest = guest;
        while !rest.is_empty() {
            let (at, len) = self.take_run(guest, rest.len() as u64).await?;
            let run = rest.split_to((len as usize).min(rest.len()));
            self.out.put(at, run).await?;
            guest = guest.saturating_add(len);
        }
        Ok(())
    }

    /// Gives clusters that read as zeros their space, which is reserved. As [`Packer::data`] otherwise.
    pub async fn reserve(&mut self, guest: u64, len: u64) -> Result<()> {
        self.admit(guest, len)?;
        let (mut guest, end) = (guest, guest.saturating_add(len));
        while guest < end {
            let (at, len) = self.take_run(guest, end.saturating_sub(guest)).await?;
            self.out.reserve(at, len).await?;
            guest = guest.saturating_add(len);
        }
        Ok(())
    }

    /// Writes a compressed cluster: `bytes`, fewer than it has, are what [`super::compress`] made of
    /// it. As [`Packer::data`] otherwise.
    pub async fn packed(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        let cluster = self.cluster().bytes();
        self.admit(guest, cluster)?;
        if bytes.is_empty() || bytes.len() as u64 >= cluster {
            return Err(Error::invalid(format!(
                "a compressed cluster of {} bytes",
                bytes.len()
            )));
        }
        self.begin_entry(guest).await?;
        let at = self.append(bytes).await?;
        let packed = Packed {
            at,
            len: bytes.len() as u64,
        };
        self.set_entry(guest, packed.entry(self.layout)?)
    }

    /// Ends the image. Durable when it returns.
    pub async fn finish(mut self) -> Result<()> {
        self.end_table().await?;
        self.end_open().await?;
        let l1 = self.end_l1().await?;
        let refcounts = self.end_refcounts().await?;
        self.out.drain().await?;
        let header = Header {
            l1,
            refcounts,
            ..self.header
        };
        let first = self.create.first_cluster(header)?;
        let update = Update::new().barrier().write(0, first).barrier();
        update.apply(self.out.store).await
    }

    const fn cluster(&self) -> ClusterSize {
        self.layout.cluster
    }

    /// Refuses clusters that do not come behind all others, or are not whole.
    fn admit(&mut self, guest: u64, len: u64) -> Result<()> {
        let cluster = self.cluster();
        let end = guest.saturating_add(len);
        let last = cluster.count(self.header.size);
        let whole = cluster.within(guest) == 0 && cluster.within(len) == 0;
        if !whole || guest < self.end || cluster.whole(end) > last {
            return Err(Error::invalid(format!(
                "guest offset {guest:#x}, length {len}: not whole clusters in order"
            )));
        }
        self.end = end;
        Ok(())
    }

    /// Takes clusters for `len` bytes from guest offset `guest` on, as many as one run has and one
    /// table names: their place, and their bytes.
    async fn take_run(&mut self, guest: u64, len: u64) -> Result<(u64, u64)> {
        self.begin_entry(guest).await?;
        self.begin_range().await?;
        let (cluster, covers) = (self.cluster(), self.layout.table_covers().max(1));
        let in_table = covers.saturating_sub(guest.checked_rem(covers).unwrap_or(0));
        let count = cluster.whole(len.min(in_table));
        let count = count.min(self.counts.left(self.next)).max(1);
        let at = self.next.saturating_mul(cluster.bytes());
        for n in 0..count {
            let host = self.count_next()?.saturating_mul(cluster.bytes());
            let guest = guest.saturating_add(n.saturating_mul(cluster.bytes()));
            self.set_entry(
                guest,
                L2Entry::owned(Some(host), Bits::ALL, self.layout).word,
            )?;
        }
        Ok((at, count.saturating_mul(cluster.bytes())))
    }

    /// Takes the next cluster.
    fn count_next(&mut self) -> Result<u64> {
        let cluster = self.next;
        self.counts.add(cluster)?;
        self.next = cluster.saturating_add(1);
        Ok(cluster)
    }

    /// Takes the next cluster, once the block of refcounts that is complete has got its place.
    async fn take(&mut self) -> Result<u64> {
        self.begin_range().await?;
        self.count_next()
    }

    /// Writes the blocks of refcounts that are complete, where the next cluster is another block's.
    async fn begin_range(&mut self) -> Result<()> {
        if self.counts.is_behind(self.next) {
            self.end_open().await?;
            self.counts.turn();
        }
        while let Some(block) = self.counts.full.pop_front() {
            let at = self.count_next()?.saturating_mul(self.cluster().bytes());
            self.counts.blocks.push(at);
            self.out.put(at, block.into()).await?;
        }
        Ok(())
    }

    /// Sees to it that the table is there that names the cluster at `guest`.
    async fn begin_entry(&mut self, guest: u64) -> Result<()> {
        let covers = self.layout.table_covers().max(1);
        let index = guest.checked_div(covers).unwrap_or(0) as usize;
        if self.table.as_ref().is_some_and(|(n, _)| *n == index) {
            return Ok(());
        }
        self.end_table().await?;
        self.table = Some((index, vec![0; self.layout.entries() as usize]));
        Ok(())
    }

    fn set_entry(&mut self, guest: u64, word: u64) -> Result<()> {
        let slot = self.cluster().whole(guest);
        let slot = slot.checked_rem(self.layout.entries()).unwrap_or(0);
        let table = self.table.as_mut();
        let entry = table.and_then(|(_, entries)| entries.get_mut(slot as usize));
        let entry = entry.ok_or_else(|| Error::invalid("an entry without a table"))?;
        *entry = word;
        Ok(())
    }

    /// Writes the second-level table.
    async fn end_table(&mut self) -> Result<()> {
        let Some((index, entries)) = self.table.take() else {
            return Ok(());
        };
        let at = self.take().await?.saturating_mul(self.cluster().bytes());
        self.out.put(at, be_bytes(&entries)).await?;
        match self.l1.get_mut(index) {
            Some(entry) => *entry = L1Entry::owned(at).0,
            None => return Err(Error::invalid("a table behind the end of the disk")),
        }
        Ok(())
    }

    /// Puts compressed bytes into the file, where those before them end if that is possible.
    async fn append(&mut self, bytes: &[u8]) -> Result<u64> {
        let size = self.cluster().bytes() as usize;
        if !self.has_room(bytes.len()) {
            self.end_open().await?;
        }
        let mut open = match self.open.take() {
            Some(open) => {
                self.counts.add(open.cluster)?;
                open
            }
            None => Open {
                cluster: self.take().await?,
                bytes: Vec::new(),
            },
        };
        let at = open.cluster.saturating_mul(self.cluster().bytes());
        let at = at.saturating_add(open.bytes.len() as u64);
        let fits = size.saturating_sub(open.bytes.len()).min(bytes.len());
        let (here, behind) = bytes.split_at_checked(fits).unwrap_or((bytes, &[]));
        open.bytes.extend(here);
        let is_full = open.bytes.len() == size;
        self.open = Some(open);
        if is_full {
            self.end_open().await?;
        }
        if !behind.is_empty() {
            // It is the cluster that follows: nothing was put between.
            self.open = Some(Open {
                cluster: self.count_next()?,
                bytes: behind.to_vec(),
            });
        }
        Ok(at)
    }

    /// Whether `len` compressed bytes can follow those before them: within their cluster, or on into
    /// the next one when nobody has that and its refcount is in the same block.
    fn has_room(&self, len: usize) -> bool {
        let Some(open) = &self.open else {
            return false;
        };
        let size = self.cluster().bytes() as usize;
        let fits = len <= size.saturating_sub(open.bytes.len());
        let follows = open.cluster.checked_add(1) == Some(self.next);
        let may_span = follows && !self.counts.is_behind(self.next);
        (fits || may_span) && !self.counts.is_full(open.cluster)
    }

    /// Writes the cluster of compressed bytes.
    async fn end_open(&mut self) -> Result<()> {
        let Some(Open { cluster, mut bytes }) = self.open.take() else {
            return Ok(());
        };
        let size = self.cluster().bytes();
        bytes.resize(size as usize, 0);
        let at = cluster.saturating_mul(size);
        self.out.put(at, bytes.into()).await
    }

    async fn end_l1(&mut self) -> Result<L1> {
        let entries = self.header.l1.entries;
        if entries == 0 {
            return Ok(L1 { at: 0, entries });
        }
        let mut bytes = be_bytes(&std::mem::take(&mut self.l1)).to_vec();
        let clusters = self.cluster().count(bytes.len() as u64);
        bytes.resize(clusters.saturating_mul(self.cluster().bytes()) as usize, 0);
        self.begin_range().await?;
        let at = self.next.saturating_mul(self.cluster().bytes());
        for _ in 0..clusters {
            self.count_next()?;
        }
        self.out.put(at, bytes.into()).await?;
        Ok(L1 { at, entries })
    }

    /// The refcount table, and behind it the blocks that are not written yet.
    async fn end_refcounts(&mut self) -> Result<Refcounts> {
        self.begin_range().await?;
        let cluster = self.cluster();
        let first = self.next;
        let (table, blocks) = self.refcount_places()?;
        for _ in 0..table.saturating_add(blocks) {
            self.count_next()?;
        }
        self.counts.turn();
        let mut at = first.saturating_add(table).saturating_mul(cluster.bytes());
        let mut last = Vec::new();
        for block in std::mem::take(&mut self.counts.full) {
            self.counts.blocks.push(at);
            last.push((at, block));
            at = at.saturating_add(cluster.bytes());
        }
        let mut entries = be_bytes(&self.counts.blocks).to_vec();
        entries.resize(table.saturating_mul(cluster.bytes()) as usize, 0);
        let at = first.saturating_mul(cluster.bytes());
        self.out.put(at, entries.into()).await?;
        for (at, block) in last {
            self.out.put(at, block.into()).await?;
        }
        Ok(Refcounts {
            at,
            clusters: table as u32,
            width: self.header.refcounts.width,
        })
    }

    /// Clusters of the refcount table, and blocks that are still to be written. Both count
    /// themselves, so they grow until they are enough.
    fn refcount_places(&self) -> Result<(u64, u64)> {
        let (mut table, mut blocks) = (1u64, 1u64);
        loop {
            let end = [self.next, table, blocks]
                .iter()
                .fold(0u64, |a, n| a.saturating_add(*n));
            let all = end.div_ceil(self.counts.per_block);
            let rest = all.saturating_sub(self.counts.blocks.len() as u64);
            let bytes = all.saturating_mul(8);
            if bytes > limits::QCOW2_REFTABLE_MAX {
                return Err(Error::unsupported(format!(
                    "clusters of {} bytes are too small for so many: the file would have {end}",
                    self.cluster().bytes()
                )));
            }
            let needed = self.cluster().count(bytes);
            if rest <= blocks && needed <= table {
                return Ok((table, blocks));
            }
            (table, blocks) = (needed.max(table), rest.max(blocks));
        }
    }
}

/// The refcounts of the clusters that the next block tells of, and where the blocks before it are.
#[derive(Debug)]
struct Counts {
    width: super::refcount::Width,
    per_block: u64,
    /// Bytes of a block.
    len: usize,
    /// The number of the block that is filled.
    number: u64,
    block: Vec<u8>,
    /// Blocks that are complete and have no place yet, in order.
    full: VecDeque<Vec<u8>>,
    /// File offsets of the others.
    blocks: Vec<u64>,
}

impl Counts {
    fn new(header: &Header) -> Self {
        let (width, len) = (header.refcounts.width, header.cluster.bytes());
        Self {
            width,
            per_block: width.per_block(len).max(1),
            len: len as usize,
            number: 0,
            block: vec![0; len as usize],
            full: VecDeque::new(),
            blocks: Vec::new(),
        }
    }

    const fn number_of(&self, cluster: u64) -> u64 {
        match cluster.checked_div(self.per_block) {
            Some(number) => number,
            None => 0,
        }
    }

    fn slot(&self, cluster: u64) -> usize {
        cluster.checked_rem(self.per_block).unwrap_or(0) as usize
    }

    /// Whether a cluster is another block's than those before it.
    const fn is_behind(&self, cluster: u64) -> bool {
        self.number_of(cluster) > self.number
    }

    /// Clusters from this one on that are the same block's.
    fn left(&self, cluster: u64) -> u64 {
        self.per_block.saturating_sub(self.slot(cluster) as u64)
    }

    /// One more user. A cluster of the next block completes the one before.
    fn add(&mut self, cluster: u64) -> Result<()> {
        if self.is_behind(cluster) {
            self.turn();
        }
        let slot = self.slot(cluster);
        let users = self.width.get(&self.block, slot).unwrap_or(0);
        self.width
            .set(&mut self.block, slot, users.saturating_add(1))
    }

    /// Whether a cluster can have no more users.
    fn is_full(&self, cluster: u64) -> bool {
        self.width.get(&self.block, self.slot(cluster)) == Some(self.width.max())
    }

    fn turn(&mut self) {
        let next = vec![0; self.len];
        self.full
            .push_back(std::mem::replace(&mut self.block, next));
        self.number = self.number.saturating_add(1);
    }
}

/// The file, and what is to be written to it next.
#[derive(Debug)]
struct Out<'a, S> {
    store: &'a S,
    /// Where the pieces go, which follow each other.
    at: u64,
    len: usize,
    pieces: Vec<Bytes>,
}

impl<'a, S: Store> Out<'a, S> {
    const fn new(store: &'a S) -> Self {
        Self {
            store,
            at: 0,
            len: 0,
            pieces: Vec::new(),
        }
    }

    const fn end(&self) -> u64 {
        self.at.saturating_add(self.len as u64)
    }

    async fn put(&mut self, at: u64, piece: Bytes) -> Result<()> {
        if self.end() != at {
            self.drain().await?;
            self.at = at;
        }
        self.len = self.len.saturating_add(piece.len());
        self.pieces.push(piece);
        match self.len >= BATCH {
            true => self.drain().await,
            false => Ok(()),
        }
    }

    /// Reserves space that reads as zeros.
    async fn reserve(&mut self, at: u64, len: u64) -> Result<()> {
        self.drain().await?;
        self.lengthen(at.saturating_add(len)).await?;
        self.store.punch(at, len, Space::Keep).await
    }

    async fn lengthen(&self, end: u64) -> Result<()> {
        match end > self.store.info().len {
            true => self.store.lengthen(end).await,
            false => Ok(()),
        }
    }

    async fn drain(&mut self) -> Result<()> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        let pieces = std::mem::take(&mut self.pieces);
        let (at, end) = (self.at, self.end());
        (self.at, self.len) = (end, 0);
        self.lengthen(end).await?;
        let bytes = joined(pieces);
        self.store.write_at(at, bytes, Reach::Cache).await
    }
}

/// The pieces as one, in memory that direct I/O takes.
fn joined(pieces: Vec<Bytes>) -> Bytes {
    if let [one] = pieces.as_slice()
        && buf::is_aligned(one, buf::ALIGN)
    {
        return one.clone();
    }
    let len = pieces.iter().map(Bytes::len).fold(0, usize::saturating_add);
    let mut all = buf::aligned(len);
    let mut rest = all.as_mut();
    for piece in &pieces {
        let Some((to, behind)) = rest.split_at_mut_checked(piece.len()) else {
            break;
        };
        to.copy_from_slice(piece);
        rest = behind;
    }
    all.freeze()
}

fn be_bytes(words: &[u64]) -> Bytes {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    bytes.into()
}
