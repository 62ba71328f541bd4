//! Metadata contexts: their names, how a client asks for them, what an extent means in each.
//!
//! Source: the protocol text for `base:allocation`, QEMU's documentation of its NBD contexts for
//! `qemu:allocation-depth` and `qemu:dirty-bitmap:NAME`. Never does I/O; the extents are the device's, or
//! a tracker's.

use super::limits;
use super::proto::{Head, Style};
use crate::device::GuestExtent;
use crate::tracker::{Registry, Set};
use bytes::{BufMut, BytesMut};
use std::collections::HashSet;
use std::ops::Range;

/// The namespace of generations of trackers; alone in a query it finds all of them.
const DIRTY: &str = "qemu:dirty-bitmap:";

/// A way to describe the blocks of an export.
#[derive(Debug, Clone)]
pub enum Context {
    /// `base:allocation`: bit 0 hole, bit 1 reads as zeros.
    Allocation,
    /// `qemu:allocation-depth`: which layer holds the block; 1 the top one, 0 none.
    Depth,
    /// `qemu:dirty-bitmap:` and this name: bit 0 when the block is in this set.
    Dirty(String, Set),
}

impl PartialEq for Context {
    /// What has the same name is the same: what it stands for stays as long as a client has it.
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Context {}

impl Context {
    /// Those that every export has.
    pub const PLAIN: [Context; 2] = [Context::Allocation, Context::Depth];

    /// Those that there are for the generations of trackers.
    pub fn dirty(registry: &Registry) -> Vec<Self> {
        let bitmaps = registry.bitmaps().into_iter();
        bitmaps.map(|(name, set)| Self::Dirty(name, set)).collect()
    }

    /// The name that clients ask for.
    pub fn name(&self) -> String {
        match self {
            Context::Allocation => "base:allocation".into(),
            Context::Depth => "qemu:allocation-depth".into(),
            Context::Dirty(name, _) => format!("{DIRTY}{name}"),
        }
    }

    /// Whether it is about what the device says.
    pub const fn is_plain(&self) -> bool {
        matches!(self, Context::Allocation | Context::Depth)
    }

    /// The blocks of a range, which is not empty, from its start on, at most `max`; `extents` are
    /// what the device says of it.
    pub fn runs(&self, range: Range<u64>, extents: &[GuestExtent], max: usize) -> Vec<(u64, u32)> {
        match self {
            Context::Allocation => join(extents, |e| e.hole as u32 | (e.zero as u32) << 1),
            Context::Depth => join(extents, |e| e.depth),
            Context::Dirty(_, set) => marked(set, range, max),
        }
    }

    /// Whether one of the queries of a list option finds this context: its name, or a namespace alone.
    fn is_found_by(&self, queries: &HashSet<&[u8]>) -> bool {
        let name = self.name();
        let namespace = name.split_inclusive(':').next();
        let within = matches!(self, Context::Dirty(..)).then_some(DIRTY);
        let names = [Some(name.as_str()), namespace, within];
        names
            .into_iter()
            .flatten()
            .any(|name| queries.contains(name.as_bytes()))
    }
}

/// What of the offered contexts a list option's queries find; all of them without a query.
pub fn found_by(offered: &[Context], queries: &[&[u8]]) -> Vec<Context> {
    let queries: HashSet<&[u8]> = queries.iter().copied().collect();
    let found = |context: &&Context| queries.is_empty() || context.is_found_by(&queries);
    offered.iter().filter(found).cloned().collect()
}

/// What of the offered contexts the queries select: those named in full, each once, and as many as a connection
/// can have. The number of one on the wire is its place among them, from 1 on.
pub fn selected_by(offered: &[Context], queries: &[&[u8]]) -> Vec<Context> {
    let queries: HashSet<&[u8]> = queries.iter().copied().collect();
    let named = |context: &&Context| queries.contains(context.name().as_bytes());
    let selected = offered.iter().filter(named).take(limits::CONTEXTS_MAX);
    selected.cloned().collect()
}

/// The blocks of a context: lengths and statuses. Neighbours differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// The context's number on the wire.
    pub id: u32,
    /// At least one.
    pub runs: Vec<(u64, u32)>,
}

