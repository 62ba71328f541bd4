//! Copy: every cluster of one delta into the one below it, or what a stack reads as into a new image.
//!
//! Ordering: a cluster is named by the lower delta's table only when all of it is written, and the
//! flush pass makes the data durable first. A cluster that the lower delta has is overwritten in
//! place: the upper one hides it as long as this can be cut. Passes of the lower delta run beside the
//! copying, so that a host's memory is not filled with what then has to be written all at once. Memory
//! is bounded whatever the cluster size. A cluster that one of two deltas has in part is copied by
//! [`super::parts`].
//!
//! In a new image nothing is hidden by what is not there: zeros are not stored, and holes of a
//! source's files are not read.

use super::parts::{self, Rest};
use crate::stack::{AnyLayer, AnyReserved, Content, Stack};
use bytes::BytesMut;
use futures_util::stream::{FuturesUnordered, StreamExt};
use ploop_formats::layer::{Below, Extent, Geometry, Layer, Place, Reservation};
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::store::{Reach, Store};
use ploop_formats::units::{ClusterSize, VirtCluster};
use ploop_formats::{Error, Kind, Result, buf};
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// Reads and writes at once.
const AT_ONCE: usize = 128;

/// How a copy is watched and slowed down.
pub struct Work<'a> {
    watch: &'a mut dyn Watch,
    pace: &'a dyn Pace,
    window: Window,
}

impl<'a> Work<'a> {
    /// `watch` is told how far it is, and may end it; `pace` returns when more may be copied.
    pub fn new(watch: &'a mut dyn Watch, pace: &'a dyn Pace) -> Self {
        let window = Window::default();
        Self {
            watch,
            pace,
            window,
        }
    }

    /// How much is under way at once.
    pub const fn window(&self) -> Window {
        self.window
    }

    /// Who is told.
    pub fn watch(&mut self) -> &mut dyn Watch {
        self.watch
    }

    /// Returns when `bytes` more may be copied.
    pub async fn wait(&self, bytes: u64) {
        self.pace.wait(bytes).await;
    }

    /// The same with another window.
    #[must_use]
    pub fn within(self, window: Window) -> Self {
        Self { window, ..self }
    }
}

/// How much is under way at once, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Held in memory; no less than `step`.
    pub memory: u64,
    /// Of one read or write; also what is copied between two reports.
    pub step: u64,
    /// Copied after which a pass begins.
    pub unsynced: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            memory: 8 << 20,
            step: 1 << 20,
            unsynced: 32 << 20,
        }
    }
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

/// Copies all that `from` has into `to`, which is below it, stands on `rest`, and is at least as large;
/// the bytes copied. They are durable once `to` is closed.
pub async fn copy<S: Store>(
    from: &AnyLayer<S>,
    to: &AnyLayer<S>,
    rest: &Rest<S>,
    work: &mut Work<'_>,
) -> Result<u64> {
    carry_out(Source::Delta(from, rest), to, work).await
}

/// Copies what a stack reads as into `to`, a new image that is at least as large and reads as zeros. Zeros
/// are not written. The bytes looked at; all is durable once `to` is closed.
pub async fn flatten<S: Store>(
    from: &Stack<S>,
    to: &AnyLayer<S>,
    work: &mut Work<'_>,
) -> Result<u64> {
    carry_out(Source::Stack(from), to, work).await
}

/// From `at`, the beginning of a cluster, to where the tables and holes of a stack say something else,
/// in whole clusters or up to the end of the disk, and whether there may be anything but zeros.
pub async fn run<S: Store>(stack: &Stack<S>, cluster: ClusterSize, at: u64) -> Result<(u64, bool)> {
    let (len, run) = Source::Stack(stack).run(cluster, at).await?;
    Ok((len, run != Run::Nothing))
}

