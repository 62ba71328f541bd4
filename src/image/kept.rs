//! Kept: the trackers of a disk between two attachments, in a side file of its directory.
//!
//! While the disk is attached its trackers are in memory of its keeper, and the file only names
//! them: [`Stored::InUse`]. So whoever attaches it after a crash has trackers that take all of it
//! for written, and no other way leads to sets that lack something.
//!
//! **Ordering.** To attach a disk for writing, in order, all of it before the first worker starts:
//!
//! 1. The disk's locks.
//! 2. [`take`] reads the file. Its sets are believed if it was written at rest, and descriptor and
//!    layers are what they were then; else every tracker has all of the disk.
//! 3. `take` puts one in its place that says "in use". What cannot be replaced is removed; what can
//!    neither is an error, and the disk is not attached.
//!
//! While it is attached, [`note`] puts the names there again when they change. To detach it, in
//! order, all of it while its locks are held:
//!
//! 1. The worker has closed the image, said so, and ended.
//! 2. [`store`] makes the top durable once more, with its times; then it looks at descriptor and
//!    layers, and waits until the clock of file times has gone on: what is written to them from now
//!    on has a later time.
//! 3. `store` puts the sets in the place of the names.
//!
//! Each is put there in one way: written aside, fsynced, renamed, the directory fsynced. A cut
//! leaves the file as it was or as it is to be, and only the rename of step 3 makes one that is
//! believed.
//!
//! Layers below the top are told by when they were modified, and not by when anything of them
//! changed: a clone gives them one more name. A program that sets these times back, or a file
//! system that goes back as a whole, is believed.

use super::chain::Chain;
use super::target::{DESCRIPTOR, Source};
use crate::io::beneath::{self, Access};
use crate::io::memfd::SharedWords;
use crate::tracker::Blocks;
use crate::tracker::stored::{self, Noted, Proof, Resting, Stamp, Stored, Time};
use ploop_formats::{Error, Kind, Result, limits};
use rustix::fs::{
    AtFlags, Mode, OFlags, StatxFlags, StatxTimestamp, fstat, fsync, openat, renameat, statat,
    statx, unlinkat,
};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The side file.
pub const FILE: &str = "trackers.bin";
/// Where it is written before it is renamed. Found without its writer, a draft.
pub const ASIDE: &str = "trackers.bin.tmp";
/// How long the clock of file times may take to go on: some file systems know whole seconds, or
/// every second one, and no others.
const TICK: Duration = Duration::from_secs(3);
/// Numbers of generations of an unknown tracker begin at a multiple: none has two meanings.
const SERIES: u64 = 1_000_000_000;

/// What was kept.
#[derive(Debug, Default)]
pub struct Kept {
    /// The trackers.
    pub trackers: Vec<Resting<SharedWords>>,
    /// Bytes that the disk has if they are right; none where nothing is believed.
    pub size: Option<u64>,
}

impl Kept {
    /// Trackers of which nothing but the names is believed.
    fn unknown(names: impl IntoIterator<Item = Noted>) -> Result<Self> {
        let one = |noted: Noted| {
            let next = (noted.next / SERIES + 1) * SERIES;
            let recording = Blocks::new(SharedWords::create(2)?, noted.log2)?;
            recording.add_all();
            Ok(Resting {
                noted: Noted { next, ..noted },
                recording: Arc::new(recording),
                sealed: Vec::new(),
            })
        };
        Ok(Self {
            trackers: names.into_iter().map(one).collect::<Result<_>>()?,
            size: None,
        })
    }

    fn names(&self) -> Vec<Noted> {
        let names = self.trackers.iter().map(|tracker| tracker.noted.clone());
        names.collect()
    }
}

