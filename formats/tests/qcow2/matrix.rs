//! Images made by QEMU in every variant of the format, read wholly and in pieces, and compared with
//! what QEMU itself makes of them.

use crate::chain::Chain;
use crate::qemu::{Folder, installed};
use ploop_formats::Kind;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::check::FindingKind::Overlap;
use ploop_formats::qcow2::check::check;
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use std::sync::atomic::{AtomicUsize, Ordering};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const DISK: &str = "disk.qcow2";
/// Images of random content.
const RANDOM: u64 = 30;

/// An image to be: what it is called, and how it is made.
struct Case {
    name: String,
    make: Box<dyn Fn(&Folder) + Sync + Send>,
}

fn case(name: impl Into<String>, make: impl Fn(&Folder) + Sync + Send + 'static) -> Case {
    Case {
        name: name.into(),
        make: Box::new(make),
    }
}

/// A size that is some clusters and a part of one.
const fn size(cluster: u64) -> u64 {
    let least = 12 * cluster + 7 * 512;
    if least < M { M + 7 * 512 } else { least }
}

/// Whole and partial clusters, runs, a run over the end of a table of the smallest clusters, the
/// last sector, zeros, and what was discarded.
fn writes(cluster: u64) -> Vec<String> {
    let c = cluster;
    let at = |pattern: u8, at: u64, len: u64| format!("write -P {pattern} {at} {len}");
    vec![
        at(1, 512, 512),
        at(2, 2 * c, 3 * c),
        at(3, 6 * c + 512 * (c / 1024), 1024.min(c)),
        at(4, size(c) - 512, 512),
        at(5, 700 * K, 33 * K),
        format!("write -z {} {c}", 3 * c),
        format!("write -z -u {} {c}", 7 * c),
        format!("write -z {} 512", 2 * c),
        format!("discard {} {c}", 4 * c),
        at(6, 9 * c, c),
    ]
}

fn create(folder: &Folder, name: &str, options: &str, size: u64) {
    folder.img(&format!("create -q -f qcow2 -o {options} {name} {size}"));
}

/// An image of its own with [`writes`].
fn plain(options: impl Into<String>, cluster: u64) -> Case {
    let options = options.into();
    case(options.clone(), move |folder| {
        let options = format!("{options},cluster_size={cluster}");
        create(folder, DISK, &options, size(cluster));
        folder.io(DISK, &writes(cluster));
    })
}

fn clusters(cases: &mut Vec<Case>) {
    for compat in ["0.10", "1.1"] {
        for cluster in [512, K, 4 * K, 32 * K, 64 * K, 256 * K, M, 2 * M] {
            let mut one = plain(format!("compat={compat}"), cluster);
            one.name = format!("{}, clusters of {cluster}", one.name);
            cases.push(one);
        }
    }
}

fn refcounts(cases: &mut Vec<Case>) {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        cases.push(plain(format!("refcount_bits={bits}"), 4 * K));
    }
    cases.push(plain("refcount_bits=1,compat=1.1", 512));
    cases.push(plain("refcount_bits=64,compat=1.1", 512));
}

fn extended(cases: &mut Vec<Case>) {
    for cluster in [16 * K, 32 * K, 64 * K, 128 * K, M, 2 * M] {
        cases.push(plain("extended_l2=on", cluster));
    }
    cases.push(plain("extended_l2=on,refcount_bits=1", 64 * K));
    cases.push(plain("extended_l2=on,preallocation=metadata", 64 * K));
    cases.push(plain("extended_l2=on,preallocation=full", 16 * K));
}

fn preallocated(cases: &mut Vec<Case>) {
    for mode in ["off", "metadata", "falloc", "full"] {
        cases.push(plain(format!("preallocation={mode}"), 64 * K));
    }
    cases.push(plain("preallocation=metadata,compat=0.10", 4 * K));
    cases.push(case("preallocated and never written", |folder| {
        create(folder, DISK, "preallocation=metadata", 5 * M);
    }));
    cases.push(case("nothing at all", |folder| {
        create(folder, DISK, "compat=1.1", 5 * M);
    }));
}

