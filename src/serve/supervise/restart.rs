//! Restart: how often a worker may die before the disk is given up.
//!
//! A crash is survived, a crash loop is not hidden: ten workers in a row that die over what they
//! were resent, or two hundred in ten minutes, end with EIO for everyone above, which is better
//! than requests that never return.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Deaths in a row after which the keeper gives up.
const LIMIT: u32 = 10;
/// A worker that served so long has outlived whatever killed the one before: what was unanswered
/// is resent at once, and a request that kills would have killed again.
const PROOF: Duration = Duration::from_millis(100);
/// Deaths within [`WINDOW`] after which the keeper gives up, however long each worker served: a
/// request may also kill slowly.
const LIMIT_IN_WINDOW: usize = 200;
/// What "often" is counted over.
const WINDOW: Duration = Duration::from_secs(600);
/// Longest pause before a restart.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The deaths so far.
#[derive(Debug, Default)]
pub struct Restarts {
    in_a_row: u32,
    recent: VecDeque<Instant>,
    total: u32,
}

impl Restarts {
    /// Counts the death of a worker that had served for so long: how long to wait before the next
    /// start, or `None` to give up.
    pub fn died(&mut self, now: Instant, served: Duration) -> Option<Duration> {
        self.recent.retain(|t| now.duration_since(*t) < WINDOW);
        self.recent.push_back(now);
        if served >= PROOF {
            self.in_a_row = 0;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.total = self.total.saturating_add(1);
        if self.recent.len() > LIMIT_IN_WINDOW {
            return None;
        }
        match self.in_a_row {
            // A single crash should be a short pause.
            1 => Some(Duration::ZERO),
            n if n > LIMIT => None,
            n => Some(Duration::from_millis(5 << n).min(PAUSE_MAX)),
        }
    }

    /// Forgets what was: a person has looked at it.
    pub fn forgive(&mut self) {
        self.in_a_row = 0;
        self.recent.clear();
    }

    /// Restarts so far.
    pub fn total(&self) -> u32 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_loop_is_given_up_with_growing_pauses() {
        let mut restarts = Restarts::default();
        let pauses: Vec<_> = (0..=LIMIT)
            .map(|_| restarts.died(Instant::now(), Duration::from_millis(3)))
            .collect();
        assert_eq!(pauses[0], Some(Duration::ZERO));
        assert!(
            pauses[..10].is_sorted() && pauses[9] == Some(PAUSE_MAX),
            "{pauses:?}"
        );
        assert_eq!(pauses[10], None);
    }

    #[test]
    fn workers_that_served_in_between_may_die_again_but_not_for_ever() {
        let mut restarts = Restarts::default();
        let start = Instant::now();
        let deaths = |every: Duration| {
            let mut restarts = Restarts::default();
            (0..1000)
                .take_while(|n| restarts.died(start + every * *n, PROOF).is_some())
                .count()
        };
        assert_eq!(deaths(Duration::from_secs(1)), LIMIT_IN_WINDOW);
        assert_eq!(deaths(Duration::from_secs(4)), 1000);
        assert_eq!(restarts.died(start, PROOF), Some(Duration::ZERO));
        assert_eq!(restarts.total(), 1);
    }
}
