//! Our NBD server beside nbdkit's and QEMU's: the same client, the same work, the same minutes.
//!
//! Method. Four servers hold the same bytes, every cluster allocated, on the same file system and
//! in the same cache mode. fio's NBD engine asks each for 4 KiB blocks at random addresses. Servers
//! take turns within each repetition and the order rotates, so that a host that slows down slows
//! all of them; a run during which somebody else used the processors is repeated. Reported are
//! medians, the server's own processor time per request (its whole process tree), and the ratio of
//! ours to each peer's, taken within a repetition and then the median. Processor time per request
//! is the steadier figure: client and server share the machine.
//!
//! `cargo bench --bench nbd -- [--seconds N] [--repetitions N] [--size BYTES] [--folder DIR]
//! [--cache writeback|none]`. In mode `none` nbdkit still uses the page cache: it has no other.

#[path = "../tests/common/mod.rs"]
mod common;

use common::process::{Guard, eventually, ok, ok_within};
use common::programs::{installed, tool};
use common::serve::{Disk, Server};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Clusters of every image that has clusters.
const CLUSTER: &str = "64k";
/// Cores that others may use during a run that counts.
const FOREIGN_MAX: f64 = 0.3;
/// How often a disturbed run is repeated before it counts all the same.
const RETRIES: usize = 2;

fn main() {
    let options = Options::parse();
    for name in ["fio", "nbdkit", "qemu-nbd", "qemu-img", "nbdcopy"] {
        assert!(installed(name), "{name} is not installed (./dev setup)");
    }
    let folder = TempDir::new_in(&options.folder).expect("a folder for the images");
    let field = Field::start(&options, folder.path());
    let runs = measure(&options, &field.competitors());
    print_table(&options, &runs);
}

struct Options {
    seconds: u64,
    repetitions: usize,
    size: u64,
    folder: PathBuf,
    cache: String,
}

impl Options {
    fn parse() -> Self {
        let mut given = HashMap::new();
        let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
        while let Some(name) = args.next() {
            let value = args
                .next()
                .unwrap_or_else(|| panic!("{name} needs a value"));
            given.insert(name, value);
        }
        let mut take = |name: &str, default: &str| given.remove(name).unwrap_or(default.into());
        let number = |text: String| text.parse().unwrap_or_else(|_| panic!("{text}: no number"));
        let options = Self {
            seconds: number(take("--seconds", "3")),
            repetitions: number(take("--repetitions", "3")) as usize,
            size: number(take("--size", "1073741824")),
            folder: take("--folder", "/dev/shm").into(),
            cache: take("--cache", "writeback"),
        };
        assert!(given.is_empty(), "unknown: {:?}", given.keys());
        assert!(
            ["writeback", "none"].contains(&options.cache.as_str()),
            "{}",
            options.cache
        );
        options
    }
}

/// The servers, all running for the whole measurement.
struct Field {
    ours: (Disk, Server),
    peers: Vec<(&'static str, Guard, PathBuf)>,
}

/// A server under test.
struct Competitor {
    name: String,
    pid: u32,
    uri: String,
}

impl Field {
    fn start(options: &Options, folder: &Path) -> Self {
        let raw = folder.join("raw");
        fill(&raw, options.size);
        let ours = our_disk(options, folder, &raw);
        let peers = vec![
            nbdkit(folder, &raw),
            qemu("qcow2", options, folder, &raw),
            qemu("parallels", options, folder, &raw),
        ];
        Self { ours, peers }
    }

