//! Keeper and worker: why a dead server is a pause and not an error.
//!
//! One attached disk is two processes. The [`keeper`] is tiny and touches no image: it owns what
//! must outlive a crash, that is the FUSE descriptor, listening sockets, disk locks, the ledger of
//! what was answered but is not durable, and the run directory. The [`worker`] opens the files
//! and serves. When it dies, the keeper starts another one, which waits for the fence, overlays
//! the ledger and asks the kernel to send the unanswered requests again.
//!
//! The pieces: [`message`] is what they say to each other, [`restart`] how often a worker may die,
//! [`log`] where both write, [`listen`] the sockets, [`mounts`] what the kernel has mounted,
//! [`control`] what others may ask, [`metrics`] what Prometheus reads, [`host`] what a disk takes
//! on the host, [`snapshot`] how the keeper, a [`changer`] and the worker ([`turnover`]) freeze a
//! top under a running guest while users of the device are kept [`still`], [`growth`] how they give
//! the disk another size, [`compaction`] its file shorter, [`tracking`] and [`trackers`] how both
//! know what was written, [`notes`] who writes the trackers' names down, [`freeze`] and [`halt`] how
//! both keep the disk as it is, [`trim`] what its file system gives back, [`leftover`] what a dead
//! keeper leaves behind, [`space`] and [`brake`] what is done while the host is nearly full.

mod announce;
mod brake;
mod changer;
mod child;
mod compaction;
pub mod control;
mod errand;
mod freeze;
mod growth;
mod halt;
pub mod host;
pub mod inherit;
pub mod keeper;
pub mod leftover;
mod listen;
pub mod log;
pub mod message;
pub mod metrics;
pub mod mounts;
mod notes;
mod packet;
mod removal;
mod restart;
mod snapshot;
mod space;
mod still;
mod trackers;
mod tracking;
pub mod trim;
mod turnover;
pub mod worker;

pub use changer::run as run_changer;
pub use errand::{Task, run as run_errand};
pub use notes::run as run_note;
pub use still::run as run_still;
