//! `convert`: a disk in another form, which reads the same.

use super::snapshot::{mount, views};
use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::{attach, errand, rate, size};
use ploop::formats::descriptor::Descriptor;
use ploop::formats::folder::{Access as Open, Folder};
use ploop::formats::ploop::{Ploop, Version};
use ploop::formats::qcow2::header::Compression;
use ploop::formats::raw::Raw;
use ploop::formats::units::ClusterSize;
use ploop::image::backing;
use ploop::image::chain::{Chain, RAW_CLUSTER};
use ploop::image::change;
use ploop::image::convert::content::{self, Form, Made, Source, Wanted};
use ploop::image::convert::spot::Spot;
use ploop::image::convert::version::{self, copy_name};
use ploop::image::detached::{Detached, random_guid};
use ploop::image::init::IMAGE;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::site::Site;
use ploop::image::snapshot::copy::Work;
use ploop::image::target::{Format, Target};
use ploop::io::exec::{self, Engine};
use ploop::io::file::{Cache, FileStore};
use ploop::io::folder::DirFolder;
use ploop::sandbox::{self, Files, Place};
use ploop::stack::AnyLayer;
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::ffi::OsString;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

pub const EXAMPLES: &str = "\
Example: ploopctl convert /var/lib/ct/100 --format-version 1

Into another disk:
  ploopctl convert 100.raw --format raw --to expanded --out /var/lib/ct/100
  ploopctl convert /var/lib/ct/100 --flatten --out /var/lib/ct/101

From and to the formats of others:
  ploopctl convert vm.qcow2 --format qcow2 --to expanded --out /var/lib/ct/102
  ploopctl convert /var/lib/ct/100 --to qcow2 --compress --out-file 100.qcow2";

/// Change the format of a disk that is not attached; what is in it stays as it is
///
/// The format version alone is changed in place, in all deltas, and takes moments. Everything else
/// writes one new image, and the disk has the old ones until that is done. What reads as zeros is not
/// stored. Interrupted anywhere, the disk is the old one or the new one; without any option, what is left
/// of that is cleared up. A new disk or file is complete, or not there; when this is killed, a hidden
/// .FILE.new is left beside it, which the same command takes away. Snapshots and bitmaps that a qcow2
/// image keeps in itself stay behind.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
    /// Version of the ploop format
    #[arg(long, value_parser = ["1", "2"])]
    format_version: Option<String>,
    /// What the image is to be; without it, what the base is
    #[arg(long)]
    to: Option<FormArg>,
    /// Make one image of all deltas; in place the disk's snapshots go
    #[arg(long)]
    flatten: bool,
    /// Make a new disk in this directory, which must not exist, or be empty; DISK stays as it is
    #[arg(long, value_name = "DIR", conflicts_with = "out_file")]
    out: Option<PathBuf>,
    /// Make a bare image in this file, which must not exist, of what DISK is now; DISK stays as it is
    #[arg(long, value_name = "FILE")]
    out_file: Option<PathBuf>,
    /// Unit of allocation of a new disk or file: 32K to 64M, of a qcow2 file 512 to 2M, of a disk of
    /// qcow2 images 32K to 2M; without it that of DISK where both are qcow2 images or neither is, else 64K
    #[arg(long, value_parser = size::parse)]
    cluster: Option<u64>,
    /// Compress the clusters of a qcow2 image
    #[arg(
        long,
        value_name = "HOW",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "deflate",
        conflicts_with = "preallocate"
    )]
    compress: Option<CompressArg>,
    /// Reserve all space of a qcow2 image, or of a raw file
    #[arg(long)]
    preallocate: bool,
    /// Bytes a second to copy at most
    #[arg(long, value_name = "BYTES", value_parser = rate::parse)]
    rate: Option<NonZeroU64>,
}

/// `--to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum FormArg {
    /// A ploop image that grows
    Expanded,
    /// A ploop image that has all its space
    Preallocated,
    /// A flat file
    Raw,
    /// A qcow2 image, with nothing below it
    Qcow2,
}

/// `--compress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CompressArg {
    /// What every reader of qcow2 images knows
    Deflate,
    /// For QEMU 5.1 and later: faster to make and to read, but larger
    Zstd,
}

