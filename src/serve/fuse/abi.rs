//! The FUSE kernel ABI, as far as one regular file needs it: numbers, requests in, replies out.
//!
//! Facts are those of protocol 7 in the kernel's public `linux/fuse.h`. All integers are in the
//! byte order of the machine. Nothing here makes a system call, and nothing trusts a length: a
//! request that is shorter than its opcode demands parses to `None`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The protocol version spoken; a new major number would be another protocol.
pub const MAJOR: u32 = 7;
/// The newest minor version whose structures are known here.
pub const MINOR: u32 = 45;
/// The oldest minor version served: Linux 4.20, the first with `max_pages`.
pub const MINOR_MIN: u32 = 28;

/// Bytes of `fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes in front of the payload of a WRITE: `fuse_in_header` and `fuse_write_in`.
pub const WRITE_HEAD: usize = IN_HEADER + 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// The node number of the mount root, here the only file.
pub const ROOT: u64 = 1;
/// Bit of a request's number: the kernel sends it again because of RESEND (Linux 6.9).
#[cfg(test)]
pub const UNIQUE_RESEND: u64 = 1 << 63;

/// Operations that get an answer other than ENOSYS.
pub mod opcode {
    /// Forgets references to a node; has no answer.
    pub const FORGET: u32 = 2;
    /// Asks for attributes.
    pub const GETATTR: u32 = 3;
    /// Changes attributes.
    pub const SETATTR: u32 = 4;
    /// Opens the file.
    pub const OPEN: u32 = 14;
    /// Reads bytes.
    pub const READ: u32 = 15;
    /// Writes bytes.
    pub const WRITE: u32 = 16;
    /// Asks for file system statistics.
    pub const STATFS: u32 = 17;
    /// Closes the last reference to an open file.
    pub const RELEASE: u32 = 18;
    /// Makes writes durable.
    pub const FSYNC: u32 = 20;
    /// A descriptor was closed.
    pub const FLUSH: u32 = 25;
    /// The first request of a session.
    pub const INIT: u32 = 26;
    /// The last request of some sessions.
    pub const DESTROY: u32 = 38;
    /// Forgets references to many nodes; has no answer.
    pub const BATCH_FORGET: u32 = 42;
    /// Allocates, punches or zeroes a range.
    pub const FALLOCATE: u32 = 43;
}

/// Session features, the 64 bits of `flags` and `flags2` of INIT.
pub mod feature {
    /// Several reads of one file may be in flight.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Writes may be longer than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// Direct I/O from asynchronous submitters (a loop device) stays asynchronous.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// `max_pages` of the reply counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// `flags2` counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// The kernel knows notification RESEND.
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// The part of `fuse_in_header` that counts here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InHeader {
    /// Bytes of the whole request.
    pub len: u32,
    /// What is asked.
    pub opcode: u32,
    /// The number that the answer must carry, flag bits included.
    pub unique: u64,
}

impl InHeader {
    /// Parses the header and leaves `from` behind it.
    pub fn parse(from: &mut &[u8]) -> Option<Self> {
        let len = from.try_get_u32_ne().ok()?;
        let opcode = from.try_get_u32_ne().ok()?;
        let unique = from.try_get_u64_ne().ok()?;
        // nodeid, uid, gid, pid, total_extlen, padding
        *from = from.get(24..)?;
        Some(Self {
            len,
            opcode,
            unique,
        })
    }
}

/// The part of `fuse_init_in` that counts here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitIn {
    /// Protocol version of the kernel.
    pub major: u32,
    /// Protocol revision of the kernel.
    pub minor: u32,
    /// Bytes the kernel would read ahead.
    pub max_readahead: u32,
    /// Features that the kernel offers ([`feature`]).
    pub flags: u64,
}

impl InitIn {
    /// Parses the body of INIT. Kernels before 7.36 send no second flag word.
    pub fn parse(mut from: &[u8]) -> Option<Self> {
        let major = from.try_get_u32_ne().ok()?;
        let minor = from.try_get_u32_ne().ok()?;
        let max_readahead = from.try_get_u32_ne().ok()?;
        let low = u64::from(from.try_get_u32_ne().ok()?);
        let high = match low & feature::INIT_EXT {
            0 => 0,
            _ => u64::from(from.try_get_u32_ne().ok()?),
        };
        Some(Self {
            major,
            minor,
            max_readahead,
            flags: low | high << 32,
        })
    }
}

/// `fuse_init_out`, less what stays zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitOut {
    /// Protocol revision agreed on.
    pub minor: u32,
    /// Bytes the kernel may read ahead.
    pub max_readahead: u32,
    /// Features agreed on ([`feature`]).
    pub flags: u64,
    /// Asynchronous requests in flight before the kernel queues.
    pub max_background: u16,
    /// Largest payload of a WRITE in bytes.
    pub max_write: u32,
    /// Largest payload of any request in pages.
    pub max_pages: u16,
}

