//! Opening an image for reading, and the lists that it holds. The file is never changed, whatever
//! state it is in.

use super::bitmap::{self, Bitmap};
use super::header::{self, Header, L1};
use super::image::Qcow2;
use super::packed;
use super::snapshot::{self, Snapshot};
use super::table::Packed;
use crate::store::Store;
use crate::units::floor_to;
use crate::{Error, Result, limits};
use bytes::{Bytes, BytesMut};
use std::collections::BTreeSet;
use std::ops::Range;

/// Reads `len` bytes from `at`; those behind the end of the file read as zeros. `Damaged` when none
/// of them is in the file. Any alignment.
pub(super) async fn read_padded<S: Store>(store: &S, at: u64, len: u64) -> Result<Bytes> {
    let info = store.info();
    if at >= info.len {
        return Err(Error::damaged(format!(
            "offset {at:#x} is behind the end of the file ({} bytes)",
            info.len
        )));
    }
    let from = floor_to(at, info.align);
    let end = at.saturating_add(len);
    let until = end.next_multiple_of(info.align).min(info.len);
    let wide = until.saturating_sub(from);
    let buf = crate::buf::aligned(usize::try_from(wide).unwrap_or(usize::MAX));
    let mut found = store.read_at(from, buf).await?;
    let mut found: BytesMut = found.split_off(at.saturating_sub(from) as usize);
    found.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
    Ok(found.freeze())
}

/// What a cluster was compressed to.
pub(super) async fn read_packed<S: Store>(store: &S, packed: Packed) -> Result<Bytes> {
    let rest = store.info().len.saturating_sub(packed.at);
    read_padded(store, packed.at, packed.len.min(rest)).await
}

/// The bytes of a cluster that was compressed to these.
pub(super) fn unpack(header: &Header, packed: Packed, bytes: &[u8]) -> Result<Vec<u8>> {
    let len = header.cluster.bytes() as usize;
    packed::unpack(header.compression, bytes, len)
        .map_err(|e| e.at(format!("offset {:#x}", packed.at)))
}

/// Reads and parses the header. What it names is for the caller to open, by his policy.
pub async fn read_header<S: Store>(store: &S) -> Result<Header> {
    let len = store.info().len;
    let head = read_padded(store, 0, len.clamp(1, 512)).await?;
    let (_, cluster) = header::peek(&head)?;
    let first = read_padded(store, 0, cluster.bytes().min(len)).await?;
    Header::parse(&first)
}

impl<S: Store> Qcow2<S> {
    /// Opens an image for reading. `data` is its external data file, given exactly when the header
    /// says that there is one ([`Header::has_data_file`]). Dirty and corrupt images are read as
    /// they are: entries are judged when they are used.
    ///
    /// `Unsupported` for a store whose blocks the format does not keep to: open the file through
    /// the page cache.
    pub async fn open_read(store: S, data: Option<S>) -> Result<Self> {
        let header = read_header(&store).await?;
        match (header.has_data_file(), &data) {
            (true, None) => {
                return Err(Error::invalid("the image's external data file is missing"));
            }
            (false, Some(_)) => {
                return Err(Error::invalid("the image has no external data file"));
            }
            _ => {}
        }
        let layout = header.layout()?;
        for file in std::iter::once(&store).chain(&data) {
            refuse_blocks(file, layout.piece())?;
        }
        refuse_outside(&store, &header.l1)?;
        Ok(Self::assemble(header, layout, store, data))
    }

    /// The snapshots, in the order of the table.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let listed = list_snapshots(self.metadata(), self.header()).await;
        listed.map(|(all, _)| all)
    }

    /// The disk as it was at a snapshot of this image. `Damaged` with an external data file, whose
    /// bytes have one state only.
    pub fn at_snapshot(mut self, snapshot: &Snapshot) -> Result<Self> {
        if self.header().has_data_file() {
            let what = Error::damaged("a snapshot in an image with an external data file");
            return Err(what.at(format!("snapshot {}", snapshot.printable())));
        }
        let (l1, size) = snapshot_l1(self.metadata(), self.header(), snapshot)?;
        self.show(l1, size);
        Ok(self)
    }

    /// The bitmaps, in the order of the directory; none when they do not say the truth.
    pub async fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        list_bitmaps(self.metadata(), self.header()).await
    }
}

