//! Disks as both generations of ploop leave them, and what each operation writes over them, to
//! the byte.

use crate::text::{NONE, TOP, Text, assert_text, branched, guid};
use ploop_formats::descriptor::{Descriptor, LayerFormat, Mark};
use ploop_formats::guid::Guid;

#[test]
fn a_snapshot_names_the_old_file_and_the_new_one_is_the_top() {
    for write in [Text::old, Text::new] {
        let (a, b, c, u) = (guid(1), guid(2), guid(3), guid(9));
        let changed = branched(write).parse().with_snapshot(u, "f9").unwrap();
        let images = [
            (a, "root.hdd"),
            (b, "f2"),
            (c, "f3"),
            (u, "f4"),
            (TOP, "f9"),
        ];
        let shots = [
            (a, NONE, ""),
            (b, a, ""),
            (c, a, "Temporary"),
            (u, b, ""),
            (TOP, u, ""),
        ];
        assert_text(&changed, &write(&images, &shots));
        assert_text(&changed.without_top().unwrap(), &branched(write));
    }
}

#[test]
fn a_switch_drops_the_top_and_leaves_all_snapshots() {
    for write in [Text::old, Text::new] {
        let (a, b, c) = (guid(1), guid(2), guid(3));
        let images = [(a, "root.hdd"), (b, "f2"), (c, "f3"), (TOP, "f9")];
        let disk = branched(write).parse();
        // The base, and the snapshot that the old top stood on.
        for to in [disk.base().guid, b] {
            let shots = [
                (a, NONE, ""),
                (b, a, ""),
                (c, a, "Temporary"),
                (TOP, to, ""),
            ];
            let changed = disk.switched(to, "f9").unwrap();
            assert_text(&changed, &write(&images, &shots));
            assert!(disk.files_not_in(&changed).eq(["f4"]));
            assert!(changed.files_not_in(&disk).eq(["f9"]));
        }
    }
}

#[test]
fn a_dissolved_snapshot_leaves_its_file_to_its_child() {
    for write in [Text::old, Text::new] {
        let (a, c) = (guid(1), guid(3));
        let disk = branched(write).parse();
        let changed = disk.dissolved(guid(2)).unwrap();
        let images = [(a, "root.hdd"), (c, "f3"), (TOP, "f2")];
        let shots = [(a, NONE, ""), (c, a, "Temporary"), (TOP, a, "")];
        assert_text(&changed, &write(&images, &shots));
        assert!(disk.files_not_in(&changed).eq(["f4"]));

        let lone = changed.without_leaf(c).unwrap();
        assert!(changed.files_not_in(&lone).eq(["f3"]));
        let images = [(a, "root.hdd"), (TOP, "f2")];
        assert_text(&lone, &write(&images, &[(a, NONE, ""), (TOP, a, "")]));

        let base = lone.dissolved(lone.base().guid).unwrap();
        assert_text(&base, &write(&[(TOP, "root.hdd")], &[(TOP, NONE, "")]));
    }
}

#[test]
fn a_marked_snapshot_is_merged_away_with_its_mark() {
    let (a, b) = (guid(1), guid(2));
    let images = [(a, "f1"), (b, "f2"), (TOP, "f3")];
    let shots = |mark| [(a, NONE, ""), (b, a, mark), (TOP, b, "")];
    let disk = Text::old(&images, &shots("")).parse();
    for (mark, name) in [
        (Mark::Temporary, "Temporary"),
        (Mark::TemporaryZero, "TemporaryZero"),
        (Mark::TemporaryZeroSwap, "TemporaryZeroSwap"),
    ] {
        let marked = disk.marked(b, Some(mark)).unwrap();
        let written = Text::old(&images, &shots(name));
        assert_text(&marked, &written);
        assert_text(
            &marked.marked(b, None).unwrap(),
            &Text::old(&images, &shots("")),
        );
        let again = marked.marked(b, Some(Mark::Temporary)).unwrap();
        assert_eq!(again.shot(b).unwrap().mark, Some(Mark::Temporary));
        let merged = written.parse().dissolved(b).unwrap();
        let left = Text::old(&[(a, "f1"), (TOP, "f2")], &[(a, NONE, ""), (TOP, a, "")]);
        assert_text(&merged, &left);
    }
    // The child's own mark says something of the child: it stays.
    let both = disk.marked(a, Some(Mark::Temporary)).unwrap();
    let both = both.marked(b, Some(Mark::TemporaryZero)).unwrap();
    let merged = both.dissolved(a).unwrap();
    assert_eq!(merged.shot(b).unwrap().mark, Some(Mark::TemporaryZero));
}

