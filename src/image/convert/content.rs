//! Content: what a chain of images reads as is written into one new image, of any form.
//!
//! In place, in order: the top is closed, the change is announced whose descriptor names the new
//! image and nothing else, that is made and filled, durably with its name, and the change is
//! committed. The old files go. Cut before the commit, the new file goes instead.
//!
//! Elsewhere it is a new disk, made as any is: its descriptor aside names what may be there, the
//! image is filled, and the descriptor gets its name last. The source is not written.
//!
//! A bare image is filled under a name of its own, durably with that, and gets the name that was asked
//! for last, as one more, which nobody has yet; then the other goes.
//!
//! Zeros are not stored. Space is reserved for the tables of all, and for the data of preallocated
//! ones.

use crate::image::chain::RAW_CLUSTER;
use crate::image::change::{self, Change};
use crate::image::convert::pack::{self, Filling};
use crate::image::members::ASIDE;
use crate::image::snapshot::copy::{self, Work};
use crate::image::snapshot::layers;
use crate::image::target::DESCRIPTOR;
use crate::stack::{AnyLayer, Stack};
use ploop_formats::descriptor::{Chs, Descriptor, ImageRef, ImageType, LayerFormat, NewDisk};
use ploop_formats::folder::{self, Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::header::{FLAG_EMPTY, Header, Version, chs};
use ploop_formats::ploop::{Ploop, create};
use ploop_formats::progress::Progress;
use ploop_formats::qcow2;
use ploop_formats::qcow2::header::Compression;
use ploop_formats::raw::Raw;
use ploop_formats::store::{Space, Store};
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Error, Kind, Result, limits};

/// Space reserved in one step.
const RESERVE_STEP: u64 = 1 << 30;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A ploop image that grows when it is written to.
    Expanded,
    /// A ploop image that has all its space.
    Preallocated,
    /// A flat file.
    Raw,
    /// A qcow2 image, with nothing below it.
    Qcow2,
}

/// What a disk is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Form; that of the base when there is none.
    pub form: Option<Form>,
    /// Version of a ploop image; that of the source when there is none, else 2.
    pub version: Option<Version>,
    /// Bytes of a cluster; those of the source when there is none and it is such an image, else 64 KiB.
    pub cluster: Option<u64>,
    /// How the clusters of a qcow2 image are compressed.
    pub compress: Option<Compression>,
    /// Whether a qcow2 image, or a raw file that is no disk's, gets all its space.
    pub reserve: bool,
}

/// What was made.
#[derive(Debug, Clone, Copy)]
pub struct Made {
    /// Virtual size in bytes.
    pub size: u64,
    /// Form of the image.
    pub form: Form,
    /// Version of a ploop image.
    pub version: Option<Version>,
}

/// Where the new image comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the disk whose it is, which keeps its cluster.
    Here,
    /// In a disk of its own.
    Disk,
    /// By itself.
    Bare,
}

/// What is to be read: a chain of files, base first.
#[derive(Debug)]
pub struct Source<S> {
    stack: Stack<S>,
    form: Form,
    version: Version,
}

/// What the new image is.
#[derive(Debug, Clone, Copy)]
struct Shape {
    form: Form,
    version: Version,
    size: u64,
    cluster: ClusterSize,
    /// What fills a qcow2 image; [`Filling::Plain`] of another one.
    filling: Filling,
    /// Whether a raw file takes its space only as it is written.
    sparse: bool,
}

impl<S: Store> Source<S> {
    /// Opens the files of a disk. Those below the top must have been closed.
    pub async fn disk<F: Folder<File = S>>(folder: &F, disk: &Descriptor) -> Result<Self> {
        let chain = disk.chain(disk.top())?;
        let mut open = Vec::new();
        for image in &chain {
            let layer = layers::open_read(folder, disk, image).await?;
            if image.guid != disk.top() {
                layers::refuse_unclosed(&layer, image)?;
            }
            open.push(layer);
        }
        let form = match chain.first().map(|base| base.format) {
            Some(LayerFormat::Raw) => Form::Raw,
            Some(LayerFormat::Qcow2) => Form::Qcow2,
            _ if disk.preallocated() => Form::Preallocated,
            _ => Form::Expanded,
        };
        Self::of(open, form)
    }

    /// A bare image.
    pub fn bare(layer: AnyLayer<S>) -> Result<Self> {
        Self::of(vec![layer], Form::Expanded)
    }

    /// A qcow2 image, and what it stands on.
    pub fn chain(stack: Stack<S>) -> Self {
        Self {
            stack,
            form: Form::Qcow2,
            version: Version::V2,
        }
    }

