//! Repair: making what an image says of itself agree with what it holds. Guest data is never touched.
//!
//! The ordering, in one place. Each step ends with a barrier and leaves an image that is no worse
//! than before; whoever is interrupted starts again.
//!
//! 1. Refcounts that are too low go up, and refcount blocks that are missing or broken are made anew
//!    behind the end of the file: from then on nobody takes what is in use.
//! 2. COPIED is set right: from then on nobody writes in place what somebody else has.
//! 3. Refcounts that are too high go down, and the file is cut where nobody names its end.
//! 4. The header no longer says dirty or corrupt.
//!
//! What cannot be mended stays as it is, and is told: entries that break a rule or name what is behind
//! the end of the file, snapshots and bitmaps that cannot be read, clusters with two uses, more
//! references than a refcount can say. While there is any of it, only what makes the image safer is
//! done: nothing is put behind the end of the file, where an entry may point; no refcount is lowered
//! and no COPIED set, because what the unread part names is not known; and the header says what it
//! said.

use super::super::header::{CORRUPT, DIRTY, write_header};
use super::mark::Flags;
use super::recount::{Changed, Recount};
use super::{AT_FEATURES, FindingKind, Report, Survey};
use crate::progress::Watch;
use crate::store::Store;
use crate::{Kind, Result};

/// What a repair may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repair {
    /// Bytes by which the file may grow for refcount blocks and a refcount table.
    pub growth_max: u64,
    /// Whether errors are mended, too. If not, an image that has one is not changed: its leaks may
    /// be what a broken entry named.
    pub errors: bool,
}

impl Default for Repair {
    fn default() -> Self {
        Self {
            growth_max: 1 << 30,
            errors: false,
        }
    }
}

/// Repairs an image that nobody uses. The report tells what was done and what is still wrong
/// afterwards. Fails before any change when the repair would grow the file too much, and in the
/// middle when the storage fails; then it may be run again. Other errors are those of
/// [`check`](super::check).
pub async fn repair<S: Store>(store: &S, allowed: &Repair) -> Result<Report> {
    repair_watched(store, allowed, &mut ()).await
}

/// The same, for somebody who may end it in the middle; then it may be run again.
pub async fn repair_watched<S: Store>(
    store: &S,
    allowed: &Repair,
    watch: &mut dyn Watch,
) -> Result<Report> {
    let survey = Survey::take(store, watch).await?;
    let report = &survey.report;
    let whole = report.is_clean() && report.notices == 0;
    if whole || (report.errors > 0 && !allowed.errors) {
        return Ok(survey.report);
    }
    let mut done = Report::default();
    let growth = (survey.hopeless == 0).then_some(allowed.growth_max);
    let mut recount = Recount::new(survey).await?;
    // Step 1.
    let raised = recount.raise(growth, watch).await?;
    tell_raised(&mut done, &recount, raised);
    if raised.blocks > 0 || raised.table {
        recount = Recount::new(Survey::take(store, watch).await?).await?;
    }
    finish(&mut recount, &mut done, watch).await?;
    let after = Survey::take(store, watch).await?.report;
    Ok(Report {
        repaired: done.repaired,
        ..after
    })
}

/// Repairs an image that is sound, in which a change left what nobody names any more, and COPIED that
/// says too little. As [`repair_watched`], but for a host without space: the change is made, and what it left
/// stays until there is a repair.
pub(in super::super) async fn clean<S: Store>(store: &S, watch: &mut dyn Watch) -> Result<()> {
    let all = Repair {
        growth_max: 0,
        errors: true,
    };
    match repair_watched(store, &all, watch).await {
        Err(e) if e.kind() == Kind::NoSpace => Ok(()),
        done => done.map(drop),
    }
}

/// Gives the host back what a change took that failed, and that nobody names: refcounts of it go
/// down, the file is cut, and has holes behind `len`, the bytes that it had before. An image with
/// an error stays as it is: such space may be what a broken entry named. Fails as [`repair`].
pub async fn give_back<S: Store>(store: &S, len: u64) -> Result<()> {
    let survey = Survey::take(store, &mut ()).await?;
    if survey.report.errors > 0 {
        return Ok(());
    }
    let mut recount = Recount::new(survey).await?;
    // No count is too low; marks that are not known here go.
    recount.raise(None, &mut ()).await?;
    finish(&mut recount, &mut Report::default(), &mut ()).await?;
    let first = recount.header().cluster.count(len);
    match u32::try_from(first) {
        Ok(first) => recount.punch_unnamed(first).await,
        Err(_) => Ok(()),
    }
}

/// Steps 2 to 4, as far as they may be done.
async fn finish<S: Store>(
    recount: &mut Recount<'_, S>,
    done: &mut Report,
    watch: &mut dyn Watch,
) -> Result<()> {
    let (l1, survey) = (recount.header().l1, &recount.survey);
    if survey.overlaps > 0 {
        return Ok(());
    }
    let stays = survey.hopeless > 0 || recount.is_above();
    let flags = if stays { Flags::Clear } else { Flags::All };
    let marked = recount.mark(l1, flags, watch).await?;
    if marked > 0 {
        let text = format!("{marked} COPIED flags were set right");
        done.done(FindingKind::Copied, l1.at, text);
    }
    if stays {
        return Ok(());
    }
    let lowered = recount.lower(watch).await?;
    if lowered.counts > 0 {
        let free = lowered
            .freed
            .saturating_mul(recount.header().cluster.bytes());
        let text = format!(
            "{} refcounts were lowered; {free} bytes are free",
            lowered.counts
        );
        done.done(FindingKind::Leak, recount.header().refcounts.at, text);
    }
    clear_marks(recount, done).await
}

fn tell_raised<S: Store>(done: &mut Report, recount: &Recount<'_, S>, raised: Changed) {
    let Changed { counts, blocks, .. } = raised;
    let at = recount.header().refcounts.at;
    if counts > 0 {
        let text = format!("{counts} refcounts were raised");
        done.done(FindingKind::RefcountLow, at, text);
    }
    if blocks > 0 {
        let text = format!("{blocks} entries of the refcount table were made anew");
        done.done(FindingKind::BadEntry, at, text);
    }
    if raised.table {
        let text = "the refcount table was written to a new place".into();
        done.done(FindingKind::Overlap, at, text);
    }
}

/// Step 4.
async fn clear_marks<S: Store>(recount: &Recount<'_, S>, done: &mut Report) -> Result<()> {
    let mut header = recount.header().clone();
    let was = header.features.incompatible;
    header.features.incompatible = was & !(DIRTY | CORRUPT);
    if header.features.incompatible == was {
        return Ok(());
    }
    write_header(recount.store(), &header).await?;
    for (bit, kind, text) in [
        (DIRTY, FindingKind::Dirty, "no longer marked dirty"),
        (CORRUPT, FindingKind::Corrupt, "no longer marked corrupt"),
    ] {
        if was & bit != 0 {
            done.done(kind, AT_FEATURES, text.into());
        }
    }
    Ok(())
}
