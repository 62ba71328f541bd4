//! `init`: a new disk, with a file system on it.

use super::mount::{device_config, need_privilege};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::settings::Settings;
use crate::{attach, size};
use ploop::formats::ploop::header::{Header, Version};
use ploop::formats::units::ClusterSize;
use ploop::image::init::{self, Form, New};
use ploop::image::target::{Format, Target};
use ploop::rundir::State;
use ploop::serve::supervise::leftover;
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Make a new disk: DIR, DIR/root.hds and DIR/DiskDescriptor.xml
///
/// Nothing is left of a disk that could not be finished.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of the disk; must not exist, or be empty
    dir: PathBuf,
    /// Virtual size in bytes, or with K, M, G, T
    #[arg(short, long, value_parser = size::parse)]
    size: u64,
    /// File system to make; all but none need root
    #[arg(long, default_value = "ext4")]
    fs: Fs,
    /// Format of the image
    #[arg(long, default_value = "ploop")]
    format: ImageArg,
    /// Unit of allocation, 32K to 64M, of a qcow2 image to 2M
    #[arg(long, default_value = "64K", value_parser = cluster)]
    cluster: ClusterSize,
    /// Version of the ploop format [default: 2]
    #[arg(long, value_parser = ["1", "2"])]
    format_version: Option<String>,
    /// Reserve all space now
    #[arg(long)]
    preallocate: bool,
}

fn cluster(text: &str) -> std::result::Result<ClusterSize, String> {
    ClusterSize::new(size::parse(text)?).map_err(|e| e.to_string())
}

/// `--format` of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ImageArg {
    /// A ploop delta
    Ploop,
    /// A qcow2 image
    Qcow2,
}

impl From<ImageArg> for Format {
    fn from(arg: ImageArg) -> Self {
        match arg {
            ImageArg::Ploop => Self::Ploop,
            ImageArg::Qcow2 => Self::Qcow2,
        }
    }
}

impl Args {
    fn form(&self) -> Form {
        match (self.format, self.preallocate) {
            (ImageArg::Qcow2, preallocate) => Form::Qcow2 { preallocate },
            (ImageArg::Ploop, true) => Form::Preallocated,
            (ImageArg::Ploop, false) => Form::Expanded,
        }
    }

    /// Refuses what the format has not.
    fn check(&self, version: Version) -> Result<()> {
        let usage = |what: String| Err(Error::new(Kind::Usage, what));
        if self.format == ImageArg::Ploop {
            let header = Header::new(version, self.size, self.cluster);
            return header.map(drop).or_else(|e| usage(e.to_string()));
        }
        if self.format_version.is_some() {
            return usage("--format-version is of the ploop format, and not of qcow2".into());
        }
        match ClusterSize::of_qcow2(self.cluster.log2()) {
            Err(e) => usage(e.to_string()),
            Ok(_) => Ok(()),
        }
    }
}

/// A file system to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Fs {
    Ext4,
    Xfs,
    Btrfs,
    None,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let settings = match args.fs {
        Fs::None => Settings::default(),
        _ => global.settings()?,
    };
    if args.fs != Fs::None {
        need_privilege("init with a file system")?;
    }
    let version = match args.format_version.as_deref() {
        Some("1") => Version::V1,
        _ => Version::V2,
    };
    args.check(version)?;
    let new = New {
        dir: &args.dir,
        beside: None,
        size: args.size,
        cluster: args.cluster,
        version,
        form: args.form(),
    };
    let cancel = Cancel::on_signals()?;
    let mut meter = Meter::new(global.progress, &cancel);
    let draft = init::begin(&new, &mut meter)?;
    if args.fs != Fs::None {
        let image = Target::resolve(&draft.image(), Some(args.format.into()))?;
        on_device(&image, &settings, &cancel, &mut meter, |device, meter| {
            make_fs(args.fs, device, &[], &cancel, meter)
        })?;
    }
    cancel.check()?;
    let disk = draft.finish()?;
    let fs = format!("{:?}", args.fs).to_lowercase();
    Ok(Answer::new(
        format!(
            "{}: {} with {fs}",
            disk.dir.display(),
            size::show(disk.size)
        ),
        json!({
            "path": disk.dir.display().to_string(),
            "image": disk.dir.join(init::IMAGE).display().to_string(),
            "size": disk.size,
            "cluster": args.cluster.bytes(),
            "format": Format::from(args.format).as_str(),
            "format_version": (args.format == ImageArg::Ploop).then_some(match version {
                Version::V1 => 1,
                Version::V2 => 2,
            }),
            "fs": fs,
        }),
    ))
}

