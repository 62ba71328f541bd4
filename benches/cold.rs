//! Random requests to a disk with O_DIRECT: the page cache helps nobody.

use crate::harness::fio::Work;
use crate::harness::images::{self, CLUSTER};
use crate::harness::peers::{self, Contender};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Cache, Options, fill};

/// Four connections.
pub fn run(options: &Options) {
    if !peers::have("cold", &["nbdcopy"]) {
        return;
    }
    let folder = options.on_disk();
    let raw = folder.path().join("raw");
    fill(&raw, options.size);
    let disk = images::filled(folder.path(), &raw);
    let ours = Contender::lasting("ploop", peers::ours(disk, Cache::None));
    let mut others: Vec<Peer> = Vec::new();
    if peers::have("qemu-nbd", &["qemu-nbd", "qemu-img"]) {
        let image = folder.path().join("qcow2");
        peers::convert("qcow2", &raw, &image);
        let target = peers::qemu("qcow2", &image, Cache::None, ());
        let bar = Bar {
            iops: 1.5,
            cpu: 0.5,
        };
        others.push((Contender::lasting("qemu-nbd qcow2", target), Some(bar)));
    }
    let works = [false, true].map(|write| Work {
        connections: 4,
        ..Work::random(write, 32)
    });
    Table {
        title: format!(
            "NBD, unix socket, 4 KiB random; {} MiB image on a disk, clusters of {CLUSTER}, O_DIRECT",
            options.size >> 20
        ),
        works: &works,
        span: options.size,
        ours: &ours,
        peers: &others,
    }
    .run(options);
}
