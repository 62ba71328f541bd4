//! Benchmarks: ploop beside its peers, the same work in the same minutes, as tables of ratios.
//!
//! `./dev bench [TABLE..] [-- OPTIONS]`; without a table, all of them. Options: `--seconds N` and
//! `--repetitions N` for each cell, `--quick` for one repetition of one second, `--retries N` for
//! runs that others disturbed, `--size BYTES` of filled images, `--memory DIR` and `--disk DIR` for
//! images on tmpfs and on a disk, `--cache writeback|none` for the tables that name no mode.
//!
//! Tables of commands (clone, clones, merge) time them from start to end; `space` times nothing.
//!
//! Method. Servers take turns within each repetition and the order rotates, so that a host that
//! slows down slows all of them; a run during which somebody else used the processors is repeated.
//! Reported are medians, the server's own processor time per request (its whole process tree), and
//! the ratio of ours to each peer's, taken within a repetition: its median and its range. Processor
//! time per request is the steadier figure: client and server share the machine.
//!
//! A peer that is not installed is a SKIP line, never a missing row that nobody sees.

#[path = "../tests/common/mod.rs"]
mod common;

mod barriers;
mod bulk;
mod clone;
mod clones;
mod cold;
mod copy_up;
mod depth;
mod first;
mod harness;
mod merge;
mod mount;
mod nbd;
mod qcow2;
mod space;

use harness::Options;

/// A table's name, and what measures and prints it.
type Table = (&'static str, fn(&Options));

/// In the order in which they run.
const TABLES: [Table; 13] = [
    ("nbd", nbd::run),
    ("bulk", bulk::run),
    ("depth", depth::run),
    ("first", first::run),
    ("copy-up", copy_up::run),
    ("cold", cold::run),
    ("qcow2", qcow2::run),
    ("mount", mount::run),
    ("barriers", barriers::run),
    ("clone", clone::run),
    ("clones", clones::run),
    ("merge", merge::run),
    ("space", space::run),
];

fn main() {
    let options = Options::parse();
    let names: Vec<&str> = TABLES.iter().map(|(name, _)| *name).collect();
    for wanted in &options.tables {
        assert!(
            names.contains(&wanted.as_str()),
            "no table {wanted}; there are: {}",
            names.join(" ")
        );
    }
    if !common::have("the benchmark", &["fio"]) {
        return;
    }
    let chosen = TABLES
        .iter()
        .filter(|(name, _)| options.tables.is_empty() || options.tables.iter().any(|t| t == name));
    for (_, run) in chosen {
        run(&options);
    }
}
