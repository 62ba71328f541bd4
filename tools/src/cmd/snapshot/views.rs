//! Views of a disk's points, as commands meet them: cleaned up after, shown, refused to be harmed.

use super::attached;
use crate::attach::{self, Attached};
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::change;
use ploop::image::detached::{self, Detached};
use ploop::image::snapshot::remove;
use ploop::image::target::Target;
use ploop::image::views::{self, Name, View};
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// A view that is in use.
pub struct Shown {
    /// The point that is looked at.
    pub point: Guid,
    path: PathBuf,
    files: Vec<OsString>,
    device: Option<String>,
    mountpoint: Option<String>,
}

impl Shown {
    /// What `umount` takes to end it.
    pub fn place(&self) -> String {
        let path = || self.path.display().to_string();
        self.mountpoint.clone().unwrap_or_else(path)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "path": self.path.display().to_string(),
            "device": self.device,
            "mountpoint": self.mountpoint,
        })
    }
}

/// Those of a disk's views that are in use.
pub fn shown(target: &Target, views: &[View]) -> Result<Vec<Shown>> {
    let mut alive = views.iter().filter(|view| view.alive).peekable();
    if alive.peek().is_none() {
        return Ok(Vec::new());
    }
    let attached = attach::registered()?;
    let folder = target.path().join(views::FOLDER);
    let show = |view: &View| {
        let run = view.identity.to_string();
        let state = attached.iter().find(|a| a.run.ends_with(&run));
        let state = state.map(|a| &a.state);
        Shown {
            point: view.name.point,
            path: folder.join(view.name.to_string()),
            files: view.files.clone(),
            device: state.and_then(|s| s.device.clone()),
            mountpoint: state.and_then(|s| s.mountpoint.clone()),
        }
    };
    Ok(alive.map(show).collect())
}

/// The views of a disk that are in use; a bare image has none.
pub fn in_use(target: &Target) -> Result<Vec<Shown>> {
    match target {
        Target::Bare { .. } => Ok(Vec::new()),
        Target::Bundle { .. } => shown(target, &views::all(target.open_dir()?)?),
    }
}

/// Removes what dead views left of themselves and in the disk's tree. What cannot be removed now is
/// no reason to fail.
pub fn settle(target: &Target) {
    let swept = || {
        if matches!(target, Target::Bare { .. }) {
            return Ok(());
        }
        let dir = target.open_dir()?;
        let found = views::all(&dir)?;
        if !found.is_empty() {
            // Their keepers' remains go first.
            let attached = attach::all()?;
            found.iter().for_each(|view| end_unused(view, &attached));
        }
        views::sweep(dir, |name| forget(target, name))
    };
    if let Err(e) = swept() {
        tracing::warn!("{}: views: {e}", target.path().display());
    }
}

/// Ends a view that is attached and mounted nowhere: who made it was killed, or it was unmounted by
/// other means. One that somebody uses otherwise stays.
fn end_unused(view: &View, attached: &[Attached]) {
    let run = view.identity.to_string();
    let served = attached.iter().find(|a| a.run.ends_with(&run));
    let unused = served.filter(|a| a.state.device.is_some() && a.state.mountpoint.is_none());
    if let Some(unused) = unused.filter(|_| !view.making)
        && let Err(e) = attach::stop(unused)
    {
        tracing::debug!("{}: {e}", unused.state.path);
    }
}

/// The point of a temporary view is marked, so that it goes as any temporary point.
fn forget(target: &Target, name: &Name) -> Result<()> {
    match mark(target, name.point) {
        // It was not even frozen, or went already.
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        marked => marked,
    }
}

/// Marks a point temporary, of a disk that is attached or not.
pub fn mark(target: &Target, point: Guid) -> Result<()> {
    if let Some(running) = attached::find(target.path())? {
        return running.mark(point);
    }
    let disk = Detached::take(target.open_dir()?)?;
    disk.run(async {
        let old = change::settle(disk.folder()).await?;
        if let Some(change) = remove::mark(disk.folder(), &old, point).await? {
            change.commit().await?;
        }
        Ok(())
    })
}

/// What a verb is about to change of a disk's tree.
#[derive(Debug, Clone, Copy)]
pub enum Harm {
    /// A point goes.
    Delete(Guid),
    /// A delta, the top if none is named, and the one below it become one.
    Merge(Option<Guid>),
}

/// Refuses what would write to a file that somebody looks at, and says who and how to end it.
pub fn refuse(disk: &Path, harm: Harm) -> Result<()> {
    let target = detached::resolve(disk)?;
    let views = in_use(&target)?;
    if views.is_empty() {
        return Ok(());
    }
    let descriptor = ploop::image::chain::read_descriptor(target.open_dir()?)?;
    let Some(file) = written(&descriptor, harm) else {
        return Ok(());
    };
    let in_the_way = |view: &&Shown| view.files.iter().any(|f| f == OsStr::new(file));
    match views.iter().find(in_the_way) {
        None => Ok(()),
        Some(view) => Err(Error::new(
            Kind::Busy,
            format!(
                "{}: snapshot {} is mounted at {place}, and that view needs what would be merged; \
                 `ploopctl umount {place}` ends it",
                target.path().display(),
                view.point.bare(),
                place = view.place(),
            ),
        )),
    }
}

/// Refuses to share files up to `point`, or the disk as it is, when somebody looks at a temporary point
/// among them, and says how to end it.
pub fn refuse_temporary(target: &Target, point: Option<Guid>) -> Result<()> {
    let views = in_use(target)?;
    if views.is_empty() {
        return Ok(());
    }
    let disk = ploop::image::chain::read_descriptor(target.open_dir()?)?;
    let Ok(chain) = disk.chain(point.unwrap_or(disk.top())) else {
        return Ok(());
    };
    let marked = |guid| disk.shot(guid).is_some_and(|shot| shot.mark.is_some());
    let shared = |guid| chain.iter().any(|image| image.guid == guid);
    match views.iter().find(|v| marked(v.point) && shared(v.point)) {
        None => Ok(()),
        Some(view) => Err(Error::new(
            Kind::Busy,
            format!(
                "{}: snapshot {} is temporary and mounted at {place}, so nothing that stands on it \
                 can be shared; `ploopctl umount {place}` ends it",
                target.path().display(),
                view.point.bare(),
                place = view.place(),
            ),
        )),
    }
}

/// The file that the verb would merge into, or remove.
fn written(disk: &Descriptor, harm: Harm) -> Option<&str> {
    let parent = |guid| disk.shot(guid).map(|shot| shot.parent);
    let guid = match harm {
        Harm::Delete(guid) if guid == disk.top() => parent(guid)?,
        Harm::Delete(guid) => guid,
        Harm::Merge(guid) => parent(guid.unwrap_or(disk.top()))?,
    };
    disk.image(guid).map(|image| image.file.as_str())
}
