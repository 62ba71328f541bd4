//! The server: takes requests from `/dev/fuse`, asks the device, answers.
//!
//! Every request that was taken is answered, whatever happens to the server's own future: a task
//! of the executor owns it. Nothing is held back: a write waits only for the device. Memory is
//! bounded by one budget, which is taken before a request is read, so that a request is never in
//! hand without the means to answer it.

use bytes::{Bytes, BytesMut};
use ploop_formats::{Error, Kind, Result, buf};
use rustix::io::{Errno, retry_on_intr};
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::abi::{self, Attr, Range, SetAttr, WRITE_HEAD};
use super::pool::{Loan, Pool, touch};
use super::request::{Ask, Request};
use super::session::Session;
use crate::device::{Device, Zero};
use crate::io::exec;
use crate::serve::complaints::Complaints;

/// Payloads up to this are copied out of the read buffer: cheaper than a fresh large buffer.
const COPY_MAX: usize = 64 << 10;
/// Bytes of payload in flight, 4 KiB a budget unit.
const BUDGET: usize = 16 << 20;
/// Requests taken before those taken get their turn.
const BATCH: u64 = 32;
/// How long a disk is quiet before spare buffers are freed.
const QUIET: Duration = Duration::from_secs(1);

/// Why [`serve`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The file is unmounted, or the session was aborted: the descriptor is of no more use.
    Unmounted,
    /// Told to stop. Every request that was taken is answered. One that came at that very moment
    /// may not have been: the next worker's [`super::resend`] brings it back.
    Stopped,
}

/// Serves `device` on a session until it is unmounted or `stop` is ready; either way after the
/// last request in hand is answered. Several threads may serve one descriptor.
///
/// Errors are those of reading `/dev/fuse`; errors of the device go to whoever asked.
pub async fn serve<D: Device + 'static>(
    fd: Arc<OwnedFd>,
    session: &Session,
    device: Arc<D>,
    stop: impl Future<Output = ()>,
) -> Result<End> {
    let server = Rc::new(Server {
        fd,
        device,
        pool: Pool::new(session.max_write as usize),
        budget: Arc::new(Semaphore::new(units(BUDGET) as usize)),
        uid: session.uid,
        gid: session.gid,
    });
    let stopped = async {
        stop.await;
        Ok(End::Stopped)
    };
    let end = first(stopped, take_requests(&server)).await;
    let all = server.budget.acquire_many(units(BUDGET)).await;
    all.expect("the budget is never closed").forget();
    end
}

struct Server<D> {
    fd: Arc<OwnedFd>,
    device: Arc<D>,
    pool: Arc<Pool>,
    budget: Arc<Semaphore>,
    uid: u32,
    gid: u32,
}

/// A request with what it needs to be answered.
struct Job {
    request: Request,
    payload: Bytes,
    budget: OwnedSemaphorePermit,
}

/// An answer: its body, or an errno.
type Answer = std::result::Result<Bytes, i32>;

/// Takes requests until the session is over. Dropped at any point, it holds no request: the
/// descriptor is only waited for, and reading it, beginning what came and making a task of the rest
/// are one step.
async fn take_requests<D: Device + 'static>(server: &Rc<Server<D>>) -> Result<End> {
    let mut kept = None;
    for turn in 1u64.. {
        let budget = server.worst_case().await;
        let mut loan = kept.take().unwrap_or_else(|| server.pool.take());
        match rustix::io::read(&server.fd, &mut loan.buf[..]) {
            Ok(len) => {
                let job = server.accept(&mut loan, len, budget);
                start(Rc::clone(server).work(job)).await;
                kept = Some(loan);
                if turn % BATCH == 0 {
                    exec::yield_now().await;
                }
            }
            Err(Errno::AGAIN) => {
                // An idle disk keeps no buffer.
                drop((loan, budget));
                server.watch_pool();
                exec::readable(&server.fd).await?;
            }
            // ENOENT: a request whose caller was killed before it was read.
            Err(Errno::INTR | Errno::NOENT) => {}
            // ECONNABORTED: the session ended while a request was being handed over.
            Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(End::Unmounted),
            Err(e) => return Err(Error::from(io::Error::from(e)).at("reading /dev/fuse")),
        }
    }
    unreachable!("the range has no end")
}

/// Does work as far as it goes without waiting; the rest is a task of its own. Never waits itself.
async fn start(work: impl Future<Output = ()> + 'static) {
    let mut work = Box::pin(work);
    let waits = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx).is_pending())).await;
    if waits {
        exec::spawn(work);
    }
}

