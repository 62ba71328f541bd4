//! Check: whether a delta keeps the rules of its format, and what is wrong when it does not.
//!
//! [`check`] only reads. It looks at the whole table in bounded steps, skips the holes of a sparse
//! one, and keeps one bit for each file cluster in use. It finds what any ploop generation or QEMU
//! finds, and more: they disagree on what to look for (ploop reference 1.11, 3.6, 8.1).
//!
//! [`repair()`] mends what can be mended and never makes readable data unreadable. Its ordering is
//! written down in `repair`.
//!
//! The caller keeps everyone else away from the file.

mod repair;
mod report;
mod scan;
mod space;

pub use repair::{Repair, repair, repair_watched};
pub use report::{Finding, FindingKind, Grade, Report, Severity};

use super::extension::{self, Extension};
use super::header::{CLOSED_V21, FLAG_CONVERTING, FLAG_EMPTY, Header, IN_USE};
use crate::progress::Watch;
use crate::store::Store;
use crate::{Error, Kind, Result, limits};
use bytes::Bytes;
use report::Place;
use roaring::RoaringBitmap;
use scan::{Judge, Table, Verdict};

/// Offsets of header fields that findings point at.
const AT_ENTRIES: Place = Place::Byte(0x20);
const AT_IN_USE: Place = Place::Byte(0x2C);
const AT_DATA: Place = Place::Byte(0x30);
const AT_FLAGS: Place = Place::Byte(0x34);
const AT_EXTENSION: Place = Place::Byte(0x38);

/// Checks a delta. Fails only when its header cannot be read as one, or when the storage fails;
/// whatever else is wrong stands in the report.
pub async fn check<S: Store>(store: &S) -> Result<Report> {
    check_watched(store, &mut ()).await
}

/// The same, for somebody who may end it: nothing is ever changed.
pub async fn check_watched<S: Store>(store: &S, watch: &mut dyn Watch) -> Result<Report> {
    Ok(Survey::take(store, watch).await?.report)
}

/// What a pass over the whole image found.
struct Survey {
    header: Header,
    /// The first page as it is on disk.
    page: Bytes,
    /// File length.
    len: u64,
    judge: Judge,
    extension: Kept,
    /// Entries of guest clusters that can only be cleared.
    cleared: u64,
    /// Entries whose data must move to a cluster of its own.
    moved: u64,
    report: Report,
}

/// What is known of the format extension.
#[derive(Debug, Clone, PartialEq)]
enum Kept {
    /// There is none.
    None,
    /// It is valid and occupies these clusters.
    Valid(RoaringBitmap),
    /// There is one that nobody may trust.
    Stale,
    /// It demands software that knows more.
    Unknown,
}

impl Survey {
    async fn take<S: Store>(store: &S, watch: &mut dyn Watch) -> Result<Self> {
        let header = super::open::read_header(store).await?;
        let page = store
            .read_at(0, crate::buf::aligned(limits::PAGE as usize))
            .await?
            .freeze();
        let len = store.info().len;
        let (judge, report) = (Judge::new(header, len), Report::default());
        let mut survey = Self {
            header,
            page,
            len,
            judge,
            extension: Kept::None,
            cleared: 0,
            moved: 0,
            report,
        };
        survey.look_at_header();
        if survey.is_converting() {
            // Entries may be in either unit: nothing said about them would be true.
            return Ok(survey);
        }
        survey.look_at_table(store, watch).await?;
        survey.look_at_extension(store).await?;
        survey.look_at_space(store, watch).await?;
        Ok(survey)
    }

    const fn is_converting(&self) -> bool {
        self.header.flags & FLAG_CONVERTING != 0
    }

    fn look_at_header(&mut self) {
        let (header, report) = (&self.header, &mut self.report);
        if header.flags & FLAG_CONVERTING != 0 {
            let text = "a conversion between format versions was interrupted; `ploopctl convert \
                        DISK` undoes it, by the .idx file beside the image";
            report.find(FindingKind::Converting, AT_FLAGS, text.into());
        }
        match header.in_use {
            0 | CLOSED_V21 => {}
            IN_USE => report.find(
                FindingKind::Unclean,
                AT_IN_USE,
                "the image was not closed".into(),
            ),
            mark => {
                let text = format!("in-use mark {mark:#010x} means neither open nor closed");
                report.find(FindingKind::Unclean, AT_IN_USE, text);
            }
        }
        if !header.covers_size() {
            let text = format!(
                "{} entries of {} bytes do not cover a size of {} sectors",
                header.entries,
                header.cluster.bytes(),
                header.sectors
            );
            report.find(FindingKind::ShortTable, AT_ENTRIES, text);
        }
        self.look_at_data_offset();
    }

    fn look_at_data_offset(&mut self) {
        let (header, size) = (&self.header, self.header.cluster);
        let needed = size.count(header.entry_at(header.entries));
        let stated = self.page.get(0x30..0x34);
        if stated == Some(&[0; 4]) {
            let text = format!("the first data cluster is not stated; it is computed as {needed}");
            self.report.find(FindingKind::DataOffset, AT_DATA, text);
        } else if u64::from(header.data_start) > needed {
            let text = format!(
                "data starts at cluster {}, where {needed} would do; some kernels refuse that",
                header.data_start
            );
            self.report.find(FindingKind::DataOffset, AT_DATA, text);
        }
        if self.len < size.start(header.data_start) {
            let text = format!(
                "the file ends inside its table, which ends at {:#x}: the entries behind are lost",
                size.start(header.data_start)
            );
            self.report
                .find(FindingKind::ShortFile, Place::Byte(self.len), text);
        }
    }

