//! QEMU as a second opinion: what this engine writes, QEMU checks clean and reads alike; what
//! QEMU writes, this engine checks clean, reads alike and goes on writing.
//!
//! Every legal cluster size in both format versions is driven with random requests beside a flat
//! model, in real files, with and without the page cache. QEMU cannot create v1 images; it reads
//! and checks them. Without qemu-img and qemu-io the tests say that they are skipped.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../common/mod.rs"]
mod common;
mod gate;
mod oracles;
mod poison;
mod qcow2;

use ploop::device::{Device, Zero};
use ploop::disk::Disk;
use ploop::image::chain::Chain;
use ploop::image::open::{Top, open_write};
use ploop::image::target::{Format, Source};
use ploop::io::exec;
use ploop::io::file::{Cache, FileStore};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::check;
use ploop_formats::ploop::create::{create, create_preallocated};
use ploop_formats::ploop::{Header, Version};
use ploop_formats::store::Store;
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Kind, buf};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// Whatever a test reads that nobody wrote is not zeros.
#[global_allocator]
static ALLOCATOR: poison::Poison = poison::Poison;

/// All cluster sizes of the format: 32 KiB to 64 MiB.
fn cluster_sizes() -> impl Iterator<Item = u64> {
    (15..=26).map(|log2| 1 << log2)
}

/// Says that a test does nothing, unless QEMU's tools are here.
fn qemu_is_here(test: &str) -> bool {
    let works = |tool| {
        Command::new(tool)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
    };
    let here = works("qemu-img") && works("qemu-io");
    if !here {
        eprintln!("SKIPPED {test}: qemu-img and qemu-io are not installed");
    }
    here
}

/// Runs one of QEMU's tools: what it said, as an error when it failed.
fn try_qemu(tool: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(tool).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    if out.status.success() {
        return Ok(said);
    }
    Err(format!("{tool} {args:?} gave {:?}: {said}", out.status))
}

/// Runs one of QEMU's tools, which must succeed.
fn qemu(tool: &str, args: &[&str], context: &str) -> String {
    try_qemu(tool, args).unwrap_or_else(|e| panic!("{context}: {e}"))
}

/// Runs what a server's thread would run.
fn block<F: Future>(future: F) -> F::Output {
    exec::run(exec::Engine::detect().0, future).unwrap()
}

/// A disk beside a model of its content.
struct Twin {
    image: PathBuf,
    format: Format,
    /// None between two openings: its file is locked.
    disk: Option<Disk<FileStore>>,
    model: Pages,
    rng: Rng,
}

impl Twin {
    async fn new(image: &Path, model: Pages, seed: u64) -> Self {
        Self::of(image, Format::Ploop, model, seed).await
    }

    async fn of(image: &Path, format: Format, model: Pages, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let disk = open(image, format, cache(&mut rng)).await;
        assert_eq!(disk.size(), model.len());
        Self {
            image: image.to_owned(),
            format,
            disk: Some(disk),
            model,
            rng,
        }
    }

    const fn disk(&self) -> &Disk<FileStore> {
        self.disk.as_ref().unwrap()
    }

    /// Some sectors: mostly few, often across the edge of a cluster, at most 2 MiB.
    fn range(&mut self) -> (u64, u64) {
        let (size, cluster) = (self.disk().size(), self.disk().preferred_block());
        let longest = (2 * cluster).min(2 << 20).min(size);
        let len = match self.rng.below(4) {
            0 => self.rng.range(1, longest / 512) * 512,
            _ => self.rng.range(1, 64.min(longest / 512)) * 512,
        };
        let at = self.rng.below((size - len) / 512 + 1) * 512;
        let edge = (at / cluster * cluster).saturating_sub(self.rng.below(8) * 512);
        (
            if self.rng.one_in(3) {
                edge.min(size - len)
            } else {
                at
            },
            len,
        )
    }