impl<D: Device + 'static> Server<D> {
    /// The budget of the largest request, for one whose size is not known yet.
    async fn worst_case(&self) -> OwnedSemaphorePermit {
        let worst = units(self.pool.buffer_len());
        let permit = Arc::clone(&self.budget).acquire_many_owned(worst).await;
        permit.expect("the budget is never closed")
    }

    /// Makes a job of the `len` bytes in `loan`, which is free to be read into again afterwards.
    fn accept(&self, loan: &mut Loan, len: usize, mut budget: OwnedSemaphorePermit) -> Job {
        let request = Request::parse(loan.buf.get(..len).unwrap_or_default());
        let (payload, used) = match &request.ask {
            Ask::Write { range, .. } if range.len <= COPY_MAX as u64 => (
                copy(loan.buf.get(WRITE_HEAD..len).unwrap_or_default()),
                range.len as usize,
            ),
            Ask::Write { .. } => {
                let full = mem::replace(loan, self.pool.take()).freeze();
                (full.slice(WRITE_HEAD..len), self.pool.buffer_len())
            }
            Ask::Read(range) if range.len > COPY_MAX as u64 => {
                (Bytes::new(), self.pool.buffer_len())
            }
            Ask::Read(range) => (Bytes::new(), range.len as usize),
            _ => (Bytes::new(), 0),
        };
        let spare = budget.num_permits().saturating_sub(units(used) as usize);
        drop(budget.split(spare));
        Job {
            request,
            payload,
            budget,
        }
    }

    async fn work(self: Rc<Self>, job: Job) {
        let Job {
            request: Request { unique, ask },
            payload,
            budget,
        } = job;
        if ask != Ask::Silent {
            let answer = self.answer(ask, payload).await;
            self.reply(unique, answer);
        }
        drop(budget);
        self.watch_pool();
    }

    fn watch_pool(&self) {
        if self.pool.wants_trimmer() {
            exec::spawn(trim(Arc::clone(&self.pool)));
        }
    }

    /// One writev(2), which never waits: the device takes a whole message.
    fn reply(&self, unique: u64, answer: Answer) {
        let (errno, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (errno, Bytes::new()),
        };
        let header = abi::encode_header(unique, errno, body.len());
        touch(&body);
        let parts = [IoSlice::new(&header), IoSlice::new(&body)];
        match retry_on_intr(|| rustix::io::writev(&self.fd, &parts)) {
            // ENOENT: its caller was killed. ENODEV: the session is over. Nobody waits any more.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::error!(%error, unique, "the kernel refused an answer"),
        }
    }

    async fn answer(&self, ask: Ask, payload: Bytes) -> Answer {
        match ask {
            Ask::Attr => Ok(abi::encode_attr(&self.attr())),
            Ask::SetAttr(change) => self.set_attr(&change),
            Ask::Open(flags) => self.open(flags),
            Ask::Read(range) => self.read(range).await,
            Ask::Write { range, durable } => self.write(range, payload, durable).await,
            Ask::Statfs => Ok(abi::encode_statfs(self.device.size(), self.block())),
            Ask::Fsync => done(ask, self.device.flush().await),
            Ask::Allocate(range, mode) => self.allocate(range, mode).await,
            Ask::Ack | Ask::Silent => Ok(Bytes::new()),
            Ask::Unknown => Err(libc::ENOSYS),
            Ask::Malformed => Err(libc::EINVAL),
        }
    }

    fn attr(&self) -> Attr {
        let permissions = if self.device.read_only() {
            0o400
        } else {
            0o600
        };
        let (uid, gid) = (self.uid, self.gid);
        Attr {
            size: self.device.size(),
            mode: libc::S_IFREG | permissions,
            uid,
            gid,
        }
    }

    /// The file has the size, mode and owner that the disk gives it; times do not matter.
    fn set_attr(&self, change: &SetAttr) -> Answer {
        let now = self.attr();
        let same = change.size.is_none_or(|size| size == now.size)
            && change
                .mode
                .is_none_or(|mode| mode & 0o7777 == now.mode & 0o7777)
            && change.uid.is_none_or(|uid| uid == now.uid)
            && change.gid.is_none_or(|gid| gid == now.gid);
        if same {
            Ok(abi::encode_attr(&now))
        } else {
            Err(libc::EPERM)
        }
    }

    fn open(&self, flags: u32) -> Answer {
        let writes = flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        if writes && self.device.read_only() {
            return Err(libc::EROFS);
        }
        Ok(abi::encode_open())
    }

    /// What a discard of the loop device is rounded to: a smaller block would cut clusters apart.
    fn block(&self) -> u32 {
        u32::try_from(self.device.preferred_block()).unwrap_or(1 << 31)
    }

    async fn read(&self, range: Range) -> Answer {
        let ask = Ask::Read(range);
        let Some(len) = self.within(range).map(|len| len as usize) else {
            return Ok(Bytes::new());
        };
        if len > self.pool.payload() {
            return Err(libc::EINVAL);
        }
        if len <= COPY_MAX {
            let data = self.device.read(range.at, buf::aligned(len)).await;
            return data.map(BytesMut::freeze).map_err(|e| refuse(ask, &e));
        }
        let mut loan = self.pool.take();
        let mut head = mem::take(&mut loan.buf);
        let mut data = head.split_off(WRITE_HEAD);
        let rest = data.split_off(len);
        let data = self
            .device
            .read(range.at, data)
            .await
            .map_err(|e| refuse(ask, &e))?;
        // Three neighbours in memory: joining them moves nothing.
        head.unsplit(data);
        head.unsplit(rest);
        loan.buf = head;
        Ok(loan.freeze().slice(WRITE_HEAD..WRITE_HEAD + len))
    }

    async fn write(&self, range: Range, mut payload: Bytes, durable: bool) -> Answer {
        let ask = Ask::Write { range, durable };
        let len = self.within(range).ok_or(libc::EFBIG)?;
        payload.truncate(len as usize);
        let result = self.device.write(range.at, payload, durable).await;
        result
            .map(|()| abi::encode_written(len as u32))
            .map_err(|e| refuse(ask, &e))
    }

    /// fallocate(2). A discard of the loop device and a write of zeros that may free space arrive
    /// alike, as a punched hole, so a punched hole always reads as zeros.
    async fn allocate(&self, range: Range, mode: u32) -> Answer {
        const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
        const PUNCH_HOLE: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32;
        const ZERO_RANGE: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;
        let how = match mode & !KEEP_SIZE {
            PUNCH_HOLE => Zero::MayFree,
            ZERO_RANGE => Zero::Allocate,
            _ => return Err(libc::EOPNOTSUPP),
        };
        let len = self.within(range).unwrap_or(0);
        if len < range.len && mode & KEEP_SIZE == 0 {
            return Err(libc::EFBIG);
        }
        if len == 0 {
            return Ok(Bytes::new());
        }
        let result = self.device.zero(range.at, len, how, false).await;
        done(Ask::Allocate(range, mode), result)
    }

    /// The length of the part of `range` that lies on the device; `None` when none does.
    fn within(&self, range: Range) -> Option<u64> {
        let left = self.device.size().checked_sub(range.at)?;
        Some(range.len.min(left)).filter(|len| *len > 0)
    }
}

