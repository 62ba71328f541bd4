//! Headers: what is read is what is written, and what breaks a rule is refused with its place.

use crate::made::{CLUSTER, L1, SIZE, backing, extend, header, put32, put64};
use ploop_formats::Kind;
use ploop_formats::qcow2::Header;
use ploop_formats::qcow2::extension::{BitmapsAt, Extension, FeatureKind};
use ploop_formats::qcow2::header::{COMPRESSION, Compression, Version};

const NAMES: u32 = 0x6803_F857;
const FORMAT: u32 = 0xE279_2ACA;
const BITMAPS: u32 = 0x2385_2875;
const DATA_FILE: u32 = 0x4441_5441;

fn refused(bytes: &[u8], kind: Kind, says: &str) {
    let e = Header::parse(bytes).expect_err(says);
    assert_eq!(e.kind(), kind, "{e}");
    assert!(e.to_string().contains(says), "{e}: does not say {says:?}");
}

fn feature(kind: u8, bit: u8, name: &str) -> Vec<u8> {
    let mut entry = vec![0; 48];
    (entry[0], entry[1]) = (kind, bit);
    entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
    entry
}

/// A header with one of every extension.
fn full() -> Vec<u8> {
    let mut bytes = header(3);
    put64(&mut bytes, 72, 1 << 2 | 1 << 3);
    put64(&mut bytes, 80, 1 | 1 << 40);
    put64(&mut bytes, 88, 1 | 1 << 50);
    bytes[104] = 1;
    let mut at = extend(&mut bytes, 112, FORMAT, b"qcow2");
    at = extend(&mut bytes, at, DATA_FILE, b"data.raw");
    at = extend(&mut bytes, at, NAMES, &feature(0, 3, "compression type"));
    let mut bitmaps = vec![0; 24];
    put32(&mut bitmaps, 0, 2);
    put64(&mut bitmaps, 8, 100);
    put64(&mut bitmaps, 16, 9 * CLUSTER);
    at = extend(&mut bytes, at, BITMAPS, &bitmaps);
    at = extend(&mut bytes, at, 0x1234_5678, b"kept");
    at = extend(&mut bytes, at, 0x1234_5678, b"kept as well");
    backing(&mut bytes, at + 8, b"base.qcow2");
    bytes
}

#[test]
fn a_header_is_written_as_it_was_read() {
    for bytes in [header(2), header(3), full()] {
        let parsed = Header::parse(&bytes).unwrap();
        let mut again = parsed.encode().unwrap();
        again.resize(bytes.len(), 0);
        assert_eq!(again, bytes);
        assert_eq!(Header::parse(&again).unwrap(), parsed);
    }
}

#[test]
fn what_a_header_says() {
    let old = Header::parse(&header(2)).unwrap();
    assert_eq!((old.version, old.refcounts.width.bits()), (Version::V2, 16));
    assert_eq!((old.l1.at, old.l1.entries, old.size), (L1, 1, SIZE));
    assert_eq!((old.backing_format(), old.data_file()), (None, None));

    let new = Header::parse(&full()).unwrap();
    assert_eq!(new.version, Version::V3);
    assert_eq!(new.compression, Compression::Zstd);
    assert_eq!(new.backing.as_deref(), Some(&b"base.qcow2"[..]));
    assert_eq!(new.backing_format(), Some(&b"qcow2"[..]));
    assert_eq!(new.data_file(), Some(&b"data.raw"[..]));
    let bitmaps = BitmapsAt {
        count: 2,
        len: 100,
        at: 9 * CLUSTER,
    };
    assert_eq!(new.bitmaps(), Some(bitmaps));
    let named = new.extensions.iter().find_map(|e| match e {
        Extension::FeatureNames(names) => names.first(),
        _ => None,
    });
    let named = named.unwrap();
    assert_eq!((named.kind, named.bit), (FeatureKind::Incompatible, 3));
    assert_eq!(named.printable(), "compression type");
}

#[test]
fn bitmaps_that_somebody_wrote_past_are_not_believed() {
    let mut bytes = full();
    put64(&mut bytes, 88, 0);
    assert_eq!(Header::parse(&bytes).unwrap().bitmaps(), None);
}

#[test]
fn a_size_is_whole_sectors() {
    let mut bytes = header(3);
    put64(&mut bytes, 24, SIZE - 1);
    assert_eq!(Header::parse(&bytes).unwrap().size, SIZE - 512);
}

#[test]
fn a_header_that_gets_another_compression_says_so() {
    let mut bytes = header(3);
    put32(&mut bytes, 100, 104);
    let mut parsed = Header::parse(&bytes).unwrap();
    assert_eq!(parsed.encode().unwrap().len(), 104 + 8);
    parsed.compression = Compression::Zstd;
    parsed.features.incompatible |= COMPRESSION;
    let again = Header::parse(&parsed.encode().unwrap()).unwrap();
    assert_eq!(again.compression, Compression::Zstd);
    assert_eq!((again.l1, again.size), (parsed.l1, parsed.size));
}

