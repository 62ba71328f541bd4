//! Trackers: what a worker does about them when its keeper says so, beside everything else.

use super::message::{Event, ExtentKind, Failure, Track, TrackedExtent, WorkerSet, WorkerTracker};
use super::{inherit, worker};
use crate::device::{Device, GuestExtent};
use crate::io::exec;
use crate::io::memfd::SharedWords;
use crate::tracker::{Blocks, Registry, Set};
use ploop_formats::{Error, Result};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Time between two looks whether a set is complete: first, and when storage hangs.
const LOOK: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(50);
/// Bytes that the device is asked about at once, and for one answer: others are served in between.
const PIECE: u64 = 1 << 30;
const SPAN: u64 = 256 << 30;

/// The trackers that a keeper has, for one that begins to serve.
pub(super) fn take(given: Vec<WorkerTracker>) -> Result<Registry> {
    let registry = Registry::default();
    let set = |given: WorkerSet| open(inherit::take(given.fd)?, given.log2);
    for tracker in given {
        registry.begin(&tracker.name, 0, set(tracker.recording)?);
        for (generation, sealed) in tracker.sealed {
            registry.add(&tracker.name, 0, generation, set(sealed)?);
        }
    }
    Ok(registry)
}

fn open(fd: OwnedFd, log2: u32) -> Result<Set> {
    Ok(Arc::new(Blocks::new(SharedWords::from_fd(fd)?, log2)?))
}

/// Who carries out orders about trackers.
pub(super) struct Clerk<D> {
    pub registry: Arc<Registry>,
    pub device: Arc<D>,
    pub control: Arc<OwnedFd>,
}

impl<D> Clone for Clerk<D> {
    fn clone(&self) -> Self {
        Self {
            registry: Arc::clone(&self.registry),
            device: Arc::clone(&self.device),
            control: Arc::clone(&self.control),
        }
    }
}

impl<D: Device + 'static> Clerk<D> {
    /// Carries out orders until there are no more. What has to wait does not keep the next one.
    pub async fn run(self, mut orders: mpsc::UnboundedReceiver<(Track, Vec<OwnedFd>)>) {
        while let Some((order, fds)) = orders.recv().await {
            self.carry_out(order, fds.into_iter());
        }
    }

    fn carry_out(&self, order: Track, mut fds: impl Iterator<Item = OwnedFd>) {
        let mut set = |log2| {
            let missing = || Error::invalid("no set came with an order");
            open(fds.next().ok_or_else(missing)?, log2)
        };
        match order {
            Track::Start { ask, name, log2 } => match set(log2).and_then(|s| Ok((s, set(log2)?))) {
                Ok((recording, all)) => {
                    self.registry.begin(&name, ask, recording);
                    self.complete(ask, move |registry| registry.add(&name, ask, 0, all));
                }
                Err(e) => self.refuse(ask, &e),
            },
            Track::Seal {
                ask,
                name,
                generation,
                log2,
            } => match set(log2) {
                Ok(next) => {
                    let old = self.registry.replace(&name, next);
                    self.complete(ask, move |registry| {
                        if let Some((id, old)) = old {
                            registry.add(&name, id, generation, old);
                        }
                    });
                }
                Err(e) => self.refuse(ask, &e),
            },
            Track::Forget { name, generation } => self.registry.forget(&name, generation),
            Track::Stop { name } => self.registry.stop(&name),
            Track::Extents {
                ask,
                name,
                generation,
                from,
                max,
            } => match self.registry.generation(&name, generation) {
                Ok(set) => {
                    let clerk = self.clone();
                    exec::spawn(async move { clerk.list(ask, &set, from, max as usize).await });
                }
                Err(e) => self.refuse(ask, &e),
            },
        }
    }

    /// Says that sets which were replaced are complete, once they are.
    fn complete(&self, ask: u64, then: impl FnOnce(&Registry) + 'static) {
        let clerk = self.clone();
        exec::spawn(async move {
            let (recorder, mut pause) = (clerk.registry.recorder(), LOOK);
            while !recorder.is_settled() {
                exec::sleep(pause).await;
                pause = (pause * 2).min(LOOK_MAX);
            }
            then(&clerk.registry);
            clerk.say(Event::Tracked { ask }).await;
        });
    }

    fn refuse(&self, ask: u64, why: &Error) {
        let (clerk, why) = (self.clone(), Failure::from(why));
        exec::spawn(async move { clerk.say(Event::NotTracked { ask, why }).await });
    }

    async fn say(&self, event: Event) {
        if let Err(e) = worker::say(&self.control, &event).await {
            // A keeper that is gone is seen elsewhere.
            tracing::debug!("{e}");
        }
    }

    async fn list(&self, ask: u64, set: &Set, from: u64, max: usize) {
        let event = match extents(&*self.device, set, from, max).await {
            Ok((extents, next)) => Event::Extents { ask, extents, next },
            Err(e) => Event::NotTracked {
                ask,
                why: Failure::from(&e),
            },
        };
        self.say(event).await;
    }
}

/// What a set has of a device, from an offset on: at most `max` extents, and where to go on.
async fn extents<D: Device>(
    device: &D,
    set: &Set,
    from: u64,
    max: usize,
) -> Result<(Vec<TrackedExtent>, Option<u64>)> {
    let mut found: Vec<TrackedExtent> = Vec::new();
    for run in set.runs(from..device.size()) {
        let mut offset = run.start;
        while offset < run.end {
            if offset - from >= SPAN {
                return Ok((found, Some(offset)));
            }
            let piece = (run.end - offset).min(PIECE);
            let described = device.extents(offset, piece, max).await?;
            if described.is_empty() {
                return Err(Error::invalid("the device described nothing"));
            }
            exec::yield_now().await;
            for extent in described {
                let (kind, length, full) = (kind(&extent), extent.len, found.len() == max);
                match found.last_mut() {
                    Some(last) if last.offset + last.length == offset && last.kind == kind => {
                        last.length += length;
                    }
                    _ if full => return Ok((found, Some(offset))),
                    _ => found.push(TrackedExtent {
                        offset,
                        length,
                        kind,
                    }),
                }
                offset += length;
            }
        }
    }
    Ok((found, None))
}

const fn kind(extent: &GuestExtent) -> ExtentKind {
    match (extent.zero, extent.hole) {
        (false, _) => ExtentKind::Data,
        (true, false) => ExtentKind::Zero,
        (true, true) => ExtentKind::Discard,
    }
}
