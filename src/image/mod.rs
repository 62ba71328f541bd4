//! Image directories: what DISK means, which files make it up, and opening them as one device.
//!
//! [`target`] turns what a user typed into a disk, [`chain`] says which file is which layer,
//! [`lock`] keeps other programs out, [`open`] builds the device, [`delta`] opens one file of it,
//! [`backing`] finds what a qcow2 image stands on, [`init`] makes a new disk, [`adopt`] one of an
//! image, [`change`] leads from one descriptor to the next and [`snapshot`] says to which,
//! [`convert`] leads from one form to another, [`replace`] gives a frozen delta another file,
//! [`restore`] makes a lost descriptor anew, [`clone`] shares frozen files, [`grow`] makes it
//! larger, [`compact`] its file shorter, [`survey`] looks without opening, [`check`] looks closely,
//! [`members`] tells a disk's files from others, [`delete`] removes a disk. What was written to it
//! since somebody looked is [`kept`] while it is detached, and [`witness`] tells whether anybody has
//! written. A disk whose tree is changed while nobody serves it is [`detached`], [`site`] is where a
//! clone comes to be, and [`views`] are clones to look at a point. Nothing here knows who serves the
//! disk or who asked for it.

pub mod adopt;
pub mod backing;
pub mod chain;
pub mod change;
pub mod check;
pub mod clone;
pub mod compact;
pub mod convert;
pub mod delete;
pub mod delta;
pub mod detached;
pub mod grow;
pub mod init;
pub mod kept;
pub mod limit;
pub mod lock;
pub mod members;
pub mod newfile;
pub mod open;
pub mod replace;
pub mod restore;
pub mod site;
pub mod snapshot;
pub mod survey;
pub mod target;
pub mod views;
pub mod witness;
