//! Pack: what a stack reads as, as a new qcow2 image. The source is only read.
//!
//! It is read a batch at a time, in guest order; holes are not read, and zeros are not written. The
//! clusters of a batch are compressed by all processors. While one batch is read, what the batches before
//! it wrote goes to the disk, so that a host's memory is not filled with it. A batch and what was made of
//! it is all that is in memory.

use crate::image::snapshot::copy::{self, Work};
use crate::stack::Stack;
use bytes::Bytes;
use futures_util::future::{join, try_join_all};
use ploop_formats::layer::Layer;
use ploop_formats::progress::Progress;
use ploop_formats::qcow2::compress;
use ploop_formats::qcow2::create::Create;
use ploop_formats::qcow2::header::Compression;
use ploop_formats::qcow2::pack::Packer;
use ploop_formats::store::Store;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Error, Result, buf};
use std::num::NonZero;
use std::thread;

/// Zeros that get their space in one step, in bytes.
const RESERVE_STEP: u64 = 1 << 30;
/// Threads that compress, at most.
const THREADS_MAX: usize = 16;

/// How clusters are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filling {
    /// As they are; zeros take no space.
    Plain,
    /// As they are; all clusters have their space.
    Reserved,
    /// Compressed, where that makes them smaller; zeros take no space.
    Packed(Compression),
}

/// A part of the disk, in whole clusters.
enum Part {
    Data { at: u64, bytes: Bytes },
    Zeros { at: u64, len: u64 },
}

/// Makes the image in an empty file, durably.
pub async fn pack<S: Store>(
    source: &Stack<S>,
    image: &S,
    wanted: &Create,
    filling: Filling,
    work: &mut Work<'_>,
) -> Result<()> {
    let mut packer = Packer::new(image, wanted)?;
    let mut reading = Reading {
        source,
        cluster: wanted.cluster,
        size: source.top().geometry().size,
        at: 0,
    };
    let window = work.window();
    let mut unsynced = 0;
    loop {
        let is_due = unsynced >= window.unsynced;
        let sync = async {
            match is_due {
                true => image.flush().await.map_err(Error::into_final),
                false => Ok(()),
            }
        };
        let (batch, synced) = join(reading.batch(window.memory, filling), sync).await;
        synced?;
        let batch = batch?;
        if batch.is_empty() {
            break;
        }
        let mut bytes = 0;
        for part in batch {
            bytes += put(&mut packer, wanted.cluster, filling, part).await?;
        }
        unsynced = if is_due { bytes } else { unsynced + bytes };
        work.watch().tell(Progress {
            phase: "converting",
            done: reading.at.min(reading.size),
            total: reading.size,
        })?;
        work.wait(bytes).await;
    }
    packer.finish().await
}

/// Where the reading is.
struct Reading<'a, S> {
    source: &'a Stack<S>,
    cluster: ClusterSize,
    size: u64,
    at: u64,
}

impl<S: Store> Reading<'_, S> {
    /// The next parts, of about `max` bytes of data; none at the end. Zeros are among them only where
    /// they are to get their space.
    async fn batch(&mut self, max: u64, filling: Filling) -> Result<Vec<Part>> {
        let (mut left, mut parts) = (max, Vec::new());
        while self.at < self.size && left > 0 {
            let at = self.at;
            let (len, present) = copy::run(self.source, self.cluster, at).await?;
            self.at += match present {
                true => {
                    let len = len.min(self.whole(left));
                    left = left.saturating_sub(len);
                    match parts.last_mut() {
                        Some((from, before, true)) if *from + *before == at => *before += len,
                        _ => parts.push((at, len, true)),
                    }
                    len
                }
                false if filling == Filling::Reserved => {
                    let len = len.min(RESERVE_STEP);
                    left = 0;
                    parts.push((at, len, false));
                    len
                }
                false => len,
            };
        }
        let source = &*self;
        let parts = parts.into_iter().map(|(at, len, present)| async move {
            match present {
                true => source.read(at, len).await,
                false => Ok(Part::Zeros {
                    at,
                    len: source.whole(len),
                }),
            }
        });
        try_join_all(parts).await
    }

    /// Bytes of the clusters that `len` bytes are in.
    const fn whole(&self, len: u64) -> u64 {
        self.cluster.count(len) * self.cluster.bytes()
    }

    /// Reads `len` bytes, and zeros up to the end of their last cluster.
    async fn read(&self, at: u64, len: u64) -> Result<Part> {
        let whole = self.whole(len);
        let mut bytes = buf::aligned(whole as usize);
        let behind = bytes.split_off(len as usize);
        let mut bytes = self.source.read_any(at, bytes).await?;
        bytes.unsplit(behind);
        let bytes = bytes.freeze();
        Ok(Part::Data { at, bytes })
    }
}