    fn competitors(&self) -> Vec<Competitor> {
        let (_, server) = &self.ours;
        let ours = Competitor {
            name: "ploop".into(),
            pid: server.pid(),
            uri: server.uri(),
        };
        let peers = self.peers.iter().map(|(name, guard, socket)| Competitor {
            name: (*name).into(),
            pid: guard.child.id(),
            uri: format!("nbd+unix:///?socket={}", socket.display()),
        });
        std::iter::once(ours).chain(peers).collect()
    }
}

/// A file without a zero block, so that every image of it is fully allocated.
fn fill(path: &Path, size: u64) {
    let mut random = common::files::Random::new(1);
    let mut file = File::create(path).expect("the folder takes files");
    for _ in 0..size.div_ceil(1 << 20) {
        file.write_all(&random.bytes(1 << 20))
            .expect("the folder has room for four images");
    }
}

fn our_disk(options: &Options, folder: &Path, raw: &Path) -> (Disk, Server) {
    let own = TempDir::new_in(folder).expect("a folder");
    let disk = Disk::in_folder(
        own,
        &options.size.to_string(),
        "none",
        &["--cluster", CLUSTER],
    );
    let server = disk.serve(&["--cache", &options.cache]);
    ok(tool("nbdcopy").arg("--flush").arg(raw).arg(server.uri()));
    (disk, server)
}

fn nbdkit(folder: &Path, raw: &Path) -> (&'static str, Guard, PathBuf) {
    let socket = folder.join("nbdkit.sock");
    let guard = Guard::spawn(
        tool("nbdkit")
            .args(["-f", "-U"])
            .arg(&socket)
            .arg("file")
            .arg(raw),
    );
    listening(&socket);
    ("nbdkit file (raw)", guard, socket)
}

fn qemu(
    format: &'static str,
    options: &Options,
    folder: &Path,
    raw: &Path,
) -> (&'static str, Guard, PathBuf) {
    let (image, socket) = (folder.join(format), folder.join(format!("{format}.sock")));
    let cluster = format!("cluster_size={CLUSTER}");
    let convert = ["convert", "-f", "raw", "-O", format, "-o", &cluster];
    ok_within(
        tool("qemu-img").args(convert).arg(raw).arg(&image),
        Duration::from_secs(300),
    );
    let mut command = tool("qemu-nbd");
    command
        .args(["-t", "-e", "16", "-f", format, "-k"])
        .arg(&socket);
    // QEMU's defaults are its best for the page cache, and io_uring is for direct I/O.
    if options.cache == "none" {
        command.args(["--cache=none", "--aio=io_uring"]);
    }
    let guard = Guard::spawn(command.arg(&image));
    listening(&socket);
    let name = if format == "qcow2" {
        "qemu-nbd qcow2"
    } else {
        "qemu-nbd parallels"
    };
    (name, guard, socket)
}

fn listening(socket: &Path) {
    eventually("a listening server", Duration::from_secs(20), || {
        UnixStream::connect(socket).ok()
    });
}

/// One cell of the table: what fio does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Work {
    write: bool,
    depth: u32,
    connections: u32,
}

impl Work {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for connections in [1, 2] {
            for write in [false, true] {
                all.extend([1, 32].map(|depth| Self {
                    write,
                    depth,
                    connections,
                }));
            }
        }
        all
    }

    fn name(self) -> String {
        let verb = if self.write { "write" } else { "read" };
        let plural = if self.connections == 1 { "" } else { "s" };
        format!(
            "{verb} QD{}, {} connection{plural}",
            self.depth, self.connections
        )
    }
}

/// What one run of fio showed.
#[derive(Debug, Clone, Copy)]
struct Run {
    iops: f64,
    /// Microseconds of the server's processor time per request.
    cpu: f64,
    /// Cores that neither fio nor the server used.
    foreign: f64,
}

/// Runs by work and server, in the order of repetitions.
type Runs = Vec<(Work, Vec<(String, Vec<Run>)>)>;

fn measure(options: &Options, servers: &[Competitor]) -> Runs {
    let empty = || {
        servers
            .iter()
            .map(|s| (s.name.clone(), Vec::new()))
            .collect()
    };
    let mut runs: Runs = Work::all()
        .into_iter()
        .map(|work| (work, empty()))
        .collect();
    for repetition in 0..options.repetitions {
        for (work, results) in &mut runs {
            for turn in 0..servers.len() {
                let i = (turn + repetition) % servers.len();
                let run = undisturbed(options, *work, &servers[i]);
                eprintln!(
                    "{repetition} {:32} {:20} {run:?}",
                    work.name(),
                    servers[i].name
                );
                results[i].1.push(run);
            }
        }
    }
    runs
}

/// Repeats a run while others use the processors; the calmest one counts.
fn undisturbed(options: &Options, work: Work, server: &Competitor) -> Run {
    let mut best = run(options, work, server);
    for _ in 0..RETRIES {
        if best.foreign <= FOREIGN_MAX {
            break;
        }
        let again = run(options, work, server);
        if again.foreign < best.foreign {
            best = again;
        }
    }
    best
}

