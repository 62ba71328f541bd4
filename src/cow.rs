//! The first write to a cluster: reserve, read what is needed of what was there, write, publish.
//!
//! Ordering: the reserved cluster durably reads as zeros; everything the guest must find in it is
//! written before it is published; it is published before the guest is answered. Durability is
//! the flush pass's business, which is told what would be lost ([`Below`]).
//!
//! What was there is mostly in a lower layer, but the top may have it in a way that it cannot be
//! written: shared, compressed, in part. Only what is needed is copied: nothing if no layer has data
//! there, nothing of what the request overwrites, and no zeros at the ends of what is there, which the
//! new cluster has already.
//!
//! Memory is bounded by [`STEP`] whatever the cluster size, and for all copies of a disk together.

use crate::stack::Stack;
use bytes::Bytes;
use ploop_formats::layer::{Below, Extent, Layer, Reservation};
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::{Reach, Space, Store};
use ploop_formats::units::VirtCluster;
use ploop_formats::{Result, buf};

/// Bytes assembled in memory at once.
const STEP: u64 = 1 << 20;
/// Zeros are left out in blocks of at least so many bytes: what a file system can leave out.
const ZERO_BLOCK: usize = 4096;

/// What a request puts into a cluster that has no place yet.
#[derive(Debug, Clone)]
pub enum Piece {
    /// Bytes from a guest offset on.
    Data {
        /// Guest offset.
        at: u64,
        /// The bytes; they end within the cluster.
        bytes: Bytes,
    },
    /// Zeros in a guest range.
    Zero {
        /// Guest offset.
        from: u64,
        /// Its end, within the cluster.
        to: u64,
        /// Whether the cluster's space is taken from the host now.
        keep: bool,
    },
}

impl Piece {
    fn range(&self) -> (u64, u64) {
        match self {
            Piece::Data { at, bytes } => (*at, *at + bytes.len() as u64),
            Piece::Zero { from, to, .. } => (*from, *to),
        }
    }

    /// The part of `from .. to` that it fills, empty when there is none.
    fn cut(&self, from: u64, to: u64) -> (u64, u64) {
        let (piece_from, piece_to) = self.range();
        (piece_from.clamp(from, to), piece_to.clamp(from, to))
    }

    fn covers(&self, from: u64, to: u64) -> bool {
        self.cut(from, to) == (from, to)
    }
}

/// Gives `cluster`, which has no place of its own in the top for all of `piece`, one that holds it and
/// the rest as it was. A top that can have a cluster in part gets no more than that: what it has of the
/// cluster already, and what the piece touches. The caller has the cluster to itself. Fails with `Pending`
/// before anything is done.
pub async fn fill<S: Store>(stack: &Stack<S>, cluster: u32, piece: Piece) -> Result<()> {
    let top = stack.top();
    let geometry = top.geometry();
    let start = geometry.cluster.start(cluster);
    let guest_end = (start + geometry.cluster.bytes()).min(geometry.size);

    let mut reserved = top.reserve(VirtCluster(cluster)).await?;
    let parts = match reserved.piece() {
        Some(unit) => parts(stack, &reserved, &piece, start, guest_end, unit).await?,
        // The file has the whole cluster, the guest perhaps not: the last block is written whole.
        None => vec![(start, guest_end.next_multiple_of(stack.align()))],
    };
    let mut was_zero = true;
    for (from, to) in &parts {
        was_zero &= stack
            .reads_zero(*from, guest_end.min(*to), stack.depth())
            .await?;
    }
    let only_zeros = matches!(piece, Piece::Zero { .. })
        && parts
            .iter()
            .all(|(from, to)| piece.covers(*from, guest_end.min(*to)));
    let fill = Fill {
        stack,
        piece: &piece,
        host: reserved.host(),
        start,
        was_zero,
        is_new: reserved.is_new(),
    };
    reserved.submitted();
    let below = if was_zero || only_zeros {
        Below::Zeros
    } else {
        Below::Data
    };
    for (from, to) in &parts {
        reserved.filled(from - start, to - start);
    }
    let mut reserved = Some(reserved);
    if planted::is(Bug::PublishBeforeData) {
        publish(top, cluster, reserved.take(), below);
    }
    fill.take_space(geometry.cluster.bytes(), &parts).await?;
    for (from, to) in parts {
        fill.range(from, to).await?;
    }
    publish(top, cluster, reserved, below);
    Ok(())
}

/// The guest ranges of a cluster that are filled: pieces of `unit` bytes that the request touches, and of
/// a new cluster those that the top has already.
async fn parts<S: Store>(
    stack: &Stack<S>,
    reserved: &impl Reservation,
    piece: &Piece,
    start: u64,
    end: u64,
    unit: u64,
) -> Result<Vec<(u64, u64)>> {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    let mut at = start;
    while at < end {
        let (to, kept) = match reserved.is_new() {
            true => {
                let extent = stack.top().map(at, end - at).await?;
                let absent = matches!(extent, Extent::Absent { .. });
                (at + extent.len(), !absent)
            }
            false => (end, false),
        };
        let (from, until) = if kept { (at, to) } else { piece.cut(at, to) };
        if from < until {
            let (from, until) = (from / unit * unit, until.next_multiple_of(unit));
            match parts.last_mut() {
                Some(last) if last.1 >= from => last.1 = until,
                _ => parts.push((from, until)),
            }
        }
        at = to;
    }
    Ok(parts)
}

