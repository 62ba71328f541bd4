//! Large sequential requests over NBD: the cost of a byte.

use crate::harness::fio::Work;
use crate::harness::images::{self, CLUSTER};
use crate::harness::peers::{self, Contender};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Cache, Options, fill};

/// In both cache modes. The peer without O_DIRECT is compared in both, and the title says so.
pub fn run(options: &Options) {
    if !peers::have("bulk", &["nbdcopy"]) {
        return;
    }
    for (cache, bar) in [(Cache::Writeback, 1.1), (Cache::None, 1.0)] {
        let folder = options.in_memory();
        let raw = folder.path().join("raw");
        fill(&raw, options.size);
        let disk = images::filled(folder.path(), &raw);
        let ours = Contender::lasting("ploop", peers::ours(disk, cache));
        let mut others: Vec<Peer> = Vec::new();
        if let Some(nbdkit) = peers::nbdkit(folder.path(), &raw) {
            others.push((nbdkit, Some(Bar::iops(bar))));
        }
        if peers::have("qemu-nbd", &["qemu-nbd", "qemu-img"]) {
            let image = folder.path().join("qcow2");
            peers::convert("qcow2", &raw, &image);
            let target = peers::qemu("qcow2", &image, cache, ());
            others.push((Contender::lasting("qemu-nbd qcow2", target), None));
        }
        let works: Vec<Work> = [128 << 10, 1 << 20]
            .into_iter()
            .flat_map(|block| [false, true].map(|write| Work::bulk(write, block)))
            .collect();
        let note = match cache {
            Cache::Writeback => "",
            Cache::None => " (nbdkit: page cache, it has no other mode)",
        };
        Table {
            title: format!(
                "NBD, unix socket, sequential QD8; {} MiB image on tmpfs, clusters of {CLUSTER}, \
                 cache {}{note}",
                options.size >> 20,
                cache.name()
            ),
            works: &works,
            span: options.size,
            ours: &ours,
            peers: &others,
        }
        .run(options);
    }
}
