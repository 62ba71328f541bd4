//! The NBD protocol's numbers and framing: pure encoding and decoding.
//!
//! Source: the NBD project's protocol text (doc/proto.md, master and the extended headers branch).
//! Everything is big-endian. Nothing here decides; nothing here does I/O.

use super::limits;
use bytes::{Buf, BufMut};

/// First word of the greeting.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting, and the head of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Head of every option reply.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Head of a compact request.
pub const REQUEST: u32 = 0x2560_9513;
/// Head of an extended request.
pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
/// Head of a simple reply.
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Head of a structured reply chunk.
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// Head of an extended reply chunk.
pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;

/// Handshake flags; server and client use the same bits.
pub mod hello {
    /// Options other than EXPORT_NAME, and error replies to them.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No padding after the answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 2;
}

/// Option numbers.
pub mod option {
    /// Choose an export and start; cannot be answered with an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// Name every export.
    pub const LIST: u32 = 3;
    /// Encrypt.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Ask for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Ask for extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of option replies.
pub mod reply {
    /// Done, no data.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    /// Refused by this server's policy.
    pub const ERR_POLICY: u32 = 0x8000_0002;
    /// The option's data makes no sense.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// Nothing without TLS.
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// The request is too large.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    /// Extended headers were agreed and stay.
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Types of information about an export.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// Its canonical name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod flag {
    /// The others mean something.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA command flag works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF command flag works.
    pub const SEND_DF: u16 = 1 << 7;
    /// Connections share one view and one flush.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE works.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The FAST_ZERO command flag works.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS takes a payload.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Command numbers.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect; no reply.
    pub const DISC: u16 = 2;
    /// Make answered writes durable.
    pub const FLUSH: u16 = 3;
    /// Contents no longer matter.
    pub const TRIM: u16 = 4;
    /// Prefetch hint.
    pub const CACHE: u16 = 5;
    /// Make a range read as zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod with {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Zeros stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent for each context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail where zeroing is no faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of a payload (extended headers only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of reply chunks.
pub mod chunk {
    /// No content.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error and a text.
    pub const ERROR: u16 = 0x8001;
    /// Chunk flag: the last of its reply.
    pub const DONE: u16 = 1;
}

/// The only error values that may cross the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// The storage failed.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// No space, or past the end of the export.
    NoSpace = 28,
    /// Not supported; answers FAST_ZERO only.
    NotSup = 95,
}

/// How requests and replies are framed, once agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Style {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl Style {
    /// Bytes in a request's header.
    pub const fn request_len(self) -> usize {
        match self {
            Style::Simple | Style::Structured => 28,
            Style::Extended => 32,
        }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags, see [`with`].
    pub flags: u16,
    /// Command number, see [`command`].
    pub command: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// First byte concerned.
    pub offset: u64,
    /// Bytes of payload or of effect.
    pub length: u64,
}

/// The stream does not continue with a request: the client is out of step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadMagic(pub u32);

impl Request {
    /// Reads a header from the start of `bytes`; `None` until enough bytes are there.
    pub fn decode(style: Style, bytes: &[u8]) -> Result<Option<Self>, BadMagic> {
        match style {
            Style::Simple | Style::Structured => decode(bytes.first_chunk::<28>(), REQUEST),
            Style::Extended => decode(bytes.first_chunk::<32>(), EXTENDED_REQUEST),
        }
    }

    /// Bytes that follow the header.
    ///
    /// With extended headers the text demands the payload flag on every write. QEMU's client (seen
    /// with 10.0) leaves it out and sends the payload all the same, so a write has one either way.
    pub fn payload(&self, style: Style) -> u64 {
        let flagged = style == Style::Extended && self.flags & with::PAYLOAD_LEN != 0;
        if flagged || self.command == command::WRITE {
            self.length
        } else {
            0
        }
    }
}

fn decode<const N: usize>(head: Option<&[u8; N]>, magic: u32) -> Result<Option<Request>, BadMagic> {
    let Some(head) = head else { return Ok(None) };
    let mut head = head.as_slice();
    let found = head.get_u32();
    if found != magic {
        return Err(BadMagic(found));
    }
    Ok(Some(Request {
        flags: head.get_u16(),
        command: head.get_u16(),
        cookie: head.get_u64(),
        offset: head.get_u64(),
        length: if N == 32 {
            head.get_u64()
        } else {
            u64::from(head.get_u32())
        },
    }))
}

/// Largest head of a reply that [`Head`] writes: an extended chunk and a data offset.
pub const HEAD_MAX: usize = 40;

/// What a reply answers: its framing, and the request's cookie and offset.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// Framing agreed with the client.
    pub style: Style,
    /// From the request.
    pub cookie: u64,
    /// From the request.
    pub offset: u64,
}

