//! Whole new images: QEMU and our own check find nothing to complain of, and both read what went in.

use crate::qemu::{Folder, installed};
use bytes::BytesMut;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::create::Create;
use ploop_formats::qcow2::header::{Compression, Version};
use ploop_formats::qcow2::pack::Packer;
use ploop_formats::qcow2::refcount::Width;
use ploop_formats::qcow2::{Qcow2, compress, read_header};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::record::{RecordStore, Recording};
use ploop_formats::store::sim::{Fate, Rules};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Kind, buf};
use std::collections::BTreeMap;

/// What comes for a guest cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comes {
    Noise,
    Text,
    Zeros,
}

/// An image to be, and what comes for it: the other clusters are never mentioned.
#[derive(Debug, Clone)]
struct Plan {
    create: Create,
    compressed: bool,
    comes: BTreeMap<u64, Comes>,
}

fn plan(log2: u32, size: u64, how: Option<Compression>) -> Plan {
    Plan {
        create: Create {
            version: Version::V3,
            size,
            cluster: ClusterSize::of_qcow2(log2).unwrap(),
            width: Width::new(4).unwrap(),
            extended: false,
            lazy: false,
            compression: how.unwrap_or(Compression::Deflate),
            backing: None,
        },
        compressed: how.is_some(),
        comes: BTreeMap::new(),
    }
}

impl Plan {
    fn clusters(&self) -> u64 {
        self.create.cluster.count(self.create.size)
    }

    /// Something for one in `each` clusters.
    fn scattered(mut self, rng: &mut Rng, each: u64) -> Self {
        for n in 0..self.clusters() {
            if rng.one_in(each) {
                let comes = [Comes::Noise, Comes::Text, Comes::Text, Comes::Zeros];
                self.comes.insert(n, comes[rng.below(4) as usize]);
            }
        }
        self
    }

    fn with(mut self, clusters: impl IntoIterator<Item = u64>, comes: Comes) -> Self {
        self.comes.extend(clusters.into_iter().map(|n| (n, comes)));
        self
    }

    /// The bytes of a cluster; zeros behind the end of the disk.
    fn bytes(&self, n: u64) -> Vec<u8> {
        let size = self.create.cluster.bytes();
        let mut bytes = match self.comes.get(&n) {
            Some(Comes::Noise) => {
                let mut rng = Rng::new(n + 1);
                (0..size / 8)
                    .flat_map(|_| rng.next().to_le_bytes())
                    .collect()
            }
            Some(Comes::Text) => {
                let line = format!("cluster {n} of some text, ");
                line.bytes().cycle().take(size as usize).collect()
            }
            _ => vec![0; size as usize],
        };
        let end = (self.create.size - n * size).min(size) as usize;
        bytes[end..].fill(0);
        bytes
    }

    fn packed(&self) -> MemStore {
        let store = MemStore::default().aligned_to(512);
        now(self.pack(&store)).unwrap_or_else(|e| panic!("{:?}: {e}", self.create));
        store
    }

    async fn pack(&self, store: &impl Store) -> ploop_formats::Result<()> {
        let size = self.create.cluster.bytes();
        let mut packer = Packer::new(store, &self.create)?;
        let mut run: Option<(u64, BytesMut)> = None;
        for (&n, comes) in &self.comes {
            let (at, bytes) = (n * size, self.bytes(n));
            let small = match self.compressed {
                true => compress(self.create.compression, &bytes),
                false => None,
            };
            let follows = |(from, run): &(u64, BytesMut)| from + run.len() as u64 == at;
            let data = *comes != Comes::Zeros && small.is_none();
            if !(data && run.as_ref().is_some_and(follows))
                && let Some((from, bytes)) = run.take()
            {
                packer.data(from, bytes.freeze()).await?;
            }
            match (comes, small) {
                (Comes::Zeros, _) => packer.reserve(at, size).await?,
                (_, Some(small)) => packer.packed(at, &small).await?,
                (_, None) => run
                    .get_or_insert_with(|| (at, BytesMut::new()))
                    .1
                    .extend(bytes),
            }
        }
        if let Some((from, bytes)) = run {
            packer.data(from, bytes.freeze()).await?;
        }
        packer.finish().await
    }

    /// What is wrong with the image, by our own check and reader.
    fn judge(&self, store: &MemStore) {
        let place = format!("{:?}", self.create);
        let report = now(check(store)).unwrap();
        assert!(report.is_clean(), "{place}: {:?}", report.findings);
        assert!(report.findings.is_empty(), "{place}: {:?}", report.findings);
        assert_eq!(
            report.used_clusters,
            self.create.cluster.count(store.to_vec().len() as u64),
            "{place}: all of the file is used"
        );
        let image = now(Qcow2::open_read(store.clone(), None)).unwrap();
        assert_eq!(image.header().size, self.create.size, "{place}");
        for n in 0..self.clusters() {
            let at = n * self.create.cluster.bytes();
            let len = self.create.cluster.bytes().min(self.create.size - at);
            let extent = now(image.map(at, len)).unwrap();
            let found = match extent {
                Extent::Absent { .. } => {
                    assert!(!self.comes.contains_key(&n), "{place}: cluster {n}");
                    continue;
                }
                Extent::Packed { .. } => now(image.unpack(at, buf::aligned(len as usize))).unwrap(),
                Extent::Data { at, .. } => {
                    let mut bytes = BytesMut::zeroed(len as usize);
                    store.pages().read(at, &mut bytes);
                    bytes
                }
                Extent::Zero { .. } => panic!("{place}: cluster {n}"),
            };
            let packs = self.compressed && self.comes.get(&n) == Some(&Comes::Text);
            let is_packed = matches!(extent, Extent::Packed { .. });
            assert!(is_packed || !packs, "{place}: cluster {n}");
            assert!(found == self.bytes(n)[..len as usize], "{place}: {n}");
        }
    }

