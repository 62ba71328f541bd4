//! The qcow2 delta: a header, two levels of tables, and clusters in any order, some of
//! them compressed.
//!
//! `header`, `extension`, `table`, `run`, `refcount`, `snapshot` and `bitmap` are bytes; `packed`
//! inflates; `cache` keeps table pages. `open` and `image` read a store for a guest; `create`, `check` with
//! its repair, and `snapshots` work on one that nobody uses, and `words` writes for them. No name that an image
//! holds is ever opened here: the caller opens backing and data files by a policy of its own.

mod be;
pub mod bitmap;
mod cache;
pub mod check;
pub mod create;
pub mod extension;
pub mod header;
mod image;
mod open;
mod packed;
pub mod refcount;
mod run;
pub mod snapshot;
pub mod snapshots;
pub mod table;
mod words;

pub use header::Header;
pub use image::Qcow2;
pub use open::read_header;