/// The snapshots, in the order of their table, and the file offset where it ends.
pub async fn list_snapshots<S: Store>(store: &S, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let table = header.snapshots;
    let mut all = Vec::new();
    let mut at = table.at;
    let end = table.at.saturating_add(limits::QCOW2_DIRECTORY_MAX);
    for n in 0..table.count {
        let place = |e: Error| e.at(format!("snapshot {n} (offset {at:#x})"));
        let bytes = read_file(store, at, snapshot::ENTRY_MAX)
            .await
            .map_err(place)?;
        let (found, len) = Snapshot::parse(&bytes).map_err(place)?;
        all.push(found);
        at = at.saturating_add(len as u64);
        if at > end {
            return Err(Error::damaged(format!(
                "a snapshot table of more than {} bytes",
                limits::QCOW2_DIRECTORY_MAX
            )));
        }
    }
    Ok((all, at))
}

/// The first-level table of a snapshot, and the size of the disk then.
pub(super) fn snapshot_l1<S: Store>(
    store: &S,
    header: &Header,
    snapshot: &Snapshot,
) -> Result<(L1, u64)> {
    let place = |e: Error| e.at(format!("snapshot {}", snapshot.printable()));
    let size = snapshot.size.unwrap_or(header.size);
    if size > limits::SIZE_MAX {
        return Err(place(Error::damaged(format!("a disk of {size} bytes"))));
    }
    let size = floor_to(size, crate::units::SECTOR);
    let layout = header.layout()?;
    let l1 = L1::new(snapshot.l1_at, snapshot.l1_entries, size, layout).map_err(place)?;
    refuse_outside(store, &l1).map_err(place)?;
    Ok((l1, size))
}

/// The bitmaps, in the order of their directory; none when they do not say the truth.
pub async fn list_bitmaps<S: Store>(store: &S, header: &Header) -> Result<Vec<Bitmap>> {
    let entries = bitmap_entries(store, header).await?;
    Ok(entries.into_iter().map(|(_, bitmap)| bitmap).collect())
}

/// The same, each with the bytes of the file that its entry is.
pub(super) async fn bitmap_entries<S: Store>(
    store: &S,
    header: &Header,
) -> Result<Vec<(Range<u64>, Bitmap)>> {
    let Some(directory) = header.bitmaps() else {
        return Ok(Vec::new());
    };
    let (size, cluster) = (header.size, header.cluster);
    let mut all = Vec::new();
    let mut names = BTreeSet::new();
    let mut at = directory.at;
    let end = directory.at.saturating_add(directory.len);
    for _ in 0..directory.count {
        let place = |e: Error| e.at(format!("bitmap directory (offset {at:#x})"));
        let max = end.saturating_sub(at).min(bitmap::ENTRY_MAX as u64);
        let bytes = read_file(store, at, max as usize).await.map_err(place)?;
        let (found, len) = Bitmap::parse(&bytes, size, cluster).map_err(place)?;
        if !names.insert(found.name.clone()) {
            return Err(place(Error::damaged("two bitmaps have the same name")));
        }
        let next = at.saturating_add(len as u64);
        all.push((at..next, found));
        at = next;
    }
    if at != end {
        return Err(Error::damaged(format!(
            "the bitmap directory ends at {at:#x}, and not at {end:#x} as the header says"
        )));
    }
    Ok(all)
}

/// Up to `len` bytes of the file from `at`: no more than there are.
async fn read_file<S: Store>(store: &S, at: u64, len: usize) -> Result<Bytes> {
    let rest = store.info().len.saturating_sub(at);
    read_padded(store, at, rest.min(len as u64).max(1)).await
}

/// Refuses a store that is read in blocks, where the file ends or its pieces begin inside one.
fn refuse_blocks<S: Store>(store: &S, piece: u64) -> Result<()> {
    let info = store.info();
    if info.align > piece || floor_to(info.len, info.align) != info.len {
        return Err(Error::unsupported(format!(
            "storage blocks of {} bytes under a file of {} bytes with pieces of {piece}",
            info.align, info.len
        )));
    }
    Ok(())
}

/// Refuses a first-level table that the file does not hold.
pub(super) fn refuse_outside<S: Store>(store: &S, l1: &L1) -> Result<()> {
    let end = l1
        .at
        .saturating_add(u64::from(l1.entries).saturating_mul(8));
    let len = store.info().len;
    match l1.entries > 0 && end > len {
        true => Err(Error::damaged(format!(
            "an L1 table that ends at {end:#x}, behind the end of the file ({len} bytes)"
        ))),
        false => Ok(()),
    }
}
