//! Convert: a disk goes from one form to another, and reads the same.
//!
//! [`version`] changes the format version of all its deltas in their places, [`content`] writes what
//! a chain of images reads as into one new image, [`pack`] where that is a qcow2 image. [`spot`] is the
//! place of one that is a file by itself.

pub mod content;
mod pack;
pub mod spot;
pub mod version;
