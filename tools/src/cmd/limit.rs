//! `limit`: how much the deltas of a disk may take on the host.

use super::confine;
use super::snapshot::mount;
use crate::answer::Answer;
use crate::{attach, size};
use ploop::client::Remote;
use ploop::image::chain::read_descriptor;
use ploop::image::detached::{self, Detached};
use ploop::image::limit;
use ploop::sandbox::Files;
use ploop::{Error, Result};
use serde_json::json;
use std::path::PathBuf;

/// Say how much each delta of a disk may take on the host
///
/// Beyond that the users of the disk are told that there is no space, as on a full host, where they
/// write what has no place yet; what has one is written as ever. They go on when something is
/// deleted and trimmed, or the limit is raised, which takes effect at once. A snapshot begins a new
/// delta, which may take as much again. Merging and growing are not held to it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    disk: PathBuf,
    /// Bytes, or with K, M, G, T; none for as much as there is
    #[arg(long, value_name = "SIZE|none", value_parser = parse)]
    delta: Wanted,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
struct Wanted(Option<u64>);

fn parse(text: &str) -> std::result::Result<Wanted, String> {
    match text {
        "none" => Ok(Wanted(None)),
        _ => match size::parse(text)? {
            0 => Err("a delta cannot do without space".into()),
            bytes => Ok(Wanted(Some(bytes))),
        },
    }
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = detached::resolve(&args.disk)?;
    mount::refuse_view(&target)?;
    let (path, bytes) = (target.path().display(), args.delta.0);
    let place = |e: Error| e.at(path.to_string());
    let old = match attach::by_identity(&target.identity()?)? {
        Some(attached) => {
            let old = read_descriptor(target.open_dir()?).map_err(place)?;
            Remote::connect(&attached.run)?
                .limit(bytes)
                .map_err(place)?;
            old.max_delta_size()
        }
        None => {
            let dir = target.open_dir()?;
            confine(&dir, Files::Change)?;
            let disk = Detached::take(dir).map_err(place)?;
            disk.run(limit::offline(disk.folder(), bytes))
                .map_err(place)?
        }
    };
    let show = |bytes: Option<u64>| bytes.map_or_else(|| "no limit".into(), size::show);
    let text = match old == bytes {
        true => format!("{path}: {} already", show(bytes)),
        false => format!("{path}: {} a delta, was {}", show(bytes), show(old)),
    };
    Ok(Answer::new(
        text,
        json!({ "path": path.to_string(), "old_delta_limit": old, "delta_limit": bytes }),
    ))
}
