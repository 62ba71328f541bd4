//! qcow2 images: our server and QEMU's, each on an image that was made in the same way.

use crate::common::process::{ok, ok_within};
use crate::common::programs::tool;
use crate::common::serve::Disk;
use crate::harness::fio::Work;
use crate::harness::images::CLUSTER;
use crate::harness::peers::{self, Contender, Target};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Cache, Options, fill};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tempfile::TempDir;

/// Of images that are written for the first time: hardly a request meets a cluster that is there.
const FRESH: u64 = 64 << 30;
/// Of the image whose tables are larger than what anybody keeps of them by default.
const WIDE: u64 = 256 << 30;
/// Reads a second that the wide image is to give.
const WIDE_READS: f64 = 100_000.0;

const ALLOCATED: Bar = Bar {
    iops: 2.0,
    cpu: 0.4,
};

/// Makes an image of this name.
type Make = Rc<dyn Fn(&Path)>;

/// One table: an image for each server, made in the same way.
struct Twins<'a> {
    title: String,
    folder: &'a Path,
    make: Make,
    cache: Cache,
    /// Each run has an image of its own.
    fresh: bool,
    bar: Bar,
    works: &'a [Work],
    span: u64,
}

impl Twins<'_> {
    fn contender(&self, name: &str, serve: fn(TempDir, Cache) -> Target) -> Contender {
        let (folder, make, cache) = (self.folder.to_owned(), Rc::clone(&self.make), self.cache);
        let start = move || {
            let own = TempDir::new_in(&folder).expect("a folder");
            make(&own.path().join("disk"));
            serve(own, cache)
        };
        match self.fresh {
            true => Contender::fresh(name, start),
            false => Contender::lasting(name, start()),
        }
    }

    /// Measures; our requests a second of each work.
    fn run(&self, options: &Options, more: Vec<Peer>) -> Vec<f64> {
        let ours = self.contender("ploop", |own, cache| {
            peers::ours_qcow2(Disk::around(own), cache)
        });
        let theirs = self.contender("qemu-nbd", |own, cache| {
            peers::qemu("qcow2", &own.path().join("disk"), cache, own)
        });
        let mut others = vec![(theirs, Some(self.bar))];
        others.extend(more);
        Table {
            title: format!(
                "qcow2 over NBD, {}, cache {}",
                self.title,
                self.cache.name()
            ),
            works: self.works,
            span: self.span,
            ours: &ours,
            peers: &others,
        }
        .run(options)
    }
}

/// Every table.
pub fn run(options: &Options) {
    if !peers::have("qcow2", &["qemu-nbd", "qemu-img"]) {
        return;
    }
    allocated(
        options,
        &options.in_memory(),
        Cache::Writeback,
        1,
        ALLOCATED,
    );
    let bar = Bar {
        iops: 1.5,
        cpu: 0.5,
    };
    allocated(options, &options.on_disk(), Cache::None, 4, bar);
    first(options, "cluster_size=64k", 2.0);
    first(options, "cluster_size=128k,extended_l2=on", 1.5);
    copy_up(options, "cluster_size=64k");
    copy_up(options, "cluster_size=128k,extended_l2=on");
    wide(options);
    packed(options);
}

/// `qemu-img create` with these options.
fn create(image: &Path, how: &str, size: u64) {
    let mut command = tool("qemu-img");
    command
        .args(["create", "-f", "qcow2", "-o", how])
        .arg(image);
    ok_within(command.arg(size.to_string()), Duration::from_secs(120));
}

/// Random requests, every cluster there.
fn allocated(options: &Options, folder: &TempDir, cache: Cache, connections: u32, bar: Bar) {
    let raw = folder.path().join("raw");
    fill(&raw, options.size);
    let depths: &[u32] = if connections == 1 { &[1, 32] } else { &[32] };
    let works: Vec<Work> = [false, true]
        .into_iter()
        .flat_map(|write| depths.iter().map(move |depth| Work::random(write, *depth)))
        .map(|work| Work {
            connections,
            ..work
        })
        .collect();
    let place = match cache {
        Cache::Writeback => "tmpfs",
        Cache::None => "a disk",
    };
    Twins {
        title: format!(
            "4 KiB random; {} MiB image on {place}, clusters of {CLUSTER}, fully allocated",
            options.size >> 20
        ),
        folder: folder.path(),
        make: Rc::new(move |image| peers::convert("qcow2", &raw, image)),
        cache,
        fresh: false,
        bar,
        works: &works,
        span: options.size,
    }
    .run(options, Vec::new());
}