async fn carry_out<S: Store>(
    from: Source<'_, S>,
    to: &AnyLayer<S>,
    work: &mut Work<'_>,
) -> Result<u64> {
    let mut copying = Copying::new(from, to, work.window);
    let done = copying.run(work).await;
    // What was begun lands before anybody closes the file.
    while copying.under_way.next().await.is_some() {}
    done.map(|()| copying.copied)
}

/// Where bytes come from.
enum Source<'a, S> {
    /// A delta, for the one below it, which stands on something: what it has is taken as it is, zeros
    /// too.
    Delta(&'a AnyLayer<S>, &'a Rest<S>),
    /// What a guest reads, for a new image.
    Stack(&'a Stack<S>),
}

impl<S> Clone for Source<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Source<'_, S> {}

/// What a source has in a row of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    /// Nothing.
    Nothing,
    /// The same in all of them, whatever it is.
    Whole,
    /// One cluster, with this here and that there.
    Mixed,
}

/// A part of a source.
struct Part<'a, S> {
    /// Bytes, never 0.
    len: u64,
    held: Held<'a, S>,
}

/// How a source has a part.
enum Held<'a, S> {
    /// Not at all: there is nothing to copy.
    Nothing,
    /// As zeros.
    Zero,
    /// In a file, from an offset on.
    At(&'a S, u64),
    /// Compressed.
    Packed(&'a AnyLayer<S>),
}

impl<'a, S: Store> Source<'a, S> {
    fn geometry(self) -> Geometry {
        match self {
            Self::Delta(layer, _) => layer.geometry(),
            Self::Stack(stack) => stack.top().geometry(),
        }
    }

    /// Blocks in which it is read, in bytes.
    fn align(self) -> u64 {
        match self {
            Self::Delta(layer, _) => layer.store().info().align,
            Self::Stack(stack) => stack.align(),
        }
    }

    const fn phase(self) -> &'static str {
        match self {
            Self::Delta(..) => "merging",
            Self::Stack(_) => "converting",
        }
    }

    /// Whether zeros are left out.
    const fn skips_zeros(self) -> bool {
        matches!(self, Self::Stack(_))
    }

    async fn part(self, at: u64, len: u64) -> Result<Part<'a, S>> {
        match self {
            Self::Delta(layer, _) => Ok(match layer.map(at, len).await? {
                Extent::Data { at, len } => Part::new(len, Held::At(layer.store(), at)),
                Extent::Packed { len } => Part::new(len, Held::Packed(layer)),
                Extent::Zero { len } => Part::new(len, Held::Zero),
                Extent::Absent { len } => Part::new(len, Held::Nothing),
            }),
            Self::Stack(stack) => {
                let segment = stack.resolve(at, len, stack.depth()).await?;
                let layer = segment.layer.and_then(|layer| stack.layers().get(layer));
                match (layer, segment.content) {
                    (Some(layer), Content::At(at)) => data(layer.store(), at, segment.len).await,
                    (Some(layer), Content::Packed) => {
                        Ok(Part::new(segment.len, Held::Packed(layer)))
                    }
                    _ => Ok(Part::new(segment.len, Held::Nothing)),
                }
            }
        }
    }

    /// Whether all of a piece is said to be zeros, which are not left out.
    async fn is_zero(self, piece: Piece) -> Result<bool> {
        let part = self.part(piece.at, piece.len).await?;
        Ok(!self.skips_zeros() && matches!(part.held, Held::Zero) && part.len == piece.len)
    }

    /// From `at`, the beginning of a cluster, to where something else begins, in whole clusters, and
    /// what is there.
    async fn run(self, cluster: ClusterSize, at: u64) -> Result<(u64, Run)> {
        let rest = self.geometry().size - at;
        let part = self.part(at, rest).await?;
        let run = match part.held {
            Held::Nothing => Run::Nothing,
            _ => Run::Whole,
        };
        let whole = part.len - cluster.within(part.len);
        Ok(match whole {
            _ if part.len == rest => (rest, run),
            // It ends within its first cluster.
            0 => (cluster.bytes().min(rest), Run::Mixed),
            whole => (whole, run),
        })
    }
}

