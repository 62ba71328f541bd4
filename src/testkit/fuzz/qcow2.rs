//! Any bytes as a qcow2 image, and a made image with words of its tables changed under a guest that
//! reads, writes and discards: no panic, no hang, no memory beyond what the file itself can justify.
//!
//! What a check finds nothing wrong with stays like that, and holds what was written.

use super::EXTREMES;
use crate::device::{Device, Zero};
use crate::disk::Disk;
use crate::stack::{AnyLayer, Stack};
use bytes::{Bytes, BytesMut};
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::ledger::Ledger;
use ploop_formats::qcow2::check::{Repair, check, repair};
use ploop_formats::qcow2::snapshots::{self, Wanted};
use ploop_formats::qcow2::{Header, Qcow2};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::qcow2::Image;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Kind, Result};
use std::sync::Arc;

/// Bytes of a disk that are looked at, from its start.
const LOOK: u64 = 1 << 20;
/// Bytes that one request is about, at most.
const PIECE: u64 = 32 << 10;
/// Bytes by which a repair may let a file grow.
const GROWTH: u64 = 1 << 20;
/// Sectors of a made image.
const SECTORS: u64 = 120;
/// Bytes that a change of a word, or a request, is made of.
const STEP: usize = 6;
/// Changes of words, and requests, that are carried out.
const CHANGES: usize = 4;
const REQUESTS: usize = 100;

/// One image.
pub fn open(input: &[u8]) {
    let _ = Header::parse(input);
    let store = MemStore::from_bytes(input);
    look(store.copy());
    mend(&store.copy());
    let requests: Vec<u8> = (0..48).map(|n: u8| n.wrapping_mul(43)).collect();
    serve(&store, &requests);
}

/// Reads what can be read of an image: lists, extents, bytes.
fn look(store: MemStore) {
    let Ok(image) = now(Qcow2::open_read(store, None)) else {
        return;
    };
    drop((now(image.snapshots()), now(image.bitmaps())));
    let size = image.geometry().size.min(LOOK);
    let mut at = 0;
    while at < size {
        let Ok(extent) = now(image.map(at, PIECE.min(size - at))) else {
            return;
        };
        assert!((1..=PIECE).contains(&extent.len()), "{extent:?} at {at}");
        let buf = BytesMut::zeroed(extent.len() as usize);
        match extent {
            Extent::Data { at: place, .. } => drop(now(image.store().read_at(place, buf))),
            Extent::Packed { .. } => drop(now(image.unpack(at, buf))),
            _ => {}
        }
        at += extent.len();
    }
}

/// Repairs an image, and makes a snapshot of what is left: a repair makes nothing worse, and what it
/// leaves sound stays so.
fn mend(store: &MemStore) {
    let allowed = Repair {
        growth_max: GROWTH,
        errors: true,
    };
    let Ok(before) = now(check(store)) else {
        return;
    };
    let done = now(repair(store, &allowed));
    if let Ok(after) = &done {
        assert!(after.errors <= before.errors, "{before:?} became {after:?}");
    }
    let wanted = Wanted {
        name: b"fuzz".to_vec(),
        seconds: 1,
        nanoseconds: 1,
    };
    if done.is_ok() && now(snapshots::create(store, &wanted, &mut ())).is_ok() {
        assert!(is_sound(store), "a snapshot of a sound image broke it");
    }
}

/// Whether a check finds no error.
fn is_sound(store: &MemStore) -> bool {
    now(check(store)).is_ok_and(|report| report.errors == 0)
}

/// Carries out requests on an image, and closes it.
fn serve(store: &MemStore, requests: &[u8]) {
    let sound = is_sound(store);
    let Ok(top) = now(Qcow2::open_write(store.clone(), None, Ledger::local())) else {
        return;
    };
    if top.geometry().size == 0 {
        return;
    }
    let layers = vec![Arc::new(AnyLayer::Qcow2(Box::new(top)))];
    let disk = Disk::over(Stack::of_chain(layers).expect("one layer"), false);
    for request in requests.chunks_exact(STEP).take(REQUESTS) {
        let done = carry_out(&disk, request.first_chunk().expect("a whole chunk"), sound);
        // A check does not unpack what is compressed.
        let fine = done
            .as_ref()
            .map_or_else(|e| e.kind() == Kind::Damaged, |()| true);
        assert!(!sound || fine, "a sound image: {done:?}");
    }
    let closed = now(disk.close());
    drop(disk);
    if sound {
        closed.expect("a sound image closes");
        let report = now(check(store)).expect("what we closed can be checked");
        assert_eq!(report.errors, 0, "{report:?}");
    }
}

