//! What the black-box suites share: the built programs, child processes with deadlines, a served
//! disk, a small NBD client, files with known contents. Nothing here knows how ploop works inside.
#![allow(dead_code, reason = "every suite uses its own part of this")]
#![allow(
    clippy::unwrap_used,
    reason = "test instruments stop at the first surprise"
)]

pub mod attach;
pub mod files;
pub mod host;
pub mod load;
pub mod mixed;
pub mod nbd;
pub mod point;
pub mod process;
pub mod programs;
pub mod serve;
pub mod sizes;
pub mod tracked;
pub mod tree;

/// Says that a test could not run here. `./dev test` counts these lines, and fails on them in CI.
pub fn skip(test: &str, reason: &str) {
    println!("SKIP: {test}: {reason}");
}

/// A count from the environment, so that CI and a quick local run can differ.
pub fn count(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// Whether every one of `tools` is installed; otherwise the test is skipped, visibly.
pub fn have(test: &str, tools: &[&str]) -> bool {
    let missing: Vec<&str> = tools
        .iter()
        .copied()
        .filter(|tool| !programs::installed(tool))
        .collect();
    if !missing.is_empty() {
        skip(
            test,
            &format!("not installed: {} (./dev setup)", missing.join(", ")),
        );
    }
    missing.is_empty()
}