impl<'a, S> Part<'a, S> {
    const fn new(len: u64, held: Held<'a, S>) -> Self {
        Self { len, held }
    }
}

/// The part of a file that is data or a hole.
async fn data<S: Store>(store: &S, at: u64, len: u64) -> Result<Part<'_, S>> {
    let (data, until) = match at < store.info().len {
        true => store.extent(at).await?,
        // Reading it says what is wrong.
        false => (true, at.saturating_add(len)),
    };
    let len = len.min(until.saturating_sub(at)).max(1);
    Ok(match data {
        true => Part::new(len, Held::At(store, at)),
        false => Part::new(len, Held::Nothing),
    })
}

/// What is copied in one go.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Guest offset, of a cluster.
    at: u64,
    /// Bytes: those of a cluster, or of several where the lower delta has them in one place already.
    len: u64,
    way: Way,
}

/// How a piece is copied.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// To its place in the lower delta's file.
    Over(u64),
    /// To a cluster that the lower delta gets.
    New,
    /// Part by part.
    Parts,
}

impl Piece {
    /// Bytes of memory, copied in such steps.
    fn held(&self, step: u64) -> u64 {
        self.len.min(step)
    }
}

/// What came to its end.
enum Done {
    Copied(Piece, Result<()>),
    /// A pass of the lower delta.
    Synced(Result<()>),
}

/// A copy that is under way.
struct Copying<'a, S> {
    from: Source<'a, S>,
    to: &'a AnyLayer<S>,
    window: Window,
    under_way: FuturesUnordered<Pin<Box<dyn Future<Output = Done> + 'a>>>,
    /// Guest offset of what comes next, the end of what the upper delta has there, and what that is.
    at: u64,
    until: u64,
    run: Run,
    /// Bytes in memory; copied; of these, since the watch was told, and since the last pass began.
    held: u64,
    copied: u64,
    untold: u64,
    unsynced: u64,
    /// Pieces that found the table of pending changes full: they come again after a pass.
    again: Vec<Piece>,
    full: bool,
    syncing: bool,
    spares: Rc<Spares>,
}

impl<'a, S: Store> Copying<'a, S> {
    fn new(from: Source<'a, S>, to: &'a AnyLayer<S>, window: Window) -> Self {
        Self {
            from,
            to,
            window,
            under_way: FuturesUnordered::new(),
            at: 0,
            until: 0,
            run: Run::Nothing,
            held: 0,
            copied: 0,
            untold: 0,
            unsynced: 0,
            again: Vec::new(),
            full: false,
            syncing: false,
            spares: Rc::new(Spares::new(
                window,
                from.align().max(to.store().info().align),
            )),
        }
    }

    async fn run(&mut self, work: &mut Work<'_>) -> Result<()> {
        loop {
            self.feed().await?;
            match self.under_way.next().await {
                None => return self.tell(work).await,
                Some(Done::Synced(done)) => {
                    done?;
                    (self.syncing, self.full) = (false, false);
                }
                Some(Done::Copied(piece, done)) => {
                    self.held -= piece.held(self.window.step);
                    match done {
                        Err(e) if e.kind() == Kind::Pending => self.put_back(piece),
                        done => done.map(|()| self.count(piece))?,
                    }
                }
            }
            if self.untold >= self.window.step {
                self.tell(work).await?;
            }
        }
    }

    fn put_back(&mut self, piece: Piece) {
        self.again.push(piece);
        self.full = true;
    }

    fn count(&mut self, piece: Piece) {
        for count in [&mut self.copied, &mut self.untold, &mut self.unsynced] {
            *count = count.saturating_add(piece.len);
        }
    }

    async fn tell(&mut self, work: &mut Work<'_>) -> Result<()> {
        let total = self.from.geometry().size;
        work.watch.tell(Progress {
            phase: self.from.phase(),
            done: self.at.min(total),
            total,
        })?;
        work.pace.wait(std::mem::take(&mut self.untold)).await;
        Ok(())
    }

