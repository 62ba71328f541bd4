//! Look: a question to a file system that may be dead.
//!
//! On a network file system even statvfs(2) can hang for ever. A thread asks; who wants to know
//! waits a moment for it, and is told what was seen last when it is late. There is one thread at
//! most, however often is asked.

use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a look is waited for. A local file system takes microseconds, the thread of a busy host
/// longer; who hangs costs this once.
const PATIENCE: Duration = Duration::from_millis(200);

/// Something to look at, and what was seen last.
pub struct Look<T> {
    how: Arc<dyn Fn() -> Option<T> + Send + Sync>,
    seen: Mutex<Seen<T>>,
}

struct Seen<T> {
    last: Option<T>,
    /// A look that did not come back in time.
    late: Option<Receiver<Option<T>>>,
}

impl<T> fmt::Debug for Look<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Look")
    }
}

impl<T: Copy + Send + 'static> Look<T> {
    /// Looks by calling `how`, which may hang. What it holds on to is held as long as it hangs.
    pub fn new(how: impl Fn() -> Option<T> + Send + Sync + 'static) -> Self {
        Self {
            how: Arc::new(how),
            seen: Mutex::new(Seen {
                last: None,
                late: None,
            }),
        }
    }

    /// What there is now, or was when it last could be seen.
    pub fn now(&self) -> Option<T> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (look, patience) = match seen.late.take() {
            Some(late) => (late, Duration::ZERO),
            None => (self.start(), PATIENCE),
        };
        match look.recv_timeout(patience) {
            Ok(found) => seen.last = found,
            Err(RecvTimeoutError::Timeout) => seen.late = Some(look),
            // There was no thread to be had: no news.
            Err(RecvTimeoutError::Disconnected) => {}
        }
        seen.last
    }

    /// Whether a look hangs: there is no news, rather than nothing to see.
    pub fn is_late(&self) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.late.is_some()
    }

    fn start(&self) -> Receiver<Option<T>> {
        let (to, from) = channel();
        let how = Arc::clone(&self.how);
        let _ = std::thread::Builder::new().spawn(move || to.send(how()));
        from
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a_look_that_hangs_is_waited_for_once_and_its_news_come_later() {
        let (news, slow) = channel::<u32>();
        let (slow, looks) = (Mutex::new(slow), Arc::new(AtomicU32::new(0)));
        let counted = Arc::clone(&looks);
        let look = Look::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            slow.lock().expect("lock").recv().ok()
        });
        let seen = |wanted| {
            let start = std::time::Instant::now();
            while look.now() != Some(wanted) {
                assert!(start.elapsed() < Duration::from_secs(20));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        news.send(1).expect("somebody waits");
        seen(1);
        let start = std::time::Instant::now();
        for _ in 0..1000 {
            assert_eq!(look.now(), Some(1), "the second look hangs");
        }
        assert!(look.is_late());
        assert!(start.elapsed() < PATIENCE * 100, "it is waited for once");
        assert!(looks.load(Ordering::Relaxed) <= 2, "and there is no third");
        news.send(2).expect("somebody waits");
        seen(2);
    }

    #[test]
    fn what_is_looked_at_is_seen_as_it_changes() {
        let n = Arc::new(AtomicU32::new(5));
        let at = Arc::clone(&n);
        let look = Look::new(move || Some(at.load(Ordering::Relaxed)));
        for wanted in [5, 6] {
            n.store(wanted, Ordering::Relaxed);
            let mut looks = std::iter::repeat_with(|| look.now()).take(100);
            assert!(looks.any(|seen| seen == Some(wanted)));
        }
    }
}
