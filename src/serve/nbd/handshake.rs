//! Negotiation as a state machine: bytes in, replies out, until both sides agree or part.
//!
//! It never does I/O and never waits; the caller bounds the time and the bytes in each direction
//! follow from [`limits`]. A client that breaks the protocol in a way that an error reply cannot
//! mend is dropped; everything else is answered, and the stream stays in step.

use super::limits;
use super::meta::{self, Context};
use super::proto::{self, Fields, Style, flag, hello, info, option, reply};
use crate::tracker::Registry;
use bytes::{Buf, BufMut, BytesMut};

/// The export, as it is while a client negotiates.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// Its name; the empty name means it too.
    pub name: &'a str,
    /// A text for people, or empty.
    pub description: &'a str,
    /// Bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Bytes that are cheapest to transfer, a power of two.
    pub preferred: u32,
    /// Trackers whose generations it has contexts for.
    pub registry: Option<&'a Registry>,
}

impl Offer<'_> {
    /// The contexts that there are now.
    fn contexts(&self) -> Vec<Context> {
        let dirty = self.registry.map(Context::dirty).unwrap_or_default();
        [&Context::PLAIN[..], &dirty].concat()
    }
}

/// What was agreed for the transmission phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// Framing.
    pub style: Style,
    /// Contexts of a BLOCK_STATUS reply.
    pub contexts: Vec<Context>,
}

/// How the client asked to start, and with what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// What it gets.
    pub terms: Terms,
    how: How,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum How {
    Go(Vec<u16>),
    ExportName,
}

/// Where a connection stands with TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tls {
    /// There is none here.
    #[default]
    Off,
    /// The client may ask for it.
    Allowed,
    /// Before the client asks for it, it gets nothing else and learns nothing.
    Required,
    /// It is on.
    On,
}

/// What the caller does next. Replies written so far are sent first in any case.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Receive more bytes.
    More,
    /// The client wants to start: [`Handshake::accept`] or [`Handshake::refuse`] it.
    Start(Start),
    /// The client turns to TLS: shake hands, then go on. `input` is empty.
    StartTls,
    /// The client took its leave: close.
    Abort,
    /// The client broke a rule: close without a word. The text is for the log.
    Drop(String),
}

/// One client's negotiation.
#[derive(Debug)]
pub struct Handshake {
    client: Option<u16>,
    options: u32,
    tls: Tls,
    style: Style,
    selected: Option<(Vec<u8>, Vec<Context>)>,
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new(Tls::Off)
    }
}

/// An option that was refused; the text goes to the client.
struct Refusal(u32, String);

impl Refusal {
    fn invalid(text: &str) -> Self {
        Self(reply::ERR_INVALID, text.into())
    }
}

type Answer = Result<(), Refusal>;

impl Handshake {
    /// A negotiation that has not begun.
    pub fn new(tls: Tls) -> Self {
        Self {
            client: None,
            options: 0,
            tls,
            style: Style::Simple,
            selected: None,
        }
    }

    /// Takes whole messages off `input` and appends replies to `out`, until more bytes are needed
    /// or something is decided. Never keeps more than one option's data waiting in `input`.
    pub fn advance(&mut self, offer: &Offer, input: &mut BytesMut, out: &mut Vec<u8>) -> Step {
        loop {
            let step = match self.client {
                None => self.client_flags(input),
                Some(flags) => self.option(flags, offer, input, out),
            };
            match step {
                Ok(()) => continue,
                Err(step) => return step,
            }
        }
    }

    fn client_flags(&mut self, input: &mut BytesMut) -> Result<(), Step> {
        let flags = input.try_get_u32().map_err(|_| Step::More)?;
        match u16::try_from(flags) {
            Ok(known) if known & !(hello::FIXED_NEWSTYLE | hello::NO_ZEROES) == 0 => {
                self.client = Some(known);
                Ok(())
            }
            _ => Err(Step::Drop(format!(
                "client flags {flags:#x} were not offered"
            ))),
        }
    }

