//! The transmission phase of one connection: receive, run, answer, on one executor.
//!
//! The reader takes requests off the socket and starts each at once; what does not finish at once
//! goes on as a task. The writer sends every answer that is there. Both are polled by one task,
//! the reader first, so that all that arrived together is answered together.
//!
//! A request that was started runs to completion whatever becomes of the connection: a session
//! ends only after the last. What a client can make us hold is bounded: beyond
//! [`limits::REQUESTS_IN_FLIGHT`] or [`limits::BYTES_IN_FLIGHT`] nothing more is received.

use super::command::{self, Answer, Export, Op, Payload, Refusal, Status};
use super::handshake::Terms;
use super::intake::{End, Intake};
use super::limits;
use super::link::Link;
use super::outbox::{Encoder, Reply};
use super::pool::Pool;
use super::proto::{Request, command as number};
use super::stop::Stop;
use crate::device::Device;
use crate::io::exec;
use bytes::{Bytes, BytesMut};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

/// What a session came to.
#[derive(Debug)]
pub(super) struct Summary {
    /// Why it ended.
    pub(super) end: End,
    /// Requests answered, or finished with nobody to tell.
    pub(super) served: u64,
    /// Requests that failed in the device, and what the first said.
    pub(super) failed: u64,
    /// See `failed`.
    pub(super) first_failure: Option<String>,
}

