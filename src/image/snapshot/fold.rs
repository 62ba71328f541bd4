//! Fold: the top of a running disk is merged into the delta below it, which then is the top.
//!
//! In order:
//!
//! 1. [`prepare`]: the lower delta is marked temporary, by a change of its own, and the change is
//!    announced in which the top has the lower one's file and parent.
//! 2. The lower delta is opened as a target, while the guest works.
//! 3. The guest waits, and the top is sealed. [`fill`]: the target is grown to its size, the top is
//!    copied into it, it is made durable, and says that it is in use.
//! 4. The change is committed, and the target serves. The old top's file goes.
//!
//! What is copied while the guest waits is little, or it is not done: [`LITTLE`].
//!
//! Cut before the rename, the old top hides all that was copied. But a top forgets what is
//! discarded where nothing below has anything. So whoever goes on with it after step 2 looks at the
//! lower delta anew, once nobody's writes to that can land any more.

use super::copy::{self, Window, Work};
use super::merge::Readers;
use super::parts::{Rest, may_have_parts};
use super::{layers, merge};
use crate::image::change::Change;
use crate::image::delta;
use crate::stack::AnyLayer;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder::{Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};
use std::sync::Arc;

/// Bytes of a top that are copied while its guest waits, at most.
pub const LITTLE: u64 = 32 << 20;

/// A fold that lacks nothing but the guest's waiting, the copy and the commit.
#[derive(Debug)]
#[must_use = "an announced change is committed or undone"]
pub struct Prepared<'f, F: Folder> {
    /// What is committed.
    pub change: Change<'f, F>,
    /// File of the lower delta.
    pub into: String,
}

/// Step 1, for the delta `lower` that carries the top and nothing else. None, with the mark made,
/// when the top has more than [`LITTLE`]. `old` is what [`crate::image::change::settle`] gave.
pub async fn prepare<'f, F: Folder>(
    folder: &'f F,
    old: &Descriptor,
    lower: Guid,
) -> Result<Option<Prepared<'f, F>>> {
    let into = layers::image(old, lower)?.file;
    let above = layers::image(old, old.top())?;
    let top = layers::open_read(folder, old, &above).await?;
    // One with much in it is frozen and merged while the disk reads both.
    let much = data_bytes(&top) > LITTLE;
    let readers = if much { Readers::Disk } else { Readers::Nobody };
    let marked = merge::claim(folder, old, lower, &top, readers).await?;
    if much {
        return Ok(None);
    }
    folder.set_shared(&into, false).await?;
    // Opened so, it is fsynced and forgotten by the page cache: what an earlier attempt could not
    // write must not be taken for what the file holds.
    drop(folder.open(&into, Access::Write).await?);
    let new = marked.dissolved(lower)?;
    let change = Change::announce(folder, &marked, new).await?;
    Ok(Some(Prepared { change, into }))
}

/// Refuses to copy, while a guest waits, what it has written since [`prepare`] found it little.
pub fn refuse_much<S: Store>(top: &AnyLayer<S>) -> Result<()> {
    match data_bytes(top) <= 4 * LITTLE {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Busy,
            "so much was written meanwhile that its users would wait too long; try again",
        )),
    }
}

/// How much a delta holds at most: an upper one is never raw.
fn data_bytes<S: Store>(layer: &AnyLayer<S>) -> u64 {
    let len = layer.store().info().len;
    match layer {
        AnyLayer::Ploop(ploop) => {
            let header = ploop.header();
            len.saturating_sub(header.cluster.start(header.data_start))
        }
        AnyLayer::Raw(_) | AnyLayer::Qcow2(_) => len,
    }
}

/// Step 2: opens the lower delta, of the kind that `was` is, so that it can go on as the top with
/// this ledger.
pub async fn open_target<S: Store>(
    store: S,
    was: &AnyLayer<S>,
    ledger: Ledger,
) -> Result<AnyLayer<S>> {
    let cluster = was.geometry().cluster;
    delta::target(store, delta::format(was), cluster, ledger).await
}

/// Step 3: copies a sealed top into `target`, which stands on `below`, base first, and makes a top of
/// that. After an error the target is closed: it may hold some of it.
pub async fn fill<S: Store + Clone>(
    top: &AnyLayer<S>,
    target: &mut AnyLayer<S>,
    below: Vec<Arc<AnyLayer<S>>>,
    window: Window,
) -> Result<()> {
    let filled = copy_over(top, target, below, window).await;
    if filled.is_err() {
        // What cannot be closed says that it is in use, and is marked: that is all the same.
        let _ = target.close().await;
    }
    filled
}

async fn copy_over<S: Store + Clone>(
    top: &AnyLayer<S>,
    target: &mut AnyLayer<S>,
    mut below: Vec<Arc<AnyLayer<S>>>,
    window: Window,
) -> Result<()> {
    if !may_have_parts(top) {
        below.clear();
    }
    let rest = Rest::new(below)?;
    let mut watch = ();
    let mut work = Work::new(&mut watch, &()).within(window);
    merge::take_size(target, top).await?;
    copy::copy(top, target, &rest, &mut work).await?;
    target.sync().await?;
    match target {
        AnyLayer::Ploop(ploop) => ploop.become_top().await,
        AnyLayer::Raw(_) | AnyLayer::Qcow2(_) => Ok(()),
    }
}
