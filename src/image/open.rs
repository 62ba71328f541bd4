//! Open: from files to a device.
//!
//! To write, in order: the top is opened, the fence is taken on that very description, and only
//! then is anything of it read. The fence is what makes a dead predecessor's last writes the past:
//! the kernel keeps a flock until the last operation on its description has landed. It is
//! taken by every writer, because who came before us may have died a second ago. A layer that the
//! top may just have been merged into is waited for in the same way.

use super::chain::{Chain, LayerFile};
use super::snapshot::internal;
use super::target::Format;
use super::{backing, delta};
use crate::disk::Disk;
use crate::io::beneath::{self, Access};
use crate::io::file::{Cache, FileStore};
use crate::io::lock;
use crate::stack::AnyLayer;
use ploop_formats::ledger::Ledger;
use ploop_formats::{Error, Kind, Result, limits, qcow2};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a command waits for the last writes of a process that died.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A top layer's file that nobody else writes any more.
#[derive(Debug)]
pub struct Top {
    fd: OwnedFd,
}

impl Top {
    /// Opens the top for writing and takes the fence. `Busy` when the predecessor's writes have
    /// not landed within `patience`. Blocks.
    pub fn fenced(dir: impl AsFd, layer: &LayerFile, patience: Duration) -> Result<Self> {
        let fd = fenced(dir, Path::new(&layer.name), patience)?;
        Ok(Self { fd })
    }

    /// Its store; the fence lasts as long as that. Blocks.
    pub fn store(self, layer: &LayerFile, cache: Cache) -> Result<FileStore> {
        top_store(self.fd, Path::new(&layer.name), layer.format, cache)
    }

    /// Links to the file: above one means that several disks share it.
    pub fn links(&self) -> Result<u64> {
        let stat = rustix::fs::fstat(&self.fd).map_err(io::Error::from)?;
        Ok(stat.st_nlink)
    }
}

/// Opens a file for writing and takes the fence. As [`Top::fenced`].
pub fn fenced(dir: impl AsFd, name: &Path, patience: Duration) -> Result<OwnedFd> {
    let fd = beneath::open_file(dir, name, Access::Write)?;
    lock::fence(&fd, Instant::now() + patience).map_err(|e| match e.kind() {
        Kind::Busy => Error::new(
            Kind::TimedOut,
            format!(
                "{}: the last writes of another process have not landed after {} s ({e})",
                name.display(),
                patience.as_secs()
            ),
        ),
        _ => e,
    })?;
    Ok(fd)
}

/// The store of a file that is written, and that nobody else has. Blocks.
pub fn top_store(fd: OwnedFd, path: &Path, format: Format, cache: Cache) -> Result<FileStore> {
    let cache = possible(&fd, format, cache)?;
    if format == Format::Qcow2 && cache == Cache::None {
        end_at_page(&fd)?;
    }
    FileStore::new(fd, path, cache)
}

/// The store of a layer's file: through the page cache where its format does not keep to the blocks of
/// direct I/O. Blocks.
pub fn store(fd: OwnedFd, path: &Path, format: Format, cache: Cache) -> Result<FileStore> {
    let cache = possible(&fd, format, cache)?;
    FileStore::new(fd, path, cache)
}

/// The cache mode asked for, or the page cache where direct I/O could not read all of an image.
fn possible(fd: &OwnedFd, format: Format, cache: Cache) -> Result<Cache> {
    Ok(match format {
        Format::Qcow2 if has_small_pieces(fd)? => Cache::Writeback,
        _ => cache,
    })
}

/// Lengthens a file to whole pages, where direct I/O could not read its end: others let an image end
/// within its last cluster, of which what is missing reads as zeros.
fn end_at_page(fd: &OwnedFd) -> Result<()> {
    let len = rustix::fs::fstat(fd).map_err(io::Error::from)?.st_size as u64;
    match len.checked_next_multiple_of(limits::PAGE) {
        Some(end) if end > len => Ok(rustix::fs::ftruncate(fd, end).map_err(io::Error::from)?),
        _ => Ok(()),
    }
}

/// Whether it is a qcow2 image with clusters or subclusters that direct I/O may be too coarse for.
fn has_small_pieces(fd: &OwnedFd) -> Result<bool> {
    let mut head = [0; qcow2::header::FIXED];
    let read = rustix::io::pread(fd, &mut head, 0).map_err(io::Error::from)?;
    let head = head.get(..read).unwrap_or_default();
    Ok(qcow2::header::peek_piece(head).is_ok_and(|piece| piece < limits::PAGE))
}

/// The store of a top that nobody serves, for one command; it is to be settled before the locks of its
/// disk go. Blocks.
pub fn alone(dir: impl AsFd, top: &LayerFile) -> Result<FileStore> {
    let store = Top::fenced(dir, top, PATIENCE)?.store(top, Cache::Writeback)?;
    // After a failed write-back it believes in what the disk never got.
    store.forget_cache()?;
    Ok(store)
}

