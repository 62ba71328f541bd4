//! Notes: which trackers an attached disk has, written down in its directory while they are in
//! memory of its keeper.
//!
//! A process of its own writes them, because the host's storage may take its time and the keeper
//! has none. One writes at a time; what changes meanwhile is for the next one. Who starts or stops
//! a tracker is answered once that is written down. What is written, and how, is in
//! [`crate::image::kept`].

use super::child::{Aide, Baggage, CONTROL_FD};
use super::control::Asker;
use super::message::Failure;
use super::{inherit, packet};
use crate::image::kept;
use crate::tracker::Name;
use crate::tracker::stored::Noted;
use ploop_formats::{Error, Kind, Result};
use serde_json::Value;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};

/// The disk's directory, in the process that writes.
const DIR_FD: RawFd = CONTROL_FD + 1;
/// The keeper's lock on the disk, which lasts until both have ended.
const LOCK_FD: RawFd = CONTROL_FD + 2;
/// Askers that wait at most.
const WAITING_MAX: usize = 64;

/// Who waits until something is written down.
#[derive(Debug)]
pub(super) struct Waiting {
    pub asker: Asker,
    /// What it is told then.
    pub answer: Value,
    /// The tracker that it has started, which is told from its namesakes by a number.
    pub started: Option<(Name, u64)>,
}

/// What is being written down.
#[derive(Debug, Default)]
pub(super) struct Notes {
    writing: Option<(Aide, Vec<Waiting>)>,
    waiting: Vec<Waiting>,
}

/// What came of it.
type Done = std::result::Result<(), Failure>;

impl Notes {
    /// Refuses one more who would have to wait.
    pub fn may_wait(&self) -> Result<()> {
        match self.waiting.len() < WAITING_MAX {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Busy,
                "too many trackers are being started and stopped at once; try again",
            )),
        }
    }

    /// Something changed, and somebody waits until that is written down.
    pub fn wait(&mut self, who: Waiting) {
        self.waiting.push(who);
    }

    /// Whether nothing is being written, nor waits for that.
    pub fn are_done(&self) -> bool {
        self.writing.is_none() && self.waiting.is_empty()
    }

    /// Whether somebody has to be sent to write.
    pub fn are_due(&self) -> bool {
        self.writing.is_none() && !self.waiting.is_empty()
    }

    /// Becomes readable when the process that writes has ended.
    pub fn polled(&self) -> Option<BorrowedFd<'_>> {
        self.writing.as_ref().map(|(aide, _)| aide.ended())
    }

    /// Sends somebody to write this down. An error is for those who get their answers with it.
    pub fn send(
        &mut self,
        dir: impl AsFd,
        lock: impl AsFd,
        trackers: &[Noted],
    ) -> std::result::Result<(), (Error, Vec<Waiting>)> {
        let waiting = std::mem::take(&mut self.waiting);
        match start(dir, lock, trackers) {
            Ok(aide) => {
                self.writing = Some((aide, waiting));
                Ok(())
            }
            Err(e) => Err((e, waiting)),
        }
    }

    /// Who waited for the process that has ended, and what came of it.
    pub fn written(&mut self) -> Option<(Result<()>, Vec<Waiting>)> {
        let (mut aide, waiting) = self.writing.take()?;
        let done = match aide.said::<Done>() {
            Some(done) => done.map_err(Error::from),
            None => Err(Error::new(Kind::Io, "who was to write it down died")),
        };
        aide.reap();
        Some((done, waiting))
    }
}

/// Starts a process for the disk in `dir`, which `lock` keeps to ourselves.
fn start(dir: impl AsFd, lock: impl AsFd, trackers: &[Noted]) -> Result<Aide> {
    let text = serde_json::to_string(trackers).map_err(io::Error::from)?;
    let mut bag = Baggage::default();
    // In the order of their numbers there.
    bag.pack(dir)?;
    bag.pack(lock)?;
    Aide::start(&["--note", &text], bag).map_err(|e| e.at("starting a process that writes"))
}

/// Writes trackers down; this is what the process does.
pub fn run(text: &str) -> Result<()> {
    let trackers: Vec<Noted> =
        serde_json::from_str(text).map_err(|e| Error::invalid(format!("--note: {e}")))?;
    let (talk, dir) = (inherit::take(CONTROL_FD)?, inherit::take(DIR_FD)?);
    let _lock = inherit::take(LOCK_FD)?;
    let done: Done = kept::note(&dir, &trackers).map_err(|e| Failure::from(&e));
    // Who is not there any more asks nothing.
    let _ = packet::send(&talk, &done, &[]);
    Ok(())
}
