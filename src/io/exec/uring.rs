//! The ring driver: operations through io_uring, completions back to tasks.
//!
//! [`Ring::submit`] is the one unsafe entry: what the kernel is given must be owned by the
//! operation, which stays in the slab until its completion was seen. Requests in flight are
//! bounded below the size of the completion queue; the rest waits in a backlog. Cancels have
//! their own queue and are never dropped. Memory is never freed because a ring is closed: a ring
//! that cannot be drained leaks its operations.

use super::core::Core;
use super::op::{Op, Orphan};
use super::wake::Mailbox;
use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Entries of the submission queue: a larger batch is submitted in several calls.
const SUBMISSIONS: u32 = 128;
/// Entries of the completion queue.
const COMPLETIONS: u32 = 1024;
/// File operations in flight. They always end.
const FILES_MAX: usize = 510;
/// Stream operations in flight. They may wait for ever, so they have a limit of their own: idle
/// connections must not keep files from being read.
const STREAMS_MAX: usize = 256;
// Completions never overflow: streams are cancelled, files are not, the bell has two.
const _: () = assert!(FILES_MAX + 2 * STREAMS_MAX + 2 <= COMPLETIONS as usize);

/// How long a thread looks for a completion before it sleeps: as long as a client needs to be woken
/// by our answer and to ask again, which on virtual processors are tens of microseconds.
const SPIN: Duration = Duration::from_micros(100);
/// A wait shorter than this, its wake included, makes the next one worth spinning for.
const CLOSE: Duration = Duration::from_micros(200);
/// Waits without spinning after it failed again and again.
const PENALTY_MAX: u32 = 1024;

/// Tags of completions that belong to no slot. Slot tags end in a slot number, which is smaller.
const BELL: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;

pub(super) struct Ring {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u32>,
    files: Lane,
    streams: Lane,
    cancels: VecDeque<u64>,
    /// Completions to come, all kinds.
    owed: usize,
    bell_armed: bool,
    generation: u32,
    closed: bool,
    patience: Patience,
}

/// Operations of one kind.
struct Lane {
    /// Those that wait for room, oldest first.
    backlog: VecDeque<u32>,
    /// How many the kernel has.
    flying: usize,
    limit: usize,
}

impl Lane {
    fn new(limit: usize) -> Self {
        Self {
            backlog: VecDeque::new(),
            flying: 0,
            limit,
        }
    }
}

struct Slot {
    /// Distinguishes operations that use the slot one after another: a late cancel for an earlier
    /// one must not hit a later one.
    generation: u32,
    state: State,
}

enum State {
    Free,
    Waiting {
        entry: squeue::Entry,
        op: Op,
        waker: Option<Waker>,
    },
    Flying {
        op: Op,
        waker: Option<Waker>,
        abandoned: bool,
    },
    Done {
        op: Op,
        result: i32,
    },
}

/// What a round of completions leaves to do once the driver is no longer borrowed: wakers and
/// destructors are foreign code and may call back.
#[derive(Default)]
pub(super) struct Harvest {
    pub(super) wakers: Vec<Waker>,
    orphans: Vec<(Op, i32)>,
}

impl Harvest {
    pub(super) fn finish(&mut self) {
        for waker in self.wakers.drain(..) {
            waker.wake();
        }
        for (op, result) in self.orphans.drain(..) {
            op.discard(result);
        }
    }
}

