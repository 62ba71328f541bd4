//! `compact`: the file of a disk gets as short as what is in use of it.
//!
//! In order: the file system is trimmed where it is mounted; clusters at the end of the file move into
//! free ones; the file is cut. Whatever ends it leaves a disk like any other, and the same command goes
//! on with it.

use super::{FormatArg, confine, snapshot};
use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::{rate, size};
use ploop::client::{Remote, number};
use ploop::image::compact::{self, Compacted};
use ploop::image::detached::Detached;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::snapshot::copy::Work;
use ploop::image::target::{Format, Source, Target};
use ploop::io::exec::{self, Engine};
use ploop::sandbox::Files;
use ploop::serve::supervise::trim::{Mounted, Trimmed};
use ploop::{Error, Kind, Result};
use rustix::fs::{AtFlags, statat};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

pub const EXAMPLE: &str = "Example: ploopctl compact /var/lib/ct/100 --rate 50M";

/// Give the space that a disk does not use back to the host, and make its file shorter
///
/// The file system on the disk is trimmed first, if it is mounted. Then what lies at the end of the top
/// layer's file moves into its holes, and the file is cut; space that was taken for zeros ahead of their
/// use goes back, too. A disk in use goes on meanwhile. Interrupted anywhere, the disk is as good as ever,
/// and the same command goes on. Snapshots are not touched.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Bytes a second to copy at most
    #[arg(long, value_name = "BYTES", value_parser = rate::parse)]
    rate: Option<NonZeroU64>,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

const LEFT: &str = "what has moved has moved, and the same command goes on with it";

/// What came of it.
struct Outcome {
    compacted: Compacted,
    trimmed: Trimmed,
    /// How long the users of the disk waited in the end, in microseconds; null when nobody knows.
    stall_us: Value,
}

/// The file that gets shorter.
struct File {
    dir: OwnedFd,
    name: OsString,
}

impl File {
    /// The top of a disk; `Unsupported` when it cannot be compacted.
    fn top(target: &Target) -> Result<Self> {
        let dir = target.open_dir()?;
        let chain = target.chain(&dir)?;
        let top = chain.top();
        match top.format {
            Format::Raw => Err(ploop::compact::raw().at(top.display())),
            Format::Qcow2 => Err(ploop::compact::qcow2().at(top.display())),
            Format::Ploop => Ok(Self {
                name: top.name.clone(),
                dir,
            }),
        }
    }

    fn look(&self) -> Result<Seen> {
        let found = statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        let found = found.map_err(std::io::Error::from)?;
        let blocks = u64::try_from(found.st_blocks).unwrap_or(0);
        Ok(Seen {
            length: u64::try_from(found.st_size).unwrap_or(0),
            allocated: blocks.saturating_mul(512),
        })
    }
}

/// A file, in bytes.
#[derive(Debug, Clone, Copy)]
struct Seen {
    length: u64,
    allocated: u64,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    snapshot::mount::refuse_view(&target)?;
    let place = |e: Error| left(e, &cancel).at(target.path().display());
    let attached = attach::by_identity(&target.identity()?)?;
    let file = File::top(&target).map_err(place)?;
    let mounted = attached.as_ref().map_or(Ok(None), mounted).map_err(place)?;
    let old = file.look().map_err(place)?;
    let mut meter = Meter::new(global.progress, &cancel);
    let done = match &attached {
        Some(attached) => running(attached, mounted, args.rate, &mut meter),
        None => detached(&target, args.rate, &cancel, &mut meter),
    };
    drop(meter);
    let done = done.map_err(place)?;
    let now = file.look().map_err(place)?;
    Ok(answer(&target, &file, &done, old, now))
}

