//! Open: from files to a device.
//!
//! To write, in order: the top is opened, the fence is taken on that very description, and only
//! then is anything of it read. The fence is what makes a dead predecessor's last writes the past:
//! the kernel keeps a flock until the last operation on its description has landed. It is
//! taken by every writer, because who came before us may have died a second ago.

use super::chain::{Chain, LayerFile};
use super::target::Format;
use crate::disk::Disk;
use crate::io::beneath;
use crate::io::file::FileStore;
use crate::stack::AnyLayer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Ploop;
use ploop_formats::ploop::header::IN_USE;
use ploop_formats::raw::Raw;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Whether guest writes go through the page cache of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// The top is opened with O_DIRECT.
    None,
    /// The top goes through the page cache.
    Writeback,
}

impl Cache {
    /// Its name in options and output.
    pub const fn name(self) -> &'static str {
        match self {
            Cache::None => "none",
            Cache::Writeback => "writeback",
        }
    }
}

/// Pause between attempts to get the fence.
const FENCE_POLL: Duration = Duration::from_millis(5);

/// A top layer's file that nobody else writes any more.
#[derive(Debug)]
pub struct Top {
    fd: OwnedFd,
    /// The cache mode that the file system allowed.
    pub cache: Cache,
}

impl Top {
    /// Opens the top for writing and takes the fence. `TimedOut` when the predecessor's writes
    /// have not landed within `patience`. Blocks.
    pub fn fenced(
        dir: impl AsFd,
        layer: &LayerFile,
        cache: Cache,
        patience: Duration,
    ) -> Result<Self> {
        let top = Self::open(dir, layer, OFlags::RDWR, cache)?;
        let start = Instant::now();
        loop {
            match flock(&top.fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::from(io::Error::from(e)).at("taking the fence")),
            }
            if start.elapsed() >= patience {
                return Err(Error::new(
                    Kind::TimedOut,
                    format!(
                        "{}: the last writes of another process have not landed after {} s",
                        layer.display(),
                        patience.as_secs()
                    ),
                ));
            }
            std::thread::sleep(FENCE_POLL);
        }
        Ok(top)
    }

    /// The file; the fence lasts as long as its description.
    pub fn into_file(self) -> File {
        File::from(self.fd)
    }

    fn open(dir: impl AsFd, layer: &LayerFile, access: OFlags, cache: Cache) -> Result<Self> {
        let place = |e: Error| e.at(layer.display());
        if cache == Cache::None {
            match beneath::open(&dir, &layer.name, access | OFlags::DIRECT) {
                Ok(fd) => return Ok(Self { fd, cache }),
                Err(e) if e.kind() == Kind::Invalid => {
                    let file = layer.display();
                    tracing::warn!("{file}: no O_DIRECT on this file system; using writeback");
                }
                Err(e) => return Err(place(e)),
            }
        }
        let fd = beneath::open(&dir, &layer.name, access).map_err(place)?;
        Ok(Self { fd, cache: Cache::Writeback })
    }
}

/// Opens a disk for writing. `top` is fenced; `ledger` outlives this process.
pub async fn open_write(
    dir: impl AsFd,
    chain: &Chain,
    top: Top,
    ledger: Ledger,
) -> Result<Disk<FileStore>> {
    let mut layers = lower(&dir, chain).await?;
    for (layer, file) in layers.iter().zip(&chain.layers) {
        refuse_dirty(layer, file)?;
    }
    let store = FileStore::from_file(File::from(top.fd))?;
    let layer = match chain.top().format {
        Format::Ploop => AnyLayer::Ploop(Ploop::open_write(store, ledger).await.map_err(|e| {
            e.at(chain.top().display())
        })?),
        Format::Raw => AnyLayer::Raw(Raw::open_write(store, chain.cluster, ledger)?),
    };
    layers.push(layer);
    Disk::new(layers, false)
}

/// Opens a disk for reading; nothing is written, not even a mark.
pub async fn open_read(dir: impl AsFd, chain: &Chain, cache: Cache) -> Result<Disk<FileStore>> {
    let mut layers = lower(&dir, chain).await?;
    let top = Top::open(&dir, chain.top(), OFlags::RDONLY, cache)?;
    layers.push(read_layer(top.fd, chain.top(), chain).await?);
    Disk::new(layers, true)
}

/// Every layer but the top, through the page cache: several disks may share them.
async fn lower(dir: impl AsFd, chain: &Chain) -> Result<Vec<AnyLayer<FileStore>>> {
    let mut layers = Vec::new();
    for layer in chain.layers.iter().take(chain.layers.len() - 1) {
        let fd = beneath::open(&dir, &layer.name, OFlags::RDONLY);
        let fd = fd.map_err(|e| e.at(layer.display()))?;
        layers.push(read_layer(fd, layer, chain).await?);
    }
    Ok(layers)
}

async fn read_layer(fd: OwnedFd, file: &LayerFile, chain: &Chain) -> Result<AnyLayer<FileStore>> {
    let place = |e: Error| e.at(file.display());
    let store = FileStore::from_file(File::from(fd)).map_err(place)?;
    Ok(match file.format {
        Format::Ploop => AnyLayer::Ploop(Ploop::open_read(store).await.map_err(place)?),
        Format::Raw => AnyLayer::Raw(Raw::open_read(store, chain.cluster).map_err(place)?),
    })
}

/// A lower layer that was not closed may lack what the layers above were written over.
fn refuse_dirty(layer: &AnyLayer<FileStore>, file: &LayerFile) -> Result<()> {
    match layer {
        AnyLayer::Ploop(ploop) if ploop.header().in_use == IN_USE => Err(Error::damaged(format!(
            "{}: this lower layer was not closed; check it before anything is written above it",
            file.display()
        ))),
        _ => Ok(()),
    }
}