/// Cuts what a device said to the range asked for, at most `len` bytes and `max` extents, so that
/// no rule of the protocol depends on the device. Empty when the device said nothing usable.
pub fn clip(extents: Vec<GuestExtent>, len: u64, max: usize) -> Vec<GuestExtent> {
    let mut left = len;
    let mut fit = |mut extent: GuestExtent| {
        extent.len = extent.len.min(left);
        left -= extent.len;
        (extent.len != 0).then_some(extent)
    };
    extents
        .into_iter()
        .map_while(&mut fit)
        .take(max.min(limits::EXTENTS_MAX))
        .collect()
}

/// Appends one status chunk.
///
/// The blocks are at least one and cover at most what was asked, so that with compact requests every
/// length fits 32 bits.
pub fn describe(head: Head, blocks: &Blocks, last: bool, out: &mut BytesMut) {
    let count = u32::try_from(blocks.runs.len()).expect("bounded by EXTENTS_MAX");
    head.status(out, last, blocks.id, count);
    for (len, status) in &blocks.runs {
        if head.style == Style::Extended {
            out.put_u64(*len);
            out.put_u64(u64::from(*status));
        } else {
            out.put_u32(u32::try_from(*len).expect("a compact request is shorter than 4 GiB"));
            out.put_u32(*status);
        }
    }
}

/// What a device said as a context sees it, equal neighbours joined.
fn join(extents: &[GuestExtent], status: impl Fn(&GuestExtent) -> u32) -> Vec<(u64, u32)> {
    let mut joined: Vec<(u64, u32)> = Vec::with_capacity(extents.len());
    for extent in extents {
        let status = status(extent);
        match joined.last_mut() {
            Some((len, same)) if *same == status => *len += extent.len,
            _ => joined.push((extent.len, status)),
        }
    }
    joined
}

