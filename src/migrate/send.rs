//! Send: the source's side of a migration: every delta, what it has of its own, and then the disk.
//!
//! What the other side has is what it said, and nothing more is ever assumed of it. This side stays
//! what it was until the target is ready; then it is sealed ([`depart`]), and the word is sent.

use super::frame::{DATA_MAX, Frame, ZERO_MAX};
use super::record::{Proof, Record, Secret, Source, SourcePhase, Words};
use super::talk::{self, Delta, Hello, PROTO, ToSource, ToTarget};
use crate::device::Device;
use crate::disk::Disk;
use crate::image::change;
use crate::image::members::{SEALED, WITNESS};
use crate::image::snapshot::copy::{self, Work};
use crate::image::snapshot::{layers, names};
use crate::image::target::DESCRIPTOR;
use crate::stack::AnyLayer;
use bytes::Bytes;
use futures_util::stream::{FuturesOrdered, StreamExt};
use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder::{self, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::ploop::header::Version;
use ploop_formats::progress::Progress;
use ploop_formats::{Error, Kind, Result, buf};
use uuid::Uuid;

/// Times that the other side may still owe the answer that something is durable.
const OWED_MAX: u64 = 2;
/// Extents asked for at once.
const EXTENTS: usize = 512;

/// The other side.
#[allow(async_fn_in_trait, reason = "futures of a simulated peer are not Send")]
pub trait Peer {
    /// Sends it a frame. Those before a message may wait for that.
    async fn send(&mut self, frame: Frame) -> Result<()>;

    /// What it says next. `Io` when it is gone.
    async fn hear(&mut self) -> Result<ToSource>;

    /// From now on nobody may end it: what is left is to hear whether the other side has the disk.
    fn is_given(&mut self) {}
}

/// What was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Bytes of data.
    pub bytes: u64,
    /// Deltas.
    pub deltas: usize,
}

/// A disk that nobody uses, and that is to be sent.
pub struct Sender<'f, F> {
    folder: &'f F,
    disk: Descriptor,
    record: Source,
    deltas: Vec<Delta>,
}

impl<'f, F> Sender<'f, F>
where
    F: Folder,
    F::File: 'static,
{
    /// Closes what an unclean end left open, and writes down what is going to be sent. What was begun
    /// goes on where `witness` says what the stored one, `begun`, said that nobody took away.
    ///
    /// Each time the word is another one: a target of an earlier time never takes it.
    pub async fn prepare(
        folder: &'f F,
        begun: Option<&str>,
        witness: impl Fn(&Descriptor) -> Result<String>,
    ) -> Result<Self> {
        let disk = change::settle_synced(folder).await?;
        refuse_marked(&disk)?;
        let mut deltas = Vec::new();
        for guid in in_order(&disk) {
            deltas.push(delta(folder, &disk, guid).await?);
        }
        let known = Record::read(folder).await?;
        let is_same = match begun {
            Some(begun) => *begun == witness(&disk)?,
            None => false,
        };
        let session = match &known {
            Some(Record::Source(source)) if is_same => source.session,
            _ => {
                layers::seal(folder, &disk).await?;
                Uuid::new_v4()
            }
        };
        let record = Source {
            session,
            phase: SourcePhase::Sending,
            word: Secret::random(),
            came: match known {
                Some(Record::Source(source)) => source.came,
                Some(Record::Target(target)) => Some(target.words.taken),
                None => None,
            },
        };
        Record::Source(record.clone()).write(folder).await?;
        // It vouches for what that record is about.
        folder.remove(WITNESS).await?;
        folder::save(folder, WITNESS, witness(&disk)?.as_bytes()).await?;
        folder.sync().await?;
        Ok(Self {
            folder,
            disk,
            record,
            deltas,
        })
    }

    /// Sends it, and gives the disk away. An error says which side has it.
    pub async fn send(mut self, peer: &mut impl Peer, work: &mut Work<'_>) -> Result<Sent> {
        let ready = self.send_all(peer, work).await;
        let (sent, words) = ready.map_err(explain)?;
        let sealed = depart(self.folder, &mut self.record, words.clone()).await;
        sealed.map_err(|e| Error::new(e.kind(), format!("sealing the disk: {e}; {ASK}")))?;
        peer.is_given();
        let given = self.give(peer, &words).await;
        given.map_err(|e| Error::new(Kind::Io, format!("{e}; {IN_DOUBT}")))?;
        Ok(sent)
    }

    async fn send_all(
        &self,
        peer: &mut impl Peer,
        work: &mut Work<'_>,
    ) -> Result<(Sent, Words<Proof>)> {
        let hello = self.hello().await?;
        say(peer, &ToTarget::Hello(hello)).await?;
        let (have, words) = match hear(peer).await? {
            ToSource::Welcome { have, words } => (have, words),
            _ => return Err(strange()),
        };
        let mut sent = Sent::default();
        for (index, delta) in self.deltas.iter().enumerate() {
            if index < have.delta {
                continue;
            }
            let from = if index == have.delta { have.at } else { 0 };
            say(peer, &ToTarget::Delta { index, from }).await?;
            let disk = open(self.folder, &self.disk, delta.guid).await?;
            let image = layers::image(&self.disk, delta.guid)?;
            work.watch().enter(&image.file);
            sent.bytes += send_own(&disk, from, peer, work)
                .await
                .map_err(|e| e.at(&image.file))?;
            sent.deltas += 1;
        }
        say(peer, &ToTarget::End).await?;
        match hear(peer).await? {
            ToSource::Ready => {}
            _ => return Err(strange()),
        }
        // The last moment at which it can be ended.
        work.watch().tell(Progress {
            phase: "handing over",
            done: 0,
            total: 0,
        })?;
        Ok((sent, words))
    }

    async fn hello(&self) -> Result<Hello> {
        let text = String::from_utf8(self.disk.encode());
        let descriptor = text.map_err(|_| Error::damaged("a descriptor that is not UTF-8"))?;
        let names = match folder::load(self.folder, names::FILE, names::FILE_MAX).await {
            Ok(names) => String::from_utf8(names.to_vec()).ok(),
            // They are remarks.
            Err(_) => None,
        };
        Ok(Hello {
            proto: PROTO,
            session: self.record.session,
            descriptor,
            deltas: self.deltas.clone(),
            names,
            go: self.record.word.proof(),
        })
    }

    async fn give(&mut self, peer: &mut impl Peer, words: &Words<Proof>) -> Result<()> {
        let word = self.record.word.clone();
        say(peer, &ToTarget::Go { word }).await?;
        match hear(peer).await? {
            ToSource::Done { taken } => words.taken.check(&taken)?,
            _ => return Err(strange()),
        }
        self.record.phase = SourcePhase::Moved;
        if let Err(e) = Record::Source(self.record.clone()).write(self.folder).await {
            tracing::warn!("the disk has gone, but that could not be written down: {e}");
        }
        Ok(())
    }
}

