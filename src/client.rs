//! Client: how a program asks the keeper of an attached disk, over the control socket in its run
//! directory.
//!
//! The language is [`control`](crate::serve::supervise::control)'s. Nothing here waits for ever,
//! except for events: a keeper that does not answer is an error of kind `TimedOut`. What answers
//! bring along (descriptors) is handed out with the answer that it came with.

use crate::counters::Watched;
use crate::image::grow::Wanted;
use crate::rundir::{Departure, State};
use crate::serve::supervise::control::{
    Answer, Ask, BACKLOG_MAX, Far, Figures, Greeting, PROTO, Request, SOCKET, TrackAsk,
};
use ploop_formats::{Error, Kind, Result};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, socket_with,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a keeper may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to freeze a disk.
const FREEZE_PATIENCE: Duration = Duration::from_secs(600);
/// How long who follows may not be asked whether it goes on.
const BLINK: Duration = Duration::from_millis(50);
/// Keepers asked at once: each costs a descriptor, of which there are 1024 by default.
const TOGETHER: usize = 256;
/// How long a keeper that hung up may take to be gone.
const FAREWELL: Duration = Duration::from_secs(2);
/// Shortest time that a socket is waited at: 0 would mean for ever.
const INSTANT: Duration = Duration::from_millis(1);

/// The other end of a control socket.
#[derive(Debug)]
pub struct Remote {
    stream: UnixStream,
    /// What was received and is no whole line yet.
    input: Vec<u8>,
    passed: VecDeque<OwnedFd>,
    /// What was heard of the end of a freeze.
    thawed: Option<Value>,
    run: PathBuf,
    /// To tell, once the events end, whether the disk is detached.
    departure: Option<Departure>,
    /// When an answer is late; `None` waits for ever.
    due: Option<Instant>,
    next: u64,
}

/// What an answer to request `id` says.
fn answered(answer: Answer, id: u64) -> Result<Value> {
    match (answer.error, answer.result) {
        (Some(failure), _) => Err(failure.into()),
        (None, Some(result)) if answer.id == id => Ok(result),
        _ => Err(Error::new(Kind::Io, "control socket: an answer to nothing")),
    }
}

impl Remote {
    /// Connects to the keeper of a run directory. `NotFound` or `Io` when none listens there,
    /// `Unsupported` when it speaks another language.
    pub fn connect(run: &Path) -> Result<Self> {
        let mut remote = Self::dial(run, Instant::now() + PATIENCE)?;
        remote.greeting()?;
        Ok(remote)
    }

    fn dial(run: &Path, due: Instant) -> Result<Self> {
        let path = run.join(SOCKET);
        let dialled = || {
            let address = SocketAddrUnix::new(&path)?;
            let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
            let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
            // Bounds the connection, too: a keeper that hangs accepts nobody.
            set_socket_timeout(&socket, Timeout::Send, Some(left(due)))?;
            connect(&socket, &address)?;
            Ok(UnixStream::from(socket))
        };
        let stream = dialled().map_err(|e: rustix::io::Errno| failed(e).at(path.display()))?;
        Ok(Self {
            stream,
            input: Vec::new(),
            passed: VecDeque::new(),
            thawed: None,
            run: run.to_path_buf(),
            departure: None,
            due: Some(due),
            next: 0,
        })
    }

    fn greeting(&mut self) -> Result<()> {
        let greeting: Greeting = self.hear()?;
        match greeting.proto {
            PROTO => Ok(()),
            other => Err(Error::unsupported(format!(
                "ploopd {} speaks control protocol {other}, this is {PROTO}",
                greeting.version
            ))),
        }
    }

    /// Asks, and waits for the answer.
    pub fn ask(&mut self, ask: Ask) -> Result<Value> {
        self.due = Some(Instant::now() + PATIENCE);
        let id = self.tell(ask)?;
        self.answer(id)
    }

    /// What the disk is doing.
    pub fn state(&mut self) -> Result<State> {
        self.ask(Ask::State).and_then(|v| parse(v, "state"))
    }

    /// The counters and what the disk takes on the host, as they are now.
    pub fn stat(&mut self) -> Result<Figures> {
        self.ask(Ask::Stat).and_then(|v| parse(v, "figures"))
    }

