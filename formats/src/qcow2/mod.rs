//! The qcow2 delta, for reading: a header, two levels of tables, and clusters in any order, some of
//! them compressed.
//!
//! `header`, `extension`, `table`, `run`, `refcount`, `snapshot` and `bitmap` are bytes; `packed`
//! inflates; `cache` keeps table pages. `open`, `image` and `check` work on a store. No name that an image
//! holds is ever opened here: the caller opens backing and data files by a policy of its own.

mod be;
pub mod bitmap;
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
pub mod table;

pub use header::Header;
pub use image::Qcow2;
pub use open::{list_bitmaps, list_snapshots, read_header};
