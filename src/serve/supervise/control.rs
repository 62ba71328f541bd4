//! Control: what other programs may ask the keeper of a disk, over a socket in its run directory.
//!
//! One JSON value a line. The keeper greets with its version, answers requests in order, and sends
//! events to those who asked for them. A second socket answers any HTTP request with the counters as
//! Prometheus reads them. Mode 0600, the peer's user is checked, everything that a client can make
//! us hold is bounded, and no client is ever waited for. Clients of ours use [`crate::client`].

use super::freeze::News;
use super::host::Footprint;
use super::message::Failure;
use super::metrics::prometheus;
use crate::counters::Stat;
use crate::image::grow::Wanted;
use crate::rundir::{Phase, State};
use crate::tracker::Name;
use ploop_formats::{Error, Result};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Version of what is spoken.
pub const PROTO: u32 = 1;
/// Its name in a run directory.
pub const SOCKET: &str = "control";
/// The name there of the socket that speaks HTTP.
pub const METRICS: &str = "metrics";
/// Clients at once; the longest connected one makes room.
const CLIENTS_MAX: usize = 32;
/// Longest line of a client, in bytes.
pub(crate) const LINE_MAX: usize = 16 << 10;
/// Bytes of answers that wait for a client; a slower one is hung up on.
pub(crate) const BACKLOG_MAX: usize = 1 << 20;

/// What the keeper says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`PROTO`].
    pub proto: u32,
    /// The keeper's release.
    pub version: String,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back with the answer.
    #[serde(default)]
    pub id: u64,
    /// What is wanted.
    #[serde(flatten)]
    pub ask: Ask,
}

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase")]
pub enum Ask {
    /// What `list` shows.
    State,
    /// The counters.
    Stat,
    /// Every change of state from now on, the present one first.
    Events,
    /// A descriptor of the counters' memory, which comes with the answer: who watches them from
    /// then on asks nobody.
    Counters,
    /// Detach the disk, as SIGTERM does; the answer only says that it was understood.
    Stop,
    /// Use a failed disk again; the answer only says that it is tried.
    Recover,
    /// Give up what this client asked for before, where that can still be done: its own answer then says
    /// `cancelled`, and the same request goes on with it. The answer to this only says that it was
    /// understood.
    Cancel {
        /// The other request's `id`.
        request: u64,
    },
    /// Freeze the top and go on with a new one. Answered when that is done, with `uuid` and
    /// `stall_us`, the time that requests waited (null when it took a new worker).
    Snapshot {
        /// Its GUID; a random one when none is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        uuid: Option<String>,
        /// Whether the file system on the device is frozen meanwhile; `frozen_us` says for how long.
        #[serde(default)]
        freeze: bool,
    },
    /// Go back to a frozen point, of a disk whose device nobody has mounted. What was written since
    /// is given up. Answered when that is done, with `uuid`.
    Switch {
        /// Its GUID.
        uuid: String,
    },
    /// Take a frozen point away. Answered when that is done, with `uuid`, `outcome` and
    /// `children`; before, answers that have `progress` and neither result nor error tell how far it
    /// is. Who hangs up before ends it.
    Remove {
        /// Its GUID.
        uuid: String,
        /// Bytes a second to copy at most.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<u64>,
    },
    /// Make the disk larger: to `size` bytes, or by `by` bytes. Answered when that is done, with
    /// `old` and `size`, the bytes before and after, and `stall_us`, the time that requests waited
    /// (null when it took a new worker). With `smaller` it gets smaller, to `size` bytes: who asks
    /// has seen to it that nobody uses what is behind.
    Grow {
        /// Bytes that it is to have.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// Bytes that it is to have more.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<u64>,
        /// Whether `size` is less than it has.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        smaller: bool,
    },
    /// Move clusters of the top to where they leave no holes in its file, and cut it, while the
    /// disk is used. Answered when that is done, with `moved` (clusters), `length` (bytes of the
    /// file when it was cut) and `stall_us`, the time that requests waited in the end; before,
    /// answers that have `progress` and neither result nor error tell how far it is. Who hangs up
    /// before ends it.
    Compact {
        /// Bytes a second to copy at most.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<u64>,
    },
    /// Say what each delta of the disk may take of the host. Answered when that is durable and in
    /// effect.
    Limit {
        /// In bytes; null for as much as there is.
        bytes: Option<u64>,
    },
    /// Give a frozen point another file that holds the same. Answered when that is done, with `uuid`,
    /// `old`, `new`, `way` and `stall_us`; before, as a removal is. Who hangs up before ends it.
    Replace {
        /// Its GUID.
        uuid: String,
        /// The file's path, absolute.
        file: String,
        /// Bytes a second to compare or copy at most.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<u64>,
    },
    /// Something about what was written since it was looked at. Refused of a disk that is attached read-only.
    Track(TrackAsk),
    /// Keep the disk as it is, and the file system on its device, until `thaw`: who writes waits. Answered
    /// once that is so, with `filesystem` (whether one is frozen) and `took_us`. It belongs to this
    /// connection, and ends with it, when its time is over, and when the disk cannot be kept any longer. Then
    /// this connection hears the event `thawed`, asked for or not.
    Freeze {
        /// Milliseconds from now on that it lasts at most, up to 600,000.
        timeout_ms: u64,
    },
    /// Let a disk go on that this connection has frozen. Answered when that is done, with `frozen_us`, or
    /// with why it had not stayed as it was.
    Thaw,
    /// Mark a frozen point temporary: nobody goes back to it, clones it or compares it from now on,
    /// and it goes when it can. Answered as a removal is.
    Mark {
        /// Its GUID.
        uuid: String,
    },
}

