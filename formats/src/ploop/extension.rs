//! Extension: the format extension cluster and the dirty bitmaps in it, as bytes.
//!
//! ```text
//! 0   u64  0xAB234CEF23DCEA87
//! 8   16   MD5 of the cluster from byte 24 to its end
//! 24  features, one after the other, until a magic of 0:
//!     u64 magic   u64 flags   u32 data size   u32 unused   data, not padded
//!
//! dirty bitmap, magic 0x20385FAE252CB34A:
//!     u64 size (sectors)   16 UUID   u32 granularity (sectors)   u32 L1 size
//!     u64 L1[]: 0 all clear, 1 all set, else the sector of a cluster of bits, lowest bit first
//! ```
//!
//! Pure functions on bytes: where the cluster is and whether to trust it is said by [`offset`],
//! reading it is the caller's. Neither this cluster nor the bitmap's are in the BAT.
//!
//! Source: ploop reference 1.10 (QEMU `docs/interop/parallels.txt`, OpenVZ/ploop).

use super::header::{CLOSED_V21, Header};
use crate::units::{ClusterSize, SECTOR};
use crate::{Error, Result, limits};
use md5::{Digest, Md5};
use roaring::RoaringBitmap;
use uuid::Uuid;

const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
const DIRTY_BITMAP: u64 = 0x2038_5FAE_252C_B34A;
/// Magic and MD5.
const HEAD: usize = 24;
/// Magic, flags, data size and padding of a feature.
const FEATURE_HEAD: usize = 24;
/// A dirty bitmap without its L1.
const BITMAP_HEAD: usize = 32;

static ZEROS: [u8; 4096] = [0; 4096];

/// Flag: software that does not know the feature must not open the image.
pub const NECESSARY: u64 = 1;
/// Flag: software that does not know the feature keeps it when it rewrites the extension.
pub const TRANSIT: u64 = 2;

/// One feature, verbatim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Says what it is; never 0.
    pub magic: u64,
    /// [`NECESSARY`], [`TRANSIT`].
    pub flags: u64,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// A parsed extension: its features, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extension {
    /// Features in the order of the cluster.
    pub features: Vec<Feature>,
}

/// What one L1 entry says of the sectors it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// No bit is set.
    Clear,
    /// Every bit is set.
    Set,
    /// The bits are in this file cluster.
    At(u32),
}

/// A dirty bitmap: which sectors were written since some point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    /// Size of the disk it speaks of, in sectors.
    pub sectors: u64,
    /// Its name.
    pub id: Uuid,
    /// Sectors that one bit stands for: a power of two.
    pub granularity: u32,
    /// One entry for each cluster of bits.
    pub l1: Vec<Bits>,
}

/// File offset of the extension cluster, or none when the image has none that may be trusted:
/// only software that maintained it closes with `v2.1`. An offset that is not that of a data
/// cluster within `len`, the file's length, is an error.
pub fn offset(header: &Header, len: u64) -> Result<Option<u64>> {
    if header.in_use != CLOSED_V21 || header.extension == 0 {
        return Ok(None);
    }
    let place = |e: Error| e.at("offset 0x38: format extension");
    let cluster = cluster_at(header, len, header.extension).map_err(place)?;
    Ok(Some(header.cluster.start(cluster)))
}

/// The data cluster that starts at `sector`, whole within the file.
fn cluster_at(header: &Header, len: u64, sector: u64) -> Result<u32> {
    let rule = |rule: &str| Error::damaged(format!("sector {sector} {rule}"));
    let at = sector
        .checked_mul(SECTOR)
        .ok_or_else(|| rule("is out of range"))?;
    if header.cluster.within(at) != 0 {
        return Err(rule("is not the start of a cluster"));
    }
    let end = at.checked_add(header.cluster.bytes());
    match header.cluster.cluster_of(at) {
        Some(n) if n < header.data_start => Err(rule("is in the header clusters")),
        Some(n) if end.is_some_and(|end| end <= len) => Ok(n),
        _ => Err(rule(&format!("is past the end of the file ({len} bytes)"))),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u64::from_le_bytes(*b))
}

/// The MD5 of an extension cluster that comes in pieces.
#[derive(Debug, Default)]
pub struct Sum(Md5);

impl Sum {
    /// Of a cluster that starts with these bytes.
    pub fn of(start: &[u8]) -> Self {
        let mut sum = Self::default();
        sum.add(start.get(HEAD..).unwrap_or_default());
        sum
    }

    /// Adds what follows.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn end(self) -> [u8; 16] {
        self.0.finalize().into()
    }
}

