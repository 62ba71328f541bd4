//! `ploop volume`, and `ploop-volume`: trees of disks that share what is frozen.
//!
//! A volume is a disk in a directory, a clone of it another. Nothing else is written down: a snapshot is
//! a clone whose descriptor nobody may write (its mode says so), and the children of a volume are those
//! that share all its frozen files.

use super::code::{Code, During, Fault, Step};
use super::{Context, absent, disk, init, verb};
use ploop::Error;
use ploop::formats::descriptor::Descriptor;
use ploop::image::target::{DESCRIPTOR, Target};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The image of a new volume.
const IMAGE: &str = "root.hds";

/// What to do with volumes
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Make a volume
    Create(Box<Create>),
    /// Make a volume that shares what another has now
    Clone {
        /// Volume
        source: PathBuf,
        /// Directory of the new one
        to: PathBuf,
    },
    /// Make a volume of what another has now, for reading
    Snapshot {
        /// Volume
        source: PathBuf,
        /// Directory of the new one
        to: PathBuf,
    },
    /// Have a volume hold what another holds
    Switch {
        /// Volume that is given up
        volume: PathBuf,
        /// Volume that it is to be like
        to: PathBuf,
    },
    /// Delete a volume
    Delete {
        /// Volume
        volume: PathBuf,
    },
    /// Tell the size of a volume's own image
    Info {
        /// Volume
        volume: PathBuf,
    },
    /// Tell which volumes beside it were made of a volume
    Tree {
        /// Volume
        volume: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct Create {
    /// Directory of the image: not offered, it is in the volume
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    #[command(flatten)]
    new: init::Args,
}

/// Does it.
pub fn run(args: Args, context: &Context) -> Result<(), Fault> {
    match args.verb {
        Verb::Create(args) => create(*args, context),
        Verb::Clone { source, to } => clone(&source, &to),
        Verb::Snapshot { source, to } => snapshot(&source, &to),
        Verb::Switch { volume, to } => switch(&volume, &to),
        Verb::Delete { volume } => delete(&volume),
        Verb::Info { volume } => info(&volume),
        Verb::Tree { volume } => tree(&volume),
    }
}

/// Whether a disk is for reading: its descriptor may be written by nobody.
pub fn is_snapshot(disk: &Target) -> bool {
    let meta = fs::metadata(disk.dir().join(DESCRIPTOR));
    matches!(disk, Target::Bundle { .. }) && meta.is_ok_and(|m| m.mode() & 0o222 == 0)
}

fn create(mut args: Create, context: &Context) -> Result<(), Fault> {
    if args.image.is_some() {
        return Err(absent::option("--image", "the image is in the volume"));
    }
    let volume = args.new.delta.clone();
    let made = match DirBuilder::new().mode(0o700).create(&volume) {
        Ok(()) => true,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
        Err(e) => return Err(Error::from(e).at(volume.display())).during(Step::Create),
    };
    args.new.delta = volume.join(IMAGE);
    let done = init::run(&args.new, context);
    if done.is_err() && made {
        // Of what failed nothing is left in it.
        let _ = fs::remove_dir(&volume);
    }
    done
}

fn clone(source: &Path, to: &Path) -> Result<(), Fault> {
    let words = ["clone".as_ref(), source.as_os_str(), to.as_os_str()];
    verb(&words).during(Step::Snapshot).map(drop)
}

fn snapshot(source: &Path, to: &Path) -> Result<(), Fault> {
    if is_snapshot(&volume(source)?.0) {
        let what = format!("{}: is a snapshot, which has none", source.display());
        return Err(Fault::new(Code::Param, what));
    }
    clone(source, to)?;
    let seal = || -> ploop::Result<()> {
        let descriptor = File::open(to.join(DESCRIPTOR))?;
        descriptor.set_permissions(Permissions::from_mode(0o400))?;
        Ok(descriptor.sync_all()?)
    };
    seal()
        .map_err(|e| e.at(to.display()))
        .during(Step::Snapshot)
}

/// In order: a clone of what is wanted, beside the volume; the two change places; the old one goes. Cut
/// before the second step the volume is as it was, and then as wanted; the next switch removes the rest.
/// One switch at a time goes on in a directory.
fn switch(path: &Path, to: &Path) -> Result<(), Fault> {
    let (disk, _) = volume(path)?;
    disk::refuse_attached(&disk)?;
    if is_snapshot(&disk) {
        let what = format!("{}: is a snapshot, which stays as it is", path.display());
        return Err(Fault::new(Code::Param, what));
    }
    let path = path
        .canonicalize()
        .map_err(Error::from)
        .during(Step::Find)?;
    let name = path.file_name().unwrap_or_default();
    let mut aside = OsString::from(".");
    aside.push(name);
    aside.push(".switch");
    let aside = path.with_file_name(aside);
    let parent = path.parent().unwrap_or(Path::new("/"));
    let beside = File::open(parent).map_err(Error::from).during(Step::Find)?;
    flock(&beside, FlockOperation::NonBlockingLockExclusive)
        .map_err(|e| Error::from(std::io::Error::from(e)).at(parent.display()))
        .during(Step::Switch)?;
    if aside.exists() {
        delete(&aside)?;
    }
    clone(to, &aside)?;
    let changed = renameat_with(CWD, &aside, CWD, &path, RenameFlags::EXCHANGE);
    let changed = changed.map_err(std::io::Error::from);
    let synced = changed.and_then(|()| beside.sync_all());
    synced.map_err(Error::from).during(Step::Switch)?;
    delete(&aside)
}

fn delete(volume: &Path) -> Result<(), Fault> {
    let words = [OsStr::new("delete"), volume.as_os_str()];
    verb(&words).during(Step::Delete).map(drop)
}

fn info(path: &Path) -> Result<(), Fault> {
    let (disk, descriptor) = volume(path)?;
    let top = descriptor.image(descriptor.top());
    let file = disk.dir().join(top.map_or("", |top| &top.file));
    let meta = fs::metadata(&file).map_err(|e| Error::from(e).at(file.display()));
    tell(&json!({ "size": meta.during(Step::Look)?.len() }))
}

fn tree(path: &Path) -> Result<(), Fault> {
    let (disk, descriptor) = volume(path)?;
    let frozen = frozen(&disk, &descriptor);
    let own = disk
        .dir()
        .canonicalize()
        .map_err(Error::from)
        .during(Step::Look)?;
    let beside = own.parent().unwrap_or(Path::new("/"));
    let entries = fs::read_dir(beside).map_err(|e| Error::from(e).at(beside.display()));
    let mut children = Vec::new();
    for entry in entries.during(Step::Look)?.flatten() {
        let place = entry.path();
        if place == own || !place.join(DESCRIPTOR).is_file() || !is_younger(&place, &own) {
            continue;
        }
        // Who cannot be read is nobody's child.
        let shares = volume(&place).is_ok_and(|(disk, descriptor)| {
            !frozen.is_empty() && frozen.is_subset(&self::frozen(&disk, &descriptor))
        });
        if shares {
            children.push(json!({ "path": place.display().to_string() }));
        }
    }
    children.sort_by_key(Value::to_string);
    tell(&json!({ "path": path.display().to_string(), "children": children }))
}

/// Whether a directory was made after another.
fn is_younger(one: &Path, other: &Path) -> bool {
    let born = |path: &Path| fs::metadata(path).and_then(|m| m.created());
    match (born(one), born(other)) {
        (Ok(one), Ok(other)) => one > other,
        // The file system does not say.
        _ => true,
    }
}

/// The frozen files that a volume stands on, by what the file system calls them.
fn frozen(disk: &Target, descriptor: &Descriptor) -> BTreeSet<(u64, u64)> {
    let chain = descriptor.chain(descriptor.top());
    let below = chain
        .iter()
        .flatten()
        .filter(|i| i.guid != descriptor.top());
    let found = below.filter_map(|image| fs::metadata(disk.dir().join(&image.file)).ok());
    found.map(|meta| (meta.dev(), meta.ino())).collect()
}

fn volume(path: &Path) -> Result<(Target, Descriptor), Fault> {
    disk::with_descriptor(&path.join(DESCRIPTOR))
}

fn tell(said: &Value) -> Result<(), Fault> {
    println!("{said:#}");
    Ok(())
}
