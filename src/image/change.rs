//! Change: how a disk goes from one descriptor to the next. At any cut it is the old disk or the
//! new one, and no file stays behind that nobody knows.
//!
//! In order:
//!
//! 1. [`Change::announce`]: the new descriptor is written as [`NEXT`] and fsynced. Where the change
//!    drops files, the old descriptor gets [`LAST`] as one more name. The directory is fsynced.
//! 2. The caller makes the files that NEXT names and nobody else ([`Change::add_delta`]), and has
//!    the directory fsynced with them. What the descriptor will call frozen is closed and clean.
//! 3. [`Change::commit`]: NEXT is renamed over the descriptor, and the directory is fsynced. From
//!    the rename on it is the new disk.
//! 4. Files that LAST names and the descriptor does not are removed, the directory is fsynced, and
//!    LAST goes.
//!
//! Who is interrupted leaves NEXT or LAST. [`settle`], which comes first in every change, removes
//! what they name and the descriptor does not: before the rename that undoes the change, after it
//! that finishes it. The names are our own, so nothing is removed that another program wrote down.

use super::convert::version;
use super::kept;
use super::members;
use super::snapshot::names;
use super::target::DESCRIPTOR;
use super::views;
use crate::io::lock::DISK_LOCK;
use crate::policy;
use ploop_formats::descriptor::{Descriptor, ImageType};
use ploop_formats::folder::{self, Folder};
use ploop_formats::ploop::create;
use ploop_formats::ploop::header::{Header, Version};
use ploop_formats::qcow2::create::Create;
use ploop_formats::store::{Space, Store};
use ploop_formats::units::SECTOR;
use ploop_formats::{Error, Kind, Result, limits, qcow2};

/// The descriptor that a change leads to.
pub const NEXT: &str = "DiskDescriptor.xml.next";
/// The descriptor that a change came from, when files of it are to go.
pub const LAST: &str = "DiskDescriptor.xml.last";

/// Reads the descriptor of a folder.
pub async fn read<F: Folder>(folder: &F, name: &str) -> Result<Descriptor> {
    let bytes = folder::load(folder, name, limits::DESCRIPTOR_MAX).await?;
    Descriptor::parse(&bytes).map_err(|e| e.at(name))
}

/// Finishes or undoes what an interrupted change left; the descriptor that holds. The caller has
/// the disk to itself, or is the one who changes it while it is attached.
pub async fn settle<F: Folder>(folder: &F) -> Result<Descriptor> {
    // A rename that is seen may still be lost, and with it all that would be decided by it.
    folder.sync().await?;
    settle_synced(folder).await
}

/// As [`settle`], for a caller who has the disk to himself and had its folder fsynced since.
pub async fn settle_synced<F: Folder>(folder: &F) -> Result<Descriptor> {
    let now = read(folder, DESCRIPTOR).await?;
    version::settle(folder, &now).await?;
    for record in [NEXT, LAST] {
        if !folder::has(folder, record).await? {
            continue;
        }
        match read(folder, record).await {
            Ok(other) => drop_files(folder, &other, &now).await?,
            // It was cut before its fsync, so nothing was done for it.
            Err(e) if matches!(e.kind(), Kind::Damaged | Kind::Unsupported) => {}
            Err(e) => return Err(e),
        }
        folder.remove(record).await?;
    }
    Ok(now)
}

/// Names in a disk's folder that are no delta's, whatever a descriptor says.
const RESERVED: [&str; 17] = [
    DESCRIPTOR,
    NEXT,
    LAST,
    members::ASIDE,
    members::DELETED,
    members::STATS,
    DISK_LOCK,
    names::FILE,
    names::ASIDE,
    kept::FILE,
    kept::ASIDE,
    views::FOLDER,
    members::MIGRATION,
    members::MIGRATION_ASIDE,
    members::WITNESS,
    members::SEALED,
    members::INCOMING,
];

/// Whether a delta may have this name: a record that comes with a foreign disk may name anything.
pub(crate) fn is_delta(name: &str) -> bool {
    policy::allow(name).is_ok() && !RESERVED.contains(&name)
}

/// Removes the files that `from` names and `to` does not, for good.
async fn drop_files<F: Folder>(folder: &F, from: &Descriptor, to: &Descriptor) -> Result<()> {
    for file in from.files_not_in(to).filter(|file| is_delta(file)) {
        folder.remove(file).await?;
    }
    folder.sync().await
}

/// What a new delta is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Format version of a ploop delta: that of the layers below.
    pub version: Version,
    /// Virtual size in bytes.
    pub size: u64,
    /// Whether the entries of a qcow2 delta tell of subclusters: as those of the one below.
    pub subclusters: bool,
}

/// A change that was announced and is not done.
#[derive(Debug)]
#[must_use = "an announced change is committed, or undone by settle()"]
pub struct Change<'f, F> {
    folder: &'f F,
    old: Descriptor,
    new: Descriptor,
}

