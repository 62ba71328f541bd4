//! Images with damage of every kind, planted: what a check finds, and what QEMU's finds.

use crate::made::{
    CLUSTER, DATA, L1, L2, REFTABLE, image, list_bitmap, list_snapshot, put32, put64,
};
use crate::qemu::{Folder, installed};
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::qcow2::check::FindingKind::{
    self, BadBitmap, BadEntry, BadSnapshot, Copied, Corrupt, Dirty, Leak, OutOfPlace, Overlap,
    PastEnd, RefcountLow,
};
use ploop_formats::qcow2::check::{Report, check, check_watched};
use ploop_formats::qcow2::read_header;
use ploop_formats::qcow2::refcount::Width;
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::{Error, Kind, Result};

/// Where the parts of [`whole`] are, beside those of [`image`].
const BLOCK: u64 = 2 * CLUSTER;
const SNAPSHOTS: u64 = 8 * CLUSTER;
const OLD_L1: u64 = 9 * CLUSTER;
const OLD_L2: u64 = 10 * CLUSTER;
const BITMAPS: u64 = 11 * CLUSTER;
const BITS_TABLE: u64 = 12 * CLUSTER;
const BITS: u64 = 13 * CLUSTER;
const PACKED: u64 = 14 * CLUSTER;
const END: u64 = 15 * CLUSTER;
const COPIED: u64 = 1 << 63;

/// A healthy image with everything: a snapshot that shares the second data cluster, a bitmap, and
/// guest clusters 6 and 7 compressed into one cluster.
pub fn whole() -> Vec<u8> {
    let mut bytes = image(3);
    bytes.resize(END as usize, 0);
    for n in 8..15 {
        bytes[(BLOCK + 2 * n + 1) as usize] = 1;
    }
    bytes[(BLOCK + 2 * 6 + 1) as usize] = 2;
    bytes[(BLOCK + 2 * 14 + 1) as usize] = 2;
    put64(&mut bytes, (L2 + 16) as usize, DATA + CLUSTER);
    put64(&mut bytes, (L2 + 48) as usize, 1 << 62 | PACKED);
    put64(&mut bytes, (L2 + 56) as usize, 1 << 62 | (PACKED + 700));
    list_snapshot(&mut bytes, SNAPSHOTS, OLD_L1);
    put64(&mut bytes, OLD_L1 as usize, OLD_L2 | COPIED);
    put64(&mut bytes, (OLD_L2 + 16) as usize, DATA + CLUSTER);
    list_bitmap(&mut bytes, BITMAPS, BITS_TABLE);
    put64(&mut bytes, BITS_TABLE as usize, BITS);
    bytes
}

/// A change to [`whole`]: an offset, bytes, a value.
pub type Edit = (u64, usize, u64);

/// What is planted, what is found, and QEMU's corruptions and leaks, where it does not give up.
pub struct Damage {
    pub name: &'static str,
    pub edits: &'static [Edit],
    pub found: &'static [FindingKind],
    qemu: Option<(u64, u64)>,
}

const fn damage(
    name: &'static str,
    edits: &'static [Edit],
    found: &'static [FindingKind],
    qemu: Option<(u64, u64)>,
) -> Damage {
    Damage {
        name,
        edits,
        found,
        qemu,
    }
}

/// Where the refcount of a cluster is.
const fn refcount(at: u64) -> u64 {
    BLOCK + 2 * (at / CLUSTER)
}