/// One request to the first [`LOOK`] bytes; of a sound image what was written is read again.
fn carry_out(disk: &Disk<MemStore>, request: &[u8; STEP], sound: bool) -> Result<()> {
    let [kind, at_high, at_low, len_high, len_low, value] = *request;
    let size = disk.size().min(LOOK);
    let at = u64::from(u16::from_be_bytes([at_high, at_low])) * 7 % size;
    let len = u64::from(u16::from_be_bytes([len_high, len_low])).clamp(1, PIECE);
    let len = len.min(size - at);
    let read = || now(disk.read(at, BytesMut::zeroed(len as usize)));
    let expect = |byte: u8| {
        let found = read()?;
        let right = !sound || found.iter().all(|is| *is == byte);
        assert!(right, "{len} bytes at {at} are not {byte}");
        Ok(())
    };
    match kind & 0x07 {
        0..=2 => {
            let data = Bytes::from(vec![value; len as usize]);
            now(disk.write(at, data, kind & 0x40 != 0))?;
            expect(value)
        }
        3 => {
            let how = [Zero::MayFree, Zero::Allocate][usize::from(value & 1)];
            now(disk.zero(at, len, how, kind & 0x40 != 0))?;
            expect(0)
        }
        4 => now(disk.discard(at, len)),
        5 => now(disk.flush()),
        6 => now(disk.extents(at, len, 8)).map(drop),
        _ => read().map(drop),
    }
}

/// The first byte chooses an image and the second says how many of its words are changed; each six
/// more are such a change, then each six a request.
pub fn requests(input: &[u8]) {
    let [seed, changes, rest @ ..] = input else {
        return;
    };
    let mut rng = Rng::new(u64::from(*seed));
    let pages = chosen(&mut rng).make(&mut rng);
    let store = MemStore::from_pages(pages);
    let mut bytes = store.to_vec();
    let len = STEP * (usize::from(*changes) % (CHANGES + 1)).min(rest.len() / STEP);
    let (changes, requests) = rest.split_at(len);
    for change in changes.chunks_exact(STEP) {
        alter(&mut bytes, change.first_chunk().expect("a whole chunk"));
    }
    let store = match changes.is_empty() {
        true => store,
        false => MemStore::from_bytes(&bytes),
    };
    serve(&store, requests);
    look(store.copy());
    mend(&store);
}

/// An image of any kind.
fn chosen(rng: &mut Rng) -> Image {
    match rng.one_in(2) {
        true => Image::odd_of_dice(rng, SECTORS, &mut 0),
        false => Image::of_dice(rng, SECTORS, &mut 0),
    }
}

/// Changes a word: of the header, or near the start of a cluster, where tables have most of theirs.
fn alter(bytes: &mut [u8], change: &[u8; STEP]) {
    let [how, high, low, word, bit, value] = *change;
    let unit = 1usize << bytes.get(23).copied().unwrap_or(9).clamp(9, 21);
    let clusters = (bytes.len() / unit).max(1);
    let cluster = usize::from(u16::from_be_bytes([high, low])) % clusters;
    let at = cluster * unit + usize::from(word % 32) * 8;
    let Some(place) = bytes.get_mut(at..at + 8) else {
        return;
    };
    let was = u64::from_be_bytes(place.try_into().expect("8 bytes"));
    let step = u64::from(value) << 9;
    let is = match how % 6 {
        0 => was ^ 1 << (bit % 64),
        1 => was.wrapping_add(step),
        2 => was.wrapping_sub(step),
        3 => EXTREMES[usize::from(value) % EXTREMES.len()],
        4 => 1 << 63 | step,
        _ => 1 << 62 | was,
    };
    place.copy_from_slice(&is.to_be_bytes());
}

/// Images of every kind, which nothing is wrong with.
pub fn images() -> Vec<(String, Vec<u8>)> {
    let made = |seed| {
        let mut rng = Rng::new(seed);
        let image = chosen(&mut rng);
        let pages = image.make(&mut rng);
        let name = format!("made-{seed}");
        (name, MemStore::from_pages(pages).to_vec())
    };
    let small = |image: &(String, Vec<u8>)| image.1.len() < 200_000;
    (0..).map(made).filter(small).take(16).collect()
}

/// Mixtures of requests on each image, without a change and with some.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mixture = |n: u8| {
        let mut rng = Rng::new(u64::from(n));
        let mut input = vec![n, n % (CHANGES as u8 + 1)];
        input.extend((0..40 * STEP).map(|_| rng.next() as u8));
        (format!("mixed-{n}"), input)
    };
    (0..40).map(mixture).collect()
}
