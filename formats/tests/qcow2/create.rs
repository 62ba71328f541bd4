//! New images: QEMU finds in them what was asked for and nothing to complain of, and so do we.

use crate::qemu::{Folder, installed};
use ploop_formats::Kind;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::create::{Backing, Create, create};
use ploop_formats::qcow2::header::{Compression, Version};
use ploop_formats::qcow2::refcount::Width;
use ploop_formats::qcow2::{Qcow2, read_header};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::record::{RecordStore, Recording};
use ploop_formats::store::sim::{Fate, Rules};
use ploop_formats::testkit::exec::now;
use ploop_formats::units::ClusterSize;

const G: u64 = 1 << 30;
const T: u64 = 1 << 40;

pub fn plain(log2: u32, size: u64) -> Create {
    Create {
        version: Version::V3,
        size,
        cluster: ClusterSize::of_qcow2(log2).unwrap(),
        width: Width::new(4).unwrap(),
        extended: false,
        lazy: false,
        compression: Compression::Deflate,
        backing: None,
    }
}

/// The largest disk that a first-level table names.
fn most(wanted: &Create) -> u64 {
    let entry = if wanted.extended { 16 } else { 8 };
    let covers = wanted.cluster.bytes() / entry * wanted.cluster.bytes();
    covers
        .saturating_mul(4 << 20)
        .min(i64::MAX as u64 / 512 * 512)
}

/// Every version, cluster, width of refcounts and feature, with sizes from nothing to as much as
/// there can be.
fn matrix() -> Vec<Create> {
    let mut all = Vec::new();
    for log2 in 9..=21 {
        let mut kinds = vec![Create {
            version: Version::V2,
            ..plain(log2, 0)
        }];
        for order in 0..=6 {
            kinds.push(Create {
                width: Width::new(order).unwrap(),
                lazy: order % 2 == 0,
                compression: match order % 3 {
                    0 => Compression::Zstd,
                    _ => Compression::Deflate,
                },
                extended: log2 >= 14 && order % 2 == 1,
                ..plain(log2, 0)
            });
        }
        for kind in kinds {
            for size in [0, 512, G + 512, 2 * T, 64 * T, most(&kind)] {
                if size <= most(&kind) {
                    all.push(Create {
                        size,
                        ..kind.clone()
                    });
                }
            }
        }
    }
    all
}

fn made(wanted: &Create) -> MemStore {
    let store = MemStore::default().aligned_to(512);
    now(create(&store, wanted)).unwrap_or_else(|e| panic!("{wanted:?}: {e}"));
    store
}

/// What is wrong with a new image, by our own reader and check.
fn judge(wanted: &Create, store: &MemStore) {
    let place = format!("{wanted:?}");
    let header = now(read_header(store)).unwrap();
    assert_eq!(
        (
            header.version,
            header.cluster,
            header.size,
            header.compression
        ),
        (
            wanted.version,
            wanted.cluster,
            wanted.size,
            wanted.compression
        ),
        "{place}"
    );
    assert_eq!(header.refcounts.width, wanted.width, "{place}");
    let report = now(check(store)).unwrap();
    assert_eq!(
        (report.findings.len(), report.is_clean()),
        (0, true),
        "{place}"
    );
    assert_eq!(
        report.used_clusters,
        wanted.cluster.count(store.info().len),
        "{place}"
    );
    let image = now(Qcow2::open_read(store.clone(), None)).unwrap();
    if wanted.size > 0 {
        let last = now(image.map(wanted.size - 512, 512)).unwrap();
        assert_eq!(last, Extent::Absent { len: 512 }, "{place}");
    }
}

#[test]
fn new_images_of_every_kind_have_nothing_to_complain_of() {
    for wanted in matrix() {
        judge(&wanted, &made(&wanted));
    }
}

/// A field of `qemu-img info` in JSON.
fn says(info: &str, field: &str, value: impl std::fmt::Display) -> bool {
    info.contains(&format!("\"{field}\": {value}"))
}

#[test]
fn qemu_finds_in_new_images_what_was_asked_for() {
    if !installed("qemu_finds_in_new_images_what_was_asked_for") {
        return;
    }
    let folder = Folder::new();
    // QEMU wants some tens of milliseconds for each.
    for (n, wanted) in matrix().into_iter().enumerate() {
        if n % 5 != 0 && wanted.size != 64 * T {
            continue;
        }
        let place = format!("{wanted:?}");
        std::fs::write(folder.path("disk"), made(&wanted).to_vec()).unwrap();
        assert_eq!(folder.check("disk"), Some((0, 0)), "{place}");
        let info = folder.info("disk");
        assert!(says(&info, "virtual-size", wanted.size), "{place}: {info}");
        let cluster = wanted.cluster.bytes();
        assert!(says(&info, "cluster-size", cluster), "{place}: {info}");
        let compat = match wanted.version {
            Version::V2 => "\"0.10\"",
            Version::V3 => "\"1.1\"",
        };
        assert!(says(&info, "compat", compat), "{place}: {info}");
        let zstd = says(&info, "compression-type", "\"zstd\"");
        assert_eq!(zstd, wanted.compression == Compression::Zstd, "{place}");
        if wanted.version == Version::V3 {
            let bits = wanted.width.bits();
            assert!(says(&info, "refcount-bits", bits), "{place}: {info}");
            assert!(says(&info, "extended-l2", wanted.extended), "{info}");
            assert!(says(&info, "lazy-refcounts", wanted.lazy), "{info}");
        }
    }
}

