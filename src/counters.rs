//! Counters: what a device was asked, how often, how long it took, and how long the oldest
//! unanswered request has been waiting.
//!
//! They are words in shared memory: who keeps the memory reads them without asking the process
//! that serves, which may hang, and they survive its death. A request costs two looks at the clock
//! and a few relaxed additions.

use crate::device::{Device, GuestExtent, Zero};
use crate::io::memfd::{SharedWords, WatchedWords};
use bytes::{Bytes, BytesMut};
use ploop_formats::{Error, Result};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Kinds of requests, in the order of their words.
const OPS: [&str; 5] = ["read", "write", "zero", "discard", "flush"];

#[derive(Debug, Clone, Copy)]
enum Op {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

/// Latencies are counted by powers of two: bucket n holds those below 2^n microseconds that no
/// lower one holds; the last one holds the rest.
const BUCKETS: usize = 32;
/// Words of one kind before its buckets: requests, errors, bytes, microseconds.
const SUMS: usize = 4;
const PER_OP: usize = SUMS + BUCKETS;
/// Unanswered requests are counted by the second in which they began, modulo this.
const SECONDS: usize = 1024;
/// Ages in seconds that are told from those of requests that began after the clock was looked at,
/// whose second comes round last.
const AGES: u64 = SECONDS as u64 - 16;
/// Age in seconds from which a request hangs.
pub const HUNG_S: u64 = 10;
const UNANSWERED: usize = OPS.len() * PER_OP;

/// One kind of request, since the disk was attached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpStat {
    /// Answered.
    pub requests: u64,
    /// Of these, answered with an error.
    pub errors: u64,
    /// Asked for, in bytes; 0 for flushes.
    pub bytes: u64,
    /// Time from request to answer, summed, in microseconds.
    pub total_us: u64,
    /// How many took less than 2^n microseconds and not less than half of that.
    pub latency_log2_us: Vec<u64>,
}

impl OpStat {
    /// A time in microseconds that the given share (0 to 1) of requests stayed below: the next
    /// power of two. 0 when there were none.
    pub fn quantile_us(&self, share: f64) -> u64 {
        let all: u64 = self.latency_log2_us.iter().sum();
        let wanted = (all as f64 * share).ceil() as u64;
        let mut below = 0;
        for (n, count) in self.latency_log2_us.iter().enumerate() {
            below += count;
            if *count > 0 && below >= wanted {
                return 1 << n;
            }
        }
        0
    }

    /// What came after `earlier`, an older look at the same counters.
    pub fn since(&self, earlier: &Self) -> Self {
        let buckets = self.latency_log2_us.iter().enumerate();
        let before = |n: usize| earlier.latency_log2_us.get(n).copied().unwrap_or(0);
        Self {
            requests: self.requests.saturating_sub(earlier.requests),
            errors: self.errors.saturating_sub(earlier.errors),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            total_us: self.total_us.saturating_sub(earlier.total_us),
            latency_log2_us: buckets.map(|(n, c)| c.saturating_sub(before(n))).collect(),
        }
    }

    /// Both together.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let (a, b) = (&self.latency_log2_us, &other.latency_log2_us);
        let bucket = |n: usize| {
            a.get(n)
                .unwrap_or(&0)
                .saturating_add(*b.get(n).unwrap_or(&0))
        };
        Self {
            requests: self.requests.saturating_add(other.requests),
            errors: self.errors.saturating_add(other.errors),
            bytes: self.bytes.saturating_add(other.bytes),
            total_us: self.total_us.saturating_add(other.total_us),
            latency_log2_us: (0..a.len().max(b.len())).map(bucket).collect(),
        }
    }

    /// Mean time in microseconds; 0 when there were none.
    pub fn mean_us(&self) -> u64 {
        self.total_us.checked_div(self.requests).unwrap_or(0)
    }
}

/// Everything counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// By kind: read, write, zero, discard, flush.
    pub ops: BTreeMap<String, OpStat>,
    /// Requests that are not answered yet.
    pub in_flight: u64,
    /// How long the oldest of them has been waiting, in whole seconds, up to 1007. A request that
    /// waits for longer is told as 1024 seconds younger.
    pub oldest_s: u64,
    /// Requests that have been waiting for [`HUNG_S`] seconds and more. A keeper of an older
    /// release does not say.
    #[serde(default)]
    pub hung: u64,
}

/// The counters of one disk; clones share them.
#[derive(Debug, Clone)]
pub struct Counters(Arc<SharedWords>);

/// The counters of a disk that another process serves.
#[derive(Debug)]
pub struct Watched(WatchedWords);

