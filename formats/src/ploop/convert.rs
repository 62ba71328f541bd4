//! Convert: a delta goes from one format version to the other, in its place.
//!
//! The versions differ in the signature and in the unit of the table's entries; data stays where it
//! is. The table is therefore written over, and a copy of it is what a cut is undone from. Each
//! function is one durable step; their order over all deltas of a disk is the caller's, who keeps
//! everyone else away:
//!
//! 1. [`save`]: header and table are copied to another file.
//! 2. [`mark`]: the header says in-use and that its format is being converted. Nobody reads such an
//!    image: its entries may be in either unit.
//! 3. [`rewrite`]: the table is written in the other unit, under the other signature, still marked.
//! 4. [`finish`]: the header loses the marks.
//!
//! [`restore`] takes a delta back to its copy from any point between.
//!
//! Source: ploop reference 1.2 (units), 1.5 (flags), 1.9 (the copy is named `IMAGE.idx`).

use super::header::{FLAG_CONVERTING, HEADER_LEN, Header, IN_USE, Version};
use super::open::{read_extension, read_header};
use crate::progress::{Progress, Watch};
use crate::store::{Reach, Store};
use crate::units::{SECTOR, floor_to};
use crate::update::Update;
use crate::{Error, Result, limits};
use bytes::BytesMut;

/// Table bytes read in one step.
const STEP: u64 = 256 << 10;

/// What a delta was and what it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Its header.
    pub was: Header,
    /// Its next version.
    pub to: Version,
}

/// The version that an image has, and whether a conversion of it was begun and not ended.
pub async fn state<S: Store>(store: &S) -> Result<(Version, bool)> {
    let header = read_header(store).await?;
    Ok((header.version, is_marked(&header)))
}

const fn is_marked(header: &Header) -> bool {
    header.flags & FLAG_CONVERTING != 0
}

/// Looks at a closed delta, and refuses what cannot be converted; changes nothing.
///
/// `Damaged` when it was not closed or its table breaks a rule, `Unsupported` when it does not fit
/// the other version.
pub async fn plan<S: Store>(store: &S, to: Version, watch: &mut dyn Watch) -> Result<Plan> {
    let was = read_header(store).await?;
    let len = store.info().len;
    if was.in_use == IN_USE || is_marked(&was) {
        return Err(Error::damaged("this delta was not closed; check it first"));
    }
    if !was.covers_size() || len < table_end(&was) {
        return Err(Error::damaged("its table is not whole; check it first"));
    }
    read_extension(store, &was).await?.refuse_unknown()?;
    let plan = Plan { was, to };
    plan.refuse_size()?;
    plan.judge_table(store, watch).await?;
    Ok(plan)
}

impl Plan {
    fn next(&self) -> Header {
        Header {
            version: self.to,
            ..self.was
        }
    }

    fn refuse_size(&self) -> Result<()> {
        let (sectors, max) = (self.was.sectors, limits::V1_SECTORS_MAX);
        if self.to == Version::V2 || sectors <= max {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "format version 1 ends at {} bytes, and this delta has {}; it stays version 2",
            max.saturating_mul(SECTOR),
            sectors.saturating_mul(SECTOR)
        )))
    }

    async fn judge_table<S: Store>(&self, store: &S, watch: &mut dyn Watch) -> Result<()> {
        let end = table_end(&self.was);
        let mut walk = Walk::new(end);
        while let Some((at, bytes)) = walk.next(store).await? {
            watch.tell(walk.progress("checking"))?;
            let slots = bytes.chunks_exact(4).enumerate();
            for (n, raw) in slots.skip(head_slots(at)) {
                let offset = at.saturating_add((n as u64).saturating_mul(4));
                let place = || format!("table at offset {offset:#x}");
                self.judge(offset, word(raw), store.info().len)
                    .map_err(|e| e.at(place()))?;
            }
        }
        Ok(())
    }

    fn judge(&self, offset: u64, raw: u32, len: u64) -> Result<()> {
        if raw == 0 {
            return Ok(());
        }
        if offset.saturating_sub(HEADER_LEN) / 4 >= u64::from(self.was.entries) {
            return Err(Error::damaged(
                "a slot behind the end of the device is not 0; check --repair mends that",
            ));
        }
        let size = self.was.cluster;
        let cluster = self.was.entry_to_cluster(raw)?;
        let end = cluster.map_or(0, |c| size.start(c.0).saturating_add(size.bytes()));
        if end > len {
            return Err(Error::damaged(format!(
                "entry {raw} ends past the end of the file ({len} bytes); check it first"
            )));
        }
        if self.to == Version::V1 && end > limits::V1_SECTORS_MAX.saturating_mul(SECTOR) {
            return Err(Error::unsupported(format!(
                "entry {raw} is behind the 2 TiB of a file that format version 1 can name; what is \
                 written anew (--to expanded) is shorter"
            )));
        }
        Ok(())
    }

    /// An entry in the other unit; [`plan`] has judged it.
    fn entry(&self, raw: u32) -> Result<u32> {
        let Some(cluster) = self.was.entry_to_cluster(raw)? else {
            return Ok(0);
        };
        let entry = self.next().cluster_to_entry(cluster);
        entry.ok_or_else(|| Error::damaged(format!("entry {raw} does not fit the format")))
    }
}

