//! Bitmaps of an image that nobody uses: what they say, stored, and removed.
//!
//! A bitmap is changed as a whole. Only an image in which a check finds no errors is changed, in the steps
//! of [`snapshots`](super::snapshots): refcounts of new clusters, behind the end of the file, go up;
//! bits, table and a new directory are written there; barrier. One write of the header's sector names the
//! directory and says that it is true; barrier. A repair returns what nobody names any more. Cut
//! anywhere, there is the old bitmap or the new one, with leaks at worst.
//!
//! Memory is bounded whatever a bitmap says: a step of its table and one of its bits, or a cluster of
//! those that are written. Source: QEMU `docs/interop/qcow2.rst`, "Bitmaps".

use super::Header;
use super::be::u64_at;
use super::bitmap::{self, Bitmap};
use super::check::{Recount, clean, sound};
use super::extension::{BitmapsAt, Extension};
use super::header::{BITMAPS_VALID, KNOWN_AUTOCLEAR, Version, rewrite_header};
use super::open::{bitmap_entries, read_header, read_padded};
use super::words::{Appender, write_words};
use crate::progress::Watch;
use crate::store::Store;
use crate::update::Update;
use crate::{Error, Kind, Result, limits};
use bytes::Bytes;
use std::iter::Peekable;
use std::ops::Range;

/// Bytes of bits, and of a table, that are read or copied in one step.
const STEP: u64 = 64 << 10;
/// An entry of a table: a file offset, and the mark of a cluster of ones. Others must be 0.
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
const ONES: u64 = 1;

/// A bitmap to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name, 1 to 1023 bytes, none of them 0.
    pub name: Vec<u8>,
    /// Bytes of the disk that a bit stands for: a power of two from 2^9 to 2^31.
    pub granularity: u64,
    /// Whether it goes on recording when a program that can do that opens the image.
    pub enabled: bool,
}

/// Goes through the parts of the disk that a bitmap says are dirty.
#[derive(Debug)]
pub struct Dirty<'s, S> {
    store: &'s S,
    header: &'s Header,
    bitmap: &'s Bitmap,
    /// Bits of the disk, and the first that was not looked at.
    end: u64,
    at: u64,
    /// A step of the table, and the number of its first entry.
    table: Option<(u64, Bytes)>,
    /// What is known from a bit on.
    known: Option<Known>,
}

/// Bits, from one to one past the last.
#[derive(Debug, Clone)]
struct Known {
    bits: Range<u64>,
    what: Bits,
}

#[derive(Debug, Clone)]
enum Bits {
    /// All the same.
    All(bool),
    Of(Bytes),
}

impl<'s, S: Store> Dirty<'s, S> {
    /// What `bitmap`, which is one of the image in `store`, says. `Invalid` when it was not stored
    /// properly, and says nothing.
    pub fn of(store: &'s S, header: &'s Header, bitmap: &'s Bitmap) -> Result<Self> {
        if bitmap.in_use {
            return Err(Error::invalid(
                "this bitmap was in use when its writer ended, and tells nothing",
            ));
        }
        Ok(Self {
            store,
            header,
            bitmap,
            end: header.size.div_ceil(bitmap.granularity.max(1)),
            at: 0,
            table: None,
            known: None,
        })
    }

    /// The next part, in bytes of the disk: in order, and never touching the one before. `Damaged`
    /// when its table or its bits cannot be read.
    pub async fn next(&mut self) -> Result<Option<Range<u64>>> {
        let Some(first) = self.find(true).await? else {
            return Ok(None);
        };
        self.at = first;
        let last = self.find(false).await?.unwrap_or(self.end);
        self.at = last;
        let byte = |bit: u64| {
            bit.saturating_mul(self.bitmap.granularity)
                .min(self.header.size)
        };
        Ok(Some(byte(first)..byte(last)))
    }

