//! Listening, counting, stopping.
//!
//! Negotiations run as tasks of the caller's executor: they are anonymous, cheap, bounded in time
//! and number, and touch no data. A client that has negotiated gets a seat, a thread and an
//! executor of its own, so that none waits for another. Errors of one connection end that
//! connection, and are said once, in the log.

use super::credentials::Identity;
use super::handshake::{self, Handshake, Offer, Step, Terms};
use super::intake::End;
use super::limits;
use super::link::Link;
use super::proto;
use super::session::{self, Summary};
use super::stop::{Stop, Watcher};
use crate::device::Device;
use crate::io::exec::{self, Engine};
use crate::sandbox;
use crate::serve::complaints::Complaints;
use crate::tracker::Registry;
use bytes::{Bytes, BytesMut};
use ploop_formats::{Error, Kind, Result};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use tokio::sync::watch;
use tracing::{info, warn};

/// What clients see of the device.
#[derive(Debug, Clone, Default)]
pub struct Export {
    /// Its name, at most 4096 bytes; clients reach it by the empty name, too.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// TLS, as clients are offered it.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The server's key, and what it asks of clients.
    pub identity: Identity,
    /// Whether clients without TLS are refused.
    pub required: bool,
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct Options {
    /// What clients see.
    pub export: Export,
    /// TLS, if there is any.
    pub tls: Option<Tls>,
    /// Negotiated connections at once; more are refused.
    pub max_connections: usize,
    /// Stop once the last client has left, after at least one came.
    pub end_with_last_client: bool,
    /// The process is in the sandbox: threads of clients give up what only starting needs.
    pub confined: bool,
    /// Trackers whose generations clients may ask for.
    pub registry: Option<Arc<Registry>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            export: Export::default(),
            tls: None,
            max_connections: limits::CONNECTIONS_DEFAULT,
            end_with_last_client: false,
            confined: false,
            registry: None,
        }
    }
}

/// An NBD server for one device. Clones are handles to the same server.
#[derive(Debug)]
pub struct Server<D>(Arc<Inner<D>>);

impl<D> Clone for Server<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Inner<D> {
    device: Arc<D>,
    options: Options,
    engine: Engine,
    stop: Stop,
    count: Count,
    failures: Complaints,
}