#[test]
fn a_header_that_grows_beyond_its_cluster_is_not_written() {
    let mut header = Header::parse(&full()).unwrap();
    header.extensions.push(Extension::Unknown {
        magic: 1,
        data: vec![0; CLUSTER as usize],
    });
    assert_eq!(header.encode().unwrap_err().kind(), Kind::Invalid);
}

#[test]
fn an_unknown_incompatible_feature_is_refused_by_its_printable_name() {
    let mut bytes = header(3);
    put64(&mut bytes, 72, 1 << 5 | 1 << 63);
    let names = [
        feature(1, 5, "not this one"),
        feature(0, 5, "time\x1b[2J travel"),
    ];
    extend(&mut bytes, 112, NAMES, &names.concat());
    refused(
        &bytes,
        Kind::Unsupported,
        r#""time\u{1b}[2J travel" (bit 5), bit 63"#,
    );
    put64(&mut bytes, 72, 1 << 7);
    refused(&bytes, Kind::Unsupported, "bit 7");
}

#[test]
fn encrypted_images_are_refused_as_such() {
    for (method, says) in [(1, "AES"), (2, "LUKS")] {
        let mut bytes = header(3);
        put32(&mut bytes, 32, method);
        refused(&bytes, Kind::Unsupported, says);
    }
    let mut bytes = header(3);
    put32(&mut bytes, 32, 3);
    refused(&bytes, Kind::Damaged, "encryption method 3");
    let mut bytes = header(3);
    extend(&mut bytes, 112, 0x0537_BE77, &[0; 16]);
    refused(&bytes, Kind::Damaged, "encryption header");
}

