//! `resize`: a disk and the file system on it get another size.
//!
//! In order: what cannot end well is refused; a file system that is not mounted is checked where its
//! tools want that; a space limit of before goes, or a part of it. A larger disk grows, then its file
//! system. In a smaller one the file system comes first, and then the disk, which is the same disk to
//! everybody until then. What is mounted and cannot get smaller is given a space limit
//! ([`crate::balloon`]). Whatever fails leaves a disk that can be used, and the same command goes on
//! with it; where a size was asked for that is relative, the one that is named.

use super::grow::{self, Grown};
use super::mount::{device_config, need_privilege, undo};
use super::{FormatArg, convert, snapshot};
use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::cancel::Cancel;
use crate::fsys::{FileSystem, Fs};
use crate::global::Global;
use crate::meter::Meter;
use crate::{balloon, errand, size};
use ploop::image::grow::{Sizes, Wanted};
use ploop::image::target::Target;
use ploop::serve::supervise::trim::{Mounted, Trimmed};
use ploop::{Error, Kind, Result};
use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Make a disk and the file system on it larger or smaller
///
/// ext4, XFS and btrfs, on the whole disk or in its one partition. A mounted one grows as it is;
/// ext4 needs CAP_SYS_RESOURCE for that. Smaller gets ext4 when it is not mounted, and btrfs
/// always; a mounted ext4 or XFS is given a space limit instead, which a larger size takes away: a
/// file in it takes the difference, and the host has its space. One that is not mounted is
/// attached, and mounted where that is needed, for as long as it takes; ext4 is checked before. A
/// failure names the step, and the command that goes on with it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Size in bytes, or with K, M, G, T; with a + before it, how much more. Rounded up to a cluster
    #[arg(value_parser = size::wanted)]
    size: Wanted,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    need_privilege("resize")?;
    let cancel = Cancel::on_signals()?;
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    snapshot::mount::refuse_view(&target)?;
    let _alone = alone(&target)?;
    let mut meter = Meter::new(global.progress, &cancel);
    let place = |e: Error| e.at(target.path().display());
    if let Some(attached) = attach::by_identity(&target.identity()?)? {
        return resize(&target, &attached, args.size, &cancel, &mut meter).map_err(place);
    }
    let config = device_config(&target, args.format, &global.settings()?);
    convert::settle(&target, &cancel)?;
    cancel.or(attach::start(config))?;
    let resized = attach::find(target.path()).and_then(|attached| {
        resize(&target, &attached, args.size, &cancel, &mut meter).map_err(place)
    });
    match resized {
        Ok(answer) => attach::stop(&attach::find(target.path())?).map(|()| answer),
        Err(e) => {
            undo(&target);
            Err(e)
        }
    }
}

/// Keeps other commands like this one away: each looks at a size, and goes by it.
fn alone(target: &Target) -> Result<OwnedFd> {
    let dir = target.open_dir()?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(_) => Err(Error::new(
            Kind::Busy,
            format!(
                "{}: is being resized by another command",
                target.path().display()
            ),
        )),
    }
}

/// What is done to an attached disk.
struct Job<'a, 'm> {
    target: &'a Target,
    attached: &'a Attached,
    fs: FileSystem<'a>,
    /// Bytes that a space limit takes now.
    taken: u64,
    cancel: &'a Cancel,
    meter: &'a mut Meter<'m>,
}

fn resize(
    target: &Target,
    attached: &Attached,
    wanted: Wanted,
    cancel: &Cancel,
    meter: &mut Meter<'_>,
) -> Result<Answer> {
    let device = attached.state.device.as_deref().ok_or_else(|| {
        Error::unsupported(
            "served over NBD: `ploopctl grow` makes it larger, and its client the file system",
        )
    })?;
    let fs = FileSystem::of(Path::new(device), attached, cancel)?;
    meter.begin("checking the file system")?;
    fs.check()?;
    let taken = fs.limit()?;
    let mut job = Job {
        target,
        attached,
        fs,
        taken,
        cancel,
        meter,
    };
    let has = attached.state.size;
    let to = wanted.of(has.saturating_sub(taken))?.bytes();
    match to < has {
        true => job.smaller(to),
        false => job.larger(to),
    }
}

