//! A client that can misbehave.

use bytes::{Buf, BufMut, Bytes};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub const MIB: u32 = 1 << 20;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const ZEROES: u16 = 6;
pub const STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;
pub const PAYLOAD_LEN: u16 = 32;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const ENOTSUP: u32 = 95;

pub const ACK: u32 = 1;
pub const ERR_POLICY: u32 = 0x8000_0002;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Style {
    Simple,
    Structured,
    Extended,
}

pub const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub errno: u32,
    pub data: Vec<u8>,
    /// By context: lengths and status words.
    pub status: Vec<(u32, Vec<(u64, u64)>)>,
}

pub struct Client {
    pub stream: UnixStream,
    pub style: Style,
    pub size: u64,
    pub flags: u16,
}

impl Client {
    pub fn over(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            stream,
            style: Style::Simple,
            size: 0,
            flags: 0,
        }
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn get(&mut self, len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        self.stream
            .read_exact(&mut bytes)
            .expect("the server answers");
        bytes.into()
    }

    /// The server closes, whatever it had to say before.
    pub fn expect_end(&mut self) {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return,
                Err(e) => panic!("the server did not close: {e}"),
            }
        }
    }

    pub fn hello(&mut self, flags: u32) {
        let mut hello = self.get(18);
        assert_eq!(hello.split_to(16), Bytes::from_static(b"NBDMAGICIHAVEOPT"));
        assert_eq!(hello.get_u16(), 3);
        self.put(&flags.to_be_bytes());
    }

    pub fn option(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Bytes)> {
        self.put(&option(number, data));
        self.option_replies(number)
    }

    /// Replies up to the one that ends the option: an ACK or an error.
    pub fn option_replies(&mut self, number: u32) -> Vec<(u32, Bytes)> {
        let mut replies = Vec::new();
        loop {
            let mut head = self.get(20);
            assert_eq!(head.get_u64(), 0x0003_e889_0455_65a9);
            assert_eq!(head.get_u32(), number);
            let (kind, len) = (head.get_u32(), head.get_u32());
            replies.push((kind, self.get(len as usize)));
            if kind == ACK || kind & 0x8000_0000 != 0 {
                return replies;
            }
        }
    }

    pub fn agree(&mut self, style: Style) {
        let number = match style {
            Style::Simple => return,
            Style::Structured => 8,
            Style::Extended => 11,
        };
        assert_eq!(self.option(number, b""), [(ACK, Bytes::new())]);
        self.style = style;
        let both = ["base:allocation", "qemu:allocation-depth"];
        let replies = self.option(10, &query_data("", &both));
        assert_eq!(replies.len(), 3);
    }

    pub fn go(&mut self, name: &str) -> Result<(), u32> {
        let replies = self.option(7, &info_data(name, &[]));
        let (end, pieces) = replies.split_last().unwrap();
        if end.0 != ACK {
            return Err(end.0);
        }
        let mut export = pieces
            .iter()
            .map(|(_, data)| data.clone())
            .find(|d| d[..2] == [0, 0])
            .unwrap();
        export.advance(2);
        (self.size, self.flags) = (export.get_u64(), export.get_u16());
        Ok(())
    }

    pub fn send(
        &mut self,
        flags: u16,
        command: u16,
        cookie: u64,
        at: u64,
        len: u64,
        payload: &[u8],
    ) {
        let mut bytes = request(self.style, flags, command, cookie, at, len);
        bytes.extend_from_slice(payload);
        self.put(&bytes);
    }

    pub fn write(&mut self, flags: u16, cookie: u64, at: u64, payload: &[u8]) {
        let flags = flags
            | if self.style == Style::Extended {
                PAYLOAD_LEN
            } else {
                0
            };
        self.send(flags, WRITE, cookie, at, payload.len() as u64, payload);
    }

    /// Sends a request and takes its reply.
    pub fn ask(&mut self, flags: u16, command: u16, at: u64, len: u64) -> Reply {
        self.send(flags, command, 0xc00c1e, at, len, b"");
        self.reply(if command == READ { len } else { 0 })
    }

    pub fn ask_write(&mut self, flags: u16, at: u64, payload: &[u8]) -> Reply {
        self.write(flags, 0xc00c1e, at, payload);
        self.reply(0)
    }

    /// The next reply; `read` bytes follow a simple one that succeeds.
    pub fn reply(&mut self, read: u64) -> Reply {
        if self.style != Style::Simple {
            return self.chunks();
        }
        let mut head = self.get(16);
        assert_eq!(head.get_u32(), 0x6744_6698);
        let (errno, cookie) = (head.get_u32(), head.get_u64());
        let data = self
            .get(if errno == 0 { read as usize } else { 0 })
            .to_vec();
        Reply {
            cookie,
            errno,
            data,
            ..Reply::default()
        }
    }

    pub fn chunks(&mut self) -> Reply {
        let mut reply = Reply::default();
        loop {
            let extended = self.style == Style::Extended;
            let mut head = self.get(if extended { 32 } else { 20 });
            assert_eq!(
                head.get_u32(),
                if extended { 0x6e8a_278c } else { 0x668e_33ef }
            );
            let (flags, kind) = (head.get_u16(), head.get_u16());
            reply.cookie = head.get_u64();
            if extended {
                head.advance(8);
            }
            let len = if extended {
                head.get_u64()
            } else {
                u64::from(head.get_u32())
            };
            let mut content = self.get(len as usize);
            match kind {
                0 => assert!(flags == 1 && len == 0),
                1 => {
                    assert!(len >= 9, "data is not empty");
                    content.advance(8);
                    reply.data.extend_from_slice(&content);
                }
                5 | 6 => {
                    assert_eq!(kind == 6, extended);
                    reply.status.push(status(content, extended));
                }
                0x8001 => {
                    reply.errno = content.get_u32();
                    assert_eq!(content.get_u16() as usize, content.len());
                    assert!(reply.errno != 0 && std::str::from_utf8(&content).is_ok());
                }
                other => panic!("chunk type {other:#x}"),
            }
            if flags & 1 != 0 {
                return reply;
            }
        }
    }

    /// A write and a read say whether client and server still understand each other.
    pub fn check_in_step(&mut self) {
        let pattern: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
        assert_eq!(self.ask_write(0, 40 << 20, &pattern).errno, 0);
        let reply = self.ask(0, READ, 40 << 20, 4096);
        assert_eq!((reply.cookie, reply.errno), (0xc00c1e, 0));
        assert!(reply.data == pattern);
    }
}

