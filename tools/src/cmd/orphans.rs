//! `list --orphans`: what nobody needs any more, and its removal when that is asked for.
//!
//! Two kinds: what dead keepers left on this host, and files in a disk's directory that its
//! descriptor does not name. Of those only drafts of our own are ever removed; what another
//! program or person put there is not ours to judge.

use crate::answer::Answer;
use ploop::image::chain::read_descriptor;
use ploop::image::members::{self, Members};
use ploop::image::target::Target;
use ploop::rundir::{self, Entry, RunDir};
use ploop::serve::loopdev;
use ploop::serve::supervise::{leftover, mounts};
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Options of `list` that ask for orphans instead.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// List what dead keepers left behind instead; with DISK, files that its descriptor lacks
    #[arg(long)]
    orphans: bool,
    /// Remove what is listed; of a disk's files only drafts of our own
    #[arg(long, requires = "orphans")]
    remove: bool,
    /// Image directory to look into
    #[arg(requires = "orphans")]
    disk: Option<PathBuf>,
}

/// Does it, if it was asked for.
pub fn run(args: &Args) -> Result<Option<Answer>> {
    match (args.orphans, &args.disk) {
        (false, _) => Ok(None),
        (true, Some(disk)) => files(disk, args.remove).map(Some),
        (true, None) => keepers(args.remove).map(Some),
    }
}

/// What stands on the run directory of a dead keeper.
struct Remains {
    run: PathBuf,
    path: Option<String>,
    devices: Vec<(PathBuf, Vec<PathBuf>)>,
    socket: Option<String>,
}

impl Remains {
    fn of(run: &RunDir) -> Self {
        let state = run.state();
        let attached = loopdev::attached_under(&run.disk()).unwrap_or_default();
        let devices = attached.iter().map(|device| {
            let path = PathBuf::from(format!("/dev/loop{}", device.number));
            let points = mounts::of_device(&path).unwrap_or_default();
            (path, points)
        });
        Self {
            run: run.path().to_path_buf(),
            devices: devices.collect(),
            path: state.as_ref().map(|s| s.path.clone()),
            socket: state.and_then(|s| s.socket),
        }
    }

    fn text(&self) -> String {
        let whose = self
            .path
            .as_deref()
            .unwrap_or("a disk that it does not name");
        let mut text = format!("{}: of {whose}\n", self.run.display());
        for (device, points) in &self.devices {
            text += &format!("  device {}\n", device.display());
            for point in points {
                text += &format!("  mounted on {}\n", point.display());
            }
        }
        if let Some(socket) = &self.socket {
            text += &format!("  socket {socket}\n");
        }
        text
    }

    fn json(&self, removed: bool) -> Value {
        let device = |(device, points): &(PathBuf, Vec<PathBuf>)| {
            json!({
                "device": device.display().to_string(),
                "mountpoints": points.iter().map(|p| p.display().to_string()).collect::<Vec<_>>(),
            })
        };
        json!({
            "run_directory": self.run.display().to_string(),
            "path": self.path,
            "devices": self.devices.iter().map(device).collect::<Vec<_>>(),
            "socket": self.socket,
            "removed": removed,
        })
    }
}

fn keepers(remove: bool) -> Result<Answer> {
    let mut found = Vec::new();
    for entry in rundir::entries()? {
        if let Entry::Leftover(run) = entry {
            found.push(Remains::of(&run));
        }
    }
    if remove {
        leftover::sweep()?;
    }
    let text: String = found.iter().map(Remains::text).collect();
    let gone = |r: &Remains| remove && !r.run.exists();
    let keepers: Vec<Value> = found.iter().map(|r| r.json(gone(r))).collect();
    Ok(Answer::new(text, json!({ "keepers": keepers })))
}

fn files(disk: &Path, remove: bool) -> Result<Answer> {
    let target = Target::resolve(disk, None).map_err(|e| match e.kind() {
        Kind::Usage => {
            let what = "a bare image has no directory of its own; name an image directory";
            Error::new(Kind::Usage, what).at(disk.display())
        }
        _ => e,
    })?;
    let place = |e: ploop::Error| e.at(target.path().display());
    let dir = target.open_dir()?;
    let descriptor = read_descriptor(&dir).map_err(place)?;
    let found = Members::of(&dir, &descriptor).map_err(place)?;
    let removed = match remove {
        true => members::remove_drafts(&dir).map_err(place)?,
        false => Vec::new(),
    };
    let drafts = found.drafts.iter().map(|name| (name, "draft"));
    let foreign = found.foreign.iter().map(|name| (name, "unknown"));
    let all: Vec<_> = drafts.chain(foreign).collect();
    let text = all.iter().map(|(name, kind)| {
        let end = if removed.contains(name) {
            ", removed"
        } else {
            ""
        };
        format!("{}: {kind}{end}\n", Path::new(name).display())
    });
    let files = all.iter().map(|(name, kind)| {
        let file = Path::new(name).display().to_string();
        json!({ "file": file, "kind": kind, "removed": removed.contains(name) })
    });
    let path = target.path().display().to_string();
    Ok(Answer::new(
        text.collect::<String>(),
        json!({ "path": path, "files": files.collect::<Vec<_>>() }),
    ))
}
