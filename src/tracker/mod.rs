//! Tracker: which blocks of a disk were written since somebody looked, for who copies it.
//!
//! A tracker has a name, one set that records, and generations: sets that are complete, and stay
//! until whoever copies says that it has them. Nothing is ever cleared: to seal is to record in
//! another set, and only what was sealed before it was read counts. The sets are in memory of the
//! keeper, which outlives whoever marks in them.
//!
//! This never says that a block is clean which is not. It may say of one that it was written
//! although it holds what it held.

mod blocks;
mod recorder;
mod registry;
pub mod stored;
#[cfg(test)]
mod tests;
mod tracked;

pub use blocks::{Blocks, LOG2, Words, words_for};
pub use recorder::{Marking, Recorder};
pub use registry::{Name, Registry, Set, gone};
pub use tracked::Tracked;

/// What the recorder is made of: a model checker puts its own in their place.
mod sync {
    pub use std::sync::{Arc, Mutex};
    use std::sync::{MutexGuard, PoisonError};

    /// A value that is replaced as a whole.
    pub type Current<T> = arc_swap::ArcSwap<T>;

    /// What it guards is whole between any two statements.
    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
