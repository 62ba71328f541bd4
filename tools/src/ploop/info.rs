//! `info`, `list` and `stat`: what disks are like, which are attached, what those were asked.

use super::code::{Code, During, Fault, Step};
use super::disk::{self, Bare};
use super::stats::Stats;
use super::{absent, names, size, umount};
use crate::attach::{self, Attached};
use crate::view;
use ploop::formats::descriptor::Descriptor;
use ploop::image::survey::{self, LayerInfo};
use ploop::image::target::Target;
use ploop::serve::supervise::mounts;
use std::path::{Path, PathBuf};

/// Show what the file system of a disk holds, or what the disk is like
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size, cluster and version
    #[arg(short)]
    size: bool,
    /// Tables of the images (not offered)
    #[arg(short = 'b')]
    table: bool,
    /// Device and partition
    #[arg(short)]
    device: bool,
    /// What an image without a descriptor is
    #[arg(short, value_name = "FORMAT")]
    format: Option<Bare>,
    /// DiskDescriptor.xml, or an image
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Fault> {
    if args.table {
        return Err(absent::option("-b", "`ploopctl map` shows where data is"));
    }
    let disk = disk::resolve(&args.file, args.format)?;
    match (args.size, args.device) {
        (false, false) => usage(&disk),
        (size, device) => {
            if size {
                print!("{}", sizes(&disk)?);
            }
            if device {
                print!("{}", devices(&disk)?);
            }
            Ok(())
        }
    }
}

fn not_mounted(disk: &Target) -> Fault {
    let what = format!("{} is not mounted", disk.path().display());
    Fault::new(Code::NotMounted, what)
}

fn usage(disk: &Target) -> Result<(), Fault> {
    let point = disk::of(disk)?.and_then(|a| attach::mounted_at(&a.state).pop());
    let now = point.as_deref().and_then(Stats::of_mount);
    let stats = now.or_else(|| Stats::read(disk));
    print!("{}", stats.ok_or_else(|| not_mounted(disk))?.table());
    Ok(())
}

fn sizes(disk: &Target) -> Result<String, Fault> {
    let layers = || {
        let dir = disk.open_dir()?;
        let chain = disk.chain(&dir)?;
        Ok((survey::layers(&dir, &chain)?, chain.cluster))
    };
    let (layers, cluster): (Vec<LayerInfo>, _) = layers().during(Step::Look)?;
    let top = layers.last().expect("a disk has layers");
    Ok(format!(
        "size:\t\t{}\nblocksize:\t{}\nfmt_version:\t{}\n",
        top.size / size::SECTOR,
        top.cluster.unwrap_or(cluster.bytes()) / size::SECTOR,
        // A raw image has none; ploop shows the one that its deltas would have.
        layers.iter().find_map(|l| l.version).unwrap_or(2)
    ))
}

fn devices(disk: &Target) -> Result<String, Fault> {
    let attached = disk::of(disk)?.ok_or_else(|| not_mounted(disk))?;
    let device = attached.state.device.unwrap_or_default();
    let device = Path::new(&device);
    let mounted = mounts::all().during(Step::Look)?;
    let part = mounts::of(&mounted, device).next_back().map(|m| &m.source);
    Ok(format!(
        "device:\t\t{}\npartition:\t{}\n",
        names::of_device(device).display(),
        part.map_or(device, |p| p.as_path()).display()
    ))
}

/// Show the devices of attached disks, and of what they are
#[derive(Debug, clap::Args)]
pub struct List {
    /// With mount points and components
    #[arg(short)]
    all: bool,
    /// Accepted; the list is made anew each time
    #[arg(short)]
    fresh: bool,
}

/// Does it.
pub fn list(args: &List) -> Result<(), Fault> {
    for attached in attach::all().during(Step::Look)? {
        let Some(device) = attached.state.device.as_deref().map(Path::new) else {
            continue;
        };
        let image = image(&attached);
        let mut line = format!(
            "{}\t{}",
            names::of_device(device).display(),
            image.display()
        );
        if args.all {
            let point = attached.state.mountpoint.as_deref().unwrap_or("-");
            let component = names::component_of(Path::new(&attached.state.path));
            line += &format!("\t{point}\t{}", component.as_deref().unwrap_or("-"));
        }
        println!("{line}");
    }
    Ok(())
}

