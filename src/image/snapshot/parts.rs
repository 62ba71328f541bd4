//! Parts: how a cluster is copied into the lower delta of which the upper one has some subclusters only,
//! or the lower one has.
//!
//! What the upper delta has is written, zeros too, and nothing else of a place that the lower one has
//! already or can fill piece by piece. A cluster that it can only have as a whole gets for its rest what
//! the lower delta and those below it read as: that is what the upper one shows of it. So what is read
//! through the upper one is the same at every cut. The cluster is named when all of it is written, and a
//! pass of the lower delta makes the data durable first.
//!
//! A running disk may read both meanwhile: where the upper delta has a part only, it looks for the
//! rest in the lower one, by tables that may be older than the merge. What those say stays true. A
//! place is filled before it is named, those that were named are written where the upper one hides
//! them, and what gets another place leaves the old one as it is
//! ([`AnyReserved::leave_old`](crate::stack::AnyReserved::leave_old)).
//!
//! One cluster is written by one future, in steps: where blocks of the file are larger than subclusters,
//! what is around them is read and written again.

use super::copy::is_zero;
use crate::stack::{AnyLayer, Stack};
use bytes::BytesMut;
use ploop_formats::layer::{Below, Extent, Layer, Place, Reservation};
use ploop_formats::store::{Reach, Store};
use ploop_formats::units::VirtCluster;
use ploop_formats::{Error, Result, buf};
use std::iter;
use std::ops::Range;
use std::sync::Arc;

/// Zeros of a new cluster are left out in blocks of so many bytes: what a file system can leave out.
const ZERO_BLOCK: usize = 4096;

/// What the lower delta stands on.
#[derive(Debug)]
pub struct Rest<S> {
    below: Option<Stack<S>>,
}

impl<S: Store> Rest<S> {
    /// `below` are the layers that the lower delta stands on, base first. Nobody asks for them when the
    /// upper delta has whole clusters only ([`may_have_parts`]).
    pub fn new(below: impl IntoIterator<Item = impl Into<Arc<AnyLayer<S>>>>) -> Result<Self> {
        let below: Vec<Arc<AnyLayer<S>>> = below.into_iter().map(Into::into).collect();
        let below = match below.is_empty() {
            true => None,
            false => Some(Stack::new(below)?),
        };
        Ok(Self { below })
    }
}

/// Whether a delta may have a cluster in part.
pub fn may_have_parts<S: Store>(layer: &AnyLayer<S>) -> bool {
    match layer {
        AnyLayer::Qcow2(image) => image.has_subclusters(),
        AnyLayer::Ploop(_) | AnyLayer::Raw(_) => false,
    }
}

/// A cluster to be copied.
pub struct Cluster<'a, S> {
    /// Where it comes from.
    pub upper: &'a AnyLayer<S>,
    /// Where it goes.
    pub lower: &'a AnyLayer<S>,
    /// What is below.
    pub rest: &'a Rest<S>,
    /// Guest offset of its first byte, and of its end or that of the disk.
    pub start: u64,
    /// See `start`.
    pub end: u64,
    /// Bytes in memory at once.
    pub step: u64,
}

