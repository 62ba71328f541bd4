//! Bitmaps of closed images: what QEMU stored we read, and what we store QEMU reads; after any cut there
//! is the old one or the new one.

use crate::check::{edit, found, whole};
use crate::made::{CLUSTER, L2};
use crate::qemu::{Folder, installed};
use crate::repair::{cuts, mend};
use crate::snapshots::{Seen, Work, recorded};
use ploop_formats::qcow2::bitmaps::{Dirty, Wanted, remove, store};
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::{list_bitmaps, read_header};
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Error, Kind};
use std::ops::Range;
use std::process::Command;

type Parts = Vec<Range<u64>>;

fn wanted(name: &str, granularity: u64) -> Wanted {
    Wanted {
        name: name.into(),
        granularity,
        enabled: true,
    }
}

/// What a bitmap of an image says; none when it is not there, or says nothing.
fn said(image: &MemStore, name: &str) -> Result<Option<Parts>, Error> {
    let header = now(read_header(image))?;
    let all = now(list_bitmaps(image, &header))?;
    let Some(bitmap) = all.iter().find(|b| b.name == name.as_bytes()) else {
        return Ok(None);
    };
    let mut dirty = Dirty::of(image, &header, bitmap)?;
    let mut parts = Vec::new();
    while let Some(part) = now(dirty.next())? {
        parts.push(part);
    }
    Ok(Some(parts))
}

/// Parts as bits of a granularity say them.
fn rounded(parts: &[Range<u64>], granularity: u64, size: u64) -> Parts {
    let mut out: Parts = Vec::new();
    for part in parts.iter().filter(|part| !part.is_empty()) {
        let start = part.start / granularity * granularity;
        let end = part.end.next_multiple_of(granularity).min(size);
        match out.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => out.push(start..end),
        }
    }
    out
}

/// Some parts of a disk, in order: small ones, long ones, and none.
fn parts(rng: &mut Rng, size: u64) -> Parts {
    let mut parts = Vec::new();
    let mut at = 0;
    for _ in 0..rng.below(30) {
        let start = at + 512 * rng.below(size / 512 / 8);
        let longest = if rng.one_in(4) { size / 512 / 2 } else { 300 };
        let end = start + 512 * rng.below(longest);
        if end > size {
            break;
        }
        parts.push(start..end);
        at = end;
    }
    parts
}

/// What QEMU says of a bitmap.
fn by_qemu(folder: &Folder, name: &str) -> Parts {
    let mut command = Command::new("nbdinfo");
    command.arg("--json");
    command.arg(format!("--map=qemu:dirty-bitmap:{name}"));
    command.args(["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name]);
    command.arg(folder.path("disk")).arg("]");
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).to_string();
    assert!(done.status.success(), "{said} {done:?}");
    let mut parts: Parts = Vec::new();
    for each in said.split('{').skip(1) {
        let field = |name: &str| -> u64 {
            let rest = each.split(&format!("\"{name}\":")).nth(1).unwrap();
            let rest = rest.trim_start();
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
            rest[..end].parse().unwrap()
        };
        if field("type") != 1 {
            continue;
        }
        let (start, end) = (field("offset"), field("offset") + field("length"));
        match parts.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => parts.push(start..end),
        }
    }
    parts
}

fn has_nbdinfo() -> bool {
    let found = Command::new("nbdinfo").arg("--version").output().is_ok();
    if !found {
        println!("SKIP: needs nbdinfo");
    }
    found
}

