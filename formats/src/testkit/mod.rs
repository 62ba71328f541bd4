//! Test instruments: an executor that replays, a model of a disk, workloads.
//!
//! Compiled with the feature `testkit` only and never shipped.

pub mod exec;
pub mod image;
pub mod model;
pub mod order;
pub mod qcow2;
pub mod rng;
pub mod stamp;
pub mod workload;

pub use crate::planted;
