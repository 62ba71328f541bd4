//! The first write to a cluster: reserve, read what is needed from below, write, publish.
//!
//! Ordering: the reserved cluster durably reads as zeros; everything the guest must find in it is
//! written before it is published; it is published before the guest is answered. Durability is
//! the flush pass's business, which is told what would be lost ([`Below`]).
//!
//! Only what is needed is copied up: nothing if no lower layer has data there, and nothing of what
//! the request overwrites. Memory is bounded by [`STEP`] whatever the cluster size.

use crate::stack::Stack;
use bytes::Bytes;
use ploop_formats::layer::{Below, Layer, Reservation};
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::{Reach, Space, Store};
use ploop_formats::units::VirtCluster;
use ploop_formats::{Result, buf};

/// Bytes assembled in memory at once.
const STEP: u64 = 1 << 20;

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
}

/// Gives `cluster`, which the top does not have, a place that holds `piece` and the rest from
/// below. The caller has the cluster to itself. Fails with `Pending` before anything is done.
pub async fn fill<S: Store>(stack: &Stack<S>, cluster: u32, piece: Piece) -> Result<()> {
    let top = stack.top();
    let geometry = top.geometry();
    let start = geometry.cluster.start(cluster);
    let guest_end = (start + geometry.cluster.bytes()).min(geometry.size);
    let depth = stack.depth() - 1;
    let lower_zero = stack.reads_zero(start, guest_end, depth).await?;
    let only_zeros = matches!(piece, Piece::Zero { .. }) && piece.range() == (start, guest_end);
    // The file has the whole cluster, the guest perhaps not: the last block is written whole.
    let end = guest_end.next_multiple_of(stack.align());

    let mut reserved = top.reserve().await?;
    let host = reserved.host();
    reserved.submitted();
    if let Piece::Zero { keep: true, .. } = piece {
        stack
            .punch_data(host, geometry.cluster.bytes(), Space::Keep)
            .await?;
    }
    let below = if lower_zero || only_zeros {
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
        if let Some((from, bytes)) = assemble(stack, &piece, at, to, lower_zero).await? {
            stack
                .write_data(host + (from - start), bytes, Reach::Cache)
                .await?;
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

/// The bytes to write for guest range `from .. to` of a new cluster and where they start; none
/// when zeros are right.
async fn assemble<S: Store>(
    stack: &Stack<S>,
    piece: &Piece,
    from: u64,
    to: u64,
    lower_zero: bool,
) -> Result<Option<(u64, Bytes)>> {
    let (piece_from, piece_to) = piece.range();
    let (cut_from, cut_to) = (piece_from.clamp(from, to), piece_to.clamp(from, to));
    if lower_zero {
        return Ok(overlaid(stack.align(), piece, cut_from, cut_to));
    }
    if (cut_from, cut_to) == (from, to) {
        return Ok(overlaid(stack.align(), piece, from, to));
    }
    let depth = stack.depth() - 1;
    let mut whole = buf::aligned((to - from) as usize);
    for (a, b) in [(from, cut_from), (cut_to, to)] {
        if a < b {
            let below = stack.read_unaligned(a, (b - a) as usize, depth).await?;
            whole[(a - from) as usize..(b - from) as usize].copy_from_slice(&below);
        }
    }
    if let Some(bytes) = slice(piece, cut_from, cut_to) {
        whole[(cut_from - from) as usize..(cut_to - from) as usize].copy_from_slice(&bytes);
    }
    Ok(Some((from, whole.freeze())))
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
fn overlaid(align: u64, piece: &Piece, from: u64, to: u64) -> Option<(u64, Bytes)> {
    let bytes = slice(piece, from, to)?;
    let (low, high) = (from / align * align, to.next_multiple_of(align));
    if (low, high) == (from, to) && buf::is_aligned(&bytes, align as usize) {
        return Some((from, bytes));
    }
    let mut whole = buf::aligned((high - low) as usize);
    whole[(from - low) as usize..][..bytes.len()].copy_from_slice(&bytes);
    Some((low, whole.freeze()))
}
