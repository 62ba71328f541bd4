//! Many mounted disks on one host: what each costs when nobody uses it, and that all of them go.
//! Run as root on a machine with /dev/fuse and loop devices; elsewhere the test says that it skipped.
//! PLOOP_DENSITY is the number of disks.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::can_mount;
use common::process::{eventually, ok, run};
use common::programs::{ploopctl, tool};
use common::{count, have};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What keeper and worker of an idle disk may hold together, each page divided by its users.
const PAIR_MAX: u64 = 2 << 20;
/// Long enough for a timer of theirs, or of the kernel for them, to come round.
const IDLE: Duration = Duration::from_secs(6);

/// Mounted disks in one folder: `NUMBER/disk` on `NUMBER/mnt`. Dropping them detaches what is left.
struct Host {
    folder: TempDir,
    disks: u64,
}

impl Host {
    /// One disk is made; the others are copies, which are disks of their own.
    fn new(disks: u64) -> Self {
        let host = Self {
            folder: TempDir::new().unwrap(),
            disks,
        };
        for n in 0..disks {
            fs::create_dir_all(host.mountpoint(n)).unwrap();
        }
        ok(ploopctl()
            .args(["init", "-s", "24M", "--fs", "ext4"])
            .arg(host.disk(0)));
        for n in 1..disks {
            let mut copy = tool("cp");
            ok(copy
                .args(["-r", "--sparse=always"])
                .arg(host.disk(0))
                .arg(host.disk(n)));
        }
        host
    }

    fn disk(&self, n: u64) -> PathBuf {
        self.folder.path().join(n.to_string()).join("disk")
    }

    fn mountpoint(&self, n: u64) -> PathBuf {
        self.folder.path().join(n.to_string()).join("mnt")
    }

    /// Mounts all, one after the other, and returns how long each took.
    fn mount_all(&self) -> Vec<Duration> {
        let one = |n| {
            let start = Instant::now();
            ok(ploopctl()
                .arg("mount")
                .arg(self.disk(n))
                .arg(self.mountpoint(n)));
            start.elapsed()
        };
        (0..self.disks).map(one).collect()
    }

    /// Keeper and worker of each attached disk, as `list` says.
    fn pairs(&self) -> Vec<[u64; 2]> {
        let all: Value =
            serde_json::from_str(&ok(ploopctl().args(["list", "-o", "json"]))).unwrap();
        let own = all["disks"].as_array().unwrap().iter().filter(|disk| {
            let path = disk["path"].as_str().unwrap();
            Path::new(path).starts_with(self.folder.path())
        });
        own.map(|disk| {
            ["keeper_pid", "worker_pid"].map(|who| disk[who].as_u64().expect("a process"))
        })
        .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for n in 0..self.disks {
            if self.disk(n).exists() {
                let _ = run(ploopctl().args(["umount", "--force"]).arg(self.disk(n)));
            }
        }
    }
}

/// Bytes in memory, each page divided by the number of processes that have it.
fn proportional_set_size(pid: u64) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn entries(path: String) -> u64 {
    fs::read_dir(path).unwrap().count() as u64
}

/// How often each thread of the processes went to sleep or was sent there, by name and number.
fn switches(pairs: &[[u64; 2]]) -> BTreeMap<(String, u64), u64> {
    let mut found = BTreeMap::new();
    for pid in pairs.iter().flatten() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let name = fs::read_to_string(task.path().join("comm")).unwrap();
            let status = fs::read_to_string(task.path().join("status")).unwrap();
            let lines = status
                .lines()
                .filter_map(|l| l.split_once("voluntary_ctxt_switches:"));
            let sum = lines.map(|(_, n)| n.trim().parse::<u64>().unwrap()).sum();
            let number = task.file_name().to_str().unwrap().parse().unwrap();
            found.insert((name.trim().to_owned(), number), sum);
        }
    }
    found
}

/// The threads that ran during a while, and how often.
fn woken(pairs: &[[u64; 2]], during: Duration) -> Vec<(String, u64)> {
    let before = switches(pairs);
    thread::sleep(during);
    let changed = switches(pairs).into_iter().filter_map(|(thread, after)| {
        let times = after - before.get(&thread).copied().unwrap_or(0);
        (times > 0).then(|| (format!("{} ({})", thread.0, thread.1), times))
    });
    changed.collect()
}

