//! Real storage and the executor that drives it.
//!
//! Together with the transports and the sandbox, the only place that makes system calls.
pub mod beneath;
pub mod exec;
pub mod file;
pub mod folder;
pub mod lock;
pub mod look;
pub mod memfd;
pub mod room;

mod direct;
mod fate;
mod space;
