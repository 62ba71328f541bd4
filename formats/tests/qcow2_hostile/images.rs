//! Images made to do harm: refused, or read to the end, in bounded memory and time, and never with a
//! panic. Nothing that they name is opened: a store is all that an image gets.

use crate::chain::Chain;
use crate::made::{
    CLUSTER, DATA, L1, L2, REFTABLE, backing, extend, header, image, list_bitmap, list_snapshot,
    put32, put64, repeated, zstd,
};
use crate::memory::{Meter, alone};
use crate::qemu::{Folder, installed};
use bytes::BytesMut;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::check::{self, Repair, Report, repair};
use ploop_formats::qcow2::snapshots::{Wanted, create};
use ploop_formats::qcow2::{Qcow2, read_header};
use ploop_formats::store::Store;
use ploop_formats::store::fault::{FaultStore, Faults, Operation, Rule};
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Error, Kind, Result};
use std::time::Duration;

/// What one image may cost.
const MEMORY: usize = 64 << 20;
const TIME: Duration = Duration::from_secs(1);
/// Bytes of a disk that are read of each image, in pieces.
const LOOK: u64 = 4 << 20;
const PIECE: u64 = 64 << 10;

/// Reads all that can be asked of an image: lists, snapshots, extents, bytes. The first error ends
/// it.
fn read_all(store: MemStore) -> Result<()> {
    let data = now(read_header(&store))?.has_data_file();
    let data = || data.then(|| MemStore::new(1 << 20));
    let image = now(Qcow2::open_read(store.clone(), data()))?;
    let snapshots = now(image.snapshots());
    let bitmaps = now(image.bitmaps());
    read_disk(&image)?;
    for snapshot in snapshots?.iter().take(3) {
        let image = now(Qcow2::open_read(store.clone(), data()))?;
        read_disk(&image.at_snapshot(snapshot)?)?;
    }
    bitmaps.map(drop)
}

fn read_disk(image: &Qcow2<MemStore>) -> Result<()> {
    let size = image.geometry().size;
    let mut at = 0;
    while at < size.min(LOOK) {
        let extent = now(image.map(at, PIECE.min(size - at)))?;
        assert!(!extent.is_empty() && extent.len() <= PIECE);
        let buf = BytesMut::zeroed(extent.len() as usize);
        match extent {
            Extent::Data { at, .. } => drop(now(image.store().read_at(at, buf))?),
            Extent::Packed { .. } => drop(now(image.unpack(at, buf))?),
            _ => {}
        }
        at += extent.len();
    }
    if size > LOOK {
        now(image.map(size - 512, 512)).map(drop)?;
    }
    Ok(())
}

/// The outcome of some work, which stays within the bounds.
fn bounded<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut meter = Meter::default();
    let done = meter.watch(work);
    assert!(
        meter.most() <= MEMORY,
        "{name}: {} bytes of memory",
        meter.most()
    );
    assert!(meter.longest() <= TIME, "{name}: {:?}", meter.longest());
    if let Err(e) = &done {
        let kinds = [Kind::Damaged, Kind::Unsupported];
        assert!(kinds.contains(&e.kind()), "{name}: {:?}: {e}", e.kind());
        assert!(e.to_string().len() < 2100, "{name}");
    }
    done
}

/// What a check finds in an image.
fn checked(name: &str, store: &MemStore) -> Result<Report> {
    bounded(&format!("{name}: check"), || now(check::check(store)))
}

/// Repairs a copy of an image: an error changes nothing, and what was done can be read by a check.
fn mended(name: &str, store: &MemStore) {
    let (copy, was) = (store.copy(), checked(name, store));
    let allowed = Repair {
        growth_max: 1 << 20,
        errors: true,
    };
    let done = bounded(&format!("{name}: repair"), || {
        match now(repair(&copy, &allowed)) {
            // It would have to grow too much.
            Err(e) if e.kind() == Kind::Invalid => Ok(None),
            done => done.map(Some),
        }
    });
    let Ok(was) = was else {
        assert!(done.is_err(), "{name}: repaired and not checked");
        return;
    };
    if let Ok(Some(report)) = done {
        assert!(
            report.errors <= was.errors,
            "{name}: {was:#?} became {report:#?}"
        );
    }
}