/// An error before the disk was given away.
fn explain(e: Error) -> Error {
    match e.kind() {
        Kind::Cancelled => Error::new(e.kind(), format!("cancelled by a signal; {GOES_ON}")),
        Kind::Io => Error::new(e.kind(), format!("{e}; {GOES_ON}")),
        _ => Error::new(e.kind(), format!("{e}; the disk stays here")),
    }
}

const GOES_ON: &str = "the disk stays here, and the same command goes on where this ended";
const ASK: &str =
    "`ploopctl migrate resolve` says whether it can be used here; the other side cannot";
const IN_DOUBT: &str = "the disk is sealed here, and it is not known whether the other side has it: \
    neither is used until `ploopctl migrate resolve` has been asked on both";

/// Makes the disk one that nobody opens, durably so.
pub async fn depart<F: Folder>(folder: &F, record: &mut Source, words: Words<Proof>) -> Result<()> {
    record.phase = SourcePhase::Sealed { words };
    Record::Source(record.clone()).write(folder).await?;
    folder.rename(DESCRIPTOR, SEALED).await?;
    folder.sync().await
}

/// What is to be merged away is no promise, and not sent.
fn refuse_marked(disk: &Descriptor) -> Result<()> {
    match disk.shots().iter().find(|shot| shot.mark.is_some()) {
        None => Ok(()),
        Some(shot) => Err(Error::new(
            Kind::Busy,
            format!(
                "snapshot {0} is being merged away: `ploopctl snapshot delete` it first",
                shot.guid.bare()
            ),
        )),
    }
}

/// The deltas of a disk, each after the one that it stands on, the top last.
fn in_order(disk: &Descriptor) -> Vec<Guid> {
    let mut order = Vec::new();
    let mut ways = vec![disk.base().guid];
    while let Some(guid) = ways.pop() {
        if guid != disk.top() {
            order.push(guid);
        }
        ways.extend(disk.children(guid).map(|shot| shot.guid));
    }
    order.push(disk.top());
    order
}

async fn delta<F: Folder>(folder: &F, disk: &Descriptor, guid: Guid) -> Result<Delta> {
    let image = layers::image(disk, guid)?;
    let layer = layers::open_read(folder, disk, &image).await?;
    match layers::inner_snapshots(&layer) {
        0 => {}
        n => {
            return Err(Error::unsupported(format!(
                "{}: {n} snapshots inside this image would stay behind; delete them, or have `ploopctl \
                 convert --flatten` make one image of what the disk is now",
                image.file
            )));
        }
    }
    if guid != disk.top() {
        layers::refuse_unclosed(&layer, &image)?;
    }
    let own = layers::shape_of(&layer);
    let ragged = disk.cluster().within(own.size);
    if matches!(layer, AnyLayer::Ploop(_)) && ragged != 0 {
        return Err(Error::unsupported(format!(
            "{}: it ends within a cluster, which no new image does; make it larger first",
            image.file
        )));
    }
    Ok(Delta {
        guid,
        size: own.size,
        version: match own.version {
            Version::V1 => 1,
            Version::V2 => 2,
        },
        subclusters: own.subclusters,
    })
}

