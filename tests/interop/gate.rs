//! What other qcow2 engines were found to fail at, each as a test of this one, with QEMU as the judge.
//! `docs/decisions/0011-qcow2-gate.md` says which test is which.
//!
//! `PLOOP_QCOW2_DEATHS` says how many writers are killed.
#![allow(
    clippy::disallowed_methods,
    reason = "a writer that is killed is a process"
)]

use super::{Twin, block, load, open, qemu_is_here, save, try_qemu};
use ploop::device::{Device, Zero};
use ploop::disk::Disk;
use ploop::image::chain::Chain;
use ploop::image::open::Top;
use ploop::image::target::{Format, Source};
use ploop::io::file::{Cache, FileStore};
use ploop_formats::buf;
use ploop_formats::qcow2::Qcow2;
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::rng::Rng;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Bytes of a small request.
const BLOCK: u64 = 4096;
/// Where a writer that is to be killed finds its image.
const IMAGE: &str = "PLOOP_GATE_IMAGE";
const SEED: &str = "PLOOP_GATE_SEED";

/// A folder, and QEMU's tools in it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn img(&self, line: &str) {
        let mut command = Command::new("qemu-img");
        command.args(line.split(' ')).current_dir(self.0.path());
        let done = command.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{line}: {said}");
    }

    /// A flat file of so many bytes, which compress to about half.
    fn flat(&self, name: &str, len: u64, seed: u64) {
        let mut rng = Rng::new(seed);
        let words = (0..len / 8).map(|n| if n % 2 == 0 { rng.next() } else { n / 64 });
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Demands that QEMU finds nothing wrong in the image, and reads in it what the model holds.
    fn judge(&self, model: &Pages) {
        save(model, &self.path("model"));
        let image = self.path("image");
        let check = ["check", "-f", "qcow2", image.to_str().unwrap()];
        try_qemu("qemu-img", &check).unwrap();
        self.img("compare -q -f qcow2 -F raw image model");
    }
}

fn block_of(rng: &mut Rng) -> bytes::Bytes {
    let mut data = buf::aligned(BLOCK as usize);
    data.chunks_exact_mut(8)
        .for_each(|word| word.copy_from_slice(&rng.next().to_le_bytes()));
    data.freeze()
}

/// Writes one block into every cluster, eight at a time, at places that dice choose.
async fn one_block_each(disk: &Disk<FileStore>, model: &mut Pages, rng: &mut Rng) {
    let cluster = disk.preferred_block();
    let mut clusters: Vec<u64> = (0..disk.size() / cluster).collect();
    for n in (1..clusters.len()).rev() {
        clusters.swap(n, rng.below(n as u64 + 1) as usize);
    }
    for some in clusters.chunks(8) {
        let requests = some.iter().map(|n| {
            let at = n * cluster + rng.below(cluster / BLOCK) * BLOCK;
            let data = block_of(rng);
            model.write(at, &data);
            disk.write(at, data, false)
        });
        let done = futures_util::future::join_all(requests.collect::<Vec<_>>()).await;
        done.into_iter().for_each(Result::unwrap);
    }
}

#[test]
fn one_write_into_every_compressed_cluster_leaves_the_others_whole() {
    if !qemu_is_here("one_write_into_every_compressed_cluster_leaves_the_others_whole") {
        return;
    }
    for compression in ["zlib", "zstd"] {
        for cluster in [4096, 65536, 2 << 20] {
            let folder = Folder::new();
            let len = (cluster * 128).min(32 << 20);
            folder.flat("flat", len, cluster);
            folder.img(&format!(
                "convert -c -f raw -O qcow2 -o cluster_size={cluster},compression_type={compression} flat image"
            ));
            folder.img("snapshot -c before image");
            let mut model = load(&folder.path("flat"));
            block(async {
                let disk = open(&folder.path("image"), Format::Qcow2, Cache::Writeback).await;
                one_block_each(&disk, &mut model, &mut Rng::new(cluster)).await;
                disk.close().await.unwrap();
            });
            folder.judge(&model);
            folder.img("convert -f qcow2 -O raw -l snapshot.name=before image then");
            let same =
                fs::read(folder.path("then")).unwrap() == fs::read(folder.path("flat")).unwrap();
            assert!(same, "{compression}, {cluster}: the snapshot");
        }
    }
}

