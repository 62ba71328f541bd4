//! A small NBD client that can also misbehave: stop in the middle of anything.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Commands that the suites send.
pub mod command {
    /// Read; carries no payload.
    pub const READ: u16 = 0;
    /// Write; the payload follows.
    pub const WRITE: u16 = 1;
    /// Disconnect; not answered.
    pub const DISCONNECT: u16 = 2;
    /// Discard; carries no payload.
    pub const TRIM: u16 = 4;
    /// NBD_CMD_FLUSH.
    pub const FLUSH: u16 = 3;
    /// NBD_CMD_WRITE_ZEROES; carries no payload.
    pub const ZERO: u16 = 6;
}

/// A connection in its transmission phase, with simple replies.
#[derive(Debug)]
pub struct Client<S = UnixStream> {
    stream: S,
}

impl Client {
    /// Connects and negotiates the default export. Fails rather than hangs.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Self::negotiate(UnixStream::connect(socket)?)
    }

    /// Negotiates the default export over a connected stream.
    pub fn negotiate(mut stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_write_timeout(Some(Duration::from_secs(20)))?;
        greet(&mut stream)?;
        Self::go(stream)
    }
}

/// Takes the server's greeting and answers it: fixed newstyle and no zeroes.
pub fn greet(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let greeting: [u8; 18] = take(stream)?;
    check(&greeting[..16] == b"NBDMAGICIHAVEOPT", "the greeting")?;
    stream.write_all(&3u32.to_be_bytes())
}

impl<S: Read + Write> Client<S> {
    /// Asks for the default export, after the greeting and whatever else was agreed.
    pub fn go(mut stream: S) -> io::Result<Self> {
        stream.write_all(b"IHAVEOPT")?;
        stream.write_all(&OPTION_GO.to_be_bytes())?;
        // No name, no information requests.
        stream.write_all(&6u32.to_be_bytes())?;
        stream.write_all(&[0; 6])?;
        loop {
            let head: [u8; 20] = take(&mut stream)?;
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let len = u32::from_be_bytes(head[16..20].try_into().unwrap());
            check(len < 65536, "an option reply's length")?;
            io::copy(&mut (&mut stream).take(len.into()), &mut io::sink())?;
            check(kind & 0x8000_0000 == 0, "the answer to GO")?;
            if kind == REPLY_ACK {
                return Ok(Self { stream });
            }
        }
    }

    /// Writes and waits for the answer: 0 or an NBD error number.
    pub fn write(&mut self, at: u64, data: &[u8]) -> io::Result<u32> {
        self.send(command::WRITE, at, data.len() as u32, data)?;
        self.answer()
    }

    /// Flushes and waits for the answer: 0 or an NBD error number.
    pub fn flush(&mut self) -> io::Result<u32> {
        self.send(command::FLUSH, 0, 0, &[])?;
        self.answer()
    }

    /// Discards and waits for the answer: 0 or an NBD error number.
    pub fn trim(&mut self, at: u64, len: u32) -> io::Result<u32> {
        self.send(command::TRIM, at, len, &[])?;
        self.answer()
    }

    /// Zeroes and waits for the answer: 0 or an NBD error number.
    pub fn zero(&mut self, at: u64, len: u32) -> io::Result<u32> {
        self.send(command::ZERO, at, len, &[])?;
        self.answer()
    }

    /// Reads and waits for the answer.
    pub fn read(&mut self, at: u64, len: u32) -> io::Result<Vec<u8>> {
        self.send(command::READ, at, len, &[])?;
        let error = self.answer()?;
        check(error == 0, "the answer to a read")?;
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Says goodbye, which is not answered.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.send(command::DISCONNECT, 0, 0, &[])?;
        // The server closes; anything else it sends now would be wrong.
        let rest = self.stream.read(&mut [0; 1])?;
        check(rest == 0, "silence after a disconnect")
    }

    /// Sends a request whose payload may be shorter than `len` says.
    pub fn send(&mut self, command: u16, at: u64, len: u32, payload: &[u8]) -> io::Result<()> {
        let mut head = Vec::with_capacity(28 + payload.len());
        head.extend(REQUEST_MAGIC.to_be_bytes());
        head.extend(0u16.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(0x6F6F_6C70u64.to_be_bytes());
        head.extend(at.to_be_bytes());
        head.extend(len.to_be_bytes());
        head.extend(payload);
        self.stream.write_all(&head)
    }

    fn answer(&mut self) -> io::Result<u32> {
        let reply: [u8; 16] = take(&mut self.stream)?;
        check(
            reply[..4] == SIMPLE_REPLY_MAGIC.to_be_bytes(),
            "a reply's magic",
        )?;
        Ok(u32::from_be_bytes(reply[4..8].try_into().unwrap()))
    }
}

fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn check(good: bool, what: &str) -> io::Result<()> {
    if good {
        Ok(())
    } else {
        Err(io::Error::other(format!("not as it should be: {what}")))
    }
}
