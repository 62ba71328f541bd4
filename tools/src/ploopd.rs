//! ploopd: the process that keeps one attached disk, and, started by itself, the one that serves
//! it. People use ploopctl, which starts it.
#![forbid(unsafe_code)]

mod report;

use clap::Parser;
use ploop::serve::supervise::{self, Task, inherit, log::Log, message::KeeperConfig};
use ploop::{Error, Result};
use report::Output;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Mutex;

/// Keeps one attached disk. Started by ploopctl mount and ploopctl serve.
#[derive(Debug, Parser)]
#[command(name = "ploopd", version)]
#[group(required = true, multiple = false)]
struct Cli {
    /// Attach the disk that this JSON object describes
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Serve for a keeper that waits on descriptor 3
    #[arg(long, hide = true)]
    worker: bool,
    /// Attach or detach a block device for a keeper
    #[arg(long, value_name = "JSON", hide = true)]
    errand: Option<String>,
}

fn main() -> ExitCode {
    if let Err(e) = inherit::init() {
        return report::error(&e, Output::Text);
    }
    // Started through /proc/self/exe, it would be listed as "exe".
    let _ = rustix::thread::set_name(c"ploopd");
    let cli = Cli::parse();
    match cli {
        Cli { worker: true, .. } => worker(),
        Cli {
            errand: Some(task), ..
        } => errand(&task),
        Cli {
            config: Some(config),
            ..
        } => keeper(&config),
        _ => ExitCode::from(2),
    }
}

fn keeper(config: &str) -> ExitCode {
    let config: KeeperConfig = match serde_json::from_str(config) {
        Ok(config) => config,
        Err(e) => return report::error(&Error::invalid(format!("--config: {e}")), Output::Text),
    };
    let output = if config.json {
        Output::Json
    } else {
        Output::Text
    };
    let detached = config.detached;
    if let Err(e) = leave_terminal(detached) {
        return report::error(&e, output);
    }
    match supervise::keeper::run(config, logging) {
        Ok(()) => ExitCode::SUCCESS,
        // Detached, the report went to who started us.
        Err(e) if detached => ExitCode::from(e.kind().exit_code()),
        Err(e) => report::error(&e, output),
    }
}

/// A session of its own: no terminal's hang-up reaches a mounted disk, and no directory is held.
fn leave_terminal(detached: bool) -> Result<()> {
    if detached {
        // Fails only for a process group leader, which has its own session's worth already.
        let _ = rustix::process::setsid();
        std::env::set_current_dir("/")?;
    }
    Ok(())
}

fn logging(log: Option<&Log>) {
    let builder = tracing_subscriber::fmt().with_ansi(false);
    match log {
        None => builder.with_writer(std::io::stderr).init(),
        Some(log) => {
            log.take_stderr();
            builder.with_writer(Mutex::new(log.clone())).init();
        }
    }
}

fn worker() -> ExitCode {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    match supervise::worker::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e}");
            ExitCode::from(e.kind().exit_code())
        }
    }
}

fn errand(task: &str) -> ExitCode {
    let task: Task = match serde_json::from_str(task) {
        Ok(task) => task,
        Err(e) => return report::error(&Error::invalid(format!("--errand: {e}")), Output::Text),
    };
    let done = supervise::run_errand(&task);
    let text = serde_json::to_string(&done).expect("a path and a failure are JSON");
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(1),
    }
}
