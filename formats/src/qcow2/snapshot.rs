//! Internal snapshots: entries of the snapshot table. Source: QEMU `docs/interop/qcow2.rst`,
//! "Snapshots".

use super::be::{u16_at, u32_at, u64_at};
use super::extension::printable;
use super::header::Header;
use super::snapshots::Wanted;
use crate::{Error, Result, limits};

/// Bytes of an entry before what varies.
const FIXED: usize = 40;
/// Bytes of the longest entry that is read: extra data, an ID and a name at their bounds.
pub(super) const ENTRY_MAX: usize =
    FIXED + limits::QCOW2_EXTRA_MAX as usize + 2 * limits::QCOW2_NAME_MAX;

/// A state of the disk that the image keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its ID, a number in practice.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// Seconds since 1970 when it was made.
    pub seconds: u32,
    /// Size of the disk in bytes then; none in old images, where it is the present one.
    pub size: Option<u64>,
    /// File offset of its first-level table, as the entry says it.
    pub(super) l1_at: u64,
    /// Entries of that table, as the entry says them.
    pub(super) l1_entries: u32,
}

/// The entry of a new snapshot, of the disk that `header` says: a multiple of 8 bytes. Its copy of the
/// first-level table is at `l1_at`.
pub(super) fn encode(wanted: &Wanted, id: &[u8], l1_at: u64, header: &Header) -> Vec<u8> {
    let (id_len, name_len) = (id.len() as u16, wanted.name.len() as u16);
    let fields: [&[u8]; 12] = [
        &l1_at.to_be_bytes(),
        &header.l1.entries.to_be_bytes(),
        &id_len.to_be_bytes(),
        &name_len.to_be_bytes(),
        &wanted.seconds.to_be_bytes(),
        &wanted.nanoseconds.to_be_bytes(),
        // The machine's clock and state, of which there are none.
        &[0; 12],
        &16u32.to_be_bytes(),
        // Extra data: bytes of the machine's state, and the size of the disk.
        &[0; 8],
        &header.size.to_be_bytes(),
        id,
        &wanted.name,
    ];
    let mut out = fields.concat();
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

impl Snapshot {
    /// Parses the entry at the start of `bytes`: the snapshot, and the bytes to the next one.
    pub(super) fn parse(bytes: &[u8]) -> Result<(Self, usize)> {
        let short = || Error::damaged("the snapshot table ends inside an entry");
        let extra = u32_at(bytes, 36);
        if extra > limits::QCOW2_EXTRA_MAX {
            return Err(Error::damaged(format!(
                "a snapshot with {extra} bytes of extra data"
            )));
        }
        let (id_len, name_len) = (
            usize::from(u16_at(bytes, 12)),
            usize::from(u16_at(bytes, 14)),
        );
        if id_len.max(name_len) > limits::QCOW2_NAME_MAX {
            return Err(Error::damaged(format!(
                "a snapshot with an ID of {id_len} bytes and a name of {name_len}"
            )));
        }
        let rest = bytes.get(FIXED..).ok_or_else(short)?;
        let (extra, rest) = rest.split_at_checked(extra as usize).ok_or_else(short)?;
        let (id, rest) = rest.split_at_checked(id_len).ok_or_else(short)?;
        let name = rest.get(..name_len).ok_or_else(short)?;
        let len = FIXED
            .saturating_add(extra.len())
            .saturating_add(id_len)
            .saturating_add(name_len);
        let found = Self {
            id: id.to_vec(),
            name: name.to_vec(),
            seconds: u32_at(bytes, 16),
            size: (extra.len() >= 16).then(|| u64_at(extra, 8)),
            l1_at: u64_at(bytes, 0),
            l1_entries: u32_at(bytes, 8),
        };
        Ok((found, len.next_multiple_of(8)))
    }

    /// ID and name, made fit to be shown.
    pub fn printable(&self) -> String {
        format!("{} ({})", printable(&self.id), printable(&self.name))
    }
}