    async fn step(&mut self) {
        let (at, len) = self.range();
        match self.rng.below(10) {
            0..=5 => {
                let mut data = buf::aligned(len as usize);
                let mut word = self.rng.next();
                for to in data.chunks_exact_mut(8) {
                    word = word
                        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                        .wrapping_add(at | 1);
                    to.copy_from_slice(&word.to_le_bytes());
                }
                self.model.write(at, &data);
                let fua = self.rng.one_in(8);
                self.disk().write(at, data.freeze(), fua).await.unwrap();
            }
            6 => {
                let how = *self.rng.pick(&[Zero::MayFree, Zero::Allocate]);
                self.disk().zero(at, len, how, false).await.unwrap();
                self.model.zero(at, len);
            }
            7 => self.discard().await,
            8 => self.disk().flush().await.unwrap(),
            _ => self.reopen().await,
        }
    }

    /// Whole clusters, of which the old content may stay.
    async fn discard(&mut self) {
        let cluster = self.disk().preferred_block();
        let at = self.rng.below(self.disk().size() / cluster) * cluster;
        self.disk().discard(at, cluster).await.unwrap();
        let bytes = self
            .disk()
            .read(at, buf::aligned(cluster as usize))
            .await
            .unwrap();
        if bytes.iter().all(|b| *b == 0) {
            self.model.zero(at, cluster);
        }
    }

    async fn reopen(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.close().await.unwrap();
        }
        let cache = cache(&mut self.rng);
        self.disk = Some(open(&self.image, self.format, cache).await);
    }

    /// Closes the disk; its content.
    async fn close(self) -> Pages {
        self.disk().close().await.unwrap();
        self.model
    }
}

fn cache(rng: &mut Rng) -> Cache {
    *rng.pick(&[Cache::None, Cache::Writeback])
}

/// Takes the fence of a file that this thread may have had open. Its ring lets go of a file for good
/// when it is entered again, which a worker, who opens a file once, never waits for.
async fn fenced(dir: &File, chain: &Chain, image: &Path) -> Top {
    for _ in 0..500 {
        match Top::fenced(dir, chain.top(), Duration::from_millis(20)) {
            Err(e) if e.kind() == Kind::TimedOut => {
                let store = FileStore::open(image, false, Cache::Writeback).unwrap();
                store.read_at(0, buf::aligned(512)).await.unwrap();
            }
            done => return done.unwrap(),
        }
    }
    panic!("{}: still locked", image.display());
}

/// Opens an image as a worker does, with what it stands on.
async fn open(image: &Path, format: Format, cache: Cache) -> Disk<FileStore> {
    let dir = File::open(image.parent().unwrap()).unwrap();
    let name = image.file_name().unwrap().to_owned();
    let chain = Chain::read(&dir, &Source::Bare { name, format }).unwrap();
    let patience = Duration::from_secs(10);
    let top = fenced(&dir, &chain, image).await;
    let store = top.store(chain.top(), cache).unwrap();
    let opened = open_write(&dir, &chain, store, Ledger::local(), patience);
    opened.await.unwrap()
}

/// Writes a sparse file.
fn save(pages: &Pages, path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(pages.len()).unwrap();
    let mut at = 0;
    while at < pages.len() {
        let (data, until) = pages.extent(at);
        if data {
            let mut bytes = vec![0; (until - at) as usize];
            pages.read(at, &mut bytes);
            file.write_all_at(&bytes, at).unwrap();
        }
        at = until;
    }
}

/// Reads a file, zero pages left out.
fn load(path: &Path) -> Pages {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let mut pages = Pages::new(len);
    let mut at = 0;
    while at < len {
        let mut bytes = vec![0; (len - at).min(1 << 20) as usize];
        file.read_exact_at(&mut bytes, at).unwrap();
        for (i, page) in bytes.chunks(4096).enumerate() {
            if page.iter().any(|b| *b != 0) {
                pages.write(at + i as u64 * 4096, page);
            }
        }
        at += bytes.len() as u64;
    }
    pages
}

