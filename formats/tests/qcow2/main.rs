//! qcow2 for reading: headers, images made by QEMU, images made to do harm.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod chain;
mod check;
mod header;
mod image;
mod made;
mod matrix;
mod qemu;