impl Head {
    /// Success without content.
    pub fn done(&self, out: &mut impl BufMut) {
        match self.style {
            Style::Simple => self.simple(out, 0),
            _ => self.chunk(out, chunk::DONE, chunk::NONE, 0),
        }
    }

    /// The head of `len` bytes of data, which the caller sends next; `len` is not 0.
    pub fn data(&self, out: &mut impl BufMut, len: u64) {
        match self.style {
            Style::Simple => self.simple(out, 0),
            _ => {
                self.chunk(out, chunk::DONE, chunk::OFFSET_DATA, len.saturating_add(8));
                out.put_u64(self.offset);
            }
        }
    }

    /// Failure, with a text for people where the framing has room for it.
    pub fn error(&self, out: &mut impl BufMut, errno: Errno, text: &str) {
        if self.style == Style::Simple {
            return self.simple(out, errno as u32);
        }
        let text = cut(text);
        self.chunk(out, chunk::DONE, chunk::ERROR, 6 + text.len() as u64);
        out.put_u32(errno as u32);
        out.put_u16(text.len() as u16);
        out.put_slice(text.as_bytes());
    }

    /// The head of a status chunk with `count` extents, which the caller sends next. Not for
    /// simple replies, which have no content but data.
    pub fn status(&self, out: &mut impl BufMut, last: bool, context: u32, count: u32) {
        let flags = if last { chunk::DONE } else { 0 };
        if self.style == Style::Extended {
            self.chunk(
                out,
                flags,
                chunk::BLOCK_STATUS_EXT,
                8 + 16 * u64::from(count),
            );
            out.put_u32(context);
            out.put_u32(count);
        } else {
            self.chunk(out, flags, chunk::BLOCK_STATUS, 4 + 8 * u64::from(count));
            out.put_u32(context);
        }
    }

    fn simple(&self, out: &mut impl BufMut, errno: u32) {
        out.put_u32(SIMPLE_REPLY);
        out.put_u32(errno);
        out.put_u64(self.cookie);
    }

    fn chunk(&self, out: &mut impl BufMut, flags: u16, kind: u16, len: u64) {
        let extended = self.style == Style::Extended;
        out.put_u32(if extended {
            EXTENDED_REPLY
        } else {
            STRUCTURED_REPLY
        });
        out.put_u16(flags);
        out.put_u16(kind);
        out.put_u64(self.cookie);
        if extended {
            out.put_u64(self.offset);
            out.put_u64(len);
        } else {
            out.put_u32(u32::try_from(len).expect("contents are bounded by the payload limit"));
        }
    }
}

/// A text as long as the protocol allows, cut between characters.
pub fn cut(text: &str) -> &str {
    let mut end = text.len().min(limits::TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.split_at(end).0
}

/// The greeting: the first bytes that a server sends.
pub fn greeting() -> [u8; 18] {
    let mut hello = [0; 18];
    let mut out = hello.as_mut_slice();
    out.put_u64(NBDMAGIC);
    out.put_u64(IHAVEOPT);
    out.put_u16(hello::FIXED_NEWSTYLE | hello::NO_ZEROES);
    hello
}

/// One reply to an option.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(u32::try_from(data.len()).expect("option replies are short"));
    out.put_slice(data);
}

