//! Receiving: requests out of one buffer, payloads straight to where they stay.
//!
//! As many requests as have arrived are taken with one receive. A payload that lies in the buffer
//! is copied once, into aligned memory; what has not arrived yet is received there.

use super::limits;
use super::link::Link;
use super::pool::Pool;
use super::proto::{BadMagic, Request, Style};
use super::stop::Watcher;
use bytes::{Bytes, BytesMut};
use ploop_formats::buf;
use std::cell::RefCell;
use std::future::Future;
use std::io;

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum End {
    /// The client said so, or closed between requests.
    Client,
    /// The server was asked to stop.
    Stopped,
    /// The client closed, or the connection broke, in the middle of something.
    Lost(io::Error),
    /// The client broke the protocol.
    Violation(String),
}

/// The receiving side of a connection.
pub(super) struct Intake<'a> {
    link: &'a Link,
    style: Style,
    /// What was received and not taken is at `start .. end`.
    buf: BytesMut,
    start: usize,
    end: usize,
    /// The last payload was large: the next will be too.
    bulk: bool,
    stop: Watcher,
}

impl<'a> Intake<'a> {
    /// `early` was received already.
    pub(super) fn new(link: &'a Link, style: Style, early: &[u8], stop: Watcher) -> Self {
        let mut buf = buf::aligned(limits::RECEIVE_BUFFER.max(early.len()));
        let (head, _) = buf.split_at_mut(early.len());
        head.copy_from_slice(early);
        Self {
            link,
            style,
            buf,
            start: 0,
            end: early.len(),
            bulk: false,
            stop,
        }
    }

    /// The next request's header.
    pub(super) async fn request(&mut self) -> Result<Request, End> {
        loop {
            match Request::decode(self.style, self.waiting()) {
                Ok(Some(request)) => {
                    self.start += self.style.request_len();
                    return Ok(request);
                }
                Ok(None) => self.more().await?,
                Err(BadMagic(word)) => {
                    return Err(End::Violation(format!(
                        "{word:#x} is not the head of a request"
                    )));
                }
            }
        }
    }

    fn waiting(&self) -> &[u8] {
        self.buf.get(self.start..self.end).unwrap_or_default()
    }

    /// Receives more behind what waits. The end of the stream is fine only when nothing waits.
    async fn more(&mut self) -> Result<(), End> {
        let kept = self.end - self.start;
        self.buf.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, kept);
        let window = match self.bulk {
            true => limits::BULK_WINDOW.min(self.buf.len() - kept),
            false => self.buf.len() - kept,
        };
        let all = std::mem::take(&mut self.buf);
        let (all, got) = receive_at(self.link, &mut self.stop, all, kept, window).await?;
        self.buf = all;
        self.end += got;
        match got {
            0 if kept == 0 => Err(End::Client),
            0 => Err(closed_early()),
            _ => Ok(()),
        }
    }

    /// Takes a payload of `len` bytes into aligned memory.
    pub(super) async fn payload(&mut self, len: usize, pool: &RefCell<Pool>) -> Result<Bytes, End> {
        self.bulk = len >= limits::BULK;
        let mut data = pool.borrow_mut().take(len);
        let ready = self.waiting();
        let mut filled = ready.len().min(len);
        let (head, _) = data.split_at_mut(filled);
        head.copy_from_slice(ready.split_at(filled).0);
        self.start += filled;
        while filled < len {
            let got;
            (data, got) = receive_at(self.link, &mut self.stop, data, filled, len - filled).await?;
            if got == 0 {
                return Err(closed_early());
            }
            filled += got;
        }
        Ok(data.freeze())
    }

    /// Takes a payload of `len` bytes and forgets it.
    pub(super) async fn skip(&mut self, mut len: u64) -> Result<(), End> {
        loop {
            let ready = (self.end - self.start).min(usize::try_from(len).unwrap_or(usize::MAX));
            self.start += ready;
            len -= ready as u64;
            if len == 0 {
                return Ok(());
            }
            self.more().await.map_err(|end| match end {
                End::Client => closed_early(),
                other => other,
            })?;
        }
    }

    /// Waits for `work`, unless the server stops.
    pub(super) async fn unless_stopped<F: Future>(&mut self, work: F) -> Result<F::Output, End> {
        self.stop.or(work).await.ok_or(End::Stopped)
    }
}

fn closed_early() -> End {
    End::Lost(io::ErrorKind::UnexpectedEof.into())
}

/// Receives at most `room` bytes into `buf` from `at` on.
async fn receive_at(
    link: &Link,
    stop: &mut Watcher,
    mut buf: BytesMut,
    at: usize,
    room: usize,
) -> Result<(BytesMut, usize), End> {
    let got;
    if at == 0 && room == buf.len() {
        (buf, got) = stop.or(link.recv(buf)).await.ok_or(End::Stopped)?;
    } else {
        let mut tail = buf.split_off(at);
        let rest = tail.split_off(room);
        (tail, got) = stop.or(link.recv(tail)).await.ok_or(End::Stopped)?;
        tail.unsplit(rest);
        buf.unsplit(tail);
    }
    got.map(|got| (buf, got)).map_err(End::Lost)
}
