//! Memory: an allocator that counts what the whole test process holds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
pub struct Counting;

fn took(len: usize) {
    let held = HELD.fetch_add(len, Relaxed) + len;
    PEAK.fetch_max(held, Relaxed);
}

// SAFETY: every call is handed to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promise about the layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `at` came from this allocator, which is the system's, with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Only one campaign runs at a time: the count is of the process.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The cost of the calls that it was asked to watch.
#[derive(Debug, Default)]
pub struct Meter {
    most: usize,
    time: Duration,
    longest: Duration,
}

/// Processor time of this thread so far.
fn worked() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("time goes forward")
}

impl Meter {
    /// Does `work` and notes the memory that it held at most, and its time.
    pub fn watch<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (before, begin) = (HELD.load(Relaxed), Instant::now());
        PEAK.store(before, Relaxed);
        let busy = worked();
        let done = work();
        self.longest = self.longest.max(worked() - busy);
        self.most = self.most.max(PEAK.load(Relaxed).saturating_sub(before));
        self.time += begin.elapsed();
        done
    }

    /// Bytes that one of the calls held at most.
    pub const fn most(&self) -> usize {
        self.most
    }

    /// Processor time of the longest call: how busy the machine is makes no difference.
    pub const fn longest(&self) -> Duration {
        self.longest
    }

    /// Time of all calls together.
    pub const fn time(&self) -> Duration {
        self.time
    }
}

#[test]
fn memory_that_is_held_and_given_back_is_counted() {
    let _alone = alone();
    let mut meter = Meter::default();
    meter.watch(|| drop(std::hint::black_box(vec![1u8; 5 << 20])));
    meter.watch(|| ());
    // The test's own machinery may take or give back a little meanwhile.
    assert!((4 << 20..6 << 20).contains(&meter.most()), "{meter:?}");
}