/// Attaches the image as a bare file (there is no descriptor yet) and does something with its device.
pub fn on_device(
    image: &Target,
    settings: &Settings,
    cancel: &Cancel,
    meter: &mut Meter<'_>,
    work: impl FnOnce(&Path, &mut Meter<'_>) -> Result<()>,
) -> Result<()> {
    meter.begin("making the file system")?;
    let format = match image {
        Target::Bare { format, .. } => Some((*format).into()),
        Target::Bundle { .. } => None,
    };
    let config = device_config(image, format, settings);
    let state = cancel.or(attach::start(config))?;
    let device = state.device.clone().unwrap_or_default();
    let made = cancel
        .check()
        .and_then(|()| work(Path::new(&device), meter));
    let attached = attach::find(image.path())?;
    let made = made.map_err(|e| say_host_low(e, &attached.state));
    // Whoever looks at the device in passing must not keep a disk attached whose file goes.
    let stopped = attach::stop(&attached).or_else(|e| attach::abandon(&attached).and(Err(e)));
    made.and(stopped)
}

/// Who writes to a device is not told why that failed where only a flush did.
fn say_host_low(e: Error, state: &State) -> Error {
    match (e.kind(), state.host_low) {
        (Kind::Io, true) => Error::new(
            Kind::NoSpace,
            format!("{}: the host is nearly full: {e}", state.path),
        ),
        _ => e,
    }
}

/// A new disk reads as zeros and has nothing to discard: what mkfs would do about that is left
/// out. `more` options come behind our own.
pub fn make_fs(
    fs: Fs,
    device: &Path,
    more: &[String],
    cancel: &Cancel,
    meter: &mut Meter<'_>,
) -> Result<()> {
    let (program, attempts): (&str, &[&[&str]]) = match fs {
        Fs::Ext4 => (
            "mkfs.ext4",
            &[
                &["-q", "-F", "-E", "nodiscard,assume_storage_prezeroed=1"],
                // Before e2fsprogs 1.47 the option is unknown.
                &[
                    "-q",
                    "-F",
                    "-E",
                    "nodiscard,lazy_itable_init=1,lazy_journal_init=1",
                ],
            ],
        ),
        Fs::Xfs => ("mkfs.xfs", &[&["-q", "-f", "-K"]]),
        Fs::Btrfs => ("mkfs.btrfs", &[&["-q", "-f", "-K"]]),
        Fs::None => return Ok(()),
    };
    let mut said = String::new();
    for options in attempts {
        let options = options
            .iter()
            .map(OsStr::new)
            .chain(more.iter().map(OsStr::new));
        match run_mkfs(program, options.chain([device.as_os_str()]), cancel, meter)? {
            Ok(()) => return Ok(()),
            Err(stderr) => said = stderr,
        }
    }
    Err(Error::new(Kind::Io, format!("{program} failed: {said}")))
}

/// How long a disk may take to die whose end is in mkfs's way.
const NEIGHBOUR_PATIENCE: Duration = Duration::from_secs(5);

/// What mkfs.btrfs says when the file behind some mounted loop device cannot be looked at: it looks
/// at all of them, and that of a disk whose keeper has just died answers with errors until the next
/// command cleans up.
const NEIGHBOUR_DIES: &str = "cannot check mount status";

/// Runs mkfs once, or again when it failed for another disk's end only. Gives what it said when it
/// failed.
fn run_mkfs<'a>(
    program: &str,
    options: impl Iterator<Item = &'a OsStr> + Clone,
    cancel: &Cancel,
    meter: &mut Meter<'_>,
) -> Result<std::result::Result<(), String>> {
    let start = Instant::now();
    loop {
        let mut command = Command::new(program);
        let output = cancel.run(command.args(options.clone()), || meter.tick());
        let output = output.map_err(|e| match e.kind() {
            Kind::Cancelled => e,
            _ => Error::new(
                Kind::NotFound,
                format!("{program}: {e}; install it, or use --fs none"),
            ),
        })?;
        if output.status.success() {
            return Ok(Ok(()));
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        if !said.contains(NEIGHBOUR_DIES) || start.elapsed() > NEIGHBOUR_PATIENCE {
            return Ok(Err(said));
        }
        leftover::sweep()?;
        std::thread::sleep(Duration::from_millis(50));
    }
}
