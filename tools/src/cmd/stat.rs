//! `stat`: what attached disks are asked, and how long it takes.

use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::size;
use crate::view::{self, View};
use ploop::serve::supervise::control::Figures;
use ploop::serve::supervise::metrics::prometheus;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Show the counters of attached disks
///
/// They count from the moment of attaching, also across deaths of the worker. The same numbers are
/// served to Prometheus on the socket `metrics` in a disk's run directory.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Disk, device or mount point; without one, every attached disk
    disk: Option<PathBuf>,
    /// In the text format of Prometheus
    #[arg(long)]
    prometheus: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let disks = match &args.disk {
        Some(disk) => vec![attach::find(disk)?],
        None => attach::all()?,
    };
    let views = view::of(disks);
    let mut stats = Vec::new();
    for view in &views {
        match &view.figures {
            Some(figures) => stats.push((&view.disk, figures)),
            None => refuse_silence(view, args.disk.is_some())?,
        }
    }
    if let (Some(disk), []) = (&args.disk, stats.as_slice()) {
        let what = format!("{}: it was detached just now", disk.display());
        return Err(Error::new(Kind::NotFound, what));
    }
    let text: String = match args.prometheus {
        true => {
            let stats: Vec<_> = stats.iter().map(|(d, f)| (&d.state, *f)).collect();
            prometheus(&stats)
        }
        false => stats.iter().map(|(d, f)| table(d, f)).collect(),
    };
    let disks: Vec<Value> = stats.iter().map(|(d, f)| object(d, f)).collect();
    Ok(Answer::new(text, json!({ "disks": disks })))
}

/// A keeper that does not answer is an error to who asked for its disk, and a line to who asked for
/// all.
fn refuse_silence(view: &View, alone: bool) -> Result<()> {
    let state = &view.disk.state;
    let whose = format!("{}: its keeper (process {})", state.path, state.keeper_pid);
    let (kind, what) = match view.answers {
        false => (Kind::TimedOut, format!("{whose} does not answer")),
        true => (
            Kind::Unsupported,
            format!("{whose} counts in another way; it is of another release"),
        ),
    };
    if alone {
        return Err(Error::new(kind, what));
    }
    tracing::warn!("{what}");
    Ok(())
}

fn object(disk: &Attached, figures: &Figures) -> Value {
    let ops = figures.counters.ops.iter().map(|(name, op)| {
        let mut object = json!(op);
        for (name, share) in [("p50_us", 0.5), ("p99_us", 0.99)] {
            object[name] = op.quantile_us(share).into();
        }
        (name.clone(), object)
    });
    let mut object = json!({
        "path": disk.state.path,
        "uuid": disk.state.uuid,
        "restarts": disk.state.restarts,
        "ops": ops.collect::<serde_json::Map<_, _>>(),
    });
    view::tell(&mut object, Some(figures));
    object
}

fn table(disk: &Attached, figures: &Figures) -> String {
    let stat = &figures.counters;
    let mut text = format!("{}\n", disk.state.path);
    text += &format!(
        "  {:8} {:>12} {:>16} {:>8} {:>10} {:>10} {:>10}\n",
        "", "requests", "bytes", "errors", "mean us", "p50 us <", "p99 us <"
    );
    for (name, op) in &stat.ops {
        text += &format!(
            "  {name:8} {:>12} {:>16} {:>8} {:>10} {:>10} {:>10}\n",
            op.requests,
            op.bytes,
            op.errors,
            op.mean_us(),
            op.quantile_us(0.5),
            op.quantile_us(0.99),
        );
    }
    text += &format!(
        "  {} in flight, the oldest for {} s, {} hang; {} restarts of the worker\n",
        stat.in_flight, stat.oldest_s, stat.hung, disk.state.restarts
    );
    if let Some(space) = figures.footprint {
        text += &format!(
            "  {} in the top layer, {} free of {} on the host\n",
            size::show(space.allocated),
            size::show(space.host_free),
            size::show(space.host_size)
        );
    }
    text
}