fn lazy(cases: &mut Vec<Case>) {
    cases.push(plain("lazy_refcounts=on", 64 * K));
    cases.push(case("left dirty by a writer that died", |folder| {
        create(folder, DISK, "lazy_refcounts=on", size(64 * K));
        folder.io_and_die(DISK, &writes(64 * K));
        let dirty = folder.read(DISK)[79];
        assert_eq!(dirty & 1, 1, "the writer closed the image");
    }));
}

/// A raw file in which some clusters are easy to compress, some impossible, some zeros.
fn mixed(folder: &Folder, name: &str, len: u64) {
    let mut rng = Rng::new(5);
    let mut bytes = vec![0; len as usize];
    for block in bytes.chunks_mut(4 * K as usize) {
        match rng.below(4) {
            0 => {}
            1 => block.fill(rng.next() as u8),
            2 => block.iter_mut().for_each(|b| *b = rng.next() as u8),
            _ => block.iter_mut().for_each(|b| *b = rng.below(3) as u8),
        }
    }
    std::fs::write(folder.path(name), bytes).unwrap();
}

fn compressed_image(folder: &Folder, name: &str, options: &str, len: u64) {
    mixed(folder, "source.raw", len);
    folder.img(&format!(
        "convert -c -f raw -O qcow2 -o {options} source.raw {name}"
    ));
}

fn compressed(cases: &mut Vec<Case>) {
    let add = |cases: &mut Vec<Case>, options: String, cluster: u64, over: bool| {
        let name = format!("compressed {options} {cluster} {over}");
        cases.push(case(name, move |folder| {
            let all = format!("{options},cluster_size={cluster}");
            compressed_image(folder, DISK, &all, size(cluster));
            if over {
                folder.io(DISK, &writes(cluster));
            }
        }));
    };
    for cluster in [512, 4 * K, 64 * K, 2 * M] {
        add(cases, "compat=1.1".into(), cluster, false);
    }
    for cluster in [4 * K, 64 * K, M, 2 * M] {
        add(cases, "compression_type=zstd".into(), cluster, false);
    }
    for kind in ["zlib", "zstd"] {
        let extended = format!("compression_type={kind},extended_l2=on");
        add(cases, extended, 64 * K, true);
        add(cases, format!("compression_type={kind}"), 64 * K, true);
    }
    add(cases, "compat=0.10".into(), 64 * K, true);
}

/// A top over a base; both are written to, and the base's size may differ.
fn over(cases: &mut Vec<Case>, base: &'static str, sizes: (u64, u64), options: &'static str) {
    let name = format!("{options} over {base}, {sizes:?}");
    cases.push(case(name, move |folder| {
        let (below, above) = sizes;
        match base {
            "raw" => mixed(folder, "base", below),
            "compressed" => compressed_image(folder, "base", "cluster_size=64k", below),
            options => {
                create(folder, "base", options, below);
                folder.io("base", &["write -P 90 0 1M".to_string()]);
                folder.io("base", &["write -z 128k 64k".to_string()]);
            }
        }
        let format = if base == "raw" { "raw" } else { "qcow2" };
        let named = format!("{options},backing_file=base,backing_fmt={format}");
        create(folder, DISK, &named, above);
        let some = [
            "write -P 91 70k 3k",
            "write -P 92 256k 128k",
            "write -z 320k 64k",
            "discard 512k 64k",
            "write -z 700k 1k",
        ];
        folder.io(DISK, &some.map(String::from));
    }));
}