/// How a place gets its bytes.
struct Fill<'a, S> {
    stack: &'a Stack<S>,
    piece: &'a Piece,
    /// File offset of the place, and the guest's of its cluster.
    host: u64,
    start: u64,
    /// Zeros are what was there.
    was_zero: bool,
    /// The place reads as zeros.
    is_new: bool,
}

impl<S: Store> Fill<'_, S> {
    /// File offset of a guest offset.
    const fn at(&self, guest: u64) -> u64 {
        self.host + (guest - self.start)
    }

    /// Takes space where it is asked for, and makes zeros where a place may hold something else.
    async fn take_space(&self, len: u64, parts: &[(u64, u64)]) -> Result<()> {
        let Piece::Zero { keep, .. } = self.piece else {
            return Ok(());
        };
        let space = if *keep { Space::Keep } else { Space::Free };
        if !self.is_new {
            for (from, to) in parts {
                let len = to - from;
                self.stack.punch_data(self.at(*from), len, space).await?;
            }
        } else if *keep {
            self.stack.punch_data(self.host, len, space).await?;
        }
        Ok(())
    }

    /// Writes a guest range, in steps.
    async fn range(&self, start: u64, end: u64) -> Result<()> {
        let stack = self.stack;
        let mut at = start;
        while at < end {
            let to = (at + STEP).min(end);
            let (from, bytes, _permit);
            if self.is_new && self.was_zero || self.piece.covers(at, to) {
                let (cut_from, cut_to) = self.piece.cut(at, to);
                (from, bytes) = overlaid(stack.align(), self.piece, cut_from, cut_to);
            } else {
                _permit = stack.copying(to - at).await;
                (from, bytes) = copied(stack, self.piece, at, to, self.is_new).await?;
            }
            if !bytes.is_empty() {
                let lent = bytes.clone();
                stack.write_data(self.at(from), bytes, Reach::Cache).await?;
                stack.take_back(lent);
            }
            at = to;
        }
        Ok(())
    }
}

fn publish<L: Layer>(top: &L, cluster: u32, reserved: Option<L::Reservation>, below: Below) {
    if let Some(reserved) = reserved {
        top.publish(VirtCluster(cluster), reserved, below);
    }
}

/// The bytes to write for guest range `from .. to`, where they start, and nothing where zeros are right:
/// the piece with what was around it, but for zeros at the ends of a place that is new.
async fn copied<S: Store>(
    stack: &Stack<S>,
    piece: &Piece,
    from: u64,
    to: u64,
    is_new: bool,
) -> Result<(u64, Bytes)> {
    let (cut_from, cut_to) = piece.cut(from, to);
    let mut head = stack.lend((to - from) as usize);
    let tail = head.split_off((cut_to - from) as usize);
    let mut middle = head.split_off((cut_from - from) as usize);
    match slice(piece, cut_from, cut_to) {
        Some(bytes) => middle.copy_from_slice(&bytes),
        None => middle.fill(0),
    }
    let (head, tail) =
        futures_util::future::join(stack.read_any(from, head), stack.read_any(cut_to, tail)).await;
    // Three neighbours in memory: joining them moves nothing.
    let mut whole = head?;
    whole.unsplit(middle);
    whole.unsplit(tail?);
    let mut whole = whole.freeze();
    if !is_new {
        return Ok((from, whole));
    }
    let (zeros_before, zeros_after) = zeros_around(&whole, stack.align() as usize);
    whole.truncate(whole.len() - zeros_after);
    let from = from + zeros_before as u64;
    Ok((from, whole.split_off(zeros_before)))
}

/// How many bytes at the start and at the end of `bytes` are zeros, in whole blocks.
fn zeros_around(bytes: &[u8], align: usize) -> (usize, usize) {
    let block = align.max(ZERO_BLOCK);
    let is_zero = |block: &&[u8]| block.iter().all(|byte| *byte == 0);
    let before = bytes
        .chunks(block)
        .take_while(is_zero)
        .map(<[u8]>::len)
        .sum();
    if before == bytes.len() {
        return (before, 0);
    }
    let after = bytes
        .rchunks(block)
        .take_while(is_zero)
        .map(<[u8]>::len)
        .sum();
    (before, after)
}

/// The piece's bytes in a guest range; none for zeros and for nothing.
fn slice(piece: &Piece, from: u64, to: u64) -> Option<Bytes> {
    match piece {
        Piece::Data { at, bytes } if from < to => {
            Some(bytes.slice((from - at) as usize..(to - at) as usize))
        }
        _ => None,
    }
}

/// The piece's bytes with zeros around them up to block boundaries: what a cluster over zeros
/// needs.
fn overlaid(align: u64, piece: &Piece, from: u64, to: u64) -> (u64, Bytes) {
    let Some(bytes) = slice(piece, from, to) else {
        return (from, Bytes::new());
    };
    let (low, high) = (from / align * align, to.next_multiple_of(align));
    if (low, high) == (from, to) && buf::is_aligned(&bytes, align as usize) {
        return (from, bytes);
    }
    let mut whole = buf::aligned((high - low) as usize);
    whole[(from - low) as usize..][..bytes.len()].copy_from_slice(&bytes);
    (low, whole.freeze())
}
