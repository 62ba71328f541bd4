//! `map`: where every part of a disk is.

use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::attach;
use ploop::Result;
use ploop::device::Device;
use ploop::formats::layer::Layer;
use ploop::image::chain::Chain;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::open;
use ploop::image::target::Target;
use ploop::io::exec::{self, Engine};
use ploop::io::file::{Cache, FileStore};
use ploop::sandbox::Files;
use ploop::stack::{AnyLayer, Content};
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

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
    compressed: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    attach::refuse(&target)?;
    let dir = target.open_dir()?;
    confine(&dir, Files::Read)?;
    let chain = target.chain(&dir)?;
    let _locks = DiskLocks::take(&dir, &target.source(), Access::Read)
        .map_err(|e| e.at(target.path().display()))?;
    let (parts, files) =
        exec::run(Engine::Poll, parts(&dir, &chain))?.map_err(|e| e.at(target.path().display()))?;
    let extents: Vec<Value> = parts.iter().map(|p| part_json(p, &files)).collect();
    let text: String = parts.iter().map(|p| part_line(p, &files)).collect();
    Ok(Answer::new(
        text,
        json!({ "path": target.path().display().to_string(), "extents": extents }),
    ))
}

/// The parts, and the names of the layers' files.
async fn parts(dir: &OwnedFd, chain: &Chain) -> Result<(Vec<Part>, Vec<String>)> {
    let disk = open::open_read(dir, chain, Cache::Writeback).await?;
    let (size, depth) = (disk.size(), disk.stack().depth());
    let name = |layer: &Arc<AnyLayer<FileStore>>| layer.store().path().display().to_string();
    let files = disk.stack().layers().iter().map(name).collect();
    let mut parts: Vec<Part> = Vec::new();
    let mut start = 0;
    while start < size {
        let found = disk.stack().resolve(start, size - start, depth).await?;
        let part = Part {
            start,
            length: found.len,
            layer: found.layer,
            offset: match found.content {
                Content::At(at) => Some(at),
                Content::Packed | Content::Zero => None,
            },
            compressed: found.content == Content::Packed,
        };
        start += found.len;
        match parts.last_mut().filter(|last| continues(last, &part)) {
            Some(last) => last.length += part.length,
            None => parts.push(part),
        }
    }
    Ok((parts, files))
}

fn continues(last: &Part, next: &Part) -> bool {
    last.layer == next.layer
        && last.compressed == next.compressed
        && last.offset.map(|o| o + last.length) == next.offset
}

fn file_of(part: &Part, files: &[String]) -> Option<String> {
    files.get(part.layer?).cloned()
}

fn part_json(part: &Part, files: &[String]) -> Value {
    json!({
        "start": part.start,
        "length": part.length,
        "zero": part.offset.is_none() && !part.compressed,
        "compressed": part.compressed,
        "layer": part.layer,
        "file": file_of(part, files),
        "offset": part.offset,
    })
}

fn part_line(part: &Part, files: &[String]) -> String {
    let place = match (file_of(part, files), part.offset) {
        (Some(file), Some(offset)) => format!("{file} at {offset}"),
        (Some(file), None) if part.compressed => format!("{file}, compressed"),
        (Some(file), None) => format!("zero, says {file}"),
        _ => "zero".into(),
    };
    format!("{} +{}  {place}\n", part.start, part.length)
}