/// Makes a snapshot in a copy of an image: refused, or the image is whole afterwards.
fn snapshotted(name: &str, store: &MemStore) {
    let (copy, wanted) = (
        store.copy(),
        Wanted {
            name: b"one more".to_vec(),
            seconds: 1,
            nanoseconds: 0,
        },
    );
    let done = bounded(&format!("{name}: snapshot"), || {
        now(create(&copy, &wanted, &mut ()))
    });
    if done.is_ok() {
        let report = checked(name, &copy).unwrap();
        assert!(report.is_clean(), "{name}: {report:#?}");
    }
}

/// The outcome of reading an image. It is checked, repaired and gets a snapshot, too.
fn judge(name: &str, store: MemStore) -> Result<()> {
    mended(name, &store);
    snapshotted(name, &store);
    bounded(name, || read_all(store))
}

fn refused(name: &str, bytes: &[u8]) -> Error {
    match judge(name, MemStore::from_bytes(bytes)) {
        Err(e) => e,
        Ok(()) => panic!("{name}: read without a complaint"),
    }
}

/// A healthy image with one snapshot, whose table is in its last cluster but one, and a bitmap
/// directory in its last.
fn full() -> Vec<u8> {
    let mut bytes = image(3);
    let (snapshots, bitmaps) = (8 * CLUSTER, 9 * CLUSTER);
    bytes.resize(10 * CLUSTER as usize, 0);
    list_snapshot(&mut bytes, snapshots, L1);
    list_bitmap(&mut bytes, bitmaps, DATA);
    bytes
}

#[test]
fn the_healthy_images_are_read_without_a_complaint() {
    let _alone = alone();
    for bytes in [image(2), image(3), full()] {
        judge("healthy", MemStore::from_bytes(&bytes)).unwrap();
        let chain = Chain::open("disk", &|_| bytes.clone()).unwrap();
        let mut expected = vec![0u8; 8 * CLUSTER as usize];
        for guest in [0, 2, 5] {
            let from = guest * CLUSTER as usize;
            expected[from..from + CLUSTER as usize].fill(guest as u8 + 1);
        }
        assert!(chain.all().unwrap() == expected);
    }
}

/// A change to [`full`]: an offset, bytes, a value.
type Edit = (u64, usize, u64);

/// The classes of malformed fields that QEMU tests its own driver with, and what a refusal says.
const CLASSES: [(&str, &str, &[Edit]); 16] = [
    ("a huge header", "offset 100", &[(100, 4, 0xFFFF_FFF8)]),
    (
        "a header larger than a cluster",
        "offset 100",
        &[(100, 4, CLUSTER + 8)],
    ),
    (
        "a huge unknown extension",
        "beyond its area",
        &[(112, 4, 0x1234_5678), (116, 4, 0x7FFF_FFFF)],
    ),
    (
        "a huge refcount table",
        "offset 56",
        &[(56, 4, 0xFFFF_FFFF)],
    ),
    (
        "a refcount table that is a bit too large",
        "offset 56",
        &[(56, 4, 129)],
    ),
    (
        "a misaligned refcount table",
        "offset 48",
        &[(48, 8, REFTABLE + 1)],
    ),
    (
        "a refcount table far away",
        "offset 48",
        &[(48, 8, 0xFFFF_FFFF_FFFF_0000)],
    ),
    (
        "a misaligned snapshot table",
        "offset 64",
        &[(64, 8, 8 * CLUSTER + 8)],
    ),
    (
        "a snapshot table far away",
        "offset 64",
        &[(64, 8, 0xFFFF_FFFF_FFFF_0000)],
    ),
    (
        "huge numbers of snapshots",
        "offset 60",
        &[(60, 4, 0xFFFF_FFFF)],
    ),
    ("a few snapshots too many", "offset 60", &[(60, 4, 65_537)]),
    ("a misaligned L1 table", "offset 40", &[(40, 8, L1 + 8)]),
    ("an L1 table that is too small", "offset 36", &[(36, 4, 0)]),
    ("a huge L1 table", "offset 36", &[(36, 4, 0x7FFF_FFFF)]),
    (
        "a huge backing file name",
        "offset 8",
        &[(8, 8, 256), (16, 4, 0xFFFF_FFFF)],
    ),
    (
        "a backing file name of a byte too many",
        "offset 8",
        &[(8, 8, 256), (16, 4, 1024)],
    ),
];

