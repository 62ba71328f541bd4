//! The qcow2 header: what an image says of itself in its first cluster, big-endian.
//!
//! Parsing gives a value that cannot contradict itself; whether the *file* agrees with it is the
//! business of `open`. Unknown header bytes and extensions survive parsing and encoding. Encrypted
//! images and those with incompatible features that nobody here knows are refused, the latter by
//! name. Source: QEMU `docs/interop/qcow2.rst`, "Header"; the bounds are those that QEMU holds
//! images to (`limits`).

use super::be::{u32_at, u64_at};
use super::extension::{self, BitmapsAt, Extension, FeatureKind};
use super::refcount::Width;
use super::table::Layout;
use super::words::{read_unit, unit, write_unit};
use crate::layer::Geometry;
use crate::limits;
use crate::store::Store;
use crate::units::{ClusterSize, SECTOR, floor_to};
use crate::update::Update;
use crate::{Error, Result};

const MAGIC: u32 = 0x5146_49FB;
/// Bytes of a version 2 header.
const V2_LEN: usize = 72;
/// Bytes of the smallest version 3 header.
const V3_LEN: usize = 104;
/// Where it says how long it is.
const LEN_AT: usize = 100;

/// Incompatible: refcounts may be wrong; reading does not need them.
pub const DIRTY: u64 = 1;
/// Incompatible: somebody found a contradiction; nothing may be written.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data is in another file.
pub const EXTERNAL_DATA: u64 = 1 << 2;
/// Incompatible: the compression is not deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible: entries of second-level tables have 16 bytes.
pub const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;
/// Compatible: refcounts may be written late.
pub const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear: the bitmaps say the truth.
pub const BITMAPS_VALID: u64 = 1;
/// Autoclear: the external data file can be read as a raw image.
pub const EXTERNAL_RAW: u64 = 1 << 1;
/// Who writes to an image clears the others.
pub(super) const KNOWN_AUTOCLEAR: u64 = BITMAPS_VALID | EXTERNAL_RAW;

/// Format version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// No feature bits, no zero clusters, refcounts of 16 bits.
    V2,
    /// Everything.
    V3,
}

/// How compressed clusters are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Deflate without a zlib header.
    Deflate,
    /// One zstd frame.
    Zstd,
}

/// The feature bits; all 0 in version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// Only known ones: others are refused.
    pub incompatible: u64,
    /// Any.
    pub compatible: u64,
    /// Any.
    pub autoclear: u64,
}

/// A first-level table: of the active image, or of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L1 {
    /// File offset, cluster aligned.
    pub at: u64,
    /// Entries of 8 bytes, at most 4 Mi.
    pub entries: u32,
}

impl L1 {
    /// The bytes of the file that it is.
    pub(super) const fn bytes(self) -> std::ops::Range<u64> {
        let len = (self.entries as u64).saturating_mul(8);
        self.at..self.at.saturating_add(len)
    }

    /// Refuses a table that cannot be one: too long, misaligned, in the header, or too short for
    /// `size` bytes.
    pub(super) fn new(at: u64, entries: u32, size: u64, layout: Layout) -> Result<Self> {
        Self::judge_entries(entries, size, layout)?;
        Self::judge_place(at, entries, layout)?;
        Ok(Self { at, entries })
    }

    /// That of the header, whose fields a refusal names.
    fn parse(bytes: &[u8], size: u64, layout: Layout) -> Result<Self> {
        let (at, entries) = (u64_at(bytes, 40), u32_at(bytes, 36));
        Self::judge_entries(entries, size, layout).map_err(|e| e.at("offset 36"))?;
        Self::judge_place(at, entries, layout).map_err(|e| e.at("offset 40"))?;
        Ok(Self { at, entries })
    }

    fn judge_entries(entries: u32, size: u64, layout: Layout) -> Result<()> {
        let len = u64::from(entries).saturating_mul(8);
        if len > limits::QCOW2_L1_MAX {
            return Err(Error::damaged(format!("an L1 table of {entries} entries")));
        }
        let needed = size.div_ceil(layout.table_covers().max(1));
        if u64::from(entries) < needed {
            return Err(Error::damaged(format!(
                "an L1 table of {entries} entries for a disk that needs {needed}"
            )));
        }
        Ok(())
    }

    fn judge_place(at: u64, entries: u32, layout: Layout) -> Result<()> {
        let len = u64::from(entries).saturating_mul(8);
        match entries {
            0 => Ok(()),
            _ => refuse_place("L1 table", at, len, layout.cluster),
        }
    }
}