/// Whether the kernel has lost data of the top since `witness`, a description of its own, was
/// opened. Each description is told of an error once; a dead process may have been told, and have
/// had no time to say so. Blocks.
pub fn has_lost_data(witness: impl AsFd) -> bool {
    let synced = rustix::io::retry_on_intr(|| rustix::fs::fdatasync(witness.as_fd()));
    synced.is_err()
}

/// Opens a disk for writing. `top` is the fenced top, `ledger` outlives this process; other fences
/// are waited for as long as `patience`.
pub async fn open_write(
    dir: impl AsFd,
    chain: &Chain,
    top: FileStore,
    ledger: Ledger,
    patience: Duration,
) -> Result<Disk<FileStore>> {
    if is_bare_qcow2(chain) {
        let name = Path::new(&chain.top().name);
        let stack = backing::open_write(dir.as_fd(), name, top, ledger, patience).await?;
        for layer in stack.layers() {
            refuse_unclosed(layer).map_err(|e| e.at("a backing file"))?;
        }
        return Ok(Disk::over(stack, false));
    }
    await_target(&dir, chain, patience)?;
    let mut layers = lower(&dir, chain).await?;
    for (layer, file) in layers.iter().zip(&chain.layers) {
        refuse_dirty(layer, file)?;
    }
    let place = |e: Error| e.at(chain.top().display());
    let top = delta::write(top, chain.top().format, chain.cluster, ledger).await;
    layers.push(top.map_err(place)?);
    Disk::new(layers, false)
}

/// Opens a disk for reading; nothing is written, not even a mark.
pub async fn open_read(dir: impl AsFd, chain: &Chain, cache: Cache) -> Result<Disk<FileStore>> {
    open_at(dir, chain, None, cache).await
}

/// The same, as it was at `point`: the name or ID of a snapshot that a bare qcow2 image keeps in itself.
/// `Usage` when the disk is something else.
pub async fn open_at(
    dir: impl AsFd,
    chain: &Chain,
    point: Option<&str>,
    cache: Cache,
) -> Result<Disk<FileStore>> {
    let top = chain.top();
    if is_bare_qcow2(chain) {
        let stack = backing::open_at(dir.as_fd(), Path::new(&top.name), point, cache).await?;
        return Ok(Disk::over(stack, true));
    }
    if point.is_some() {
        return Err(internal::not_qcow2());
    }
    let mut layers = lower(&dir, chain).await?;
    layers.push(read_layer(&dir, top, chain, cache).await?);
    Disk::new(layers, true)
}

/// Whether the disk is a qcow2 image that says itself what it stands on.
fn is_bare_qcow2(chain: &Chain) -> bool {
    chain.descriptor.is_none() && chain.top().format == Format::Qcow2
}

/// Every layer but the top, through the page cache: several disks may share them.
async fn lower(dir: impl AsFd, chain: &Chain) -> Result<Vec<AnyLayer<FileStore>>> {
    let mut layers = Vec::new();
    for layer in chain.layers.iter().take(chain.layers.len() - 1) {
        layers.push(read_layer(&dir, layer, chain, Cache::Writeback).await?);
    }
    Ok(layers)
}

async fn read_layer(
    dir: impl AsFd,
    file: &LayerFile,
    chain: &Chain,
    cache: Cache,
) -> Result<AnyLayer<FileStore>> {
    let fd = beneath::open_file(dir, Path::new(&file.name), Access::Read)?;
    let store = store(fd, Path::new(&file.name), file.format, cache)?;
    let opened = delta::read(store, file.format, chain.cluster).await;
    opened.map_err(|e| e.at(file.display()))
}

/// Waits until nothing is on its way any more to the layer that the top was about to be merged into.
/// A predecessor that died doing that could still change what that layer has, and a top forgets what
/// is discarded where no other layer has anything. Blocks.
fn await_target(dir: impl AsFd, chain: &Chain, patience: Duration) -> Result<()> {
    let Some(target) = chain.target() else {
        return Ok(());
    };
    match Top::fenced(dir, target, patience) {
        // Read-only is what several disks share: nothing is merged into that.
        Err(e) if e.kind() == Kind::Privilege => Ok(()),
        fenced => fenced.map(drop),
    }
}

/// A lower layer that was not closed may lack what the layers above were written over, unless it is
/// one that these are merged into.
fn refuse_dirty(layer: &AnyLayer<FileStore>, file: &LayerFile) -> Result<()> {
    match file.marked {
        true => Ok(()),
        false => refuse_unclosed(layer).map_err(|e| e.at(file.display())),
    }
}

fn refuse_unclosed(layer: &AnyLayer<FileStore>) -> Result<()> {
    match delta::is_unclosed(layer) {
        true => Err(Error::damaged(
            "this lower layer was not closed; check it before anything is written above it",
        )),
        false => Ok(()),
    }
}
