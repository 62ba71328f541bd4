//! Freeze: how a keeper keeps a disk as it is for somebody, and lets it go on.
//!
//! In order:
//!
//! 1. The file system on the device, where one is mounted, is frozen ([`super::still`]): what it
//!    holds in memory is written, and who wants to write to it waits there.
//! 2. The worker lets nothing in that changes the disk, and flushes ([`super::halt`]).
//! 3. Whoever asked is answered.
//!
//! To go on, the worker lets all in that waits. Then the file system is thawed.
//!
//! A freeze belongs to the connection that asked for it. It ends with that, when its time is over,
//! when it says so, when the worker dies (the next one begins with nothing halted), and when the
//! disk fails or is being detached. Nobody has to be alive for that: the worker and the process
//! that keeps the file system frozen have the time as well, and count it from later on than the
//! keeper does.
//!
//! A freeze never changes a disk, and none is begun while one is being changed.

use super::child::Worker;
use super::control::{Asker, Control};
use super::message::{Event, Failure, Order};
use super::still::{self, Change, Still};
use ploop_formats::{Error, Kind, Result};
use serde_json::{Value, json};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Longest time that can be asked for.
const LONGEST: Duration = Duration::from_secs(600);

/// Why a disk goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Whoever froze it said so.
    Asked,
    /// Whoever froze it is gone.
    HangUp,
    /// The time is over.
    Timeout,
    /// Its worker died.
    Worker,
    /// What kept its file system frozen ended.
    FileSystem,
    /// It is being detached.
    Detach,
    /// It has failed.
    Failure,
}

impl Why {
    /// Its name in an event.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::HangUp => "hang-up",
            Self::Timeout => "timeout",
            Self::Worker => "worker",
            Self::FileSystem => "file-system",
            Self::Detach => "detach",
            Self::Failure => "failure",
        }
    }

    const fn kind(self) -> Kind {
        match self {
            Self::Timeout => Kind::TimedOut,
            Self::Asked | Self::HangUp | Self::Detach => Kind::Cancelled,
            Self::Worker | Self::FileSystem | Self::Failure => Kind::Io,
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::Asked => "whoever froze it said so",
            Self::HangUp => "whoever froze it is gone",
            Self::Timeout => "its time was over",
            Self::Worker => "the worker died",
            Self::FileSystem => "the process that kept the file system frozen ended",
            Self::Detach => "the disk is being detached",
            Self::Failure => "the disk has failed",
        }
    }
}

/// What there is to tell of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// The disk stays as it is.
    Frozen,
    /// The disk goes on.
    Thawed {
        /// Why.
        why: Why,
        /// How long it did not, in microseconds.
        frozen_us: u64,
    },
}

/// Where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The file system is being frozen.
    FileSystem,
    /// The worker has its order.
    Worker,
    /// The disk stays as it is.
    Frozen,
    /// The disk goes on, and its file system does soon.
    Ended,
    /// Nothing is left of it.
    Over,
}

/// One that was asked for.
#[derive(Debug)]
pub(super) struct Freeze {
    /// Whoever asked for it.
    pub asker: Asker,
    /// Tells the worker's answer from that to an older one.
    number: u64,
    asked: Instant,
    most: Duration,
    still: Option<Still>,
    stage: Stage,
    /// Since when somebody waits.
    since: Option<Instant>,
    mounted: bool,
    /// Whoever is to be answered once it is over.
    thawer: Option<Asker>,
}

impl Freeze {
    /// Begins to freeze a disk, and the file system on its device, for so long at most.
    pub fn begin(
        asker: Asker,
        most: Duration,
        device: Option<PathBuf>,
        worker: &Worker,
        number: u64,
    ) -> Result<Self> {
        let mut freeze = Self {
            asker,
            number,
            asked: Instant::now(),
            most,
            still: None,
            stage: Stage::FileSystem,
            since: None,
            mounted: false,
            thawer: None,
        };
        match device {
            Some(device) => {
                let still = Still::start(device, asker, Change::Nothing(most))?;
                freeze.still = Some(still);
            }
            None => freeze.halt(worker)?,
        }
        Ok(freeze)
    }

    /// The time that is asked for, if it can be.
    pub fn time(ms: u64) -> Result<Duration> {
        let time = Duration::from_millis(ms);
        match time.is_zero() || time > LONGEST {
            true => Err(Error::invalid(format!(
                "a freeze lasts from a millisecond to {} seconds",
                LONGEST.as_secs()
            ))),
            false => Ok(time),
        }
    }

    /// What to wait for.
    pub fn polled(&self) -> [Option<BorrowedFd<'_>>; 2] {
        self.still.as_ref().map_or([None; 2], Still::polled)
    }

    /// When its time is over.
    pub fn due(&self) -> Option<Instant> {
        let goes_on = matches!(self.stage, Stage::Ended | Stage::Over);
        (!goes_on).then(|| self.asked + self.most)
    }