impl<D: Device + Send + Sync + 'static> Server<D> {
    /// A server that has no client yet. `engine` drives the threads of its connections.
    pub fn new(device: Arc<D>, options: Options, engine: Engine) -> Result<Self> {
        if options.export.name.len() > limits::NAME_MAX || options.export.name.contains('\0') {
            return Err(Error::invalid(
                "an export name is at most 4096 bytes and holds no NUL",
            ));
        }
        let (stop, count) = (Stop::default(), Count::default());
        Ok(Self(Arc::new(Inner {
            device,
            options,
            engine,
            stop,
            count,
            failures: Complaints::new(),
        })))
    }

    /// Accepts no more, lets what was asked for finish and be answered, closes. From any thread.
    pub fn stop(&self) {
        self.0.stop.set();
    }

    /// Negotiated connections, now.
    pub fn connections(&self) -> usize {
        self.0.count.now().established
    }

    /// Serves everybody who connects to `listeners` (stream sockets that listen), until stopped or,
    /// if the options say so, until the last client has left. Returns once every connection is
    /// closed and everything that was asked for is done. Runs on an executor.
    ///
    /// Fails when a listener breaks; those who are connected are served to their end first.
    pub async fn serve(&self, listeners: Vec<OwnedFd>) -> Result<()> {
        if listeners.is_empty() {
            return Err(Error::invalid("no socket to listen on"));
        }
        let lobby = Rc::new(Lobby::default());
        let mut loops: Vec<Loop<'_>> = Vec::new();
        for fd in listeners {
            loops.push(Box::pin(self.accept_all(Arc::new(fd), Rc::clone(&lobby))));
        }
        if self.0.options.end_with_last_client {
            loops.push(Box::pin(async {
                self.0
                    .count
                    .until(|now| now.seated != 0 && now.established == 0)
                    .await;
                Ok(())
            }));
        }
        let result = first(&mut loops).await;
        drop(loops);
        if result.is_ok() {
            self.stop();
        }
        self.0
            .count
            .until(|now| now.established == 0 && now.negotiating == 0)
            .await;
        result
    }

    /// Serves one client over a socket (the same descriptor twice) or a pair of pipes, on the
    /// caller's executor. Returns when it has left and everything that it asked for is done.
    pub async fn serve_connection(&self, input: Arc<OwnedFd>, output: Arc<OwnedFd>) -> Result<()> {
        prepare(&input);
        let mut link = Link::new(input, output);
        let mut stop = self.0.stop.watcher();
        let negotiated = self.negotiate(&mut link, &mut stop).await;
        let negotiated = negotiated.map_err(|why| Error::from(why).at("NBD client"))?;
        let Some(Agreed { terms, early, seat }) = negotiated else {
            return Ok(());
        };
        let device = Arc::clone(&self.0.device);
        let summary = session::run(link, early, device, terms, &self.0.stop).await;
        report(seat.number, &summary);
        drop(seat);
        match summary.end {
            End::Client | End::Stopped => Ok(()),
            End::Lost(error) => Err(Error::from(error).at("NBD client")),
            End::Violation(text) => Err(Error::invalid(text).at("NBD client")),
        }
    }

    async fn accept_all(&self, listener: Arc<OwnedFd>, lobby: Rc<Lobby>) -> Result<()> {
        let mut stop = self.0.stop.watcher();
        loop {
            match stop.or(exec::accept(&listener)).await {
                None => return Ok(()),
                Some(Ok(fd)) => self.welcome(Arc::new(fd), &lobby),
                Some(Err(error)) if is_temporary(&error) => {
                    warn!("NBD: cannot accept a connection now: {error}");
                    stop.or(exec::sleep(limits::ACCEPT_PAUSE)).await;
                }
                Some(Err(error)) => return Err(Error::from(error).at("accepting NBD connections")),
            }
        }
    }

    /// Starts a negotiation beside the others.
    fn welcome(&self, fd: Arc<OwnedFd>, lobby: &Rc<Lobby>) {
        prepare(&fd);
        let (server, place) = (self.clone(), lobby.enter(&fd));
        let guest = self.0.count.admit_guest();
        exec::spawn(async move {
            let mut link = Link::new(Arc::clone(&fd), fd);
            let mut stop = server.0.stop.watcher();
            match server.negotiate(&mut link, &mut stop).await {
                Ok(Some(agreed)) => server.start(link, agreed),
                Ok(None) => {}
                // Anybody who can connect can fail, as often as they like.
                Err(error) => {
                    let error = Error::new(Kind::Io, error.to_string());
                    server.0.failures.about("an NBD negotiation", &error);
                }
            }
            drop((place, guest));
        });
    }

    /// Negotiates within the deadline. `None` when the client, or the server, ended it in peace.
    async fn negotiate(&self, link: &mut Link, stop: &mut Watcher) -> io::Result<Option<Agreed>> {
        let talk = exec::timeout(limits::HANDSHAKE_DEADLINE, self.talk(link));
        let agreed = match stop.or(talk).await {
            None => Ok(None),
            Some(Some(result)) => result,
            Some(None) => Err(io::ErrorKind::TimedOut.into()),
        };
        if !matches!(agreed, Ok(Some(_))) {
            link.say_goodbye();
        }
        agreed
    }

    async fn talk(&self, link: &mut Link) -> io::Result<Option<Agreed>> {
        let mut handshake = Handshake::new(self.tls());
        let (mut input, mut scratch) = (BytesMut::new(), BytesMut::zeroed(4096));
        let mut out = proto::greeting().to_vec();
        loop {
            let step = handshake.advance(&self.offer(), &mut input, &mut out);
            let next = self.decide(&handshake, step, &mut out);
            if !out.is_empty() {
                link.send_all(vec![Bytes::from(std::mem::take(&mut out))])
                    .await?;
            }
            match next {
                Next::Go(terms, seat) => {
                    return Ok(Some(Agreed {
                        terms,
                        early: input,
                        seat,
                    }));
                }
                Next::Leave => return Ok(None),
                Next::Drop(why) => return Err(io::Error::other(why)),
                Next::Again => continue,
                Next::Secure(identity) => link.secure(&identity).await?,
                Next::Receive => {}
            }
            let got;
            (scratch, got) = link.recv(scratch).await;
            match got? {
                0 => return Ok(None),
                got => input.extend_from_slice(scratch.get(..got).unwrap_or_default()),
            }
        }
    }

    /// What to do after a step; a client that wants to start needs a seat.
    fn decide(&self, handshake: &Handshake, step: Step, out: &mut Vec<u8>) -> Next {
        let start = match step {
            Step::More => return Next::Receive,
            Step::Abort => return Next::Leave,
            Step::Drop(why) => return Next::Drop(why),
            Step::StartTls => return self.secure(),
            Step::Start(start) => start,
        };
        const FULL: &str = "all connections are taken, try again later";
        match self.0.count.take_seat(self.0.options.max_connections) {
            Some(seat) => {
                handshake.accept(&self.offer(), &start, out);
                Next::Go(start.terms, seat)
            }
            None if handshake.refuse(&start, FULL, out) => Next::Again,
            None => Next::Drop(FULL.into()),
        }
    }

    fn tls(&self) -> handshake::Tls {
        match &self.0.options.tls {
            None => handshake::Tls::Off,
            Some(Tls { required: true, .. }) => handshake::Tls::Required,
            Some(_) => handshake::Tls::Allowed,
        }
    }

    fn secure(&self) -> Next {
        let tls = self.0.options.tls.as_ref();
        let tls = tls.expect("a negotiation turns to TLS only where there is one");
        Next::Secure(tls.identity.clone())
    }

    fn offer(&self) -> Offer<'_> {
        let Inner {
            device, options, ..
        } = &*self.0;
        let preferred = device.preferred_block().clamp(4096, limits::PAYLOAD_MAX);
        Offer {
            name: &options.export.name,
            description: &options.export.description,
            size: device.size(),
            read_only: device.read_only(),
            preferred: preferred.next_power_of_two() as u32,
            registry: options.registry.as_deref(),
        }
    }

    /// Gives a client its thread.
    fn start(&self, link: Link, agreed: Agreed) {
        let server = self.clone();
        let number = agreed.seat.number;
        let thread = std::thread::Builder::new().name(format!("nbd-{number}"));
        let started = thread.spawn(move || {
            let Agreed { terms, early, seat } = agreed;
            let Inner {
                device,
                engine,
                stop,
                options,
                ..
            } = &*server.0;
            let session = async {
                if options.confined {
                    sandbox::narrow()?;
                }
                Ok::<_, Error>(session::run(link, early, Arc::clone(device), terms, stop).await)
            };
            match exec::run(*engine, session) {
                Ok(Ok(summary)) => report(number, &summary),
                Ok(Err(error)) => warn!("NBD connection {number}: {error}"),
                Err(error) => warn!("NBD connection {number}: no executor: {error}"),
            }
            // Last, so that whoever waits for the seat finds the device released.
            drop(server);
            drop(seat);
        });
        if let Err(error) = started {
            warn!("NBD connection {number}: no thread: {error}");
        }
    }
}

