//! Check finds every rule that is broken, and only those.
//!
//! Images are made here field by field, so that each test breaks one rule and knows the rest to
//! be whole. What repair promises is in `repair.rs`.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{CLUSTER, Made, SLOT};
use ploop_formats::Kind;
use ploop_formats::ploop::check::{FindingKind as F, Report, Severity, check};
use ploop_formats::ploop::create::{create, create_preallocated};
use ploop_formats::ploop::header::{CLOSED_V21, FLAG_CONVERTING, FLAG_EMPTY, IN_USE};
use ploop_formats::ploop::{Header, Version};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::units::ClusterSize;

const VERSIONS: [Version; 2] = [Version::V1, Version::V2];

fn report(made: &Made) -> Report {
    let store = MemStore::from_pages(made.pages()).aligned_to(4096);
    let before = store.to_vec();
    let report = now(check(&store)).unwrap();
    assert_eq!(store.to_vec(), before, "a check changed the file");
    report
}

/// The kinds found, in order.
fn kinds(made: &Made) -> Vec<F> {
    report(made).findings.iter().map(|f| f.kind).collect()
}

#[test]
fn a_healthy_image_has_no_finding() {
    for version in VERSIONS {
        let made = Made::healthy(version);
        let report = report(&made);
        assert_eq!(
            report,
            Report {
                used_clusters: 4,
                ..Report::default()
            }
        );
        assert_eq!((report.exit_code(), report.is_clean()), (0, true));
    }
}

#[test]
fn new_images_have_no_finding() {
    let cluster = ClusterSize::new(CLUSTER).unwrap();
    for version in VERSIONS {
        let header = Header::new(version, 10 << 20, cluster).unwrap();
        let (blank, full) = (MemStore::new(0), MemStore::new(0));
        now(create(&blank, &header)).unwrap();
        now(create_preallocated(&full, &header)).unwrap();
        for store in [blank, full] {
            assert_eq!(now(check(&store)).unwrap().findings, []);
        }
    }
}

#[test]
fn an_entry_past_the_end_is_found() {
    for version in VERSIONS {
        let mut made = Made::healthy(version);
        for wrong in [made.clusters(), made.clusters() + 7] {
            made.set_cluster(1, wrong);
            let report = report(&made);
            let finding = &report.findings[0];
            assert_eq!(
                (finding.kind, finding.severity),
                (F::PastEnd, Severity::Error)
            );
            assert_eq!((finding.entry, finding.offset), (Some(1), SLOT + 4));
            assert!(
                finding.text.contains("BAT entry 1 (offset 0x44)"),
                "{}",
                finding.text
            );
            assert_eq!(report.exit_code(), 6);
        }
        made.table[1] = u32::MAX;
        assert_eq!(report(&made).findings[0].kind, F::PastEnd);
    }
}

#[test]
fn the_reserved_entry_is_past_the_end_of_any_file() {
    let mut made = Made::healthy(Version::V2);
    made.table[1] = u32::MAX;
    let store = MemStore::from_pages(made.pages());
    now(store.set_len((1u64 << 32) * CLUSTER)).unwrap();
    let report = now(check(&store)).unwrap();
    assert_eq!(report.findings[0].kind, F::PastEnd);
    assert_eq!(report.findings[1].kind, F::TailLeak);
}

#[test]
fn an_entry_into_the_header_is_found() {
    for version in VERSIONS {
        let mut made = Made::healthy(version);
        made.start(3);
        made.set_cluster(1, 2);
        assert_eq!(kinds(&made), [F::DataOffset, F::InHeader, F::MiddleLeak]);
    }
    let mut made = Made::healthy(Version::V1);
    made.table[1] = 1;
    assert_eq!(kinds(&made), [F::InHeader, F::MiddleLeak]);
}

#[test]
fn a_cluster_with_two_owners_is_found_at_the_second() {
    for version in VERSIONS {
        let mut made = Made::healthy(version);
        made.table[5] = made.table[0];
        let report = report(&made);
        assert_eq!(report.findings.len(), 1);
        assert_eq!(
            (report.findings[0].kind, report.findings[0].entry),
            (F::Duplicate, Some(5))
        );
        assert_eq!(report.errors, 1);
    }
}

