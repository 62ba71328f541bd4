//! `generate`: man pages and shell completions, made from the command line itself, so that they
//! cannot say anything else than `--help`. For packagers.

use crate::answer::Answer;
use crate::persona;
use clap::CommandFactory;
use clap_complete::Shell;
use ploop::{Error, Result};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Write man pages or shell completions
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

/// A name that this binary has.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Program {
    Ploopctl,
    Ploop,
}

/// What to make.
#[derive(Debug, Clone, clap::Subcommand)]
enum What {
    /// A page for ploopctl, one for ploop, and one for each of their verbs, into a directory
    Man {
        /// Directory, which must exist
        dir: PathBuf,
    },
    /// A script for a shell, on standard output
    Completions {
        /// The shell
        shell: Shell,
        /// Of which command
        #[arg(long, value_enum, default_value = "ploopctl")]
        of: Program,
    },
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    match &args.what {
        What::Man { dir } => man(dir),
        What::Completions { shell, of } => completions(*shell, *of),
    }
}

fn man(dir: &Path) -> Result<Answer> {
    for command in [crate::Cli::command(), persona::command()] {
        let made = clap_mangen::generate_to(command, dir);
        made.map_err(|e| Error::from(e).at(dir.display()))?;
    }
    Ok(Answer::new(
        "",
        json!({ "path": dir.display().to_string() }),
    ))
}

fn completions(shell: Shell, of: Program) -> Result<Answer> {
    let mut script = Vec::new();
    let (mut command, name) = match of {
        Program::Ploopctl => (crate::Cli::command(), "ploopctl"),
        Program::Ploop => (persona::command(), "ploop"),
    };
    clap_complete::generate(shell, &mut command, name, &mut script);
    let script = String::from_utf8(script).map_err(|e| Error::invalid(e.to_string()))?;
    Ok(Answer::new(script.clone(), json!({ "script": script })))
}