impl Extension {
    /// Parses a whole extension cluster.
    pub fn parse(cluster: &[u8]) -> Result<Self> {
        Self::parse_start(cluster, Sum::of(cluster))
    }

    /// Parses an extension by the start of its cluster and the sum of all of it. Features that
    /// reach past [`limits::EXTENSION_MAX`] are `Unsupported`.
    pub fn parse_start(start: &[u8], sum: Sum) -> Result<Self> {
        if u64_at(start, 0) != Some(MAGIC) {
            return Err(Error::damaged("format extension: no magic"));
        }
        if start.get(8..HEAD) != Some(sum.end().as_slice()) {
            return Err(Error::damaged(
                "format extension: its MD5 does not match its content",
            ));
        }
        let (mut features, mut at) = (Vec::new(), HEAD);
        while let Some((feature, next)) = Feature::parse(start, at)? {
            features.push(feature);
            at = next;
        }
        Ok(Self { features })
    }

    /// The start of the extension cluster, behind which it is zeros: at most
    /// [`limits::EXTENSION_MAX`] bytes. Fails when the features do not fit.
    pub fn build_start(&self, size: ClusterSize) -> Result<Vec<u8>> {
        let len = size.bytes().min(limits::EXTENSION_MAX);
        let mut out = self.lay_out(len as usize)?;
        let mut sum = Sum::of(&out);
        let mut rest = size.bytes().saturating_sub(len);
        while rest > 0 {
            let step = rest.min(ZEROS.len() as u64);
            sum.add(ZEROS.get(..step as usize).unwrap_or(&ZEROS));
            rest = rest.saturating_sub(step);
        }
        seal(&mut out, sum);
        Ok(out)
    }

    /// The whole extension cluster. Fails when the features do not fit.
    pub fn build(&self, size: ClusterSize) -> Result<Vec<u8>> {
        let mut out = self.lay_out(size.bytes() as usize)?;
        let sum = Sum::of(&out);
        seal(&mut out, sum);
        Ok(out)
    }

    /// Magic and features in `bytes` bytes, without the digest.
    fn lay_out(&self, bytes: usize) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        for feature in &self.features {
            feature.write(&mut out)?;
        }
        // The feature of magic 0 that ends the list must fit too.
        let end = out.len().saturating_add(FEATURE_HEAD);
        if end > bytes {
            return Err(Error::invalid(format!(
                "features of {end} bytes do not fit into {bytes}"
            )));
        }
        out.resize(bytes, 0);
        Ok(out)
    }

    /// Fails with `Unsupported` when there is a feature that must be known and is not.
    pub fn refuse_unknown(&self) -> Result<()> {
        let unknown = |f: &&Feature| f.magic != DIRTY_BITMAP && f.flags & NECESSARY != 0;
        match self.features.iter().find(unknown) {
            None => Ok(()),
            Some(feature) => Err(Error::unsupported(format!(
                "format extension: feature {:#018x} must be understood to open this image",
                feature.magic
            ))),
        }
    }

    /// The features that are kept when software that does not know them rewrites the extension.
    pub fn transit(&self) -> impl Iterator<Item = &Feature> {
        self.features
            .iter()
            .filter(|f| f.magic != DIRTY_BITMAP && f.flags & TRANSIT != 0)
    }

    /// The dirty bitmaps of an image with this header in a file of `len` bytes.
    pub fn dirty_bitmaps(&self, header: &Header, len: u64) -> Result<Vec<DirtyBitmap>> {
        self.features
            .iter()
            .filter(|f| f.magic == DIRTY_BITMAP)
            .map(|f| DirtyBitmap::parse(&f.data, header, len))
            .collect()
    }

    /// The file clusters that the extension at byte `at` occupies: its own and those of its
    /// bitmaps. No entry names them, and they are no leaks. A cluster used twice is an error.
    pub fn clusters(&self, header: &Header, len: u64, at: u64) -> Result<RoaringBitmap> {
        let mut clusters: RoaringBitmap = header.cluster.cluster_of(at).into_iter().collect();
        for bitmap in self.dirty_bitmaps(header, len)? {
            for cluster in bitmap.clusters() {
                if !clusters.insert(cluster) {
                    return Err(Error::damaged(format!(
                        "dirty bitmap {}: cluster {cluster} is used twice",
                        bitmap.id
                    )));
                }
            }
        }
        Ok(clusters)
    }
}

fn too_long() -> Error {
    Error::unsupported(format!(
        "format extension: features of more than {} bytes are not read",
        limits::EXTENSION_MAX
    ))
}

