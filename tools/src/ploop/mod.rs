//! The tool `ploop`: this binary under the name of OpenVZ's, for scripts that were written for that.
//!
//! Parses ploop's command line, has the verbs of `ploopctl` do it, and prints what ploop prints. It
//! adds no way to change a disk that those do not have. docs/PLOOP.md is the contract.

mod absent;
mod balloon;
mod check;
mod code;
mod convert;
mod disk;
mod fscheck;
mod grow;
mod helper;
mod info;
mod init;
mod merge;
mod mount;
pub mod names;
mod replace;
mod resize;
mod restore;
mod size;
mod snapshot;
mod snapshot_list;
mod stats;
mod umount;
mod volumes;

use crate::answer;
use crate::cancel::Cancel;
use crate::errand;
use crate::global::Global;
use crate::meter::ProgressArg;
use crate::report::Output;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use code::{Code, Fault};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

/// Disks of the ploop format, as OpenVZ's tool is called
///
/// Sizes are sectors, or K, M, G, T of 1024 bytes. Before the command, -v or -vN says how much is
/// told: 0 nothing but errors, 3 everything.
#[derive(Debug, Parser)]
#[command(
    name = "ploop",
    disable_version_flag = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
enum Verb {
    Init(init::Args),
    Mount(mount::Args),
    Umount(umount::Args),
    Start(umount::Start),
    Stop(umount::Stop),
    #[command(alias = "fsck")]
    Check(check::Args),
    Fscheck(fscheck::Args),
    Snapshot(snapshot::Args),
    Tsnapshot(snapshot::Temporary),
    SnapshotSwitch(snapshot::Switch),
    SnapshotDelete(snapshot::Delete),
    SnapshotMerge(merge::Args),
    SnapshotList(snapshot_list::Args),
    Merge(merge::Files),
    Info(info::Args),
    List(info::List),
    Stat(info::Stat),
    Convert(convert::Args),
    Replace(replace::Args),
    RestoreDescriptor(restore::Args),
    Grow(grow::Args),
    Resize(resize::Args),
    Balloon(balloon::Args),
    Volume(volumes::Args),
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

/// What every command has.
#[derive(Debug)]
pub struct Context {
    /// How much is told.
    verbosity: u32,
    /// What `ploopctl` has.
    global: Global,
}

impl Context {
    /// Tells what is done.
    fn say(&self, text: impl std::fmt::Display) {
        if self.verbosity > 0 {
            println!("{text}");
        }
    }
}

/// The command line as clap has it: the last of an option that is given twice counts, and long ones
/// may be cut short, as getopt(3) has it.
pub fn command() -> clap::Command {
    Cli::command().mut_subcommands(|verb| verb.args_override_self(true).infer_long_args(true))
}

/// Whether this binary was called by one of ploop's names: then it does what was asked.
pub fn run() -> Option<ExitCode> {
    let mut args = std::env::args_os();
    let name = args.next()?;
    let name = Path::new(&name).file_name()?.to_str()?;
    let run: fn(Vec<OsString>) -> Result<(), Fault> = match name {
        "ploop" => tool,
        "ploop-volume" => |mut args| {
            args.insert(0, "volume".into());
            tool(args)
        },
        "mount.ploop" => helper::mount,
        "umount.ploop" => helper::umount,
        _ => return None,
    };
    let done = run(args.collect());
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            if !fault.text.is_empty() {
                eprintln!("{}", fault.text.trim_end());
            }
            ExitCode::from(fault.code as u8)
        }
    })
}

fn tool(mut args: Vec<OsString>) -> Result<(), Fault> {
    let verbosity = verbosity(&mut args);
    answer::log_to_stderr();
    let is_list = args.first().is_some_and(|verb| verb == "snapshot-list");
    let words = [OsString::from("ploop")].into_iter().chain(args);
    let parsed = command()
        .try_get_matches_from(words)
        .and_then(|found| Cli::from_arg_matches(&found));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(e) if !e.use_stderr() => {
            let _ = e.print();
            return Ok(());
        }
        Err(e) if is_list => return Err(Fault::new(Code::Creat, e)),
        Err(e) => return Err(Fault::new(Code::Param, e)),
    };
    let context = context(verbosity);
    dispatch(cli.verb, &context)
}

