//! Snapshots: the changes of a disk's tree of deltas, each a transaction on its descriptor.
//!
//! [`create`] freezes the top under a new one, [`switch`] goes back to a frozen point, [`remove`]
//! takes one away, [`merge`] copies a delta into the one below it, which [`copy`] does, [`parts`] where
//! a cluster is there in part, and [`fold`] does that with the top of a disk that is in use. The order in
//! which a change becomes true is in [`super::change`]. Nothing here knows who serves the disk: what
//! has to be asked of whoever writes the top comes as a closure. [`listing`] shows the tree, [`names`]
//! what people call its points, [`diff`] where two of them differ. [`internal`] is about the
//! snapshots that a bare qcow2 image keeps in itself.

pub mod copy;
pub mod create;
pub mod diff;
pub mod fold;
pub mod internal;
pub mod layers;
pub mod listing;
pub mod merge;
pub mod names;
pub mod parts;
pub mod rate;
pub mod remove;
pub mod switch;
