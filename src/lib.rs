//! ploop: a container's file system in a file.
pub mod device;
pub mod image;
pub mod io;
pub mod policy;
pub mod rundir;
pub mod serve;

pub use ploop_formats as formats;
pub use ploop_formats::{Error, Kind, Result};
