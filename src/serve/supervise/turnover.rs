//! Turnover: a worker's part in a snapshot of the disk that it serves.
//!
//! In order:
//!
//! 1. Order `Freeze` brings the new top, its ledger, and the old top to be read. The new top is
//!    opened: it is empty, and says that it is in use. What is pending is flushed while requests
//!    run, so that little is left for later.
//! 2. The disk is held, and the old top sealed: all that was answered is durable in it, its ledger
//!    is empty, it is closed. "Frozen" is said. From here on the guest waits.
//! 3. The keeper has the descriptor renamed, or not, and orders to go on: with the new top, or with
//!    the old one, opened anew.
//!
//! A worker that dies on the way leaves nothing of its own: its successor reads the descriptor, and
//! is given the ledger of the top that this names.

use super::message::{Event, Failure, Order};
use super::worker::say;
use crate::device::Device;
use crate::disk::Disk;
use crate::hold::Hold;
use crate::io::file::{Cache, FileStore};
use crate::io::lock;
use crate::io::memfd::SharedWords;
use crate::io::room::KeepFree;
use crate::stack::{AnyLayer, Stack};
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Ploop;
use ploop_formats::raw::Raw;
use ploop_formats::{Error, Kind, Result};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// How long the new top may take to be ours: nobody else ever wrote to it.
const FENCE: Duration = Duration::from_secs(5);

/// An order and the descriptors that it brought.
pub(super) type Ordered = (Order, Vec<OwnedFd>);

/// Changes the stack of a disk when the keeper says so.
pub(super) struct Turnover {
    /// The disk.
    pub disk: Arc<Disk<FileStore>>,
    /// The way to the keeper.
    pub control: Arc<OwnedFd>,
    /// The store of the top, for those who watch it.
    pub top: watch::Sender<FileStore>,
    /// The ledger of the top.
    pub ledger: Ledger,
    /// Cache mode of the top.
    pub cache: Cache,
    /// Space that the disk leaves to the host.
    pub keep_free: KeepFree,
}

/// A stack that is ready but for the old top, which is still written to.
struct Next {
    top: AnyLayer<FileStore>,
    store: FileStore,
    ledger: Ledger,
    below: OwnedFd,
    name: String,
}

