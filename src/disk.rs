//! Disk: the device over a stack of layers. The life of every request is here.
//!
//! A request is admitted to its clusters ([`crate::flight`]), resolved, carried out, answered.
//! Requests that change where a cluster is have it to themselves. No lock is held across I/O.
//! What a request is admitted to is also the stack of that moment: it keeps it to its end, and the
//! disk gets another one only while no request is admitted ([`crate::hold`]).

use crate::cow::{self, Piece};
use crate::device::{Device, GuestExtent, Zero};
use crate::flight::{Admitted, Flight, Mode};
use crate::flush::Flush;
use crate::hold::Hold;
use crate::stack::{AnyLayer, Content, Segment, Stack};
use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use ploop_formats::layer::{Extent, Layer, Place};
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::{Reach, Space, Store};
use ploop_formats::units::{ClusterSize, SECTOR, VirtCluster};
use ploop_formats::{Error, Kind, Result, buf, limits};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;

/// Clusters that one step of a long zero or discard has to itself.
const ZERO_STEP: u64 = 1024;
/// Bytes that one request describes at most, and clusters: more would take a second to look at.
const DESCRIBE_MAX: u64 = 256 << 30;
const DESCRIBE_CLUSTERS: u64 = 8 << 20;

/// A virtual disk.
#[derive(Debug)]
pub struct Disk<S> {
    stack: ArcSwap<Stack<S>>,
    /// The same in every stack.
    cluster: ClusterSize,
    /// That of the stack, for those who ask before they are admitted to it.
    size: AtomicU64,
    flight: Flight,
    flush: Flush,
    /// Something may wait for a flush.
    changed: Notify,
    /// It failed for good.
    poisoned: Notify,
    read_only: bool,
}

/// A request in flight, and the stack that it is carried out on. The stack is let go of first: who
/// has the disk to himself is not to find users of an old one.
pub(crate) struct Request<S> {
    pub(crate) stack: Arc<Stack<S>>,
    _admitted: Admitted,
}

/// What becomes of a range that shall not hold its data any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wipe {
    /// Reads as zeros, space given back where possible.
    Free,
    /// Reads as zeros, space taken.
    Keep,
    /// Contents do not matter: never worth a copy or a new cluster.
    Advise,
}

impl<S: Store> Disk<S> {
    /// A disk over the layers of a descriptor, base first. The top is written unless `read_only`.
    pub fn new(
        layers: impl IntoIterator<Item = impl Into<Arc<AnyLayer<S>>>>,
        read_only: bool,
    ) -> Result<Self> {
        Ok(Self::over(Stack::new(layers)?, read_only))
    }

    /// A disk over a stack of any kind.
    pub fn over(stack: Stack<S>, read_only: bool) -> Self {
        let stack = Arc::new(stack);
        let disk = Self {
            cluster: stack.top().geometry().cluster,
            size: AtomicU64::new(stack.top().geometry().size),
            stack: ArcSwap::new(Arc::clone(&stack)),
            flight: Flight::default(),
            flush: Flush::default(),
            changed: Notify::new(),
            poisoned: Notify::new(),
            read_only,
        };
        disk.announce(&stack);
        disk
    }

    /// Wakes those who wait for what is true of `stack` from the start: a predecessor's answers
    /// wait for a flush, or it has failed.
    fn announce(&self, stack: &Stack<S>) {
        if stack.is_poisoned() {
            self.poisoned.notify_one();
        }
        if stack.has_pending() {
            self.changed.notify_one();
        }
    }

    /// The layers, as they are now: the disk may get others while requests run.
    pub fn stack(&self) -> Arc<Stack<S>> {
        self.stack.load_full()
    }