    /// Freezes the top under a GUID, or a random one, and with `freeze` the file system on the device
    /// meanwhile; what came of it. A busy disk may take a while to make durable what it holds.
    pub fn snapshot(&mut self, uuid: Option<String>, freeze: bool) -> Result<Value> {
        self.due = Some(Instant::now() + FREEZE_PATIENCE);
        let id = self.tell(Ask::Snapshot { uuid, freeze })?;
        self.answer(id)
    }

    /// Goes back to a frozen point; what came of it.
    pub fn switch(&mut self, uuid: String) -> Result<Value> {
        self.due = Some(Instant::now() + FREEZE_PATIENCE);
        let id = self.tell(Ask::Switch { uuid })?;
        self.answer(id)
    }

    /// Gives the disk another size; what came of it. What lies where a larger table goes is moved
    /// meanwhile.
    pub fn grow(&mut self, wanted: Wanted) -> Result<Value> {
        self.due = Some(Instant::now() + FREEZE_PATIENCE);
        let (size, by, smaller) = match wanted {
            Wanted::To(size) => (Some(size), None, false),
            Wanted::By(by) => (None, Some(by), false),
            Wanted::Down(size) => (Some(size), None, true),
        };
        let id = self.tell(Ask::Grow { size, by, smaller })?;
        self.answer(id)
    }

    /// Makes the top's file shorter; what came of it. `far` is told how far that is, and called without
    /// news many times a second; an error of it ends it.
    pub fn compact(
        &mut self,
        rate: Option<u64>,
        far: &mut dyn FnMut(Option<Far>) -> Result<()>,
    ) -> Result<Value> {
        let id = self.tell(Ask::Compact { rate })?;
        self.follow(id, far)
    }

    /// Says what each delta may take of the host, in bytes.
    pub fn limit(&mut self, bytes: Option<u64>) -> Result<Value> {
        self.due = Some(Instant::now() + FREEZE_PATIENCE);
        let id = self.tell(Ask::Limit { bytes })?;
        self.answer(id)
    }

    /// Asks something about trackers. A set is complete only when what is being written has been.
    pub fn track(&mut self, ask: TrackAsk) -> Result<Value> {
        let waits = matches!(ask, TrackAsk::Start { .. } | TrackAsk::Seal { .. });
        let patience = if waits { FREEZE_PATIENCE } else { PATIENCE };
        self.due = Some(Instant::now() + patience);
        let id = self.tell(Ask::Track(ask))?;
        self.answer(id)
    }

    /// Keeps the disk as it is, for so long at most, until [`Remote::thaw`] or the end of this
    /// connection.
    pub fn freeze(&mut self, most: Duration) -> Result<Value> {
        self.thawed = None;
        self.due = Some(Instant::now() + most + PATIENCE);
        let timeout_ms = most.as_millis() as u64;
        let id = self.tell(Ask::Freeze { timeout_ms })?;
        self.answer(id)
    }

    /// Lets a frozen disk go on. An error says why it had gone on before.
    pub fn thaw(&mut self) -> Result<Value> {
        self.due = Some(Instant::now() + FREEZE_PATIENCE);
        let id = self.tell(Ask::Thaw)?;
        self.answer(id)
    }

    /// What the keeper says of a freeze that has ended without [`Remote::thaw`], if it has; never waits.
    /// When the keeper is gone, so is the freeze, and that is an error.
    pub fn thawed(&mut self) -> Result<Option<Value>> {
        if self.thawed.is_none() {
            self.due = Some(Instant::now());
            match self.hear::<Value>() {
                Ok(said) => self.note(said),
                Err(e) if e.kind() == Kind::TimedOut => {}
                Err(e) => return Err(e),
            }
        }
        Ok(self.thawed.take())
    }

    /// Notes what comes unasked.
    fn note(&mut self, said: Value) {
        if said["event"] == "thawed" {
            self.thawed = Some(said);
        }
    }

    /// Marks a frozen point temporary.
    pub fn mark(&mut self, uuid: String) -> Result<Value> {
        self.due = Some(Instant::now() + FREEZE_PATIENCE);
        let id = self.tell(Ask::Mark { uuid })?;
        self.answer(id)
    }

