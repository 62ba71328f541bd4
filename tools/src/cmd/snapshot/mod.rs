//! `snapshot`: the points of a disk that can be gone back to, one verb a file.

pub mod attached;
mod create;
mod delete;
mod diff;
mod internal;
mod list;
mod merge;
pub mod mount;
mod switch;
pub mod views;

use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::attach;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::detached::{self, Detached};
use ploop::image::snapshot::copy::{Pace, Work};
use ploop::image::snapshot::{self, remove};
use ploop::image::target::Target;
use ploop::io::folder::DirFolder;
use ploop::sandbox::Files;
use ploop::{Error, Kind, Result};
use std::path::Path;
use views::Harm;

/// Make, list, mount, compare, merge and delete snapshots of a disk, and go back to them
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

/// What to do with them.
#[derive(Debug, clap::Subcommand)]
enum Verb {
    #[command(
        after_help = "Example: ploopctl snapshot create /var/lib/ct/100 --name before-upgrade"
    )]
    Create(create::Args),
    #[command(after_help = "Example: ploopctl snapshot list /var/lib/ct/100")]
    List(list::Args),
    #[command(after_help = delete::EXAMPLE)]
    Delete(delete::Args),
    #[command(after_help = merge::EXAMPLE)]
    Merge(merge::Args),
    #[command(after_help = switch::EXAMPLE)]
    Switch(switch::Args),
    #[command(after_help = diff::EXAMPLE)]
    Diff(diff::Args),
    #[command(after_help = mount::EXAMPLE)]
    Mount(mount::Args),
}

impl Verb {
    fn disk(&self) -> &Path {
        match self {
            Self::Create(args) => &args.disk,
            Self::List(args) => &args.disk,
            Self::Delete(args) => &args.disk,
            Self::Merge(args) => &args.disk,
            Self::Switch(args) => &args.disk,
            Self::Diff(args) => &args.disk,
            Self::Mount(args) => &args.disk,
        }
    }

    /// What was said of a bare image.
    const fn format(&self) -> Option<FormatArg> {
        match self {
            Self::Create(args) => args.format,
            Self::List(args) => args.format,
            Self::Delete(args) => args.format,
            Self::Switch(args) => args.format,
            Self::Merge(_) | Self::Diff(_) | Self::Mount(_) => None,
        }
    }
}

/// A snapshot, as it was typed.
#[derive(Debug, Clone)]
struct Point(String);

impl From<&str> for Point {
    fn from(typed: &str) -> Self {
        Self(typed.into())
    }
}

impl Point {
    /// The UUID that it is, of a disk's snapshot.
    fn uuid(&self) -> Result<Guid> {
        let parsed: Result<Guid> = self.0.parse();
        parsed.map_err(|e| Error::new(Kind::Usage, e.to_string()))
    }

    /// The name or ID that it is, of an image's own snapshot.
    fn typed(&self) -> &str {
        &self.0
    }
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    if let Some(format) = args.verb.format() {
        return internal::run(&args.verb, format, global);
    }
    let target = detached::resolve(args.verb.disk())?;
    mount::refuse_view(&target)?;
    views::settle(&target);
    match &args.verb {
        Verb::Delete(args) => views::refuse(&args.disk, Harm::Delete(args.point.uuid()?))?,
        Verb::Merge(args) => views::refuse(&args.disk, Harm::Merge(args.uuid))?,
        _ => {}
    }
    match &args.verb {
        Verb::Create(args) => create::run(args, global),
        Verb::List(args) => list::run(args),
        Verb::Delete(args) => delete::run(args, global),
        Verb::Merge(args) => merge::run(args, global),
        Verb::Switch(args) => switch::run(args),
        Verb::Diff(args) => diff::run(args, global.output),
        Verb::Mount(args) => mount::run(args, global),
    }
}

/// The image directory that DISK means, of a disk that is not attached.
pub fn resolve(disk: &Path) -> Result<Target> {
    let target = detached::resolve(disk)?;
    match attach::by_identity(&target.identity()?)? {
        None => Ok(target),
        Some(attached) => Err(Error::new(
            Kind::Busy,
            format!(
                "{}: attached; for now this is done to a disk that is detached: umount it first",
                attached.state.path
            ),
        )),
    }
}

/// Takes the disk, in the sandbox.
fn take(target: &Target) -> Result<Detached> {
    let dir = target.open_dir()?;
    confine(&dir, Files::Change)?;
    Detached::take(dir).map_err(|e| e.at(target.path().display()))
}

/// Takes the disk and does what copies data, with progress.
fn work<T>(
    target: &Target,
    global: &Global,
    cancel: &Cancel,
    pace: &dyn Pace,
    job: impl AsyncFnOnce(&DirFolder, &mut Work<'_>) -> Result<T>,
) -> Result<T> {
    // Before the sandbox: there a terminal could not be asked for its width.
    let mut meter = Meter::new(global.progress, cancel);
    let disk = take(target)?;
    let mut work = Work::new(&mut meter, pace);
    let done = disk.run(job(disk.folder(), &mut work));
    done.map_err(|e| e.at(target.path().display()))
}

/// What a signal left.
fn cancelled(e: Error, left: &str) -> Error {
    match e.kind() {
        Kind::Cancelled => Error::new(Kind::Cancelled, format!("cancelled by a signal; {left}")),
        _ => e,
    }
}

/// Makes a snapshot, once what is temporary and can go is gone. What cannot go now is no reason to
/// make none.
pub async fn create(folder: &DirFolder, uuid: Guid, work: &mut Work<'_>) -> Result<Descriptor> {
    merge_temporaries(folder, work).await?;
    snapshot::create::offline(folder, uuid, detached::random_guid()).await
}

/// Merges away what was marked temporary and can go, and says how many that were. Fails when a
/// signal came, and warns of anything else.
async fn merge_temporaries(folder: &DirFolder, work: &mut Work<'_>) -> Result<usize> {
    match remove::temporaries(folder, work).await {
        Err(e) if e.kind() == Kind::Cancelled => Err(e),
        Err(e) => {
            tracing::warn!("a temporary snapshot stays for now: {e}");
            Ok(0)
        }
        done => done,
    }
}
