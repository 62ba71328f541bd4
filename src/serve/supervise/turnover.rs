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
//! To merge the top into the layer below it ([`crate::image::snapshot::fold`]), which becomes the top,
//! order `Fold` brings that layer and its ledger. While the disk is held and the top sealed, that is
//! copied. With the old top again, the layer below is opened anew as well: it may hold some of it.
//!
//! To give the disk another size, order `Resize` says which: [`Hold::resize`] does it. To compact it,
//! order `Compact` has clusters moved while requests run ([`super::compaction`]).
//!
//! A worker that dies on the way leaves nothing of its own: its successor reads the descriptor, and
//! is given the ledger of the top that this names.

use super::compaction;
use super::message::{Event, Failure, Order};
use super::worker::say;
use crate::device::Device;
use crate::disk::Disk;
use crate::hold::Hold;
use crate::image::delta;
use crate::image::open;
use crate::image::snapshot::copy::Window;
use crate::image::snapshot::fold;
use crate::image::target::Format;
use crate::io::file::{Cache, FileStore};
use crate::io::lock;
use crate::io::memfd::SharedWords;
use crate::io::room::{KeepFree, Limit};
use crate::stack::{AnyLayer, NewSize, Stack};
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
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
    /// What a top may take there. What is not the guest's writing is not held to it: merges, growth.
    pub limit: Option<Limit>,
}

/// A stack that is ready but for the old top, which is still written to.
struct Next {
    top: AnyLayer<FileStore>,
    store: FileStore,
    ledger: Ledger,
    below: OwnedFd,
    name: String,
}

/// The layer below the top, as it is to be the top.
struct Target {
    layer: AnyLayer<FileStore>,
    store: FileStore,
    ledger: Ledger,
    /// Its file, should it stay below.
    read: OwnedFd,
}

impl Target {
    /// It stays below after all: the layers below the top, in which it is opened anew.
    async fn give_back(self, stack: &Stack<FileStore>) -> Result<Vec<Arc<AnyLayer<FileStore>>>> {
        let store = FileStore::new(self.read, self.store.path(), Cache::Writeback)?;
        let mut layers = lower(stack);
        layers.pop();
        layers.push(Arc::new(delta::read_again(store, &self.layer).await?));
        Ok(layers)
    }
}