pub const DAMAGES: &[Damage] = &[
    damage("nothing", &[], &[], Some((0, 0))),
    damage("an entry lost", &[(L2, 8, 0)], &[Leak], Some((0, 1))),
    damage(
        "a refcount too high",
        &[(refcount(PACKED), 2, 5)],
        &[Leak],
        Some((0, 1)),
    ),
    damage(
        "a refcount too high under COPIED",
        &[(refcount(DATA), 2, 2)],
        &[Leak],
        Some((1, 1)),
    ),
    damage(
        "no refcount",
        &[(refcount(DATA), 2, 0)],
        &[RefcountLow],
        Some((2, 0)),
    ),
    damage(
        "the refcount of a shared cluster",
        &[(refcount(DATA + CLUSTER), 2, 1)],
        &[RefcountLow],
        Some((2, 0)),
    ),
    damage(
        "the refcount of compressed clusters",
        &[(refcount(PACKED), 2, 1)],
        &[RefcountLow],
        Some((1, 0)),
    ),
    damage(
        "no refcount of metadata",
        &[
            (refcount(0), 2, 0),
            (refcount(REFTABLE), 2, 0),
            (refcount(BLOCK), 2, 0),
            (refcount(L1), 2, 0),
            (refcount(SNAPSHOTS), 2, 0),
            (refcount(OLD_L1), 2, 0),
            (refcount(OLD_L2), 2, 0),
            (refcount(BITMAPS), 2, 0),
            (refcount(BITS_TABLE), 2, 0),
            (refcount(BITS), 2, 0),
        ],
        &[RefcountLow; 10],
        Some((10, 0)),
    ),
    damage("COPIED lost", &[(L2, 8, DATA)], &[Copied], Some((1, 0))),
    damage("COPIED lost in L1", &[(L1, 8, L2)], &[Copied], Some((1, 0))),
    damage(
        "COPIED of a shared cluster",
        &[(L2 + 16, 8, COPIED | (DATA + CLUSTER))],
        &[Copied],
        Some((1, 0)),
    ),
    damage(
        "COPIED of compressed data",
        &[(L2 + 48, 8, COPIED | 1 << 62 | PACKED)],
        &[Copied],
        Some((1, 0)),
    ),
    damage(
        "a cluster named twice",
        &[(L2 + 8, 8, COPIED | DATA)],
        &[RefcountLow, Copied, Copied],
        Some((1, 0)),
    ),
    damage(
        "data behind the file",
        &[(L2, 8, COPIED | (99 * CLUSTER))],
        &[PastEnd, Leak],
        Some((2, 1)),
    ),
    damage(
        "compressed data behind the file",
        &[(L2 + 48, 8, 1 << 62 | (99 * CLUSTER))],
        &[PastEnd, Leak],
        Some((1, 1)),
    ),
    damage(
        "an L2 table behind the file",
        &[(OLD_L1, 8, 99 * CLUSTER)],
        &[PastEnd, Leak, Leak],
        Some((1, 2)),
    ),
    damage(
        "misaligned data",
        &[(L2, 8, COPIED | (DATA + 512))],
        &[BadEntry],
        Some((2, 0)),
    ),
    damage(
        "reserved bits in L2",
        &[(L2, 8, COPIED | DATA | 1 << 57)],
        &[BadEntry],
        Some((1, 0)),
    ),
    damage(
        "reserved bits in L1",
        &[(OLD_L1, 8, COPIED | OLD_L2 | 1 << 57)],
        &[BadEntry],
        Some((1, 0)),
    ),
    damage(
        "a misaligned L2 table",
        &[(OLD_L1, 8, OLD_L2 + 512)],
        &[BadEntry, Leak],
        Some((7, 1)),
    ),
    damage(
        "a misaligned L1 table of a snapshot",
        &[(SNAPSHOTS, 8, OLD_L1 + 512)],
        &[BadSnapshot, Leak, Leak, Leak],
        Some((1, 3)),
    ),
    damage(
        "an L1 table of a snapshot behind the file",
        &[(SNAPSHOTS, 8, 99 * CLUSTER)],
        &[BadSnapshot, Leak, Leak, Leak],
        Some((1, 3)),
    ),
    damage(
        "a huge L1 table of a snapshot",
        &[(SNAPSHOTS + 8, 4, 0x7FFF_FFFF)],
        &[BadSnapshot, Leak, Leak, Leak],
        Some((1, 3)),
    ),
    damage(
        "a snapshot table behind the file",
        &[(64, 8, 99 * CLUSTER)],
        &[BadSnapshot, Leak, Leak, Leak, Leak],
        Some((2, 4)),
    ),
    damage(
        "a refcount block behind the file",
        &[(REFTABLE + 8, 8, 99 * CLUSTER)],
        &[PastEnd],
        Some((1, 0)),
    ),
    damage(
        "a misaligned refcount block",
        &[(REFTABLE + 8, 8, BLOCK + 512)],
        &[BadEntry],
        Some((1, 0)),
    ),
    damage(
        "reserved bits in the refcount table",
        &[(REFTABLE + 8, 8, 1)],
        &[BadEntry],
        Some((1, 0)),
    ),
    damage(
        "a refcount block named twice",
        &[(REFTABLE + 8, 8, BLOCK)],
        &[RefcountLow, Overlap],
        Some((2, 0)),
    ),
    damage(
        "data in an L2 table, counted",
        &[(L2 + 8, 8, L2), (refcount(L2), 2, 2), (L1, 8, L2)],
        &[Overlap],
        Some((0, 0)),
    ),
    damage(
        "data in the refcount table, counted",
        &[(L2 + 8, 8, REFTABLE), (refcount(REFTABLE), 2, 2)],
        &[Overlap],
        Some((0, 0)),
    ),
    damage(
        "data among compressed data, counted",
        &[(L2 + 8, 8, PACKED), (refcount(PACKED), 2, 3)],
        &[Overlap],
        Some((0, 0)),
    ),
    damage(
        "a snapshot that has the active L1 table",
        &[(SNAPSHOTS, 8, L1), (refcount(L1), 2, 2)],
        &[
            RefcountLow,
            RefcountLow,
            RefcountLow,
            Leak,
            Leak,
            RefcountLow,
            Overlap,
            Copied,
            Copied,
            Copied,
        ],
        Some((4, 2)),
    ),
    damage(
        "bits of a bitmap behind the file",
        &[(BITS_TABLE, 8, 99 * CLUSTER)],
        &[PastEnd, Leak],
        Some((1, 1)),
    ),
    damage(
        "reserved bits in the table of a bitmap",
        &[(BITS_TABLE, 8, BITS | 2)],
        &[BadEntry],
        None,
    ),
    damage(
        "misaligned bits of a bitmap",
        &[(BITS_TABLE, 8, BITS + 512)],
        &[BadEntry],
        None,
    ),
    damage(
        "a bitmap of no known type",
        &[(BITMAPS + 16, 1, 2)],
        &[BadBitmap, Leak, Leak],
        None,
    ),
    damage("marked dirty", &[(72, 8, 1)], &[Dirty], Some((0, 0))),
    damage("marked corrupt", &[(72, 8, 2)], &[Corrupt], Some((0, 0))),
];

