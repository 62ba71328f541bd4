//! ploopd: the process that keeps one attached disk, and, started by itself, the one that serves
//! it. People use ploopctl, which starts it.
#![forbid(unsafe_code)]

mod report;

use clap::{ArgGroup, Parser};
use ploop::serve::supervise::log::{Log, Priority};
use ploop::serve::supervise::{self, Task, inherit, message::KeeperConfig};
use ploop::{Error, Result};
use report::Output;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use tracing::Metadata;
use tracing_subscriber::fmt::format::{DefaultFields, Format, Full};
use tracing_subscriber::fmt::{MakeWriter, SubscriberBuilder};

/// Keeps one attached disk. Started by ploopctl mount and ploopctl serve.
#[derive(Debug, Parser)]
#[command(name = "ploopd", version, group(ArgGroup::new("what").required(true)))]
struct Cli {
    /// Attach the disk that this JSON object describes
    #[arg(long, value_name = "JSON", group = "what")]
    config: Option<String>,
    /// Serve for a keeper that waits on descriptor 3
    #[arg(long, hide = true, group = "what")]
    worker: bool,
    /// Mark each line that is printed with its priority
    #[arg(long, hide = true, requires = "worker")]
    captured: bool,
    /// Attach or detach a block device for a keeper
    #[arg(long, value_name = "JSON", hide = true, group = "what")]
    errand: Option<String>,
    /// Change the disk's directory for a keeper that waits on descriptor 3
    #[arg(long, value_name = "JSON", hide = true, group = "what")]
    change: Option<String>,
    /// Keep users of a device still for a keeper that waits on descriptor 3
    #[arg(long, value_name = "JSON", hide = true, group = "what")]
    still: Option<String>,
    /// Write down which trackers a disk has for a keeper that waits on descriptor 3
    #[arg(long, value_name = "JSON", hide = true, group = "what")]
    note: Option<String>,
}

fn main() -> ExitCode {
    if let Err(e) = inherit::init() {
        return report::error(&e, Output::Text);
    }
    // Started through /proc/self/exe, it would be listed as "exe".
    let _ = rustix::thread::set_name(c"ploopd");
    let cli = Cli::parse();
    match cli {
        Cli {
            worker: true,
            captured,
            ..
        } => worker(captured),
        Cli {
            errand: Some(task), ..
        } => errand(&task),
        Cli {
            change: Some(wanted),
            ..
        } => aide(supervise::run_changer(&wanted)),
        Cli {
            still: Some(task), ..
        } => aide(supervise::run_still(&task)),
        Cli {
            note: Some(trackers),
            ..
        } => aide(supervise::run_note(&trackers)),
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
    match log {
        None => builder().with_writer(std::io::stderr).init(),
        Some(log) => {
            log.take_stderr();
            let log = log.clone();
            let say = move |priority, line: &str| {
                log.event(priority, line);
                Ok(())
            };
            bare().with_writer(Lines(Arc::new(say))).init();
        }
    }
}

/// Lines for people.
fn builder() -> SubscriberBuilder {
    tracing_subscriber::fmt().with_ansi(false)
}

/// Lines for somebody who adds the rest.
fn bare() -> SubscriberBuilder<DefaultFields, Format<Full, ()>> {
    builder()
        .with_level(false)
        .with_target(false)
        .without_time()
}

type Say = dyn Fn(Priority, &str) -> io::Result<()> + Send + Sync;

/// Each event as one line with its priority.
struct Lines(Arc<Say>);

/// One event.
struct Line {
    priority: Priority,
    say: Arc<Say>,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line {
            priority: Priority::Info,
            say: Arc::clone(&self.0),
        }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line {
        Line {
            priority: Priority::from(meta.level()),
            say: Arc::clone(&self.0),
        }
    }
}

impl Write for Line {
    /// The subscriber writes an event in one piece.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        (self.say)(self.priority, &String::from_utf8_lossy(event))?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn worker(captured: bool) -> ExitCode {
    match captured {
        false => builder().with_writer(io::stderr).init(),
        true => {
            let say = |priority: Priority, line: &str| {
                io::stderr().write_all(priority.mark(line).as_bytes())
            };
            bare().with_writer(Lines(Arc::new(say))).init();
        }
    }
    match supervise::worker::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e}");
            ExitCode::from(e.kind().exit_code())
        }
    }
}

fn aide(done: ploop::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => report::error(&e, Output::Text),
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
