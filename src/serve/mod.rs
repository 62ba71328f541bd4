//! Transports: how a kernel or a client reaches a device.
pub mod fuse;
pub mod loopdev;
pub mod nbd;
pub mod supervise;