fn answer(target: &Target, file: &File, done: &Outcome, old: Seen, now: Seen) -> Answer {
    let Compacted { moved, length } = done.compacted;
    let untrimmed = match &done.trimmed {
        Trimmed::Done => None,
        Trimmed::NotMounted => Some("it is not mounted"),
        Trimmed::Refused(why) => Some(why.as_str()),
    };
    let what = untrimmed.map(|why| format!("; its file system was not trimmed: {why}"));
    Answer::new(
        format!(
            "{}: {}, was {}; on the host {}, was {}; {moved} clusters moved{}",
            target.path().display(),
            size::show(length),
            size::show(old.length),
            size::show(now.allocated),
            size::show(old.allocated),
            what.unwrap_or_default(),
        ),
        json!({
            "path": target.path().display().to_string(),
            "image": Path::new(&file.name).display().to_string(),
            "old_length": old.length,
            "length": length,
            "old_allocated": old.allocated,
            "allocated": now.allocated,
            "moved": moved,
            "trimmed": untrimmed.is_none(),
            "untrimmed": untrimmed,
            "stall_us": done.stall_us,
        }),
    )
}

/// Says what is left of what was cut.
fn left(e: Error, cancel: &Cancel) -> Error {
    match e.kind() {
        Kind::Cancelled if cancel.check().is_err() => {
            Error::new(Kind::Cancelled, format!("cancelled by a signal; {LEFT}"))
        }
        Kind::Cancelled => Error::new(Kind::Cancelled, format!("{e}; {LEFT}")),
        Kind::NoSpace => Error::new(
            Kind::NoSpace,
            format!("{e}; to move clusters takes some space before it gives any back; {LEFT}"),
        ),
        _ => e,
    }
}

/// The file system of an attached disk, if it is mounted, with what it has to write written.
fn mounted(attached: &Attached) -> Result<Option<Mounted>> {
    if attached.state.read_only {
        return Err(Error::new(Kind::ReadOnly, "the disk is attached read-only"));
    }
    let Some(device) = attached.state.device.as_deref() else {
        return Ok(None);
    };
    let mounted = Mounted::from(Path::new(device))?;
    mounted.as_ref().map_or(Ok(()), Mounted::sync)?;
    Ok(mounted)
}

/// Has the file system trimmed, and the keeper of an attached disk do the rest.
fn running(
    attached: &Attached,
    mounted: Option<Mounted>,
    rate: Option<NonZeroU64>,
    meter: &mut Meter<'_>,
) -> Result<Outcome> {
    // It is let go of then: whoever unmounts it is not to find us there.
    let trimmed = mounted.map_or(Ok(Trimmed::NotMounted), |fs| fs.trim(meter))?;
    if let Trimmed::Refused(why) = &trimmed {
        tracing::warn!("what is on it is not trimmed: {why}");
    }
    let mut far = |far| meter.hear("compacting", far);
    let rate = rate.map(NonZeroU64::get);
    let said = Remote::connect(&attached.run)?.compact(rate, &mut far)?;
    Ok(Outcome {
        compacted: Compacted {
            moved: number(&said, "moved")?,
            length: number(&said, "length")?,
        },
        trimmed,
        stall_us: said.get("stall_us").cloned().unwrap_or_default(),
    })
}

fn detached(
    target: &Target,
    rate: Option<NonZeroU64>,
    cancel: &Cancel,
    meter: &mut Meter<'_>,
) -> Result<Outcome> {
    let pace = rate::limit(rate, cancel);
    let mut work = Work::new(meter, &pace);
    let dir = target.open_dir()?;
    let compacted = match target.source() {
        Source::Bundle => {
            confine(&dir, Files::Change)?;
            let disk = Detached::take(dir)?;
            disk.run(compact::offline(disk.folder(), &mut work))?
        }
        source @ Source::Bare { .. } => {
            confine(&dir, Files::Write)?;
            let chain = target.chain(&dir)?;
            let _locks = DiskLocks::take(&dir, &source, Access::Write)?;
            let dir = dir.as_fd();
            exec::run(Engine::Poll, compact::bare(dir, &chain, &mut work))??
        }
    };
    Ok(Outcome {
        compacted,
        trimmed: Trimmed::NotMounted,
        stall_us: json!(0),
    })
}