fn seal(cluster: &mut [u8], sum: Sum) {
    if let Some(to) = cluster.get_mut(8..HEAD) {
        to.copy_from_slice(&sum.end());
    }
}

impl Feature {
    /// The feature at byte `at`, and where the next one is; none at the end of the list.
    fn parse(cluster: &[u8], at: usize) -> Result<Option<(Self, usize)>> {
        // Nobody reads further than that, so what is there is not known.
        if at.saturating_add(FEATURE_HEAD) > limits::EXTENSION_MAX as usize {
            return Err(too_long());
        }
        let short = || Error::damaged(format!("format extension, byte {at}: cut short"));
        let field = |n: usize| at.saturating_add(n);
        let magic = u64_at(cluster, at).ok_or_else(short)?;
        if magic == 0 {
            return Ok(None);
        }
        let flags = u64_at(cluster, field(8)).ok_or_else(short)?;
        let size = u32_at(cluster, field(16)).ok_or_else(short)?;
        let start = field(FEATURE_HEAD);
        let end = start.checked_add(size as usize).ok_or_else(short)?;
        if end > limits::EXTENSION_MAX as usize && cluster.len() >= limits::EXTENSION_MAX as usize {
            return Err(too_long());
        }
        let data = cluster.get(start..end).ok_or_else(|| {
            Error::damaged(format!(
                "format extension, byte {at}: a feature of {size} bytes leaves the cluster"
            ))
        })?;
        Ok(Some((
            Self {
                magic,
                flags,
                data: data.to_vec(),
            },
            end,
        )))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<()> {
        if self.magic == 0 {
            return Err(Error::invalid("a feature of magic 0 ends the list"));
        }
        let size = u32::try_from(self.data.len())
            .map_err(|_| Error::invalid("a feature of more than 4 GiB"))?;
        out.extend_from_slice(&self.magic.to_le_bytes());
        out.extend_from_slice(&self.flags.to_le_bytes());
        out.extend_from_slice(&size.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.data);
        Ok(())
    }
}

impl DirtyBitmap {
    /// Parses the feature's data and checks it against the image.
    fn parse(data: &[u8], header: &Header, len: u64) -> Result<Self> {
        let fields = (
            u64_at(data, 0),
            data.get(8..24),
            u32_at(data, 24),
            u32_at(data, 28),
        );
        let (Some(sectors), Some(id), Some(granularity), Some(count)) = fields else {
            return Err(Error::damaged(
                "dirty bitmap: shorter than its 32 fixed bytes",
            ));
        };
        let id = Uuid::from_slice(id).map_err(|_| Error::damaged("dirty bitmap: bad UUID"))?;
        let bad = |rule: String| Err(Error::damaged(format!("dirty bitmap {id}: {rule}")));
        if sectors != header.sectors {
            return bad(format!(
                "it speaks of {sectors} sectors, the disk has {}",
                header.sectors
            ));
        }
        if !granularity.is_power_of_two() {
            return bad(format!(
                "a granularity of {granularity} sectors is no power of two"
            ));
        }
        let needed = l1_len(sectors, granularity, header.cluster);
        if u64::from(count) != needed {
            return bad(format!("{count} L1 entries where {needed} are needed"));
        }
        let table = data.get(BITMAP_HEAD..).unwrap_or_default();
        if (table.len() / 8) as u64 != needed {
            return bad(format!(
                "{} bytes are no L1 of {count} entries",
                table.len()
            ));
        }
        let l1 = table
            .chunks_exact(8)
            .map(|entry| bits(u64_at(entry, 0).unwrap_or(0), header, len))
            .collect::<Result<_>>()
            .map_err(|e| e.at(format_args!("dirty bitmap {id}")))?;
        Ok(Self {
            sectors,
            id,
            granularity,
            l1,
        })
    }

    /// The feature that holds this bitmap, for an image with clusters of `size`.
    pub fn feature(&self, size: ClusterSize) -> Result<Feature> {
        let needed = l1_len(self.sectors, self.granularity, size);
        if self.l1.len() as u64 != needed || !self.granularity.is_power_of_two() {
            return Err(Error::invalid(format!(
                "a dirty bitmap needs {needed} L1 entries"
            )));
        }
        let count = u32::try_from(needed).map_err(|_| Error::invalid("too many L1 entries"))?;
        let mut data = Vec::new();
        data.extend_from_slice(&self.sectors.to_le_bytes());
        data.extend_from_slice(self.id.as_bytes());
        data.extend_from_slice(&self.granularity.to_le_bytes());
        data.extend_from_slice(&count.to_le_bytes());
        for bits in &self.l1 {
            let entry = match bits {
                Bits::Clear => 0,
                Bits::Set => 1,
                Bits::At(cluster) => u64::from(*cluster).saturating_mul(size.sectors()),
            };
            data.extend_from_slice(&entry.to_le_bytes());
        }
        Ok(Feature {
            magic: DIRTY_BITMAP,
            flags: 0,
            data,
        })
    }

