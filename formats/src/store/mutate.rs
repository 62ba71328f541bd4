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
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What changed since the barrier before: the name of a barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Covers {
    /// Guest data.
    pub data: bool,
    /// Header or table.
    pub metadata: bool,
    /// The length.
    pub length: bool,
    /// Punched ranges.
    pub punch: bool,
}

impl fmt::Display for Covers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (self.data, "data"),
            (self.metadata, "metadata"),
            (self.length, "length"),
            (self.punch, "punch"),
        ];
        let named: Vec<&str> = names
            .iter()
            .filter(|(yes, _)| *yes)
            .map(|(_, n)| *n)
            .collect();
        f.write_str(if named.is_empty() { "nothing" } else { "" })?;
        f.write_str(&named.join("+"))
    }
}

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Barriers that cover this do nothing, and say that they did.
    Drop(Covers),
    /// The first change after such a barrier happens before it.
    Swap(Covers),
    /// The barrier with this number, from 0, does nothing.
    DropNumber(u64),
    /// The first change after the barrier with this number happens before it.
    SwapNumber(u64),
}

#[derive(Debug, Default)]
struct State {
    mutation: Option<Mutation>,
    dirty: Covers,
    late: bool,
    barriers: u64,
    seen: BTreeMap<Covers, u64>,
    hits: u64,
}

/// The mutation that a [`MutateStore`] carries out; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Mutator(Arc<Mutex<State>>);

enum Barrier {
    Real,
    Skipped,
}

impl Mutator {
    /// Nothing is broken; barriers are counted.
    pub fn new() -> Self {
        Self::default()
    }

    /// Breaks `mutation` from now on, or nothing.
    pub fn set(&self, mutation: Option<Mutation>) {
        let mut state = self.lock();
        state.mutation = mutation;
        state.barriers = 0;
        state.hits = 0;
    }

    /// What is broken.
    pub fn mutation(&self) -> Option<Mutation> {
        self.lock().mutation
    }

    /// How many barriers of each name were asked for.
    pub fn seen(&self) -> BTreeMap<Covers, u64> {
        self.lock().seen.clone()
    }

    /// How many barriers were broken.
    pub fn hits(&self) -> u64 {
        self.lock().hits
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn barrier(&self) -> Barrier {
        let mut state = self.lock();
        let (number, name) = (state.barriers, std::mem::take(&mut state.dirty));
        state.barriers += 1;
        *state.seen.entry(name).or_default() += 1;
        let (hit, late) = match state.mutation {
            Some(Mutation::Drop(covers)) => (covers == name, false),
            Some(Mutation::Swap(covers)) => (covers == name, true),
            Some(Mutation::DropNumber(n)) => (n == number, false),
            Some(Mutation::SwapNumber(n)) => (n == number, true),
            None => (false, false),
        };
        if !hit {
            return Barrier::Real;
        }
        state.hits += 1;
        state.late = late;
        Barrier::Skipped
    }

    /// Notes a change; true when the barrier before it was held back and is due now.
    fn changed(&self, note: impl FnOnce(&mut Covers)) -> bool {
        let mut state = self.lock();
        note(&mut state.dirty);
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

    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.inner.read_at(at, buf).await
    }

    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()> {
        let due = self.mutator.changed(|dirty| match at < self.metadata_end {
            true => dirty.metadata = true,
            false => dirty.data = true,
        });
        self.inner.write_at(at, data, reach).await?;
        self.overdue(due).await
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        let due = self.mutator.changed(|dirty| dirty.length = true);
        self.inner.set_len(len).await?;
        self.overdue(due).await
    }

    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()> {
        let due = self.mutator.changed(|dirty| dirty.punch = true);
        self.inner.punch(at, len, space).await?;
        self.overdue(due).await
    }

    async fn flush(&self) -> Result<()> {
        match self.mutator.barrier() {
            Barrier::Real => self.inner.flush().await,
            Barrier::Skipped => Ok(()),
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
    fn a_barrier_is_dropped_or_stepped_over_by_name_or_number() {
        let data = Covers {
            data: true,
            ..Covers::default()
        };
        assert_eq!(trace(Mutation::Drop(data)), "dm|");
        assert_eq!(trace(Mutation::Swap(data)), "dm||");
        assert_eq!(trace(Mutation::DropNumber(1)), "d|m");
        assert_eq!(trace(Mutation::SwapNumber(7)), "d|m|");
        assert_eq!(data.to_string(), "data");
    }
}