    fn of(open: Vec<AnyLayer<S>>, ploop: Form) -> Result<Self> {
        let form = match open.first() {
            Some(AnyLayer::Raw(_)) => Form::Raw,
            Some(AnyLayer::Qcow2(_)) => Form::Qcow2,
            _ => ploop,
        };
        let version = match open.last() {
            Some(AnyLayer::Ploop(top)) => top.header().version,
            _ => Version::V2,
        };
        Ok(Self {
            stack: Stack::new(open)?,
            form,
            version,
        })
    }

    /// What is made of it. `Usage` for what the form cannot have.
    fn shape(&self, wanted: Wanted, place: Place) -> Result<Shape> {
        let form = wanted.form.unwrap_or(self.form);
        wanted.refuse_strange(form, place)?;
        let geometry = self.stack.top().geometry();
        let mut shape = Shape {
            form,
            version: wanted.version.unwrap_or(self.version),
            size: geometry.size,
            cluster: self.cluster(wanted, form, place)?,
            filling: match (wanted.compress, wanted.reserve) {
                (Some(how), _) => Filling::Packed(how),
                (None, true) => Filling::Reserved,
                (None, false) => Filling::Plain,
            },
            sparse: place == Place::Bare && !wanted.reserve,
        };
        match form {
            Form::Raw => {}
            Form::Qcow2 => {
                let fits = shape.create().update().map(drop);
                fits.map_err(|e| Error::unsupported(e.to_string()))?;
            }
            // A ploop image is whole clusters.
            Form::Expanded | Form::Preallocated => shape.size = shape.header()?.geometry().size,
        }
        Ok(shape)
    }

    /// Its cluster.
    fn cluster(&self, wanted: Wanted, form: Form, place: Place) -> Result<ClusterSize> {
        let own = self.stack.top().geometry().cluster;
        let is_qcow2 = |form| form == Form::Qcow2;
        let kept = place == Place::Here || is_qcow2(form) == is_qcow2(self.form);
        let bytes = match wanted.cluster {
            Some(bytes) => bytes,
            None if kept => own.bytes(),
            None => RAW_CLUSTER,
        };
        if !bytes.is_power_of_two() {
            return Err(usage(format!("clusters of {bytes} bytes: no power of two")));
        }
        let cluster = match (is_qcow2(form), place) {
            (true, Place::Bare) => ClusterSize::of_qcow2(bytes.trailing_zeros()),
            // What a descriptor can say, and a qcow2 image have.
            (true, _) => ClusterSize::new(bytes).and_then(|c| ClusterSize::of_qcow2(c.log2())),
            (false, _) => ClusterSize::new(bytes),
        };
        let way = match place {
            Place::Here => "with --out DIR or --out-file FILE they can be others",
            Place::Disk | Place::Bare => "`--cluster 64K` makes others",
        };
        cluster.map_err(|e| usage(format!("clusters of {bytes} bytes: {e}; {way}")))
    }
}

fn usage(what: impl Into<String>) -> Error {
    Error::new(Kind::Usage, what)
}

impl Wanted {
    /// Refuses what is asked of a form that has no such thing.
    fn refuse_strange(self, form: Form, place: Place) -> Result<()> {
        let is_ploop = matches!(form, Form::Expanded | Form::Preallocated);
        let reserves = form == Form::Qcow2 || form == Form::Raw && place == Place::Bare;
        let what = match () {
            () if form == Form::Raw && self.version.is_some() => {
                "a raw image has no format version; `--to expanded` makes a ploop image"
            }
            () if self.version.is_some() && !is_ploop => {
                "a qcow2 image has no format version of ploop's; `--to expanded` makes a ploop image"
            }
            () if self.compress.is_some() && form != Form::Qcow2 => {
                "only qcow2 images are compressed: `--to qcow2`"
            }
            () if self.compress.is_some() && self.reserve => {
                "how much space a compressed image takes is known when it is made"
            }
            () if self.reserve && is_ploop => {
                "`--to preallocated` makes a ploop image with its space"
            }
            () if self.reserve && !reserves => "the raw image of a disk has all its space anyway",
            () if self.cluster.is_some() && form == Form::Raw && place == Place::Bare => {
                "a raw file has no clusters"
            }
            () if self.cluster.is_some() && place == Place::Here => {
                "a disk keeps its clusters; with --out DIR or --out-file FILE they can be others"
            }
            () => return Ok(()),
        };
        Err(usage(what))
    }
}

