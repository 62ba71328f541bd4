//! `mount`: a disk becomes a block device, and its file system a directory.

use super::snapshot::views;
use super::twin;
use super::{CacheArg, FormatArg, SandboxArg};
use crate::answer::Answer;
use crate::attach;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::settings::Settings;
use crate::volume::Volume;
use ploop::image::target::Target;
use ploop::io::room::KeepFree;
use ploop::rundir::State;
use ploop::serve::supervise::message::{Announce, Cache, KeeperConfig, Mode};
use ploop::{Error, Kind, Result};
use rustix::thread::CapabilitySet;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Attach a disk as a block device and mount its file system
///
/// Prints the device, and the mount point, once they can be used.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Directory to mount the file system on; without one there is only the device
    mountpoint: Option<PathBuf>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Attach a qcow2 image as it was at this snapshot that it keeps in itself, by name or ID; with
    /// --read-only
    ///
    /// A file system that was in use then has a journal that is not replayed on a device that refuses
    /// writes: `--mount-options noload` mounts ext4 without, `norecovery` XFS, and what only the journal
    /// had is not seen.
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Options for the file system, as mount(8) takes them
    #[arg(long, value_name = "OPTS", requires = "mountpoint")]
    mount_options: Option<String>,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
    /// Cache mode of the writable layer; `none` when neither this nor the settings say
    #[arg(long)]
    cache: Option<CacheArg>,
    /// Leave so much of the host's file system free: a size, a percentage, or 0
    ///
    /// With less, whatever needs new space fails with ENOSPC until there is more. Without this
    /// option 1G or 1% are left, whichever is more, but at most an eighth.
    #[arg(long, value_name = "SPACE", value_parser = super::keep_free)]
    keep_free: Option<KeepFree>,
    /// What the process that serves may do, should an image or a client take it over; `on` when
    /// neither this nor the settings say
    #[arg(long)]
    sandbox: Option<SandboxArg>,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    super::check_snapshot(args.snapshot.as_deref(), args.read_only, args.format)?;
    need_privilege("mount")?;
    let settings = global.settings()?;
    let point = args.mountpoint.as_deref().map(mount_point).transpose()?;
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    let mut config = device_config(&target, args.format, &settings);
    config.read_only = args.read_only;
    config.snapshot.clone_from(&args.snapshot);
    config.cache = args.cache.map_or(config.cache, Into::into);
    config.keep_free = args.keep_free.unwrap_or(config.keep_free);
    config.sandbox = args.sandbox.map_or(config.sandbox, SandboxArg::is_on);
    views::settle(&target);
    let cancel = Cancel::on_signals()?;
    super::convert::settle(&target, &cancel)?;
    let mut state = cancel.or(attach::start(config))?;
    let mounted = cancel.check().and_then(|()| match &point {
        Some(point) => {
            let access = if args.read_only { "ro" } else { "rw" };
            mount(
                &state,
                point,
                &options(access, args.mount_options.as_deref()),
            )
        }
        None => Ok(()),
    });
    if let Err(e) = cancel.or(mounted).and_then(|()| cancel.check()) {
        undo(&target);
        return Err(e);
    }
    state.mountpoint = point.map(|p| p.display().to_string());
    let device = state.device.clone().unwrap_or_default();
    let text = match &state.mountpoint {
        Some(point) => format!("{device} {point}"),
        None => device,
    };
    Ok(Answer::new(text, json!(state)))
}

/// What a keeper is told to attach a disk as a device, unless its user wants it otherwise.
pub fn device_config(
    target: &Target,
    format: Option<FormatArg>,
    settings: &Settings,
) -> KeeperConfig {
    KeeperConfig {
        disk: target.path().to_path_buf(),
        format: format.map(Into::into),
        snapshot: None,
        read_only: false,
        cache: settings.mount.cache.map_or(Cache::None, Into::into),
        keep_free: settings.keep_free.unwrap_or_default(),
        mode: Mode::Device,
        detached: true,
        log: settings.log.map(Into::into).unwrap_or_default(),
        sandbox: settings.sandbox.is_none_or(SandboxArg::is_on),
        announce: Announce::Nobody,
        json: false,
    }
}

/// Refuses early, and names the capability.
pub fn need_privilege(verb: &str) -> Result<()> {
    let held = rustix::thread::capabilities(None)
        .is_ok_and(|c| c.effective.contains(CapabilitySet::SYS_ADMIN));
    if held {
        return Ok(());
    }
    Err(Error::new(
        Kind::Privilege,
        format!("{verb} needs root, or the capability CAP_SYS_ADMIN"),
    ))
}

/// A directory to mount on, absolute.
pub fn mount_point(path: &Path) -> Result<PathBuf> {
    let point = path
        .canonicalize()
        .map_err(|e| Error::from(e).at(format!("mount point {}", path.display())))?;
    match point.is_dir() {
        true => Ok(point),
        false => Err(Error::invalid(format!(
            "mount point {}: not a directory",
            path.display()
        ))),
    }
}

/// Options for mount(8).
pub fn options(access: &str, more: Option<&str>) -> String {
    match more {
        Some(more) => format!("{access},{more}"),
        None => access.to_string(),
    }
}

/// Mounts the file system of a disk that was attached; nobody else is told of it yet.
pub fn mount(state: &State, point: &Path, options: &str) -> Result<()> {
    mount_as(state, point, None, options)
}

/// The same, of a type that is known.
pub fn mount_as(state: &State, point: &Path, fs: Option<&str>, options: &str) -> Result<()> {
    let device = state.device.as_deref().unwrap_or_default();
    // Held until the mount holds it.
    let volume = Volume::of(Path::new(device))?;
    let device = volume.path();
    let options = match twin::option(&device)? {
        Some(more) => format!("{options},{more}"),
        None => options.to_string(),
    };
    let output = Command::new("mount")
        .args(fs.map(|fs| ["-t", fs]).into_iter().flatten())
        .args(["-o", &options, "--"])
        .args([device.as_path(), point])
        .output()
        .map_err(|e| Error::from(e).at("mount(8)"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(
        Kind::Invalid,
        format!(
            "{} is not mounted on {}: {}; nothing is left attached",
            state.path,
            point.display(),
            said.trim().replace('\n', " ")
        ),
    ))
}

/// Detaches a disk that was attached in vain.
pub fn undo(target: &Target) {
    // Whoever looks at the device in passing must not keep attached what nobody was told of.
    let stop = |a| attach::stop(&a).or_else(|_| attach::abandon(&a));
    if let Err(e) = attach::find(target.path()).and_then(stop) {
        tracing::warn!("detaching after a failed mount: {e}");
    }
}
