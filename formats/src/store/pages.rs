//! Pages: sparse bytes in memory, cheap to copy.
//!
//! What the memory stores are made of. A page that is absent reads as zeros; copies share pages
//! until one of them is written, so that a simulator can keep a picture of a file for the price of
//! a reference count. It knows nothing about durability.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page, the unit of sharing and of holes.
pub const PAGE: u64 = 4096;
const SIZE: usize = PAGE as usize;

type Page = [u8; SIZE];

/// A sparse, growable array of bytes.
#[derive(Debug, Clone, Default)]
pub struct Pages {
    pages: Arc<BTreeMap<u64, Arc<Page>>>,
    len: u64,
}

/// The pieces of `at .. at + len`, page by page: page number, offset in it, length.
fn pieces(at: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = at.saturating_add(len);
    let mut next = at;
    std::iter::from_fn(move || {
        let rest = end.checked_sub(next).filter(|n| *n > 0)?;
        let within = next.checked_rem(PAGE)?;
        let take = rest.min(PAGE.saturating_sub(within));
        let piece = (next.checked_div(PAGE)?, within as usize, take as usize);
        next = next.saturating_add(take);
        Some(piece)
    })
}

impl Pages {
    /// `len` zero bytes.
    pub fn new(len: u64) -> Self {
        Self {
            pages: Arc::default(),
            len,
        }
    }

    /// A copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut pages = Self::new(bytes.len() as u64);
        pages.write(0, bytes);
        pages
    }

    /// Length in bytes.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not one byte.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buf` from `at`; bytes past the end read as zeros.
    pub fn read(&self, at: u64, buf: &mut [u8]) {
        let mut rest = buf;
        for (page, within, len) in pieces(at, rest.len() as u64) {
            let (part, tail) = rest.split_at_mut(len.min(rest.len()));
            let from = self
                .pages
                .get(&page)
                .and_then(|p| p.get(within..))
                .and_then(|p| p.get(..len));
            match from {
                Some(from) => part.copy_from_slice(from),
                None => part.fill(0),
            }
            rest = tail;
        }
    }

    /// Copies `data` to `at`. Bytes past the end are kept, but no length changes.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        let pages = Arc::make_mut(&mut self.pages);
        let mut rest = data;
        for (page, within, len) in pieces(at, data.len() as u64) {
            let (part, tail) = rest.split_at(len.min(rest.len()));
            let page = pages.entry(page).or_insert_with(|| Arc::new([0; SIZE]));
            let to = Arc::make_mut(page)
                .get_mut(within..)
                .and_then(|p| p.get_mut(..len));
            if let Some(to) = to {
                to.copy_from_slice(part);
            }
            rest = tail;
        }
    }

    /// Makes the range read as zeros; whole pages become holes.
    pub fn zero(&mut self, at: u64, len: u64) {
        let pages = Arc::make_mut(&mut self.pages);
        let end = at.saturating_add(len);
        let first = at.div_ceil(PAGE);
        let last = end.checked_div(PAGE).unwrap_or(0);
        if first < last {
            let whole: Vec<u64> = pages.range(first..last).map(|(n, _)| *n).collect();
            whole.iter().for_each(|n| drop(pages.remove(n)));
        }
        for edge in [at, end] {
            let page = edge.checked_div(PAGE).unwrap_or(0);
            let base = page.saturating_mul(PAGE);
            let Some(bytes) = pages.get_mut(&page) else {
                continue;
            };
            let from = at.saturating_sub(base).min(PAGE) as usize;
            let to = end.saturating_sub(base).min(PAGE) as usize;
            if let Some(part) = Arc::make_mut(bytes).get_mut(from..to) {
                part.fill(0);
            }
        }
    }

    /// Fills the range with one byte; whole pages share their memory.
    pub fn fill(&mut self, at: u64, len: u64, byte: u8) {
        let page = Arc::new([byte; SIZE]);
        for (number, within, len) in pieces(at, len) {
            if len == SIZE {
                Arc::make_mut(&mut self.pages).insert(number, page.clone());
            } else if let Some(part) = page.get(..len) {
                self.write(
                    number.saturating_mul(PAGE).saturating_add(within as u64),
                    part,
                );
            }
        }
    }

    /// Sets the length. Bytes past a shorter one are forgotten; new ones read as zeros.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len.saturating_sub(len));
        }
        self.len = len;
    }

    /// Whether byte `at` is in a page that holds anything but zeros, and where that stops being so.
    pub fn extent(&self, at: u64) -> (bool, u64) {
        let first = at.checked_div(PAGE).unwrap_or(0);
        let data = |page: u64| {
            self.pages
                .get(&page)
                .is_some_and(|p| p.iter().any(|b| *b != 0))
        };
        let kind = data(first);
        let mut page = first.saturating_add(1);
        while page.saturating_mul(PAGE) < self.len && data(page) == kind {
            page = match (kind, self.pages.range(page.saturating_add(1)..).next()) {
                (true, _) => page.saturating_add(1),
                (false, Some((next, _))) => *next,
                (false, None) => self.len.div_ceil(PAGE),
            };
        }
        (kind, page.saturating_mul(PAGE).min(self.len))
    }

    /// Everything, as one piece of memory. For tests on small files.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; self.len as usize];
        self.read(0, &mut all);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_agree_with_a_flat_array() {
        let mut pages = Pages::new(40_000);
        let mut flat = vec![0u8; 40_000];
        let mut x = 7u64;
        for step in 0..2_000u32 {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let at = (x >> 33) % 39_000;
            let len = ((x >> 20) % 9_000).min(40_000 - at);
            let range = at as usize..(at + len) as usize;
            if step % 3 == 0 {
                pages.zero(at, len);
                flat[range].fill(0);
            } else {
                let data = vec![step as u8; len as usize];
                pages.write(at, &data);
                flat[range].copy_from_slice(&data);
            }
        }
        assert_eq!(pages.to_vec(), flat);
    }

    #[test]
    fn a_copy_does_not_see_later_writes() {
        let mut one = Pages::from_bytes(&[1; 5000]);
        let two = one.clone();
        one.write(4000, &[9; 500]);
        assert_eq!(two.to_vec(), vec![1; 5000]);
    }

    #[test]
    fn a_shorter_length_forgets_what_was_past_it() {
        let mut pages = Pages::from_bytes(&[1; 5000]);
        pages.set_len(100);
        pages.set_len(5000);
        assert_eq!(pages.to_vec()[..100], [1; 100]);
        assert_eq!(pages.to_vec()[100..], [0; 4900]);
    }

    #[test]
    fn extents_alternate_between_data_and_holes_up_to_the_end() {
        let mut pages = Pages::new(10 * PAGE + 10);
        pages.write(3 * PAGE + 5, &[1]);
        pages.write(4 * PAGE, &[1]);
        pages.write(9 * PAGE, &[0; 10]);
        assert_eq!(pages.extent(0), (false, 3 * PAGE));
        assert_eq!(pages.extent(3 * PAGE + 100), (true, 5 * PAGE));
        assert_eq!(pages.extent(5 * PAGE), (false, 10 * PAGE + 10));
    }
}