fn context(verbosity: u32) -> Context {
    Context {
        verbosity,
        global: Global {
            output: Output::Text,
            config: None,
            progress: ProgressArg::Auto,
        },
    }
}

/// Takes `-v`, `-vvv`, `-v3` from before the command.
fn verbosity(args: &mut Vec<OsString>) -> u32 {
    let mut told = None;
    while let Some(rest) = args.first().and_then(|a| a.to_str()?.strip_prefix("-v")) {
        let more = rest.chars().take_while(|c| *c == 'v').count() as u32 + 1;
        if more as usize > rest.len() {
            told = Some(told.unwrap_or(3) + more);
        } else if let Ok(level) = rest.parse() {
            told = Some(level);
        } else {
            break;
        }
        args.remove(0);
    }
    told.unwrap_or(3)
}

fn dispatch(verb: Verb, context: &Context) -> Result<(), Fault> {
    match verb {
        Verb::Init(args) => init::run(&args, context),
        Verb::Mount(args) => mount::run(&args, context),
        Verb::Umount(args) => umount::run(&args, context),
        Verb::Start(args) => umount::start(&args),
        Verb::Stop(args) => umount::stop(&args, context),
        Verb::Check(args) => check::run(&args, context),
        Verb::Fscheck(args) => fscheck::run(&args, context),
        Verb::Snapshot(args) => snapshot::run(&args, context),
        Verb::Tsnapshot(args) => snapshot::temporary(&args, context),
        Verb::SnapshotSwitch(args) => snapshot::switch(&args, context),
        Verb::SnapshotDelete(args) => snapshot::delete(&args, context),
        Verb::SnapshotMerge(args) => merge::run(&args, context),
        Verb::SnapshotList(args) => snapshot_list::run(&args),
        Verb::Merge(args) => merge::files(&args, context),
        Verb::Info(args) => info::run(&args),
        Verb::List(args) => info::list(&args),
        Verb::Stat(args) => info::stat(&args),
        Verb::Convert(args) => convert::run(&args, context),
        Verb::Replace(args) => replace::run(&args, context),
        Verb::RestoreDescriptor(args) => restore::run(&args, context),
        Verb::Grow(args) => grow::run(&args, context),
        Verb::Resize(args) => resize::run(&args, context),
        Verb::Balloon(args) => balloon::run(&args, context),
        Verb::Volume(args) => volumes::run(args, context),
        Verb::Other(words) => other(&words),
    }
}

/// A command that is not ours: not offered, or a program of its own.
fn other(words: &[OsString]) -> Result<(), Fault> {
    let (name, args) = words.split_first().expect("clap gives a command its name");
    if let Some(absent) = name.to_str().and_then(absent::find) {
        return Err(absent.fault());
    }
    let mut program = OsString::from("ploop-");
    program.push(name);
    let failed = Command::new(program).args(args).exec();
    let name = name.to_string_lossy();
    let usage = command().render_usage();
    Err(Fault::new(
        Code::Param,
        format!("ploop: unknown command '{name}' (ploop-{name}: {failed})\n\n{usage}"),
    ))
}

/// Has a verb of `ploopctl` do it, in a process of its own, which may confine itself; what it says.
fn verb<W: AsRef<OsStr>>(words: &[W]) -> ploop::Result<Value> {
    let cancel = Cancel::on_signals()?;
    let words: Vec<OsString> = words.iter().map(|w| w.as_ref().to_os_string()).collect();
    errand::run(&words, None, &cancel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_stands_before_the_command_only() {
        let told = |words: &[&str]| {
            let mut args: Vec<OsString> = words.iter().map(OsString::from).collect();
            let told = verbosity(&mut args);
            (told, args.len())
        };
        assert_eq!(told(&["init", "-v", "2"]), (3, 3));
        assert_eq!(told(&["-v", "list"]), (4, 1));
        assert_eq!(told(&["-vvv", "-v", "list"]), (7, 1));
        assert_eq!(told(&["-v0", "list"]), (0, 1));
        assert_eq!(told(&["-v10"]), (10, 0));
        assert_eq!(told(&["-vx"]), (3, 1));
    }

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }
}