impl InitOut {
    /// The body of the reply to INIT: 64 bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        out.put_u32_ne(MAJOR);
        out.put_u32_ne(self.minor);
        out.put_u32_ne(self.max_readahead);
        out.put_u32_ne(self.flags as u32);
        out.put_u16_ne(self.max_background);
        out.put_u16_ne(self.max_background / 4 * 3); // congestion_threshold
        out.put_u32_ne(self.max_write);
        out.put_u32_ne(1); // time_gran, in nanoseconds
        out.put_u16_ne(self.max_pages);
        out.put_u16_ne(0); // map_alignment
        out.put_u32_ne((self.flags >> 32) as u32);
        // max_stack_depth, request_timeout, unused
        out.put_bytes(0, 64 - 36);
        out.freeze()
    }
}

/// A body of READ, WRITE or FALLOCATE: the range it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Parses `fuse_read_in` or `fuse_write_in`, which have one shape: the range, and the flags of
/// open(2) as they stand for this transfer. Leaves `from` at the payload.
pub fn parse_transfer(from: &mut &[u8]) -> Option<(Range, u32)> {
    from.try_get_u64_ne().ok()?; // fh
    let at = from.try_get_u64_ne().ok()?;
    let len = u64::from(from.try_get_u32_ne().ok()?);
    *from = from.get(12..)?; // read_flags or write_flags, lock_owner
    let flags = from.try_get_u32_ne().ok()?;
    *from = from.get(4..)?;
    Some((Range { at, len }, flags))
}

/// Parses `fuse_fallocate_in`: the range and the mode of fallocate(2).
pub fn parse_fallocate(mut from: &[u8]) -> Option<(Range, u32)> {
    from.try_get_u64_ne().ok()?; // fh
    let at = from.try_get_u64_ne().ok()?;
    let len = from.try_get_u64_ne().ok()?;
    let mode = from.try_get_u32_ne().ok()?;
    Some((Range { at, len }, mode))
}

/// Parses `fuse_open_in`: the flags of open(2).
pub fn parse_open(mut from: &[u8]) -> Option<u32> {
    from.try_get_u32_ne().ok()
}

/// What a SETATTR wants changed; times are accepted and forgotten, so they are not listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttr {
    /// A new size in bytes.
    pub size: Option<u64>,
    /// New mode bits.
    pub mode: Option<u32>,
    /// A new owner.
    pub uid: Option<u32>,
    /// A new group.
    pub gid: Option<u32>,
}

impl SetAttr {
    /// Parses `fuse_setattr_in`.
    pub fn parse(mut from: &[u8]) -> Option<Self> {
        let valid = from.try_get_u32_ne().ok()?;
        from = from.get(12..)?; // padding, fh
        let size = from.try_get_u64_ne().ok()?;
        from = from.get(44..)?; // lock_owner, three times and their nanoseconds
        let mode = from.try_get_u32_ne().ok()?;
        from = from.get(4..)?;
        let uid = from.try_get_u32_ne().ok()?;
        let gid = from.try_get_u32_ne().ok()?;
        Some(Self {
            mode: (valid & 1 != 0).then_some(mode),
            uid: (valid & 2 != 0).then_some(uid),
            gid: (valid & 4 != 0).then_some(gid),
            size: (valid & 8 != 0).then_some(size),
        })
    }
}

/// What stat(2) shall say about the one file; every time is the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Size in bytes.
    pub size: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The body of `fuse_attr_out`, valid for no time at all, so that growth is seen at once.
pub fn encode_attr(attr: &Attr) -> Bytes {
    let mut out = BytesMut::with_capacity(104);
    out.put_bytes(0, 16); // attr_valid, attr_valid_nsec, dummy
    out.put_u64_ne(ROOT);
    out.put_u64_ne(attr.size);
    out.put_u64_ne(attr.size.div_ceil(512));
    out.put_bytes(0, 36); // atime, mtime, ctime and their nanoseconds
    out.put_u32_ne(attr.mode);
    out.put_u32_ne(1); // nlink
    out.put_u32_ne(attr.uid);
    out.put_u32_ne(attr.gid);
    out.put_u32_ne(0); // rdev
    out.put_u32_ne(4096); // blksize
    out.put_u32_ne(0); // flags
    out.freeze()
}

/// The body of `fuse_open_out`: no page cache, and direct writes in parallel.
pub fn encode_open() -> Bytes {
    const DIRECT_IO: u32 = 1 << 0;
    const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    let mut out = BytesMut::with_capacity(16);
    out.put_u64_ne(0); // fh
    out.put_u32_ne(DIRECT_IO | PARALLEL_DIRECT_WRITES);
    out.put_u32_ne(0); // backing_id
    out.freeze()
}

