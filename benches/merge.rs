//! A delta merged into the one below it, beside QEMU's commit of an overlay.

use crate::common::process::ok;
use crate::common::programs::{ploopctl, tool};
use crate::harness::cost;
use crate::harness::images::{self, CLUSTER};
use crate::harness::peers::{self, Place};
use crate::harness::table::Spread;
use crate::harness::{Cache, Options, fill};
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Both start with nothing in the page cache, end with everything durable and the delta removed.
pub fn run(options: &Options) {
    if !peers::have("merge", &["qemu-img", "qemu-nbd", "nbdcopy"]) {
        return;
    }
    let merged = options.size / 2;
    println!(
        "\nMerge of a delta with {} MiB of random clusters of {CLUSTER} into a full one of {} MiB: read \
         from outside the page cache, durable, and the delta removed; median of {} runs\n",
        merged >> 20,
        options.size >> 20,
        options.repetitions
    );
    println!(
        "| where | ours, MiB/s | qemu-img commit -d, MiB/s | ratio | wanted | |\n\
         | --- | ---: | ---: | ---: | --- | --- |"
    );
    for (name, folder) in [("disk", options.on_disk()), ("tmpfs", options.in_memory())] {
        let at = folder.path();
        let uuid = make(options, at, merged);
        let speed = |time: Duration| merged as f64 / f64::from(1 << 20) / time.as_secs_f64();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..options.repetitions {
            ours.push(speed(our_merge(at, &uuid)));
            theirs.push(speed(their_merge(at)));
        }
        let ratio = Spread::of(ours.iter().zip(&theirs).map(|(a, b)| a / b));
        println!(
            "| {name} | {:.0} | {:.0} | {} | 1 x | {} |",
            Spread::of(ours.into_iter()).middle,
            Spread::of(theirs.into_iter()).middle,
            ratio.text(),
            if ratio.middle >= 1.0 { "met" } else { "missed" },
        );
    }
}

/// A disk with a snapshot that `merged` bytes stand on, and an image and its overlay: the same bytes
/// in the same places. The snapshot that is merged into the other.
fn make(options: &Options, at: &Path, merged: u64) -> String {
    let (raw, base, top) = (at.join("raw"), at.join("base"), at.join("top"));
    fill(&raw, options.size);
    let disk = images::filled(at, &raw);
    snapshot(&disk.path());
    let server = disk.serve(&["--cache", Cache::Writeback.name()]);
    scatter(&server.uri(), options.size, merged);
    server.stop();
    let uuid = snapshot(&disk.path());
    fs::rename(disk.path(), at.join("ours")).expect("one file system");
    peers::convert("qcow2", &raw, &base);
    fs::remove_file(&raw).expect("ours");
    let mut create = tool("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-o"]);
    create.arg(format!("cluster_size={CLUSTER}"));
    // Of a name without a folder, so that a copy of both is a pair, too.
    ok(create.args(["-b", "base"]).arg(&top));
    let server = peers::qemu("qcow2", &top, Cache::Writeback, ());
    if let Place::Uri(uri) = &server.place {
        scatter(uri, options.size, merged);
    }
    uuid
}

/// Freezes the top of a disk; the snapshot.
fn snapshot(disk: &Path) -> String {
    let said = ok(ploopctl().args(["snapshot", "create"]).arg(disk));
    said.trim().to_owned()
}

/// Writes whole clusters, each once, in an order that is the same every time.
fn scatter(uri: &str, span: u64, bytes: u64) {
    let mut fio = tool("fio");
    fio.args(["--name=j", "--ioengine=nbd", "--rw=randwrite", "--bs=64k"]);
    fio.args(["--iodepth=8", "--randseed=1", "--end_fsync=1", "--uri"]);
    fio.arg(uri);
    fio.arg(format!("--size={span}"));
    ok(fio.arg(format!("--io_size={bytes}")));
}

/// How long it takes to merge a copy of ours.
fn our_merge(at: &Path, uuid: &str) -> Duration {
    let own = TempDir::new_in(at).expect("a folder");
    let disk = own.path().join("disk");
    cost::copy(&at.join("ours"), &disk);
    cost::forget(own.path());
    cost::of(ploopctl().args(["snapshot", "merge"]).arg(disk).arg(uuid)).time
}

/// How long it takes to commit a copy of the overlay, until that is durable and the overlay gone.
fn their_merge(at: &Path) -> Duration {
    let own = TempDir::new_in(at).expect("a folder");
    for name in ["base", "top"] {
        cost::copy(&at.join(name), &own.path().join(name));
    }
    cost::forget(own.path());
    let (base, top) = (own.path().join("base"), own.path().join("top"));
    let start = Instant::now();
    cost::of(tool("qemu-img").args(["commit", "-q", "-d"]).arg(&top));
    let synced = File::open(base).and_then(|base| base.sync_all());
    synced.expect("fsync");
    fs::remove_file(top).expect("the overlay");
    start.elapsed()
}
