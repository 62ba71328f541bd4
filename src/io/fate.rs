//! What became of operations that nobody waits for, and whether a flush may still succeed.
//!
//! A dropped future leaves its operation with the kernel. Here it is counted until it lands, and
//! the error of a dropped flush is kept: the kernel tells such an error once.

use super::exec::Witness;
use super::space::Backed;
use ploop_formats::{Error, Kind, Result};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::Notify;

/// The part of a store that its operations in flight share.
#[derive(Debug, Default)]
pub(super) struct Fate {
    abandoned: AtomicUsize,
    landed: Notify,
    /// The first failure after which no flush may succeed.
    poison: OnceLock<String>,
    backed: Mutex<Backed>,
}

impl Fate {
    /// Returns once every abandoned operation has landed.
    pub(super) async fn settle(&self) {
        loop {
            // Made before looking: a landing in between is noticed.
            let landed = self.landed.notified();
            if self.abandoned.load(Ordering::Acquire) == 0 {
                return;
            }
            landed.await;
        }
    }

    /// No flush succeeds any more, because of this.
    pub(super) fn poison(&self, why: impl Into<String>) {
        let why = why.into();
        if self.poison.set(why.clone()).is_ok() {
            tracing::error!("no later flush can succeed: {why}");
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(why) => Err(Error::new(
                Kind::Poisoned,
                format!("an earlier failure may have lost data; close and check it ({why})"),
            )),
        }
    }

    /// Which units have their space.
    pub(super) fn backed(&self) -> MutexGuard<'_, Backed> {
        self.backed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn land(&self) {
        // An abandoned punch may have taken space away after the map was told otherwise.
        self.backed().forget();
        self.abandoned.fetch_sub(1, Ordering::AcqRel);
        self.landed.notify_waiters();
    }
}

/// Witness of reads, writes and punches: their errors are nobody's any more.
pub(super) struct Quiet(pub(super) Arc<Fate>);

impl Witness for Quiet {
    fn abandoned(&self) {
        self.0.abandoned.fetch_add(1, Ordering::AcqRel);
    }

    fn landed(&self, _: i32) {
        self.0.land();
    }
}

/// Witness of flushes and durable writes.
pub(super) struct Barrier(pub(super) Arc<Fate>);

impl Witness for Barrier {
    fn abandoned(&self) {
        self.0.abandoned.fetch_add(1, Ordering::AcqRel);
    }

    fn landed(&self, result: i32) {
        if result < 0 {
            let error = io::Error::from_raw_os_error(result.saturating_neg());
            self.0
                .poison(format!("a barrier that nobody waited for failed: {error}"));
        }
        self.0.land();
    }
}
