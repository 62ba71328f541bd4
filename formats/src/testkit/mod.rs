//! Test instruments: an executor that replays, a model of a disk, workloads.
//!
//! Compiled with the feature `testkit` only and never shipped.

pub mod exec;
pub mod rng;

pub use crate::planted;
