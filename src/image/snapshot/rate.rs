//! Rate: how many bytes a second a copy may take, so that it leaves the host's disks to others.

use super::copy::Pace;
use crate::io::exec;
use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::time::{Duration, Instant};

/// How long the end of the wish to copy may go unnoticed.
const BLINK: Duration = Duration::from_millis(50);

/// A limit, or none.
pub struct Rate<F> {
    limit: Option<NonZeroU64>,
    goes_on: F,
    /// When what was let through is paid for.
    due: Cell<Instant>,
}

impl<F> fmt::Debug for Rate<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rate({:?})", self.limit)
    }
}

impl<F: Fn() -> bool> Rate<F> {
    /// Starts the clock. `limit` is in bytes a second; no wait goes on when `goes_on` says no.
    pub fn new(limit: Option<NonZeroU64>, goes_on: F) -> Self {
        Self {
            limit,
            goes_on,
            due: Cell::new(Instant::now()),
        }
    }

    async fn pay(&self, bytes: u64) {
        let Some(limit) = self.limit else {
            return;
        };
        let cost = Duration::from_secs_f64(bytes as f64 / limit.get() as f64);
        // The time that copying took counts; idle time before it is not saved up.
        let due = self.due.get() + cost;
        while (self.goes_on)() && Instant::now() < due {
            let left = due.saturating_duration_since(Instant::now());
            exec::sleep(left.min(BLINK)).await;
        }
        self.due.set(due.max(Instant::now()));
    }
}

impl<F: Fn() -> bool> Pace for Rate<F> {
    fn wait(&self, bytes: u64) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(self.pay(bytes))
    }
}
