//! Any bytes as requests to a disk of two layers in memory: it never holds anything but what a
//! flat array would.

use crate::device::{Device, Zero};
use crate::disk::Disk;
use crate::stack::AnyLayer;
use bytes::{Bytes, BytesMut};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::image::{Delta, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::SECTOR;

const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = (CLUSTER / SECTOR) as usize;
const CLUSTERS: usize = 5;
const SIZE: usize = CLUSTER as usize * CLUSTERS;
/// Bytes that one request is made of.
const REQUEST: usize = 6;
/// Requests that are carried out: enough to meet every state, few enough to stay quick.
const REQUESTS: usize = 400;

/// The disk, its files, and what it must hold.
struct Bench {
    base: MemStore,
    top: MemStore,
    disk: Disk<MemStore>,
    model: Vec<u8>,
}

fn layer(version: Version, every: usize) -> MemStore {
    let values = |n: usize| (0..SECTORS).map(|s| (n * SECTORS + s + 1) as u64).collect();
    let delta = Delta {
        version,
        cluster: CLUSTER,
        clusters: (0..CLUSTERS)
            .map(|n| n.is_multiple_of(every).then(|| values(n)))
            .collect(),
        leaks: 1,
        in_use: false,
    };
    MemStore::from_pages(delta.make(&mut Rng::new(every as u64)))
}

fn open(base: &MemStore, top: &MemStore) -> Disk<MemStore> {
    let layers = now(async {
        let base = Ploop::open_read(base.clone())
            .await
            .expect("a healthy base");
        let top = Ploop::open_write(top.clone(), Ledger::local()).await;
        let top = top.expect("a top that we made or closed");
        vec![AnyLayer::Ploop(base), AnyLayer::Ploop(top)]
    });
    Disk::new(layers, false).expect("layers of one kind")
}

impl Bench {
    fn new(kind: u8) -> Self {
        let version = if kind & 1 == 0 {
            Version::V1
        } else {
            Version::V2
        };
        let align = [1, 512, 4096][usize::from(kind >> 1) % 3];
        let (base, top) = (layer(version, 2), layer(version, 3));
        let (base, top) = (base.aligned_to(align), top.aligned_to(align));
        let disk = open(&base, &top);
        let model = now(disk.read(0, BytesMut::zeroed(SIZE))).expect("a healthy disk");
        let model = model.to_vec();
        Self {
            base,
            top,
            disk,
            model,
        }
    }

    fn request(&mut self, bytes: &[u8; REQUEST]) {
        let [kind, at_high, at_low, len_high, len_low, value] = *bytes;
        let at = usize::from(u16::from_be_bytes([at_high, at_low])) * 3 % SIZE;
        // Half of the requests are of whole sectors, as guests' are.
        let at = if kind & 0x80 == 0 { at / 512 * 512 } else { at };
        let len = usize::from(u16::from_be_bytes([len_high, len_low])).max(1);
        let len = if kind & 0x80 == 0 {
            len.next_multiple_of(512)
        } else {
            len
        };
        let len = len.min(SIZE - at);
        let (from, bytes) = (at as u64, len as u64);
        match kind & 0x0F {
            0..=4 => {
                let data = Bytes::from(vec![value; len]);
                now(self.disk.write(from, data, kind & 0x40 != 0)).expect("memory takes all");
                self.model[at..at + len].fill(value);
            }
            5..=7 => {
                let how = [Zero::MayFree, Zero::Allocate, Zero::Fast][usize::from(kind & 0x0F) - 5];
                match now(self.disk.zero(from, bytes, how, kind & 0x40 != 0)) {
                    Ok(()) => self.model[at..at + len].fill(0),
                    Err(e) => assert_eq!((how, e.kind()), (Zero::Fast, crate::Kind::Unsupported)),
                }
            }
            8..=9 => {
                now(self.disk.discard(from, bytes)).expect("memory takes all");
                self.settle(at, len);
            }
            10 => now(self.disk.flush()).expect("memory takes all"),
            11 => self.reopen(value & 1 != 0),
            12 => {
                let found = now(self.disk.extents(from, bytes, usize::from(value) + 1));
                let found = found.expect("a healthy disk");
                let total: u64 = found.iter().map(|extent| extent.len).sum();
                assert!((1..=bytes).contains(&total), "{found:?}");
            }
            _ => self.compare(at, len),
        }
    }

    /// A discard leaves each byte, or makes it zero.
    fn settle(&mut self, at: usize, len: usize) {
        let found = now(self.disk.read(at as u64, BytesMut::zeroed(len))).expect("a healthy disk");
        for (was, is) in self.model[at..at + len].iter_mut().zip(&found[..]) {
            assert!(*is == 0 || is == was, "a discard made {was} into {is}");
            *was = *is;
        }
    }

    fn compare(&self, at: usize, len: usize) {
        let found = now(self.disk.read(at as u64, BytesMut::zeroed(len))).expect("a healthy disk");
        assert!(found[..] == self.model[at..at + len], "{len} bytes at {at}");
    }

    /// Closes, or leaves after a flush as one who is killed, and opens again.
    fn reopen(&mut self, cleanly: bool) {
        if cleanly {
            now(self.disk.close()).expect("memory takes all");
        } else {
            now(self.disk.flush()).expect("memory takes all");
        }
        let state = audit(&self.top.pages()).expect("a healthy image");
        assert_eq!(state.in_use, !cleanly);
        self.disk = open(&self.base, &self.top);
        self.compare(0, SIZE);
    }
}

/// The first byte chooses the disk, each six more are a request.
pub fn run(input: &[u8]) {
    let Some((kind, requests)) = input.split_first() else {
        return;
    };
    let mut bench = Bench::new(*kind);
    for request in requests.chunks_exact(REQUEST).take(REQUESTS) {
        bench.request(request.first_chunk().expect("a whole chunk"));
    }
    bench.compare(0, SIZE);
    bench.reopen(true);
}

/// One of everything, and a long mixture, on each kind of disk.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    (0..6u8)
        .flat_map(|kind| {
            let all = (0..16).flat_map(|op| [op, 0x15, 0x60, 0x12, 0x00, 0xA0 + op]);
            let mut rng = Rng::new(kind.into());
            let mixed = (0..100 * REQUEST).map(move |_| rng.next() as u8);
            [
                (
                    format!("each-{kind}"),
                    [kind].into_iter().chain(all).collect(),
                ),
                (
                    format!("mixed-{kind}"),
                    [kind].into_iter().chain(mixed).collect(),
                ),
            ]
        })
        .collect()
}
