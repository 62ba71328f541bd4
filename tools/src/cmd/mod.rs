//! The verbs, one file each.

mod check;
mod events;
mod info;
mod init;
mod list;
mod map;
mod mount;
mod serve;
mod stat;
mod tour;
mod umount;

use crate::answer::Answer;
use crate::report::Output;
use ploop::image::target::Format;
use ploop::sandbox::{self, Files};
use ploop::{Kind, Result};
use std::os::fd::AsFd;

/// A verb and its arguments.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    Init(init::Args),
    Mount(mount::Args),
    Umount(umount::Args),
    Serve(serve::Args),
    List(list::Args),
    Info(info::Args),
    Stat(stat::Args),
    Events(events::Args),
    Map(map::Args),
    Check(check::Args),
    Tour(tour::Args),
}

/// Does what was asked.
pub fn run(command: Command, output: Output) -> Result<Answer> {
    match command {
        Command::Init(args) => init::run(&args),
        Command::Mount(args) => mount::run(&args),
        Command::Umount(args) => umount::run(&args),
        Command::Serve(args) => serve::run(args, output),
        Command::List(args) => list::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Stat(args) => stat::run(&args),
        Command::Events(args) => events::run(&args, output),
        Command::Map(args) => map::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Tour(args) => tour::run(&args),
    }
}

/// `--format` of a bare file.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum FormatArg {
    /// One ploop delta
    Ploop,
    /// A flat file
    Raw,
}

impl From<FormatArg> for Format {
    fn from(arg: FormatArg) -> Self {
        match arg {
            FormatArg::Ploop => Format::Ploop,
            FormatArg::Raw => Format::Raw,
        }
    }
}

/// Confines this process before it looks at an image: it needs no file but the disk's any more.
/// Where a kernel can enforce nothing, its user reads with the rights they have.
pub fn confine(dir: impl AsFd, files: Files) -> Result<()> {
    match sandbox::enter(dir, files) {
        Err(e) if e.kind() != Kind::Unsupported => Err(e),
        _ => Ok(()),
    }
}

/// `--sandbox` of the serving process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SandboxArg {
    /// No file but the disk's, no program, no new connection
    On,
    /// Everything that this user may do
    Off,
}

/// `--cache` of the writable layer.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum CacheArg {
    /// Bypass the page cache of the host (O_DIRECT)
    None,
    /// Write through the page cache of the host
    Writeback,
}

impl From<CacheArg> for ploop::serve::supervise::message::Cache {
    fn from(arg: CacheArg) -> Self {
        match arg {
            CacheArg::None => Self::None,
            CacheArg::Writeback => Self::Writeback,
        }
    }
}
