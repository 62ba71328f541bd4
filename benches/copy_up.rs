//! The first write to a cluster whose data is in a parent: copied up, or not.

use crate::common::process::ok;
use crate::common::programs::tool;
use crate::harness::fio::Work;
use crate::harness::images::{self, Base, CLUSTER};
use crate::harness::peers::{self, Contender};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Cache, Options, fill};
use tempfile::TempDir;

/// Both over one raw base; a fresh top and a fresh server for every run.
pub fn run(options: &Options) {
    let size = options.size * 4;
    let folder = options.in_memory();
    let raw = folder.path().join("raw");
    fill(&raw, size);
    let (at, base) = (folder.path().to_owned(), raw.clone());
    let ours = Contender::fresh("ploop", move || {
        let disk = images::stack(&at, &Base::Raw(&base), size, 2);
        peers::ours(disk, Cache::None)
    });
    let mut others: Vec<Peer> = Vec::new();
    if peers::have("qemu-nbd", &["qemu-nbd", "qemu-img"]) {
        let at = folder.path().to_owned();
        let qcow2 = Contender::fresh("qemu-nbd qcow2 64k", move || {
            let own = TempDir::new_in(&at).expect("a folder");
            let image = own.path().join("qcow2");
            let how = [
                "create",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=64k",
                "-F",
                "raw",
            ];
            ok(tool("qemu-img").args(how).arg("-b").arg(&raw).arg(&image));
            peers::qemu("qcow2", &image, Cache::None, own)
        });
        others.push((qcow2, Some(Bar::iops(1.5))));
    }
    let works = [1, 32].map(|depth| Work::random(true, depth));
    Table {
        title: format!(
            "Writes of 4 KiB over a parent full of data, NBD; {} MiB raw base on tmpfs, top with \
             clusters of {CLUSTER}, cache none",
            size >> 20
        ),
        works: &works,
        span: size,
        ours: &ours,
        peers: &others,
    }
    .run(options);
}