    /// The first bit that is so, from the one that is next on.
    async fn find(&mut self, set: bool) -> Result<Option<u64>> {
        let mut at = self.at;
        while at < self.end {
            let Known { bits, what } = self.known_at(at).await?;
            match what {
                Bits::All(is) if is == set => return Ok(Some(at)),
                Bits::All(_) => {}
                Bits::Of(bytes) => {
                    let skip = at.saturating_sub(bits.start);
                    let left = bits.end.saturating_sub(bits.start);
                    if let Some(n) = find_in(&bytes, skip..left, set) {
                        return Ok(Some(bits.start.saturating_add(n)));
                    }
                }
            }
            at = bits.end;
        }
        Ok(None)
    }

    /// What is known of bit `at`, which is not behind the end, and of those behind it.
    async fn known_at(&mut self, at: u64) -> Result<Known> {
        if let Some(known) = self.known.as_ref().filter(|known| known.bits.contains(&at)) {
            return Ok(known.clone());
        }
        let per = self.header.cluster.bytes().saturating_mul(8);
        let index = at.checked_div(per).unwrap_or(0);
        let first = index.saturating_mul(per);
        let word = self.entry(index).await?;
        let offset = word & OFFSET;
        let marked = word & ONES != 0;
        let odd = word & !(OFFSET | ONES) != 0 || (marked && offset != 0);
        if odd || self.header.cluster.within(offset) != 0 {
            return Err(Error::damaged(format!(
                "bitmap table entry {index} is {word:#018x}, which breaks a rule"
            )));
        }
        let known = match offset {
            0 => Known {
                bits: first..first.saturating_add(per).min(self.end),
                what: Bits::All(marked),
            },
            _ => {
                let step = STEP.min(self.header.cluster.bytes());
                let bits = step.saturating_mul(8);
                let n = at.saturating_sub(first).checked_div(bits).unwrap_or(0);
                let start = first.saturating_add(n.saturating_mul(bits));
                let from = offset.saturating_add(n.saturating_mul(step));
                Known {
                    bits: start..start.saturating_add(bits).min(self.end),
                    what: Bits::Of(read_padded(self.store, from, step).await?),
                }
            }
        };
        self.known = Some(known.clone());
        Ok(known)
    }

    /// Entry `index` of the table.
    async fn entry(&mut self, index: u64) -> Result<u64> {
        let all = u64::from(self.bitmap.table_entries);
        if index >= all {
            return Err(Error::damaged("a bitmap that is shorter than its disk"));
        }
        let inside = |first: u64, bytes: &Bytes| {
            let n = index.checked_sub(first)?;
            let at = usize::try_from(n.checked_mul(8)?).ok()?;
            bytes
                .get(at..)
                .filter(|rest| rest.len() >= 8)
                .map(|rest| u64_at(rest, 0))
        };
        if let Some(word) = self.table.as_ref().and_then(|(n, bytes)| inside(*n, bytes)) {
            return Ok(word);
        }
        let at = self.bitmap.table_at.saturating_add(index.saturating_mul(8));
        let len = all.saturating_sub(index).saturating_mul(8).min(STEP);
        let bytes = read_padded(self.store, at, len).await?;
        let word = u64_at(&bytes, 0);
        self.table = Some((index, bytes));
        Ok(word)
    }
}

/// The first bit in `range` that is so. The first bit of a byte is its lowest.
fn find_in(bytes: &[u8], range: Range<u64>, set: bool) -> Option<u64> {
    let none = if set { 0 } else { 0xFF };
    let mut at = range.start;
    while at < range.end {
        let byte = *bytes.get(usize::try_from(at / 8).ok()?)?;
        if byte == none {
            at = (at / 8).saturating_add(1).saturating_mul(8);
            continue;
        }
        if (byte.wrapping_shr((at % 8) as u32) & 1 == 1) == set {
            return Some(at);
        }
        at = at.saturating_add(1);
    }
    None
}