/// The first write to a cluster, beside a flat file with holes, too.
fn first(options: &Options, how: &'static str, bar: f64) {
    let folder = options.in_memory();
    let works: Vec<Work> = [0, 16]
        .into_iter()
        .flat_map(|flush_every| {
            [1, 32].map(|depth| Work {
                flush_every,
                ..Work::random(true, depth)
            })
        })
        .collect();
    let flat = sparse(folder.path()).map(|peer| (peer, Some(Bar::iops(0.3))));
    Twins {
        title: format!(
            "first writes of 4 KiB, random; fresh {} GiB image on tmpfs, {how}",
            FRESH >> 30
        ),
        folder: folder.path(),
        make: Rc::new(move |image| create(image, how, FRESH)),
        cache: Cache::None,
        fresh: true,
        bar: Bar::iops(bar),
        works: &works,
        span: FRESH,
    }
    .run(options, flat.into_iter().collect());
}

/// nbdkit on a flat file of holes, another one for each run.
fn sparse(folder: &Path) -> Option<Contender> {
    let folder: PathBuf = folder.to_owned();
    peers::have("nbdkit file", &["nbdkit"]).then(|| {
        Contender::fresh("nbdkit file (sparse raw)", move || {
            let own = TempDir::new_in(&folder).expect("a folder");
            let raw = own.path().join("raw");
            let file = File::create(&raw).expect("a flat file");
            file.set_len(FRESH).expect("a file of holes");
            peers::nbdkit_on(&own.path().join("sock"), &raw, own)
        })
    })
}

/// Writes to clusters whose data is below.
fn copy_up(options: &Options, how: &'static str) {
    let folder = options.in_memory();
    let (raw, size) = (folder.path().join("raw"), options.size * 4);
    fill(&raw, size);
    let works = [1, 32].map(|depth| Work::random(true, depth));
    Twins {
        title: format!(
            "writes of 4 KiB over a parent full of data; {} MiB raw base on tmpfs, top with {how}",
            size >> 20
        ),
        folder: folder.path(),
        make: Rc::new(move |image| {
            let base = image.with_file_name("base");
            fs::hard_link(&raw, base).expect("one file system");
            let mut command = tool("qemu-img");
            command.args([
                "create", "-f", "qcow2", "-o", how, "-F", "raw", "-b", "base",
            ]);
            ok(command.arg(image));
        }),
        cache: Cache::None,
        fresh: true,
        bar: Bar::iops(1.5),
        works: &works,
        span: size,
    }
    .run(options, Vec::new());
}

/// Reads all over an image whose tables are larger than a cache of them.
fn wide(options: &Options) {
    let folder = options.in_memory();
    let works = [1, 32].map(|depth| Work::random(false, depth));
    let ours = Twins {
        title: format!(
            "reads of 4 KiB all over a {} GiB image of holes that are mapped, on tmpfs, clusters of {CLUSTER}",
            WIDE >> 30
        ),
        folder: folder.path(),
        make: Rc::new(|image| create(image, "cluster_size=64k,preallocation=metadata", WIDE)),
        cache: Cache::Writeback,
        fresh: false,
        bar: ALLOCATED,
        works: &works,
        span: WIDE,
    }
    .run(options, Vec::new());
    for (work, reads) in works.iter().zip(ours) {
        let ratio = reads / WIDE_READS;
        println!("{}: {ratio:.2} x of {WIDE_READS} a second", work.name());
    }
}

/// Reads of compressed clusters.
fn packed(options: &Options) {
    let folder = options.in_memory();
    let (raw, size) = (folder.path().join("raw"), options.size / 8);
    fill(&raw, size);
    let mut bytes = fs::read(&raw).expect("a flat file");
    // Half of each cluster is easy.
    let halves = bytes.chunks_mut(32 << 10).skip(1).step_by(2);
    halves.for_each(|half| half.fill(7));
    fs::write(&raw, bytes).expect("room for it");
    let works = [
        Work::random(false, 1),
        Work::random(false, 32),
        Work::bulk(false, 128 << 10),
    ];
    Twins {
        title: format!(
            "reads of a compressed image (deflate) of {} MiB on tmpfs",
            size >> 20
        ),
        folder: folder.path(),
        make: Rc::new(move |image| {
            let mut command = tool("qemu-img");
            command.args(["convert", "-c", "-f", "raw", "-O", "qcow2"]);
            ok_within(command.arg(&raw).arg(image), Duration::from_secs(300));
        }),
        cache: Cache::Writeback,
        fresh: false,
        bar: ALLOCATED,
        works: &works,
        span: size,
    }
    .run(options, Vec::new());
}
