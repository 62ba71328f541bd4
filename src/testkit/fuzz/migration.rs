//! Any bytes to the target of a migration: as a stream, and, past its checksums, as frames.

use crate::image::change;
use crate::image::members::{INCOMING, MIGRATION, MIGRATION_ASIDE};
use crate::image::snapshot::copy::{Window, Work};
use crate::image::snapshot::names;
use crate::image::target::DESCRIPTOR;
use crate::migrate::frame::{DATA_MAX, Frame};
use crate::migrate::receive::Receiver;
use crate::migrate::send::{Peer, Sender};
use crate::migrate::talk::{self, Hello, ToSource, ToTarget};
use crate::testkit::migrations::may_go;
use crate::testkit::trees::{self, Formats, RULES};
use bytes::{Buf, Bytes};
use ploop_formats::Result;
use ploop_formats::descriptor::Descriptor;
use ploop_formats::store::mutate::Mutator;
use ploop_formats::store::sim::{Rules, Sim, SimFolder};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use std::collections::VecDeque;

/// Larger disks would be tried for hours.
const SIZE_MAX: u64 = 64 << 20;

/// Bytes of a stream, and pieces that each become a frame: a kind, a length, and what it carries.
pub fn run(input: &[u8]) {
    let mut stream = input;
    while let Ok(Some(_)) = Frame::read(&mut stream) {}
    let sim = Sim::new(0);
    sim.instant(true);
    let rules = Rules {
        metadata_end: u64::MAX,
        ..RULES
    };
    let folder = SimFolder::new(sim, Mutator::new(), rules);
    now(receive(&folder, input));
}

async fn receive(folder: &SimFolder, mut input: &[u8]) {
    let Some(hello) = piece(&mut input).and_then(hello) else {
        return;
    };
    let disk = Descriptor::parse(hello.descriptor.as_bytes());
    let Ok((mut receiver, _)) = Receiver::begin(folder, hello).await else {
        assert!(!folder.names().contains_key(DESCRIPTOR));
        return;
    };
    let disk = disk.expect("it was accepted");
    while let Some(frame) = piece(&mut input) {
        if receiver.take(frame, &mut ()).await.is_err() {
            break;
        }
    }
    let own = [
        DESCRIPTOR,
        INCOMING,
        MIGRATION,
        MIGRATION_ASIDE,
        names::FILE,
    ];
    for name in folder.names().keys() {
        let is_image = disk.images().iter().any(|image| image.file == *name);
        assert!(is_image || own.contains(&name.as_str()), "{name:?}");
    }
    assert_eq!(folder.names().contains_key(DESCRIPTOR), receiver.is_done());
}

fn hello(frame: Frame) -> Option<Hello> {
    let Frame::Message(text) = frame else {
        return None;
    };
    match talk::parse(&text) {
        Ok(ToTarget::Hello(hello)) if is_small(&hello) => Some(hello),
        _ => None,
    }
}

fn is_small(hello: &Hello) -> bool {
    let disk = Descriptor::parse(hello.descriptor.as_bytes());
    let size = disk.map_or(0, |disk| change::size(&disk));
    size <= SIZE_MAX && hello.deltas.iter().all(|delta| delta.size <= SIZE_MAX)
}

fn piece(input: &mut &[u8]) -> Option<Frame> {
    let kind = input.try_get_u8().ok()?;
    let len = usize::from(input.try_get_u16_le().ok()?).min(input.len());
    let (mut own, rest) = input.split_at(len);
    *input = rest;
    Some(match kind % 3 {
        0 => Frame::Message(Bytes::copy_from_slice(own)),
        1 => {
            let at = own.try_get_u64_le().ok()?;
            let len = own.len().clamp(1, DATA_MAX);
            let mut bytes = ploop_formats::buf::aligned(len);
            bytes.iter_mut().zip(own).for_each(|(to, from)| *to = *from);
            Frame::Data {
                at,
                bytes: bytes.freeze(),
            }
        }
        _ => Frame::Zero {
            at: own.try_get_u64_le().ok()?,
            len: own.try_get_u64_le().ok()?,
        },
    })
}

fn put(out: &mut Vec<u8>, frame: &Frame) {
    let (kind, body) = match frame {
        Frame::Message(text) => (0, text.to_vec()),
        Frame::Data { at, bytes } => (1, [&at.to_le_bytes()[..], bytes].concat()),
        Frame::Zero { at, len } => (2, [at.to_le_bytes(), len.to_le_bytes()].concat()),
    };
    out.push(kind);
    out.extend((body.len() as u16).to_le_bytes());
    out.extend(body);
}

/// Writes down what a source sends.
struct Scribe<'f> {
    receiver: Option<Receiver<'f, SimFolder>>,
    folder: &'f SimFolder,
    said: Vec<u8>,
    answers: VecDeque<ToSource>,
}

impl Peer for Scribe<'_> {
    async fn send(&mut self, frame: Frame) -> Result<()> {
        put(&mut self.said, &frame);
        let answer = match (&mut self.receiver, hello(frame.clone())) {
            (Some(receiver), _) => receiver.take(frame, &mut ()).await?,
            (None, Some(hello)) => {
                let (receiver, welcome) = Receiver::begin(self.folder, hello).await?;
                self.receiver = Some(receiver);
                Some(welcome)
            }
            (None, None) => None,
        };
        self.answers.extend(answer);
        Ok(())
    }

    async fn hear(&mut self) -> Result<ToSource> {
        Ok(self.answers.pop_front().expect("an answer"))
    }
}

/// What was said when disks moved.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let formats = [Formats::Ploop, Formats::Mixed];
    let moved = formats.into_iter().flat_map(|formats| {
        let disks = (0..).filter_map(move |seed| said(seed, formats));
        disks.take(2)
    });
    let named = moved.zip(0..);
    named.map(|(said, n)| (format!("disk {n}"), said)).collect()
}

fn said(seed: u64, formats: Formats) -> Option<Vec<u8>> {
    let mut rng = Rng::new(seed);
    let (source, tree) = trees::make(&mut rng, formats, 3);
    if !may_go(&source, &tree.disk) {
        return None;
    }
    source.sim().instant(true);
    let target = source.sibling(1);
    let window = Window {
        memory: trees::CLUSTER,
        step: trees::CLUSTER,
        unsynced: trees::CLUSTER,
    };
    let mut scribe = Scribe {
        receiver: None,
        folder: &target,
        said: Vec::new(),
        answers: VecDeque::new(),
    };
    let moved = async {
        let (watch, pace) = (&mut (), &());
        let sender = Sender::prepare(&source, None, |_| Ok(String::new())).await?;
        let mut work = Work::new(watch, pace).within(window);
        sender.send(&mut scribe, &mut work).await
    };
    now(moved).ok().map(|_| scribe.said)
}
