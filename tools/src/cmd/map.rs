//! `map`: where every part of a disk is.

use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::attach;
use ploop::device::Device;
use ploop::image::chain::Chain;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::open;
use ploop::image::target::Target;
use ploop::io::exec::{self, Engine};
use ploop::io::file::Cache;
use ploop::sandbox::Files;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::path::PathBuf;

/// List where each part of an unattached disk is: layer, file and offset
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

/// A part of the disk that is in one place.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    start: u64,
    length: u64,
    layer: Option<usize>,
    offset: Option<u64>,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    if let Some(attached) = attach::by_identity(&target.identity()?)? {
        let what = format!("{}: attached; umount it first", attached.state.path);
        return Err(Error::new(Kind::Busy, what));
    }
    let dir = target.open_dir()?;
    confine(&dir, Files::Read)?;
    let chain = target.chain(&dir)?;
    let _locks = DiskLocks::take(&dir, &target.source(), Access::Read)
        .map_err(|e| e.at(target.path().display()))?;
    let parts =
        exec::run(Engine::Poll, parts(&dir, &chain))?.map_err(|e| e.at(target.path().display()))?;
    let extents: Vec<Value> = parts.iter().map(|p| part_json(p, &chain)).collect();
    let text: String = parts.iter().map(|p| part_line(p, &chain)).collect();
    Ok(Answer::new(
        text,
        json!({ "path": target.path().display().to_string(), "extents": extents }),
    ))
}

async fn parts(dir: &std::os::fd::OwnedFd, chain: &Chain) -> Result<Vec<Part>> {
    let disk = open::open_read(dir, chain, Cache::Writeback).await?;
    let (size, depth) = (disk.size(), disk.stack().depth());
    let mut parts: Vec<Part> = Vec::new();
    let mut start = 0;
    while start < size {
        let found = disk.stack().resolve(start, size - start, depth).await?;
        let part = Part {
            start,
            length: found.len,
            layer: found.layer,
            offset: found.at,
        };
        start += found.len;
        match parts.last_mut().filter(|last| continues(last, &part)) {
            Some(last) => last.length += part.length,
            None => parts.push(part),
        }
    }
    Ok(parts)
}

fn continues(last: &Part, next: &Part) -> bool {
    last.layer == next.layer && last.offset.map(|o| o + last.length) == next.offset
}

fn file_of(part: &Part, chain: &Chain) -> Option<String> {
    chain
        .layers
        .get(part.layer?)
        .map(|l| l.display().to_string())
}

fn part_json(part: &Part, chain: &Chain) -> Value {
    json!({
        "start": part.start,
        "length": part.length,
        "zero": part.offset.is_none(),
        "layer": part.layer,
        "file": file_of(part, chain),
        "offset": part.offset,
    })
}

fn part_line(part: &Part, chain: &Chain) -> String {
    let place = match (file_of(part, chain), part.offset) {
        (Some(file), Some(offset)) => format!("{file} at {offset}"),
        (Some(file), None) => format!("zero, says {file}"),
        _ => "zero".into(),
    };
    format!("{} +{}  {place}\n", part.start, part.length)
}
