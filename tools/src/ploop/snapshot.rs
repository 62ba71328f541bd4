//! `snapshot`, `tsnapshot`, `snapshot-switch`, `snapshot-delete`: points to go back to.

use super::code::{Code, During, Fault, Step};
use super::{Context, absent, disk, names, verb};
use ploop::formats::guid::Guid;
use ploop::image::detached::random_guid;
use ploop::image::target::Target;
use std::ffi::OsStr;
use std::path::PathBuf;

/// Freeze a disk as it is
#[derive(Debug, clap::Args)]
pub struct Args {
    /// UUID of the snapshot; a random one otherwise
    #[arg(short)]
    uuid: Option<Guid>,
    /// Tracker of changed blocks (not offered)
    #[arg(short = 'b', value_name = "UUID")]
    cbt: Option<Guid>,
    /// Only of a disk that is not attached
    #[arg(short)]
    offline: bool,
    /// Freeze the file system meanwhile, so that nothing of it is in memory only
    #[arg(short = 'F')]
    freeze: bool,
    /// Device (not offered)
    #[arg(short, value_name = "DEVICE")]
    device: Option<PathBuf>,
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    if args.cbt.is_some() {
        return Err(absent::find("cbt").expect("it is listed").fault());
    }
    if args.device.is_some() {
        let why = "the descriptor must say what stands on what; give that";
        return Err(absent::option("-d", why));
    }
    let (disk, _) = disk::with_descriptor(&args.file)?;
    if args.offline && disk::of(&disk)?.is_some() {
        let what = format!("{}: in use, and -o is given", disk.path().display());
        return Err(Fault::new(Code::PloopInUse, what));
    }
    let uuid = args.uuid.unwrap_or_else(random_guid);
    let more: &[&str] = if args.freeze { &["--freeze"] } else { &[] };
    create(&disk, uuid, more).during(Step::Snapshot)?;
    made(uuid, context);
    Ok(())
}

fn create(disk: &Target, uuid: Guid, more: &[&str]) -> ploop::Result<serde_json::Value> {
    let bare = uuid.bare();
    let mut words = vec![OsStr::new("snapshot"), OsStr::new("create")];
    words.extend([
        disk.path().as_os_str(),
        OsStr::new("--uuid"),
        OsStr::new(&bare),
    ]);
    words.extend(more.iter().map(OsStr::new));
    verb(&words)
}

fn made(uuid: Guid, context: &Context) {
    context.say(format_args!(
        "ploop snapshot {uuid} has been successfully created"
    ));
}

/// Freeze a disk as it is, and mount that read-only, until it is unmounted
#[derive(Debug, clap::Args)]
pub struct Temporary {
    /// UUID of the snapshot
    #[arg(short)]
    uuid: Option<Guid>,
    /// Name to unmount it by
    #[arg(short, value_name = "COMPONENT")]
    component: String,
    /// Where to mount
    #[arg(short, value_name = "DIR")]
    mountpoint: Option<PathBuf>,
    /// Freeze the file system meanwhile
    #[arg(short = 'F')]
    freeze: bool,
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// Does it.
pub fn temporary(args: &Temporary, context: &Context) -> Result<(), Fault> {
    names::refuse_component(&args.component)?;
    let Some(point) = args.mountpoint.as_deref().and_then(|p| p.to_str()) else {
        let why = "a snapshot is mounted, or not attached at all: give -m";
        return Err(absent::option("tsnapshot without -m", why));
    };
    let (disk, _) = disk::with_descriptor(&args.file)?;
    let uuid = args.uuid.unwrap_or_else(random_guid);
    let mut more = vec!["--temporary", point];
    if args.freeze {
        more.push("--freeze");
    }
    let said = create(&disk, uuid, &more).during(Step::Snapshot)?;
    let path = PathBuf::from(said["view"]["path"].as_str().unwrap_or_default());
    if let Err(e) = names::name_component(&args.component, &path) {
        // Nobody could unmount it by the name that he gave it.
        let _ = verb(&["umount", point]);
        return Err(e).during(Step::Snapshot);
    }
    made(uuid, context);
    let device = said["view"]["device"].as_str().unwrap_or_default();
    context.say(format_args!("Mounting {device} at {point}"));
    Ok(())
}

/// Go back to a snapshot; what was written since the last one is given up
#[derive(Debug, clap::Args)]
pub struct Switch {
    /// UUID of the snapshot
    #[arg(short)]
    uuid: Guid,
    /// Keep what is given up (not offered)
    #[arg(short = 'D')]
    keep: bool,
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// Does it.
pub fn switch(args: &Switch, context: &Context) -> Result<(), Fault> {
    if args.keep {
        return Err(absent::option(
            "-D",
            "make a snapshot first, which keeps it",
        ));
    }
    let (disk, _) = disk::with_descriptor(&args.file)?;
    if disk::of(&disk)?.is_some() {
        let what = format!("{}: mounted; umount it first", disk.path().display());
        return Err(Fault::new(Code::Param, what));
    }
    one("switch", &disk, args.uuid).during(Step::Switch)?;
    super::stats::Stats::forget(&disk);
    let uuid = args.uuid;
    context.say(format_args!(
        "ploop snapshot {uuid} has been successfully switched"
    ));
    Ok(())
}

/// Delete a snapshot; what the disk is now stays as it is
#[derive(Debug, clap::Args)]
pub struct Delete {
    /// UUID of the snapshot
    #[arg(short)]
    uuid: Guid,
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// Does it.
pub fn delete(args: &Delete, context: &Context) -> Result<(), Fault> {
    let (disk, _) = disk::with_descriptor(&args.file)?;
    let said = one("delete", &disk, args.uuid).during(Step::Delete)?;
    let uuid = args.uuid;
    match said["outcome"].as_str() {
        Some("temporary") => context.say(format_args!(
            "ploop snapshot {uuid} is marked temporary: several deltas stand on it"
        )),
        _ => context.say(format_args!(
            "ploop snapshot {uuid} has been successfully deleted"
        )),
    }
    Ok(())
}

/// Has a verb of snapshots do something with one.
pub fn one(what: &str, disk: &Target, uuid: Guid) -> ploop::Result<serde_json::Value> {
    let bare = uuid.bare();
    let words = [OsStr::new("snapshot"), OsStr::new(what)];
    verb(&[
        words[0],
        words[1],
        disk.path().as_os_str(),
        OsStr::new(&bare),
    ])
}