    fn option(
        &mut self,
        flags: u16,
        offer: &Offer,
        input: &mut BytesMut,
        out: &mut Vec<u8>,
    ) -> Result<(), Step> {
        let head = input.first_chunk::<16>().ok_or(Step::More)?;
        let mut head = head.as_slice();
        let (magic, number, len) = (head.get_u64(), head.get_u32(), head.get_u32());
        self.bounds(flags, magic, number, len).map_err(Step::Drop)?;
        let end = 16 + len as usize;
        if input.len() < end {
            return Err(Step::More);
        }
        let data = input.split_to(end).split_off(16);
        self.options += 1;
        if number == option::STARTTLS {
            return self.start_tls(&data, input, out);
        }
        if self.tls == Tls::Required {
            return without_tls(number, out);
        }
        self.answer(number, offer, &data, out)
    }

    /// Everything that was agreed in the clear is forgotten: somebody in between may have agreed
    /// to it. For the same reason what was sent ahead in the clear is never looked at.
    fn start_tls(&mut self, data: &[u8], ahead: &[u8], out: &mut Vec<u8>) -> Result<(), Step> {
        let (kind, text) = match self.tls {
            Tls::Off => (reply::ERR_UNSUP, "no TLS here"),
            Tls::On => (reply::ERR_INVALID, "TLS is on"),
            _ if !data.is_empty() => (reply::ERR_INVALID, NO_DATA),
            _ if !ahead.is_empty() => {
                let what = format!("{} bytes behind STARTTLS, in the clear", ahead.len());
                return Err(Step::Drop(what));
            }
            _ => {
                *self = Self {
                    client: self.client,
                    options: self.options,
                    ..Self::new(Tls::On)
                };
                proto::option_reply(out, option::STARTTLS, reply::ACK, &[]);
                return Err(Step::StartTls);
            }
        };
        proto::option_reply(out, option::STARTTLS, kind, text.as_bytes());
        Ok(())
    }

    fn bounds(&self, flags: u16, magic: u64, number: u32, len: u32) -> Result<(), String> {
        if magic != proto::IHAVEOPT {
            return Err(format!("{magic:#x} is not the head of an option"));
        }
        if flags & hello::FIXED_NEWSTYLE == 0 && number != option::EXPORT_NAME {
            return Err(format!("option {number} without fixed newstyle"));
        }
        if len > limits::OPTION_DATA_MAX {
            return Err(format!("option {number} with {len} bytes of data"));
        }
        if self.options >= limits::OPTIONS_MAX {
            return Err(format!("more than {} options", limits::OPTIONS_MAX));
        }
        Ok(())
    }

