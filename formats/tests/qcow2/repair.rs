//! Repair promises: what an image shows, it shows afterwards, whatever was wrong and wherever the
//! repair was cut; what can be mended is whole for us and for QEMU; the rest stays and is told.

use crate::chain::Chain;
use crate::check::{DAMAGES, Damage, Edit, edit, found, whole};
use crate::made::{CLUSTER, REFTABLE, put64};
use crate::qemu::{Folder, installed};
use ploop_formats::Kind;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::Qcow2;
use ploop_formats::qcow2::check::FindingKind::{self, Corrupt, Dirty, Leak, RefcountLow};
use ploop_formats::qcow2::check::{Repair, Report, check, repair};
use ploop_formats::qcow2::read_header;
use ploop_formats::store::Store;
use ploop_formats::store::fault::{FaultStore, Faults, Rule};
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::{Break, MutateStore, Mutation, Mutator};
use ploop_formats::store::record::{RecordStore, Recording};
use ploop_formats::store::sim::{Fate, Rules};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;

/// Mends all that can be.
pub const ALL: Repair = Repair {
    growth_max: 8 << 20,
    errors: true,
};

pub fn mend(store: &impl Store) -> Report {
    now(repair(store, &ALL)).unwrap()
}

/// What a state of the disk shows, cluster by cluster; none where it cannot be read.
type View = Vec<Option<Vec<u8>>>;

fn show(image: &Qcow2<MemStore>) -> View {
    let size = image.geometry().size;
    let clusters = (0..size).step_by(CLUSTER as usize);
    clusters.map(|at| show_cluster(image, at)).collect()
}

fn show_cluster(image: &Qcow2<MemStore>, at: u64) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    while (out.len() as u64) < CLUSTER {
        let (guest, rest) = (at + out.len() as u64, CLUSTER - out.len() as u64);
        let extent = now(image.map(guest, rest)).ok()?;
        let buf = bytes::BytesMut::zeroed(extent.len() as usize);
        let found = match extent {
            Extent::Data { at, .. } => now(image.store().read_at(at, buf)).ok()?,
            Extent::Packed { .. } => now(image.unpack(guest, buf)).ok()?,
            Extent::Zero { .. } | Extent::Absent { .. } => buf,
        };
        out.extend(&found);
    }
    Some(out)
}

/// What an image without a data file shows: now, and at each snapshot that can be read.
pub fn views(store: &MemStore) -> Vec<View> {
    let open = || now(Qcow2::open_read(store.clone(), None)).unwrap();
    let snapshots = now(open().snapshots()).unwrap_or_default();
    let old = snapshots.iter().filter_map(|s| open().at_snapshot(s).ok());
    std::iter::once(open())
        .chain(old)
        .map(|i| show(&i))
        .collect()
}

fn damaged(edits: &[Edit]) -> Vec<u8> {
    let mut bytes = whole();
    edit(&mut bytes, edits);
    bytes
}

/// Whether counts, flags and blocks of refcounts are all that is wrong.
fn is_hopeless(damage: &Damage) -> bool {
    let mended = ["refcount block", "refcount table"];
    let mendable = mended.iter().any(|part| damage.name.contains(part));
    let stays = [
        FindingKind::PastEnd,
        FindingKind::BadEntry,
        FindingKind::Overlap,
        FindingKind::BadSnapshot,
        FindingKind::BadBitmap,
    ];
    !mendable && damage.found.iter().any(|kind| stays.contains(kind))
}

#[test]
fn damage_of_each_kind_is_mended_or_told_and_nothing_else_is_seen() {
    let qemu = installed("damage_of_each_kind_is_mended_or_told_and_nothing_else_is_seen");
    let mut hopeless = 0;
    for damage in DAMAGES {
        let name = damage.name;
        let store = MemStore::from_bytes(&damaged(damage.edits));
        let (before, was) = (views(&store), now(check(&store)).unwrap());
        let report = mend(&store.clone().aligned_to(4096));
        assert!(views(&store) == before, "{name}: other content");
        if is_hopeless(damage) {
            hopeless += 1;
            assert!(
                report.errors > 0 && report.leaks == was.leaks,
                "{name}: {report:#?}"
            );
            continue;
        }
        assert!(report.findings.is_empty(), "{name}: {report:#?}");
        let nothing = damage.found.is_empty();
        assert_eq!(report.repaired.is_empty(), nothing, "{name}: {report:#?}");
        let after = store.to_vec();
        assert_eq!(mend(&store).repaired, [], "{name}");
        assert!(
            store.to_vec() == after,
            "{name}: a second repair changed it"
        );
        if qemu {
            let folder = Folder::new();
            std::fs::write(folder.path("disk"), &after).unwrap();
            assert_eq!(folder.check("disk"), Some((0, 0)), "{name}");
        }
    }
    assert!(hopeless >= 10, "{hopeless}");
}

