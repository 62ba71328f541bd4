//! A request to end that any thread may make and any task may wait for.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use tokio::sync::watch;

/// A flag that is set once.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Set before the news is sent: a waiter that misses the news sees the flag.
    set: AtomicBool,
    news: watch::Sender<()>,
}

impl Stop {
    /// Sets it, for good.
    pub(super) fn set(&self) {
        self.0.set.store(true, Ordering::Release);
        self.0.news.send_replace(());
    }

    /// Whether it is set.
    pub(super) fn is_set(&self) -> bool {
        self.0.set.load(Ordering::Acquire)
    }

    /// Somebody who waits for it.
    pub(super) fn watcher(&self) -> Watcher {
        let mut news = self.0.news.subscribe();
        let inner = Arc::clone(&self.0);
        let wait = Box::pin(async move {
            // The sender lives in `inner`, so news is all that can come.
            let _ = news.changed().await;
            drop(inner);
        });
        Watcher {
            stop: self.clone(),
            wait,
            registered: None,
        }
    }
}

/// Waits for the flag, next to other work.
///
/// A connection looks here before every receive, so the look is one load: the future behind it is
/// polled only to register a waker.
pub(super) struct Watcher {
    stop: Stop,
    wait: Pin<Box<dyn Future<Output = ()>>>,
    registered: Option<Waker>,
}

impl Watcher {
    /// The output of `work`, or `None` when the flag is set first.
    pub(super) async fn or<F: Future>(&mut self, work: F) -> Option<F::Output> {
        let mut work = pin!(work);
        poll_fn(|cx| {
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(Some(done));
            }
            self.poll(cx).map(|()| None)
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let registered = self
            .registered
            .as_ref()
            .is_some_and(|old| old.will_wake(cx.waker()));
        if !registered && !self.stop.is_set() {
            self.registered = Some(cx.waker().clone());
            if self.wait.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
        }
        if self.stop.is_set() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_stop_set_from_another_thread_wakes_its_watchers_and_stays_set() {
        let stop = Stop::default();
        let (count, mut watcher) = (Arc::new(Count::default()), stop.watcher());
        let waker = Waker::from(count.clone());
        let mut cx = Context::from_waker(&waker);
        {
            let mut wait = pin!(watcher.or(std::future::pending::<()>()));
            assert!(wait.as_mut().poll(&mut cx).is_pending());
            let there = stop.clone();
            std::thread::spawn(move || there.set()).join().unwrap();
            assert_eq!(count.0.load(Ordering::Relaxed), 1);
            assert!(wait.as_mut().poll(&mut cx).is_ready());
        }
        let mut late = stop.watcher();
        for watcher in [&mut watcher, &mut late] {
            assert!(
                pin!(watcher.or(std::future::pending::<()>()))
                    .poll(&mut cx)
                    .is_ready()
            );
        }
        assert_eq!(
            pin!(watcher.or(std::future::ready(5))).poll(&mut cx),
            Poll::Ready(Some(5))
        );
    }
}
