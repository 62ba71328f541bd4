//! Transports: how a kernel or a client reaches a device.
mod complaints;
pub mod fuse;
pub mod loopdev;
pub mod nbd;
pub mod supervise;