    /// Begins as much as there is memory for.
    async fn feed(&mut self) -> Result<()> {
        if !self.syncing && (self.full || self.unsynced >= self.window.unsynced) {
            self.begin_sync();
        }
        let Window { memory, step, .. } = self.window;
        while !self.full && self.held + step <= memory && self.under_way.len() < AT_ONCE {
            let piece = match self.again.pop() {
                Some(piece) => piece,
                None => match self.next().await? {
                    Some(piece) => piece,
                    None => break,
                },
            };
            self.begin_copy(piece);
        }
        Ok(())
    }

    fn begin_copy(&mut self, piece: Piece) {
        let (from, to, spares) = (self.from, self.to, Rc::clone(&self.spares));
        let copied = async move { Done::Copied(piece, copy_piece(from, to, piece, &spares).await) };
        self.under_way.push(Box::pin(copied));
        self.held += piece.held(self.window.step);
    }

    fn begin_sync(&mut self) {
        let to = self.to;
        let synced = async move { Done::Synced(to.sync().await) };
        self.under_way.push(Box::pin(synced));
        (self.syncing, self.unsynced) = (true, 0);
    }

    /// The next piece that the upper delta has, if there is one.
    async fn next(&mut self) -> Result<Option<Piece>> {
        let size = self.from.geometry().size;
        let cluster = self.to.geometry().cluster;
        while self.at >= self.until {
            if self.at >= size {
                return Ok(None);
            }
            let (len, run) = self.from.run(cluster, self.at).await?;
            match run {
                Run::Nothing => self.at += len,
                _ => (self.until, self.run) = (self.at + len, run),
            }
        }
        let at = self.at;
        let one = cluster.bytes().min(size - at);
        let step = self.window.step.max(one).min(self.until - at);
        let (len, way) = match self.to.place(at, step).await? {
            _ if self.is_parted() => (one, Way::Parts),
            Place::Here { at: host, len } if len == one => (one, Way::Over(host)),
            Place::Here { at: host, len } if len > one => {
                (len - cluster.within(len), Way::Over(host))
            }
            // It has a part of it.
            Place::Here { .. } => (one, Way::Parts),
            Place::New { .. } => (one, Way::New),
        };
        self.at += len;
        Ok(Some(Piece { at, len, way }))
    }

    /// Whether the upper delta has parts of a cluster, one by one.
    fn is_parted(&self) -> bool {
        matches!(self.from, Source::Delta(..)) && self.run == Run::Mixed
    }
}

/// Where a piece goes.
enum Spot<'a, S> {
    /// It has its place.
    Here(u64),
    /// It gets a cluster when there is something to write.
    Wanted(&'a AnyLayer<S>, VirtCluster),
    /// It has got one.
    Taken(VirtCluster, AnyReserved),
}

impl<S: Store> Spot<'_, S> {
    async fn host(&mut self) -> Result<u64> {
        if let Self::Wanted(to, cluster) = self {
            let cluster = *cluster;
            let mut reserved = to.reserve(cluster).await?;
            reserved.submitted();
            *self = Self::Taken(cluster, reserved);
        }
        match self {
            Self::Here(host) => Ok(*host),
            Self::Taken(_, reserved) => Ok(reserved.host()),
            Self::Wanted(..) => Err(Error::invalid("a cluster that was taken and is not there")),
        }
    }
}

async fn copy_piece<S: Store>(
    from: Source<'_, S>,
    to: &AnyLayer<S>,
    piece: Piece,
    spares: &Spares,
) -> Result<()> {
    let mut spot = match piece.way {
        Way::Over(host) => Spot::Here(host),
        Way::Parts => return copy_parts(from, to, piece, spares.window.step).await,
        Way::New => {
            let cluster = to.geometry().cluster.cluster_of(piece.at);
            let cluster = cluster.ok_or_else(|| Error::invalid("offset past the table"))?;
            Spot::Wanted(to, VirtCluster(cluster))
        }
    };
    if let Spot::Wanted(to, cluster) = spot
        && from.is_zero(piece).await?
        && to.zero(cluster).await?
    {
        return Ok(());
    }
    copy_bytes(from, to, piece, &mut spot, spares).await?;
    if let Spot::Taken(cluster, mut reserved) = spot {
        reserved.filled(0, piece.len);
        to.publish(cluster, reserved, Below::Data);
    }
    Ok(())
}