    /// Has the disk to itself: returns once every request and flush that was called before is over.
    /// Those that come later wait, in the order of their coming, until the hold is dropped or
    /// consumed.
    pub async fn hold(&self) -> Hold<'_, S> {
        // In this order: a request that is admitted may need a flush to end.
        let requests = self.flight.admit(0, u64::MAX, Mode::Exclusive).await;
        let flushes = match planted::is(Bug::HoldWithoutFlushes) {
            true => None,
            false => Some(self.flush.hold_off().await),
        };
        Hold::new(self, flushes, requests)
    }

    /// Puts another stack in the place of this one. The caller has the disk to itself.
    pub(crate) fn replace(&self, stack: Stack<S>) {
        let stack = Arc::new(stack);
        self.stack.store(Arc::clone(&stack));
        let size = stack.top().geometry().size;
        self.size.store(size, Ordering::Release);
        self.announce(&stack);
    }

    pub(crate) const fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Says that the disk has failed, for those who wait for that.
    pub(crate) fn failed(&self) {
        self.poisoned.notify_one();
    }

    /// Makes everything durable and marks the top clean. Nobody asks for anything any more.
    pub async fn close(&self) -> Result<()> {
        self.hold().await.end().await
    }

    /// Says that something may wait for a flush.
    pub(crate) fn is_changed(&self) {
        self.changed.notify_one();
    }

    /// Returns once something may wait for a flush: an idle disk wakes nobody.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns once no flush can succeed any more.
    pub async fn poisoned(&self) {
        loop {
            self.poisoned.notified().await;
            // What was said of a top that is no more concerns nobody.
            if self.stack().is_poisoned() {
                return;
            }
        }
    }

    /// Makes durable what waits for a flush that nobody asked for; nothing when nothing waits.
    /// Called now and then, it bounds what power loss can take and returns discarded space.
    pub async fn write_back(&self) -> Result<()> {
        if self.read_only || !self.stack().has_pending() {
            return Ok(());
        }
        let done = self.flush_once().await;
        if done.is_err() {
            self.changed.notify_one();
        }
        done
    }

    /// Refuses a range outside the disk.
    fn check(&self, at: u64, len: u64) -> Result<()> {
        within(at, len, self.size())
    }

    fn check_write(&self, at: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::new(Kind::ReadOnly, "the disk is attached read-only"));
        }
        self.check(at, len)
    }

    /// Admits a request to the clusters of a byte range, which is not empty. Refuses one that waited
    /// while the disk got smaller, and lies behind its end now.
    pub(crate) async fn admit(&self, at: u64, len: u64, mode: Mode) -> Result<Request<S>> {
        let size = self.cluster.bytes();
        let early = planted::is(Bug::StackBeforeAdmission).then(|| self.stack());
        let admitted = self
            .flight
            .admit(at / size, (at + len - 1) / size, mode)
            .await;
        let stack = early.unwrap_or_else(|| self.stack());
        within(at, len, stack.top().geometry().size)?;
        Ok(Request {
            stack,
            _admitted: admitted,
        })
    }

    /// As [`Disk::admit`], for one that changes the disk, which has not failed.
    pub(crate) async fn admit_change(&self, at: u64, len: u64, mode: Mode) -> Result<Request<S>> {
        let request = self.admit(at, len, mode).await?;
        let may = request.stack.may_write();
        may.inspect_err(|_| self.poisoned.notify_one())?;
        Ok(request)
    }

    /// Repeats `step` after a flush as long as the table of pending changes is full.
    pub(crate) async fn with_room<T, F: Future<Output = Result<T>>>(
        &self,
        step: impl Fn() -> F,
    ) -> Result<T> {
        loop {
            match step().await {
                Err(e) if e.kind() == Kind::Pending => self.flush_once().await?,
                done => return done,
            }
        }
    }

    /// Runs a pass on the stack that is there when its turn comes, or joins one. What was answered
    /// on an older stack is durable since that was sealed.
    pub(crate) async fn flush_once(&self) -> Result<()> {
        let pass = async || {
            let stack = self.stack();
            let done = stack.sync().await;
            if done.is_err() && stack.is_poisoned() {
                self.poisoned.notify_one();
            }
            done
        };
        self.flush.join(pass).await
    }

    /// Whether a write to this range is durable as soon as its bytes are.
    fn is_durable(&self, stack: &Stack<S>, at: u64, len: u64) -> bool {
        let size = self.cluster;
        let (Some(first), Some(last)) = (size.cluster_of(at), size.cluster_of(at + len - 1)) else {
            return false;
        };
        (first..=last).all(|n| stack.top().is_durable(VirtCluster(n)))
    }

    /// Writes where every cluster has its place and the request is aligned; gives the request
    /// back otherwise.
    async fn write_in_place(&self, at: u64, data: &Bytes, fua: bool) -> Result<bool> {
        let shared = self.admit_change(at, data.len() as u64, Mode::Shared);
        let shared = shared.await?;
        let stack = &*shared.stack;
        if !is_aligned(stack, at, data) {
            return Ok(false);
        }
        let mut parts = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let left = (data.len() - done) as u64;
            let Place::Here { at: host, len } = stack.top().place(at + done as u64, left).await?
            else {
                return Ok(false);
            };
            parts.push((host, data.slice(done..done + len as usize)));
            done += len as usize;
        }
        let durable = fua
            && (planted::is(Bug::FuaIgnoresIndex) || self.is_durable(stack, at, data.len() as u64));
        let reach = if durable {
            Reach::Durable
        } else {
            Reach::Cache
        };
        let writes = parts
            .into_iter()
            .map(|(host, bytes)| stack.write_data(host, bytes, reach));
        let written = all(writes).await;
        drop(shared);
        if durable && written.is_err() {
            // The store may have heard here, and never again, that earlier data is lost: then its
            // flush fails, which whoever comes after this process finds written down.
            let _ = self.flush_once().await;
        }
        written?;
        if fua && !durable {
            self.flush_once().await?;
        }
        Ok(true)
    }

    /// Writes with the clusters to itself: new clusters, and blocks written in part.
    async fn write_exclusive(&self, at: u64, data: &Bytes) -> Result<()> {
        let mode = match planted::is(Bug::CopyUpUnderShared) {
            true => Mode::Shared,
            false => Mode::Exclusive,
        };
        let exclusive = self.admit_change(at, data.len() as u64, mode).await?;
        let stack = &*exclusive.stack;
        let mut old = Vec::new();
        let mut new: Vec<(u32, Vec<Piece>)> = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let guest = at + done as u64;
            let left = (data.len() - done) as u64;
            let len = match stack.top().place(guest, left).await? {
                Place::Here { at: host, len } => {
                    old.push(overwrite(
                        stack,
                        host,
                        data.slice(done..done + len as usize),
                    ));
                    len
                }
                Place::New { len } => {
                    let within = self.cluster.within(guest);
                    let len = len.min(self.cluster.bytes() - within);
                    let bytes = data.slice(done..done + len as usize);
                    let (cluster, piece) =
                        (self.table_index(guest)?, Piece::Data { at: guest, bytes });
                    match new.last_mut() {
                        Some((last, pieces)) if *last == cluster => pieces.push(piece),
                        _ => new.push((cluster, vec![piece])),
                    }
                    len
                }
            };
            done += len as usize;
        }
        let new = new
            .into_iter()
            .map(|(cluster, pieces)| self.fill(stack, cluster, pieces));
        let (old, new) = futures_util::future::join(all(old), all(new)).await;
        old.and(new)
    }

    /// Fills in pieces of one cluster, one after the other.
    async fn fill(&self, stack: &Stack<S>, cluster: u32, pieces: Vec<Piece>) -> Result<()> {
        for piece in pieces {
            self.with_room(|| cow::fill(stack, cluster, piece.clone()))
                .await?;
        }
        Ok(())
    }

    fn table_index(&self, guest: u64) -> Result<u32> {
        self.cluster
            .cluster_of(guest)
            .ok_or_else(|| Error::invalid("offset past the table"))
    }

    /// Wipes a range in steps, each with its clusters to itself.
    async fn wipe(&self, at: u64, len: u64, how: Wipe) -> Result<()> {
        let step = ZERO_STEP * self.cluster.bytes();
        let end = at + len;
        let mut at = at;
        while at < end {
            let to = end.min((at / step + 1) * step);
            let exclusive = self.admit_change(at, to - at, Mode::Exclusive).await?;
            let wiped = self.wipe_step(&exclusive.stack, at, to, how).await;
            self.changed.notify_one();
            wiped?;
            at = to;
        }
        Ok(())
    }

    async fn wipe_step(&self, stack: &Stack<S>, from: u64, to: u64, how: Wipe) -> Result<()> {
        let mut at = from;
        while at < to {
            at += match stack.top().place(at, to - at).await? {
                Place::Here { at: host, len } => {
                    self.wipe_present(stack, at..to, host, len, how).await?
                }
                Place::New { len } => self.wipe_absent(stack, at..to, len, how).await?,
            };
        }
        Ok(())
    }

    /// Bytes of a range that are in its first cluster.
    fn in_first(&self, range: &Range<u64>) -> u64 {
        let rest = self.cluster.bytes() - self.cluster.within(range.start);
        rest.min(range.end - range.start)
    }

    /// Wipes the start of a range, of which the top has `len` bytes at `host`; how much of it was done.
    async fn wipe_present(
        &self,
        stack: &Stack<S>,
        range: Range<u64>,
        host: u64,
        len: u64,
        how: Wipe,
    ) -> Result<u64> {
        let in_first = self.in_first(&range);
        let guest = range.start;
        if how != Wipe::Keep && self.give_up_whole(stack, guest, in_first).await? {
            return Ok(in_first);
        }
        let len = len.min(in_first);
        if how == Wipe::Advise && !stack.top().store().info().punches {
            return Ok(len);
        }
        let space = if how == Wipe::Keep {
            Space::Keep
        } else {
            Space::Free
        };
        stack.punch_data(host, len, space).await?;
        Ok(len)
    }

    /// Takes a range out of the top if it is a whole cluster: zeros are what is below, or the top can
    /// say that it reads as zeros; whether.
    async fn give_up_whole(&self, stack: &Stack<S>, guest: u64, len: u64) -> Result<bool> {
        let (size, top) = (self.cluster, stack.top());
        let end = (guest - size.within(guest) + size.bytes()).min(top.geometry().size);
        if size.within(guest) != 0 || guest + len != end || !top.allocates() {
            return Ok(false);
        }
        let cluster = VirtCluster(self.table_index(guest)?);
        let exposed = planted::is(Bug::DiscardExposesParent);
        if !exposed && !stack.reads_zero(guest, end, stack.depth() - 1).await? {
            return self.with_room(|| top.zero(cluster)).await;
        }
        self.with_room(|| top.release(cluster)).await?;
        Ok(true)
    }

    /// Wipes the start of a range, of which `len` bytes have no place of their own in the top; how much
    /// of it was done.
    async fn wipe_absent(
        &self,
        stack: &Stack<S>,
        range: Range<u64>,
        len: u64,
        how: Wipe,
    ) -> Result<u64> {
        let in_first = self.in_first(&range);
        let guest = range.start;
        // To the end of a cluster: the rest of one that is there in part is wiped with it.
        let absent = match stack.top().map(guest, len).await? {
            Extent::Absent { len } if len >= in_first => {
                Some((len - self.cluster.within(guest + len).min(len)).max(in_first))
            }
            _ => None,
        };
        if absent.is_none() && how != Wipe::Keep {
            let whole = self.give_up_whole(stack, guest, in_first);
            if whole.await? {
                return Ok(in_first);
            }
        }
        let len = absent.unwrap_or(len.min(in_first));
        if how == Wipe::Advise {
            return Ok(len);
        }
        let found = stack.resolve(guest, len, stack.depth()).await?;
        if found.is_zero() && how == Wipe::Free {
            return Ok(found.len);
        }
        if how == Wipe::Free && self.give_up_whole(stack, guest, in_first).await? {
            return Ok(in_first);
        }
        let len = found.len.min(in_first);
        let piece = Piece::Zero {
            from: guest,
            to: guest + len,
            keep: how == Wipe::Keep,
        };
        self.fill(stack, self.table_index(guest)?, vec![piece])
            .await?;
        Ok(len)
    }

    /// Whether wiping the range needs no copy of parent data: its partial clusters have a place
    /// in the top, or zeros below.
    async fn wipes_fast(&self, at: u64, len: u64) -> Result<bool> {
        let shared = self.admit(at, len, Mode::Shared).await?;
        let stack = &*shared.stack;
        let size = self.cluster;
        for edge in [at, at + len - 1] {
            let start = edge - size.within(edge);
            let end = (start + size.bytes()).min(stack.top().geometry().size);
            let partial = at > start || at + len < end;
            let new = matches!(stack.top().place(edge, 1).await?, Place::New { .. });
            if partial && new && !stack.reads_zero(start, end, stack.depth()).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn within(at: u64, len: u64, size: u64) -> Result<()> {
    match at.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::invalid(format!(
            "{len} bytes at {at} reach past the end of the disk ({size} bytes)"
        ))),
    }
}

