//! Keeper: owns what must outlive a worker, and decides what happens next.
//!
//! One thread, one poll loop, no image access, and never a touch of a path on its own disk.
//! What it holds is released in one order: loop device, worker (which closes the image), FUSE
//! mount, sockets, trackers (which are kept), locks, run directory.

use super::announce::Announcer;
use super::child::{Baggage, Worker};
use super::compaction::{self, Compaction};
use super::control::{Asker, Control, Far, Figures, Oracle, TrackAsk};
use super::errand::{Errand, Task};
use super::freeze::{self, Freeze};
use super::growth::{self, Growth};
use super::host::{self, Footprint};
use super::listen::Sockets;
use super::log::Log;
use super::message::{
    Event, Failure, KeeperConfig, Mode, Order, WorkerConfig, WorkerMode, WorkerTls, kind_name,
};
use super::notes::{Notes, Waiting};
use super::restart::Restarts;
use super::snapshot::{End, Next, Place, Snapshot, Turn};
use super::space::Space;
use super::still::{self, Still};
use super::tracking::{Answered, Tracking};
use super::{inherit, leftover};
use crate::counters::Counters;
use crate::image::detached::random_guid;
use crate::image::grow::Wanted;
use crate::image::kept;
use crate::image::lock::{Access, DiskLocks};
use crate::image::target::{Source, Target};
use crate::io::look::Look;
use crate::io::memfd::SharedWords;
use crate::io::room::Limit;
use crate::rundir::{Outcome, Phase, RunDir, State};
use crate::serve::{fuse, loopdev};
use crate::tracker::Name;
use ploop_formats::ledger::Ledger;
use ploop_formats::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a new worker may wait for the last writes of the old one.
const FENCE: Duration = Duration::from_secs(30);
/// Pause between attempts to open a disk that needs space which the host has not.
const SPACE_AGAIN: Duration = Duration::from_secs(2);
/// Pause between attempts to detach a device that somebody still holds.
const DETACH_AGAIN: Duration = Duration::from_millis(500);
/// What a worker may have said and printed in one turn, in messages and in pieces of [`PIECE`]
/// bytes: one that never pauses must not keep its keeper from anything else.
const TURN: usize = 16;
/// The same for a worker that has ended: more than a socket or a pipe can hold.
const REST: usize = 1024;
/// Bytes of output that are read at once.
const PIECE: usize = 4 << 10;

/// What the kernel or clients are connected to.
enum Endpoint {
    Fuse {
        fds: Vec<OwnedFd>,
        session: fuse::Session,
    },
    Nbd(Sockets),
}

/// What is held for the disk as long as it is attached.
struct Holdings {
    dir: OwnedFd,
    source: Source,
    ledger: Option<SharedWords>,
    counters: Counters,
    /// Their memory as watchers may have it; none where `/proc` is missing.
    watched: Option<OwnedFd>,
    endpoint: Endpoint,
    /// None where `/proc` is missing.
    host: Option<Look<Footprint>>,
    locks: DiskLocks,
}

/// One attached disk.
struct Keeper {
    config: KeeperConfig,
    run: RunDir,
    state: State,
    held: Holdings,
    signals: UnixStream,
    log: Option<Log>,
    announcer: Announcer,
    control: Control,
    worker: Option<Worker>,
    errand: Option<Errand>,
    /// A snapshot under way, and who asked for it.
    snapshot: Option<(Snapshot, Asker)>,
    /// Keeps the users of the device still for it.
    still: Option<Still>,
    /// The disk is being made larger.
    growth: Option<Growth>,
    /// Its file is being made shorter.
    compaction: Option<Compaction>,
    tracking: Tracking,
    /// Its trackers are being written down.
    notes: Notes,
    /// The disk is kept as it is.
    freeze: Option<Freeze>,
    /// Freezes so far.
    freezes: u64,
    restarts: Restarts,
    space: Space,
    health: Health,
    /// What it was before somebody asked to mend it.
    unmended: Health,
    /// When to start the next worker.
    next_start: Option<Instant>,
    /// When to try to detach the device again.
    next_detach: Option<Instant>,
    /// Format version of a delta that would stand on the top.
    version: u8,
    /// What the top may take of the host.
    limit: Option<Limit>,
    /// A worker has served: from now on a death is survived.
    served: bool,
    stopping: bool,
    /// Nothing is left to ask of a worker: the image is closed, or given up.
    settled: bool,
    /// Its last worker has closed the image, and holds back nothing that was written.
    is_closed: bool,
    /// What the current worker said before it went.
    last_words: Option<Event>,
    failure: Option<Failure>,
}

/// What workers are good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    /// They serve the disk.
    Sound,
    /// The last ones could not: the next one tries to in spite of that.
    Mending,
    /// They only answer with errors.
    Broken,
}

/// What clients of the control socket may know.
struct Known<'a> {
    state: &'a State,
    counters: &'a Counters,
    watched: Option<&'a OwnedFd>,
    host: Option<&'a Look<Footprint>>,
    is_held: bool,
}

impl Oracle for Known<'_> {
    fn state(&self) -> &State {
        self.state
    }

    fn stat(&self) -> Figures {
        Figures {
            counters: self.counters.stat(),
            footprint: self.host.and_then(Look::now),
        }
    }

    fn counters(&self) -> Option<BorrowedFd<'_>> {
        self.watched.map(AsFd::as_fd)
    }

    fn is_held(&self) -> bool {
        self.is_held
    }
}

/// What poll(2) found.
#[derive(Debug, Default)]
struct Ready {
    signal: bool,
    output: bool,
    spoke: bool,
    ended: bool,
    errand: bool,
    changer: bool,
    changed: bool,
    still: bool,
    quit: bool,
    noted: bool,
    control: bool,
}

/// Attaches a disk and keeps it until it is told to stop, or cannot. `logging` is called once
/// with the log file to use (none: standard error).
///
/// Returns after everything is released; an error says why the disk was not served, or not
/// closed cleanly.
pub fn run(config: KeeperConfig, logging: impl FnOnce(Option<&Log>)) -> Result<()> {
    let mut announcer = Announcer::new(config.announce, config.json)?;
    let opened = signals().and_then(|signals| {
        let target = Target::resolve(&config.disk, config.format)?;
        let run = RunDir::claim(&target.identity()?, leftover::clean)?;
        Ok((signals, target, run))
    });
    let (signals, target, run) = opened.inspect_err(|e| announcer.failed(&Failure::from(e)))?;
    let prepared = open_log(&config, &target, &run, logging).and_then(|log| {
        let control = Control::listen(run.path())?;
        let held = Holdings::take(&config, &target, &run)?;
        match held.tracking() {
            Ok(tracking) => Ok((log, control, held, tracking)),
            Err(e) => {
                release(held.endpoint, &run);
                Err(e.at(target.path().display()))
            }
        }
    });
    let (log, control, held, tracking) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => {
            let failure = Failure::from(&e);
            run.finish(&Outcome {
                failure: Some(failure.clone()),
            });
            announcer.failed(&failure);
            return Err(e);
        }
    };
    let mut state = first_state(&config, &target, &held)?;
    state.log = log.as_ref().map(Log::place);
    let keeper = Keeper {
        config,
        run,
        state,
        held,
        signals,
        log,
        announcer,
        control,
        worker: None,
        errand: None,
        snapshot: None,
        still: None,
        growth: None,
        compaction: None,
        tracking,
        notes: Notes::default(),
        freeze: None,
        freezes: 0,
        restarts: Restarts::default(),
        space: Space::default(),
        health: Health::Sound,
        unmended: Health::Sound,
        next_start: Some(Instant::now()),
        next_detach: None,
        version: 2,
        limit: None,
        served: false,
        stopping: false,
        settled: false,
        is_closed: false,
        last_words: None,
        failure: None,
    };
    keeper.serve()
}