/// The body of `fuse_write_out`.
pub fn encode_written(len: u32) -> Bytes {
    let mut out = BytesMut::with_capacity(8);
    out.put_u32_ne(len);
    out.put_u32_ne(0);
    out.freeze()
}

/// The body of `fuse_statfs_out` for a device of `size` bytes in blocks of `block` bytes, all used.
pub fn encode_statfs(size: u64, block: u32) -> Bytes {
    let mut out = BytesMut::with_capacity(80);
    out.put_u64_ne(size.div_ceil(u64::from(block.max(1))));
    out.put_u64_ne(0); // bfree
    out.put_u64_ne(0); // bavail
    out.put_u64_ne(1); // files
    out.put_u64_ne(0); // ffree
    out.put_u32_ne(block); // bsize
    out.put_u32_ne(255); // namelen
    out.put_u32_ne(block); // frsize
    out.put_bytes(0, 28);
    out.freeze()
}

/// `fuse_out_header` of an answer to `unique` with `body` bytes behind it; `errno` is 0 or positive.
pub fn encode_header(unique: u64, errno: i32, body: usize) -> Bytes {
    let len = u32::try_from(body + OUT_HEADER).expect("a reply is at most max_write and a header");
    let mut out = BytesMut::with_capacity(OUT_HEADER);
    out.put_u32_ne(len);
    out.put_i32_ne(-errno);
    out.put_u64_ne(unique);
    out.freeze()
}

/// The notification RESEND: a reply header whose number is 0 and whose error is the code 7.
pub fn encode_resend() -> Bytes {
    encode_header(0, -7, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        let mut out = BytesMut::new();
        words.iter().for_each(|w| out.put_u32_ne(*w));
        out.to_vec()
    }

    #[test]
    fn replies_have_the_sizes_of_the_kernels_structures() {
        let attr = Attr {
            size: 1,
            mode: 0,
            uid: 0,
            gid: 0,
        };
        assert_eq!(encode_attr(&attr).len(), 104);
        assert_eq!(encode_statfs(1, 65536).len(), 80);
        assert_eq!(encode_open().len(), 16);
        assert_eq!(encode_written(1).len(), 8);
        assert_eq!(encode_resend().as_ref(), words(&[16, 7, 0, 0]));
        let init = InitOut {
            minor: 45,
            max_readahead: 0,
            flags: feature::HAS_RESEND | feature::MAX_PAGES,
            max_background: 64,
            max_write: 1 << 20,
            max_pages: 256,
        };
        let body = init.encode();
        assert_eq!(body.len(), 64);
        assert_eq!(
            &body[32..36],
            &words(&[1 << 7])[..],
            "RESEND is bit 7 of flags2"
        );
    }

    #[test]
    fn a_request_cut_short_anywhere_is_refused_not_misread() {
        let header = words(&[40, opcode::READ, 7, 1 << 31, 1, 0, 0, 0, 0, 0]);
        let full = InHeader::parse(&mut &header[..]).unwrap();
        assert_eq!(
            (full.len, full.opcode, full.unique),
            (40, 15, 7 | UNIQUE_RESEND)
        );
        for cut in 0..header.len() {
            assert_eq!(InHeader::parse(&mut &header[..cut]), None, "{cut} bytes");
        }
        let transfer = words(&[0, 0, 512, 0, 4096, 0, 0, 0, 9, 0]);
        let range = Range { at: 512, len: 4096 };
        assert_eq!(parse_transfer(&mut &transfer[..]), Some((range, 9)));
        for cut in 0..transfer.len() {
            assert_eq!(parse_transfer(&mut &transfer[..cut]), None, "{cut} bytes");
        }
        assert_eq!(SetAttr::parse(&words(&[8; 19])), None);
        assert_eq!(parse_fallocate(&words(&[0; 6])), None);
    }

    #[test]
    fn setattr_reads_each_field_from_its_place_and_only_when_valid() {
        let mut body = [0u32; 22];
        (body[0], body[4], body[17], body[19], body[20]) = (8, 4096, 0o600, 11, 12);
        let size_only = SetAttr {
            size: Some(4096),
            ..SetAttr::default()
        };
        assert_eq!(SetAttr::parse(&words(&body)), Some(size_only));
        body[0] = 15;
        let all = SetAttr {
            size: Some(4096),
            mode: Some(0o600),
            uid: Some(11),
            gid: Some(12),
        };
        assert_eq!(SetAttr::parse(&words(&body)), Some(all));
    }

    #[test]
    fn an_old_kernels_init_has_no_second_flag_word() {
        let old = words(&[7, 31, 0, 1]);
        assert_eq!(InitIn::parse(&old).unwrap().flags, 1);
        let new = words(&[7, 41, 0, 1 | 1 << 30, 1 << 7]);
        assert_eq!(
            InitIn::parse(&new).unwrap().flags,
            1 | 1 << 30 | feature::HAS_RESEND
        );
    }
}
