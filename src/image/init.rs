//! Init: a new disk appears whole or not at all.
//!
//! In order: the directory, the image and its fsync, whatever the caller puts into it, then the
//! descriptor aside, its fsync, its rename, the directory's fsync. A directory without a
//! descriptor is no disk to anyone, so a cut before the rename leaves nothing that could be
//! mistaken for one.

use super::change;
use super::members::{ASIDE, INCOMING, SEALED};
use super::target::DESCRIPTOR;
use crate::io::exec::{self, Engine};
use crate::io::file::{Cache, FileStore};

use ploop_formats::descriptor::{Chs, Descriptor, ImageType, NewDisk};
use ploop_formats::ploop::create;
use ploop_formats::ploop::header::{Header, Version, chs};
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::qcow2;
use ploop_formats::qcow2::pack::Packer;
use ploop_formats::store::Store;
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Name of a new disk's base image (ploop's own).
pub const IMAGE: &str = "root.hds";

/// What to make.
#[derive(Debug, Clone, Copy)]
pub struct New<'a> {
    /// The directory: absent, or empty, unless the image has a name of its own.
    pub dir: &'a Path,
    /// Name of the image in a directory that is there and may hold other things, but no disk;
    /// [`IMAGE`] in a directory of its own when there is none.
    pub beside: Option<&'a str>,
    /// Virtual size in bytes; rounded up to a cluster.
    pub size: u64,
    /// Unit of allocation.
    pub cluster: ClusterSize,
    /// Format version of the image.
    pub version: Version,
    /// What the image is.
    pub form: Form,
}

/// What a base image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A ploop image that grows as it is written to.
    Expanded,
    /// A ploop image that has all its space.
    Preallocated,
    /// A flat file, with all its space or, sparse, with none yet.
    Raw {
        /// Whether space is taken only as it is written to.
        sparse: bool,
    },
    /// A qcow2 image; clusters of 2 MiB at most.
    Qcow2 {
        /// Whether it has all its space.
        preallocate: bool,
    },
}

/// Bytes of a qcow2 image that get their space between two reports.
const RESERVE_STEP: u64 = 1 << 30;

impl New<'_> {
    fn image(&self) -> &str {
        self.beside.unwrap_or(IMAGE)
    }
}

/// A disk that lacks its descriptor. Dropping it removes what was made.
#[derive(Debug)]
#[must_use = "without finish() the disk is removed"]
pub struct Draft {
    dir: PathBuf,
    made_dir: bool,
    image: String,
    /// What was made, or is about to be, and nobody else has.
    made: Vec<PathBuf>,
    descriptor: Descriptor,
    finished: bool,
}

/// A disk that was made.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its directory, absolute.
    pub dir: PathBuf,
    /// Virtual size in bytes.
    pub size: u64,
}

/// Makes the directory and the image. Whoever watches may end it; then nothing is left.
pub fn begin(new: &New<'_>, watch: &mut dyn Watch) -> Result<Draft> {
    let header = Header::new(new.version, new.size, new.cluster)?;
    let descriptor = describe(new, &header)?;
    let qcow2 = qcow2::create::Create::new(header.geometry().size, new.cluster);
    if let Form::Qcow2 { .. } = new.form {
        qcow2.update()?;
    }
    let made_dir = match new.beside {
        None => make_dir(new.dir)?,
        Some(name) if change::is_delta(name) => false,
        Some(name) => {
            let what = format!("{name:?} is no name for an image");
            return Err(Error::new(Kind::Usage, what));
        }
    };
    let dir = new
        .dir
        .canonicalize()
        .map_err(|e| Error::from(e).at(new.dir.display()))?;
    let mut draft = Draft {
        dir,
        made_dir,
        image: new.image().to_string(),
        made: Vec::new(),
        descriptor,
        finished: false,
    };
    draft.refuse_disk()?;
    let image = draft.image();
    let place = |e: Error| e.at(image.display());
    let file = create_image(&image).map_err(place)?;
    draft.made.push(image.clone());
    match new.form {
        Form::Raw { sparse } => fill_raw(&file, header.sectors, sparse),
        Form::Qcow2 { preallocate } => {
            fill_image(file, &image, preallocate, async |store| match preallocate {
                true => reserve_all(store, &qcow2, watch).await,
                false => qcow2::create::create(store, &qcow2).await,
            })
        }
        Form::Preallocated => fill_image(file, &image, true, async |store| {
            create::create_preallocated_watched(store, &header, watch).await
        }),
        Form::Expanded => fill_image(file, &image, false, async |store| {
            create::create(store, &header).await
        }),
    }
    .map_err(place)?;
    Ok(draft)
}

fn describe(new: &New<'_>, header: &Header) -> Result<Descriptor> {
    let (heads, sectors, cylinders) = chs(header.sectors);
    Descriptor::new_disk(&NewDisk {
        sectors: header.sectors,
        cluster: new.cluster,
        kind: match new.form {
            Form::Raw { .. } => ImageType::Plain,
            Form::Qcow2 { .. } => ImageType::QCow2,
            Form::Expanded | Form::Preallocated => ImageType::Compressed,
        },
        file: new.image(),
        preallocated: new.form == Form::Preallocated,
        chs: Chs {
            cylinders: u64::from(cylinders),
            heads: u64::from(heads),
            sectors: u64::from(sectors),
        },
    })
}

