//! ploop: a container's file system in a file.
pub mod device;
pub mod io;
pub mod serve;

pub use ploop_formats as formats;
pub use ploop_formats::{Error, Kind, Result};