impl Ring {
    /// Makes a ring with the best flags this kernel takes.
    pub(super) fn new() -> io::Result<Self> {
        let ring = build()?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::other(
                "io_uring of this kernel is too old (5.11 is needed)",
            ));
        }
        enable(&ring)?;
        Ok(Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            files: Lane::new(FILES_MAX),
            streams: Lane::new(STREAMS_MAX),
            cancels: VecDeque::new(),
            owed: 0,
            bell_armed: false,
            generation: 0,
            closed: false,
            patience: Patience::new(),
        })
    }

    /// Starts an operation, or queues it where there is no room; returns its slot.
    ///
    /// # Safety
    ///
    /// Every address in `entry` must lie in heap or static memory that `op` keeps alive and, if
    /// the kernel writes there, that nobody else touches; its descriptor must be `op.fd`.
    unsafe fn submit(&mut self, entry: squeue::Entry, op: Op) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                state: State::Free,
            });
            (self.slots.len() - 1) as u32
        });
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let entry = entry.user_data(tag(slot, generation));
        let state = if self.closed {
            State::Done {
                op,
                result: -libc::ECANCELED,
            }
        } else {
            self.lane(&op).backlog.push_back(slot);
            State::Waiting {
                entry,
                op,
                waker: None,
            }
        };
        self.slots[slot as usize] = Slot { generation, state };
        self.fill();
        slot
    }

    fn lane(&mut self, op: &Op) -> &mut Lane {
        match op.orphan {
            Orphan::Cancel => &mut self.streams,
            Orphan::Land(_) => &mut self.files,
        }
    }

    /// Moves cancels, then waiting operations, into the submission queue while there is room.
    fn fill(&mut self) {
        while let Some(&target) = self.cancels.front() {
            let entry = opcode::AsyncCancel::new(target).build().user_data(CANCEL);
            if !self.push(&entry) {
                return;
            }
            self.cancels.pop_front();
        }
        while let Some(slot) = next_of(&self.streams) {
            if !self.launch(slot) {
                return;
            }
            self.streams.backlog.pop_front();
        }
        while let Some(slot) = next_of(&self.files) {
            if !self.launch(slot) {
                return;
            }
            self.files.backlog.pop_front();
        }
    }

    /// Puts a waiting operation into the submission queue, unless that is full.
    fn launch(&mut self, slot: u32) -> bool {
        let state = mem::replace(&mut self.slots[slot as usize].state, State::Free);
        let State::Waiting { entry, op, waker } = state else {
            unreachable!("a backlog holds waiting operations")
        };
        let pushed = self.push(&entry);
        self.slots[slot as usize].state = if pushed {
            self.lane(&op).flying += 1;
            State::Flying {
                op,
                waker,
                abandoned: false,
            }
        } else {
            State::Waiting { entry, op, waker }
        };
        pushed
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: callers push entries of operations that the slab owns (see `submit`), or ones
        // that name no memory at all.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.owed += usize::from(pushed);
        pushed
    }

    /// Submits what waits and collects completions; with `wait`, sleeps until there is one, the
    /// bell rings or the time is over.
    pub(super) fn turn(
        &mut self,
        mail: &Mailbox,
        wait: bool,
        time: Option<Duration>,
        harvest: &mut Harvest,
    ) -> io::Result<()> {
        self.arm_bell(mail);
        self.fill();
        while self.ring.submission().is_full() {
            self.enter(false, None)?;
            self.fill();
            self.reap(mail, harvest);
        }
        // Without a bell nobody could end the sleep: it rang just now, or the queue had no room.
        let wait = wait
            && self.bell_armed
            && harvest.wakers.is_empty()
            && self.ring.completion().is_empty();
        let began = wait.then(Instant::now);
        if wait && self.patience.spins() {
            self.spin(time)?;
        }
        self.enter(wait, time)?;
        self.reap(mail, harvest);
        if let Some(began) = began {
            self.patience.learn(began.elapsed());
        }
        Ok(())
    }

    /// Looks for a completion for a little while before sleeping. It costs less than to be put to
    /// sleep and woken, above all to the one who would have to wake us.
    fn spin(&mut self, time: Option<Duration>) -> io::Result<()> {
        self.enter(false, None)?;
        let began = Instant::now();
        let limit = time.map_or(SPIN, |time| time.min(SPIN));
        while self.nothing_came() && began.elapsed() < limit {
            // Whoever else wants this processor has it.
            std::thread::yield_now();
        }
        let in_vain = self.nothing_came();
        self.patience.spun(!in_vain);
        Ok(())
    }

    fn nothing_came(&mut self) -> bool {
        self.ring.completion().is_empty() && !self.ring.submission().taskrun()
    }

    fn arm_bell(&mut self, mail: &Mailbox) {
        if !self.bell_armed && !self.closed {
            let fd = types::Fd(mail.bell.as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .build()
                .user_data(BELL);
            self.bell_armed = self.push(&entry);
        }
    }

    fn enter(&mut self, wait: bool, time: Option<Duration>) -> io::Result<()> {
        if !wait && self.nothing_to_tell() {
            return Ok(());
        }
        let result = match time {
            Some(time) if wait => {
                let time = types::Timespec::from(time);
                self.ring
                    .submitter()
                    .submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
            _ => self.ring.submitter().submit_and_wait(usize::from(wait)),
        };
        match result {
            Ok(_) => Ok(()),
            // Interrupted, out of time, or short of memory for more requests: completions come
            // first, the next turn tries again.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Nothing to submit, and the kernel has no work that only runs when it is entered.
    fn nothing_to_tell(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.is_empty() && !queue.taskrun() && !queue.cq_overflow()
    }

    fn reap(&mut self, mail: &Mailbox, harvest: &mut Harvest) {
        loop {
            let next = self.ring.completion().next();
            let Some(done) = next else { return };
            self.owed -= 1;
            match done.user_data() {
                CANCEL => {}
                BELL => {
                    self.bell_armed = false;
                    mail.silence();
                }
                tag => self.complete(tag as u32, done.result(), harvest),
            }
        }
    }

    fn complete(&mut self, slot: u32, result: i32, harvest: &mut Harvest) {
        let state = &mut self.slots[slot as usize].state;
        let State::Flying {
            op,
            waker,
            abandoned,
        } = mem::replace(state, State::Free)
        else {
            unreachable!("a completion belongs to an operation in flight")
        };
        self.lane(&op).flying -= 1;
        let state = &mut self.slots[slot as usize].state;
        if abandoned {
            self.free.push(slot);
            harvest.orphans.push((op, result));
        } else {
            *state = State::Done { op, result };
            harvest.wakers.extend(waker);
        }
    }

    /// The outcome of `slot`, if it is there; else `waker` is called when it is.
    fn outcome(&mut self, slot: u32, with: &Waker) -> Poll<(Op, i32)> {
        let state = &mut self.slots[slot as usize].state;
        match state {
            State::Waiting { waker, .. } | State::Flying { waker, .. } => {
                match waker {
                    Some(old) => old.clone_from(with),
                    None => *waker = Some(with.clone()),
                }
                Poll::Pending
            }
            State::Done { .. } | State::Free => {
                let State::Done { op, result } = mem::replace(state, State::Free) else {
                    unreachable!("an operation is asked for until it is done, not after")
                };
                self.free.push(slot);
                Poll::Ready((op, result))
            }
        }
    }

    /// Nobody waits for `slot` any more. Returns what can be released at once.
    fn abandon(&mut self, slot: u32) -> Option<(Op, i32)> {
        let place = &mut self.slots[slot as usize];
        match &mut place.state {
            State::Flying {
                op,
                abandoned,
                waker,
            } => {
                *abandoned = true;
                *waker = None;
                match &op.orphan {
                    Orphan::Cancel => self.cancels.push_back(tag(slot, place.generation)),
                    Orphan::Land(Some(witness)) => witness.abandoned(),
                    Orphan::Land(None) => {}
                }
                None
            }
            State::Waiting { .. } => {
                self.files.backlog.retain(|&waiting| waiting != slot);
                self.streams.backlog.retain(|&waiting| waiting != slot);
                self.release(slot)
            }
            State::Done { op, .. } => {
                // A result that nobody took: a failed flush, say, must not be forgotten.
                if let Orphan::Land(Some(witness)) = &op.orphan {
                    witness.abandoned();
                }
                self.release(slot)
            }
            State::Free => None,
        }
    }

    fn release(&mut self, slot: u32) -> Option<(Op, i32)> {
        self.free.push(slot);
        match mem::replace(&mut self.slots[slot as usize].state, State::Free) {
            State::Waiting { mut op, .. } => {
                // Never started: there is nothing to witness.
                op.orphan = Orphan::Land(None);
                Some((op, -libc::ECANCELED))
            }
            State::Done { op, result } => Some((op, result)),
            State::Flying { .. } | State::Free => None,
        }
    }

    /// Refuses new operations, cancels those in flight and waits for every completion.
    pub(super) fn drain(&mut self, mail: &Mailbox, harvest: &mut Harvest) {
        self.closed = true;
        let waiting = mem::take(&mut self.streams.backlog).into_iter();
        for slot in waiting.chain(mem::take(&mut self.files.backlog)) {
            let state = &mut self.slots[slot as usize].state;
            if let State::Waiting { op, waker, .. } = mem::replace(state, State::Free) {
                *state = State::Done {
                    op,
                    result: -libc::ECANCELED,
                };
                harvest.wakers.extend(waker);
            }
        }
        for (slot, place) in self.slots.iter().enumerate() {
            let State::Flying {
                op,
                abandoned: false,
                ..
            } = &place.state
            else {
                continue;
            };
            if matches!(op.orphan, Orphan::Cancel) {
                self.cancels.push_back(tag(slot as u32, place.generation));
            }
        }
        if self.bell_armed {
            self.cancels.push_back(BELL);
        }
        while self.owed > 0 || !self.cancels.is_empty() {
            self.fill();
            let wait = self.cancels.is_empty() && self.ring.completion().is_empty();
            if let Err(error) = self.enter(wait, None) {
                // The kernel may write to these buffers, and to the disk, at any time from now on.
                tracing::error!("cannot wait for {} operations: {error}", self.owed);
                std::process::abort();
            }
            self.reap(mail, harvest);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        debug_assert!(
            self.owed == 0 || std::thread::panicking(),
            "a ring is drained before"
        );
        if self.owed > 0 {
            mem::forget(mem::take(&mut self.slots));
        }
    }
}

/// Whether spinning before a sleep pays. A processor that spins does nobody else's work, so it is
/// done only while answers follow each other closely, and after spinning for nothing it is left for
/// a while, each time for longer.
struct Patience {
    /// Somebody else can run meanwhile.
    company: bool,
    /// The last wait was short.
    close: bool,
    /// Waits to come before the next try, and how many the next failure adds.
    pause: u32,
    penalty: u32,
}

impl Patience {
    fn new() -> Self {
        Self {
            company: std::thread::available_parallelism().is_ok_and(|n| n.get() > 1),
            close: false,
            pause: 0,
            penalty: 0,
        }
    }

    fn spins(&mut self) -> bool {
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        self.company && self.close
    }

    fn spun(&mut self, well: bool) {
        if well {
            self.penalty = self.penalty.saturating_sub(1);
        } else {
            self.penalty = (self.penalty * 2).clamp(1, PENALTY_MAX);
            self.pause = self.penalty;
        }
    }

    fn learn(&mut self, waited: Duration) {
        self.close = waited < CLOSE;
    }
}

fn next_of(lane: &Lane) -> Option<u32> {
    lane.backlog
        .front()
        .copied()
        .filter(|_| lane.flying < lane.limit)
}

/// Slot and generation in one word; never [`BELL`] or [`CANCEL`], as slots are few.
fn tag(slot: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(slot)
}

/// The operations used here. A ring accepts no other: it could open files and sockets behind the
/// sandbox's back.
const OPERATIONS: [u8; 9] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::SendMsg::CODE,
    opcode::Accept::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

fn build() -> io::Result<IoUring> {
    let sized = || {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(COMPLETIONS).setup_r_disabled();
        builder
    };
    let best = sized()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(SUBMISSIONS);
    // Kernels before 6.1 know no deferred task work, those before 5.19 none of the flags.
    best.or_else(|_| {
        sized()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(SUBMISSIONS)
    })
    .or_else(|_| sized().build(SUBMISSIONS))
}

/// Starts a ring that knows every operation used here, and makes it refuse any other.
fn enable(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if let Some(code) = OPERATIONS.iter().find(|&&code| !probe.is_supported(code)) {
        return Err(io::Error::other(format!("io_uring lacks operation {code}")));
    }
    let mut allowed = OPERATIONS.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}

/// An operation's result, to come. Dropping it leaves the operation, its memory and its
/// descriptor with the driver until the completion.
pub(super) struct Pending {
    core: Rc<Core>,
    slot: Option<u32>,
}

impl Pending {
    /// Starts an operation on the ring of `core`.
    ///
    /// # Safety
    ///
    /// As for [`Ring::submit`].
    pub(super) unsafe fn start(core: &Rc<Core>, entry: squeue::Entry, op: Op) -> Self {
        // SAFETY: the caller's promise.
        let slot = core.with_ring(|ring| unsafe { ring.submit(entry, op) });
        Self {
            core: Rc::clone(core),
            slot: Some(slot),
        }
    }
}

impl Future for Pending {
    type Output = (Op, i32);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let slot = self.slot.expect("a finished operation is not polled again");
        let outcome = self.core.with_ring(|ring| ring.outcome(slot, cx.waker()));
        if outcome.is_ready() {
            self.slot = None;
        }
        outcome
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let released = self.core.with_ring(|ring| ring.abandon(slot));
            if let Some((op, result)) = released {
                op.discard(result);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_in_vain_is_left_for_longer_each_time() {
        let mut patience = Patience {
            company: true,
            ..Patience::new()
        };
        assert!(!patience.spins(), "nothing is known yet");
        patience.learn(CLOSE / 2);
        let mut tries = 0;
        for _ in 0..10_000 {
            if patience.spins() {
                tries += 1;
                patience.spun(false);
            }
        }
        assert!((10..30).contains(&tries), "{tries}");
        patience.learn(CLOSE * 2);
        assert!(
            (0..5000).all(|_| !patience.spins()),
            "answers are far apart"
        );
    }
}