/// What can be asked of trackers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum TrackAsk {
    /// Begin to record. Answered once nothing is written any more that is not recorded, with `name`,
    /// `granularity`, `generation` (0, which has every block) and `bytes`.
    Start {
        /// The new tracker.
        name: Name,
        /// Bytes of a block, a power of two from 4 KiB to 1 MiB; 64 KiB when none are given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        granularity: Option<u64>,
    },
    /// Record in another set, and make a generation of the one so far. Answered once that is complete, with
    /// `generation` and `bytes`: what is read of the disk from then on is what the generation is about, or
    /// newer and in a later one.
    Seal {
        /// Which tracker.
        name: Name,
    },
    /// What a generation has: `extents`, each with `offset`, `length` and `kind` (`data`, `zero` or
    /// `discard`, as the disk is now), and `next`, where the next one begins, null when that is
    /// all.
    Extents {
        /// Which tracker.
        name: Name,
        /// Which of its generations.
        generation: u64,
        /// The first byte to tell of.
        #[serde(default)]
        from: u64,
        /// Extents to tell of at most, 512 or less.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max: Option<u32>,
    },
    /// What a generation has was copied: forget it.
    Ack {
        /// Which tracker.
        name: Name,
        /// Which of its generations.
        generation: u64,
    },
    /// It was not: record it again.
    Nack {
        /// Which tracker.
        name: Name,
        /// Which of its generations.
        generation: u64,
    },
    /// All trackers: `trackers`, each with `name`, `granularity`, `recorded` (bytes since the last
    /// seal), `unknown` (whether that is all because nobody knows) and `generations` (`generation`,
    /// `bytes`, `age_s`).
    Stat,
    /// Record no more, and forget the tracker.
    Stop {
        /// Which.
        name: Name,
    },
}

/// An answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// The request's.
    pub id: u64,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// How far it is: an answer of its own, before the one that ends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Far>,
}

/// How far something is that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Far {
    /// Bytes done.
    pub done: u64,
    /// Bytes to do.
    pub total: u64,
}

/// What `stat` is answered with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// What was asked of the disk.
    #[serde(flatten)]
    pub counters: Stat,
    /// What it takes and what is left, where that is known. A keeper of an older release does not
    /// say.
    #[serde(flatten)]
    pub footprint: Option<Footprint>,
}

/// What the keeper knows.
pub(crate) trait Oracle {
    fn state(&self) -> &State;
    fn stat(&self) -> Figures;
    /// The counters' memory, to be read and not written.
    fn counters(&self) -> Option<BorrowedFd<'_>>;
    /// Whether anything is left that a failed disk could be served with.
    fn is_held(&self) -> bool;
}

