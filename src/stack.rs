//! Stack: ordered layers. Resolves a guest range, newest layer first, and reads through all.
//!
//! What is behind the end of a layer reads as zeros through it, whatever the layers below have there.
//! In the stack of a descriptor every layer has the same cluster size, and an upper one is never
//! smaller than a lower one ([`Stack::new`]); the images of a backing chain are of any size
//! ([`Stack::of_chain`]). Only the top is ever written, and not by this file. What even layers say is
//! kept in a merged map ([`crate::merged`]), so that many cost no more to ask than two.
//!
//! A stack never changes: a disk that gets another layer gets another stack ([`crate::hold`]). The
//! layers that both have, with what they keep in memory, are shared.

use crate::merged::{Merged, Place};
use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use ploop_formats::layer::{Below, Extent, Geometry, Layer, Place as Placed, Reservation};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::{self, Ploop};
use ploop_formats::qcow2::{self, Qcow2};
use ploop_formats::raw::Raw;
use ploop_formats::store::{Reach, Space, Store};
use ploop_formats::units::VirtCluster;
use ploop_formats::{Error, Kind, Result, buf, limits};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Bytes of buffers for copies that are kept, and of the largest of them.
const SPARES_BYTES: usize = 1 << 20;
const SPARE_MAX: u64 = 1 << 20;
/// Bytes that copies of one disk hold in memory, and what they are counted in.
const COPIES_BYTES: u64 = 16 << 20;
const COPY_UNIT: u64 = 4096;
/// Compressed clusters that one disk unpacks at the same time: each takes two clusters of memory.
const UNPACKED_AT_ONCE: usize = 4;
/// Parts of one read that are under way at the same time: as many as the largest transfer has ploop
/// clusters. Those of qcow2 may be 64 times smaller.
const PARTS_AT_ONCE: usize = 1024;

/// A layer of any format.
#[derive(Debug)]
pub enum AnyLayer<S> {
    /// A ploop delta.
    Ploop(Ploop<S>),
    /// A flat file, lowest only.
    Raw(Raw<S>),
    /// A qcow2 image.
    Qcow2(Box<Qcow2<S>>),
}

/// A cluster that a layer of any format handed out.
#[derive(Debug)]
pub enum AnyReserved {
    /// Of a ploop delta.
    Ploop(ploop::Reserved),
    /// Of a qcow2 image.
    Qcow2(qcow2::Reserved),
}

/// Calls the same method on whichever reservation it is.
macro_rules! of_any {
    ($any:expr, $reserved:ident => $call:expr) => {
        match $any {
            AnyReserved::Ploop($reserved) => $call,
            AnyReserved::Qcow2($reserved) => $call,
        }
    };
}

impl AnyReserved {
    /// Others still read what the cluster had ([`qcow2::Reserved::leave_old`]). That of a ploop delta keeps
    /// its place.
    pub fn leave_old(&mut self) {
        if let Self::Qcow2(reserved) = self {
            reserved.leave_old();
        }
    }
}

impl Reservation for AnyReserved {
    fn host(&self) -> u64 {
        of_any!(self, reserved => reserved.host())
    }

    fn submitted(&mut self) {
        of_any!(self, reserved => reserved.submitted());
    }

    fn piece(&self) -> Option<u64> {
        of_any!(self, reserved => reserved.piece())
    }

    fn is_new(&self) -> bool {
        of_any!(self, reserved => reserved.is_new())
    }

    fn filled(&mut self, from: u64, to: u64) {
        of_any!(self, reserved => reserved.filled(from, to));
    }
}

/// Calls the same method on whichever layer it is.
macro_rules! each {
    ($any:expr, $layer:ident => $call:expr) => {
        match $any {
            AnyLayer::Ploop($layer) => $call,
            AnyLayer::Raw($layer) => $call,
            AnyLayer::Qcow2($layer) => $call,
        }
    };
}

/// The size that is wanted, in bytes; it is rounded up to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewSize {
    /// No less than there are.
    Larger(u64),
    /// No more than there are: who asks vouches that nobody wants what is behind it.
    Smaller(u64),
}

impl NewSize {
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Larger(size) | Self::Smaller(size) => size,
        }
    }
}