/// The same for what is not in the header.
const BEHIND: [(&str, &str, &[Edit]); 13] = [
    (
        "two bitmaps of the same name",
        "the same name",
        &[
            (120, 4, 2),
            (128, 8, 64),
            (9 * CLUSTER + 32, 8, DATA),
            (9 * CLUSTER + 40, 4, 1),
            (9 * CLUSTER + 48, 4, 0x0110_0004),
            (9 * CLUSTER + 56, 4, 0x6269_7473),
        ],
    ),
    (
        "a misaligned L1 table of a snapshot",
        "not the start of a cluster",
        &[(8 * CLUSTER, 8, L1 + 8)],
    ),
    (
        "an L1 table of a snapshot far away",
        "behind the end of the file",
        &[(8 * CLUSTER, 8, 1 << 62)],
    ),
    (
        "a huge L1 table of a snapshot",
        "L1 table of 2147483647 entries",
        &[(8 * CLUSTER + 8, 4, 0x7FFF_FFFF)],
    ),
    (
        "an empty L1 table of a snapshot",
        "needs 1",
        &[(8 * CLUSTER + 8, 4, 0)],
    ),
    (
        "huge extra data of a snapshot",
        "bytes of extra data",
        &[(8 * CLUSTER + 36, 4, 0xFFFF_FFFF)],
    ),
    (
        "a huge disk of a snapshot",
        "a disk of",
        &[(8 * CLUSTER + 48, 8, u64::MAX)],
    ),
    (
        "a huge name of a snapshot",
        "a name of 65535",
        &[(8 * CLUSTER + 14, 2, 0xFFFF)],
    ),
    (
        "a snapshot table behind the file",
        "snapshot 0 (offset 0x630000)",
        &[(64, 8, 99 * CLUSTER)],
    ),
    (
        "a bitmap table far away",
        "bitmap: table",
        &[(9 * CLUSTER, 8, 1 << 63)],
    ),
    (
        "a huge bitmap table",
        "bitmap: a table of",
        &[(9 * CLUSTER + 8, 4, 0xFFFF_FFFF)],
    ),
    (
        "a bitmap of no known type",
        "type 2",
        &[(9 * CLUSTER + 16, 1, 2)],
    ),
    (
        "a bitmap with a huge name",
        "a name of 65535",
        &[(9 * CLUSTER + 18, 2, 0xFFFF)],
    ),
];

