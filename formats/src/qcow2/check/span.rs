//! Span: a range of the file, read in bounded pieces; its holes, which are zeros, are skipped.

use super::super::be::u64_at;
use super::super::open::read_padded;
use crate::Result;
use crate::store::Store;
use crate::units::{SECTOR, floor_to};
use bytes::Bytes;
use std::ops::Range;

/// Bytes read in one step.
const STEP: u64 = 256 << 10;

/// A range of the file that is being read.
pub(in super::super) struct Span<'s, S> {
    store: &'s S,
    at: u64,
    end: u64,
}

/// Some bytes of a range.
pub(in super::super) struct Piece {
    /// File offset.
    pub(in super::super) at: u64,
    pub(in super::super) bytes: Bytes,
}

impl<'s, S: Store> Span<'s, S> {
    /// `range`, as far as the file has it. It begins at a multiple of 8.
    pub(in super::super) fn new(store: &'s S, range: Range<u64>) -> Self {
        Self {
            store,
            at: range.start,
            end: range.end.min(store.info().len),
        }
    }

    /// The next piece that is no hole. Pieces end at multiples of a sector, or with the range.
    pub(in super::super) async fn next(&mut self) -> Result<Option<Piece>> {
        while self.at < self.end {
            let (data, until) = self.store.extent(self.at).await?;
            let hole_end = floor_to(until, SECTOR).min(self.end);
            if data || hole_end <= self.at {
                let at = self.at;
                let stop = floor_to(at, SECTOR).saturating_add(STEP).min(self.end);
                self.at = stop;
                let bytes = read_padded(self.store, at, stop.saturating_sub(at)).await?;
                return Ok(Some(Piece { at, bytes }));
            }
            self.at = hole_end;
        }
        Ok(None)
    }
}

impl Piece {
    /// Numbers of 8 bytes that are not 0, and their file offsets.
    pub(in super::super) fn words(&self) -> impl Iterator<Item = (u64, u64)> {
        let at = (self.at..).step_by(8);
        let words = self.bytes.chunks_exact(8).map(|word| u64_at(word, 0));
        at.zip(words).filter(|(_, word)| *word != 0)
    }
}
