//! Whether a request is legal, and its execution on a device.
//!
//! [`plan`] decides from the header alone, before a payload is looked at; [`Op::run`] does it.
//! Error values follow the protocol text: past the end is ENOSPC for what writes and EINVAL for
//! what does not, a write to a read-only export is EPERM, nonsense is EINVAL. Nothing here touches
//! a socket.

use super::handshake::Terms;
use super::limits;
use super::meta::{self, Context};
use super::proto::{Errno, Fields, Request, Style, command, with};
use crate::device::{Device, Zero};
use bytes::{Bytes, BytesMut};
use ploop_formats::{Error, Kind};
use std::borrow::Cow;

/// Why a request fails: the value for programs, the text for people.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the wire carries.
    pub errno: Errno,
    /// At most a few sentences.
    pub text: Cow<'static, str>,
}

impl Refusal {
    /// A refusal for a reason known beforehand.
    pub const fn new(errno: Errno, text: &'static str) -> Self {
        Self {
            errno,
            text: Cow::Borrowed(text),
        }
    }
}

/// A legal request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Success without work: an empty range, or a hint.
    Nothing,
    /// Read `len` bytes, at least 1.
    Read {
        /// First byte.
        at: u64,
        /// Bytes, at most the payload limit.
        len: usize,
    },
    /// Write the payload.
    Write {
        /// First byte.
        at: u64,
        /// Bytes, at most the payload limit.
        len: usize,
        /// Durable before the answer.
        fua: bool,
    },
    /// Make everything answered durable.
    Flush,
    /// The contents no longer matter.
    Trim {
        /// First byte.
        at: u64,
        /// Bytes.
        len: u64,
        /// Durable before the answer.
        fua: bool,
    },
    /// Zeros.
    Zero {
        /// First byte.
        at: u64,
        /// Bytes.
        len: u64,
        /// What may become of the space.
        how: Zero,
        /// Durable before the answer.
        fua: bool,
    },
    /// Describe blocks.
    Status(Status),
    /// Describe blocks; range and contexts are in a payload of `len` bytes, see [`Status::parse`].
    StatusPayload {
        /// First byte.
        at: u64,
        /// Bytes of payload.
        len: usize,
        /// One extent for each context.
        one: bool,
    },
}

/// A request to describe blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// First byte.
    pub at: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// One extent for each context.
    pub one: bool,
    /// In which contexts; at least one.
    pub contexts: Selection,
}

/// Some of the contexts that a connection has: a bit for the number of each on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Selection(u64);

impl Selection {
    /// All of these.
    pub fn of(contexts: &[Context]) -> Self {
        let each = (1..).zip(contexts);
        each.fold(Self::default(), |all, (id, _)| all.with(id))
    }

    /// Its members among these, and their numbers on the wire.
    pub fn of_them(self, contexts: &[Context]) -> impl Iterator<Item = (u32, &Context)> {
        (1..).zip(contexts).filter(move |(id, _)| self.holds(*id))
    }

    fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    fn holds(self, id: u32) -> bool {
        self.0.checked_shr(id).is_some_and(|bits| bits & 1 != 0)
    }

    fn with(self, id: u32) -> Self {
        Self(self.0 | 1u64.checked_shl(id).unwrap_or(0))
    }
}

/// What a finished request answers.
#[derive(Debug)]
pub enum Answer {
    /// Success without content.
    Done,
    /// The bytes read, at least 1.
    Data(BytesMut),
    /// The blocks of each context.
    Status(Vec<meta::Blocks>),
    /// Failure.
    Failed(Refusal),
}

