//! Mark: COPIED made to say what was counted.
//!
//! Changes that flag alone, and only in tables that nothing else is in; entries that break another
//! rule are left as they are. Writes nothing but first- and second-level tables.

use super::super::header::L1;
use super::super::table::{L1Entry, L2Entry, Mapping};
use super::super::words::write_words;
use super::progress;
use super::recount::Recount;
use super::span::Span;
use crate::Result;
use crate::progress::Watch;
use crate::store::Store;
use crate::update::Update;
use roaring::RoaringBitmap;

/// Which flags are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Flags {
    /// Those that promise too much are taken away.
    Clear,
    /// All that are wrong.
    All,
}

impl<S: Store> Recount<'_, S> {
    /// Goes through a first-level table and those that it names; the number of flags that were
    /// changed. They are durable when it returns.
    pub(in super::super) async fn mark(
        &self,
        l1: L1,
        flags: Flags,
        watch: &mut dyn Watch,
    ) -> Result<u64> {
        let mut tables = RoaringBitmap::new();
        let mut span = Span::new(self.store(), l1.bytes());
        let mut count = 0u64;
        while let Some(piece) = span.next().await? {
            let mut words = Vec::new();
            for (at, word) in piece.words() {
                let entry = L1Entry(word);
                let table = entry.table(self.survey.cluster()).ok().flatten();
                let Some(table) = table.and_then(|at| self.survey.cluster_in_file(at)) else {
                    continue;
                };
                tables.insert(table);
                let only = self.survey.total.get(table) == 1;
                if differs(entry.copied(), only, flags) {
                    words.push((at, entry.with_copied(only)));
                }
            }
            count = count.saturating_add(self.write_flags(&words).await?);
        }
        for (done, table) in (0u64..).zip(&tables) {
            watch.tell(progress("flags", done, tables.len()))?;
            count = count.saturating_add(self.mark_table(table, flags).await?);
        }
        if count > 0 {
            Update::new().barrier().apply(self.store()).await?;
        }
        Ok(count)
    }

    /// The second-level table in a cluster.
    async fn mark_table(&self, table: u32, flags: Flags) -> Result<u64> {
        let size = self.survey.cluster();
        let start = size.start(table);
        let mut span = Span::new(self.store(), start..start.saturating_add(size.bytes()));
        let mut count = 0u64;
        while let Some(piece) = span.next().await? {
            let mut words = Vec::new();
            for (at, entry) in piece.entries(self.survey.layout) {
                let Some(only) = self.is_only(entry) else {
                    continue;
                };
                if differs(entry.copied(), only, flags) {
                    words.push((at, entry.with_copied(only)));
                }
            }
            count = count.saturating_add(self.write_flags(&words).await?);
        }
        Ok(count)
    }

    /// Whether an entry is the only one that names its cluster; none when it names none, or breaks a
    /// rule.
    fn is_only(&self, entry: L2Entry) -> Option<bool> {
        let layout = self.survey.layout;
        if let Mapping::Packed(_) = entry.mapping(layout, 0).ok()? {
            return Some(false);
        }
        let at = entry.host(layout).ok()??;
        if layout.external {
            return Some(true);
        }
        let cluster = self.survey.cluster_in_file(at)?;
        Some(self.survey.total.get(cluster) == 1)
    }

    async fn write_flags(&self, words: &[(u64, u64)]) -> Result<u64> {
        write_words(self.store(), self.survey.cluster(), words).await?;
        Ok(words.len() as u64)
    }
}

fn differs(copied: bool, only: bool, flags: Flags) -> bool {
    copied != only && (copied || flags == Flags::All)
}