/// Serves one client until it leaves, breaks or `stop` is set, and everything it asked for is done.
/// `early` is what it sent behind the negotiation.
pub(super) async fn run<D: Device + 'static>(
    link: Link,
    early: BytesMut,
    device: Arc<D>,
    terms: Terms,
    stop: &Stop,
) -> Summary {
    let mut intake = Intake::new(&link, terms.style, &early, stop.watcher());
    drop(early);
    let desk = Rc::new(Desk::new(device, terms));
    let end = {
        let mut reader = pin!(read(Rc::clone(&desk), &mut intake));
        let mut writer = pin!(write(Rc::clone(&desk), &link));
        let (mut end, mut deadline) = (None, None);
        poll_fn(|cx| {
            desk.polled.set(true);
            let sent = loop {
                if end.is_none()
                    && let Poll::Ready(reason) = reader.as_mut().poll(cx)
                {
                    end = Some(reason);
                    desk.closing.set(true);
                }
                let sent = writer.as_mut().poll(cx);
                let reader_goes_on = desk.room_made.take() && desk.starved.get();
                if sent.is_ready() || end.is_some() || !reader_goes_on {
                    break sent;
                }
            };
            desk.polled.set(false);
            match patience(&desk, &mut deadline, cx) {
                _ if sent.is_ready() => sent.map(|sent| (end.take(), sent)),
                Poll::Ready(()) => Poll::Ready((end.take(), Err(io::ErrorKind::TimedOut.into()))),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    };
    let summary = finish(&desk, end).await;
    link.say_goodbye();
    summary
}

/// When a client that takes its leave must have taken another answer, and how many it had then; and
/// when it must have taken all of them.
struct Deadline {
    served: u64,
    over: Pin<Box<dyn Future<Output = ()>>>,
    end: Instant,
}

/// Ready when a client that takes its leave does not take its last answers in time.
fn patience<D: Device>(
    desk: &Desk<D>,
    deadline: &mut Option<Deadline>,
    cx: &mut Context<'_>,
) -> Poll<()> {
    if !desk.closing.get() || desk.running.get() != 0 {
        return Poll::Pending;
    }
    let served = desk.served.get();
    let now = Instant::now();
    let until = |end: Instant| {
        let time = limits::DRAIN_DEADLINE.min(end.saturating_duration_since(now));
        Deadline {
            served,
            over: Box::pin(exec::sleep(time)),
            end,
        }
    };
    let deadline = deadline.get_or_insert_with(|| until(now + limits::DRAIN_MAX));
    if deadline.served != served {
        *deadline = until(deadline.end);
    }
    deadline.over.as_mut().poll(cx)
}

/// Waits for what still runs. Answers have nowhere to go any more.
async fn finish<D: Device>(desk: &Desk<D>, end: (Option<End>, io::Result<()>)) -> Summary {
    desk.broken.set(true);
    desk.queue.borrow_mut().clear();
    desk.until(|| desk.running.get() == 0).await;
    let end = match end {
        (Some(end @ (End::Violation(_) | End::Lost(_))), _) | (Some(end), Ok(())) => end,
        (_, Err(error)) => End::Lost(error),
        (None, Ok(())) => unreachable!("the writer ends after the reader, or fails"),
    };
    Summary {
        end,
        served: desk.served.get(),
        failed: desk.failed.get(),
        first_failure: desk.first_failure.take(),
    }
}

/// What reader, writer and running requests share; all on one thread.
struct Desk<D> {
    device: Arc<D>,
    terms: Terms,
    queue: RefCell<VecDeque<Reply>>,
    /// Bytes of the answers in the queue.
    queued: Cell<usize>,
    pool: RefCell<Pool>,
    /// Requests admitted and not yet answered, and what they hold.
    requests: Cell<usize>,
    bytes: Cell<usize>,
    /// Requests that run.
    running: Cell<usize>,
    /// No request comes any more.
    closing: Cell<bool>,
    /// No answer can be sent any more.
    broken: Cell<bool>,
    /// The session's task, and whether it is being polled: then it looks by itself.
    task: RefCell<Waker>,
    polled: Cell<bool>,
    /// The reader waits for room, which the writer made.
    starved: Cell<bool>,
    room_made: Cell<bool>,
    /// A task waits for the connection to be idle, to empty the pool.
    trimming: Cell<bool>,
    served: Cell<u64>,
    failed: Cell<u64>,
    first_failure: RefCell<Option<String>>,
}

impl<D: Device> Desk<D> {
    fn new(device: Arc<D>, terms: Terms) -> Self {
        Self {
            device,
            terms,
            queue: RefCell::default(),
            queued: Cell::new(0),
            pool: RefCell::default(),
            requests: Cell::new(0),
            bytes: Cell::new(0),
            running: Cell::new(0),
            closing: Cell::new(false),
            broken: Cell::new(false),
            task: RefCell::new(Waker::noop().clone()),
            polled: Cell::new(false),
            starved: Cell::new(false),
            room_made: Cell::new(false),
            trimming: Cell::new(false),
            served: Cell::new(0),
            failed: Cell::new(0),
            first_failure: RefCell::default(),
        }
    }

    /// Something changed that the session's task may wait for.
    fn notify(&self) {
        if !self.polled.get() {
            self.task.borrow().wake_by_ref();
        }
    }

    /// Waits for a condition that changes only together with a call of `notify`.
    async fn until(&self, condition: impl Fn() -> bool) {
        poll_fn(|cx| {
            if condition() {
                return Poll::Ready(());
            }
            self.task.borrow_mut().clone_from(cx.waker());
            Poll::Pending
        })
        .await;
    }

    fn export(&self) -> Export {
        Export {
            size: self.device.size(),
            read_only: self.device.read_only(),
        }
    }

    /// Whether a request that holds `cost` bytes may start. One alone always may.
    fn has_room(&self, cost: usize) -> bool {
        let (requests, bytes) = (self.requests.get(), self.bytes.get());
        let fits = bytes == 0 || bytes.saturating_add(cost) <= limits::BYTES_IN_FLIGHT;
        let unsent = self.queued.get() < limits::BATCH_BYTES
            && self.queue.borrow().len() < limits::BATCH_REPLIES;
        requests < limits::REQUESTS_IN_FLIGHT && fits && unsent
    }

    fn admit(&self, cost: usize) {
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + cost);
    }

    fn release(&self, requests: usize, cost: usize) {
        self.requests.set(self.requests.get() - requests);
        self.bytes.set(self.bytes.get() - cost);
        self.served.set(self.served.get() + requests as u64);
        self.room_made.set(true);
    }

    /// Queues the answer of an admitted request.
    fn answer(&self, request: &Request, cost: usize, answer: Answer) {
        if self.broken.get() {
            self.release(1, cost);
            return;
        }
        self.queued.set(self.queued.get() + weight(&answer));
        let reply = Reply {
            cookie: request.cookie,
            offset: request.offset,
            cost,
            answer,
        };
        self.queue.borrow_mut().push_back(reply);
        self.notify();
    }

    /// Answers with so many bytes of data left the queue.
    fn sending(&self, bytes: usize) {
        self.queued.set(self.queued.get() - bytes);
        self.room_made.set(true);
    }

    fn note_failure(&self, refusal: &Refusal) {
        self.failed.set(self.failed.get() + 1);
        let mut first = self.first_failure.borrow_mut();
        first.get_or_insert_with(|| refusal.text.to_string());
    }
}

fn weight(answer: &Answer) -> usize {
    match answer {
        Answer::Data(data) => data.len(),
        _ => 0,
    }
}

/// Reads requests until there is a reason to end.
async fn read<D: Device + 'static>(desk: Rc<Desk<D>>, intake: &mut Intake<'_>) -> End {
    loop {
        let request = match intake.request().await {
            Ok(request) if request.command == number::DISC => return End::Client,
            Ok(request) => request,
            Err(end) => return end,
        };
        if let Err(end) = take(&desk, intake, request).await {
            return end;
        }
    }
}

/// Receives the rest of a request and starts it.
async fn take<D: Device + 'static>(
    desk: &Rc<Desk<D>>,
    intake: &mut Intake<'_>,
    request: Request,
) -> Result<(), End> {
    let payload = payload_len(desk, &request)?;
    let plan = command::plan(&request, &desk.terms, desk.export());
    let cost = plan.as_ref().map_or(0, Op::cost);
    if !desk.has_room(cost) {
        desk.starved.set(true);
        intake
            .unless_stopped(desk.until(|| desk.has_room(cost)))
            .await?;
        desk.starved.set(false);
    }
    let op = match plan {
        Ok(op) => op,
        Err(refusal) => {
            intake.skip(payload).await?;
            desk.admit(0);
            desk.answer(&request, 0, Answer::Failed(refusal));
            return Ok(());
        }
    };
    let job = match gather(desk, intake, op).await? {
        Ok((op, data)) => Job {
            request,
            cost,
            op,
            data,
        },
        Err(refusal) => {
            desk.admit(cost);
            desk.answer(&request, cost, Answer::Failed(refusal));
            return Ok(());
        }
    };
    desk.admit(cost);
    start(desk, job).await;
    Ok(())
}