/// Copies a piece, in steps. What is not written of a new cluster reads as zeros.
async fn copy_bytes<S: Store>(
    from: Source<'_, S>,
    to: &AnyLayer<S>,
    piece: Piece,
    spot: &mut Spot<'_, S>,
    spares: &Spares,
) -> Result<()> {
    let end = piece.at + piece.len;
    let mut at = piece.at;
    while at < end {
        let part = from.part(at, spares.window.step.min(end - at)).await?;
        let (begin, len) = (at, part.len);
        at += len;
        // A disk may end within a block, but no cluster does.
        let blocks = len.next_multiple_of(spares.align) as usize;
        let mut bytes = match part.held {
            Held::At(store, at) => store.read_at(at, spares.lend(blocks)).await?,
            Held::Packed(layer) => layer.unpack(begin, spares.lend(len as usize)).await?,
            Held::Zero | Held::Nothing if from.skips_zeros() => continue,
            Held::Nothing => return Err(gone(begin)),
            Held::Zero => buf::aligned(blocks),
        };
        bytes.resize(blocks, 0);
        let bytes = bytes.freeze();
        if !(from.skips_zeros() && is_zero(&bytes)) {
            let place = spot.host().await? + (begin - piece.at);
            let written = to.store().write_at(place, bytes.clone(), Reach::Cache);
            written.await?;
        }
        // Nobody else holds it, unless the storage keeps it.
        if let Ok(spare) = bytes.try_into_mut() {
            spares.keep(spare);
        }
    }
    Ok(())
}

/// Copies a cluster that is there in part.
async fn copy_parts<S: Store>(
    from: Source<'_, S>,
    to: &AnyLayer<S>,
    piece: Piece,
    step: u64,
) -> Result<()> {
    let Source::Delta(upper, rest) = from else {
        return Err(gone(piece.at));
    };
    let cluster = parts::Cluster {
        upper,
        lower: to,
        rest,
        start: piece.at,
        end: piece.at + piece.len,
        step,
    };
    cluster.copy().await
}

/// A delta that is copied does not change.
fn gone(guest: u64) -> Error {
    Error::invalid(format!(
        "guest offset {guest:#x}: it was all there, and then in part"
    ))
}

/// Whether all of it is zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Without a way out of the inner loop it is done many bytes at once.
    let mut blocks = bytes.chunks(4096);
    blocks.all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Buffers to be used again: a fresh one costs its page faults every time.
struct Spares {
    window: Window,
    /// What is read and written is a multiple of this.
    align: u64,
    kept: RefCell<Vec<BytesMut>>,
}

impl Spares {
    fn new(window: Window, align: u64) -> Self {
        let kept = RefCell::default();
        Self {
            window,
            align,
            kept,
        }
    }

    /// Keeps a buffer, unless there are enough.
    fn keep(&self, spare: BytesMut) {
        let mut kept = self.kept.borrow_mut();
        let there: usize = kept.iter().map(BytesMut::capacity).sum();
        if (there + spare.capacity()) as u64 <= self.window.memory {
            kept.push(spare);
        }
    }

    /// An aligned buffer to fill; what it holds is arbitrary.
    fn lend(&self, len: usize) -> BytesMut {
        let spare = self.kept.borrow_mut().pop();
        match spare.filter(|spare| spare.capacity() >= len && buf::is_aligned(spare, buf::ALIGN)) {
            Some(mut spare) => {
                spare.resize(len, 0);
                spare
            }
            None => buf::aligned(len),
        }
    }
}
