//! Frame: one piece of the stream, its length and its checksum before its bytes.
//!
//! Twelve bytes, little endian: the kind (u8), three zeros, the length of what follows (u32), and a
//! CRC-32 (IEEE) of these eight and of what follows (u32). What a stream says is bounded before any
//! of it is kept.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ploop_formats::{Error, Kind, Result, buf, limits};
use std::io::{self, ErrorKind, Read, Write};

/// Most bytes of data in one.
pub const DATA_MAX: usize = 1 << 20;
/// Most bytes that are said to be zeros at once: what a disk does about them takes time.
pub const ZERO_MAX: u64 = 1 << 30;
/// Bytes before what it carries.
const HEAD: usize = 12;
/// Most bytes of a message: one of them carries a descriptor, as a string of JSON.
const MESSAGE_MAX: usize = 2 * limits::DESCRIPTOR_MAX as usize;

const MESSAGE: u8 = 1;
const DATA: u8 = 2;
const ZERO: u8 = 3;

/// What it carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Text, of [`super::talk`].
    Message(Bytes),
    /// What the disk has from `at` on, 1 to [`DATA_MAX`] bytes.
    Data {
        /// Bytes from the disk's start.
        at: u64,
        /// Them; in memory that direct I/O can write from.
        bytes: Bytes,
    },
    /// That it reads as zeros there, whatever lies below.
    Zero {
        /// Bytes from the disk's start.
        at: u64,
        /// How many.
        len: u64,
    },
}

impl Frame {
    /// Writes it, maybe into a buffer of `out`.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut head = BytesMut::with_capacity(HEAD + 16);
        head.put_bytes(0, HEAD);
        let (kind, body): (u8, &[u8]) = match self {
            Frame::Message(text) => (MESSAGE, text),
            Frame::Data { at, bytes } => {
                head.put_u64_le(*at);
                (DATA, bytes)
            }
            Frame::Zero { at, len } => {
                head.put_u64_le(*at);
                head.put_u64_le(*len);
                (ZERO, &[])
            }
        };
        let len = head.len() - HEAD + body.len();
        let len = u32::try_from(len).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
        let mut front = [0; HEAD];
        (&mut front[..4]).put_u32_le(kind.into());
        (&mut front[4..8]).put_u32_le(len);
        let crc = checksum(&front[..8], &[&head[HEAD..], body]);
        (&mut front[8..]).put_u32_le(crc);
        head[..HEAD].copy_from_slice(&front);
        out.write_all(&head)?;
        out.write_all(body)
    }

    /// Reads the next one; none where the stream ends before it. `Io` where it ends within one,
    /// and for what no sender of ours writes.
    pub fn read(input: &mut impl Read) -> Result<Option<Self>> {
        let mut head = [0; HEAD];
        match fill(input, &mut head)? {
            0 => return Ok(None),
            HEAD => {}
            _ => return Err(cut()),
        }
        let mut fields = &head[..];
        let (kind, len, crc) = (
            fields.get_u32_le(),
            fields.get_u32_le() as usize,
            fields.get_u32_le(),
        );
        let kind = u8::try_from(kind).unwrap_or(0);
        let fits = match kind {
            MESSAGE => len <= MESSAGE_MAX,
            DATA => (9..=8 + DATA_MAX).contains(&len),
            ZERO => len == 16,
            _ => false,
        };
        if !fits {
            let what = format!("the stream has no frame here (kind {kind}, {len} bytes)");
            return Err(Error::new(Kind::Io, what));
        }
        // Where direct I/O could begin, data begins.
        let mut place = [0; 8];
        let place = match kind {
            DATA => &mut place[..],
            _ => &mut [],
        };
        let mut body = buf::aligned(len - place.len());
        if fill(input, place)? < place.len() || fill(input, &mut body)? < body.len() {
            return Err(cut());
        }
        if checksum(&head[..8], &[place, &body]) != crc {
            let what = "a frame of the stream has another checksum";
            return Err(Error::new(Kind::Io, what));
        }
        let frame = match kind {
            DATA => Frame::Data {
                at: (&*place).get_u64_le(),
                bytes: body.freeze(),
            },
            ZERO => Frame::Zero {
                at: body.get_u64_le(),
                len: body.get_u64_le(),
            },
            _ => Frame::Message(body.freeze()),
        };
        match frame {
            Frame::Zero { len, .. } if len > ZERO_MAX => {
                let what = format!("the stream says of {len} bytes at once that they are zeros");
                Err(Error::new(Kind::Io, what))
            }
            frame => Ok(Some(frame)),
        }
    }
}

fn checksum(head: &[u8], parts: &[&[u8]]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    parts.iter().for_each(|part| crc.update(part));
    crc.finalize()
}

/// As many bytes as there are, until `buf` is full.
fn fill(input: &mut impl Read, buf: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match input.read(rest) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::from(e).at("the stream")),
        }
    }
    Ok(done)
}

fn cut() -> Error {
    Error::new(Kind::Io, "the stream ended within a frame")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(frame: &Frame) -> Vec<u8> {
        let mut out = Vec::new();
        frame.write(&mut out).unwrap();
        out
    }

    fn frames() -> [Frame; 4] {
        [
            Frame::Message(Bytes::from_static(b"{}")),
            Frame::Message(Bytes::new()),
            Frame::Data {
                at: 1 << 40,
                bytes: vec![7; 70_000].into(),
            },
            Frame::Zero { at: 512, len: 9 },
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let stream: Vec<u8> = frames().iter().flat_map(written).collect();
        let mut input = &stream[..];
        for frame in frames() {
            assert_eq!(Frame::read(&mut input).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut input).unwrap(), None);
    }

    #[test]
    fn a_frame_that_was_cut_or_changed_anywhere_is_an_error() {
        for frame in frames() {
            let sound = written(&frame);
            let places = (0..sound.len().min(64)).chain([sound.len() - 1]);
            for at in places {
                let cut = Frame::read(&mut &sound[..at]);
                assert!(matches!(cut, Ok(None) if at == 0) || cut.is_err(), "{at}");
                let mut other = sound.clone();
                other[at] ^= 1;
                assert!(Frame::read(&mut &other[..]).is_err(), "{at}");
            }
        }
    }

    #[test]
    fn a_length_is_judged_before_it_is_believed() {
        for kind in 0..5u32 {
            let mut stream = kind.to_le_bytes().to_vec();
            stream.extend(u32::MAX.to_le_bytes());
            stream.extend([0; 64]);
            let refused = Frame::read(&mut &stream[..]).map_err(|e| e.kind());
            assert_eq!(refused, Err(Kind::Io), "{kind}");
        }
    }
}
