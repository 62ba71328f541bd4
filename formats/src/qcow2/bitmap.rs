//! Persistent bitmaps: entries of their directory. Source: QEMU `docs/interop/qcow2.rst`,
//! "Bitmaps extension" and "Bitmap directory".

use super::be::{u16_at, u32_at, u64_at};
use super::bitmaps::Wanted;
use super::header::refuse_place;
use crate::units::ClusterSize;
use crate::{Error, Result, limits};

/// Bytes of an entry before its name.
const FIXED: usize = 24;
/// Bytes of the longest entry.
pub(super) const ENTRY_MAX: usize = FIXED + limits::QCOW2_NAME_MAX;
/// Where an entry has the number of 8 bytes that ends with its flags.
pub(super) const SECOND_AT: u64 = 8;
const IN_USE: u32 = 1;
const ENABLED: u32 = 1 << 1;
const KNOWN: u32 = IN_USE | ENABLED | 1 << 2;
/// Bytes of bits of the largest bitmap (QEMU's bound).
const BYTES_MAX: u64 = 512 << 20;
/// Smallest and largest bytes that a bit stands for, as powers of two (QEMU's bounds).
const BITS_MIN: u8 = 9;
const BITS_MAX: u8 = 31;

/// The entry of a bitmap whose table has so many `entries`, at `table_at`: a multiple of 8 bytes.
pub(super) fn encode(wanted: &Wanted, table_at: u64, entries: u32) -> Vec<u8> {
    let flags = if wanted.enabled { ENABLED } else { 0 };
    let bits = wanted.granularity.trailing_zeros() as u8;
    let fields: [&[u8]; 7] = [
        &table_at.to_be_bytes(),
        &entries.to_be_bytes(),
        &flags.to_be_bytes(),
        // A bitmap of dirty places, the only kind there is.
        &[1, bits],
        &(wanted.name.len() as u16).to_be_bytes(),
        // Extra data, of which there is none.
        &[0; 4],
        &wanted.name,
    ];
    let mut out = fields.concat();
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// Refuses bits for so many bytes each, of a disk of `size` bytes.
pub(super) fn refuse_granularity(granularity: u64, size: u64) -> Result<()> {
    let bits = granularity.trailing_zeros() as u8;
    let legal = granularity.is_power_of_two() && (BITS_MIN..=BITS_MAX).contains(&bits);
    if !legal || size == 0 {
        return Err(Error::invalid(format!(
            "a bitmap of a disk of {size} bytes with bits for {granularity}: powers of two from \
             2^{BITS_MIN} to 2^{BITS_MAX} are possible, and a disk that has bytes"
        )));
    }
    match size.div_ceil(granularity).div_ceil(8) > BYTES_MAX {
        true => Err(Error::invalid(format!(
            "a bitmap of more than {BYTES_MAX} bytes: let each bit stand for more"
        ))),
        false => Ok(()),
    }
}

/// A set of dirty places that the image keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in the image.
    pub name: Vec<u8>,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// It was not stored properly, and tells nothing.
    pub in_use: bool,
    /// It goes on recording writes.
    pub enabled: bool,
    /// All flags of its entry.
    flags: u32,
    /// File offset of its table, cluster aligned.
    pub(super) table_at: u64,
    /// Entries of that table, of 8 bytes.
    pub(super) table_entries: u32,
}

impl Bitmap {
    /// Parses the entry at the start of `bytes`, of a disk of `size` bytes: the bitmap, and the bytes
    /// to the next one.
    pub(super) fn parse(bytes: &[u8], size: u64, cluster: ClusterSize) -> Result<(Self, usize)> {
        let refuse = |what: String| Err(Error::damaged(format!("bitmap: {what}")));
        let flags = u32_at(bytes, 12);
        let (kind, bits) = match bytes.get(16..18) {
            Some([kind, bits]) => (*kind, *bits),
            _ => return refuse("the directory ends inside an entry".into()),
        };
        let (name_len, extra) = (usize::from(u16_at(bytes, 18)), u32_at(bytes, 20));
        if kind != 1 || extra != 0 || flags & !KNOWN != 0 {
            return refuse(format!(
                "type {kind}, flags {flags:#x}, {extra} bytes of extra data"
            ));
        }
        if !(BITS_MIN..=BITS_MAX).contains(&bits) {
            return refuse(format!("a granularity of 2^{bits} bytes"));
        }
        if name_len == 0 || name_len > limits::QCOW2_NAME_MAX {
            return refuse(format!("a name of {name_len} bytes"));
        }
        let Some(name) = bytes.get(FIXED..).and_then(|b| b.get(..name_len)) else {
            return refuse("the directory ends inside an entry".into());
        };
        let found = Self {
            name: name.to_vec(),
            granularity: 1u64.wrapping_shl(u32::from(bits)),
            in_use: flags & IN_USE != 0,
            enabled: flags & ENABLED != 0,
            flags,
            table_at: u64_at(bytes, 0),
            table_entries: u32_at(bytes, 8),
        };
        found.judge_table(size, cluster)?;
        let len = found.entry_len() as usize;
        Ok((found, len))
    }

    /// The number of 8 bytes at [`SECOND_AT`] that says that the bitmap was not stored properly.
    pub(super) fn second_word_in_use(&self) -> u64 {
        let entries = u64::from(self.table_entries).wrapping_shl(32);
        entries | u64::from(self.flags | IN_USE)
    }

    /// Bytes of its entry.
    const fn entry_len(&self) -> u64 {
        FIXED.saturating_add(self.name.len()).next_multiple_of(8) as u64
    }

    /// Refuses a table that is nowhere, or does not fit the disk. One that was in use may be of any
    /// former size.
    fn judge_table(&self, size: u64, cluster: ClusterSize) -> Result<()> {
        let (at, entries) = (self.table_at, self.table_entries);
        let len = u64::from(entries).saturating_mul(8);
        refuse_place("bitmap: table", at, len, cluster)?;
        let bytes = size.div_ceil(self.granularity.max(1)).div_ceil(8);
        let needed = cluster.count(bytes);
        let fits = bytes <= BYTES_MAX && needed == u64::from(entries);
        if entries == 0 || !(fits || self.in_use) {
            return Err(Error::damaged(format!(
                "bitmap: a table of {entries} entries for a disk that needs {needed}"
            )));
        }
        Ok(())
    }
}
