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
use ploop_formats::layer::{Below, Layer, Reservation};
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

/// Gives `cluster`, which has no place of its own in the top, one that holds `piece` and the rest as it
/// was. The caller has the cluster to itself. Fails with `Pending` before anything is done.
pub async fn fill<S: Store>(stack: &Stack<S>, cluster: u32, piece: Piece) -> Result<()> {
    let top = stack.top();
    let geometry = top.geometry();
    let start = geometry.cluster.start(cluster);
    let guest_end = (start + geometry.cluster.bytes()).min(geometry.size);
    let was_zero = stack.reads_zero(start, guest_end, stack.depth()).await?;
    let only_zeros = matches!(piece, Piece::Zero { .. }) && piece.range() == (start, guest_end);
    // The file has the whole cluster, the guest perhaps not: the last block is written whole.
    let end = guest_end.next_multiple_of(stack.align());

    let mut reserved = top.reserve(VirtCluster(cluster)).await?;
    let host = reserved.host();
    reserved.submitted();
    if let Piece::Zero { keep: true, .. } = piece {
        stack
            .punch_data(host, geometry.cluster.bytes(), Space::Keep)
            .await?;
    }
    let below = if was_zero || only_zeros {
        Below::Zeros
    } else {
        Below::Data
    };
    let mut reserved = Some(reserved);
    if planted::is(Bug::PublishBeforeData) {
        publish(top, cluster, reserved.take(), below);
    }
    let mut at = start;
    while at < end {
        let to = (at + STEP).min(end);
        let (from, bytes, _permit);
        if was_zero || piece.covers(at, to) {
            let (cut_from, cut_to) = piece.cut(at, to);
            (from, bytes) = overlaid(stack.align(), &piece, cut_from, cut_to);
        } else {
            _permit = stack.copying(to - at).await;
            (from, bytes) = copied(stack, &piece, at, to).await?;
        }
        if !bytes.is_empty() {
            let lent = bytes.clone();
            stack
                .write_data(host + (from - start), bytes, Reach::Cache)
                .await?;
            stack.take_back(lent);
        }
        at = to;
    }
    publish(top, cluster, reserved, below);
    Ok(())
}

fn publish<L: Layer>(top: &L, cluster: u32, reserved: Option<L::Reservation>, below: Below) {
    if let Some(reserved) = reserved {
        top.publish(VirtCluster(cluster), reserved, below);
    }
}

/// The bytes to write for guest range `from .. to` of a new cluster, where they start, and nothing
/// where zeros are right: the piece with what was around it, but for zeros at the ends.
async fn copied<S: Store>(
    stack: &Stack<S>,
    piece: &Piece,
    from: u64,
    to: u64,
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
