//! Compaction: how a worker moves clusters of its disk beside the guest, and what its keeper has to do
//! with it.
//!
//! The keeper orders it, passes on how far it is, and gives it up when nobody waits any more or the
//! disk is to be detached; nothing else is changed of the disk meanwhile. The worker does it: it
//! moves ([`crate::compact`]), and in the end holds the guest for the time of a close and an open, which
//! cuts the file. A worker that dies on the way leaves a disk like any other, and whoever compacts it
//! again goes on.

use super::control::{Asker, Far};
use super::message::{Event, Failure, Order};
use super::turnover::Ordered;
use super::worker::say;
use crate::disk::Disk;
use crate::image::snapshot::copy::Work;
use crate::image::snapshot::rate::Rate;
use crate::io::exec;
use crate::io::file::FileStore;
use futures_util::future::{Either, select};
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};
use serde_json::{Value, json};
use std::cell::Cell;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Time between two words about how far it is, said also when there is no news: who does not hear
/// them has gone.
const PAUSE: Duration = Duration::from_millis(250);

/// One that a worker has its order for, to its keeper.
#[derive(Debug)]
pub(super) struct Compaction {
    /// Who asked for it.
    pub asker: Asker,
    /// It was given up.
    pub ending: bool,
}

/// What a worker said of it.
pub(super) enum Turn {
    /// How far it is.
    Progress(Far),
    /// What came of it.
    Over(Result<Value>),
}

impl Compaction {
    /// What an event of the worker means; `None` when it is about something else.
    pub fn heard(event: Event) -> Option<Turn> {
        Some(match event {
            Event::Compacting { done, total } => Turn::Progress(Far { done, total }),
            Event::Compacted {
                moved,
                length,
                stall_us,
            } => Turn::Over(Ok(json!({
                "moved": moved,
                "length": length,
                "stall_us": stall_us,
            }))),
            Event::NotCompacted(why) => Turn::Over(Err(why.into())),
            _ => return None,
        })
    }

    /// The worker is gone.
    pub fn lost() -> Error {
        Error::new(
            Kind::Io,
            "the worker died while the disk was compacted; nothing is lost, and the same command goes on \
             with it",
        )
    }
}

/// What the mover and who talks for it share.
#[derive(Debug, Default)]
struct State {
    far: Cell<(u64, u64)>,
    ended: Cell<bool>,
}

impl Watch for &State {
    fn tell(&mut self, progress: Progress) -> Result<()> {
        self.far.set((progress.done, progress.total));
        match self.ended.get() {
            true => Err(Error::new(
                Kind::Cancelled,
                "given up: nobody waits for it, or the disk is being detached",
            )),
            false => Ok(()),
        }
    }
}

/// Carries the order out. What fails in the end, once the guest is held, is final unless it lacks
/// space: then this process ends, and the next one looks at what is in the file.
pub(super) async fn carry_out(
    disk: &Disk<FileStore>,
    ledger: Ledger,
    control: &Arc<OwnedFd>,
    rate: Option<u64>,
    orders: &mut mpsc::UnboundedReceiver<Ordered>,
) -> Result<()> {
    let moved = match pack(disk, control, rate, orders).await {
        Ok(moved) => moved,
        Err(e) => return say(control, &Event::NotCompacted(Failure::from(&e))).await,
    };
    let start = Instant::now();
    let hold = disk.hold().await;
    // It ended meanwhile, with its last client, or has failed, which others have seen.
    if let Err(e) = disk.stack().may_write() {
        return say(control, &Event::NotCompacted(Failure::from(&e))).await;
    }
    match hold.cut(ledger).await {
        Ok(()) => {
            let event = Event::Compacted {
                moved,
                length: disk.stack().top().store().info().len,
                stall_us: start.elapsed().as_micros() as u64,
            };
            say(control, &event).await
        }
        Err(e) => {
            say(control, &Event::NotCompacted(Failure::from(&e))).await?;
            match e.kind() {
                Kind::NoSpace => Ok(()),
                _ => Err(e),
            }
        }
    }
}

/// Moves clusters until that is done or given up, and tells the keeper how far it is.
async fn pack(
    disk: &Disk<FileStore>,
    control: &Arc<OwnedFd>,
    rate: Option<u64>,
    orders: &mut mpsc::UnboundedReceiver<Ordered>,
) -> Result<u64> {
    let state = State::default();
    let rate = Rate::new(rate.and_then(NonZeroU64::new), || !state.ended.get());
    let mut watch = &state;
    let mut work = Work::new(&mut watch, &rate);
    let packed = pin!(disk.pack(&mut work));
    let talk = pin!(talk(&state, control, orders));
    match select(packed, talk).await {
        Either::Left((packed, _)) => packed,
        Either::Right(((), packed)) => packed.await,
    }
}

/// Says how far it is, and hears when it is given up; then it is over.
async fn talk(
    state: &State,
    control: &Arc<OwnedFd>,
    orders: &mut mpsc::UnboundedReceiver<Ordered>,
) {
    loop {
        let heard = pin!(orders.recv());
        let pause = pin!(exec::sleep(PAUSE));
        match select(heard, pause).await {
            Either::Left((Some((Order::EndCompact, _)) | None, _)) => break,
            Either::Left(_) => {}
            Either::Right(_) => {
                let (done, total) = state.far.get();
                // A keeper that is gone is seen elsewhere.
                let _ = super::packet::send(control, &Event::Compacting { done, total }, &[]);
            }
        }
    }
    state.ended.set(true);
}
