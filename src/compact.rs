//! Compact: clusters from the end of the top's file move into free ones before them, while the guest
//! works, so that the file can be cut.
//!
//! Ordering. A request of our own has one guest cluster to itself, as a first write has: nothing else
//! is in flight on it. It looks where the cluster is, takes a lower place, copies, and has the top
//! name that ([`ploop_formats::ploop::Ploop::relocate`]), whose flush passes see to the rest. Passes
//! come in between, so that what was left is free, and has its space given back, before much more is
//! taken. Nobody else waits, and whoever is cut or ended leaves a disk like any other.
//!
//! What a guest takes meanwhile it takes from the lowest, so a few rounds see the end of it, or of
//! patience. The file is then cut by whoever closes the top, or by [`crate::hold::Hold::cut`].

use crate::device::Device;
use crate::disk::{Disk, all};
use crate::flight::Mode;
use crate::image::snapshot::copy::Work;
use crate::stack::{AnyLayer, Stack};
use futures_util::future::join_all;
use ploop_formats::layer::{Extent, Layer, Reservation};
use ploop_formats::planted::{self, Bug};
use ploop_formats::ploop::{Packing, Ploop, Reserved};
use ploop_formats::progress::Progress;
use ploop_formats::store::{Reach, Store};
use ploop_formats::units::{HostCluster, VirtCluster};
use ploop_formats::{Error, Kind, Result};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Bytes of one read.
const STEP: u64 = 1 << 20;
/// Bytes of clusters that move at the same time, and how many there are of them.
const WINDOW: u64 = 4 << 20;
const AT_ONCE: u64 = 32;
/// Bytes moved after which a pass makes the old places free.
const UNSYNCED: u64 = 64 << 20;
/// Times that the table is looked through, at most.
const ROUNDS: u32 = 8;
/// Zeros are left out in blocks of at least so many bytes: what a file system can leave out.
const ZERO_BLOCK: usize = 4096;

/// Why a raw image is not compacted.
pub fn raw() -> Error {
    Error::unsupported(
        "a raw image, in which every cluster has its place: there is nothing to compact",
    )
}

/// Why a qcow2 image is not compacted.
pub fn qcow2() -> Error {
    Error::unsupported(
        "a qcow2 image, which is not compacted in place; `ploopctl convert --to qcow2` with --out DIR or \
         --out-file FILE writes one without what is not used",
    )
}

/// The top, which is to be a delta.
fn delta<S: Store>(stack: &Stack<S>) -> Result<&Ploop<S>> {
    match stack.top() {
        AnyLayer::Ploop(ploop) => Ok(ploop),
        AnyLayer::Raw(_) => Err(raw()),
        AnyLayer::Qcow2(_) => Err(qcow2()),
    }
}

/// A compaction under way.
struct Mover<'a, S> {
    disk: &'a Disk<S>,
    /// The layer that is compacted.
    top: Weak<AnyLayer<S>>,
    /// Bytes of a cluster.
    cluster: u64,
    /// Bytes moved.
    done: u64,
    /// Bytes to move, as far as anybody knows.
    total: u64,
    /// Bytes moved since the last pass.
    unsynced: u64,
}

impl<S: Store> Disk<S> {
    /// Moves clusters of the top to where they belong in a file without free ones, and makes that
    /// durable: how many moved. The file is as long as it was.
    ///
    /// `work` is told how far it is, and may end it. `Unsupported` when the top is raw, `Busy` when
    /// the disk got another one meanwhile. After any error the disk goes on, unless it has failed.
    pub async fn pack(&self, work: &mut Work<'_>) -> Result<u64> {
        if self.is_read_only() {
            return Err(Error::new(Kind::ReadOnly, "the disk is open read-only"));
        }
        let stack = self.stack();
        delta(&stack)?;
        let mut mover = Mover {
            disk: self,
            top: stack
                .layers()
                .last()
                .map(Arc::downgrade)
                .unwrap_or_default(),
            cluster: stack.top().geometry().cluster.bytes(),
            done: 0,
            total: 0,
            unsynced: 0,
        };
        drop(stack);
        for _ in 0..ROUNDS {
            // What was freed loses its content after the first pass, and can be taken after the second.
            mover.flush().await?;
            mover.flush().await?;
            let before = mover.done;
            mover.round(work).await?;
            if mover.done == before {
                break;
            }
        }
        Ok(mover.done / mover.cluster)
    }
}