fn edited(edits: &[Edit]) -> Vec<u8> {
    let mut bytes = full();
    for (at, len, value) in edits {
        let at = *at as usize;
        bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
    bytes
}

#[test]
fn every_class_of_malformed_field_is_refused() {
    let _alone = alone();
    for (name, says, edits) in CLASSES.into_iter().chain(BEHIND) {
        let e = refused(name, &edited(edits));
        assert_eq!(e.kind(), Kind::Damaged, "{name}: {e}");
        assert!(e.to_string().contains(says), "{name}: {e}");
    }
}

/// Entries that break a rule, the first in the L1 table, the others in the L2 table.
const ENTRIES: [(&str, &str, Edit); 10] = [
    (
        "an L2 table behind the file",
        "L2 table: offset 0x630000",
        (L1, 8, 99 * CLUSTER),
    ),
    (
        "an L2 table at the end of all offsets",
        "L2 table: offset 0xffffffffff0000",
        (L1, 8, 0x00FF_FFFF_FFFF_0000),
    ),
    (
        "a misaligned L2 table",
        "offset 0x30000: L1 entry",
        (L1, 8, L2 + 512),
    ),
    (
        "reserved bits in L1",
        "offset 0x30000: L1 entry",
        (L1, 8, L2 | 1),
    ),
    (
        "data behind the file",
        "offset 0x40000: a cluster at",
        (L2, 8, 99 * CLUSTER),
    ),
    (
        "data at the end of all offsets",
        "offset 0x40000: a cluster at",
        (L2, 8, 0x00FF_FFFF_FFFF_0000),
    ),
    (
        "misaligned data",
        "offset 0x40000: L2 entry",
        (L2, 8, DATA + 512),
    ),
    (
        "reserved bits in L2",
        "offset 0x40000: L2 entry",
        (L2, 8, DATA | 2),
    ),
    (
        "compressed data behind the file",
        "offset 0x630000",
        (L2, 8, (1 << 62) | (99 * CLUSTER)),
    ),
    (
        "compressed data that is none",
        "offset 0x50000: compressed",
        (L2, 8, 1 << 62 | 1 << 54 | DATA),
    ),
];

#[test]
fn entries_that_break_a_rule_are_errors_where_they_are_and_nowhere_else() {
    let _alone = alone();
    for (name, says, edit) in ENTRIES {
        let bytes = edited(&[edit]);
        let e = refused(name, &bytes);
        assert_eq!(e.kind(), Kind::Damaged, "{name}: {e}");
        let place = e.to_string().contains("guest offset 0x0");
        assert!(place && e.to_string().contains(says), "{name}: {e}");
        if edit.0 == L2 {
            let image = now(Qcow2::open_read(MemStore::from_bytes(&bytes), None)).unwrap();
            let other = now(image.map(2 * CLUSTER, CLUSTER)).unwrap();
            assert!(matches!(other, Extent::Data { .. }), "{name}");
        }
    }
    let mut bytes = image(2);
    put64(&mut bytes, L2 as usize + 24, 1);
    let e = refused("a zero cluster in version 2", &bytes);
    assert!(e.to_string().contains("version 2"), "{e}");
}

#[test]
fn an_image_that_reads_itself_ends() {
    let _alone = alone();
    // The tables name each other and themselves: everything is a table, and data.
    for table in [L1, L2] {
        judge("loops", MemStore::from_bytes(&edited(&[(L1, 8, table)]))).ok();
    }
    let e = refused("itself below", &{
        let mut bytes = edited(&[(L2, 8, 1 << 62 | L2)]);
        backing(&mut bytes, 256, b"disk");
        bytes
    });
    assert_eq!(e.kind(), Kind::Damaged);
}

/// One image for each published hole that an image could use: what it did elsewhere, and here.
#[test]
fn images_of_known_holes_do_no_harm() {
    let _alone = alone();
    // CVE-2014-0142, -0143, -0144, -0145, -0146, -0147, -0148, 2014-0222, 2014-0223: sizes that
    // overflow, divide by zero or are allocated unseen.
    for (name, edits) in [
        (
            "0143: L1 and size",
            [(36, 4, 0x2000_0000), (24, 8, 1 << 62)],
        ),
        ("0144: clusters of a byte", [(20, 4, 0), (24, 8, 1 << 40)]),
        ("0144: clusters of 2^63", [(20, 4, 63), (24, 8, 1 << 40)]),
        (
            "0145: snapshot table",
            [(60, 4, 65_536), (64, 8, 0x7FFF_FFFF_FFFF_0000)],
        ),
        ("0146: snapshots without a table", [(60, 4, 1), (64, 8, 0)]),
        (
            "0147: refcount table",
            [(56, 4, 0x0001_0000), (48, 8, 1 << 62)],
        ),
        ("0222: a table of no entries", [(36, 4, 0), (40, 8, 0)]),
        (
            "0223: a disk beyond all offsets",
            [(24, 8, u64::MAX), (36, 4, 1)],
        ),
    ] {
        assert_eq!(
            refused(name, &edited(&edits)).kind(),
            Kind::Damaged,
            "{name}"
        );
    }
    // CVE-2024-4467, 2024-32498: a data file that names what is not the guest's. It is a name, and
    // the caller's to refuse: opening without it fails, and nothing but the store was read.
    for name in [
        &b"/etc/passwd"[..],
        b"json:{\"driver\":\"file\"}",
        b"nbd://host/",
    ] {
        let mut bytes = image(3);
        put64(&mut bytes, 72, 1 << 2);
        extend(&mut bytes, 112, 0x4441_5441, name);
        let store = MemStore::from_bytes(&bytes);
        assert_eq!(now(read_header(&store)).unwrap().data_file(), Some(name));
        let e = now(Qcow2::open_read(store, None)).unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid);
    }
    // CVE-2008-2004 and its like: a backing file without a format. The format is not guessed here.
    let mut bytes = image(3);
    backing(&mut bytes, 256, b"/etc/shadow");
    let image = now(Qcow2::open_read(MemStore::from_bytes(&bytes), None)).unwrap();
    assert_eq!(image.header().backing.as_deref(), Some(&b"/etc/shadow"[..]));
    assert_eq!(image.header().backing_format(), None);
    let absent = now(image.map(CLUSTER, CLUSTER)).unwrap();
    assert_eq!(absent, Extent::Absent { len: CLUSTER });
}

