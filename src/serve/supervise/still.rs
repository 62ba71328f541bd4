//! Still: a process that keeps who uses a device still while its disk is changed, or kept as it is.
//!
//! For a snapshot and for a freeze ([`super::freeze`]) it freezes the file system on the device.
//! That writes back what the file system holds in memory, through our own worker, and may wait for
//! it, so the keeper has it done. In order: what is to be written is written while programs still
//! run; the file system is frozen, and that is said; it is thawed.
//!
//! For a switch it claims the device, which nobody may have mounted, and has the kernel write back and
//! forget what it remembers of it, before and after.
//!
//! It ends when the keeper says so or has died, and after a while in any case. One that is killed is
//! replaced by one that only undoes what it did.

use super::child::{Aide, Baggage, CONTROL_FD};
use super::control::Asker;
use super::inherit;
use super::message::Failure;
use super::mounts::{self, Mount};
use super::packet;
use ploop_formats::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, openat, statx, syncfs};
use rustix::io::Errno;
use rustix::ioctl::{self, NoArg, Opcode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// `FIFREEZE`, `FITHAW` and `BLKFLSBUF` (linux/fs.h).
const FIFREEZE: Opcode = ioctl::opcode::read_write::<libc::c_int>(b'X', 119);
const FITHAW: Opcode = ioctl::opcode::read_write::<libc::c_int>(b'X', 120);
const BLKFLSBUF: Opcode = ioctl::opcode::none(0x12, 97);

/// How long a change may take at most, and somewhat more.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is wanted of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Wanted {
    /// The file system is frozen.
    Freeze,
    /// It is thawed.
    Thaw,
    /// Nobody mounts the device, and nothing of it is remembered.
    Claim,
    /// Nothing of it is remembered.
    Forget,
}

/// The same, of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Task {
    device: PathBuf,
    wanted: Wanted,
    /// How long everybody is kept still at most.
    most: Duration,
}

/// What it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Said {
    /// Everybody is still; whether a file system is among them.
    Still { mounted: bool },
    /// Nobody is any more, after so many microseconds.
    Over(u64),
    /// It could not be done, or undone.
    Failed(Failure),
}

/// What it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Told {
    /// The change is made, or not.
    End,
}

/// What it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// The top is frozen, under a GUID if one was asked for.
    Snapshot(Option<String>),
    /// The disk goes back to a point.
    Switch(String),
    /// None: the disk is kept as it is, for so long at most.
    Nothing(Duration),
}

/// One as its keeper sees it.
#[derive(Debug)]
pub(super) struct Still {
    aide: Aide,
    device: PathBuf,
    /// Who asked for the change.
    pub asker: Asker,
    /// The change.
    pub change: Change,
    /// Whether a file system is frozen.
    pub mounted: bool,
    /// It said what came of it, or another one was sent to undo what it may have done.
    over: bool,
    /// It has ended, and the change has not.
    gone: bool,
    lasted_us: Option<u64>,
    answer: Option<Result<Value>>,
}

/// What the keeper is to do.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing yet.
    Wait,
    /// Make the change.
    Begin,
    /// Do not commit the change, if that is still possible.
    Abandon,
    /// Forget the process and answer, unless the answer comes later.
    Over(Option<Result<Value>>),
}

impl Still {
    /// Sends somebody to keep the users of `device` still.
    pub fn start(device: PathBuf, asker: Asker, change: Change) -> Result<Self> {
        let (wanted, most) = match change {
            Change::Snapshot(_) => (Wanted::Freeze, PATIENCE),
            Change::Switch(_) => (Wanted::Claim, PATIENCE),
            Change::Nothing(most) => (Wanted::Freeze, most),
        };
        Ok(Self {
            aide: send(&device, wanted, most)?,
            device,
            asker,
            change,
            mounted: false,
            over: false,
            gone: false,
            lasted_us: None,
            answer: None,
        })
    }

    /// What to wait for.
    pub fn polled(&self) -> [Option<BorrowedFd<'_>>; 2] {
        match self.gone {
            true => [None; 2],
            false => [self.aide.spoke(), Some(self.aide.ended())],
        }
    }

    /// Hears it.
    pub fn hear(&mut self) -> Turn {
        match self.aide.said() {
            None => Turn::Wait,
            Some(Said::Still { mounted }) => {
                self.mounted = mounted;
                Turn::Begin
            }
            Some(Said::Over(us)) => {
                self.over = true;
                self.lasted_us = Some(us);
                Turn::Wait
            }
            Some(Said::Failed(failure)) => {
                self.over = true;
                tracing::warn!("{}", failure.message);
                // Also after a success: who asked must know that it is not undone.
                if !matches!(self.answer, Some(Err(_))) {
                    self.answer = Some(Err(Error::from(failure)));
                }
                Turn::Wait
            }
        }
    }