#[test]
fn what_is_behind_a_short_backing_file_is_zeros_and_nobodys_memory() {
    if !qemu_is_here("what_is_behind_a_short_backing_file_is_zeros_and_nobodys_memory") {
        return;
    }
    for (format, short) in [
        ("raw", 1000),
        ("raw", 65536 * 3 + 512),
        ("qcow2", 65536 + 1024),
    ] {
        let folder = Folder::new();
        folder.flat("flat", 1 << 20, 1);
        let flat = fs::File::options().write(true).open(folder.path("flat"));
        flat.unwrap().set_len(short).unwrap();
        folder.img(&format!("convert -f raw -O {format} flat base"));
        folder.img(&format!("create -q -f qcow2 -b base -F {format} image 4M"));
        let mut model = load(&folder.path("flat"));
        model.set_len(4 << 20);
        block(async {
            let mut twin = Twin::of(&folder.path("image"), Format::Qcow2, model, short).await;
            let all = twin.disk().read(0, buf::aligned(4 << 20)).await.unwrap();
            let end = short as usize;
            assert!(all[end..].iter().all(|byte| *byte == 0), "{format}");
            // Each is a copy of its cluster, around the end of the backing file and behind it.
            for n in 0..64u64 {
                let at = n * 65536 + n * 512;
                let data = block_of(&mut Rng::new(n)).slice(..512);
                twin.model.write(at, &data);
                twin.disk().write(at, data, false).await.unwrap();
            }
            for _ in 0..200 {
                twin.step().await;
            }
            folder.judge(&twin.close().await);
        });
    }
}

#[test]
fn small_first_writes_take_hardly_more_space_than_their_bytes() {
    if !qemu_is_here("small_first_writes_take_hardly_more_space_than_their_bytes") {
        return;
    }
    // With the page cache space is taken for a cluster before the write is, so that a full host answers
    // the write and not the flush.
    let written = 8192;
    for (cache, most) in [
        (Cache::None, written * BLOCK * 3 / 2),
        (Cache::Writeback, written * 65_536 * 11 / 10),
    ] {
        let folder = Folder::new();
        folder.img("create -q -f qcow2 image 4G");
        // QEMU ends a new file within a block, which direct I/O cannot read.
        let file = fs::File::options().write(true).open(folder.path("image"));
        file.unwrap().set_len(1 << 20).unwrap();
        let mut model = Pages::new(4 << 30);
        block(async {
            let disk = open(&folder.path("image"), Format::Qcow2, cache).await;
            let mut rng = Rng::new(7);
            for n in 0..written {
                // Another cluster each time, all over the disk.
                let at = n * 29_989 % 65_536 * 65_536 + rng.below(16) * BLOCK;
                let data = block_of(&mut rng);
                model.write(at, &data);
                disk.write(at, data, false).await.unwrap();
            }
            disk.close().await.unwrap();
        });
        let took = fs::metadata(folder.path("image")).unwrap().blocks() * 512;
        let payload = written * BLOCK;
        println!("COUNT: {cache:?}: {took} bytes on disk for {payload}");
        assert!(took <= most, "{cache:?}: {took} for {payload}");
        folder.judge(&model);
    }
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Disk<FileStore>>();
    shared::<Qcow2<FileStore>>();
};

/// Sectors in a row that belong to one thread; four threads share every cluster.
const SHARE: u64 = 4096;
const THREADS: u64 = 4;