fn is_aligned<S: Store>(stack: &Stack<S>, at: u64, data: &[u8]) -> bool {
    let align = stack.align();
    at.is_multiple_of(align)
        && (data.len() as u64).is_multiple_of(align)
        && buf::is_aligned(data, align as usize)
}

/// Writes to a place in the top's file, any alignment: whole blocks around it are read first.
async fn overwrite<S: Store>(stack: &Stack<S>, host: u64, bytes: Bytes) -> Result<()> {
    if is_aligned(stack, host, &bytes) {
        return stack.write_data(host, bytes, Reach::Cache).await;
    }
    let align = stack.align();
    let from = host / align * align;
    let to = (host + bytes.len() as u64).next_multiple_of(align);
    let block = buf::aligned((to - from) as usize);
    let mut whole = stack.top().store().read_at(from, block).await?;
    whole[(host - from) as usize..][..bytes.len()].copy_from_slice(&bytes);
    stack.write_data(from, whole.freeze(), Reach::Cache).await
}

/// How a segment is stored; holes in the file of a layer read as zeros.
async fn extent_of<S: Store>(stack: &Stack<S>, segment: Segment) -> Result<GuestExtent> {
    let depth = segment.layer.map_or(0, |i| (stack.depth() - i) as u32);
    let hole = GuestExtent {
        len: segment.len,
        zero: true,
        hole: true,
        depth,
    };
    let data = GuestExtent {
        zero: false,
        hole: false,
        ..hole
    };
    let layer = segment.layer.and_then(|i| stack.layers().get(i));
    let (layer, at) = match (layer, segment.content) {
        (Some(layer), Content::At(at)) => (layer, at),
        (Some(_), Content::Packed) => return Ok(data),
        _ => return Ok(hole),
    };
    let (is_data, until) = layer.store().extent(at).await?;
    let len = segment.len.min(until.saturating_sub(at).max(1));
    let extent = if is_data { data } else { hole };
    Ok(GuestExtent { len, ..extent })
}

