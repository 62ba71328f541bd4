//! Unpacking a compressed cluster: exactly one cluster comes out, or an error.
//!
//! What is packed is as long as its sectors, so rubbish may follow it. Memory is bounded by the
//! cluster and by the history that a zstd frame may ask for. Source: QEMU
//! `docs/interop/qcow2.rst`, "Compressed Clusters Descriptor".

use super::header::Compression;
use crate::{Error, Result, limits};
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use ruzstd::decoding::StreamingDecoder;
use std::io::Read;

/// The `len` bytes that were packed into `packed`; `Damaged` when it does not hold so many.
pub(super) fn unpack(how: Compression, packed: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0; len];
    let full = match how {
        Compression::Deflate => inflate(packed, &mut out),
        Compression::Zstd => unpack_zstd(packed, &mut out),
    };
    match full {
        true => Ok(out),
        false => Err(Error::damaged(format!(
            "compressed cluster ({how:?}): not a whole cluster"
        ))),
    }
}

/// Whether all of `out` was filled.
fn inflate(packed: &[u8], out: &mut [u8]) -> bool {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let len = out.len();
    let (_, _, written) = decompress(&mut state, packed, out, 0, flags);
    written == len
}

/// Whether all of `out` was filled.
fn unpack_zstd(packed: &[u8], out: &mut [u8]) -> bool {
    let frame = StreamingDecoder::new_with_max_window_size(packed, limits::QCOW2_WINDOW_MAX);
    frame.is_ok_and(|mut frame| frame.read_exact(out).is_ok())
}
