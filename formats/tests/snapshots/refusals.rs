//! Operations that are refused: the kind is the documented one, the message says why, and nothing
//! has changed.

use crate::rules;
use crate::text::{NONE, TOP, Text, branched, guid};
use ploop_formats::descriptor::{Descriptor, Mark};
use ploop_formats::guid::Guid;
use ploop_formats::{Kind, Result, limits};

type Change<'a> = &'a dyn Fn(&Descriptor) -> Result<Descriptor>;
type WithFile<'a> = &'a dyn Fn(&Descriptor, &str) -> Result<Descriptor>;

fn refused(disk: &Descriptor, change: Change, kind: Kind, part: &str) {
    let before = disk.clone();
    let e = change(disk).expect_err(part);
    assert_eq!(e.kind(), kind, "{e}");
    assert!(e.to_string().contains(part), "expected {part:?} in: {e}");
    assert_eq!(disk, &before);
    assert_eq!(disk.encode(), before.encode());
}

/// Base 1 and the snapshots 2 to `n` above one another, and the top on snapshot `of`.
fn chain_of(n: u32, of: u32) -> Descriptor {
    let files: Vec<&'static str> = (1..=n).map(|n| &*format!("f{n}").leak()).collect();
    let parent = |n: u32| if n == 1 { NONE } else { guid(n - 1) };
    let mut images: Vec<_> = (1..=n).map(|n| (guid(n), files[n as usize - 1])).collect();
    let mut shots: Vec<_> = (1..=n).map(|n| (guid(n), parent(n), "")).collect();
    images.push((TOP, "top"));
    shots.push((TOP, guid(of), ""));
    Text::old(&images, &shots).parse()
}

#[test]
fn a_taken_or_reserved_guid_names_no_snapshot() {
    let disk = branched(Text::old).parse();
    refused(
        &disk,
        &|d| d.with_snapshot(guid(2), "x"),
        Kind::Exists,
        &guid(2).to_string(),
    );
    for reserved in [Guid::NONE, Guid::TOP, Guid::BACKUP] {
        refused(
            &disk,
            &|d| d.with_snapshot(reserved, "x"),
            Kind::Invalid,
            "reserved",
        );
    }
    let images = [(guid(1), "f1"), (guid(7), "f2")];
    let shots = [(guid(1), NONE, ""), (guid(7), guid(1), "")];
    let foreign = Text {
        top: guid(7),
        ..Text::old(&images, &shots)
    }
    .parse();
    refused(
        &foreign,
        &|d| d.with_snapshot(guid(7), "x"),
        Kind::Exists,
        "already",
    );
}

#[test]
fn a_new_top_takes_no_file_of_another_and_none_outside() {
    let disk = branched(Text::new).parse();
    let changes: [WithFile; 3] = [
        &|d, file| d.with_snapshot(guid(9), file),
        &|d, file| d.switched(guid(2), file),
        &|d, file| d.cloned(guid(2), file),
    ];
    for change in changes {
        // The last one is the top's own file.
        for taken in ["root.hdd", "./f2", "f4"] {
            refused(&disk, &|d| change(d, taken), Kind::Exists, taken);
        }
        for bad in ["", "/etc/shadow", "../x", "a/..", "./", "a\nb"] {
            refused(&disk, &|d| change(d, bad), Kind::Invalid, "file name");
        }
    }
}

#[test]
fn a_chain_of_the_greatest_depth_takes_no_further_top() {
    let (new, most) = (guid(999), limits::DEPTH_MAX as u32);
    let deepest = chain_of(most - 1, most - 1);
    let reason = "merge some";
    refused(
        &deepest,
        &|d| d.with_snapshot(new, "x"),
        Kind::Unsupported,
        reason,
    );
    deepest.switched(guid(most - 1), "x").unwrap();
    deepest.cloned(guid(most - 1), "x").unwrap();
    let below = chain_of(most - 2, most - 2)
        .with_snapshot(new, "x")
        .unwrap();
    assert_eq!(below.chain(TOP).unwrap().len(), limits::DEPTH_MAX);
    // A snapshot on another branch is as deep as the limit, and takes no top above it.
    let aside = chain_of(most, 1);
    refused(
        &aside,
        &|d| d.switched(guid(most), "x"),
        Kind::Unsupported,
        reason,
    );
    refused(
        &aside,
        &|d| d.cloned(guid(most), "x"),
        Kind::Unsupported,
        reason,
    );
    aside.with_snapshot(new, "x").unwrap();
}