fn backed(cases: &mut Vec<Case>) {
    let same = (2 * M, 2 * M);
    over(cases, "compat=1.1", same, "compat=1.1");
    over(cases, "compat=0.10", same, "compat=0.10");
    over(cases, "cluster_size=4k", same, "cluster_size=256k");
    over(cases, "cluster_size=1M", same, "cluster_size=512");
    over(cases, "compat=1.1", (M + 512, 2 * M + 512), "compat=1.1");
    over(cases, "compat=1.1", (3 * M, 2 * M), "compat=1.1");
    over(cases, "raw", same, "compat=1.1");
    over(cases, "raw", (M + 77 * 512, 2 * M), "compat=0.10");
    over(cases, "raw", same, "extended_l2=on");
    over(
        cases,
        "extended_l2=on",
        (M + 512, 2 * M),
        "extended_l2=on,cluster_size=128k",
    );
    over(cases, "compressed", same, "extended_l2=on");
    over(cases, "compressed", same, "compat=1.1");
    cases.push(case("a chain of six", |folder| {
        mixed(folder, "0", 2 * M);
        for n in 1..6 {
            let below = if n == 1 { "raw" } else { "qcow2" };
            let named = format!("backing_file={},backing_fmt={below}", n - 1);
            let name = if n == 5 {
                DISK.to_string()
            } else {
                n.to_string()
            };
            create(folder, &name, &named, 2 * M);
            folder.io(&name, &[format!("write -P {n} {}k 100k", n * 60)]);
        }
    }));
}

fn external(cases: &mut Vec<Case>) {
    for options in [
        "data_file=data",
        "data_file=data,data_file_raw=on",
        "data_file=data,extended_l2=on",
        "data_file=data,preallocation=metadata",
        "data_file=data,data_file_raw=on,preallocation=full",
        "data_file=data,cluster_size=4k",
    ] {
        let mut one = plain(options, 64 * K);
        if options.contains("4k") {
            one = case(options, move |folder| {
                create(folder, DISK, options, size(4 * K));
                folder.io(DISK, &writes(4 * K));
            });
        }
        cases.push(one);
    }
}

fn changed(cases: &mut Vec<Case>) {
    for (verb, to) in [("", 40 * M), ("--shrink", 700 * K)] {
        cases.push(case(format!("resized {verb} {to}"), move |folder| {
            create(folder, DISK, "cluster_size=4k", size(4 * K));
            folder.io(DISK, &writes(4 * K));
            folder.img(&format!("resize -q {verb} {DISK} {to}"));
        }));
    }
    cases.push(case("with bitmaps", |folder| {
        create(folder, DISK, "compat=1.1", size(64 * K));
        folder.img(&format!("bitmap --add {DISK} one"));
        folder.io(DISK, &writes(64 * K));
        folder.img(&format!("bitmap --add --disable -g 512k {DISK} two"));
    }));
    cases.push(case("with snapshots", |folder| {
        create(folder, DISK, "cluster_size=4k", size(4 * K));
        folder.img(&format!("snapshot -c empty {DISK}"));
        folder.io(DISK, &writes(4 * K));
        folder.img(&format!("snapshot -c full {DISK}"));
        folder.io(DISK, &["write -P 77 0 256k".into()]);
    }));
}

/// Any options that go together, and many small changes, compressed ones among them; a snapshot
/// half-way, so that clusters are shared.
fn random(cases: &mut Vec<Case>) {
    for seed in 0..RANDOM {
        cases.push(case(format!("random {seed}"), move |folder| {
            let mut rng = Rng::new(seed);
            let cluster = *rng.pick(&[512, 4 * K, 16 * K, 64 * K, 256 * K, 2 * M]);
            let size = (64 * cluster).clamp(512 * K, 6 * M) + 512 * rng.below(9);
            let mut options = format!("cluster_size={cluster}");
            match rng.below(4) {
                0 => options += ",compat=0.10",
                1 if cluster >= 16 * K => options += ",extended_l2=on",
                2 => options += ",compression_type=zstd,refcount_bits=32",
                _ => {}
            }
            match rng.below(3) {
                0 => {
                    mixed(folder, "base", size / 1024 * 512);
                    options += ",backing_file=base,backing_fmt=raw";
                }
                1 => {
                    create(folder, "base", "cluster_size=32k", size + 512);
                    folder.try_io("base", &changes(&mut rng, 32 * K, size));
                    options += ",backing_file=base,backing_fmt=qcow2";
                }
                _ => {}
            }
            create(folder, DISK, &options, size);
            folder.try_io(DISK, &changes(&mut rng, cluster, size));
            folder.img(&format!("snapshot -c half {DISK}"));
            folder.try_io(DISK, &changes(&mut rng, cluster, size));
        }));
    }
}

