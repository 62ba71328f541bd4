//! ploop: a container's file system in a file.
pub mod client;
pub mod compact;
pub mod counters;
pub mod cow;
pub mod device;
pub mod disk;
pub mod flight;
pub mod flush;
pub mod gate;
pub mod hold;
pub mod image;
pub mod io;
pub mod merged;
pub mod migrate;
pub mod policy;
pub mod rundir;
pub mod sandbox;
pub mod serve;
pub mod stack;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod tracker;

pub use ploop_formats as formats;
pub use ploop_formats::{Error, Kind, Result};
