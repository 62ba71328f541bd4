//! Compressing a cluster, and unpacking one: exactly one cluster comes out, or an error.
//!
//! What is packed is as long as its sectors, so rubbish may follow it. Memory is bounded by the
//! cluster and by the history that a zstd frame may ask for; time by the cluster and the number of
//! blocks, because whatever is not the start of a block makes output. Source: QEMU
//! `docs/interop/qcow2.rst`, "Compressed Clusters Descriptor".

use super::header::Compression;
use crate::{Error, Result, limits};
use miniz_oxide::deflate::compress_to_vec;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::encoding::CompressionLevel;
use std::io::Read;

/// What others use: less takes little less time, more makes little less.
const DEFLATE_LEVEL: u8 = 6;

/// Why a cluster does not unpack.
type Fault = &'static str;
const SHORT: Fault = "less than a cluster";
const BLOCKS: Fault = "more blocks than a cluster needs";
const BROKEN: Fault = "data that is not so compressed";

/// The `len` bytes that were packed into `packed`; `Damaged` when it does not hold so many, or is a
/// zstd frame of more.
pub(super) fn unpack(how: Compression, packed: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0; len];
    let done = match how {
        Compression::Deflate => inflate(packed, &mut out),
        Compression::Zstd => unpack_zstd(packed, &mut out),
    };
    match done {
        Ok(()) => Ok(out),
        Err(fault) => Err(Error::damaged(format!(
            "compressed cluster ({how:?}): {fault}"
        ))),
    }
}

/// A cluster compressed, when that makes it smaller. It is unpacked again and compared: what a compressor
/// does wrong would be seen when the source is gone.
pub fn compress(how: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let packed = match how {
        Compression::Deflate => compress_to_vec(cluster, DEFLATE_LEVEL),
        Compression::Zstd => ruzstd::encoding::compress_to_vec(cluster, CompressionLevel::Fastest),
    };
    let is_same = || unpack(how, &packed, cluster.len()).is_ok_and(|bytes| bytes == cluster);
    (packed.len() < cluster.len() && is_same()).then_some(packed)
}

/// Blocks that are looked at for `len` bytes. Those that make nothing cost time all the same.
const fn blocks_max(len: usize) -> usize {
    (len / limits::QCOW2_BLOCK_MEAN).saturating_add(limits::QCOW2_BLOCKS_SPARE)
}

/// Fills `out`. What the stream would go on to is not looked at: QEMU reads a stream that holds more
/// than a cluster, and so it is read here.
fn inflate(packed: &[u8], out: &mut [u8]) -> std::result::Result<(), Fault> {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;
    let (mut rest, mut made) = (packed, 0usize);
    for _ in 0..blocks_max(out.len()) {
        let (status, read, written) = decompress(&mut state, rest, out, made, flags);
        made = made.saturating_add(written);
        match status {
            TINFLStatus::Failed => return Err(BROKEN),
            _ if made == out.len() => return Ok(()),
            TINFLStatus::BlockBoundary => rest = rest.get(read..).unwrap_or_default(),
            _ => return Err(SHORT),
        }
    }
    Err(BLOCKS)
}

/// Fills `out` with one whole frame, which holds nothing else.
fn unpack_zstd(packed: &[u8], out: &mut [u8]) -> std::result::Result<(), Fault> {
    let len = out.len();
    let mut rest = packed;
    let mut frame = FrameDecoder::new();
    frame.set_max_window_size(limits::QCOW2_WINDOW_MAX);
    frame.reset(&mut rest).map_err(|_| BROKEN)?;
    if says_its_size(packed) && frame.content_size() != len as u64 {
        return Err("a frame that says another size than a cluster's");
    }
    let mut made = 0usize;
    for _ in 0..blocks_max(len) {
        frame
            .decode_blocks(&mut rest, BlockDecodingStrategy::UptoBlocks(1))
            .map_err(|_| BROKEN)?;
        let free = out.get_mut(made..).unwrap_or_default();
        made = made.saturating_add(frame.read(free).map_err(|_| BROKEN)?);
        // Up to the end of the frame its history is held back: more than that is never kept.
        match (frame.can_collect(), frame.is_finished()) {
            (1.., _) => return Err("more than a cluster"),
            (0, false) => {}
            (0, true) if made < len => return Err(SHORT),
            (0, true) => return judge_sum(&frame),
        }
    }
    Err(BLOCKS)
}

/// Whether a frame's header has a field for the size of its content (RFC 8878, 3.1.1.1.1: any of the
/// three highest bits of the descriptor).
fn says_its_size(frame: &[u8]) -> bool {
    frame.get(4).is_some_and(|descriptor| *descriptor >= 0x20)
}

/// Compares the checksum of a frame, of which all was collected, if it has one.
fn judge_sum(frame: &FrameDecoder) -> std::result::Result<(), Fault> {
    let said = frame.get_checksum_from_data();
    match said.is_none() || said == frame.get_calculated_checksum() {
        true => Ok(()),
        false => Err("a wrong checksum"),
    }
}
