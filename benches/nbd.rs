//! Small random requests over NBD, every cluster allocated: the cost of a request.

use crate::harness::fio::Work;
use crate::harness::images::{self, CLUSTER};
use crate::harness::peers::{self, Contender};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Options, fill};

/// One connection at both depths, then more connections at the greater one.
pub fn run(options: &Options) {
    if !peers::have("nbd", &["nbdcopy"]) {
        return;
    }
    let folder = options.in_memory();
    let raw = folder.path().join("raw");
    fill(&raw, options.size);
    let disk = images::filled(folder.path(), &raw);
    let ours = Contender::lasting("ploop", peers::ours(disk, options.cache));
    let mut one: Vec<Peer> = Vec::new();
    if let Some(nbdkit) = peers::nbdkit(folder.path(), &raw) {
        one.push((
            nbdkit,
            Some(Bar {
                iops: 1.2,
                cpu: 1.0,
            }),
        ));
    }
    if peers::have("qemu-nbd", &["qemu-nbd", "qemu-img"]) {
        for format in ["qcow2", "parallels"] {
            let image = folder.path().join(format);
            peers::convert(format, &raw, &image);
            let target = peers::qemu(format, &image, options.cache, ());
            let name = format!("qemu-nbd {format}");
            let bar = Bar {
                iops: 2.0,
                cpu: 0.4,
            };
            one.push((Contender::lasting(&name, target), Some(bar)));
        }
    }
    let (size, cache) = (options.size >> 20, options.cache.name());
    let title = format!(
        "NBD, unix socket, 4 KiB random; {size} MiB image on tmpfs, clusters of {CLUSTER}, fully \
         allocated, cache {cache}"
    );
    let table = |title: String, works: &[Work], peers: &[Peer]| {
        let (ours, span) = (&ours, options.size);
        Table {
            title,
            works,
            span,
            ours,
            peers,
        }
        .run(options);
    };
    let works = [(false, 1), (false, 32), (true, 1), (true, 32)];
    let works = works.map(|(write, depth)| Work::random(write, depth));
    table(title.clone(), &works, &one);
    let many: Vec<Peer> = one
        .into_iter()
        .map(|(peer, bar)| {
            let bar = if peer.name.starts_with("nbdkit") {
                Some(Bar::iops(2.0))
            } else {
                bar
            };
            (peer, bar)
        })
        .collect();
    let works: Vec<Work> = [2, 4]
        .into_iter()
        .flat_map(|connections| {
            [false, true].map(|write| Work {
                connections,
                ..Work::random(write, 32)
            })
        })
        .collect();
    table(title + ", several connections", &works, &many);
}
