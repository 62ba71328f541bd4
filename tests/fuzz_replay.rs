//! The fuzz targets without a fuzzer: every input that is kept, every seed and mutations of both go
//! through the same functions, in every run of the tests.
//!
//! `PLOOP_FUZZ_MUTATIONS` says how many mutations a target gets. An input that once broke a target
//! is kept in `fuzz/regressions/TARGET/`; what a fuzzer collected in `fuzz/corpus/TARGET/` is
//! replayed too, where there is some.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use ploop::testkit::fuzz::{TARGETS, mutate};
use ploop_formats::planted::{self, Bug};
use ploop_formats::testkit::rng::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Inputs longer than this are left to the fuzzer.
const LONGEST: usize = 1 << 20;
/// One input may take this long before it counts as a hang.
const HANG: Duration = Duration::from_secs(60);

/// Files of a target that were collected.
fn kept(target: &str) -> Vec<(String, Vec<u8>)> {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let folders = ["regressions", "corpus"].map(|kind| fuzz.join(kind).join(target));
    let entries = folders.iter().flat_map(std::fs::read_dir).flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: PathBuf| (path.display().to_string(), std::fs::read(&path).unwrap());
    files.into_iter().map(read).collect()
}

/// All inputs of a target, each with a name that says how to make it again.
fn inputs(target: usize) -> impl Iterator<Item = (String, Vec<u8>)> + Send {
    let target = TARGETS[target];
    let mut first = (target.seeds)();
    assert!(!first.is_empty(), "{} has no seeds", target.name);
    first.extend(kept(target.name));
    first.retain(|(_, bytes)| bytes.len() <= LONGEST);
    let mutations = common::count("PLOOP_FUZZ_MUTATIONS", 3000);
    let each = mutations.div_ceil(first.len() as u64);
    first.into_iter().flat_map(move |(name, bytes)| {
        let changed = bytes.clone();
        let mutated = (0..each).map(move |n| {
            let input = mutate(&changed, &mut Rng::new(n));
            (format!("mutation {n}"), input)
        });
        let whole = std::iter::once(("itself".to_string(), bytes));
        whole
            .chain(mutated)
            .map(move |(how, bytes)| (format!("{name}, {how}"), bytes))
    })
}

fn replay(name: &str) {
    let target = TARGETS
        .iter()
        .position(|target| target.name == name)
        .unwrap();
    let run = TARGETS[target].run;
    let (begun, names) = mpsc::channel();
    let start = Instant::now();
    let worker = std::thread::spawn(move || {
        for (name, bytes) in inputs(target) {
            begun.send(name.clone()).unwrap();
            let run = catch_unwind(AssertUnwindSafe(|| run(&bytes)));
            assert!(run.is_ok(), "{name}: {} bytes broke it", bytes.len());
        }
    });
    let (mut count, mut last) = (0, String::new());
    loop {
        match names.recv_timeout(HANG) {
            Ok(name) => (count, last) = (count + 1, name),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => panic!("{last}: hangs"),
        }
    }
    let name = TARGETS[target].name;
    worker.join().unwrap_or_else(|_| panic!("{name}: {last}"));
    println!("COUNT: {name}: {count} inputs in {:?}", start.elapsed());
}

#[test]
fn any_bytes_as_an_image_are_refused_or_served() {
    replay("ploop_open");
}

#[test]
fn any_requests_to_a_disk_in_memory_give_what_a_flat_array_would() {
    replay("layer_ops");
}

#[test]
fn any_bytes_as_a_descriptor_are_refused_or_read_back() {
    replay("descriptor");
}

#[test]
fn any_bytes_of_a_negotiating_client_are_answered_in_whole_replies() {
    replay("nbd_handshake");
}

#[test]
fn any_bytes_of_a_served_client_end_in_a_closed_session() {
    replay("nbd_transmission");
}

#[test]
fn any_bytes_of_a_control_client_are_answered_in_lines_of_json_or_hung_up_on() {
    replay("control_socket");
}

#[test]
fn a_planted_bug_is_caught_by_the_replay_of_requests() {
    let caught = |bug| {
        let _planted = planted::plant(bug);
        let run = |bytes: Vec<u8>| catch_unwind(|| (TARGETS[1].run)(&bytes));
        inputs(1).any(|(_, bytes)| run(bytes).is_err())
    };
    for bug in [Bug::FreshForReused, Bug::DiscardExposesParent] {
        assert!(caught(bug), "{bug:?} was missed");
    }
}

#[test]
fn any_bytes_as_a_qcow2_image_are_refused_or_served() {
    replay("qcow2_open");
}

#[test]
fn any_requests_to_a_qcow2_image_leave_a_sound_one_sound_and_no_other_breaks_them() {
    replay("qcow2_ops");
}

#[test]
fn any_bytes_of_a_source_fill_the_disk_that_it_describes_and_nothing_else() {
    replay("migration");
}

#[test]
fn any_bytes_as_stored_trackers_are_refused_or_read_back() {
    replay("stored_trackers");
}

#[test]
fn every_target_has_its_file_and_its_replay() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .path()
                .file_stem()
                .unwrap()
                .to_str()
                .unwrap()
                .into()
        })
        .collect();
    files.sort();
    let mut names = TARGETS.map(|target| target.name);
    names.sort_unstable();
    assert_eq!(files, names);
}