impl Job<'_, '_> {
    /// At least as large as the disk.
    fn larger(&mut self, to: u64) -> Result<Answer> {
        if self.taken > 0 && to == self.attached.state.size {
            self.release()?;
            return Ok(self.answer(&self.as_it_is()));
        }
        self.fs.refuse_growth()?;
        let taken = self.taken;
        self.release()?;
        let begun = self.meter.begin("growing the disk");
        let grown = begun.and_then(|()| grow::running(self.attached, Wanted::To(to)));
        let grown = grown.map_err(|e| self.put_back(taken, grow::smaller(e)))?;
        // Whoever wants it to end is heard by what follows.
        let _ = self.meter.begin("growing the file system");
        let room = self.fs.follow(grown.sizes.new);
        room.and_then(|()| self.fs.grow()).map_err(|e| {
            let has = "but the file system on it has not";
            step("the disk", grown.sizes.new, has, grown.sizes.new, &e)
        })?;
        Ok(self.answer(&grown))
    }

    fn smaller(&mut self, to: u64) -> Result<Answer> {
        let (cluster, below) = look(self.target, self.cancel)?;
        let to = to.next_multiple_of(cluster);
        if to >= self.attached.state.size {
            return self.larger(to);
        }
        let shrinks = self.fs.kind == Fs::Btrfs && below <= to;
        if self.fs.mounted.is_some() && !shrinks {
            return self.limit(to);
        }
        if below > to {
            return Err(Error::invalid(format!(
                "a snapshot of it has {}, and what that holds behind the end would be seen again if the \
                 disk grew: delete the snapshots first, or make the disk one image with `ploopctl \
                 convert --flatten`; a mounted disk can be given a space limit",
                size::show(below)
            )));
        }
        if self.fs.kind == Fs::Xfs {
            // Which is refused, with the way out.
            self.fs.minimum()?;
        }
        // What a command before this one began is over then, or in the way.
        let now = grow::running(self.attached, Wanted::By(0))?;
        if now.sizes.new != self.attached.state.size {
            return Err(Error::new(
                Kind::Busy,
                "its size has just been changed by another command; look at it, and try again",
            ));
        }
        self.make_room(to)?;
        let _ = self.meter.begin("making the file system smaller");
        let shrunk = self.fs.room(to).and_then(|room| self.fs.shrink(room));
        shrunk.and_then(|()| self.fs.follow(to)).map_err(|e| {
            let what = format!(
                "the disk is as large as before, and the file system is not smaller yet, or its \
                 partition: {e}; `ploopctl resize DISK {to}` tries again"
            );
            Error::new(e.kind(), what)
        })?;
        let _ = self.meter.begin("making the disk smaller");
        let shrunk = grow::running(self.attached, Wanted::Down(to))
            .map_err(|e| step("the file system", to, "but the disk is not smaller", to, &e))?;
        Ok(self.answer(&shrunk))
    }

    /// Takes a space limit away, and refuses what the file system cannot get down to without it: then
    /// it is as it was.
    fn make_room(&mut self, to: u64) -> Result<()> {
        let taken = self.taken;
        let around = to.saturating_sub(self.fs.room(to)?);
        self.release()?;
        let needs = self.fs.minimum().and_then(|minimum| {
            let minimum = minimum.saturating_add(around);
            match to >= minimum {
                true => Ok(()),
                false => Err(Error::invalid(format!(
                    "{} do not hold what is in the file system, which needs {minimum} bytes ({}) or more",
                    size::show(to),
                    size::show(minimum)
                ))),
            }
        });
        needs.map_err(|e| self.put_back(taken, e))
    }

    /// Gives the file system its space limit again, when what that was taken away for has failed; why,
    /// and that it is gone where that fails, too.
    fn put_back(&mut self, taken: u64, why: Error) -> Error {
        match self.fs.take(taken) {
            Ok(()) => {
                self.taken = taken;
                why
            }
            Err(e) => Error::new(
                why.kind(),
                format!("{why}; the space limit that it had is gone: {e}"),
            ),
        }
    }