/// Bytes that follow the header.
fn payload_len<D: Device>(desk: &Desk<D>, request: &Request) -> Result<u64, End> {
    match request.payload(desk.terms.style) {
        len if len <= limits::PAYLOAD_MAX => Ok(len),
        len => Err(End::Violation(format!("a payload of {len} bytes"))),
    }
}

/// Brings what a request needs to run: the payload, or room for data.
async fn gather<D: Device>(
    desk: &Desk<D>,
    intake: &mut Intake<'_>,
    op: Op,
) -> Result<Result<(Op, Payload), Refusal>, End> {
    Ok(match op {
        Op::Read { len, .. } => Ok((op, Payload::Room(desk.pool.borrow_mut().take(len)))),
        Op::Write { len, .. } => Ok((op, Payload::Data(intake.payload(len, &desk.pool).await?))),
        Op::StatusPayload { at, len, one } => {
            let payload = intake.payload(len, &desk.pool).await?;
            Status::parse(at, one, &payload, &desk.terms, desk.export())
                .map(|status| (Op::Status(status), Payload::None))
        }
        op => Ok((op, Payload::None)),
    })
}

/// A request that is complete.
struct Job {
    request: Request,
    cost: usize,
    op: Op,
    data: Payload,
}

/// Runs a request as far as it goes without waiting; the rest is a task of its own.
async fn start<D: Device + 'static>(desk: &Rc<Desk<D>>, job: Job) {
    let mut task = Box::pin(perform(Rc::clone(desk), job));
    let finished = poll_fn(|cx| Poll::Ready(task.as_mut().poll(cx).is_ready())).await;
    if !finished {
        exec::spawn(task);
    }
}

async fn perform<D: Device + 'static>(desk: Rc<Desk<D>>, job: Job) {
    let Job {
        request,
        cost,
        op,
        data,
    } = job;
    desk.running.set(desk.running.get() + 1);
    let written = match &data {
        Payload::Data(data) => data.clone(),
        _ => Bytes::new(),
    };
    let answer = op.run(&*desk.device, &desk.terms, data).await;
    desk.pool.borrow_mut().give(written);
    if let Answer::Failed(refusal) = &answer {
        desk.note_failure(refusal);
    }
    desk.running.set(desk.running.get() - 1);
    desk.answer(&request, cost, answer);
    desk.notify();
}

/// Sends answers until none comes any more.
async fn write<D: Device + 'static>(desk: Rc<Desk<D>>, link: &Link) -> io::Result<()> {
    let mut encoder = Encoder::new(desk.terms.style);
    let over = || desk.closing.get() && desk.running.get() == 0;
    loop {
        desk.until(|| !desk.queue.borrow().is_empty() || over())
            .await;
        let batch = encoder.batch(&mut desk.queue.borrow_mut());
        if batch.requests == 0 {
            return Ok(());
        }
        desk.sending(batch.lent.iter().map(Bytes::len).sum());
        link.send_all(batch.parts).await?;
        let mut pool = desk.pool.borrow_mut();
        batch.lent.into_iter().for_each(|data| pool.give(data));
        drop(pool);
        desk.release(batch.requests, batch.cost);
        trim_later(&desk);
    }
}

/// Empties the pool once the connection has been idle for a while.
fn trim_later<D: Device + 'static>(desk: &Rc<Desk<D>>) {
    if desk.pool.borrow().is_empty() || desk.trimming.replace(true) {
        return;
    }
    let desk = Rc::downgrade(desk);
    exec::spawn(async move {
        let mut seen = None;
        loop {
            exec::sleep(limits::POOL_IDLE).await;
            let Some(desk) = desk.upgrade() else { return };
            if seen.replace(desk.served.get()) == Some(desk.served.get()) {
                desk.pool.borrow_mut().clear();
                desk.trimming.set(false);
                return;
            }
        }
    });
}
