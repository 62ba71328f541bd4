//! qcow2: headers, images made by QEMU and by us, and what is done to them while nobody uses them.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod bitmaps;
mod chain;
mod check;
mod create;
mod header;
mod image;
mod made;
mod matrix;
mod outside;
mod pack;
mod parts;
mod qemu;
mod repair;
mod resize;
mod snapshots;
