//! Header extensions: typed pieces between the header and the backing file's name.
//!
//! What is not known is kept byte for byte. Names are bytes that a file gave, never paths: they are
//! printed with [`printable`] and opened by nobody here. Source: QEMU `docs/interop/qcow2.rst`,
//! "Header extensions" and "Feature name table".

use super::be::{u32_at, u64_at};
use super::header::refuse_place;
use crate::units::ClusterSize;
use crate::{Error, Result, limits};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xE279_2ACA;
const FEATURE_NAMES: u32 = 0x6803_F857;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_BE77;
const DATA_FILE: u32 = 0x4441_5441;
/// Bytes of type and length before the data of an extension.
const HEAD: usize = 8;
/// Bytes of an entry of the feature name table: kind, bit, and a name padded with zeros.
const FEATURE_LEN: usize = 48;
const BITMAPS_LEN: usize = 24;

/// What a feature bit belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureKind {
    /// Software that does not know it must not open the image.
    Incompatible,
    /// May be ignored.
    Compatible,
    /// To be cleared by who writes without knowing it.
    Autoclear,
    /// Nobody knows.
    Other(u8),
}

impl FeatureKind {
    const fn parse(byte: u8) -> Self {
        match byte {
            0 => Self::Incompatible,
            1 => Self::Compatible,
            2 => Self::Autoclear,
            other => Self::Other(other),
        }
    }

    const fn byte(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
            Self::Other(other) => other,
        }
    }
}

/// The name that an image gives to a feature bit, to be shown to people who use other software.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// Which set of bits.
    pub kind: FeatureKind,
    /// The bit, from 0.
    pub bit: u8,
    /// The 46 bytes of the name, padded with zeros.
    pub name: [u8; 46],
}

impl FeatureName {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let (bit, name) = rest.split_first()?;
        Some(Self {
            kind: FeatureKind::parse(*kind),
            bit: *bit,
            name: *name.first_chunk()?,
        })
    }

    /// The name, made fit to be shown.
    pub fn printable(&self) -> String {
        let end = self.name.iter().position(|b| *b == 0);
        printable(self.name.get(..end.unwrap_or(46)).unwrap_or_default())
    }
}

/// Where the persistent bitmaps are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsAt {
    /// Bitmaps, 1 to 65535.
    pub count: u32,
    /// Bytes of the directory, 1 to 64 MiB.
    pub len: u64,
    /// File offset of the directory, cluster aligned.
    pub at: u64,
}

impl BitmapsAt {
    fn parse(data: &[u8], cluster: ClusterSize) -> Result<Self> {
        let count = u32_at(data, 0);
        let (len, at) = (u64_at(data, 8), u64_at(data, 16));
        let refuse = |what: String| Err(Error::damaged(format!("bitmaps extension: {what}")));
        if data.len() != BITMAPS_LEN {
            return refuse(format!("{} bytes instead of 24", data.len()));
        }
        if u32_at(data, 4) != 0 {
            return refuse("reserved bytes are not zero".into());
        }
        if count == 0 || count > limits::QCOW2_BITMAPS_MAX {
            return refuse(format!("{count} bitmaps"));
        }
        if len == 0 || len > limits::QCOW2_DIRECTORY_MAX {
            return refuse(format!("a directory of {len} bytes"));
        }
        refuse_place("bitmaps extension: directory", at, len, cluster)?;
        Ok(Self { count, len, at })
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BITMAPS_LEN);
        out.extend(self.count.to_be_bytes());
        out.extend([0; 4]);
        out.extend(self.len.to_be_bytes());
        out.extend(self.at.to_be_bytes());
        out
    }
}

/// One header extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extension {
    /// The format of the backing file, by the name that QEMU gives it.
    BackingFormat(Vec<u8>),
    /// Names of feature bits.
    FeatureNames(Vec<FeatureName>),
    /// Persistent bitmaps, of an image that says that they are to be believed; otherwise the extension
    /// is kept as one that is not known.
    Bitmaps(BitmapsAt),
    /// The name of the external data file.
    DataFile(Vec<u8>),
    /// Anything else, kept as it is.
    Unknown {
        /// Its type.
        magic: u32,
        /// Its bytes.
        data: Vec<u8>,
    },
}

impl Extension {
    /// Whether it is about bitmaps, to be believed or not.
    pub(super) const fn is_bitmaps(&self) -> bool {
        matches!(
            self,
            Self::Bitmaps(_) | Self::Unknown { magic: BITMAPS, .. }
        )
    }