/// Writes a part; the bytes of the disk that it is.
async fn put<S: Store>(
    packer: &mut Packer<'_, S>,
    cluster: ClusterSize,
    filling: Filling,
    part: Part,
) -> Result<u64> {
    let (at, bytes) = match part {
        Part::Zeros { at, len } => return packer.reserve(at, len).await.map(|()| 0),
        Part::Data { at, bytes } => (at, bytes),
    };
    let size = cluster.bytes() as usize;
    let clusters: Vec<Bytes> = (0..bytes.len() / size)
        .map(|n| bytes.slice(n * size..(n + 1) * size))
        .collect();
    let made = make(&clusters, filling)?;
    let mut from = 0;
    while let Some(first) = made.get(from) {
        let like = made[from..].iter().take_while(|one| one.goes_with(first));
        let until = from + like.count().max(1);
        let guest = at + (from * size) as u64;
        let run = from * size..until * size;
        match first {
            Cluster::Packed(packed) => packer.packed(guest, packed).await?,
            Cluster::Data => packer.data(guest, bytes.slice(run)).await?,
            Cluster::Zeros if filling == Filling::Reserved => {
                packer.reserve(guest, run.len() as u64).await?;
            }
            Cluster::Zeros => {}
        }
        from = until;
    }
    Ok(bytes.len() as u64)
}

/// What is written of a cluster.
enum Cluster {
    Zeros,
    Data,
    Packed(Vec<u8>),
}

impl Cluster {
    fn of(bytes: &[u8], filling: Filling) -> Self {
        if copy::is_zero(bytes) {
            return Self::Zeros;
        }
        let packed = match filling {
            Filling::Packed(how) => compress(how, bytes),
            Filling::Plain | Filling::Reserved => None,
        };
        packed.map_or(Self::Data, Self::Packed)
    }

    /// Whether both are written in one go.
    const fn goes_with(&self, other: &Self) -> bool {
        matches!(
            (self, other),
            (Self::Zeros, Self::Zeros) | (Self::Data, Self::Data)
        )
    }
}

/// What is written of each cluster. Compressing has all processors.
fn make(clusters: &[Bytes], filling: Filling) -> Result<Vec<Cluster>> {
    let each = |clusters: &[Bytes]| -> Vec<Cluster> {
        let all = clusters.iter();
        all.map(|bytes| Cluster::of(bytes, filling)).collect()
    };
    let threads = match filling {
        Filling::Packed(_) => thread::available_parallelism().map_or(1, NonZero::get),
        Filling::Plain | Filling::Reserved => 1,
    };
    let threads = threads.min(THREADS_MAX).min(clusters.len());
    if threads < 2 {
        return Ok(each(clusters));
    }
    thread::scope(|scope| {
        let shares = clusters.chunks(clusters.len().div_ceil(threads));
        let begun: Vec<_> = shares
            .map(|share| thread::Builder::new().spawn_scoped(scope, move || each(share)))
            .collect::<std::io::Result<_>>()?;
        let done = begun.into_iter().map(|one| one.join());
        let done: Vec<Vec<Cluster>> = done
            .collect::<thread::Result<_>>()
            .map_err(|_| Error::invalid("a thread that compresses panicked"))?;
        Ok(done.into_iter().flatten().collect())
    })
}
