//! `track`: what was written to an attached disk since somebody looked.

use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::report::Output;
use crate::size;
use crate::table::{Align, render};
use ploop::client::{Remote, number};
use ploop::serve::supervise::control::TrackAsk;
use ploop::tracker::Name;
use ploop::{Error, Result};
use serde_json::{Value, json};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

pub const EXAMPLES: &str = "\
Example: ploopctl track start /var/lib/ct/100 backup

An incremental copy: copy generation 0, which is all of the disk, then `track ack`. From then on:
  ploopctl track seal /var/lib/ct/100 backup
  ploopctl track extents /var/lib/ct/100 backup 1
  copy these parts
  ploopctl track ack /var/lib/ct/100 backup 1";

/// Record what is written to an attached disk, for who copies it
///
/// A tracker records which blocks are written. To seal it makes a generation of what it has so far, and
/// records from nothing again; what a generation has is read from the disk after that. A generation stays until
/// it is acknowledged, or given back to be recorded again. NBD clients find the newest generation as
/// qemu:dirty-bitmap:NAME, and each as qemu:dirty-bitmap:NAME.GENERATION.
///
/// A tracker is there again when the disk is attached again, and goes on where it was if the disk was detached
/// cleanly and nobody has written to it or changed it since. Otherwise, and when the disk fails or goes
/// back to a snapshot, all of it counts as written. Trackers of a bare image end with its attachment.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Begin to record; generation 0 is all of the disk
    #[command(after_help = "Example: ploopctl track start /var/lib/ct/100 backup")]
    Start {
        #[command(flatten)]
        which: Which,
        /// Bytes of a block, a power of two from 4K to 1M
        #[arg(long, value_name = "BYTES", value_parser = size::parse, default_value = "64K")]
        granularity: u64,
    },
    /// Make a generation of what was written so far, and record from nothing again
    #[command(after_help = "Example: ploopctl track seal /var/lib/ct/100 backup")]
    Seal {
        #[command(flatten)]
        which: Which,
    },
    /// List what a generation has, one part a line, and how to copy it: data, zero, or discard
    #[command(after_help = "Example: ploopctl track extents /var/lib/ct/100 backup 1")]
    Extents {
        #[command(flatten)]
        which: Which,
        /// Its number
        generation: u64,
        /// First byte of the disk to tell of
        #[arg(long, value_name = "BYTE", value_parser = size::parse, default_value = "0")]
        from: u64,
        /// Parts to tell of at most
        #[arg(long)]
        max: Option<u64>,
    },
    /// Say that what a generation has was copied, and forget it
    #[command(after_help = "Example: ploopctl track ack /var/lib/ct/100 backup 1")]
    Ack {
        #[command(flatten)]
        which: Which,
        /// Its number
        generation: u64,
    },
    /// Give a generation back, to be recorded again
    #[command(after_help = "Example: ploopctl track nack /var/lib/ct/100 backup 1")]
    Nack {
        #[command(flatten)]
        which: Which,
        /// Its number
        generation: u64,
    },
    /// Show the trackers of a disk, or one of them
    #[command(after_help = "Example: ploopctl track stat /var/lib/ct/100")]
    Stat {
        /// Disk, device or mount point
        disk: PathBuf,
        /// Name of the tracker
        name: Option<Name>,
    },
    /// Record no more, and forget the tracker
    #[command(after_help = "Example: ploopctl track stop /var/lib/ct/100 backup")]
    Stop {
        #[command(flatten)]
        which: Which,
    },
}

/// A tracker of a disk.
#[derive(Debug, clap::Args)]
struct Which {
    /// Disk, device or mount point
    disk: PathBuf,
    /// Name of the tracker: letters, digits, - and _
    name: Name,
}

/// An attached disk, and its keeper.
struct Tracked {
    disk: Attached,
    remote: Remote,
}

impl Tracked {
    fn find(disk: &Path) -> Result<Self> {
        let disk = attach::find(disk)?;
        let remote = Remote::connect(&disk.run).map_err(|e| e.at(&disk.state.path))?;
        Ok(Self { disk, remote })
    }

    fn ask(&mut self, ask: TrackAsk) -> Result<Value> {
        let said = self.remote.track(ask);
        said.map_err(|e| e.at(&self.disk.state.path))
    }
}