impl Turnover {
    /// Carries out orders until there are no more.
    pub async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Ordered>) -> Result<()> {
        while let Some((order, fds)) = orders.recv().await {
            match order {
                Order::Freeze { top, below } => {
                    self.freeze(&top, below, fds, &mut orders).await?;
                }
                Order::Fold { into } => self.fold(&into, fds, &mut orders).await?,
                Order::Resize { to } => self.resize(to).await?,
                Order::Compact { rate } => {
                    let (disk, ledger) = (&self.disk, self.ledger.clone());
                    compaction::carry_out(disk, ledger, &self.control, rate, &mut orders).await?;
                }
                Order::Limit { bytes } => {
                    self.limit = bytes.map(Limit);
                    self.top.borrow().set_limit(self.limit);
                }
                Order::Reload { lower, merged } => self.reload(&lower, &merged, fds).await?,
                Order::Stop
                | Order::Go { .. }
                | Order::EndCompact
                | Order::Track(_)
                | Order::Halt { .. }
                | Order::Resume => {}
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
            let resumed = self.resume(hold, lower(&disk.stack())).await;
            self.not_frozen(&e).await?;
            return resumed;
        }
        say(&self.control, &Event::Frozen).await?;
        match orders.recv().await {
            Some((Order::Go { new: true }, _)) => self.go(hold, next).await?,
            _ => self.resume(hold, lower(&disk.stack())).await?,
        }
        self.went(start).await
    }

    async fn fold(
        &mut self,
        into: &str,
        fds: Vec<OwnedFd>,
        orders: &mut mpsc::UnboundedReceiver<Ordered>,
    ) -> Result<()> {
        let prepared = match self.target(into, fds).await {
            Ok(target) => self.disk.flush().await.map(|()| target),
            Err(e) => Err(e),
        };
        let little = |target| fold::refuse_much(self.disk.stack().top()).map(|()| target);
        let prepared = prepared.and_then(little);
        let mut target = match prepared {
            Ok(target) => target,
            Err(e) => return self.not_frozen(&e).await,
        };
        let disk = Arc::clone(&self.disk);
        let start = Instant::now();
        let hold = disk.hold().await;
        let stack = disk.stack();
        let mut below = lower(&stack);
        below.pop();
        let filled = match hold.seal().await {
            Ok(()) => {
                let (top, target) = (stack.top(), &mut target.layer);
                fold::fill(top, target, below.clone(), Window::default()).await
            }
            Err(e) => Err(e),
        };
        if let Err(e) = filled {
            let resumed = self.unfold(hold, target, &stack).await;
            self.not_frozen(&e).await?;
            return resumed;
        }
        say(&self.control, &Event::Frozen).await?;
        match orders.recv().await {
            Some((Order::Go { new: true }, _)) => {
                below.push(Arc::new(target.layer));
                go_on(hold, below)?;
                self.ledger = target.ledger;
                target.store.set_limit(self.limit);
                self.top.send_replace(target.store);
            }
            _ => {
                if let Err(e) = target.layer.close().await {
                    std::mem::forget(hold);
                    return Err(e);
                }
                self.unfold(hold, target, &stack).await?;
            }
        }
        self.went(start).await
    }

    /// Gives the disk another size. After a failure that is final this process ends: the next one
    /// looks at what is in the file.
    async fn resize(&self, to: NewSize) -> Result<()> {
        if let Err(e) = self.disk.stack().resized(to) {
            return say(&self.control, &Event::NotResized(Failure::from(&e))).await;
        }
        // While requests run, so that little is left for later.
        if let Err(e) = self.disk.flush().await {
            return say(&self.control, &Event::NotResized(Failure::from(&e))).await;
        }
        let start = Instant::now();
        let hold = self.disk.hold().await;
        let top = self.top.borrow().clone();
        top.set_limit(None);
        let resized = hold.resize(to, self.ledger.clone()).await;
        top.set_limit(self.limit);
        match resized {
            Ok(()) => {
                let stall_us = start.elapsed().as_micros() as u64;
                let size = self.disk.size();
                say(&self.control, &Event::Resized { size, stall_us }).await
            }
            Err(e) => {
                say(&self.control, &Event::NotResized(Failure::from(&e))).await?;
                match e.kind() {
                    // The image itself may say no. The disk goes on as it was.
                    Kind::Invalid | Kind::NoSpace | Kind::Unsupported => Ok(()),
                    _ => Err(e),
                }
            }
        }
    }

    /// Opens the layer below the top to be copied into, before anybody waits.
    async fn target(&self, into: &str, fds: Vec<OwnedFd>) -> Result<Target> {
        let (file, words, read) = three(fds)?;
        let stack = self.disk.stack();
        let below = lower(&stack).pop();
        let below = below.filter(|layer| layer.store().path() == Path::new(into));
        let below = below.ok_or_else(|| Error::invalid(format!("{into}: not below the top")))?;
        let store = self.own(file, into, delta::format(&below))?;
        let ledger = Ledger::new(Arc::new(SharedWords::from_fd(words)?));
        let layer = fold::open_target(store.clone(), &below, ledger.clone()).await;
        Ok(Target {
            layer: layer.map_err(|e| e.at(into))?,
            store,
            ledger,
            read,
        })
    }

    /// The store of a file that is to be the top.
    fn own(&self, file: OwnedFd, name: &str, format: Format) -> Result<FileStore> {
        lock::fence(&file, Instant::now() + FENCE)?;
        let store = open::top_store(file, Path::new(name), format, self.cache)?;
        store.keep_free(self.keep_free);
        Ok(store)
    }

    async fn went(&self, since: Instant) -> Result<()> {
        let stall_us = since.elapsed().as_micros() as u64;
        say(&self.control, &Event::Went { stall_us }).await
    }

    async fn not_frozen(&self, why: &Error) -> Result<()> {
        say(&self.control, &Event::NotFrozen(Failure::from(why))).await
    }

    /// Opens the new top, before anybody waits.
    async fn prepare(&self, top: &str, below: String, fds: Vec<OwnedFd>) -> Result<Next> {
        let (file, words, old) = three(fds)?;
        let stack = self.disk.stack();
        // As the descriptor has it.
        let format = match delta::format(stack.top()) {
            Format::Qcow2 => Format::Qcow2,
            Format::Ploop | Format::Raw => Format::Ploop,
        };
        let store = self.own(file, top, format)?;
        let ledger = Ledger::new(Arc::new(SharedWords::from_fd(words)?));
        let cluster = stack.top().geometry().cluster;
        let layer = delta::write(store.clone(), format, cluster, ledger.clone()).await;
        let layer = layer.map_err(|e| e.at(top))?;
        if layer.geometry().size < self.disk.size() {
            let what = "the disk has grown meanwhile; try again";
            return Err(Error::new(Kind::Busy, what));
        }
        Ok(Next {
            top: layer,
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
        let same_depth = lower.len().checked_add(1) == Some(stack.depth());
        for (n, name) in lower.iter().enumerate() {
            let path = Path::new(name);
            let known = stack.layers().iter().find(|l| l.store().path() == path);
            // A file in another one's place holds the same.
            let place = || {
                stack
                    .layers()
                    .get(n)
                    .filter(|_| same_depth && name == merged)
            };
            let known = known.or_else(place);
            let known = known.ok_or_else(|| Error::invalid(format!("{name}: not a layer")))?;
            layers.push(match (name == merged, fds.len()) {
                (true, 1..) => {
                    let fd = fds.next().ok_or_else(|| Error::invalid("no descriptor"))?;
                    let store = FileStore::new(fd, path, Cache::Writeback)?;
                    Arc::new(delta::read_again(store, known).await?)
                }
                _ => Arc::clone(known),
            });
        }
        let start = Instant::now();
        let hold = self.disk.hold().await;
        layers.extend(stack.layers().last().cloned());
        hold.switch(Stack::new(layers)?)?;
        self.went(start).await
    }

    /// Goes on with the new top, above the old one.
    async fn go(&mut self, hold: Hold<'_, FileStore>, next: Next) -> Result<()> {
        let stack = self.disk.stack();
        let old = FileStore::new(next.below, Path::new(&next.name), Cache::Writeback)?;
        let above = [delta::read_again(old, stack.top()).await?, next.top].map(Arc::new);
        let layers = lower(&stack).into_iter().chain(above);
        hold.switch(Stack::new(layers)?)?;
        self.ledger = next.ledger;
        next.store.set_limit(self.limit);
        self.top.send_replace(next.store);
        Ok(())
    }

    /// Goes on with the old top, over the layer below as it is now, whose clusters may have moved.
    async fn unfold(
        &self,
        hold: Hold<'_, FileStore>,
        target: Target,
        stack: &Stack<FileStore>,
    ) -> Result<()> {
        match target.give_back(stack).await {
            Ok(layers) => self.resume(hold, layers).await,
            Err(e) => {
                std::mem::forget(hold);
                Err(e)
            }
        }
    }

    /// Goes on with the old top above these layers. It is opened anew when its end had begun; else
    /// nothing has changed.
    async fn resume(
        &self,
        hold: Hold<'_, FileStore>,
        lower: Vec<Arc<AnyLayer<FileStore>>>,
    ) -> Result<()> {
        let stack = self.disk.stack();
        if !hold.is_sealed() || self.ledger.is_poisoned() {
            return Ok(());
        }
        match stack.top().open_again(self.ledger.clone()).await {
            Ok(top) => go_on(hold, lower.into_iter().chain([Arc::new(top)])),
            Err(e) => {
                std::mem::forget(hold);
                Err(e)
            }
        }
    }
}

/// Goes on with these layers. After an error nobody goes on, and this process ends: the clusters of the
/// layers that are there may not be where they are looked for.
fn go_on(
    hold: Hold<'_, FileStore>,
    layers: impl IntoIterator<Item = Arc<AnyLayer<FileStore>>>,
) -> Result<()> {
    match Stack::new(layers) {
        Ok(stack) => hold.switch(stack),
        Err(e) => {
            std::mem::forget(hold);
            Err(e)
        }
    }
}

/// The descriptors of an order that brings three.
fn three(fds: Vec<OwnedFd>) -> Result<(OwnedFd, OwnedFd, OwnedFd)> {
    let fds: [OwnedFd; 3] = fds
        .try_into()
        .map_err(|_| Error::invalid("an order that lacks its descriptors"))?;
    Ok(fds.into())
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
