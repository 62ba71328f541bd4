//! Campaigns in simulated worlds, and the engine beside its model. One program: what they share is the
//! engine over simulated storage, which takes long to compile.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod campaign;
mod chains;
mod changes;
mod compact;
mod conversions;
mod copies;
mod crash;
mod engine;
mod exports;
mod faults;
mod forest;
mod grow;
mod migrations;
mod model;
mod parts;
mod switch;
mod worker_death;
