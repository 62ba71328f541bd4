//! The qcow2 delta: a header, two levels of tables, and clusters in any order, some of them compressed.
//!
//! `header`, `extension`, `table`, `run`, `refcount`, `snapshot` and `bitmap` are bytes; `packed`
//! inflates; `cache` keeps table pages. `open`, `image` and `check` work on a store. What writes is split
//! by what happens to an image: `start` (opened for writing, recovery), `writer` (what is known in
//! memory), `alloc` (what is free), `blocks` (refcounts), `supply` (where clusters come from), `sync`
//! (what is durable, and in which order). No name that an image holds is ever opened here: the caller
//! opens backing and data files by a policy of its own.

mod alloc;
mod be;
pub mod bitmap;
mod blocks;
mod cache;
pub mod check;
pub mod extension;
pub mod header;
mod image;
mod open;
mod packed;
pub mod refcount;
mod run;
pub mod snapshot;
mod start;
mod supply;
mod sync;
pub mod table;
mod writer;

pub use header::Header;
pub use image::Qcow2;
pub use open::read_header;
pub use writer::Reserved;
