//! Create: the bytes of a new image.
//!
//! Header, refcount table, refcount blocks and first-level table follow each other; no guest data has
//! a place yet. Ordering: the length, table and blocks, a barrier, then the first cluster, then a
//! barrier. A file in which the header can be read therefore has all that it names, and one in which
//! it cannot is no image. The first-level table is a hole, as is what is empty of the blocks.
//!
//! Names are bytes here: what they name is for the caller to judge, by his policy. Source: QEMU
//! `docs/interop/qcow2.rst`, "Header", "Feature name table" and "Host cluster management".

use super::extension::{Extension, FeatureKind, FeatureName};
use super::header::{
    COMPRESSION, Compression, EXTENDED_L2, Features, Header, L1, LAZY_REFCOUNTS, Refcounts,
    SnapshotsAt, Version,
};
use super::refcount::Width;
use super::table::Layout;
use crate::store::Store;
use crate::units::{ClusterSize, SECTOR};
use crate::update::Update;
use crate::{Error, Kind, Result, limits};
use bytes::Bytes;

/// Bits and what people call them.
const NAMES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty"),
    (FeatureKind::Incompatible, 1, "corrupt"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data file"),
];

/// The file that a new image shows where it has nothing itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its name, 1 to 1023 bytes, none of them 0.
    pub name: Vec<u8>,
    /// Its format, by the name that QEMU gives it, 1 to 15 bytes. Always stated: a format that is
    /// guessed can be chosen by who writes the file.
    pub format: Vec<u8>,
}

/// An image to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// Format version. Version 2 has refcounts of 16 bits and deflate, and nothing of what is a
    /// feature below.
    pub version: Version,
    /// Virtual size in bytes, a multiple of 512: as much as a first-level table of 32 MiB names.
    pub size: u64,
    /// Unit of allocation.
    pub cluster: ClusterSize,
    /// Bits of a refcount.
    pub width: Width,
    /// Second-level entries that tell of subclusters; for clusters of 16 KiB and more.
    pub extended: bool,
    /// Refcounts may be written late.
    pub lazy: bool,
    /// How clusters are compressed, should any be.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<Backing>,
}

/// Writes a new image into an empty store. Durable when it returns; after an error the file is no
/// image and is to be removed. `Invalid` for what the format cannot hold, `Exists` when the store is
/// not empty, `Unsupported` when its blocks are larger than a cluster.
pub async fn create<S: Store>(store: &S, wanted: &Create) -> Result<()> {
    let info = store.info();
    if info.len > 0 {
        return Err(Error::new(
            Kind::Exists,
            format!(
                "the file holds {} bytes; a new image is written into an empty file only",
                info.len
            ),
        ));
    }
    if info.align > wanted.cluster.bytes() {
        return Err(Error::unsupported(format!(
            "clusters of {} bytes on storage blocks of {}",
            wanted.cluster.bytes(),
            info.align
        )));
    }
    wanted.update()?.apply(store).await
}

impl Create {
    /// An image of version 3 with nothing special: refcounts of 16 bits, deflate, nothing below it.
    pub fn new(size: u64, cluster: ClusterSize) -> Self {
        Self {
            version: Version::V3,
            size,
            cluster,
            width: Width::default(),
            extended: false,
            lazy: false,
            compression: Compression::Deflate,
            backing: None,
        }
    }

    /// The change that turns an empty file into the image.
    pub fn update(&self) -> Result<Update> {
        let header = self.header()?;
        let first = self.first_cluster(header)?;
        let (table, blocks, end) = self.places()?;
        let size = self.cluster.bytes();
        let blocks_at = size.saturating_add(table.saturating_mul(size));
        let entries = (0..blocks).map(|n| blocks_at.saturating_add(n.saturating_mul(size)));
        let entries: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
        let update = Update::new()
            .len(end.saturating_mul(size))
            .write(size, self.padded(&entries))
            .write(blocks_at, self.padded(&self.ones(end)?));
        Ok(update.barrier().write(0, first).barrier())
    }

    /// The first cluster, with the names of features where there is room for them.
    pub(super) fn first_cluster(&self, mut header: Header) -> Result<Bytes> {
        let plain = header.encode()?;
        if self.version == Version::V2 {
            return Ok(self.padded(&plain));
        }
        header.extensions.push(Extension::FeatureNames(names()));
        Ok(self.padded(&header.encode().unwrap_or(plain)))
    }

    /// The header, without names of features. Fails for what the format cannot hold.
    pub(super) fn header(&self) -> Result<Header> {
        self.refuse_version()?;
        self.refuse_backing()?;
        let (table, blocks, _) = self.places()?;
        let l1 = [1, table, blocks]
            .iter()
            .fold(0, |a: u64, n| a.saturating_add(*n));
        let entries = self.l1_entries()?;
        let at = match entries {
            0 => 0,
            _ => l1.saturating_mul(self.cluster.bytes()),
        };
        let backing = self.backing.as_ref();
        let format = backing.map(|b| Extension::BackingFormat(b.format.clone()));
        Ok(Header {
            version: self.version,
            cluster: self.cluster,
            size: self.size,
            backing: backing.map(|b| b.name.clone()),
            l1: L1 { at, entries },
            refcounts: Refcounts {
                at: self.cluster.bytes(),
                clusters: table as u32,
                width: self.width,
            },
            snapshots: SnapshotsAt { at: 0, count: 0 },
            features: self.features(),
            compression: self.compression,
            tail: Vec::new(),
            extensions: format.into_iter().collect(),
        })
    }

