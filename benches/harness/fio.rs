//! One run of fio against one server, and what it showed.

use super::Options;
use super::peers::{Place, Target};
use super::ticks::{self, Machine, TICK_MICROSECONDS};
use crate::common::process::ok_within;
use crate::common::programs::tool;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Cores that others may use during a run that counts.
pub const FOREIGN_MAX: f64 = 0.3;

/// What fio does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Writes, or reads.
    pub write: bool,
    /// In order, or at random.
    pub random: bool,
    /// Bytes of a request.
    pub block: u64,
    /// Requests in flight, each connection.
    pub depth: u32,
    /// Connections.
    pub connections: u32,
    /// A flush after so many writes; 0 for none.
    pub flush_every: u32,
}

impl Work {
    /// Random 4 KiB requests over one connection.
    pub const fn random(write: bool, depth: u32) -> Self {
        Self {
            write,
            random: true,
            block: 4096,
            depth,
            connections: 1,
            flush_every: 0,
        }
    }

    /// Large requests in order, eight in flight.
    pub const fn bulk(write: bool, block: u64) -> Self {
        Self {
            random: false,
            block,
            ..Self::random(write, 8)
        }
    }

    /// For people.
    pub fn name(&self) -> String {
        let order = if self.random { "random" } else { "sequential" };
        let verb = if self.write { "write" } else { "read" };
        let mut name = format!("{order} {verb} {} KiB QD{}", self.block >> 10, self.depth);
        if self.connections > 1 {
            name += &format!(", {} connections", self.connections);
        }
        if self.flush_every > 0 {
            name += &format!(", flush every {}", self.flush_every);
        }
        name
    }

    fn mode(&self) -> &'static str {
        match (self.random, self.write) {
            (true, false) => "randread",
            (true, true) => "randwrite",
            (false, false) => "read",
            (false, true) => "write",
        }
    }
}

/// What one run showed.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Requests a second.
    pub iops: f64,
    /// Microseconds of the server's processor time per request.
    pub cpu: f64,
    /// Cores that neither fio nor the server used.
    pub foreign: f64,
    /// Flushes that the client asked for.
    pub flushes: u64,
}

/// Runs `work` over the first `span` bytes of a target; repeated while others use the processors,
/// the calmest one counts. Every try has a target of its own.
pub fn undisturbed(
    options: &Options,
    work: &Work,
    span: u64,
    mut target: impl FnMut() -> Target,
) -> Run {
    let mut best = run(options, work, span, &target());
    for _ in 0..options.retries {
        if best.foreign <= FOREIGN_MAX {
            break;
        }
        let again = run(options, work, span, &target());
        if again.foreign < best.foreign {
            best = again;
        }
    }
    best
}

/// One run.
pub fn run(options: &Options, work: &Work, span: u64, target: &Target) -> Run {
    let mut fio = tool("fio");
    fio.args(["--name=j", "--time_based", "--randrepeat=0"]);
    fio.args(["--norandommap", "--group_reporting", "--output-format=json"]);
    match &target.place {
        Place::Uri(uri) => fio.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
        Place::Device(path) => fio
            .args(["--ioengine=io_uring", "--direct=1"])
            .arg(format!("--filename={}", path.display())),
    };
    fio.arg(format!("--rw={}", work.mode()))
        .arg(format!("--bs={}", work.block))
        .arg(format!("--size={span}"))
        .arg(format!("--runtime={}", options.seconds))
        .arg(format!("--iodepth={}", work.depth))
        .arg(format!("--numjobs={}", work.connections));
    if work.flush_every > 0 {
        fio.arg(format!("--fsync={}", work.flush_every));
    }
    let ticks = || target.pid.map_or(0, ticks::of_tree);
    let (before, server_before, start) = (Machine::now(), ticks(), Instant::now());
    let said = ok_within(&mut fio, Duration::from_secs(options.seconds + 60));
    let (after, server_after, took) = (Machine::now(), ticks(), start.elapsed());
    // The engine greets on standard output, before fio's report.
    let json = said
        .find('{')
        .and_then(|at| said.get(at..))
        .unwrap_or(&said);
    let report: Value = serde_json::from_str(json).expect("fio prints JSON");
    let job = &report["jobs"][0];
    let side = &job[if work.write { "write" } else { "read" }];
    let served = server_after.saturating_sub(server_before) as f64;
    let known = served + (after.children - before.children) as f64;
    let others = (after.busy - before.busy) as f64 - known;
    let requests = side["total_ios"].as_f64().expect("total_ios");
    Run {
        iops: side["iops"].as_f64().expect("iops"),
        cpu: served * TICK_MICROSECONDS / requests.max(1.0),
        foreign: (others * TICK_MICROSECONDS / took.as_micros() as f64).max(0.0),
        flushes: job["sync"]["total_ios"].as_u64().unwrap_or(0),
    }
}