/// What an export is at the moment of a request.
#[derive(Debug, Clone, Copy)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Decides whether a request is legal. Its payload, if any, is the caller's to receive or skip.
/// DISC is the caller's too.
pub fn plan(request: &Request, terms: &Terms, export: Export) -> Result<Op, Refusal> {
    check_flags(request, terms.style)?;
    let Request {
        flags,
        offset: at,
        length: len,
        ..
    } = *request;
    let fua = flags & with::FUA != 0;
    match request.command {
        command::FLUSH if at != 0 || len != 0 => {
            Err(Refusal::new(Errno::Inval, "FLUSH takes no range"))
        }
        command::FLUSH => Ok(Op::Flush),
        command::READ => plan_read(at, len, export),
        command::CACHE => inside(at, len, export, Errno::Inval).map(|()| Op::Nothing),
        command::BLOCK_STATUS => plan_status(request, terms, export),
        _ => plan_change(request, export).map(|()| match request.command {
            _ if len == 0 => Op::Nothing,
            command::WRITE => Op::Write {
                at,
                len: len as usize,
                fua,
            },
            command::TRIM => Op::Trim { at, len, fua },
            _ => Op::Zero {
                at,
                len,
                how: zero_mode(flags),
                fua,
            },
        }),
    }
    .and_then(possible(flags))
}

/// FAST_ZERO and NO_HOLE together: that allocating zeros is fast is never known beforehand.
fn possible(flags: u16) -> impl FnOnce(Op) -> Result<Op, Refusal> {
    let both = with::FAST_ZERO | with::NO_HOLE;
    move |op| match op {
        Op::Zero { .. } if flags & both == both => Err(Refusal::new(
            Errno::NotSup,
            "zeroing without a hole is not known to be fast",
        )),
        op => Ok(op),
    }
}

fn check_flags(request: &Request, style: Style) -> Result<(), Refusal> {
    let structured = style >= Style::Structured;
    let payload = if style == Style::Extended {
        with::PAYLOAD_LEN
    } else {
        0
    };
    let valid = match request.command {
        command::READ if structured => with::DF,
        command::READ | command::FLUSH | command::TRIM | command::CACHE => 0,
        command::WRITE => payload,
        command::WRITE_ZEROES => with::NO_HOLE | with::FAST_ZERO,
        command::BLOCK_STATUS => with::REQ_ONE | payload,
        _ => return Err(Refusal::new(Errno::Inval, "unknown command")),
    };
    match request.flags & !(valid | with::FUA) {
        0 => Ok(()),
        _ => Err(Refusal::new(
            Errno::Inval,
            "a flag that this command does not take",
        )),
    }
}

fn inside(at: u64, len: u64, export: Export, past: Errno) -> Result<(), Refusal> {
    match at.checked_add(len) {
        Some(end) if end <= export.size => Ok(()),
        _ => Err(Refusal::new(past, "past the end of the export")),
    }
}

fn plan_read(at: u64, len: u64, export: Export) -> Result<Op, Refusal> {
    inside(at, len, export, Errno::Inval)?;
    match len {
        0 => Ok(Op::Nothing),
        1..=limits::PAYLOAD_MAX => Ok(Op::Read {
            at,
            len: len as usize,
        }),
        _ => Err(Refusal::new(Errno::Inval, "a read is at most 32 MiB")),
    }
}

fn plan_change(request: &Request, export: Export) -> Result<(), Refusal> {
    if export.read_only {
        return Err(Refusal::new(Errno::Perm, "the export is read-only"));
    }
    let past = match request.command {
        command::TRIM => Errno::Inval,
        _ => Errno::NoSpace,
    };
    inside(request.offset, request.length, export, past)
}

fn zero_mode(flags: u16) -> Zero {
    if flags & with::FAST_ZERO != 0 {
        Zero::Fast
    } else if flags & with::NO_HOLE != 0 {
        Zero::Allocate
    } else {
        Zero::MayFree
    }
}

