//! The NBD server as a client sees it: bytes over a socket, legal and not.
//!
//! The client here is written from the protocol text, independently of the server's own encoders.
//! Every promise is tested under both engines; a good client connects after each outrage.

mod client;
mod commands;
mod connections;
mod disk;
mod negotiation;
mod serving;
