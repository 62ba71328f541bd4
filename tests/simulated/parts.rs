//! Clusters in part, merged into a file whose blocks are larger than subclusters: what is around them is
//! what it was.

use ploop::image::snapshot::copy::{Work, copy};
use ploop::image::snapshot::parts::Rest;
use ploop::stack::AnyLayer;
use ploop_formats::ledger::Ledger;
use ploop_formats::qcow2::Qcow2;
use ploop_formats::raw::Raw;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::qcow2::{Held, Image};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Seen, Value, ZERO};
use ploop_formats::units::{ClusterSize, SECTOR};

const CLUSTER: u64 = 32 << 10;
const CLUSTERS: u64 = 3;
const SECTORS: u64 = CLUSTERS * CLUSTER / SECTOR;

/// An image of which dice choose what each subcluster of two sectors is.
fn upper(rng: &mut Rng) -> Image {
    let mut value = 1000;
    let mut part = || match rng.below(3) {
        0 => [None; 2],
        1 => [Some(ZERO); 2],
        _ => {
            value += 2;
            [Some(value), Some(value + 1)]
        }
    };
    let mut cluster = || Held::Parts((0..32).flat_map(|_| part()).collect());
    let clusters = (0..CLUSTERS).map(|_| (cluster(), false)).collect();
    Image {
        version: 3,
        extended: true,
        behind: 0,
        log2: CLUSTER.trailing_zeros(),
        order: 4,
        clusters,
        snapshot: false,
        free: 1,
        leaks: 0,
        skip: 0,
    }
}

#[test]
fn what_is_around_a_subcluster_in_a_larger_block_stays() {
    for seed in 0..100 {
        let mut rng = Rng::new(seed);
        let mut wanted: Vec<Value> = (1..=SECTORS).collect();
        let mut pages = Pages::new(SECTORS * SECTOR);
        for (n, value) in (0..).zip(&wanted) {
            pages.write(n * SECTOR, &stamp::run(n, 1, *value));
        }
        let image = upper(&mut rng);
        let child = MemStore::from_pages(image.make(&mut rng));
        let child = AnyLayer::Qcow2(Box::new(now(Qcow2::open_read(child, None)).unwrap()));
        let file = MemStore::from_pages(pages);
        let cluster = ClusterSize::new(CLUSTER).unwrap();
        let align = *rng.pick(&[512, 4096]);
        let lower = Raw::open_write(file.clone().aligned_to(align), cluster, Ledger::local());
        let lower = AnyLayer::Raw(lower.unwrap());
        let rest = Rest::new(Vec::<AnyLayer<MemStore>>::new()).unwrap();
        let mut watch = ();
        let mut work = Work::new(&mut watch, &());
        let copied = copy(&child, &lower, &rest, &mut work);
        assert_eq!(now(copied).unwrap(), SECTORS * SECTOR, "seed {seed}");
        image.overlay(&mut wanted);
        let bytes = file.to_vec();
        let sectors = bytes.chunks_exact(SECTOR as usize).zip(0..);
        let found: Vec<Seen> = sectors.map(|(sector, n)| stamp::look(sector, n)).collect();
        let wanted: Vec<Seen> = wanted.into_iter().map(Seen::Value).collect();
        assert!(found == wanted, "seed {seed}, blocks of {align}");
    }
}