/// Where the refcounts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refcounts {
    /// File offset of the table, cluster aligned.
    pub at: u64,
    /// Clusters of the table, at least 1; at most 8 MiB.
    pub clusters: u32,
    /// Bits of one refcount.
    pub width: Width,
}

/// Where the snapshots are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotsAt {
    /// File offset of the table, cluster aligned; of no meaning when there are none.
    pub at: u64,
    /// Snapshots, at most 65536.
    pub count: u32,
}

/// A parsed header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Format version.
    pub version: Version,
    /// Unit of allocation.
    pub cluster: ClusterSize,
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// Name of the backing file, 1 to 1023 bytes; none when there is no backing file.
    pub backing: Option<Vec<u8>>,
    /// The active first-level table.
    pub l1: L1,
    /// Refcounts.
    pub refcounts: Refcounts,
    /// Snapshots.
    pub snapshots: SnapshotsAt,
    /// Feature bits.
    pub features: Features,
    /// How compressed clusters are packed.
    pub compression: Compression,
    /// Header bytes from 105 on, which nobody here knows; empty in version 2.
    pub tail: Vec<u8>,
    /// Header extensions, in order.
    pub extensions: Vec<Extension>,
}

/// Refuses a table that is not at a cluster's start, or is where the header is, or ends beyond what
/// an offset can say.
pub(super) fn refuse_place(what: &str, at: u64, len: u64, cluster: ClusterSize) -> Result<()> {
    let end = at.checked_add(len).filter(|end| *end <= limits::SIZE_MAX);
    if at == 0 || cluster.within(at) != 0 || end.is_none() {
        return Err(Error::damaged(format!(
            "{what} of {len} bytes at offset {at:#x}: not the start of a cluster behind the header"
        )));
    }
    Ok(())
}

/// The version and the cluster, which say how much to read: the first cluster, of which `bytes` are
/// the first 24 at least.
pub fn peek(bytes: &[u8]) -> Result<(Version, ClusterSize)> {
    if bytes.len() < V2_LEN {
        return Err(Error::damaged("shorter than the 72-byte qcow2 header"));
    }
    if u32_at(bytes, 0) != MAGIC {
        return Err(Error::damaged("offset 0: no qcow2 signature"));
    }
    let version = match u32_at(bytes, 4) {
        2 => Version::V2,
        3 => Version::V3,
        1 => return Err(Error::unsupported("qcow version 1, not qcow2")),
        n => return Err(Error::unsupported(format!("qcow2 version {n}"))),
    };
    let cluster = ClusterSize::of_qcow2(u32_at(bytes, 20))
        .map_err(|e| Error::damaged(format!("offset 20: {e}")))?;
    Ok((version, cluster))
}

/// Bytes of a header that [`peek_piece`] looks at.
pub const FIXED: usize = V3_LEN;

/// Bytes that are the same for sure in an image whose header begins with `bytes`: a cluster, or a
/// subcluster.
pub fn peek_piece(bytes: &[u8]) -> Result<u64> {
    let (version, cluster) = peek(bytes)?;
    let features = parse_features(bytes, version);
    Ok(layout(version, cluster, features)?.piece())
}

/// The size that an image whose header begins with `bytes` states, in bytes. Of one that is no
/// multiple of a sector, the rest is not there for anybody ([`Header::size`]).
pub fn peek_size(bytes: &[u8]) -> u64 {
    u64_at(bytes, 24)
}

