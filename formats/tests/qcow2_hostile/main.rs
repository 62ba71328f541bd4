//! qcow2 images made to do harm, in a process of their own: what it holds in memory is counted.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../qcow2/chain.rs"]
mod chain;
mod images;
#[path = "../qcow2/made.rs"]
mod made;
#[allow(dead_code, reason = "each test uses its part")]
#[path = "../../../tests/hostile/memory.rs"]
mod memory;
#[path = "../qcow2/qemu.rs"]
mod qemu;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;
