//! MutateStore: any store, with one barrier taken out or stepped over.
//!
//! The harness is measured with it: a metadata change is steps and barriers, so every barrier can
//! be removed, and every step after one moved before it, and a campaign must notice. Barriers are
//! named by what they cover, because their number alone says nothing about another run.
#![allow(
    clippy::arithmetic_side_effects,
    reason = "a test instrument stops at the first surprise"
)]

use super::{Reach, Space, Store, StoreInfo};
use crate::Result;
use bytes::{Bytes, BytesMut};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The name of a barrier: what it makes durable, by the most telling of the changes since the
/// barrier before. A pass that ends a close, say, is for metadata although it also cuts the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Covers {
    /// Nothing changed.
    #[default]
    Nothing,
    /// Punched ranges.
    Punch,
    /// Guest data.
    Data,
    /// The length.
    Length,
    /// Header or table.
    Metadata,
}

/// What happens to a barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Break {
    /// It does nothing, and says that it did.
    Drop,
    /// The first change after it happens before it.
    Swap,
}

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mutation {
    /// Barriers of this name; of any name when `None`.
    pub covers: Option<Covers>,
    /// What happens to them.
    pub how: Break,
    /// Only the one with this number, counted from 0 among those that `covers` selects.
    pub only: Option<u64>,
}

impl fmt::Display for Mutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of ", self.how)?;
        match self.only {
            Some(n) => write!(f, "number {n} of the ")?,
            None => write!(f, "every one of the ")?,
        }
        match self.covers {
            Some(name) => write!(f, "{name:?} barriers"),
            None => write!(f, "barriers"),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    mutation: Option<Mutation>,
    dirty: Covers,
    late: bool,
    selected: u64,
}

/// The mutation that a [`MutateStore`] carries out; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Mutator(Arc<Mutex<State>>);

impl Mutator {
    /// Nothing is broken.
    pub fn new() -> Self {
        Self::default()
    }

    /// Breaks `mutation` from now on, or nothing; counts from 0 again.
    pub fn set(&self, mutation: Option<Mutation>) {
        *self.lock() = State {
            mutation,
            ..State::default()
        };
    }

    /// What is broken.
    pub fn mutation(&self) -> Option<Mutation> {
        self.lock().mutation
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the barrier that is due is to be carried out.
    pub(super) fn barrier(&self) -> bool {
        let mut state = self.lock();
        let name = std::mem::take(&mut state.dirty);
        let selects = |m: &Mutation| m.covers.is_none_or(|covers| covers == name);
        let Some(mutation) = state.mutation.filter(selects) else {
            return true;
        };
        let number = state.selected;
        state.selected += 1;
        if mutation.only.is_some_and(|n| n != number) {
            return true;
        }
        state.late = mutation.how == Break::Swap;
        false
    }

    /// Notes a change; true when the barrier before it was held back and is due now.
    fn changed(&self, what: Covers) -> bool {
        let mut state = self.lock();
        state.dirty = state.dirty.max(what);
        std::mem::take(&mut state.late)
    }
}

/// A store one of whose barriers is broken.
#[derive(Debug, Clone)]
pub struct MutateStore<S> {
    inner: S,
    mutator: Mutator,
    metadata_end: u64,
}

impl<S> MutateStore<S> {
    /// `inner`, whose bytes below `metadata_end` are header and table, as `mutator` breaks it.
    pub const fn new(inner: S, mutator: Mutator, metadata_end: u64) -> Self {
        Self {
            inner,
            mutator,
            metadata_end,
        }
    }

    /// The store below.
    pub const fn inner(&self) -> &S {
        &self.inner
    }
}

impl<S: Store> MutateStore<S> {
    async fn overdue(&self, due: bool) -> Result<()> {
        if due {
            self.inner.flush().await
        } else {
            Ok(())
        }
    }
}

impl<S: Store> Store for MutateStore<S> {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    fn room(&self) -> Result<u64> {
        self.inner.room()
    }

    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.inner.read_at(at, buf).await
    }

    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()> {
        let metadata = at < self.metadata_end;
        let due = self.mutator.changed(if metadata {
            Covers::Metadata
        } else {
            Covers::Data
        });
        self.inner.write_at(at, data, reach).await?;
        self.overdue(due).await
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        let due = self.mutator.changed(Covers::Length);
        self.inner.set_len(len).await?;
        self.overdue(due).await
    }

    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()> {
        let due = self.mutator.changed(Covers::Punch);
        self.inner.punch(at, len, space).await?;
        self.overdue(due).await
    }

    async fn flush(&self) -> Result<()> {
        match self.mutator.barrier() {
            true => self.inner.flush().await,
            false => Ok(()),
        }
    }

    async fn settle(&self) {
        self.inner.settle().await;
    }

    async fn extent(&self, at: u64) -> Result<(bool, u64)> {
        self.inner.extent(at).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::mem::MemStore;
    use crate::store::record::{Entry, RecordStore, Recording};
    use crate::testkit::exec::now;

    /// Data, barrier, metadata, barrier, under a mutation: what reaches the store.
    fn trace(mutation: Mutation) -> String {
        let recording = Recording::new(MemStore::new(8192).pages());
        let mutator = Mutator::new();
        mutator.set(Some(mutation));
        let below = RecordStore::new(MemStore::new(8192), recording.clone());
        let store = MutateStore::new(below, mutator, 512);
        let write = |at| now(store.write_at(at, Bytes::from_static(&[1; 512]), Reach::Cache));
        write(4096).unwrap();
        now(store.flush()).unwrap();
        write(0).unwrap();
        now(store.flush()).unwrap();
        let letter = |e: &Entry| match e {
            Entry::Write { at: 0, .. } => 'm',
            Entry::Write { .. } => 'd',
            _ => '|',
        };
        recording.entries().iter().map(letter).collect()
    }

    #[test]
    fn a_barrier_is_dropped_or_stepped_over_by_name_and_number() {
        let broken = |covers, how, only| trace(Mutation { covers, how, only });
        assert_eq!(broken(Some(Covers::Data), Break::Drop, None), "dm|");
        assert_eq!(broken(Some(Covers::Data), Break::Swap, None), "dm||");
        assert_eq!(broken(Some(Covers::Metadata), Break::Drop, Some(0)), "d|m");
        assert_eq!(broken(Some(Covers::Metadata), Break::Drop, Some(1)), "d|m|");
        assert_eq!(broken(Some(Covers::Length), Break::Drop, None), "d|m|");
        assert_eq!(broken(None, Break::Drop, Some(1)), "d|m");
    }
}
