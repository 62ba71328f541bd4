//! Version: the format version of all deltas of a disk is changed, where they are.
//!
//! In order, each step durable before the next begins:
//!
//! 1. A change is announced whose descriptor is the old one: nobody makes a clone meanwhile, and what
//!    is left is known to be ours. Each delta's header and table are copied to `IMAGE.idx`.
//! 2. Each delta is marked: it is in use, and its format is being converted. The deciding one is
//!    marked first. Whoever opens a marked delta refuses it.
//! 3. The table of each is written in the other unit.
//! 4. The marks are taken away, from the deciding one last: from then on it is the new version.
//! 5. The copies go, and then the record of the change.
//!
//! [`settle`], which comes first in every change, undoes all while any delta is marked, the deciding
//! one last, and else takes the copies away. The deciding one is the lowest delta of the disk's own
//! chain: whoever opens the disk as it is now opens that, too, so nothing can have been written to
//! what is undone.
//!
//! These are the steps, names and marks of the original ploop (reference 1.9), so that each undoes
//! what the other left. A file that other disks have, too, is written by nobody.

use crate::image::change::{self, Change, NEXT};
use crate::image::snapshot::layers;
use ploop_formats::descriptor::{Descriptor, LayerFormat};
use ploop_formats::folder::{self, Access, Folder};
use ploop_formats::ploop::convert::{self, Plan};
use ploop_formats::ploop::header::Version;
use ploop_formats::progress::Watch;
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};

/// Where the table of an image is copied to, as ploop calls it.
pub fn copy_name(image: &str) -> String {
    format!("{image}.idx")
}

/// The ploop deltas among a disk's files, the deciding one last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deltas(Vec<String>);

impl Deltas {
    /// Those of a disk; none when it is one raw image.
    pub fn of(disk: &Descriptor) -> Result<Self> {
        let mut deciding = disk.chain(disk.top())?.into_iter();
        let deciding = deciding.find(|image| image.format == LayerFormat::Ploop);
        let mut files = Vec::new();
        for image in disk.images() {
            let format = layers::image(disk, image.guid)?.format;
            let decides = deciding.as_ref().is_some_and(|d| d.guid == image.guid);
            if format == LayerFormat::Ploop && !decides {
                files.push(image.file.clone());
            }
        }
        files.extend(deciding.map(|image| image.file));
        Ok(Self(files))
    }

    /// A bare image.
    pub fn one(file: &str) -> Self {
        Self(vec![file.to_string()])
    }

