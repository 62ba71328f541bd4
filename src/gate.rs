//! Gate: makes what changes a device wait, and lets everything else through.
//!
//! It stands before everything that a change may hold: one that waits here holds no marks of a
//! tracker, no clusters and no layers, so that seals, flushes and reads go on. A flush must never
//! wait here: a held one stops every reader of a loop device.

use crate::device::{Device, GuestExtent, Zero};
use bytes::{Bytes, BytesMut};
use ploop_formats::Result;
use std::sync::Arc;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, RwLockReadGuard};

/// A gate; clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<RwLock<()>>);

/// A gate that is closed, with nothing behind it under way. Dropping it lets those in who wait, in
/// the order of their coming.
#[derive(Debug)]
#[must_use = "a gate that is not kept closed opens at once"]
pub struct Closed(#[allow(dead_code, reason = "held")] OwnedRwLockWriteGuard<()>);

impl Gate {
    /// Lets nothing in from now on, and returns once what was let in before is over. Given up
    /// before that, it is open again.
    pub async fn close(&self) -> Closed {
        // The lock is fair: who comes later waits behind this.
        Closed(Arc::clone(&self.0).write_owned().await)
    }

    async fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.0.read().await
    }
}

/// A device behind a gate.
#[derive(Debug)]
pub struct Gated<D> {
    device: Arc<D>,
    gate: Gate,
}

impl<D> Gated<D> {
    /// `device`, whose changes wait while `gate` is closed.
    pub const fn new(device: Arc<D>, gate: Gate) -> Self {
        Self { device, gate }
    }
}

impl<D: Device> Device for Gated<D> {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn preferred_block(&self) -> u64 {
        self.device.preferred_block()
    }

    async fn read(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.device.read(at, buf).await
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> Result<()> {
        let _entered = self.gate.enter().await;
        self.device.write(at, data, fua).await
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> Result<()> {
        let _entered = self.gate.enter().await;
        self.device.zero(at, len, how, fua).await
    }

    async fn discard(&self, at: u64, len: u64) -> Result<()> {
        let _entered = self.gate.enter().await;
        self.device.discard(at, len).await
    }

    async fn flush(&self) -> Result<()> {
        self.device.flush().await
    }

    async fn extents(&self, at: u64, len: u64, max: usize) -> Result<Vec<GuestExtent>> {
        self.device.extents(at, len, max).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::{Pin, pin};
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::task::{Context, Poll, Waker};
    use tokio::sync::Semaphore;

    fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// Writes down where changes begin; each ends when it is let.
    struct Slow {
        begun: Mutex<Vec<u64>>,
        ends: Semaphore,
    }

    impl Slow {
        async fn change(&self, at: u64) -> Result<()> {
            self.begun().push(at);
            self.ends.acquire().await.expect("never closed").forget();
            Ok(())
        }

        fn begun(&self) -> MutexGuard<'_, Vec<u64>> {
            self.begun.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Device for Slow {
        fn size(&self) -> u64 {
            1 << 20
        }

        fn read_only(&self) -> bool {
            false
        }

        fn preferred_block(&self) -> u64 {
            4096
        }

        async fn read(&self, _: u64, buf: BytesMut) -> Result<BytesMut> {
            Ok(buf)
        }

        async fn write(&self, at: u64, _: Bytes, _: bool) -> Result<()> {
            self.change(at).await
        }

        async fn zero(&self, at: u64, _: u64, _: Zero, _: bool) -> Result<()> {
            self.change(at).await
        }

        async fn discard(&self, at: u64, _: u64) -> Result<()> {
            self.change(at).await
        }

        async fn flush(&self) -> Result<()> {
            Ok(())
        }

        async fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<GuestExtent>> {
            Ok(Vec::new())
        }
    }

    fn slow() -> (Arc<Slow>, Gate, Gated<Slow>) {
        let slow = Arc::new(Slow {
            begun: Mutex::default(),
            ends: Semaphore::new(0),
        });
        let gate = Gate::default();
        let gated = Gated::new(Arc::clone(&slow), gate.clone());
        (slow, gate, gated)
    }

    #[test]
    fn a_gate_is_closed_once_what_was_let_in_is_over_and_what_waits_goes_on_in_order() {
        let (slow, gate, device) = slow();
        let mut first = pin!(device.write(1, Bytes::new(), false));
        assert!(poll(first.as_mut()).is_pending());
        let mut close = pin!(gate.close());
        assert!(poll(close.as_mut()).is_pending(), "a write is under way");
        let mut later = pin!(device.write(2, Bytes::new(), true));
        let mut zero = pin!(device.zero(3, 1, Zero::MayFree, false));
        let mut discard = pin!(device.discard(4, 1));
        assert!(poll(later.as_mut()).is_pending());
        assert!(poll(zero.as_mut()).is_pending());
        assert!(poll(discard.as_mut()).is_pending());
        slow.ends.add_permits(1);
        assert!(poll(first.as_mut()).is_ready());
        let Poll::Ready(closed) = poll(close.as_mut()) else {
            panic!("nothing is under way");
        };
        assert!(poll(discard.as_mut()).is_pending());
        assert_eq!(*slow.begun(), [1]);
        drop(closed);
        for change in [
            &mut later as &mut (dyn Future<Output = _> + Unpin),
            &mut zero,
            &mut discard,
        ] {
            assert!(poll(Pin::new(change)).is_pending());
        }
        assert_eq!(*slow.begun(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_changes_nothing_passes_a_closed_gate() {
        let (_, gate, device) = slow();
        let Poll::Ready(_closed) = poll(pin!(gate.close())) else {
            panic!("nothing is under way");
        };
        assert!(poll(pin!(device.read(0, BytesMut::new()))).is_ready());
        assert!(poll(pin!(device.extents(0, 1, 1))).is_ready());
        assert!(poll(pin!(device.flush())).is_ready());
    }

    #[test]
    fn a_gate_that_is_given_up_before_it_is_closed_is_open() {
        let (slow, gate, device) = slow();
        let mut first = pin!(device.write(1, Bytes::new(), false));
        assert!(poll(first.as_mut()).is_pending());
        let mut later = Box::pin(device.write(2, Bytes::new(), false));
        {
            let mut close = pin!(gate.close());
            assert!(poll(close.as_mut()).is_pending());
            assert!(poll(later.as_mut()).is_pending());
        }
        assert!(poll(later.as_mut()).is_pending());
        assert_eq!(*slow.begun(), [1, 2]);
    }
}