/// Reads fields of an option's data, never past its end.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.0.try_get_u16().ok()
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.0.try_get_u32().ok()
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.0.try_get_u64().ok()
    }

    /// A 32-bit length and as many bytes.
    pub fn counted(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compact(magic: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u32(magic);
        bytes.put_u16(with::FUA);
        bytes.put_u16(command::WRITE);
        bytes.put_u64(0x1122_3344_5566_7788);
        bytes.put_u64(1 << 40);
        bytes.put_u32(4096);
        bytes
    }

    #[test]
    fn a_request_is_read_once_whole_and_only_with_its_magic() {
        let bytes = compact(REQUEST);
        for short in 0..28 {
            assert_eq!(Request::decode(Style::Simple, &bytes[..short]), Ok(None));
        }
        let request = Request {
            flags: with::FUA,
            command: command::WRITE,
            cookie: 0x1122_3344_5566_7788,
            offset: 1 << 40,
            length: 4096,
        };
        for style in [Style::Simple, Style::Structured] {
            assert_eq!(Request::decode(style, &bytes), Ok(Some(request)));
        }
        let padded = [bytes.clone(), vec![0; 4]].concat();
        assert_eq!(
            Request::decode(Style::Extended, &padded),
            Err(BadMagic(REQUEST))
        );
        let retired = compact(0x2560_9514);
        assert_eq!(
            Request::decode(Style::Simple, &retired),
            Err(BadMagic(0x2560_9514))
        );
    }

    #[test]
    fn an_extended_request_has_a_64_bit_length() {
        let mut bytes = compact(EXTENDED_REQUEST);
        bytes.truncate(24);
        bytes.put_u64(1 << 33);
        assert_eq!(Request::decode(Style::Extended, &bytes[..31]), Ok(None));
        let request = Request::decode(Style::Extended, &bytes).unwrap().unwrap();
        assert_eq!((request.offset, request.length), (1 << 40, 1 << 33));
    }

    #[test]
    fn what_follows_a_header_depends_on_command_style_and_flag() {
        use Style::*;
        let payload = |style, command, flags| {
            Request {
                flags,
                command,
                cookie: 0,
                offset: 0,
                length: 9,
            }
            .payload(style)
        };
        let table = [
            (Simple, command::WRITE, 0, 9),
            (Structured, command::WRITE, with::PAYLOAD_LEN, 9),
            (Simple, command::READ, with::PAYLOAD_LEN, 0),
            (Structured, command::WRITE_ZEROES, 0, 0),
            (Extended, command::WRITE, 0, 9),
            (Extended, command::WRITE, with::PAYLOAD_LEN, 9),
            (Extended, command::TRIM, 0, 0),
            (Extended, command::TRIM, with::PAYLOAD_LEN, 9),
            (Extended, 99, with::PAYLOAD_LEN, 9),
            (Extended, 99, 0, 0),
        ];
        for (style, command, flags, expected) in table {
            assert_eq!(
                payload(style, command, flags),
                expected,
                "{style:?} {command} {flags}"
            );
        }
    }

    fn head(style: Style) -> Head {
        Head {
            style,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
        }
    }

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out);
        out
    }

    const COOKIE: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    #[test]
    fn a_simple_reply_is_magic_error_cookie() {
        let expected = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], &COOKIE[..]].concat();
        assert_eq!(written(|out| head(Style::Simple).done(out)), expected);
        assert_eq!(written(|out| head(Style::Simple).data(out, 5)), expected);
        let error = written(|out| head(Style::Simple).error(out, Errno::NoSpace, "full"));
        assert_eq!(
            error,
            [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28], &COOKIE[..]].concat()
        );
    }

    #[test]
    fn a_structured_chunk_is_magic_flags_type_cookie_length() {
        let start = [0x66, 0x8e, 0x33, 0xef, 0, 1];
        let done = written(|out| head(Style::Structured).done(out));
        assert_eq!(done, [&start[..], &[0, 0], &COOKIE, &[0, 0, 0, 0]].concat());
        let data = written(|out| head(Style::Structured).data(out, 5));
        let tail: &[u8] = &[0, 0, 0, 13, 0, 0, 0, 0, 0, 0, 0x10, 0];
        assert_eq!(data, [&start[..], &[0, 1], &COOKIE, tail].concat());
        let error = written(|out| head(Style::Structured).error(out, Errno::Inval, "no"));
        let tail: &[u8] = &[0, 0, 0, 8, 0, 0, 0, 22, 0, 2, b'n', b'o'];
        assert_eq!(error, [&start[..], &[0x80, 1], &COOKIE, tail].concat());
    }

    #[test]
    fn an_extended_chunk_repeats_the_offset_and_has_a_64_bit_length() {
        let start = [0x6e, 0x8a, 0x27, 0x8c, 0, 1];
        let offset: &[u8] = &[0, 0, 0, 0, 0, 0, 0x10, 0];
        let data = written(|out| head(Style::Extended).data(out, 5));
        let tail = [&[0, 0, 0, 0, 0, 0, 0, 13], offset].concat();
        assert_eq!(data, [&start[..], &[0, 1], &COOKIE, offset, &tail].concat());
        assert_eq!(data.len(), HEAD_MAX);
        let done = written(|out| head(Style::Extended).done(out));
        assert_eq!(done.len(), 32);
    }

    #[test]
    fn an_error_text_is_cut_between_characters() {
        let long = "\u{20ac}".repeat(2000);
        let error = written(|out| head(Style::Structured).error(out, Errno::Io, &long));
        assert_eq!(error.len(), 20 + 6 + 4095);
        assert_eq!(cut("short"), "short");
    }

    #[test]
    fn fields_never_read_past_the_end() {
        let mut fields = Fields(&[0, 0, 0, 3, b'a', b'b', b'c', 0]);
        assert_eq!(fields.counted(), Some(&b"abc"[..]));
        assert_eq!(fields.u16(), None);
        assert_eq!(Fields(&[0, 0, 0, 2, 1]).counted(), None);
        assert_eq!(Fields(&[0xff, 0xff, 0xff, 0xff, 1]).counted(), None);
        assert_eq!(Fields(&[0; 7]).u64(), None);
    }
}
