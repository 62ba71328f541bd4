//! `balloon`: the space that a mounted file system does not get, and that which it does not use.

use super::code::{Code, During, Fault, Step};
use super::disk::{self, Which};
use super::{Context, absent, mount, size, umount, verb};
use crate::attach::{self, Attached};
use crate::balloon;
use ploop::Error;
use ploop::serve::supervise::trim::Mounted;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

/// Space that a mounted file system does not get, or does not use
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Tell how much the file system does not get
    Show(Show),
    /// Change that
    Change(Change),
    /// Give what the file system does not use back to the host
    Discard(Discard),
    /// Tell what the kernel is at, which is nothing
    Status(Show),
    /// Not offered
    Clear(Rest),
    /// Not offered
    Complete(Rest),
    /// Not offered
    Check(Rest),
    /// Not offered
    Repair(Rest),
}

/// What is not looked at.
#[derive(Debug, clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _words: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Show {
    /// Take no lock: accepted, none is taken
    #[arg(short)]
    force: bool,
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, clap::Args)]
struct Change {
    /// What the file system is not to get
    #[arg(short, value_parser = size::parse)]
    size: u64,
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, clap::Args)]
struct Discard {
    /// Mount the disk for as long as it takes
    #[arg(long)]
    automount: bool,
    /// Tell the sizes, and do nothing
    #[arg(long)]
    stat: bool,
    /// Not offered
    #[arg(long, value_name = "SIZE")]
    to_free: Option<String>,
    /// Not offered
    #[arg(long, value_name = "SIZE")]
    min_block: Option<String>,
    /// Not offered
    #[arg(long, alias = "defrag-only")]
    defrag: bool,
    /// Accepted: what lies at the end of the image is moved in any case
    #[arg(long, value_name = "N")]
    image_defrag_threshold: Option<String>,
    #[command(flatten)]
    which: Which,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    match &args.verb {
        Verb::Show(args) => show(args),
        Verb::Change(args) => change(args),
        Verb::Discard(args) => discard(args, context),
        Verb::Status(args) => {
            args.which.attached()?;
            println!("Current state of in-kernel maintenance: OFF");
            Ok(())
        }
        Verb::Clear(_) | Verb::Complete(_) | Verb::Check(_) | Verb::Repair(_) => {
            let why = "no kernel driver keeps a state of it";
            Err(absent::option("clear, complete, check and repair", why))
        }
    }
}

/// Where the file system of an attached disk is.
fn root(attached: &Attached) -> Result<PathBuf, Fault> {
    let point = attach::root_of(&attached.state);
    point.ok_or_else(|| {
        let what = format!("{}: its file system is not mounted", attached.state.path);
        Fault::new(Code::NotMounted, what)
    })
}

fn show(args: &Show) -> Result<(), Fault> {
    let root = root(&args.which.attached()?)?;
    let bytes = balloon::show(&root).map_err(|e| e.at(root.display()));
    let bytes = bytes.during(Step::Look)?;
    println!("Current size of hidden balloon is {bytes} bytes");
    Ok(())
}

fn change(args: &Change) -> Result<(), Fault> {
    let attached = args.which.attached()?;
    let root = root(&attached)?;
    // What it takes is given to the host before, because it is not free afterwards.
    let device = attached.state.device.as_deref().map(Path::new);
    let mounted = device.map_or(Ok(None), Mounted::from).during(Step::Look)?;
    if let Some(fs) = mounted {
        let trimmed = fs.sync().and_then(|()| fs.trim(&mut ()));
        trimmed.during(Step::Change)?;
    }
    let set = balloon::set(&root, args.size);
    set.map_err(|e| e.at(root.display()))
        .during(Step::Resize)
        .map(drop)
}

fn discard(args: &Discard, context: &Context) -> Result<(), Fault> {
    for (option, given) in [
        ("--to-free", args.to_free.is_some()),
        ("--min-block", args.min_block.is_some()),
    ] {
        if given {
            return Err(absent::option(option, "all that is free goes back"));
        }
    }
    if args.defrag {
        let why = "`e4defrag` does that, on a mounted file system";
        return Err(absent::option("--defrag", why));
    }
    if args.stat {
        return stat(&args.which.attached()?);
    }
    match (args.automount, &args.which.file) {
        (true, Some(file)) if disk::of(&disk::resolve(file, None)?)?.is_none() => {
            mounted(file, context, compact)
        }
        _ => {
            let attached = args.which.attached()?;
            root(&attached)?;
            compact(&attached)
        }
    }
}

fn compact(attached: &Attached) -> Result<(), Fault> {
    let words = ["compact", attached.state.path.as_str()];
    verb(&words.map(OsStr::new)).during(Step::Change).map(drop)
}

/// Does something with a disk that is mounted for as long.
fn mounted(
    file: &Path,
    context: &Context,
    work: impl FnOnce(&Attached) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let point = PathBuf::from(format!("/run/ploop.discard.{}", std::process::id()));
    let made = fs::create_dir(&point).map_err(|e| Error::from(e).at(point.display()));
    made.during(Step::Mount)?;
    let args = mount::Args {
        mountpoint: Some(point.clone()),
        files: vec![file.to_path_buf()],
        ..mount::Args::default()
    };
    let done = mount::run(&args, context).and_then(|()| {
        let which = Which {
            mountpoint: Some(point.clone()),
            ..Which::default()
        };
        let worked = which.attached().and_then(|attached| work(&attached));
        worked.and(umount::run(&umount::Args { which }, context))
    });
    let _ = fs::remove_dir(&point);
    done
}

/// The sizes that `discard --stat` tells, each in MiB.
fn stat(attached: &Attached) -> Result<(), Fault> {
    let root = root(attached)?;
    let disk = umount::disk_of(attached)?;
    let look = || {
        let used = rustix::fs::statvfs(&root).map_err(std::io::Error::from)?;
        let chain = disk.chain(disk.open_dir()?)?;
        let dir = disk.dir();
        let images = chain.layers.iter().map(|l| dir.join(&l.name).metadata());
        let image = images.flatten().map(|m| m.len()).sum();
        let data = used.f_blocks.saturating_sub(used.f_bfree) * used.f_frsize;
        Ok((balloon::show(&root)?, data, image))
    };
    let (balloon, data, image): (u64, u64, u64) = look()
        .map_err(|e: Error| e.at(root.display()))
        .during(Step::Look)?;
    let whole = disk::descriptor(&disk)?.sectors() * size::SECTOR;
    for (name, bytes) in [
        ("Balloon size: ", balloon),
        ("Data size:    ", data),
        ("Ploop size:   ", whole),
        ("Image size:   ", image),
    ] {
        println!("{name}{:>8}MB", bytes >> 20);
    }
    Ok(())
}
