//! Convert: a disk goes from one form to another, and reads the same.
//!
//! [`version`] changes the format version of all its deltas in their places, [`content`] writes what
//! a chain of them reads as into one new image.

pub mod content;
pub mod version;
