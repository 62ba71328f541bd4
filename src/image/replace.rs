//! Replace: a frozen delta gets another file, which holds the same.
//!
//! In order: the change is announced in which the point has the new file, that file gets its name in
//! the disk's folder (one more name where it is of the same file system, else a copy), the two are
//! compared as a guest reads them, and the change is committed. The old file goes, and the name that
//! the new one had.
//!
//! What is compared is what is committed. Cut before that, the file is where it was. Cut after it, the
//! file may still have its old name, too, and whoever merges takes it for one that other disks share:
//! the same command says so ([`refuse_own`]).

use super::change::{self, Change};
use super::newfile::NewFile;
use super::snapshot::copy::{self, Work};
use super::snapshot::layers;
use crate::io::folder::DirFolder;
use crate::stack::{AnyLayer, Stack};
use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder::{Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::progress::Progress;
use ploop_formats::raw::Raw;
use ploop_formats::store::Store;
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Error, Kind, Result, buf};

/// Bytes compared in one step.
const STEP: u64 = 1 << 20;
/// Unit in which a file is copied; any would do.
const COPY_CLUSTER: u64 = 64 << 10;

/// How the new file came to its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It was moved.
    Moved,
    /// It was copied, and is still where it was.
    Copied,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replaced {
    /// File that the point had.
    pub old: String,
    /// File that it has.
    pub new: String,
    /// How that came there.
    pub way: Way,
}

/// The new file, where it is now. The caller has it for himself.
#[derive(Debug)]
pub struct Source<'a, F> {
    /// Its folder.
    pub from: &'a F,
    /// Its name there.
    pub name: &'a str,
    /// How it comes to the disk.
    pub way: Way,
}

/// A replacement that lacks nothing but its commit.
#[derive(Debug)]
#[must_use = "an announced change is committed or undone"]
pub struct Prepared<'f, F: Folder> {
    /// What is committed.
    pub change: Change<'f, F>,
    /// What will have been done.
    pub replaced: Replaced,
}

/// Replaces the file of point `uuid` of a disk that is not attached. `Invalid` when the new one does
/// not hold the same: then nothing was changed.
pub async fn offline<F: Folder>(
    folder: &F,
    uuid: Guid,
    source: &Source<'_, F>,
    random: Guid,
    work: &mut Work<'_>,
) -> Result<Replaced> {
    let disk = change::settle(folder).await?;
    let prepared = prepare(folder, &disk, uuid, source, random, work).await?;
    prepared.change.commit().await?;
    source.leave().await;
    Ok(prepared.replaced)
}

/// Refuses a file that the point has already. A replacement that was cut after its commit leaves one, and so
/// does whoever keeps a second name of it on purpose: which, nobody knows, so no name is taken away.
pub async fn refuse_own(
    folder: &DirFolder,
    disk: &Descriptor,
    uuid: Guid,
    new: &NewFile,
) -> Result<()> {
    let file = layers::image(disk, uuid)?.file;
    match new.is(folder, &file)? {
        false => Ok(()),
        true => Err(Error::new(
            Kind::Exists,
            format!(
                "{}: the snapshot has this very file already, as {file}, and nothing is to be done; \
                 remove the name if a replacement was interrupted, because with it the file is taken \
                 for one that disks share",
                new.name()
            ),
        )),
    }
}

/// All but the commit, of a disk that is running or not. After an error it is as it was. `disk` is what
/// [`change::settle`] gave.
pub async fn prepare<'f, F: Folder>(
    folder: &'f F,
    disk: &Descriptor,
    uuid: Guid,
    source: &Source<'_, F>,
    random: Guid,
    work: &mut Work<'_>,
) -> Result<Prepared<'f, F>> {
    let old = layers::image(disk, uuid)?;
    if uuid == disk.top() {
        return Err(Error::invalid(format!(
            "{} is the top, which is written: what is replaced is a snapshot's file",
            uuid.bare()
        )));
    }
    refuse_shared(source.from, source.name).await?;
    let file = disk.new_file_name(random);
    let new = disk.edit(|e| e.set_file(uuid, &file))?;
    let change = Change::announce(folder, disk, new.clone()).await?;
    let made = async {
        source.bring(folder, &file, work).await?;
        refuse_different(folder, disk, &new, uuid, work)
            .await
            .map_err(|e| e.at(source.name))?;
        folder.sync().await
    };
    if let Err(e) = made.await {
        // What cannot be removed now is with the next command.
        let _ = change.undo().await;
        return Err(e);
    }
    let replaced = Replaced {
        old: old.file,
        new: file,
        way: source.way,
    };
    Ok(Prepared { change, replaced })
}

