//! The ploop delta: a header, a block allocation table (BAT), and clusters in any order.
//!
//! `header` and `extension` are bytes; `create`, `check` and `image` work on a store. The image is
//! split by what happens to it: `open` (recovery, in-use mark, close), `index` (what is mapped),
//! `alloc` (what is free), `sync` (what is durable, and in which order), `grow` and `shrink` (another
//! size), `compact` (places further down).
//! `convert` changes the format version of a closed one.

mod alloc;
pub mod check;
mod compact;
pub mod convert;
pub mod create;
pub mod extension;
mod grow;
pub mod header;
mod image;
mod index;
mod open;
mod shrink;
mod sync;

pub use compact::Packing;
pub use header::{Header, Version};
pub use image::{Ploop, Reserved};
