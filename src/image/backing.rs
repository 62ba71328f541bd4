//! Backing: a bare qcow2 image with those that it names, which are only read but for its data file.
//!
//! An image is data from anywhere. Each name in it has passed the policy before it is opened, leads to
//! a regular file in or below the folder of the image that says it, through no link.
//! Formats are stated, and never guessed. No file is used twice, which ends every circle. Writers are
//! kept from all files but the top, which whoever opens the disk has locked. This reads images, so it
//! runs in the sandbox.

use super::chain::RAW_CLUSTER;
use super::open;
use super::snapshot::internal;
use super::target::Format;
use crate::io::beneath::{self, Access};
use crate::io::file::{Cache, FileStore};
use crate::io::lock;
use crate::policy;
use crate::stack::{AnyLayer, Stack};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Ploop;
use ploop_formats::qcow2::extension::printable;
use ploop_formats::qcow2::{Header, Qcow2, read_header};
use ploop_formats::raw::Raw;
use ploop_formats::store::Store;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Error, Result, limits};
use rustix::fs::fstat;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Opens the image `top` in `dir` for reading, and what it stands on. `cache` is for the top and its
/// data; what is below is read through the page cache, because others may read it, too.
pub async fn open_read(dir: BorrowedFd<'_>, top: &Path, cache: Cache) -> Result<Stack<FileStore>> {
    open_at(dir, top, None, cache).await
}

/// The same as it was at `point`, the name or ID of a snapshot that the image keeps in itself. What it
/// stands on is as it is now.
pub async fn open_at(
    dir: BorrowedFd<'_>,
    top: &Path,
    point: Option<&str>,
    cache: Cache,
) -> Result<Stack<FileStore>> {
    let mut files = Files::new(dir);
    let place = |e: Error| e.at(top.display());
    let store = files.open(top, Cache::Writeback, Hold::Held);
    let store = store.map_err(place)?;
    let header = read_header(&store).await.map_err(place)?;
    let opened = files.qcow2(top, store, &header, cache, Hold::Held).await;
    let mut image = opened.map_err(place)?;
    if let Some(point) = point {
        let all = image.snapshots().await.map_err(place)?;
        let found = internal::find(&all, point).map_err(place)?;
        image = image.at_snapshot(found).map_err(place)?;
    }
    files.stack(top, &header, image).await
}

/// The same as it is, for writing: `store` is that of the top, which is nobody else's, and `ledger`
/// outlives this process. An external data file is taken for this process alone, once a
/// predecessor's last writes to it have landed, for which `patience` is waited. What the top stands
/// on is only read.
pub async fn open_write(
    dir: BorrowedFd<'_>,
    top: &Path,
    store: FileStore,
    ledger: Ledger,
    patience: Duration,
) -> Result<Stack<FileStore>> {
    let mut files = Files::new(dir);
    let place = |e: Error| e.at(top.display());
    // It counts as used.
    let again = files.open(top, Cache::Writeback, Hold::Held);
    drop(again.map_err(place)?);
    let header = read_header(&store).await.map_err(place)?;
    let data = files.data_to_write(top, &header, store.cache(), patience);
    let opened = Qcow2::open_write(store, data.map_err(place)?, ledger).await;
    files.stack(top, &header, opened.map_err(place)?).await
}

/// Opens the external data file of the image `top`, if it has one, to be written by this process alone,
/// as [`open_write`] does. The image itself is nobody else's. Blocks.
pub fn open_data(
    dir: BorrowedFd<'_>,
    top: &Path,
    header: &Header,
    patience: Duration,
) -> Result<Option<FileStore>> {
    let mut files = Files::new(dir);
    // It counts as used.
    drop(files.open(top, Cache::Writeback, Hold::Held)?);
    files.data_to_write(top, header, Cache::Writeback, patience)
}

/// Name, from the top's folder, and format of what an image stands on.
fn backing_of(image: &Path, header: &Header) -> Result<Option<(PathBuf, Format)>> {
    let Some(name) = &header.backing else {
        return Ok(None);
    };
    let file = beside(image, name)?;
    let state = "`qemu-img rebase -u -b NAME -F FORMAT IMAGE` states it";
    let format = match header.backing_format() {
        Some(b"qcow2") => Format::Qcow2,
        Some(b"raw") => Format::Raw,
        // QEMU's name for the format that ploop's images have.
        Some(b"ploop" | b"parallels") => Format::Ploop,
        None => {
            return Err(Error::unsupported(format!(
                "does not say which format its backing file \"{}\" has, and formats are never guessed; \
                 {state}",
                printable(name)
            )));
        }
        Some(other) => {
            return Err(Error::unsupported(format!(
                "its backing file \"{}\" is of format \"{}\", and only qcow2, raw and ploop (which QEMU \
                 calls parallels) are read; if it is one of them, {state}",
                printable(name),
                printable(other)
            )));
        }
    };
    Ok(Some((file, format)))
}

/// The external data file of an image, from the top's folder; it must be given by name.
fn data_of(image: &Path, header: &Header) -> Result<Option<PathBuf>> {
    match (header.has_data_file(), header.data_file()) {
        (false, _) => Ok(None),
        (true, Some(data)) => beside(image, data).map(Some),
        (true, None) => Err(Error::unsupported(
            "its data is in another file, and it does not say in which",
        )),
    }
}