    /// The change is made, or not: everybody goes on, and then whoever asked is answered.
    pub fn finish(&mut self, answer: Result<Value>) -> Turn {
        self.answer.get_or_insert(answer);
        if std::mem::take(&mut self.gone) {
            return match self.change {
                Change::Switch(_) if !self.over => self.undo(Wanted::Forget),
                _ => self.end(),
            };
        }
        if !self.aide.tell(&Told::End) {
            // It does the same when it hears no more, or is replaced.
            self.aide.leave_alone();
        }
        Turn::Wait
    }

    /// It has ended, and was heard. `busy` while the change is under way.
    pub fn ended(&mut self, busy: bool) -> Turn {
        self.aide.reap();
        if self.over {
            self.gone = busy;
            return if busy { Turn::Wait } else { self.end() };
        }
        // It may have done it without having said so.
        let (why, wanted) = match self.change {
            Change::Snapshot(_) => (
                "the process that kept the file system frozen died: a snapshot that was made is as \
                 after a power cut",
                Wanted::Thaw,
            ),
            Change::Switch(_) => (
                "the process that kept others off the device died: see in `ploopctl snapshot list` \
                 whether the disk was switched",
                Wanted::Forget,
            ),
            Change::Nothing(_) => (
                "the process that kept the file system frozen died",
                Wanted::Thaw,
            ),
        };
        self.answer = Some(Err(Error::new(Kind::Io, why)));
        if busy && wanted == Wanted::Forget {
            // What is read until then would be remembered.
            self.gone = true;
            return Turn::Abandon;
        }
        self.undo(wanted)
    }

    /// Sends another one, to undo what this one may have done.
    fn undo(&mut self, wanted: Wanted) -> Turn {
        self.over = true;
        match send(&self.device, wanted, PATIENCE) {
            Ok(aide) => {
                self.aide = aide;
                Turn::Wait
            }
            Err(e) => {
                tracing::error!("{}: left as it was: {e}", self.device.display());
                self.end()
            }
        }
    }

    fn end(&mut self) -> Turn {
        let frozen_us = match self.change {
            Change::Snapshot(_) | Change::Nothing(_) => self.lasted_us,
            Change::Switch(_) => None,
        };
        Turn::Over(self.answer.take().map(|answer| {
            answer.map(|mut made| {
                if let (Some(fields), Some(us)) = (made.as_object_mut(), frozen_us) {
                    fields.insert("frozen_us".into(), json!(us));
                }
                made
            })
        }))
    }

    /// Ends it where it is: another one undoes what it did.
    pub fn kill(&mut self) {
        self.aide.kill();
    }
}

fn send(device: &Path, wanted: Wanted, most: Duration) -> Result<Aide> {
    let task = Task {
        device: device.to_path_buf(),
        wanted,
        most,
    };
    let text = serde_json::to_string(&task).map_err(io::Error::from)?;
    let started = Aide::start(&["--still", &text], Baggage::default());
    started.map_err(|e| e.at("starting a process that keeps a device still"))
}

/// Keeps a device still as long as the keeper wants; this is what the process does.
pub fn run(task: &str) -> Result<()> {
    let task: Task =
        serde_json::from_str(task).map_err(|e| Error::invalid(format!("--still: {e}")))?;
    let talk = inherit::take(CONTROL_FD)?;
    let device = &task.device;
    let done = match task.wanted {
        Wanted::Freeze => keep_frozen(device, &talk, task.most),
        Wanted::Thaw => {
            root_of(device).and_then(|root| root.map_or(Ok(0), |r| thaw(&r).map(|()| 0)))
        }
        Wanted::Claim => keep_claimed(device, &talk, task.most),
        Wanted::Forget => open_device(device, OFlags::empty())
            .and_then(|d| forget(&d))
            .map(|()| 0),
    };
    let said = match done {
        Ok(us) => Said::Over(us),
        Err(e) => Said::Failed(Failure::from(&e.at(device.display()))),
    };
    let _ = packet::send(&talk, &said, &[]);
    Ok(())
}

