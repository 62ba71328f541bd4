//! An open qcow2 image: the [`Layer`] over a store, for reading.
//!
//! Owns its stores and what it keeps of them in memory: table slices and the last cluster that was
//! unpacked, both bounded. Unpacks one cluster at a time: a lock is held across I/O for that alone.
//! Never writes.

use super::be::u64_at;
use super::cache::Slices;
use super::header::{Header, L1};
use super::open::read_padded;
use super::packed;
use super::run::Entries;
use super::table::{L1Entry, Layout, Mapping, Packed};
use crate::layer::{Below, Extent, Geometry, Layer, Never};
use crate::store::Store;
use crate::units::{VirtCluster, floor_to};
use crate::{Error, Kind, Result};
use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex;

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

    /// The store of header and tables.
    pub(super) const fn metadata(&self) -> &S {
        &self.store
    }

    /// Table bytes from `at` to the end of their slice, or to the end of the table. `Damaged` when
    /// not all of them are in the file.
    async fn table(&self, at: u64, end: u64) -> Result<Bytes> {
        let start = self.slices.start(at);
        let last = start.saturating_add(self.slices.unit()).min(end);
        let len = self.store.info().len;
        if last > len {
            return Err(Error::damaged(format!(
                "offset {at:#x}: a table that goes on to {last:#x}, behind the end of the file ({len} bytes)"
            )));
        }
        let slice = match self.slices.find(start) {
            Some(slice) => slice,
            None => {
                let slice = read_padded(&self.store, start, self.slices.unit()).await?;
                self.slices.keep(start, slice.clone());
                slice
            }
        };
        let stop = end.saturating_sub(start).min(slice.len() as u64);
        let from = at.saturating_sub(start).min(stop);
        Ok(slice.slice(from as usize..stop as usize))
    }

    /// What the tables say of `guest`, as far as one slice of each tells.
    async fn look_up(&self, guest: u64) -> Result<Lookup> {
        let covers = self.layout.table_covers();
        let index = guest.checked_div(covers).unwrap_or(0);
        let entries = u64::from(self.l1.entries);
        if index >= entries {
            return Ok(Lookup::Absent(u64::MAX));
        }
        let entry_at = |n: u64| self.l1.at.saturating_add(n.saturating_mul(8));
        let l1 = self.table(entry_at(index), entry_at(entries)).await?;
        let place = |e: Error| e.at(format!("offset {:#x}", entry_at(index)));
        let Some(table) = L1Entry(u64_at(&l1, 0))
            .table(self.layout.cluster)
            .map_err(place)?
        else {
            let empty = l1.chunks_exact(8).take_while(|e| e.iter().all(|b| *b == 0));
            let tables = (empty.count() as u64).max(1);
            let end = index.saturating_add(tables).saturating_mul(covers);
            return Ok(Lookup::Absent(end.saturating_sub(guest)));
        };
        let n = guest.checked_rem(covers).unwrap_or(0) >> self.layout.cluster.log2();
        let at = table.saturating_add(n.saturating_mul(self.layout.entry_len()));
        let end = table.saturating_add(self.layout.cluster.bytes());
        let bytes = self.table(at, end).await.map_err(|e| e.at("L2 table"))?;
        Ok(Lookup::Entries { at, bytes })
    }

    /// What there is of an extent of data: a file may end inside its last cluster, whose rest reads
    /// as zeros.
    fn cut_to_file(&self, at: u64, len: u64) -> Result<Extent> {
        let end = self.store().info().len;
        let cluster = floor_to(at, self.layout.cluster.bytes());
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
        let rest = self.store.info().len.saturating_sub(packed.at);
        let bytes = read_padded(&self.store, packed.at, packed.len.min(rest)).await?;
        let len = self.layout.cluster.bytes() as usize;
        let whole = packed::unpack(self.header.compression, &bytes, len)
            .map(Bytes::from)
            .map_err(|e| e.at(format!("offset {:#x}", packed.at)));
        let (_, known) = last.insert((packed, whole));
        copy(known)
    }
}

fn copy(known: &Result<Bytes>) -> Result<Bytes> {
    match known {
        Ok(bytes) => Ok(bytes.clone()),
        Err(e) => Err(e.duplicate()),
    }
}

fn read_only() -> Error {
    Error::new(Kind::ReadOnly, "this qcow2 image is open read-only")
}

impl<S: Store> Layer for Qcow2<S> {
    type Store = S;
    type Reservation = Never;

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
        let place = |e: Error| e.at(format!("guest offset {guest:#x}"));
        let (entry, bytes) = match self.look_up(guest).await.map_err(place)? {
            Lookup::Absent(rest) => return Ok(Extent::Absent { len: len.min(rest) }),
            Lookup::Entries { at, bytes } => (at, bytes),
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
            return Err(place(Error::damaged(format!(
                "is at {at:#x} of the external data file"
            ))));
        }
        self.cut_to_file(at, len).map_err(place)
    }

    async fn unpack(&self, guest: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let place = |e: Error| e.at(format!("guest offset {guest:#x}"));
        let found = self.look_up(guest).await.map_err(place)?;
        let Lookup::Entries { at, bytes } = found else {
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
            return Err(place(Error::invalid("is not compressed")));
        };
        let whole = self.whole(packed).await.map_err(place)?;
        let within = layout.cluster.within(guest) as usize;
        match whole.get(within..).and_then(|rest| rest.get(..buf.len())) {
            Some(part) => buf.copy_from_slice(part),
            None => return Err(place(Error::invalid("goes beyond its cluster"))),
        }
        Ok(buf)
    }

    fn is_durable(&self, _cluster: VirtCluster) -> bool {
        true
    }

    async fn reserve(&self) -> Result<Never> {
        Err(read_only())
    }

    fn publish(&self, _cluster: VirtCluster, reserved: Never, _below: Below) {
        match reserved {}
    }

    async fn release(&self, _cluster: VirtCluster) -> Result<()> {
        Err(read_only())
    }

    async fn sync(&self) -> Result<()> {
        Err(read_only())
    }

    async fn close(&self) -> Result<()> {
        Ok(())
    }
}