#[test]
fn a_misaligned_v1_entry_is_found_and_what_it_covers_is_no_leak() {
    let mut made = Made::healthy(Version::V1);
    made.grow(2);
    made.table[5] = made.raw(made.clusters() - 2) + 3;
    assert_eq!(kinds(&made), [F::Misaligned]);
}

#[test]
fn slots_behind_the_device_must_be_zero() {
    for version in VERSIONS {
        let mut made = Made::healthy(version);
        // A slot within m_Size but behind the size, and one behind m_Size.
        made.header.sectors -= made.header.cluster.sectors();
        let last = made.header.entries as usize - 1;
        made.table[last] = made.raw(2);
        made.table[last + 9] = made.raw(2);
        assert_eq!(kinds(&made), [F::BeyondDevice, F::BeyondDevice]);
    }
}

#[test]
fn a_tail_that_nothing_names_is_a_leak_and_a_ragged_one_too() {
    let mut made = Made::healthy(Version::V2);
    made.grow(3);
    let tail = report(&made);
    assert_eq!(
        tail.findings.iter().map(|f| f.kind).collect::<Vec<_>>(),
        [F::TailLeak]
    );
    assert_eq!(
        (tail.leaked_bytes, tail.exit_code(), tail.leaks),
        (3 * CLUSTER, 3, 1)
    );
    assert_eq!(
        tail.findings[0].offset,
        (u64::from(made.clusters()) - 3) * CLUSTER
    );

    let mut made = Made::healthy(Version::V2);
    made.ragged = 1000;
    let ragged = report(&made);
    assert_eq!(ragged.findings[0].kind, F::RaggedTail);
    assert_eq!((ragged.leaked_bytes, ragged.exit_code()), (1000, 3));
}

#[test]
fn a_ragged_tail_that_an_entry_names_is_an_error() {
    for version in VERSIONS {
        let mut made = Made::healthy(version);
        made.ragged = 512;
        made.set_cluster(6, made.clusters());
        let report = report(&made);
        assert_eq!(report.findings[0].kind, F::RaggedTail);
        assert_eq!(
            (report.findings[0].severity, report.findings.len()),
            (Severity::Error, 1)
        );
    }
}

#[test]
fn a_leak_in_the_middle_is_found_and_a_hole_there_is_none() {
    let mut made = Made::healthy(Version::V2);
    made.table[1] = 0;
    let report = report(&made);
    assert_eq!(
        report.findings.iter().map(|f| f.kind).collect::<Vec<_>>(),
        [F::MiddleLeak]
    );
    assert_eq!((report.leaked_bytes, report.exit_code()), (CLUSTER, 3));
    made.punched.push(2);
    assert_eq!(kinds(&made), []);
}

#[test]
fn header_marks_are_judged() {
    let with = |change: &dyn Fn(&mut Header)| {
        let mut made = Made::healthy(Version::V2);
        change(&mut made.header);
        kinds(&made)
    };
    assert_eq!(with(&|h| h.in_use = IN_USE), [F::Unclean]);
    assert_eq!(with(&|h| h.in_use = 0x1234), [F::Unclean]);
    assert_eq!(with(&|h| h.in_use = CLOSED_V21), []);
    assert_eq!(with(&|h| h.flags |= FLAG_CONVERTING), [F::Converting]);
    assert_eq!(with(&|h| h.flags |= FLAG_EMPTY), [F::EmptyFlag]);
    assert_eq!(with(&|h| h.extension = 999), [F::StaleExtension]);
    assert_eq!(with(&|h| h.entries -= 1), [F::ShortTable]);
    let mut blank = Made::healthy(Version::V2);
    blank.table.fill(0);
    blank.shrink(4);
    assert_eq!(kinds(&blank), [F::EmptyFlag]);
    blank.header.flags |= FLAG_EMPTY;
    assert_eq!(kinds(&blank), []);
}

#[test]
fn notices_do_not_make_an_image_unclean() {
    let mut made = Made::healthy(Version::V2);
    made.header.flags |= FLAG_EMPTY;
    made.header.extension = 999;
    let report = report(&made);
    assert_eq!(
        (report.notices, report.exit_code(), report.is_clean()),
        (2, 0, true)
    );
}

