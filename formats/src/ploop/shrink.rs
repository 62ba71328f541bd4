//! Shrink: an open delta gets a smaller virtual size, and the space behind it becomes free.
//!
//! In order:
//!
//! 1. What is pending is made durable.
//! 2. The header, in sector 0: size, geometry, entries, and where the data begins, all as in an image
//!    that is made with the smaller size. Barrier. From here on it is the smaller image: no reader
//!    looks at an entry behind its end.
//! 3. The entries behind the end are zeroed, as the format wants it (ploop reference 1.2): who knows
//!    less than [`super::grow`] may take the place for a larger table.
//! 4. The clusters that they named, and those of the table that is not needed any more, are free. Their
//!    space goes back to the host; the file is cut at close.
//!
//! Before step 2 is durable nothing of the larger image is touched. A cut behind it leaves entries
//! that nobody looks at: opening clears them in an image that was not closed. What is freed is named
//! by nobody since step 2, so steps 3 and 4 need no order among them; the pass of closing makes step 3
//! durable before the image says that it is closed.
//!
//! What was behind the end is gone: an image that grows again shows zeros there.

use super::alloc::Alloc;
use super::header::Header;
use super::image::{Ploop, lock};
use super::index::Index;
use crate::store::{Space, Store};
use crate::update::Update;
use crate::{Kind, Result};
use roaring::RoaringBitmap;

impl<S: Store> Ploop<S> {
    /// Shrinks the image to `size` bytes, rounded up to a cluster; what it holds behind that is lost.
    /// Nothing is in flight on it, and nobody else has it open. An image that ends in that cluster
    /// already stays as it is. That no lower delta shows through what grows later is the caller's
    /// business.
    ///
    /// Fails with `Invalid`, and changes nothing, when it is smaller. After any error the image is
    /// opened anew, and is the old one or the smaller one; any but `NoSpace` is final.
    pub async fn shrink(&mut self, size: u64) -> Result<()> {
        let new = self.header.shrunk(size)?;
        if new.sectors == self.header.sectors {
            return Ok(());
        }
        self.may_write()?;
        let done = self.shrink_to(new).await;
        done.map_err(|e| {
            if e.kind() != Kind::NoSpace {
                self.poison();
            }
            e.at("shrinking")
        })
    }

    async fn shrink_to(&mut self, new: Header) -> Result<()> {
        if self.has_pending() {
            self.pass(None).await?;
        }
        let used = self.named_below(new.entries).await?;
        let page = self.first_page(&new).await?;
        let header = Update::new().write(0, page).barrier();
        header.apply(&self.store).await?;
        self.become_smaller(new, &used);
        self.clear_behind_end().await?;
        // What keeps its space is free all the same.
        self.return_space().await;
        Ok(())
    }

    /// Zeroes what the table holds behind its last entry; nothing is taken from the host for what has no
    /// space yet. Nobody but other tools looks there before the image grows, which clears it, too: a
    /// full host is no reason to fail.
    pub(super) async fn clear_behind_end(&self) -> Result<()> {
        match self.clear_found_entries().await {
            Err(e) if e.kind() == Kind::NoSpace => Ok(()),
            cleared => cleared,
        }
    }

    async fn clear_found_entries(&self) -> Result<()> {
        let end = self.header.cluster.start(self.header.data_start);
        let mut at = self.clear_page_of(self.header.entries, end).await?;
        while at < end {
            let (data, until) = self.store.extent(at).await?;
            let until = until.clamp(at.saturating_add(1), end);
            if data {
                let len = until.saturating_sub(at);
                self.store.punch(at, len, Space::Keep).await?;
            }
            at = until;
        }
        Ok(())
    }

    /// The file clusters that entries below `end` name.
    async fn named_below(&self, end: u32) -> Result<RoaringBitmap> {
        let mut used = RoaringBitmap::new();
        self.each_entry(|n, to| {
            if n < end {
                used.insert(to.0);
            }
            Ok(())
        })
        .await?;
        Ok(used)
    }

    /// What is in memory agrees with the file: nothing is known of a free cluster.
    fn become_smaller(&mut self, new: Header, used: &RoaringBitmap) {
        let end = lock(&self.index).alloc.end();
        let alloc = Alloc::new(new.data_start, end, used);
        self.header = new;
        *lock(&self.index) = Index::new(new, alloc, self.ledger.clone());
    }
}
