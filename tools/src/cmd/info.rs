//! `info`: what a disk is made of.

use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::{attach, size};
use ploop::Result;
use ploop::image::survey::{self, Closed, LayerInfo};
use ploop::image::target::{Format, Target};
use ploop::sandbox::Files;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Show a disk's size, layers and state
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    let identity = target.identity()?;
    let attached = attach::by_identity(&identity)?.map(|a| a.state);
    let dir = target.open_dir()?;
    confine(&dir, Files::Read)?;
    let chain = target.chain(&dir)?;
    let layers = survey::layers(&dir, &chain)?;
    let size = layers.last().map_or(0, |l| l.size);
    let json = json!({
        "path": target.path().display().to_string(),
        "uuid": identity.uuid(),
        "size": size,
        "cluster": chain.cluster.bytes(),
        "allocated": layers.iter().map(|l| l.allocated).sum::<u64>(),
        "layers": layers.iter().map(layer_json).collect::<Vec<_>>(),
        "attached": attached,
    });
    let mut text = format!("{}: {}\n", target.path().display(), size::show(size));
    if let Some(state) = &attached {
        let at = state
            .device
            .as_deref()
            .or(state.uri.as_deref())
            .unwrap_or("-");
        let point = state
            .mountpoint
            .as_deref()
            .map(|p| format!(", on {p}"))
            .unwrap_or_default();
        text += &format!("attached: {at}{point}\n");
    }
    for (n, layer) in layers.iter().enumerate().rev() {
        text += &layer_line(n, layer);
    }
    Ok(Answer::new(text, json))
}

fn format_name(format: Format) -> &'static str {
    match format {
        Format::Ploop => "ploop",
        Format::Raw => "raw",
    }
}

fn layer_json(info: &LayerInfo) -> Value {
    json!({
        "file": info.layer.display().to_string(),
        "format": format_name(info.layer.format),
        "guid": info.layer.guid.map(|g| g.to_string()),
        "format_version": info.version,
        "cluster": info.cluster,
        "size": info.size,
        "file_length": info.len,
        "allocated": info.allocated,
        "in_use": info.closed.map(|c| c == Closed::InUse),
        "links": info.links,
    })
}

fn layer_line(n: usize, info: &LayerInfo) -> String {
    let version = info.version.map(|v| format!(" v{v}")).unwrap_or_default();
    let cluster = info
        .cluster
        .map(|c| format!(", clusters of {}", size::show(c)));
    let in_use = if info.closed == Some(Closed::InUse) {
        ", in use or not closed"
    } else {
        ""
    };
    format!(
        "layer {n}: {} ({}{version}{}), {} on the host{in_use}\n",
        info.layer.display(),
        format_name(info.layer.format),
        cluster.unwrap_or_default(),
        size::show(info.allocated),
    )
}
