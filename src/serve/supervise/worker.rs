//! Worker: opens the image and serves it. It may die at any moment; everything it has answered is
//! in the files or in the ledger.
//!
//! In order: the files, the fence, what the page cache believes, what the kernel lost, the ledger,
//! the stack, the resend, "ready", service. The fence comes before the first byte of the top is
//! looked at: a dead predecessor's last writes may still be landing.

use super::child::{CONTROL_FD, MESSAGE_MAX};
use super::halt::{Halt, Porter};
use super::inherit;
use super::message::{Cache, Event, Failure, Order, Track, WorkerConfig, WorkerMode, WorkerTls};
use super::packet;
use super::trackers::{self, Clerk};
use super::turnover::{self, Ordered, Turnover};
use crate::counters::{Counted, Counters};
use crate::device::Device;
use crate::disk::Disk;
use crate::gate::{Gate, Gated};
use crate::image::chain::Chain;
use crate::image::open::{self, Top};
use crate::io::exec::{self, Engine};
use crate::io::file::FileStore;
use crate::io::memfd::{self, SharedWords};
use crate::io::room::Limit;
use crate::sandbox;
use crate::serve::broken::Broken;
use crate::serve::nbd::credentials::Credentials;
use crate::serve::{fuse, nbd};
use crate::stack::AnyLayer;
use crate::tracker::{Registry, Tracked};
use bytes::Bytes;
use futures_util::future::{Either, select};
use ploop_formats::descriptor::Descriptor;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::header::Version;
use ploop_formats::{Error, Result};
use rustix::net::RecvFlags;
use rustix::process::Signal;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// How long changes that nobody flushes wait for it.
const WRITE_BACK: Duration = Duration::from_secs(5);
/// Time between two reports of the same.
const REPORT_PAUSE: Duration = Duration::from_millis(250);

/// Runs a worker to its end: a clean one returns `Ok`, with the image closed.
pub fn run() -> Result<()> {
    die_of_panics();
    // The end of the socket pair says the same, for a keeper that died before this call.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(io::Error::from)?;
    let control = Arc::new(inherit::take(CONTROL_FD)?);
    let config = first_message(&control)?;
    if let WorkerMode::Fuse { .. } = config.mode {
        keep_out_of_reclaim();
    }
    let (engine, why) = Engine::detect();
    tracing::info!(
        "I/O engine: {}{}",
        name(engine),
        why.map_or(String::new(), |w| format!(" ({w})"))
    );
    let ended = exec::run(engine, async {
        let done = serve(&control, config, engine).await;
        let words = match &done {
            Ok(()) => Event::Closed,
            Err(e) => Event::Failed(Failure::from(e)),
        };
        say(&control, &words).await?;
        done
    });
    ended.map_err(|e| Error::from(e).at("the I/O engine"))?
}

/// A thread that panics takes the process with it, before anything of its is dropped. A request
/// that is given up half-way may still be writing; the next worker waits for that behind the fence,
/// and what was not answered is asked again.
fn die_of_panics() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        std::process::abort();
    }));
}

fn name(engine: Engine) -> &'static str {
    match engine {
        Engine::Ring => "io_uring",
        Engine::Poll => "poll",
    }
}

fn first_message(control: &OwnedFd) -> Result<WorkerConfig> {
    let mut buf = vec![0u8; MESSAGE_MAX];
    let (_, len) = rustix::net::recv(control, buf.as_mut_slice(), RecvFlags::empty())
        .map_err(io::Error::from)?;
    let text = buf.get(..len).unwrap_or_default();
    serde_json::from_slice(text).map_err(|e| Error::invalid(format!("worker configuration: {e}")))
}

/// Memory that this process asks for while it serves a disk must not wait for that disk.
fn keep_out_of_reclaim() {
    if let Err(e) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::info!("not marked as an I/O flusher ({e}): CAP_SYS_RESOURCE is missing");
    }
}

pub(super) async fn say(control: &Arc<OwnedFd>, event: &Event) -> Result<()> {
    let text = serde_json::to_vec(event).map_err(io::Error::from)?;
    Ok(exec::send_all(control, vec![Bytes::from(text)]).await?)
}

