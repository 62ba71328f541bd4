//! Receive: the target's side of a migration. It is told frame by frame, and makes the disk.
//!
//! The deltas are written through the engine, each over those that it stands on, so what is seen
//! through them is what the source sees, whatever the files look like. Nothing that the other side
//! says is believed: what it sends can fill the disk that it describes and nothing else.

use super::frame::Frame;
use super::record::{Place, Proof, Record, Secret, Target, TargetPhase, Words};
use super::talk::{self, Delta, Hello, PROTO, ToSource, ToTarget};
use crate::device::{Device, Zero};
use crate::disk::Disk;
use crate::image::change::{self, Shape};
use crate::image::members::INCOMING;
use crate::image::snapshot::{layers, names};
use crate::image::target::DESCRIPTOR;
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use ploop_formats::descriptor::{Descriptor, ImageRef, LayerFormat};
use ploop_formats::folder::{self, Access, Folder};
use ploop_formats::ploop::header::Version;
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result, limits, ploop, qcow2};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// Bytes that are being written at once.
const MEMORY: u64 = 16 << 20;

/// A disk that is being received.
pub struct Receiver<'f, F: Folder> {
    folder: &'f F,
    record: Target,
    disk: Descriptor,
    deltas: Vec<Delta>,
    have: Place,
    open: Option<Open<F::File>>,
    is_done: bool,
}

/// The delta that is being received.
struct Open<S> {
    disk: Rc<Disk<S>>,
    under_way: FuturesUnordered<Pin<Box<dyn Future<Output = Result<u64>>>>>,
    held: u64,
}

