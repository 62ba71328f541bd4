//! ploopctl: one command line for disks that live in files.
//!
//! Parses, dispatches, prints, and turns the outcome into an exit code; each verb is one file in
//! `cmd`. It holds no image open while a disk is attached: that is ploopd's business.
#![forbid(unsafe_code)]

mod answer;
mod attach;
mod balloon;
mod cancel;
mod cmd;
mod errand;
mod force;
mod fsys;
mod global;
mod gpt;
mod holders;
mod meter;
mod nbd;
#[path = "ploop/mod.rs"]
mod persona;
mod portrait;
mod rate;
mod report;
mod screen;
mod settings;
mod size;
mod table;
mod view;
mod volume;

use clap::Parser;
use clap::error::ErrorKind;
use global::Global;
use std::process::ExitCode;

/// A container's file system in a file: make, mount, serve and check ploop disks.
///
/// DISK is a directory with a DiskDescriptor.xml, that file, or a bare image file with --format.
#[derive(Debug, Parser)]
#[command(name = "ploopctl", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: cmd::Command,
}

const AFTER_HELP: &str = "Exit codes: 0 ok, 1 failed, 2 usage, 3 leaks only (check), 4 busy or \
locked, 5 I/O, 6 damaged, 7 unsupported, 8 missing privilege, 9 timed out, 10 cancelled, 11 not \
found.

Settings: /etc/ploop/ploop.toml, or the file that --config or PLOOP_CONFIG names; keys: keep-free, \
sandbox, log (auto, journal, syslog, file), mount.cache, serve.cache. Options win.";

fn main() -> ExitCode {
    if let Some(code) = persona::run() {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    answer::log_to_stderr();
    match cmd::run(cli.command, &cli.global) {
        Ok(answer) => answer.print(cli.global.output),
        Err(e) => report::error(&e, cli.global.output),
    }
}

/// Prints what clap has to say, as JSON where that was asked for in vain.
fn usage(e: &clap::Error) -> ExitCode {
    let help = matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    let args: Vec<String> = std::env::args_os()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let json = args
        .windows(2)
        .any(|w| matches!(w, [o, v] if (o == "-o" || o == "--output") && v == "json"))
        || args.iter().any(|a| a == "--output=json" || a == "-ojson");
    if json && !help {
        return answer::usage_error(&e.to_string());
    }
    let _ = e.print();
    ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
}