    /// The file clusters that hold its bits.
    pub fn clusters(&self) -> impl Iterator<Item = u32> {
        self.l1.iter().filter_map(|bits| match bits {
            Bits::At(cluster) => Some(*cluster),
            Bits::Clear | Bits::Set => None,
        })
    }
}

/// L1 entries of a bitmap: each stands for a cluster of bits.
pub fn l1_len(sectors: u64, granularity: u32, size: ClusterSize) -> u64 {
    let covered = size
        .bytes()
        .saturating_mul(8)
        .saturating_mul(u64::from(granularity.max(1)));
    sectors.div_ceil(covered.max(1))
}

fn bits(entry: u64, header: &Header, len: u64) -> Result<Bits> {
    match entry {
        0 => Ok(Bits::Clear),
        1 => Ok(Bits::Set),
        sector => cluster_at(header, len, sector).map(Bits::At),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::ploop::Version;

    const CLUSTER: u64 = 32 << 10;
    const LEN: u64 = 8 * CLUSTER;

    fn header() -> Header {
        let size = ClusterSize::new(CLUSTER).unwrap();
        Header {
            in_use: CLOSED_V21,
            extension: 3 * size.sectors(),
            ..Header::new(Version::V2, 64 << 20, size).unwrap()
        }
    }

    fn bitmap() -> DirtyBitmap {
        let l1 = vec![Bits::At(4)];
        DirtyBitmap {
            sectors: 131_072,
            id: Uuid::from_u128(7),
            granularity: 128,
            l1,
        }
    }

    fn cluster_with(features: Vec<Feature>) -> Vec<u8> {
        Extension { features }.build(header().cluster).unwrap()
    }

    /// A cluster whose only feature is the bitmap with `change` applied to its data.
    fn damaged(change: impl Fn(&mut Vec<u8>)) -> Result<Vec<DirtyBitmap>> {
        let mut feature = bitmap().feature(header().cluster).unwrap();
        change(&mut feature.data);
        Extension::parse(&cluster_with(vec![feature]))?.dirty_bitmaps(&header(), LEN)
    }

    #[test]
    fn an_extension_of_a_large_cluster_is_known_by_its_start_and_its_sum() {
        let feature = |len| Feature {
            magic: 9,
            flags: TRANSIT,
            data: vec![1; len],
        };
        let size = ClusterSize::new(4 << 20).unwrap();
        let fits = Extension {
            features: vec![feature(1000), feature(0)],
        };
        let (whole, start) = (fits.build(size).unwrap(), fits.build_start(size).unwrap());
        assert_eq!(start.len() as u64, limits::EXTENSION_MAX);
        assert_eq!(start, whole[..start.len()]);
        let mut sum = Sum::of(&start);
        whole[start.len()..]
            .chunks(1000)
            .for_each(|part| sum.add(part));
        assert_eq!(Extension::parse_start(&start, sum).unwrap(), fits);
        let long = Extension {
            features: vec![feature(1 << 20)],
        };
        assert!(long.build_start(size).is_err());
        let e = Extension::parse(&long.build(size).unwrap()).unwrap_err();
        assert_eq!(e.kind(), crate::Kind::Unsupported, "{e}");
    }

    #[test]
    fn what_is_built_is_parsed_back() {
        let other = Feature {
            magic: 9,
            flags: TRANSIT,
            data: vec![1, 2, 3],
        };
        let feature = bitmap().feature(header().cluster).unwrap();
        let built = cluster_with(vec![other.clone(), feature]);
        assert_eq!(built.len() as u64, CLUSTER);
        let parsed = Extension::parse(&built).unwrap();
        assert_eq!(parsed.transit().collect::<Vec<_>>(), [&other]);
        let bitmaps = parsed.dirty_bitmaps(&header(), LEN).unwrap();
        assert_eq!(bitmaps, [bitmap()]);
        assert_eq!(bitmaps[0].clusters().collect::<Vec<_>>(), [4]);
        assert!(parsed.refuse_unknown().is_ok());
    }

    #[test]
    fn a_single_changed_byte_is_noticed_by_the_md5() {
        let good = cluster_with(vec![bitmap().feature(header().cluster).unwrap()]);
        for at in [0, 8, 24, 60, CLUSTER as usize - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(Extension::parse(&bad).is_err(), "{at}");
        }
        assert!(Extension::parse(&good[..good.len() - 1]).is_err());
        assert!(Extension::parse(&[]).is_err());
    }

    #[test]
    fn only_an_unknown_feature_marked_necessary_forbids_opening() {
        for (magic, flags, fine) in [
            (9, 0, true),
            (9, TRANSIT, true),
            (9, NECESSARY, false),
            (DIRTY_BITMAP, 1, true),
        ] {
            let extension = Extension {
                features: vec![Feature {
                    magic,
                    flags,
                    data: Vec::new(),
                }],
            };
            assert_eq!(
                extension.refuse_unknown().is_ok(),
                fine,
                "{magic:x} {flags}"
            );
        }
    }

    #[test]
    fn the_extension_is_trusted_only_after_a_v21_close_and_within_the_file() {
        let size = header().cluster.sectors();
        let at = |in_use, extension| {
            offset(
                &Header {
                    in_use,
                    extension,
                    ..header()
                },
                LEN,
            )
        };
        assert_eq!(at(CLOSED_V21, 3 * size).unwrap(), Some(3 * CLUSTER));
        assert_eq!(at(CLOSED_V21, 7 * size).unwrap(), Some(7 * CLUSTER));
        assert_eq!(at(CLOSED_V21, 0).unwrap(), None);
        assert_eq!(at(0, u64::MAX).unwrap(), None);
        for bad in [
            1,
            size - 1,
            8 * size,
            7 * size + 1,
            u64::MAX,
            u64::MAX / 512,
            1 << 60,
        ] {
            assert!(at(CLOSED_V21, bad).is_err(), "{bad}");
        }
        let deep = Header {
            data_start: 5,
            ..header()
        };
        assert!(offset(&deep, LEN).is_err());
    }

    #[test]
    fn a_bitmap_that_contradicts_its_image_is_refused() {
        assert!(damaged(|_| ()).is_ok());
        let put = |data: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            data[at..at + bytes.len()].copy_from_slice(bytes);
        };
        assert!(damaged(|d| put(d, 0, &1u64.to_le_bytes())).is_err(), "size");
        assert!(
            damaged(|d| put(d, 24, &0u32.to_le_bytes())).is_err(),
            "granularity 0"
        );
        assert!(
            damaged(|d| put(d, 24, &100u32.to_le_bytes())).is_err(),
            "granularity 100"
        );
        assert!(
            damaged(|d| put(d, 28, &u32::MAX.to_le_bytes())).is_err(),
            "L1 size"
        );
        assert!(
            damaged(|d| put(d, 28, &0u32.to_le_bytes())).is_err(),
            "L1 empty"
        );
        assert!(
            damaged(|d| put(d, 32, &2u64.to_le_bytes())).is_err(),
            "L1 misaligned"
        );
        assert!(
            damaged(|d| put(d, 32, &(8 * 64u64).to_le_bytes())).is_err(),
            "L1 past the end"
        );
        assert!(damaged(|d| d.truncate(31)).is_err(), "short");
        assert!(damaged(|d| d.extend([0; 8])).is_err(), "long");
    }

    #[test]
    fn a_feature_that_leaves_the_cluster_is_refused() {
        let mut cluster = cluster_with(vec![Feature {
            magic: 9,
            flags: 0,
            data: vec![0; 8],
        }]);
        cluster[HEAD + 16..HEAD + 20].copy_from_slice(&u32::MAX.to_le_bytes());
        let digest = Sum::of(&cluster).end();
        cluster[8..HEAD].copy_from_slice(&digest);
        assert!(Extension::parse(&cluster).is_err());
        let big = Feature {
            magic: 9,
            flags: 0,
            data: vec![0; CLUSTER as usize],
        };
        assert!(
            Extension {
                features: vec![big]
            }
            .build(header().cluster)
            .is_err()
        );
    }

    #[test]
    fn a_list_that_fills_the_cluster_needs_its_end_mark() {
        let data = vec![1; CLUSTER as usize - HEAD - 2 * FEATURE_HEAD];
        let full = Feature {
            magic: 9,
            flags: 0,
            data,
        };
        let built = cluster_with(vec![full.clone()]);
        assert_eq!(Extension::parse(&built).unwrap().features, [full]);
    }
}