impl<S: Store> AnyLayer<S> {
    /// Whether clusters come and go in it; a raw image has all of them always, and so has an external
    /// data file.
    pub fn allocates(&self) -> bool {
        match self {
            AnyLayer::Ploop(_) => true,
            AnyLayer::Raw(_) => false,
            AnyLayer::Qcow2(layer) => !layer.header().has_data_file(),
        }
    }

    /// File offset below which no guest data may ever be written: header and table.
    fn data_floor(&self) -> u64 {
        match self {
            AnyLayer::Ploop(layer) => {
                let header = layer.header();
                header.cluster.start(header.data_start)
            }
            AnyLayer::Raw(_) => 0,
            AnyLayer::Qcow2(layer) if layer.header().has_data_file() => 0,
            // What else holds metadata the image knows.
            AnyLayer::Qcow2(layer) => layer.geometry().cluster.bytes(),
        }
    }

    /// Whether a failed flush forbids further success until the disk is closed and checked.
    pub fn is_poisoned(&self) -> bool {
        each!(self, layer => layer.is_poisoned())
    }

    /// Opens its files anew for writing, as what it is.
    pub async fn open_again(&self, ledger: Ledger) -> Result<Self>
    where
        S: Clone,
    {
        Ok(match self {
            AnyLayer::Ploop(layer) => {
                AnyLayer::Ploop(Ploop::open_write(layer.store().clone(), ledger).await?)
            }
            AnyLayer::Raw(layer) => {
                let (store, cluster) = (layer.store().clone(), layer.geometry().cluster);
                AnyLayer::Raw(Raw::open_write(store, cluster, ledger)?)
            }
            AnyLayer::Qcow2(layer) => {
                let (image, data) = (layer.metadata().clone(), layer.data_file().cloned());
                AnyLayer::Qcow2(Box::new(Qcow2::open_write(image, data, ledger).await?))
            }
        })
    }

    /// Grows it, as its format says ([`Ploop::grow`], [`Raw::grow`], [`Qcow2::resize`]).
    pub async fn grow(&mut self, size: u64) -> Result<()>
    where
        S: Clone,
    {
        match self {
            AnyLayer::Ploop(layer) => layer.grow(size).await,
            AnyLayer::Raw(layer) => layer.grow(size).await,
            AnyLayer::Qcow2(layer) => layer.resize(size, true).await,
        }
    }

    /// The size that it would grow to, in bytes; `Invalid` when it cannot.
    pub fn grown(&self, size: u64) -> Result<u64> {
        match self {
            AnyLayer::Ploop(layer) => Ok(layer.header().grown(size)?.geometry().size),
            AnyLayer::Raw(layer) => layer.grown(size),
            AnyLayer::Qcow2(layer) => layer.resized(size, true),
        }
    }

    /// Gives it another size, just opened for writing ([`Ploop::grow`], [`Ploop::shrink`], those of
    /// [`Raw`], [`Qcow2::resize`]). After an error it is opened anew.
    pub async fn resize(&mut self, to: NewSize) -> Result<()>
    where
        S: Clone,
    {
        match (to, self) {
            (NewSize::Larger(size), layer) => layer.grow(size).await,
            (NewSize::Smaller(size), AnyLayer::Ploop(layer)) => layer.shrink(size).await,
            (NewSize::Smaller(size), AnyLayer::Raw(layer)) => layer.shrink(size).await,
            (NewSize::Smaller(size), AnyLayer::Qcow2(layer)) => layer.resize(size, false).await,
        }
    }

    /// The size that it would have, in bytes; `Invalid` when it cannot.
    fn resized(&self, to: NewSize) -> Result<u64> {
        match (to, self) {
            (NewSize::Larger(size), _) => self.grown(size),
            (NewSize::Smaller(size), AnyLayer::Ploop(layer)) => {
                Ok(layer.header().shrunk(size)?.geometry().size)
            }
            (NewSize::Smaller(size), AnyLayer::Raw(layer)) => layer.shrunk(size),
            (NewSize::Smaller(size), AnyLayer::Qcow2(layer)) => layer.resized(size, false),
        }
    }

    /// Forbids further success. A raw image has nothing that could be half written but data.
    fn poison(&self) {
        match self {
            AnyLayer::Ploop(layer) => layer.poison(),
            AnyLayer::Qcow2(layer) => layer.poison(),
            AnyLayer::Raw(_) => {}
        }
    }