impl Header {
    /// Parses the first cluster of a file, or all of a file that is shorter.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (version, cluster) = peek(bytes)?;
        let first = usize::try_from(cluster.bytes()).unwrap_or(usize::MAX);
        let bytes = bytes.get(..first).unwrap_or(bytes);
        let len = header_len(bytes, version)?;
        refuse_encryption(bytes)?;
        let (backing_at, backing) = parse_backing(bytes, len)?;
        let area = bytes.get(len..backing_at).unwrap_or_default();
        let features = parse_features(bytes, version);
        // Names first: a feature that is not known changes what everything else means.
        refuse_unknown(features, area)?;
        let compression = parse_compression(bytes, len, features)?;
        refuse_raw_over(features, backing.as_deref())?;
        let bitmaps = features.autoclear & BITMAPS_VALID != 0;
        let extensions = extension::parse_all(area, len, cluster, bitmaps)?;
        let layout = layout(version, cluster, features)?;
        let size = floor_to(u64_at(bytes, 24), SECTOR);
        if size > limits::SIZE_MAX {
            return Err(Error::damaged(format!("offset 24: a size of {size} bytes")));
        }
        Ok(Self {
            version,
            cluster,
            size,
            backing,
            l1: L1::parse(bytes, size, layout)?,
            refcounts: parse_refcounts(bytes, version, cluster)?,
            snapshots: parse_snapshots(bytes, cluster)?,
            features,
            compression,
            tail: bytes
                .get(V3_LEN..len)
                .and_then(|b| b.get(1..))
                .unwrap_or_default()
                .to_vec(),
            extensions,
        })
    }

    /// The bytes on disk, from offset 0 on; the rest of the first cluster is zeros. `Invalid` when
    /// they do not fit in it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = self.encode_fields();
        out.extend(extension::encode_all(&self.extensions));
        if let Some(name) = &self.backing {
            let (at, len) = (out.len() as u64, name.len() as u32);
            let place = [&at.to_be_bytes()[..], &len.to_be_bytes()].concat();
            let slot = out.iter_mut().skip(8);
            slot.zip(place).for_each(|(to, from)| *to = from);
            out.extend(name);
        }
        if out.len() as u64 > self.cluster.bytes() {
            return Err(Error::invalid(format!(
                "a qcow2 header of {} bytes, more than a cluster",
                out.len()
            )));
        }
        Ok(out)
    }

    /// The header proper, with no backing file.
    fn encode_fields(&self) -> Vec<u8> {
        let number: u32 = match self.version {
            Version::V2 => 2,
            Version::V3 => 3,
        };
        let fields: [&[u8]; 12] = [
            &MAGIC.to_be_bytes(),
            &number.to_be_bytes(),
            &[0; 12],
            &self.cluster.log2().to_be_bytes(),
            &self.size.to_be_bytes(),
            &[0; 4],
            &self.l1.entries.to_be_bytes(),
            &self.l1.at.to_be_bytes(),
            &self.refcounts.at.to_be_bytes(),
            &self.refcounts.clusters.to_be_bytes(),
            &self.snapshots.count.to_be_bytes(),
            &self.snapshots.at.to_be_bytes(),
        ];
        let mut out = fields.concat();
        if self.version == Version::V2 {
            return out;
        }
        out.extend(self.features.incompatible.to_be_bytes());
        out.extend(self.features.compatible.to_be_bytes());
        out.extend(self.features.autoclear.to_be_bytes());
        out.extend(self.refcounts.width.order().to_be_bytes());
        let kind = match (self.compression, self.tail.is_empty()) {
            (Compression::Deflate, true) => None,
            (Compression::Deflate, false) => Some(0),
            (Compression::Zstd, _) => Some(1),
        };
        out.extend([0; 4]);
        out.extend(kind);
        out.extend(&self.tail);
        out.resize(out.len().next_multiple_of(8), 0);
        let len = (out.len() as u32).to_be_bytes();
        let slot = out.iter_mut().skip(LEN_AT);
        slot.zip(len).for_each(|(to, from)| *to = from);
        out
    }

    /// Puts a refcount table into the bytes of a header.
    pub(super) fn put_refcounts(head: &mut [u8], at: u64, clusters: u32) {
        put(head, 48, &at.to_be_bytes());
        put(head, 56, &clusters.to_be_bytes());
    }

    /// Puts autoclear features into the bytes of a header.
    pub(super) fn put_autoclear(head: &mut [u8], features: u64) {
        put(head, 88, &features.to_be_bytes());
    }

    /// Puts the fields that change while an image is closed - size, tables, snapshots, incompatible
    /// and autoclear features - into its first sector, and leaves everything else in it as it is.
    fn patch(&self, sector: &mut [u8]) {
        let fields = self.encode_fields();
        let mut put = |range: std::ops::Range<usize>| {
            let to = sector.get_mut(range.clone());
            if let (Some(to), Some(from)) = (to, fields.get(range)) {
                to.copy_from_slice(from);
            }
        };
        put(36..72);
        if self.version == Version::V3 {
            put(72..80);
            put(88..96);
        }
        // A size that is no multiple of a sector stays, as long as the disk does.
        if floor_to(u64_at(sector, 24), SECTOR) != self.size {
            let to = sector.iter_mut().skip(24);
            to.zip(self.size.to_be_bytes()).for_each(|(to, b)| *to = b);
        }
    }

    /// Virtual size and cluster.
    pub const fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size,
            cluster: self.cluster,
        }
    }

    /// How its tables are to be read.
    pub fn layout(&self) -> Result<Layout> {
        layout(self.version, self.cluster, self.features)
    }

    /// Whether guest data is in another file.
    pub const fn has_data_file(&self) -> bool {
        self.features.incompatible & EXTERNAL_DATA != 0
    }

    /// The name of the external data file, if the image gives one.
    pub fn data_file(&self) -> Option<&[u8]> {
        self.extensions.iter().find_map(|e| match e {
            Extension::DataFile(name) if self.has_data_file() => Some(name.as_slice()),
            _ => None,
        })
    }

    /// The format of the backing file, if the image says it.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions.iter().find_map(|e| match e {
            Extension::BackingFormat(name) => Some(name.as_slice()),
            _ => None,
        })
    }

    /// Where the bitmaps are, if there are any that say the truth.
    pub fn bitmaps(&self) -> Option<BitmapsAt> {
        self.extensions.iter().find_map(|e| match e {
            Extension::Bitmaps(at) if self.features.autoclear & BITMAPS_VALID != 0 => Some(*at),
            _ => None,
        })
    }
}

