//! Check: whether a qcow2 image keeps the rules of its format, and what is wrong when it does not.
//!
//! The check only reads, and `repair` makes use of what it knows. Counts who names each cluster of
//! the file, compares with the refcounts that are stored, and judges every entry on the way. Its
//! order:
//!
//! 1. `areas`: the places that are named by the header, by snapshots and by bitmaps.
//! 2. `refs`: what the entries in them name, each byte of a table looked at once however often it
//!    is named.
//! 3. `stored`: the counts against the stored refcounts, and overlaps.
//! 4. `flags`: what the active tables say of their own clusters.
//!
//! What it costs follows from what the file has. Time: from the table bytes that are no hole. Memory:
//! from the clusters that are named. A set of clusters takes at most one bit for each cluster of the
//! file, and less when few are in it; the counts are one set for each bit of the largest count. With
//! 16 TiB in clusters of 64 KiB and no snapshot, three sets are full: 96 MiB.
//!
//! Guest data in an external data file is not looked at, nor the file. The caller keeps everyone
//! else away from the image. Source of the rules: QEMU `docs/interop/qcow2.rst`.

mod areas;
mod counts;
mod flags;
mod mark;
mod recount;
mod refs;
mod repair;
mod report;
mod span;
mod stored;

pub(super) use mark::Flags;
pub(super) use recount::Recount;
pub(super) use repair::clean;
pub use repair::{Repair, give_back, repair, repair_watched};
pub use report::{Finding, FindingKind, Report};
pub(super) use span::Span;

use super::header::{CORRUPT, DIRTY, Header};
use super::open::read_header;
use super::table::Layout;
use crate::progress::{Progress, Watch};
use crate::store::Store;
use crate::units::ClusterSize;
use crate::{Error, Result};
use areas::Areas;
use counts::Counts;
use roaring::RoaringBitmap;
use std::ops::Range;

/// Clusters of the largest file whose references are counted: what a cluster number can say.
const CLUSTERS_MAX: u64 = 1 << 32;
/// Where a header holds its incompatible features.
const AT_FEATURES: u64 = 72;

/// Checks an image. Fails only when its header cannot be read as one, when the file has more than
/// 2^32 clusters (`Unsupported`), or when the storage fails; whatever else is wrong stands in the
/// report.
pub async fn check<S: Store>(store: &S) -> Result<Report> {
    check_watched(store, &mut ()).await
}

/// The same, for somebody who may end it: nothing is ever changed.
pub async fn check_watched<S: Store>(store: &S, watch: &mut dyn Watch) -> Result<Report> {
    Ok(Survey::take(store, watch).await?.report)
}

/// The counts of an image that may be changed. `Damaged` when a check finds an error in it, or when it
/// was not closed.
pub(super) async fn sound<'s, S: Store>(
    store: &'s S,
    watch: &mut dyn Watch,
) -> Result<Recount<'s, S>> {
    let survey = Survey::take(store, watch).await?;
    let (errors, notices) = (survey.report.errors, survey.report.notices);
    if errors > 0 || notices > 0 {
        return Err(Error::damaged(format!(
            "the image must be repaired first: a check finds {errors} errors{}",
            if notices > 0 {
                ", and it was not closed"
            } else {
                ""
            }
        )));
    }
    Recount::new(survey).await
}

/// A check under way, and what it knows so far.
struct Survey<'s, S> {
    store: &'s S,
    header: Header,
    layout: Layout,
    /// File length.
    len: u64,
    /// Clusters of the file; its last may be cut short.
    clusters: u64,
    /// How often each cluster is named.
    total: Counts,
    /// How often each cluster is named as a second-level table.
    tables: Counts,
    /// Clusters that must be named once: all metadata but second-level tables, and the bits of
    /// bitmaps.
    single: RoaringBitmap,
    /// Clusters that are named as guest data.
    plain: RoaringBitmap,
    /// Clusters that compressed data touches.
    packed: RoaringBitmap,
    /// Clusters that are named, and less often than their refcounts say.
    too_high: RoaringBitmap,
    /// Clusters that cannot have all the uses that they have.
    overlaps: u64,
    /// Other errors that no count mends: what names nothing that can be, and what cannot be read.
    hopeless: u64,
    report: Report,
}

impl<'s, S: Store> Survey<'s, S> {
    /// Looks at everything.
    async fn take(store: &'s S, watch: &mut dyn Watch) -> Result<Self> {
        let mut survey = Self::new(store, read_header(store).await?)?;
        survey.look_at_header();
        let areas = Areas::collect(&mut survey).await?;
        survey.count_areas(&areas);
        survey.count_refs(&areas, watch).await?;
        survey.look_at_refcounts(watch).await?;
        survey.look_at_overlaps();
        survey.look_at_flags(watch).await?;
        Ok(survey)
    }

    fn new(store: &'s S, header: Header) -> Result<Self> {
        let len = store.info().len;
        let clusters = header.cluster.count(len);
        if clusters > CLUSTERS_MAX {
            return Err(Error::unsupported(format!(
                "references in a file of {clusters} clusters, more than 2^32, are not counted"
            )));
        }
        Ok(Self {
            store,
            layout: header.layout()?,
            header,
            len,
            clusters,
            total: Counts::default(),
            tables: Counts::default(),
            single: RoaringBitmap::new(),
            plain: RoaringBitmap::new(),
            packed: RoaringBitmap::new(),
            too_high: RoaringBitmap::new(),
            overlaps: 0,
            hopeless: 0,
            report: Report::default(),
        })
    }

    const fn cluster(&self) -> ClusterSize {
        self.header.cluster
    }

    /// The cluster of the file that holds byte `at`; none behind its end.
    fn cluster_in_file(&self, at: u64) -> Option<u32> {
        let cluster = self.cluster().cluster_of(at);
        cluster.filter(|n| u64::from(*n) < self.clusters)
    }

    /// Adds an error that no count mends.
    fn find_hopeless(&mut self, kind: FindingKind, at: u64, text: impl FnOnce() -> String) {
        self.hopeless = self.hopeless.saturating_add(1);
        self.report.find(kind, at, text);
    }

    /// Whether a cluster in these bytes of the file is not named exactly once.
    fn is_shared(&self, range: &Range<u64>) -> bool {
        let (first, end) = (
            self.cluster().whole(range.start),
            self.cluster().count(range.end),
        );
        (first..end).any(|n| u32::try_from(n).map_or(0, |n| self.total.get(n)) != 1)
    }

    fn look_at_header(&mut self) {
        let features = self.header.features.incompatible;
        if features & DIRTY != 0 {
            self.report.find(FindingKind::Dirty, AT_FEATURES, || {
                "the image was not closed: refcounts may be stale, which reading does not need"
                    .into()
            });
        }
        if features & CORRUPT != 0 {
            self.report.find(FindingKind::Corrupt, AT_FEATURES, || {
                "the image is marked corrupt: nobody may write to it".into()
            });
        }
    }
}

/// How far a phase is, in bytes.
const fn progress(phase: &'static str, done: u64, total: u64) -> Progress {
    Progress { phase, done, total }
}
