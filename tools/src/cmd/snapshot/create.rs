//! `snapshot create`: the disk as it is now can be gone back to.

use super::attached::{self, Running};
use super::{cancelled, mount, resolve, views, work};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::cmd::FormatArg;
use crate::cmd::mount::{mount_point, need_privilege};
use crate::errand;
use crate::global::Global;
use crate::meter::Meter;
use ploop::formats::guid::Guid;
use ploop::image::chain::read_descriptor;
use ploop::image::detached::{self, random_guid};
use ploop::image::snapshot::names::{self, Names};
use ploop::image::target::Target;
use ploop::image::views::Making;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Freeze a disk as it is under a UUID, which is printed
///
/// What is written from then on goes into a new delta. A disk in use goes on, after a short wait: what
/// was answered is in the snapshot; what its file system still holds in memory is only with --freeze,
/// which lets programs wait until it is written. Snapshots that are marked temporary and can go by now
/// are merged away first.
///
/// With --format qcow2 it is kept in the image, by a name and an ID, and the image is not attached.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare qcow2 image
    pub(super) disk: PathBuf,
    /// UUID of the snapshot, with or without braces; a random one otherwise
    #[arg(long)]
    uuid: Option<Guid>,
    /// What people call it
    #[arg(long)]
    name: Option<String>,
    /// Mount it on this directory as well, read-only, for as long as that is mounted: `ploopctl
    /// umount DIR` ends the view and takes the snapshot away, and after a crash both go by themselves
    #[arg(long, value_name = "DIR")]
    temporary: Option<PathBuf>,
    /// Freeze the file system on the disk meanwhile, so that nothing of it is in memory only
    #[arg(long)]
    freeze: bool,
    /// Format of a bare image file: qcow2, which keeps the snapshot in itself, by its name
    #[arg(long, requires = "name", conflicts_with_all = ["uuid", "temporary", "freeze"])]
    pub(super) format: Option<FormatArg>,
}

impl Args {
    /// The name of a snapshot that is kept in an image.
    pub(super) fn own_name(&self) -> Result<&str> {
        let name = self.name.as_deref().unwrap_or_default();
        names::check(name).map(|()| name)
    }
}

const CANCELLED: &str = "no snapshot was made; a merge that was begun is gone on with by the next \
    snapshot, and the disk can be used meanwhile";

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    args.name.as_deref().map_or(Ok(()), names::check)?;
    let cancel = Cancel::on_signals()?;
    if let Some(point) = &args.temporary {
        return temporary(args, point, global, &cancel);
    }
    let uuid = args.uuid.unwrap_or_else(random_guid);
    if let Some(running) = attached::find(&args.disk)? {
        return freeze(
            args,
            uuid,
            &running,
            &mut Meter::new(global.progress, &cancel),
        );
    }
    let target = resolve(&args.disk)?;
    let done = work(&target, global, &cancel, &(), async |folder, work| {
        let disk = super::create(folder, uuid, work).await?;
        let Some(name) = &args.name else {
            return Ok(());
        };
        // The snapshot is there; its name is a remark.
        if let Err(e) = Names::set(folder, &disk, uuid, name).await {
            tracing::warn!("the snapshot is made, but its name is not kept: {e}");
        }
        Ok(())
    });
    done.map_err(|e| cancelled(e, CANCELLED))?;
    Ok(answer(args, uuid, &target, json!(0), Value::Null))
}

/// Makes a snapshot that goes with its view. In order: the directory of the view, whose name says
/// that its point is temporary; the snapshot; the view's links, which keep it from being merged away;
/// the mark in the descriptor; the mount. Whoever finds the directory and nobody who serves it marks
/// the point, too, so at any cut both go.
fn temporary(args: &Args, dir: &Path, global: &Global, cancel: &Cancel) -> Result<Answer> {
    need_privilege("snapshot create --temporary")?;
    let dir = mount_point(dir)?;
    let target = detached::resolve(&args.disk)?;
    let uuid = args.uuid.unwrap_or_else(random_guid);
    if read_descriptor(target.open_dir()?)?.shot(uuid).is_some() {
        let what = format!("there is a snapshot {} already", uuid.bare());
        return Err(Error::invalid(what));
    }
    views::refuse_temporary(&target, None)?;
    let making = Making::begin(target.path(), uuid, true)?;
    let opened = freeze_apart(args, uuid, &target, &making, cancel).and_then(|made| {
        mount::clone(&target, uuid, &making, cancel)?;
        views::mark(&target, uuid)?;
        let state = mount::open(&making, &dir, None, global, cancel)?;
        Ok((made, state))
    });
    let (made, state) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            give_up(making, &target, uuid);
            return Err(e);
        }
    };
    making.keep();
    let mut answer = answer(
        args,
        uuid,
        &target,
        made["stall_us"].clone(),
        made["frozen_us"].clone(),
    );
    answer.json["view"] = mount::object(&state, &target, uuid);
    Ok(answer)
}

/// Takes the point away of which there will be no view, if it was made: marked while the view is
/// there, removed when it is not in the way any more.
fn give_up(making: Making, target: &Target, uuid: Guid) {
    let marked = views::mark(target, uuid);
    drop(making);
    match marked.and_then(|()| mount::take_away(target, uuid)) {
        Err(e) if e.kind() != Kind::NotFound => {
            tracing::warn!("snapshot {} was made for it and stays: {e}", uuid.bare());
        }
        _ => {}
    }
}

/// Makes the snapshot by a process of its own: this one starts others, and may not be confined.
fn freeze_apart(
    args: &Args,
    uuid: Guid,
    target: &Target,
    making: &Making,
    cancel: &Cancel,
) -> Result<Value> {
    let mut words: Vec<OsString> = vec!["snapshot".into(), "create".into(), target.path().into()];
    words.extend(["--uuid".into(), uuid.bare().into()]);
    if let Some(name) = &args.name {
        words.push(format!("--name={name}").into());
    }
    if args.freeze {
        words.push("--freeze".into());
    }
    errand::run(&words, making.lock(), cancel)
}

/// Has the keeper of an attached disk do it.
fn freeze(args: &Args, uuid: Guid, running: &Running, meter: &mut Meter<'_>) -> Result<Answer> {
    let merged = running.remove_temporaries(None, meter);
    merged.map_err(|e| cancelled(e, CANCELLED))?;
    let made = running.freeze(uuid, args.freeze)?;
    if let Some(name) = &args.name
        && let Err(e) = running.set_name(uuid, name)
    {
        tracing::warn!("the snapshot is made, but its name is not kept: {e}");
    }
    let time = |name: &str| made.get(name).cloned().unwrap_or_default();
    let (stall, frozen) = (time("stall_us"), time("frozen_us"));
    Ok(answer(args, uuid, &running.target, stall, frozen))
}

fn answer(args: &Args, uuid: Guid, target: &Target, stall_us: Value, frozen_us: Value) -> Answer {
    Answer::new(
        uuid.bare(),
        json!({
            "path": target.path().display().to_string(),
            "uuid": uuid.bare(),
            "name": args.name,
            "stall_us": stall_us,
            "temporary": args.temporary.is_some(),
            "view": null,
            "frozen_us": frozen_us,
        }),
    )
}
