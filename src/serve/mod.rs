//! Transports: how a kernel or a client reaches a device.
pub mod supervise;
