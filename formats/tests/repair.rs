//! Repair promises: what a guest could read, it reads; what it could not read never turns into
//! somebody else's bytes; and both hold wherever the repair is interrupted.
//!
//! Method: images with several rules broken at once are made by dice. What a guest reads from each
//! cluster is taken by other code than the crate's, before, after, and from every state that a
//! power cut during the repair can leave. Each such state must be repairable to the same end.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{CLUSTER, Made, view};
use ploop_formats::Kind;
use ploop_formats::ploop::Version;
use ploop_formats::ploop::check::{FindingKind as F, Grade, Repair, Report, check, repair};
use ploop_formats::ploop::header::{CLOSED_V21, FLAG_CONVERTING, IN_USE};
use ploop_formats::store::Store;
use ploop_formats::store::fault::{FaultStore, Faults, Operation, Rule};
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::{Break, MutateStore, Mutation, Mutator};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::record::{RecordStore, Recording};
use ploop_formats::store::sim::{Fate, POISON, Rules};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;

type View = Vec<Option<Vec<u8>>>;

const ALLOWED: Repair = Repair {
    growth_max: u64::MAX,
    give_up: true,
};

fn mend(store: &impl Store) -> Report {
    now(repair(store, &ALLOWED)).unwrap()
}

/// The mended image of `made`, and what was reported.
fn mended(made: &Made) -> (Pages, Report) {
    let store = MemStore::from_pages(made.pages()).aligned_to(4096);
    let report = mend(&store);
    (store.pages(), report)
}

/// What is wrong with `after` when a guest saw `before`.
fn loss(before: &View, after: &Pages) -> Result<(), String> {
    for (n, (was, is)) in before.iter().zip(view(after)?).enumerate() {
        let fine = match (was, &is) {
            (Some(was), Some(is)) => is.starts_with(was) && is[was.len()..].iter().all(nobodys),
            (was, is) => was.is_none() && is.is_none(),
        };
        if !fine {
            let show = |v: &Option<Vec<u8>>| v.as_ref().map(|b| (b[..8].to_vec(), b.len()));
            return Err(format!(
                "guest cluster {n}: {:?} became {:?}",
                show(was),
                show(&is)
            ));
        }
    }
    Ok(())
}

/// What may stand where a file was longer than its data: zeros, or what a new length holds before
/// it is durable.
fn nobodys(byte: &u8) -> bool {
    matches!(*byte, 0 | POISON)
}

fn assert_mended(before: &View, pages: Pages, place: &str) {
    let store = MemStore::from_pages(pages);
    let report = mend(&store);
    assert_eq!(left(&report), [], "{place}");
    loss(before, &store.pages()).unwrap_or_else(|e| panic!("{place}: {e}"));
}

/// What is still wrong; more room than a table needs stays, because data would have to move.
fn left(report: &Report) -> Vec<F> {
    let kinds = report.findings.iter().map(|f| f.kind);
    kinds.filter(|kind| *kind != F::DataOffset).collect()
}

fn did(report: &Report) -> Vec<F> {
    report.repaired.iter().map(|f| f.kind).collect()
}

#[test]
fn any_mixture_of_damage_is_mended_without_loss_and_for_good() {
    for seed in 0..4000 {
        let made = Made::damaged(&mut Rng::new(seed));
        let before = view(&made.pages()).unwrap();
        let (pages, report) = mended(&made);
        assert_eq!(left(&report), [], "seed {seed}");
        loss(&before, &pages).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let again = MemStore::from_pages(pages.clone());
        let second = mend(&again);
        assert_eq!(
            (left(&second).len(), second.repaired.len()),
            (0, 0),
            "seed {seed}"
        );
        assert_eq!(
            again.to_vec(),
            pages.to_vec(),
            "seed {seed}: a second repair changed it"
        );
    }
}

/// Every state that cuts during a repair of `made` can leave, some fates each.
fn cuts(made: &Made, recording: &Recording, mut judge: impl FnMut(usize, Fate, Pages)) {
    let metadata_end = u64::from(made.header.data_start) * CLUSTER;
    let rules = Rules {
        metadata_end,
        ..Rules::default()
    };
    for n in 0..=recording.entries().len() {
        for fate in [
            Fate::None,
            Fate::All,
            Fate::OnlyOp(n.saturating_sub(1) as u64),
            Fate::LoseOp(n.saturating_sub(2) as u64),
            Fate::Random(n as u64),
            Fate::Random(n as u64 + 1_000_000),
        ] {
            judge(n, fate, recording.cut(n, rules, &fate));
        }
    }
}