    /// Takes a frozen point away; what came of it. `far` as in [`Remote::compact`].
    pub fn remove(
        &mut self,
        uuid: String,
        rate: Option<u64>,
        far: &mut dyn FnMut(Option<Far>) -> Result<()>,
    ) -> Result<Value> {
        let id = self.tell(Ask::Remove { uuid, rate })?;
        self.follow(id, far)
    }

    /// Gives a frozen point another file; what came of it. `far` as in [`Remote::compact`].
    pub fn replace(
        &mut self,
        uuid: String,
        file: String,
        rate: Option<u64>,
        far: &mut dyn FnMut(Option<Far>) -> Result<()>,
    ) -> Result<Value> {
        let id = self.tell(Ask::Replace { uuid, file, rate })?;
        self.follow(id, far)
    }

    /// Hears how far a request is, and its answer. What is ended is waited for, too: until then the
    /// disk is being changed.
    fn follow(&mut self, id: u64, far: &mut dyn FnMut(Option<Far>) -> Result<()>) -> Result<Value> {
        let (mut heard, mut ended) = (Instant::now(), None);
        loop {
            self.due = Some(Instant::now() + BLINK);
            let news = match self.hear::<Answer>() {
                Ok(answer) if answer.progress.is_some() => {
                    heard = Instant::now();
                    answer.progress
                }
                // To what ended it.
                Ok(answer) if answer.id != id && answer.error.is_none() => None,
                Ok(answer) => {
                    // A keeper that does not understand the end of it knows no number, either.
                    let is_other = answer.id != id;
                    return answered(answer, id).map_err(|e| match ended {
                        Some(why) if is_other || e.kind() == Kind::Cancelled => why,
                        _ => e,
                    });
                }
                Err(e) if e.kind() == Kind::TimedOut && heard.elapsed() < FREEZE_PATIENCE => None,
                Err(e) => return Err(ended.unwrap_or(e)),
            };
            if ended.is_none()
                && let Err(why) = far(news)
            {
                self.tell(Ask::Cancel { request: id })?;
                (heard, ended) = (Instant::now(), Some(why));
            }
        }
    }

    /// The counters, to be watched without asking again. `Invalid` or `Unsupported` when the
    /// keeper is of a release that does not pass them, or counts otherwise.
    pub fn watch(&mut self) -> Result<Watched> {
        self.ask(Ask::Counters)?;
        self.watched()
    }

    /// The counters behind the descriptor that came.
    fn watched(&mut self) -> Result<Watched> {
        let missing = || Error::unsupported("control socket: no descriptor came with the counters");
        Watched::from_fd(self.passed.pop_front().ok_or_else(missing)?)
    }

    /// Asks for events: each call of [`Remote::event`] gives one.
    pub fn subscribe(&mut self) -> Result<()> {
        self.departure = Departure::of(&self.run);
        self.tell(Ask::Events)?;
        self.due = None;
        Ok(())
    }

    /// The next event; `None` once the disk is detached. Waits. A disk that was not closed cleanly
    /// is an error, and so is the end of events of a disk that goes on: its keeper hangs up on who
    /// leaves too much unread.
    pub fn event(&mut self) -> Result<Option<Value>> {
        match self.hear() {
            Err(e) if e.kind() == Kind::NotFound => self.departed().map(|()| None),
            event => event.map(Some),
        }
    }

