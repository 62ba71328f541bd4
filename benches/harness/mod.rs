//! What the tables share: options, contenders, one run of fio, processor time, the table itself.

pub mod cost;
pub mod fio;
pub mod images;
pub mod peers;
pub mod table;
pub mod ticks;

use crate::common::files::Random;
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// How to measure.
pub struct Options {
    /// Names of the tables; all when empty.
    pub tables: Vec<String>,
    /// Length of a run.
    pub seconds: u64,
    /// Runs of each cell.
    pub repetitions: usize,
    /// How often a disturbed run is repeated before it counts all the same.
    pub retries: usize,
    /// Bytes of images that are filled.
    pub size: u64,
    /// Cache mode of the tables that do not name one.
    pub cache: Cache,
    memory: PathBuf,
    disk: PathBuf,
}

/// Who keeps copies of the bytes: the same for all contenders of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// O_DIRECT.
    None,
    /// The page cache.
    Writeback,
}

impl Cache {
    /// As `ploopctl` and QEMU call it.
    pub const fn name(self) -> &'static str {
        match self {
            Cache::None => "none",
            Cache::Writeback => "writeback",
        }
    }
}

impl Options {
    /// Of the command line.
    pub fn parse() -> Self {
        let (mut tables, mut given) = (Vec::new(), HashMap::new());
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.strip_prefix("--") {
                Some("" | "bench") => {}
                Some("quick") => {
                    given.insert("seconds".into(), "1".into());
                    given.insert("repetitions".into(), "1".into());
                }
                Some(name) => {
                    let value = args.next();
                    let value = value.unwrap_or_else(|| panic!("--{name} needs a value"));
                    given.insert(name.to_owned(), value);
                }
                None => tables.push(arg),
            }
        }
        let mut take = |name: &str, default: &str| given.remove(name).unwrap_or(default.into());
        let number = |text: String| -> u64 {
            text.parse()
                .unwrap_or_else(|_| panic!("{text} is not a number"))
        };
        let options = Self {
            tables,
            seconds: number(take("seconds", "3")),
            repetitions: number(take("repetitions", "3")) as usize,
            retries: number(take("retries", "1")) as usize,
            size: number(take("size", "1073741824")),
            cache: match take("cache", "writeback").as_str() {
                "none" => Cache::None,
                "writeback" => Cache::Writeback,
                other => panic!("no cache mode {other}"),
            },
            memory: take("memory", "/dev/shm").into(),
            disk: take("disk", env!("CARGO_TARGET_TMPDIR")).into(),
        };
        assert!(given.is_empty(), "unknown options: {:?}", given.keys());
        options
    }

    /// A folder on tmpfs.
    pub fn in_memory(&self) -> TempDir {
        TempDir::new_in(&self.memory).expect("a folder for images in memory")
    }

    /// A folder on a disk.
    pub fn on_disk(&self) -> TempDir {
        TempDir::new_in(&self.disk).expect("a folder for images on a disk")
    }
}

/// A file without a zero block, so that every image of it is fully allocated.
pub fn fill(path: &Path, size: u64) {
    let mut random = Random::new(1);
    let mut file = File::create(path).expect("the folder takes files");
    for _ in 0..size.div_ceil(1 << 20) {
        file.write_all(&random.bytes(1 << 20))
            .expect("the folder has room for the images");
    }
}
