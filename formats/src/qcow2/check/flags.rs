//! Flags: what the entries of the active tables say of their own clusters.
//!
//! COPIED must say whether an entry is the only one that names its cluster: a writer then writes in
//! place. It is judged by the references that there are, not by the stored refcounts, which may be
//! wrong themselves. Entries of snapshots have the flag as it was, and nobody asks it.

use super::super::table::{L1Entry, L2Entry, Mapping};
use super::span::Span;
use super::{FindingKind, Survey, progress};
use crate::Result;
use crate::progress::Watch;
use crate::store::Store;
use roaring::RoaringBitmap;

impl<S: Store> Survey<'_, S> {
    /// Looks at the active tables in the order of the guest, each once.
    pub(super) async fn look_at_flags(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let l1 = self.header.l1;
        let end = l1
            .at
            .saturating_add(u64::from(l1.entries).saturating_mul(8));
        let mut seen = RoaringBitmap::new();
        let mut span = Span::new(self.store, l1.at..end);
        while let Some(piece) = span.next().await? {
            for (at, word) in piece.words() {
                watch.tell(progress(
                    "flags",
                    at.saturating_sub(l1.at),
                    end.saturating_sub(l1.at),
                ))?;
                let table = L1Entry(word).table(self.cluster()).ok().flatten();
                let Some(table) = table.and_then(|table| self.cluster_in_file(table)) else {
                    continue;
                };
                self.look_at_copied(at, table, L1Entry(word).copied());
                let index = at.saturating_sub(l1.at) / 8;
                let guest = index.saturating_mul(self.layout.table_covers());
                if seen.insert(table) {
                    self.look_at_entries(table, guest).await?;
                } else if self.layout.external {
                    self.out_of_place(at, guest);
                }
            }
        }
        Ok(())
    }

    /// The entries of the table of guest offset `guest`.
    async fn look_at_entries(&mut self, table: u32, guest: u64) -> Result<()> {
        let (size, layout) = (self.cluster(), self.layout);
        let start = size.start(table);
        let mut span = Span::new(self.store, start..start.saturating_add(size.bytes()));
        while let Some(piece) = span.next().await? {
            for (at, entry) in piece.entries(layout) {
                let n = at.saturating_sub(start).checked_div(layout.entry_len());
                let within = n.unwrap_or(0).saturating_mul(size.bytes());
                self.look_at_entry(at, entry, guest.saturating_add(within));
            }
        }
        Ok(())
    }

    fn look_at_entry(&mut self, at: u64, entry: L2Entry, guest: u64) {
        // Entries that break another rule have been told.
        let named = match entry.mapping(self.layout, 0) {
            Ok(Mapping::Packed(_)) | Err(_) => return,
            Ok(_) => entry.host(self.layout).ok().flatten(),
        };
        let Some(named) = named else {
            return;
        };
        if !self.layout.external {
            if let Some(cluster) = self.cluster_in_file(named) {
                self.look_at_copied(at, cluster, entry.copied());
            }
            return;
        }
        if named != guest {
            self.out_of_place(at, guest);
        }
        if !entry.copied() {
            self.report.find(FindingKind::Copied, at, || {
                "names a cluster of the external data file and does not say COPIED".into()
            });
        }
    }

    fn look_at_copied(&mut self, at: u64, cluster: u32, copied: bool) {
        let times = self.total.get(cluster);
        // One reference and a higher refcount is a leak: no flag makes it worse.
        if copied == (times == 1) || (!copied && self.too_high.contains(cluster)) {
            return;
        }
        self.report.find(FindingKind::Copied, at, || {
            let says = if copied { "says" } else { "does not say" };
            format!("{says} COPIED of cluster {cluster}, which is named {times} times")
        });
    }

    fn out_of_place(&mut self, at: u64, guest: u64) {
        self.find_hopeless(FindingKind::OutOfPlace, at, || {
            format!("guest offset {guest:#x} has another place in the external data file")
        });
    }
}