impl Shape {
    fn header(&self) -> Result<Header> {
        let header = Header::new(self.version, self.size, self.cluster);
        let header = header.map_err(|e| Error::unsupported(e.to_string()))?;
        if self.form == Form::Preallocated {
            create::preallocated_len(&header).map_err(|e| Error::unsupported(e.to_string()))?;
        }
        Ok(Header {
            // It says so itself when it is closed, and is.
            flags: header.flags & !FLAG_EMPTY,
            ..header
        })
    }

    /// A qcow2 image.
    fn create(&self) -> qcow2::create::Create {
        let mut create = qcow2::create::Create::new(self.size, self.cluster);
        if let Filling::Packed(how) = self.filling {
            create.compression = how;
        }
        create
    }

    const fn kind(&self) -> ImageType {
        match self.form {
            Form::Raw => ImageType::Plain,
            Form::Qcow2 => ImageType::QCow2,
            Form::Expanded | Form::Preallocated => ImageType::Compressed,
        }
    }

    fn is_preallocated(&self) -> bool {
        self.form == Form::Preallocated
    }

    fn sectors(&self) -> (u64, Chs) {
        let sectors = self.size / SECTOR;
        let (heads, track, cylinders) = chs(sectors);
        let chs = Chs {
            cylinders: u64::from(cylinders),
            heads: u64::from(heads),
            sectors: u64::from(track),
        };
        (sectors, chs)
    }

    fn made(&self) -> Made {
        let is_ploop = matches!(self.form, Form::Expanded | Form::Preallocated);
        Made {
            size: self.size,
            form: self.form,
            version: is_ploop.then_some(self.version),
        }
    }

    /// The descriptor of `disk` when all it has is `file`.
    fn instead_of(&self, disk: &Descriptor, file: &str) -> Result<Descriptor> {
        let top = disk.top();
        let others = disk.shots().iter().map(|shot| shot.guid);
        let others: Vec<Guid> = others.filter(|guid| *guid != top).collect();
        let (sectors, chs) = self.sectors();
        disk.edit(|e| {
            for guid in others {
                e.remove(guid)?;
            }
            e.set_parent(top, Guid::NONE)?;
            e.set_file(top, file)?;
            e.set_type(top, self.kind())?;
            e.set_preallocated(self.is_preallocated())?;
            match sectors == disk.sectors() {
                true => Ok(()),
                false => e.set_size(sectors, chs),
            }
        })
    }

    fn new_disk(&self, file: &str) -> Result<Descriptor> {
        let (sectors, chs) = self.sectors();
        Descriptor::new_disk(&NewDisk {
            sectors,
            cluster: self.cluster,
            kind: self.kind(),
            file,
            preallocated: self.is_preallocated(),
            chs,
        })
    }
}

/// Writes a disk that is not attached anew, as one image: its snapshots go. `Unsupported` when it
/// has some and `flatten` does not say so.
pub async fn in_place<F: Folder>(
    folder: &F,
    wanted: Wanted,
    flatten: bool,
    random: Guid,
    work: &mut Work<'_>,
) -> Result<Made> {
    let disk = change::settle(folder).await?;
    refuse_snapshots(&disk, flatten)?;
    layers::seal(folder, &disk).await?;
    let source = Source::disk(folder, &disk).await?;
    refuse_inner(&source.stack, flatten)?;
    let shape = source.shape(wanted, Place::Here)?;
    let file = disk.new_file_name(random);
    let new = shape.instead_of(&disk, &file)?;
    let change = Change::announce(folder, &disk, new).await?;
    let made = async {
        let image = folder.create(&file).await?;
        let filled = fill(image, &source.stack, shape, work).await;
        filled.map_err(|e| e.at(&file))?;
        folder.sync().await
    };
    match made.await {
        Ok(()) => {
            change.commit().await?;
            Ok(shape.made())
        }
        Err(e) => {
            // What cannot be removed now is with the next command.
            let _ = change.undo().await;
            Err(e)
        }
    }
}

/// A disk with snapshots is made one image only when that was said.
pub fn refuse_snapshots(disk: &Descriptor, flatten: bool) -> Result<()> {
    match disk.shots().len() {
        1 => Ok(()),
        _ if flatten => Ok(()),
        n => Err(Error::unsupported(format!(
            "the disk is {n} deltas; --flatten makes one image of what it is now, and its \
             snapshots go (with --out they stay where they are)"
        ))),
    }
}

/// The same of snapshots that a qcow2 image keeps in itself.
fn refuse_inner<S: Store>(stack: &Stack<S>, flatten: bool) -> Result<()> {
    let inner = stack
        .layers()
        .iter()
        .map(|layer| layers::inner_snapshots(layer));
    match inner.sum() {
        0u64 => Ok(()),
        _ if flatten => Ok(()),
        n => Err(Error::unsupported(format!(
            "{n} snapshots inside its qcow2 images would go; --flatten says that they may (with --out \
             they stay where they are)"
        ))),
    }
}