impl AsFd for Counters {
    /// To be handed to the process that counts.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// When a request began, in nanoseconds of the clock that all processes share.
#[derive(Debug, Clone, Copy)]
struct Began(u64);

impl Began {
    fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        Self(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    fn second(self) -> u64 {
        self.0 / 1_000_000_000
    }

    fn word(self) -> usize {
        UNANSWERED + self.second() as usize % SECONDS
    }
}

impl Counters {
    /// Words that they need.
    pub const WORDS: usize = UNANSWERED + SECONDS;

    /// The counters in `words`. Made before the sandbox is entered: the first look at the clock
    /// finds the way that needs no system call, for which it asks the kernel something that a
    /// confined thread may not.
    pub fn new(words: Arc<SharedWords>) -> Result<Self> {
        Began::now();
        match words.len() {
            Self::WORDS => Ok(Self(words)),
            n => Err(Error::invalid(format!("counters: {n} words"))),
        }
    }

    /// A predecessor's unanswered requests are not ours: those who wait will ask again.
    pub fn forget_unanswered(&self) {
        (UNANSWERED..Self::WORDS).for_each(|word| self.0.set(word, 0));
    }

    fn begin(&self) -> Began {
        let began = Began::now();
        self.0.add(began.word(), 1);
        began
    }

    fn end<T>(&self, op: Op, began: Began, bytes: u64, outcome: &Result<T>) {
        let us = Began::now().0.saturating_sub(began.0) / 1000;
        let bucket = (u64::BITS - us.leading_zeros()).min(BUCKETS as u32 - 1);
        let first = op as usize * PER_OP;
        self.0.add(first, 1);
        self.0.add(first + 1, u64::from(outcome.is_err()));
        self.0.add(first + 2, bytes);
        self.0.add(first + 3, us);
        self.0.add(first + SUMS + bucket as usize, 1);
        self.0.add(began.word(), u64::MAX);
    }

    /// All of them, now.
    pub fn stat(&self) -> Stat {
        tally(|word| self.0.at(word))
    }

    /// A descriptor for [`Watched::from_fd`], which can be read and not written.
    pub fn read_only(&self) -> Result<OwnedFd> {
        self.0.read_only()
    }
}

impl Watched {
    /// The counters behind a descriptor that [`Counters::read_only`] made in another process.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let words = WatchedWords::from_fd(fd)?;
        match words.len() {
            Counters::WORDS => Ok(Self(words)),
            n => Err(Error::unsupported(format!("counters: {n} words"))),
        }
    }

    /// All of them, now. They stay as they were when the process that counts is gone.
    pub fn stat(&self) -> Stat {
        tally(|word| self.0.at(word))
    }
}

/// What the words say.
fn tally(at: impl Fn(usize) -> u64) -> Stat {
    let ops = OPS.iter().enumerate().map(|(op, name)| {
        let first = op * PER_OP;
        let stat = OpStat {
            requests: at(first),
            errors: at(first + 1),
            bytes: at(first + 2),
            total_us: at(first + 3),
            latency_log2_us: (0..BUCKETS).map(|n| at(first + SUMS + n)).collect(),
        };
        ((*name).to_string(), stat)
    });
    let ops = ops.collect();
    let now = Began::now().second();
    let waiting = |age: u64| {
        let word = UNANSWERED + (now.wrapping_sub(age) % SECONDS as u64) as usize;
        at(word)
    };
    let sum = |ages: std::ops::Range<u64>| ages.map(waiting).fold(0, u64::wrapping_add);
    Stat {
        ops,
        in_flight: sum(0..SECONDS as u64),
        oldest_s: (0..AGES).rev().find(|age| waiting(*age) != 0).unwrap_or(0),
        hung: sum(HUNG_S..AGES),
    }
}

/// A device whose requests are counted.
#[derive(Debug)]
pub struct Counted<D> {
    device: Arc<D>,
    counters: Counters,
}

impl<D> Counted<D> {
    /// `device`, counted.
    pub const fn new(device: Arc<D>, counters: Counters) -> Self {
        Self { device, counters }
    }

    async fn counted<T>(
        &self,
        op: Op,
        bytes: u64,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let began = self.counters.begin();
        let outcome = request.await;
        self.counters.end(op, began, bytes, &outcome);
        outcome
    }
}

impl<D: Device> Device for Counted<D> {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn preferred_block(&self) -> u64 {
        self.device.preferred_block()
    }

