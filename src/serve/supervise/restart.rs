//! Restart: how often a worker may die before the disk is given up.
//!
//! A crash is survived, a crash loop is not hidden: ten deaths within a minute end with EIO for
//! everyone above, which is better than requests that never return.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Deaths within [`WINDOW`] after which the keeper gives up.
const LIMIT: usize = 10;
/// What "often" is counted over.
const WINDOW: Duration = Duration::from_secs(60);
/// Longest pause before a restart.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The recent deaths.
#[derive(Debug, Default)]
pub struct Restarts {
    recent: VecDeque<Instant>,
    total: u32,
}

impl Restarts {
    /// Counts a death: how long to wait before the next start, or `None` to give up.
    pub fn died(&mut self, now: Instant) -> Option<Duration> {
        self.recent.retain(|t| now.duration_since(*t) < WINDOW);
        self.recent.push_back(now);
        self.total = self.total.saturating_add(1);
        if self.recent.len() > LIMIT {
            return None;
        }
        // The first restart is immediate: a single crash should be a short pause.
        let doublings = self.recent.len().saturating_sub(2) as u32;
        match self.recent.len() {
            1 => Some(Duration::ZERO),
            _ => Some(
                Duration::from_millis(10)
                    .saturating_mul(1 << doublings)
                    .min(PAUSE_MAX),
            ),
        }
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
    fn a_crash_loop_is_given_up_and_rare_crashes_are_not() {
        let start = Instant::now();
        let mut loops = Restarts::default();
        let pauses: Vec<_> = (0..11).map(|_| loops.died(start)).collect();
        assert_eq!(pauses[0], Some(Duration::ZERO));
        assert!(
            pauses[1..10]
                .windows(2)
                .all(|w| w[0] <= w[1] && w[0].is_some()),
            "{pauses:?}"
        );
        assert_eq!(pauses[10], None);

        let mut rare = Restarts::default();
        let apart = (0..100).map(|n| start + Duration::from_secs(7 * n));
        assert!(apart.into_iter().all(|t| rare.died(t).is_some()));
        assert_eq!(rare.total(), 100);
    }
}
