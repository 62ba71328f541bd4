//! Rate: how many bytes a second long work may copy, so that it leaves the host's disks to others.

use crate::cancel::Cancel;
use ploop::image::snapshot::copy::Pace;
use ploop::io::exec;
use std::cell::Cell;
use std::future::Future;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::time::{Duration, Instant};

/// How long a signal may go unnoticed.
const BLINK: Duration = Duration::from_millis(50);

/// A limit, or none.
#[derive(Debug)]
pub struct Rate<'c> {
    limit: Option<NonZeroU64>,
    cancel: &'c Cancel,
    /// When what was let through is paid for.
    due: Cell<Instant>,
}

impl<'c> Rate<'c> {
    /// Starts the clock. `limit` is in bytes a second.
    pub fn new(limit: Option<NonZeroU64>, cancel: &'c Cancel) -> Self {
        Self {
            limit,
            cancel,
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
        while self.cancel.check().is_ok() && Instant::now() < due {
            let left = due.saturating_duration_since(Instant::now());
            exec::sleep(left.min(BLINK)).await;
        }
        self.due.set(due.max(Instant::now()));
    }
}

impl Pace for Rate<'_> {
    fn wait(&self, bytes: u64) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(self.pay(bytes))
    }
}

/// `--rate`: a size, not 0.
pub fn parse(text: &str) -> Result<NonZeroU64, String> {
    let rate = NonZeroU64::new(crate::size::parse(text)?);
    rate.ok_or_else(|| "nothing would ever be copied at 0".into())
}