/// One thread's requests to its own parts of the disk, beside a model of its own.
async fn a_thread(disk: &Disk<FileStore>, model: &mut Pages, thread: u64) {
    let mut rng = Rng::new(thread);
    for _ in 0..500 {
        let at = (rng.below(disk.size() / SHARE / THREADS) * THREADS + thread) * SHARE;
        match rng.below(8) {
            0..=4 => {
                let data = block_of(&mut rng);
                model.write(at, &data);
                disk.write(at, data, rng.one_in(16)).await.unwrap();
            }
            5 => {
                disk.zero(at, SHARE, Zero::MayFree, false).await.unwrap();
                model.zero(at, SHARE);
            }
            6 => disk.flush().await.unwrap(),
            _ => {
                let found = disk.read(at, buf::aligned(SHARE as usize)).await.unwrap();
                let mut expected = vec![0; SHARE as usize];
                model.read(at, &mut expected);
                assert!(found[..] == expected[..], "thread {thread}, at {at}");
            }
        }
    }
}

#[test]
fn four_threads_on_one_image_give_what_each_of_them_wrote() {
    if !qemu_is_here("four_threads_on_one_image_give_what_each_of_them_wrote") {
        return;
    }
    for options in ["cluster_size=65536", "cluster_size=16384,extended_l2=on"] {
        let folder = Folder::new();
        folder.flat("base", 6 << 20, 3);
        folder.img(&format!(
            "create -q -f qcow2 -o {options} -b base -F raw image 8M"
        ));
        folder.img("snapshot -c before image");
        let mut model = load(&folder.path("base"));
        model.set_len(8 << 20);
        let disk = block(open(&folder.path("image"), Format::Qcow2, Cache::Writeback));
        let models: Vec<Pages> = std::thread::scope(|scope| {
            let start = |thread| {
                let (disk, mut model) = (&disk, model.clone());
                scope.spawn(move || {
                    block(a_thread(disk, &mut model, thread));
                    model
                })
            };
            let threads: Vec<_> = (0..THREADS).map(start).collect();
            let done = threads.into_iter().map(|thread| thread.join().unwrap());
            done.collect()
        });
        block(disk.close()).unwrap();
        for n in 0..(8 << 20) / SHARE {
            let mut bytes = vec![0; SHARE as usize];
            models[(n % THREADS) as usize].read(n * SHARE, &mut bytes);
            model.write(n * SHARE, &bytes);
        }
        folder.judge(&model);
    }
}

/// Blocks of the disk that a killed writer writes to.
const BLOCKS: u64 = 4096;

/// Block `n` as write number `number` of a writer leaves it.
fn stamped(seed: u64, n: u64, number: u64) -> bytes::Bytes {
    block_of(&mut Rng::new(seed << 44 | n << 32 | number))
}

/// The block of write number `number`, and whether it is flushed behind it.
fn plan(seed: u64, number: u64) -> (u64, bool) {
    let mut rng = Rng::new(seed << 32 | number);
    (rng.below(BLOCKS), rng.one_in(24))
}

/// Writes until it is killed, and says what is flushed.
async fn write_until_killed(image: &Path, seed: u64) {
    let cache = [Cache::Writeback, Cache::None][(seed / 4 % 2) as usize];
    let disk = open(image, Format::Qcow2, cache).await;
    println!("flushed 0");
    for number in 1.. {
        let (n, flush) = plan(seed, number);
        let data = stamped(seed, n, number);
        disk.write(n * BLOCK, data, false).await.unwrap();
        if flush {
            disk.flush().await.unwrap();
            println!("flushed {number}");
        }
    }
}

/// No test of its own: what [`a_killed_writer`] starts.
#[test]
fn a_writer_that_is_killed() {
    if let Some(image) = std::env::var_os(IMAGE) {
        let seed = std::env::var(SEED).unwrap().parse().unwrap();
        block(write_until_killed(Path::new(&image), seed));
    }
}

/// Waits for the last writes of who had an image open.
fn fence(image: &Path) {
    let dir = fs::File::open(image.parent().unwrap()).unwrap();
    let name = image.file_name().unwrap().to_owned();
    let format = Format::Qcow2;
    let chain = Chain::read(&dir, &Source::Bare { name, format }).unwrap();
    drop(Top::fenced(&dir, chain.top(), Duration::from_secs(10)).unwrap());
}