impl<S: Store + 'static> Open<S> {
    async fn write(&mut self, at: u64, bytes: Bytes) -> Result<()> {
        let (disk, len) = (Rc::clone(&self.disk), bytes.len() as u64);
        let write = async move { disk.write(at, bytes, false).await.map(|()| len) };
        self.begin(len, Box::pin(write)).await
    }

    async fn zero(&mut self, at: u64, len: u64) -> Result<()> {
        let disk = Rc::clone(&self.disk);
        let zero = async move { disk.zero(at, len, Zero::MayFree, false).await.map(|()| 0) };
        self.begin(0, Box::pin(zero)).await
    }

    /// No two of what is under way meet: what is sent between two messages never overlaps, and
    /// where it does the other side has itself to blame.
    async fn begin(
        &mut self,
        len: u64,
        change: Pin<Box<dyn Future<Output = Result<u64>>>>,
    ) -> Result<()> {
        self.under_way.push(change);
        self.held += len;
        while self.held > MEMORY || self.under_way.len() > 64 {
            self.land().await?;
        }
        Ok(())
    }

    async fn land(&mut self) -> Result<()> {
        if let Some(done) = self.under_way.next().await {
            self.held = self.held.saturating_sub(done?);
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<()> {
        while !self.under_way.is_empty() {
            self.land().await?;
        }
        Ok(())
    }
}

impl<'f, F> Receiver<'f, F>
where
    F: Folder,
    F::File: 'static,
{
    /// Begins, or goes on with what was begun; what the other side is answered. The caller has locked
    /// the folder, in which is nothing else.
    pub async fn begin(folder: &'f F, hello: Hello) -> Result<(Self, ToSource)> {
        let (disk, deltas) = described(&hello)?;
        let record = match Record::read(folder).await? {
            None => prepare(folder, &disk, &hello).await?,
            Some(Record::Target(target)) if target.session == hello.session => {
                if change::read(folder, INCOMING).await? != disk {
                    return Err(other(target.phase));
                }
                target
            }
            Some(Record::Target(target)) => return Err(other(target.phase)),
            Some(Record::Source(_)) => return Err(other(TargetPhase::Discarded)),
        };
        let mut receiver = Self {
            folder,
            have: Place::default(),
            record,
            disk,
            deltas,
            open: None,
            is_done: false,
        };
        let welcome = receiver.welcome(hello.go).await?;
        Ok((receiver, welcome))
    }

    /// The word of an earlier time is worth nothing from now on.
    async fn welcome(&mut self, go: Proof) -> Result<ToSource> {
        self.have = match self.record.phase {
            TargetPhase::Receiving { have } => have,
            TargetPhase::Ready => Place {
                delta: self.deltas.len(),
                at: 0,
            },
            TargetPhase::Discarded => return Err(other(TargetPhase::Discarded)),
        };
        self.record.go = go;
        self.note(self.record.phase).await?;
        Ok(ToSource::Welcome {
            have: self.have,
            words: self.record.words.proofs(),
        })
    }

    /// The disk.
    pub const fn disk(&self) -> &Descriptor {
        &self.disk
    }

    /// An error, and what it leaves.
    pub fn explain(&self, e: Error) -> Error {
        let left = match self.record.phase {
            TargetPhase::Ready => {
                "all of the disk is here, and whether it can be used nobody knows here: ask `ploopctl \
                 migrate resolve` on both sides"
            }
            _ => "what came is kept, and the same command goes on with it",
        };
        match e.kind() {
            Kind::Cancelled => Error::new(e.kind(), format!("cancelled by a signal; {left}")),
            _ => Error::new(e.kind(), format!("{e}; {left}")),
        }
    }

    /// Whether the disk is here, and can be used.
    pub const fn is_done(&self) -> bool {
        self.is_done
    }

    /// Takes what the other side sent; what it is to be answered. After an error nothing more is taken:
    /// what was durable stays, and another receiver goes on from there.
    pub async fn take(&mut self, frame: Frame, watch: &mut dyn Watch) -> Result<Option<ToSource>> {
        match frame {
            Frame::Data { at, bytes } => {
                let open = self.watched(at, watch)?;
                open.write(at, bytes).await.map(|()| None)
            }
            Frame::Zero { at, len } => {
                let open = self.watched(at, watch)?;
                open.zero(at, len).await.map(|()| None)
            }
            Frame::Message(text) => match talk::parse(&text)? {
                ToTarget::Hello(_) => Err(strange("a second greeting")),
                ToTarget::Delta { index, from } => self.begin_delta(index, from).await,
                ToTarget::Sync { at } => self.sync(at).await,
                ToTarget::Whole => self.close_delta().await,
                ToTarget::End => self.end(watch).await,
                ToTarget::Go { word } => self.go(&word).await,
            },
        }
    }

    fn watched(&mut self, at: u64, watch: &mut dyn Watch) -> Result<&mut Open<F::File>> {
        let open = self.delta()?;
        watch.tell(Progress {
            phase: "receiving",
            done: at,
            total: open.disk.size(),
        })?;
        Ok(open)
    }

    fn delta(&mut self) -> Result<&mut Open<F::File>> {
        let open = self.open.as_mut();
        open.ok_or_else(|| strange("data of no delta"))
    }

    async fn begin_delta(&mut self, delta: usize, at: u64) -> Result<Option<ToSource>> {
        let fits = self.open.is_none() && self.have == Place { delta, at };
        let is_receiving = matches!(self.record.phase, TargetPhase::Receiving { .. });
        let Some(wanted) = self.deltas.get(delta).filter(|_| fits && is_receiving) else {
            return Err(strange("another delta than was to come"));
        };
        let disk = open(self.folder, &self.disk, wanted, at == 0).await?;
        self.open = Some(Open {
            disk: Rc::new(disk),
            under_way: FuturesUnordered::new(),
            held: 0,
        });
        Ok(None)
    }

    async fn sync(&mut self, at: u64) -> Result<Option<ToSource>> {
        let open = self.delta()?;
        open.settle().await?;
        open.disk.flush().await?;
        let delta = self.have.delta;
        self.reached(Place { delta, at }).await
    }

    async fn close_delta(&mut self) -> Result<Option<ToSource>> {
        let open = self.delta()?;
        open.settle().await?;
        open.disk.close().await?;
        self.open = None;
        let delta = self.have.delta + 1;
        self.reached(Place { delta, at: 0 }).await
    }

    async fn reached(&mut self, have: Place) -> Result<Option<ToSource>> {
        self.note(TargetPhase::Receiving { have }).await?;
        self.have = have;
        Ok(Some(ToSource::Synced))
    }

    async fn note(&mut self, phase: TargetPhase) -> Result<()> {
        self.record.phase = phase;
        Record::Target(self.record.clone()).write(self.folder).await
    }

    async fn end(&mut self, watch: &mut dyn Watch) -> Result<Option<ToSource>> {
        if self.open.is_some() || self.have.delta != self.deltas.len() {
            return Err(strange("an end before the last delta"));
        }
        if self.record.phase != TargetPhase::Ready {
            for delta in &self.deltas {
                let image = layers::image(&self.disk, delta.guid)?;
                watch.enter(&image.file);
                let checked = check(self.folder, &image, watch).await;
                checked.map_err(|e| e.at(&image.file))?;
            }
            self.note(TargetPhase::Ready).await?;
        }
        Ok(Some(ToSource::Ready))
    }

    async fn go(&mut self, word: &Secret) -> Result<Option<ToSource>> {
        become_disk(self.folder, &self.record, word).await?;
        self.is_done = true;
        let taken = self.record.words.taken.clone();
        Ok(Some(ToSource::Done { taken }))
    }
}

/// Makes the received disk one that can be used, durably so, once the word is shown. `Busy` when it is
/// not ready. The record stays: it says what the source may want to see.
pub async fn become_disk<F: Folder>(folder: &F, record: &Target, word: &Secret) -> Result<()> {
    if record.phase != TargetPhase::Ready {
        let what = "it has not all of the disk, or has thrown it away";
        return Err(Error::new(Kind::Busy, what));
    }
    record.go.check(word)?;
    folder.rename(INCOMING, DESCRIPTOR).await?;
    folder.sync().await
}

fn strange(what: &str) -> Error {
    Error::new(Kind::Io, format!("the other side sent {what}"))
}

/// Why a directory takes nothing of this migration.
fn other(phase: TargetPhase) -> Error {
    let what = match phase {
        TargetPhase::Receiving { .. } | TargetPhase::Ready => {
            "here is what another migration, or the same disk before it was changed, has sent; `ploopctl \
             migrate resolve` says how that stands, and --discard throws it away"
        }
        TargetPhase::Discarded => {
            "here is the record of another migration; `ploopctl migrate resolve` says whether anybody still \
             needs it, else the directory can go"
        }
    };
    Error::new(Kind::Exists, what)
}

/// The descriptor that the disk gets here, and its deltas. What the other side says of it must hold together.
fn described(hello: &Hello) -> Result<(Descriptor, Vec<Delta>)> {
    if hello.proto != PROTO {
        let what = format!("the other side speaks version {} of migration", hello.proto);
        return Err(Error::unsupported(what));
    }
    let disk = Descriptor::parse(hello.descriptor.as_bytes())?;
    if let Some(image) = disk.images().iter().find(|i| !change::is_delta(&i.file)) {
        let what = format!("{:?} is no name for an image", image.file);
        return Err(Error::unsupported(what));
    }
    let mut files: Vec<&str> = disk.images().iter().map(|i| i.file.as_str()).collect();
    files.sort_unstable();
    if files.windows(2).any(|pair| pair.first() == pair.last()) {
        return Err(Error::unsupported("two deltas that are one file"));
    }
    let known = |before: &[Delta], guid| before.iter().any(|delta| delta.guid == guid);
    for (n, delta) in hello.deltas.iter().enumerate() {
        let before = hello.deltas.get(..n).unwrap_or_default();
        let shot = disk.shot(delta.guid);
        let stands = shot.is_some_and(|shot| {
            shot.mark.is_none() && (shot.parent.is_none() || known(before, shot.parent))
        });
        let depth = disk.chain(delta.guid).map_or(0, |chain| chain.len());
        if !stands || known(before, delta.guid) || depth > limits::DEPTH_MAX {
            return Err(strange("deltas that are not those of its descriptor"));
        }
    }
    if hello.deltas.len() != disk.shots().len() {
        return Err(strange("other deltas than its descriptor has"));
    }
    // The new images take the space that they need. An odd name of the top goes with any edit.
    let new = disk.edit(|edit| edit.set_preallocated(false))?;
    let deltas = hello
        .deltas
        .iter()
        .map(|delta| match delta.guid == disk.top() {
            true => Delta {
                guid: new.top(),
                ..*delta
            },
            false => *delta,
        });
    let deltas = deltas.collect();
    Ok((new, deltas))
}

/// Writes down what is going to come to be in an empty folder.
async fn prepare<F: Folder>(folder: &F, disk: &Descriptor, hello: &Hello) -> Result<Target> {
    if folder::has(folder, DESCRIPTOR).await? {
        return Err(Error::new(Kind::Exists, "there is a disk already"));
    }
    let target = Target {
        session: hello.session,
        phase: TargetPhase::Receiving {
            have: Place::default(),
        },
        go: hello.go.clone(),
        words: Words::random(),
    };
    // A record without them would be one of nothing.
    for stale in [INCOMING, names::FILE] {
        folder.remove(stale).await?;
    }
    folder::save(folder, INCOMING, &disk.encode()).await?;
    if let Some(names) = &hello.names {
        folder::save(folder, names::FILE, names.as_bytes()).await?;
    }
    folder.sync().await?;
    Record::Target(target.clone()).write(folder).await?;
    Ok(target)
}

/// Opens a delta to be written over what it stands on; one that is `new` is made.
async fn open<F: Folder>(
    folder: &F,
    disk: &Descriptor,
    wanted: &Delta,
    new: bool,
) -> Result<Disk<F::File>> {
    let mut chain = disk.chain(wanted.guid)?;
    let image = chain.pop();
    let image = image.ok_or_else(|| Error::damaged("a chain without images"))?;
    let mut stack = Vec::new();
    for below in &chain {
        stack.push(layers::open_read(folder, disk, below).await?);
    }
    if new {
        // Of one that was cut before its first sync.
        folder.remove(&image.file).await?;
        let made = create(folder, disk, &image, wanted).await;
        made.map_err(|e| e.at(&image.file))?;
    }
    stack.push(layers::open_write(folder, disk, &image).await?);
    Disk::new(stack, false)
}

async fn create<F: Folder>(
    folder: &F,
    disk: &Descriptor,
    image: &ImageRef,
    wanted: &Delta,
) -> Result<()> {
    let shape = Shape {
        version: match wanted.version {
            1 => Version::V1,
            2 => Version::V2,
            n => return Err(strange(&format!("an image of version {n}"))),
        },
        size: wanted.size,
        subclusters: wanted.subclusters,
    };
    let file = folder.create(&image.file).await?;
    match image.format {
        LayerFormat::Raw => file.lengthen(wanted.size).await?,
        LayerFormat::Ploop => change::fill_ploop(&file, disk, shape).await?,
        LayerFormat::Qcow2 => change::fill_qcow2(&file, disk, shape).await?,
    }
    file.flush().await?;
    folder.sync().await
}

/// Gives back what a receiver that was cut left lying about in an image, and refuses one that has
/// anything else wrong. What was said to be durable is looked at, not what the page cache has of it.
async fn check<F: Folder>(folder: &F, image: &ImageRef, watch: &mut dyn Watch) -> Result<()> {
    let store = folder.open(&image.file, Access::Write).await?;
    let is_clean = match image.format {
        LayerFormat::Raw => true,
        LayerFormat::Ploop => {
            use ploop::check::{Repair, check_watched, repair_watched};
            check_watched(&store, watch).await?.is_clean()
                || repair_watched(&store, &Repair::default(), watch)
                    .await?
                    .is_clean()
        }
        LayerFormat::Qcow2 => {
            use qcow2::check::{Repair, check_watched, repair_watched};
            check_watched(&store, watch).await?.is_clean()
                || repair_watched(&store, &Repair::default(), watch)
                    .await?
                    .is_clean()
        }
    };
    store.settle().await;
    match is_clean {
        true => Ok(()),
        false => Err(Error::damaged("the image that was received is not sound")),
    }
}
