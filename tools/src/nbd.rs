//! The smallest NBD client: enough for the tour to read and write without privileges.
//!
//! Fixed newstyle with the old EXPORT_NAME option and simple replies, one request at a time
//! (NBD protocol, sections "newstyle negotiation" and "transmission").

use ploop::{Error, Kind, Result};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

/// A connection in its transmission phase.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the default export.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0u8; 18];
        stream.read_exact(&mut greeting)?;
        if &greeting[..16] != GREETING {
            return Err(Error::new(
                Kind::Io,
                "the server does not speak newstyle NBD",
            ));
        }
        // Fixed newstyle, no padding after the export's data.
        stream.write_all(&3u32.to_be_bytes())?;
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0")?;
        let mut export = [0u8; 10];
        stream.read_exact(&mut export)?;
        Ok(Self { stream })
    }

    fn request(&mut self, command: u16, at: u64, len: usize, data: &[u8]) -> Result<()> {
        let mut head = Vec::with_capacity(28 + data.len());
        head.extend(REQUEST.to_be_bytes());
        head.extend(0u16.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(1u64.to_be_bytes());
        head.extend(at.to_be_bytes());
        head.extend((len as u32).to_be_bytes());
        head.extend(data);
        self.stream.write_all(&head)?;
        let mut reply = [0u8; 16];
        self.stream.read_exact(&mut reply)?;
        match (&reply[..4], &reply[4..8]) {
            (magic, [0, 0, 0, 0]) if magic == REPLY.to_be_bytes() => Ok(()),
            (_, error) => Err(Error::new(Kind::Io, format!("NBD error {error:?}"))),
        }
    }

    /// Reads `len` bytes.
    pub fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>> {
        self.request(READ, at, len, &[])?;
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Writes.
    pub fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.request(WRITE, at, data.len(), data)
    }

    /// Makes what was written durable.
    pub fn flush(&mut self) -> Result<()> {
        self.request(FLUSH, 0, 0, &[])
    }
}
