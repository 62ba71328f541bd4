//! `umount`, and `start` and `stop` of a device: a disk is detached, and its image closed.

use super::code::{Code, During, Fault, Step};
use super::disk::{self, Which};
use super::stats::Stats;
use super::{Context, names};
use crate::attach::{self, Attached};
use crate::cmd::umount::leave_point;
use ploop::image::target::Target;
use ploop::image::views;
use std::path::{Path, PathBuf};

/// Unmount a disk and detach it
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub which: Which,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    end(args.which.attached()?, context)
}

fn end(attached: Attached, context: &Context) -> Result<(), Fault> {
    let device = attached.state.device.clone().unwrap_or_default();
    let path = PathBuf::from(&attached.state.path);
    let point = attach::mounted_at(&attached.state).pop();
    let stats = point.as_deref().and_then(Stats::of_mount);
    if let Some(point) = &point {
        context.say(format_args!("Umounting fs at {}", point.display()));
    }
    context.say(format_args!("Unmounting device {device}"));
    leave_point(attached).during(Step::Umount)?;
    names::forget(Some(Path::new(&device)), &path);
    // A view goes with all that was in it.
    if let (Some(stats), None, Ok(disk)) = (stats, views::of(&path), disk::resolve(&path, None)) {
        stats.keep(&disk);
    }
    Ok(())
}

/// Detach a device that is not mounted
#[derive(Debug, clap::Args)]
pub struct Stop {
    /// Device
    #[arg(short, value_name = "DEVICE")]
    device: PathBuf,
}

/// Start a device: one that is there has been started
#[derive(Debug, clap::Args)]
pub struct Start {
    /// Device
    #[arg(short, value_name = "DEVICE")]
    device: PathBuf,
}

/// Whether it is there.
pub fn start(args: &Start) -> Result<(), Fault> {
    device(&args.device).map(drop)
}

/// Detaches it.
pub fn stop(args: &Stop, context: &Context) -> Result<(), Fault> {
    let attached = device(&args.device)?;
    match attach::mounted_at(&attached.state).pop() {
        None => end(attached, context),
        Some(point) => Err(Fault::new(
            Code::Ebusy,
            format!(
                "{} is mounted at {}",
                args.device.display(),
                point.display()
            ),
        )),
    }
}

/// The attached disk that a device is of.
pub fn device(device: &Path) -> Result<Attached, Fault> {
    let found = attach::find(device);
    found.map_err(|e| Fault::new(Code::Device, e))
}

/// The image directory of an attached disk.
pub fn disk_of(attached: &Attached) -> Result<Target, Fault> {
    disk::resolve(Path::new(&attached.state.path), None)
}
