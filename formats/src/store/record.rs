//! RecordStore: any store, with a log of what it was told, from which any past can be rebuilt.
//!
//! It works over real files too: run a load once, then look at what a power cut would have left at
//! every barrier, and at seeded cuts between them. An operation enters the log when it is answered;
//! a barrier covers exactly the entries before it that were answered before it was called.
#![allow(
    clippy::arithmetic_side_effects,
    reason = "a test instrument stops at the first surprise"
)]

use super::pages::Pages;
use super::sim::{Change, Disk, Fate, Rules};
use super::{Reach, Space, Store, StoreInfo};
use crate::Result;
use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One operation, as it was answered with success.
#[derive(Debug, Clone)]
pub enum Entry {
    /// Bytes at an offset.
    Write {
        /// File offset.
        at: u64,
        /// The bytes.
        data: Bytes,
        /// Whether they were durable at once.
        reach: Reach,
    },
    /// A range that reads as zeros from then on.
    Punch {
        /// File offset.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A new length.
    SetLen(u64),
    /// A barrier that was called when this many entries were in the log.
    Flush {
        /// How many of the first entries it covers.
        covers: usize,
    },
}

#[derive(Debug, Default)]
struct State {
    start: Pages,
    entries: Vec<Entry>,
}

/// The log; clones share it. Sequence numbers are positions in it.
#[derive(Debug, Clone, Default)]
pub struct Recording(Arc<Mutex<State>>);

impl Recording {
    /// An empty log of a file that held `start`.
    pub fn new(start: Pages) -> Self {
        Self(Arc::new(Mutex::new(State {
            start,
            entries: Vec::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, entry: Entry) {
        self.lock().entries.push(entry);
    }

    /// Everything so far.
    pub fn entries(&self) -> Vec<Entry> {
        self.lock().entries.clone()
    }

    /// Positions of the barriers.
    pub fn marks(&self) -> Vec<usize> {
        let state = self.lock();
        let mark = |(n, e): (usize, &Entry)| matches!(e, Entry::Flush { .. }).then_some(n);
        state.entries.iter().enumerate().filter_map(mark).collect()
    }

    /// The file after a power cut when the first `entries` of the log were answered. With
    /// [`Fate::None`] that is what the last barrier promised, with [`Fate::All`] all of it.
    pub fn cut(&self, entries: usize, rules: Rules, fate: &Fate) -> Pages {
        let state = self.lock();
        let mut disk = Disk::new(state.start.clone(), rules);
        for (n, entry) in state.entries.iter().enumerate().take(entries) {
            let op = n as u64;
            match entry.clone() {
                Entry::Write { at, data, reach } => {
                    disk.apply(op, op, Change::Write { at, data }, reach == Reach::Durable);
                }
                Entry::Punch { at, len } => disk.apply(op, op, Change::Zero { at, len }, false),
                Entry::SetLen(len) => disk.apply(op, op, Change::Len(len), false),
                Entry::Flush { covers } => disk.flush(covers as u64),
            }
        }
        disk.crash(&[], fate)
    }
}

/// A store that is being recorded.
#[derive(Debug, Clone)]
pub struct RecordStore<S> {
    inner: S,
    recording: Recording,
}

impl<S> RecordStore<S> {
    /// `inner`, recorded. The recording starts from what `inner` holds.
    pub const fn new(inner: S, recording: Recording) -> Self {
        Self { inner, recording }
    }

    /// The store below.
    pub const fn inner(&self) -> &S {
        &self.inner
    }
}

impl<S: Store> Store for RecordStore<S> {
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
        self.inner.write_at(at, data.clone(), reach).await?;
        self.recording.add(Entry::Write { at, data, reach });
        Ok(())
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len).await?;
        self.recording.add(Entry::SetLen(len));
        Ok(())
    }

    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()> {
        self.inner.punch(at, len, space).await?;
        self.recording.add(Entry::Punch { at, len });
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let covers = self.recording.lock().entries.len();
        self.inner.flush().await?;
        self.recording.add(Entry::Flush { covers });
        Ok(())
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
    use crate::testkit::exec::now;

    #[test]
    fn a_recording_rebuilds_what_every_barrier_promised() {
        let below = MemStore::from_bytes(&[1; 1024]);
        let recording = Recording::new(below.pages());
        let store = RecordStore::new(below.clone(), recording.clone());
        now(store.write_at(0, Bytes::from_static(&[2; 512]), Reach::Cache)).unwrap();
        now(store.flush()).unwrap();
        now(store.set_len(1536)).unwrap();
        now(store.punch(512, 512, Space::Free)).unwrap();
        now(store.flush()).unwrap();
        now(store.write_at(0, Bytes::from_static(&[3; 512]), Reach::Cache)).unwrap();
        assert_eq!(recording.marks(), [1, 4]);
        let at = |n, fate| recording.cut(n, Rules::default(), &fate).to_vec();
        assert_eq!(at(1, Fate::None), [1; 1024]);
        assert_eq!(at(2, Fate::None), [[2; 512], [1; 512]].concat());
        assert_eq!(at(6, Fate::None), [[2; 512], [0; 512], [0; 512]].concat());
        assert_eq!(at(6, Fate::All), below.to_vec());
    }
}