/// A socket that becomes readable when we are asked to stop.
fn signals() -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, theirs.try_clone()?)?;
    }
    Ok(ours)
}

fn open_log(
    config: &KeeperConfig,
    target: &Target,
    run: &RunDir,
    logging: impl FnOnce(Option<&Log>),
) -> Result<Option<Log>> {
    let path = run.path().join("log");
    let disk = target.path().display().to_string();
    let open = || Log::open(&path, &disk, config.log);
    let log = match config.detached {
        true => Some(open().map_err(|e| Error::from(e).at(path.display()))?),
        false => None,
    };
    logging(log.as_ref());
    Ok(log)
}

fn first_state(config: &KeeperConfig, target: &Target, held: &Holdings) -> Result<State> {
    let (transport, uri, socket) = match (&held.endpoint, &config.mode) {
        (Endpoint::Nbd(sockets), Mode::Nbd { export, tls, .. }) => {
            let required = tls.as_ref().is_some_and(|tls| tls.required);
            let uri = sockets.uri.as_ref().map(|u| u.of(export, required));
            ("nbd", uri, sockets.path())
        }
        _ => ("fuse+loop", None, None),
    };
    Ok(State {
        schema: 1,
        path: target.path().display().to_string(),
        uuid: target.identity()?.uuid(),
        device: None,
        mountpoint: None,
        transport: transport.into(),
        uri,
        socket: socket.map(|p| p.display().to_string()),
        worker_pid: None,
        keeper_pid: std::process::id(),
        size: 0,
        state: Phase::Starting,
        read_only: config.read_only,
        snapshot: config.snapshot.clone(),
        cache: config.cache.name().into(),
        engine: None,
        host_low: false,
        frozen: false,
        restarts: 0,
        log: None,
        error: None,
    })
}

impl Holdings {
    fn take(config: &KeeperConfig, target: &Target, run: &RunDir) -> Result<Self> {
        let dir = target.open_dir()?;
        let source = target.source();
        let access = if config.read_only {
            Access::Read
        } else {
            Access::Write
        };
        let locks =
            DiskLocks::take(&dir, &source, access).map_err(|e| e.at(target.path().display()))?;
        let ledger = match config.read_only {
            true => None,
            false => Some(SharedWords::create(Ledger::WORDS)?),
        };
        let counters = Counters::new(Arc::new(SharedWords::create(Counters::WORDS)?))?;
        let endpoint = match &config.mode {
            Mode::Device => mount(config, target, run)?,
            Mode::Nbd { listen, tls, .. } => {
                Endpoint::Nbd(Sockets::open(listen, tls.as_ref(), inherit::take)?)
            }
        };
        Ok(Self {
            source,
            ledger,
            watched: counters.read_only().ok(),
            counters,
            endpoint,
            host: host::footprint(&dir, locks.top()).ok(),
            dir,
            locks,
        })
    }

    /// The trackers that were kept.
    fn tracking(&self) -> Result<Tracking> {
        match self.keeps_trackers() {
            true => kept::take(&self.dir).map(Tracking::resume),
            false => Ok(Tracking::default()),
        }
    }

    /// Whether the disk has a directory of its own, and is written to. A file beside a bare image
    /// would be nobody's.
    fn keeps_trackers(&self) -> bool {
        self.locks.disk().is_some()
    }

    /// Packs what a worker needs for a disk of `size` bytes, which nobody has to know who is the
    /// first, with `takeover` false.
    fn pack(
        &mut self,
        config: &KeeperConfig,
        tracking: &Tracking,
        takeover: bool,
        health: Health,
        size: u64,
    ) -> Result<(WorkerConfig, Baggage)> {
        let mut bag = Baggage::default();
        let trackers = tracking.pack(&mut bag)?;
        let dir_fd = bag.pack(&self.dir)?;
        let (ledger_fd, witness_fd) = match &self.ledger {
            Some(words) => (Some(bag.pack(words)?), Some(bag.pack(self.locks.top())?)),
            None => (None, None),
        };
        let mode = match (&mut self.endpoint, &config.mode) {
            (
                Endpoint::Nbd(sockets),
                Mode::Nbd {
                    listen,
                    export,
                    tls,
                },
            ) => {
                let listeners = sockets.listeners.iter().map(|fd| bag.pack(fd));
                let listeners = listeners.collect::<Result<_>>()?;
                // A connection is passed on and not kept: its client must see the worker's end.
                let connection = match sockets.connection.take() {
                    Some((input, output)) => Some((bag.pack(input)?, bag.pack(output)?)),
                    None => None,
                };
                let tls = match (&sockets.credentials, tls) {
                    (Some(fd), Some(tls)) => Some(WorkerTls {
                        credentials_fd: bag.pack(fd)?,
                        required: tls.required,
                    }),
                    _ => None,
                };
                let until_idle = Sockets::ends_with_clients(listen);
                WorkerMode::Nbd {
                    listeners,
                    connection,
                    export: export.clone(),
                    tls,
                    until_idle,
                }
            }
            (Endpoint::Fuse { fds, session }, _) => {
                let fds = fds.iter().map(|fd| bag.pack(fd)).collect::<Result<_>>()?;
                let session = session.clone();
                match health {
                    Health::Broken => WorkerMode::Broken { fds, session, size },
                    _ => WorkerMode::Fuse { fds, session },
                }
            }
            (Endpoint::Nbd(_), Mode::Device) => return Err(Error::invalid("no such mode")),
        };
        let config = WorkerConfig {
            dir_fd,
            source: self.source.clone(),
            snapshot: config.snapshot.clone(),
            ledger_fd,
            witness_fd,
            counters_fd: bag.pack(&self.counters)?,
            takeover,
            heal: health == Health::Mending,
            sandbox: config.sandbox,
            fence_ms: FENCE.as_millis() as u64,
            cache: config.cache,
            keep_free: config.keep_free,
            trackers,
            mode,
        };
        Ok((config, bag))
    }

    /// What the host has left and the top takes, if that can be told.
    fn footprint(&self) -> Option<Footprint> {
        self.host.as_ref()?.now()
    }

    /// Whether requests wait for a new worker, or are lost with the old one.
    fn survives(&self) -> bool {
        match &self.endpoint {
            Endpoint::Fuse { session, .. } => session.resends(),
            Endpoint::Nbd(sockets) => !sockets.listeners.is_empty(),
        }
    }
}

fn mount(config: &KeeperConfig, target: &Target, run: &RunDir) -> Result<Endpoint> {
    let disk = run.disk();
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&disk)
        .map_err(|e| Error::from(e).at(disk.display()))?;
    let source = target.path().display().to_string();
    let how = fuse::Mount {
        target: &disk,
        source: &source,
        read_only: config.read_only,
    };
    let fd = fuse::mount(&how)?;
    match fuse::Session::handshake(&fd) {
        Ok(session) => Ok(Endpoint::Fuse {
            fds: vec![fd],
            session,
        }),
        Err(e) => {
            drop(fd);
            fuse::unmount(&disk, true)?;
            Err(e)
        }
    }
}

/// Lets go of what the kernel or clients are connected to. Call before anybody is told that the
/// disk is detached: the next one may want the same address.
fn release(endpoint: Endpoint, run: &RunDir) {
    match endpoint {
        Endpoint::Fuse { fds, .. } => {
            let disk = run.disk();
            let unmounted = fuse::unmount(&disk, false).or_else(|_| fuse::unmount(&disk, true));
            if let Err(e) = unmounted {
                tracing::warn!("{e}");
            }
            drop(fds);
        }
        Endpoint::Nbd(sockets) => drop(sockets),
    }
}