impl Turnover {
    /// Carries out orders until there are no more.
    pub async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Ordered>) -> Result<()> {
        while let Some((order, fds)) = orders.recv().await {
            match order {
                Order::Freeze { top, below } => {
                    self.freeze(&top, below, fds, &mut orders).await?;
                }
                Order::Reload { lower, merged } => self.reload(&lower, &merged, fds).await?,
                Order::Stop | Order::Go { .. } => {}
            }
        }
        Ok(())
    }

    async fn freeze(
        &mut self,
        top: &str,
        below: String,
        fds: Vec<OwnedFd>,
        orders: &mut mpsc::UnboundedReceiver<Ordered>,
    ) -> Result<()> {
        let prepared = match self.prepare(top, below, fds).await {
            Ok(next) => self.disk.flush().await.map(|()| next),
            Err(e) => Err(e),
        };
        let next = match prepared {
            Ok(next) => next,
            Err(e) => return self.not_frozen(&e).await,
        };
        let disk = Arc::clone(&self.disk);
        let start = Instant::now();
        let hold = disk.hold().await;
        if let Err(e) = hold.seal().await {
            let resumed = self.resume(hold).await;
            self.not_frozen(&e).await?;
            return resumed;
        }
        say(&self.control, &Event::Frozen).await?;
        match orders.recv().await {
            Some((Order::Go { new: true }, _)) => self.go(hold, next).await?,
            _ => self.resume(hold).await?,
        }
        let stall_us = start.elapsed().as_micros() as u64;
        say(&self.control, &Event::Went { stall_us }).await
    }

    async fn not_frozen(&self, why: &Error) -> Result<()> {
        say(&self.control, &Event::NotFrozen(Failure::from(why))).await
    }

    /// Opens the new top, before anybody waits.
    async fn prepare(&self, top: &str, below: String, fds: Vec<OwnedFd>) -> Result<Next> {
        let mut fds = fds.into_iter();
        let (Some(file), Some(words), Some(old)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(Error::invalid("an order that lacks its descriptors"));
        };
        lock::fence(&file, Instant::now() + FENCE)?;
        let store = FileStore::new(file, Path::new(top), self.cache)?;
        store.keep_free(self.keep_free);
        let ledger = Ledger::new(Arc::new(SharedWords::from_fd(words)?));
        let layer = Ploop::open_write(store.clone(), ledger.clone()).await;
        Ok(Next {
            top: AnyLayer::Ploop(layer.map_err(|e| e.at(top))?),
            store,
            ledger,
            below: old,
            name: below,
        })
    }

    /// Goes on with fewer lower layers. What a guest reads is the same through either stack, so
    /// that who dies before this has lost nothing.
    async fn reload(&self, lower: &[String], merged: &str, fds: Vec<OwnedFd>) -> Result<()> {
        let stack = self.disk.stack();
        let mut fds = fds.into_iter();
        let mut layers = Vec::with_capacity(lower.len());
        for name in lower {
            let path = Path::new(name);
            let known = stack.layers().iter().find(|l| l.store().path() == path);
            let known = known.ok_or_else(|| Error::invalid(format!("{name}: not a layer")))?;
            layers.push(match (name == merged, fds.len()) {
                (true, 1..) => {
                    let fd = fds.next().ok_or_else(|| Error::invalid("no descriptor"))?;
                    let store = FileStore::new(fd, path, Cache::Writeback)?;
                    Arc::new(open_lower(store, known).await?)
                }
                _ => Arc::clone(known),
            });
        }
        let start = Instant::now();
        let hold = self.disk.hold().await;
        layers.extend(stack.layers().last().cloned());
        hold.switch(Stack::new(layers)?)?;
        let stall_us = start.elapsed().as_micros() as u64;
        say(&self.control, &Event::Went { stall_us }).await
    }

    /// Goes on with the new top, above the old one.
    async fn go(&mut self, hold: Hold<'_, FileStore>, next: Next) -> Result<()> {
        let stack = self.disk.stack();
        let old = FileStore::new(next.below, Path::new(&next.name), Cache::Writeback)?;
        let above = [open_lower(old, stack.top()).await?, next.top].map(Arc::new);
        let layers = lower(&stack).into_iter().chain(above);
        hold.switch(Stack::new(layers)?)?;
        self.ledger = next.ledger;
        self.top.send_replace(next.store);
        Ok(())
    }

    /// Goes on with the old top, which is opened anew when its end had begun.
    async fn resume(&self, hold: Hold<'_, FileStore>) -> Result<()> {
        let stack = self.disk.stack();
        if !hold.is_sealed() || self.ledger.is_poisoned() {
            return Ok(());
        }
        let (store, ledger) = (stack.top().store().clone(), self.ledger.clone());
        let top = match stack.top() {
            AnyLayer::Ploop(_) => AnyLayer::Ploop(Ploop::open_write(store, ledger).await?),
            AnyLayer::Raw(raw) => {
                AnyLayer::Raw(Raw::open_write(store, raw.geometry().cluster, ledger)?)
            }
        };
        let layers = lower(&stack).into_iter().chain([Arc::new(top)]);
        hold.switch(Stack::new(layers)?)
    }
}

/// Opens a layer below the top for reading, of the kind that it was.
async fn open_lower(store: FileStore, was: &AnyLayer<FileStore>) -> Result<AnyLayer<FileStore>> {
    Ok(match was {
        AnyLayer::Ploop(_) => AnyLayer::Ploop(Ploop::open_read(store).await?),
        AnyLayer::Raw(raw) => AnyLayer::Raw(Raw::open_read(store, raw.geometry().cluster)?),
    })
}

/// All layers but the top.
fn lower(stack: &Stack<FileStore>) -> Vec<Arc<AnyLayer<FileStore>>> {
    let below = stack.depth().saturating_sub(1);
    stack.layers().iter().take(below).cloned().collect()
}

/// Tells the keeper that a disk that is not written to was not frozen, nor held for anything else.
pub(super) async fn refuse(control: &Arc<OwnedFd>) -> Result<()> {
    let why = Error::new(Kind::ReadOnly, "nothing is written to the disk");
    say(control, &Event::NotFrozen(Failure::from(&why))).await
}