/// Files of one comparison.
struct Bench {
    _dir: TempDir,
    image: PathBuf,
    flat: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, flat) = (dir.path().join("image"), dir.path().join("flat"));
        Self {
            _dir: dir,
            image,
            flat,
        }
    }

    /// An image that has just been made, blank or preallocated; its guest's bytes.
    async fn new_image(&self, version: Version, cluster: u64, rng: &mut Rng) -> u64 {
        let most = (24u64 << 20).div_ceil(cluster).clamp(3, 200);
        let size = ClusterSize::new(cluster).unwrap();
        let header = Header::new(version, rng.range(2, most) * cluster, size).unwrap();
        File::create(&self.image).unwrap();
        let store = FileStore::open(&self.image, true, cache(rng)).unwrap();
        match rng.one_in(5) {
            true => create_preallocated(&store, &header).await.unwrap(),
            false => create(&store, &header).await.unwrap(),
        }
        header.sectors * 512
    }

    async fn assert_clean(&self, context: &str) {
        let store = FileStore::open(&self.image, false, Cache::Writeback).unwrap();
        let report = check(&store).await.unwrap();
        assert!(report.is_clean(), "{context}: {:?}", report.findings);
    }

    fn image(&self) -> &str {
        self.image.to_str().unwrap()
    }

    fn flat(&self) -> &str {
        self.flat.to_str().unwrap()
    }

    /// Whether QEMU finds nothing wrong in the image and reads what the model holds.
    fn verdict(&self, model: &Pages) -> Result<(), String> {
        save(model, &self.flat);
        try_qemu("qemu-img", &["check", "-f", "parallels", self.image()])?;
        let compare = [
            "compare",
            "-f",
            "parallels",
            "-F",
            "raw",
            self.image(),
            self.flat(),
        ];
        let said = try_qemu("qemu-img", &compare)?;
        // A difference in size alone is only a warning.
        if said.contains("mismatch") {
            Err(said)
        } else {
            Ok(())
        }
    }

    fn qemu_agrees(&self, model: &Pages, context: &str) {
        self.verdict(model)
            .unwrap_or_else(|e| panic!("{context}: {e}"));
    }

    /// What QEMU reads from the image.
    fn as_qemu_reads(&self, context: &str) -> Pages {
        let convert = [
            "convert",
            "-f",
            "parallels",
            "-O",
            "raw",
            self.image(),
            self.flat(),
        ];
        qemu("qemu-img", &convert, context);
        load(&self.flat)
    }

    /// Has QEMU write patterns; the image must be closed afterwards.
    fn qemu_writes(&self, rng: &mut Rng, size: u64, context: &str) {
        let mut args = vec!["-f".to_string(), "parallels".to_string()];
        for _ in 0..rng.range(3, 12) {
            let len = rng.range(1, (size / 512).min(700)) * 512;
            let at = rng.below((size - len) / 512 + 1) * 512;
            let pattern = rng.range(1, 255);
            let command = match rng.below(6) {
                0 => format!("write -z {at} {len}"),
                1 => "flush".into(),
                _ => format!("write -P {pattern} {at} {len}"),
            };
            args.extend(["-c".into(), command]);
        }
        args.push(self.image().into());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = qemu("qemu-io", &args, context);
        assert!(!said.contains("failed"), "{context}: {said}");
    }
}

/// All content, in pieces.
async fn content(disk: &Disk<FileStore>) -> Pages {
    let mut pages = Pages::new(disk.size());
    let mut at = 0;
    while at < disk.size() {
        let len = (disk.size() - at).min(1 << 20);
        let bytes = disk.read(at, buf::aligned(len as usize)).await.unwrap();
        if bytes.iter().any(|b| *b != 0) {
            pages.write(at, &bytes);
        }
        at += len;
    }
    pages
}

fn assert_same(ours: &Pages, theirs: &Pages, context: &str) {
    assert_eq!(ours.len(), theirs.len(), "{context}");
    let mut at = 0;
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while at < ours.len() {
        ours.read(at, &mut a);
        theirs.read(at, &mut b);
        assert!(a == b, "{context}: contents differ within 1 MiB from {at}");
        at += 1 << 20;
    }
}

