//! qcow2 images that QEMU made, written by this engine: QEMU finds nothing wrong in them afterwards, not
//! one lost cluster, reads what the model holds, and finds their snapshots as they were.

use super::{Twin, block, load, qemu_is_here, save};
use ploop::image::chain::Chain;
use ploop::image::open::Top;
use ploop::image::target::{Format, Source};
use ploop::io::file::Cache;
use ploop_formats::store::Store;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// Random requests on each image.
const STEPS: u64 = 600;

/// Guest data in a file that is the disk, byte for byte.
const RAW_DATA: &str = "data_file=data,data_file_raw=on";

/// How an image is made.
#[derive(Debug, Clone, Copy)]
struct Made {
    /// `-o` of `qemu-img create`.
    options: &'static str,
    cluster: u64,
    /// Format of what it stands on.
    base: Option<&'static str>,
    /// Half of it is compressed.
    packed: bool,
    snapshot: bool,
    /// Its last writer died, and left it dirty.
    dead: bool,
}

const fn made(cluster: u64, options: &'static str) -> Made {
    Made {
        options,
        cluster,
        base: None,
        packed: false,
        snapshot: false,
        dead: false,
    }
}

/// Every cluster size with each feature that it can have.
fn matrix() -> Vec<Made> {
    let mut all = Vec::new();
    for log2 in [9, 10, 12, 15, 16, 18, 21] {
        let plain = made(1 << log2, "compat=1.1");
        all.push(plain);
        all.push(made(1 << log2, "compat=0.10"));
        all.push(Made {
            base: Some("raw"),
            ..plain
        });
        all.push(Made {
            base: Some("qcow2"),
            snapshot: true,
            ..plain
        });
        all.push(Made {
            packed: true,
            snapshot: true,
            ..plain
        });
        for dead in [false, true] {
            all.push(Made {
                base: Some("raw"),
                dead,
                ..made(1 << log2, "compat=1.1,lazy_refcounts=on")
            });
        }
    }
    for options in [
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=4",
        "refcount_bits=8",
        "refcount_bits=32",
        "refcount_bits=64",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
    ] {
        all.push(made(512, options));
        all.push(made(65536, options));
    }
    for cluster in [512, 65536] {
        for base in [None, Some("raw")] {
            all.push(Made {
                base,
                ..made(cluster, "data_file=data")
            });
        }
        all.push(made(cluster, RAW_DATA));
    }
    all.push(made(16384, "extended_l2=on,data_file=data"));
    for cluster in [16384, 65536, 2 << 20] {
        for base in [None, Some("raw"), Some("qcow2")] {
            all.push(Made {
                base,
                snapshot: base == Some("qcow2"),
                ..made(cluster, "extended_l2=on")
            });
        }
        all.push(Made {
            packed: true,
            ..made(cluster, "extended_l2=on")
        });
        all.push(Made {
            packed: true,
            ..made(cluster, "compression_type=zstd")
        });
    }
    all
}