#[test]
fn what_is_not_there_is_not_found() {
    let disk = branched(Text::old).parse();
    for unknown in [guid(9), Guid::NONE, Guid::BACKUP] {
        let changes: [Change; 6] = [
            &|d| d.switched(unknown, "x"),
            &|d| d.without_leaf(unknown),
            &|d| d.dissolved(unknown),
            &|d| d.marked(unknown, Some(Mark::Temporary)),
            &|d| d.marked(unknown, None),
            &|d| d.cloned(unknown, "x"),
        ];
        for change in changes {
            refused(&disk, change, Kind::NotFound, &unknown.to_string());
        }
    }
}

#[test]
fn the_top_is_no_snapshot() {
    let disk = branched(Text::old).parse();
    refused(
        &disk,
        &|d| d.switched(TOP, "x"),
        Kind::Invalid,
        "is the top",
    );
    refused(&disk, &|d| d.without_leaf(TOP), Kind::Invalid, "is the top");
    refused(&disk, &|d| d.dissolved(TOP), Kind::Invalid, "is the top");
    refused(
        &disk,
        &|d| d.cloned(TOP, "x"),
        Kind::Invalid,
        "make a snapshot",
    );
    for mark in [
        Mark::Temporary,
        Mark::TemporaryZero,
        Mark::TemporaryZeroSwap,
    ] {
        refused(
            &disk,
            &|d| d.marked(TOP, Some(mark)),
            Kind::Invalid,
            "is the top",
        );
    }
    assert_eq!(disk.marked(TOP, None).unwrap(), disk);
    // A fresh disk has nothing but its top, which is its base too.
    let fresh = Text::old(&[(TOP, "f1")], &[(TOP, NONE, "")]).parse();
    assert_eq!(fresh.base().guid, TOP);
    refused(
        &fresh,
        &|d| d.switched(TOP, "x"),
        Kind::Invalid,
        "is the top",
    );
    refused(
        &fresh,
        &|d| d.without_leaf(TOP),
        Kind::Invalid,
        "is the top",
    );
    refused(
        &fresh,
        &|d| d.without_top(),
        Kind::Busy,
        "no snapshot to go back to",
    );
}

#[test]
fn a_marked_snapshot_is_neither_switched_to_nor_cloned_nor_made_the_top() {
    let (a, b, c) = (guid(1), guid(2), guid(3));
    let images = [(a, "f1"), (b, "f2"), (c, "f3"), (TOP, "f4")];
    for mark in ["Temporary", "TemporaryZero", "TemporaryZeroSwap"] {
        let shots = [(a, NONE, ""), (b, a, mark), (c, b, ""), (TOP, c, "")];
        let disk = Text::old(&images, &shots).parse();
        refused(&disk, &|d| d.switched(b, "x"), Kind::Busy, mark);
        // In the chain of what is cloned, too.
        refused(&disk, &|d| d.cloned(b, "x"), Kind::Busy, mark);
        refused(&disk, &|d| d.cloned(c, "x"), Kind::Busy, mark);
        disk.cloned(a, "x").unwrap();
        let shots = [(a, NONE, ""), (b, a, ""), (c, b, mark), (TOP, c, "")];
        let disk = Text::old(&images, &shots).parse();
        refused(&disk, &|d| d.without_top(), Kind::Busy, mark);
    }
}

