//! A connection: where requests come from and where answers go, in the clear or under TLS.
//!
//! Negotiation and session use it alike; neither knows what is on the wire.

use super::credentials::Identity;
use super::tls::Tls;
use crate::io::exec;
use bytes::{Bytes, BytesMut};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A socket, or a pair of pipes.
#[derive(Debug)]
pub(super) struct Link {
    input: Arc<OwnedFd>,
    output: Arc<OwnedFd>,
    tls: Option<Box<Tls>>,
}

impl Link {
    /// In the clear. For a socket both are the same.
    pub(super) fn new(input: Arc<OwnedFd>, output: Arc<OwnedFd>) -> Self {
        Self {
            input,
            output,
            tls: None,
        }
    }

    /// Receives once into `buf`, up to its length: how many bytes arrived, 0 at the end. Dropped
    /// before it is done, bytes are lost.
    pub(super) async fn recv(&self, buf: BytesMut) -> (BytesMut, io::Result<usize>) {
        match &self.tls {
            None => exec::recv(&self.input, buf).await,
            Some(tls) => tls.recv(&self.input, &self.output, buf).await,
        }
    }

    /// Sends all parts, in order. One at a time.
    pub(super) async fn send_all(&self, parts: Vec<Bytes>) -> io::Result<()> {
        match &self.tls {
            None => exec::send_all(&self.output, parts).await,
            Some(tls) => tls.send_all(&self.output, parts).await,
        }
    }

    /// Turns to TLS, as the server. What the peer sends from now on is taken for its handshake.
    pub(super) async fn secure(&mut self, identity: &Identity) -> io::Result<()> {
        let tls = Tls::accept(identity, &self.input, &self.output).await?;
        self.tls = Some(Box::new(tls));
        Ok(())
    }

    /// Tells the peer that nothing more comes, where the wire has a word for it. Never waits.
    pub(super) fn say_goodbye(&self) {
        if let Some(tls) = &self.tls {
            tls.say_goodbye(&self.output);
        }
    }
}