impl Keeper {
    fn serve(mut self) -> Result<()> {
        self.publish();
        loop {
            self.advance();
            if self.is_finished() {
                return self.wind_down();
            }
            match self.wait() {
                Ok(ready) => self.react(&ready),
                Err(e) => self.give_up(Failure::from(&e)),
            }
        }
    }

    /// Sleeps until something happens or is due.
    fn wait(&self) -> Result<Ready> {
        let snapshot = self.snapshot.as_ref().map(|(snapshot, _)| snapshot);
        // Its end is heard of; a start that is due until then would be no sleep.
        let growth = self.growth.as_ref();
        let barred = snapshot.is_some_and(Snapshot::bars_workers)
            || growth.is_some_and(Growth::bars_workers);
        let start = self.next_start.filter(|_| !barred);
        let overdue = snapshot.and_then(Snapshot::due);
        let thaw = self.freeze.as_ref().and_then(Freeze::due);
        let due = [start, self.next_detach, self.space.due(), overdue, thaw]
            .into_iter()
            .flatten()
            .min();
        let timeout = due.map(|t| t.saturating_duration_since(Instant::now()));
        let timeout = timeout.map(|d| Timespec {
            tv_sec: d.as_secs() as i64,
            // Rounded up, or a nearly due time would be waited for in a busy loop.
            tv_nsec: (i64::from(d.subsec_micros()) + 1) * 1000 % 1_000_000_000,
        });
        let worker = self.worker.as_ref();
        let [changer, changed] = match (snapshot, growth) {
            (Some(snapshot), _) => snapshot.polled(),
            (None, growth) => growth.map_or([None; 2], Growth::polled),
        };
        let [still, quit] = match (&self.still, &self.freeze) {
            (Some(still), _) => still.polled(),
            (None, freeze) => freeze.as_ref().map_or([None; 2], Freeze::polled),
        };
        let sources = [
            Some(self.signals.as_fd()),
            worker.and_then(|w| w.output.as_ref()).map(AsFd::as_fd),
            worker.and_then(Worker::spoke),
            worker.map(Worker::ended),
            self.errand.as_ref().map(Errand::back),
            changer,
            changed,
            still,
            quit,
            self.notes.polled(),
        ];
        let own = sources.iter().flatten();
        let mut polled: Vec<PollFd<'_>> = own
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .chain(self.control.polled())
            .collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::from(io::Error::from(e)).at("poll")),
        }
        let mut hit = polled.iter().map(|p| !p.revents().is_empty());
        let [
            signal,
            output,
            spoke,
            ended,
            errand,
            changer,
            changed,
            still,
            quit,
            noted,
        ] = sources.map(|s| s.is_some() && hit.next().unwrap_or(false));
        let control = hit.any(|hit| hit);
        Ok(Ready {
            control,
            signal,
            output,
            spoke,
            ended,
            errand,
            changer,
            changed,
            still,
            quit,
            noted,
        })
    }

    fn react(&mut self, ready: &Ready) {
        if ready.signal {
            let mut buf = [0u8; 64];
            while matches!((&self.signals).read(&mut buf), Ok(n) if n > 0) {}
            tracing::info!("asked to stop");
            self.stop();
        }
        let most = if ready.ended { REST } else { TURN };
        if ready.output || ready.ended {
            self.copy_output(most);
        }
        if ready.spoke || ready.ended {
            self.hear(most);
        }
        if ready.ended {
            self.on_exit();
        }
        if ready.errand {
            self.on_errand();
        }
        if ready.changer || ready.changed {
            self.on_changer(ready.changed);
        }
        if ready.still || ready.quit {
            match self.freeze {
                Some(_) => self.about_freeze(|f, c, w| f.hear_still(ready.quit, c, w)),
                None => self.on_still(ready.quit),
            }
        }
        if ready.noted {
            self.on_noted();
        }
        if ready.control {
            self.on_control();
        }
    }

    fn on_control(&mut self) {
        let known = Known {
            state: &self.state,
            counters: &self.held.counters,
            watched: self.held.watched.as_ref(),
            host: self.held.host.as_ref(),
            is_held: !self.settled,
        };
        self.control.turn(&known);
        let orders = std::mem::take(&mut self.control.orders);
        if orders.stop {
            tracing::info!("asked to stop by the control socket");
            self.stop();
        }
        if orders.recover {
            self.recover();
        }
        for (asker, uuid, freeze) in orders.snapshots {
            let begun = match freeze {
                true => self.begin_still(asker, still::Change::Snapshot(uuid)),
                false => self.begin_snapshot(asker, uuid.as_deref()),
            };
            if let Err(e) = begun {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, uuid) in orders.switches {
            if let Err(e) = self.begin_still(asker, still::Change::Switch(uuid)) {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, wanted) in orders.growths {
            if let Err(e) = self.begin_growth(asker, wanted) {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, rate) in orders.compactions {
            if let Err(e) = self.begin_compaction(asker, rate) {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, uuid) in orders.marks {
            if let Err(e) = self.begin_mark(asker, &uuid) {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, bytes) in orders.limits {
            if let Err(e) = self.begin_limit(asker, bytes) {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, uuid, file, rate) in orders.replacements {
            if let Err(e) = self.begin_replace(asker, &uuid, file, rate) {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, ask) in orders.tracks {
            match self.track(asker, ask) {
                Ok(None) => {}
                Ok(Some(answer)) => self.control.answer(asker, Ok(answer)),
                Err(e) => self.control.answer(asker, Err(e)),
            }
        }
        for (asker, uuid, rate) in orders.removals {
            if let Err(e) = self.begin_removal(asker, &uuid, rate) {
                self.control.answer(asker, Err(e));
            }
        }
        for (asker, timeout_ms) in orders.freezes {
            if let Err(e) = self.begin_freeze(asker, timeout_ms) {
                self.control.answer(asker, Err(e));
            }
        }
        for asker in orders.thaws {
            let own = |freeze: &Freeze| freeze.asker.is_with(asker);
            match self.freeze.as_ref().is_some_and(own) {
                true => self.about_freeze(|f, c, w| f.thaw(asker, c, w)),
                false => {
                    let why = self.control.lost_freeze(asker);
                    self.control.answer(asker, Err(why));
                }
            }
        }
    }

    fn begin_freeze(&mut self, asker: Asker, timeout_ms: u64) -> Result<()> {
        let most = Freeze::time(timeout_ms)?;
        self.may_change()?;
        let device = self.state.device.as_ref().map(PathBuf::from);
        if self.is_device() && device.is_none() {
            return Err(Error::new(Kind::Busy, "it has no device yet"));
        }
        if let Some(worker) = &self.worker {
            self.freezes += 1;
            let begun = Freeze::begin(asker, most, device, worker, self.freezes)?;
            self.freeze = Some(begun);
        }
        Ok(())
    }

    /// Does something about the freeze, if there is one, and tells what came of it.
    fn about_freeze(
        &mut self,
        act: impl FnOnce(&mut Freeze, &mut Control, Option<&mut Worker>) -> Option<freeze::News>,
    ) {
        let Some(freeze) = self.freeze.as_mut() else {
            return;
        };
        let (asker, worker) = (freeze.asker, self.worker.as_mut());
        let news = act(freeze, &mut self.control, worker);
        if freeze.is_over() {
            self.freeze = None;
        }
        let Some(news) = news else {
            return;
        };
        match news {
            freeze::News::Frozen => tracing::info!("frozen"),
            freeze::News::Thawed { why, frozen_us } => {
                tracing::info!("thawed after {frozen_us} us ({})", why.name());
            }
        }
        self.state.frozen = news == freeze::News::Frozen;
        self.publish();
        self.control.announce_freeze(&self.state, news, asker);
    }

    fn thaw(&mut self, why: freeze::Why) {
        self.about_freeze(|f, c, w| f.end(why, c, w));
    }

    /// Does what is asked of trackers, or has the worker do it.
    fn track(&mut self, asker: Asker, ask: TrackAsk) -> Result<Option<Value>> {
        if self.config.read_only {
            let what = "the disk is attached read-only: nothing is written to it";
            return Err(Error::new(Kind::ReadOnly, what));
        }
        if self.state.state == Phase::Failed {
            let what =
                "the disk has failed, and nobody knows what it holds; see `ploopctl recover`";
            return Err(Error::new(Kind::Poisoned, what));
        }
        if !self.served {
            // How much a set has depends on the disk's size, which nobody knows yet.
            return Err(Error::new(Kind::Busy, "it is not served yet; try again"));
        }
        let is_noted = matches!(ask, TrackAsk::Start { .. } | TrackAsk::Stop { .. });
        if is_noted {
            self.notes.may_wait()?;
        }
        let worker = self.worker.as_ref().filter(|worker| !worker.condemned);
        let answer = self.tracking.ask(asker, ask, worker, self.state.size)?;
        Ok(match answer {
            Some(answer) if is_noted => self.note(asker, answer, None),
            answer => answer,
        })
    }

    /// Has the trackers written down before this is answered, where that outlives the attachment.
    fn note(&mut self, asker: Asker, answer: Value, started: Option<(Name, u64)>) -> Option<Value> {
        if !self.held.keeps_trackers() {
            return Some(answer);
        }
        self.notes.wait(Waiting {
            asker,
            answer,
            started,
        });
        None
    }

    fn answer_track(&mut self, answered: Answered) {
        let Answered {
            asker,
            answer,
            started,
        } = answered;
        let answer = match answer {
            Ok(answer) if started.is_some() => self.note(asker, answer, started).map(Ok),
            answer => Some(answer),
        };
        if let Some(answer) = answer {
            self.control.answer(asker, answer);
        }
    }

    /// Sends somebody to write the trackers down.
    fn send_notes(&mut self) {
        let Some(lock) = self.held.locks.disk() else {
            return;
        };
        let sent = self
            .notes
            .send(&self.held.dir, lock, &self.tracking.names());
        if let Err((e, waiting)) = sent {
            self.after_notes(&Err(e), waiting);
        }
    }

    fn on_noted(&mut self) {
        if let Some((done, waiting)) = self.notes.written() {
            self.after_notes(&done, waiting);
        }
    }

    /// Answers who waited. What was started and cannot be written down is stopped.
    fn after_notes(&mut self, done: &Result<()>, waiting: Vec<Waiting>) {
        if let Err(e) = done {
            tracing::warn!("writing its trackers down: {e}");
        }
        let worker = self.worker.as_ref().filter(|worker| !worker.condemned);
        for Waiting {
            asker,
            answer,
            started,
        } in waiting
        {
            let answer = match (done, started) {
                (Err(e), Some((name, id))) => {
                    self.tracking.give_up(worker, name, id);
                    Err(Error::new(e.kind(), e.to_string()).at("it cannot be written down"))
                }
                _ => Ok(answer),
            };
            self.control.answer(asker, answer);
        }
    }

    fn begin_mark(&mut self, asker: Asker, uuid: &str) -> Result<()> {
        let uuid = uuid.parse()?;
        self.may_change()?;
        self.snapshot = Some((Snapshot::begin_mark(&self.place(), uuid)?, asker));
        Ok(())
    }

    fn begin_limit(&mut self, asker: Asker, bytes: Option<u64>) -> Result<()> {
        self.may_change()?;
        self.snapshot = Some((Snapshot::begin_limit(&self.place(), bytes)?, asker));
        Ok(())
    }

    fn begin_replace(
        &mut self,
        asker: Asker,
        uuid: &str,
        file: String,
        rate: Option<u64>,
    ) -> Result<()> {
        let uuid = uuid.parse()?;
        self.may_change()?;
        let begun = Snapshot::begin_replace(&self.place(), uuid, file, rate)?;
        tracing::info!("giving snapshot {} another file", uuid.bare());
        self.snapshot = Some((begun, asker));
        Ok(())
    }

    /// What a delta may take from now on. A worker that cannot be told is followed by one that reads it.
    fn set_limit(&mut self, bytes: Option<u64>) {
        self.limit = bytes.map(Limit);
        if let Some(worker) = &self.worker
            && let Err(e) = worker.order(&Order::Limit { bytes }, &[])
        {
            tracing::debug!("{e}");
        }
    }

    fn begin_growth(&mut self, asker: Asker, wanted: Wanted) -> Result<()> {
        self.may_change()?;
        if self.is_device() && self.state.device.is_none() {
            return Err(Error::new(Kind::Busy, "it has no device yet"));
        }
        let (old, to) = (self.state.size, wanted.of(self.state.size)?);
        if let Some(worker) = &self.worker {
            worker.order(&Order::Resize { to }, &[])?;
            tracing::info!("from {old} to {} bytes", to.bytes());
            self.growth = Some(Growth::asked(asker, old, to));
        }
        Ok(())
    }

    fn begin_compaction(&mut self, asker: Asker, rate: Option<u64>) -> Result<()> {
        self.may_change()?;
        if self.is_device() && self.state.device.is_none() {
            return Err(Error::new(Kind::Busy, "it has no device yet"));
        }
        if let Some(worker) = &self.worker {
            worker.order(&Order::Compact { rate }, &[])?;
            tracing::info!("compacting");
            let ending = false;
            self.compaction = Some(Compaction { asker, ending });
        }
        Ok(())
    }

    /// Hears of a compaction.
    fn on_compaction(&mut self, turn: compaction::Turn) {
        let Some(compaction) = &self.compaction else {
            return;
        };
        match turn {
            compaction::Turn::Progress(far) => {
                self.control.progress(compaction.asker, far);
            }
            compaction::Turn::Over(answer) => {
                match &answer {
                    Ok(made) => tracing::info!("compacted: {made}"),
                    Err(e) => tracing::warn!("compacting: {e}"),
                }
                self.control.answer(compaction.asker, answer);
                self.compaction = None;
            }
        }
    }

    /// Gives up what nobody waits for any more.
    fn end_unwanted(&mut self) {
        if let Some((snapshot, asker)) = self.snapshot.as_mut()
            && !self.control.is_wanted(*asker)
        {
            snapshot.hurry("given up: nobody waits for it");
        }
        let unwanted = |compaction: &Compaction| !self.control.is_wanted(compaction.asker);
        if self.compaction.as_ref().is_some_and(unwanted) {
            self.end_compaction();
        }
        if let Some(asker) = self.freeze.as_ref().map(|freeze| freeze.asker)
            && !self.control.is_wanted(asker)
        {
            self.thaw(match self.control.is_connected(asker) {
                true => freeze::Why::Asked,
                false => freeze::Why::HangUp,
            });
        }
    }

    /// Gives a compaction up, if one is under way.
    fn end_compaction(&mut self) {
        let Some(compaction) = self.compaction.as_mut().filter(|c| !c.ending) else {
            return;
        };
        compaction.ending = true;
        let order = |worker: &Worker| worker.order(&Order::EndCompact, &[]);
        if let Some(Err(e)) = self.worker.as_ref().map(order) {
            // Its end is seen elsewhere.
            tracing::debug!("{e}");
        }
    }

    /// Goes on with a growth, or answers who asked for it.
    fn advance_growth(&mut self) {
        let Some(mut growth) = self.growth.take() else {
            return;
        };
        let gone = self.state.state == Phase::Failed || self.settled;
        if gone {
            growth.lost("the disk has failed before it had another size");
        }
        let described = self.held.source == Source::Bundle;
        let device = self.state.device.as_deref();
        match growth.advance(device, &self.place(), described) {
            growth::Turn::Wait => self.growth = Some(growth),
            growth::Turn::Send(task) => {
                let started = Errand::start(task);
                let failed = started.map(|errand| self.errand = Some(errand)).err();
                if let Some(e) = &failed {
                    growth.sized(Err(Failure::from(e)));
                }
                self.growth = Some(growth);
                if failed.is_some() {
                    // Nothing else would have this go on.
                    self.advance_growth();
                }
            }
            growth::Turn::Over(asker, answer) => {
                match &answer {
                    Ok(made) => tracing::info!("resized: {made}"),
                    Err(e) => tracing::warn!("resizing: {e}"),
                }
                if let Some(asker) = asker {
                    self.control.answer(asker, answer);
                }
            }
        }
    }

    /// Refuses a change of the tree that cannot be begun now.
    fn may_change(&self) -> Result<()> {
        if self.growth.is_some() {
            return Err(Error::new(Kind::Busy, "it is being given another size"));
        }
        if self.snapshot.is_some() || self.still.is_some() {
            return Err(Error::new(Kind::Busy, "its snapshots are being changed"));
        }
        if self.compaction.is_some() {
            return Err(Error::new(
                Kind::Busy,
                "it is being compacted; wait for the end of that, or end it (Ctrl-C), and try again",
            ));
        }
        if self.freeze.is_some() {
            let what = "it is frozen for somebody, and stays as it is; try again once it is thawed";
            return Err(Error::new(Kind::Busy, what));
        }
        self.may_go_on()
    }

    /// Refuses a step of a change that cannot be begun now.
    fn may_go_on(&self) -> Result<()> {
        if self.config.read_only {
            return Err(Error::new(Kind::ReadOnly, "the disk is attached read-only"));
        }
        let serves = |worker: &Worker| worker.ready.is_some() && !worker.condemned;
        let serves = self.worker.as_ref().is_some_and(serves);
        if self.state.state != Phase::Serving || !serves || self.stopping {
            let what = "only a disk that serves can be changed or frozen; try again, or see `ploopctl list`";
            return Err(Error::new(Kind::Busy, what));
        }
        Ok(())
    }

    fn place(&self) -> Place<'_> {
        Place {
            dir: self.held.dir.as_fd(),
            locks: &self.held.locks,
            sandbox: self.config.sandbox,
            version: self.version,
            size: self.state.size,
        }
    }

    fn begin_removal(&mut self, asker: Asker, uuid: &str, rate: Option<u64>) -> Result<()> {
        let uuid = uuid.parse()?;
        self.may_change()?;
        let begun = Snapshot::begin_removal(&self.place(), uuid, rate)?;
        tracing::info!("taking snapshot {} away", uuid.bare());
        self.snapshot = Some((begun, asker));
        Ok(())
    }

    fn begin_snapshot(&mut self, asker: Asker, uuid: Option<&str>) -> Result<()> {
        self.may_change()?;
        self.freeze_top(asker, uuid)
    }

    fn freeze_top(&mut self, asker: Asker, uuid: Option<&str>) -> Result<()> {
        let uuid = uuid.map_or_else(|| Ok(random_guid()), str::parse)?;
        self.may_go_on()?;
        let begun = Snapshot::begin(&self.place(), uuid)?;
        tracing::info!("freezing the top as snapshot {}", uuid.bare());
        self.snapshot = Some((begun, asker));
        Ok(())
    }

    fn begin_still(&mut self, asker: Asker, change: still::Change) -> Result<()> {
        if !self.is_device() {
            return Err(Error::unsupported(match change {
                still::Change::Snapshot(_) | still::Change::Nothing(_) => {
                    "its file system is its client's, to be frozen there (fsfreeze -f)"
                }
                still::Change::Switch(_) => {
                    "its clients may hold what they have read: stop serving it first"
                }
            }));
        }
        self.may_change()?;
        let no_device = || Error::new(Kind::Busy, "it has no device yet");
        let device = self.state.device.as_ref().ok_or_else(no_device)?;
        self.still = Some(Still::start(PathBuf::from(device), asker, change)?);
        Ok(())
    }

    fn on_still(&mut self, ended: bool) {
        let Some(mut still) = self.still.take() else {
            return;
        };
        let mut turn = still.hear();
        if ended {
            // Whatever it said is heard first. That everybody is still is not true any more.
            while !matches!(still.hear(), still::Turn::Wait) {}
            let under_way = |(_, asker): &(Snapshot, Asker)| *asker == still.asker;
            turn = still.ended(self.snapshot.as_ref().is_some_and(under_way));
        }
        if let still::Turn::Begin = turn {
            let begun = match &still.change {
                still::Change::Snapshot(uuid) => self.freeze_top(still.asker, uuid.as_deref()),
                still::Change::Switch(uuid) => self.begin_switch(still.asker, uuid),
                still::Change::Nothing(_) => Ok(()),
            };
            turn = begun.map_or_else(|e| still.finish(Err(e)), |()| still::Turn::Wait);
        }
        if let (still::Turn::Abandon, Some((snapshot, _))) = (&turn, self.snapshot.as_mut()) {
            snapshot.abandon();
        }
        self.after_still(still, turn);
    }

    /// Answers who asked, once everybody goes on.
    fn after_still(&mut self, still: Still, turn: still::Turn) {
        match turn {
            still::Turn::Over(Some(answer)) => self.control.answer(still.asker, answer),
            still::Turn::Over(None) => {}
            _ => self.still = Some(still),
        }
    }

    fn begin_switch(&mut self, asker: Asker, uuid: &str) -> Result<()> {
        let uuid = uuid.parse()?;
        self.may_go_on()?;
        let begun = Snapshot::begin_switch(&self.place(), uuid)?;
        tracing::info!("going back to snapshot {}", uuid.bare());
        self.snapshot = Some((begun, asker));
        Ok(())
    }

    fn on_changer(&mut self, ended: bool) {
        if let Some(growth) = self.growth.as_mut().filter(|_| self.snapshot.is_none()) {
            return growth.hear(ended);
        }
        let Some((snapshot, asker)) = self.snapshot.as_mut() else {
            return;
        };
        let mut turn = snapshot.hear(&self.held.dir, self.worker.as_ref());
        if ended && matches!(turn, Turn::Wait) {
            // Whatever it said is heard first.
            turn = match snapshot.hear(&self.held.dir, self.worker.as_ref()) {
                Turn::Wait => snapshot.changer_ended(&self.held.dir, self.worker.as_ref()),
                turn => turn,
            };
        }
        match turn {
            Turn::Wait => {}
            Turn::Keep => snapshot.let_go(self.worker.as_ref(), false),
            Turn::Renew => self.renew_worker(),
            Turn::Progress(done, total) => {
                self.control.progress(*asker, Far { done, total });
            }
            Turn::Take(next, unknown) => {
                if snapshot.goes_back() {
                    self.tracking.doubt();
                }
                self.take_top(next, unknown);
            }
            Turn::Limit(bytes) => self.set_limit(bytes),
        }
        self.end_snapshot();
    }

    /// Replaces a worker that must read the descriptor anew.
    fn renew_worker(&mut self) {
        if let Some(worker) = self.worker.as_mut() {
            tracing::warn!("the worker is replaced, to read the disk's tree anew");
            worker.condemn();
        }
    }

    /// The disk has a new top.
    fn take_top(&mut self, next: Next, unknown: bool) {
        let Next { top, ledger, .. } = next;
        self.held.locks.set_top(top);
        self.held.host = host::footprint(&self.held.dir, self.held.locks.top()).ok();
        if unknown {
            let same = ledger.as_fd().try_clone_to_owned();
            if let Ok(same) = same.map_err(Error::from).and_then(SharedWords::from_fd) {
                Ledger::new(Arc::new(same)).poison();
            }
        }
        self.held.ledger = Some(ledger);
        if let Some((snapshot, _)) = &self.snapshot {
            snapshot.let_go(self.worker.as_ref(), true);
        }
    }

    fn expire_snapshot(&mut self) {
        if let Some((snapshot, _)) = self.snapshot.as_mut()
            && let Turn::Renew = snapshot.expire(&self.held.dir, self.worker.as_ref())
        {
            self.renew_worker();
        }
        self.end_snapshot();
    }

    /// Goes on with the next step of what changes the tree, or answers who asked for it, once
    /// nothing is under way.
    fn end_snapshot(&mut self) {
        let Some((mut snapshot, asker)) = self.snapshot.take() else {
            return;
        };
        let goes_on = self.may_go_on().is_ok() && self.control.is_wanted(asker);
        match snapshot.end(&self.place(), goes_on) {
            None => self.snapshot = Some((snapshot, asker)),
            Some(End::Begun(next)) => self.snapshot = Some((*next, asker)),
            Some(End::Answer(answer)) => {
                // The base may be another file now, and until here the old one was it.
                if let Err(e) = self.held.locks.follow_base(&self.held.dir) {
                    tracing::warn!("other tools may take the disk for one that nobody uses: {e}");
                }
                match &answer {
                    Ok(made) => tracing::info!("its snapshots are changed: {made}"),
                    Err(e) => tracing::warn!("its snapshots are not changed: {e}"),
                }
                match self.still.take_if(|still| still.asker == asker) {
                    None => self.control.answer(asker, answer),
                    Some(mut still) => {
                        let turn = still.finish(answer);
                        self.after_still(still, turn);
                    }
                }
            }
        }
    }

    /// Uses a failed disk again: what it lost is lost, and what is there is looked at anew.
    fn recover(&mut self) {
        if self.stopping || self.settled || self.state.state != Phase::Failed {
            return;
        }
        tracing::warn!("asked to recover from: {:?}", self.state.error);
        if let Err(e) = self.held.locks.follow(&self.held.dir) {
            self.state.error = Some(format!("it cannot be looked at anew: {e}"));
            return self.publish();
        }
        self.tracking.doubt();
        self.failure = None;
        self.state.error = None;
        self.state.state = Phase::Recovering;
        self.unmended = std::mem::replace(&mut self.health, Health::Mending);
        self.restarts.forgive();
        match self.worker.as_mut() {
            // The next one starts when it has ended.
            Some(worker) => worker.condemn(),
            None => self.next_start = Some(Instant::now()),
        }
        self.publish();
    }

    /// Looks whether the host has space again, when that is due.
    fn look_at_space(&mut self) {
        let device = self.state.device.as_deref().map(Path::new);
        let (held, keep, limit) = (&self.held, self.config.keep_free, self.limit);
        let is_ample = || {
            held.footprint()
                .is_none_or(|seen| seen.is_ample(keep, limit))
        };
        if self.space.look(Instant::now(), is_ample, device) {
            tracing::info!("the disk can take space again");
            self.publish();
        }
    }

    fn on_low(&mut self) {
        let (seen, keep) = (self.held.footprint(), self.config.keep_free);
        let is_ample = |seen: Footprint| seen.is_ample(keep, self.limit);
        let is_seen = || seen.is_some_and(|seen| !is_ample(seen));
        if !self.space.report(Instant::now(), is_seen) {
            return;
        }
        let near = seen.zip(self.limit);
        let near = near.filter(|(seen, limit)| limit.is_near(seen.allocated));
        match (near, seen) {
            (Some((seen, limit)), _) => tracing::warn!(
                "its top has {} bytes of the {} that a delta of it may have: the disk takes no more, \
                 or soon will not; see `ploopctl limit`",
                seen.allocated,
                limit.0
            ),
            (None, seen) => {
                let space = seen.map(|seen| seen.host().to_string());
                let space = space.unwrap_or_else(|| "nobody knows how low".into());
                tracing::warn!(
                    "the host is low on space ({space}): the disk takes no more, or soon will not, \
                     until there is more than --keep-free"
                );
            }
        }
        self.publish();
    }

    /// Starts whatever the present state calls for. Idempotent.
    fn advance(&mut self) {
        self.look_at_space();
        self.end_unwanted();
        let stopping = self.stopping;
        self.step();
        // To stop may be the outcome, and calls for other things: nothing else would wake us.
        if self.stopping != stopping {
            self.step();
        }
    }

    fn step(&mut self) {
        let due = |t: Option<Instant>| t.is_some_and(|t| t <= Instant::now());
        if due(self.snapshot.as_ref().and_then(|(s, _)| s.due())) {
            self.expire_snapshot();
        }
        // A descriptor that may change is not read.
        let changing = self
            .snapshot
            .as_ref()
            .is_some_and(|(s, _)| s.bars_workers())
            || self.growth.as_ref().is_some_and(Growth::bars_workers);
        if due(self.next_start) && self.worker.is_none() && !changing {
            self.next_start = None;
            self.start_worker();
        }
        if self.notes.are_due() {
            self.send_notes();
        }
        if due(self.freeze.as_ref().and_then(Freeze::due)) {
            self.thaw(freeze::Why::Timeout);
        }
        let waits = self.snapshot.is_some() || self.still.is_some() || self.freeze.is_some();
        if self.errand.is_some() || waits {
            return;
        }
        self.advance_growth();
        if self.growth.is_some() || self.errand.is_some() || self.compaction.is_some() {
            return;
        }
        match (self.stopping, self.is_device(), &self.state.device) {
            (false, true, None) if self.served => self.attach(),
            (false, _, _) if self.served => self.announce(),
            (true, _, Some(device)) if self.next_detach.is_none() || due(self.next_detach) => {
                self.next_detach = None;
                let device = PathBuf::from(device);
                self.send(Task::Detach {
                    device,
                    file: self.run.disk(),
                });
            }
            (true, _, Some(_)) => {}
            (true, _, None) => {
                if let Some(worker) = self.worker.as_mut().filter(|w| w.ready.is_some()) {
                    worker.order_stop();
                }
            }
            _ => {}
        }
    }

    fn is_device(&self) -> bool {
        self.config.mode == Mode::Device
    }

    fn is_finished(&self) -> bool {
        let idle = self.worker.is_none() && self.errand.is_none() && self.state.device.is_none();
        let idle = idle && self.snapshot.is_none() && self.still.is_none();
        let idle = idle && self.growth.is_none() && self.compaction.is_none();
        let idle = idle && self.notes.are_done();
        let idle = idle && self.freeze.is_none();
        self.stopping && self.settled && idle
    }

    fn stop(&mut self) {
        self.stopping = true;
        self.end_compaction();
        self.thaw(freeze::Why::Detach);
        match (self.snapshot.as_mut(), self.still.as_mut()) {
            (Some((snapshot, _)), _) => snapshot.hurry("the disk is being detached"),
            // It may wait for a file system that hangs.
            (None, Some(still)) => still.kill(),
            (None, None) => {}
        }
        if self.state.state != Phase::Failed {
            self.state.state = Phase::Stopping;
        }
        self.publish();
    }

    fn publish(&mut self) {
        self.state.restarts = self.restarts.total();
        self.state.host_low = self.space.is_low();
        self.state.worker_pid = self.worker.as_ref().map(Worker::pid);
        if let Err(e) = self.run.publish(&self.state) {
            tracing::warn!("{e}");
        }
        self.control.announce(&self.state);
    }

    fn announce(&mut self) {
        if self.announcer.is_done() || self.state.state != Phase::Serving {
            return;
        }
        self.run.forget_kept_log();
        if let Err(e) = self.announcer.ready(&self.state) {
            let nobody = Error::from(e).at("nobody waits for this disk any more");
            self.fail(Failure::from(&nobody));
        }
    }

    fn start_worker(&mut self) {
        let capture = self.log.is_some();
        let started = self
            .held
            .pack(
                &self.config,
                &self.tracking,
                self.served,
                self.health,
                self.state.size,
            )
            .and_then(|(config, bag)| Worker::start(&config, bag, capture));
        self.last_words = None;
        match started {
            Ok(worker) => self.worker = Some(worker),
            Err(e) if self.served => {
                self.survive(&format!("no worker could be started: {e}"), Duration::ZERO);
            }
            Err(e) => self.give_up(Failure::from(&e)),
        }
        self.publish();
    }

    fn attach(&mut self) {
        let read_only = self.config.read_only;
        self.send(Task::Attach {
            file: self.run.disk(),
            read_only,
        });
    }

    fn send(&mut self, task: Task) {
        match Errand::start(task) {
            Ok(errand) => self.errand = Some(errand),
            Err(e) if self.stopping => {
                tracing::warn!("{e}");
                self.next_detach = Some(Instant::now() + DETACH_AGAIN);
            }
            Err(e) => self.fail(Failure::from(&e)),
        }
    }

    fn on_errand(&mut self) {
        let Some(errand) = self.errand.take() else {
            return;
        };
        if let (Task::Resize { .. }, Some(growth)) = (&errand.task, self.growth.as_mut()) {
            return growth.sized(errand.result());
        }
        let attaching = matches!(errand.task, Task::Attach { .. });
        match errand.result() {
            Ok(device) if attaching => {
                tracing::info!("attached as {}", device.display());
                self.state.device = Some(device.display().to_string());
            }
            Ok(_) => self.state.device = None,
            Err(failure) if attaching => {
                // It may have died with the device attached, which is then detached like any.
                let left = loopdev::attached_under(&self.run.disk()).unwrap_or_default();
                self.state.device = left.first().map(|l| format!("/dev/loop{}", l.number));
                self.fail(failure);
            }
            // Nothing is served through it any more, and the kernel detaches it with its last user.
            Err(failure) if self.settled && failure.kind == kind_name(Kind::Busy) => {
                tracing::warn!("left to its last user: {}", failure.message);
                self.state.device = None;
            }
            Err(failure) => {
                tracing::warn!("detaching: {}", failure.message);
                self.next_detach = Some(Instant::now() + DETACH_AGAIN);
            }
        }
        self.publish();
    }

    /// Copies what the worker printed into the log, at most so many pieces of it.
    fn copy_output(&mut self, most: usize) {
        let output = self.worker.as_ref().and_then(|w| w.output.as_ref());
        let (Some(output), Some(log)) = (output, &self.log) else {
            return;
        };
        let mut buf = [0u8; PIECE];
        let again = |fd: &OwnedFd| {
            let mut fds = [PollFd::new(fd, PollFlags::IN)];
            let none = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            poll(&mut fds, Some(&none)).is_ok_and(|n| n > 0)
        };
        let mut ended = false;
        for _ in 0..most {
            if ended || !again(output) {
                break;
            }
            match rustix::io::read(output, &mut buf) {
                Ok(n) if n > 0 => log.raw(buf.get(..n).unwrap_or_default()),
                Err(rustix::io::Errno::INTR) => {}
                _ => ended = true,
            }
        }
        if ended {
            log.end_raw();
        }
        if let Some(worker) = self.worker.as_mut().filter(|_| ended) {
            worker.output = None;
        }
    }

    /// Hears what the worker has to say, at most so many messages.
    fn hear(&mut self, most: usize) {
        for _ in 0..most {
            let Some(event) = self.worker.as_mut().and_then(Worker::event) else {
                break;
            };
            match event {
                _ if self.worker.as_ref().is_some_and(|w| w.condemned) => {}
                Event::Ready {
                    size,
                    engine,
                    cache,
                    poisoned,
                    version,
                    limit,
                } => {
                    if let Some(worker) = self.worker.as_mut() {
                        worker.ready = Some(Instant::now());
                    }
                    if let Some((snapshot, _)) = self.snapshot.as_mut() {
                        snapshot.serves(self.worker.as_ref());
                    }
                    self.served = true;
                    if self.health == Health::Broken {
                        continue;
                    }
                    self.health = Health::Sound;
                    self.sized(size);
                    self.version = version;
                    self.limit = limit.map(Limit);
                    self.state.engine = Some(engine);
                    self.state.cache = cache.name().into();
                    if poisoned {
                        self.on_poison();
                        continue;
                    }
                    self.state.error = None;
                    if !self.stopping {
                        self.state.state = Phase::Serving;
                    }
                    self.publish();
                }
                Event::Resized { size, stall_us } => {
                    match self.growth.as_mut() {
                        Some(growth) => {
                            self.tracking.resized(self.state.size, size);
                            self.state.size = size;
                            growth.resized(size, stall_us);
                        }
                        None => self.sized(size),
                    }
                    self.publish();
                }
                Event::NotResized(why) => {
                    if let Some(growth) = self.growth.as_mut() {
                        growth.not_resized(why);
                    }
                }
                event @ (Event::Tracked { .. }
                | Event::NotTracked { .. }
                | Event::Extents { .. }) => {
                    let is_wanted = |asker| self.control.is_wanted(asker);
                    let (size, worker) = (self.state.size, self.worker.as_ref());
                    let answered = self.tracking.heard(event, worker, is_wanted, size);
                    if let Some(answered) = answered {
                        self.answer_track(answered);
                    }
                }
                event @ (Event::Compacting { .. }
                | Event::Compacted { .. }
                | Event::NotCompacted(_)) => {
                    if let Some(turn) = Compaction::heard(event) {
                        self.on_compaction(turn);
                    }
                }
                event @ (Event::Halted { .. } | Event::NotHalted { .. }) => {
                    self.about_freeze(|f, c, w| f.hear_worker(event, c, w));
                }
                Event::Low => self.on_low(),
                Event::Poisoned => self.on_poison(),
                Event::Frozen | Event::NotFrozen(_) | Event::Went { .. } => self.on_turnover(event),
                words => self.last_words = Some(words),
            }
        }
    }

    /// A worker serves a disk of this size. A predecessor may have died after it had another.
    fn sized(&mut self, size: u64) {
        let old = std::mem::replace(&mut self.state.size, size);
        self.tracking.resized(old, size);
        match self.growth.as_mut() {
            Some(growth) => growth.serves(size),
            None if self.state.device.is_some() && old != size => {
                self.growth = Some(Growth::found(old, size));
            }
            None => {}
        }
    }

    fn on_turnover(&mut self, event: Event) {
        let Some((snapshot, _)) = self.snapshot.as_mut() else {
            return;
        };
        match event {
            Event::Frozen => snapshot.frozen(self.worker.as_ref()),
            Event::NotFrozen(why) => snapshot.not_frozen(why),
            Event::Went { stall_us } => snapshot.went(stall_us),
            _ => {}
        }
        self.end_snapshot();
    }

    /// The worker goes on and lets what is there be read; nobody is told a success any more.
    fn on_poison(&mut self) {
        if self.state.state == Phase::Failed {
            return;
        }
        self.thaw(freeze::Why::Failure);
        self.tracking.doubt();
        let why = "a flush failed, and data may be lost: nothing more can be written; see the \
                   host's log, then use `ploopctl recover`, or detach the disk and check it";
        let failure = self.name(Failure::from(&Error::new(Kind::Poisoned, why)));
        tracing::error!("{}", failure.message);
        self.state.state = Phase::Failed;
        self.state.error = Some(failure.message);
        self.publish();
    }

    fn on_exit(&mut self) {
        let Some(mut worker) = self.worker.take() else {
            return;
        };
        let how = worker
            .reap()
            .map_or_else(|e| e.to_string(), |s| s.to_string());
        let served = worker.ready.map_or(Duration::ZERO, |t| t.elapsed());
        self.on_compaction(compaction::Turn::Over(Err(Compaction::lost())));
        self.thaw(freeze::Why::Worker);
        for answered in self.tracking.lost_worker() {
            self.answer_track(answered);
        }
        if let Some((snapshot, _)) = self.snapshot.as_mut() {
            snapshot.lost_worker();
            snapshot.serves(None);
            self.end_snapshot();
        }
        match self.last_words.take() {
            _ if worker.condemned => self.next_start = Some(Instant::now()),
            Some(Event::Closed) => {
                self.settled = true;
                self.is_closed = self.health == Health::Sound && self.state.state != Phase::Failed;
                self.stop();
            }
            Some(Event::Failed(failure)) if self.can_be_read() => self.unmend(failure),
            Some(Event::Failed(failure)) if self.wants_space(&failure) => {
                self.wait_for_space(&failure);
            }
            Some(Event::Failed(failure)) if self.is_final(&failure) => self.give_up(failure),
            Some(Event::Failed(failure)) => self.survive(&failure.message, served),
            _ if !self.served => {
                let log = self.log.as_ref().map(|log| log.hint(&self.run.kept_log()));
                let log = log.unwrap_or_default();
                let what = format!("the worker died before it served ({how}){log}");
                self.give_up(Failure::from(&Error::new(Kind::Io, what)));
            }
            _ => self.survive(&format!("the worker died ({how})"), served),
        }
        self.publish();
    }

    /// Whether the disk is in use, and another worker can go on with it.
    fn goes_on(&self) -> bool {
        self.served && !self.stopping && self.held.survives()
    }

    /// Whether a worker ended for lack of space only.
    fn wants_space(&self, failure: &Failure) -> bool {
        failure.kind == kind_name(Kind::NoSpace) && self.goes_on()
    }

    /// There is no hurry, and no limit: with space everything goes on by itself.
    fn wait_for_space(&mut self, failure: &Failure) {
        if !self.space.is_low() {
            tracing::warn!("{}; trying again until there is space", failure.message);
        }
        self.state.state = Phase::Recovering;
        self.next_start = Some(Instant::now() + SPACE_AGAIN);
        self.on_low();
    }

    /// Whether a disk that was to be mended could still be read before.
    fn can_be_read(&self) -> bool {
        let tried = self.health == Health::Mending && self.unmended == Health::Sound;
        tried && self.goes_on()
    }

    /// Goes back to what was: a disk that can be read.
    fn unmend(&mut self, failure: Failure) {
        let failure = self.name(failure);
        tracing::error!("not recovered: {}", failure.message);
        self.state.state = Phase::Failed;
        self.state.error = Some(failure.message);
        self.health = Health::Sound;
        self.next_start = Some(Instant::now());
    }

    /// Whether another worker would only say the same.
    fn is_final(&self, failure: &Failure) -> bool {
        let passing = [Kind::Busy, Kind::NoSpace, Kind::Privilege];
        let kind = Error::from(failure.clone()).kind();
        !self.served || self.stopping || !passing.contains(&kind)
    }

    /// Replaces the worker, which had served for so long, unless that is hopeless.
    fn survive(&mut self, why: &str, served: Duration) {
        let pause = match self.held.survives() {
            true => self.restarts.died(Instant::now(), served),
            false => None,
        };
        let Some(pause) = pause else {
            let what = format!("{why}, and the disk is given up; detach it and check it");
            return self.give_up(Failure::from(&Error::new(Kind::Io, what)));
        };
        tracing::error!("{why}; starting another in {} ms", pause.as_millis());
        self.next_start = Some(Instant::now() + pause);
        if !self.stopping {
            self.state.state = Phase::Recovering;
        }
    }

    /// Says which disk it was: a worker knows only the names beneath its directory.
    fn name(&self, failure: Failure) -> Failure {
        let path = &self.state.path;
        let message = match failure.message.starts_with(path.as_str()) {
            true => failure.message,
            false => format!("{path}: {}", failure.message),
        };
        Failure { message, ..failure }
    }

    /// Something failed on the way up: closes what is open in the ordinary order.
    fn fail(&mut self, failure: Failure) {
        let failure = self.name(failure);
        tracing::error!("{}", failure.message);
        self.failure.get_or_insert(failure);
        self.stop();
    }

    /// No worker can serve this disk any more: every request from now on fails with EIO, until
    /// the disk is recovered or detached.
    fn give_up(&mut self, failure: Failure) {
        let failure = self.name(failure);
        tracing::error!("giving up: {}", failure.message);
        self.thaw(freeze::Why::Failure);
        self.next_start = None;
        self.state.state = Phase::Failed;
        self.state.error = Some(failure.message.clone());
        self.failure.get_or_insert(failure);
        let attached = self.state.device.is_some() || self.errand.is_some();
        let fuse = matches!(self.held.endpoint, Endpoint::Fuse { .. });
        if attached && fuse && self.held.survives() && self.health != Health::Broken {
            self.health = Health::Broken;
            self.next_start = Some(Instant::now());
        } else {
            self.let_go(attached);
        }
        self.publish();
    }

    /// Not even errors can be answered.
    fn let_go(&mut self, attached: bool) {
        self.settled = true;
        if let Endpoint::Fuse { fds, .. } = &mut self.held.endpoint {
            // Nobody else holds one: the kernel ends the session and fails what waits.
            fds.clear();
        }
        self.held.counters.forget_unanswered();
        if !attached {
            self.stopping = true;
        }
    }

    /// Releases everything, in order, and says how it went.
    fn wind_down(self) -> Result<()> {
        let Self {
            run,
            held,
            mut announcer,
            failure,
            state,
            tracking,
            is_closed,
            ..
        } = self;
        let is_kept = is_closed && held.keeps_trackers();
        release(held.endpoint, &run);
        if is_kept {
            let (dir, top) = (&held.dir, held.locks.top());
            if let Err(e) = kept::store(dir, top, state.size, tracking.rest()) {
                tracing::warn!("{}: its trackers are not kept: {e}", kept::FILE);
            }
        }
        tracing::info!("detached");
        drop(held.locks);
        run.finish(&Outcome {
            failure: failure.clone(),
        });
        let Some(failure) = failure else {
            return Ok(());
        };
        if !announcer.is_done() {
            announcer.failed(&failure);
        }
        Err(failure.into())
    }
}