#[test]
fn a_repair_may_be_cut_anywhere() {
    let mut states = 0;
    for seed in 0..120 {
        let made = Made::damaged(&mut Rng::new(seed));
        let before = view(&made.pages()).unwrap();
        let recording = Recording::new(made.pages());
        mend(&RecordStore::new(
            MemStore::from_pages(made.pages()),
            recording.clone(),
        ));
        cuts(&made, &recording, |n, fate, pages| {
            let place = format!("seed {seed}, cut {n}, {fate:?}");
            loss(&before, &pages).unwrap_or_else(|e| panic!("{place}: {e}"));
            assert_mended(&before, pages, &place);
            states += 1;
        });
    }
    assert!(states > 5000, "{states}");
}

/// Whether some cut shows a loss when barrier number `barrier` does nothing.
fn notices(barrier: u64) -> bool {
    (0..120).any(|seed| {
        let made = Made::damaged(&mut Rng::new(seed));
        let before = view(&made.pages()).unwrap();
        let recording = Recording::new(made.pages());
        let mutator = Mutator::new();
        mutator.set(Some(Mutation {
            covers: None,
            how: Break::Drop,
            only: Some(barrier),
        }));
        let inner = RecordStore::new(MemStore::from_pages(made.pages()), recording.clone());
        mend(&MutateStore::new(inner, mutator, CLUSTER));
        let mut lost = false;
        cuts(&made, &recording, |_, _, pages| {
            lost |= loss(&before, &pages).is_err()
        });
        lost
    })
}

#[test]
fn a_missing_barrier_would_be_noticed() {
    let noticed: Vec<u64> = (0..5).filter(|n| notices(*n)).collect();
    assert!(noticed.len() >= 4, "only barriers {noticed:?} were missed");
}

#[test]
fn a_repair_survives_the_failure_of_any_operation() {
    for seed in 0..60 {
        let made = Made::damaged(&mut Rng::new(seed));
        let before = view(&made.pages()).unwrap();
        for after in 0.. {
            let (store, faults) = (MemStore::from_pages(made.pages()), Faults::new());
            let error = Kind::NoSpace;
            faults.set(Some(Rule {
                only: None,
                after,
                error,
                forever: false,
            }));
            let outcome = now(repair(
                &FaultStore::new(store.clone(), faults.clone()),
                &ALLOWED,
            ));
            let place = format!("seed {seed}, operation {after}");
            if faults.failed() == 0 {
                assert!(outcome.is_ok(), "{place}");
                break;
            }
            assert!(outcome.is_err(), "{place}: the failure was swallowed");
            loss(&before, &store.pages()).unwrap_or_else(|e| panic!("{place}: {e}"));
            assert_mended(&before, store.pages(), &place);
        }
    }
}

#[test]
fn a_failed_flush_ends_the_repair_with_the_image_marked_as_it_was() {
    let mut made = Made::healthy(Version::V2);
    made.header.in_use = IN_USE;
    made.table[5] = made.table[0];
    for after in 0..3 {
        let (store, faults) = (MemStore::from_pages(made.pages()), Faults::new());
        let only = Some(Operation::Flush);
        faults.set(Some(Rule {
            only,
            after,
            error: Kind::Io,
            forever: true,
        }));
        let outcome = now(repair(&FaultStore::new(store.clone(), faults), &ALLOWED));
        assert_eq!(outcome.unwrap_err().kind(), Kind::Io);
        if after < 2 {
            let report = now(check(&store)).unwrap();
            assert!(
                report.findings.iter().any(|f| f.kind == F::Unclean),
                "{after}"
            );
        }
    }
}

#[test]
fn a_shared_cluster_is_copied_and_nothing_else_moves() {
    let mut made = Made::healthy(Version::V2);
    made.table[5] = made.table[0];
    made.table[6] = made.table[0];
    let (pages, report) = mended(&made);
    assert_eq!(did(&report), [F::Duplicate, F::Duplicate]);
    assert_eq!(report.repaired[0].entry, Some(5));
    assert_eq!(pages.len(), 7 * CLUSTER);
    let after = view(&pages).unwrap();
    assert_eq!((&after[5], &after[6]), (&after[0], &after[0]));
    let mut head = [0; 40];
    pages.read(64, &mut head);
    let entries: Vec<u8> = head.chunks(4).map(|b| b[0]).collect();
    assert_eq!(entries, [1, 2, 3, 4, 0, 5, 6, 0, 0, 0]);
}

#[test]
fn misaligned_data_at_the_very_end_takes_nothing_from_what_is_appended() {
    let mut made = Made::healthy(Version::V1);
    made.table[5] = made.raw(4) + 1;
    made.table[6] = made.raw(4) + 2;
    let before = view(&made.pages()).unwrap();
    let (pages, report) = mended(&made);
    assert_eq!(report.findings, []);
    loss(&before, &pages).unwrap();
    assert_eq!(
        view(&pages).unwrap()[6].as_ref().unwrap()[(CLUSTER - 1024) as usize..],
        [0; 1024]
    );
}

