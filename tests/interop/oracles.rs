//! Other implementations of qcow2 as second opinions: images that this engine made and wrote read alike to
//! imago and to qcow2-rs, as far as each goes.
//!
//! They are not linked here, but in a program of its own, `tests/oracles`, which is built when it
//! is wanted first. Where that cannot be, the tests say that they are skipped. Neither knows
//! subclusters or zstd. qcow2-rs reads nothing below an image of version 2, nothing but qcow2
//! images that are no shorter, and no cluster of less than 4 KiB.

use super::common::process::{ok, ok_within, run_within};
use super::common::programs::ploopctl;
use super::common::skip;
use super::{Twin, assert_same, block, load};
use ploop::image::target::Format;
use ploop::io::file::{Cache, FileStore};
use ploop_formats::qcow2::create::{Backing, Create, create};
use ploop_formats::qcow2::header::Version;
use ploop_formats::qcow2::refcount::Width;
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;
/// Random requests on each image that is written.
const STEPS: u64 = 250;
/// How long building the program may take: two processors are shared.
const BUILD: Duration = Duration::from_secs(900);
const READ: Duration = Duration::from_secs(60);

const BOTH: &[&str] = &["imago", "qcow2-rs"];
const IMAGO: &[&str] = &["imago"];

/// The program, if it could be built.
fn oracle(test: &str) -> Option<&'static Path> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match PATH.get_or_init(build) {
        Ok(path) => Some(path),
        Err(why) => {
            skip(test, &format!("tests/oracles does not build: {why}"));
            None
        }
    }
}

fn build() -> Result<PathBuf, String> {
    let test = std::env::current_exe().unwrap();
    // Tests live in TARGET/PROFILE/deps.
    let target = test.ancestors().nth(3).unwrap().join("oracles");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--locked", "--manifest-path"]);
    cargo.arg(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/oracles/Cargo.toml"
    ));
    let said = run_within(cargo.arg("--target-dir").arg(&target), BUILD);
    match said.status.success() {
        true => Ok(target.join("debug/oracle")),
        false => Err(said.err.lines().next().unwrap_or_default().into()),
    }
}

/// A folder in which images are made.
struct Folder(TempDir);

impl Folder {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes an empty image.
    fn create(&self, name: &str, wanted: &Create) {
        File::create(self.path(name)).unwrap();
        let store = FileStore::open(&self.path(name), true, Cache::Writeback).unwrap();
        block(create(&store, wanted)).unwrap();
    }