#[test]
fn a_huge_disk_with_huge_tables_costs_a_page() {
    let _alone = alone();
    let mut bytes = header(3);
    put64(&mut bytes, 24, 1 << 51);
    put32(&mut bytes, 36, 4 << 20);
    let store = MemStore::from_bytes(&bytes);
    now(store.set_len(1 << 40)).unwrap();
    let mut meter = Meter::default();
    meter.watch(|| {
        let image = now(Qcow2::open_read(store, None)).unwrap();
        let mut at = 0;
        while at < 1 << 51 {
            at += now(image.map(at, (1 << 51) - at)).unwrap().len();
        }
    });
    assert!(meter.most() < 4 << 20, "{meter:?}");
    assert!(meter.longest() < TIME, "{meter:?}");
}

#[test]
fn a_header_full_of_extensions_is_read_in_time() {
    let _alone = alone();
    let mut bytes = vec![0; 2 << 20];
    bytes[..112].copy_from_slice(&header(3)[..112]);
    put32(&mut bytes, 20, 21);
    for at in [40, 48] {
        put64(&mut bytes, at, 2 << 20);
    }
    for at in (112..(2 << 20) - 8).step_by(8) {
        put32(&mut bytes, at, 77);
    }
    bytes.resize(8 << 20, 0);
    judge("extensions", MemStore::from_bytes(&bytes)).unwrap();
}

/// An image with many snapshots whose IDs and names have so many bytes.
fn with_snapshots(count: usize, name: u8) -> Vec<u8> {
    let entry = (56 + 2 * usize::from(name)).next_multiple_of(8);
    let mut bytes = image(3);
    let table = bytes.len();
    bytes.resize(table + count * entry, 0);
    put32(&mut bytes, 60, count as u32);
    put64(&mut bytes, 64, table as u64);
    for at in (table..bytes.len()).step_by(entry) {
        put64(&mut bytes, at, L1);
        put32(&mut bytes, at + 8, 1);
        bytes[at + 12..at + 16].copy_from_slice(&[0, name, 0, name]);
        put32(&mut bytes, at + 36, 16);
        put64(&mut bytes, at + 48, 8 * CLUSTER);
    }
    bytes
}

#[test]
fn as_many_snapshots_as_there_may_be_are_listed_in_time() {
    let _alone = alone();
    let most = with_snapshots(65_536, 90);
    judge("snapshots", MemStore::from_bytes(&most)).unwrap();
}

