//! Qcow2: what a qcow2 image says of itself.
//!
//! Its names are only shown: neither backing file nor data file is opened, or looked for.

use super::{Closed, LayerInfo};
use crate::image::chain::LayerFile;
use crate::io::beneath::{self, Access};
use crate::io::file::{Cache, FileStore};
use ploop_formats::qcow2::bitmap::Bitmap;
use ploop_formats::qcow2::header::{DIRTY, Version, peek, peek_size};
use ploop_formats::qcow2::snapshot::Snapshot;
use ploop_formats::qcow2::{Header, list_bitmaps, list_snapshots, read_header};
use ploop_formats::{Error, Result, limits};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// All of it.
#[derive(Debug, Clone)]
pub struct Said {
    /// The header.
    pub header: Header,
    /// Snapshots inside the image, in the order of their table.
    pub snapshots: Vec<Snapshot>,
    /// Bitmaps that say the truth, in the order of their directory.
    pub bitmaps: Vec<Bitmap>,
}

/// Reads it. `Damaged` when one of the lists cannot be read.
pub async fn read(dir: impl AsFd, layer: &LayerFile) -> Result<Said> {
    let path = Path::new(&layer.name);
    let fd = beneath::open_file(dir, path, Access::Read)?;
    let store = FileStore::new(fd, path, Cache::Writeback)?;
    let read = async {
        let header = read_header(&store).await?;
        Ok(Said {
            snapshots: list_snapshots(&store, &header).await?.0,
            bitmaps: list_bitmaps(&store, &header).await?,
            header,
        })
    };
    read.await.map_err(|e: Error| e.at(layer.display()))
}

/// What the header says of size and state.
pub(super) fn look(file: &File, info: &mut LayerInfo) -> Result<()> {
    let head = start(file, HEAD)?;
    let (_, cluster) = peek(&head)?;
    let header = Header::parse(&start(file, cluster.bytes())?)?;
    info.size = peek_size(&head);
    info.cluster = Some(header.cluster.bytes());
    info.version = Some(match header.version {
        Version::V2 => 2,
        Version::V3 => 3,
    });
    let is_dirty = header.features.incompatible & DIRTY != 0;
    info.closed = is_dirty.then_some(Closed::InUse);
    Ok(())
}

/// Bytes that tell how long the header is.
const HEAD: u64 = 512;

/// The first `len` bytes of a file, at most a cluster, or all that it has.
fn start(file: &File, len: u64) -> Result<Vec<u8>> {
    let len = len.min(1 << limits::QCOW2_BITS_MAX);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    let mut done = 0;
    while done < bytes.len() {
        let rest = bytes.get_mut(done..).unwrap_or_default();
        match file.read_at(rest, done as u64).map_err(Error::from)? {
            0 => break,
            read => done += read,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}
