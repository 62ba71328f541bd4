//! Campaigns: the engine against simulated disks, power cuts, deaths of its process and errors.
//!
//! A campaign runs seeded workloads on a [`Subject`], a disk whose files are simulated, and judges
//! what it finds with a model of all legal contents. Every failure names the seed that replays it.
//! What the campaigns themselves are worth is measured by planted bugs and broken barriers
//! ([`mutate`]): a campaign that never caught anything proves nothing.
//!
//! Compiled with the feature `testkit` only and never shipped.
#![allow(
    clippy::unwrap_used,
    reason = "test instruments stop at the first surprise"
)]

pub mod chains;
pub mod changes;
pub mod compacts;
pub mod copies;
pub mod crash;
pub mod death;
pub mod engine;
pub mod faults;
pub mod forest;
pub mod fuzz;
pub mod grows;
pub mod judge;
pub mod migrations;
pub mod models;
pub mod mutate;
pub mod orders;
pub mod report;
pub mod session;
pub mod subject;
pub mod switches;
pub mod toy;
pub mod trees;

pub use chains::{Chains, OddChains};
pub use engine::Engine;
pub use report::{Failure, Report};
pub use subject::Subject;
pub use switches::Stacked;