pub fn edit(bytes: &mut [u8], edits: &[Edit]) {
    for (at, len, value) in edits {
        let at = *at as usize;
        bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
}

pub fn found(bytes: &[u8]) -> Report {
    now(check(&MemStore::from_bytes(bytes))).unwrap()
}

pub fn kinds(report: &Report) -> Vec<FindingKind> {
    report.findings.iter().map(|f| f.kind).collect()
}

#[test]
fn damage_of_each_kind_is_found_and_nothing_else() {
    let qemu = installed("damage_of_each_kind_is_found_and_nothing_else");
    let mut wrong = Vec::new();
    for Damage {
        name,
        edits,
        found: expected,
        qemu: said,
    } in DAMAGES
    {
        let mut bytes = whole();
        edit(&mut bytes, edits);
        let report = found(&bytes);
        if kinds(&report) != *expected {
            wrong.push(format!("{name}: {report:#?}"));
        }
        if qemu {
            let folder = Folder::new();
            std::fs::write(folder.path("disk"), &bytes).unwrap();
            let says = folder.check("disk");
            if says != *said {
                wrong.push(format!("{name}: QEMU says {says:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_report_counts_what_it_found() {
    let mut bytes = whole();
    let healthy = found(&bytes);
    assert_eq!((healthy.used_clusters, healthy.exit_code()), (15, 0));
    edit(&mut bytes, &[(L2, 8, 0), (72, 8, 1)]);
    let leaky = found(&bytes);
    assert_eq!((leaky.errors, leaky.leaks, leaky.notices), (0, 1, 1));
    assert_eq!((leaky.leaked_bytes, leaky.used_clusters), (CLUSTER, 14));
    assert_eq!(leaky.exit_code(), 3);
    assert_eq!(leaky.findings[1].offset, DATA);
    edit(
        &mut bytes,
        &[(refcount(PACKED), 2, 3), (L2 + 16, 8, DATA + CLUSTER + 512)],
    );
    let broken = found(&bytes);
    assert_eq!((broken.errors, broken.leaks), (1, 2));
    assert_eq!((broken.leaked_bytes, broken.exit_code()), (CLUSTER, 6));
    assert_eq!(broken.findings[1].offset, L2 + 16);
}

#[test]
fn findings_beyond_a_limit_are_counted_and_not_kept() {
    let mut bytes = whole();
    let table = L2 as usize..DATA as usize;
    for at in table.step_by(8) {
        put64(&mut bytes, at, 99 * CLUSTER);
    }
    let report = found(&bytes);
    let entries = CLUSTER / 8;
    assert_eq!(report.findings.len(), 1000);
    assert_eq!(report.errors + report.leaks - 1000, report.omitted);
    assert!(report.errors >= entries);
}

#[test]
fn zeros_in_version_2_are_found() {
    let mut bytes = image(2);
    assert!(found(&bytes).is_clean());
    put64(&mut bytes, (L2 + 24) as usize, 1);
    assert_eq!(kinds(&found(&bytes)), [BadEntry]);
}

/// Every width of a refcount, with a leak and a refcount that is too low.
#[test]
fn refcounts_of_every_width_are_compared() {
    for order in 0..=6 {
        let width = Width::new(order).unwrap();
        let mut bytes = image(3);
        put32(&mut bytes, 96, order);
        let block = BLOCK as usize..BLOCK as usize + CLUSTER as usize;
        bytes[block.clone()].fill(0);
        for n in 0..8 {
            width.set(&mut bytes[block.clone()], n, 1).unwrap();
        }
        assert_eq!(found(&bytes).findings, [], "{} bits", width.bits());
        width.set(&mut bytes[block.clone()], 6, 0).unwrap();
        put64(&mut bytes, (L2 + 40) as usize, 0);
        let report = found(&bytes);
        assert_eq!(kinds(&report), [RefcountLow, Leak], "{} bits", width.bits());
        let places: Vec<u64> = report.findings.iter().map(|f| f.offset).collect();
        assert_eq!(places, [6 * CLUSTER, 7 * CLUSTER]);
    }
}

/// An image by QEMU with two L1 entries, and where the entry of its first guest cluster is.
fn by_qemu(options: &str) -> (Folder, Vec<u8>, usize) {
    let folder = Folder::new();
    folder.img(&format!("create -q -f qcow2 -o {options} disk 600M"));
    folder.io("disk", &["write -P 1 0 256k".to_string()]);
    let bytes = folder.read("disk");
    let header = now(read_header(&MemStore::from_bytes(&bytes))).unwrap();
    let at = header.l1.at as usize;
    let l1 = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    assert!(found(&bytes).is_clean());
    (folder, bytes, (l1 & !COPIED) as usize)
}

#[test]
fn an_external_file_has_every_cluster_in_its_place() {
    if !installed("an_external_file_has_every_cluster_in_its_place") {
        return;
    }
    let (_folder, healthy, l2) = by_qemu("data_file=data");
    for (word, expected) in [
        (COPIED | (2 * CLUSTER), OutOfPlace),
        (CLUSTER, Copied),
        (1 << 62 | (9 * CLUSTER), BadEntry),
    ] {
        let mut bytes = healthy.clone();
        put64(&mut bytes, l2 + 8, word);
        assert_eq!(kinds(&found(&bytes)), [expected], "{word:#x}");
    }
    let mut bytes = healthy;
    let l1 = now(read_header(&MemStore::from_bytes(&bytes))).unwrap().l1;
    put64(&mut bytes, l1.at as usize + 8, l2 as u64);
    let expected = [RefcountLow, Copied, OutOfPlace];
    assert_eq!(kinds(&found(&bytes)), expected, "a table in two places");
}

#[test]
fn subclusters_that_contradict_each_other_are_found() {
    if !installed("subclusters_that_contradict_each_other_are_found") {
        return;
    }
    let (folder, mut bytes, l2) = by_qemu("extended_l2=on");
    put64(&mut bytes, l2 + 8, 1 | 1 << 32);
    assert_eq!(kinds(&found(&bytes)), [BadEntry]);
    std::fs::write(folder.path("disk"), &bytes).unwrap();
    assert_eq!(folder.check("disk"), Some((1, 0)));
}

/// Ends the work when it is told of a phase.
struct Ends(&'static str, Vec<&'static str>);

impl Watch for Ends {
    fn tell(&mut self, progress: Progress) -> Result<()> {
        assert!(progress.done <= progress.total, "{progress:?}");
        self.1.push(progress.phase);
        match progress.phase == self.0 {
            true => Err(Error::new(Kind::Cancelled, "no")),
            false => Ok(()),
        }
    }
}

#[test]
fn a_check_tells_how_far_it_is_and_ends_when_it_is_told() {
    let store = MemStore::from_bytes(&whole());
    let mut all = Ends("", Vec::new());
    now(check_watched(&store, &mut all)).unwrap();
    all.1.dedup();
    let phases = [
        "refcount table",
        "bitmaps",
        "L1 tables",
        "L2 tables",
        "refcounts",
        "flags",
    ];
    assert_eq!(all.1, phases);
    for phase in phases {
        let e = now(check_watched(&store, &mut Ends(phase, Vec::new()))).unwrap_err();
        assert_eq!(e.kind(), Kind::Cancelled, "{phase}");
    }
}

#[test]
fn what_is_no_qcow2_image_is_an_error_and_no_report() {
    let e = now(check(&MemStore::from_bytes(&[0; 4096]))).unwrap_err();
    assert_eq!(e.kind(), Kind::Damaged);
    let store = MemStore::from_bytes(&whole());
    now(ploop_formats::store::Store::set_len(&store, CLUSTER << 33)).unwrap();
    assert_eq!(now(check(&store)).unwrap_err().kind(), Kind::Unsupported);
}