/// The base of a disk: what tells disks apart for people.
fn image(attached: &Attached) -> PathBuf {
    let path = PathBuf::from(&attached.state.path);
    let base = |d: &Descriptor| d.image(d.base().guid).map(|i| path.join(&i.file));
    let read = umount::disk_of(attached).and_then(|disk| disk::descriptor(&disk));
    read.ok().and_then(|d| base(&d)).unwrap_or(path)
}

/// Counters as ploop's kernel driver has them, in its order, and which of ours they are: those that
/// count what is here.
const COUNTERS: [(&str, &[&str]); 47] = [
    ("bio_in", &["read", "write", "zero", "discard", "flush"]),
    ("bio_fast", &[]),
    ("bio_full", &[]),
    ("bio_out", &[]),
    ("bio_alloc", &[]),
    ("bio_alloc_whole", &[]),
    ("bio_splits", &[]),
    ("coal_back", &[]),
    ("coal_forw", &[]),
    ("coal_back2", &[]),
    ("coal_forw2", &[]),
    ("coal_oback", &[]),
    ("coal_oforw", &[]),
    ("coal_mback", &[]),
    ("coal_mforw", &[]),
    ("coal_overlap", &[]),
    ("coal_flush", &[]),
    ("bio_barriers", &[]),
    ("bio_rzero", &[]),
    ("bio_wzero", &[]),
    ("bio_syncwait", &[]),
    ("bio_fsync", &["flush"]),
    ("bio_cows", &[]),
    ("bio_whole_cows", &[]),
    ("merge_neg_cluster", &[]),
    ("merge_neg_disable", &[]),
    ("fast_neg_nomap", &[]),
    ("fast_neg_noem", &[]),
    ("fast_neg_shortem", &[]),
    ("fast_neg_backing", &[]),
    ("bio_lockouts", &[]),
    ("map_lockouts", &[]),
    ("merge_lockouts", &[]),
    ("map_reads", &[]),
    ("map_merges", &[]),
    ("map_single_writes", &[]),
    ("map_multi_writes", &[]),
    ("map_multi_updates", &[]),
    ("bio_trans_whole", &[]),
    ("bio_trans_copy", &[]),
    ("bio_trans_alloc", &[]),
    ("bio_trans_index", &[]),
    ("bio_flush_in", &["flush"]),
    ("bio_fua_in", &[]),
    ("bio_flush_out", &[]),
    ("bio_fua_out", &[]),
    ("bio_flush_skip", &[]),
];

/// Show what a device was asked since it was attached
#[derive(Debug, clap::Args)]
pub struct Stat {
    /// Device
    #[arg(short, value_name = "DEVICE")]
    device: PathBuf,
    /// Set the counters to 0 (not offered)
    #[arg(short)]
    clear: bool,
    /// Set the counters from standard input (not offered)
    #[arg(short)]
    load: bool,
}

/// Does it.
pub fn stat(args: &Stat) -> Result<(), Fault> {
    if args.clear || args.load {
        return Err(absent::option(
            "-c and -l",
            "counters count from attaching on",
        ));
    }
    let attached = umount::device(&args.device)?;
    let views = view::of(vec![attached]);
    let figures = views.into_iter().find_map(|view| view.figures);
    let figures = figures.ok_or_else(|| {
        let what = format!("{}: its keeper does not answer", args.device.display());
        Fault::new(Code::Sys, what)
    })?;
    let ops = &figures.counters.ops;
    for (name, kinds) in COUNTERS {
        let of = |kind: &&str| ops.get(*kind).map_or(0, |op| op.requests);
        println!("{name} {}", kinds.iter().map(of).sum::<u64>());
    }
    Ok(())
}
