//! The flush pass: how what a guest was answered becomes durable. The ordering, in one place:
//!
//! 1. Freeze: the entries and frees that are pending now are what this pass covers. When clusters
//!    are being taken and few are left, the file was extended just before: step 4 makes its length
//!    durable.
//! 2. Data barrier. Left out only when every frozen entry is fresh: its cluster durably read as
//!    zeros before it was written, and zeros are what the guest read there before.
//! 3. Page images, holding durable plus frozen entries and nothing later.
//! 4. Metadata barrier. Now the frozen entries are durable.
//! 5. Their words leave the ledger. Freed clusters lose their content; they are handed out again
//!    only after a further flush.
//!
//! A write of step 3 that finds no space leaves everything pending and may be tried again. Every
//! other failure is final and poisons the image.

use super::image::{Ahead, Ploop, lock};
use crate::limits;
use crate::planted::{self, Bug};
use crate::store::Store;
use crate::update::Update;
use crate::{Error, Kind, Result};
use bytes::{Bytes, BytesMut};
use roaring::RoaringBitmap;

/// Pages in one metadata write at most.
const PAGES_PER_WRITE: usize = 64;

impl<S: Store> Ploop<S> {
    /// Runs one pass, which makes the extended length durable, too. The caller runs one at a time.
    pub(super) async fn pass(&self, ahead: Option<Ahead<'_>>) -> Result<()> {
        let (given_up, punched) = {
            let mut index = lock(&self.index);
            (index.freeze(), index.alloc.take_punched())
        };
        if given_up {
            // Its page images may still be on their way, and must not land after ours.
            self.store.settle().await;
        }
        match self.write_frozen().await {
            Ok(images) => self.done(images, punched, ahead),
            Err(e) => {
                self.undone(punched, &e);
                return Err(e);
            }
        }
        self.return_space().await;
        Ok(())
    }

    fn done(&self, images: Vec<(u32, Bytes)>, punched: RoaringBitmap, ahead: Option<Ahead<'_>>) {
        let mut index = lock(&self.index);
        index.pass_done(images);
        index.alloc.now_fresh(punched);
        if let Some(ahead) = ahead {
            index.alloc.extended(ahead.end);
        }
    }

    fn undone(&self, punched: RoaringBitmap, why: &Error) {
        let mut index = lock(&self.index);
        index.pass_undone();
        index.alloc.dirty_again(punched);
        if why.kind() != Kind::NoSpace {
            index.pending.ledger().poison();
        }
    }

    /// Steps 2 to 4; gives the page images that are durable now.
    async fn write_frozen(&self) -> Result<Vec<(u32, Bytes)>> {
        let (pages, data_first) = {
            let index = lock(&self.index);
            (index.frozen_pages(), index.pending.needs_data_first())
        };
        let mut update = Update::new();
        if data_first && !planted::is(Bug::IndexBeforeData) {
            update = update.barrier();
        }
        if planted::is(Bug::LaterEntriesInPageImage) {
            // Only what is published while the data barrier runs can be wrongly in an image.
            std::mem::take(&mut update).apply(&self.store).await?;
        }
        let images = self.images(&pages).await?;
        for (at, data) in runs(&images) {
            update = update.write(at, data);
        }
        update.barrier().apply(&self.store).await?;
        Ok(images)
    }

    /// Page images with the frozen entries.
    async fn images(&self, pages: &[u32]) -> Result<Vec<(u32, Bytes)>> {
        let mut images = Vec::with_capacity(pages.len());
        for page in pages {
            let cached = lock(&self.index).page(*page);
            let durable = match cached {
                Some(bytes) => bytes,
                None => self.read_page(*page).await?,
            };
            images.push((*page, lock(&self.index).page_image(*page, &durable)?));
        }
        Ok(images)
    }

    /// Step 5, the space: best effort, since a cluster that keeps its space is still free. Where
    /// there are no holes, only clusters that are wanted again are zeroed, when they are.
    pub(super) async fn return_space(&self) {
        if !self.store.info().punches {
            return;
        }
        while matches!(self.punch_free(u32::MAX).await, Ok(true)) {}
    }
}

/// Adjacent pages joined into single writes.
fn runs(images: &[(u32, Bytes)]) -> Vec<(u64, Bytes)> {
    let mut out = Vec::new();
    for run in images.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0)) {
        for part in run.chunks(PAGES_PER_WRITE) {
            let Some((first, bytes)) = part.first() else {
                continue;
            };
            let at = u64::from(*first).saturating_mul(limits::PAGE);
            let data = if part.len() == 1 {
                bytes.clone()
            } else {
                join(part)
            };
            out.push((at, data));
        }
    }
    out
}

/// The bytes of several pages in one buffer.
fn join(pages: &[(u32, Bytes)]) -> Bytes {
    let len = pages
        .iter()
        .fold(0usize, |n, (_, b)| n.saturating_add(b.len()));
    let mut all: BytesMut = crate::buf::aligned(len);
    let mut rest = all.as_mut();
    for (_, bytes) in pages {
        let Some((to, tail)) = rest.split_at_mut_checked(bytes.len()) else {
            break;
        };
        to.copy_from_slice(bytes);
        rest = tail;
    }
    all.freeze()
}
