//! The verbs, one file each.

mod adopt;
mod check;
mod clone;
mod compact;
pub mod convert;
mod delete;
mod doctor;
mod events;
mod freeze;
mod generate;
mod grow;
mod info;
pub mod init;
mod limit;
mod list;
mod map;
mod migrate;
pub mod mount;
mod orphans;
mod recover;
mod replace;
mod resize;
mod restore;
mod serve;
pub mod snapshot;
mod stat;
mod top;
mod tour;
mod track;
pub mod twin;
pub mod umount;

use crate::answer::Answer;
use crate::global::Global;
use crate::size;
use ploop::image::snapshot::internal;
use ploop::image::target::Format;
use ploop::io::room::KeepFree;
use ploop::sandbox::{self, Files};
use ploop::{Error, Kind, Result};
use std::os::fd::AsFd;

/// A verb and its arguments.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    #[command(after_help = "Example: ploopctl init -s 20G /var/lib/ct/100")]
    Init(init::Args),
    #[command(after_help = "Example: ploopctl mount /var/lib/ct/100 /mnt/100")]
    Mount(mount::Args),
    #[command(after_help = "Example: ploopctl umount /mnt/100")]
    Umount(umount::Args),
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::Args),
    #[command(after_help = "Example: ploopctl list -o json")]
    List(list::Args),
    #[command(after_help = "Example: ploopctl info /var/lib/ct/100")]
    Info(info::Args),
    #[command(after_help = "Example: ploopctl stat /var/lib/ct/100")]
    Stat(stat::Args),
    #[command(after_help = "Example: ploopctl top -d 5")]
    Top(top::Args),
    #[command(after_help = "Example: ploopctl events -f /var/lib/ct/100")]
    Events(events::Args),
    #[command(after_help = "Example: ploopctl map --format ploop /var/lib/ct/100.hds")]
    Map(map::Args),
    #[command(after_help = "Example: ploopctl check --repair /var/lib/ct/100")]
    Check(check::Args),
    #[command(after_help = "Example: ploopctl adopt 100.raw --format raw /var/lib/ct/100")]
    Adopt(adopt::Args),
    #[command(after_help = "Example: ploopctl snapshot create /var/lib/ct/100")]
    Snapshot(snapshot::Args),
    #[command(after_help = "Example: ploopctl clone /var/lib/ct/template /var/lib/ct/101")]
    Clone(clone::Args),
    #[command(after_help = "Example: ploopctl grow /var/lib/ct/100 +10G")]
    Grow(grow::Args),
    #[command(after_help = compact::EXAMPLE)]
    Compact(compact::Args),
    #[command(after_help = "Example: ploopctl resize /var/lib/ct/100 40G")]
    Resize(resize::Args),
    #[command(after_help = "Example: ploopctl limit /var/lib/ct/100 --delta 20G")]
    Limit(limit::Args),
    #[command(after_help = convert::EXAMPLES)]
    Convert(convert::Args),
    #[command(after_help = replace::EXAMPLE)]
    Replace(replace::Args),
    #[command(name = "restore-descriptor", after_help = restore::EXAMPLE)]
    RestoreDescriptor(restore::Args),
    #[command(after_help = track::EXAMPLES)]
    Track(track::Args),
    #[command(after_help = migrate::EXAMPLES)]
    Migrate(migrate::Args),
    #[command(after_help = freeze::EXAMPLES)]
    Freeze(freeze::Args),
    #[command(after_help = "Example: ploopctl delete /var/lib/ct/100")]
    Delete(delete::Args),
    #[command(after_help = "Example: ploopctl recover /mnt/100")]
    Recover(recover::Args),
    #[command(after_help = "Example: ploopctl doctor -o json")]
    Doctor(doctor::Args),
    #[command(after_help = "Example: ploopctl tour")]
    Tour(tour::Args),
    #[command(hide = true)]
    Generate(generate::Args),
}

/// Does what was asked.
pub fn run(command: Command, global: &Global) -> Result<Answer> {
    let output = global.output;
    match command {
        Command::Init(args) => init::run(&args, global),
        Command::Mount(args) => mount::run(&args, global),
        Command::Umount(args) => umount::run(&args),
        Command::Serve(args) => serve::run(args, global),
        Command::List(args) => list::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Stat(args) => stat::run(&args),
        Command::Top(args) => top::run(&args, output),
        Command::Events(args) => events::run(&args, output),
        Command::Map(args) => map::run(&args),
        Command::Check(args) => check::run(&args, global),
        Command::Adopt(args) => adopt::run(&args, global),
        Command::Snapshot(args) => snapshot::run(&args, global),
        Command::Clone(args) => clone::run(&args, global),
        Command::Grow(args) => grow::run(&args),
        Command::Compact(args) => compact::run(&args, global),
        Command::Resize(args) => resize::run(&args, global),
        Command::Limit(args) => limit::run(&args),
        Command::Convert(args) => convert::run(&args, global),
        Command::Replace(args) => replace::run(&args, global),
        Command::RestoreDescriptor(args) => restore::run(&args, global),
        Command::Track(args) => track::run(args, output),
        Command::Migrate(args) => migrate::run(args, global),
        Command::Freeze(args) => freeze::run(&args, output),
        Command::Delete(args) => delete::run(&args),
        Command::Recover(args) => recover::run(&args, global),
        Command::Doctor(args) => doctor::run(&args, global),
        Command::Tour(args) => tour::run(&args, global),
        Command::Generate(args) => generate::run(&args),
    }
}

/// `--format` of a bare file.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum FormatArg {
    /// One ploop delta
    Ploop,
    /// A flat file
    Raw,
    /// A qcow2 image
    Qcow2,
}

impl From<FormatArg> for Format {
    fn from(arg: FormatArg) -> Self {
        match arg {
            FormatArg::Ploop => Format::Ploop,
            FormatArg::Raw => Format::Raw,
            FormatArg::Qcow2 => Format::Qcow2,
        }
    }
}

impl From<Format> for FormatArg {
    fn from(format: Format) -> Self {
        match format {
            Format::Ploop => FormatArg::Ploop,
            Format::Raw => FormatArg::Raw,
            Format::Qcow2 => FormatArg::Qcow2,
        }
    }
}

/// Refuses `--snapshot` where nothing can be shown by it.
pub fn check_snapshot(
    snapshot: Option<&str>,
    read_only: bool,
    format: Option<FormatArg>,
) -> Result<()> {
    match (snapshot, read_only, format) {
        (None, ..) | (Some(_), true, Some(FormatArg::Qcow2)) => Ok(()),
        (Some(_), true, _) => Err(internal::not_qcow2()),
        (Some(_), false, _) => Err(Error::new(
            Kind::Usage,
            "--snapshot needs --read-only: what a snapshot holds is not written to",
        )),
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

/// `--keep-free`: a size, or hundredths of the host's file system.
pub fn keep_free(text: &str) -> std::result::Result<KeepFree, String> {
    let percent = text.strip_suffix('%').map(|n| n.parse::<u8>());
    match percent {
        Some(Ok(n @ 0..=100)) => Ok(KeepFree::Percent(n)),
        Some(_) => Err("0% to 100%".into()),
        None => size::parse(text).map(KeepFree::Bytes),
    }
}

impl SandboxArg {
    /// Whether it is wanted.
    pub fn is_on(self) -> bool {
        self == Self::On
    }
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