fn changes(rng: &mut Rng, cluster: u64, size: u64) -> Vec<String> {
    let sectors = size / 512;
    let change = |_| {
        let at = rng.below(sectors);
        let most = *rng.pick(&[1, 8, cluster / 512, 4 * cluster / 512]);
        let len = rng.range(1, most).min(sectors - at) * 512;
        let (at, pattern) = (at * 512, rng.range(1, 255));
        let whole = at / cluster * cluster;
        match rng.below(8) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            3 if whole + cluster <= size => format!("discard {whole} {cluster}"),
            4 | 5 if whole + cluster <= size => {
                format!("write -c -P {pattern} {whole} {cluster}")
            }
            _ => format!("write -P {pattern} {at} {len}"),
        }
    };
    (0..40).map(change).collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in [
        clusters,
        refcounts,
        extended,
        preallocated,
        lazy,
        compressed,
        backed,
        external,
        changed,
        random,
    ] {
        family(&mut cases);
    }
    cases
}

/// Reads the image whole, and in pieces of any length, and compares with what QEMU reads. QEMU 10.0
/// loses compressed clusters now and then, and finds that when it reads them: so must we, and then the
/// answer is false.
fn judge(name: &str, folder: &Folder, source: &str) -> bool {
    let whole = folder.convert(&format!("{source} {DISK}"), "expected");
    let mut chain = Chain::open(DISK, &|name| folder.read(name)).unwrap();
    if let Some(snapshot) = source.strip_prefix("-l ") {
        let all = now(chain.top.snapshots()).unwrap();
        let found = all.iter().find(|s| s.name == snapshot.as_bytes());
        chain.top = chain.top.at_snapshot(found.unwrap()).unwrap();
    }
    if !whole {
        let e = chain.all().expect_err(name);
        assert_eq!(e.kind(), Kind::Damaged, "{name}: {e}");
        return false;
    }
    let expected = folder.read("expected");
    assert_eq!(chain.size(), expected.len() as u64, "{name}: size");
    let all = chain.all().unwrap_or_else(|e| panic!("{name}: {e}"));
    let wrong = all.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{name}: first wrong byte");
    let mut rng = Rng::new(expected.len() as u64);
    for _ in 0..200 {
        let at = rng.below(expected.len() as u64);
        let len = rng.range(1, (expected.len() as u64 - at).min(200 * K)) as usize;
        let mut piece = vec![0xEE; len];
        chain.read(at, &mut piece).unwrap();
        assert!(
            piece == expected[at as usize..at as usize + len],
            "{name}: {len} bytes at {at}"
        );
    }
    true
}

/// Makes every image, and looks at it.
fn for_each_image(look: impl Fn(&str, &Folder) + Sync) {
    let cases = cases();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let folder = Folder::new();
                    (case.make)(&folder);
                    look(&case.name, &folder);
                }
            });
        }
    });
    println!("COUNT: {} images made by QEMU", cases.len());
    assert!(cases.len() >= 100);
}

#[test]
fn images_made_by_qemu_read_as_qemu_reads_them() {
    if !installed("images_made_by_qemu_read_as_qemu_reads_them") {
        return;
    }
    let damaged = AtomicUsize::new(0);
    for_each_image(|name, folder| {
        if !judge(name, folder, "") {
            assert!(name.starts_with("random"), "{name}: damaged");
            damaged.fetch_add(1, Ordering::Relaxed);
        }
    });
    let damaged = damaged.into_inner();
    println!("COUNT: {damaged} of them damaged");
    assert!(damaged <= 5);
}

/// QEMU 10.0 now and then puts compressed data into a cluster that it gave away meanwhile. Those are
/// overlaps, which its own check does not look for.
#[test]
fn images_made_by_qemu_are_checked_as_qemu_checks_them() {
    if !installed("images_made_by_qemu_are_checked_as_qemu_checks_them") {
        return;
    }
    let clean = AtomicUsize::new(0);
    for_each_image(|name, folder| {
        let found = now(check(&MemStore::from_bytes(&folder.read(DISK)))).unwrap();
        let kinds = found.findings.iter().map(|finding| finding.kind);
        let overlaps = kinds.filter(|kind| *kind == Overlap).count() as u64;
        let compresses = name.starts_with("random");
        assert!(overlaps == 0 || compresses, "{name}: {found:#?}");
        let said = folder.check(DISK).unwrap();
        let agreed = (found.errors - overlaps, found.leaks);
        assert_eq!(agreed, said, "{name}: {found:#?}");
        clean.fetch_add(usize::from(found.is_clean()), Ordering::Relaxed);
    });
    let clean = clean.into_inner();
    println!("COUNT: {clean} of them clean");
    assert!(clean >= 95);
}