/// Where a part of the guest's bytes is.
enum Source<'a, S> {
    /// In a file, from an offset on.
    At(&'a S, u64),
    /// Compressed.
    Packed(&'a AnyLayer<S>),
    /// Below the two deltas.
    Below(&'a Stack<S>),
    /// Nowhere: zeros.
    Zeros,
}

impl<S: Store> Cluster<'_, S> {
    /// Copies what the upper delta has of it. Fails with `Pending` before anything is done.
    pub async fn copy(&self) -> Result<()> {
        let held = self.held(self.upper).await?;
        if held.is_empty() {
            return Ok(());
        }
        match self.lower.place(self.start, self.end - self.start).await? {
            Place::Here { at, len } if len >= self.end - self.start => {
                self.write(&held, at, false).await
            }
            _ => self.copy_elsewhere(held).await,
        }
    }

    /// Copies it where the lower delta has not all of it in a place of its own.
    async fn copy_elsewhere(&self, held: Vec<Range<u64>>) -> Result<()> {
        let size = self.lower.geometry().cluster;
        let cluster = size.cluster_of(self.start);
        let cluster = VirtCluster(cluster.ok_or_else(|| Error::invalid("offset past the table"))?);
        let all = self.start..self.end;
        let whole = held.first() == Some(&all);
        if whole && self.is_zero().await? && self.lower.zero(cluster).await? {
            return Ok(());
        }
        let mut reserved = self.lower.reserve(cluster).await?;
        if !whole {
            reserved.leave_old();
        }
        let is_new = reserved.is_new();
        let ranges = match reserved.piece() {
            None => iter::once(all).collect(),
            Some(unit) => {
                let mut held = held;
                if is_new {
                    held.extend(self.held(self.lower).await?);
                }
                widened(held, unit)
            }
        };
        reserved.submitted();
        self.write(&ranges, reserved.host(), is_new).await?;
        for range in ranges {
            reserved.filled(range.start - self.start, range.end - self.start);
        }
        self.lower.publish(cluster, reserved, Below::Data);
        Ok(())
    }

    /// Whether all of it is said to be zeros by the upper delta.
    async fn is_zero(&self) -> Result<bool> {
        let extent = self.upper.map(self.start, self.end - self.start).await?;
        Ok(matches!(extent, Extent::Zero { len } if len == self.end - self.start))
    }

    /// Guest ranges of which a delta says something, in order.
    async fn held(&self, layer: &AnyLayer<S>) -> Result<Vec<Range<u64>>> {
        let mut held = Vec::new();
        let mut at = self.start;
        while at < self.end {
            let extent = layer.map(at, self.end - at).await?;
            let end = at + extent.len();
            if !matches!(extent, Extent::Absent { .. }) {
                held.push(at..end);
            }
            at = end;
        }
        Ok(widened(held, 1))
    }

    /// Writes guest ranges to a place in the lower delta's file, which begins with the cluster. A new one
    /// reads as zeros.
    async fn write(&self, ranges: &[Range<u64>], host: u64, is_new: bool) -> Result<()> {
        let align = self.lower.store().info().align.max(1);
        let step = (self.step / align).max(1) * align;
        for range in widened(ranges.to_vec(), align) {
            let mut at = range.start;
            while at < range.end {
                let len = step.min(range.end - at);
                let bytes = self.read(at, len as usize).await?.freeze();
                let block = match is_new {
                    true => ZERO_BLOCK.next_multiple_of(align as usize),
                    false => bytes.len(),
                };
                for (n, block) in (0..).step_by(block).zip(bytes.chunks(block)) {
                    if !(is_new && is_zero(block)) {
                        let place = host + (at - self.start) + n as u64;
                        let part = bytes.slice(n..n + block.len());
                        let written = self.lower.store().write_at(place, part, Reach::Cache);
                        written.await?;
                    }
                }
                at += len;
            }
        }
        Ok(())
    }

    /// What is read through the upper delta, as the lower one is now; zeros behind the end.
    async fn read(&self, at: u64, len: usize) -> Result<BytesMut> {
        let mut whole = buf::aligned(len);
        let end = (at + len as u64).min(self.end);
        let mut from = at;
        while from < end {
            let (len, source) = self.source(from, end - from).await?;
            let bytes = match source {
                Source::At(store, host) => Some(read_any(store, host, len as usize).await?),
                Source::Packed(layer) => {
                    Some(layer.unpack(from, buf::aligned(len as usize)).await?)
                }
                Source::Below(stack) => {
                    Some(stack.read_any(from, buf::aligned(len as usize)).await?)
                }
                Source::Zeros => None,
            };
            if let Some(bytes) = bytes {
                whole[(from - at) as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            from += len;
        }
        Ok(whole)
    }

    /// Where guest bytes are that are read through the upper delta, and how many.
    async fn source(&self, at: u64, len: u64) -> Result<(u64, Source<'_, S>)> {
        let mut len = len;
        for layer in [self.upper, self.lower] {
            let extent = layer.map(at, len).await?;
            len = extent.len();
            match extent {
                Extent::Data { at, .. } => return Ok((len, Source::At(layer.store(), at))),
                Extent::Packed { .. } => return Ok((len, Source::Packed(layer))),
                Extent::Zero { .. } => return Ok((len, Source::Zeros)),
                Extent::Absent { .. } => {}
            }
        }
        let Some(below) = &self.rest.below else {
            return Ok((len, Source::Zeros));
        };
        // What is behind the end of what is below are zeros.
        Ok(match below.top().geometry().size.saturating_sub(at) {
            0 => (len, Source::Zeros),
            rest => (len.min(rest), Source::Below(below)),
        })
    }
}

/// The same ranges in whole units, in order, those joined that touch each other.
fn widened(mut ranges: Vec<Range<u64>>, unit: u64) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let (start, end) = (range.start / unit * unit, range.end.next_multiple_of(unit));
        match all.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => all.push(start..end),
        }
    }
    all
}

/// Reads of any alignment: whole blocks are read.
async fn read_any<S: Store>(store: &S, at: u64, len: usize) -> Result<BytesMut> {
    let align = store.info().align.max(1);
    let from = at / align * align;
    let to = (at + len as u64).next_multiple_of(align);
    let mut wide = store
        .read_at(from, buf::aligned((to - from) as usize))
        .await?;
    let mut inner = wide.split_off((at - from) as usize);
    inner.truncate(len);
    Ok(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_widened_to_units_and_joined_where_they_touch() {
        let ranges = vec![6..7, 0..1, 1..2, 20..21];
        assert_eq!(widened(ranges.clone(), 1), [0..2, 6..7, 20..21]);
        assert_eq!(widened(ranges, 4), [0..8, 20..24]);
    }
}
