//! Cancel: Ctrl-C, SIGTERM and a hang-up end a verb in order, so that nothing half made stays.
//!
//! The first signal is noted and looked at between steps; a second one ends the process at once.

use ploop::{Error, Kind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a signal may go unnoticed by who sleeps.
const BLINK: Duration = Duration::from_millis(50);

/// Whether the user wants it to end.
#[derive(Debug)]
pub struct Cancel {
    asked: Arc<AtomicBool>,
}

impl Cancel {
    /// Notes signals from now on.
    pub fn on_signals() -> Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            flag::register_conditional_default(signal, Arc::clone(&asked))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self { asked })
    }

    /// Notes nothing.
    #[cfg(test)]
    pub fn never() -> Self {
        Self {
            asked: Arc::default(),
        }
    }

    /// `Cancelled` once a signal came.
    pub fn check(&self) -> Result<()> {
        match self.asked.load(Ordering::Relaxed) {
            true => Err(Error::new(
                Kind::Cancelled,
                "cancelled by a signal; what was begun is undone",
            )),
            false => Ok(()),
        }
    }

    /// Sleeps; false when a signal ended that.
    pub fn sleep(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.check().is_err() {
                return self.check().is_ok();
            }
            std::thread::sleep(left.min(BLINK));
        }
    }

    /// What came of a step that started others: a signal of the terminal ends those, too, and then
    /// `Cancelled` is the truth about their failure.
    pub fn or<T>(&self, done: Result<T>) -> Result<T> {
        done.or_else(|e| self.check().and(Err(e)))
    }

    /// Runs a program that says little, calls `tick` meanwhile, and ends it when a signal comes.
    pub fn run(
        &self,
        command: &mut Command,
        mut tick: impl FnMut() -> Result<()>,
    ) -> Result<Output> {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = quiet.stderr(Stdio::piped()).spawn()?;
        while child.try_wait()?.is_none() {
            if tick().and(self.check()).is_err() {
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = child.wait_with_output()?;
        self.check()?;
        Ok(output)
    }
}