/// Over TCP, answers leave at once, and a peer whose machine is gone is found out although it never
/// says so: it would keep its seat. Refused by what is no TCP socket, and not needed there.
fn prepare(fd: &OwnedFd) {
    use rustix::net::sockopt;
    let _ = sockopt::set_tcp_nodelay(fd, true);
    let _ = sockopt::set_tcp_keepidle(fd, limits::TCP_IDLE);
    let _ = sockopt::set_tcp_keepintvl(fd, limits::TCP_PROBE_EVERY);
    let _ = sockopt::set_tcp_keepcnt(fd, limits::TCP_PROBES);
    let _ = sockopt::set_socket_keepalive(fd, true);
}

/// A client that may begin.
struct Agreed {
    terms: Terms,
    /// What it sent behind the negotiation.
    early: BytesMut,
    seat: Seat,
}

enum Next {
    Receive,
    /// Look at what was received already.
    Again,
    Go(Terms, Seat),
    /// Turn to TLS.
    Secure(Identity),
    Leave,
    Drop(String),
}

type Loop<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// The output of whichever is ready first.
async fn first(loops: &mut [Loop<'_>]) -> Result<()> {
    poll_fn(|cx| {
        let mut results = loops.iter_mut().map(|one| one.as_mut().poll(cx));
        results.find(Poll::is_ready).unwrap_or(Poll::Pending)
    })
    .await
}

/// What a later attempt may not meet: a client that left, or a shortage.
fn is_temporary(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    !matches!(
        errno,
        Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP | Errno::FAULT)
    )
}

