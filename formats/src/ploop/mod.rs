//! The ploop delta: a header, a block allocation table (BAT), and clusters in any order.
//!
//! `header` and `extension` are bytes; `create`, `check` and `image` work on a store. The image is
//! split by what happens to it: `open` (recovery, in-use mark, close), `index` (what is mapped),
//! `alloc` (what is free), `sync` (what is durable, and in which order).

mod alloc;
pub mod check;
pub mod create;
pub mod extension;
pub mod header;
mod image;
mod index;
mod open;
mod sync;

pub use header::{Header, Version};
pub use image::{Ploop, Reserved};
