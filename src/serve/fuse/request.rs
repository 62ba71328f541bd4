//! One request as a value: what the kernel asks about the one file.
//!
//! Parsing never fails: what is malformed or unknown becomes a request that is answered with an
//! error, because a request without an answer blocks its caller for good.

use super::abi::{self, InHeader, Range, SetAttr, opcode};

/// A request and the number that its answer must carry.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// The kernel's number, flag bits included.
    pub unique: u64,
    /// What is asked.
    pub ask: Ask,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Attributes.
    Attr,
    /// A change of attributes.
    SetAttr(SetAttr),
    /// To open the file with these flags of open(2).
    Open(u32),
    /// Bytes.
    Read(Range),
    /// To write the payload, which starts [`abi::WRITE_HEAD`] bytes into the request; `durable`
    /// when the caller's O_DSYNC or RWF_DSYNC wants it on disk before the answer.
    Write { range: Range, durable: bool },
    /// File system statistics.
    Statfs,
    /// To make writes durable.
    Fsync,
    /// fallocate(2) with this mode.
    Allocate(Range, u32),
    /// Nothing but an acknowledgement.
    Ack,
    /// Nothing, not even an answer.
    Silent,
    /// Something that is not offered: ENOSYS, after which the kernel does not ask again.
    Unknown,
    /// Too short for what it claims to be.
    Malformed,
}

impl Request {
    /// Parses a message of the kernel. A message too short for a header has no number to answer
    /// to; it comes out as a silent request.
    pub fn parse(message: &[u8]) -> Self {
        let mut body = message;
        match InHeader::parse(&mut body) {
            Some(header) if header.len as usize == message.len() => Self {
                unique: header.unique,
                ask: ask(header.opcode, body),
            },
            Some(header) => Self {
                unique: header.unique,
                ask: Ask::Malformed,
            },
            None => Self {
                unique: 0,
                ask: Ask::Silent,
            },
        }
    }
}

fn ask(op: u32, mut body: &[u8]) -> Ask {
    let parsed = match op {
        opcode::GETATTR => Some(Ask::Attr),
        opcode::SETATTR => SetAttr::parse(body).map(Ask::SetAttr),
        opcode::OPEN => abi::parse_open(body).map(Ask::Open),
        opcode::READ => abi::parse_transfer(&mut body).map(|(range, _)| Ask::Read(range)),
        opcode::WRITE => abi::parse_transfer(&mut body)
            .filter(|(range, _)| range.len == body.len() as u64)
            .map(|(range, flags)| Ask::Write {
                range,
                durable: is_durable(flags),
            }),
        opcode::STATFS => Some(Ask::Statfs),
        opcode::FSYNC => Some(Ask::Fsync),
        opcode::FALLOCATE => abi::parse_fallocate(body).map(|(range, m)| Ask::Allocate(range, m)),
        opcode::FLUSH | opcode::RELEASE | opcode::DESTROY => Some(Ask::Ack),
        opcode::FORGET | opcode::BATCH_FORGET => Some(Ask::Silent),
        _ => Some(Ask::Unknown),
    };
    parsed.unwrap_or(Ask::Malformed)
}

/// With direct I/O the kernel sends no FSYNC after a synchronous write: the flags are all it says.
fn is_durable(flags: u32) -> bool {
    flags & rustix::fs::OFlags::DSYNC.bits() != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{BufMut, BytesMut};

    fn message(op: u32, body: &[u32], payload: usize) -> BytesMut {
        let mut out = BytesMut::new();
        out.put_u32_ne((abi::IN_HEADER + body.len() * 4 + payload) as u32);
        out.put_u32_ne(op);
        out.put_u64_ne(7 | abi::UNIQUE_RESEND);
        out.put_bytes(0, 24);
        body.iter().for_each(|w| out.put_u32_ne(*w));
        out.put_bytes(0xaa, payload);
        out
    }

    fn write(len: u32, flags: u32, payload: usize) -> Request {
        Request::parse(&message(
            opcode::WRITE,
            &[0, 0, 512, 0, len, 0, 0, 0, flags, 0],
            payload,
        ))
    }

    #[test]
    fn a_request_sent_again_keeps_the_flag_in_its_number() {
        let request = Request::parse(&message(opcode::FSYNC, &[0; 4], 0));
        assert_eq!(
            request,
            Request {
                unique: 7 | 1 << 63,
                ask: Ask::Fsync
            }
        );
    }

    #[test]
    fn a_synchronous_write_is_told_from_a_plain_one() {
        let range = Range { at: 512, len: 1024 };
        assert_eq!(
            write(1024, 1, 1024).ask,
            Ask::Write {
                range,
                durable: false
            }
        );
        let dsync = rustix::fs::OFlags::DSYNC.bits() | 1;
        assert_eq!(
            write(1024, dsync, 1024).ask,
            Ask::Write {
                range,
                durable: true
            }
        );
    }

    #[test]
    fn a_write_whose_payload_is_not_what_it_says_is_refused() {
        assert_eq!(write(1024, 0, 1023).ask, Ask::Malformed);
        assert_eq!(write(1024, 0, 0).ask, Ask::Malformed);
    }

    #[test]
    fn every_cut_of_a_request_keeps_the_number_to_refuse_it_by() {
        let whole = message(opcode::FALLOCATE, &[0; 8], 0);
        for cut in abi::IN_HEADER..whole.len() {
            let request = Request::parse(&whole[..cut]);
            assert_eq!(
                request,
                Request {
                    unique: 7 | 1 << 63,
                    ask: Ask::Malformed
                }
            );
        }
    }

    #[test]
    fn only_forgetting_goes_unanswered() {
        let silent: Vec<u32> = (1..=60)
            .filter(|op| Request::parse(&message(*op, &[0; 30], 0)).ask == Ask::Silent)
            .collect();
        assert_eq!(silent, [opcode::FORGET, opcode::BATCH_FORGET]);
    }
}
