//! Disks with branches, marked points and clones under random sequences of every verb, against a
//! model.
//!
//! `PLOOP_FOREST_SEQUENCES` says how many sequences are tried.

use crate::campaign::{SEED, count, holds};
use ploop::testkit::Report;
use ploop::testkit::forest::{self, Answers};
use std::thread;

/// Runs of different threads have seeds this far apart.
const STRIDE: u64 = 1 << 40;
const THREADS: u64 = 2;

/// Every answer that a verb is documented to give.
const ANSWERS: &[&str] = &[
    "create Ok(Done)",
    "create Err(Exists)",
    "create Err(Invalid)",
    "switch Ok(Done)",
    "switch Err(NotFound)",
    "switch Err(Invalid)",
    "switch Err(Busy)",
    "remove Ok(Dropped)",
    "remove Ok(Merged)",
    "remove Ok(Marked(2))",
    "remove Ok(Marked(3))",
    "remove Err(NotFound)",
    "remove Err(Busy)",
    "remove Err(Cancelled)",
    "merge Ok(Merged)",
    "merge Err(Busy)",
    "merge Err(Cancelled)",
    "temporaries Ok(Went(0))",
    "temporaries Ok(Went(2))",
    "temporaries Err(Busy)",
    "clone Ok(Done)",
    "clone Err(NotFound)",
    "clone Err(Invalid)",
    "clone Err(Busy)",
    "forget Ok(Done)",
    "write Ok(Done)",
];

#[test]
fn every_verb_on_trees_and_their_clones_answers_and_leaves_what_the_model_says() {
    let sequences = count("PLOOP_FOREST_SEQUENCES", 300).div_ceil(THREADS);
    let run = |n: u64| {
        let mut answers = Answers::new();
        let report = forest::campaign(SEED + n * STRIDE, sequences, &mut answers);
        (report, answers)
    };
    let runs: Vec<(Report, Answers)> = thread::scope(|scope| {
        let all: Vec<_> = (0..THREADS).map(|n| scope.spawn(move || run(n))).collect();
        let all = all.into_iter().map(|one| one.join().expect("no panic"));
        all.collect()
    });
    let (reports, answers): (Vec<Report>, Vec<Answers>) = runs.into_iter().unzip();
    holds(reports.into_iter().reduce(Report::join).expect("threads"));
    let seen = |answer: &str| -> u64 { answers.iter().filter_map(|all| all.get(answer)).sum() };
    for answer in ANSWERS {
        // None is judged by nothing.
        assert!(
            sequences < 500 || seen(answer) >= 3,
            "{answer}: {answers:#?}"
        );
    }
}
