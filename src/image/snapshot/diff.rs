//! Diff: where two points of a disk differ, told from their tables. No data is read.
//!
//! Frozen files never change, so what both points find at the same place of the same file is the
//! same; what they find at two places is taken to differ, though its bytes may not.

use crate::image::chain::Chain;
use crate::stack::{Content, Stack};
use ploop_formats::Result;
use ploop_formats::layer::Layer;
use ploop_formats::store::Store;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

/// A point of a disk, opened.
#[derive(Debug)]
pub struct Point<S> {
    stack: Arc<Stack<S>>,
    files: Vec<OsString>,
}

/// A part of the disk that two points may have different bytes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Guest offset.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The later point reads as zeros here.
    pub zero: bool,
}

/// File of a range and where it is in that, none where it reads as zeros; and its length. What is
/// compressed is in one place for as long as its file does not change.
type Found<'a> = (Option<(&'a OsStr, Content)>, u64);

impl<S: Store> Point<S> {
    /// The stack of a chain's files.
    pub fn new(stack: Arc<Stack<S>>, chain: &Chain) -> Self {
        let files = chain.layers.iter().map(|layer| layer.name.clone());
        Self {
            stack,
            files: files.collect(),
        }
    }

    fn size(&self) -> u64 {
        self.stack.top().geometry().size
    }

    async fn find(&self, start: u64, len: u64) -> Result<Found<'_>> {
        let left = self.size().saturating_sub(start);
        if left == 0 {
            // Made before the disk grew.
            return Ok((None, len));
        }
        let depth = self.stack.depth();
        let segment = self.stack.resolve(start, len.min(left), depth).await?;
        let file = segment.layer.and_then(|layer| self.files.get(layer));
        let file = file.filter(|_| !segment.is_zero());
        let place = file.map(|file| (file.as_os_str(), segment.content));
        Ok((place, segment.len))
    }
}

/// Where `new` may differ from `old`, in order; neighbours that are alike are one.
pub async fn diff<S: Store>(old: &Point<S>, new: &Point<S>) -> Result<Vec<Difference>> {
    let size = old.size().max(new.size());
    let mut all: Vec<Difference> = Vec::new();
    let mut start = 0;
    while start < size {
        let (before, len) = old.find(start, size - start).await?;
        let (after, length) = new.find(start, len).await?;
        if before != after {
            let zero = after.is_none();
            match all.last_mut().filter(|last| last.meets(start, zero)) {
                Some(last) => last.length += length,
                None => all.push(Difference {
                    start,
                    length,
                    zero,
                }),
            }
        }
        start += length;
    }
    Ok(all)
}

impl Difference {
    const fn meets(&self, start: u64, zero: bool) -> bool {
        self.start + self.length == start && self.zero == zero
    }
}