    /// Whether nothing is left of it.
    pub fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }

    fn halt(&mut self, worker: &Worker) -> Result<()> {
        let (number, most_ms) = (self.number, self.most.as_millis() as u64);
        worker.order(&Order::Halt { number, most_ms }, &[])?;
        self.stage = Stage::Worker;
        self.since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Hears the process that keeps the file system frozen; `ended` when it has.
    pub fn hear_still(
        &mut self,
        ended: bool,
        control: &mut Control,
        worker: Option<&mut Worker>,
    ) -> Option<News> {
        let still = self.still.as_mut()?;
        let mut turn = still.hear();
        if ended {
            // Whatever it said is heard first. That everybody is still is not true any more.
            while !matches!(still.hear(), still::Turn::Wait) {}
            turn = still.ended(false);
        }
        match (turn, self.stage) {
            (still::Turn::Begin, Stage::FileSystem) => {
                self.mounted = still.mounted;
                self.since = Some(Instant::now());
                let halted = match &worker {
                    Some(worker) => self.halt(worker),
                    None => Err(Error::new(Kind::Busy, "no worker serves the disk")),
                };
                let e = halted.err()?;
                self.give_up(e, control, worker)
            }
            (still::Turn::Over(said), Stage::FileSystem) => {
                self.still = None;
                let missing = || Error::new(Kind::Io, Why::FileSystem.words());
                let e = said.and_then(Result::err).unwrap_or_else(missing);
                self.give_up(e, control, worker)
            }
            (still::Turn::Over(said), Stage::Ended) => {
                self.still = None;
                self.close(said.unwrap_or_else(|| Ok(json!({}))), control);
                None
            }
            (still::Turn::Over(_), _) => {
                self.still = None;
                self.end(self.now_because(Why::FileSystem), control, worker)
            }
            // It may have done it, and another one was sent to undo that.
            (_, Stage::FileSystem) if ended => {
                self.stage = Stage::Ended;
                let e = Error::new(Kind::Io, Why::FileSystem.words());
                control.answer(self.asker, Err(e));
                None
            }
            _ if ended => self.end(self.now_because(Why::FileSystem), control, worker),
            _ => None,
        }
    }

    /// Hears the worker.
    pub fn hear_worker(
        &mut self,
        event: Event,
        control: &mut Control,
        worker: Option<&mut Worker>,
    ) -> Option<News> {
        match event {
            Event::Halted { number } if self.awaits(number) => {
                // It was, and may not be any more.
                if self.is_late() {
                    return self.end(Why::Timeout, control, worker);
                }
                self.stage = Stage::Frozen;
                let took_us = self.asked.elapsed().as_micros() as u64;
                let said = json!({ "filesystem": self.mounted, "took_us": took_us });
                control.answer(self.asker, Ok(said));
                Some(News::Frozen)
            }
            Event::NotHalted { number, why } if self.awaits(number) => {
                self.give_up(why.into(), control, worker)
            }
            _ => None,
        }
    }

    fn awaits(&self, number: u64) -> bool {
        self.stage == Stage::Worker && self.number == number
    }

    /// Lets the disk go on because whoever has frozen it says so, and answers him then.
    pub fn thaw(
        &mut self,
        thawer: Asker,
        control: &mut Control,
        worker: Option<&mut Worker>,
    ) -> Option<News> {
        if self.stage != Stage::Frozen {
            control.answer(thawer, Err(control.lost_freeze(thawer)));
            return None;
        }
        let why = self.now_because(Why::Asked);
        if why == Why::Asked {
            self.thawer = Some(thawer);
        }
        let news = self.end(why, control, worker);
        if why != Why::Asked {
            control.answer(thawer, Err(control.lost_freeze(thawer)));
        }
        news
    }

    /// Why it ends: its time may have been over while this process did something else, or nothing,
    /// and then nobody else has kept it.
    fn now_because(&self, why: Why) -> Why {
        if self.is_late() { Why::Timeout } else { why }
    }

    fn is_late(&self) -> bool {
        self.due().is_some_and(|due| due <= Instant::now())
    }

    /// Lets the disk go on.
    pub fn end(
        &mut self,
        why: Why,
        control: &mut Control,
        worker: Option<&mut Worker>,
    ) -> Option<News> {
        let frozen_us = self.since.map_or(0, |since| since.elapsed().as_micros());
        let frozen_us = frozen_us as u64;
        match self.stage {
            Stage::Ended | Stage::Over => None,
            Stage::FileSystem | Stage::Worker => {
                let what = format!("not frozen: {}", why.words());
                self.give_up(Error::new(why.kind(), what), control, worker)
            }
            Stage::Frozen => {
                if why != Why::Asked {
                    control.lose_freeze(self.asker, Failure::from(&lost(why, frozen_us)));
                }
                self.let_go(frozen_us, control, worker);
                Some(News::Thawed { why, frozen_us })
            }
        }
    }

    /// Answers that it came to nothing.
    fn give_up(
        &mut self,
        why: Error,
        control: &mut Control,
        worker: Option<&mut Worker>,
    ) -> Option<News> {
        control.answer(self.asker, Err(why));
        self.let_go(0, control, worker);
        None
    }

    /// The worker first, then the file system.
    fn let_go(&mut self, frozen_us: u64, control: &mut Control, worker: Option<&mut Worker>) {
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        if stage != Stage::FileSystem
            && let Some(worker) = worker
            && let Err(e) = worker.order(&Order::Resume, &[])
        {
            // The next one begins with nothing halted.
            tracing::warn!("{e}");
            worker.condemn();
        }
        match (self.still.as_mut(), stage) {
            (None, _) => self.close(Ok(json!({ "frozen_us": frozen_us })), control),
            // It may wait for a file system that hangs. Another one is sent to thaw it.
            (Some(still), Stage::FileSystem) => still.kill(),
            (Some(still), _) => drop(still.finish(Ok(json!({})))),
        }
    }

    fn close(&mut self, said: Result<Value>, control: &mut Control) {
        self.stage = Stage::Over;
        if let Some(thawer) = self.thawer {
            control.answer(thawer, said);
        }
    }
}

/// What whoever froze a disk is told of a freeze that ended without him.
fn lost(why: Why, frozen_us: u64) -> Error {
    let seconds = Duration::from_micros(frozen_us).as_secs_f64();
    let what = format!(
        "thawed {seconds:.3} s after it was frozen, and may have changed since: {}",
        why.words()
    );
    Error::new(why.kind(), what)
}
