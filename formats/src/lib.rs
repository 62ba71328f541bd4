//! On-disk formats of ploop: image deltas, their descriptor, and the seams an engine stands on.
//!
//! Five nouns carry everything:
//!
//! - [`store::Store`]: bytes at rest, which may or may not be durable;
//! - [`layer::Layer`]: one delta image, which says *where* guest bytes live and moves none;
//! - [`layer::Extent`]: the answer to that question;
//! - [`update::Update`]: a metadata change as a value, writes and barriers in order;
//! - [`ledger::Ledger`]: what a guest was answered but no disk holds yet.
//!
//! This crate makes no system call, spawns no thread, reads no clock, contains no `unsafe`, and
//! never panics on what an image says: sizes are checked, indexing goes through `get`.
#![forbid(unsafe_code)]
#![deny(clippy::host_endian_bytes)]
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

pub mod buf;
pub mod descriptor;
pub mod error;
pub mod folder;
pub mod guid;
pub mod layer;
pub mod ledger;
pub mod limits;
mod pending;
pub mod planted;
pub mod ploop;
pub mod progress;
pub mod qcow2;
pub mod raw;
pub mod severity;
pub mod store;
#[cfg(feature = "testkit")]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unreachable,
    clippy::unwrap_used,
    reason = "test instruments stop at the first surprise"
)]
pub mod testkit;
pub mod units;
pub mod update;

pub use error::{Error, Kind, Result};
