//! Areas: the places of the file that the header, snapshots and bitmaps name, in one list.
//!
//! Tables may be named by many and overlap. Where they do, each byte is looked at once, and counts
//! as often as it is named: an image cannot make a check walk the same table a million times.

use super::super::open::{list_bitmaps, list_snapshots, snapshot_l1};
use super::counts::Cover;
use super::{FindingKind, Survey};
use crate::store::Store;
use crate::{Error, Kind, Result};
use std::ops::Range;

/// What is named from outside of the tables.
#[derive(Debug, Default)]
pub(super) struct Areas {
    /// Clusters of all of it.
    pub(super) clusters: Cover,
    /// Bytes of the first-level tables, the active one and those of snapshots.
    pub(super) l1: Cover,
    /// Bytes of the tables of bitmaps.
    pub(super) bitmaps: Cover,
}

/// What a damaged list tells, and else what is in it. The outer error is the storage's.
fn soften<T>(done: Result<T>) -> Result<std::result::Result<T, Error>> {
    match done {
        Err(e) if !matches!(e.kind(), Kind::Damaged | Kind::Unsupported) => Err(e),
        done => Ok(done),
    }
}

impl Areas {
    /// Lists them, and says which cannot be read or are not in the file.
    pub(super) async fn collect<S: Store>(survey: &mut Survey<'_, S>) -> Result<Self> {
        let mut areas = Self::default();
        let (l1, refcounts) = (survey.header.l1, survey.header.refcounts);
        areas.take(survey, "the header", 0, 1);
        let active = areas.take(survey, "the L1 table", l1.at, table_len(l1.entries));
        areas.l1.add(&active);
        let len = u64::from(refcounts.clusters).saturating_mul(survey.cluster().bytes());
        areas.take(survey, "the refcount table", refcounts.at, len);
        areas.snapshots(survey).await?;
        areas.bitmaps(survey).await?;
        Ok(areas)
    }

    /// Takes `len` bytes from `at`, and gives what of them is in the file.
    fn take<S: Store>(
        &mut self,
        survey: &mut Survey<'_, S>,
        what: &str,
        at: u64,
        len: u64,
    ) -> Range<u64> {
        let end = at.saturating_add(len);
        let size = survey.cluster();
        let (first, last) = (size.whole(at), size.count(end));
        if len > 0 && last > survey.clusters {
            let file = survey.len;
            survey.find_hopeless(FindingKind::PastEnd, at, || {
                format!("{what} ends at {end:#x}, behind the end of the file ({file} bytes)")
            });
        }
        if len > 0 && first < survey.clusters {
            self.clusters.add(&(first..last.min(survey.clusters)));
        }
        at.min(survey.len)..end.min(survey.len)
    }

    async fn snapshots<S: Store>(&mut self, survey: &mut Survey<'_, S>) -> Result<()> {
        let at = survey.header.snapshots.at;
        let (all, end) = match soften(list_snapshots(survey.store, &survey.header).await)? {
            Ok(listed) => listed,
            Err(e) => {
                let text = || format!("{e}; what the snapshots name is not known");
                survey.find_hopeless(FindingKind::BadSnapshot, at, text);
                return Ok(());
            }
        };
        if !all.is_empty() {
            self.take(survey, "the snapshot table", at, end.saturating_sub(at));
        }
        for snapshot in &all {
            match snapshot_l1(survey.store, &survey.header, snapshot) {
                Ok((l1, _)) => {
                    let len = table_len(l1.entries);
                    let range = self.take(survey, "the L1 table of a snapshot", l1.at, len);
                    self.l1.add(&range);
                }
                Err(e) => {
                    let text = || format!("{e}; what it names is not known");
                    survey.find_hopeless(FindingKind::BadSnapshot, at, text);
                }
            }
        }
        Ok(())
    }

    async fn bitmaps<S: Store>(&mut self, survey: &mut Survey<'_, S>) -> Result<()> {
        let Some(directory) = survey.header.bitmaps() else {
            return Ok(());
        };
        self.take(survey, "the bitmap directory", directory.at, directory.len);
        match soften(list_bitmaps(survey.store, &survey.header).await)? {
            Ok(all) => {
                for bitmap in all {
                    let (at, len) = (bitmap.table_at, table_len(bitmap.table_entries));
                    let range = self.take(survey, "the table of a bitmap", at, len);
                    self.bitmaps.add(&range);
                }
            }
            Err(e) => {
                let text = || format!("{e}; what the bitmaps name is not known");
                survey.find_hopeless(FindingKind::BadBitmap, directory.at, text);
            }
        }
        Ok(())
    }
}

/// Bytes of a table of so many entries.
fn table_len(entries: u32) -> u64 {
    u64::from(entries).saturating_mul(8)
}