    fn departed(&mut self) -> Result<()> {
        let Some(departure) = &mut self.departure else {
            return Ok(());
        };
        let hung_up = || {
            Error::new(
                Kind::Io,
                "the keeper hung up, and the disk is still attached",
            )
        };
        let outcome = departure.wait(FAREWELL)?.ok_or_else(hung_up)?;
        outcome
            .failure
            .map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// Sends a request; its number.
    fn tell(&mut self, ask: Ask) -> Result<u64> {
        self.next += 1;
        let id = self.next;
        let mut text = serde_json::to_vec(&Request { id, ask }).map_err(io::Error::from)?;
        text.push(b'\n');
        self.stream.write_all(&text).map_err(gone)?;
        Ok(id)
    }

    fn answer(&mut self, id: u64) -> Result<Value> {
        loop {
            let said: Value = self.hear()?;
            match said.get("event") {
                Some(_) => self.note(said),
                None => return answered(parse(said, "control socket")?, id),
            }
        }
    }

    /// The next line.
    fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        loop {
            if let Some(end) = self.input.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                let line = serde_json::from_slice(&line);
                return line.map_err(|e| Error::invalid(format!("control socket: {e}")));
            }
            if self.input.len() > BACKLOG_MAX {
                return Err(Error::invalid("control socket: a line without end"));
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Result<()> {
        set_socket_timeout(&self.stream, Timeout::Recv, self.due.map(left)).map_err(failed)?;
        let mut buf = [0u8; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let data = &mut [IoSliceMut::new(&mut buf)];
        let got = match recvmsg(&self.stream, data, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => got.bytes,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(gone(e.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.passed.extend(fds);
            }
        }
        if got == 0 {
            return Err(Error::new(Kind::NotFound, "the keeper is gone"));
        }
        self.input
            .extend_from_slice(buf.get(..got).unwrap_or_default());
        Ok(())
    }
}

impl AsFd for Remote {
    /// Becomes readable when the keeper says something, or is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Asks many keepers the same questions and waits for all of them together: those that hang cost
/// `patience` once, not each ([`TOGETHER`] at a time). The answers are in the order of the run
/// directories, and each keeper's in that of the questions.
pub fn ask_all<P: AsRef<Path>>(
    runs: &[P],
    asks: &[Ask],
    patience: Duration,
) -> Vec<Result<Vec<Value>>> {
    together(runs, asks, patience, |mut asked| asked.answers())
}

/// [`Remote::watch`] of many keepers, all asked together.
pub fn watch_all<P: AsRef<Path>>(runs: &[P], patience: Duration) -> Vec<Result<Watched>> {
    together(runs, &[Ask::Counters], patience, |mut asked| {
        asked.answers()?;
        asked.remote.watched()
    })
}

/// A keeper that has its questions and owes the greeting and the answers.
struct Asked {
    remote: Remote,
    ids: Vec<u64>,
}

impl Asked {
    fn answers(&mut self) -> Result<Vec<Value>> {
        self.remote.greeting()?;
        let ids = self.ids.iter();
        ids.map(|id| self.remote.answer(*id)).collect()
    }
}

/// Asks many keepers, and makes of each what `outcome` makes of its answers.
fn together<P: AsRef<Path>, T>(
    runs: &[P],
    asks: &[Ask],
    patience: Duration,
    outcome: impl Fn(Asked) -> Result<T>,
) -> Vec<Result<T>> {
    let asked = |runs| ask_some(runs, asks, patience);
    let asked = runs.chunks(TOGETHER).flat_map(asked);
    asked.map(|asked| outcome(asked?)).collect()
}

/// Every keeper has its questions before the first answer is waited for.
fn ask_some<P: AsRef<Path>>(runs: &[P], asks: &[Ask], patience: Duration) -> Vec<Result<Asked>> {
    let due = Instant::now() + patience;
    let tell = |run: &P| {
        let mut remote = Remote::dial(run.as_ref(), due)?;
        let ids = asks.iter().map(|ask| remote.tell(ask.clone()));
        let ids = ids.collect::<Result<_>>()?;
        Ok(Asked { remote, ids })
    };
    let mut asked: Vec<Result<Asked>> = runs.iter().map(tell).collect();
    // To ask many takes a while, too, on a busy host: the last one asked has its time.
    let due = Instant::now() + patience;
    for asked in asked.iter_mut().flatten() {
        asked.remote.due = Some(due);
    }
    asked
}

/// An answer as what it should be.
pub fn parse<T: DeserializeOwned>(value: Value, what: &str) -> Result<T> {
    serde_json::from_value(value).map_err(|e| Error::invalid(format!("{what}: {e}")))
}

/// A number that an answer of a keeper has.
pub fn number(said: &Value, name: &str) -> Result<u64> {
    let number = said.get(name).and_then(Value::as_u64);
    number.ok_or_else(|| Error::invalid(format!("control socket: an answer without {name}")))
}

fn left(due: Instant) -> Duration {
    due.saturating_duration_since(Instant::now()).max(INSTANT)
}

fn failed(e: rustix::io::Errno) -> Error {
    gone(io::Error::from(e))
}

/// What an error of the socket means for who asked.
fn gone(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::WouldBlock => Error::new(
            Kind::TimedOut,
            "the keeper does not answer; it hangs, or is stopped",
        ),
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionRefused => Error::new(Kind::NotFound, "the keeper is gone"),
        _ => Error::from(e),
    }
}
