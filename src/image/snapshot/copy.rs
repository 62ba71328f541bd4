//! Copy: every cluster of one delta into the one below it.
//!
//! Ordering: a cluster is named by the lower delta's table only when all of it is written, and the
//! flush pass makes the data durable first. A cluster that the lower delta has is overwritten in
//! place: the upper one hides it as long as this can be cut. Memory is bounded whatever the cluster
//! size.

use crate::stack::AnyLayer;
use futures_util::future::join_all;
use ploop_formats::layer::{Below, Extent, Layer, Reservation};
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::store::{Reach, Store};
use ploop_formats::units::VirtCluster;
use ploop_formats::{Error, Kind, Result, buf};
use std::future::Future;
use std::pin::Pin;

/// Clusters that are copied at once, and bytes of each that are held in memory.
const AT_ONCE: usize = 8;
const STEP: u64 = 1 << 20;

/// How a copy is watched and slowed down.
pub struct Work<'a> {
    /// Told how far it is; may end it.
    pub watch: &'a mut dyn Watch,
    /// Returns when the next so many bytes may be copied.
    pub pace: &'a dyn Pace,
}

/// Waits as long as a rate wants it.
pub trait Pace {
    /// Returns when `bytes` more may be copied.
    fn wait(&self, bytes: u64) -> Pin<Box<dyn Future<Output = ()> + '_>>;
}

/// As fast as possible.
impl Pace for () {
    fn wait(&self, _: u64) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(std::future::ready(()))
    }
}

/// Copies all that `from` has into `to`, which is at least as large; the bytes copied. They are
/// durable once `to` is closed.
pub async fn copy<S: Store>(
    from: &AnyLayer<S>,
    to: &AnyLayer<S>,
    work: &mut Work<'_>,
) -> Result<u64> {
    let geometry = from.geometry();
    let mut copied = 0u64;
    let mut at = 0u64;
    while at < geometry.size {
        let (batch, next) = present(from, at).await?;
        copy_all(from, to, &batch).await?;
        let bytes = (batch.len() as u64).saturating_mul(geometry.cluster.bytes());
        copied = copied.saturating_add(bytes);
        at = next;
        work.watch.tell(Progress {
            phase: "merging",
            done: at.min(geometry.size),
            total: geometry.size,
        })?;
        work.pace.wait(bytes).await;
    }
    Ok(copied)
}

/// The next clusters from guest offset `at` on that a delta has, a few at most, and where to look
/// for more.
async fn present<S: Store>(from: &AnyLayer<S>, mut at: u64) -> Result<(Vec<u32>, u64)> {
    let geometry = from.geometry();
    let mut found = Vec::new();
    while at < geometry.size && found.len() < AT_ONCE {
        let extent = from.map(at, geometry.size - at).await?;
        if let Extent::Absent { len } = extent {
            at += len;
            if !found.is_empty() {
                break;
            }
            continue;
        }
        let cluster = geometry.cluster.cluster_of(at);
        found.push(cluster.ok_or_else(|| Error::invalid("offset past the table"))?);
        at += geometry.cluster.bytes();
    }
    Ok((found, at))
}

/// Copies clusters; those that find the table of pending changes full come again after a pass.
async fn copy_all<S: Store>(from: &AnyLayer<S>, to: &AnyLayer<S>, clusters: &[u32]) -> Result<()> {
    let mut left = clusters.to_vec();
    while !left.is_empty() {
        let all = join_all(left.iter().map(|n| copy_one(from, to, *n))).await;
        let mut again = Vec::new();
        for (n, done) in left.iter().zip(all) {
            match done {
                Err(e) if e.kind() == Kind::Pending => again.push(*n),
                done => done?,
            }
        }
        if !again.is_empty() {
            to.sync().await?;
        }
        left = again;
    }
    Ok(())
}

async fn copy_one<S: Store>(from: &AnyLayer<S>, to: &AnyLayer<S>, cluster: u32) -> Result<()> {
    let size = to.geometry().cluster;
    let start = size.start(cluster);
    match to.map(start, size.bytes()).await? {
        Extent::Data { at, .. } => copy_bytes(from, to, start, at).await,
        Extent::Zero { .. } | Extent::Absent { .. } => {
            let mut reserved = to.reserve().await?;
            reserved.submitted();
            copy_bytes(from, to, start, reserved.host()).await?;
            to.publish(VirtCluster(cluster), reserved, Below::Data);
            Ok(())
        }
    }
}

/// Copies the cluster at guest offset `start` to file offset `host`, in steps.
async fn copy_bytes<S: Store>(
    from: &AnyLayer<S>,
    to: &AnyLayer<S>,
    start: u64,
    host: u64,
) -> Result<()> {
    let end = (start + to.geometry().cluster.bytes()).min(from.geometry().size);
    let mut at = start;
    while at < end {
        let step = STEP.min(end - at);
        let extent = from.map(at, step).await?;
        let len = extent.len();
        let bytes = buf::aligned(len as usize);
        let bytes = match extent {
            Extent::Data { at, .. } => from.store().read_at(at, bytes).await?,
            Extent::Zero { .. } | Extent::Absent { .. } => bytes,
        };
        let place = host + (at - start);
        to.store()
            .write_at(place, bytes.freeze(), Reach::Cache)
            .await?;
        at += len;
    }
    Ok(())
}
