//! Planted bugs: the wrong orders that the campaigns must catch, each behind one question.
//!
//! A million clean crash states prove nothing unless the campaign has been seen to catch bugs. The
//! engine asks [`is`] at the few places where an order matters; the answer is `false`, known at
//! compile time, unless the feature `testkit` is on and a test planted that bug on its thread.

/// A bug that can be planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Bug {
    /// A flush writes the index without a barrier after the data.
    IndexBeforeData,
    /// A cluster that was freed and is used again counts as never written.
    FreshForReused,
    /// A cluster counts as never written although the file's length is not durable yet.
    FreshWithoutDurableLength,
    /// A cluster freed while a flush pass runs is reusable when that pass ends.
    FreeReusableAtPassEnd,
    /// A page image of a flush pass holds entries published after the pass froze.
    LaterEntriesInPageImage,
    /// A freed cluster is reusable before any sync.
    FreeReusableBeforeSync,
    /// The mapping is published before the data write has succeeded.
    PublishBeforeData,
    /// Copy-up does not keep other requests off its cluster.
    CopyUpUnderShared,
    /// The ledger is written after the guest was answered.
    LedgerAfterAnswer,
    /// A successor opens without waiting for its predecessor's operations.
    NoFence,
    /// A cluster whose reservation was dropped with a write submitted is handed out at once.
    ReuseQuarantined,
    /// A discard drops the mapping although a lower layer has data.
    DiscardExposesParent,
    /// A flush joins a pass that has already frozen what it covers.
    FlushJoinsFrozenPass,
    /// The image is marked clean before its index is durable.
    CleanMarkBeforeSync,
    /// A write with FUA is answered when its data is durable, whatever its index is.
    FuaIgnoresIndex,
    /// An unclean open cuts the file before the ledger is laid over the index.
    CutBeforeOverlay,
    /// A layer is put on top of one that was not sealed.
    SwitchWithoutSeal,
    /// A flush may run while the disk is held.
    HoldWithoutFlushes,
    /// A request is carried out on the stack that was there when it was called.
    StackBeforeAdmission,
    /// A table is cleared for a larger one before what lay there is named elsewhere.
    TableBeforeMoves,
    /// Free clusters of an image that has grown count as never written.
    FreshAfterGrowth,
    /// A cluster that moves is named in its new place before it is copied there.
    MovedBeforeCopy,
    /// A cluster that was moved counts as one that read as zeros before.
    MovedCountsAsFresh,
    /// The old place of a cluster that was moved is reusable before any sync.
    OldPlaceFreeAtOnce,
    /// A cluster moves while others use it.
    MoveUnderShared,
    /// A cluster is handed out before its refcount is durable.
    CountAfterUse,
    /// A refcount block is named before it is written.
    BlockBeforeCounts,
    /// The copy of a shared table is named before it is written.
    TableBeforeCopy,
    /// A cluster that others have, too, is overwritten.
    WriteToShared,
    /// A table that may be named is written as if it were not.
    RewriteNamedTable,
    /// A refcount is lowered before what named its cluster is gone durably.
    LowerBeforeDrop,
    /// No successor is told which subclusters of a cluster are there.
    BitsUnsaid,
    /// A place that others still read is given to somebody else.
    LeftPlaceFree,
    /// A tracker hears of a write when that is over, and not before.
    MarkOnlyAfter,
}

impl Bug {
    /// Every bug that ploop deltas can have.
    pub const ALL: [Bug; 25] = [
        Bug::IndexBeforeData,
        Bug::FreshForReused,
        Bug::FreshWithoutDurableLength,
        Bug::FreeReusableAtPassEnd,
        Bug::LaterEntriesInPageImage,
        Bug::FreeReusableBeforeSync,
        Bug::PublishBeforeData,
        Bug::CopyUpUnderShared,
        Bug::LedgerAfterAnswer,
        Bug::NoFence,
        Bug::ReuseQuarantined,
        Bug::DiscardExposesParent,
        Bug::FlushJoinsFrozenPass,
        Bug::CleanMarkBeforeSync,
        Bug::FuaIgnoresIndex,
        Bug::CutBeforeOverlay,
        Bug::SwitchWithoutSeal,
        Bug::HoldWithoutFlushes,
        Bug::StackBeforeAdmission,
        Bug::TableBeforeMoves,
        Bug::FreshAfterGrowth,
        Bug::MovedBeforeCopy,
        Bug::MovedCountsAsFresh,
        Bug::OldPlaceFreeAtOnce,
        Bug::MoveUnderShared,
    ];

    /// Every bug that an active qcow2 image can have. [`Bug::WriteToShared`] shows in
    /// snapshots alone, [`Bug::RewriteNamedTable`] in one faulty run of 60,000, [`Bug::LeftPlaceFree`] to a
    /// disk below which something is merged.
    pub const OF_QCOW2: [Bug; 17] = [
        Bug::IndexBeforeData,
        Bug::FreshForReused,
        Bug::LaterEntriesInPageImage,
        Bug::PublishBeforeData,
        Bug::CopyUpUnderShared,
        Bug::LedgerAfterAnswer,
        Bug::NoFence,
        Bug::ReuseQuarantined,
        Bug::DiscardExposesParent,
        Bug::FlushJoinsFrozenPass,
        Bug::FuaIgnoresIndex,
        Bug::FreeReusableAtPassEnd,
        Bug::CountAfterUse,
        Bug::BlockBeforeCounts,
        Bug::TableBeforeCopy,
        Bug::LowerBeforeDrop,
        Bug::BitsUnsaid,
    ];
}

/// Whether `bug` is planted on this thread. Always `false` without the feature `testkit`.
#[cfg(not(feature = "testkit"))]
#[inline(always)]
pub const fn is(_: Bug) -> bool {
    false
}

/// Whether `bug` is planted on this thread. Always `false` without the feature `testkit`.
#[cfg(feature = "testkit")]
pub fn is(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

#[cfg(feature = "testkit")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// A bug that stays planted on this thread until this is dropped.
#[cfg(feature = "testkit")]
#[derive(Debug)]
#[must_use = "the bug is gone when this is dropped"]
pub struct Planted(());

/// Plants `bug` on this thread, in place of any other.
#[cfg(feature = "testkit")]
pub fn plant(bug: Bug) -> Planted {
    PLANTED.set(Some(bug));
    Planted(())
}

#[cfg(feature = "testkit")]
impl Drop for Planted {
    fn drop(&mut self) {
        PLANTED.set(None);
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;

    #[test]
    fn a_bug_is_there_only_while_planted() {
        assert!(!is(Bug::NoFence));
        let guard = plant(Bug::NoFence);
        assert!(is(Bug::NoFence) && !is(Bug::FreshForReused));
        drop(guard);
        assert!(!is(Bug::NoFence));
    }
}