    /// Makes a flat file of so many bytes, of which a part compresses well and a part is zeros.
    fn flat(&self, name: &str, len: u64) {
        let mut rng = Rng::new(len);
        let word = |n: u64| match n >> 13 & 3 {
            0 => 0,
            1 => n >> 9,
            _ => rng.next(),
        };
        let bytes: Vec<u8> = (0..len / 8).map(word).flat_map(u64::to_le_bytes).collect();
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Makes a compressed image of a flat file.
    fn pack(&self, from: &str, name: &str, cluster: u64) {
        let mut convert = ploopctl();
        convert
            .args(["convert", "--format", "raw"])
            .arg(self.path(from));
        convert.args(["--to", "qcow2", "--compress", "--cluster"]);
        convert.arg(cluster.to_string());
        ok(convert.arg("--out-file").arg(self.path(name)));
    }

    /// Writes to an image at random places; what it holds then.
    fn write(&self, name: &str, mut model: Pages, seed: u64) -> Pages {
        model.set_len(SIZE);
        block(async {
            let mut twin = Twin::of(&self.path(name), Format::Qcow2, model, seed).await;
            for _ in 0..STEPS {
                twin.step().await;
            }
            twin.close().await
        })
    }

    /// Demands that those who are asked read in an image what it holds.
    fn judge(&self, oracle: &Path, name: &str, model: &Pages, readers: &[&str]) {
        for reader in readers {
            let mut ask = Command::new(oracle);
            ask.args([reader, name, "out"]).current_dir(self.0.path());
            ok_within(&mut ask, READ);
            let found = load(&self.path("out"));
            assert_same(&found, model, &format!("{name}, as {reader} reads it"));
        }
        println!("COUNT: {name}: {} read it alike", readers.join(" and "));
    }
}

fn plain(cluster: u64) -> Create {
    let cluster = ClusterSize::of_qcow2(cluster.trailing_zeros());
    Create::new(SIZE, cluster.unwrap())
}

fn over(wanted: Create, name: &str, format: &str) -> Create {
    Create {
        backing: Some(Backing {
            name: name.into(),
            format: format.into(),
        }),
        ..wanted
    }
}

#[test]
fn others_read_alike_what_was_written_to_an_image() {
    let Some(oracle) = oracle("others_read_alike_what_was_written_to_an_image") else {
        return;
    };
    let width = |order| Width::new(order).unwrap();
    let cases = [
        ("clusters of 512 bytes", plain(512), IMAGO),
        ("clusters of 4 KiB", plain(4096), BOTH),
        ("clusters of 64 KiB", plain(65536), BOTH),
        ("clusters of 2 MiB", plain(2 << 20), BOTH),
        (
            "version 2",
            Create {
                version: Version::V2,
                ..plain(65536)
            },
            BOTH,
        ),
        (
            "refcounts of 1 bit",
            Create {
                width: width(0),
                ..plain(8192)
            },
            BOTH,
        ),
        (
            "refcounts of 64 bits",
            Create {
                width: width(6),
                ..plain(32768)
            },
            BOTH,
        ),
    ];
    for (n, (name, wanted, readers)) in cases.iter().enumerate() {
        let folder = Folder(TempDir::new().unwrap());
        folder.create(name, wanted);
        let model = folder.write(name, Pages::new(SIZE), n as u64);
        folder.judge(oracle, name, &model, readers);
    }
}

#[test]
fn others_read_alike_what_an_image_and_all_that_it_stands_on_hold() {
    let test = "others_read_alike_what_an_image_and_all_that_it_stands_on_hold";
    let Some(oracle) = oracle(test) else {
        return;
    };
    let folder = Folder(TempDir::new().unwrap());
    folder.flat("flat", SIZE - (1 << 20) - 512);
    folder.create("over a flat file", &over(plain(65536), "flat", "raw"));
    let model = folder.write("over a flat file", load(&folder.path("flat")), 1);
    folder.judge(oracle, "over a flat file", &model, IMAGO);
    folder.create("low", &plain(4096));
    let model = folder.write("low", Pages::new(SIZE), 2);
    folder.create("middle", &over(plain(2 << 20), "low", "qcow2"));
    let model = folder.write("middle", model, 3);
    folder.judge(oracle, "middle", &model, BOTH);
    folder.create("top of three", &over(plain(65536), "middle", "qcow2"));
    folder.judge(oracle, "top of three", &model, BOTH);
    let model = folder.write("top of three", model, 4);
    folder.judge(oracle, "top of three", &model, BOTH);
}

#[test]
fn others_read_alike_what_was_compressed_and_what_was_written_over_it() {
    let test = "others_read_alike_what_was_compressed_and_what_was_written_over_it";
    let Some(oracle) = oracle(test) else {
        return;
    };
    for cluster in [4096, 65536, 2 << 20] {
        let folder = Folder(TempDir::new().unwrap());
        let name = format!("compressed clusters of {cluster} bytes");
        folder.flat("flat", SIZE);
        folder.pack("flat", &name, cluster);
        let model = load(&folder.path("flat"));
        folder.judge(oracle, &name, &model, BOTH);
        let mut create = ploopctl();
        create.args(["snapshot", "create", "--format", "qcow2", "--name", "then"]);
        ok(create.arg(folder.path(&name)));
        let model = folder.write(&name, model, cluster);
        folder.judge(oracle, &name, &model, BOTH);
    }
}