    fn answer(
        &mut self,
        number: u32,
        offer: &Offer,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Step> {
        let answer = match number {
            option::EXPORT_NAME => return Err(self.export_name(offer, data)),
            option::ABORT => return Err(abort(out)),
            option::GO => match self.information(offer, number, data, out) {
                Ok(start) => return Err(Step::Start(start)),
                Err(refusal) => Err(refusal),
            },
            option::INFO => self.information(offer, number, data, out).map(|_| ()),
            option::LIST => list(offer, data, out),
            option::STRUCTURED_REPLY => self.structured(data),
            option::EXTENDED_HEADERS => self.extended(data),
            option::LIST_META_CONTEXT => self.list_contexts(offer, data, out),
            option::SET_META_CONTEXT => self.set_contexts(offer, data, out),
            other => Err(Refusal(
                reply::ERR_UNSUP,
                format!("option {other} is not known here"),
            )),
        };
        match answer {
            Ok(()) => proto::option_reply(out, number, reply::ACK, &[]),
            Err(Refusal(kind, text)) => {
                proto::option_reply(out, number, kind, proto::cut(&text).as_bytes());
            }
        }
        Ok(())
    }

    fn export_name(&self, offer: &Offer, name: &[u8]) -> Step {
        if self.style == Style::Extended {
            return Step::Drop("EXPORT_NAME after extended headers".into());
        }
        match check_name(offer, name) {
            Ok(()) => Step::Start(Start {
                terms: self.terms(name),
                how: How::ExportName,
            }),
            Err(Refusal(_, text)) => Step::Drop(text),
        }
    }

    /// INFO and GO: everything but the final ACK, which follows once the client has a place.
    fn information(
        &self,
        offer: &Offer,
        number: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Start, Refusal> {
        let (name, wanted) = parse_info(data)
            .ok_or_else(|| Refusal::invalid("name and requests do not fill the option's data"))?;
        check_name(offer, name)?;
        let start = Start {
            terms: self.terms(name),
            how: How::Go(wanted),
        };
        if number == option::INFO {
            inform(offer, number, &start, out);
        }
        Ok(start)
    }

    fn structured(&mut self, data: &[u8]) -> Answer {
        no_data(data)?;
        if self.style == Style::Extended {
            let text = "extended headers were agreed and stay";
            return Err(Refusal(reply::ERR_EXT_HEADER_REQD, text.into()));
        }
        self.style = Style::Structured;
        Ok(())
    }

    fn extended(&mut self, data: &[u8]) -> Answer {
        no_data(data)?;
        self.style = Style::Extended;
        Ok(())
    }

    fn list_contexts(&self, offer: &Offer, data: &[u8], out: &mut Vec<u8>) -> Answer {
        let (name, queries) = self.queries(data)?;
        check_name(offer, name)?;
        for context in meta::found_by(&offer.contexts(), &queries) {
            context_reply(out, option::LIST_META_CONTEXT, 0, &context);
        }
        Ok(())
    }

    fn set_contexts(&mut self, offer: &Offer, data: &[u8], out: &mut Vec<u8>) -> Answer {
        self.selected = None;
        let (name, queries) = self.queries(data)?;
        check_name(offer, name)?;
        let contexts = meta::selected_by(&offer.contexts(), &queries);
        for (id, context) in (1..).zip(&contexts) {
            context_reply(out, option::SET_META_CONTEXT, id, context);
        }
        self.selected = Some((name.to_vec(), contexts));
        Ok(())
    }

    fn queries<'a>(&self, data: &'a [u8]) -> Result<(&'a [u8], Vec<&'a [u8]>), Refusal> {
        if self.style == Style::Simple {
            return Err(Refusal::invalid("ask for structured replies first"));
        }
        let (name, queries) = parse_queries(data)
            .ok_or_else(|| Refusal::invalid("name and queries do not fill the option's data"))?;
        if queries.iter().any(|query| query.len() > limits::NAME_MAX) {
            return Err(Refusal(
                reply::ERR_TOO_BIG,
                "a query is longer than 4096 bytes".into(),
            ));
        }
        Ok((name, queries))
    }

    /// Contexts count only for the name that they were selected with.
    fn terms(&self, name: &[u8]) -> Terms {
        let contexts = match &self.selected {
            Some((of, contexts)) if of == name => contexts.clone(),
            _ => Vec::new(),
        };
        Terms {
            style: self.style,
            contexts,
        }
    }

    /// Appends what begins the transmission phase. The bytes that are left in `input` belong to it.
    pub fn accept(&self, offer: &Offer, start: &Start, out: &mut Vec<u8>) {
        match &start.how {
            How::Go(_) => {
                inform(offer, option::GO, start, out);
                proto::option_reply(out, option::GO, reply::ACK, &[]);
            }
            How::ExportName => {
                out.put_u64(offer.size);
                out.put_u16(flags(offer, &start.terms));
                if self
                    .client
                    .is_some_and(|flags| flags & hello::NO_ZEROES == 0)
                {
                    out.put_bytes(0, 124);
                }
            }
        }
    }

    /// Refuses a start for a reason that is the server's. False when the client cannot be told
    /// and has to be dropped; else the negotiation goes on.
    pub fn refuse(&self, start: &Start, text: &str, out: &mut Vec<u8>) -> bool {
        let can_be_told = matches!(start.how, How::Go(_));
        if can_be_told {
            proto::option_reply(
                out,
                option::GO,
                reply::ERR_POLICY,
                proto::cut(text).as_bytes(),
            );
        }
        can_be_told
    }
}

const NO_DATA: &str = "this option takes no data";

fn no_data(data: &[u8]) -> Answer {
    if data.is_empty() {
        Ok(())
    } else {
        Err(Refusal::invalid(NO_DATA))
    }
}

fn abort(out: &mut Vec<u8>) -> Step {
    proto::option_reply(out, option::ABORT, reply::ACK, &[]);
    Step::Abort
}

/// What a client gets for any option but STARTTLS where TLS is required: nothing about the export.
fn without_tls(number: u32, out: &mut Vec<u8>) -> Result<(), Step> {
    match number {
        option::ABORT => Err(abort(out)),
        // The one option that cannot be refused with a word.
        option::EXPORT_NAME => Err(Step::Drop("EXPORT_NAME where TLS is required".into())),
        _ => {
            proto::option_reply(out, number, reply::ERR_TLS_REQD, b"TLS is required here");
            Ok(())
        }
    }
}

fn check_name(offer: &Offer, name: &[u8]) -> Answer {
    if name.len() > limits::NAME_MAX {
        return Err(Refusal(
            reply::ERR_TOO_BIG,
            "a name is longer than 4096 bytes".into(),
        ));
    }
    let text = std::str::from_utf8(name).unwrap_or("\0");
    if text.contains('\0') {
        return Err(Refusal::invalid("a name is UTF-8 text without NUL"));
    }
    if text.is_empty() || text == offer.name {
        return Ok(());
    }
    let shown: String = text.chars().take(80).collect();
    Err(Refusal(
        reply::ERR_UNKNOWN,
        format!("no export {shown:?} here"),
    ))
}

fn list(offer: &Offer, data: &[u8], out: &mut Vec<u8>) -> Answer {
    no_data(data)?;
    let mut entry = Vec::with_capacity(4 + offer.name.len());
    entry.put_u32(u32::try_from(offer.name.len()).expect("an export name is short"));
    entry.put_slice(offer.name.as_bytes());
    proto::option_reply(out, option::LIST, reply::SERVER, &entry);
    Ok(())
}

fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.counted()?;
    let count = fields.u16()?;
    let wanted = (0..count)
        .map(|_| fields.u16())
        .collect::<Option<Vec<_>>>()?;
    fields.is_empty().then_some((name, wanted))
}

fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.counted()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.counted()?);
    }
    fields.is_empty().then_some((name, queries))
}

fn context_reply(out: &mut Vec<u8>, number: u32, id: u32, context: &Context) {
    let mut data = id.to_be_bytes().to_vec();
    data.put_slice(context.name().as_bytes());
    proto::option_reply(out, number, reply::META_CONTEXT, &data);
}

/// The pieces of information: size and flags, and block sizes, always; the rest when wanted.
fn inform(offer: &Offer, number: u32, start: &Start, out: &mut Vec<u8>) {
    let How::Go(wanted) = &start.how else { return };
    let mut piece = |kind: u16, fill: &dyn Fn(&mut Vec<u8>)| {
        let mut data = kind.to_be_bytes().to_vec();
        fill(&mut data);
        proto::option_reply(out, number, reply::INFO, &data);
    };
    piece(info::EXPORT, &|data| {
        data.put_u64(offer.size);
        data.put_u16(flags(offer, &start.terms));
    });
    piece(info::BLOCK_SIZE, &|data| {
        data.put_u32(1);
        data.put_u32(offer.preferred);
        data.put_u32(limits::PAYLOAD_MAX as u32);
    });
    if wanted.contains(&info::NAME) {
        piece(info::NAME, &|data| data.put_slice(offer.name.as_bytes()));
    }
    if wanted.contains(&info::DESCRIPTION) && !offer.description.is_empty() {
        let text = proto::cut(offer.description);
        piece(info::DESCRIPTION, &|data| data.put_slice(text.as_bytes()));
    }
}