impl From<CompressArg> for Compression {
    fn from(arg: CompressArg) -> Self {
        match arg {
            CompressArg::Deflate => Self::Deflate,
            CompressArg::Zstd => Self::Zstd,
        }
    }
}

impl From<FormArg> for Form {
    fn from(arg: FormArg) -> Self {
        match arg {
            FormArg::Expanded => Self::Expanded,
            FormArg::Preallocated => Self::Preallocated,
            FormArg::Raw => Self::Raw,
            FormArg::Qcow2 => Self::Qcow2,
        }
    }
}

impl Args {
    fn version(&self) -> Option<Version> {
        self.format_version.as_deref().map(|text| match text {
            "1" => Version::V1,
            _ => Version::V2,
        })
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            form: self.to.map(Into::into),
            version: self.version(),
            cluster: self.cluster,
            compress: self.compress.map(Into::into),
            reserve: self.preallocate,
        }
    }

    /// Whether a new image is written.
    fn copies(&self) -> bool {
        self.to.is_some() || self.flatten || self.leaves()
    }

    /// Whether what it is made of stays as it is.
    const fn leaves(&self) -> bool {
        self.out.is_some() || self.out_file.is_some()
    }

    /// Whether an option is there that says what a new image is like.
    const fn shapes(&self) -> bool {
        self.cluster.is_some() || self.compress.is_some() || self.preallocate
    }

    fn check(&self, target: &Target) -> Result<()> {
        let usage = |what: &str| Err(Error::new(Kind::Usage, what.to_string()));
        match target {
            _ if self.rate.is_some() && !self.copies() => {
                usage("--rate is for what copies data; the format version alone copies none")
            }
            _ if self.shapes() && !self.copies() => usage(
                "--cluster, --compress and --preallocate are for a new image: say which with --to",
            ),
            Target::Bare { .. } if self.copies() && !self.leaves() => usage(
                "what is made of a bare image file is another: say where with --out DIR or --out-file \
                 FILE",
            ),
            Target::Bare { format, .. } if *format != Format::Ploop && !self.copies() => usage(
                "only a ploop image has a format version; `--to expanded --out DIR` makes one",
            ),
            _ => Ok(()),
        }
    }
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    args.check(&target)?;
    mount::refuse_view(&target)?;
    refuse_in_use(&target, args.leaves())?;
    let mut meter = Meter::new(global.progress, &cancel);
    let place = |e: Error| ended(e).at(target.path().display());
    if let Some(file) = &args.out_file {
        let spot = Spot::new(file)?;
        let pace = rate::limit(args.rate, &cancel);
        let mut work = Work::new(&mut meter, &pace);
        return by_itself(args, &target, spot, &mut work).map_err(place);
    }
    match (&args.out, args.copies(), args.version()) {
        (Some(out), ..) => {
            let site = Site::new(out)?;
            let pace = rate::limit(args.rate, &cancel);
            let mut work = Work::new(&mut meter, &pace);
            elsewhere(args, &target, site, &mut work).map_err(place)
        }
        (None, true, _) => {
            let pace = rate::limit(args.rate, &cancel);
            let mut work = Work::new(&mut meter, &pace);
            in_place(args, &target, &mut work).map_err(place)
        }
        (None, false, Some(to)) => other_version(&target, to, &mut meter).map_err(place),
        (None, false, None) => clear_up(&target).map_err(place),
    }
}

/// Refuses a disk that is attached, or, unless it is only read, one that somebody looks at a
/// snapshot of.
pub fn refuse_in_use(target: &Target, only_read: bool) -> Result<()> {
    if let Some(attached) = attach::by_identity(&target.identity()?)? {
        return Err(Error::new(
            Kind::Busy,
            format!(
                "{}: attached, and what is written to it meanwhile would be missed; umount it \
                 first, or make a clone of it and use that",
                attached.state.path
            ),
        ));
    }
    views::settle(target);
    match views::in_use(target)?.first() {
        Some(view) if !only_read => Err(Error::new(
            Kind::Busy,
            format!(
                "{}: snapshot {} of it is mounted at {place}; `ploopctl umount {place}` first",
                target.path().display(),
                view.point.bare(),
                place = view.place()
            ),
        )),
        _ => Ok(()),
    }
}