    fn features(&self) -> Features {
        let bit = |wanted: bool, bit: u64| if wanted { bit } else { 0 };
        let zstd = self.compression == Compression::Zstd;
        Features {
            incompatible: bit(zstd, COMPRESSION) | bit(self.extended, EXTENDED_L2),
            compatible: bit(self.lazy, LAZY_REFCOUNTS),
            autoclear: 0,
        }
    }

    fn refuse_version(&self) -> Result<()> {
        let features = self.features();
        let more = features != Features::default() || self.width.bits() != 16;
        if self.version == Version::V2 && more {
            return Err(Error::invalid(
                "qcow2 version 2 has refcounts of 16 bits, deflate, and neither lazy refcounts nor extended L2 entries",
            ));
        }
        if self.extended && self.cluster.log2() < 14 {
            return Err(Error::invalid(format!(
                "extended L2 entries need clusters of 16 KiB or more, not {} bytes",
                self.cluster.bytes()
            )));
        }
        Ok(())
    }

    fn refuse_backing(&self) -> Result<()> {
        let Some(Backing { name, format }) = &self.backing else {
            return Ok(());
        };
        let fits = |bytes: &[u8], max| (1..=max).contains(&bytes.len()) && !bytes.contains(&0);
        if !fits(name, limits::QCOW2_NAME_MAX) || !fits(format, limits::QCOW2_FORMAT_NAME_MAX) {
            return Err(Error::invalid(format!(
                "a backing file with a name of {} bytes and a format of {}: 1 to {} and 1 to {} are possible",
                name.len(),
                format.len(),
                limits::QCOW2_NAME_MAX,
                limits::QCOW2_FORMAT_NAME_MAX
            )));
        }
        Ok(())
    }

    /// Entries of the first-level table. Refuses a size that it cannot name.
    fn l1_entries(&self) -> Result<u32> {
        let layout = Layout {
            cluster: self.cluster,
            extended: self.extended,
            external: false,
            zero_flag: self.version == Version::V3,
        };
        let covers = layout.table_covers().max(1);
        let entries_max = limits::QCOW2_L1_MAX / 8;
        let max = covers.saturating_mul(entries_max).min(limits::SIZE_MAX);
        if !self.size.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "a disk of {} bytes: not a multiple of {SECTOR}",
                self.size
            )));
        }
        if self.size > max {
            return Err(Error::invalid(format!(
                "a disk of {} bytes in clusters of {}: at most {max} are possible",
                self.size,
                self.cluster.bytes()
            )));
        }
        Ok(self.size.div_ceil(covers) as u32)
    }

    /// Clusters of the refcount table, refcount blocks, and clusters of the file.
    fn places(&self) -> Result<(u64, u64, u64)> {
        let l1 = u64::from(self.l1_entries()?).saturating_mul(8);
        let l1 = self.cluster.count(l1);
        let per_block = self.width.per_block(self.cluster.bytes()).max(1);
        let (mut table, mut blocks) = (1u64, 1u64);
        // Both count themselves, so they grow until they are enough.
        loop {
            let parts = [1, table, blocks, l1];
            let end = parts.iter().fold(0u64, |a, n| a.saturating_add(*n));
            let needed = end.div_ceil(per_block);
            let needed_table = self.cluster.count(needed.saturating_mul(8));
            if needed <= blocks && needed_table <= table {
                return Ok((table, blocks, end));
            }
            (table, blocks) = (needed_table.max(table), needed.max(blocks));
        }
    }

    /// So many refcounts of 1, as they are in blocks.
    fn ones(&self, count: u64) -> Result<Vec<u8>> {
        let count = count as usize;
        let bytes = count.saturating_mul(self.width.bits() as usize).div_ceil(8);
        let mut out = vec![0; bytes];
        for n in 0..count {
            self.width.set(&mut out, n, 1)?;
        }
        Ok(out)
    }

    /// `bytes`, and zeros up to what can be written: a page, or a cluster where that is less.
    fn padded(&self, bytes: &[u8]) -> Bytes {
        let unit = self.cluster.bytes().min(limits::PAGE) as usize;
        let mut out = crate::buf::aligned(bytes.len().next_multiple_of(unit));
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = *from;
        }
        out.freeze()
    }
}

/// The names of all features that are known here.
fn names() -> Vec<FeatureName> {
    let name = |(kind, bit, text): (FeatureKind, u8, &str)| {
        let mut name = [0; 46];
        name.iter_mut()
            .zip(text.bytes())
            .for_each(|(to, b)| *to = b);
        FeatureName { kind, bit, name }
    };
    NAMES.into_iter().map(name).collect()
}