/// Copies header and table into `copy`, an empty file. Durable but for the name of that.
pub async fn save<S: Store>(store: &S, plan: &Plan, copy: &S) -> Result<()> {
    let end = table_end(&plan.was);
    copy.set_len(end).await?;
    let mut walk = Walk::new(end);
    while let Some((at, bytes)) = walk.next(store).await? {
        copy.write_at(at, bytes.freeze(), Reach::Cache).await?;
    }
    copy.flush().await
}

/// Says that a delta is being converted: whatever opens it by itself refuses it from now on.
pub async fn mark<S: Store>(store: &S) -> Result<()> {
    let header = read_header(store).await?;
    write_header(store, &marked(&header)).await
}

/// Writes the table of a marked delta in the other unit. It stays marked.
pub async fn rewrite<S: Store>(store: &S, plan: &Plan, watch: &mut dyn Watch) -> Result<()> {
    let head = marked(&plan.next()).encode();
    let mut walk = Walk::new(table_end(&plan.was));
    while let Some((at, mut bytes)) = walk.next(store).await? {
        watch.tell(walk.progress("converting"))?;
        for raw in bytes.chunks_exact_mut(4).skip(head_slots(at)) {
            let entry = plan.entry(word(raw))?;
            raw.copy_from_slice(&entry.to_le_bytes());
        }
        if at == 0 {
            put_header(&mut bytes, &head);
        }
        store.write_at(at, bytes.freeze(), Reach::Cache).await?;
    }
    store.flush().await
}

/// Takes the marks away from a delta whose table is written.
pub async fn finish<S: Store>(store: &S, plan: &Plan) -> Result<()> {
    write_header(store, &plan.next()).await
}

/// Takes a delta back to `copy`, from wherever a conversion was cut. Marked meanwhile.
///
/// `Damaged` when the copy is of another image; then nothing is changed.
pub async fn restore<S: Store>(store: &S, copy: &S) -> Result<()> {
    let (now, was) = (read_header(store).await?, read_header(copy).await?);
    let was = Header {
        flags: was.flags & !FLAG_CONVERTING,
        ..was
    };
    let shape = |h: &Header| (h.cluster, h.entries, h.sectors, h.data_start);
    let needed = was.entry_at(was.entries);
    if shape(&now) != shape(&was) || copy.info().len < needed {
        return Err(Error::damaged(
            "the copy of its table that an interrupted conversion left is not of this image",
        ));
    }
    if !is_marked(&now) {
        mark(store).await?;
    }
    let head = marked(&was).encode();
    let mut walk = Walk::new(table_end(&was));
    while let Some((at, mut bytes)) = walk.next(copy).await? {
        if at == 0 {
            put_header(&mut bytes, &head);
        }
        store.write_at(at, bytes.freeze(), Reach::Cache).await?;
    }
    store.flush().await?;
    write_header(store, &was).await
}

const fn marked(header: &Header) -> Header {
    Header {
        in_use: IN_USE,
        flags: header.flags | FLAG_CONVERTING,
        ..*header
    }
}

fn table_end(header: &Header) -> u64 {
    header.cluster.start(header.data_start)
}

/// Words at the beginning of table bytes from `at` that are the header's.
const fn head_slots(at: u64) -> usize {
    if at == 0 { HEADER_LEN as usize / 4 } else { 0 }
}

fn word(raw: &[u8]) -> u32 {
    raw.first_chunk().map_or(0, |raw| u32::from_le_bytes(*raw))
}

fn put_header(page: &mut BytesMut, header: &[u8; 64]) {
    if let Some(head) = page.get_mut(..HEADER_LEN as usize) {
        head.copy_from_slice(header);
    }
}

/// Writes the header into the first page as it is, and a barrier. Sectors of metadata are written
/// whole or not at all, and only the first one changes.
async fn write_header<S: Store>(store: &S, header: &Header) -> Result<()> {
    let buf = crate::buf::aligned(limits::PAGE as usize);
    let mut page = store.read_at(0, buf).await?;
    put_header(&mut page, &header.encode());
    let update = Update::new().write(0, page.freeze()).barrier();
    update.apply(store).await
}

/// Header and table in bounded steps. Holes are left out, the first page never: entries of 0 are 0
/// in both versions.
struct Walk {
    at: u64,
    end: u64,
}

impl Walk {
    const fn new(end: u64) -> Self {
        Self { at: 0, end }
    }

    async fn next<S: Store>(&mut self, store: &S) -> Result<Option<(u64, BytesMut)>> {
        // A copy by other hands may end with the last entry.
        let len = store.info().len.min(self.end);
        while self.at < len {
            let (data, until) = store.extent(self.at).await?;
            let hole_end = floor_to(until, limits::PAGE);
            if !data && self.at > 0 && hole_end > self.at {
                self.at = hole_end;
                continue;
            }
            let (at, step) = (self.at, STEP.min(self.end.saturating_sub(self.at)));
            let there = step.min(len.saturating_sub(at));
            let mut buf = crate::buf::aligned(step as usize);
            let rest = buf.split_off(there as usize);
            let mut bytes = store.read_at(at, buf).await?;
            bytes.unsplit(rest);
            self.at = at.saturating_add(step);
            return Ok(Some((at, bytes)));
        }
        Ok(None)
    }

    const fn progress(&self, phase: &'static str) -> Progress {
        Progress {
            phase,
            done: self.at,
            total: self.end,
        }
    }
}