#[test]
fn an_interrupted_conversion_is_said_and_nothing_else() {
    let mut made = Made::healthy(Version::V1);
    made.header.flags |= FLAG_CONVERTING;
    made.header.in_use = IN_USE;
    made.set_cluster(1, 1000);
    assert_eq!(kinds(&made), [F::Converting, F::Unclean]);
}

#[test]
fn more_room_than_the_table_needs_is_a_notice() {
    for version in VERSIONS {
        let mut made = Made::healthy(version);
        made.start(2);
        assert_eq!(kinds(&made), [F::DataOffset]);
        assert_eq!(report(&made).exit_code(), 0);
    }
    let mut made = Made::healthy(Version::V1);
    made.zero_data_offset = true;
    assert_eq!(kinds(&made), [F::DataOffset]);
}

#[test]
fn a_file_that_ends_inside_its_table_is_found() {
    let mut made = Made::healthy(Version::V2);
    made.cut = Some(8192 + 100);
    assert_eq!(
        kinds(&made),
        [F::ShortFile, F::PastEnd, F::PastEnd, F::PastEnd, F::PastEnd]
    );
}

#[test]
fn extension_clusters_are_no_leaks() {
    let mut made = Made::healthy(Version::V2);
    made.add_extension();
    assert_eq!(kinds(&made), []);
    made.header.in_use = 0;
    assert_eq!(kinds(&made), [F::StaleExtension, F::TailLeak]);
}

#[test]
fn a_damaged_extension_is_an_error_and_its_clusters_are_leaks() {
    let mut made = Made::healthy(Version::V2);
    made.add_extension();
    made.spoil_extension();
    assert_eq!(kinds(&made), [F::BadExtension, F::TailLeak]);

    let mut made = Made::healthy(Version::V2);
    made.add_extension();
    made.header.extension = u64::MAX / 512;
    assert_eq!(kinds(&made), [F::BadExtension, F::TailLeak]);

    let mut made = Made::healthy(Version::V2);
    made.add_extension();
    made.set_cluster(7, made.clusters() - 1);
    assert_eq!(kinds(&made), [F::BadExtension, F::MiddleLeak]);
}

#[test]
fn an_extension_that_demands_unknown_software_is_found() {
    let mut made = Made::healthy(Version::V2);
    made.add_necessary_feature();
    assert_eq!(kinds(&made)[0], F::UnknownFeature);
}

#[test]
fn a_table_of_billions_of_holes_is_checked_at_once() {
    let cluster = ClusterSize::new(CLUSTER).unwrap();
    let size = 0xFFFF_FFFE * CLUSTER;
    let header = Header {
        in_use: IN_USE,
        ..Header::new(Version::V2, size, cluster).unwrap()
    };
    let store = MemStore::new(0);
    now(create(&store, &header)).unwrap();
    let report = now(check(&store)).unwrap();
    assert_eq!(
        report.findings.iter().map(|f| f.kind).collect::<Vec<_>>(),
        [F::Unclean]
    );
}

#[test]
fn findings_beyond_a_limit_are_counted_and_not_kept() {
    let cluster = ClusterSize::new(CLUSTER).unwrap();
    let header = Header::new(Version::V2, 5000 * CLUSTER, cluster).unwrap();
    let store = MemStore::new(0);
    now(create(&store, &header)).unwrap();
    let table = bytes::Bytes::from(vec![0xEE; 5000 * 4]);
    now(store.write_at(SLOT, table, ploop_formats::store::Reach::Cache)).unwrap();
    let report = now(check(&store)).unwrap();
    assert_eq!(
        (report.errors, report.findings.len() as u64 + report.omitted),
        (5000, 5001)
    );
    assert_eq!(report.findings.len(), 1000);
}

#[test]
fn what_is_no_ploop_image_is_an_error_and_no_report() {
    for bytes in [vec![], vec![0; 100], vec![0; 1 << 16]] {
        let e = now(check(&MemStore::from_bytes(&bytes))).unwrap_err();
        assert_eq!(e.kind(), Kind::Damaged);
    }
}
