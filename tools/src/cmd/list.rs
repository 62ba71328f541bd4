//! `list`: which disks are attached.

use super::orphans;
use crate::answer::Answer;
use crate::{attach, size};
use ploop::Result;
use ploop::rundir::State;
use serde_json::json;

/// List the attached disks
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    orphans: orphans::Args,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    if let Some(answer) = orphans::run(&args.orphans)? {
        return Ok(answer);
    }
    let disks: Vec<State> = attach::all()?.into_iter().map(|a| a.state).collect();
    Ok(Answer::new(table(&disks), json!({ "disks": disks })))
}

fn table(disks: &[State]) -> String {
    let head = ["DEVICE", "SIZE", "STATE", "MOUNTPOINT", "PATH"].map(String::from);
    let rows: Vec<[String; 5]> = std::iter::once(head).chain(disks.iter().map(row)).collect();
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3].map(width);
    let mut out = String::new();
    for [device, size, state, point, path] in &rows {
        let [a, b, c, d] = widths;
        out += &format!("{device:a$}  {size:b$}  {state:c$}  {point:d$}  {path}\n");
    }
    out
}

fn row(state: &State) -> [String; 5] {
    let reached = state.device.clone().or_else(|| state.uri.clone());
    [
        reached.unwrap_or_else(|| "-".into()),
        size::show(state.size),
        phase(state),
        state.mountpoint.clone().unwrap_or_else(|| "-".into()),
        state.path.clone(),
    ]
}

/// What it is doing, and whether that will last.
fn phase(state: &State) -> String {
    let phase = format!("{:?}", state.state).to_lowercase();
    match state.host_low {
        true => phase + ", host low on space",
        false => phase,
    }
}