/// A folder with an image.
struct Bench {
    dir: TempDir,
    context: String,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn img(&self, line: &str) -> String {
        let mut command = Command::new("qemu-img");
        command.args(line.split(' ')).current_dir(self.dir.path());
        let done = command.output().unwrap();
        let said = [done.stdout, done.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(done.status.success(), "{}: {line}: {said}", self.context);
        said
    }

    /// In the folder: QEMU looks for a data file in its own.
    fn io(&self, format: &str, name: &str, commands: &[String]) {
        let mut command = Command::new("qemu-io");
        command.args(["-t", "unsafe", "-f", format]);
        for each in commands {
            command.args(["-c", each]);
        }
        let done = command.arg(name).current_dir(self.dir.path()).output();
        let done = done.unwrap();
        let said = [done.stdout, done.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        // It succeeds although its commands failed.
        let fine = done.status.success() && !said.contains("failed");
        assert!(fine, "{}: {said}", self.context);
    }

    /// As a writer that dies before it closes the image.
    fn io_and_die(&self, commands: &[String]) {
        let mut command = Command::new("qemu-io");
        for each in commands
            .iter()
            .map(String::as_str)
            .chain(["flush", "abort"])
        {
            command.args(["-c", each]);
        }
        command.args(["-f", "qcow2"]).arg(self.path("image"));
        let done = command.output().unwrap();
        assert!(!done.status.success(), "{}: it closed it", self.context);
        let head = fs::read(self.path("image")).unwrap();
        assert_eq!(head.get(79), Some(&1), "{}: it is dirty", self.context);
    }

    /// Makes it, with data of many kinds.
    fn make(made: Made) -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
            context: format!("{made:?}"),
        };
        let size = (made.cluster * 40).clamp(96 << 10, 20 << 20);
        let k = size / 16;
        let fill = |from: u64, to: u64, byte: u64| format!("write -P {byte} {from} {}", to - from);
        if let Some(format) = made.base {
            // It ends before the image, and a raw one within a sector.
            let odd = if format == "raw" { 77 } else { 0 };
            bench.img(&format!(
                "create -q -f {format} base {}",
                size * 3 / 4 / 512 * 512
            ));
            bench.io(
                format,
                "base",
                &[fill(0, k * 2, 1), fill(k * 5 + 512, k * 9, 2)],
            );
            let base = fs::File::options().append(true).open(bench.path("base"));
            let base = base.unwrap();
            base.set_len(base.metadata().unwrap().len() + odd).unwrap();
        }
        let mut create = format!(
            "create -q -f qcow2 -o cluster_size={},{}",
            made.cluster, made.options
        );
        if let Some(format) = made.base {
            create += &format!(" -b base -F {format}");
        }
        if made.packed {
            bench.img(&format!("create -q -f raw flat {size}"));
            bench.io("raw", "flat", &[fill(k, k * 8, 3), fill(k * 9, k * 12, 4)]);
            let options = format!("cluster_size={},{}", made.cluster, made.options);
            bench.img(&format!(
                "convert -c -f raw -O qcow2 -o {options} flat image"
            ));
        } else {
            bench.img(&format!("{create} image {size}"));
        }
        let zero = format!("write -z {} {}", k * 3, k);
        bench.io(
            "qcow2",
            "image",
            &[fill(k, k * 2 + 512, 5), zero, fill(k * 13, k * 14, 6)],
        );
        if made.dead {
            bench.io_and_die(&[fill(k * 2, k * 3, 8), fill(k * 14, k * 15, 9)]);
        }
        if made.snapshot {
            bench.img("snapshot -c one image");
            bench.io("qcow2", "image", &[fill(k * 4, k * 6, 7)]);
        }
        bench
    }

    fn snapshot(&self, to: &str) -> Vec<u8> {
        self.img(&format!(
            "convert -f qcow2 -O raw -l snapshot.name=one image {to}"
        ));
        fs::read(self.path(to)).unwrap()
    }

    async fn drive(&self, made: Made, seed: u64) {
        self.img("convert -f qcow2 -O raw image before");
        let before = made.snapshot.then(|| self.snapshot("then"));
        let model = load(&self.path("before"));
        let mut twin = Twin::of(&self.path("image"), Format::Qcow2, model, seed).await;
        for _ in 0..STEPS {
            twin.step().await;
        }
        let model = twin.close().await;
        save(&model, &self.path("model"));
        self.img("check -q -f qcow2 image");
        self.img("compare -q -f qcow2 -F raw image model");
        if made.options == RAW_DATA {
            self.img("compare -q -f raw -F raw data model");
        }
        if let Some(before) = before {
            assert!(
                self.snapshot("now") == before,
                "{}: its snapshot",
                self.context
            );
        }
    }
}

#[test]
fn what_this_engine_writes_to_images_of_qemu_is_clean_and_reads_alike() {
    let test = "what_this_engine_writes_to_images_of_qemu_is_clean_and_reads_alike";
    if !qemu_is_here(test) {
        return;
    }
    let all = matrix();
    for (seed, made) in all.iter().enumerate() {
        let bench = Bench::make(*made);
        block(bench.drive(*made, seed as u64));
    }
    println!("COUNT: {test}: {} images, {STEPS} requests each", all.len());
}

#[test]
fn an_image_that_ends_anywhere_is_served_by_direct_io() {
    if !qemu_is_here("an_image_that_ends_anywhere_is_served_by_direct_io") {
        return;
    }
    // Where there is direct I/O: not in memory.
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = folder.path().join("disk");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]);
    assert!(create.arg(&image).arg("64M").status().unwrap().success());
    assert_ne!(fs::metadata(&image).unwrap().len() % 512, 0);
    let dir = fs::File::open(folder.path()).unwrap();
    let (name, format) = ("disk".into(), Format::Qcow2);
    let chain = Chain::read(&dir, &Source::Bare { name, format }).unwrap();
    let top = Top::fenced(&dir, chain.top(), Duration::from_secs(10)).unwrap();
    let store = top.store(chain.top(), Cache::None).unwrap();
    // Only direct I/O promises this.
    assert!(store.info().fresh_zero);
}
