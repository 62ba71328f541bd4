//! `tour`: the newcomer's two minutes.

use crate::report::Answer;
use ploop::Result;

/// See it work: make a disk, use it, kill its server, find every byte again
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Does it.
pub fn run(_: &Args) -> Result<Answer> {
    Ok(Answer::default())
}