    /// Whether answered changes wait for a flush to become durable.
    fn has_pending(&self) -> bool {
        match self {
            AnyLayer::Ploop(layer) => layer.has_pending(),
            AnyLayer::Qcow2(layer) => layer.has_pending(),
            AnyLayer::Raw(_) => false,
        }
    }
}

impl<S: Store> Layer for AnyLayer<S> {
    type Store = S;
    type Reservation = AnyReserved;

    fn geometry(&self) -> Geometry {
        each!(self, layer => layer.geometry())
    }

    fn store(&self) -> &S {
        each!(self, layer => layer.store())
    }

    async fn map(&self, guest: u64, len: u64) -> Result<Extent> {
        each!(self, layer => layer.map(guest, len).await)
    }

    async fn unpack(&self, guest: u64, buf: BytesMut) -> Result<BytesMut> {
        each!(self, layer => layer.unpack(guest, buf).await)
    }

    fn is_durable(&self, cluster: VirtCluster) -> bool {
        each!(self, layer => layer.is_durable(cluster))
    }

    async fn place(&self, guest: u64, len: u64) -> Result<Placed> {
        each!(self, layer => layer.place(guest, len).await)
    }

    async fn reserve(&self, cluster: VirtCluster) -> Result<AnyReserved> {
        match self {
            AnyLayer::Ploop(layer) => layer.reserve(cluster).await.map(AnyReserved::Ploop),
            AnyLayer::Qcow2(layer) => layer.reserve(cluster).await.map(AnyReserved::Qcow2),
            AnyLayer::Raw(_) => Err(Error::invalid("a raw image has every cluster")),
        }
    }

    fn publish(&self, cluster: VirtCluster, reserved: AnyReserved, below: Below) {
        match (self, reserved) {
            (AnyLayer::Ploop(layer), AnyReserved::Ploop(reserved)) => {
                layer.publish(cluster, reserved, below);
            }
            (AnyLayer::Qcow2(layer), AnyReserved::Qcow2(reserved)) => {
                layer.publish(cluster, reserved, below);
            }
            // It goes back to the layer that it is of.
            (_, other) => drop(other),
        }
    }

    async fn release(&self, cluster: VirtCluster) -> Result<()> {
        each!(self, layer => layer.release(cluster).await)
    }

    async fn zero(&self, cluster: VirtCluster) -> Result<bool> {
        each!(self, layer => layer.zero(cluster).await)
    }

    async fn sync(&self) -> Result<()> {
        each!(self, layer => layer.sync().await)
    }

    async fn close(&self) -> Result<()> {
        each!(self, layer => layer.close().await)
    }
}

/// How a layer has a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// In its file, at an offset in bytes.
    At(u64),
    /// Compressed: only the layer can give the bytes.
    Packed,
    /// It reads as zeros.
    Zero,
}

/// Where a guest range comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Length in bytes, never 0.
    pub len: u64,
    /// The layer that answers, counted from the base; none when no layer knows the range.
    pub layer: Option<usize>,
    /// How that has it; zeros where there is none.
    pub content: Content,
}

impl Segment {
    /// Where a cluster is that it begins with.
    const fn place(&self) -> Place {
        match (self.layer, self.content) {
            (Some(layer), Content::At(at)) => Place::Data { layer, at },
            (Some(layer), Content::Zero) => Place::Zero { layer },
            (Some(_), Content::Packed) => Place::Mixed,
            (None, _) => Place::Nowhere,
        }
    }

    /// Whether the tables say that it reads as zeros.
    pub fn is_zero(&self) -> bool {
        self.content == Content::Zero
    }
}

/// Refuses layers that a descriptor may not stack: all have the same cluster size, and an upper one
/// is never smaller than a lower one.
fn refuse_uneven<S: Store>(layers: &[Arc<AnyLayer<S>>]) -> Result<()> {
    let top = layers.last().map(|top| top.geometry().cluster.bytes());
    for (i, layer) in layers.iter().enumerate() {
        let (cluster, of_top) = (layer.geometry().cluster.bytes(), top.unwrap_or_default());
        if cluster != of_top {
            return Err(Error::damaged(format!(
                "layer {i} has clusters of {cluster} bytes, the top of {of_top}"
            )));
        }
    }
    let smaller = layers
        .windows(2)
        .position(|w| w[1].geometry().size < w[0].geometry().size);
    match smaller {
        Some(i) => Err(Error::damaged(format!(
            "layer {} is smaller than the one below it",
            i + 1
        ))),
        None => Ok(()),
    }
}

