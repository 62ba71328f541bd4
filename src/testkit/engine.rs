//! The engine as a subject: stacks of ploop deltas over a delta or a raw base.

use super::subject::{BenchStore, Chain, Setup, Subject, Wish};
use crate::disk::Disk;
use crate::stack::AnyLayer;
use ploop_formats::Result;
use ploop_formats::layer::Layer;
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::raw::Raw;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::Rules;
use ploop_formats::testkit::image::{Delta, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Value, ZERO};
use ploop_formats::units::SECTOR;

/// The smallest cluster that the format allows, so that a state is small.
const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = (CLUSTER / SECTOR) as usize;

/// The engine.
#[derive(Debug)]
pub struct Engine;

/// Numbers the values of the first images.
struct Numbers(Value);

impl Numbers {
    /// Sectors of one cluster: stamps, and now and then zeros.
    fn cluster(&mut self, rng: &mut Rng) -> Vec<Value> {
        let zeros = rng.one_in(8);
        (0..SECTORS)
            .map(|_| {
                self.0 += 1;
                if zeros && rng.one_in(2) { ZERO } else { self.0 }
            })
            .collect()
    }

    /// Clusters of a layer, each there once in `one_in` times.
    fn layer(&mut self, rng: &mut Rng, clusters: u64, one_in: u64) -> Vec<Option<Vec<Value>>> {
        (0..clusters)
            .map(|_| rng.one_in(one_in).then(|| self.cluster(rng)))
            .collect()
    }
}

/// What a guest reads through `layer` when it read `values` below it.
fn overlay(values: &mut [Value], layer: &[Option<Vec<Value>>]) {
    for (to, cluster) in values.chunks_mut(SECTORS).zip(layer) {
        if let Some(cluster) = cluster {
            to.copy_from_slice(&cluster[..to.len()]);
        }
    }
}

fn raw(layer: &[Option<Vec<Value>>]) -> Pages {
    let mut pages = Pages::new(layer.len() as u64 * CLUSTER);
    let sectors = layer
        .iter()
        .flat_map(|c| c.clone().unwrap_or_else(|| vec![ZERO; SECTORS]));
    for (n, value) in sectors.enumerate().filter(|(_, v)| *v != ZERO) {
        pages.write(n as u64 * SECTOR, &stamp::run(n as u64, 1, value));
    }
    pages
}

/// How the written file looks at first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Top {
    /// Each cluster is there once in so many times.
    pub one_in: u64,
    /// Free clusters in between, at most.
    pub leaks: u64,
}

impl Engine {
    /// Files that dice choose.
    pub(super) fn files(rng: &mut Rng, wish: &Wish, top: Top) -> Setup {
        let most = if rng.one_in(2) { 4 } else { wish.max_clusters };
        let clusters = rng.range(2, most.min(wish.max_clusters));
        let layers = rng.range(wish.min_layers, wish.max_layers);
        let version = *rng.pick(&[Version::V1, Version::V2]);
        let align = *rng.pick(&[1, 512, 512, 4096]);
        let raw_base = layers > 1 && rng.one_in(4);
        let mut numbers = Numbers(0);
        let mut values = vec![ZERO; clusters as usize * SECTORS];
        let mut files = Vec::new();
        // A lower layer may be shorter than those above it. The base is usually full.
        let mut size = if rng.one_in(3) {
            rng.range(1, clusters)
        } else {
            clusters
        };
        for n in 1..layers {
            size = rng.range(size, clusters);
            let layer = numbers.layer(rng, size, if n == 1 { 1 } else { 2 });
            overlay(&mut values, &layer);
            let rules = Rules {
                align,
                sealed: true,
                ..Rules::default()
            };
            let delta = Delta {
                version,
                cluster: CLUSTER,
                clusters: layer,
                leaks: 0,
                in_use: false,
            };
            let flat = raw_base && n == 1;
            files.push((
                if flat {
                    raw(&delta.clusters)
                } else {
                    delta.make(rng)
                },
                rules,
            ));
        }
        let layer = numbers.layer(rng, clusters, top.one_in);
        overlay(&mut values, &layer);
        let leaks = rng.below(top.leaks + 1) as u32;
        let delta = Delta {
            version,
            cluster: CLUSTER,
            clusters: layer,
            leaks,
            in_use: rng.one_in(4),
        };
        let top = delta.make(rng);
        let tight = (clusters + rng.below(4)) * CLUSTER;
        let rules = Rules {
            align,
            metadata_end: CLUSTER,
            fresh_zero: !rng.one_in(4),
            max_len: if rng.one_in(2) {
                tight.max(top.len())
            } else {
                u64::MAX
            },
            sealed: false,
        };
        files.push((top, rules));
        let slots = *rng.pick(&[4, 16, 64]);
        Setup {
            files,
            raw_base,
            values,
            cluster: SECTORS,
            slots,
        }
    }
}

impl Subject for Engine {
    type Device = Disk<BenchStore>;

    fn setup(rng: &mut Rng, wish: &Wish) -> Setup {
        let top = Top {
            one_in: 4,
            leaks: 2,
        };
        Self::files(rng, wish, top)
    }

    async fn open(mut chain: Chain) -> Result<Disk<BenchStore>> {
        let top = chain.stores.pop().expect("a disk has a file");
        let top = Ploop::open_write(top, chain.ledger).await?;
        let mut layers = Vec::new();
        for (n, store) in chain.stores.into_iter().enumerate() {
            layers.push(if chain.raw_base && n == 0 {
                AnyLayer::Raw(Raw::open_read(store, top.geometry().cluster)?)
            } else {
                AnyLayer::Ploop(Ploop::open_read(store).await?)
            });
        }
        layers.push(AnyLayer::Ploop(top));
        Disk::new(layers, false)
    }

    async fn close(device: &Disk<BenchStore>) -> Result<()> {
        device.close().await
    }

    fn audit(top: &Pages) -> std::result::Result<(), String> {
        audit(top).map(|_| ())
    }

    fn audit_open(top: &Pages) -> std::result::Result<(), String> {
        audit_mark(top, true)
    }

    fn audit_closed(top: &Pages) -> std::result::Result<(), String> {
        audit_mark(top, false)
    }
}

/// Judges a delta, and whether it says that it is in use as it must.
pub(super) fn audit_mark(top: &Pages, in_use: bool) -> std::result::Result<(), String> {
    match (audit(top)?.in_use, in_use) {
        (false, true) => Err("an image that is being written does not say so".into()),
        (true, false) => Err("a closed image says that it is in use".into()),
        _ => Ok(()),
    }
}