/// Several rules broken at once, by dice: of counts and flags, and sometimes of what names blocks.
fn broken(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = whole();
    let simple = |d: &&Damage| !is_hopeless(d) && !d.found.is_empty();
    let choices: Vec<&Damage> = DAMAGES.iter().filter(simple).collect();
    for _ in 0..1 + rng.below(3) {
        edit(
            &mut bytes,
            choices[rng.below(choices.len() as u64) as usize].edits,
        );
    }
    if rng.one_in(4) {
        put64(&mut bytes, REFTABLE as usize, 0);
    }
    if rng.one_in(8) {
        let hopeless = DAMAGES.iter().filter(|d| is_hopeless(d));
        let hopeless: Vec<&Damage> = hopeless.collect();
        edit(
            &mut bytes,
            hopeless[rng.below(hopeless.len() as u64) as usize].edits,
        );
    }
    bytes
}

/// All of the file is metadata.
pub fn rules() -> Rules {
    Rules {
        metadata_end: u64::MAX,
        ..Rules::default()
    }
}

/// Every state that cuts during `work` can leave, some fates each.
pub fn cuts(bytes: &[u8], recording: &Recording, mut judge: impl FnMut(&str, MemStore)) {
    let rules = rules();
    assert!(!bytes.is_empty());
    for n in 0..=recording.entries().len() {
        for fate in [
            Fate::None,
            Fate::All,
            Fate::OnlyOp(n.saturating_sub(1) as u64),
            Fate::LoseOp(n.saturating_sub(2) as u64),
            Fate::Random(n as u64),
            Fate::Random(n as u64 + 1_000_000),
        ] {
            let store = MemStore::from_pages(recording.cut(n, rules, &fate));
            judge(&format!("cut {n}, {fate:?}"), store);
        }
    }
}

/// A recording of a repair.
fn recorded(bytes: &[u8]) -> Recording {
    let below = MemStore::from_bytes(bytes);
    let recording = Recording::new(below.pages());
    mend(&RecordStore::new(below, recording.clone()));
    recording
}

#[test]
fn a_repair_may_be_cut_anywhere() {
    let mut states = 0;
    for seed in 0..60 {
        let bytes = broken(seed);
        let store = MemStore::from_bytes(&bytes);
        let (before, was) = (views(&store), found(&bytes));
        let end = mend(&store);
        cuts(&bytes, &recorded(&bytes), |cut, store| {
            let place = format!("seed {seed}, {cut}");
            let now = now(check(&store)).unwrap();
            assert!(now.errors <= was.errors, "{place}: {was:#?} {now:#?}");
            assert!(views(&store) == before, "{place}: other content");
            let again = mend(&store);
            assert_eq!(
                (again.errors, again.leaks),
                (end.errors, end.leaks),
                "{place}: {again:#?}"
            );
            assert!(views(&store) == before, "{place}: other content at last");
            states += 1;
        });
    }
    assert!(states > 1000, "{states}");
}

/// Whether some cut shows more errors than there were when barrier number `barrier` does nothing.
fn notices(barrier: u64) -> bool {
    (0..60).any(|seed| {
        let bytes = broken(seed);
        let below = MemStore::from_bytes(&bytes);
        let (was, before) = (found(&bytes), views(&below));
        let recording = Recording::new(below.pages());
        let mutator = Mutator::new();
        mutator.set(Some(Mutation {
            covers: None,
            how: Break::Drop,
            only: Some(barrier),
        }));
        let inner = RecordStore::new(below, recording.clone());
        mend(&MutateStore::new(inner, mutator, CLUSTER));
        let mut noticed = false;
        cuts(&bytes, &recording, |_, store| {
            let unmarked =
                |r: &Report| !r.findings.iter().any(|f| matches!(f.kind, Dirty | Corrupt));
            let report = now(check(&store)).unwrap();
            // An image that no longer says that something is wrong with it is whole.
            let lies = !unmarked(&was) && unmarked(&report) && !report.is_clean();
            noticed |= report.errors > was.errors || lies || views(&store) != before;
        });
        noticed
    })
}

