//! FaultStore: any store, with one rule about what fails.
//!
//! A rule names the n-th operation, of one kind or of any, its error, and whether everything of
//! that kind after it fails too. A failed flush is final, as the contract of a store says. Clones
//! of a [`Faults`] share the rule and its count, so that a test can set it while the store is used.
#![allow(
    clippy::arithmetic_side_effects,
    reason = "a test instrument stops at the first surprise"
)]

use super::{Reach, Space, Store, StoreInfo};
use crate::{Error, Kind, Result};
use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Kinds of operations that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// [`Store::read_at`].
    Read,
    /// [`Store::write_at`].
    Write,
    /// [`Store::flush`].
    Flush,
    /// [`Store::set_len`].
    SetLen,
    /// [`Store::punch`].
    Punch,
    /// [`Store::room`], which fails in one way only: `NoSpace`.
    Room,
    /// A change of a name, of a simulated folder.
    Name,
    /// What makes names durable, of a simulated folder.
    SyncNames,
}

impl Operation {
    /// Every kind that a store has.
    pub const ALL: [Operation; 6] = [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::SetLen,
        Operation::Punch,
        Operation::Room,
    ];

    const fn takes_space(self) -> bool {
        matches!(
            self,
            Operation::Write | Operation::SetLen | Operation::Room | Operation::Name
        )
    }
}

/// Which operation fails, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Only operations of this kind count and fail; `None`: all of them. An error of kind
    /// `NoSpace` for all kinds is for those that take space.
    pub only: Option<Operation>,
    /// How many of them succeed first.
    pub after: u64,
    /// The error.
    pub error: Kind,
    /// All later ones fail too.
    pub forever: bool,
}

#[derive(Debug, Default)]
struct State {
    rule: Option<Rule>,
    seen: u64,
    failed: u64,
    flush_failed: bool,
    metadata_failed: bool,
}

/// The rule that a [`FaultStore`] obeys; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

/// What a failing write leaves behind, chosen by its number: nothing, its first half, or all.
enum Damage {
    Nothing,
    Half,
    All,
}

impl Faults {
    /// Nothing fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts counting for `rule`, or stops failing.
    pub fn set(&self, rule: Option<Rule>) {
        let mut state = self.lock();
        state.rule = rule;
        state.seen = 0;
        state.failed = 0;
    }

    /// How many operations failed under this rule.
    pub fn failed(&self) -> u64 {
        self.lock().failed
    }

    /// How many operations of the rule's kind were called.
    pub fn seen(&self) -> u64 {
        self.lock().seen
    }

    /// Whether a flush failed, under this rule or an earlier one.
    pub fn flush_failed(&self) -> bool {
        self.lock().flush_failed
    }

    /// Whether nothing may be promised any more: a flush failed, or a write of metadata, and not
    /// for lack of space, under this rule or an earlier one.
    pub fn is_final(&self) -> bool {
        let state = self.lock();
        state.flush_failed || state.metadata_failed
    }

    /// Whether a change of a name works; if not, whether it happened nevertheless.
    pub(super) fn name(&self) -> std::result::Result<(), (Error, bool)> {
        let failed = self.check(Operation::Name);
        failed.map_err(|(e, damage)| (e, matches!(damage, Damage::All)))
    }

    /// Whether a name can be looked at.
    pub(super) fn look(&self) -> Result<()> {
        self.check(Operation::Read).map_err(|(e, _)| e)
    }

    /// Whether names become durable.
    pub(super) fn sync_names(&self) -> Result<()> {
        self.check(Operation::SyncNames).map_err(|(e, _)| e)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, kind: Operation) -> std::result::Result<(), (Error, Damage)> {
        let mut state = self.lock();
        if kind == Operation::Flush && state.flush_failed {
            let error = Error::new(Kind::Io, "an earlier flush failed");
            return Err((error, Damage::Nothing));
        }
        let Some(rule) = state.rule else {
            return Ok(());
        };
        let meant = match rule.only {
            Some(only) => only == kind,
            None if rule.error == Kind::NoSpace => kind.takes_space(),
            None => kind != Operation::Room,
        };
        if !meant {
            return Ok(());
        }
        let number = state.seen;
        state.seen += 1;
        if number < rule.after || (number > rule.after && !rule.forever) {
            return Ok(());
        }
        state.failed += 1;
        state.flush_failed |= kind == Operation::Flush;
        let damage = match number % 3 {
            0 => Damage::Nothing,
            1 => Damage::Half,
            _ => Damage::All,
        };
        Err((
            Error::new(rule.error, format!("planned failure of {kind:?} {number}")),
            damage,
        ))
    }
}

