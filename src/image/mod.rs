//! Image directories: what DISK means, which files make it up, and opening them as one device.
//!
//! [`target`] turns what a user typed into a disk, [`chain`] says which file is which layer,
//! [`lock`] keeps other programs out, [`open`] builds the device, [`init`] makes a new disk.
//! Nothing here knows who serves the disk or who asked for it.

pub mod target;
