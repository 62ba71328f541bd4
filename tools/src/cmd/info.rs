//! `info`: what a disk is made of.

use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::{attach, balloon, portrait, size, view};
use ploop::Result;
use ploop::image::chain::Chain;
use ploop::image::survey::qcow2::read;
use ploop::image::survey::{self, Closed, LayerInfo};
use ploop::image::target::{Format, Target};
use ploop::image::views;
use ploop::io::exec::{self, Engine};
use ploop::rundir::State;
use ploop::sandbox::Files;
use rustix::fs::statvfs;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Show a disk's sizes, layers and state
///
/// Four sizes: what its user sees, what their files take in it, and what the images take on the
/// host, of which other disks may share a part.
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
    let attached = attach::by_identity(&identity)?.map(|a| view::of(vec![a]));
    let attached = attached.and_then(|mut views| Some(views.pop()?.disk.state));
    let used = attached.as_ref().and_then(used);
    let taken = attached.as_ref().and_then(attach::root_of);
    let taken = taken.and_then(|root| balloon::show(&root).ok());
    let dir = target.open_dir()?;
    let views = views::all(&dir)?;
    confine(&dir, Files::Read)?;
    let chain = target.chain(&dir)?;
    let place = |e: ploop::Error| e.at(target.path().display());
    let mut layers = survey::layers(&dir, &chain).map_err(place)?;
    let said = match chain.top().format {
        Format::Qcow2 => Some(exec::run(Engine::Poll, read(&dir, chain.top()))?.map_err(place)?),
        Format::Ploop | Format::Raw => None,
    };
    let others = Chain {
        layers: chain.tree()?.split_off(layers.len()),
        ..chain.clone()
    };
    // What other points lack is the business of a check.
    let mut others = survey::layers(&dir, &others).unwrap_or_default();
    for layer in layers.iter_mut().chain(&mut others) {
        // Who looks at a snapshot of the disk is no other disk.
        let own = views::links(&views, &layer.layer.name);
        layer.links = layer.links.saturating_sub(own);
    }
    let size = layers.last().map_or(0, |l| l.size);
    let allocated = |shared: bool| -> u64 {
        let all = layers.iter().chain(&others);
        let of = all.filter(|l| (l.links > 1) == shared);
        of.map(|l| l.allocated).sum()
    };
    let (exclusive, shared) = (allocated(false), allocated(true));
    let snapshots = chain.descriptor.as_ref().map(|d| d.shots().len() - 1);
    let disk = chain.descriptor.as_ref();
    let delta_limit = disk.and_then(|disk| disk.max_delta_size());
    let base_shared = layers.first().is_some_and(|base| base.links > 1);
    let limit = taken.filter(|bytes| *bytes > 0);
    let limit = limit.map(|bytes| size.saturating_sub(bytes));
    let json = json!({
        "path": target.path().display().to_string(),
        "uuid": identity.uuid(),
        "size": size,
        "cluster": said.as_ref().map_or(chain.cluster, |s| s.header.cluster).bytes(),
        "allocated": exclusive + shared,
        "sizes": { "virtual": size, "used": used, "exclusive": exclusive, "shared": shared },
        "limit": limit,
        "delta_limit": delta_limit,
        "snapshots": snapshots,
        "shared": base_shared,
        "layers": layers.iter().map(layer_json).collect::<Vec<_>>(),
        "qcow2": said.as_ref().map(portrait::json),
        "attached": attached,
    });
    let mut text = format!("{}\n", target.path().display());
    text += &format!("virtual    {}\n", size::show(size));
    text += &match used {
        Some(used) => format!(
            "used       {} (in its file system)
",
            size::show(used)
        ),
        None => "used       - (not mounted)
"
        .into(),
    };
    if let Some(limit) = limit {
        text += &format!("limit      {} (of the virtual size)\n", size::show(limit));
    }
    text += &format!(
        "exclusive  {} (on the host, this disk's alone)\n",
        size::show(exclusive)
    );
    text += &format!(
        "shared     {} (on the host, with other disks)\n",
        size::show(shared)
    );
    if let Some(limit) = delta_limit {
        text += &format!(
            "limit      {} (of each delta, on the host)\n",
            size::show(limit)
        );
    }
    if let Some(snapshots) = snapshots {
        let with = if base_shared {
            " (the base is shared)"
        } else {
            ""
        };
        text += &format!("snapshots  {snapshots}{with}\n");
    }
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
    text += &said.as_ref().map(portrait::text).unwrap_or_default();
    Ok(Answer::new(text, json))
}

/// Bytes in use in the mounted file system, as df(1) counts them.
fn used(state: &State) -> Option<u64> {
    let fs = statvfs(&attach::mounted_at(state).pop()?).ok()?;
    let blocks = fs.f_blocks.saturating_sub(fs.f_bfree);
    Some(blocks.saturating_mul(fs.f_frsize))
}

fn layer_json(info: &LayerInfo) -> Value {
    json!({
        "file": info.layer.display().to_string(),
        "format": info.layer.format.as_str(),
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
        info.layer.format.as_str(),
        cluster.unwrap_or_default(),
        size::show(info.allocated),
    )
}