/// A field: its offset, its bytes, a value that breaks a rule, and what the refusal says.
type Broken = (usize, usize, u64, &'static str);

const BROKEN: [Broken; 40] = [
    (0, 4, 0, "signature"),
    (20, 4, 8, "offset 20"),
    (20, 4, 22, "offset 20"),
    (20, 4, u32::MAX as u64, "offset 20"),
    (8, 8, 64, "offset 8"),
    (8, 8, 111, "offset 8"),
    (8, 8, CLUSTER - 9, "offset 8"),
    (8, 8, CLUSTER, "offset 8"),
    (8, 8, u64::MAX, "offset 8"),
    (24, 8, u64::MAX, "offset 24"),
    (24, 8, 1 << 63, "offset 24"),
    (24, 8, (512 << 20) + 512, "needs 2"),
    (24, 8, 1 << 62, "offset 36"),
    (36, 4, 0, "offset 36"),
    (36, 4, (4 << 20) + 1, "offset 36"),
    (36, 4, u32::MAX as u64, "offset 36"),
    (40, 8, 0, "offset 40"),
    (40, 8, L1 + 512, "offset 40"),
    (40, 8, 1 << 63, "offset 40"),
    (40, 8, u64::MAX - CLUSTER + 1, "offset 40"),
    (48, 8, 0, "offset 48"),
    (48, 8, 512, "offset 48"),
    (48, 8, 1 << 63, "offset 48"),
    (48, 8, i64::MAX as u64 - CLUSTER + 2, "offset 48"),
    (48, 8, u64::MAX - CLUSTER + 1, "offset 48"),
    (56, 4, 0, "offset 56"),
    (56, 4, 129, "offset 56"),
    (56, 4, u32::MAX as u64, "offset 56"),
    (60, 4, 65_537, "offset 60"),
    (60, 4, u32::MAX as u64, "offset 60"),
    (60, 4, 1, "offset 64"),
    (96, 4, 7, "offset 96"),
    (96, 4, u32::MAX as u64, "offset 96"),
    (100, 4, 103, "offset 100"),
    (100, 4, 105, "offset 100"),
    (100, 4, CLUSTER + 8, "offset 100"),
    (100, 4, 0x7FFF_FFF8, "offset 100"),
    (72, 8, 1 << 3, "offset 104"),
    (104, 1, 1, "offset 104"),
    (72, 8, 1 << 63, "bit 63"),
];

#[test]
fn every_field_that_breaks_a_rule_is_refused_with_its_place() {
    for (at, len, value, says) in BROKEN {
        let mut bytes = header(3);
        backing(&mut bytes, 200, b"base.qcow2");
        assert!(Header::parse(&bytes).is_ok());
        bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
        let e = Header::parse(&bytes).expect_err(says);
        assert!(e.to_string().contains(says), "{at}: {value:#x}: {e}");
    }
}

#[test]
fn versions_and_compressions_that_are_not_known_are_not_damage() {
    for version in [0, 1, 4, u32::MAX] {
        let mut bytes = header(3);
        put32(&mut bytes, 4, version);
        refused(&bytes, Kind::Unsupported, "version");
    }
    let mut bytes = header(3);
    bytes[104] = 2;
    refused(&bytes, Kind::Unsupported, "compression 2");
}

#[test]
fn extended_entries_need_subclusters_of_a_sector() {
    for (bits, fine) in [(13, false), (14, true)] {
        let mut bytes = header(3);
        put64(&mut bytes, 72, 1 << 4);
        put32(&mut bytes, 20, bits);
        match fine {
            true => assert!(Header::parse(&bytes).is_ok()),
            false => refused(&bytes, Kind::Damaged, "less than a sector"),
        }
    }
}

#[test]
fn extensions_that_break_a_rule_are_refused() {
    let with = |magic: u32, data: &[u8]| {
        let mut bytes = header(3);
        extend(&mut bytes, 112, magic, data);
        bytes
    };
    refused(&with(FORMAT, &[b'x'; 16]), Kind::Damaged, "backing format");
    refused(&with(DATA_FILE, &[b'x'; 1024]), Kind::Damaged, "data file");
    assert!(Header::parse(&with(NAMES, &[0; 47])).is_ok());
    for len in [u32::MAX, CLUSTER as u32 - 112 - 7, 1 << 31] {
        let mut bytes = header(3);
        put32(&mut bytes, 112, 77);
        put32(&mut bytes, 116, len);
        refused(&bytes, Kind::Damaged, "beyond its area");
        refused(&bytes, Kind::Damaged, "offset 0x70: ");
    }
    let mut bytes = with(FORMAT, b"raw");
    extend(&mut bytes, 128, FORMAT, b"raw");
    refused(&bytes, Kind::Damaged, "twice");
    refused(&bytes, Kind::Damaged, "offset 0x80: ");
}

/// Whether a header is read, and written as it was: nobody believes its bitmaps.
fn kept(bytes: &[u8]) {
    let parsed = Header::parse(bytes).unwrap();
    assert_eq!(parsed.bitmaps(), None);
    let mut again = parsed.encode().unwrap();
    again.resize(bytes.len(), 0);
    assert!(again == bytes);
}

#[test]
fn a_raw_external_data_file_has_nothing_below_it() {
    for (incompatible, autoclear, fine) in [(1 << 2, 0, true), (0, 2, true), (1 << 2, 2, false)] {
        let mut bytes = header(3);
        put64(&mut bytes, 72, incompatible);
        put64(&mut bytes, 88, autoclear);
        assert!(Header::parse(&bytes).is_ok());
        backing(&mut bytes, 200, b"base");
        match fine {
            true => assert!(Header::parse(&bytes).is_ok()),
            false => refused(&bytes, Kind::Damaged, "offset 88: a raw external"),
        }
    }
}

#[test]
fn a_bitmap_directory_that_breaks_a_rule_is_refused() {
    let fine: [u64; 4] = [1, 0, 100, CLUSTER];
    let make = |[count, reserved, len, at]: [u64; 4]| {
        let mut data = vec![0; 24];
        put32(&mut data, 0, count as u32);
        put32(&mut data, 4, reserved as u32);
        put64(&mut data, 8, len);
        put64(&mut data, 16, at);
        let mut bytes = header(3);
        put64(&mut bytes, 88, 1);
        extend(&mut bytes, 112, BITMAPS, &data);
        bytes
    };
    assert!(Header::parse(&make(fine)).is_ok());
    for (field, value) in [
        (0, 0),
        (0, 65_536),
        (1, 1),
        (2, 0),
        (2, (64 << 20) + 1),
        (3, 0),
        (3, 512),
        (3, u64::MAX - CLUSTER + 1),
    ] {
        let mut fields = fine;
        fields[field] = value;
        let mut bytes = make(fields);
        refused(&bytes, Kind::Damaged, "offset 0x70: bitmaps extension");
        put64(&mut bytes, 88, 0);
        kept(&bytes);
    }
    for len in [0, 23, 25, 4096] {
        let mut bytes = header(3);
        put64(&mut bytes, 88, 1);
        extend(&mut bytes, 112, BITMAPS, &vec![0; len]);
        refused(&bytes, Kind::Damaged, "offset 0x70: bitmaps extension");
        put64(&mut bytes, 88, 0);
        kept(&bytes);
    }
    assert!(Header::parse(&make([1, 0, 64 << 20, CLUSTER])).is_ok());
}

#[test]
fn a_file_that_ends_inside_its_header_is_refused() {
    let bytes = full();
    for len in 0..112 {
        let says = if len < 72 { "shorter" } else { "offset 100" };
        refused(&bytes[..len], Kind::Damaged, says);
    }
    let short = header(3);
    assert!(Header::parse(&short[..112]).is_ok());
}
