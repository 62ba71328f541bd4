//! Images as other tools made them: the same headers and tables, built here, read as their makers
//! meant and refused where writing would harm.
//!
//! The shapes are those of the Parallels product of 2014 (v1 and v2, four clusters of 64 KiB in a
//! disk of 2 MiB), of a hand-made image with zeros for its geometry, data offset and half of its
//! table, and of a disk of 64 GiB that ploop 7 closed with a dirty bitmap.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use ploop_formats::layer::{Extent, Layer};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::{FindingKind as F, Repair, check, repair};
use ploop_formats::ploop::extension::{Bits, DirtyBitmap, Extension, offset};
use ploop_formats::ploop::{Header, Ploop, Version};
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::{Kind, Result};
use uuid::Uuid;

const CLUSTER: usize = 64 << 10;

/// Header words from offset 0x10, then table words.
fn image(magic: &[u8; 16], header: [u32; 12], table: &[u32], clusters: usize) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    for word in header.iter().chain(table) {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.resize(CLUSTER, 0);
    for n in 1..=clusters {
        bytes.extend(vec![n as u8 * 0x11; CLUSTER]);
    }
    bytes
}

/// Type, heads, cylinders, cluster, entries, size, high size, in-use, data, flags, extension.
const PRODUCT: [u32; 12] = [2, 16, 8, 128, 32, 4096, 0, 0, 128, 0, 0, 0];
const HAND_MADE: [u32; 12] = [2, 0, 0, 128, 16, 4096, 0, 0, 0, 0, 0, 0];
const SECTORS: [u32; 4] = [0x80, 0x100, 0x180, 0x200];

fn v1() -> Vec<u8> {
    image(b"WithoutFreeSpace", PRODUCT, &SECTORS, 4)
}

fn v2() -> Vec<u8> {
    image(b"WithouFreSpacExt", PRODUCT, &[1, 2, 3, 4], 4)
}

fn hand_made() -> Vec<u8> {
    image(b"WithoutFreeSpace", HAND_MADE, &SECTORS, 4)
}

/// What a guest reads, by way of the layer's map.
fn content(bytes: &[u8]) -> Result<Vec<u8>> {
    let image = now(Ploop::open_read(MemStore::from_bytes(bytes)))?;
    let size = image.geometry().size;
    let mut out = Vec::new();
    while (out.len() as u64) < size {
        let at = out.len() as u64;
        match now(image.map(at, size - at))? {
            Extent::Data { at, len } => out.extend(&bytes[at as usize..(at + len) as usize]),
            other => out.resize(out.len() + other.len() as usize, 0),
        }
    }
    Ok(out)
}

fn kinds(bytes: &[u8]) -> Vec<F> {
    let report = now(check(&MemStore::from_bytes(bytes))).unwrap();
    report.findings.iter().map(|f| f.kind).collect()
}

fn expected() -> Vec<u8> {
    let mut all: Vec<u8> = [0x11, 0x22, 0x33, 0x44]
        .iter()
        .flat_map(|b| vec![*b; CLUSTER])
        .collect();
    all.resize(2 << 20, 0);
    all
}

#[test]
fn product_images_read_alike_and_have_no_finding() {
    for bytes in [v1(), v2()] {
        assert_eq!(content(&bytes).unwrap(), expected());
        assert_eq!(kinds(&bytes), []);
        assert!(
            now(Ploop::open_write(
                MemStore::from_bytes(&bytes),
                Ledger::local()
            ))
            .is_ok()
        );
    }
}

#[test]
fn the_hand_made_image_is_read_and_not_written_until_it_is_repaired() {
    let bytes = hand_made();
    assert_eq!(content(&bytes).unwrap(), expected());
    assert_eq!(kinds(&bytes), [F::ShortTable, F::DataOffset]);
    let store = MemStore::from_bytes(&bytes);
    let e = now(Ploop::open_write(store.copy(), Ledger::local())).unwrap_err();
    assert_eq!(e.kind(), Kind::Damaged);
    assert!(e.to_string().contains("do not cover"), "{e}");
    assert!(now(repair(&store, &Repair::default())).unwrap().is_clean());
    assert_eq!(content(&store.to_vec()).unwrap(), expected());
    assert!(now(Ploop::open_write(store, Ledger::local())).is_ok());
}

#[test]
fn mutations_that_crashed_other_drivers_are_refused() {
    let mutate = |edits: &[(usize, u32)]| {
        let mut bytes = v1();
        for (at, word) in edits {
            bytes[*at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    };
    for bytes in [
        mutate(&[(0x40, u32::MAX), (0x44, u32::MAX)]),
        mutate(&[(0x24, u32::MAX), (0x40, 0x4000_0001)]),
        mutate(&[(0x1C, 0)]),
        mutate(&[(0x1C, u32::MAX)]),
        mutate(&[(0x20, u32::MAX)]),
        mutate(&[(0x20, 1 << 29)]),
        mutate(&[(0x30, 1)]),
        mutate(&[(0x10, 3)]),
    ] {
        let store = MemStore::from_bytes(&bytes);
        let e = now(Ploop::open_write(store.clone(), Ledger::local())).unwrap_err();
        assert_eq!(e.kind(), Kind::Damaged, "{e}");
        assert!(now(check(&store)).is_err() || !kinds(&bytes).is_empty());
        assert_eq!(store.to_vec(), bytes, "a refused image was changed");
    }
}

#[test]
fn a_bitmap_closed_by_ploop_7_is_found_and_not_taken_for_leaks() {
    const MIB: usize = 1 << 20;
    let bitmap = DirtyBitmap {
        sectors: 134_217_728,
        id: Uuid::from_u128(0xe4f2eed0_37fe_4539_b50b_85d2e7fd235f),
        granularity: 128,
        l1: vec![Bits::At(1)],
    };
    let words = [
        2,
        16,
        262_144,
        2048,
        65_536,
        134_217_728,
        0,
        0x312E_3276,
        2048,
        0,
        4096,
        0,
    ];
    let mut bytes = image(b"WithouFreSpacExt", words, &[], 0);
    bytes.resize(MIB, 0);
    bytes.extend([0x60, 0x1c, 0x00, 0x40]);
    bytes.resize(2 * MIB, 0);
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.version, Version::V2);
    let features = vec![bitmap.feature(header.cluster).unwrap()];
    assert_eq!(features[0].data.len(), 40);
    bytes.extend(Extension { features }.build(header.cluster).unwrap());

    assert_eq!(kinds(&bytes), [F::EmptyFlag]);
    let len = bytes.len() as u64;
    let at = offset(&header, len).unwrap().unwrap() as usize;
    let extension = Extension::parse(&bytes[at..at + MIB]).unwrap();
    assert_eq!(extension.dirty_bitmaps(&header, len).unwrap(), [bitmap]);
    let image = now(Ploop::open_read(MemStore::from_bytes(&bytes))).unwrap();
    assert!(matches!(
        now(image.map(0, 64 << 30)).unwrap(),
        Extent::Absent { .. }
    ));
}