/// Makes the directory; whether it was made, and not empty already.
pub(super) fn make_dir(dir: &Path) -> Result<bool> {
    let at = |e: io::Error| Error::from(e).at(dir.display());
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(at(e)),
        Err(_) => {
            if !fs::metadata(dir).map_err(at)?.is_dir() {
                let what = format!("{}: exists and is not a directory", dir.display());
                return Err(Error::new(Kind::Exists, what));
            }
            if fs::read_dir(dir).map_err(at)?.next().is_some() {
                let what = format!("{}: not empty; a new disk needs a new place", dir.display());
                return Err(Error::new(Kind::Exists, what));
            }
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(at)?;
            Ok(false)
        }
    }
}

fn create_image(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let new = options.read(true).write(true).create_new(true).mode(0o600);
    Ok(new.open(path)?)
}

fn fill_raw(file: &File, sectors: u64, sparse: bool) -> Result<()> {
    let len = sectors.saturating_mul(SECTOR);
    file.set_len(len)?;
    if !sparse {
        let reserved = fallocate(file, FallocateFlags::empty(), 0, len);
        reserved.map_err(|e| Error::from(io::Error::from(e)).at("reserving space"))?;
    }
    Ok(file.sync_all()?)
}

/// Makes an image in an empty file; one that is preallocated has all of its space.
fn fill_image(
    file: File,
    path: &Path,
    preallocate: bool,
    fill: impl AsyncFnOnce(&FileStore) -> Result<()>,
) -> Result<()> {
    let reserve = file.try_clone()?;
    let store = FileStore::new(file.into(), path, Cache::Writeback)?;
    exec::run(Engine::Poll, async {
        fill(&store).await?;
        store.settle().await;
        Ok::<(), Error>(())
    })??;
    // The tables have their space from the start: a full host disk must never stop an index write.
    keep_space(&reserve, preallocate)
}

/// Takes the space of all that a file has, durably; a storage that cannot is an error only where it
/// `must`.
fn keep_space(file: &File, must: bool) -> Result<()> {
    let len = file.metadata()?.len();
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(e) if must || matches!(e, Errno::NOSPC | Errno::DQUOT) => {
            Err(Error::from(io::Error::from(e)).at("reserving space"))
        }
        _ => Ok(file.sync_all()?),
    }
}

/// An image in which every cluster has its place and its space.
async fn reserve_all<S: Store>(
    store: &S,
    wanted: &qcow2::create::Create,
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut packer = Packer::new(store, wanted)?;
    let mut at = 0;
    while at < wanted.size {
        let len = RESERVE_STEP.min(wanted.size - at);
        packer.reserve(at, len).await?;
        at += len;
        watch.tell(Progress {
            phase: "reserving space",
            done: at,
            total: wanted.size,
        })?;
    }
    packer.finish().await
}

impl Draft {
    /// The image file.
    pub fn image(&self) -> PathBuf {
        self.dir.join(&self.image)
    }

    /// A directory with a disk in it, or with half of one, is no place for another.
    fn refuse_disk(&self) -> Result<()> {
        let there = |name: &&&str| fs::symlink_metadata(self.dir.join(name)).is_ok();
        match [DESCRIPTOR, ASIDE, SEALED, INCOMING].iter().find(there) {
            None => Ok(()),
            Some(name) => Err(Error::new(
                Kind::Exists,
                format!("{}: there is a {name} already", self.dir.display()),
            )),
        }
    }

    /// Writes the descriptor: from now on it is a disk.
    pub fn finish(mut self) -> Result<Made> {
        self.refuse_disk()?;
        // The descriptor, too: its rename may have been done, and only the last fsync failed.
        let files = [DESCRIPTOR, ASIDE].map(|name| self.dir.join(name));
        self.made.splice(..0, files);
        write_descriptor(&self.dir, &self.descriptor)?;
        self.finished = true;
        let size = self.descriptor.sectors().saturating_mul(SECTOR);
        Ok(Made {
            dir: self.dir.clone(),
            size,
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for file in &self.made {
            let _ = fs::remove_file(file);
        }
        if self.made_dir {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Replaces the descriptor of `dir`: old or new at any cut, and durably new when it returns.
pub(super) fn write_descriptor(dir: &Path, descriptor: &Descriptor) -> Result<()> {
    let aside = dir.join(ASIDE);
    let at = |e: io::Error| Error::from(e).at(aside.display());
    let mut file = OpenOptions::new();
    let mut file = file
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .map_err(at)?;
    file.write_all(&descriptor.encode()).map_err(at)?;
    file.sync_all().map_err(at)?;
    fs::rename(&aside, dir.join(DESCRIPTOR)).map_err(at)?;
    sync_dir(dir)?;
    // The directory's own name, when it is new.
    match dir.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|d| d.sync_all());
    synced.map_err(|e| Error::from(e).at(dir.display()))
}
