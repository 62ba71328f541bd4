//! `stat`: what attached disks are asked, and how long it takes.

use crate::answer::Answer;
use crate::attach::{self, Attached};
use ploop::client::Remote;
use ploop::counters::Stat;
use ploop::serve::supervise::control::prometheus;
use ploop::{Error, Result};
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
    let stats: Vec<(Attached, Stat)> = disks
        .into_iter()
        .filter_map(|disk| match of(&disk) {
            Ok(stat) => Some(Ok((disk, stat))),
            // It went while we looked.
            Err(e) if args.disk.is_none() && e.kind() == ploop::Kind::NotFound => None,
            Err(e) => Some(Err(e)),
        })
        .collect::<Result<_>>()?;
    let text: String = match args.prometheus {
        true => stats.iter().map(|(d, s)| prometheus(&d.state, s)).collect(),
        false => stats.iter().map(|(d, s)| table(d, s)).collect(),
    };
    let disks: Vec<Value> = stats.iter().map(|(d, s)| object(d, s)).collect();
    Ok(Answer::new(text, json!({ "disks": disks })))
}

fn of(disk: &Attached) -> Result<Stat> {
    let stat = Remote::connect(&disk.run).and_then(|mut remote| remote.stat());
    stat.map_err(|e: Error| e.at(&disk.state.path))
}

fn object(disk: &Attached, stat: &Stat) -> Value {
    let ops = stat.ops.iter().map(|(name, op)| {
        let mut object = json!(op);
        for (name, share) in [("p50_us", 0.5), ("p99_us", 0.99)] {
            object[name] = op.quantile_us(share).into();
        }
        (name.clone(), object)
    });
    json!({
        "path": disk.state.path,
        "uuid": disk.state.uuid,
        "restarts": disk.state.restarts,
        "in_flight": stat.in_flight,
        "oldest_s": stat.oldest_s,
        "hung": stat.hung,
        "ops": ops.collect::<serde_json::Map<_, _>>(),
    })
}

fn table(disk: &Attached, stat: &Stat) -> String {
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
            op.total_us.checked_div(op.requests).unwrap_or(0),
            op.quantile_us(0.5),
            op.quantile_us(0.99),
        );
    }
    text + &format!(
        "  {} in flight, the oldest for {} s; {} restarts of the worker\n",
        stat.in_flight, stat.oldest_s, disk.state.restarts
    )
}