/// What was kept of the trackers of a disk that is locked for writing, and that nobody has written
/// to since. From now on the file believes in nothing.
pub fn take(dir: impl AsFd) -> Result<Kept> {
    let kept = match read(&dir) {
        Ok(None) => return Ok(Kept::default()),
        Ok(Some(stored)) => judge(&dir, stored)?,
        Err(e) => {
            tracing::warn!(
                "{FILE}: {e}: which trackers the disk had is not known, and it has none"
            );
            Kept::default()
        }
    };
    if let Err(e) = note(&dir, &kept.names()) {
        tracing::warn!("{e}: after a crash nobody will know of the disk's trackers");
        remove(&dir)?;
    }
    Ok(kept)
}

/// Writes down which trackers a disk has that is in use.
pub fn note(dir: impl AsFd, trackers: &[Noted]) -> Result<()> {
    match trackers.is_empty() {
        true => remove(dir),
        false => replace(dir, &Stored::<SharedWords>::InUse(trackers.to_vec())),
    }
}

/// Keeps the trackers of a disk of so many bytes, whose image was closed; `top` is its top.
pub fn store(
    dir: impl AsFd,
    top: impl AsFd,
    size: u64,
    trackers: Vec<Resting<SharedWords>>,
) -> Result<()> {
    if trackers.is_empty() {
        // One that was stopped may have stayed.
        return match statat(&dir, FILE, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            _ => remove(dir),
        };
    }
    fsync(&top).map_err(at("fsync of the top"))?;
    let proof = proof(&dir)?;
    let ours = fstat(&top).map_err(at("the top"))?.st_ino;
    if proof.files.last().is_none_or(|stamp| stamp.inode != ours) {
        return Err(Error::invalid(
            "its top is not the file that was written to",
        ));
    }
    outlast(&proof)?;
    let stored = Stored::AtRest {
        size,
        proof,
        trackers,
    };
    replace(dir, &stored)
}

fn at(place: &'static str) -> impl Fn(Errno) -> Error {
    move |e| Error::from(io::Error::from(e)).at(place)
}

fn read(dir: impl AsFd) -> Result<Option<Stored<SharedWords>>> {
    match beneath::open_file(dir, Path::new(FILE), Access::Read) {
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
        Ok(fd) => stored::decode(BufReader::new(File::from(fd)), SharedWords::create).map(Some),
    }
}

/// Believes what there is reason to.
fn judge(dir: impl AsFd, stored: Stored<SharedWords>) -> Result<Kept> {
    let (trackers, why) = match stored {
        Stored::InUse(names) => (names, "it was not detached cleanly".to_string()),
        Stored::AtRest {
            size,
            proof: then,
            trackers,
        } => match proof(dir) {
            Ok(now) if now == then => {
                return Ok(Kept {
                    trackers,
                    size: Some(size),
                });
            }
            now => {
                let names = trackers.into_iter().map(|tracker| tracker.noted);
                let why = now.map_or_else(|e| e.to_string(), |_| "it was changed since".into());
                (names.collect(), why)
            }
        },
    };
    tracing::warn!("{FILE}: all of the disk counts as written for its trackers: {why}");
    Kept::unknown(trackers)
}

/// What the files of a disk look like.
fn proof(dir: impl AsFd) -> Result<Proof> {
    let mut text = Vec::new();
    let descriptor = beneath::open_file(&dir, Path::new(DESCRIPTOR), Access::Read)?;
    let mut limited = File::from(descriptor).take(limits::DESCRIPTOR_MAX);
    limited.read_to_end(&mut text)?;
    let mut files = vec![stamp(&dir, DESCRIPTOR.as_ref())?];
    for layer in Chain::read(&dir, &Source::Bundle)?.layers {
        files.push(stamp(&dir, &layer.name)?);
    }
    // A clone gives a frozen layer one more name, which changes it and none of its bytes.
    let below = files.len() - 1;
    for frozen in files.iter_mut().take(below).skip(1) {
        frozen.changed = (0, 0);
    }
    Ok(Proof {
        descriptor: crc32fast::hash(&text),
        files,
    })
}