#[test]
fn a_foreign_top_becomes_the_standard_one_with_every_operation() {
    let (a, b, foreign, u) = (guid(1), guid(2), guid(7), guid(9));
    let images = [(a, "root.hdd"), (b, "f2"), (foreign, "f3")];
    let shots = [(a, NONE, ""), (b, a, ""), (foreign, b, "")];
    let disk = Text {
        top: foreign,
        ..Text::old(&images, &shots)
    }
    .parse();

    let expected = Text::old(
        &[(a, "root.hdd"), (b, "f2"), (u, "f3"), (TOP, "f9")],
        &[(a, NONE, ""), (b, a, ""), (u, b, ""), (TOP, u, "")],
    );
    assert_text(&disk.with_snapshot(u, "f9").unwrap(), &expected);
    let standard = |top, of| {
        let images = [(a, "root.hdd"), (b, "f2"), (TOP, top)];
        Text::old(&images, &[(a, NONE, ""), (b, a, ""), (TOP, of, "")])
    };
    assert_text(&disk.switched(a, "f9").unwrap(), &standard("f9", a));
    assert_text(&disk.marked(b, None).unwrap(), &standard("f3", b));
    let two = |a, base, top| {
        let images = [(a, base), (TOP, top)];
        Text::old(&images, &[(a, NONE, ""), (TOP, a, "")])
    };
    assert_text(&disk.without_top().unwrap(), &two(a, "root.hdd", "f2"));
    assert_text(&disk.dissolved(a).unwrap(), &two(b, "root.hdd", "f3"));
    assert_text(&disk.cloned(a, "f9").unwrap(), &two(a, "root.hdd", "f9"));
}

#[test]
fn a_disk_with_a_volume_keeps_the_guid_of_its_top() {
    let (a, foreign, u) = (guid(1), guid(7), guid(9));
    let disk = |images: &[_], shots: &[_]| Text {
        volume: "    <Volume>\n      <SnapshotGUID>x</SnapshotGUID>\n    </Volume>\n",
        top: foreign,
        ..Text::new(images, shots)
    };
    let two = disk(
        &[(a, "f1"), (foreign, "f2")],
        &[(a, NONE, ""), (foreign, a, "")],
    );
    let three = disk(
        &[(a, "f1"), (u, "f2"), (foreign, "f9")],
        &[(a, NONE, ""), (u, a, ""), (foreign, u, "")],
    );
    let changed = two.parse().with_snapshot(u, "f9").unwrap();
    assert_text(&changed, &three);
    assert_text(&changed.without_top().unwrap(), &two);
    let switched = disk(
        &[(a, "f1"), (u, "f2"), (foreign, "f5")],
        &[(a, NONE, ""), (u, a, ""), (foreign, a, "")],
    );
    assert_text(&changed.switched(a, "f5").unwrap(), &switched);
}

#[test]
fn a_top_without_a_shot_is_rotated_like_any_other() {
    let (a, b, u) = (guid(1), guid(2), guid(9));
    let images = [(a, "f1"), (b, "f2"), (TOP, "f3")];
    let shots = [(a, NONE, ""), (b, a, "")];
    for top in [b, TOP] {
        let disk = Text {
            top,
            ..Text::old(&images, &shots)
        }
        .parse();
        let expected = Text::old(
            &[(a, "f1"), (b, "f2"), (u, "f3"), (TOP, "f9")],
            &[(a, NONE, ""), (b, a, ""), (u, b, ""), (TOP, u, "")],
        );
        assert_text(&disk.with_snapshot(u, "f9").unwrap(), &expected);
        let back = Text::old(&[(a, "f1"), (TOP, "f2")], &[(a, NONE, ""), (TOP, a, "")]);
        assert_text(&disk.without_top().unwrap(), &back);
        assert_text(&disk.dissolved(b).unwrap(), &back);
        let switched = Text::old(
            &[(a, "f1"), (b, "f2"), (TOP, "f9")],
            &[(a, NONE, ""), (b, a, ""), (TOP, a, "")],
        );
        assert_text(&disk.switched(a, "f9").unwrap(), &switched);
    }
}

#[test]
fn a_clone_has_the_chain_and_nothing_else() {
    let disk = branched(Text::new).parse();
    let clone = disk.cloned(guid(2), "f9").unwrap();
    let images = [(guid(1), "root.hdd"), (guid(2), "f2"), (TOP, "f9")];
    let shots = [
        (guid(1), NONE, ""),
        (guid(2), guid(1), ""),
        (TOP, guid(2), ""),
    ];
    assert_text(&clone, &Text::new(&images, &shots));
    assert!(disk.files_not_in(&clone).eq(["f3", "f4"]));
    assert!(clone.files_not_in(&disk).eq(["f9"]));
}

