//! NBD server: one export of one device, over sockets or a pair of pipes.
//!
//! Fixed newstyle negotiation, simple, structured and extended replies, block status and
//! multi-conn, as the protocol text of the NBD project describes them. Layers, lowest first:
//!
//! - [`proto`]: what the bytes mean; pure encoding and decoding;
//! - [`handshake`]: negotiation as a state machine, bytes in, replies out;
//! - [`meta`]: metadata contexts, and how extents are told to a client;
//! - [`command`]: whether a request is legal, and its execution on a device;
//! - [`credentials`], [`tls`], [`link`]: what a connection is made of, in the clear or not;
//! - [`session`]: the transmission phase of one connection, on one executor;
//! - [`server`]: listening, counting, stopping.
//!
//! Nothing here knows what an image is; the device decides what durable means.
pub mod command;
pub mod credentials;
pub mod handshake;
mod intake;
pub mod limits;
mod link;
pub mod meta;
mod outbox;
mod pool;
pub mod proto;
pub mod server;
mod session;
mod stop;
mod tls;

pub use server::{Export, Options, Server, Tls};
