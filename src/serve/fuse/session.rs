//! A session as a value: what INIT agreed on, and the request to start over.
//!
//! The kernel says INIT once in the life of a mount, a disk sees many workers. So the keeper
//! answers INIT and hands every worker the [`Session`], which outlives them all.

use crate::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};

use super::abi::{self, InHeader, InitIn, InitOut, feature, opcode};

/// Largest payload of a request in bytes: what the kernel allows by default (256 pages of 4 KiB).
pub(super) const MAX_TRANSFER: u32 = 1 << 20;
/// Asynchronous requests in flight: a loop device's queue depth. More would only wait here.
const MAX_BACKGROUND: u16 = 128;
/// Seconds that the kernel may take to say INIT; it does so before mount(2) returns.
const INIT_TIMEOUT: i64 = 10;
/// What the kernel's smallest legal read is (`FUSE_MIN_READ_BUFFER`).
const INIT_BUFFER: usize = 8192;

/// Features asked for; the kernel may offer fewer.
const WANTED: u64 = feature::ASYNC_READ
    | feature::BIG_WRITES
    | feature::ASYNC_DIO
    | feature::MAX_PAGES
    | feature::INIT_EXT
    | feature::HAS_RESEND;

/// What keeper and kernel agreed on when the mount was made. Handed to each worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Protocol revision (7.`minor`).
    pub minor: u32,
    /// Features in force: `flags` of INIT, `flags2` in the upper half.
    pub flags: u64,
    /// Largest payload of a WRITE in bytes.
    pub max_write: u32,
    /// Owner of the file: who mounted it.
    pub uid: u32,
    /// Group of the file.
    pub gid: u32,
}

impl Session {
    /// Answers INIT, the first request after a mount. Call it once per mount, before any worker.
    ///
    /// Fails with `Unsupported` on a kernel before 4.20, with `TimedOut` or `Damaged` when the
    /// descriptor does not hold a fresh session.
    pub fn handshake(fd: impl AsFd) -> Result<Self> {
        shake(fd.as_fd()).map_err(|e| e.at("FUSE handshake"))
    }

    /// Whether unanswered requests can be asked for again, so that a worker can be replaced
    /// without an error above. Linux 6.9 and later.
    pub fn resends(&self) -> bool {
        self.flags & feature::HAS_RESEND != 0
    }

    fn agree(init: &InitIn) -> Result<Self> {
        if init.major != abi::MAJOR || init.minor < abi::MINOR_MIN {
            return Err(Error::unsupported(format!(
                "the kernel speaks FUSE {}.{}, and {}.{} (Linux 4.20) is the oldest served",
                init.major,
                init.minor,
                abi::MAJOR,
                abi::MINOR_MIN
            )));
        }
        Ok(Self {
            minor: init.minor.min(abi::MINOR),
            flags: init.flags & WANTED,
            max_write: MAX_TRANSFER,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        })
    }
}

/// Asks the kernel to send every unanswered request again: what a worker does first when it
/// follows one that died. Requests sent again were never answered, so doing them twice is legal
/// once the predecessor can no longer write.
///
/// Fails with `Unsupported` before Linux 6.9: then close the session instead of holding it.
pub fn resend(fd: impl AsFd, session: &Session) -> Result<()> {
    if !session.resends() {
        return Err(Error::unsupported(
            "this kernel cannot send unanswered FUSE requests again (Linux 6.9 can)",
        ));
    }
    write_all(fd.as_fd(), &[&abi::encode_resend()]).map_err(|e| e.at("FUSE resend"))
}

fn shake(fd: BorrowedFd<'_>) -> Result<Session> {
    let mut buf = vec![0; INIT_BUFFER];
    let len = read_request(fd, &mut buf)?;
    let mut body = buf.get(..len).unwrap_or_default();
    let header = InHeader::parse(&mut body).filter(|h| h.opcode == opcode::INIT);
    let init = InitIn::parse(body);
    let (Some(header), Some(init)) = (header, init) else {
        return Err(Error::damaged(
            "the first request is not INIT: the session was begun by somebody else",
        ));
    };
    let session = Session::agree(&init)?;
    let reply = InitOut {
        minor: session.minor,
        max_readahead: init.max_readahead,
        flags: session.flags,
        max_background: MAX_BACKGROUND,
        max_write: session.max_write,
        max_pages: (MAX_TRANSFER / 4096) as u16,
    }
    .encode();
    write_all(
        fd,
        &[&abi::encode_header(header.unique, 0, reply.len()), &reply],
    )?;
    Ok(session)
}

fn read_request(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize> {
    loop {
        let timeout = Timespec {
            tv_sec: INIT_TIMEOUT,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(Error::new(Kind::TimedOut, "the kernel sends no INIT")),
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
        match rustix::io::read(fd, &mut *buf) {
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
            done => return Ok(done.map_err(io::Error::from)?),
        }
    }
}

/// One writev: the device takes a whole message or none of it.
fn write_all(fd: BorrowedFd<'_>, parts: &[&[u8]]) -> Result<()> {
    let slices: Vec<_> = parts.iter().map(|p| IoSlice::new(p)).collect();
    rustix::io::retry_on_intr(|| rustix::io::writev(fd, &slices)).map_err(io::Error::from)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(minor: u32, flags: u64) -> InitIn {
        InitIn {
            major: abi::MAJOR,
            minor,
            max_readahead: 0,
            flags,
        }
    }

    #[test]
    fn a_session_asks_for_nothing_that_the_kernel_does_not_offer() {
        let old = Session::agree(&init(31, feature::ASYNC_READ | feature::MAX_PAGES)).unwrap();
        assert_eq!(
            (old.minor, old.flags),
            (31, feature::ASYNC_READ | feature::MAX_PAGES)
        );
        assert!(!old.resends());
        let new = Session::agree(&init(99, u64::MAX)).unwrap();
        assert_eq!((new.minor, new.flags), (abi::MINOR, WANTED));
        assert!(new.resends());
    }

    #[test]
    fn a_kernel_too_old_is_refused_by_its_version() {
        let error = Session::agree(&init(27, 0)).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("7.27"), "{error}");
    }

    #[test]
    fn a_kernel_without_resend_is_told_apart_before_anything_is_written() {
        let session = Session::agree(&init(31, 0)).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(
            resend(&null, &session).unwrap_err().kind(),
            Kind::Unsupported
        );
    }

    #[test]
    fn a_session_survives_the_way_to_a_worker() {
        let session = Session::agree(&init(45, u64::MAX)).unwrap();
        let text = serde_json::to_string(&session).unwrap();
        assert_eq!(serde_json::from_str::<Session>(&text).unwrap(), session);
    }
}
