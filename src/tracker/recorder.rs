//! Recorder: marks what is written in every set that records, and says when one is complete.
//!
//! Ordering. A write marks its blocks in the sets of that moment before its data operation, and in
//! those of its end when that is over, whatever came of it, before it is answered. Until then it
//! holds the sets that it began with. A set is sealed by putting others in its place, and is
//! complete once nobody holds the old ones any more: whoever reads the disk from then on finds what
//! its marks are for, and what is written later is marked in the next one.
//!
//! The first mark is for the death of this process: what was not answered may land nevertheless,
//! and nobody else knows where. The second is for a write that was made to wait while the sets were replaced.

use super::blocks::{Blocks, Words};
use super::sync::{Arc, Current, Mutex, lock};
use ploop_formats::planted::{self, Bug};

/// Sets that record at the same time.
pub type Sets<W> = Vec<Arc<Blocks<W>>>;

/// What is recorded of a disk.
#[derive(Debug)]
pub struct Recorder<W> {
    now: Current<Sets<W>>,
    /// Those that were replaced, as long as somebody may hold them.
    past: Mutex<Vec<Arc<Sets<W>>>>,
}

/// A write under way.
#[derive(Debug)]
#[must_use = "the end of a write is marked when this is dropped"]
pub struct Marking<'r, W: Words> {
    recorder: &'r Recorder<W>,
    at: u64,
    len: u64,
    _began: Arc<Sets<W>>,
}

impl<W: Words> Recorder<W> {
    /// One that records in these.
    pub fn new(sets: Sets<W>) -> Self {
        Self {
            now: Current::new(Arc::new(sets)),
            past: Mutex::new(Vec::new()),
        }
    }

    /// Marks a write of `len` bytes, not 0, at `at`, which begins.
    pub fn begin(&self, at: u64, len: u64) -> Marking<'_, W> {
        let began = self.now.load_full();
        if !planted::is(Bug::MarkOnlyAfter) {
            mark(&began, at, len);
        }
        Marking {
            recorder: self,
            at,
            len,
            _began: began,
        }
    }

    /// From now on records in these.
    pub fn replace(&self, sets: Sets<W>) {
        let old = self.now.swap(Arc::new(sets));
        let mut past = lock(&self.past);
        past.push(old);
        let_go(&mut past);
    }

    /// Whether nobody holds sets any more that were replaced.
    pub fn is_settled(&self) -> bool {
        let mut past = lock(&self.past);
        let_go(&mut past);
        past.is_empty()
    }
}

/// Drops those that nobody holds. What who held them wrote happened before that is seen.
fn let_go<W>(past: &mut Vec<Arc<Sets<W>>>) {
    past.retain_mut(|sets| Arc::get_mut(sets).is_none());
}

impl<W: Words> Default for Recorder<W> {
    /// One that records nothing.
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl<W: Words> Drop for Marking<'_, W> {
    fn drop(&mut self) {
        mark(&self.recorder.now.load(), self.at, self.len);
    }
}

fn mark<W: Words>(sets: &Sets<W>, at: u64, len: u64) {
    for set in sets {
        set.add(at, len);
    }
}
