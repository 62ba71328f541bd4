//! Update: a metadata change as a value.
//!
//! An ordered list of writes, lengths and barriers, applied by one function. Crash ordering is
//! thereby data: it is written down in one place per change, a reviewer reads it top to bottom,
//! and a test deletes barrier number k, or moves a step across its barrier, and demands that
//! something notices.

use crate::store::{Reach, Store};
use crate::{Error, Result};
use bytes::Bytes;

/// One step of a metadata change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write metadata bytes at a file offset.
    Write {
        /// File offset in bytes.
        at: u64,
        /// The bytes.
        data: Bytes,
    },
    /// Set the file length, in bytes.
    Len(u64),
    /// Everything before is durable before anything after begins.
    Barrier,
}

/// A metadata change: steps in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    steps: Vec<Step>,
}

impl Update {
    /// A change without steps.
    pub const fn new() -> Self {
        Self { steps: Vec::new() }
    }

    /// Adds a write at a file offset.
    #[must_use]
    pub fn write(mut self, at: u64, data: Bytes) -> Self {
        self.steps.push(Step::Write { at, data });
        self
    }

    /// Adds a change of the file length.
    #[must_use]
    pub fn len(mut self, len: u64) -> Self {
        self.steps.push(Step::Len(len));
        self
    }

    /// Adds a barrier.
    #[must_use]
    pub fn barrier(mut self) -> Self {
        self.steps.push(Step::Barrier);
        self
    }

    /// The steps, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Applies the steps in order and stops at the first error.
    ///
    /// On an error the steps before it may or may not be durable, the failed one may be partly
    /// done, and none after it has begun. A failed barrier is final: never `NoSpace`.
    pub async fn apply<S: Store>(self, store: &S) -> Result<()> {
        for step in self.steps {
            match step {
                Step::Write { at, data } => store.write_at(at, data, Reach::Cache).await?,
                Step::Len(len) => store.set_len(len).await?,
                Step::Barrier => store.flush().await.map_err(Error::into_final)?,
            }
        }
        Ok(())
    }
}
