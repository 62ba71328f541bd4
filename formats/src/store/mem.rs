//! MemStore: a store in memory, always ready.
//!
//! For tools, tests and set-up of simulations. Cloning gives another handle to the same bytes;
//! [`MemStore::copy`] gives bytes of its own. Nothing survives the process.

use super::pages::Pages;
use super::{Reach, Space, Store, StoreInfo};
use crate::{Error, Result};
use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A growable file in memory; clones share its bytes.
#[derive(Debug, Clone)]
pub struct MemStore {
    pages: Arc<Mutex<Pages>>,
    align: u64,
}

impl Default for MemStore {
    fn default() -> Self {
        Self::new(0)
    }
}

/// Refuses a range that is not aligned or does not end by `end` (`None`: anywhere).
pub(super) fn admit(at: u64, len: u64, align: u64, end: Option<u64>) -> Result<()> {
    let ragged = |n: u64| n.checked_rem(align).is_some_and(|r| r != 0);
    if ragged(at) || ragged(len) {
        return Err(Error::invalid(format!(
            "offset {at}, length {len}: not a multiple of the store's alignment {align}"
        )));
    }
    match (at.checked_add(len), end) {
        (Some(stop), Some(end)) if stop > end => Err(Error::new(
            crate::Kind::Io,
            format!("offset {at}, length {len}: past the end of the file at {end}"),
        )),
        (None, _) => Err(Error::invalid(format!(
            "offset {at}, length {len}: too large"
        ))),
        _ => Ok(()),
    }
}

/// Refuses memory that direct I/O would not take.
pub(super) fn admit_memory(data: &[u8], align: u64) -> Result<()> {
    if data.is_empty() || crate::buf::is_aligned(data, align as usize) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "memory that does not start at a multiple of the store's alignment {align}"
    )))
}

impl MemStore {
    /// `len` zero bytes, any alignment accepted.
    pub fn new(len: u64) -> Self {
        Self::from_pages(Pages::new(len))
    }

    /// A file that holds `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self::from_pages(Pages::from_bytes(bytes))
    }

    /// A file that holds `pages`.
    pub fn from_pages(pages: Pages) -> Self {
        Self {
            pages: Arc::new(Mutex::new(pages)),
            align: 1,
        }
    }

    /// The same bytes through a handle that demands `align` (1, 512 or 4096).
    #[must_use]
    pub fn aligned_to(mut self, align: u64) -> Self {
        self.align = align.max(1);
        self
    }

    /// A store of its own that holds what this one holds now.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self::from_pages(self.pages()).aligned_to(self.align)
    }

    /// What it holds now.
    pub fn pages(&self) -> Pages {
        self.lock().clone()
    }

    /// What it holds now, as one piece of memory.
    pub fn to_vec(&self) -> Vec<u8> {
        self.lock().to_vec()
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemStore {
    fn info(&self) -> StoreInfo {
        StoreInfo {
            len: self.lock().len(),
            align: self.align,
            fresh_zero: true,
            punches: true,
        }
    }

    fn room(&self) -> Result<u64> {
        Ok(u64::MAX)
    }

    async fn read_at(&self, at: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let pages = self.lock();
        admit(at, buf.len() as u64, self.align, Some(pages.len()))?;
        admit_memory(&buf, self.align)?;
        pages.read(at, &mut buf);
        Ok(buf)
    }

    async fn write_at(&self, at: u64, data: Bytes, _: Reach) -> Result<()> {
        let mut pages = self.lock();
        admit(at, data.len() as u64, self.align, Some(pages.len()))?;
        admit_memory(&data, self.align)?;
        pages.write(at, &data);
        Ok(())
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        self.lock().set_len(len);
        Ok(())
    }

    async fn punch(&self, at: u64, len: u64, _: Space) -> Result<()> {
        let mut pages = self.lock();
        let end = pages.len();
        admit(at, len, 1, None)?;
        pages.zero(
            at.min(end),
            at.saturating_add(len).min(end).saturating_sub(at.min(end)),
        );
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn settle(&self) {}

    async fn extent(&self, at: u64) -> Result<(bool, u64)> {
        Ok(self.lock().extent(at))
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::testkit::exec::now;

    #[test]
    fn a_clone_is_the_same_file_and_a_copy_is_not() {
        let one = MemStore::new(8);
        let (same, other) = (one.clone(), one.copy());
        now(one.write_at(2, Bytes::from_static(b"ab"), Reach::Cache)).unwrap();
        assert_eq!(same.to_vec(), b"\0\0ab\0\0\0\0");
        assert_eq!(other.to_vec(), [0; 8]);
    }

    #[test]
    fn reads_and_writes_past_the_end_fail() {
        let store = MemStore::new(8);
        assert!(now(store.read_at(4, BytesMut::zeroed(5))).is_err());
        assert!(now(store.write_at(8, Bytes::from_static(b"a"), Reach::Cache)).is_err());
        assert!(now(store.read_at(8, BytesMut::zeroed(0))).is_ok());
    }

    #[test]
    fn a_misaligned_request_is_refused_where_alignment_is_demanded() {
        let store = MemStore::new(8192).aligned_to(512);
        assert!(now(store.read_at(1, BytesMut::zeroed(512))).is_err());
        assert!(now(store.read_at(0, BytesMut::zeroed(100))).is_err());
        let mut odd = crate::buf::aligned(513).split_off(1);
        assert!(now(store.read_at(512, odd.split())).is_err());
        assert!(now(store.read_at(512, crate::buf::aligned(512))).is_ok());
    }

    #[test]
    fn a_punched_range_reads_as_zeros_and_is_a_hole() {
        let store = MemStore::from_bytes(&[7; 3 * 4096]);
        now(store.punch(100, 8192, Space::Free)).unwrap();
        assert_eq!(now(store.extent(4096)).unwrap(), (false, 8192));
        let all = store.to_vec();
        assert!(all[100..8292].iter().all(|b| *b == 0));
        assert_eq!((all[99], all[8292]), (7, 7));
    }
}