fn plan_status(request: &Request, terms: &Terms, export: Export) -> Result<Op, Refusal> {
    if terms.contexts.is_empty() {
        return Err(Refusal::new(
            Errno::Inval,
            "no metadata context was selected",
        ));
    }
    let at = request.offset;
    let one = request.flags & with::REQ_ONE != 0;
    if request.flags & with::PAYLOAD_LEN != 0 {
        return plan_status_payload(request, terms, one);
    }
    let contexts = Selection::of(&terms.contexts);
    Status {
        at,
        len: request.length,
        one,
        contexts,
    }
    .check(export)
    .map(Op::Status)
}

fn plan_status_payload(request: &Request, terms: &Terms, one: bool) -> Result<Op, Refusal> {
    let longest = 8 + 4 * terms.contexts.len() as u64;
    let len = request.length;
    if !(12..=longest).contains(&len) || !len.is_multiple_of(4) {
        let text = "the payload is not a length and some of the selected contexts, each once";
        return Err(Refusal::new(Errno::Inval, text));
    }
    Ok(Op::StatusPayload {
        at: request.offset,
        len: len as usize,
        one,
    })
}

impl Status {
    /// The request that a BLOCK_STATUS payload describes.
    pub fn parse(
        at: u64,
        one: bool,
        payload: &[u8],
        terms: &Terms,
        export: Export,
    ) -> Result<Self, Refusal> {
        let mut fields = Fields(payload);
        let len = fields.u64().unwrap_or(0);
        let (offered, mut contexts) = (Selection::of(&terms.contexts), Selection::default());
        while let Some(id) = fields.u32() {
            if !offered.holds(id) || contexts.holds(id) {
                let text = "a context that is not selected, or named twice";
                return Err(Refusal::new(Errno::Inval, text));
            }
            contexts = contexts.with(id);
        }
        Self {
            at,
            len,
            one,
            contexts,
        }
        .check(export)
    }

    /// An empty range has no legal answer: a status has at least one extent, and none is empty.
    fn check(self, export: Export) -> Result<Self, Refusal> {
        if self.len == 0 {
            return Err(Refusal::new(Errno::Inval, "a status of nothing"));
        }
        inside(self.at, self.len, export, Errno::Inval).map(|()| self)
    }

    fn extents_max(&self) -> usize {
        match self.one {
            true => 1,
            // As much memory for many contexts as for two.
            false => limits::EXTENTS_MAX * 2 / self.contexts.len().max(2),
        }
    }
}

impl Op {
    /// Bytes of memory that the request may hold until it is answered, roughly: what counts
    /// against the connection's share.
    pub fn cost(&self) -> usize {
        match self {
            Op::Read { len, .. } | Op::Write { len, .. } => len.next_power_of_two(),
            Op::Status(status) => {
                status_cost(status.len, status.extents_max(), status.contexts.len())
            }
            Op::StatusPayload { one: false, .. } => status_cost(u64::MAX, limits::EXTENTS_MAX, 2),
            _ => 0,
        }
    }

    /// Does it. `data` is the payload of a write, or the buffer that a read fills, exactly as long
    /// as the request; empty for the others.
    pub async fn run<D: Device>(self, device: &D, terms: &Terms, data: Payload) -> Answer {
        let done = match (self, data) {
            (Op::Read { at, .. }, Payload::Room(room)) => {
                return match device.read(at, room).await {
                    Ok(data) => Answer::Data(data),
                    Err(error) => failed(&error, false),
                };
            }
            (Op::Write { at, fua, .. }, Payload::Data(data)) => device.write(at, data, fua).await,
            (Op::Status(status), _) => return describe(device, status, &terms.contexts).await,
            (Op::Flush, _) => device.flush().await,
            (Op::Trim { at, len, fua }, _) => trim(device, at, len, fua).await,
            (Op::Zero { at, len, how, fua }, _) => device.zero(at, len, how, fua).await,
            (Op::Nothing, _) => Ok(()),
            (Op::Read { .. } | Op::Write { .. } | Op::StatusPayload { .. }, _) => {
                unreachable!("the session brings what a request needs")
            }
        };
        let fast = matches!(
            self,
            Op::Zero {
                how: Zero::Fast,
                ..
            }
        );
        done.map_or_else(|error| failed(&error, fast), |()| Answer::Done)
    }
}