/// The same of names of 1023 bytes, none of which can be shown as it is.
fn with_long_names(count: usize) -> Vec<u8> {
    let short = image(3);
    let mut entry = vec![0x1B; 56 + 2 * 1023];
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry[..56].fill(0);
    put64(&mut entry, 0, L1);
    put32(&mut entry, 8, 1);
    entry[12..16].copy_from_slice(&[3, 0xFF, 3, 0xFF]);
    put32(&mut entry, 36, 16);
    put64(&mut entry, 48, 8 * CLUSTER);
    let mut bytes = [short.clone(), entry.repeat(count)].concat();
    put32(&mut bytes, 60, count as u32);
    put64(&mut bytes, 64, short.len() as u64);
    bytes
}

#[test]
fn a_list_of_snapshots_has_a_bound() {
    let _alone = alone();
    let image = Qcow2::open_read(MemStore::from_bytes(&with_long_names(32_000)), None);
    let mut meter = Meter::default();
    let e = meter.watch(|| now(now(image).unwrap().snapshots()).unwrap_err());
    assert_eq!(e.kind(), Kind::Damaged);
    assert!(e.to_string().contains("more than 67108864 bytes"), "{e}");
    assert!(
        meter.most() < 96 << 20 && meter.longest() < TIME,
        "{meter:?}"
    );
}

#[test]
fn an_error_stays_short_whatever_the_image_says() {
    let _alone = alone();
    let mut bytes = with_long_names(1);
    let at = 8 * CLUSTER as usize;
    put64(&mut bytes, at, L1 + 8);
    let e = refused("names", &bytes).to_string();
    assert!(e.contains("not the start of a cluster"), "{e}");
    assert!(e.len() < 800, "{} bytes", e.len());
}

/// An image with so many bytes behind what it uses.
fn with_room(bytes: usize) -> Vec<u8> {
    let mut image = image(3);
    image.resize(image.len() + bytes, 0);
    image
}

/// A million L1 entries name one L2 table, and so do those of 16384 snapshots, whose tables begin
/// inside the first; all entries of that table name one cluster.
#[test]
fn tables_that_are_named_a_billion_times_are_checked_once() {
    let _alone = alone();
    let (entries, snapshots) = (1u64 << 20, 1u64 << 14);
    let (l1, list) = (8 * CLUSTER, 8 * CLUSTER + 8 * entries);
    let mut bytes = with_room((8 * entries + 56 * snapshots) as usize);
    put32(&mut bytes, 36, entries as u32);
    put64(&mut bytes, 40, l1);
    for at in (l1..list).step_by(8) {
        put64(&mut bytes, at as usize, L2);
    }
    for at in (L2..DATA).step_by(8) {
        put64(&mut bytes, at as usize, DATA);
    }
    put32(&mut bytes, 60, snapshots as u32);
    put64(&mut bytes, 64, list);
    let mut named = entries;
    for n in 0..snapshots {
        let at = (list + 56 * n) as usize;
        let skipped = n % 128 * CLUSTER;
        put64(&mut bytes, at, l1 + skipped);
        put32(&mut bytes, at + 8, (entries - skipped / 8) as u32);
        put32(&mut bytes, at + 36, 16);
        put64(&mut bytes, at + 48, 8 * CLUSTER);
        named += entries - skipped / 8;
    }
    mended("shared tables", &MemStore::from_bytes(&bytes));
    let report = checked("shared tables", &MemStore::from_bytes(&bytes)).unwrap();
    let says = |at: u64, times: u64| {
        let text = format!("is named {times} times");
        let mut all = report.findings.iter();
        all.any(|finding| finding.offset == at && finding.text.ends_with(&text))
    };
    assert!(says(L2, named), "{named} times: {report:?}");
    assert!(says(DATA, named * CLUSTER / 8), "{named} times: {report:?}");
}

#[test]
fn a_refcount_block_that_stands_for_everything_is_read_once() {
    let _alone = alone();
    let mut bytes = with_room(8 << 20);
    let table = 8 * CLUSTER as usize;
    put64(&mut bytes, 48, table as u64);
    put32(&mut bytes, 56, 128);
    for at in (table..bytes.len()).step_by(8) {
        put64(&mut bytes, at, 2 * CLUSTER);
    }
    bytes[2 * CLUSTER as usize..3 * CLUSTER as usize].fill(1);
    let store = MemStore::from_bytes(&bytes);
    now(store.set_len(CLUSTER << 31)).unwrap();
    mended("one block", &store);
    let report = checked("one block", &store).unwrap();
    assert!(report.errors > 0 && report.leaks < 32_768, "{report:?}");
}

