//! Complaints: failed requests, told to the log without filling it.
//!
//! The first is told at once. A failing disk fails thousands of requests a second: after that there
//! is one line in [`PAUSE`], which says how many it stands for.

use ploop_formats::{Error, Kind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two lines.
const PAUSE: Duration = Duration::from_secs(10);

/// What was complained about so far.
#[derive(Debug, Default)]
pub struct Complaints(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    last: Option<Instant>,
    kept: u64,
}

impl Complaints {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self(Mutex::new(Told {
            last: None,
            kept: 0,
        }))
    }

    /// A request failed. A lack of space is the keeper's to tell, once.
    pub fn about(&self, request: &str, error: &Error) {
        if error.kind() == Kind::NoSpace {
            return;
        }
        match self.due(Instant::now()) {
            None => {}
            Some(0) => tracing::warn!("{request} failed: {error}"),
            Some(n) => tracing::warn!("{request} failed, and {n} others before: {error}"),
        }
    }

    /// How many were kept back, when a line is due.
    fn due(&self, now: Instant) -> Option<u64> {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.last.is_some_and(|t| now.duration_since(t) < PAUSE) {
            told.kept += 1;
            return None;
        }
        told.last = Some(now);
        Some(std::mem::take(&mut told.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_failures_is_a_line_now_and_one_later_with_their_number() {
        let (complaints, start) = (Complaints::new(), Instant::now());
        assert_eq!(complaints.due(start), Some(0));
        assert!((1..=500).all(|ms| complaints.due(start + Duration::from_millis(ms)).is_none()));
        assert_eq!(complaints.due(start + PAUSE), Some(500));
        assert_eq!(complaints.due(start + PAUSE * 3), Some(0));
    }
}