/// The disk as it was at a point, to be read.
async fn open<F: Folder>(folder: &F, disk: &Descriptor, guid: Guid) -> Result<Disk<F::File>> {
    let mut stack = Vec::new();
    for image in disk.chain(guid)? {
        stack.push(layers::open_read(folder, disk, &image).await?);
    }
    Disk::new(stack, true)
}

/// Sends what the top layer of a device has of its own, from `from` on; the bytes of data.
async fn send_own(
    disk: &impl Device,
    from: u64,
    peer: &mut impl Peer,
    work: &mut Work<'_>,
) -> Result<u64> {
    let (total, mut at, window) = (disk.size(), from, work.window());
    let step = window.step.min(DATA_MAX as u64);
    let at_once = window.memory / step;
    let (mut sent, mut unsynced, mut owed) = (0, 0, 0);
    while at < total {
        let extents = disk.extents(at, ZERO_MAX.min(total - at), EXTENTS).await?;
        let mut reads = FuturesOrdered::new();
        let mut pieces = extents.into_iter().flat_map(|extent| {
            let start = at;
            at += extent.len;
            // What is not the top's own is not sent.
            let end = if extent.depth == 1 { at } else { start };
            pieces(start, end, extent.zero, step)
        });
        loop {
            while (reads.len() as u64) < at_once
                && let Some(piece) = pieces.next()
            {
                reads.push_back(read(disk, piece));
            }
            let Some(frame) = reads.next().await else {
                break;
            };
            let frame = frame?;
            let (end, data) = match &frame {
                Frame::Data { at, bytes } => (at + bytes.len() as u64, bytes.len() as u64),
                Frame::Zero { at, len } => (at + len, 0),
                Frame::Message(_) => continue,
            };
            work.wait(data).await;
            peer.send(frame).await?;
            sent += data;
            unsynced += data;
            if unsynced >= window.unsynced {
                say(peer, &ToTarget::Sync { at: end }).await?;
                (unsynced, owed) = (0, owed + 1);
            }
            while owed > OWED_MAX {
                synced(peer).await?;
                owed -= 1;
            }
            work.watch().tell(Progress {
                phase: "sending",
                done: end,
                total,
            })?;
        }
    }
    say(peer, &ToTarget::Whole).await?;
    for _ in 0..=owed {
        synced(peer).await?;
    }
    Ok(sent)
}

/// A part of the device, and whether it is known to read as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    at: u64,
    len: u64,
    zero: bool,
}

/// The pieces of an extent that are sent. Those with data end where a multiple of `step` ends, so that
/// each is of one cluster or of whole ones.
fn pieces(mut at: u64, end: u64, zero: bool, step: u64) -> impl Iterator<Item = Piece> {
    std::iter::from_fn(move || {
        let next = if zero {
            end
        } else {
            end.min((at / step + 1) * step)
        };
        let piece = (at < end).then_some(Piece {
            at,
            len: next - at,
            zero,
        });
        at = next;
        piece
    })
}

async fn read(disk: &impl Device, piece: Piece) -> Result<Frame> {
    let Piece { at, len, zero } = piece;
    if zero {
        return Ok(Frame::Zero { at, len });
    }
    let bytes: Bytes = disk.read(at, buf::aligned(len as usize)).await?.freeze();
    Ok(match copy::is_zero(&bytes) {
        // Said, and not left out: what is below may be something else.
        true => Frame::Zero { at, len },
        false => Frame::Data { at, bytes },
    })
}

async fn say(peer: &mut impl Peer, message: &ToTarget) -> Result<()> {
    peer.send(talk::frame(message)?).await
}

/// What the other side says, unless that is why it cannot go on.
async fn hear(peer: &mut impl Peer) -> Result<ToSource> {
    match peer.hear().await? {
        ToSource::Failed { message } => Err(failed(&message)),
        said => Ok(said),
    }
}

/// That the other side cannot go on.
pub fn failed(message: &str) -> Error {
    Error::invalid(format!("the other side ended it: {message}"))
}

async fn synced(peer: &mut impl Peer) -> Result<()> {
    match hear(peer).await? {
        ToSource::Synced => Ok(()),
        _ => Err(strange()),
    }
}

fn strange() -> Error {
    Error::new(Kind::Io, "the other side answered something else")
}
