//! Points: what two readers, ours and QEMU's, find at a frozen point of a disk.

use super::process::ok_within;
use super::programs::tool;
use super::serve::Disk;
use super::tree::descriptor;
use bytes::BytesMut;
use ploop::device::Device;
use ploop::image::chain::Chain;
use ploop::image::open::open_read;
use ploop::io::exec::{self, Engine};
use ploop::io::file::Cache;
use ploop_formats::descriptor::LayerFormat;
use ploop_formats::guid::Guid;
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes that are read at once.
const STEP: usize = 1 << 20;

/// How QEMU opens a point: each layer by its stated format, in a chain that we tell it.
fn qemu_chain(disk: &Disk, point: Guid) -> String {
    let mut node = None;
    for image in descriptor(disk).chain(point).unwrap() {
        let driver = match image.format {
            LayerFormat::Raw => "raw",
            LayerFormat::Qcow2 => "qcow2",
            LayerFormat::Ploop => "parallels",
        };
        let file = disk.path().join(&image.file);
        let mut next = json!({
            "driver": driver,
            "file": { "driver": "file", "filename": file },
        });
        if let Some(below) = node {
            next["backing"] = below;
        }
        node = Some(next);
    }
    format!("json:{}", node.unwrap())
}

/// What our own reader finds at a point, as a raw file with holes where it finds zeros. The disk is
/// not attached.
fn read(disk: &Disk, point: Guid) -> PathBuf {
    let raw = disk.beside("point.raw");
    let _ = fs::remove_file(&raw);
    let file = File::create(&raw).unwrap();
    let chain = Chain::of(descriptor(disk), point).unwrap();
    let dir = File::open(disk.path()).unwrap();
    exec::run(Engine::Poll, async {
        let opened = open_read(&dir, &chain, Cache::Writeback).await.unwrap();
        file.set_len(opened.size()).unwrap();
        let mut bytes = ploop_formats::buf::aligned(STEP);
        for at in (0..opened.size()).step_by(STEP) {
            let len = STEP.min((opened.size() - at) as usize);
            bytes.resize(len, 0);
            bytes = opened.read(at, bytes).await.unwrap();
            write_data(&file, at, &bytes);
        }
    })
    .unwrap();
    raw
}

/// Writes what is not zero, in blocks.
fn write_data(file: &File, at: u64, bytes: &BytesMut) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    for (n, block) in bytes.chunks(ZEROS.len()).enumerate() {
        if block != &ZEROS[..block.len()] {
            let place = at + (n * ZEROS.len()) as u64;
            file.write_all_at(block, place).unwrap();
        }
    }
}

/// Demands that both readers find the same bytes at a point; those bytes, as a raw file.
pub fn assert_read_alike(disk: &Disk, point: Guid) -> PathBuf {
    let raw = read(disk, point);
    let mut compare = tool("qemu-img");
    compare.args(["compare", "-q"]).arg(image_options(&raw));
    compare.arg(qemu_chain(disk, point));
    ok_within(&mut compare, PATIENCE);
    raw
}

fn image_options(raw: &Path) -> String {
    format!(
        "json:{}",
        json!({ "driver": "raw", "file": { "driver": "file", "filename": raw } })
    )
}
