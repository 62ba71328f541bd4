//! How many barriers a guest's flush costs, on storage where each takes 5 ms.
//!
//! The servers run under strace, which counts their calls of fdatasync(2) and fsync(2) and delays
//! each. So that there are calls to count, io_uring is refused to all of them: the same code then
//! makes plain system calls. Time under strace says nothing; the count is what is judged.

use crate::common::process::{eventually, ok};
use crate::common::programs::tool;
use crate::harness::fio::{self, Work};
use crate::harness::images::{self, Base, CLUSTER};
use crate::harness::peers::{self, Target, end};
use crate::harness::{Cache, Options, fill, ticks};
use std::any::Any;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

const DELAY_MICROSECONDS: u32 = 5000;
/// Bytes of a base image.
const BASE: u64 = 256 << 20;

/// A case and the barriers that a flush may cost us.
struct Case {
    name: &'static str,
    wanted: f64,
    size: u64,
    /// Whether there is data below.
    parent: bool,
}

const CASES: [Case; 2] = [
    Case {
        name: "first writes to a fresh image",
        wanted: 1.0,
        size: 64 << 30,
        parent: false,
    },
    Case {
        name: "writes over a parent full of data",
        wanted: 2.0,
        size: BASE,
        parent: true,
    },
];

/// Ours beside qcow2.
pub fn run(options: &Options) {
    if !peers::have("barriers", &["strace", "qemu-nbd", "qemu-img"]) {
        return;
    }
    println!(
        "\nBarriers: 4 KiB random writes QD1, a flush after every 16, over NBD; tmpfs, cache none, \
         clusters of {CLUSTER}, each barrier {DELAY_MICROSECONDS} us\n"
    );
    println!(
        "| work | flushes a second, ours | theirs | barriers a flush, ours | qemu-nbd qcow2 64k | wanted | |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | --- |");
    for case in &CASES {
        let folder = options.in_memory();
        let base = folder.path().join("base");
        if case.parent {
            fill(&base, case.size);
        }
        let ours = measure(options, case, &ours(folder.path(), case, &base));
        let theirs = measure(options, case, &qemu(folder.path(), case, &base));
        // The file grows now and then, which costs a barrier that is no flush's.
        let met = ours.barriers <= case.wanted * 1.1;
        println!(
            "| {} | {:.0} | {:.0} | {:.2} | {:.2} | {:.0} | {} |",
            case.name,
            ours.flushes,
            theirs.flushes,
            ours.barriers,
            theirs.barriers,
            case.wanted,
            if met { "met" } else { "missed" }
        );
    }
}

/// A server under strace, ended when dropped.
struct Traced {
    target: Target,
    log: PathBuf,
}

struct Measured {
    /// A second.
    flushes: f64,
    /// Per flush.
    barriers: f64,
}

fn measure(options: &Options, case: &Case, server: &Traced) -> Measured {
    let work = Work {
        flush_every: 16,
        ..Work::random(true, 1)
    };
    let before = barriers(&server.log);
    let run = fio::run(options, &work, case.size, &server.target);
    let made = barriers(&server.log) - before;
    let flushes = run.flushes.max(1) as f64;
    Measured {
        flushes: flushes / options.seconds as f64,
        barriers: made as f64 / flushes,
    }
}

/// Barriers in a log of strace.
pub fn barriers(log: &Path) -> usize {
    let text = fs::read_to_string(log).unwrap_or_default();
    let begins = |line: &&str| {
        ["fdatasync(", "fsync("]
            .iter()
            .any(|call| line.contains(call))
    };
    text.lines().filter(begins).count()
}

fn ours(folder: &Path, case: &Case, base: &Path) -> Traced {
    let disk = if case.parent {
        images::stack(folder, &Base::Raw(base), case.size, 2)
    } else {
        images::fresh(folder, case.size)
    };
    let socket = disk.beside("socket");
    let on = format!("unix:{}", socket.display());
    let serve = disk.serve_command(&on, &["--cache", Cache::None.name()]);
    Traced::start(&serve, socket, disk)
}

fn qemu(folder: &Path, case: &Case, base: &Path) -> Traced {
    let own = TempDir::new_in(folder).expect("a folder");
    let (image, socket) = (own.path().join("qcow2"), own.path().join("socket"));
    let mut create = tool("qemu-img");
    create.args(["create", "-f", "qcow2", "-o", "cluster_size=64k"]);
    if case.parent {
        create.args(["-F", "raw", "-b"]).arg(base);
    }
    ok(create.arg(&image).arg(case.size.to_string()));
    let mut serve = tool("qemu-nbd");
    serve.args(["-t", "-f", "qcow2", "--cache=none", "--aio=threads", "-k"]);
    serve.arg(&socket).arg(&image);
    Traced::start(&serve, socket, own)
}

impl Traced {
    fn start(server: &Command, socket: PathBuf, held: impl Any) -> Self {
        let log = socket.with_extension("calls");
        let mut strace = tool("strace");
        strace.args(["-f", "-qq", "--seccomp-bpf", "-o"]).arg(&log);
        strace.args(["-e", "trace=fdatasync,fsync,io_uring_setup"]);
        strace.args(["-e", "inject=io_uring_setup:error=ENOSYS", "-e"]);
        strace.arg(format!(
            "inject=fdatasync,fsync:delay_enter={DELAY_MICROSECONDS}"
        ));
        strace.arg(server.get_program()).args(server.get_args());
        let target = peers::listening(&mut strace, socket, held);
        Self { target, log }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // strace that is killed leaves what it traces behind, and ends after it.
        let strace = self.target.pid.expect("a process");
        for server in ticks::children(strace) {
            end(server);
        }
        eventually(
            "the end of a traced server",
            Duration::from_secs(30),
            || ticks::children(strace).is_empty().then_some(()),
        );
    }
}
