//! `mount`: a disk becomes a device, and its file system a directory.

use super::code::{Code, During, Fault, Step};
use super::disk::{self, Bare};
use super::names;
use super::stats::Stats;
use super::{Context, absent, size, verb, volumes};
use crate::attach;
use crate::cancel::Cancel;
use crate::cmd::convert;
use crate::cmd::mount as ours;
use crate::cmd::snapshot::views;
use crate::volume::Volume;
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::target::Target;
use ploop::rundir::State;
use ploop::{Error, Kind};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Make a disk a device, and mount its file system
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Refuse writes
    #[arg(short)]
    pub read_only: bool,
    /// Check the file system first
    #[arg(short = 'F')]
    pub fsck: bool,
    /// Name of the device, as in /dev/ploop12345
    #[arg(short, value_name = "DEVICE")]
    pub device: Option<PathBuf>,
    /// Where to mount
    #[arg(short, value_name = "DIR")]
    pub mountpoint: Option<PathBuf>,
    /// Options for the file system
    #[arg(short, value_name = "OPTS")]
    pub options: Option<String>,
    /// Type of the file system
    #[arg(short = 't', value_name = "FS")]
    pub fs: Option<String>,
    /// Snapshot, or `base`
    #[arg(short, value_name = "UUID")]
    pub uuid: Option<String>,
    /// Name to unmount it by
    #[arg(short, value_name = "COMPONENT")]
    pub component: Option<String>,
    /// What images without a descriptor are
    #[arg(short, value_name = "FORMAT")]
    pub format: Option<Bare>,
    /// Cluster of a raw image, in sectors: accepted, every one serves
    #[arg(short = 'b', value_name = "SECTORS", value_parser = size::parse)]
    pub block: Option<u64>,
    /// Do not ask the kernel for partitions: accepted, it never is
    #[arg(short = 'n')]
    pub no_probe: bool,
    /// DiskDescriptor.xml, or the images of a disk, base first
    #[arg(value_name = "XML|DELTA", required = true)]
    pub files: Vec<PathBuf>,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    ours::need_privilege("mount").during(Step::Attach)?;
    if let Some(device) = &args.device {
        names::refuse_device(device)?;
    }
    args.component
        .as_deref()
        .map_or(Ok(()), names::refuse_component)?;
    let point = args.mountpoint.as_deref().map(ours::mount_point);
    let point = point.transpose().during(Step::Mount)?;
    let disk = target(&args.files, args.format)?;
    if let Some(uuid) = snapshot(args, &disk)? {
        return view(args, &disk, uuid, point.as_deref(), context);
    }
    if let Some(attached) = disk::of(&disk)? {
        let device = attached.state.device.unwrap_or_default();
        return Err(Fault::new(
            Code::Mount,
            format!("{}: already used by device {device}", disk.path().display()),
        ));
    }
    let state = attach_and_mount(args, &disk, point.as_deref(), context)?;
    let device = PathBuf::from(state.device.unwrap_or_default());
    let named = match &args.device {
        Some(name) => names::name_device(name, &device),
        None => Ok(()),
    };
    let named = named.and_then(|()| match &args.component {
        Some(component) => names::name_component(component, disk.path()),
        None => Ok(()),
    });
    if let Err(e) = named {
        names::forget(Some(&device), disk.path());
        ours::undo(&disk);
        return Err(e).during(Step::Attach);
    }
    Ok(())
}

/// The disk that is meant by a descriptor, one image, or all images of a disk with a descriptor.
pub fn target(files: &[PathBuf], format: Option<Bare>) -> Result<Target, Fault> {
    let top = files.last().expect("clap wants one");
    let disk = disk::resolve(top, format)?;
    if files.len() == 1 {
        return Ok(disk);
    }
    let whole = || {
        let chain = disk.chain(disk.open_dir()?)?;
        let dir = disk.dir().canonicalize()?;
        let listed = files.iter().map(|file| Ok(file.canonicalize()?));
        let listed: ploop::Result<Vec<PathBuf>> = listed.collect();
        let images = chain.layers.iter().map(|layer| dir.join(&layer.name));
        Ok::<_, Error>(listed? == images.collect::<Vec<_>>())
    };
    match matches!(disk, Target::Bundle { .. }) && whole().during(Step::Find)? {
        true => Ok(disk),
        false => Err(absent::option(
            "a list of images",
            "it must be all those of one descriptor beside them, base first",
        )),
    }
}

/// The snapshot that is to be mounted; none for the disk as it is.
fn snapshot(args: &Args, disk: &Target) -> Result<Option<Guid>, Fault> {
    let Some(name) = &args.uuid else {
        return Ok(None);
    };
    if matches!(disk, Target::Bare { .. }) {
        return Err(Fault::new(
            Code::Param,
            "-u: an image alone has no snapshots",
        ));
    }
    let descriptor = disk::descriptor(disk)?;
    let uuid = disk::point(&descriptor, name)?;
    if descriptor.shot(uuid).is_none() {
        let what = format!("{name}: no such snapshot");
        return Err(Fault::new(Code::NoSnap, what));
    }
    Ok(Some(uuid).filter(|uuid| *uuid != descriptor.top()))
}