#[test]
fn a_missing_barrier_of_a_repair_would_be_noticed() {
    let noticed: Vec<u64> = (0..4).filter(|n| notices(*n)).collect();
    assert!(noticed.len() >= 3, "only barriers {noticed:?} were missed");
}

#[test]
fn a_repair_survives_the_failure_of_any_operation() {
    for seed in 0..20 {
        let bytes = broken(seed);
        let before = views(&MemStore::from_bytes(&bytes));
        for after in 0.. {
            let (store, faults) = (MemStore::from_bytes(&bytes), Faults::new());
            faults.set(Some(Rule {
                only: None,
                after,
                error: Kind::NoSpace,
                forever: false,
            }));
            let outcome = now(repair(
                &FaultStore::new(store.clone(), faults.clone()),
                &ALL,
            ));
            let place = format!("seed {seed}, operation {after}");
            if faults.failed() == 0 {
                assert!(outcome.is_ok(), "{place}");
                break;
            }
            assert!(outcome.is_err(), "{place}: the failure was swallowed");
            assert!(views(&store) == before, "{place}: other content");
            mend(&store);
            assert!(views(&store) == before, "{place}: other content at last");
        }
    }
}

#[test]
fn leaks_are_returned_alone_only_where_nothing_else_is_wrong() {
    let leaks = Repair::default();
    let mended = |edits: &[Edit]| {
        let store = MemStore::from_bytes(&damaged(edits));
        let report = now(repair(&store, &leaks)).unwrap();
        (report, store.to_vec())
    };
    let lost = (4 * CLUSTER, 8, 0);
    let (report, after) = mended(&[lost, (72, 8, 1)]);
    assert_eq!(report.findings, []);
    let did: Vec<FindingKind> = report.repaired.iter().map(|f| f.kind).collect();
    assert_eq!(did, [Leak, Dirty]);
    assert_eq!(found(&after).exit_code(), 0);
    for error in [(72, 8, 2), (4 * CLUSTER + 16, 8, 5 * CLUSTER)] {
        let before = damaged(&[lost, error]);
        let (report, after) = mended(&[lost, error]);
        assert_eq!((report.exit_code(), report.repaired.len()), (6, 0));
        assert!(after == before);
    }
}

#[test]
fn a_clean_image_is_not_written_at_all() {
    assert!(recorded(&whole()).entries().is_empty());
}

#[test]
fn marks_that_nobody_here_knows_are_taken_away_by_who_writes() {
    let mark = |bytes: &[u8]| bytes[95];
    let (unknown, lost) = ((88, 8, 0x21), (4 * CLUSTER, 8, 0));
    assert!(recorded(&damaged(&[unknown])).entries().is_empty());
    let store = MemStore::from_bytes(&damaged(&[unknown, lost]));
    assert_eq!(mend(&store).findings, []);
    assert_eq!(mark(&store.to_vec()), 1);
}

#[test]
fn nothing_is_put_where_an_entry_may_point() {
    // The refcount block is gone, and an entry names the place behind the end of the file.
    let edits = [(REFTABLE, 8, 0), (4 * CLUSTER, 8, 15 * CLUSTER)];
    let bytes = damaged(&edits);
    let store = MemStore::from_bytes(&bytes);
    let report = mend(&store);
    assert!(report.errors > 0);
    assert_eq!(store.info().len, bytes.len() as u64);
}

#[test]
fn a_repair_that_would_grow_the_file_too_much_changes_nothing() {
    let bytes = damaged(&[(REFTABLE, 8, 0)]);
    let store = MemStore::from_bytes(&bytes);
    let allowed = |growth_max| Repair {
        growth_max,
        errors: true,
    };
    let e = now(repair(&store, &allowed(CLUSTER - 1))).unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid, "{e}");
    assert!(store.to_vec() == bytes);
    assert!(now(repair(&store, &allowed(CLUSTER))).unwrap().is_clean());
}

