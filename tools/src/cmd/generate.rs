//! `generate`: man pages and shell completions, made from the command line itself, so that they
//! cannot say anything else than `--help`. For packagers.

use crate::answer::Answer;
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

/// What to make.
#[derive(Debug, Clone, clap::Subcommand)]
enum What {
    /// One page for ploopctl and one for each verb, into a directory
    Man {
        /// Directory, which must exist
        dir: PathBuf,
    },
    /// A script for a shell, on standard output
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    match &args.what {
        What::Man { dir } => man(dir),
        What::Completions { shell } => completions(*shell),
    }
}

fn man(dir: &Path) -> Result<Answer> {
    clap_mangen::generate_to(crate::Cli::command(), dir)
        .map_err(|e| Error::from(e).at(dir.display()))?;
    Ok(Answer::new(
        "",
        json!({ "path": dir.display().to_string() }),
    ))
}

fn completions(shell: Shell) -> Result<Answer> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::Cli::command(), "ploopctl", &mut script);
    let script = String::from_utf8(script).map_err(|e| Error::invalid(e.to_string()))?;
    Ok(Answer::new(script.clone(), json!({ "script": script })))
}