/// A store whose operations fail by rule.
#[derive(Debug, Clone)]
pub struct FaultStore<S> {
    inner: S,
    faults: Faults,
    metadata_end: u64,
}

impl<S> FaultStore<S> {
    /// `inner`, as long as `faults` allow.
    pub const fn new(inner: S, faults: Faults) -> Self {
        Self::with_metadata(inner, faults, 0)
    }

    /// The same, of a file whose bytes before `metadata_end` are metadata.
    pub const fn with_metadata(inner: S, faults: Faults, metadata_end: u64) -> Self {
        Self {
            inner,
            faults,
            metadata_end,
        }
    }

    /// The store below.
    pub const fn inner(&self) -> &S {
        &self.inner
    }
}

impl<S: Store> Store for FaultStore<S> {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    fn room(&self) -> Result<u64> {
        self.faults.check(Operation::Room).map_err(|(e, _)| e)?;
        self.inner.room()
    }

    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.faults.check(Operation::Read).map_err(|(e, _)| e)?;
        self.inner.read_at(at, buf).await
    }

    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()> {
        let Err((error, damage)) = self.faults.check(Operation::Write) else {
            return self.inner.write_at(at, data, reach).await;
        };
        if at < self.metadata_end && error.kind() != Kind::NoSpace {
            self.faults.lock().metadata_failed = true;
        }
        let align = self.info().align.max(512) as usize;
        let len = match damage {
            Damage::Nothing => 0,
            Damage::Half => data.len() / 2 / align * align,
            Damage::All => data.len(),
        };
        if len > 0 {
            self.inner
                .write_at(at, data.slice(..len), Reach::Cache)
                .await?;
        }
        Err(error)
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        self.faults.check(Operation::SetLen).map_err(|(e, _)| e)?;
        self.inner.set_len(len).await
    }

    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()> {
        self.faults.check(Operation::Punch).map_err(|(e, _)| e)?;
        self.inner.punch(at, len, space).await
    }

    async fn flush(&self) -> Result<()> {
        self.faults.check(Operation::Flush).map_err(|(e, _)| e)?;
        self.inner.flush().await
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

    fn store(rule: Rule) -> (FaultStore<MemStore>, Faults) {
        let faults = Faults::new();
        faults.set(Some(rule));
        (FaultStore::new(MemStore::new(4096), faults.clone()), faults)
    }

    fn write(store: &FaultStore<MemStore>) -> Option<Kind> {
        let data = Bytes::from_static(&[1; 1024]);
        now(store.write_at(0, data, Reach::Cache))
            .err()
            .map(|e| e.kind())
    }

    #[test]
    fn the_named_operation_fails_once_and_others_do_not() {
        let rule = Rule {
            only: Some(Operation::Write),
            after: 1,
            error: Kind::NoSpace,
            forever: false,
        };
        let (store, faults) = store(rule);
        assert!(now(store.read_at(0, BytesMut::zeroed(512))).is_ok());
        assert_eq!(
            [write(&store), write(&store), write(&store)],
            [None, Some(Kind::NoSpace), None]
        );
        assert_eq!((faults.failed(), faults.seen()), (1, 3));
    }

    #[test]
    fn a_failed_flush_is_final_even_when_the_rule_is_gone() {
        let rule = Rule {
            only: Some(Operation::Flush),
            after: 0,
            error: Kind::Io,
            forever: false,
        };
        let (store, faults) = store(rule);
        assert!(now(store.flush()).is_err());
        faults.set(None);
        assert!(now(store.flush()).is_err());
        assert!(faults.flush_failed());
    }

    #[test]
    fn a_full_disk_fails_what_takes_space_and_nothing_else() {
        let rule = Rule {
            only: None,
            after: 0,
            error: Kind::NoSpace,
            forever: true,
        };
        let (store, faults) = store(rule);
        assert!(now(store.flush()).is_ok());
        assert!(now(store.punch(0, 512, Space::Free)).is_ok());
        assert_eq!(write(&store), Some(Kind::NoSpace));
        assert!(now(store.set_len(1 << 20)).is_err());
        faults.set(None);
        assert_eq!(write(&store), None);
    }
}
