//! The first write to each cluster of a fresh image: the cost of allocation, and of its flush.

use crate::common::process::ok;
use crate::common::programs::tool;
use crate::harness::fio::Work;
use crate::harness::images;
use crate::harness::peers::{self, Contender};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Cache, Options};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// So large that hardly a request meets a cluster that is there already.
const SIZE: u64 = 64 << 30;

/// A fresh image and a fresh server for every run.
pub fn run(options: &Options) {
    let folder = options.in_memory();
    let at = folder.path().to_owned();
    let ours = Contender::fresh("ploop", move || {
        peers::ours(images::fresh(&at, SIZE), Cache::None)
    });
    let mut others: Vec<Peer> = Vec::new();
    if peers::have("qemu-nbd", &["qemu-nbd", "qemu-img"]) {
        let plain = qcow2(folder.path(), "qemu-nbd qcow2 64k", "cluster_size=64k");
        let extended = "cluster_size=128k,extended_l2=on";
        let extended = qcow2(folder.path(), "qemu-nbd qcow2 128k, extended L2", extended);
        others.push((plain, Some(Bar::iops(2.0))));
        others.push((extended, Some(Bar::iops(1.5))));
    }
    let works: Vec<Work> = [0, 16]
        .into_iter()
        .flat_map(|flush_every| {
            [1, 32].map(|depth| Work {
                flush_every,
                ..Work::random(true, depth)
            })
        })
        .collect();
    Table {
        title: format!(
            "First writes over NBD, 4 KiB random; fresh {} GiB image on tmpfs, cache none, ours with \
             clusters of {}",
            SIZE >> 30,
            images::CLUSTER
        ),
        works: &works,
        span: SIZE,
        ours: &ours,
        peers: &others,
    }
    .run(options);
}

fn qcow2(folder: &Path, name: &str, how: &'static str) -> Contender {
    let folder: PathBuf = folder.to_owned();
    Contender::fresh(name, move || {
        let own = TempDir::new_in(&folder).expect("a folder");
        let image = own.path().join("qcow2");
        ok(tool("qemu-img")
            .args(["create", "-f", "qcow2", "-o", how])
            .arg(&image)
            .arg(SIZE.to_string()));
        peers::qemu("qcow2", &image, Cache::None, own)
    })
}