/// The layers of one disk, base first.
#[derive(Debug)]
pub struct Stack<S> {
    layers: Vec<Arc<AnyLayer<S>>>,
    /// The images say themselves what stands on what, and no descriptor does.
    chained: bool,
    align: u64,
    /// The end of the top has begun: nothing is written any more.
    sealed: AtomicBool,
    /// What the layers below the top say; none where asking them is as cheap.
    merged: Option<Merged>,
    /// Memory for copies that are under way, in units of [`COPY_UNIT`].
    copies: Semaphore,
    /// Turns at unpacking compressed clusters.
    unpacks: Semaphore,
    /// Buffers for copies: a fresh one costs its page faults every time.
    spares: Mutex<Vec<BytesMut>>,
}

impl<S: Store> Stack<S> {
    /// Stacks the layers of a descriptor, or a bare image, base first, and refuses what does not fit
    /// together: other clusters, a layer that is smaller than one below it. Layers may be shared with
    /// other stacks, the top only with those whose requests are over.
    pub fn new(layers: impl IntoIterator<Item = impl Into<Arc<AnyLayer<S>>>>) -> Result<Self> {
        let layers: Vec<Arc<AnyLayer<S>>> = layers.into_iter().map(Into::into).collect();
        refuse_uneven(&layers)?;
        Self::of_layers(layers, false)
    }

    /// Stacks the images of a backing chain, base first, which may have clusters and sizes of any
    /// kind. A raw one is the lowest.
    pub fn of_chain(layers: Vec<Arc<AnyLayer<S>>>) -> Result<Self> {
        Self::of_layers(layers, true)
    }

    /// The same with another top, of which all is demanded that was of this one.
    pub fn with_top(&self, top: AnyLayer<S>) -> Result<Self> {
        let below = self.layers.iter().take(self.depth().saturating_sub(1));
        let layers = below.cloned().chain([Arc::new(top)]);
        match self.chained {
            true => Self::of_chain(layers.collect()),
            false => Self::new(layers),
        }
    }