    fn parse(magic: u32, data: &[u8], cluster: ClusterSize, bitmaps: bool) -> Result<Self> {
        Ok(match magic {
            BACKING_FORMAT if data.len() > limits::QCOW2_FORMAT_NAME_MAX => {
                return Err(Error::damaged(format!(
                    "backing format name of {} bytes",
                    data.len()
                )));
            }
            BACKING_FORMAT => Self::BackingFormat(data.to_vec()),
            FEATURE_NAMES if data.len().is_multiple_of(FEATURE_LEN) => {
                let names = data.chunks_exact(FEATURE_LEN);
                Self::FeatureNames(names.filter_map(FeatureName::parse).collect())
            }
            BITMAPS if bitmaps => Self::Bitmaps(BitmapsAt::parse(data, cluster)?),
            DATA_FILE if data.len() > limits::QCOW2_NAME_MAX => {
                return Err(Error::damaged(format!(
                    "data file name of {} bytes",
                    data.len()
                )));
            }
            DATA_FILE => Self::DataFile(data.to_vec()),
            ENCRYPTION => {
                return Err(Error::damaged(
                    "an encryption header in an image that says it is not encrypted",
                ));
            }
            magic => Self::Unknown {
                magic,
                data: data.to_vec(),
            },
        })
    }

    /// Type and data as they are on disk.
    fn encode(&self) -> (u32, Vec<u8>) {
        match self {
            Self::BackingFormat(name) => (BACKING_FORMAT, name.clone()),
            Self::FeatureNames(names) => {
                let entry = |f: &FeatureName| [&[f.kind.byte(), f.bit][..], &f.name].concat();
                (FEATURE_NAMES, names.iter().flat_map(entry).collect())
            }
            Self::Bitmaps(at) => (BITMAPS, at.encode()),
            Self::DataFile(name) => (DATA_FILE, name.clone()),
            Self::Unknown { magic, data } => (*magic, data.clone()),
        }
    }
}

/// Parses the extensions in `area`, the bytes from file offset `from`, where the header ends, to the
/// backing file's name or to the end of the first cluster. `bitmaps`: those are to be believed.
pub(super) fn parse_all(
    area: &[u8],
    from: usize,
    cluster: ClusterSize,
    bitmaps: bool,
) -> Result<Vec<Extension>> {
    let mut all: Vec<Extension> = Vec::new();
    let mut rest = area;
    let end = from.saturating_add(area.len());
    while rest.len() >= HEAD {
        let (magic, len) = (u32_at(rest, 0), u32_at(rest, 4) as usize);
        if magic == END {
            break;
        }
        let at = end.saturating_sub(rest.len());
        let place = |e: Error| e.at(format!("offset {at:#x}"));
        let data = rest.get(HEAD..).and_then(|r| r.get(..len));
        let data = data.ok_or_else(|| {
            place(Error::damaged(format!(
                "header extension {magic:#010x} of {len} bytes goes beyond its area"
            )))
        })?;
        let found = Extension::parse(magic, data, cluster, bitmaps).map_err(place)?;
        let same = |other| std::mem::discriminant(other) == std::mem::discriminant(&found);
        // There may be as many unknown ones as fit: only the few others are compared.
        if !matches!(found, Extension::Unknown { .. }) && all.iter().any(same) {
            return Err(place(Error::damaged(format!(
                "header extension {magic:#010x} is there twice"
            ))));
        }
        all.push(found);
        let next = HEAD.saturating_add(len.next_multiple_of(8));
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(all)
}

/// The feature names in `area`, as far as it can be read: they only make a refusal easier to
/// understand.
pub(super) fn feature_names(area: &[u8]) -> Vec<FeatureName> {
    let mut rest = area;
    while rest.len() >= HEAD {
        let (magic, len) = (u32_at(rest, 0), u32_at(rest, 4) as usize);
        let data = rest.get(HEAD..).and_then(|r| r.get(..len));
        match data {
            Some(data) if magic == FEATURE_NAMES => {
                let entries = data.chunks_exact(FEATURE_LEN);
                return entries.filter_map(FeatureName::parse).collect();
            }
            Some(_) if magic != END => {}
            _ => break,
        }
        let next = HEAD.saturating_add(len.next_multiple_of(8));
        rest = rest.get(next..).unwrap_or_default();
    }
    Vec::new()
}

/// The bytes of `all` and the mark behind them, a multiple of 8.
pub(super) fn encode_all(all: &[Extension]) -> Vec<u8> {
    let mut out = Vec::new();
    for extension in all {
        let (magic, data) = extension.encode();
        out.extend(magic.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(&data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend([0; HEAD]);
    out
}

/// Letters of a name that are shown, after escaping, before the rest is cut off.
const SHOWN: usize = 255;

/// Bytes that an image gave, made fit for a terminal and a log: no control characters, and cut where
/// they are many.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut escaped = text.escape_debug();
    let mut shown: String = escaped.by_ref().take(SHOWN).collect();
    if escaped.next().is_some() {
        shown.push_str("[...]");
    }
    shown
}