fn put(head: &mut [u8], at: usize, field: &[u8]) {
    let slot = head.iter_mut().skip(at);
    slot.zip(field).for_each(|(to, from)| *to = *from);
}

/// Writes what changes of a header while the image is closed, and a barrier. All of it is in one
/// sector: it is there, or it is not.
pub(super) async fn write_header<S: Store>(store: &S, header: &Header) -> Result<()> {
    let mut first = read_unit(store, 0, unit(header.cluster)).await?;
    header.patch(&mut first);
    write_unit(store, 0, first).await?;
    Update::new().barrier().apply(store).await
}

/// Whether all that the header says, extensions and names, is in its first sector.
pub(super) fn is_one_sector(header: &Header) -> bool {
    let encoded = header.encode();
    encoded.is_ok_and(|bytes| bytes.len() as u64 <= SECTOR)
}

/// Writes a header whose extensions have changed and that [`is_one_sector`] while the image is closed,
/// and a barrier. It is there, or it is not.
pub(super) async fn rewrite_header<S: Store>(store: &S, header: &Header) -> Result<()> {
    let mut first = read_unit(store, 0, unit(header.cluster)).await?;
    let old = u64_at(&first, 24);
    let mut bytes = header.encode()?;
    bytes.resize(SECTOR as usize, 0);
    first.iter_mut().zip(bytes).for_each(|(to, b)| *to = b);
    // A size that is no multiple of a sector stays.
    if floor_to(old, SECTOR) == header.size {
        put(&mut first, 24, &old.to_be_bytes());
    }
    write_unit(store, 0, first).await?;
    Update::new().barrier().apply(store).await
}

fn layout(version: Version, cluster: ClusterSize, features: Features) -> Result<Layout> {
    let extended = features.incompatible & EXTENDED_L2 != 0;
    if extended && cluster.log2() < 14 {
        return Err(Error::damaged(format!(
            "extended L2 entries with clusters of {} bytes: subclusters of less than a sector",
            cluster.bytes()
        )));
    }
    Ok(Layout {
        cluster,
        extended,
        external: features.incompatible & EXTERNAL_DATA != 0,
        zero_flag: version == Version::V3,
    })
}

/// Bytes of the header: fixed in version 2, stated in version 3.
fn header_len(bytes: &[u8], version: Version) -> Result<usize> {
    if version == Version::V2 {
        return Ok(V2_LEN);
    }
    let len = u32_at(bytes, LEN_AT) as usize;
    if bytes.len() < V3_LEN || len < V3_LEN || len > bytes.len() || !len.is_multiple_of(8) {
        return Err(Error::damaged(format!(
            "offset 100: a header of {len} bytes in {} of the first cluster",
            bytes.len()
        )));
    }
    Ok(len)
}

fn refuse_encryption(bytes: &[u8]) -> Result<()> {
    match u32_at(bytes, 32) {
        0 => Ok(()),
        1 => Err(Error::unsupported(
            "the image is encrypted (AES, by old versions of QEMU): decrypt it with qemu-img convert",
        )),
        2 => Err(Error::unsupported(
            "the image is encrypted (LUKS): decrypt it with qemu-img convert",
        )),
        n => Err(Error::damaged(format!("offset 32: encryption method {n}"))),
    }
}