/// Runs all to their end, whatever happens to any, and gives the first failure.
pub(crate) async fn all<F: Future<Output = Result<()>>>(
    work: impl IntoIterator<Item = F>,
) -> Result<()> {
    let mut work: Vec<F> = work.into_iter().collect();
    match work.len() {
        0 => Ok(()),
        1 => work.remove(0).await,
        _ => join_all(work).await.into_iter().collect(),
    }
}

impl<S: Store> Device for Disk<S> {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn preferred_block(&self) -> u64 {
        self.cluster.bytes()
    }

    async fn read(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.check(at, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(buf);
        }
        let shared = self.admit(at, buf.len() as u64, Mode::Shared).await?;
        let stack = &*shared.stack;
        if is_aligned(stack, at, &buf) {
            return stack.read(at, buf, stack.depth()).await;
        }
        let mut buf = buf;
        let bytes = stack.read_unaligned(at, buf.len(), stack.depth()).await?;
        buf.copy_from_slice(&bytes);
        Ok(buf)
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> Result<()> {
        self.check_write(at, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        if self.write_in_place(at, &data, fua).await? {
            return Ok(());
        }
        let written = self.write_exclusive(at, &data).await;
        self.changed.notify_one();
        written?;
        if fua { self.flush_once().await } else { Ok(()) }
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> Result<()> {
        self.check_write(at, len)?;
        if len == 0 {
            return Ok(());
        }
        if how == Zero::Fast && !self.wipes_fast(at, len).await? {
            return Err(Error::unsupported(
                "zeroing part of a cluster over a parent is no faster",
            ));
        }
        self.wipe(
            at,
            len,
            if how == Zero::Allocate {
                Wipe::Keep
            } else {
                Wipe::Free
            },
        )
        .await?;
        if fua { self.flush_once().await } else { Ok(()) }
    }

    async fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.check_write(at, len)?;
        if len == 0 {
            return Ok(());
        }
        self.wipe(at, len, Wipe::Advise).await
    }

    async fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.flush_once().await
    }

    async fn extents(&self, at: u64, len: u64, max: usize) -> Result<Vec<GuestExtent>> {
        self.check(at, len)?;
        let mut out: Vec<GuestExtent> = Vec::new();
        let most = DESCRIBE_CLUSTERS.saturating_mul(self.stack().finest());
        let end = at + len.min(DESCRIBE_MAX).min(most);
        let mut at = at;
        while at < end {
            let shared = self.admit(at, 1, Mode::Shared).await?;
            let stack = &*shared.stack;
            let len = (end - at).min(limits::TRANSFER_MAX);
            let segment = stack.resolve(at, len, stack.depth()).await?;
            let mut extent = extent_of(stack, segment).await?;
            if !extent.zero {
                // The file of a layer may end within a sector, whose rest reads as zeros.
                extent.len = (at + extent.len).next_multiple_of(SECTOR).min(end) - at;
            }
            at += extent.len;
            let full = out.len() == max;
            match out.last_mut() {
                Some(last)
                    if GuestExtent {
                        len: last.len,
                        ..extent
                    } == *last =>
                {
                    last.len += extent.len;
                }
                _ if full => break,
                _ => out.push(extent),
            }
        }
        Ok(out)
    }
}