fn run(options: &Options, work: Work, server: &Competitor) -> Run {
    let rw = if work.write { "randwrite" } else { "randread" };
    let mut fio = tool("fio");
    fio.args([
        "--name=j",
        "--ioengine=nbd",
        "--bs=4k",
        "--time_based",
        "--randrepeat=0",
    ]);
    fio.args(["--norandommap", "--group_reporting", "--output-format=json"]);
    fio.arg(format!("--uri={}", server.uri))
        .arg(format!("--rw={rw}"));
    fio.arg(format!("--size={}", options.size))
        .arg(format!("--runtime={}", options.seconds));
    fio.arg(format!("--iodepth={}", work.depth))
        .arg(format!("--numjobs={}", work.connections));
    let (before, server_before, start) = (Machine::now(), tree_ticks(server.pid), Instant::now());
    let said = ok_within(&mut fio, Duration::from_secs(options.seconds + 60));
    let (after, server_after, took) = (Machine::now(), tree_ticks(server.pid), start.elapsed());
    // The engine greets on standard output, before fio's report.
    let json = said
        .find('{')
        .and_then(|at| said.get(at..))
        .unwrap_or(&said);
    let report: Value = serde_json::from_str(json).expect("fio prints JSON");
    let side = &report["jobs"][0][if work.write { "write" } else { "read" }];
    let served = (server_after - server_before) as f64;
    let ours = served + (after.children - before.children) as f64;
    let others = (after.busy - before.busy) as f64 - ours;
    Run {
        iops: side["iops"].as_f64().expect("iops"),
        cpu: served * TICK_MICROSECONDS / side["total_ios"].as_f64().expect("total_ios"),
        foreign: (others * TICK_MICROSECONDS / took.as_micros() as f64).max(0.0),
    }
}

/// The kernel reports processor time in hundredths of a second (USER_HZ is 100 on Linux).
const TICK_MICROSECONDS: f64 = 10_000.0;

/// Processor time so far, in ticks.
struct Machine {
    /// Of everybody.
    busy: u64,
    /// Of this process's children that have ended: fio.
    children: u64,
}

impl Machine {
    fn now() -> Self {
        let all = fs::read_to_string("/proc/stat").expect("/proc");
        let line = all
            .lines()
            .next()
            .expect("the first line sums all processors");
        let fields: Vec<u64> = line
            .split_whitespace()
            .skip(1)
            .filter_map(|f| f.parse().ok())
            .collect();
        // user, nice and system; idle, iowait, interrupts and stolen time are nobody's work.
        let own = stat(std::process::id()).expect("this process");
        Self {
            busy: fields[..3].iter().sum(),
            children: own.fields[15] + own.fields[16],
        }
    }
}

/// A line of /proc/PID/stat: the number k of proc(5) is `fields[k - 1]`, texts are 0.
struct Stat {
    fields: Vec<u64>,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, also spaces and brackets.
    let (_, rest) = text.rsplit_once(')')?;
    let numbers = rest
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0));
    Some(Stat {
        fields: [u64::from(pid), 0].into_iter().chain(numbers).collect(),
    })
}

/// User and system time of a process and everything below it: ours is a keeper and a worker.
fn tree_ticks(root: u32) -> u64 {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let all: HashMap<u32, Stat> = pids.filter_map(|pid| Some((pid, stat(pid)?))).collect();
    let below = |pid: u32| {
        let mut at = pid;
        while at != root {
            match all.get(&at).map(|s| s.fields[3] as u32) {
                None | Some(0) => return false,
                Some(parent) => at = parent,
            }
        }
        true
    };
    all.iter()
        .filter(|(pid, _)| below(**pid))
        .map(|(_, s)| s.fields[13] + s.fields[14])
        .sum()
}

fn print_table(options: &Options, runs: &Runs) {
    println!();
    println!(
        "4 KiB random blocks, unix socket, {} MiB image, clusters of {CLUSTER}, fully allocated,",
        options.size >> 20
    );
    println!(
        "cache {}, images in {}, median of {} runs of {} s. CPU: microseconds a request.",
        options.cache,
        options.folder.display(),
        options.repetitions,
        options.seconds
    );
    println!();
    println!("| work | server | IOPS | CPU | ploop's IOPS, ratio | ploop's CPU, ratio |");
    println!("| --- | --- | ---: | ---: | ---: | ---: |");
    let mut disturbed = 0;
    for (work, results) in runs {
        let ours = &results[0].1;
        for (name, theirs) in results {
            let iops = median(theirs.iter().map(|r| r.iops));
            let cpu = median(theirs.iter().map(|r| r.cpu));
            let more = median(ours.iter().zip(theirs).map(|(a, b)| a.iops / b.iops));
            let less = median(ours.iter().zip(theirs).map(|(a, b)| a.cpu / b.cpu));
            println!(
                "| {} | {name} | {iops:.0} | {cpu:.1} | {more:.2} | {less:.2} |",
                work.name()
            );
            disturbed += theirs.iter().filter(|r| r.foreign > FOREIGN_MAX).count();
        }
    }
    println!();
    println!(
        "Runs that others disturbed (above {FOREIGN_MAX} cores) and that count all the same: {disturbed}."
    );
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}