pub fn status(mut content: Bytes, extended: bool) -> (u32, Vec<(u64, u64)>) {
    let context = content.get_u32();
    if extended {
        assert_eq!(content.get_u32() as usize * 16, content.len());
    }
    let mut extents = Vec::new();
    while !content.is_empty() {
        extents.push(if extended {
            (content.get_u64(), content.get_u64())
        } else {
            (u64::from(content.get_u32()), u64::from(content.get_u32()))
        });
    }
    assert!(!extents.is_empty() && extents.iter().all(|(len, _)| *len != 0));
    (context, extents)
}

pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.put_u32(number);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(data);
    bytes
}

pub fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.put_slice(name.as_bytes());
    data.put_u16(wanted.len() as u16);
    wanted.iter().for_each(|info| data.put_u16(*info));
    data
}

pub fn query_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.put_slice(name.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.put_slice(query.as_bytes());
    }
    data
}

pub fn request(style: Style, flags: u16, command: u16, cookie: u64, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(if style == Style::Extended {
        0x21e4_1c71
    } else {
        0x2560_9513
    });
    bytes.put_u16(flags);
    bytes.put_u16(command);
    bytes.put_u64(cookie);
    bytes.put_u64(at);
    match style {
        Style::Extended => bytes.put_u64(len),
        _ => bytes.put_u32(len.try_into().expect("compact lengths have 32 bits")),
    }
    bytes
}
