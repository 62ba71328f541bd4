//! Negotiation as a state machine: bytes in, replies out, until both sides agree or part.
//!
//! It never does I/O and never waits; the caller bounds the time and the bytes in each direction
//! follow from [`limits`]. A client that breaks the protocol in a way that an error reply cannot
//! mend is dropped; everything else is answered, and the stream stays in step.

use super::limits;
use super::meta::{self, Context};
use super::proto::{self, Fields, Style, flag, hello, info, option, reply};
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

/// What the caller does next. Replies written so far are sent first in any case.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Receive more bytes.
    More,
    /// The client wants to start: [`Handshake::accept`] or [`Handshake::refuse`] it.
    Start(Start),
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
    style: Style,
    selected: Option<(Vec<u8>, Vec<Context>)>,
}

impl Default for Handshake {
    fn default() -> Self {
        Self {
            client: None,
            options: 0,
            style: Style::Simple,
            selected: None,
        }
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
        self.answer(number, offer, &data, out)
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
            option::ABORT => {
                proto::option_reply(out, number, reply::ACK, &[]);
                return Err(Step::Abort);
            }
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
            option::STARTTLS => Err(Refusal(reply::ERR_UNSUP, "no TLS here".into())),
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
        for context in meta::found_by(&queries) {
            context_reply(out, option::LIST_META_CONTEXT, 0, context);
        }
        Ok(())
    }

    fn set_contexts(&mut self, offer: &Offer, data: &[u8], out: &mut Vec<u8>) -> Answer {
        self.selected = None;
        let (name, queries) = self.queries(data)?;
        check_name(offer, name)?;
        let contexts = meta::selected_by(&queries);
        for context in &contexts {
            context_reply(out, option::SET_META_CONTEXT, context.id(), *context);
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

fn no_data(data: &[u8]) -> Answer {
    if data.is_empty() {
        Ok(())
    } else {
        Err(Refusal::invalid("this option takes no data"))
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

fn context_reply(out: &mut Vec<u8>, number: u32, id: u32, context: Context) {
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