/// The socket and those who are connected.
#[derive(Debug)]
pub(super) struct Control {
    control: UnixListener,
    metrics: UnixListener,
    clients: Vec<Client>,
    /// Clients so far.
    count: u64,
    /// What clients ordered since this was last taken.
    pub(super) orders: Orders,
}

/// What clients can order.
#[derive(Debug, Default)]
pub(crate) struct Orders {
    /// Detach the disk.
    pub(super) stop: bool,
    /// Use it again although it failed.
    pub(super) recover: bool,
    /// Freeze its top under this GUID, or a random one, and the file system on it, too.
    pub(super) snapshots: Vec<(Asker, Option<String>, bool)>,
    /// Go back to this point.
    pub(super) switches: Vec<(Asker, String)>,
    /// Take this point away, copying so many bytes a second at most.
    pub(super) removals: Vec<(Asker, String, Option<u64>)>,
    /// Make it so large.
    pub(super) growths: Vec<(Asker, Wanted)>,
    /// Make its file shorter, copying so many bytes a second at most.
    pub(super) compactions: Vec<(Asker, Option<u64>)>,
    /// Let a delta take so much.
    pub(super) limits: Vec<(Asker, Option<u64>)>,
    /// Give this point this file, copying so many bytes a second at most.
    pub(super) replacements: Vec<(Asker, String, String, Option<u64>)>,
    /// Points to mark temporary.
    pub(super) marks: Vec<(Asker, String)>,
    /// What is asked of trackers.
    pub(super) tracks: Vec<(Asker, TrackAsk)>,
    /// Keep it as it is for so many milliseconds at most.
    pub(super) freezes: Vec<(Asker, u64)>,
    /// Let it go on.
    pub(super) thaws: Vec<Asker>,
}

/// Whom an answer belongs to that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asker {
    client: u64,
    request: u64,
}

impl Asker {
    /// Whether both are the same client.
    pub(super) fn is_with(self, other: Self) -> bool {
        self.client == other.client
    }
}

/// Somebody who is connected.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    /// Tells it from others, for answers that take time.
    number: u64,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How far in `output` the answers begin that the counters' descriptor goes with.
    passing: VecDeque<usize>,
    speaks_http: bool,
    events: bool,
    /// The request that it wants no more.
    cancelled: Option<u64>,
    /// How its freeze ended without it, if that was so.
    thawed: Option<Failure>,
    /// Hung up on once its answers are sent.
    last: bool,
}

impl Control {
    /// Listens in a run directory.
    pub(super) fn listen(run: &Path) -> Result<Self> {
        Ok(Self {
            control: listen(&run.join(SOCKET))?,
            metrics: listen(&run.join(METRICS))?,
            clients: Vec::new(),
            count: 0,
            orders: Orders::default(),
        })
    }

