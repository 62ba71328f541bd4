//! Create: the bytes of a new delta.
//!
//! Ordering, the same for both kinds: the length and all of the table but its first page, then
//! the first page, which holds the header, then a barrier. A file in which the header can be read
//! therefore has its length and its table, and one in which it cannot is no image; the caller
//! gives it a name that counts only after [`create`] has returned.
//!
//! A blank table is a hole: a 16 TiB image costs one page. Space for the table, or for all of a
//! preallocated image, is reserved by the caller's store (`punch` with `Space::Keep`, or
//! fallocate), because only the caller knows whether it wants to pay for it.

use super::header::{HEADER_LEN, Header};
use crate::progress::{Progress, Watch};
use crate::store::Store;
use crate::units::HostCluster;
use crate::update::Update;
use crate::{Error, Kind, Result, limits};
use bytes::Bytes;

/// Table bytes written in one step.
const STEP: u64 = 1 << 20;
/// File length given in one step.
const LENGTH_STEP: u64 = 1 << 30;

/// File length of a new blank delta: its header and table, in whole clusters.
pub fn blank_len(header: &Header) -> u64 {
    header.cluster.start(header.data_start)
}

/// File length of a new preallocated delta. Fails when its last cluster cannot be named.
pub fn preallocated_len(header: &Header) -> Result<u64> {
    if header
        .entries
        .checked_sub(1)
        .and_then(|n| entry(header, n))
        .is_none()
    {
        return Err(Error::invalid(format!(
            "{} preallocated clusters of {} bytes do not fit format {:?}",
            header.entries,
            header.cluster.bytes(),
            header.version
        )));
    }
    Ok(header
        .cluster
        .start(header.data_start.saturating_add(header.entries)))
}

/// The change that turns an empty file into a blank delta.
pub fn blank(header: &Header) -> Update {
    Update::new()
        .len(blank_len(header))
        .write(0, page(header, 0, |_| 0))
        .barrier()
}

/// Writes a blank delta into an empty store. Durable when it returns; after an error the file is
/// no image and is to be removed.
pub async fn create<S: Store>(store: &S, header: &Header) -> Result<()> {
    refuse_content(store)?;
    blank(header).apply(store).await
}

/// Writes a delta in which every cluster has its place already, ascending, and reads as zeros.
/// `Empty` stays set in its header: that is what ploop writes (reference 1.6). Errors and
/// durability as for [`create`].
pub async fn create_preallocated<S: Store>(store: &S, header: &Header) -> Result<()> {
    create_preallocated_watched(store, header, &mut ()).await
}

/// The same, for somebody who may end it; then the file is no image, as after any error.
pub async fn create_preallocated_watched<S: Store>(
    store: &S,
    header: &Header,
    watch: &mut dyn Watch,
) -> Result<()> {
    refuse_content(store)?;
    lengthen(store, preallocated_len(header)?, watch).await?;
    let entry = |n| entry(header, n).unwrap_or(0);
    let end = header.entry_at(header.entries);
    let mut at = limits::PAGE;
    while at < end {
        let chunk = end
            .saturating_sub(at)
            .min(STEP)
            .next_multiple_of(limits::PAGE);
        let data = table(header, at, chunk, entry);
        Update::new().write(at, data).apply(store).await?;
        at = at.saturating_add(chunk);
        watch.tell(Progress {
            phase: "table",
            done: at.min(end),
            total: end,
        })?;
    }
    Update::new()
        .barrier()
        .write(0, page(header, 0, entry))
        .barrier()
        .apply(store)
        .await
}

/// Gives an empty store its length, in steps: each takes its space where the store reserves any.
async fn lengthen<S: Store>(store: &S, len: u64, watch: &mut dyn Watch) -> Result<()> {
    let mut done = 0;
    while done < len {
        done = len.min(done.saturating_add(LENGTH_STEP));
        store.set_len(done).await?;
        watch.tell(Progress {
            phase: "reserving space",
            done,
            total: len,
        })?;
    }
    Ok(())
}

/// A new image never replaces bytes that are there.
fn refuse_content<S: Store>(store: &S) -> Result<()> {
    match store.info().len {
        0 => Ok(()),
        len => Err(Error::new(
            Kind::Exists,
            format!("the file holds {len} bytes; a new image is written into an empty file only"),
        )),
    }
}

/// The entry of virtual cluster `n` in a preallocated image.
fn entry(header: &Header, n: u32) -> Option<u32> {
    header.cluster_to_entry(HostCluster(header.data_start.checked_add(n)?))
}

/// A page of header and table.
fn page(header: &Header, at: u64, entry: impl Fn(u32) -> u32) -> Bytes {
    table(header, at, limits::PAGE, entry)
}

/// The bytes `at .. at + len` of header and table; `at` is a multiple of 64.
fn table(header: &Header, at: u64, len: u64, entry: impl Fn(u32) -> u32) -> Bytes {
    let mut out = crate::buf::aligned(len as usize);
    let head = if at == 0 { HEADER_LEN as usize } else { 0 };
    for (to, from) in out.iter_mut().zip(header.encode()).take(head) {
        *to = from;
    }
    let first = at.saturating_sub(HEADER_LEN) / 4;
    let slots = out.get_mut(head..).unwrap_or_default().chunks_exact_mut(4);
    for (n, to) in (first..u64::from(header.entries)).zip(slots) {
        to.copy_from_slice(&entry(n as u32).to_le_bytes());
    }
    out.freeze()
}
