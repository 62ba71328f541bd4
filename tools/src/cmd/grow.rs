//! `grow`: a disk gets a larger size, and nothing else changes.

use super::{FormatArg, confine, snapshot};
use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::size;
use ploop::client::{Remote, number};
use ploop::image::detached::Detached;
use ploop::image::grow::{self, Sizes, Wanted};
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::target::{Source, Target};
use ploop::io::exec::{self, Engine};
use ploop::sandbox::Files;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Make a disk larger, but not the file system on it
///
/// The new part reads as zeros. A disk in use goes on, after a short wait, and its device has the new
/// size at once; clients of an NBD server see it when they connect again. What is in the way of the larger
/// table is moved first; interrupted anywhere, the disk is as large as before or as it was to be, and the
/// same command with that size goes on with it. Snapshots keep their size. What the external data file of
/// a qcow2 image holds behind the end of the disk is cut off. For the file system, too, see resize.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Size in bytes, or with K, M, G, T; with a + before it, how much more. Rounded up to a cluster
    #[arg(value_parser = size::wanted)]
    size: Wanted,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

/// What came of it.
pub struct Grown {
    /// Bytes before and after.
    pub sizes: Sizes,
    /// How long the users of the disk waited, in microseconds; null when nobody knows.
    pub stall_us: Value,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    snapshot::mount::refuse_view(&target)?;
    let grown = match attach::by_identity(&target.identity()?)? {
        Some(attached) => running(&attached, args.size),
        None => detached(&target, args.size).map(|sizes| Grown {
            sizes,
            stall_us: json!(0),
        }),
    };
    let grown = grown.map_err(|e| smaller(e).at(target.path().display()))?;
    let Sizes { old, new } = grown.sizes;
    let text = match old == new {
        true => format!(
            "{}: has {} already",
            target.path().display(),
            size::show(new)
        ),
        false => format!(
            "{}: {}, was {}",
            target.path().display(),
            size::show(new),
            size::show(old)
        ),
    };
    Ok(Answer::new(
        text,
        json!({
            "path": target.path().display().to_string(),
            "old_size": old,
            "size": new,
            "stall_us": grown.stall_us,
        }),
    ))
}

/// Says what makes a disk smaller.
pub fn smaller(e: Error) -> Error {
    match e.kind() {
        Kind::Invalid if e.to_string().contains(" are less than ") => Error::new(
            Kind::Invalid,
            format!(
                "{e}; a disk is not made smaller by itself: `ploopctl resize` does it, with the file \
                 system on it"
            ),
        ),
        _ => e,
    }
}

/// Has the keeper of an attached disk do it.
pub fn running(attached: &Attached, wanted: Wanted) -> Result<Grown> {
    let said = Remote::connect(&attached.run)?.grow(wanted)?;
    Ok(Grown {
        sizes: Sizes {
            old: number(&said, "old")?,
            new: number(&said, "size")?,
        },
        stall_us: said.get("stall_us").cloned().unwrap_or_default(),
    })
}

fn detached(target: &Target, wanted: Wanted) -> Result<Sizes> {
    let dir = target.open_dir()?;
    match target.source() {
        Source::Bundle => {
            confine(&dir, Files::Change)?;
            let disk = Detached::take(dir)?;
            disk.run(grow::offline(disk.folder(), wanted))
        }
        source @ Source::Bare { .. } => {
            confine(&dir, Files::Write)?;
            let chain = target.chain(&dir)?;
            let _locks = DiskLocks::take(&dir, &source, Access::Write)?;
            exec::run(Engine::Poll, grow::bare(&dir, &chain, wanted))?
        }
    }
}
