//! Hold: a disk to oneself, to change its stack of layers while its guest runs.
//!
//! Ordering. Every request that was admitted ends; then the flush that runs, if one does; then the
//! disk is held. [`Hold::seal`] makes all that was answered durable and closes the top: nothing
//! writes to it any more. [`Hold::switch`] puts another stack in its place and lets everybody go, who
//! then sees that one. Whether the change is durable is the caller's business, between the two.
//!
//! Requests that wait for a hold are answered after it: it is short, or its guest feels it.

use crate::disk::Disk;
use crate::flight::Admitted;
use crate::stack::Stack;
use ploop_formats::layer::Layer;
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};
use tokio::sync::MutexGuard;

/// A disk on which nothing runs. Dropping it lets those go who wait; without a seal before, and
/// after one that found no space, the disk goes on as it was. After any other seal it takes no
/// write any more unless another stack was switched to.
#[derive(Debug)]
#[must_use = "a hold that is not kept ends at once"]
pub struct Hold<'a, S: Store> {
    disk: &'a Disk<S>,
    _flushes: Option<MutexGuard<'a, ()>>,
    _requests: Admitted,
    /// It is the end of the disk.
    last: bool,
}

impl<'a, S: Store> Hold<'a, S> {
    pub(crate) const fn new(
        disk: &'a Disk<S>,
        flushes: Option<MutexGuard<'a, ()>>,
        requests: Admitted,
    ) -> Self {
        Self {
            disk,
            _flushes: flushes,
            _requests: requests,
            last: false,
        }
    }

    /// Seals the top for good: that nothing is written any more is no failure.
    pub(crate) async fn end(mut self) -> Result<()> {
        if !self.disk.is_read_only() {
            self.disk.stack().seal().await?;
        }
        self.last = true;
        Ok(())
    }

    /// Makes everything answered durable, and closes the top: cut to its end, marked clean. A
    /// read-only disk has nothing to seal.
    ///
    /// After success the top is a lower layer of the next stack, opened anew for reading. To undo
    /// that, it is opened anew for writing and switched to. So it is after an error of kind
    /// `NoSpace`, unless [`Hold::is_sealed`] says that the disk goes on with the top as it is. After
    /// any other error the disk has failed.
    pub async fn seal(&self) -> Result<()> {
        if planted::is(Bug::SwitchWithoutSeal) || self.disk.is_read_only() {
            return Ok(());
        }
        let stack = self.disk.stack();
        let sealed = stack.seal().await;
        // A half-written end must not be taken for one that can be tried again.
        let is_final = |e: &&Error| e.kind() != Kind::NoSpace;
        if sealed.as_ref().err().filter(is_final).is_some() {
            stack.poison();
        }
        sealed
    }

    /// Whether the end of the top has begun, whatever came of it.
    pub fn is_sealed(&self) -> bool {
        self.disk.stack().is_sealed()
    }

    /// Goes on with another stack. Refuses one that a guest could tell from this one, by its
    /// clusters or by a size that is smaller, and one that would lose answers: its top is another
    /// one although this one is not sealed, or has failed, or is this one although that is sealed.
    pub fn switch(self, stack: Stack<S>) -> Result<()> {
        let old = self.disk.stack();
        let (was, is) = (old.top().geometry(), stack.top().geometry());
        if is.cluster != was.cluster {
            return Err(Error::invalid(format!(
                "the disk has clusters of {} bytes, the new stack of {}",
                was.cluster.bytes(),
                is.cluster.bytes()
            )));
        }
        if is.size < was.size {
            return Err(Error::invalid(format!(
                "the disk has {} bytes, the new stack {}",
                was.size, is.size
            )));
        }
        let ended = old.is_sealed() && !old.top().is_poisoned();
        let same = old.shares_top(&stack);
        let fits = self.disk.is_read_only() || if same { !old.is_sealed() } else { ended };
        if !fits && !planted::is(Bug::SwitchWithoutSeal) {
            return Err(Error::invalid(match same {
                true => "the top of the new stack is sealed",
                false => "the top of the old stack is not sealed",
            }));
        }
        self.disk.replace(stack);
        Ok(())
    }
}

impl<S: Store> Drop for Hold<'_, S> {
    fn drop(&mut self) {
        if !self.last && self.disk.stack().is_poisoned() {
            self.disk.failed();
        }
    }
}