/// What a file is like now, also where another host may have written to it.
fn stamp(dir: impl AsFd, name: &OsStr) -> Result<Stamp> {
    let how = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
    let stat = statx(dir, name, how, StatxFlags::BASIC_STATS)
        .map_err(|e| Error::from(io::Error::from(e)).at(Path::new(name).display()))?;
    let time = |at: StatxTimestamp| (at.tv_sec, at.tv_nsec);
    Ok(Stamp {
        inode: stat.stx_ino,
        len: stat.stx_size,
        modified: time(stat.stx_mtime),
        changed: time(stat.stx_ctime),
    })
}

/// Waits until a file that is written to gets a later time than any of these has.
fn outlast(proof: &Proof) -> Result<()> {
    let times = proof.files.iter().flat_map(|f| [f.modified, f.changed]);
    let ends = times.map(|(seconds, nanoseconds)| match nanoseconds {
        0 => (seconds.saturating_add(2), 0),
        _ => (seconds, nanoseconds),
    });
    let last = ends.max().unwrap_or_default();
    let now = || -> Time {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        (now.tv_sec, now.tv_nsec as u32)
    };
    let due = Instant::now() + TICK;
    while now() <= last {
        if Instant::now() > due {
            return Err(Error::invalid(
                "its files were changed later than it is now: check the host's clock",
            ));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Puts another file in the place of the one there is, durably.
fn replace(dir: impl AsFd, stored: &Stored<SharedWords>) -> Result<()> {
    unlink(&dir, ASIDE)?;
    let written = write(&dir, stored).and_then(|()| {
        renameat(&dir, ASIDE, &dir, FILE).map_err(at(FILE))?;
        fsync(&dir).map_err(at("fsync of the directory"))
    });
    if written.is_err() {
        // It may have taken the last space.
        let _ = unlink(&dir, ASIDE);
    }
    written
}

fn write(dir: impl AsFd, stored: &Stored<SharedWords>) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(dir, ASIDE, flags, Mode::from_raw_mode(0o600)).map_err(at(ASIDE))?;
    let written = || {
        let mut out = BufWriter::new(File::from(fd));
        stored::encode(stored, &mut out)?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok::<_, Error>(file.sync_all()?)
    };
    written().map_err(|e| e.at(ASIDE))
}

fn remove(dir: impl AsFd) -> Result<()> {
    unlink(&dir, ASIDE)?;
    unlink(&dir, FILE)?;
    fsync(dir).map_err(at("fsync of the directory"))
}

fn unlink(dir: impl AsFd, name: &'static str) -> Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        gone => gone.map_err(at(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_written_after_a_look_at_the_files_is_seen_by_the_next_look() {
        let folder = tempfile::tempdir().unwrap();
        let dir = beneath::directory(folder.path()).unwrap();
        let write = || {
            let mut file = File::options();
            let file = file.create(true).truncate(false).write(true);
            let mut file = file.open(folder.path().join("top")).unwrap();
            file.write_all(b"x").unwrap();
        };
        write();
        for round in 0..100 {
            let stamp = stamp(&dir, "top".as_ref()).unwrap();
            let then = Proof {
                descriptor: 0,
                files: vec![stamp],
            };
            outlast(&then).unwrap();
            write();
            let now = super::stamp(&dir, "top".as_ref()).unwrap();
            assert_ne!(now, stamp, "round {round}");
        }
    }

    #[test]
    fn files_from_the_future_prove_nothing() {
        let now = clock_gettime(ClockId::RealtimeCoarse).tv_sec;
        let changed = |changed| Proof {
            descriptor: 0,
            files: vec![Stamp {
                inode: 1,
                len: 1,
                modified: (0, 0),
                changed,
            }],
        };
        outlast(&changed((now - 10, 5))).unwrap();
        // Of a file system that knows whole seconds only: what is written in this one looks alike.
        outlast(&changed((now, 0))).unwrap();
        assert!(clock_gettime(ClockId::RealtimeCoarse).tv_sec >= now + 2);
        assert!(outlast(&changed((now + 3600, 5))).is_err());
    }
}
