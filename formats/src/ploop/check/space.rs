//! Space: which file clusters nothing names, and how much storage they hold.
//!
//! A cluster that nothing names and that is a hole is free, not lost: freed clusters look like
//! that. Only the tail counts by its length, because a file ends with its last cluster.

use super::report::Place;
use super::{FindingKind, Kept, Severity, Survey};
use crate::Result;
use crate::progress::{Progress, Watch};
use crate::store::Store;
use crate::units::ClusterSize;
use roaring::RoaringBitmap;
use std::ops::Range;

impl Survey {
    /// Clusters that belong to something: data, misaligned data, the extension.
    pub(super) fn occupied(&self) -> RoaringBitmap {
        let mut occupied = self.judge.occupied();
        if let Kept::Valid(clusters) = &self.extension {
            occupied |= clusters;
        }
        occupied
    }

    /// One past the last cluster that belongs to something.
    pub(super) fn occupied_end(&self) -> u64 {
        let last = self
            .occupied()
            .max()
            .map_or(0, |c| u64::from(c).saturating_add(1));
        last.max(u64::from(self.header.data_start))
    }

    pub(super) async fn look_at_space<S: Store>(
        &mut self,
        store: &S,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        self.look_at_tail();
        let size = self.header.cluster;
        let total = self.occupied_end().saturating_mul(size.bytes());
        for gap in gaps(&self.occupied(), self.header.data_start) {
            let lost = data_bytes(store, size, &gap).await?;
            watch.tell(Progress {
                phase: "space",
                done: size.start(gap.end),
                total,
            })?;
            if lost > 0 {
                let text = format!("{} clusters that no entry names", gap.len());
                self.report.find(
                    FindingKind::MiddleLeak,
                    Place::Byte(size.start(gap.start)),
                    text,
                );
                self.report.leaked_bytes = self.report.leaked_bytes.saturating_add(lost);
            }
        }
        Ok(())
    }

    fn look_at_tail(&mut self) {
        let size = self.header.cluster;
        let (whole, ragged) = (
            self.len.checked_div(size.bytes()).unwrap_or(0),
            size.within(self.len),
        );
        let end = self.occupied_end();
        if ragged != 0 && self.len > size.start(self.header.data_start) {
            let used = end > whole;
            let text = format!(
                "the file ends {ragged} bytes into a cluster{}",
                if used {
                    " that is in use"
                } else {
                    ": an extension that was cut short"
                }
            );
            let severity = if used {
                Severity::Error
            } else {
                Severity::Leak
            };
            let at = Place::Byte(self.len.saturating_sub(ragged));
            self.report
                .find_as(FindingKind::RaggedTail, severity, at, text);
            let lost = if used { 0 } else { ragged };
            self.report.leaked_bytes = self.report.leaked_bytes.saturating_add(lost);
        }
        if whole > end {
            let lost = whole.saturating_sub(end);
            let at = Place::Byte(end.saturating_mul(size.bytes()));
            let text = format!("{lost} clusters behind the last one in use");
            self.report.find(FindingKind::TailLeak, at, text);
            let bytes = lost.saturating_mul(size.bytes());
            self.report.leaked_bytes = self.report.leaked_bytes.saturating_add(bytes);
        }
    }
}

/// The runs of clusters from `start` that are not in `occupied`, up to its last one.
pub(super) fn gaps(occupied: &RoaringBitmap, start: u32) -> impl Iterator<Item = Range<u32>> {
    let mut next = start;
    occupied.iter().filter_map(move |cluster| {
        let gap = next..cluster;
        next = cluster.saturating_add(1);
        (!gap.is_empty()).then_some(gap)
    })
}

/// Bytes of a run of clusters that are no hole.
pub(super) async fn data_bytes<S: Store>(
    store: &S,
    size: ClusterSize,
    gap: &Range<u32>,
) -> Result<u64> {
    let (mut at, end) = (
        size.start(gap.start),
        size.start(gap.end).min(store.info().len),
    );
    let mut bytes = 0u64;
    while at < end {
        let (data, until) = store.extent(at).await?;
        let until = until.clamp(at.saturating_add(1), end);
        if data {
            bytes = bytes.saturating_add(until.saturating_sub(at));
        }
        at = until;
    }
    Ok(bytes)
}