/// How long the file system was frozen, in microseconds.
fn keep_frozen(device: &Path, talk: &OwnedFd, most: Duration) -> Result<u64> {
    let root = root_of(device)?;
    if let Some(root) = &root {
        // What is left to write when everybody waits is little.
        syncfs(root).map_err(io::Error::from)?;
    }
    let start = Instant::now();
    root.as_ref().map_or(Ok(()), freeze)?;
    await_the_end(talk, root.is_some(), most);
    root.as_ref().map_or(Ok(()), thaw)?;
    Ok(start.elapsed().as_micros() as u64)
}

/// How long the device was claimed, in microseconds.
fn keep_claimed(path: &Path, talk: &OwnedFd, most: Duration) -> Result<u64> {
    let start = Instant::now();
    let device = open_device(path, OFlags::EXCL)?;
    // Written later, it would be written to what the disk is then.
    forget(&device)?;
    await_the_end(talk, false, most);
    forget(&device)?;
    Ok(start.elapsed().as_micros() as u64)
}

fn open_device(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    match open(
        path,
        flags | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Err(Errno::BUSY) => Err(Error::new(
            Kind::Busy,
            "it is mounted, or in use otherwise: what is in use cannot go back; umount it first",
        )),
        opened => opened.map_err(|e| io::Error::from(e).into()),
    }
}

/// Has the kernel write back and forget what it remembers of a device.
fn forget(device: &OwnedFd) -> Result<()> {
    // SAFETY: BLKFLSBUF takes a descriptor and ignores its argument.
    let done = unsafe { ioctl::ioctl(device, NoArg::<BLKFLSBUF>::new()) };
    done.map_err(|e| Error::from(io::Error::from(e)).at("forgetting what is cached"))
}

fn freeze(root: &OwnedFd) -> Result<()> {
    // SAFETY: FIFREEZE takes a descriptor and ignores its argument.
    match unsafe { ioctl::ioctl(root, NoArg::<FIFREEZE>::new()) } {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(Error::new(Kind::Busy, "somebody has frozen it already")),
        Err(Errno::OPNOTSUPP) => Err(Error::unsupported(
            "its file system cannot be frozen: make the snapshot without --freeze, or unmount it first",
        )),
        Err(Errno::PERM) => Err(Error::new(
            Kind::Privilege,
            "to freeze a file system takes CAP_SYS_ADMIN",
        )),
        Err(e) => Err(Error::from(io::Error::from(e)).at("freezing")),
    }
}

fn thaw(root: &OwnedFd) -> Result<()> {
    // SAFETY: FITHAW takes a descriptor and ignores its argument.
    match unsafe { ioctl::ioctl(root, NoArg::<FITHAW>::new()) } {
        // Somebody was faster.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(e) => Err(Error::from(io::Error::from(e)).at("thawing")),
    }
}

/// Says that everybody is still, and waits until the keeper ends that or is gone, or too long.
fn await_the_end(talk: &OwnedFd, mounted: bool, most: Duration) {
    if packet::send(talk, &Said::Still { mounted }, &[]).is_err() {
        return;
    }
    let start = Instant::now();
    loop {
        let waits = matches!(packet::receive::<Told>(talk), Ok(None));
        let left = most.saturating_sub(start.elapsed());
        if !waits || left.is_zero() {
            return;
        }
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let _ = poll(&mut [PollFd::new(talk, PollFlags::IN)], Some(&left));
    }
}

/// The root of what is mounted from a device, in whatever mount namespace.
pub(super) fn root_of(device: &Path) -> Result<Option<OwnedFd>> {
    let own = PathBuf::from("/proc/self");
    let others = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let others = others.filter(|e| {
        e.file_name()
            .as_encoded_bytes()
            .iter()
            .all(u8::is_ascii_digit)
    });
    for proc in [own].into_iter().chain(others.map(|e| e.path())) {
        // Who is gone by now has nothing mounted.
        let mounted = mounts::seen_by(&proc).unwrap_or_default();
        let roots = mounts::of(&mounted, device).rev();
        if let Some(root) = roots.filter_map(|mount| open_root(&proc, mount)).next() {
            return Ok(Some(root));
        }
    }
    Ok(None)
}

/// Opens a mount point as a process sees it, unless something else covers it.
fn open_root(proc: &Path, mount: &Mount) -> Option<OwnedFd> {
    let point = mount.point.strip_prefix("/").ok()?;
    let path = proc.join("root").join(point);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, &path, flags, Mode::empty()).ok()?;
    let found = statx(root.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    (found.stx_mnt_id == mount.id).then_some(root)
}