/// What a signal left.
fn ended(e: Error) -> Error {
    match e.kind() {
        Kind::Cancelled => Error::new(
            Kind::Cancelled,
            "cancelled by a signal; the disk is what it was, and nothing new is left",
        ),
        _ => e,
    }
}

/// A disk of our own, of whatever kind.
enum Taken {
    Bundle(Detached),
    Bare {
        folder: DirFolder,
        file: String,
        _locks: DiskLocks,
    },
}

impl Taken {
    fn new(target: &Target) -> Result<Self> {
        let dir = target.open_dir()?;
        confine(&dir, Files::Change)?;
        match target {
            Target::Bundle { .. } => Detached::take(dir).map(Self::Bundle),
            Target::Bare { file, .. } => Ok(Self::Bare {
                _locks: DiskLocks::take(&dir, &target.source(), Access::Write)?,
                file: file_name(file)?,
                folder: DirFolder::new(dir),
            }),
        }
    }
}

fn file_name(file: &Path) -> Result<String> {
    let name = file.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Error::unsupported("a file name that is not UTF-8"))?;
    Ok(name.to_string())
}

fn other_version(target: &Target, to: Version, meter: &mut Meter<'_>) -> Result<Answer> {
    let changed = match Taken::new(target)? {
        Taken::Bundle(disk) => disk.run(version::offline(disk.folder(), to, meter)),
        Taken::Bare { folder, file, .. } => {
            let work = version::bare(&folder, &file, to, meter);
            exec::run(Engine::detect().0, work)?
        }
    }?;
    let (path, number) = (target.path().display(), number(to));
    let text = match changed {
        true => format!("{path}: format version {number}"),
        false => format!("{path}: format version {number} already"),
    };
    let json = json!({
        "path": path.to_string(),
        "source": null,
        "form": null,
        "format_version": number,
        "size": null,
        "changed": changed,
    });
    Ok(Answer::new(text, json))
}

const fn number(version: Version) -> u32 {
    match version {
        Version::V1 => 1,
        Version::V2 => 2,
    }
}

fn in_place(args: &Args, target: &Target, work: &mut Work<'_>) -> Result<Answer> {
    let Taken::Bundle(disk) = Taken::new(target)? else {
        return Err(Error::new(Kind::Usage, "--out is missing"));
    };
    let (folder, random) = (disk.folder(), random_guid());
    let made = content::in_place(folder, args.wanted(), args.flatten, random, work);
    let made = disk.run(made)?;
    Ok(answer(&made, target.path(), None))
}

fn elsewhere(args: &Args, target: &Target, mut site: Site, work: &mut Work<'_>) -> Result<Answer> {
    let dir = target.open_dir()?;
    site.expect([IMAGE.to_string()]);
    confine_to(&[
        (dir.as_fd(), Files::Write),
        (site.folder().as_fd(), Files::Change),
        (site.parent(), Files::Directories),
    ])?;
    let _locks = DiskLocks::take(&dir, &target.source(), Access::Read)?;
    let made = exec::run(Engine::detect().0, async {
        let source = open(args, target, dir).await?;
        let made = content::elsewhere(&source, args.wanted(), site.folder(), IMAGE, work);
        site.fill(made).await
    })??;
    let path = site.path().to_path_buf();
    site.finish()?;
    Ok(answer(&made, &path, Some(target.path())))
}

fn by_itself(args: &Args, target: &Target, spot: Spot, work: &mut Work<'_>) -> Result<Answer> {
    let dir = target.open_dir()?;
    confine_to(&[
        (dir.as_fd(), Files::Write),
        (spot.folder().as_fd(), Files::Change),
    ])?;
    let _locks = DiskLocks::take(&dir, &target.source(), Access::Read)?;
    let made = exec::run(Engine::detect().0, async {
        let source = open(args, target, dir).await?;
        content::bare(&source, args.wanted(), spot.folder(), spot.names(), work).await
    })??;
    let path = spot.path().to_path_buf();
    spot.finish();
    Ok(answer(&made, &path, Some(target.path())))
}