#[test]
fn what_others_stand_on_stays_and_they_are_named() {
    let (a, b, c) = (guid(1), guid(2), guid(3));
    let disk = branched(Text::old).parse();
    for name in [b, c] {
        refused(&disk, &|d| d.without_leaf(a), Kind::Busy, &name.to_string());
        refused(&disk, &|d| d.dissolved(a), Kind::Busy, &name.to_string());
    }
    refused(&disk, &|d| d.without_leaf(b), Kind::Busy, &TOP.to_string());
    refused(&disk, &|d| d.dissolved(c), Kind::Invalid, "leaf");
    // The top stands beside a snapshot on its parent.
    let beside = disk.switched(a, "x").unwrap();
    refused(&beside, &|d| d.without_top(), Kind::Busy, &c.to_string());
}

#[test]
fn a_top_that_a_snapshot_stands_on_is_not_dropped() {
    let (a, b) = (guid(1), guid(2));
    let images = [(a, "f1"), (TOP, "f2"), (b, "f3")];
    let disk = Text::old(&images, &[(a, NONE, ""), (TOP, a, ""), (b, TOP, "")]).parse();
    refused(&disk, &|d| d.without_top(), Kind::Busy, &b.to_string());
    refused(&disk, &|d| d.switched(a, "x"), Kind::Busy, &b.to_string());
    refused(&disk, &|d| d.switched(b, "x"), Kind::Busy, &b.to_string());
    refused(
        &disk,
        &|d| d.cloned(b, "x"),
        Kind::Invalid,
        "make a snapshot",
    );
    refused(&disk, &|d| d.dissolved(TOP), Kind::Invalid, "is the top");
}

#[test]
fn a_foreign_top_is_not_stored_while_a_snapshot_has_its_guid() {
    let foreign = guid(7);
    let images = [(TOP, "f1"), (foreign, "f2")];
    let shots = [(TOP, NONE, ""), (foreign, TOP, "")];
    let disk = Text {
        top: foreign,
        ..Text::new(&images, &shots)
    }
    .parse();
    let reserved = "reserved for the top";
    refused(
        &disk,
        &|d| d.with_snapshot(guid(9), "x"),
        Kind::Unsupported,
        reserved,
    );
    refused(
        &disk,
        &|d| d.switched(TOP, "x"),
        Kind::Unsupported,
        reserved,
    );
    refused(&disk, &|d| d.cloned(TOP, "x"), Kind::Unsupported, reserved);
    // What ends that state is done.
    assert_eq!(disk.without_top().unwrap().image(TOP).unwrap().file, "f1");
    assert_eq!(disk.dissolved(TOP).unwrap().image(TOP).unwrap().file, "f1");
}

#[test]
fn the_rule_model_can_refuse() {
    let good = branched(Text::old).write();
    rules::load(&good).unwrap();
    let top = format!("<TopGUID>{TOP}");
    let own = format!("<GUID>{TOP}");
    for (from, to) in [
        (top.clone(), format!("<TopGUID>{}", guid(9))),
        (top.clone(), format!("<TopGUID>{}", guid(3))),
        (top, format!("<TopGUID>{}", TOP.bare())),
        (own.clone(), format!("<GUID>{}", guid(1))),
        (own, format!("<GUID>{}", guid(9))),
        (
            format!("<ParentGUID>{NONE}"),
            format!("<ParentGUID>{}", guid(2)),
        ),
        (
            format!("<ParentGUID>{}", guid(2)),
            format!("<ParentGUID>{}", guid(9)),
        ),
        (
            format!("<ParentGUID>{}", guid(2)),
            format!("<ParentGUID>{NONE}"),
        ),
        ("<File>f2".into(), "<File>f3".into()),
        ("<Temporary/>".into(), "<Temporary/><TemporaryZero/>".into()),
        ("<Type>Compressed".into(), "<Type>Squeezed".into()),
        ("<End>2097152".into(), "<End>5".into()),
        (
            "    <TopGUID>".into(),
            "    </Snapshots><Snapshots><TopGUID>".into(),
        ),
    ] {
        assert!(good.contains(&from), "{from}");
        assert!(
            rules::load(&good.replacen(&from, &to, 1)).is_err(),
            "{from} -> {to}"
        );
    }
}
