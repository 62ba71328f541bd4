//! Hold: a disk to oneself, to change its stack of layers while its guest runs.
//!
//! Ordering. Every request that was admitted ends; then the flush that runs, if one does; then the
//! disk is held. [`Hold::seal`] makes all that was answered durable and closes the top: nothing
//! writes to it any more. [`Hold::switch`] puts another stack in its place and lets everybody go, who
//! then sees that one. Whether the change is durable is the caller's business, between the two.
//!
//! To give the disk another size, [`Hold::resize`] seals the top, opens it anew, which nobody else
//! can see, has it grown or shrunk ([`ploop_formats::ploop::Ploop::grow`],
//! [`ploop_formats::ploop::Ploop::shrink`], [`ploop_formats::qcow2::resize`]), and puts that in its
//! place. So what is kept in memory of it, the index, the free clusters, and which of them were
//! never written, is what its file says; its ledger was emptied by the seal. Who dies on the way
//! leaves an image that is the old one or the new one. A request that waited meanwhile, and lies
//! behind a new end, is refused.
//!
//! [`Hold::cut`] does the same and leaves the size: the seal has cut the file to its end.
//!
//! Requests that wait for a hold are answered after it: it is short, or its guest feels it.

use crate::disk::Disk;
use crate::flight::Admitted;
use crate::stack::{AnyLayer, NewSize, Stack};
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
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
        // What is over, or has failed, is not begun again.
        stack.may_write()?;
        let sealed = stack.seal().await;
        // A half-written end must not be taken for one that can be tried again.
        let is_final = |e: &&Error| e.kind() != Kind::NoSpace;
        if sealed.as_ref().err().filter(is_final).is_some() {
            stack.poison();
        }
        sealed
    }

    /// Gives the disk another size, rounded up to a cluster, and lets everybody go; nothing is done
    /// when it has that. `ledger` is that of the top.
    ///
    /// `Invalid` or `Unsupported`, and nothing was done, when that is the other way, or not possible
    /// ([`Stack::resized`]). After `NoSpace` the disk goes on as it was. After any other error it has
    /// failed, and whoever waits is let go only if what the file holds can be read.
    pub async fn resize(self, to: NewSize, ledger: Ledger) -> Result<()>
    where
        S: Clone,
    {
        let old = self.disk.stack();
        if old.resized(to)? == old.top().geometry().size {
            return Ok(());
        }
        self.renew(ledger, async |top| top.resize(to).await).await
    }

    /// Closes the top, which cuts its file to its end, opens it anew and lets everybody go. `ledger`
    /// is that of the top. Errors are as those of [`Hold::resize`].
    pub async fn cut(self, ledger: Ledger) -> Result<()>
    where
        S: Clone,
    {
        self.renew(ledger, async |_| Ok(())).await
    }

    /// Closes the top, opens it anew, has it changed, and goes on with it.
    async fn renew(
        self,
        ledger: Ledger,
        change: impl AsyncFnOnce(&mut AnyLayer<S>) -> Result<()>,
    ) -> Result<()>
    where
        S: Clone,
    {
        if self.disk.is_read_only() {
            return Err(Error::new(Kind::ReadOnly, "the disk is open read-only"));
        }
        let sealed = self.seal().await;
        let failed = |e: &Error| e.kind() != Kind::NoSpace;
        if !self.is_sealed() || sealed.as_ref().is_err_and(failed) {
            return sealed;
        }
        match self.renew_sealed(sealed, ledger, change).await {
            Ok(outcome) => outcome,
            Err(e) => {
                // Its clusters may not be where the old stack looks for them, and who waits is not let go:
                // not even for lack of space does the disk go on here.
                std::mem::forget(self);
                Err(e.into_final())
            }
        }
    }

    /// Opens a sealed top anew and has it changed. The inner outcome is that of the change, after
    /// which the disk has a stack to go on with.
    async fn renew_sealed(
        &self,
        sealed: Result<()>,
        ledger: Ledger,
        change: impl AsyncFnOnce(&mut AnyLayer<S>) -> Result<()>,
    ) -> Result<Result<()>>
    where
        S: Clone,
    {
        let old = self.disk.stack();
        let open = || old.top().open_again(ledger.clone());
        let changed = match sealed {
            Ok(()) => {
                let mut top = open().await?;
                change(&mut top).await.map(|()| top)
            }
            Err(e) => Err(e),
        };
        let (top, outcome) = match changed {
            Ok(top) => (top, Ok(())),
            Err(e) => (open().await?, Err(e)),
        };
        self.disk.replace(old.with_top(top)?);
        Ok(outcome)
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