/// What a cluster of bits is.
enum Chunk {
    Zeros,
    Ones,
    Mixed(Vec<u8>),
}

/// The clusters of bits that some parts of the disk make.
struct Chunks<I: Iterator> {
    parts: Peekable<I>,
    granularity: u64,
    /// Bytes of a cluster.
    cluster: u64,
    /// Bits, and the first of the next cluster.
    end: u64,
    at: u64,
}

impl<I: Iterator<Item = Range<u64>>> Chunks<I> {
    fn new(parts: I, wanted: &Wanted, header: &Header) -> Self {
        Self {
            parts: parts.peekable(),
            granularity: wanted.granularity.max(1),
            cluster: header.cluster.bytes(),
            end: header.size.div_ceil(wanted.granularity.max(1)),
            at: 0,
        }
    }
}

impl<I: Iterator<Item = Range<u64>>> Iterator for Chunks<I> {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        if self.at >= self.end {
            return None;
        }
        let start = self.at;
        let stop = start.saturating_add(self.cluster.saturating_mul(8));
        let stop = stop.min(self.end);
        let mut bytes = Vec::new();
        while let Some(part) = self.parts.peek() {
            let first = part.start.checked_div(self.granularity).unwrap_or(0);
            if first >= stop {
                break;
            }
            let last = part.end.div_ceil(self.granularity).min(self.end);
            if last > start && part.start < part.end {
                bytes.resize(self.cluster as usize, 0);
                let from = first.max(start).saturating_sub(start);
                set(&mut bytes, from..last.min(stop).saturating_sub(start));
            }
            if last > stop {
                break;
            }
            self.parts.next();
        }
        self.at = stop;
        Some(match bytes.iter().all(|byte| *byte == 0xFF) {
            _ if bytes.is_empty() => Chunk::Zeros,
            true => Chunk::Ones,
            false => Chunk::Mixed(bytes),
        })
    }
}

/// Sets bits.
fn set(bytes: &mut [u8], bits: Range<u64>) {
    let mut at = bits.start;
    while at < bits.end {
        let Some(byte) = bytes.get_mut((at / 8) as usize) else {
            return;
        };
        if at.is_multiple_of(8) && bits.end.saturating_sub(at) >= 8 {
            *byte = 0xFF;
            at = at.saturating_add(8);
        } else {
            *byte |= 1u8.wrapping_shl((at % 8) as u32);
            at = at.saturating_add(1);
        }
    }
}

/// Stores a bitmap, durably, in the place of one that has its name. `dirty` are the parts of the disk that
/// it says are dirty, in bytes and in order; each bit that stands for a byte of them is set.
///
/// `Invalid` for a name, a granularity or parts that cannot be, `Unsupported` in an image of version
/// 2, with an external data file, and where the header has no room; `Damaged` when the image must be
/// repaired first.
pub async fn store<S: Store>(
    store: &S,
    wanted: &Wanted,
    dirty: impl Iterator<Item = Range<u64>> + Clone,
    watch: &mut dyn Watch,
) -> Result<()> {
    let header = read_header(store).await?;
    refuse_image(&header)?;
    refuse_wanted(wanted, &header)?;
    refuse_parts(dirty.clone(), header.size)?;
    let mut recount = sound(store, watch).await?;
    let header = recount.header().clone();
    let chunks = || Chunks::new(dirty.clone(), wanted, &header);
    let mixed = chunks().filter(|chunk| matches!(chunk, Chunk::Mixed(_)));
    let (mixed, entries) = (mixed.count() as u64, chunks().count() as u64);
    let others = Others::of(store, &header, &wanted.name).await?;
    let bits_at = recount.take(mixed)?;
    let table_at = recount.take(header.cluster.count(entries.saturating_mul(8)))?;
    let entry = bitmap::encode(wanted, table_at, entries as u32);
    let listed = others.take(&mut recount, Some(&entry))?;
    let new = with_bitmaps(recount.header(), listed);
    fits(&new)?;
    recount.raise(Some(u64::MAX), watch).await?;
    write_bits(store, &header, chunks(), bits_at).await?;
    write_table(store, &header, chunks(), bits_at, table_at).await?;
    others.write(store, &header, listed, &entry).await?;
    switch(&recount, listed, watch).await
}