    fn raw(&self) -> Vec<u8> {
        let all = (0..self.clusters()).flat_map(|n| self.bytes(n));
        all.take(self.create.size as usize).collect()
    }
}

const HOWS: [Option<Compression>; 3] = [None, Some(Compression::Deflate), Some(Compression::Zstd)];

/// Clusters of these sizes, few and many, sizes of disks that end within one, and small clusters with
/// so many that blocks of refcounts, their table and the first-level table are many clusters long.
fn plans(sizes: impl Iterator<Item = u32> + Clone) -> Vec<Plan> {
    let mut rng = Rng::new(0x9AC4);
    let mut all = Vec::new();
    for how in HOWS {
        for log2 in sizes.clone() {
            let cluster = 1u64 << log2;
            all.push(plan(log2, 0, how));
            all.push(plan(log2, 512, how).with([0], Comes::Text));
            all.push(plan(log2, 40 * cluster + 512, how).scattered(&mut rng, 2));
            all.push(plan(log2, 9 * cluster, how).with(0..9, Comes::Noise));
        }
        all.push(plan(9, 20 << 20, how).scattered(&mut rng, 3));
        all.push(plan(9, 12 << 20, how).with(0..24_576, Comes::Text));
        all.push(plan(9, 9 << 20, how).with(0..17_000, Comes::Noise));
        all.push(plan(12, 64 << 20, how).scattered(&mut rng, 20));
    }
    all
}

#[test]
fn packed_images_of_every_kind_have_nothing_to_complain_of() {
    for plan in plans(9..=21) {
        plan.judge(&plan.packed());
    }
    // A first-level table of more clusters than a block of refcounts tells of.
    let plan = plan(9, 1 << 30, None).with([0, 1, 2_000_000], Comes::Noise);
    let report = now(check(&plan.packed())).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[test]
fn qemu_reads_packed_images_and_finds_no_fault_and_no_leak() {
    if !installed("qemu_reads_packed_images_and_finds_no_fault_and_no_leak") {
        return;
    }
    let folder = Folder::new();
    for plan in plans([9, 12, 16, 21].into_iter()) {
        let store = plan.packed();
        std::fs::write(folder.path("made.qcow2"), store.to_vec()).unwrap();
        let place = format!("{:?}", plan.create);
        assert_eq!(folder.check("made.qcow2"), Some((0, 0)), "{place}");
        if plan.create.size > 0 {
            std::fs::write(folder.path("wanted.raw"), plan.raw()).unwrap();
            folder.img("compare -f qcow2 -F raw made.qcow2 wanted.raw");
        }
    }
}

#[test]
fn compressed_clusters_share_the_clusters_of_the_file() {
    for how in [Compression::Deflate, Compression::Zstd] {
        let plan = plan(16, 64 << 20, Some(how)).with(0..1024, Comes::Text);
        let len = plan.packed().to_vec().len();
        assert!(len < 1 << 20, "{how:?}: {len} bytes of 64 MiB of text");
    }
}

#[test]
fn a_packed_image_is_whole_or_no_image_after_any_cut() {
    let mut rng = Rng::new(7);
    let plan = plan(9, 100 << 10, Some(Compression::Deflate)).scattered(&mut rng, 2);
    let recording = Recording::default();
    let store = RecordStore::new(MemStore::default(), recording.clone());
    now(plan.pack(&store)).unwrap();
    let rules = Rules {
        metadata_end: u64::MAX,
        ..Rules::default()
    };
    let mut images = 0;
    for n in 0..=recording.entries().len() {
        let fates = (0..40).map(Fate::Random).chain([Fate::None, Fate::All]);
        for fate in fates {
            let store = MemStore::from_pages(recording.cut(n, rules, &fate));
            if store.info().len > 0 && now(read_header(&store)).is_ok() {
                plan.judge(&store);
                images += 1;
            }
        }
    }
    assert!(images >= 42, "{images}");
}

#[test]
fn what_does_not_come_in_order_and_whole_is_refused() {
    let create = plan(16, (1 << 20) + 512, None).create;
    let zeros = |len: usize| bytes::Bytes::from(vec![1; len]);
    for (from, len) in [(0, 1 << 16), (1 << 16, 512), (3 << 16, 15 << 16), (7, 0)] {
        let store = MemStore::default();
        let mut packer = Packer::new(&store, &create).unwrap();
        now(packer.data(0, zeros(2 << 16))).unwrap();
        let e = now(packer.data(from, zeros(len))).unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid, "{from} {len}: {e}");
        now(packer.data(2 << 16, zeros(15 << 16))).unwrap();
        for len in [0, 1 << 16] {
            assert!(now(packer.packed(17 << 16, &zeros(len))).is_err());
        }
    }
    let is_there = MemStore::new(512);
    assert!(Packer::new(&is_there, &create).is_err());
    let coarse = MemStore::default().aligned_to(4096);
    let small = plan(9, 512, None).create;
    let e = Packer::new(&coarse, &small).map(drop).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
}