/// What a request is run with.
#[derive(Debug)]
pub enum Payload {
    /// Nothing.
    None,
    /// A buffer to read into.
    Room(BytesMut),
    /// Data to write.
    Data(Bytes),
}

/// An extent needs 24 bytes in memory, for each context 16 more and up to 16 on the wire, and is at least
/// a sector long.
fn status_cost(len: u64, max: usize, contexts: usize) -> usize {
    let extents = usize::try_from(len / 512).unwrap_or(max).min(max);
    extents * (24 + contexts * (16 + 16))
}

async fn trim<D: Device>(device: &D, at: u64, len: u64, fua: bool) -> ploop_formats::Result<()> {
    device.discard(at, len).await?;
    if fua { device.flush().await } else { Ok(()) }
}

async fn describe<D: Device>(device: &D, status: Status, contexts: &[Context]) -> Answer {
    let max = status.extents_max();
    let asks = |(_, context): (u32, &Context)| context.is_plain();
    let extents = match status.contexts.of_them(contexts).any(asks) {
        true => device.extents(status.at, status.len, max).await,
        false => Ok(Vec::new()),
    };
    let extents = match extents {
        Ok(extents) => meta::clip(extents, status.len, max),
        Err(error) => return failed(&error, false),
    };
    let blocks = |(id, context): (u32, &Context)| {
        let runs = context.runs(status.at..status.at + status.len, &extents, max);
        meta::Blocks { id, runs }
    };
    let blocks: Vec<_> = status.contexts.of_them(contexts).map(blocks).collect();
    match blocks.iter().any(|blocks| blocks.runs.is_empty()) {
        true => Answer::Failed(Refusal::new(Errno::Io, "the device described nothing")),
        false => Answer::Status(blocks),
    }
}

