//! Oracle: what another implementation of qcow2 reads in an image, with all that it stands on, as a flat
//! file. It only reads; a program of its own, because one of them ends the process at what it does not like.
//!
//! Names inside an image are opened without asking, and by one of them from the current folder: it
//! is for images that a test made, and is started where they are.
#![forbid(unsafe_code)]

use futures::executor::block_on;
use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

/// Bytes that are read at once.
const STEP: u64 = 1 << 20;
/// Size of the blocks that are read, as a power of two, and of which buffers are aligned.
const BLOCK_BITS: u8 = 9;

type Done = Result<(), Box<dyn Error>>;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let done = match &args[..] {
        [reader, image, out] if reader == "imago" => imago(image.as_ref(), out.as_ref()),
        [reader, image, out] if reader == "qcow2-rs" => qcow2_rs(image.as_ref(), out.as_ref()),
        _ => Err("usage: oracle imago|qcow2-rs IMAGE OUT".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("oracle: {e}");
            ExitCode::FAILURE
        }
    }
}

/// The pieces of a disk.
fn pieces(size: u64) -> impl Iterator<Item = (u64, usize)> {
    let starts = (0..size).step_by(STEP as usize);
    starts.map(move |at| (at, STEP.min(size - at) as usize))
}

fn imago(image: &Path, out: &Path) -> Done {
    let opened =
        Qcow2::<Storage>::builder_path(image).open(PermissiveImplicitOpenGate::default())?;
    let disk = FormatAccess::new(opened);
    let mut out = File::create(out)?;
    for (at, len) in pieces(disk.size()) {
        // What is not filled is seen.
        let mut piece = vec![0xEE; len];
        disk.read(&mut piece, at)?;
        out.write_all(&piece)?;
    }
    Ok(())
}

fn qcow2_rs(image: &Path, out: &Path) -> Done {
    let params = Qcow2DevParams::new(BLOCK_BITS, None, None, true, false);
    let said = |e| format!("{e:?}");
    let disk = qcow2_setup_dev_sync(image, &params).map_err(said)?;
    block_on(disk.qcow2_prep_io()).map_err(said)?;
    let mut out = File::create(out)?;
    for (at, len) in pieces(disk.info.virtual_size()) {
        let mut piece = Qcow2IoBuf::<u8>::new(len);
        piece.fill(0xEE);
        let read = block_on(disk.read_at(&mut piece, at)).map_err(said)?;
        if read != len {
            return Err(format!("{read} of {len} bytes at {at}").into());
        }
        out.write_all(&piece)?;
    }
    Ok(())
}