/// Where the backing file's name begins, or else the bytes end, and the name.
fn parse_backing(bytes: &[u8], header_len: usize) -> Result<(usize, Option<Vec<u8>>)> {
    let (at, len) = (u64_at(bytes, 8), u32_at(bytes, 16) as usize);
    if at == 0 {
        return Ok((bytes.len(), None));
    }
    let start = usize::try_from(at).unwrap_or(usize::MAX);
    let name = bytes.get(start..).and_then(|rest| rest.get(..len));
    match name {
        Some(name) if start >= header_len && len <= limits::QCOW2_NAME_MAX => {
            Ok((start, Some(name.to_vec()).filter(|name| !name.is_empty())))
        }
        _ => Err(Error::damaged(format!(
            "offset 8: a backing file name of {len} bytes at {at:#x}, not behind the header in the first cluster"
        ))),
    }
}

fn parse_features(bytes: &[u8], version: Version) -> Features {
    match version {
        Version::V2 => Features::default(),
        Version::V3 => Features {
            incompatible: u64_at(bytes, 72),
            compatible: u64_at(bytes, 80),
            autoclear: u64_at(bytes, 88),
        },
    }
}

/// Refuses incompatible features that are not known, by the names that the image gives them.
fn refuse_unknown(features: Features, area: &[u8]) -> Result<()> {
    let unknown = features.incompatible & !KNOWN_INCOMPATIBLE;
    if unknown == 0 {
        return Ok(());
    }
    let names = extension::feature_names(area);
    let bits = (0..64u8).filter(|bit| unknown.wrapping_shr(u32::from(*bit)) & 1 == 1);
    let said: Vec<String> = bits
        .map(|bit| {
            let named =
                |f: &&extension::FeatureName| f.kind == FeatureKind::Incompatible && f.bit == bit;
            match names.iter().find(named) {
                Some(feature) => format!("\"{}\" (bit {bit})", feature.printable()),
                None => format!("bit {bit}"),
            }
        })
        .collect();
    Err(Error::unsupported(format!(
        "the image uses features that are not known here: {}",
        said.join(", ")
    )))
}

/// Refuses an external data file that is said to be the whole disk, over a backing file.
fn refuse_raw_over(features: Features, backing: Option<&[u8]>) -> Result<()> {
    let external = features.incompatible & EXTERNAL_DATA != 0;
    match external && features.autoclear & EXTERNAL_RAW != 0 && backing.is_some() {
        true => Err(Error::damaged(
            "offset 88: a raw external data file and a backing file",
        )),
        false => Ok(()),
    }
}

fn parse_compression(bytes: &[u8], len: usize, features: Features) -> Result<Compression> {
    let kind = bytes.get(V3_LEN..len).and_then(|b| b.first()).copied();
    let flagged = features.incompatible & COMPRESSION != 0;
    match (kind.unwrap_or(0), flagged) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (kind @ (0 | 1), _) => Err(Error::damaged(format!(
            "offset 104: compression {kind} contradicts the feature bits"
        ))),
        (kind, _) => Err(Error::unsupported(format!(
            "offset 104: compression {kind}"
        ))),
    }
}

fn parse_refcounts(bytes: &[u8], version: Version, cluster: ClusterSize) -> Result<Refcounts> {
    let (at, clusters) = (u64_at(bytes, 48), u32_at(bytes, 56));
    let order = match version {
        Version::V2 => 4,
        Version::V3 => u32_at(bytes, 96),
    };
    let width = Width::new(order).map_err(|e| e.at("offset 96"))?;
    let len = u64::from(clusters).saturating_mul(cluster.bytes());
    if clusters == 0 || len > limits::QCOW2_REFTABLE_MAX {
        return Err(Error::damaged(format!(
            "offset 56: a refcount table of {clusters} clusters"
        )));
    }
    refuse_place("offset 48: refcount table", at, len, cluster)?;
    Ok(Refcounts {
        at,
        clusters,
        width,
    })
}

fn parse_snapshots(bytes: &[u8], cluster: ClusterSize) -> Result<SnapshotsAt> {
    let (at, count) = (u64_at(bytes, 64), u32_at(bytes, 60));
    if count > limits::QCOW2_SNAPSHOTS_MAX {
        return Err(Error::damaged(format!("offset 60: {count} snapshots")));
    }
    if count > 0 {
        let least = u64::from(count).saturating_mul(40);
        refuse_place("offset 64: snapshot table", at, least, cluster)?;
    }
    Ok(SnapshotsAt { at, count })
}
