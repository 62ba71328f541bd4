//! The qcow2 delta: a header, two levels of tables, and clusters in any order, some of them compressed.
//!
//! `header`, `extension`, `table`, `run`, `refcount`, `snapshot` and `bitmap` are bytes; `packed`
//! inflates; `cache` keeps table pages. `open` and `image` read a store for a guest. What writes for it is
//! split by what happens to an image: `start` (opened for writing, recovery), `writer` (what is known in
//! memory), `partial` (which subclusters of a cluster are there), `alloc` (what is free), `blocks` (refcounts), `supply` (where clusters come from), `sync`
//! (what is durable, and in which order). `create`, `check` with its repair, and `snapshots` work on an
//! image that nobody uses, and `words` writes for them. No name that an image holds is ever opened here:
//! the caller opens backing and data files by a policy of its own.

mod alloc;
mod be;
pub mod bitmap;
mod blocks;
mod cache;
pub mod check;
pub mod create;
pub mod extension;
pub mod header;
mod image;
mod open;
mod packed;
mod partial;
pub mod refcount;
mod run;
pub mod snapshot;
pub mod snapshots;
mod start;
mod supply;
mod sync;
pub mod table;
mod words;
mod writer;

pub use header::Header;
pub use image::Qcow2;
pub use open::{list_bitmaps, list_snapshots, read_header};
pub use writer::Reserved;
