//! Hostile files: images and descriptors that a stranger made to hurt whoever opens them.
//!
//! Each is opened for reading, mapped, read, checked, opened for writing and repaired, as real
//! files, through what the programs use. Nothing may panic, reach another file, take memory that
//! the file merely claims to need, take long, change a file that was refused, or make unreadable
//! what could be read.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod abuse;
mod canary;
mod descriptors;
mod images;
mod memory;

use abuse::Case;
use memory::Counting;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that a case may hold at once, beyond what was held before it.
const MEMORY_MAX: usize = 64 << 20;
/// A case that takes longer hangs.
const HANG: Duration = Duration::from_secs(60);
/// Processor time of each operation on a case: a look, a check, an open for writing, a repair.
const TIME_MAX: Duration = Duration::from_secs(1);
/// Time for a case on average, all its operations together.
const TIME_MEAN: Duration = Duration::from_millis(250);
/// Only so many complaints are printed.
const SHOWN: usize = 20;

#[test]
fn hostile_images_cost_a_clear_refusal_and_nothing_else() {
    let tried = campaign("hostile images", images::cases());
    assert!(tried >= 1200, "{tried} images");
}

#[test]
fn hostile_descriptors_cost_a_clear_refusal_and_nothing_else() {
    let tried = campaign("hostile descriptors", descriptors::cases());
    assert!(tried >= 800, "{tried} descriptors");
}

/// What a case came to.
struct Verdict {
    name: String,
    result: Result<abuse::Outcome, String>,
    memory: usize,
    time: Duration,
    longest: Duration,
    foreign: Vec<String>,
}

/// Runs all cases one after the other, beside a watch on files that none of them may touch.
fn campaign(what: &str, cases: impl Iterator<Item = Case> + Send + 'static) -> usize {
    let _alone = memory::alone();
    let folder = folder();
    let canary = canary::Canary::plant(folder.path());
    canary.sings();
    let (said, verdicts) = mpsc::channel();
    let place = folder.path().to_owned();
    let current = Arc::new(Mutex::new(String::new()));
    let name = Arc::clone(&current);
    thread::spawn(move || {
        for case in cases {
            name.lock().unwrap().clone_from(&case.name);
            if said.send(try_one(&place, &case)).is_err() {
                return;
            }
        }
    });
    let mut all = Vec::new();
    loop {
        let next = verdicts.recv_timeout(HANG);
        let mut verdict: Verdict = match next {
            Ok(verdict) => verdict,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => panic!("{}: hangs", current.lock().unwrap()),
        };
        verdict.foreign = canary.heard();
        all.push(verdict);
    }
    judge(what, &all);
    all.len()
}

/// In memory where that is possible: thousands of flushes prove nothing more on a slow disk.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

fn try_one(place: &Path, case: &Case) -> Verdict {
    let begin = Instant::now();
    let mut meter = memory::Meter::default();
    let result = catch_unwind(AssertUnwindSafe(|| abuse::run(place, case, &mut meter)));
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| Some((*panic.downcast_ref::<&str>()?).to_string()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    });
    Verdict {
        name: case.name.clone(),
        result,
        memory: meter.most(),
        time: begin.elapsed().min(meter.time()),
        longest: meter.longest(),
        foreign: Vec::new(),
    }
}

fn judge(what: &str, all: &[Verdict]) {
    let mut wrong = Vec::new();
    for verdict in all {
        let name = &verdict.name;
        if let Err(text) = &verdict.result {
            wrong.push(format!("{name}: {text}"));
        }
        if verdict.memory > MEMORY_MAX {
            wrong.push(format!("{name}: {} bytes of memory", verdict.memory));
        }
        if verdict.longest > TIME_MAX {
            wrong.push(format!("{name}: an operation of {:?}", verdict.longest));
        }
        if !verdict.foreign.is_empty() {
            wrong.push(format!("{name}: foreign files: {:?}", verdict.foreign));
        }
    }
    let total: Duration = all.iter().map(|v| v.time).sum();
    let slowest = all.iter().max_by_key(|v| v.time).unwrap();
    let longest = all.iter().map(|v| v.longest).max().unwrap();
    let largest = all.iter().max_by_key(|v| v.memory).unwrap();
    let counted = |is: fn(&abuse::Outcome) -> bool| {
        let outcomes = all.iter().filter_map(|v| v.result.as_ref().ok());
        outcomes.filter(|o| is(o)).count()
    };
    println!(
        "COUNT: {what}: {} tried; {} refused for reading, {} for writing; {} repaired, {} refused \
         repair",
        all.len(),
        counted(|o| !o.read),
        counted(|o| !o.written),
        counted(|o| o.repaired == Some(true)),
        counted(|o| o.repaired == Some(false)),
    );
    println!(
        "COUNT: {what}: {total:?} in all, the slowest {:?} ({}), an operation {longest:?} at most, \
         most memory {} KiB ({})",
        slowest.time,
        slowest.name,
        largest.memory >> 10,
        largest.name
    );
    let count = wrong.len();
    wrong.truncate(SHOWN);
    assert!(
        count == 0,
        "{count} of {}:\n{}",
        all.len(),
        wrong.join("\n")
    );
    assert!(total < TIME_MEAN * all.len() as u32, "{total:?} in all");
}