/// Opens the disk, serves it, and closes it.
async fn serve(control: &Arc<OwnedFd>, config: WorkerConfig, engine: Engine) -> Result<()> {
    let dir = inherit::take(config.dir_fd)?;
    let counters = Counters::new(Arc::new(SharedWords::from_fd(inherit::take(
        config.counters_fd,
    )?)?))?;
    confine(&dir, config.sandbox)?;
    if let WorkerMode::Broken { fds, session, size } = config.mode {
        counters.forget_unanswered();
        let device = Counted::new(Arc::new(Broken { size }), counters);
        return serve_errors(control, fds, &session, device, engine).await;
    }
    let ledger = ledger(&config)?;
    let witness = config.witness_fd.map(inherit::take).transpose()?;
    let chain = Chain::read(&dir, &config.source)?;
    let disk_now = chain.descriptor.as_ref();
    let limit = disk_now.and_then(Descriptor::max_delta_size).map(Limit);
    let disk = match &ledger {
        Some(ledger) => open_write(&config, &dir, &chain, witness, ledger.clone()).await?,
        None => {
            open::open_at(
                &dir,
                &chain,
                config.snapshot.as_deref(),
                config.cache.into(),
            )
            .await?
        }
    };
    let (top, watched) = watch::channel(disk.stack().top().store().clone());
    top.borrow().set_limit(limit);
    let disk = Arc::new(disk);
    let registry = Arc::new(trackers::take(config.trackers)?);
    // What a predecessor had not answered is asked again, of this one.
    counters.forget_unanswered();
    let tracked = Tracked::new(Arc::clone(&disk), registry.recorder());
    let gate = Gate::default();
    let gated = Gated::new(Arc::new(tracked), gate.clone());
    let device = Arc::new(Counted::new(Arc::new(gated), counters));
    let offered = Arc::clone(&registry);
    let transport = Transport::take(config.mode, &device, offered, engine, config.sandbox)?;
    if config.sandbox && !matches!(transport, Transport::Nbd { .. }) {
        // The only thread there will be.
        sandbox::narrow()?;
    }
    if let (true, Transport::Fuse { fds, session }) = (config.takeover, &transport) {
        fds.first().map_or(Ok(()), |fd| fuse::resend(fd, session))?;
    }
    let ready = Event::Ready {
        size: disk.size(),
        engine: name(engine).into(),
        cache: watched.borrow().cache().into(),
        poisoned: disk.stack().is_poisoned(),
        version: version(disk.stack().top()),
        limit: limit.map(|limit| limit.0),
    };
    say(control, &ready).await?;
    let (stop, stopped) = watch::channel(false);
    let (orders, ordered) = mpsc::unbounded_channel();
    let (tracks, asked) = mpsc::unbounded_channel();
    let (halts, halted) = mpsc::unbounded_channel();
    let heard = Heard {
        stop,
        orders,
        tracks,
        halts,
    };
    exec::spawn(hear(Arc::clone(control), heard));
    let porter = Porter {
        gate,
        device: Arc::clone(&disk),
        control: Arc::clone(control),
    };
    exec::spawn(porter.run(halted));
    let clerk = Clerk {
        registry,
        device: Arc::clone(&disk),
        control: Arc::clone(control),
    };
    exec::spawn(clerk.run(asked));
    exec::spawn(change(
        ledger.map(|ledger| Turnover {
            disk: Arc::clone(&disk),
            control: Arc::clone(control),
            top,
            ledger,
            cache: config.cache.into(),
            keep_free: config.keep_free,
            limit,
        }),
        Arc::clone(control),
        ordered,
    ));
    exec::spawn(report_low(Arc::clone(control), watched));
    exec::spawn(report_poison(Arc::clone(control), Arc::clone(&disk)));
    let (quit, quitted) = watch::channel(false);
    let (last, ended) = oneshot::channel();
    let background = write_back(Arc::clone(&disk), quitted);
    exec::spawn(async move {
        background.await;
        let _ = last.send(());
    });
    let served = transport.serve(&device, stopped).await;
    // Closing wants the disk to itself.
    quit.send_replace(true);
    let _ = ended.await;
    served?;
    disk.close().await
}

/// Opens the disk as the successor of whoever wrote to it before.
async fn open_write(
    config: &WorkerConfig,
    dir: &OwnedFd,
    chain: &Chain,
    witness: Option<OwnedFd>,
    ledger: Ledger,
) -> Result<Disk<FileStore>> {
    let patience = Duration::from_millis(config.fence_ms);
    let top = Top::fenced(dir, chain.top(), patience)?;
    let store = top.store(chain.top(), config.cache.into())?;
    store.keep_free(config.keep_free);
    if config.heal || !config.takeover {
        // The file as it is; a mere takeover goes on with what the predecessor had in memory.
        store.forget_cache()?;
    }
    // The first worker takes the file as it is, and asks so that no successor is told of the past.
    if witness.is_some_and(open::has_lost_data) && config.takeover {
        tracing::error!("{}: the host lost data of it", chain.top().display());
        ledger.poison();
    }
    let failed = ledger.is_poisoned();
    if config.heal {
        ledger.heal();
    }
    let opened = open::open_write(dir, chain, store, ledger.clone(), patience).await;
    opened.inspect_err(|_| {
        if failed {
            ledger.poison();
        }
    })
}