#[test]
fn qemu_reads_our_bitmaps_and_we_read_those_of_qemu() {
    if !installed("qemu_reads_our_bitmaps_and_we_read_those_of_qemu") || !has_nbdinfo() {
        return;
    }
    let kinds = [
        ("cluster_size=512", 512, 9 << 20),
        ("cluster_size=512,refcount_bits=64", 4096, 64 << 20),
        ("cluster_size=4k", 512, 300 << 20),
        ("cluster_size=64k,lazy_refcounts=on", 65536, (1 << 30) + 512),
        ("cluster_size=64k,extended_l2=on", 1 << 20, 5 << 40),
        ("cluster_size=2M,compression_type=zstd", 4096, 1 << 30),
    ];
    for (n, (kind, granularity, size)) in kinds.into_iter().enumerate() {
        let mut rng = Rng::new(n as u64);
        let folder = Folder::new();
        folder.img(&format!("create -q -f qcow2 -o {kind} disk {size}"));
        folder.img("bitmap -f qcow2 --add -g 4096 disk theirs");
        let writes = [
            "write -P 1 0 512".to_string(),
            "write -P 2 1000000 70000".to_string(),
            format!("write -P 3 {} 512", (size - 512) / 512 * 512),
        ];
        folder.io("disk", &writes);
        let theirs = by_qemu(&folder, "theirs");
        assert_eq!(theirs.len(), 3, "{kind}");
        for round in 0..4 {
            let bytes = folder.read("disk");
            let align = if bytes.len().is_multiple_of(512) {
                512
            } else {
                1
            };
            let image = MemStore::from_bytes(&bytes).aligned_to(align);
            assert_eq!(said(&image, "theirs").unwrap().unwrap(), theirs, "{kind}");
            let dirty = match round {
                0 => std::iter::once(0..size).collect(),
                1 => Vec::new(),
                _ => parts(&mut rng, size),
            };
            let ours = wanted("ours", granularity);
            now(store(&image, &ours, dirty.iter().cloned(), &mut ())).unwrap();
            let place = format!("{kind}, round {round}: {dirty:?}");
            let expected = rounded(&dirty, granularity, size);
            assert_eq!(said(&image, "ours").unwrap().unwrap(), expected, "{place}");
            assert_eq!(now(check(&image)).unwrap().findings, [], "{place}");
            std::fs::write(folder.path("disk"), image.to_vec()).unwrap();
            assert_eq!(folder.check("disk"), Some((0, 0)), "{place}");
            assert_eq!(by_qemu(&folder, "ours"), expected, "{place}");
            assert_eq!(by_qemu(&folder, "theirs"), theirs, "{place}");
        }
        // QEMU goes on with ours, and both go without a rest.
        folder.img("bitmap -f qcow2 --merge theirs disk ours");
        folder.img("bitmap -f qcow2 --remove disk theirs");
        let bytes = folder.read("disk");
        let align = if bytes.len().is_multiple_of(512) {
            512
        } else {
            1
        };
        let image = MemStore::from_bytes(&bytes).aligned_to(align);
        now(remove(&image, b"ours", &mut ())).unwrap();
        assert_eq!(said(&image, "ours").unwrap(), None);
        assert_eq!(now(check(&image)).unwrap().findings, [], "{kind}");
        std::fs::write(folder.path("disk"), image.to_vec()).unwrap();
        assert_eq!(folder.check("disk"), Some((0, 0)), "{kind}");
        folder.img("bitmap -f qcow2 --add disk again");
    }
}

/// An image with the bitmap `bits`, all of whose clusters can be read.
fn small() -> Vec<u8> {
    let mut bytes = whole();
    edit(&mut bytes, &[(L2 + 48, 8, 0), (L2 + 56, 8, 0)]);
    let image = MemStore::from_bytes(&bytes);
    assert!(mend(&image).is_clean());
    let half = [0..CLUSTER, 3 * CLUSTER..8 * CLUSTER];
    let bits = wanted("bits", 512);
    now(store(&image, &bits, half.into_iter(), &mut ())).unwrap();
    image.to_vec()
}

/// What is stored in its place.
const NEW: [Range<u64>; 2] = [512..1024, 2 * CLUSTER..4 * CLUSTER];

fn replacing(image: &Seen) -> Result<(), Error> {
    now(store(image, &wanted("bits", 512), NEW.into_iter(), &mut ()))
}

fn adding(image: &Seen) -> Result<(), Error> {
    now(store(
        image,
        &wanted("other", 4096),
        NEW.into_iter(),
        &mut (),
    ))
}

fn removing(image: &Seen) -> Result<(), Error> {
    now(remove(image, b"bits", &mut ()))
}

/// What both bitmaps say.
fn both(image: &MemStore) -> Result<[Option<Parts>; 2], String> {
    let one = |name| said(image, name).map_err(|e| e.to_string());
    Ok([one("bits")?, one("other")?])
}