    /// Takes the difference out of a mounted file system.
    fn limit(&mut self, to: u64) -> Result<Answer> {
        let has = self.attached.state.size;
        self.meter.begin("taking space from the file system")?;
        if has - to > self.taken {
            self.trim()?;
        }
        let point = self.fs.mounted.as_deref().expect("it is mounted");
        balloon::set(point, has - to).map_err(|e| {
            let smallest = balloon::most(point).map(|most| has.saturating_sub(most));
            match (e.kind(), smallest) {
                (Kind::Invalid, Ok(least)) => Error::invalid(format!(
                    "{e}; it can be limited to {least} bytes ({}) now, and not to less",
                    size::show(least)
                )),
                _ => e,
            }
        })?;
        self.taken = has - to;
        Ok(self.answer(&self.as_it_is()))
    }

    /// Gives the host what is free.
    fn trim(&mut self) -> Result<()> {
        let device = self.attached.state.device.as_deref().map(Path::new);
        let mounted = device.map_or(Ok(None), Mounted::from)?;
        // It is let go of then: whoever unmounts it is not to find us there.
        let trimmed = mounted.map(|fs| fs.sync().and_then(|()| fs.trim(self.meter)));
        if let Some(Trimmed::Refused(why)) = trimmed.transpose()? {
            tracing::warn!("what is free in it stays on the host: {why}");
        }
        Ok(())
    }

    /// The disk has the size that it had.
    fn as_it_is(&self) -> Grown {
        let has = self.attached.state.size;
        Grown {
            sizes: Sizes { old: has, new: has },
            stall_us: json!(0),
        }
    }

    /// Takes a space limit away.
    fn release(&mut self) -> Result<()> {
        if self.taken > 0 {
            self.meter.begin("taking its space limit away")?;
            self.fs.release()?;
            self.taken = 0;
        }
        Ok(())
    }

    fn answer(&self, grown: &Grown) -> Answer {
        let Sizes { old, new } = grown.sizes;
        let fs = self.fs.name();
        let limit = (self.taken > 0).then(|| new.saturating_sub(self.taken));
        let limited = limit.map(|limit| format!(", limited to {}", size::show(limit)));
        Answer::new(
            format!(
                "{}: {} with {fs}, was {}{}",
                self.target.path().display(),
                size::show(new),
                size::show(old),
                limited.unwrap_or_default()
            ),
            json!({
                "path": self.target.path().display().to_string(),
                "old_size": old,
                "size": new,
                "limit": limit,
                "fs": fs,
                "stall_us": grown.stall_us,
            }),
        )
    }
}

/// The disk's cluster, and the size of its largest delta below the top, in bytes. Another process
/// looks: this one may not look into images.
fn look(target: &Target, cancel: &Cancel) -> Result<(u64, u64)> {
    let mut args: Vec<OsString> = vec!["info".into(), target.path().into()];
    if let Target::Bare { format, .. } = target {
        args.extend(["--format".into(), format.as_str().into()]);
    }
    let said = errand::run(&args, None, cancel)?;
    let odd = || Error::invalid("info: an answer without sizes");
    let cluster = said["cluster"]
        .as_u64()
        .filter(|n| *n > 0)
        .ok_or_else(odd)?;
    let layers = said["layers"].as_array().ok_or_else(odd)?;
    let below = layers.iter().take(layers.len().saturating_sub(1));
    let below = below.filter_map(|layer| layer["size"].as_u64()).max();
    Ok((cluster, below.unwrap_or(0)))
}

/// Says what is done, and what is left to do.
fn step(what: &str, has: u64, left: &str, to: u64, e: &Error) -> Error {
    let what = format!(
        "{what} has {} now, {left}: {e}; `ploopctl resize DISK {to}` goes on with it",
        size::show(has)
    );
    Error::new(e.kind(), what)
}