/// Answers every request with EIO, in place of a worker that can open the image.
async fn serve_errors(
    control: &Arc<OwnedFd>,
    fds: Vec<RawFd>,
    session: &fuse::Session,
    device: Counted<Broken>,
    engine: Engine,
) -> Result<()> {
    let fd = fds.into_iter().next();
    let fd = fd.ok_or_else(|| Error::invalid("no FUSE descriptor"))?;
    let fd = Arc::new(inherit::take(fd)?);
    fuse::resend(&fd, session)?;
    let ready = Event::Ready {
        size: device.size(),
        engine: name(engine).into(),
        cache: Cache::None,
        poisoned: true,
        version: 2,
        limit: None,
    };
    say(control, &ready).await?;
    let (stop, stopped) = watch::channel(false);
    let (orders, ordered) = mpsc::unbounded_channel();
    let heard = Heard {
        stop,
        orders,
        tracks: mpsc::unbounded_channel().0,
        halts: mpsc::unbounded_channel().0,
    };
    exec::spawn(hear(Arc::clone(control), heard));
    exec::spawn(change(None, Arc::clone(control), ordered));
    let served = fuse::serve(fd, session, Arc::new(device), wait(stopped)).await;
    served.map(|_| ())
}

/// From here on foreign bytes are looked at.
fn confine(dir: &OwnedFd, wanted: bool) -> Result<()> {
    if !wanted {
        tracing::warn!("serving without a sandbox, as asked");
        return Ok(());
    }
    if let Some(missing) = sandbox::enter(dir, sandbox::Files::Write)? {
        tracing::warn!("the sandbox is weaker than it should be: {missing}");
    }
    Ok(())
}

/// The ledger of everything answered; without it a predecessor's answers would be lost silently.
fn ledger(config: &WorkerConfig) -> Result<Option<Ledger>> {
    match config.ledger_fd {
        Some(fd) => Ok(Some(Ledger::new(Arc::new(SharedWords::from_fd(
            inherit::take(fd)?,
        )?)))),
        None => Ok(None),
    }
}

/// Where orders go.
struct Heard {
    stop: watch::Sender<bool>,
    orders: mpsc::UnboundedSender<Ordered>,
    tracks: mpsc::UnboundedSender<(Track, Vec<OwnedFd>)>,
    halts: mpsc::UnboundedSender<Halt>,
}

/// Waits for orders. A keeper that is gone ends everything at once: nobody could replace us, and
/// nobody holds the locks.
async fn hear(control: Arc<OwnedFd>, to: Heard) {
    loop {
        if exec::readable(&control).await.is_err() {
            std::process::exit(1);
        }
        match packet::receive(&control) {
            Ok(None) => {}
            Ok(Some((Order::Stop, _))) => {
                to.stop.send_replace(true);
            }
            // Who changes nothing hears nothing.
            Ok(Some((Order::Track(order), fds))) => drop(to.tracks.send((order, fds))),
            Ok(Some((Order::Halt { number, most_ms }, _))) => {
                let most = Duration::from_millis(most_ms);
                let _ = to.halts.send(Halt::Begin { number, most });
            }
            Ok(Some((Order::Resume, _))) => {
                let _ = to.halts.send(Halt::End);
            }
            Ok(Some(ordered)) => drop(to.orders.send(ordered)),
            Err(_) => std::process::exit(1),
        }
    }
}

/// Changes the disk's stack when the keeper says so. What fails half-way would leave the guest
/// waiting: the next worker reads the descriptor and goes on.
async fn change(
    turnover: Option<Turnover>,
    control: Arc<OwnedFd>,
    mut orders: mpsc::UnboundedReceiver<Ordered>,
) {
    let Some(turnover) = turnover else {
        while orders.recv().await.is_some() {
            let _ = turnover::refuse(&control).await;
        }
        return;
    };
    if let Err(e) = turnover.run(orders).await {
        tracing::error!("changing the stack: {e}");
        std::process::abort();
    }
}

/// Format version of a delta that would stand on this layer.
fn version(layer: &AnyLayer<FileStore>) -> u8 {
    match layer {
        AnyLayer::Ploop(ploop) if ploop.header().version == Version::V1 => 1,
        _ => 2,
    }
}

/// Tells the keeper when the host has little space for the top, whichever that is.
async fn report_low(control: Arc<OwnedFd>, mut top: watch::Receiver<FileStore>) {
    loop {
        let store = top.borrow_and_update().clone();
        let replaced = {
            let (low, changed) = (pin!(store.low()), pin!(top.changed()));
            matches!(select(low, changed).await, Either::Right(_))
        };
        if replaced {
            if top.has_changed().is_err() {
                return;
            }
            continue;
        }
        if let Err(e) = say(&control, &Event::Low).await {
            return tracing::warn!("{e}");
        }
        exec::sleep(REPORT_PAUSE).await;
    }
}

