//! Processor time: of everybody, of fio, of a server with all its processes.

use std::collections::HashMap;
use std::fs;

/// The kernel reports processor time in hundredths of a second (USER_HZ is 100 on Linux).
pub const TICK_MICROSECONDS: f64 = 10_000.0;

/// Processor time so far, in ticks.
pub struct Machine {
    /// Of everybody.
    pub busy: u64,
    /// Of this process's children that have ended: fio.
    pub children: u64,
}

impl Machine {
    /// As it is now.
    pub fn now() -> Self {
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

/// A process and everything below it: ours is a keeper and a worker.
fn tree(root: u32) -> Vec<(u32, Stat)> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let all: HashMap<u32, Stat> = pids.filter_map(|pid| Some((pid, stat(pid)?))).collect();
    let parents: HashMap<u32, u32> = all
        .iter()
        .map(|(pid, stat)| (*pid, stat.fields[3] as u32))
        .collect();
    let below = |pid: u32| {
        let mut at = pid;
        while at != root {
            match parents.get(&at) {
                None | Some(0) => return false,
                Some(parent) => at = *parent,
            }
        }
        true
    };
    all.into_iter().filter(|(pid, _)| below(*pid)).collect()
}

/// User and system time of a process and everything below it.
pub fn of_tree(root: u32) -> u64 {
    tree(root)
        .iter()
        .map(|(_, s)| s.fields[13] + s.fields[14])
        .sum()
}

/// The children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let tree = tree(parent).into_iter();
    tree.filter(|(_, s)| s.fields[3] as u32 == parent)
        .map(|(pid, _)| pid)
        .collect()
}
