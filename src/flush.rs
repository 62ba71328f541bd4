//! Group commit: concurrent flushes share one pass.
//!
//! A flush joins only a pass that begins after it was asked for, because a pass covers what was
//! answered before it froze. At most one pass runs at a time.

use ploop_formats::planted::{self, Bug};
use ploop_formats::{Error, Result};
use std::sync::{Mutex, PoisonError};

/// The passes of one disk.
#[derive(Debug, Default)]
pub struct Flush {
    one: tokio::sync::Mutex<()>,
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    /// Passes begun so far.
    begun: u64,
    /// How the last one failed, if it did.
    failure: Option<Error>,
}

impl Flush {
    /// Returns when a pass that began after this call ended, with its outcome; runs `pass` when
    /// nobody else does.
    pub async fn join<F: Future<Output = Result<()>>>(
        &self,
        pass: impl FnOnce() -> F,
    ) -> Result<()> {
        let joins_any = planted::is(Bug::FlushJoinsFrozenPass) && self.one.try_lock().is_err();
        let wanted = self.last().begun + u64::from(!joins_any);
        let _one = self.one.lock().await;
        {
            let mut last = self.last();
            if last.begun >= wanted {
                return last.failure.as_ref().map_or(Ok(()), |e| Err(e.duplicate()));
            }
            last.begun += 1;
        }
        let outcome = pass().await;
        self.last().failure = outcome.as_ref().err().map(Error::duplicate);
        outcome
    }

    fn last(&self) -> std::sync::MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