    async fn look_at_table<S: Store>(&mut self, store: &S, watch: &mut dyn Watch) -> Result<()> {
        let mut table = Table::new(store, &self.header);
        while let Some(chunk) = table.next().await? {
            watch.tell(table.progress("table"))?;
            for (slot, raw) in chunk.slots() {
                let verdict = self.judge.slot(slot, raw);
                self.count(verdict);
                if let Some((kind, text)) = complaint(verdict) {
                    self.report.find(kind, Place::Slot(slot), text);
                }
            }
        }
        self.report.used_clusters = self.judge.used.len();
        self.look_at_empty_flag();
        Ok(())
    }

    fn count(&mut self, verdict: Verdict) {
        let counter = match verdict {
            Verdict::PastEnd(_) | Verdict::InHeader(_) => &mut self.cleared,
            Verdict::Duplicate(_) | Verdict::Misaligned(_) => &mut self.moved,
            Verdict::Good(_) | Verdict::BeyondDevice => return,
        };
        *counter = counter.saturating_add(1);
    }

    /// ploop sets the flag on preallocated images too, so a full table is no contradiction.
    fn look_at_empty_flag(&mut self) {
        let (used, entries) = (self.judge.used.len(), u64::from(self.header.entries));
        let blank = used == 0 && self.cleared == 0 && self.moved == 0;
        let text = match (self.header.flags & FLAG_EMPTY != 0, blank) {
            (false, true) => "the Empty flag is not set on a blank image".into(),
            (true, false) if used < entries => {
                format!("the Empty flag is set on an image with {used} clusters in use")
            }
            _ => return,
        };
        self.report.find(FindingKind::EmptyFlag, AT_FLAGS, text);
    }

    async fn look_at_extension<S: Store>(&mut self, store: &S) -> Result<()> {
        if self.header.extension == 0 {
            return Ok(());
        }
        if self.header.in_use != CLOSED_V21 {
            let text = "a format extension that was not maintained at the last close; ignored";
            self.report
                .find(FindingKind::StaleExtension, AT_EXTENSION, text.into());
            self.extension = Kept::Stale;
            return Ok(());
        }
        let found = match read_extension(store, &self.header).await? {
            Ok(found) => found,
            Err(e) if e.kind() == Kind::Unsupported => return self.unknown_extension(&e),
            Err(e) => return self.bad_extension(e),
        };
        if let Err(e) = found.0.refuse_unknown() {
            return self.unknown_extension(&e);
        }
        if !self.judge.occupied().is_disjoint(&found.1) {
            return self.bad_extension(Error::damaged("shares a cluster with guest data"));
        }
        self.extension = Kept::Valid(found.1);
        Ok(())
    }

    fn unknown_extension(&mut self, e: &Error) -> Result<()> {
        self.report
            .find(FindingKind::UnknownFeature, AT_EXTENSION, e.to_string());
        self.extension = Kept::Unknown;
        Ok(())
    }

    fn bad_extension(&mut self, e: Error) -> Result<()> {
        let text = format!("{e}; the bitmaps in it are lost, guest data is not affected");
        self.report
            .find(FindingKind::BadExtension, AT_EXTENSION, text);
        self.extension = Kept::Stale;
        Ok(())
    }
}

/// What is wrong with a slot, if anything.
fn complaint(verdict: Verdict) -> Option<(FindingKind, String)> {
    Some(match verdict {
        Verdict::Good(_) => return None,
        Verdict::Duplicate(cluster) => (
            FindingKind::Duplicate,
            format!(
                "names cluster {cluster}, which an earlier entry has: a write to one is seen in both"
            ),
        ),
        Verdict::Misaligned(at) => (
            FindingKind::Misaligned,
            format!("names byte {at:#x}, which is not the start of a cluster"),
        ),
        Verdict::PastEnd(at) => (
            FindingKind::PastEnd,
            format!("names byte {at:#x}, past the end of the file: its data is gone"),
        ),
        Verdict::InHeader(at) => (
            FindingKind::InHeader,
            format!("names byte {at:#x}, in the header and table of the image"),
        ),
        Verdict::BeyondDevice => (
            FindingKind::BeyondDevice,
            "is not 0, although it is behind the end of the device".into(),
        ),
    })
}

/// The extension of a `v2.1` image and the clusters it occupies, or why it is damaged. The outer
/// error is the storage's.
async fn read_extension<S: Store>(
    store: &S,
    header: &Header,
) -> Result<Result<(Extension, RoaringBitmap)>> {
    let len = store.info().len;
    let at = match extension::offset(header, len) {
        Ok(Some(at)) => at,
        Ok(None) => return Ok(Err(Error::damaged("there is none"))),
        Err(e) => return Ok(Err(e)),
    };
    let extension = super::open::load_extension(store, header, at).await?;
    Ok(extension.and_then(|extension| {
        let clusters = extension.clusters(header, len, at)?;
        Ok((extension, clusters))
    }))
}