#[test]
fn qemu_writes_to_new_images_and_leaves_them_whole() {
    if !installed("qemu_writes_to_new_images_and_leaves_them_whole") {
        return;
    }
    let folder = Folder::new();
    for log2 in [9, 12, 16, 21] {
        for order in [0, 4, 6] {
            let wanted = Create {
                width: Width::new(order).unwrap(),
                extended: log2 >= 16,
                ..plain(log2, 64 << 20)
            };
            std::fs::write(folder.path("disk"), made(&wanted).to_vec()).unwrap();
            let lines = ["write -P 7 512 300k", "write -P 8 40M 5000"];
            folder.io("disk", &lines.map(String::from));
            assert_eq!(folder.check("disk"), Some((0, 0)), "{wanted:?}");
            let report = now(check(&MemStore::from_bytes(&folder.read("disk")))).unwrap();
            assert_eq!(report.findings, [], "{wanted:?}");
        }
    }
}

#[test]
fn a_backing_file_is_named_with_its_format() {
    let backing = |name: &[u8]| {
        Some(Backing {
            name: name.to_vec(),
            format: b"raw".to_vec(),
        })
    };
    let wanted = Create {
        backing: backing(b"base.raw"),
        ..plain(16, 1 << 20)
    };
    let store = made(&wanted);
    judge(&wanted, &store);
    let header = now(read_header(&store)).unwrap();
    assert_eq!(header.backing.as_deref(), Some(&b"base.raw"[..]));
    assert_eq!(header.backing_format(), Some(&b"raw"[..]));
    if installed("a_backing_file_is_named_with_its_format") {
        let folder = Folder::new();
        std::fs::write(folder.path("base.raw"), vec![9; 1 << 20]).unwrap();
        std::fs::write(folder.path("disk"), store.to_vec()).unwrap();
        let info = folder.info("disk");
        assert!(says(&info, "backing-filename", "\"base.raw\""), "{info}");
        assert!(says(&info, "backing-filename-format", "\"raw\""), "{info}");
        assert!(folder.convert("disk", "flat"));
        assert!(folder.read("flat") == vec![9; 1 << 20]);
    }
    // In the smallest cluster there is no room for a long name, and for a short one only without
    // the names of features.
    let small = Create {
        backing: backing(&[b'a'; 360]),
        ..plain(9, 1 << 20)
    };
    judge(&small, &made(&small));
    for name in [&b""[..], &[b'a'; 1024], b"a\0b", &[b'a'; 400]] {
        let wanted = Create {
            backing: backing(name),
            ..plain(9, 1 << 20)
        };
        let e = now(create(&MemStore::default(), &wanted)).unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid, "{e}");
    }
}

#[test]
fn what_the_format_cannot_hold_is_refused_before_anything_is_written() {
    let refused = [
        plain(16, 513),
        plain(9, most(&plain(9, 0)) + 512),
        plain(21, u64::MAX / 512 * 512),
        Create {
            extended: true,
            ..plain(13, G)
        },
        Create {
            version: Version::V2,
            width: Width::new(3).unwrap(),
            ..plain(16, G)
        },
        Create {
            version: Version::V2,
            lazy: true,
            ..plain(16, G)
        },
        Create {
            version: Version::V2,
            extended: true,
            ..plain(16, G)
        },
        Create {
            version: Version::V2,
            compression: Compression::Zstd,
            ..plain(16, G)
        },
    ];
    for wanted in refused {
        let store = MemStore::default();
        let e = now(create(&store, &wanted)).unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid, "{wanted:?}: {e}");
        assert_eq!(store.info().len, 0);
    }
    let e = now(create(&MemStore::new(1), &plain(16, G))).unwrap_err();
    assert_eq!(e.kind(), Kind::Exists);
    let e = now(create(&MemStore::default().aligned_to(4096), &plain(9, G))).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
}

#[test]
fn a_new_image_is_whole_or_no_image_after_any_cut() {
    for log2 in [9, 16] {
        let wanted = plain(log2, G);
        let recording = Recording::default();
        now(create(
            &RecordStore::new(MemStore::default(), recording.clone()),
            &wanted,
        ))
        .unwrap();
        let rules = Rules {
            metadata_end: u64::MAX,
            ..Rules::default()
        };
        let mut images = 0;
        for n in 0..=recording.entries().len() {
            let fates = (0..40).map(Fate::Random).chain([Fate::None, Fate::All]);
            for fate in fates {
                let store = MemStore::from_pages(recording.cut(n, rules, &fate));
                if store.info().len > 0 && now(read_header(&store)).is_ok() {
                    judge(&wanted, &store);
                    images += 1;
                }
            }
        }
        assert!(images >= 42, "{images}");
    }
}
