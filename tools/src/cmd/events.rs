//! `events`: what happens to an attached disk, as it happens.

use crate::answer::Answer;
use crate::attach;
use crate::report::Output;
use ploop::Result;
use ploop::client::Remote;
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;

/// Show the state of an attached disk, and with --follow every change of it
///
/// Ends when the disk is detached. When its keeper died or hung up on a reader that was too slow,
/// the exit code is 5. With -o json, one object a line.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Disk, device or mount point
    disk: PathBuf,
    /// Go on until the disk is detached
    #[arg(short, long)]
    follow: bool,
}

/// Prints events as they come.
pub fn run(args: &Args, output: Output) -> Result<Answer> {
    let disk = attach::find(&args.disk)?;
    let mut remote = Remote::connect(&disk.run).map_err(|e| e.at(&disk.state.path))?;
    remote.subscribe()?;
    while let Some(event) = remote.event().map_err(|e| e.at(&disk.state.path))? {
        let line = match output {
            Output::Json => event.to_string(),
            Output::Text => line(&event),
        };
        // Nobody reads any more: that is how one stops following.
        if writeln!(std::io::stdout(), "{line}").is_err() || !args.follow {
            break;
        }
    }
    Ok(Answer::new(String::new(), Value::Null))
}

fn line(event: &Value) -> String {
    let disk = &event["disk"];
    let text = |v: &Value| match v {
        Value::Null => "-".to_string(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    let path = text(&disk["path"]);
    match event["event"].as_str() {
        Some("frozen") => return format!("{path} frozen"),
        Some("thawed") => {
            let ms = event["frozen_us"].as_u64().unwrap_or(0) / 1000;
            return format!("{path} thawed after {ms} ms ({})", text(&event["why"]));
        }
        _ => {}
    }
    format!(
        "{path} {} device {} worker {} restarts {}{}",
        text(&disk["state"]),
        text(&disk["device"]),
        text(&disk["worker_pid"]),
        text(&disk["restarts"]),
        match (&disk["error"], &disk["host_low"]) {
            (Value::String(error), _) => format!(": {error}"),
            (_, Value::Bool(true)) => ": the host is low on space".into(),
            _ => String::new(),
        }
    )
}