/// A name that an image says, from the top's folder.
fn beside(image: &Path, name: &[u8]) -> Result<PathBuf> {
    let name = policy::allow_beneath(name)?;
    Ok(image.parent().unwrap_or(Path::new("")).join(name))
}

/// Who keeps writers from a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// It is locked already.
    Held,
    /// Nobody yet.
    Shared,
}

/// The files of a chain.
struct Files<'a> {
    dir: BorrowedFd<'a>,
    /// Those that are open, by device and inode.
    used: BTreeSet<(u64, u64)>,
}

impl<'a> Files<'a> {
    const fn new(dir: BorrowedFd<'a>) -> Self {
        Self {
            dir,
            used: BTreeSet::new(),
        }
    }

    /// The image `top`, with what it stands on.
    async fn stack(
        &mut self,
        top: &Path,
        header: &Header,
        image: Qcow2<FileStore>,
    ) -> Result<Stack<FileStore>> {
        let mut layers = vec![Arc::new(AnyLayer::Qcow2(Box::new(image)))];
        let mut next = backing_of(top, header).map_err(|e| e.at(top.display()))?;
        while let Some((name, format)) = next.take() {
            if layers.len() == limits::DEPTH_MAX {
                let what = format!("stands on more than {} images", limits::DEPTH_MAX - 1);
                return Err(Error::unsupported(what).at(top.display()));
            }
            let place = |e: Error| e.at(name.display());
            let store = self.open(&name, Cache::Writeback, Hold::Shared);
            let store = store.map_err(place)?;
            layers.push(Arc::new(match format {
                Format::Ploop => AnyLayer::Ploop(Ploop::open_read(store).await.map_err(place)?),
                Format::Raw => {
                    AnyLayer::Raw(Raw::open_backing(store, ClusterSize::new(RAW_CLUSTER)?))
                }
                Format::Qcow2 => {
                    let header = read_header(&store).await.map_err(place)?;
                    next = backing_of(&name, &header).map_err(place)?;
                    let (cache, hold) = (Cache::Writeback, Hold::Shared);
                    let opened = self.qcow2(&name, store, &header, cache, hold).await;
                    AnyLayer::Qcow2(Box::new(opened.map_err(place)?))
                }
            }));
        }
        layers.reverse();
        Stack::of_chain(layers)
    }

    /// Opens one that was not used before.
    fn open(&mut self, name: &Path, cache: Cache, hold: Hold) -> Result<FileStore> {
        let fd = self.open_again(name, hold)?;
        self.use_once(&fd)?;
        FileStore::new(fd, name, cache)
    }

    /// Refuses a file that was used before.
    fn use_once(&mut self, fd: impl AsFd) -> Result<()> {
        let found = fstat(&fd).map_err(io::Error::from)?;
        match self.used.insert((found.st_dev, found.st_ino)) {
            true => Ok(()),
            false => Err(Error::damaged(
                "the chain of backing files comes back to this file",
            )),
        }
    }

    /// Opens the external data file of the top for writing, alone. Blocks.
    fn data_to_write(
        &mut self,
        top: &Path,
        header: &Header,
        cache: Cache,
        patience: Duration,
    ) -> Result<Option<FileStore>> {
        let Some(file) = data_of(top, header)? else {
            return Ok(None);
        };
        let place = |e: Error| e.at(file.display());
        let fd = open::fenced(self.dir, &file, patience).map_err(place)?;
        // The lock is on the description, which the store goes on to have.
        let copy = fd.try_clone()?;
        drop(lock::own_top(copy).map_err(place)?);
        self.use_once(&fd).map_err(place)?;
        let piece = header.layout()?.piece();
        let cache = if piece < limits::PAGE {
            Cache::Writeback
        } else {
            cache
        };
        FileStore::new(fd, &file, cache).map(Some)
    }

    fn open_again(&self, name: &Path, hold: Hold) -> Result<OwnedFd> {
        let fd = beneath::open_file(self.dir, name, Access::Read)?;
        if hold == Hold::Shared {
            // The lock is on the description, which the store goes on to have.
            drop(lock::share_top(fd.try_clone()?)?);
        }
        Ok(fd)
    }

    /// Opens the image that is in `store`, and its data file, which must be given by name.
    async fn qcow2(
        &mut self,
        name: &Path,
        store: FileStore,
        header: &Header,
        cache: Cache,
        hold: Hold,
    ) -> Result<Qcow2<FileStore>> {
        let piece = header.layout()?.piece();
        let data = match data_of(name, header)? {
            None => None,
            Some(file) => {
                let opened = self.open(&file, Cache::Writeback, Hold::Shared);
                let opened = opened.map_err(|e| e.at(file.display()))?;
                Some(self.in_mode(&file, opened, cache, piece, Hold::Shared)?)
            }
        };
        let store = self.in_mode(name, store, cache, piece, hold)?;
        Qcow2::open_read(store, data).await
    }

    /// The file past the page cache, where that is wanted and possible, and the blocks of the storage
    /// are no larger than what is read of it at once.
    fn in_mode(
        &self,
        name: &Path,
        cached: FileStore,
        cache: Cache,
        piece: u64,
        hold: Hold,
    ) -> Result<FileStore> {
        if cache == Cache::Writeback {
            return Ok(cached);
        }
        let direct = FileStore::new(self.open_again(name, hold)?, name, cache)?;
        match direct.info().align <= piece {
            true => Ok(direct),
            false => Ok(cached),
        }
    }
}
