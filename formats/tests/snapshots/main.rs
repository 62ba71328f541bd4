//! Snapshots: what each operation makes of a descriptor, whoever wrote it.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod generations;
mod model;
mod random;
mod refusals;
mod rules;
mod text;
