//! Image directories: what DISK means, which files make it up, and opening them as one device.
//!
//! [`target`] turns what a user typed into a disk, [`chain`] says which file is which layer,
//! [`lock`] keeps other programs out, [`open`] builds the device, [`init`] makes a new disk,
//! [`adopt`] one of an image, [`change`] leads from one descriptor to the next and [`snapshot`] says to which,
//! [`survey`] looks without opening, [`check`] looks closely, [`members`] tells a disk's files from
//! others, [`delete`] removes a disk. A disk whose tree is changed while nobody serves it is
//! [`detached`], and [`site`] is where a clone comes to be. Nothing here knows who serves the disk or
//! who asked for it.

pub mod adopt;
pub mod chain;
pub mod change;
pub mod check;
pub mod clone;
pub mod delete;
pub mod detached;
pub mod init;
pub mod lock;
pub mod members;
pub mod open;
pub mod site;
pub mod snapshot;
pub mod survey;
pub mod target;
