//! Announce: tells once, and only once, whether the disk can be used.

use super::inherit;
use super::message::{Announce, Failure, Report};
use crate::rundir::State;
use ploop_formats::Result;
use std::fs::File;
use std::io::{self, Write};

/// Who waits to hear.
#[derive(Debug)]
pub struct Announcer {
    pipe: Option<File>,
    stdout: bool,
    json: bool,
    done: bool,
}

impl Announcer {
    /// Takes the pipe, when there is one.
    pub fn new(announce: Announce, json: bool) -> Result<Self> {
        let pipe = match announce {
            Announce::Pipe(fd) => Some(File::from(inherit::take(fd)?)),
            _ => None,
        };
        Ok(Self {
            pipe,
            stdout: announce == Announce::Stdout,
            json,
            done: false,
        })
    }

    /// Whether somebody was told.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The disk can be used. An error means that nobody listens any more.
    pub fn ready(&mut self, state: &State) -> io::Result<()> {
        self.done = true;
        if let Some(mut pipe) = self.pipe.take() {
            return pipe.write_all(&serde_json::to_vec(&Report::Ready(Box::new(
                state.clone(),
            )))?);
        }
        if !self.stdout {
            return Ok(());
        }
        let line = match self.json {
            true => serde_json::to_string(state)?,
            false => state.uri.clone().unwrap_or_default(),
        };
        writeln!(io::stdout(), "{line}")
    }

    /// It cannot, and what was made for it is gone.
    pub fn failed(&mut self, failure: &Failure) {
        self.done = true;
        let Some(mut pipe) = self.pipe.take() else {
            return;
        };
        let text = serde_json::to_vec(&Report::Failed(failure.clone())).unwrap_or_default();
        let _ = pipe.write_all(&text);
    }
}