/// Does it.
pub fn run(args: Args, output: Output) -> Result<Answer> {
    match args.verb {
        Verb::Start { which, granularity } => start(which, granularity),
        Verb::Seal { which } => seal(which),
        Verb::Extents {
            which,
            generation,
            from,
            max,
        } => {
            let listing = Listing {
                name: which.name,
                generation,
                from,
                left: max.unwrap_or(u64::MAX),
            };
            list(&mut Tracked::find(&which.disk)?, listing, output)
        }
        Verb::Ack { which, generation } => {
            let Which { disk, name } = which;
            let text = format!("{name}: generation {generation} is done with");
            Tracked::find(&disk)?.ask(TrackAsk::Ack { name, generation })?;
            Ok(Answer::new(text, json!({ "generation": generation })))
        }
        Verb::Nack { which, generation } => {
            let Which { disk, name } = which;
            let text = format!("{name}: generation {generation} is recorded again");
            Tracked::find(&disk)?.ask(TrackAsk::Nack { name, generation })?;
            Ok(Answer::new(text, json!({ "generation": generation })))
        }
        Verb::Stat { disk, name } => stat(&disk, name.as_ref()),
        Verb::Stop { which } => {
            let Which { disk, name } = which;
            let text = format!("{name}: stopped");
            Tracked::find(&disk)?.ask(TrackAsk::Stop { name: name.clone() })?;
            Ok(Answer::new(text, json!({ "name": name })))
        }
    }
}

fn start(which: Which, granularity: u64) -> Result<Answer> {
    let said = Tracked::find(&which.disk)?.ask(TrackAsk::Start {
        name: which.name.clone(),
        granularity: Some(granularity),
    })?;
    let text = format!(
        "{}: recording, in blocks of {}; generation 0 is all of the disk",
        which.name,
        size::show(granularity)
    );
    Ok(Answer::new(text, said))
}

fn seal(which: Which) -> Result<Answer> {
    let name = which.name.clone();
    let said = Tracked::find(&which.disk)?.ask(TrackAsk::Seal { name: which.name })?;
    let text = format!(
        "{name}: generation {} has {}",
        number(&said, "generation")?,
        size::show(number(&said, "bytes")?)
    );
    Ok(Answer::new(text, said))
}

/// What to tell of a generation.
struct Listing {
    name: Name,
    generation: u64,
    from: u64,
    left: u64,
}

/// One part a line. A reader that leaves has read enough.
fn list(disk: &mut Tracked, mut listing: Listing, output: Output) -> Result<Answer> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    while listing.left > 0 {
        let said = disk.ask(TrackAsk::Extents {
            name: listing.name.clone(),
            generation: listing.generation,
            from: listing.from,
            max: u32::try_from(listing.left).ok(),
        })?;
        let extents = said["extents"].as_array().map_or(&[][..], Vec::as_slice);
        for extent in extents {
            let line = match output {
                Output::Text => line(extent)?,
                Output::Json => extent.to_string(),
            };
            match writeln!(out, "{line}") {
                Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(Answer::default()),
                written => written?,
            }
        }
        listing.left = listing.left.saturating_sub(extents.len() as u64);
        match said["next"].as_u64() {
            Some(next) => listing.from = next,
            None => break,
        }
    }
    match out.flush() {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(Answer::default()),
    }
}

fn line(extent: &Value) -> Result<String> {
    Ok(format!(
        "{} +{}  {}",
        number(extent, "offset")?,
        number(extent, "length")?,
        extent["kind"].as_str().unwrap_or_default()
    ))
}

fn stat(disk: &Path, name: Option<&Name>) -> Result<Answer> {
    let mut said = Tracked::find(disk)?.ask(TrackAsk::Stat)?;
    let wanted = name.map(ToString::to_string);
    if let (Some(wanted), Some(all)) = (&wanted, said["trackers"].as_array_mut()) {
        all.retain(|tracker| tracker["name"] == **wanted);
        if all.is_empty() {
            let what = format!("there is no tracker {wanted}");
            return Err(Error::new(ploop::Kind::NotFound, what).at(disk.display()));
        }
    }
    let trackers = said["trackers"].as_array().map_or(&[][..], Vec::as_slice);
    let rows: Vec<[String; 4]> = trackers.iter().map(row).collect::<Result<_>>()?;
    let heads = [
        ("NAME", Align::Left),
        ("BLOCK", Align::Right),
        ("RECORDED", Align::Right),
        ("GENERATIONS", Align::Left),
    ];
    let text = match rows.is_empty() {
        true => "no trackers".to_string(),
        false => render(heads, &rows),
    };
    Ok(Answer::new(text, said))
}

fn row(tracker: &Value) -> Result<[String; 4]> {
    let generations = tracker["generations"].as_array();
    let one = |generation: &Value| {
        let bytes = size::show(number(generation, "bytes")?);
        Ok(format!("{} ({bytes})", number(generation, "generation")?))
    };
    let generations = generations.map_or(&[][..], Vec::as_slice).iter().map(one);
    let generations: Vec<String> = generations.collect::<Result<_>>()?;
    Ok([
        tracker["name"].as_str().unwrap_or_default().into(),
        size::show(number(tracker, "granularity")?),
        match tracker["unknown"].as_bool() {
            Some(true) => "unknown".into(),
            _ => size::show(number(tracker, "recorded")?),
        },
        match generations.is_empty() {
            true => "-".into(),
            false => generations.join(", "),
        },
    ])
}
