//! TLS on one connection: what goes through it is encrypted and decrypted on the connection's own
//! thread.
//!
//! One task receives while another sends; both are polled by one thread, and neither holds a
//! borrow while it waits. Memory is bounded: one receive of ciphertext, one record of what it
//! holds, and [`limits::TLS_UNSENT`] bytes on their way out.

use super::credentials::Identity;
use super::limits;
use crate::io::exec;
use bytes::{Bytes, BytesMut};
use rustls::ServerConnection;
use std::cell::RefCell;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The server's end of a TLS connection.
#[derive(Debug)]
pub(super) struct Tls(RefCell<State>);

#[derive(Debug)]
struct State {
    connection: ServerConnection,
    received: Received,
}

/// Ciphertext that was received and not looked at yet: `buf[start..end]`.
#[derive(Debug, Default)]
struct Received {
    buf: BytesMut,
    start: usize,
    end: usize,
}

impl Tls {
    /// Shakes hands. The peer has shown a certificate afterwards, if the identity asks for one.
    pub(super) async fn accept(
        identity: &Identity,
        input: &Arc<OwnedFd>,
        output: &Arc<OwnedFd>,
    ) -> io::Result<Self> {
        let mut connection = ServerConnection::new(identity.config()).map_err(broken)?;
        connection.set_buffer_limit(Some(limits::TLS_UNSENT));
        let tls = Self(RefCell::new(State {
            connection,
            received: Received::default(),
        }));
        match tls.shake(input, output).await {
            Ok(()) => Ok(tls),
            Err(e) => {
                exec::timeout(limits::TLS_LINGER, tls.linger(input, output)).await;
                Err(e)
            }
        }
    }

    async fn shake(&self, input: &Arc<OwnedFd>, output: &Arc<OwnedFd>) -> io::Result<()> {
        while self.0.borrow().connection.is_handshaking() {
            self.flush(output).await?;
            if self.receive(input, limits::TLS_HANDSHAKE_BUFFER).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.with_replies(output, State::shake)?;
        }
        self.flush(output).await
    }

    /// Lets the peer read why it was refused: closed with something of its own unread, or while
    /// it still sends, a socket would tell it of that instead.
    async fn linger(&self, input: &Arc<OwnedFd>, output: &Arc<OwnedFd>) {
        let _ = rustix::net::shutdown(output, rustix::net::Shutdown::Write);
        while self
            .receive(input, limits::TLS_HANDSHAKE_BUFFER)
            .await
            .is_ok_and(|got| got != 0)
        {}
    }

    /// See [`super::link::Link::recv`].
    pub(super) async fn recv(
        &self,
        input: &Arc<OwnedFd>,
        output: &Arc<OwnedFd>,
        mut buf: BytesMut,
    ) -> (BytesMut, io::Result<usize>) {
        loop {
            match self.with_replies(output, |state| state.take(&mut buf)) {
                Ok(Some(taken)) => return (buf, Ok(taken)),
                Ok(None) => {}
                Err(e) => return (buf, Err(e)),
            }
            match self.receive(input, limits::TLS_BUFFER).await {
                Ok(0) => return (buf, Ok(0)),
                Ok(_) => {}
                Err(e) => return (buf, Err(e)),
            }
        }
    }

    /// Looks at what was received, and sends what TLS itself has to say to that: a part of the
    /// handshake, a key update, or why it breaks off. Not waited for: the peer may be waiting for
    /// us to receive. What is left goes before whatever is sent next.
    fn with_replies<T>(
        &self,
        output: &OwnedFd,
        look: impl FnOnce(&mut State) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.0.borrow_mut();
        let seen = look(&mut state);
        let sent = state.send(output);
        seen.and_then(|seen| sent.map(|_| seen))
    }

    /// Receives ciphertext; everything before it was decrypted.
    async fn receive(&self, input: &Arc<OwnedFd>, room: usize) -> io::Result<usize> {
        let mut buf = std::mem::take(&mut self.0.borrow_mut().received.buf);
        if buf.len() != room {
            buf = BytesMut::zeroed(room);
        }
        let (buf, got) = exec::recv(input, buf).await;
        let end = got?;
        self.0.borrow_mut().received = Received { buf, start: 0, end };
        Ok(end)
    }

    /// See [`super::link::Link::send_all`].
    pub(super) async fn send_all(
        &self,
        output: &Arc<OwnedFd>,
        mut parts: Vec<Bytes>,
    ) -> io::Result<()> {
        exec::advance(&mut parts, 0);
        while !parts.is_empty() {
            let taken = self.0.borrow_mut().encrypt(&parts)?;
            exec::advance(&mut parts, taken);
            self.flush(output).await?;
        }
        Ok(())
    }

    /// Sends what is encrypted.
    async fn flush(&self, output: &Arc<OwnedFd>) -> io::Result<()> {
        while !self.0.borrow_mut().send(output)? {
            exec::writable(output).await?;
        }
        Ok(())
    }

    /// Says that nothing more comes, if the peer takes it at once.
    pub(super) fn say_goodbye(&self, output: &OwnedFd) {
        let mut state = self.0.borrow_mut();
        state.connection.send_close_notify();
        // It may be gone, and need not listen.
        let _ = state.send(output);
    }
}

impl State {
    /// Goes on with the handshake, and not beyond it.
    fn shake(&mut self) -> io::Result<()> {
        while self.connection.is_handshaking() && self.decrypt()? {}
        Ok(())
    }

    /// Decrypts what was received, as far as it fits `buf`: how much, 0 when the peer has closed,
    /// `None` when more must be received first.
    fn take(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut filled = 0;
        loop {
            let room = buf.get_mut(filled..).unwrap_or_default();
            match self.connection.reader().read(room) {
                // Full, or the peer has closed.
                Ok(0) => return Ok(Some(filled)),
                Ok(got) => filled += got,
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                Err(_) if self.decrypt()? => {}
                Err(_) => return Ok((filled != 0).then_some(filled)),
            }
        }
    }

    /// Decrypts a record or a part of one; false when there is nothing left to decrypt.
    fn decrypt(&mut self) -> io::Result<bool> {
        let Received { buf, start, end } = &mut self.received;
        let mut waiting = buf.get(*start..*end).unwrap_or_default();
        if waiting.is_empty() {
            return Ok(false);
        }
        let got = self.connection.read_tls(&mut waiting)?;
        *start += got;
        self.connection.process_new_packets().map_err(broken)?;
        Ok(got != 0)
    }

    /// Encrypts as much of the parts as may wait to be sent: how many bytes.
    fn encrypt(&mut self, parts: &[Bytes]) -> io::Result<usize> {
        let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        match self.connection.writer().write_vectored(&slices)? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            taken => Ok(taken),
        }
    }

    /// Sends what is encrypted, as far as that needs no waiting: whether it is all.
    fn send(&mut self, output: &OwnedFd) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Direct(output)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
}

/// Writes without waiting, and without another copy of what is written.
struct Direct<'a>(&'a OwnedFd);

impl Write for Direct<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        exec::try_send(self.0, &[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        exec::try_send(self.0, parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