#[test]
fn holes_are_checked_without_reading_them() {
    let _alone = alone();
    let mut bytes = header(3);
    put64(&mut bytes, 24, 1 << 51);
    put32(&mut bytes, 36, 4 << 20);
    put32(&mut bytes, 56, 128);
    let store = MemStore::from_bytes(&bytes);
    now(store.set_len(CLUSTER << 31)).unwrap();
    mended("holes", &store);
    let report = checked("holes", &store).unwrap();
    // The header, the L1 table of 512 clusters, which has most of the 128 of the refcount table.
    assert_eq!(report.used_clusters, 1 + 2 + 512);
    assert_eq!(report.leaks, 0);
    let reads = Faults::new();
    reads.set(Some(Rule {
        only: Some(Operation::Read),
        after: u64::MAX,
        error: Kind::Io,
        forever: false,
    }));
    now(check::check(&FaultStore::new(store, reads.clone()))).unwrap();
    assert!(reads.seen() < 8, "{} reads", reads.seen());
}

#[test]
fn references_far_apart_are_counted_in_little_memory() {
    let _alone = alone();
    let mut bytes = with_room(1 << 20);
    let tables = 8 * CLUSTER;
    for n in 0..16 {
        put64(&mut bytes, (L1 + 8 * n) as usize, tables + n * CLUSTER);
    }
    put32(&mut bytes, 36, 16);
    for n in 0..(1 << 17) {
        let far = (n + 1) << 30;
        put64(&mut bytes, (tables + 8 * n) as usize, far);
    }
    let store = MemStore::from_bytes(&bytes);
    now(store.set_len(CLUSTER << 31)).unwrap();
    mended("far apart", &store);
    let report = checked("far apart", &store).unwrap();
    assert!(report.used_clusters > 1 << 17, "{report:?}");
}

#[test]
fn a_frame_that_wants_a_huge_history_is_refused() {
    let _alone = alone();
    for (descriptor, fine) in [(0x68u8, true), (0x70, false), (0xF8, false), (0xFF, false)] {
        let frame = [
            &[0x28, 0xB5, 0x2F, 0xFD, 0, descriptor],
            &repeated(7, CLUSTER, true)[..],
        ];
        let bytes = zstd(&frame.concat());
        let done = judge("window", MemStore::from_bytes(&bytes));
        assert_eq!(done.is_ok(), fine, "{descriptor:#x}: {done:?}");
    }
}

/// An image of 2 MiB clusters, the first of which is all that a compressed cluster can be: 4 MiB of
/// `pattern` over and over, behind `start`.
fn packed(start: &[u8], pattern: &[u8], zstd: bool) -> Vec<u8> {
    let (cluster, sectors) = (2 << 20, 8192);
    let mut bytes = vec![0; 8 * cluster];
    bytes[..112].copy_from_slice(&header(3)[..112]);
    put32(&mut bytes, 20, 21);
    put64(&mut bytes, 24, 2 * cluster as u64);
    put64(&mut bytes, 40, 2 * cluster as u64);
    put64(&mut bytes, 48, cluster as u64);
    put64(&mut bytes, 72, u64::from(zstd) << 3);
    bytes[104] = u8::from(zstd);
    put64(&mut bytes, 2 * cluster, 3 * cluster as u64);
    let entry = (1 << 62) | ((sectors - 1) << 49) | (4 * cluster as u64);
    put64(&mut bytes, 3 * cluster, entry);
    let content = start.iter().chain(pattern.iter().cycle());
    let place = bytes
        .iter_mut()
        .skip(4 * cluster)
        .take(512 * sectors as usize);
    place.zip(content).for_each(|(to, from)| *to = *from);
    bytes
}

