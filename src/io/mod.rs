//! Real storage and the executor that drives it.
pub mod exec;
