//! Halt: how a worker keeps its disk as it is when its keeper says so, beside everything else.
//!
//! In order: nothing that changes the disk is let in any more ([`crate::gate`]); what was let in
//! before is over; all of it is flushed; that is said. Reads, extents and flushes go on. It ends
//! when the keeper says so, and after a while in any case: a keeper that hangs must not hold a
//! guest.

use super::message::{Event, Failure};
use super::worker::say;
use crate::device::Device;
use crate::gate::Gate;
use crate::io::exec;
use futures_util::future::{Either, select};
use ploop_formats::Result;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;

/// What a keeper says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halt {
    /// Keep the disk as it is, for so long at most. What is answered has this number.
    Begin { number: u64, most: Duration },
    /// Go on.
    End,
}

/// Who carries that out.
pub(super) struct Porter<D> {
    pub gate: Gate,
    /// What is behind the gate.
    pub device: Arc<D>,
    pub control: Arc<OwnedFd>,
}

impl<D: Device> Porter<D> {
    /// Does what the keeper says until that is gone.
    pub async fn run(self, mut orders: UnboundedReceiver<Halt>) {
        while let Some(order) = orders.recv().await {
            // An end comes late where the time was over.
            if let Halt::Begin { number, most } = order
                && let Err(e) = self.halt(number, most, &mut orders).await
            {
                // A keeper that is gone is seen elsewhere.
                tracing::debug!("{e}");
            }
        }
    }

    async fn halt(
        &self,
        number: u64,
        most: Duration,
        orders: &mut UnboundedReceiver<Halt>,
    ) -> Result<()> {
        let mut over = pin!(exec::timeout(most, until_end(orders)));
        let closed = match select(pin!(self.gate.close()), over.as_mut()).await {
            Either::Left((closed, _)) => closed,
            Either::Right(_) => return Ok(()),
        };
        let mut flush = pin!(self.device.flush());
        let flushed = match select(flush.as_mut(), over.as_mut()).await {
            Either::Left((flushed, _)) => flushed,
            Either::Right(_) => {
                drop(closed);
                // One that has begun is not given up, and nobody waits for what comes of it.
                let _ = flush.await;
                return Ok(());
            }
        };
        match flushed {
            Ok(()) => {
                say(&self.control, &Event::Halted { number }).await?;
                over.await;
                Ok(())
            }
            Err(e) => {
                let why = Failure::from(&e);
                say(&self.control, &Event::NotHalted { number, why }).await
            }
        }
    }
}

/// Returns when the keeper says so, or is gone.
async fn until_end(orders: &mut UnboundedReceiver<Halt>) {
    while orders.recv().await.is_some_and(|order| order != Halt::End) {}
}