/// What a set has of a range, which is not empty: at most `max` runs from its start on.
fn marked(set: &Set, range: Range<u64>, max: usize) -> Vec<(u64, u32)> {
    let mut runs = Vec::new();
    let mut at = range.start;
    for run in set.runs(range.clone()) {
        if run.start > at {
            runs.push((run.start - at, 0));
        }
        runs.push((run.end - run.start, 1));
        at = run.end;
        if runs.len() >= max {
            runs.truncate(max);
            return runs;
        }
    }
    if at < range.end {
        runs.push((range.end - at, 0));
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::memfd::SharedWords;
    use crate::tracker::{Blocks as Marks, words_for};
    use std::sync::Arc;

    fn extent(len: u64, zero: bool, hole: bool, depth: u32) -> GuestExtent {
        GuestExtent {
            len,
            zero,
            hole,
            depth,
        }
    }

    fn joined(context: &Context, extents: &[GuestExtent]) -> Vec<(u64, u32)> {
        context.runs(0..u64::MAX, extents, usize::MAX)
    }

    fn blocks(context: &Context, extents: &[GuestExtent]) -> Blocks {
        let runs = joined(context, extents);
        Blocks { id: 2, runs }
    }

    fn head(style: Style) -> Head {
        Head {
            style,
            cookie: 7,
            offset: 0,
        }
    }

    #[test]
    fn a_list_query_finds_by_name_by_namespace_and_nothing_else() {
        let all = Context::PLAIN.to_vec();
        assert_eq!(found_by(&Context::PLAIN, &[]), all);
        assert_eq!(
            found_by(&Context::PLAIN, &[b"base:"]),
            [Context::Allocation]
        );
        assert_eq!(
            found_by(&Context::PLAIN, &[b"qemu:", b"base:allocation"]),
            all
        );
        assert_eq!(
            found_by(&Context::PLAIN, &[b"qemu:allocation-depth"]),
            [Context::Depth]
        );
        for nothing in [
            "",
            ":",
            "base",
            "base:x",
            "qemu:dirty-bitmap:",
            "x-other:",
            "base:\0",
        ] {
            assert_eq!(
                found_by(&Context::PLAIN, &[nothing.as_bytes()]),
                [],
                "{nothing:?}"
            );
        }
    }

    #[test]
    fn a_set_query_selects_only_full_names_and_each_once() {
        assert_eq!(selected_by(&Context::PLAIN, &[]), []);
        assert_eq!(selected_by(&Context::PLAIN, &[b"base:", b"qemu:"]), []);
        let twice: [&[u8]; 3] = [b"base:allocation", b"x-y:z", b"base:allocation"];
        assert_eq!(selected_by(&Context::PLAIN, &twice), [Context::Allocation]);
    }

    #[test]
    fn a_careless_device_cannot_make_an_illegal_chunk() {
        let wild = vec![extent(600, false, false, 1), extent(600, true, true, 0)];
        assert_eq!(
            clip(wild.clone(), 1000, 9)
                .iter()
                .map(|e| e.len)
                .sum::<u64>(),
            1000
        );
        assert_eq!(
            clip(wild.clone(), 600, 9).len(),
            1,
            "an empty extent is none"
        );
        assert_eq!(clip(wild, 1000, 1).len(), 1);
        assert_eq!(clip(vec![extent(0, true, true, 0)], 10, 9), []);
        assert_eq!(
            clip(vec![extent(u64::MAX, true, true, 0); 2], 10, 9).len(),
            1
        );
        let many = vec![extent(1, true, true, 0); limits::EXTENTS_MAX + 1];
        assert_eq!(clip(many, u64::MAX, usize::MAX).len(), limits::EXTENTS_MAX);
    }

    #[test]
    fn neighbours_that_look_alike_in_a_context_are_joined() {
        let extents = [extent(4096, false, false, 1), extent(512, false, false, 2)];
        assert_eq!(joined(&Context::Allocation, &extents), [(4608, 0)]);
        assert_eq!(joined(&Context::Depth, &extents), [(4096, 1), (512, 2)]);
        let zeros = [
            extent(1, true, false, 1),
            extent(2, true, true, 0),
            extent(3, false, true, 0),
        ];
        assert_eq!(
            joined(&Context::Allocation, &zeros),
            [(1, 2), (2, 3), (3, 1)]
        );
    }

    #[test]
    fn what_a_set_has_is_told_from_edge_to_edge_and_cut_where_a_client_wants_one() {
        let words = SharedWords::create(words_for(1 << 20, 12).unwrap()).unwrap();
        let set = Arc::new(Marks::new(words, 12).unwrap());
        set.add(4096, 8192);
        set.add((1 << 20) - 1, 1);
        let told = |range, max| marked(&set, range, max);
        let rest = (1 << 20) - 4096 - 12288;
        assert_eq!(
            told(0..1 << 20, 9),
            [(4096, 0), (8192, 1), (rest, 0), (4096, 1)]
        );
        assert_eq!(told(0..1 << 20, 1), [(4096, 0)]);
        assert_eq!(told(0..1 << 20, 2), [(4096, 0), (8192, 1)]);
        assert_eq!(told(5000..6000, 9), [(1000, 1)]);
        assert_eq!(told(20480..20481, 9), [(1, 0)]);
        assert_eq!(told(5000..13000, 9), [(7288, 1), (712, 0)]);
    }

    #[test]
    fn the_longest_compact_request_fits_32_bit_lengths() {
        let longest = u64::from(u32::MAX);
        let half = extent(1 << 31, true, true, 0);
        let extents = clip(vec![half, half, half], longest, 9);
        let mut out = BytesMut::new();
        let blocks = blocks(&Context::Allocation, &extents);
        describe(head(Style::Structured), &blocks, true, &mut out);
        assert_eq!(out.len(), 20 + 4 + 8, "joined to one");
        assert_eq!(&out[24..28], u32::MAX.to_be_bytes());
    }

    #[test]
    fn an_extended_chunk_counts_its_extents_and_carries_64_bit_lengths() {
        let mut out = BytesMut::new();
        let extents = [extent(1 << 40, true, true, 0), extent(5, false, false, 3)];
        let blocks = blocks(&Context::Depth, &extents);
        describe(head(Style::Extended), &blocks, false, &mut out);
        assert_eq!(out.len(), 32 + 8 + 2 * 16);
        assert_eq!(&out[4..8], [0, 0, 0, 6], "no DONE; type 6");
        assert_eq!(&out[24..32], (8u64 + 32).to_be_bytes());
        assert_eq!(&out[32..40], [0, 0, 0, 2, 0, 0, 0, 2]);
        assert_eq!(&out[40..48], (1u64 << 40).to_be_bytes());
        assert_eq!(
            &out[56..72],
            [0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 3]
        );
    }
}
