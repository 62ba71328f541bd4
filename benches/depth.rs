//! Stacks of many deltas beside the same disk without any: what a lookup through them costs.

use crate::common::process::{ok, ok_within};
use crate::common::programs::{ploopctl, tool};
use crate::common::serve::Disk;
use crate::harness::fio::Work;
use crate::harness::images::{self, Base, CLUSTER};
use crate::harness::peers::{self, Contender};
use crate::harness::table::{Bar, Table};
use crate::harness::{Options, fill};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// Clusters of every stack, in bytes.
const CLUSTER_BYTES: u64 = 64 << 10;
/// Of what the largest image has, so that many layers are written to in a moment.
const SHARE: u64 = 4;

/// Depths that are compared with a single layer, and what is to be left of its speed.
const DEPTHS: [usize; 2] = [16, 64];
const WANTED: f64 = 0.95;

/// Everything in the base, so that each request asks every layer; everything spread, so that
/// neighbours are in different files; and writes to a top that has all that is written to.
pub fn run(options: &Options) {
    if !peers::have("depth", &["nbdcopy"]) {
        return;
    }
    let folder = options.in_memory();
    let (raw, small) = (folder.path().join("raw"), folder.path().join("small"));
    fill(&raw, options.size);
    let flat = images::filled(folder.path(), &raw);
    fill(&small, options.size / SHARE);
    let place = Stacks {
        options,
        folder: &folder,
        flat: &flat,
        small: &small,
    };
    for depth in DEPTHS {
        place.read(depth);
        place.spread(depth);
        place.write(depth);
    }
}

struct Stacks<'a> {
    options: &'a Options,
    folder: &'a TempDir,
    /// All of the image in one layer.
    flat: &'a Disk,
    /// A raw file of the share that is written.
    small: &'a Path,
}

impl Stacks<'_> {
    fn span(&self) -> u64 {
        self.options.size / SHARE
    }

    fn stack(&self, layers: usize) -> Disk {
        let base = self.flat.image();
        let base = Base::Delta(&base);
        images::stack(self.folder.path(), &base, self.options.size, layers)
    }

    fn read_only(&self, name: &str, disk: Disk) -> Contender {
        Contender::lasting(name, peers::ours_read_only(disk, self.options.cache))
    }

    fn read(&self, layers: usize) {
        let deep = self.read_only(&name(layers), self.stack(layers));
        let flat = self.read_only(&name(1), self.stack(1));
        let works = reads();
        self.table(
            layers,
            "all data in the base",
            self.options.size,
            &works,
            &deep,
            flat,
        );
    }

    /// Cluster n is in layer n modulo their number; beside it, the same was written in the same order
    /// without a snapshot in between, so that neighbours are as far from each other in one file.
    fn spread(&self, layers: usize) {
        let [deep, flat] = [true, false].map(|frozen| self.striped(layers, frozen));
        let deep = self.read_only(&name(layers), deep);
        let flat = self.read_only(&name(1), flat);
        let works = reads();
        self.table(
            layers,
            "neighbours in different layers",
            self.span(),
            &works,
            &deep,
            flat,
        );
    }

    /// A disk that was written to in as many turns, perhaps frozen between them.
    fn striped(&self, turns: usize, frozen: bool) -> Disk {
        let own = TempDir::new_in(self.folder.path()).expect("a folder");
        let disk = Disk::in_folder(
            own,
            &self.span().to_string(),
            "none",
            &["--cluster", CLUSTER],
        );
        let server = disk.serve(&[]);
        for turn in 0..turns {
            if frozen && turn > 0 {
                ok(ploopctl().args(["snapshot", "create"]).arg(disk.path()));
            }
            stripe(&server.uri(), self.span(), turn as u64, turns as u64);
        }
        server.stop();
        disk
    }

    fn write(&self, layers: usize) {
        let [deep, flat] = [layers, 2].map(|layers| {
            let disk = self.stack(layers);
            let server = disk.serve(&[]);
            ok(tool("nbdcopy")
                .arg("--flush")
                .arg(self.small)
                .arg(server.uri()));
            server.stop();
            let target = peers::ours(disk, self.options.cache);
            Contender::lasting(&name(layers), target)
        });
        let works = [1, 32].map(|depth| Work::random(true, depth));
        self.table(
            layers,
            "overwritten in the top",
            self.span(),
            &works,
            &deep,
            flat,
        );
    }

    fn table(
        &self,
        layers: usize,
        what: &str,
        span: u64,
        works: &[Work],
        deep: &Contender,
        flat: Contender,
    ) {
        Table {
            title: format!(
                "{layers} layers, {what}; {} MiB on tmpfs, clusters of {CLUSTER}, cache {}",
                span >> 20,
                self.options.cache.name()
            ),
            works,
            span,
            ours: deep,
            peers: &[(flat, Some(Bar::iops(WANTED)))],
        }
        .run(self.options);
    }
}

fn name(layers: usize) -> String {
    format!("{layers} layers")
}

fn reads() -> [Work; 3] {
    [
        Work::random(false, 1),
        Work::random(false, 32),
        Work::bulk(false, 128 << 10),
    ]
}

/// Writes every `of`th cluster, from the `first` on.
fn stripe(uri: &str, span: u64, first: u64, of: u64) {
    let mut fio = tool("fio");
    fio.args([
        "--name=j",
        "--ioengine=nbd",
        "--bs=64k",
        "--iodepth=8",
        "--uri",
    ]);
    fio.arg(uri);
    fio.arg(format!("--rw=write:{}", (of - 1) * CLUSTER_BYTES));
    fio.arg(format!("--offset={}", first * CLUSTER_BYTES));
    fio.arg(format!("--size={}", span - first * CLUSTER_BYTES));
    fio.arg(format!("--io_size={}", span / of));
    ok_within(&mut fio, Duration::from_secs(60));
}
