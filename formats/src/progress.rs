//! Progress: long work tells how far it is, and is asked in return whether to go on.
//!
//! Told between steps, never inside one: work that is ended here is as if it had been cut there,
//! and every format's ordering rules say what that leaves.

use crate::Result;

/// How far long work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, in a word or two. A new phase begins at 0.
    pub phase: &'static str,
    /// Bytes done.
    pub done: u64,
    /// Bytes to do.
    pub total: u64,
}

/// Somebody who wants to know.
pub trait Watch {
    /// Told now and then, in bounded steps. An error ends the work, with that error.
    fn tell(&mut self, progress: Progress) -> Result<()>;

    /// From now on another file, or whatever it is, is worked on.
    fn enter(&mut self, _what: &str) {}
}

/// Nobody wants to know.
impl Watch for () {
    fn tell(&mut self, _: Progress) -> Result<()> {
        Ok(())
    }
}
