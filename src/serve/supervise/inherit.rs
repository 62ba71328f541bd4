//! Inherit: the descriptors that this process was started with.

use ploop_formats::{Error, Result};
use std::os::fd::{OwnedFd, RawFd};

/// Takes charge of every inherited descriptor above standard error and closes them on exec.
/// Call it first thing in `main`, once.
pub fn init() -> Result<()> {
    // SAFETY: `main` calls this before anything else, so nobody owns a descriptor yet.
    let done = unsafe { command_fds::inherited::init_inherited_fds() };
    done.map_err(|e| Error::from(e).at("inherited descriptors"))
}

/// Hands out one of them, once.
pub fn take(fd: RawFd) -> Result<OwnedFd> {
    command_fds::inherited::take_fd_ownership(fd)
        .map_err(|e| Error::invalid(format!("inherited descriptor {fd}: {e}")))
}