/// The one log line of a connection.
fn report(number: u64, summary: &Summary) {
    let Summary {
        end,
        served,
        failed,
        first_failure,
    } = summary;
    let why = match end {
        End::Client => "the client left".to_string(),
        End::Stopped => "the server stops".to_string(),
        End::Lost(error) => format!("lost: {error}"),
        End::Violation(text) => format!("the client broke the protocol: {text}"),
    };
    match first_failure {
        None => info!("NBD connection {number}: {why}, after {served} requests"),
        Some(first) => warn!(
            "NBD connection {number}: {why}, after {served} requests; {failed} failed, first: {first}"
        ),
    }
}

/// Negotiations in progress, oldest first.
#[derive(Debug, Default)]
struct Lobby(RefCell<VecDeque<Arc<OwnedFd>>>);

impl Lobby {
    /// Adds one; the oldest is cut off when there are too many.
    fn enter(self: &Rc<Self>, fd: &Arc<OwnedFd>) -> Place {
        let mut waiting = self.0.borrow_mut();
        if waiting.len() >= limits::HANDSHAKES_MAX
            && let Some(oldest) = waiting.pop_front()
        {
            // Its task sees the end of the stream. It may have left already, which is as well.
            let _ = rustix::net::shutdown(&oldest, rustix::net::Shutdown::Both);
        }
        waiting.push_back(Arc::clone(fd));
        Place {
            lobby: Rc::clone(self),
            fd: Arc::clone(fd),
        }
    }
}

/// A negotiation's place among the others; left by dropping it.
struct Place {
    lobby: Rc<Lobby>,
    fd: Arc<OwnedFd>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.lobby
            .0
            .borrow_mut()
            .retain(|fd| !Arc::ptr_eq(fd, &self.fd));
    }
}

/// How many clients there are; shared by all threads.
#[derive(Debug, Clone, Default)]
struct Count(Arc<watch::Sender<Clients>>);

#[derive(Debug, Clone, Copy, Default)]
struct Clients {
    negotiating: usize,
    established: usize,
    /// Clients that ever got a seat.
    seated: u64,
}

impl Count {
    fn now(&self) -> Clients {
        *self.0.borrow()
    }

    async fn until(&self, condition: impl Fn(&Clients) -> bool) {
        // The sender lives in `self`.
        let _ = self.0.subscribe().wait_for(|now| condition(now)).await;
    }

    fn take_seat(&self, max: usize) -> Option<Seat> {
        let mut number = None;
        self.0.send_if_modified(|now| {
            if now.established < max {
                now.established += 1;
                now.seated += 1;
                number = Some(now.seated);
            }
            number.is_some()
        });
        number.map(|number| Seat {
            count: self.clone(),
            number,
        })
    }

    fn admit_guest(&self) -> Guest {
        self.0.send_modify(|now| now.negotiating += 1);
        Guest(self.clone())
    }
}

/// A negotiated connection; given back by dropping it.
#[derive(Debug)]
struct Seat {
    count: Count,
    number: u64,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.count.0.send_modify(|now| now.established -= 1);
    }
}

/// A connection in negotiation; given back by dropping it.
struct Guest(Count);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.0.send_modify(|now| now.negotiating -= 1);
    }
}