/// Removes the bitmap with a name, durably. `NotFound` when there is none, otherwise as [`store`].
pub async fn remove<S: Store>(store: &S, name: &[u8], watch: &mut dyn Watch) -> Result<()> {
    let header = read_header(store).await?;
    refuse_image(&header)?;
    let others = Others::of(store, &header, name).await?;
    if !others.found {
        let name = super::extension::printable(name);
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no bitmap {name}"),
        ));
    }
    let mut recount = sound(store, watch).await?;
    let listed = others.take(&mut recount, None)?;
    fits(&with_bitmaps(recount.header(), listed))?;
    recount.raise(Some(u64::MAX), watch).await?;
    others.write(store, &header, listed, &[]).await?;
    switch(&recount, listed, watch).await
}

/// Says of every bitmap that it was not stored properly: nobody records what changes now. Makes nothing
/// durable.
pub(super) async fn mark_in_use<S: Store>(store: &S, header: &Header) -> Result<()> {
    let entries = bitmap_entries(store, header).await?;
    let words = entries.iter().map(|(entry, bitmap)| {
        let at = entry.start.saturating_add(bitmap::SECOND_AT);
        (at, bitmap.second_word_in_use())
    });
    let words: Vec<_> = words.collect();
    write_words(store, header.cluster, &words).await
}

fn refuse_image(header: &Header) -> Result<()> {
    if header.version == Version::V2 {
        return Err(Error::unsupported("bitmaps in an image of version 2"));
    }
    match header.has_data_file() {
        true => Err(Error::unsupported(
            "bitmaps of an image with an external data file",
        )),
        false => Ok(()),
    }
}

fn refuse_wanted(wanted: &Wanted, header: &Header) -> Result<()> {
    let Wanted {
        name, granularity, ..
    } = wanted;
    if !(1..=limits::QCOW2_NAME_MAX).contains(&name.len()) || name.contains(&0) {
        return Err(Error::invalid(format!(
            "a bitmap with a name of {} bytes: 1 to {} are possible, none of them 0",
            name.len(),
            limits::QCOW2_NAME_MAX
        )));
    }
    bitmap::refuse_granularity(*granularity, header.size)
}

/// Refuses parts that are out of order or behind the end.
fn refuse_parts(parts: impl Iterator<Item = Range<u64>>, size: u64) -> Result<()> {
    let mut end = 0;
    for part in parts {
        if part.start < end || part.end < part.start || part.end > size {
            return Err(Error::invalid(format!(
                "dirty from {} to {} of a disk of {size} bytes, and behind {end}",
                part.start, part.end
            )));
        }
        end = part.end;
    }
    Ok(())
}

/// The bitmaps that stay as they are.
struct Others {
    /// Their entries, as bytes of the file.
    entries: Vec<Range<u64>>,
    /// Whether there is one with the name.
    found: bool,
}

impl Others {
    async fn of<S: Store>(store: &S, header: &Header, name: &[u8]) -> Result<Self> {
        let mut others = Self {
            entries: Vec::new(),
            found: false,
        };
        for (entry, other) in bitmap_entries(store, header).await? {
            match other.name == name {
                true => others.found = true,
                false => others.entries.push(entry),
            }
        }
        Ok(others)
    }