    /// What to wait for.
    pub(super) fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        let clients = self.clients.iter().map(|c| {
            let out = match c.output.is_empty() {
                true => PollFlags::empty(),
                false => PollFlags::OUT,
            };
            PollFd::new(&c.stream, PollFlags::IN | out)
        });
        let listeners = [&self.control, &self.metrics];
        let listeners = listeners.map(|l| PollFd::new(l, PollFlags::IN));
        listeners.into_iter().chain(clients)
    }

    /// Does all that can be done without waiting.
    pub(super) fn turn(&mut self, oracle: &impl Oracle) {
        let orders = &mut self.orders;
        self.clients.retain_mut(|c| c.turn(oracle, orders));
        for (listener, speaks_http) in [(&self.control, false), (&self.metrics, true)] {
            // More wait for the next turn: who makes room for them has been served by then.
            let accepted = std::iter::from_fn(|| listener.accept().ok()).take(CLIENTS_MAX / 2);
            for (stream, _) in accepted {
                let Some(mut client) = Client::welcome(stream, speaks_http) else {
                    continue;
                };
                self.count += 1;
                client.number = self.count;
                if !client.turn(oracle, orders) {
                    continue;
                }
                if self.clients.len() == CLIENTS_MAX {
                    self.clients.remove(0);
                }
                self.clients.push(client);
            }
        }
    }

    /// Answers what was asked a while ago, if whoever asked is still there.
    pub(super) fn answer(&mut self, asker: Asker, outcome: Result<Value>) {
        let client = self.clients.iter_mut().find(|c| c.number == asker.client);
        if let Some(client) = client {
            match outcome {
                Ok(result) => client.accept(asker.request, result),
                Err(e) => client.refuse(asker.request, &e),
            }
        }
    }

    /// Whether whoever asked still waits, and wants it.
    pub(super) fn is_wanted(&self, asker: Asker) -> bool {
        let client = self.clients.iter().find(|c| c.number == asker.client);
        client.is_some_and(|c| c.cancelled != Some(asker.request))
    }

    /// Whether whoever asked is still there.
    pub(super) fn is_connected(&self, asker: Asker) -> bool {
        self.clients.iter().any(|c| c.number == asker.client)
    }

    /// Remembers how a freeze ended, for when whoever asked for it wants to end it.
    pub(super) fn lose_freeze(&mut self, asker: Asker, why: Failure) {
        let client = self.clients.iter_mut().find(|c| c.number == asker.client);
        if let Some(client) = client {
            client.thawed = Some(why);
        }
    }

    /// Why this client has frozen nothing.
    pub(super) fn lost_freeze(&self, asker: Asker) -> Error {
        let client = self.clients.iter().find(|c| c.number == asker.client);
        let none = || Error::invalid("this connection has not frozen the disk");
        client
            .and_then(|c| c.thawed.clone())
            .map_or_else(none, Error::from)
    }

    /// Tells who asked how far it is.
    pub(super) fn progress(&mut self, asker: Asker, far: Far) {
        let client = self.clients.iter_mut().find(|c| c.number == asker.client);
        // Who has not read the last word yet gets the next one.
        if let Some(client) = client.filter(|c| c.output.is_empty()) {
            client.say(&json!(Answer {
                id: asker.request,
                result: None,
                error: None,
                progress: Some(far),
            }));
        }
    }

    /// Tells those who want to know, and hangs up on who does not listen.
    pub(super) fn announce(&mut self, state: &State) {
        self.tell(&event("state", state), |client| client.events);
    }

    /// Tells that the disk stays as it is, or goes on.
    pub(super) fn announce_freeze(&mut self, state: &State, news: News, asker: Asker) {
        match news {
            News::Frozen => self.tell(&event("frozen", state), |client| client.events),
            News::Thawed { why, frozen_us } => {
                let mut said = event("thawed", state);
                said["why"] = why.name().into();
                said["frozen_us"] = frozen_us.into();
                let unasked =
                    |client: &Client| client.number == asker.client && client.thawed.is_some();
                self.tell(&said, |client| client.events || unasked(client));
            }
        }
    }

    fn tell(&mut self, event: &Value, whom: impl Fn(&Client) -> bool) {
        self.clients.retain_mut(|client| {
            if whom(client) {
                client.say(event);
            }
            client.output.len() <= BACKLOG_MAX
        });
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    let bound = || {
        let listener = UnixListener::bind(path)?;
        // The directory has mode 0700: nobody else could have connected before this.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    bound().map_err(|e: io::Error| Error::from(e).at(path.display()))
}

fn event(what: &str, state: &State) -> Value {
    json!({ "schema": 1, "event": what, "disk": state })
}

impl Client {
    /// Greets who may connect.
    pub(crate) fn welcome(stream: UnixStream, speaks_http: bool) -> Option<Self> {
        let peer = rustix::net::sockopt::socket_peercred(stream.as_fd()).ok()?;
        let own = rustix::process::geteuid();
        if peer.uid != own && !peer.uid.is_root() {
            return None;
        }
        stream.set_nonblocking(true).ok()?;
        let mut client = Self {
            stream,
            number: 0,
            input: Vec::new(),
            output: Vec::new(),
            passing: VecDeque::new(),
            speaks_http,
            events: false,
            cancelled: None,
            thawed: None,
            last: false,
        };
        if !speaks_http {
            client.say(&json!(Greeting {
                proto: PROTO,
                version: env!("CARGO_PKG_VERSION").into(),
            }));
        }
        Some(client)
    }

    fn say(&mut self, value: &Value) {
        self.output.extend_from_slice(value.to_string().as_bytes());
        self.output.push(b'\n');
    }

    /// Does all that can be done for it without waiting. Whether it stays.
    pub(crate) fn turn(&mut self, oracle: &impl Oracle, orders: &mut Orders) -> bool {
        let stays = self.receive();
        while let Some(line) = self.line() {
            self.serve(&line, oracle, orders);
        }
        if self.input.len() >= LINE_MAX {
            return false;
        }
        let sent = self.send(oracle.counters());
        stays && sent && self.output.len() <= BACKLOG_MAX && !(self.last && self.output.is_empty())
    }

    /// Bytes that are held for it: of an unfinished line, and of answers.
    #[cfg(feature = "testkit")]
    pub(crate) fn holds(&self) -> (usize, usize) {
        (self.input.len(), self.output.len())
    }

    fn receive(&mut self) -> bool {
        let mut buf = [0u8; 4096];
        while self.input.len() < LINE_MAX {
            match self.stream.read(&mut buf) {
                Ok(0) => return false,
                Ok(n) => self
                    .input
                    .extend_from_slice(buf.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.input.iter().position(|b| *b == b'\n')?;
        let mut line: Vec<u8> = self.input.drain(..=end).collect();
        line.pop();
        Some(line)
    }

    fn serve(&mut self, line: &[u8], oracle: &impl Oracle, orders: &mut Orders) {
        if self.last {
            return;
        }
        if self.speaks_http {
            // The end of the request's head; whatever it asked for, there is one answer.
            if matches!(line, b"" | b"\r") {
                self.last = true;
                self.output = http(&prometheus(&[(oracle.state(), &oracle.stat())]));
            }
            return;
        }
        let request: Request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(e) => {
                let error = Error::invalid(format!("not a request: {e}"));
                return self.refuse(0, &error);
            }
        };
        let asker = Asker {
            client: self.number,
            request: request.id,
        };
        if self.cancelled == Some(request.id) {
            // Another one of that number.
            self.cancelled = None;
        }
        let result = match request.ask {
            Ask::State => json!(oracle.state()),
            Ask::Stat => json!(oracle.stat()),
            Ask::Events => {
                self.events = true;
                return self.say(&event("state", oracle.state()));
            }
            Ask::Counters if oracle.counters().is_some() => {
                self.passing.push_back(self.output.len());
                json!({})
            }
            Ask::Counters => {
                let error = Error::unsupported("the counters' descriptor cannot be passed");
                return self.refuse(request.id, &error);
            }
            Ask::Stop => {
                orders.stop = true;
                json!({})
            }
            Ask::Cancel { request } => {
                self.cancelled = Some(request);
                json!({})
            }
            Ask::Recover if !oracle.is_held() => {
                let error = Error::unsupported("nothing is left to serve it with: detach it");
                return self.refuse(request.id, &error);
            }
            Ask::Recover if oracle.state().state == Phase::Failed => {
                orders.recover = true;
                json!({})
            }
            Ask::Recover => {
                let error = Error::invalid("the disk has not failed");
                return self.refuse(request.id, &error);
            }
            Ask::Snapshot { uuid, freeze } => {
                return orders.snapshots.push((asker, uuid, freeze));
            }
            Ask::Switch { uuid } => return orders.switches.push((asker, uuid)),
            Ask::Grow { size, by, smaller } => match (size, by) {
                (Some(size), None) if smaller => {
                    return orders.growths.push((asker, Wanted::Down(size)));
                }
                (Some(size), None) => return orders.growths.push((asker, Wanted::To(size))),
                (None, Some(by)) if !smaller => {
                    return orders.growths.push((asker, Wanted::By(by)));
                }
                _ => {
                    let error = Error::invalid("either `size` or `by` says how large");
                    return self.refuse(request.id, &error);
                }
            },
            Ask::Compact { rate } => return orders.compactions.push((asker, rate)),
            Ask::Limit { bytes } => return orders.limits.push((asker, bytes)),
            Ask::Replace { uuid, file, rate } => {
                return orders.replacements.push((asker, uuid, file, rate));
            }
            Ask::Track(ask) => return orders.tracks.push((asker, ask)),
            Ask::Freeze { timeout_ms } => {
                self.thawed = None;
                return orders.freezes.push((asker, timeout_ms));
            }
            Ask::Thaw => return orders.thaws.push(asker),
            Ask::Mark { uuid } => return orders.marks.push((asker, uuid)),
            Ask::Remove { uuid, rate } => return orders.removals.push((asker, uuid, rate)),
        };
        self.accept(request.id, result);
    }

    fn accept(&mut self, id: u64, result: Value) {
        self.say(&json!(Answer {
            id,
            result: Some(result),
            error: None,
            progress: None,
        }));
    }

    fn refuse(&mut self, id: u64, error: &Error) {
        self.say(&json!(Answer {
            id,
            result: None,
            error: Some(Failure::from(error)),
            progress: None,
        }));
    }

    fn send(&mut self, counters: Option<BorrowedFd<'_>>) -> bool {
        while !self.output.is_empty() {
            match self.send_some(counters) {
                Ok(n) => {
                    self.output.drain(..n);
                    self.passing.iter_mut().for_each(|at| *at -= n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Sends up to the next answer that a descriptor goes with: it belongs to that one's first
    /// byte.
    fn send_some(&mut self, counters: Option<BorrowedFd<'_>>) -> io::Result<usize> {
        let passes = self.passing.front() == Some(&0);
        let end = self.passing.get(usize::from(passes)).copied();
        let part = self.output.get(..end.unwrap_or(self.output.len()));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [counters.unwrap_or(self.stream.as_fd())];
        if passes && counters.is_some() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let data = [IoSlice::new(part.unwrap_or_default())];
        let sent = sendmsg(&self.stream, &data, &mut control, SendFlags::NOSIGNAL)?;
        if passes && sent > 0 {
            self.passing.pop_front();
        }
        Ok(sent)
    }
}

fn http(body: &str) -> Vec<u8> {
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    (head + body).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};

    struct Known(State);

    impl Oracle for Known {
        fn state(&self) -> &State {
            &self.0
        }

        fn stat(&self) -> Figures {
            Figures::default()
        }

        fn counters(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn is_held(&self) -> bool {
            true
        }
    }

    fn known(path: &str) -> Known {
        Known(State::sample(path))
    }

    fn asking(run: &Path, method: &str) -> UnixStream {
        let mut client = UnixStream::connect(run.join(SOCKET)).expect("connected");
        writeln!(client, "{{\"id\":1,\"method\":\"{method}\"}}").expect("asked");
        client
    }

    #[test]
    fn more_clients_than_there_is_room_for_are_all_answered_when_they_ask_at_once() {
        let run = tempfile::tempdir().expect("temp dir");
        let mut control = Control::listen(run.path()).expect("sockets");
        let clients: Vec<_> = (0..100).map(|_| asking(run.path(), "state")).collect();
        for _ in 0..20 {
            control.turn(&known("/ct/1"));
        }
        assert!(control.clients.len() <= CLIENTS_MAX);
        for (n, client) in clients.into_iter().enumerate() {
            let lines = BufReader::new(client).lines().take(2);
            let lines: Vec<_> = lines.map_while(io::Result::ok).collect();
            assert!(
                lines.len() == 2 && lines[1].contains("/ct/1"),
                "{n}: {lines:?}"
            );
        }
    }

    #[test]
    fn who_follows_events_and_reads_none_is_hung_up_on_before_the_next_turn() {
        let run = tempfile::tempdir().expect("temp dir");
        let mut control = Control::listen(run.path()).expect("sockets");
        let known = known("/ct/1");
        let follower = asking(run.path(), "events");
        control.turn(&known);
        let mut events = 0;
        while let Some(client) = control.clients.first() {
            assert!(client.output.len() <= BACKLOG_MAX, "{events} events");
            control.announce(&known.0);
            events += 1;
        }
        assert!(events > 1);
        drop(follower);
    }
}
