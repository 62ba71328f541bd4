//! Transports: how a kernel or a client reaches a device.
mod broken;
mod complaints;
pub mod fuse;
pub mod loopdev;
pub mod nbd;
pub mod supervise;
