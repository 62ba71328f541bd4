//! Growth: how a keeper gives its disk another size, larger or smaller, while the guest runs.
//!
//! In order:
//!
//! 1. The worker holds the guest, grows or shrinks the top, goes on with it, and says how large it is.
//! 2. The device, if there is one, is told to look at its file again: who uses the disk can use what
//!    is new. That touches the disk's own path, so somebody is sent ([`super::errand`]). Of what went
//!    nobody makes use any more: the file system was made smaller before.
//! 3. A changer has the descriptor say so.
//!
//! A worker that dies in step 1 is followed by one that says how large the disk is: as large as it
//! was, or as was wanted. Steps 2 and 3 are done whatever came of the other, and all three are done
//! also for a disk that has the size already: the same command once more finishes what was cut. Also
//! when nobody waits any more, a device is made as large as its disk.

use super::changer::{self, Said, Task, Wanted};
use super::child::Aide;
use super::control::Asker;
use super::errand;
use super::message::Failure;
use super::snapshot::Place;
use crate::stack::NewSize;
use ploop_formats::{Error, Kind, Result};
use serde_json::{Value, json};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

/// Where it is.
#[derive(Debug)]
enum Stage {
    /// The worker grows or shrinks the top.
    Top,
    /// The device is to be looked at, or somebody is at it.
    Device { sent: bool },
    /// The descriptor is to be written, or somebody is at it.
    Descriptor(Option<Aide>),
    /// All is said.
    Over,
}

/// A new size under way.
#[derive(Debug)]
pub(super) struct Growth {
    /// Who asked for it; nobody when it was found.
    asker: Option<Asker>,
    /// Bytes before.
    old: u64,
    /// What is wanted.
    to: NewSize,
    /// Bytes that there are from step 2 on.
    size: u64,
    stage: Stage,
    stall_us: Option<u64>,
    /// What the changer said.
    described: Option<Result<()>>,
    failure: Option<Error>,
}

/// What the keeper is to do.
pub(super) enum Turn {
    /// Nothing.
    Wait,
    /// Send somebody.
    Send(errand::Task),
    /// Answer whoever asked.
    Over(Option<Asker>, Result<Value>),
}

impl Growth {
    /// One that the worker has its order for.
    pub const fn asked(asker: Asker, old: u64, to: NewSize) -> Self {
        Self {
            asker: Some(asker),
            old,
            to,
            size: old,
            stage: Stage::Top,
            stall_us: None,
            described: None,
            failure: None,
        }
    }

    /// One that a worker came upon: a predecessor gave the disk this size, and nobody heard of it.
    pub const fn found(old: u64, size: u64) -> Self {
        Self {
            asker: None,
            old,
            to: NewSize::Larger(size),
            size,
            stage: Stage::Device { sent: false },
            stall_us: None,
            described: None,
            failure: None,
        }
    }

    /// What to wait for.
    pub fn polled(&self) -> [Option<BorrowedFd<'_>>; 2] {
        match &self.stage {
            Stage::Descriptor(Some(changer)) => [changer.spoke(), Some(changer.ended())],
            _ => [None; 2],
        }
    }

    /// Whether somebody reads and writes the descriptor, so that no worker may be started.
    pub const fn bars_workers(&self) -> bool {
        matches!(self.stage, Stage::Descriptor(Some(_)))
    }

    /// The top has its size.
    pub fn resized(&mut self, size: u64, stall_us: u64) {
        self.size = size;
        self.stall_us = Some(stall_us);
        self.stage = Stage::Device { sent: false };
    }

    /// The worker could not.
    pub fn not_resized(&mut self, why: Failure) {
        self.failure = Some(why.into());
        self.stage = Stage::Over;
    }

    /// Another worker serves a disk of this size.
    pub fn serves(&mut self, size: u64) {
        if !matches!(self.stage, Stage::Top) {
            return;
        }
        let done = match self.to {
            NewSize::Larger(wanted) => size >= wanted,
            NewSize::Smaller(_) => size < self.old,
        };
        if done {
            self.size = size;
            self.stage = Stage::Device { sent: false };
        } else {
            self.lost("the worker died before the disk had another size; try again");
        }
    }

    /// No worker will say what came of it.
    pub fn lost(&mut self, why: &str) {
        if matches!(self.stage, Stage::Top) {
            self.failure = Some(Error::new(Kind::Io, why));
            self.stage = Stage::Over;
        }
    }

    /// Step 2 is over.
    pub fn sized(&mut self, outcome: errand::Done) {
        if let Err(why) = outcome {
            let why = Error::from(why);
            let what = format!(
                "the disk has {} bytes now, but not its device: {why}",
                self.size
            );
            self.failure = Some(Error::new(why.kind(), what));
        }
        self.stage = Stage::Descriptor(None);
    }

    /// The next step, when its time has come. `device` is that of the disk; `described` whether there
    /// is a descriptor.
    pub fn advance(&mut self, device: Option<&str>, place: &Place<'_>, described: bool) -> Turn {
        if let (Stage::Device { sent: false }, None) = (&self.stage, device) {
            self.stage = Stage::Descriptor(None);
        }
        match (&self.stage, device) {
            (Stage::Device { sent: false }, Some(device)) => {
                self.stage = Stage::Device { sent: true };
                return Turn::Send(errand::Task::Resize {
                    device: PathBuf::from(device),
                    size: self.size,
                });
            }
            (Stage::Descriptor(None), _) if described => match self.describe(place) {
                Ok(changer) => self.stage = Stage::Descriptor(Some(changer)),
                Err(e) => self.undescribed(e),
            },
            (Stage::Descriptor(None), _) => self.stage = Stage::Over,
            _ => {}
        }
        match &self.stage {
            Stage::Over => self.over(),
            _ => Turn::Wait,
        }
    }

    fn describe(&self, place: &Place<'_>) -> Result<Aide> {
        let lock = place.locks.disk();
        let lock = lock.ok_or_else(|| Error::invalid("a disk without its lock"))?;
        let wanted = Wanted::Resize { size: self.size };
        let sandbox = place.sandbox;
        changer::start(place.dir, lock, &Task { wanted, sandbox })
    }

    /// Hears the changer, which may have `ended`.
    pub fn hear(&mut self, ended: bool) {
        let Stage::Descriptor(Some(changer)) = &mut self.stage else {
            return;
        };
        while let Some(said) = changer.said() {
            self.described = Some(match said {
                Said::Undone(why) | Said::Unknown(why) => Err(why.into()),
                _ => Ok(()),
            });
        }
        if !ended {
            return;
        }
        changer.reap();
        let died = || {
            let why = "the process that writes the descriptor died";
            Err(Error::new(Kind::Io, why))
        };
        match self.described.take().unwrap_or_else(died) {
            Ok(()) => self.stage = Stage::Over,
            Err(e) => self.undescribed(e),
        }
    }

    fn undescribed(&mut self, why: Error) {
        let what = format!(
            "the disk has {} bytes now, but its descriptor does not say so; the same size once \
             more mends that: {why}",
            self.size
        );
        self.failure
            .get_or_insert_with(|| Error::new(why.kind(), what));
        self.stage = Stage::Over;
    }

    fn over(&mut self) -> Turn {
        let answer = match self.failure.take() {
            Some(e) => Err(e),
            None => Ok(json!({
                "old": self.old,
                "size": self.size,
                "stall_us": self.stall_us,
            })),
        };
        Turn::Over(self.asker, answer)
    }
}