impl<F: Folder> Source<'_, F> {
    /// Takes the name away that a file had before the disk got it.
    pub async fn leave(&self) {
        if self.way == Way::Copied {
            return;
        }
        let gone = async {
            self.from.remove(self.name).await?;
            self.from.sync().await
        };
        if let Err(e) = gone.await {
            tracing::warn!(
                "{}: the disk has it, but its old name stays: {e}; remove it, or nothing is merged into the file",
                self.name
            );
        }
    }

    /// Gives the new file its place, durably but for its name.
    async fn bring(&self, folder: &F, file: &str, work: &mut Work<'_>) -> Result<()> {
        let Self { from, name, .. } = *self;
        if self.way == Way::Moved {
            from.set_shared(name, false).await?;
            from.link(name, folder, file).await?;
            // Whoever wrote it may not have waited for it.
            return folder.open(file, Access::Write).await?.flush().await;
        }
        let source = from.open(name, Access::Read).await?;
        let len = source.info().len;
        if !len.is_multiple_of(SECTOR) {
            return Err(Error::damaged(format!(
                "{name}: {len} bytes are no whole number of sectors"
            )));
        }
        let unit = ClusterSize::new(COPY_CLUSTER)?;
        let source = Stack::new(vec![AnyLayer::Raw(Raw::open_read(source, unit)?)])?;
        let target = folder.create(file).await?;
        target.lengthen(len).await?;
        let target = AnyLayer::Raw(Raw::open_write(target, unit, Ledger::local())?);
        copy::flatten(&source, &target, work).await?;
        target.close().await
    }
}

/// A file with several names may be written by somebody who knows another.
async fn refuse_shared<F: Folder>(from: &F, name: &str) -> Result<()> {
    layers::refuse_names(from, name, |n| {
        let what =
            format!("{name}: it has {n} names, so others may have it, too; make a copy of it");
        Error::unsupported(what)
    })
    .await
}

/// Refuses a file through which a guest would read something else, or of another shape.
async fn refuse_different<F: Folder>(
    folder: &F,
    old: &Descriptor,
    new: &Descriptor,
    uuid: Guid,
    work: &mut Work<'_>,
) -> Result<()> {
    let (is, was) = (
        chain(folder, new, uuid).await?,
        chain(folder, old, uuid).await?,
    );
    refuse_other_shape(is.top(), was.top())?;
    let total = was.top().geometry().size;
    let mut at = 0;
    while at < total {
        let len = STEP.min(total - at);
        let (is_there, was_there) = (
            is.resolve(at, len, is.depth()).await?,
            was.resolve(at, len, was.depth()).await?,
        );
        let len = is_there.len.min(was_there.len);
        // Zeros, or the same place of the same file.
        let lower = |layer: Option<usize>| layer.is_some_and(|layer| layer + 1 < was.depth());
        let both_zero = is_there.is_zero() && was_there.is_zero();
        let same = is_there.layer == was_there.layer && is_there.content == was_there.content;
        if !(both_zero || same && lower(was_there.layer)) {
            compare(&is, &was, at, len).await?;
        }
        at += len;
        work.watch().tell(Progress {
            phase: "comparing",
            done: at,
            total,
        })?;
        work.wait(len).await;
    }
    Ok(())
}

async fn compare<S: Store>(is: &Stack<S>, was: &Stack<S>, at: u64, len: u64) -> Result<()> {
    let read = async |stack: &Stack<S>| {
        let buf = buf::aligned(len as usize);
        stack.read(at, buf, stack.depth()).await
    };
    let (now, before) = (read(is).await?, read(was).await?);
    match now.iter().zip(&before).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(n) => Err(Error::invalid(format!(
            "it is no copy of the snapshot's file: guest offset {} reads as something else; nothing \
             was changed",
            at + n as u64
        ))),
    }
}

fn refuse_other_shape<S: Store>(is: &AnyLayer<S>, was: &AnyLayer<S>) -> Result<()> {
    let version = |layer: &AnyLayer<S>| match layer {
        AnyLayer::Ploop(ploop) => Some(ploop.header().version),
        AnyLayer::Raw(_) | AnyLayer::Qcow2(_) => None,
    };
    let (now, before) = (is.geometry(), was.geometry());
    let what = match () {
        () if now.size != before.size => format!("{} bytes, not {}", now.size, before.size),
        () if now.cluster != before.cluster => format!(
            "clusters of {} bytes, not {}",
            now.cluster.bytes(),
            before.cluster.bytes()
        ),
        () if version(is) != version(was) => "another format version".into(),
        () => return Ok(()),
    };
    Err(Error::invalid(format!(
        "it is no copy of the snapshot's file: {what}; nothing was changed"
    )))
}

/// What a point reads as; all of it must have been closed.
async fn chain<F: Folder>(folder: &F, disk: &Descriptor, uuid: Guid) -> Result<Stack<F::File>> {
    let mut open = Vec::new();
    for image in disk.chain(uuid)? {
        let layer = layers::open_read(folder, disk, &image).await?;
        layers::refuse_unclosed(&layer, &image)?;
        open.push(layer);
    }
    Stack::new(open)
}