    fn of_layers(layers: Vec<Arc<AnyLayer<S>>>, chained: bool) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::invalid("a stack without layers"));
        }
        if layers.len() > limits::DEPTH_MAX {
            return Err(Error::damaged(format!(
                "{} layers, more than {}",
                layers.len(),
                limits::DEPTH_MAX
            )));
        }
        let is_raw = |layer: &Arc<AnyLayer<S>>| matches!(&**layer, AnyLayer::Raw(_));
        if let Some(i) = layers.iter().skip(1).position(is_raw) {
            return Err(Error::damaged(format!(
                "layer {} is raw; only the lowest may be",
                i + 1
            )));
        }
        let align = layers
            .iter()
            .map(|l| l.store().info().align)
            .max()
            .unwrap_or(1);
        // The map has no words for places in smaller clusters.
        let small =
            |layer: &Arc<AnyLayer<S>>| layer.geometry().cluster.bytes() < limits::CLUSTER_MIN;
        let even = refuse_uneven(&layers).is_ok() && !layers.iter().any(small);
        let merged = (even && layers.len() > 2).then(Merged::default);
        Ok(Self {
            layers,
            chained,
            align,
            sealed: AtomicBool::new(false),
            merged,
            copies: Semaphore::new((COPIES_BYTES / COPY_UNIT) as usize),
            unpacks: Semaphore::new(UNPACKED_AT_ONCE),
            spares: Mutex::default(),
        })
    }

    /// The layers, base first.
    pub fn layers(&self) -> &[Arc<AnyLayer<S>>] {
        &self.layers
    }

    /// The writable layer.
    pub fn top(&self) -> &AnyLayer<S> {
        self.layers.last().expect("a stack has layers")
    }

    /// The size that the disk would have, in bytes; `Invalid` when its top cannot have it. A disk does
    /// not get smaller than a layer below: what that holds behind the end would be seen again when
    /// the disk grows. One over a backing file may, and does not grow then.
    pub fn resized(&self, to: NewSize) -> Result<u64> {
        let size = self.top().resized(to)?;
        if self.chained {
            return self.refuse_longer(size, self.top().geometry().size);
        }
        let larger = |layer: &&Arc<AnyLayer<S>>| layer.geometry().size > size;
        match self.layers.iter().rev().skip(1).find(larger) {
            Some(layer) => Err(Error::invalid(format!(
                "a snapshot below has {} bytes, and what it holds behind the end would be seen again \
                 if the disk grew: delete the snapshots first, or make the disk one image with \
                 `ploopctl convert --flatten`",
                layer.geometry().size
            ))),
            None => Ok(size),
        }
    }

    /// Refuses that a disk of `old` bytes gets more when an image below has more: it would be seen.
    fn refuse_longer(&self, size: u64, old: u64) -> Result<u64> {
        let below = self.layers.iter().rev().skip(1);
        let longest = below.map(|layer| layer.geometry().size).max();
        match longest.filter(|longest| size > old && *longest > old) {
            Some(longest) => Err(Error::invalid(format!(
                "an image that it stands on has {longest} bytes, and what is behind the {old} of the \
                 disk would be seen: make it one image with `qemu-img convert`, or change it with \
                 `qemu-img resize`"
            ))),
            None => Ok(size),
        }
    }

    /// Writes guest data to a place in the top's file. Every guest write passes here.
    ///
    /// # Panics
    /// When the place is in the header or the table, or the top is sealed: a panic costs an export,
    /// that write a disk.
    pub async fn write_data(&self, host: u64, bytes: Bytes, reach: Reach) -> Result<()> {
        let top = self.top();
        assert!(!self.is_sealed(), "guest data for a sealed layer");
        assert!(
            host >= top.data_floor(),
            "guest data at {host}, inside header and table"
        );
        top.store().write_at(host, bytes, reach).await
    }

    /// Zeroes guest data at a place in the top's file.
    ///
    /// # Panics
    /// As [`Stack::write_data`].
    pub async fn punch_data(&self, host: u64, len: u64, space: Space) -> Result<()> {
        let top = self.top();
        assert!(!self.is_sealed(), "a hole in a sealed layer");
        assert!(
            host >= top.data_floor(),
            "a hole at {host}, inside header and table"
        );
        top.store().punch(host, len, space).await
    }

    /// Whether no write or flush can succeed any more: a flush failed, or the top is sealed.
    pub fn is_poisoned(&self) -> bool {
        self.may_write().is_err()
    }

    /// Whether the end of the top has begun. On it nobody goes on: it is opened anew.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Why no write or flush can succeed any more.
    pub fn may_write(&self) -> Result<()> {
        if self.top().is_poisoned() {
            return Err(Error::poisoned());
        }
        if self.is_sealed() {
            return Err(Error::new(
                Kind::Poisoned,
                "the top layer is sealed, and no other has taken its place: attach the disk anew",
            ));
        }
        Ok(())
    }

    /// Forbids further success, to this process and its successors.
    pub fn poison(&self) {
        self.top().poison();
    }

    /// Whether another stack has the very same top.
    pub fn shares_top(&self, other: &Self) -> bool {
        match (self.layers.last(), other.layers.last()) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }

    /// Makes everything answered durable. One at a time; the caller sees to that.
    pub async fn sync(&self) -> Result<()> {
        self.may_write()?;
        self.top().sync().await
    }

    /// Makes everything durable, cuts the top to what is used of it, and marks it clean. The caller
    /// has the disk to itself. Nothing is written to the top from then on, whatever came of it, but
    /// for a final pass that found no space: then all is as before. Any error but `NoSpace` is final.
    pub async fn seal(&self) -> Result<()> {
        self.may_write()?;
        self.sealed.store(true, Ordering::Release);
        let done = self.top().close().await;
        // Nothing is pending once the pass is over.
        if matches!(&done, Err(e) if e.kind() == Kind::NoSpace) && self.has_pending() {
            self.sealed.store(false, Ordering::Release);
        }
        done
    }

    /// Whether the top has answered changes that wait for a flush.
    pub fn has_pending(&self) -> bool {
        self.top().has_pending()
    }

    /// How many layers there are.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Bytes of the smallest cluster that a layer has.
    pub fn finest(&self) -> u64 {
        let clusters = self.layers.iter().map(|l| l.geometry().cluster.bytes());
        clusters.min().unwrap_or(limits::CLUSTER_MIN)
    }

    /// Offsets, lengths and buffers of every I/O are multiples of this.
    pub const fn align(&self) -> u64 {
        self.align
    }

    /// How far layer `i` is looked at. Reads of whole blocks reach past the end of a size that is
    /// no multiple of them; in the top the last cluster is there as a whole, below that is nothing.
    fn reach(&self, i: usize, size: u64) -> u64 {
        if i + 1 == self.layers.len() {
            size.next_multiple_of(self.align)
        } else {
            size
        }
    }

    /// The first segment of a guest range, as the lowest `depth` layers tell it.
    pub async fn resolve(&self, guest: u64, len: u64, depth: usize) -> Result<Segment> {
        let below = self.layers.len() - 1;
        let Some(merged) = self.merged.as_ref().filter(|_| depth >= below) else {
            return self.ask(guest, len, 0..depth).await;
        };
        let mut len = len;
        if depth > below {
            let top = self.ask(guest, len, below..depth).await?;
            if top.layer.is_some() {
                return Ok(top);
            }
            len = top.len;
        }
        let size = self.top().geometry().cluster;
        let Some(cluster) = size.cluster_of(guest) else {
            return self.ask(guest, len, 0..below).await;
        };
        let within = size.within(guest);
        let max = size.count(within.saturating_add(len));
        let (place, clusters) = match merged.find(cluster, max, size) {
            Some(found) => found,
            None => self.learn(merged, cluster, max).await?,
        };
        let len = len.min(clusters * size.bytes() - within);
        let (layer, content) = match place {
            Place::Data { layer, at } => (Some(layer), Content::At(at + within)),
            Place::Zero { layer } => (Some(layer), Content::Zero),
            Place::Nowhere => (None, Content::Zero),
            Place::Mixed => return self.ask(guest, len, 0..below).await,
        };
        Ok(Segment {
            len,
            layer,
            content,
        })
    }

    /// Asks the layers below the top about a cluster and those behind it, at most `max`: where the
    /// first is, and how many go on like that.
    async fn learn(&self, merged: &Merged, cluster: u32, max: u64) -> Result<(Place, u64)> {
        let geometry = self.top().geometry();
        let size = geometry.cluster;
        let (start, bytes) = (size.start(cluster), max * size.bytes());
        let rest = geometry.size.saturating_sub(start);
        let segment = self
            .ask(start, bytes.min(rest), 0..self.layers.len() - 1)
            .await?;
        let found = match size.whole(segment.len) {
            // Also the last one of a disk that ends within it.
            0 => (Place::Mixed, 1),
            whole => (segment.place(), whole),
        };
        merged.keep(cluster, found.0, found.1, size);
        Ok(found)
    }

    /// The first segment of a guest range, as some of the layers tell it, the upper ones first.
    async fn ask(&self, guest: u64, len: u64, among: Range<usize>) -> Result<Segment> {
        let mut len = len;
        for i in among.rev() {
            let Some(layer) = self.layers.get(i) else {
                continue;
            };
            let size = self.reach(i, layer.geometry().size);
            if guest >= size {
                // It ends before, and so does all that is seen through it.
                break;
            }
            let extent = layer.map(guest, len.min(size - guest)).await?;
            len = extent.len();
            let content = match extent {
                Extent::Data { at, .. } => Content::At(at),
                Extent::Packed { .. } => Content::Packed,
                Extent::Zero { .. } => Content::Zero,
                Extent::Absent { .. } => continue,
            };
            return Ok(Segment {
                len,
                layer: Some(i),
                content,
            });
        }
        Ok(Segment {
            len,
            layer: None,
            content: Content::Zero,
        })
    }

    /// Whether the lowest `depth` layers read as zeros in `from .. to` for all that their tables
    /// say.
    pub async fn reads_zero(&self, from: u64, to: u64, depth: usize) -> Result<bool> {
        let mut at = from;
        while at < to {
            let segment = self.resolve(at, to - at, depth).await?;
            if !segment.is_zero() {
                return Ok(false);
            }
            at += segment.len;
        }
        Ok(true)
    }

    /// Fills `buf` from guest offset `guest`, as the lowest `depth` layers have it. Aligned.
    pub async fn read(&self, guest: u64, mut buf: BytesMut, depth: usize) -> Result<BytesMut> {
        let mut whole: Option<BytesMut> = None;
        let mut at = guest;
        while !buf.is_empty() {
            let mut parts = Vec::new();
            while !buf.is_empty() && parts.len() < PARTS_AT_ONCE {
                let segment = self.resolve(at, buf.len() as u64, depth).await?;
                parts.push(self.read_segment(at, segment, buf.split_to(segment.len as usize)));
                at += segment.len;
            }
            if parts.len() == 1 && whole.is_none() && buf.is_empty() {
                return parts.remove(0).await;
            }
            for part in join_all(parts).await {
                match whole.as_mut() {
                    Some(whole) => whole.unsplit(part?),
                    None => whole = Some(part?),
                }
            }
        }
        Ok(whole.unwrap_or(buf))
    }

    async fn read_segment(
        &self,
        guest: u64,
        segment: Segment,
        mut buf: BytesMut,
    ) -> Result<BytesMut> {
        let layer = segment.layer.and_then(|i| self.layers.get(i));
        match (layer, segment.content) {
            (Some(layer), Content::At(at)) => layer.store().read_at(at, buf).await,
            (Some(layer), Content::Packed) => {
                let _turn = self.unpacks.acquire().await.expect("it is never closed");
                layer.unpack(guest, buf).await
            }
            _ => {
                buf.fill(0);
                Ok(buf)
            }
        }
    }

    /// Fills `buf` from guest offset `guest`, as all layers have it. Of any alignment.
    pub async fn read_any(&self, guest: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let depth = self.layers.len();
        let len = buf.len();
        let aligned = [guest, len as u64]
            .iter()
            .all(|n| n.is_multiple_of(self.align))
            && buf::is_aligned(&buf, self.align as usize);
        if len == 0 {
            return Ok(buf);
        }
        if aligned {
            return self.read(guest, buf, depth).await;
        }
        let bytes = self.read_unaligned(guest, len, depth).await?;
        buf.copy_from_slice(&bytes);
        Ok(buf)
    }

    /// Waits until a copy of `len` bytes may be held in memory, which it may as long as the permit
    /// is. Who asked for it pays for the bytes of a request, not for those around them.
    pub async fn copying(&self, len: u64) -> SemaphorePermit<'_> {
        // As read, and once more where what is wanted is not aligned.
        let bytes = (2 * len).min(COPIES_BYTES);
        let permit = self.copies.acquire_many(bytes.div_ceil(COPY_UNIT) as u32);
        permit.await.expect("it is never closed")
    }

    /// An aligned buffer of `len` bytes to fill; what it holds is arbitrary.
    pub fn lend(&self, len: usize) -> BytesMut {
        let spare = self.spares().pop();
        match spare.filter(|spare| spare.capacity() >= len) {
            Some(mut spare) => {
                spare.resize(len, 0);
                spare
            }
            None => buf::aligned(len),
        }
    }

    /// Takes a buffer back once nobody else holds it, and keeps it when it is one that
    /// [`Stack::lend`] gave, whole, and there is room.
    pub fn take_back(&self, bytes: Bytes) {
        let whole = self.top().geometry().cluster.bytes().min(SPARE_MAX) as usize;
        if bytes.len() < whole || !buf::is_aligned(&bytes, buf::ALIGN) {
            return;
        }
        let Ok(spare) = bytes.try_into_mut() else {
            return;
        };
        let mut spares = self.spares();
        if spares.len() < SPARES_BYTES / whole {
            spares.push(spare);
        }
    }

    fn spares(&self) -> MutexGuard<'_, Vec<BytesMut>> {
        self.spares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Stack::read`], of any alignment: reads whole blocks and copies.
    pub async fn read_unaligned(&self, guest: u64, len: usize, depth: usize) -> Result<BytesMut> {
        let from = guest / self.align * self.align;
        let to = (guest + len as u64).next_multiple_of(self.align);
        let mut wide = self
            .read(from, buf::aligned((to - from) as usize), depth)
            .await?;
        let mut inner = wide.split_off((guest - from) as usize);
        inner.truncate(len);
        Ok(inner)
    }
}