    async fn read(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        let bytes = buf.len() as u64;
        let request = self.device.read(at, buf);
        self.counted(Op::Read, bytes, request).await
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> Result<()> {
        let bytes = data.len() as u64;
        let request = self.device.write(at, data, fua);
        self.counted(Op::Write, bytes, request).await
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> Result<()> {
        let request = self.device.zero(at, len, how, fua);
        self.counted(Op::Zero, len, request).await
    }

    async fn discard(&self, at: u64, len: u64) -> Result<()> {
        let request = self.device.discard(at, len);
        self.counted(Op::Discard, len, request).await
    }

    async fn flush(&self) -> Result<()> {
        self.counted(Op::Flush, 0, self.device.flush()).await
    }

    async fn extents(&self, at: u64, len: u64, max: usize) -> Result<Vec<GuestExtent>> {
        self.device.extents(at, len, max).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters() -> Counters {
        let words = SharedWords::create(Counters::WORDS).expect("a memfd");
        Counters::new(Arc::new(words)).expect("enough words")
    }

    #[test]
    fn a_request_is_in_flight_until_it_ends_and_then_counted_by_its_time() {
        let counters = counters();
        let began = counters.begin();
        assert_eq!(counters.stat().in_flight, 1);
        let long_ago = Began(began.0.saturating_sub(3_000_000));
        counters.0.add(began.word(), u64::MAX);
        counters.0.add(long_ago.word(), 1);
        counters.end(Op::Write, long_ago, 512, &Ok(()));
        let stat = counters.stat();
        assert_eq!((stat.in_flight, stat.oldest_s), (0, 0));
        let write = &stat.ops["write"];
        assert_eq!((write.requests, write.bytes, write.errors), (1, 512, 0));
        assert!(write.total_us >= 3000 && write.quantile_us(0.5) >= 4096);
        assert_eq!(
            stat.ops["read"],
            OpStat {
                latency_log2_us: vec![0; BUCKETS],
                ..OpStat::default()
            }
        );
    }

    #[test]
    fn the_age_of_the_oldest_request_is_known_until_its_process_is_replaced() {
        let counters = counters();
        let old = Began(Began::now().0 - 12_500_000_000);
        counters.0.add(old.word(), 1);
        counters.begin();
        let stat = counters.stat();
        assert!((12..=14).contains(&stat.oldest_s), "{}", stat.oldest_s);
        assert_eq!((stat.in_flight, stat.hung), (2, 1));
        counters.forget_unanswered();
        assert_eq!(counters.stat().in_flight, 0);
    }

    #[test]
    fn a_request_that_begins_while_the_counters_are_read_is_not_an_old_one() {
        let counters = counters();
        let after = Began(Began::now().0 + 3_000_000_000);
        counters.0.add(after.word(), 1);
        let stat = counters.stat();
        assert_eq!((stat.in_flight, stat.oldest_s, stat.hung), (1, 0, 0));
        let old = Began(after.0 - 1_008_000_000_000);
        counters.0.add(old.word(), 1);
        assert!(counters.stat().oldest_s >= 1005);
    }

    #[test]
    fn what_came_between_two_looks_is_their_difference() {
        let counters = counters();
        counters.end(Op::Read, Began::now(), 512, &Ok(()));
        let first = counters.stat();
        counters.end(Op::Read, Began(Began::now().0 - 5_000_000), 4096, &Ok(()));
        counters.end(Op::Flush, Began::now(), 0, &Err::<(), _>(Error::poisoned()));
        let second = counters.stat();
        let since = |op: &str| second.ops[op].since(&first.ops[op]);
        assert_eq!((since("read").requests, since("read").bytes), (1, 4096));
        assert!(since("read").quantile_us(0.5) >= 8192 && since("read").mean_us() >= 5000);
        let both = since("read").and(&since("flush"));
        assert_eq!((both.requests, both.errors, both.bytes), (2, 1, 4096));
        assert_eq!(both.latency_log2_us.iter().sum::<u64>(), 2);
    }

    #[test]
    fn who_watches_counts_the_same() {
        let counters = counters();
        let watched = Watched::from_fd(counters.read_only().expect("a descriptor"));
        let watched = watched.expect("the same words");
        let began = counters.begin();
        counters.end(Op::Read, began, 4096, &Ok(()));
        counters.begin();
        assert_eq!(watched.stat(), counters.stat());
        assert_eq!(watched.stat().ops["read"].bytes, 4096);
    }

    #[test]
    fn words_of_another_size_are_refused() {
        let words = SharedWords::create(8).expect("a memfd");
        assert!(Counters::new(Arc::new(words)).is_err());
    }
}
