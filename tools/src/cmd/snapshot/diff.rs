//! `snapshot diff`: where two points of a disk differ.

use crate::answer::Answer;
use crate::attach;
use crate::cmd::confine;
use crate::report::Output;
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::chain::{Chain, read_descriptor};
use ploop::image::detached;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::open;
use ploop::image::snapshot::diff::{self, Difference, Point};
use ploop::image::snapshot::remove::unknown;
use ploop::image::target::Source;
use ploop::io::exec::{self, Engine};
use ploop::io::file::{Cache, FileStore};
use ploop::sandbox::Files;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::io::{BufWriter, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;

pub const EXAMPLE: &str = "Example: ploopctl snapshot diff /var/lib/ct/100 \
    9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a top";

/// List where two points of a disk differ: offset, length, and whether B has data or zeros there
///
/// Told from what is stored where; no data is read, so a part that was written again with the same
/// bytes is listed, too.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    pub(super) disk: PathBuf,
    /// UUID of the earlier point, or top: the disk as it is, unless it is attached
    a: PointArg,
    /// The later one
    b: PointArg,
}

/// A point of a disk.
#[derive(Debug, Clone, Copy)]
enum PointArg {
    Top,
    Snapshot(Guid),
}

impl FromStr for PointArg {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "top" => Ok(Self::Top),
            _ => Ok(Self::Snapshot(text.parse()?)),
        }
    }
}

/// Does it.
pub fn run(args: &Args, output: Output) -> Result<Answer> {
    let target = detached::resolve(&args.disk)?;
    let attached = attach::by_identity(&target.identity()?)?.is_some();
    let dir = target.open_dir()?;
    confine(&dir, Files::Read)?;
    let found = find(&dir, args, attached).map_err(|e| e.at(target.path().display()))?;
    print(&found, output)?;
    Ok(Answer::default())
}

fn find(dir: &OwnedFd, args: &Args, attached: bool) -> Result<Vec<Difference>> {
    // Whoever has an attached disk leaves its frozen files alone, but for a merge.
    let _locks = match attached {
        true => None,
        false => Some(DiskLocks::take(dir, &Source::Bundle, Access::Read)?),
    };
    let disk = read_descriptor(dir)?;
    let chains = [args.a, args.b].map(|point| chain(&disk, point, attached));
    let [a, b] = chains;
    let (a, b) = (a?, b?);
    let found = exec::run(Engine::Poll, async {
        let (a, b) = (open(dir, &a).await?, open(dir, &b).await?);
        diff::diff(&a, &b).await
    })??;
    match read_descriptor(dir)? == disk {
        true => Ok(found),
        false => Err(Error::new(
            Kind::Busy,
            "its snapshots were changed meanwhile: try again",
        )),
    }
}

fn chain(disk: &Descriptor, point: PointArg, attached: bool) -> Result<Chain> {
    let shot = match point {
        PointArg::Snapshot(uuid) => disk.shot(uuid).ok_or_else(|| unknown(uuid))?.guid,
        PointArg::Top => disk.top(),
    };
    if attached && shot == disk.top() {
        return Err(Error::new(
            Kind::Busy,
            "attached, so its top is written to: make a snapshot and compare that, or umount it",
        ));
    }
    match disk.shot(shot).and_then(|shot| shot.mark) {
        None => Chain::of(disk.clone(), shot),
        Some(_) => Err(Error::new(
            Kind::Busy,
            format!(
                "{} is temporary: its content may be changed by a merge",
                shot.bare()
            ),
        )),
    }
}

async fn open(dir: &OwnedFd, chain: &Chain) -> Result<Point<FileStore>> {
    let disk = open::open_read(dir, chain, Cache::Writeback).await?;
    Ok(Point::new(disk.stack(), chain))
}

/// One part a line. A reader that leaves has read enough.
fn print(found: &[Difference], output: Output) -> Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let lines = found.iter().try_for_each(|part| match output {
        Output::Text => writeln!(out, "{}", line(part)),
        Output::Json => writeln!(out, "{}", object(part)),
    });
    match lines.and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

fn line(part: &Difference) -> String {
    let what = if part.zero { "zero" } else { "data" };
    format!("{} +{}  {what}", part.start, part.length)
}

fn object(part: &Difference) -> Value {
    json!({
        "schema": 1,
        "start": part.start,
        "length": part.length,
        "zero": part.zero,
    })
}