#[test]
fn a_cleared_entry_says_what_is_read_instead() {
    let mut made = Made::healthy(Version::V2);
    made.set_cluster(1, 77);
    let (_, report) = mended(&made);
    assert_eq!(did(&report), [F::PastEnd, F::MiddleLeak]);
    assert!(report.repaired[0].text.contains("or as the image below"));
}

#[test]
fn a_valid_bitmap_is_kept_unless_it_would_lie() {
    let mut made = Made::healthy(Version::V2);
    made.add_extension();
    made.table[5] = made.table[0];
    let (pages, report) = mended(&made);
    assert_eq!(did(&report), [F::Duplicate]);
    let mut mark = [0; 4];
    pages.read(0x2C, &mut mark);
    assert_eq!(u32::from_le_bytes(mark), CLOSED_V21);

    made.set_cluster(6, 1000);
    let (pages, report) = mended(&made);
    assert!(did(&report).contains(&F::StaleExtension), "{report:?}");
    pages.read(0x2C, &mut mark);
    assert_eq!(mark, [0; 4]);
    let mut pointer = [0; 8];
    pages.read(0x38, &mut pointer);
    assert_eq!(pointer, [0; 8]);
}

#[test]
fn a_short_table_gets_the_entries_that_its_clusters_have_room_for() {
    let mut made = Made::healthy(Version::V1);
    made.zero_data_offset = true;
    made.header.entries = 6;
    made.table[9] = made.raw(2);
    let before = view(&made.pages()).unwrap();
    let (pages, report) = mended(&made);
    assert_eq!(
        (report.findings.len(), did(&report)),
        (0, vec![F::BeyondDevice, F::ShortTable])
    );
    loss(&before, &pages).unwrap();

    made.header.sectors = 10_000 * CLUSTER / 512;
    made.table[9] = 0;
    let (_, report) = mended(&made);
    assert_eq!(report.findings[0].kind, F::ShortTable);
    assert_eq!(report.exit_code(), 6);
}

#[test]
fn what_cannot_be_told_is_left_alone() {
    let mut converting = Made::healthy(Version::V1);
    converting.header.flags |= FLAG_CONVERTING;
    converting.header.in_use = IN_USE;
    let mut unknown = Made::healthy(Version::V2);
    unknown.add_necessary_feature();
    unknown.set_cluster(1, 900);
    for made in [converting, unknown] {
        let (pages, report) = mended(&made);
        assert_eq!(pages.to_vec(), made.pages().to_vec());
        assert_eq!((report.exit_code(), report.repaired.len()), (6, 0));
    }
}

#[test]
fn a_repair_that_would_grow_the_file_too_much_changes_nothing() {
    let mut made = Made::healthy(Version::V2);
    made.header.in_use = IN_USE;
    for slot in 4..16 {
        made.table[slot] = made.table[0];
    }
    let store = MemStore::from_pages(made.pages());
    let e = now(repair(
        &store,
        &Repair {
            growth_max: 12 * CLUSTER - 1,
            give_up: false,
        },
    ))
    .unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid);
    assert_eq!(store.to_vec(), made.pages().to_vec());
    now(repair(
        &store,
        &Repair {
            growth_max: 12 * CLUSTER,
            give_up: false,
        },
    ))
    .unwrap();
}

#[test]
fn a_table_that_a_small_file_claims_is_not_made_for_it() {
    let mut made = Made::healthy(Version::V2);
    made.header.entries = u32::MAX - 1;
    made.header.data_start = ((64 + 4 * u64::from(u32::MAX - 1)).div_ceil(CLUSTER)) as u32;
    let mut pages = made.pages();
    pages.set_len(4096);
    let store = MemStore::from_pages(pages);
    let allowed = Repair {
        give_up: true,
        ..Repair::default()
    };
    let e = now(repair(&store, &allowed)).unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid, "{e}");
    assert_eq!(store.info().len, 4096);
}

#[test]
fn an_entry_without_its_data_is_given_up_only_when_that_is_said() {
    for version in [Version::V1, Version::V2] {
        let mut made = Made::healthy(version);
        made.set_cluster(1, 900);
        made.header.in_use = IN_USE;
        let store = MemStore::from_pages(made.pages());
        let report = now(repair(&store, &Repair::default())).unwrap();
        assert_eq!((report.exit_code(), report.repaired.len()), (6, 0));
        let lost = report
            .findings
            .iter()
            .filter(|f| f.kind.grade() == Grade::Loss);
        assert_eq!(lost.count(), 1, "{:?}", report.findings);
        assert_eq!(store.to_vec(), made.pages().to_vec());
        assert!(mend(&store).is_clean());
    }
}

#[test]
fn a_clean_image_is_not_written_at_all() {
    for version in [Version::V1, Version::V2] {
        let recording = Recording::default();
        let store = MemStore::from_pages(Made::healthy(version).pages());
        mend(&RecordStore::new(store, recording.clone()));
        assert!(recording.entries().is_empty());
    }
}