/// Tells the keeper that the disk has failed.
async fn report_poison(control: Arc<OwnedFd>, disk: Arc<Disk<FileStore>>) {
    disk.poisoned().await;
    if let Err(e) = say(&control, &Event::Poisoned).await {
        tracing::warn!("{e}");
    }
}

/// Bounds what a power cut can take from a guest that never flushes.
async fn write_back(disk: Arc<Disk<FileStore>>, quitted: watch::Receiver<bool>) {
    let mut quit = pin!(wait(quitted));
    loop {
        let due = pin!(async {
            disk.changed().await;
            exec::sleep(WRITE_BACK).await;
        });
        if let Either::Left(_) = select(quit.as_mut(), due).await {
            return;
        }
        if let Err(e) = disk.write_back().await {
            tracing::warn!("writing back: {e}");
            if disk.stack().is_poisoned() {
                return;
            }
        }
    }
}

type Served = Counted<Gated<Tracked<Disk<FileStore>>>>;

/// TLS with the credentials that the keeper read.
fn tls(given: WorkerTls) -> Result<nbd::Tls> {
    let text = memfd::contents(&inherit::take(given.credentials_fd)?)?;
    let credentials: Credentials = serde_json::from_slice(&text)
        .map_err(|e| Error::invalid(format!("credentials from the keeper: {e}")))?;
    Ok(nbd::Tls {
        identity: credentials.identity()?,
        required: given.required,
    })
}

/// A way to clients, ready to be used.
enum Transport {
    Fuse {
        fds: Vec<Arc<OwnedFd>>,
        session: fuse::Session,
    },
    Nbd {
        server: nbd::Server<Served>,
        listeners: Vec<OwnedFd>,
    },
    Connection {
        server: nbd::Server<Served>,
        input: OwnedFd,
        output: OwnedFd,
    },
}

impl Transport {
    fn take(
        mode: WorkerMode,
        device: &Arc<Served>,
        registry: Arc<Registry>,
        engine: Engine,
        confined: bool,
    ) -> Result<Self> {
        let all = |fds: Vec<RawFd>| {
            fds.into_iter()
                .map(inherit::take)
                .collect::<Result<Vec<_>>>()
        };
        match mode {
            WorkerMode::Fuse { fds, session } => Ok(Self::Fuse {
                fds: all(fds)?.into_iter().map(Arc::new).collect(),
                session,
            }),
            WorkerMode::Broken { .. } => Err(Error::invalid("there is no disk to serve")),
            WorkerMode::Nbd {
                listeners,
                connection,
                export,
                tls: given,
                until_idle,
            } => {
                let options = nbd::Options {
                    export: nbd::Export {
                        name: export,
                        ..Default::default()
                    },
                    tls: given.map(tls).transpose()?,
                    end_with_last_client: until_idle,
                    confined,
                    registry: Some(registry),
                    ..Default::default()
                };
                let server = nbd::Server::new(Arc::clone(device), options, engine)?;
                match connection {
                    None => Ok(Self::Nbd {
                        server,
                        listeners: all(listeners)?,
                    }),
                    Some((input, output)) => {
                        let (input, output) = (inherit::take(input)?, inherit::take(output)?);
                        Ok(Self::Connection {
                            server,
                            input,
                            output,
                        })
                    }
                }
            }
        }
    }

    /// Serves until told to stop, or until the last client left.
    async fn serve(self, device: &Arc<Served>, stopped: watch::Receiver<bool>) -> Result<()> {
        match self {
            Self::Fuse { fds, session } => {
                let fd = fds.into_iter().next();
                let fd = fd.ok_or_else(|| Error::invalid("no FUSE descriptor"))?;
                let stop = wait(stopped);
                fuse::serve(fd, &session, Arc::clone(device), stop)
                    .await
                    .map(|_| ())
            }
            Self::Nbd { server, listeners } => {
                exec::spawn(stop_server(server.clone(), stopped));
                server.serve(listeners).await
            }
            Self::Connection {
                server,
                input,
                output,
            } => {
                exec::spawn(stop_server(server.clone(), stopped));
                let served = server
                    .serve_connection(Arc::new(input), Arc::new(output))
                    .await;
                // A client that breaks off is no reason to leave the image unclosed.
                served.unwrap_or_else(|e| tracing::warn!("{e}"));
                Ok(())
            }
        }
    }
}

async fn wait(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which ends the process anyway.
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn stop_server(server: nbd::Server<Served>, stopped: watch::Receiver<bool>) {
    wait(stopped).await;
    server.stop();
}