fn our_images(version: Version, per_size: u64) {
    let name = format!("images of format {version:?}");
    if !qemu_is_here(&name) {
        return;
    }
    let (bench, mut images) = (Bench::new(), 0);
    for cluster in cluster_sizes() {
        for n in 0..per_size {
            let context = format!("{name}, clusters of {cluster}, number {n}");
            let seed = cluster ^ n;
            let model = block(async {
                let size = bench.new_image(version, cluster, &mut Rng::new(seed)).await;
                let mut twin = Twin::new(&bench.image, Pages::new(size), seed).await;
                for _ in 0..40 {
                    twin.step().await;
                }
                let model = twin.close().await;
                bench.assert_clean(&context).await;
                model
            });
            bench.qemu_agrees(&model, &context);
            images += 1;
        }
    }
    eprintln!("{images} {name}: QEMU finds nothing wrong and reads them alike");
}

#[test]
fn qemu_checks_and_reads_our_v1_images() {
    our_images(Version::V1, 9);
}

#[test]
fn qemu_checks_and_reads_our_v2_images() {
    our_images(Version::V2, 9);
}

#[test]
fn images_that_qemu_makes_are_read_alike_and_written_on() {
    if !qemu_is_here("images that QEMU makes") {
        return;
    }
    let (bench, mut images) = (Bench::new(), 0);
    for cluster in cluster_sizes() {
        for n in 0..3u64 {
            let context = format!("made by QEMU, clusters of {cluster}, number {n}");
            let mut rng = Rng::new(cluster ^ n ^ 0x51);
            // QEMU rounds sizes to sectors only.
            let size = cluster * rng.range(2, 5) + rng.below(2) * rng.below(cluster / 512) * 512;
            let option = format!("cluster_size={cluster}");
            let (of, image) = (size.to_string(), bench.image());
            qemu(
                "qemu-img",
                &["create", "-q", "-f", "parallels", "-o", &option, image, &of],
                &context,
            );
            bench.qemu_writes(&mut rng, size, &context);
            read_and_go_on(&bench, rng.next(), &context);
            images += 1;
        }
    }
    eprintln!("{images} images made by QEMU are read alike and written on");
}

#[test]
fn qemu_writes_on_in_images_that_we_made() {
    if !qemu_is_here("QEMU writing in our images") {
        return;
    }
    let (bench, mut images) = (Bench::new(), 0);
    for cluster in cluster_sizes() {
        let context = format!("made by us and written by QEMU, clusters of {cluster}");
        let mut rng = Rng::new(cluster ^ 0xA7);
        let size = block(async {
            let size = bench.new_image(Version::V2, cluster, &mut rng).await;
            let mut twin = Twin::new(&bench.image, Pages::new(size), cluster).await;
            for _ in 0..20 {
                twin.step().await;
            }
            twin.close().await;
            size
        });
        bench.qemu_writes(&mut rng, size, &context);
        read_and_go_on(&bench, rng.next(), &context);
        images += 1;
    }
    eprintln!("{images} images made here and written by QEMU are read alike and written on");
}

/// An image that QEMU has closed: nothing is wrong with it, it reads as QEMU reads it, and both
/// stays so when this engine has written to it.
fn read_and_go_on(bench: &Bench, seed: u64, context: &str) {
    let model = bench.as_qemu_reads(context);
    let model = block(async {
        bench.assert_clean(context).await;
        let mut twin = Twin::new(&bench.image, model, seed).await;
        assert_same(&content(twin.disk()).await, &twin.model, context);
        for _ in 0..20 {
            twin.step().await;
        }
        twin.close().await
    });
    bench.qemu_agrees(&model, context);
}

#[test]
fn a_difference_would_be_noticed() {
    if !qemu_is_here("the comparison itself") {
        return;
    }
    let bench = Bench::new();
    let model = block(async {
        let size = bench
            .new_image(Version::V2, 1 << 16, &mut Rng::new(1))
            .await;
        let twin = Twin::new(&bench.image, Pages::new(size), 1).await;
        let mut data = buf::aligned(512);
        data.fill(1);
        twin.disk().write(4096, data.freeze(), false).await.unwrap();
        twin.close().await
    });
    let verdict = bench.verdict(&model);
    assert!(verdict.is_err_and(|e| e.contains("mismatch at offset 4096")));
}