#[test]
fn a_snapshot_reads_as_the_disk_was() {
    if !installed("a_snapshot_reads_as_the_disk_was") {
        return;
    }
    for (options, cluster) in [
        ("compat=1.1", 64 * K),
        ("compat=0.10", 64 * K),
        ("cluster_size=512", 512),
        ("extended_l2=on", 64 * K),
    ] {
        let folder = Folder::new();
        create(&folder, DISK, options, size(cluster));
        folder.img(&format!("snapshot -c empty {DISK}"));
        folder.io(DISK, &writes(cluster));
        folder.img(&format!("snapshot -c full {DISK}"));
        folder.io(DISK, &["write -P 77 0 256k".into()]);
        let chain = Chain::open(DISK, &|name| folder.read(name)).unwrap();
        let names: Vec<String> = now(chain.top.snapshots())
            .unwrap()
            .iter()
            .map(|s| s.printable())
            .collect();
        assert_eq!(names, ["1 (empty)", "2 (full)"]);
        for source in ["", "-l empty", "-l full"] {
            let name = format!("{options} {source}");
            assert!(judge(&name, &folder, source), "{name}: damaged");
        }
    }
}

#[test]
fn bitmaps_are_listed_as_they_were_made() {
    if !installed("bitmaps_are_listed_as_they_were_made") {
        return;
    }
    let folder = Folder::new();
    create(&folder, DISK, "compat=1.1", size(64 * K));
    folder.img(&format!("bitmap --add {DISK} one"));
    folder.img(&format!("bitmap --add --disable -g 512k {DISK} two"));
    let chain = Chain::open(DISK, &|name| folder.read(name)).unwrap();
    let found: Vec<(Vec<u8>, u64, bool, bool)> = now(chain.top.bitmaps())
        .unwrap()
        .into_iter()
        .map(|b| (b.name, b.granularity, b.enabled, b.in_use))
        .collect();
    let expected = [
        (b"one".to_vec(), 64 * K, true, false),
        (b"two".to_vec(), 512 * K, false, false),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_header_by_qemu_is_written_as_it_was_read() {
    if !installed("a_header_by_qemu_is_written_as_it_was_read") {
        return;
    }
    for options in [
        "compat=0.10",
        "compat=1.1",
        "extended_l2=on,compression_type=zstd,refcount_bits=1",
        "data_file=data,data_file_raw=on",
        "backing_file=base,backing_fmt=raw",
    ] {
        let folder = Folder::new();
        mixed(&folder, "base", M);
        create(&folder, DISK, options, M);
        let chain = Chain::open(DISK, &|name| folder.read(name)).unwrap();
        let mut written = chain.top.header().encode().unwrap();
        let first = folder.read(DISK)[..64 * K as usize].to_vec();
        written.resize(first.len(), 0);
        assert!(written == first, "{options}");
    }
}

#[test]
fn a_long_run_is_one_extent_as_far_as_a_slice_tells() {
    if !installed("a_long_run_is_one_extent_as_far_as_a_slice_tells") {
        return;
    }
    let folder = Folder::new();
    create(&folder, DISK, "preallocation=off", 64 * M);
    folder.io(DISK, &["write -P 1 0 40M".into()]);
    let chain = Chain::open(DISK, &|name| folder.read(name)).unwrap();
    let first = now(chain.top.map(0, 64 * M)).unwrap();
    assert!(
        matches!(first, Extent::Data { len, .. } if len == 32 * M),
        "{first:?}"
    );
    let rest = now(chain.top.map(40 * M, 24 * M)).unwrap();
    assert_eq!(rest, Extent::Absent { len: 24 * M });
}
