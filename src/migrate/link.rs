//! Link: the stream between the two sides, as each of them has it: two ends of bytes, one to read and
//! one to write.
//!
//! What comes is read by a thread of its own, so that it arrives while the disk works, and as much of
//! it as fits a bounded queue. Nobody is waited for after the link is gone.

use super::frame::Frame;
use super::send::{Peer, failed};
use super::talk::{self, ToSource};
use ploop_formats::{Error, Kind, Result};
use std::io::{BufWriter, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

/// Frames that were read and not taken.
const WAITING: usize = 4;
/// Bytes that are written together.
const TOGETHER: usize = 64 << 10;
/// How long a side may take to go.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long it may not be asked whether it is still wanted.
const BLINK: Duration = Duration::from_millis(50);

/// One side's ends.
pub struct Link<'a> {
    came: Receiver<Result<Frame>>,
    out: BufWriter<Box<dyn Write + Send>>,
    /// Asked while nothing comes: an error ends the wait.
    goes_on: Option<&'a dyn Fn() -> Result<()>>,
}

impl<'a> Link<'a> {
    /// A link that is read from `input` and written to `out`.
    pub fn new(
        mut input: impl Read + Send + 'static,
        out: impl Write + Send + 'static,
        goes_on: &'a dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let (read, came) = sync_channel(WAITING);
        let reader = move || {
            loop {
                let frame = Frame::read(&mut input).transpose();
                let is_last = !matches!(frame, Some(Ok(_)));
                // Nobody listens any more when this side has ended it.
                let told = frame.is_none_or(|frame| read.send(frame).is_ok());
                if is_last || !told {
                    return;
                }
            }
        };
        thread::Builder::new().spawn(reader)?;
        Ok(Self {
            came,
            out: BufWriter::with_capacity(TOGETHER, Box::new(out)),
            goes_on: Some(goes_on),
        })
    }

    /// The next frame; none once the other side has ended it in order.
    pub fn next(&self) -> Result<Option<Frame>> {
        loop {
            match self.came.recv_timeout(BLINK) {
                Ok(frame) => return frame.map(Some),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    self.goes_on.map_or(Ok(()), |goes_on| goes_on())?
                }
            }
        }
    }

    /// Sends a frame, and with a message all before it.
    pub fn write(&mut self, frame: &Frame) -> Result<()> {
        let written = frame.write(&mut self.out).and_then(|()| match frame {
            Frame::Message(_) => self.out.flush(),
            Frame::Data { .. } | Frame::Zero { .. } => Ok(()),
        });
        written.map_err(|e| Error::new(Kind::Io, format!("the link is gone: {e}")))
    }

    /// Returns when the other side is gone, too, or takes long for that.
    pub fn end(self) {
        drop(self.out);
        while let Ok(Ok(_)) = self.came.recv_timeout(FAREWELL) {}
    }

    /// Why the other side went, if it said so.
    fn last_words(&self) -> Option<String> {
        loop {
            let came = self.came.recv_timeout(FAREWELL).ok()?.ok()?;
            let Frame::Message(text) = came else {
                return None;
            };
            if let ToSource::Failed { message } = talk::parse(&text).ok()? {
                return Some(message);
            }
        }
    }
}

impl Peer for Link<'_> {
    async fn send(&mut self, frame: Frame) -> Result<()> {
        let written = self.write(&frame);
        written.map_err(|e| self.last_words().map_or(e, |why| failed(&why)))
    }

    async fn hear(&mut self) -> Result<ToSource> {
        match self.next()? {
            Some(Frame::Message(text)) => talk::parse(&text),
            Some(_) => Err(Error::new(Kind::Io, "the other side sent data")),
            None => Err(Error::new(Kind::Io, "the other side is gone")),
        }
    }

    fn is_given(&mut self) {
        self.goes_on = None;
    }
}