    /// Their file names.
    pub fn names(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// Converts a disk that is not attached; whether anything had to be done.
///
/// `Unsupported` when a delta does not fit version 1, or other disks have it, too: then nothing was
/// changed. After any error the disk is what it was, or the next command undoes the rest.
pub async fn offline<F: Folder>(folder: &F, to: Version, watch: &mut dyn Watch) -> Result<bool> {
    let disk = change::settle(folder).await?;
    let deltas = Deltas::of(&disk)?;
    if deltas.0.is_empty() {
        return Err(Error::unsupported(
            "only ploop images have a format version; `--to expanded` makes one of it",
        ));
    }
    if !is_needed(folder, &deltas, to).await? {
        return Ok(false);
    }
    for file in deltas.names() {
        refuse_shared(folder, file).await?;
    }
    layers::seal(folder, &disk).await?;
    let plans = plan(folder, &deltas, to, watch).await?;
    let change = Change::announce(folder, &disk, disk.clone()).await?;
    // A clone looks for the record after it has made its links, we for links after the record.
    for file in deltas.names() {
        if let Err(e) = refuse_shared(folder, file).await {
            change.undo().await?;
            return Err(e);
        }
    }
    let done = carry_out(folder, &deltas, &plans, watch).await;
    ended(done, change.undo().await)
}

/// Converts a bare image of which the caller has the locks; whether anything had to be done.
pub async fn bare<F: Folder>(
    folder: &F,
    file: &str,
    to: Version,
    watch: &mut dyn Watch,
) -> Result<bool> {
    let deltas = Deltas::one(file);
    settle_deltas(folder, &deltas, false).await?;
    if !is_needed(folder, &deltas, to).await? {
        return Ok(false);
    }
    refuse_shared(folder, file).await?;
    let plans = plan(folder, &deltas, to, watch).await?;
    let done = carry_out(folder, &deltas, &plans, watch).await;
    ended(done, settle_deltas(folder, &deltas, true).await)
}

/// What to say of a conversion and of the clearing up after it.
fn ended(done: Result<()>, settled: Result<()>) -> Result<bool> {
    done?;
    if let Err(e) = settled {
        tracing::warn!("converted; what is left of it goes with the next command: {e}");
    }
    Ok(true)
}

async fn is_needed<F: Folder>(folder: &F, deltas: &Deltas, to: Version) -> Result<bool> {
    for file in deltas.names() {
        let store = folder.open(file, Access::Read).await?;
        if convert::state(&store).await.map_err(|e| e.at(file))?.0 != to {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn refuse_shared<F: Folder>(folder: &F, file: &str) -> Result<()> {
    layers::refuse_names(folder, file, |n| {
        Error::unsupported(format!(
            "{file}: {n} disks have this file, so it is not written; `--flatten --out DIR` makes a \
             disk of its own in the other version"
        ))
    })
    .await
}

/// Everything that can be refused is refused here.
async fn plan<F: Folder>(
    folder: &F,
    deltas: &Deltas,
    to: Version,
    watch: &mut dyn Watch,
) -> Result<Vec<Plan>> {
    let mut plans = Vec::new();
    for file in deltas.names() {
        watch.enter(file);
        let store = folder.open(file, Access::Read).await?;
        let plan = convert::plan(&store, to, watch).await;
        plans.push(plan.map_err(|e| e.at(file))?);
        let copy = copy_name(file);
        if folder::has(folder, &copy).await? {
            return Err(Error::new(
                Kind::Exists,
                format!(
                    "{copy}: exists; the table of {file} is to be copied there, so move it away \
                     (what an earlier conversion left of this name after its end is worth nothing)"
                ),
            ));
        }
    }
    Ok(plans)
}

/// Steps 1 to 4, but for the announcement.
async fn carry_out<F: Folder>(
    folder: &F,
    deltas: &Deltas,
    plans: &[Plan],
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut stores = Vec::new();
    for (file, plan) in deltas.names().zip(plans) {
        // It may have been shared with a clone that is gone.
        folder.set_shared(file, false).await?;
        let store = folder.open(file, Access::Write).await?;
        let copy = folder.create(&copy_name(file)).await?;
        let saved = convert::save(&store, plan, &copy).await;
        saved.map_err(|e| e.at(copy_name(file)))?;
        stores.push((file, store, plan));
    }
    folder.sync().await?;
    for (file, store, _) in stores.iter().rev() {
        convert::mark(store).await.map_err(|e| e.at(file))?;
    }
    for (file, store, plan) in &stores {
        watch.enter(file);
        let written = convert::rewrite(store, plan, watch).await;
        written.map_err(|e| e.at(file))?;
    }
    for (file, store, plan) in &stores {
        convert::finish(store, plan).await.map_err(|e| e.at(file))?;
    }
    Ok(())
}

/// Undoes or finishes what a conversion left that was cut. The caller has the disk to himself, or it
/// is attached and nothing is left.
pub async fn settle<F: Folder>(folder: &F, disk: &Descriptor) -> Result<()> {
    let deltas = Deltas::of(disk)?;
    if left(folder, &deltas).await?.is_empty() {
        return Ok(());
    }
    let ours = is_announced(folder, disk).await?;
    settle_deltas(folder, &deltas, ours).await
}

/// Whether what is left is of a conversion of ours: of no other change the descriptor is the old one.
async fn is_announced<F: Folder>(folder: &F, disk: &Descriptor) -> Result<bool> {
    if !folder::has(folder, NEXT).await? {
        return Ok(false);
    }
    match change::read(folder, NEXT).await {
        Ok(next) => Ok(next == *disk),
        // It was cut before its fsync, so nothing was done for it.
        Err(e) if matches!(e.kind(), Kind::Damaged | Kind::Unsupported) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The same for a bare image.
pub async fn settle_bare<F: Folder>(folder: &F, file: &str) -> Result<()> {
    settle_deltas(folder, &Deltas::one(file), false).await
}

/// Files whose copies are there.
async fn left<F: Folder>(folder: &F, deltas: &Deltas) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for file in deltas.names() {
        if folder::has(folder, &copy_name(file)).await? {
            left.push(file.to_string());
        }
    }
    Ok(left)
}

/// The same for files. Copies of unmarked deltas stay, unless they are `ours`.
async fn settle_deltas<F: Folder>(folder: &F, deltas: &Deltas, ours: bool) -> Result<()> {
    let left = left(folder, deltas).await?;
    let mut marked = false;
    for file in &left {
        let store = folder.open(file, Access::Read).await?;
        marked |= convert::state(&store).await.map_err(|e| e.at(file))?.1;
    }
    if !marked && !ours {
        return Ok(());
    }
    let mut stores = Vec::new();
    for file in &left {
        folder.set_shared(file, false).await?;
        stores.push((file, folder.open(file, Access::Write).await?));
    }
    if marked {
        undo(folder, &stores).await?;
    }
    for (file, store) in &stores {
        // That it is not marked may be seen and still be lost, and then the copy is needed.
        store.flush().await.map_err(|e| e.at(file))?;
    }
    for file in &left {
        folder.remove(&copy_name(file)).await?;
    }
    folder.sync().await
}

/// Takes deltas back to their copies. As long as the last one is marked, the next command does the
/// same again.
async fn undo<F: Folder>(folder: &F, stores: &[(&String, F::File)]) -> Result<()> {
    if let Some((file, last)) = stores.last() {
        convert::mark(last).await.map_err(|e| e.at(file))?;
    }
    for (file, store) in stores {
        let copy = folder.open(&copy_name(file), Access::Read).await?;
        let restored = convert::restore(store, &copy).await;
        restored.map_err(|e| e.at(file))?;
    }
    Ok(())
}