#[test]
fn references_that_no_refcount_can_say_are_told() {
    let mut bytes = whole();
    crate::made::put32(&mut bytes, 96, 0);
    let store = MemStore::from_bytes(&bytes);
    let before = views(&store);
    let report = mend(&store);
    let left: Vec<FindingKind> = report.findings.iter().map(|f| f.kind).collect();
    let low = left.iter().filter(|kind| **kind == RefcountLow);
    assert_eq!(low.count(), 2, "{report:#?}");
    assert!(views(&store) == before);
}

/// Options of images, and bytes of their clusters.
const KINDS: [(&str, u64); 9] = [
    ("cluster_size=512", 512),
    ("cluster_size=512,refcount_bits=64", 512),
    ("cluster_size=4k,refcount_bits=1", 4096),
    ("cluster_size=4k,compat=0.10", 4096),
    ("lazy_refcounts=on", 65536),
    ("extended_l2=on,cluster_size=16k,lazy_refcounts=on", 16384),
    ("refcount_bits=8", 65536),
    ("cluster_size=2M,lazy_refcounts=on", 2 << 20),
    ("data_file=data", 65536),
];

/// An image of QEMU's, whose writer died.
fn by_qemu(options: &str, cluster: u64, seed: u64) -> Folder {
    let folder = Folder::new();
    let mut rng = Rng::new(seed);
    folder.img(&format!("create -q -f qcow2 -o {options} disk 24M"));
    let lines = |rng: &mut Rng| -> Vec<String> {
        let line = |_| {
            let at = rng.below((24 << 20) / 512 - 600) * 512;
            let len = 512 * (1 + rng.below(500));
            match rng.below(5) {
                0 => format!("discard {} {cluster}", at / cluster * cluster),
                1 => format!("write -z {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + rng.below(255)),
            }
        };
        (0..12).map(line).collect()
    };
    folder.io("disk", &lines(&mut rng));
    let shared = !options.contains("data_file") && !options.contains("bits=1");
    if shared {
        folder.img("snapshot -c one disk");
    }
    folder.io_and_die("disk", &lines(&mut rng));
    folder
}

/// What we read of an image of QEMU's.
fn content(folder: &Folder) -> Vec<u8> {
    let file = |name: &str| folder.read(name);
    Chain::open("disk", &file).unwrap().all().unwrap()
}

#[test]
fn images_whose_writer_died_or_whose_refcounts_are_rubbish_are_mended() {
    let test = "images_whose_writer_died_or_whose_refcounts_are_rubbish_are_mended";
    if !installed(test) {
        return;
    }
    for (n, (options, cluster)) in KINDS.iter().enumerate() {
        for round in 0..4u64 {
            let place = format!("{options}, round {round}");
            let folder = by_qemu(options, *cluster, n as u64 * 10 + round);
            let before = content(&folder);
            assert!(folder.convert("disk", "before"), "{place}");
            let mut bytes = folder.read("disk");
            rubbish(&mut bytes, round);
            let store = MemStore::from_bytes(&bytes).aligned_to(512);
            let report = mend(&store);
            assert_eq!(report.findings, [], "{place}");
            std::fs::write(folder.path("disk"), store.to_vec()).unwrap();
            assert_eq!(folder.check("disk"), Some((0, 0)), "{place}");
            assert!(content(&folder) == before, "{place}: other content");
            folder.img("compare -q -f qcow2 -F raw disk before");
            folder.io("disk", &["write -P 3 1M 2M".to_string()]);
            assert_eq!(folder.check("disk"), Some((0, 0)), "{place}: written to");
        }
    }
}

/// Makes rubbish of refcounts: of some, of a block, of all blocks.
fn rubbish(bytes: &mut [u8], round: u64) {
    let header = now(read_header(&MemStore::from_bytes(bytes))).unwrap();
    let (table, cluster) = (
        header.refcounts.at as usize,
        header.cluster.bytes() as usize,
    );
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let block = word(table) as usize;
    let mut rng = Rng::new(round);
    match round {
        0 => {}
        1 => {
            for _ in 0..20 {
                let at = block + rng.below(64.min(cluster as u64)) as usize;
                bytes[at] = rng.next() as u8;
            }
        }
        2 => bytes[block..block + cluster].fill(0),
        _ => bytes[table..table + cluster].fill(0),
    }
}