#[test]
fn a_raw_base_stays_raw_whichever_snapshot_gets_its_file() {
    let raw = |images: &[_], shots: &[_]| Text {
        kind: "Plain",
        ..Text::old(images, shots)
    };
    let (a, b) = (guid(1), guid(2));
    let one = raw(&[(TOP, "f1")], &[(TOP, NONE, "")]);
    let two = one.parse().with_snapshot(a, "f2").unwrap();
    assert_text(
        &two,
        &raw(&[(a, "f1"), (TOP, "f2")], &[(a, NONE, ""), (TOP, a, "")]),
    );
    let three = two.with_snapshot(b, "f3").unwrap();
    let formats = |disk: &Descriptor| -> Vec<LayerFormat> {
        let chain = disk.chain(disk.top()).unwrap();
        chain.iter().map(|layer| layer.format).collect()
    };
    let (raw, ploop) = (LayerFormat::Raw, LayerFormat::Ploop);
    assert_eq!(formats(&three), [raw, ploop, ploop]);
    assert_eq!(formats(&three.dissolved(a).unwrap()), [raw, ploop]);
    assert_eq!(formats(&three.dissolved(b).unwrap()), [raw, ploop]);
    assert_eq!(formats(&three.switched(a, "f9").unwrap()), [raw, ploop]);
    assert_eq!(formats(&two.dissolved(a).unwrap()), [raw]);
    assert_eq!(formats(&two.without_top().unwrap()), [raw]);
    // Types may differ, as no ploop writes them: the type goes with the file.
    let mixed = String::from_utf8(two.encode()).unwrap();
    let mixed = mixed.replacen("<Type>Plain</Type>", "<Type>Compressed</Type>", 2);
    let mixed = mixed.replacen("<Type>Compressed</Type>", "<Type>Plain</Type>", 1);
    let mixed = Descriptor::parse(mixed.as_bytes()).unwrap();
    assert_eq!(formats(&mixed), [raw, ploop]);
    assert_eq!(formats(&mixed.dissolved(a).unwrap()), [raw]);
}

#[test]
fn what_stands_on_the_top_stands_on_its_snapshot() {
    // The tree that is left when a snapshot with children was made the top.
    let (a, b, u) = (guid(1), guid(2), guid(9));
    let images = [(a, "f1"), (TOP, "f2"), (b, "f3")];
    let disk = Text::old(&images, &[(a, NONE, ""), (TOP, a, ""), (b, TOP, "")]).parse();
    let changed = disk.with_snapshot(u, "f9").unwrap();
    let images = [(a, "f1"), (u, "f2"), (b, "f3"), (TOP, "f9")];
    let shots = [(a, NONE, ""), (u, a, ""), (b, u, ""), (TOP, u, "")];
    assert_text(&changed, &Text::old(&images, &shots));
}

#[test]
fn the_case_of_a_guid_does_not_matter() {
    let text = branched(Text::old).write();
    let upper = text.replace(&guid(2).to_string(), &guid(2).to_string().to_uppercase());
    assert_ne!(text, upper);
    let disk = Descriptor::parse(upper.as_bytes()).unwrap();
    let typed: Guid = guid(2).bare().to_uppercase().parse().unwrap();
    let changed = disk.dissolved(typed).unwrap();
    assert_eq!(changed.image(TOP).unwrap().file, "f2");
    assert!(disk.with_snapshot(typed, "f9").is_err());
}

#[test]
fn a_new_file_is_named_after_the_base_without_its_guid() {
    let name = |base| {
        let disk = Text::old(&[(TOP, base)], &[(TOP, NONE, "")]).parse();
        disk.new_file_name(guid(5))
    };
    let random = guid(5);
    assert_eq!(name("root.hdd"), format!("root.hdd.{random}"));
    assert_eq!(name("sub/root.hdd"), format!("sub/root.hdd.{random}"));
    assert_eq!(name("root.hdd.{x}"), format!("root.hdd.{{x}}.{random}"));
    for old in [
        "root.hdd.{0000000a-ABCD-4000-8000-000000000000}",
        "root.hdd.{0000000a-abcd-4000-8000-000000000000}",
    ] {
        assert_eq!(name(old), format!("root.hdd.{random}"));
    }
    // The name is the base's, wherever its image stands in the file.
    let images = [(TOP, "top"), (guid(1), "base")];
    let disk = Text::old(&images, &[(TOP, guid(1), ""), (guid(1), NONE, "")]).parse();
    assert_eq!(disk.new_file_name(random), format!("base.{random}"));
}

#[test]
fn a_new_file_is_never_one_that_the_disk_has() {
    let mut disk = Text::old(&[(TOP, "./root.hdd")], &[(TOP, NONE, "")]).parse();
    for n in 0..100 {
        let name = disk.new_file_name(guid(5));
        disk = disk.with_snapshot(guid(100 + n), &name).unwrap();
    }
    assert_eq!(disk.images().len(), 101);
}

#[test]
fn files_are_compared_as_files_and_not_as_spellings() {
    let one = Text::old(&[(TOP, "./a//b")], &[(TOP, NONE, "")]).parse();
    let two = Text::old(&[(TOP, "a/b")], &[(TOP, NONE, "")]).parse();
    assert_eq!(one.files_not_in(&two).count(), 0);
    let three = Text::old(&[(TOP, "a/B")], &[(TOP, NONE, "")]).parse();
    assert!(one.files_not_in(&three).eq(["./a//b"]));
}

#[test]
fn stray_text_between_images_survives_and_reads_back_the_same() {
    let text = branched(Text::old).write();
    let stray = text.replace("</Image>\n", "</Image> stray\n");
    let disk = Descriptor::parse(stray.as_bytes()).unwrap();
    let changed = disk.dissolved(guid(2)).unwrap();
    let written = changed.encode();
    assert_eq!(
        String::from_utf8_lossy(&written).matches(" stray").count(),
        4
    );
    assert_eq!(Descriptor::parse(&written).unwrap(), changed);
}