impl<'f, F: Folder> Change<'f, F> {
    /// Step 1. `old` is what [`settle`] gave.
    pub async fn announce(folder: &'f F, old: &Descriptor, new: Descriptor) -> Result<Self> {
        let change = Self {
            folder,
            old: old.clone(),
            new,
        };
        if let Err(e) = change.write_down().await {
            // Nothing was done yet; what cannot be removed now is with the next command.
            let _ = settle(folder).await;
            return Err(e);
        }
        Ok(change)
    }

    async fn write_down(&self) -> Result<()> {
        folder::save(self.folder, NEXT, &self.new.encode()).await?;
        if self.old.files_not_in(&self.new).next().is_some() {
            self.folder.link(DESCRIPTOR, self.folder, LAST).await?;
        }
        self.folder.sync().await
    }

    /// The descriptor that it leads to.
    pub const fn new_descriptor(&self) -> &Descriptor {
        &self.new
    }

    /// Step 2: an empty delta, durable with its name.
    pub async fn add_delta(&self, name: &str, shape: Shape) -> Result<F::File> {
        let file = new_delta(self.folder, name, &self.new, shape).await?;
        self.folder.sync().await?;
        Ok(file)
    }

    /// Steps 3 and 4. An error says what holds: [`Uncommitted`] or not.
    pub async fn commit(self) -> std::result::Result<Descriptor, Uncommitted> {
        let Self { folder, old, new } = self;
        if let Err(e) = folder.rename(NEXT, DESCRIPTOR).await {
            return Err(judge(folder, &old, e).await);
        }
        if let Err(e) = folder.sync().await {
            return Err(Uncommitted::Unknown(e));
        }
        if let Err(e) = finish(folder, &old, &new).await {
            tracing::warn!("files that are not needed any more stay until the next command: {e}");
        }
        Ok(new)
    }

    /// Undoes an announced change.
    pub async fn undo(self) -> Result<()> {
        settle(self.folder).await.map(|_| ())
    }
}

async fn finish<F: Folder>(folder: &F, old: &Descriptor, new: &Descriptor) -> Result<()> {
    if old.files_not_in(new).next().is_some() {
        drop_files(folder, old, new).await?;
        folder.remove(LAST).await?;
    }
    Ok(())
}

/// Why a change was not committed.
#[derive(Debug)]
pub enum Uncommitted {
    /// It is the old disk.
    Old(Error),
    /// Nobody knows which of the two a power cut would leave.
    Unknown(Error),
}

impl From<Uncommitted> for Error {
    fn from(why: Uncommitted) -> Self {
        match why {
            Uncommitted::Old(e) => e,
            Uncommitted::Unknown(e) => e.at("it is not known whether the change would survive"),
        }
    }
}

/// A rename that failed: did it?
async fn judge<F: Folder>(folder: &F, old: &Descriptor, why: Error) -> Uncommitted {
    match read(folder, DESCRIPTOR).await {
        Ok(now) if now == *old => Uncommitted::Old(why),
        _ => Uncommitted::Unknown(why),
    }
}

/// Makes the empty delta that is to be the top of a disk, durably but for its name.
pub async fn new_delta<F: Folder>(
    folder: &F,
    name: &str,
    disk: &Descriptor,
    shape: Shape,
) -> Result<F::File> {
    let file = folder.create(name).await?;
    fill_delta(&file, disk, shape)
        .await
        .map_err(|e| e.at(name))?;
    Ok(file)
}

/// The same in a file that was just made: of the type that the disk's descriptor says.
pub async fn fill_delta<S: Store>(file: &S, disk: &Descriptor, shape: Shape) -> Result<()> {
    match disk.image(disk.top()).map(|top| top.kind) {
        Some(ImageType::QCow2) => fill_qcow2(file, disk, shape).await,
        _ => fill_ploop(file, disk, shape).await,
    }
}

/// The same, a qcow2 image whatever the descriptor says.
pub async fn fill_qcow2<S: Store>(file: &S, disk: &Descriptor, shape: Shape) -> Result<()> {
    // What it stands on, the descriptor says.
    let wanted = Create {
        extended: shape.subclusters,
        ..Create::new(shape.size, disk.cluster())
    };
    qcow2::create::create(file, &wanted).await
}

/// The same, a ploop image. Its table has its space from the start: a full host must never stop an
/// index write.
pub async fn fill_ploop<S: Store>(file: &S, disk: &Descriptor, shape: Shape) -> Result<()> {
    let header = Header::new(shape.version, shape.size, disk.cluster())?;
    let len = create::blank_len(&header);
    let table = len.saturating_sub(limits::PAGE);
    file.set_len(len).await?;
    file.punch(limits::PAGE, table, Space::Keep).await?;
    create::blank(&header).apply(file).await
}

/// Bytes of a disk, as its descriptor has them.
pub fn size(disk: &Descriptor) -> u64 {
    disk.sectors().saturating_mul(SECTOR)
}