/// The transmission flags of an export, for a client with these terms.
pub fn flags(offer: &Offer, terms: &Terms) -> u16 {
    let mut flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE;
    flags |= match offer.read_only {
        true => flag::READ_ONLY,
        false => flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO,
    };
    if terms.style >= Style::Structured {
        flags |= flag::SEND_DF;
    }
    if terms.style == Style::Extended && !terms.contexts.is_empty() {
        flags |= flag::BLOCK_STATUS_PAYLOAD;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Offer = Offer {
        name: "disk",
        description: "the one",
        size: 1 << 30,
        read_only: false,
        preferred: 65536,
        registry: None,
    };

    /// A negotiation after the client flags.
    fn begun() -> Handshake {
        with_flags(hello::FIXED_NEWSTYLE | hello::NO_ZEROES)
    }

    fn with_flags(flags: u16) -> Handshake {
        let mut handshake = Handshake::default();
        let mut input = BytesMut::from(&u32::from(flags).to_be_bytes()[..]);
        assert_eq!(
            handshake.advance(&OFFER, &mut input, &mut Vec::new()),
            Step::More
        );
        handshake
    }

    fn message(option: u32, data: &[u8]) -> BytesMut {
        let mut bytes = BytesMut::new();
        bytes.put_u64(proto::IHAVEOPT);
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        bytes
    }

    /// Sends one option; the types of the replies, and what is next.
    fn send(handshake: &mut Handshake, option: u32, data: &[u8]) -> (Vec<u32>, Step) {
        let mut out = Vec::new();
        let step = handshake.advance(&OFFER, &mut message(option, data), &mut out);
        (
            replies(&out, option)
                .into_iter()
                .map(|(kind, _)| kind)
                .collect(),
            step,
        )
    }

    fn replies(out: &[u8], option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut fields = Fields(out);
        let mut all = Vec::new();
        while let Some(magic) = fields.u64() {
            assert_eq!(magic, proto::OPTION_REPLY);
            assert_eq!(fields.u32(), Some(option));
            all.push((fields.u32().unwrap(), fields.counted().unwrap().to_vec()));
        }
        all
    }

    fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
        let mut data = Vec::new();
        data.put_u32(name.len() as u32);
        data.put_slice(name.as_bytes());
        data.put_u16(wanted.len() as u16);
        wanted.iter().for_each(|info| data.put_u16(*info));
        data
    }

    fn query_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = Vec::new();
        data.put_u32(name.len() as u32);
        data.put_slice(name.as_bytes());
        data.put_u32(queries.len() as u32);
        for query in queries {
            data.put_u32(query.len() as u32);
            data.put_slice(query.as_bytes());
        }
        data
    }

    fn start(step: Step) -> Start {
        match step {
            Step::Start(start) => start,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn client_flags_that_were_not_offered_end_the_connection() {
        for flags in [4u32, 0x8000, 0x1_0000, u32::MAX] {
            let mut input = BytesMut::from(&flags.to_be_bytes()[..]);
            let step = Handshake::default().advance(&OFFER, &mut input, &mut Vec::new());
            assert!(matches!(step, Step::Drop(_)), "{flags:#x}");
        }
    }

    #[test]
    fn bytes_may_come_one_at_a_time_or_all_at_once() {
        let mut all = 3u32.to_be_bytes().to_vec();
        all.extend(message(option::LIST, b""));
        all.extend(message(99, b"what is this"));
        all.extend(message(option::GO, &info_data("disk", &[])));
        all.extend(b"first request");
        let once = {
            let (mut handshake, mut out) = (Handshake::default(), Vec::new());
            let mut input = BytesMut::from(&all[..]);
            let start = start(handshake.advance(&OFFER, &mut input, &mut out));
            handshake.accept(&OFFER, &start, &mut out);
            assert_eq!(&input[..], b"first request");
            out
        };
        let (mut handshake, mut out, mut input) =
            (Handshake::default(), Vec::new(), BytesMut::new());
        for byte in all {
            input.put_u8(byte);
            match handshake.advance(&OFFER, &mut input, &mut out) {
                Step::More => {}
                step => {
                    handshake.accept(&OFFER, &start(step), &mut out);
                    break;
                }
            }
        }
        assert_eq!(out, once);
    }

    #[test]
    fn every_option_is_answered_and_the_stream_stays_in_step() {
        use reply::*;
        let long = "n".repeat(4096);
        let longer = "n".repeat(4097);
        let table: &[(u32, Vec<u8>, &[u32])] = &[
            (option::LIST, vec![], &[SERVER, ACK]),
            (option::LIST, vec![1], &[ERR_INVALID]),
            (4, vec![], &[ERR_UNSUP]),
            (option::STARTTLS, vec![], &[ERR_UNSUP]),
            (option::STARTTLS, vec![1], &[ERR_UNSUP]),
            (0, vec![], &[ERR_UNSUP]),
            (12, vec![7; 100], &[ERR_UNSUP]),
            (u32::MAX, vec![7; 65536], &[ERR_UNSUP]),
            (option::INFO, info_data("disk", &[]), &[INFO, INFO, ACK]),
            (
                option::INFO,
                info_data("", &[1, 2, 3, 77]),
                &[INFO, INFO, INFO, INFO, ACK],
            ),
            (option::INFO, info_data("other", &[]), &[ERR_UNKNOWN]),
            (option::INFO, info_data(&long, &[]), &[ERR_UNKNOWN]),
            (option::INFO, info_data(&longer, &[]), &[ERR_TOO_BIG]),
            (option::INFO, info_data("a\0b", &[]), &[ERR_INVALID]),
            (option::INFO, vec![0, 0, 0, 1, 0xff, 0, 0], &[ERR_INVALID]),
            (option::INFO, vec![], &[ERR_INVALID]),
            (
                option::INFO,
                vec![0xff, 0xff, 0xff, 0xff, 0, 0],
                &[ERR_INVALID],
            ),
            (
                option::INFO,
                [info_data("", &[]), vec![0]].concat(),
                &[ERR_INVALID],
            ),
            (option::GO, info_data("other", &[]), &[ERR_UNKNOWN]),
            (option::GO, vec![0, 0, 0, 0, 0, 1], &[ERR_INVALID]),
            (
                option::LIST_META_CONTEXT,
                query_data("", &[]),
                &[ERR_INVALID],
            ),
            (
                option::SET_META_CONTEXT,
                query_data("", &["base:allocation"]),
                &[ERR_INVALID],
            ),
            (option::STRUCTURED_REPLY, vec![0], &[ERR_INVALID]),
            (option::STRUCTURED_REPLY, vec![], &[ACK]),
            (
                option::LIST_META_CONTEXT,
                query_data("", &[]),
                &[META_CONTEXT, META_CONTEXT, ACK],
            ),
            (
                option::LIST_META_CONTEXT,
                query_data("", &["x-a:b"]),
                &[ACK],
            ),
            (
                option::LIST_META_CONTEXT,
                query_data("other", &[]),
                &[ERR_UNKNOWN],
            ),
            (
                option::LIST_META_CONTEXT,
                query_data("", &[&longer]),
                &[ERR_TOO_BIG],
            ),
            (
                option::LIST_META_CONTEXT,
                vec![0, 0, 0, 0, 0, 0, 0, 1],
                &[ERR_INVALID],
            ),
            (
                option::LIST_META_CONTEXT,
                vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
                &[ERR_INVALID],
            ),
            (option::SET_META_CONTEXT, query_data("", &["base:"]), &[ACK]),
            (option::EXTENDED_HEADERS, vec![0], &[ERR_INVALID]),
            (option::EXTENDED_HEADERS, vec![], &[ACK]),
            (option::STRUCTURED_REPLY, vec![], &[ERR_EXT_HEADER_REQD]),
        ];
        let mut handshake = begun();
        for (number, data, expected) in table {
            handshake.options = 0;
            let (kinds, step) = send(&mut handshake, *number, data);
            assert_eq!(
                (&kinds[..], step),
                (*expected, Step::More),
                "option {number} {data:?}"
            );
        }
        assert_eq!(
            send(&mut handshake, option::ABORT, b"bye"),
            (vec![ACK], Step::Abort)
        );
    }

    #[test]
    fn an_export_is_described_in_full() {
        let mut out = Vec::new();
        let mut handshake = begun();
        let mut input = message(
            option::INFO,
            &info_data("", &[info::NAME, info::DESCRIPTION]),
        );
        handshake.advance(&OFFER, &mut input, &mut out);
        let pieces: Vec<_> = replies(&out, option::INFO)
            .into_iter()
            .map(|(_, data)| data)
            .collect();
        let size = (1u64 << 30).to_be_bytes();
        // HAS_FLAGS FLUSH FUA TRIM ZEROES MULTI_CONN CACHE FAST_ZERO, no DF.
        let expected: [&[u8]; 5] = [
            &[&[0, 0], &size[..], &[0x0d, 0x6d]].concat(),
            &[0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 2, 0, 0, 0],
            b"\0\x01disk",
            b"\0\x02the one",
            b"",
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn transmission_flags_follow_what_was_agreed() {
        let flags = |style, contexts: &[Context], read_only| {
            let terms = Terms {
                style,
                contexts: contexts.to_vec(),
            };
            flags(&Offer { read_only, ..OFFER }, &terms)
        };
        let simple = flags(Style::Simple, &[], false);
        assert_eq!(
            flags(Style::Structured, &Context::PLAIN, false),
            simple | flag::SEND_DF
        );
        assert_eq!(flags(Style::Extended, &[], false), simple | flag::SEND_DF);
        let all = simple | flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD;
        assert_eq!(flags(Style::Extended, &Context::PLAIN, false), all);
        let changes = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        assert_eq!(
            flags(Style::Simple, &[], true),
            simple & !changes | flag::READ_ONLY
        );
    }

    #[test]
    fn contexts_count_only_for_their_name_and_the_last_selection_wins() {
        let select = |name: &str, queries: &[&str], more: &[(u32, Vec<u8>)], go: &str| {
            let mut handshake = begun();
            send(&mut handshake, option::STRUCTURED_REPLY, b"");
            send(
                &mut handshake,
                option::SET_META_CONTEXT,
                &query_data(name, queries),
            );
            for (number, data) in more {
                send(&mut handshake, *number, data);
            }
            let (_, step) = send(&mut handshake, option::GO, &info_data(go, &[]));
            start(step).terms.contexts
        };
        let set = option::SET_META_CONTEXT;
        let base = ["base:allocation"];
        assert_eq!(select("", &base, &[], ""), [Context::Allocation]);
        assert_eq!(select("disk", &base, &[], ""), []);
        assert_eq!(
            select("disk", &["qemu:allocation-depth"], &[], "disk"),
            [Context::Depth]
        );
        assert_eq!(select("", &base, &[(set, query_data("", &[]))], ""), []);
        assert_eq!(
            select("", &base, &[(set, query_data("other", &base))], ""),
            []
        );
        assert_eq!(select("", &base, &[(set, vec![1])], ""), []);
        let list = (option::LIST_META_CONTEXT, query_data("", &[]));
        assert_eq!(select("", &base, &[list], ""), [Context::Allocation]);
    }

    #[test]
    fn export_name_starts_without_a_word_of_error() {
        let mut handshake = with_flags(0);
        let begin = start(send(&mut handshake, option::EXPORT_NAME, b"disk").1);
        let mut out = Vec::new();
        handshake.accept(&OFFER, &begin, &mut out);
        assert_eq!(out.len(), 8 + 2 + 124, "padded");
        assert_eq!(out[..8], (1u64 << 30).to_be_bytes());
        assert!(!handshake.refuse(&begin, "full", &mut out));
        let mut handshake = begun();
        let begin = start(send(&mut handshake, option::EXPORT_NAME, b"").1);
        let mut out = Vec::new();
        handshake.accept(&OFFER, &begin, &mut out);
        assert_eq!(out.len(), 8 + 2);
        for (extended, name) in [
            (false, &b"other"[..]),
            (false, &[b'n'; 4097]),
            (true, b"disk"),
        ] {
            let mut handshake = begun();
            if extended {
                send(&mut handshake, option::EXTENDED_HEADERS, b"");
            }
            let step = send(&mut handshake, option::EXPORT_NAME, name).1;
            assert!(matches!(step, Step::Drop(_)), "{step:?}");
        }
    }

    #[test]
    fn a_client_without_fixed_newstyle_has_export_name_only() {
        let step = send(&mut with_flags(0), option::LIST, b"").1;
        assert!(matches!(step, Step::Drop(_)));
    }

    #[test]
    fn a_refused_client_is_told_why_and_may_go_on() {
        let mut handshake = begun();
        let (kinds, step) = send(&mut handshake, option::GO, &info_data("", &[]));
        assert_eq!(kinds, [] as [u32; 0], "nothing before a place is sure");
        let mut out = Vec::new();
        assert!(handshake.refuse(&start(step), "full", &mut out));
        assert_eq!(
            replies(&out, option::GO),
            [(reply::ERR_POLICY, b"full".to_vec())]
        );
        assert_eq!(send(&mut handshake, option::ABORT, b"").1, Step::Abort);
    }

    #[test]
    fn a_negotiation_is_bounded() {
        let mut handshake = begun();
        for _ in 0..limits::OPTIONS_MAX {
            assert_eq!(send(&mut handshake, option::LIST, b"").1, Step::More);
        }
        assert!(matches!(
            send(&mut handshake, option::LIST, b"").1,
            Step::Drop(_)
        ));

        let mut head = message(option::LIST, b"");
        head.truncate(12);
        head.put_u32(limits::OPTION_DATA_MAX + 1);
        let step = begun().advance(&OFFER, &mut head, &mut Vec::new());
        assert!(matches!(step, Step::Drop(_)), "before the data is received");

        let mut noise = BytesMut::from(&[0x55; 16][..]);
        assert!(matches!(
            begun().advance(&OFFER, &mut noise, &mut Vec::new()),
            Step::Drop(_)
        ));
    }

    fn begun_with(tls: Tls) -> Handshake {
        Handshake { tls, ..begun() }
    }

    #[test]
    fn where_tls_is_required_nothing_else_is_answered() {
        for number in 0..200 {
            let mut handshake = begun_with(Tls::Required);
            for data in [&b""[..], b"disk", &info_data("disk", &[1, 2, 3])] {
                let (kinds, step) = send(&mut handshake, number, data);
                match number {
                    option::EXPORT_NAME => {
                        assert!(matches!(step, Step::Drop(_)) && kinds.is_empty())
                    }
                    option::ABORT => assert_eq!((kinds, step), (vec![reply::ACK], Step::Abort)),
                    option::STARTTLS => break,
                    _ => assert_eq!((kinds, step), (vec![reply::ERR_TLS_REQD], Step::More)),
                }
            }
        }
        let step = send(
            &mut begun_with(Tls::Allowed),
            option::GO,
            &info_data("", &[]),
        )
        .1;
        assert!(matches!(step, Step::Start(_)));
    }

    #[test]
    fn tls_starts_once_and_with_nothing_from_before() {
        for tls in [Tls::Allowed, Tls::Required] {
            let mut handshake = begun_with(tls);
            if tls == Tls::Allowed {
                send(&mut handshake, option::EXTENDED_HEADERS, b"");
                let query = query_data("", &["base:allocation"]);
                send(&mut handshake, option::SET_META_CONTEXT, &query);
            }
            let refused = (vec![reply::ERR_INVALID], Step::More);
            assert_eq!(send(&mut handshake, option::STARTTLS, b"now"), refused);
            let started = (vec![reply::ACK], Step::StartTls);
            assert_eq!(send(&mut handshake, option::STARTTLS, b""), started);
            assert_eq!(send(&mut handshake, option::STARTTLS, b""), refused);
            let step = send(&mut handshake, option::GO, &info_data("", &[])).1;
            let nothing = Terms {
                style: Style::Simple,
                contexts: vec![],
            };
            assert_eq!(start(step).terms, nothing);
        }
    }

    #[test]
    fn what_was_sent_ahead_of_tls_ends_the_connection() {
        for tls in [Tls::Allowed, Tls::Required] {
            let mut input = message(option::STARTTLS, b"");
            input.extend(message(option::LIST, b""));
            let mut out = Vec::new();
            let step = begun_with(tls).advance(&OFFER, &mut input, &mut out);
            assert!(matches!(step, Step::Drop(_)), "{step:?}");
            assert_eq!(out, b"");
        }
    }

    #[test]
    fn options_are_counted_across_the_start_of_tls() {
        let mut handshake = begun_with(Tls::Allowed);
        for _ in 1..limits::OPTIONS_MAX {
            send(&mut handshake, option::LIST, b"");
        }
        let step = send(&mut handshake, option::STARTTLS, b"").1;
        assert_eq!(step, Step::StartTls);
        let step = send(&mut handshake, option::LIST, b"").1;
        assert!(matches!(step, Step::Drop(_)));
    }
}
