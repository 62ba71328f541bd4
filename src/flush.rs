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
    /// The last pass that came to its end. One that was dropped on the way has no outcome.
    ended: u64,
    /// How that one failed, if it did.
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
        let number = {
            let mut last = self.last();
            if last.ended >= wanted {
                return last.failure.as_ref().map_or(Ok(()), |e| Err(e.duplicate()));
            }
            last.begun += 1;
            last.begun
        };
        let outcome = pass().await;
        let mut last = self.last();
        last.ended = number;
        last.failure = outcome.as_ref().err().map(Error::duplicate);
        drop(last);
        outcome
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
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn a_pass_that_was_dropped_on_the_way_answers_nobody() {
        let (flush, ran) = (Flush::default(), Cell::new(false));
        let mut cx = Context::from_waker(Waker::noop());
        let (go, gate) = tokio::sync::oneshot::channel::<()>();
        let mut first = pin!(flush.join(|| async {
            gate.await.expect("sent");
            Ok(())
        }));
        assert!(first.as_mut().poll(&mut cx).is_pending());
        // Both wait for the second pass; who leads it goes away in the middle.
        let mut leader = Box::pin(flush.join(pending));
        assert!(leader.as_mut().poll(&mut cx).is_pending());
        let mut other = pin!(flush.join(|| {
            ran.set(true);
            ready(Ok(()))
        }));
        assert!(other.as_mut().poll(&mut cx).is_pending());
        go.send(()).expect("waits");
        assert!(matches!(first.as_mut().poll(&mut cx), Poll::Ready(Ok(()))));
        assert!(leader.as_mut().poll(&mut cx).is_pending());
        drop(leader);
        assert!(matches!(other.as_mut().poll(&mut cx), Poll::Ready(Ok(()))));
        assert!(ran.get(), "an answer without a pass");
    }
}