#[test]
fn compressed_clusters_of_blocks_that_make_nothing_cost_no_time() {
    let _alone = alone();
    // Four fixed-Huffman blocks with nothing but their ends, in 40 bits; stored blocks of no bytes.
    let fixed = [0x02, 0x08, 0x20, 0x80, 0];
    let stored = [0, 0, 0, 0xFF, 0xFF];
    let frame = [0x28, 0xB5, 0x2F, 0xFD, 0, 0x58];
    for (name, bytes) in [
        ("fixed", packed(&[], &fixed, false)),
        ("stored", packed(&[], &stored, false)),
        ("raw", packed(&frame, &[0, 0, 0], true)),
        ("repeated", packed(&frame, &repeated(0, 0, false), true)),
    ] {
        let e = refused(name, &bytes);
        assert!(e.to_string().contains("more blocks"), "{name}: {e}");
    }
}

/// Changes something that a parser looks at: a field, an entry, packed bytes, or any place.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>, places: &[u64]) {
    for _ in 0..rng.range(1, 4) {
        let len = bytes.len() as u64;
        let near = *rng.pick(places) + 8 * rng.below(16);
        let at = match rng.below(4) {
            0 => 4 * rng.below(32),
            1 => rng.below(len),
            _ => near,
        };
        let at = at.min(len - 8) as usize;
        let was = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let value = match rng.below(7) {
            0 => 0,
            1 => u64::MAX,
            2 => was ^ 1 << rng.below(64),
            3 => was.wrapping_add(CLUSTER),
            4 => rng.next(),
            5 => 1 << 62 | was,
            _ => was.wrapping_sub(512),
        };
        match rng.below(8) {
            0 => bytes.truncate(len as usize - rng.below(len / 2) as usize),
            1 => bytes[at] = value as u8,
            2 => bytes[at..at + 4].copy_from_slice(&value.to_be_bytes()[4..]),
            _ => bytes[at..at + 8].copy_from_slice(&value.to_be_bytes()),
        }
        if bytes.len() < 8 {
            return;
        }
    }
}

fn campaign(name: &str, seed: &[u8], places: &[u64], rounds: u64) -> (u64, u64) {
    let mut counts = (0, 0);
    for round in 0..rounds {
        let mut bytes = seed.to_vec();
        mutate(&mut Rng::new(round), &mut bytes, places);
        let name = format!("{name}, round {round}");
        match judge(&name, MemStore::from_bytes(&bytes)) {
            Ok(()) => counts.0 += 1,
            Err(_) => counts.1 += 1,
        }
    }
    counts
}

#[test]
fn mutated_images_are_read_or_refused() {
    let _alone = alone();
    let places = [0, L1, L2, 8 * CLUSTER, 9 * CLUSTER, 104];
    let (read, refused) = campaign("mutated", &full(), &places, 1000);
    println!("COUNT: mutated images: {read} read, {refused} refused");
    assert!(read > 100 && refused > 100);
}

#[test]
fn mutated_images_of_qemu_are_read_or_refused() {
    let _alone = alone();
    if !installed("mutated_images_of_qemu_are_read_or_refused") {
        return;
    }
    for options in [
        "compression_type=zstd,cluster_size=16k",
        "compression_type=zlib,cluster_size=16k",
        "compression_type=zstd,extended_l2=on",
    ] {
        let folder = Folder::new();
        let words = (0..40_000u32).flat_map(|n| (n / 7).to_be_bytes());
        std::fs::write(folder.path("raw"), words.collect::<Vec<u8>>()).unwrap();
        folder.img(&format!("convert -c -f raw -O qcow2 -o {options} raw disk"));
        folder.img("snapshot -c one disk");
        let bytes = folder.read("disk");
        let cluster = 1u64 << bytes[23];
        let places: Vec<u64> = (0..bytes.len() as u64 / cluster)
            .map(|n| n * cluster)
            .collect();
        let (read, refused) = campaign(options, &bytes, &places, 400);
        println!("COUNT: mutated images of QEMU ({options}): {read} read, {refused} refused");
        assert!(read > 20 && refused > 20);
    }
}