/// Kills a writer at some moment; the number of its last write that was flushed for sure.
fn a_killed_writer(image: &Path, seed: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "gate::a_writer_that_is_killed", "--nocapture"])
        .env(IMAGE, image)
        .env(SEED, seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut flushed = lines.filter_map(|line| {
        let line = line.unwrap();
        let (_, number) = line.split_once("flushed ")?;
        Some(number.parse().unwrap())
    });
    let mut last: u64 = flushed.next().unwrap();
    std::thread::sleep(Duration::from_millis(seed % 13));
    child.kill().unwrap();
    child.wait().unwrap();
    flushed.for_each(|n| last = n);
    // What it had begun lands before anybody looks.
    fence(image);
    last
}

/// Demands that QEMU finds leaks at worst; whether there are some.
fn leaks_at_worst(image: &Path) -> bool {
    let mut check = Command::new("qemu-img");
    let done = check.args(["check", "-f", "qcow2"]).arg(image).output();
    let done = done.unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    match done.status.code() {
        Some(0) => false,
        Some(3) => true,
        code => panic!("{code:?}: {said}"),
    }
}

/// Demands that what was flushed is there, or what was written over it.
fn judge_blocks(model: &mut Pages, found: &Pages, seed: u64, flushed: u64) {
    let mut legal: Vec<Vec<u64>> = vec![Vec::new(); BLOCKS as usize];
    // More than a writer gets done.
    for number in 1..flushed + 20_000 {
        let place = plan(seed, number).0 as usize;
        if number <= flushed {
            legal[place].clear();
        }
        legal[place].push(number);
    }
    for (n, legal) in (0..BLOCKS).zip(legal) {
        let (mut is, mut was) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
        found.read(n * BLOCK, &mut is);
        model.read(n * BLOCK, &mut was);
        let was_flushed = legal.first().is_some_and(|number| *number <= flushed);
        let written = legal
            .iter()
            .any(|number| stamped(seed, n, *number) == is[..]);
        let fine = written || !was_flushed && is == was;
        assert!(fine, "seed {seed}: block {n}, flushed to {flushed}");
        model.write(n * BLOCK, &is);
    }
}

#[test]
fn a_writer_that_is_killed_without_a_flush_leaves_leaks_at_worst_each_time() {
    let test = "a_writer_that_is_killed_without_a_flush_leaves_leaks_at_worst_each_time";
    if !qemu_is_here(test) {
        return;
    }
    let deaths: u64 = std::env::var("PLOOP_QCOW2_DEATHS").map_or(24, |n| n.parse().unwrap());
    let mut leaked = 0;
    for seed in 0..deaths.div_ceil(2) {
        let folder = Folder::new();
        folder.flat("base", BLOCKS * BLOCK * 3 / 4, seed);
        // Of the smaller ones each write takes one, and many take a table.
        let cluster = [4096, 65536][(seed % 2) as usize];
        folder.img(&format!(
            "create -q -f qcow2 -o cluster_size={cluster} -b base -F raw image {}",
            BLOCKS * BLOCK
        ));
        let image = folder.path("image");
        let mut model = load(&folder.path("base"));
        model.set_len(BLOCKS * BLOCK);
        for round in 0..2 {
            let seed = seed * 2 + round;
            let flushed = a_killed_writer(&image, seed);
            leaked += u64::from(leaks_at_worst(&image));
            folder.img("convert -f qcow2 -O raw image found");
            judge_blocks(&mut model, &load(&folder.path("found")), seed, flushed);
        }
        // Whoever comes next takes nothing that is in use.
        block(async {
            let disk = open(&image, Format::Qcow2, Cache::Writeback).await;
            one_block_each(&disk, &mut model, &mut Rng::new(seed)).await;
            disk.close().await.unwrap();
        });
        leaks_at_worst(&image);
        folder.img("check -q -r leaks -f qcow2 image");
        folder.judge(&model);
    }
    println!(
        "COUNT: {test}: {} writers killed, {leaked} of them left leaks",
        deaths.next_multiple_of(2)
    );
}
