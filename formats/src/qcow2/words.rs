//! Words: table bytes of a closed image, changed in place.
//!
//! Writes whole units, each a page or a cluster where that is less: never a byte of another cluster,
//! and aligned for every store whose blocks fit in a cluster. Makes nothing durable.

use super::open::read_padded;
use crate::store::{Reach, Store};
use crate::units::{ClusterSize, floor_to};
use crate::{Error, Result, limits};
use bytes::{Bytes, BytesMut};
use std::ops::Range;

/// Bytes written in one step by [`Appender`].
const STEP: usize = 256 << 10;

/// Bytes that are written at once, at a multiple of them.
pub(super) const fn unit(cluster: ClusterSize) -> u64 {
    if cluster.bytes() < limits::PAGE {
        cluster.bytes()
    } else {
        limits::PAGE
    }
}

/// Refuses a store whose blocks are larger than a cluster.
pub(super) fn refuse_blocks<S: Store>(store: &S, cluster: ClusterSize) -> Result<()> {
    let info = store.info();
    if info.align > cluster.bytes() || floor_to(info.len, info.align) != info.len {
        return Err(Error::unsupported(format!(
            "storage blocks of {} bytes under a file of {} bytes with clusters of {}",
            info.align,
            info.len,
            cluster.bytes()
        )));
    }
    Ok(())
}

/// The unit at `at`, which is in the file.
pub(super) async fn read_unit<S: Store>(store: &S, at: u64, unit: u64) -> Result<BytesMut> {
    let bytes = read_padded(store, at, unit).await?;
    let mut out = crate::buf::aligned(unit as usize);
    out.copy_from_slice(&bytes);
    Ok(out)
}

/// Writes a unit, as far as the file has it: a file may end inside its last cluster.
pub(super) async fn write_unit<S: Store>(store: &S, at: u64, mut bytes: BytesMut) -> Result<()> {
    let rest = store.info().len.saturating_sub(at);
    bytes.truncate(usize::try_from(rest).unwrap_or(usize::MAX));
    store.write_at(at, bytes.freeze(), Reach::Cache).await
}

/// Changes numbers of 8 bytes, given in the order of their file offsets.
pub(super) async fn write_words<S: Store>(
    store: &S,
    cluster: ClusterSize,
    words: &[(u64, u64)],
) -> Result<()> {
    let unit = unit(cluster);
    for group in words.chunk_by(|a, b| floor_to(a.0, unit) == floor_to(b.0, unit)) {
        let Some((first, _)) = group.first() else {
            continue;
        };
        let start = floor_to(*first, unit);
        let mut bytes = read_unit(store, start, unit).await?;
        for (at, word) in group {
            let slot = bytes.iter_mut().skip(at.saturating_sub(start) as usize);
            slot.zip(word.to_be_bytes())
                .for_each(|(to, from)| *to = from);
        }
        write_unit(store, start, bytes).await?;
    }
    Ok(())
}

/// Writes new clusters, which read as zeros, from their start to their end.
pub(super) struct Appender<'s, S> {
    store: &'s S,
    unit: u64,
    at: u64,
    waiting: Vec<u8>,
}

impl<'s, S: Store> Appender<'s, S> {
    /// From `at` on, the start of a cluster.
    pub(super) const fn new(store: &'s S, cluster: ClusterSize, at: u64) -> Self {
        Self {
            store,
            unit: unit(cluster),
            at,
            waiting: Vec::new(),
        }
    }

    /// Adds some bytes, a few at a time.
    pub(super) async fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.waiting.extend(bytes);
        match self.waiting.len() >= STEP {
            true => self.write(STEP).await,
            false => Ok(()),
        }
    }

    /// Adds a range of the same file.
    pub(super) async fn copy(&mut self, range: Range<u64>, step: u64) -> Result<()> {
        let Range { start: mut at, end } = range;
        while at < end {
            let len = end.saturating_sub(at).min(step);
            self.push(&read_padded(self.store, at, len).await?).await?;
            at = at.saturating_add(len);
        }
        Ok(())
    }

    /// Adds zeros.
    pub(super) async fn zeros(&mut self, len: u64) -> Result<()> {
        let mut left = len;
        while left > 0 {
            let now = left.min(limits::PAGE);
            self.push(&vec![0; now as usize]).await?;
            left = left.saturating_sub(now);
        }
        Ok(())
    }

    /// Writes what waits.
    pub(super) async fn finish(mut self) -> Result<()> {
        while !self.waiting.is_empty() {
            self.write(self.waiting.len().min(STEP)).await?;
        }
        Ok(())
    }

    /// Writes the first `len` bytes that wait, and zeros up to the end of their unit.
    async fn write(&mut self, len: usize) -> Result<()> {
        let rest = self.waiting.split_off(len);
        let mut bytes = crate::buf::aligned(len.next_multiple_of(self.unit as usize));
        let waiting = std::mem::replace(&mut self.waiting, rest);
        bytes.iter_mut().zip(waiting).for_each(|(to, b)| *to = b);
        let (at, bytes): (u64, Bytes) = (self.at, bytes.freeze());
        self.at = at.saturating_add(bytes.len() as u64);
        self.store.write_at(at, bytes, Reach::Cache).await
    }
}