fn failed(error: &Error, fast_zero: bool) -> Answer {
    let errno = match error.kind() {
        Kind::NoSpace => Errno::NoSpace,
        Kind::ReadOnly => Errno::Perm,
        Kind::Unsupported if fast_zero => Errno::NotSup,
        Kind::Unsupported | Kind::Invalid => Errno::Inval,
        _ => Errno::Io,
    };
    Answer::Failed(Refusal {
        errno,
        text: error.to_string().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 40;
    const WRITABLE: Export = Export {
        size: SIZE,
        read_only: false,
    };

    fn terms(style: Style) -> Terms {
        let contexts = match style {
            Style::Simple => vec![],
            _ => Context::PLAIN.to_vec(),
        };
        Terms { style, contexts }
    }

    fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request {
        Request {
            flags,
            command,
            cookie: 1,
            offset,
            length,
        }
    }

    fn refused(style: Style, export: Export, request: Request) -> Option<Errno> {
        plan(&request, &terms(style), export)
            .err()
            .map(|refusal| refusal.errno)
    }

    const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

    #[test]
    fn past_the_end_is_no_space_for_writers_and_invalid_for_others() {
        use command::*;
        let table = [
            (READ, Errno::Inval),
            (WRITE, Errno::NoSpace),
            (TRIM, Errno::Inval),
            (CACHE, Errno::Inval),
            (WRITE_ZEROES, Errno::NoSpace),
        ];
        for style in STYLES {
            for (command, errno) in table {
                let at = |offset, len| refused(style, WRITABLE, request(command, 0, offset, len));
                assert_eq!(at(SIZE - 512, 512), None, "{command}");
                assert_eq!(at(SIZE, 0), None, "{command}: nothing, at the end");
                assert_eq!(at(SIZE - 512, 513), Some(errno), "{command}");
                assert_eq!(at(SIZE + 1, 0), Some(errno), "{command}");
                assert_eq!(at(u64::MAX, 512), Some(errno), "{command}: overflow");
            }
        }
        let status = |offset, len| request(BLOCK_STATUS, 0, offset, len);
        assert_eq!(refused(Style::Extended, WRITABLE, status(0, SIZE)), None);
        assert_eq!(
            refused(Style::Extended, WRITABLE, status(1, SIZE)),
            Some(Errno::Inval)
        );
    }

    #[test]
    fn a_read_only_export_refuses_every_change_and_nothing_else() {
        let export = Export {
            read_only: true,
            ..WRITABLE
        };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            let errno = refused(Style::Simple, export, request(command, 0, 0, 512));
            assert_eq!(errno, Some(Errno::Perm));
        }
        for command in [command::READ, command::CACHE] {
            assert_eq!(
                refused(Style::Simple, export, request(command, 0, 0, 512)),
                None
            );
        }
        assert_eq!(
            refused(Style::Simple, export, request(command::FLUSH, 0, 0, 0)),
            None
        );
    }

    #[test]
    fn every_command_takes_fua_and_only_the_flags_that_are_its_own() {
        use command::*;
        use with::*;
        let own = |command, style| match (command, style) {
            (READ, Style::Simple) => 0,
            (READ, _) => DF,
            (WRITE, Style::Extended) => PAYLOAD_LEN,
            (WRITE_ZEROES, _) => NO_HOLE | FAST_ZERO,
            (BLOCK_STATUS, Style::Extended) => REQ_ONE | PAYLOAD_LEN,
            (BLOCK_STATUS, _) => REQ_ONE,
            _ => 0,
        };
        for style in STYLES {
            for command in READ..=BLOCK_STATUS {
                if command == DISC || (command == BLOCK_STATUS && style == Style::Simple) {
                    continue;
                }
                let len = match command {
                    FLUSH => 0,
                    _ => 12,
                };
                for bit in 0..16 {
                    let legal = (own(command, style) | FUA) & 1 << bit != 0;
                    let errno = refused(style, WRITABLE, request(command, 1 << bit, 0, len));
                    let expected = (!legal).then_some(Errno::Inval);
                    assert_eq!(errno, expected, "{style:?} command {command} bit {bit}");
                }
            }
            for unknown in [8, 9, u16::MAX] {
                let errno = refused(style, WRITABLE, request(unknown, 0, 0, 0));
                assert_eq!(errno, Some(Errno::Inval));
            }
        }
    }

    #[test]
    fn payloads_are_bounded_and_effects_are_not() {
        let read = |len| refused(Style::Extended, WRITABLE, request(command::READ, 0, 0, len));
        assert_eq!(read(32 << 20), None);
        assert_eq!(read((32 << 20) + 1), Some(Errno::Inval));
        for command in [command::TRIM, command::WRITE_ZEROES, command::CACHE] {
            let errno = refused(Style::Extended, WRITABLE, request(command, 0, 0, SIZE));
            assert_eq!(errno, None, "{command} of everything");
        }
    }

    #[test]
    fn zeroing_modes_follow_the_flags() {
        let plan = |flags| {
            plan(
                &request(command::WRITE_ZEROES, flags, 0, 9),
                &terms(Style::Simple),
                WRITABLE,
            )
        };
        let zero = |how, fua| {
            Ok(Op::Zero {
                at: 0,
                len: 9,
                how,
                fua,
            })
        };
        assert_eq!(plan(0), zero(Zero::MayFree, false));
        assert_eq!(plan(with::NO_HOLE | with::FUA), zero(Zero::Allocate, true));
        assert_eq!(plan(with::FAST_ZERO), zero(Zero::Fast, false));
        let both = plan(with::FAST_ZERO | with::NO_HOLE).unwrap_err();
        assert_eq!(both.errno, Errno::NotSup);
    }

    #[test]
    fn a_status_needs_contexts_and_a_range() {
        let status = |flags, len| request(command::BLOCK_STATUS, flags, 0, len);
        for style in STYLES {
            let none = Terms {
                style,
                contexts: vec![],
            };
            let refusal = plan(&status(0, 512), &none, WRITABLE).unwrap_err();
            assert_eq!(refusal.errno, Errno::Inval);
        }
        assert_eq!(
            refused(Style::Structured, WRITABLE, status(0, 0)),
            Some(Errno::Inval)
        );
        let one = plan(
            &status(with::REQ_ONE, 512),
            &terms(Style::Structured),
            WRITABLE,
        );
        let contexts = Selection::of(&Context::PLAIN);
        assert_eq!(
            one,
            Ok(Op::Status(Status {
                at: 0,
                len: 512,
                one: true,
                contexts
            }))
        );
    }

    #[test]
    fn a_status_payload_names_selected_contexts_each_once() {
        let both = terms(Style::Extended);
        let parse = |terms: &Terms, len: u64, ids: &[u32]| {
            let mut payload = len.to_be_bytes().to_vec();
            ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
            Status::parse(512, false, &payload, terms, WRITABLE).map_err(|refusal| refusal.errno)
        };
        let ok = parse(&both, 1024, &[2]).unwrap();
        assert_eq!((ok.at, ok.len), (512, 1024));
        let members: Vec<_> = ok.contexts.of_them(&both.contexts).collect();
        assert_eq!(members, [(2, &Context::Depth)]);
        let only = Terms {
            contexts: vec![Context::Allocation],
            ..both.clone()
        };
        for (terms, len, ids) in [
            (&both, 1024, &[1u32, 1][..]),
            (&both, 1024, &[1, 3]),
            (&only, 1024, &[2]),
            (&both, 1024, &[0]),
            (&both, 1024, &[u32::MAX]),
            (&both, 0, &[1]),
            (&both, SIZE, &[1]),
        ] {
            assert_eq!(parse(terms, len, ids), Err(Errno::Inval), "{len} {ids:?}");
        }
        let len = |len| {
            refused(
                Style::Extended,
                WRITABLE,
                request(command::BLOCK_STATUS, with::PAYLOAD_LEN, 0, len),
            )
        };
        let legal: Vec<_> = (0..30).filter(|n| len(*n).is_none()).collect();
        assert_eq!(legal, [12, 16]);
    }

    #[test]
    fn kinds_become_the_values_that_may_cross_the_wire() {
        let errno = |kind, fast| match failed(&Error::new(kind, "why"), fast) {
            Answer::Failed(Refusal { errno, text }) if text == "why" => errno,
            other => panic!("{other:?}"),
        };
        let table = [
            (Kind::NoSpace, Errno::NoSpace),
            (Kind::ReadOnly, Errno::Perm),
            (Kind::Invalid, Errno::Inval),
            (Kind::Unsupported, Errno::Inval),
            (Kind::Io, Errno::Io),
            (Kind::Damaged, Errno::Io),
            (Kind::Poisoned, Errno::Io),
            (Kind::Privilege, Errno::Io),
            (Kind::TimedOut, Errno::Io),
        ];
        for (kind, expected) in table {
            assert_eq!(errno(kind, false), expected, "{kind:?}");
        }
        assert_eq!(errno(Kind::Unsupported, true), Errno::NotSup);
    }

    #[test]
    fn what_a_request_may_hold_is_counted_before_it_is_held() {
        assert_eq!(Op::Read { at: 0, len: 5000 }.cost(), 8192);
        assert_eq!(Op::Flush.cost(), 0);
        let status = |len, one| {
            Op::Status(Status {
                at: 0,
                len,
                one,
                contexts: Selection::of(&Context::PLAIN),
            })
        };
        assert!(status(u64::MAX, false).cost() >= limits::EXTENTS_MAX * 24);
        assert!(status(u64::MAX, false).cost() < limits::BYTES_IN_FLIGHT);
        assert!(status(u64::MAX, true).cost() < 1024);
        assert!(status(4096, false).cost() < 1024);
    }
}
