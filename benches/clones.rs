//! Many clones of one golden image: what each costs, and that the thousandth costs what the first did.

use crate::clone::{clone, golden};
use crate::common::programs::ploopctl;
use crate::harness::Options;
use crate::harness::cost::{self, Cost};
use crate::harness::table::Spread;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const SIZE: u64 = 10 << 30;
const CLONES: usize = 1000;
/// Those that are compared, at both ends.
const SAMPLE: usize = 50;

/// Made, looked at and deleted, on a disk.
pub fn run(options: &Options) {
    let folder = options.on_disk();
    let disk = folder.path().join("golden");
    let uuid = golden(&disk, SIZE);
    let base = disk.join("root.hds");
    let before = fs::read(&base).expect("the base");
    let path = |n: usize| folder.path().join(n.to_string());
    let listed = cost::of(ploopctl().args(["snapshot", "list"]).arg(&disk));
    let made: Vec<Cost> = (0..CLONES)
        .map(|n| cost::of(&mut clone(&disk, &uuid, &path(n))))
        .collect();
    let shared = fs::metadata(&base).expect("the base").nlink();
    assert_eq!(shared as usize, CLONES + 1, "names of the base");
    let listed_after = cost::of(ploopctl().args(["snapshot", "list"]).arg(&disk));
    let own: u64 = (0..CLONES).map(|n| own_bytes(&path(n))).max().unwrap_or(0);
    let deleted: Vec<Cost> = (0..CLONES)
        .map(|n| cost::of(ploopctl().arg("delete").arg(path(n))))
        .collect();
    assert_eq!(fs::metadata(&base).expect("the base").nlink(), 1);
    assert!(fs::read(&base).expect("the base") == before, "the base");

    println!(
        "\n{CLONES} clones of one golden image of {} GiB on a disk\n",
        SIZE >> 30
    );
    println!("| | |\n| --- | ---: |");
    let all: f64 = made.iter().map(|c| c.time.as_secs_f64()).sum();
    println!("| all made, s | {all:.1} |");
    println!(
        "| one made, ms: of the first {SAMPLE}, of the last | {} |",
        ends(&made, milliseconds)
    );
    println!(
        "| its peak memory, MiB: likewise | {} |",
        ends(&made, mebibytes)
    );
    println!(
        "| its own bytes on the disk, KiB, the most of any | {} |",
        own >> 10
    );
    println!(
        "| snapshot list of the golden image, ms: before, with all | {:.1}, {:.1} |",
        milliseconds(&listed),
        milliseconds(&listed_after)
    );
    println!(
        "| one deleted, ms: of the first {SAMPLE}, of the last | {} |",
        ends(&deleted, milliseconds)
    );
    println!("| the golden image afterwards | as it was |");
}

/// Medians at both ends.
fn ends(costs: &[Cost], of: fn(&Cost) -> f64) -> String {
    let first = Spread::of(costs[..SAMPLE].iter().map(of)).middle;
    let last = Spread::of(costs[costs.len() - SAMPLE..].iter().map(of)).middle;
    format!("{first:.1}, {last:.1}")
}

fn milliseconds(cost: &Cost) -> f64 {
    cost.time.as_secs_f64() * 1e3
}

fn mebibytes(cost: &Cost) -> f64 {
    cost.memory as f64 / f64::from(1 << 20)
}

/// Bytes on the disk of a folder and of the files that only it has.
fn own_bytes(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).expect("a clone").flatten();
    let files = files.map(|entry| entry.metadata().expect("a file"));
    let own = files
        .filter(|file| file.nlink() == 1)
        .map(|file| file.blocks() * 512);
    own.sum::<u64>() + fs::metadata(folder).expect("a clone").blocks() * 512
}
