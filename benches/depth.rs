//! Stacks of many deltas beside the same disk without any: what a lookup through them costs.

use crate::harness::fio::Work;
use crate::harness::images::{self, Base, CLUSTER};
use crate::harness::peers::{self, Contender};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Options, fill};

/// Everything is in the base, so that each request asks every layer.
pub fn run(options: &Options) {
    if !peers::have("depth", &["nbdcopy"]) {
        return;
    }
    let folder = options.in_memory();
    let raw = folder.path().join("raw");
    fill(&raw, options.size);
    let flat = images::filled(folder.path(), &raw);
    std::fs::remove_file(&raw).expect("ours");
    let stacked = |layers: usize| {
        let base = flat.image();
        let disk = images::stack(folder.path(), &Base::Delta(&base), options.size, layers);
        let target = peers::ours_read_only(disk, options.cache);
        Contender::lasting(&format!("{layers} layers"), target)
    };
    for layers in [16, 64] {
        let (deep, flat) = (stacked(layers), stacked(1));
        let peers: [Peer; 1] = [(flat, Some(Bar::iops(0.95)))];
        let works = [
            Work::random(false, 1),
            Work::random(false, 32),
            Work::bulk(false, 128 << 10),
        ];
        Table {
            title: format!(
                "{layers} layers beside one, all data in the base; {} MiB image on tmpfs, clusters \
                 of {CLUSTER}, cache {}",
                options.size >> 20,
                options.cache.name()
            ),
            works: &works,
            span: options.size,
            ours: &deep,
            peers: &peers,
        }
        .run(options);
    }
}