/// Waits until no thread of ours runs. The kernel's own threads that a ring once needed for a flush
/// look every five seconds whether they are needed, and the last of them never ends.
fn assert_idle(test: &str, pairs: &[[u64; 2]]) {
    // What mounting wrote is written back first, and journals have their own pace.
    let start = Instant::now();
    let of_the_kernel = loop {
        let (kernels, ours): (Vec<_>, Vec<_>) = woken(pairs, IDLE)
            .into_iter()
            .partition(|(name, _)| name.starts_with("iou-wrk-"));
        if ours.is_empty() {
            break kernels;
        }
        let late = start.elapsed() > Duration::from_secs(45);
        assert!(!late, "idle disks are woken: {ours:?}");
    };
    let times: u64 = of_the_kernel.iter().map(|(_, times)| times).sum();
    println!("COUNT: {test}: 0 wake-ups in {IDLE:?}, {times} of the kernel's ring threads");
    assert!(times <= 2 * pairs.len() as u64, "{of_the_kernel:?}");
}

/// The value that half, and the one that 99 of 100, do not exceed.
fn percentiles<T: Ord + Copy>(mut all: Vec<T>) -> (T, T) {
    all.sort();
    (all[(all.len() - 1) / 2], all[(all.len() - 1) * 99 / 100])
}

/// Nothing of ours may be left: no device, mount, run directory or process that names the folder.
fn assert_all_gone(folder: &Path, inodes: &[u64]) {
    let folder = folder.to_str().unwrap();
    let loops = ok(tool("losetup").args(["--list", "--noheadings", "--output", "BACK-FILE"]));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let runs: Vec<_> = fs::read_dir("/run/ploop")
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    for inode in inodes {
        let ends = format!("-{inode}");
        let names = runs.iter().map(|e| e.file_name().into_string().unwrap());
        assert!(
            !names.clone().any(|name| name.ends_with(&ends)),
            "{:?}",
            names.collect::<Vec<_>>()
        );
        let backs = format!("-{inode}/disk");
        assert!(!loops.lines().any(|l| l.contains(&backs)), "{loops}");
    }
    assert!(!mounts.contains(folder), "{mounts}");
    // A zombie has no command line: it is dead, whoever has yet to notice.
    eventually("the end of every process", Duration::from_secs(20), || {
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let mut lines = pids.filter_map(|e| fs::read(e.path().join("cmdline")).ok());
        let named = |line: Vec<u8>| {
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("ploopd") && line.contains(folder)
        };
        (!lines.any(named)).then_some(())
    });
}

#[test]
fn many_idle_disks_cost_two_mebibytes_each_and_no_wake_up_and_all_go() {
    let test = "many_idle_disks_cost_two_mebibytes_each_and_no_wake_up_and_all_go";
    if !can_mount(test) || !have(test, &["mkfs.ext4", "losetup"]) {
        return;
    }
    let host = Host::new(count("PLOOP_DENSITY", 20));
    let (half, most) = percentiles(host.mount_all());
    println!(
        "COUNT: {test}: {} disks, mounted in {half:.1?} (p50), {most:.1?} (p99)",
        host.disks
    );
    let start = Instant::now();
    let pairs = host.pairs();
    println!("COUNT: {test}: listed in {:.1?}", start.elapsed());
    assert_eq!(pairs.len() as u64, host.disks);

    assert_idle(test, &pairs);
    let sizes: Vec<u64> = pairs
        .iter()
        .map(|pair| pair.map(proportional_set_size).iter().sum())
        .collect();
    let (half, most) = percentiles(sizes.clone());
    println!(
        "COUNT: {test}: {} KiB a pair (p50), {} KiB (p99)",
        half >> 10,
        most >> 10
    );
    for (what, place) in [("descriptors", "fd"), ("threads", "task")] {
        let all = |n: usize| {
            pairs
                .iter()
                .map(|p| entries(format!("/proc/{}/{place}", p[n])))
                .max()
        };
        println!(
            "COUNT: {test}: {what}: keeper {:?}, worker {:?}",
            all(0).unwrap(),
            all(1).unwrap()
        );
    }
    let largest = sizes.into_iter().max().unwrap();
    assert!(largest <= PAIR_MAX, "a pair has {largest} bytes");

    let inodes: Vec<u64> = (0..host.disks)
        .map(|n| fs::metadata(host.disk(n)).unwrap().ino())
        .collect();
    for n in 0..host.disks {
        ok(ploopctl().arg("umount").arg(host.mountpoint(n)));
    }
    assert_all_gone(host.folder.path(), &inodes);
    for n in 0..host.disks {
        ok(ploopctl().arg("check").arg(host.disk(n)));
        fs::remove_dir_all(host.disk(n)).unwrap();
    }
}
