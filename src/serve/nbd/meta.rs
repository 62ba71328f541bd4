//! Metadata contexts: their names, how a client asks for them, what an extent means in each.
//!
//! Source: the protocol text for `base:allocation`, QEMU's documentation of its NBD contexts for
//! `qemu:allocation-depth`. Never does I/O; the extents are the device's.

use super::limits;
use super::proto::{Head, Style};
use crate::device::GuestExtent;
use bytes::{BufMut, BytesMut};

/// A way to describe the blocks of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: bit 0 hole, bit 1 reads as zeros.
    Allocation,
    /// `qemu:allocation-depth`: which layer holds the block; 1 the top one, 0 none.
    Depth,
}

impl Context {
    /// Every context of an export.
    pub const ALL: [Context; 2] = [Context::Allocation, Context::Depth];

    /// The name that clients ask for.
    pub const fn name(self) -> &'static str {
        match self {
            Context::Allocation => "base:allocation",
            Context::Depth => "qemu:allocation-depth",
        }
    }

    /// Its number on the wire, the same in every connection.
    pub const fn id(self) -> u32 {
        match self {
            Context::Allocation => 1,
            Context::Depth => 2,
        }
    }

    /// The context with this number.
    pub fn with_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|context| context.id() == id)
    }

    /// The status word of an extent.
    pub const fn status(self, extent: &GuestExtent) -> u32 {
        match self {
            Context::Allocation => extent.hole as u32 | (extent.zero as u32) << 1,
            Context::Depth => extent.depth,
        }
    }

    /// Whether a query names exactly this context.
    fn is(self, query: &[u8]) -> bool {
        query == self.name().as_bytes()
    }

    /// Whether a query of a list option finds this context: its name, or its namespace alone.
    fn is_found_by(self, query: &[u8]) -> bool {
        let namespace = self.name().split_inclusive(':').next();
        self.is(query) || namespace.is_some_and(|name| query == name.as_bytes())
    }
}

/// The contexts that a list option's queries find; all of them without a query.
pub fn found_by(queries: &[&[u8]]) -> Vec<Context> {
    let found =
        |c: &Context| queries.is_empty() || queries.iter().any(|query| c.is_found_by(query));
    Context::ALL.into_iter().filter(found).collect()
}

/// The contexts that the queries select: those named in full, each once.
pub fn selected_by(queries: &[&[u8]]) -> Vec<Context> {
    let named = |context: &Context| queries.iter().any(|query| context.is(query));
    Context::ALL.into_iter().filter(named).collect()
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

/// Appends one status chunk: the extents as `context` sees them, equal neighbours joined.
///
/// `extents` is not empty and covers at most what was asked, so that with compact requests every
/// length, joined or not, fits 32 bits.
pub fn describe(
    head: Head,
    context: Context,
    extents: &[GuestExtent],
    last: bool,
    out: &mut BytesMut,
) {
    let joined = join(context, extents);
    let count = u32::try_from(joined.len()).expect("bounded by EXTENTS_MAX");
    head.status(out, last, context.id(), count);
    for (len, status) in joined {
        if head.style == Style::Extended {
            out.put_u64(len);
            out.put_u64(u64::from(status));
        } else {
            out.put_u32(u32::try_from(len).expect("a compact request is shorter than 4 GiB"));
            out.put_u32(status);
        }
    }
}

fn join(context: Context, extents: &[GuestExtent]) -> Vec<(u64, u32)> {
    let mut joined: Vec<(u64, u32)> = Vec::with_capacity(extents.len());
    for extent in extents {
        let status = context.status(extent);
        match joined.last_mut() {
            Some((len, same)) if *same == status => *len += extent.len,
            _ => joined.push((extent.len, status)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(len: u64, zero: bool, hole: bool, depth: u32) -> GuestExtent {
        GuestExtent {
            len,
            zero,
            hole,
            depth,
        }
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
        let all = Context::ALL.to_vec();
        assert_eq!(found_by(&[]), all);
        assert_eq!(found_by(&[b"base:"]), [Context::Allocation]);
        assert_eq!(found_by(&[b"qemu:", b"base:allocation"]), all);
        assert_eq!(found_by(&[b"qemu:allocation-depth"]), [Context::Depth]);
        for nothing in [
            "",
            ":",
            "base",
            "base:x",
            "qemu:dirty-bitmap:",
            "x-other:",
            "base:\0",
        ] {
            assert_eq!(found_by(&[nothing.as_bytes()]), [], "{nothing:?}");
        }
    }

    #[test]
    fn a_set_query_selects_only_full_names_and_each_once() {
        assert_eq!(selected_by(&[]), []);
        assert_eq!(selected_by(&[b"base:", b"qemu:"]), []);
        let twice: [&[u8]; 3] = [b"base:allocation", b"x-y:z", b"base:allocation"];
        assert_eq!(selected_by(&twice), [Context::Allocation]);
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
        assert_eq!(join(Context::Allocation, &extents), [(4608, 0)]);
        assert_eq!(join(Context::Depth, &extents), [(4096, 1), (512, 2)]);
        let zeros = [
            extent(1, true, false, 1),
            extent(2, true, true, 0),
            extent(3, false, true, 0),
        ];
        assert_eq!(join(Context::Allocation, &zeros), [(1, 2), (2, 3), (3, 1)]);
    }

    #[test]
    fn the_longest_compact_request_fits_32_bit_lengths() {
        let longest = u64::from(u32::MAX);
        let half = extent(1 << 31, true, true, 0);
        let extents = clip(vec![half, half, half], longest, 9);
        let mut out = BytesMut::new();
        describe(
            head(Style::Structured),
            Context::Allocation,
            &extents,
            true,
            &mut out,
        );
        assert_eq!(out.len(), 20 + 4 + 8, "joined to one");
        assert_eq!(&out[24..28], u32::MAX.to_be_bytes());
    }

    #[test]
    fn an_extended_chunk_counts_its_extents_and_carries_64_bit_lengths() {
        let mut out = BytesMut::new();
        let extents = [extent(1 << 40, true, true, 0), extent(5, false, false, 3)];
        describe(
            head(Style::Extended),
            Context::Depth,
            &extents,
            false,
            &mut out,
        );
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