async fn trim(pool: Arc<Pool>) {
    while !pool.trim() {
        exec::sleep(QUIET).await;
    }
}

/// Whichever is ready first; the other is dropped.
async fn first<T>(a: impl Future<Output = T>, b: impl Future<Output = T>) -> T {
    let (mut a, mut b) = (pin!(a), pin!(b));
    poll_fn(|cx| match a.as_mut().poll(cx) {
        Poll::Ready(out) => Poll::Ready(out),
        Poll::Pending => b.as_mut().poll(cx),
    })
    .await
}

fn copy(payload: &[u8]) -> Bytes {
    let mut out = buf::aligned(payload.len());
    out.copy_from_slice(payload);
    out.freeze()
}

/// Budget units of a request with `len` bytes of payload: at least one, for the request itself.
fn units(len: usize) -> u32 {
    len.div_ceil(4096).max(1) as u32
}

fn done(ask: Ask, result: Result<()>) -> Answer {
    result.map(|()| Bytes::new()).map_err(|e| refuse(ask, &e))
}

/// One process serves one file.
static COMPLAINTS: Complaints = Complaints::new();

/// The errno that whoever uses the file sees. Never ENOSYS: the kernel would remember it and let
/// all later flushes succeed without asking.
fn refuse(ask: Ask, error: &Error) -> i32 {
    COMPLAINTS.about(&format!("{ask:?}"), error);
    match error.kind() {
        Kind::ReadOnly => libc::EROFS,
        Kind::Pending => libc::EIO,
        kind => kind.errno(),
    }
}