/// Mounts a snapshot beside the disk, read-only.
fn view(
    args: &Args,
    disk: &Target,
    uuid: Guid,
    point: Option<&Path>,
    context: &Context,
) -> Result<(), Fault> {
    let Some(point) = point else {
        let why = "a snapshot is mounted, or not attached at all: give -m";
        return Err(absent::option("-u without -m", why));
    };
    let bare = uuid.bare();
    let mut words: Vec<&OsStr> = ["snapshot", "mount"].map(OsStr::new).to_vec();
    words.extend([
        disk.path().as_os_str(),
        OsStr::new(&bare),
        point.as_os_str(),
    ]);
    if let Some(options) = &args.options {
        words.extend([OsStr::new("--mount-options"), OsStr::new(options)]);
    }
    let said = verb(&words).during(Step::MountSnapshot)?;
    let text = |name: &str| said[name].as_str().unwrap_or_default().to_string();
    let device = PathBuf::from(text("device"));
    let named = || {
        if let Some(name) = &args.device {
            names::name_device(name, &device)?;
        }
        match &args.component {
            Some(component) => names::name_component(component, Path::new(&text("path"))),
            None => Ok(()),
        }
    };
    if let Err(e) = named() {
        // Nobody could unmount it by the name that he gave it.
        let _ = verb(&[OsStr::new("umount"), point.as_os_str()]);
        return Err(e).during(Step::MountSnapshot);
    }
    tell_mount(context, &device, point, args);
    Ok(())
}

fn attach_and_mount(
    args: &Args,
    disk: &Target,
    point: Option<&Path>,
    context: &Context,
) -> Result<State, Fault> {
    let settings = context.global.settings().during(Step::Find)?;
    let format = match disk {
        Target::Bare { format, .. } => Some((*format).into()),
        Target::Bundle { .. } => None,
    };
    let mut config = ours::device_config(disk, format, &settings);
    config.read_only = args.read_only;
    views::settle(disk);
    let cancel = Cancel::on_signals().during(Step::Attach)?;
    convert::settle(disk, &cancel).during(Step::Attach)?;
    let state = cancel.or(attach::start(config)).during(Step::Attach)?;
    tell_layers(context, disk, &state);
    if !args.read_only {
        Stats::forget(disk);
    }
    let device = PathBuf::from(state.device.clone().unwrap_or_default());
    let mut step = Step::Attach;
    let done = cancel.check().and_then(|()| {
        let Some(point) = point else {
            return Ok(());
        };
        if args.fsck {
            step = Step::Fsck;
            fsck(&device)?;
        }
        step = Step::Mount;
        tell_mount(context, &device, point, args);
        // A snapshot's journal may have to be replayed, on a device that can be written.
        let reads = args.read_only || volumes::is_snapshot(disk);
        let access = if reads { "ro" } else { "rw" };
        let options = ours::options(access, args.options.as_deref());
        ours::mount_as(&state, point, args.fs.as_deref(), &options)
    });
    if let Err(e) = cancel.or(done).and_then(|()| cancel.check()) {
        ours::undo(disk);
        return Err(e).during(step);
    }
    Ok(state)
}

/// Checks the file system of a device that is not mounted; what was mended is fine.
fn fsck(device: &Path) -> ploop::Result<()> {
    let volume = Volume::of(device)?;
    let output = Command::new("fsck").arg("-p").arg(volume.path()).output();
    let output = output.map_err(|e| Error::from(e).at("fsck(8)"))?;
    match output.status.code() {
        Some(0 | 1) => Ok(()),
        _ => Err(Error::new(
            Kind::Damaged,
            format!(
                "fsck of {}: {}: {}",
                device.display(),
                output.status,
                String::from_utf8_lossy(&output.stdout).trim()
            ),
        )),
    }
}

fn tell_layers(context: &Context, disk: &Target, state: &State) {
    let device = state.device.as_deref().unwrap_or_default();
    let files: Vec<OsString> = match disk {
        Target::Bare { file, .. } => vec![file.clone().into()],
        Target::Bundle { dir } => disk::descriptor(disk)
            .and_then(|d: Descriptor| d.chain(d.top()).during(Step::Descriptor))
            .map(|chain| chain.into_iter().map(|i| dir.join(i.file).into()).collect())
            .unwrap_or_default(),
    };
    for (n, file) in files.iter().enumerate() {
        let top = n + 1 == files.len() && !state.read_only;
        let access = if top { "rw" } else { "ro" };
        let file = Path::new(file).display();
        context.say(format_args!(
            "Adding delta dev={device} img={file} ({access})"
        ));
    }
}

fn tell_mount(context: &Context, device: &Path, point: &Path, args: &Args) {
    context.say(format_args!(
        "Mounting {} at {} fstype='{}' data='{}'",
        device.display(),
        point.display(),
        args.fs.as_deref().unwrap_or("auto"),
        args.options.as_deref().unwrap_or_default()
    ));
}