impl<S: Store> Mover<'_, S> {
    async fn flush(&mut self) -> Result<()> {
        self.unsynced = 0;
        self.disk.flush_once().await
    }

    /// The delta that is compacted, on the stack of a request.
    fn delta<'s>(&self, stack: &'s Stack<S>) -> Result<&'s Ploop<S>> {
        let same = |top: &Arc<AnyLayer<S>>| Weak::ptr_eq(&Arc::downgrade(top), &self.top);
        match stack.layers().last().is_some_and(same) {
            true => delta(stack),
            false => Err(Error::new(
                Kind::Busy,
                "the disk got another top while it was compacted; try again",
            )),
        }
    }

    /// Looks through the table once, and moves what lies too far behind.
    async fn round(&mut self, work: &mut Work<'_>) -> Result<()> {
        let Packing { end, misplaced } = {
            let request = self.disk.admit(0, 1, Mode::Shared).await?;
            self.delta(&request.stack)?.packing()
        };
        self.total = self.done + misplaced * self.cluster;
        let mut next = (misplaced > 0).then_some(VirtCluster(0));
        while let Some(from) = next {
            let mut found;
            (found, next) = {
                let request = self.disk.admit(0, 1, Mode::Shared).await?;
                let delta = self.delta(&request.stack)?;
                delta.placed_from(from, end).await?
            };
            // Foreign tables may be longer than their disk, behind whose end nobody is admitted.
            let size = self.disk.size();
            found.retain(|cluster| u64::from(cluster.0) * self.cluster < size);
            let at_once = (WINDOW / self.cluster).clamp(1, AT_ONCE) as usize;
            for clusters in found.chunks(at_once) {
                self.tell(work)?;
                self.advance(clusters, end, work).await?;
            }
        }
        self.tell(work)
    }

    fn tell(&self, work: &mut Work<'_>) -> Result<()> {
        work.watch().tell(Progress {
            phase: "compacting",
            done: self.done,
            total: self.total.max(self.done),
        })
    }

    /// Moves a few clusters. Where the host has no space for them, what was moved before is made
    /// durable, which gives some back.
    async fn advance(
        &mut self,
        clusters: &[VirtCluster],
        end: HostCluster,
        work: &Work<'_>,
    ) -> Result<()> {
        let before = self.done;
        let lacks_space = |moved: &Result<()>| {
            let kind = moved.as_ref().err().map(Error::kind);
            kind == Some(Kind::NoSpace)
        };
        let mut moved = self.move_all(clusters, end).await;
        while lacks_space(&moved) && self.unsynced > 0 {
            self.flush().await?;
            moved = self.move_all(clusters, end).await;
        }
        moved?;
        if self.unsynced >= UNSYNCED {
            self.flush().await?;
        }
        work.wait(self.done - before).await;
        Ok(())
    }

    async fn move_all(&mut self, clusters: &[VirtCluster], end: HostCluster) -> Result<()> {
        let moves = clusters.iter().map(|cluster| self.move_one(*cluster, end));
        let mut failed = Ok(());
        // All of them run to their end, whatever happens to any.
        for moved in join_all(moves).await {
            match moved {
                Ok(true) => {
                    self.done += self.cluster;
                    self.unsynced += self.cluster;
                }
                Ok(false) => {}
                Err(e) => failed = failed.and(Err(e)),
            }
        }
        failed
    }

    /// Moves a cluster to before `end`, if it is not there and there is a place; whether it moved.
    async fn move_one(&self, cluster: VirtCluster, end: HostCluster) -> Result<bool> {
        let at = u64::from(cluster.0) * self.cluster;
        let mode = match planted::is(Bug::MoveUnderShared) {
            true => Mode::Shared,
            false => Mode::Exclusive,
        };
        let request = self.disk.admit_change(at, 1, mode).await?;
        let stack = &*request.stack;
        let delta = self.delta(stack)?;
        let moved = self
            .disk
            .with_room(|| relocate(stack, delta, cluster, end))
            .await;
        self.disk.is_changed();
        moved
    }
}

/// Gives a cluster another place, before `end`; whether it has one. The caller has it to himself.
/// Fails with `Pending` before anything is done.
async fn relocate<S: Store>(
    stack: &Stack<S>,
    delta: &Ploop<S>,
    cluster: VirtCluster,
    end: HostCluster,
) -> Result<bool> {
    let size = delta.geometry().cluster;
    let Extent::Data { at: from, .. } = delta.map(size.start(cluster.0), 1).await? else {
        return Ok(false);
    };
    if from < size.start(end.0) {
        return Ok(false);
    }
    let Some(mut reserved) = delta.reserve_below(end).await? else {
        return Ok(false);
    };
    let to = reserved.host();
    reserved.submitted();
    let mut reserved = Some(reserved);
    let publish = |reserved: &mut Option<Reserved>| match reserved.take() {
        Some(reserved) => delta.relocate(cluster, from, reserved),
        None => Ok(()),
    };
    if planted::is(Bug::MovedBeforeCopy) {
        publish(&mut reserved)?;
    }
    let mut done = 0;
    while done < size.bytes() {
        let len = STEP.min(size.bytes() - done);
        copy(stack, from + done, to + done, len).await?;
        done += len;
    }
    publish(&mut reserved)?;
    Ok(true)
}

/// Copies bytes of the top's file, but for zeros, which are there already.
async fn copy<S: Store>(stack: &Stack<S>, from: u64, to: u64, len: u64) -> Result<()> {
    let _permit = stack.copying(len).await;
    let buf = stack.lend(len as usize);
    let bytes = stack.top().store().read_at(from, buf).await?.freeze();
    let block = ZERO_BLOCK.max(stack.align() as usize);
    let writes = runs(&bytes, block).into_iter().map(|run| {
        let at = to + run.start as u64;
        stack.write_data(at, bytes.slice(run), Reach::Cache)
    });
    let written = all(writes).await;
    stack.take_back(bytes);
    written
}

/// The ranges of `bytes` that are not zeros, in whole blocks.
fn runs(bytes: &[u8], block: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (n, part) in bytes.chunks(block).enumerate() {
        if part.iter().all(|byte| *byte == 0) {
            continue;
        }
        let (start, end) = (n * block, n * block + part.len());
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_left_out_wherever_they_are() {
        let mut bytes = vec![0; 10];
        assert_eq!(runs(&bytes, 2), []);
        bytes[3] = 1;
        bytes[4] = 1;
        bytes[9] = 1;
        assert_eq!(runs(&bytes, 2), [2..6, 8..10]);
    }
}
