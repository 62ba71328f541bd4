//! Group commit: concurrent flushes share one pass.
//!
//! A flush joins only a pass that begins after it was asked for, because a pass covers what was
//! answered before it froze. At most one pass runs at a time, and none while it is held off.

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
    /// The last one that ran to its end, and how it failed, if it did.
    ended: u64,
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
            if last.ended >= wanted {
                return last.failure.as_ref().map_or(Ok(()), |e| Err(e.duplicate()));
            }
            last.begun += 1;
        }
        let outcome = pass().await;
        let mut last = self.last();
        last.ended = last.begun;
        last.failure = outcome.as_ref().err().map(Error::duplicate);
        outcome
    }

    /// Waits until no pass runs, and keeps those that come later from running for as long as the
    /// guard is held. Never while requests are admitted: they may need a pass to end.
    pub async fn hold_off(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.one.lock().await
    }

    fn last(&self) -> std::sync::MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::{pending, ready};
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    fn poll<T>(future: &mut Pin<Box<impl Future<Output = T>>>) -> Poll<T> {
        let mut cx = Context::from_waker(Waker::noop());
        future.as_mut().poll(&mut cx)
    }

    #[test]
    fn a_pass_that_its_thread_did_not_survive_answers_nobody() {
        let (flush, ran) = (Flush::default(), Cell::new(false));
        let mut first = Box::pin(flush.join(pending));
        assert!(poll(&mut first).is_pending());
        let mut second = Box::pin(flush.join(pending));
        assert!(poll(&mut second).is_pending());
        let mut third = Box::pin(flush.join(|| {
            ran.set(true);
            ready(Ok(()))
        }));
        assert!(poll(&mut third).is_pending());
        drop(first);
        assert!(poll(&mut second).is_pending());
        drop(second);
        assert!(poll(&mut third).is_ready());
        assert!(ran.get(), "answered by a pass that never ended");
    }
}