    /// Takes clusters for a directory of them and another; none when it would be empty.
    fn take<S: Store>(
        &self,
        recount: &mut Recount<'_, S>,
        entry: Option<&Vec<u8>>,
    ) -> Result<Option<BitmapsAt>> {
        let lengths = self.entries.iter().map(|e| e.end.saturating_sub(e.start));
        let own = entry.map_or(0, |entry| entry.len() as u64);
        let len = lengths.fold(own, u64::saturating_add);
        let count = self
            .entries
            .len()
            .saturating_add(usize::from(entry.is_some()));
        if len > limits::QCOW2_DIRECTORY_MAX || count > limits::QCOW2_BITMAPS_MAX as usize {
            return Err(Error::unsupported(format!(
                "{count} bitmaps in a directory of {len} bytes, more than there may be"
            )));
        }
        if count == 0 {
            return Ok(None);
        }
        let at = recount.take(recount.header().cluster.count(len))?;
        let count = count as u32;
        Ok(Some(BitmapsAt { count, len, at }))
    }

    /// Writes the directory. Nobody names it yet.
    async fn write<S: Store>(
        &self,
        store: &S,
        header: &Header,
        to: Option<BitmapsAt>,
        entry: &[u8],
    ) -> Result<()> {
        let Some(to) = to else {
            return Ok(());
        };
        let mut out = Appender::new(store, header.cluster, to.at);
        for other in &self.entries {
            out.copy(other.clone(), STEP).await?;
        }
        out.push(entry).await?;
        out.finish().await
    }
}

async fn write_bits<S: Store>(
    store: &S,
    header: &Header,
    chunks: impl Iterator<Item = Chunk>,
    at: u64,
) -> Result<()> {
    let mut out = Appender::new(store, header.cluster, at);
    for chunk in chunks {
        if let Chunk::Mixed(bytes) = chunk {
            out.push(&bytes).await?;
        }
    }
    out.finish().await
}

async fn write_table<S: Store>(
    store: &S,
    header: &Header,
    chunks: impl Iterator<Item = Chunk>,
    bits_at: u64,
    at: u64,
) -> Result<()> {
    let mut out = Appender::new(store, header.cluster, at);
    let mut next = bits_at;
    for chunk in chunks {
        let word = match chunk {
            Chunk::Zeros => 0,
            Chunk::Ones => ONES,
            Chunk::Mixed(_) => {
                let word = next;
                next = next.saturating_add(header.cluster.bytes());
                word
            }
        };
        out.push(&word.to_be_bytes()).await?;
    }
    out.finish().await
}

/// The header that names a directory, and says that it is true; or none.
fn with_bitmaps(header: &Header, listed: Option<BitmapsAt>) -> Header {
    let mut new = header.clone();
    new.extensions.retain(|extension| !extension.is_bitmaps());
    new.extensions.extend(listed.map(Extension::Bitmaps));
    new.features.autoclear &= KNOWN_AUTOCLEAR & !BITMAPS_VALID;
    if listed.is_some() {
        new.features.autoclear |= BITMAPS_VALID;
    }
    // A remark, which others write again. All that counts is written at once.
    let is_short = |header: &Header| super::header::is_one_sector(header);
    if !is_short(&new) {
        let names = |e: &Extension| matches!(e, Extension::FeatureNames(_));
        new.extensions.retain(|extension| !names(extension));
    }
    new
}

/// Refuses a header that cannot be written at once.
fn fits(header: &Header) -> Result<()> {
    match super::header::is_one_sector(header) {
        true => Ok(()),
        false => Err(Error::unsupported(
            "the header has no room for bitmaps in its first sector: the name of its backing file is \
             too long, or it has extensions that are not known here",
        )),
    }
}

/// What was written becomes durable, and then the header that names it; then the rest is returned.
async fn switch<S: Store>(
    recount: &Recount<'_, S>,
    listed: Option<BitmapsAt>,
    watch: &mut dyn Watch,
) -> Result<()> {
    let store = recount.store();
    Update::new().barrier().apply(store).await?;
    rewrite_header(store, &with_bitmaps(recount.header(), listed)).await?;
    clean(store, watch).await
}