fn wrong(image: &MemStore, old: &MemStore, new: &MemStore) -> Result<(), String> {
    let report = now(check(image)).map_err(|e| e.to_string())?;
    if report.errors > 0 {
        return Err(format!("{report:#?}"));
    }
    let is = both(image)?;
    match is == both(old)? || is == both(new)? {
        true => Ok(()),
        false => Err("neither the old bitmaps nor the new ones".into()),
    }
}

#[test]
fn a_change_of_bitmaps_may_be_cut_anywhere() {
    let bytes = small();
    let old = MemStore::from_bytes(&bytes);
    let mut states = 0;
    for (w, work) in [replacing, adding, removing].into_iter().enumerate() {
        let (recording, new) = recorded(&bytes, work, None);
        let new = MemStore::from_bytes(&new);
        assert!(found(&new.to_vec()).is_clean() && both(&new) != both(&old));
        cuts(&bytes, &recording, |cut, image| {
            let place = format!("work {w}, {cut}");
            wrong(&image, &old, &new).unwrap_or_else(|e| panic!("{place}: {e}"));
            assert!(mend(&image).is_clean(), "{place}");
            wrong(&image, &old, &new).unwrap_or_else(|e| panic!("{place}, mended: {e}"));
            states += 1;
        });
    }
    println!("COUNT: {states} states");
    assert!(states > 150, "{states}");
}

#[test]
fn a_missing_barrier_of_a_bitmap_would_be_noticed() {
    let bytes = small();
    let old = MemStore::from_bytes(&bytes);
    for (w, work, needed) in [(0, replacing as Work, 2), (1, adding, 2), (2, removing, 1)] {
        let noticed = |barrier: &u64| {
            let (recording, new) = recorded(&bytes, work, Some(*barrier));
            let new = MemStore::from_bytes(&new);
            let mut noticed = false;
            cuts(&bytes, &recording, |_, image| {
                noticed = noticed || wrong(&image, &old, &new).is_err();
            });
            noticed
        };
        let noticed: Vec<u64> = (0..5).filter(noticed).collect();
        assert!(noticed.len() >= needed, "work {w}: only {noticed:?}");
    }
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let refused = |bytes: &[u8], wanted: &Wanted, parts: &[Range<u64>], kind| {
        let image = MemStore::from_bytes(bytes);
        let e = now(store(&image, wanted, parts.iter().cloned(), &mut ())).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(image.to_vec() == bytes, "{e}: changed");
    };
    let bytes = small();
    refused(&bytes, &wanted("", 512), &[], Kind::Invalid);
    refused(&bytes, &wanted("a\0b", 512), &[], Kind::Invalid);
    for granularity in [0, 256, 513, 1 << 32] {
        refused(&bytes, &wanted("new", granularity), &[], Kind::Invalid);
    }
    let good = wanted("new", 512);
    refused(
        &bytes,
        &good,
        &[0..512, 512..8 * CLUSTER + 1],
        Kind::Invalid,
    );
    refused(&bytes, &good, &[512..1024, 0..512], Kind::Invalid);
    refused(&crate::made::image(2), &good, &[], Kind::Unsupported);
    let mut dirty = bytes.clone();
    edit(&mut dirty, &[(72, 8, 1)]);
    refused(&dirty, &good, &[], Kind::Damaged);
    let image = MemStore::from_bytes(&bytes);
    let e = now(remove(&image, b"none", &mut ())).unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound, "{e}");
    // One whose writer died says nothing.
    let mut left = small();
    let at = u64::from_be_bytes(left[120 + 16..120 + 24].try_into().unwrap());
    edit(&mut left, &[(at + 12, 4, 3)]);
    let e = said(&MemStore::from_bytes(&left), "bits").unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid, "{e}");
}

#[test]
fn a_table_that_breaks_a_rule_is_damage_wherever_it_is_read() {
    let bytes = small();
    let at = u64::from_be_bytes(bytes[120 + 16..120 + 24].try_into().unwrap());
    let table = u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    for word in [2, 1 << 63, CLUSTER | 1, CLUSTER + 512, 1 << 50] {
        let mut bytes = bytes.clone();
        edit(&mut bytes, &[(table, 8, word)]);
        let e = said(&MemStore::from_bytes(&bytes), "bits").unwrap_err();
        assert_eq!(e.kind(), Kind::Damaged, "{word:#x}: {e}");
    }
}