/// Makes a disk of `file` in an empty folder. After an error that is no disk, and to be removed with
/// what is in it.
pub async fn elsewhere<F: Folder>(
    source: &Source<F::File>,
    wanted: Wanted,
    to: &F,
    file: &str,
    work: &mut Work<'_>,
) -> Result<Made> {
    let shape = source.shape(wanted, Place::Disk)?;
    let disk = shape.new_disk(file)?;
    folder::save(to, ASIDE, &disk.encode()).await?;
    to.sync().await?;
    let image = to.create(file).await?;
    let filled = fill(image, &source.stack, shape, work).await;
    filled.map_err(|e| e.at(file))?;
    to.sync().await?;
    to.rename(ASIDE, DESCRIPTOR).await?;
    to.sync().await?;
    Ok(shape.made())
}

/// Makes a bare image `file` in a folder, of the empty file `aside` there, which is to be removed after
/// an error. `Exists` when somebody else has made a file of that name.
pub async fn bare<F: Folder>(
    source: &Source<F::File>,
    wanted: Wanted,
    folder: &F,
    (aside, file): (&str, &str),
    work: &mut Work<'_>,
) -> Result<Made> {
    let shape = source.shape(wanted, Place::Bare)?;
    let image = folder.open(aside, Access::Write).await?;
    let filled = fill(image, &source.stack, shape, work).await;
    filled.map_err(|e| e.at(file))?;
    folder.link(aside, folder, file).await?;
    let named = async {
        folder.remove(aside).await?;
        folder.sync().await
    };
    match named.await {
        Ok(()) => Ok(shape.made()),
        Err(e) => {
            // Nobody knows whether it would be there after a power cut.
            let _ = folder.remove(file).await;
            Err(e)
        }
    }
}

/// Makes an image in an empty file, durably.
async fn fill<S: Store>(
    image: S,
    source: &Stack<S>,
    shape: Shape,
    work: &mut Work<'_>,
) -> Result<()> {
    if shape.form == Form::Qcow2 {
        let done = pack::pack(source, &image, &shape.create(), shape.filling, work).await;
        image.settle().await;
        return done;
    }
    let target = blank(image, shape, work).await?;
    copy::flatten(source, &target, work).await?;
    target.close().await
}

/// An image that reads as zeros. Not durable: a file that is cut short of its end is never looked at.
async fn blank<S: Store>(image: S, shape: Shape, work: &mut Work<'_>) -> Result<AnyLayer<S>> {
    if shape.form == Form::Raw {
        match shape.sparse {
            true => image.lengthen(shape.size).await?,
            false => image.set_len(shape.size).await?,
        }
        let raw = Raw::open_write(image, shape.cluster, Ledger::local())?;
        return Ok(AnyLayer::Raw(raw));
    }
    let header = shape.header()?;
    if shape.is_preallocated() {
        create::create_preallocated_watched(&image, &header, work.watch()).await?;
    } else {
        let len = create::blank_len(&header);
        image.set_len(len).await?;
        let table = len.saturating_sub(limits::PAGE);
        image.punch(limits::PAGE, table, Space::Keep).await?;
        create::blank(&header).apply(&image).await?;
    }
    if shape.is_preallocated() {
        reserve(&image, create::blank_len(&header), work).await?;
    }
    let target = Ploop::open_target(image, Ledger::local()).await?;
    Ok(AnyLayer::Ploop(target))
}

/// Takes the space of a file from `at` on, in steps.
async fn reserve<S: Store>(image: &S, mut at: u64, work: &mut Work<'_>) -> Result<()> {
    let total = image.info().len;
    while at < total {
        let len = RESERVE_STEP.min(total - at);
        image.punch(at, len, Space::Keep).await?;
        at += len;
        work.watch().tell(Progress {
            phase: "reserving space",
            done: at,
            total,
        })?;
    }
    Ok(())
}

/// Opens a source that is only read, once what a dead process wrote to its top has landed.
pub async fn open_source<F: Folder>(folder: &F, disk: &Descriptor) -> Result<Source<F::File>> {
    let top = layers::image(disk, disk.top())?;
    settle_writes(folder, &top).await?;
    Source::disk(folder, disk).await
}

/// The page cache may believe in what never reached the disk; who opens a file for writing does not.
async fn settle_writes<F: Folder>(folder: &F, top: &ImageRef) -> Result<()> {
    match folder.open(&top.file, Access::Write).await {
        Err(e) if !matches!(e.kind(), Kind::Privilege | Kind::ReadOnly) => Err(e),
        _ => Ok(()),
    }
}
