//! `snapshot mount`: a frozen point becomes a directory, beside the disk and whatever that does.
//!
//! This process reads no image, because it starts others and mounts: the clone that a view is of is
//! made by one that is confined.

use super::views;
use crate::answer::Answer;
use crate::attach;
use crate::cancel::Cancel;
use crate::cmd::mount::{self, device_config, mount_point, need_privilege};
use crate::cmd::umount::Point;
use crate::errand;
use crate::global::Global;
use ploop::formats::guid::Guid;
use ploop::image::chain::read_descriptor;
use ploop::image::detached;
use ploop::image::snapshot::remove::unknown;
use ploop::image::target::Target;
use ploop::image::views::Making;
use ploop::rundir::State;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

pub const EXAMPLE: &str = "Example: ploopctl snapshot mount /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a /mnt/100-before";

/// Mount the file system of a snapshot, read-only, whether the disk is attached or not
///
/// A file system that was frozen in use replays its journal first, into a delta that goes with the
/// view: the snapshot stays as it is. `ploopctl umount DIR` ends it. Meanwhile nothing is merged into
/// the snapshot.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    pub(super) disk: PathBuf,
    /// UUID of the snapshot, with or without braces
    uuid: Guid,
    /// Directory to mount it on
    #[arg(value_name = "DIR")]
    mountpoint: PathBuf,
    /// Options for the file system besides, as mount(8) takes them
    #[arg(long, value_name = "OPTS")]
    mount_options: Option<String>,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    need_privilege("snapshot mount")?;
    let point = mount_point(&args.mountpoint)?;
    let target = detached::resolve(&args.disk)?;
    refuse_unknown(&target, args.uuid)?;
    views::refuse_temporary(&target, Some(args.uuid))?;
    let cancel = Cancel::on_signals()?;
    let making = Making::begin(target.path(), args.uuid, false)?;
    clone(&target, args.uuid, &making, &cancel)?;
    let options = args.mount_options.as_deref();
    let state = open(&making, &point, options, global, &cancel)?;
    making.keep();
    let device = state.device.as_deref().unwrap_or_default();
    let text = format!("{device} {}", point.display());
    Ok(Answer::new(text, object(&state, &target, args.uuid)))
}

/// A view as a program reads it.
pub fn object(state: &State, target: &Target, point: Guid) -> Value {
    let mut object = json!(state);
    object["view_of"] = target.path().display().to_string().into();
    object["snapshot"] = point.bare().into();
    object
}

/// A view goes with all that is in it.
pub fn refuse_view(target: &Target) -> Result<()> {
    match ploop::image::views::of(target.path()) {
        None => Ok(()),
        Some((disk, name)) => Err(Error::unsupported(format!(
            "{}: a view of snapshot {}, which has no snapshots of its own; use {}",
            target.path().display(),
            name.point.bare(),
            disk.display()
        ))),
    }
}

fn refuse_unknown(target: &Target, uuid: Guid) -> Result<()> {
    let disk = read_descriptor(target.open_dir()?).map_err(|e| e.at(target.path().display()))?;
    let shot = disk.shot(uuid).filter(|shot| shot.guid != disk.top());
    match shot.ok_or_else(|| unknown(uuid))?.mark {
        None => Ok(()),
        Some(_) => Err(Error::new(
            Kind::Busy,
            format!(
                "{} is temporary: its content may be changed by a merge",
                uuid.bare()
            ),
        )),
    }
}

/// Makes the disk that a view is, out of links and an empty delta.
pub fn clone(target: &Target, uuid: Guid, making: &Making, cancel: &Cancel) -> Result<()> {
    let mut source = OsString::from(target.path());
    source.push(format!("@{}", uuid.bare()));
    let args = ["clone".into(), source, making.path().into()];
    errand::run(&args, making.lock(), cancel).map(|_| ())
}

/// Attaches a view and mounts it. After an error nothing of it is attached.
pub fn open(
    making: &Making,
    point: &Path,
    options: Option<&str>,
    global: &Global,
    cancel: &Cancel,
) -> Result<State> {
    let view = Target::resolve(making.path(), None)?;
    let config = device_config(&view, None, &global.settings()?);
    let mut state = cancel.or(attach::start(config))?;
    let options = mount::options("ro", options);
    let mounted = cancel
        .check()
        .and_then(|()| mount::mount(&state, point, &options));
    if let Err(e) = cancel.or(mounted).and_then(|()| cancel.check()) {
        mount::undo(&view);
        return Err(e);
    }
    state.mountpoint = Some(point.display().to_string());
    Ok(state)
}

/// Ends what is left of a view whose keeper is gone, and of a temporary point what is wanted: what
/// came of that.
pub fn end(path: &Path, temporary: Point) -> Result<Option<Value>> {
    let Some((disk, name)) = ploop::image::views::of(path) else {
        return Ok(None);
    };
    let Ok(target) = Target::resolve(disk, None) else {
        // It was moved or removed, its views with it.
        return Ok(None);
    };
    ploop::image::views::remove(target.open_dir()?, &name)?;
    if !name.temporary || temporary == Point::Left {
        return Ok(None);
    }
    match take_away(&target, name.point) {
        Ok(said) => Ok(Some(said["outcome"].clone())),
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => {
            tracing::warn!(
                "snapshot {} is temporary and stays for now: {e}",
                name.point.bare()
            );
            Ok(None)
        }
    }
}

/// Deletes a point; what was said of that.
pub fn take_away(target: &Target, point: Guid) -> Result<Value> {
    let cancel = Cancel::on_signals()?;
    let args = ["snapshot".into(), "delete".into(), target.path().into()];
    let args = args.into_iter().chain([OsString::from(point.bare())]);
    errand::run(&args.collect::<Vec<_>>(), None, &cancel)
}