async fn open(args: &Args, target: &Target, dir: OwnedFd) -> Result<Source<FileStore>> {
    let Target::Bare { file, format } = target else {
        let disk = Chain::read(&dir, &target.source())?.descriptor;
        let disk = disk.ok_or_else(|| Error::damaged("a disk without a descriptor"))?;
        // A file can be nothing but what the disk is now.
        content::refuse_snapshots(&disk, args.flatten || args.out_file.is_some())?;
        return content::open_source(&DirFolder::new(dir), &disk).await;
    };
    let name = file_name(file)?;
    if *format == Format::Qcow2 {
        let chain = backing::open_read(dir.as_fd(), Path::new(&name), Cache::Writeback);
        return chain.await.map(Source::chain);
    }
    let store = DirFolder::new(dir).open(&name, Open::Read).await?;
    Source::bare(match format {
        Format::Ploop => AnyLayer::Ploop(Ploop::open_read(store).await?),
        // It may end within a sector: the rest of that is zeros.
        _ => AnyLayer::Raw(Raw::open_backing(store, ClusterSize::new(RAW_CLUSTER)?)),
    })
}

fn answer(made: &Made, path: &Path, source: Option<&Path>) -> Answer {
    let form = match made.form {
        Form::Expanded => "expanded",
        Form::Preallocated => "preallocated",
        Form::Raw => "raw",
        Form::Qcow2 => "qcow2",
    };
    let version = made.version.map(number);
    let bytes = made.size;
    let of = version.map(|n| format!(", format version {n}"));
    let text = format!(
        "{}: {form}{}, {}",
        path.display(),
        of.unwrap_or_default(),
        size::show(bytes)
    );
    Answer::new(
        text,
        json!({
            "path": path.display().to_string(),
            "source": source.map(|source| source.display().to_string()),
            "form": form,
            "format_version": version,
            "size": bytes,
            "changed": true,
        }),
    )
}

/// Leaves this process the source, what it makes, and the removal of what it made in vain.
fn confine_to(places: &[(BorrowedFd<'_>, Files)]) -> Result<()> {
    let places: Vec<Place<'_>> = places
        .iter()
        .map(|(dir, files)| Place {
            dir: *dir,
            files: *files,
        })
        .collect();
    match sandbox::enter_all(&places) {
        Err(e) if e.kind() != Kind::Unsupported => Err(e),
        _ => Ok(()),
    }
}

/// Finishes or undoes what an interrupted command left.
fn clear_up(target: &Target) -> Result<Answer> {
    match Taken::new(target)? {
        Taken::Bundle(disk) => disk.run(change::settle(disk.folder())).map(drop)?,
        Taken::Bare { folder, file, .. } => {
            exec::run(Engine::Poll, version::settle_bare(&folder, &file))??;
        }
    }
    let path = target.path().display();
    Ok(Answer::new(
        format!("{path}: nothing is left of an interrupted conversion"),
        json!({
            "path": path.to_string(),
            "source": null,
            "form": null,
            "format_version": null,
            "size": null,
            "changed": false,
        }),
    ))
}

/// Clears up after an interrupted conversion of a disk that is about to be attached: this process
/// may not look into images.
pub fn settle(target: &Target, cancel: &Cancel) -> Result<()> {
    if !is_left(target)? || attach::by_identity(&target.identity()?)?.is_some() {
        return Ok(());
    }
    let mut args: Vec<OsString> = vec!["convert".into(), target.path().into()];
    if let Target::Bare { format, .. } = target {
        args.extend(["--format".into(), format.as_str().into()]);
    }
    errand::run(&args, None, cancel).map(drop)
}

/// Whether the copy of a table lies beside an image.
fn is_left(target: &Target) -> Result<bool> {
    let dir = target.dir();
    let is_copied = |file: &str| dir.join(copy_name(file)).exists();
    Ok(match target {
        Target::Bare { format, .. } if *format != Format::Ploop => false,
        Target::Bare { file, .. } => file_name(file).is_ok_and(|file| is_copied(&file)),
        Target::Bundle { .. } => {
            let read = ploop::image::chain::read_descriptor(target.open_dir()?);
            // Who attaches the disk says what is wrong with it.
            let images = read.as_ref().map(Descriptor::images).unwrap_or_default();
            images.iter().any(|image| is_copied(&image.file))
        }
    })
}
