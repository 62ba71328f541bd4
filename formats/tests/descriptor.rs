//! Descriptors: what other tools wrote is read as they meant it, survives a round trip, and is
//! refused when a rule of ploop is broken. Files are written here as the generations write them.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use ploop_formats::descriptor::{Chs, Descriptor, ImageType, LayerFormat, Mark, NewDisk};
use ploop_formats::guid::Guid;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Kind, Result, limits};

/// A disk of the 9.x generation with everything that this project does not interpret.
const RICH: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<!-- kept -->
<Virtuozzo_disk_image Version='1.0'  x:odd = "a &lt; b">
  <Disk_Parameters>
    <Disk_size>2097152</Disk_size>
    <Max_delta_size>1073741824</Max_delta_size>
    <Cylinders>2080</Cylinders>
    <Heads>16</Heads>
    <Sectors>63</Sectors>
    <Padding>0</Padding>
    <Encryption>
      <KeyId>key-1</KeyId>
    </Encryption>
    <LogicSectorSize>512</LogicSectorSize>
    <Miscellaneous><?pi data?><Bounded/><![CDATA[<raw> & kept]]></Miscellaneous>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>2097152</End>
      <Blocksize>2048</Blocksize>
      <Preallocated>1</Preallocated>
      <Vendor attribute="1"/>
      <Image kind="base">
        <GUID>{AAAAAAAA-0000-4000-8000-000000000001}</GUID>
        <Type>Compressed</Type>
        <File>root &amp; co.hdd</File>
        <Extra>1</Extra>
      </Image>
      <Image>
        <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
        <Type>Compressed</Type>
        <File>sub/root.hdd.{bbbbbbbb-0000-4000-8000-000000000002}</File>
      </Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot>
      <GUID>{aaaaaaaa-0000-4000-8000-000000000001}</GUID>
      <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
    </Shot>
    <Shot>
      <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
      <ParentGUID>{aaaaaaaa-0000-4000-8000-000000000001}</ParentGUID>
    </Shot>
  </Snapshots>
</Virtuozzo_disk_image>
<!-- also kept -->
"#;

fn guid(n: u32) -> Guid {
    Guid::parse(&format!("{{{n:08x}-0000-4000-8000-000000000000}}")).unwrap()
}

fn parse(text: &str) -> Result<Descriptor> {
    Descriptor::parse(text.as_bytes())
}

fn text(descriptor: &Descriptor) -> String {
    String::from_utf8(descriptor.encode()).unwrap()
}

/// GUID, type and file of an image.
type ImageRow<'a> = (Guid, &'a str, &'a str);
/// GUID and parent of a shot, and what else stands in it.
type ShotRow<'a> = (Guid, Guid, &'a str);

/// A descriptor with these images (GUID, type, file), shots (GUID, parent, more) and top.
fn disk(images: &[ImageRow], shots: &[ShotRow], top: &str) -> String {
    let images: String = images
        .iter()
        .map(|(g, t, f)| format!("<Image><GUID>{g}</GUID><Type>{t}</Type><File>{f}</File></Image>"))
        .collect();
    let shots: String = shots
        .iter()
        .map(|(g, p, more)| {
            format!("<Shot><GUID>{g}</GUID><ParentGUID>{p}</ParentGUID>{more}</Shot>")
        })
        .collect();
    format!(
        "<Parallels_disk_image><Disk_Parameters><Disk_size>131072</Disk_size></Disk_Parameters>\
         <StorageData><Storage><Start>0</Start><End>131072</End><Blocksize>2048</Blocksize>{images}\
         </Storage></StorageData><Snapshots>{top}{shots}</Snapshots></Parallels_disk_image>"
    )
}

/// A chain of `n` images, base first, the last of which is the standard top.
fn chain_of(n: u32) -> String {
    let name = |i: u32| if i + 1 == n { Guid::TOP } else { guid(i + 1) };
    let files: Vec<String> = (0..n).map(|i| format!("f{i}")).collect();
    let images: Vec<_> = (0..n)
        .map(|i| (name(i), "Compressed", files[i as usize].as_str()))
        .collect();
    let parent = |i: u32| if i == 0 { Guid::NONE } else { name(i - 1) };
    let shots: Vec<_> = (0..n).map(|i| (name(i), parent(i), "")).collect();
    disk(&images, &shots, "")
}

fn refused(text: &str, kind: Kind, part: &str) {
    let e = parse(text).expect_err(part);
    assert!(e.to_string().contains(part), "expected {part:?} in: {e}");
    assert_eq!(e.kind(), kind, "{e}");
}

fn new_disk() -> Descriptor {
    Descriptor::new_disk(&NewDisk {
        sectors: 2_097_152,
        cluster: ClusterSize::new(1 << 20).unwrap(),
        kind: ImageType::Compressed,
        file: "root.hdd",
        preallocated: false,
        chs: Chs {
            cylinders: 2080,
            heads: 16,
            sectors: 63,
        },
    })
    .unwrap()
}

#[test]
fn an_unchanged_file_is_written_back_byte_for_byte() {
    assert_eq!(text(&parse(RICH).unwrap()), RICH);
}

#[test]
fn a_rich_file_is_read_as_it_was_meant() {
    let disk = parse(RICH).unwrap();
    assert_eq!(disk.sectors(), 2_097_152);
    assert_eq!(disk.cluster().sectors(), 2048);
    assert!(disk.preallocated());
    assert_eq!(disk.max_delta_size(), Some(1 << 30));
    assert_eq!(
        disk.chs(),
        Some(Chs {
            cylinders: 2080,
            heads: 16,
            sectors: 63
        })
    );
    assert_eq!(disk.images()[0].file, "root & co.hdd");
    let base = disk.base().guid;
    assert_eq!(base.to_string(), "{aaaaaaaa-0000-4000-8000-000000000001}");
    assert_eq!(disk.top(), Guid::TOP);
    assert_eq!(disk.children(base).count(), 1);
    let chain = disk.chain(disk.top()).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!((chain[0].guid, chain[0].format), (base, LayerFormat::Ploop));
    assert_eq!(disk.chain(guid(9)).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn an_edit_touches_only_what_it_names() {
    let disk = parse(RICH).unwrap();
    let changed = disk.edit(|e| e.set_max_delta_size(Some(5))).unwrap();
    assert_eq!(text(&changed), RICH.replace(">1073741824<", ">5<"));
    let changed = disk.edit(|e| e.set_max_delta_size(None)).unwrap();
    let line = "    <Max_delta_size>1073741824</Max_delta_size>\n";
    assert_eq!(text(&changed), RICH.replace(line, ""));
    let changed = disk.edit(|e| e.set_preallocated(false)).unwrap();
    assert_eq!(
        text(&changed),
        RICH.replace("      <Preallocated>1</Preallocated>\n", "")
    );
    assert!(text(&changed).contains("<Virtuozzo_disk_image Version='1.0'  x:odd = \"a &lt; b\">"));
}

#[test]
fn a_new_disk_is_written_in_the_order_and_indentation_of_ploop() {
    let expected = r#"<?xml version="1.0"?>
<Parallels_disk_image>
  <Disk_Parameters>
    <Disk_size>2097152</Disk_size>
    <Cylinders>2080</Cylinders>
    <Heads>16</Heads>
    <Sectors>63</Sectors>
    <Padding>0</Padding>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>2097152</End>
      <Blocksize>2048</Blocksize>
      <Image>
        <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
        <Type>Compressed</Type>
        <File>root.hdd</File>
      </Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot>
      <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
      <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
    </Shot>
  </Snapshots>
</Parallels_disk_image>
"#;
    assert_eq!(text(&new_disk()), expected);
}

#[test]
fn what_an_edit_adds_stands_where_a_new_file_would_have_it() {
    let disk = new_disk();
    let changed = disk
        .edit(|e| {
            e.set_max_delta_size(Some(7))?;
            e.set_preallocated(true)
        })
        .unwrap();
    let expected = text(&disk)
        .replace(
            "</Disk_size>\n",
            "</Disk_size>\n    <Max_delta_size>7</Max_delta_size>\n",
        )
        .replace(
            "</Blocksize>\n",
            "</Blocksize>\n      <Preallocated>1</Preallocated>\n",
        );
    assert_eq!(text(&changed), expected);
    let thin = changed.edit(|e| e.set_preallocated(false)).unwrap();
    assert!(!thin.preallocated());
}

#[test]
fn a_snapshot_rotates_guids_as_ploop_does() {
    let (disk, u) = (new_disk(), guid(7));
    let changed = disk
        .edit(|e| {
            e.rename(Guid::TOP, u)?;
            e.add(Guid::TOP, u, "root.hdd.{x}", ImageType::Compressed)?;
            e.set_top(Guid::TOP)
        })
        .unwrap();
    assert_eq!((changed.top(), changed.base().guid), (Guid::TOP, u));
    let files: Vec<_> = changed
        .chain(Guid::TOP)
        .unwrap()
        .into_iter()
        .map(|i| i.file)
        .collect();
    assert_eq!(files, ["root.hdd", "root.hdd.{x}"]);
    let image = [
        "      <Image>",
        "        <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>",
        "        <Type>Compressed</Type>",
        "        <File>root.hdd.{x}</File>",
        "      </Image>\n    </Storage>",
    ];
    assert!(
        text(&changed).contains(&image.join("\n")),
        "{}",
        text(&changed)
    );
    let shot = format!(
        "    <Shot>\n      <GUID>{}</GUID>\n      <ParentGUID>{u}</ParentGUID>\n    </Shot>\n  </S",
        Guid::TOP
    );
    assert!(text(&changed).contains(&shot), "{}", text(&changed));
    let back = changed
        .edit(|e| {
            e.remove(Guid::TOP)?;
            e.rename(u, Guid::TOP)?;
            e.set_top(Guid::TOP)
        })
        .unwrap();
    assert_eq!(text(&back), text(&disk));
}

#[test]
fn an_edit_that_breaks_a_rule_changes_nothing() {
    let disk = new_disk();
    assert!(disk.edit(|e| e.set_top(guid(3))).is_err());
    assert!(disk.edit(|e| e.set_file(Guid::TOP, "../up")).is_err());
    let kind = ImageType::Compressed;
    let orphan = disk.edit(|e| e.add(guid(3), guid(4), "x", kind));
    assert!(orphan.is_err());
    assert!(
        disk.edit(|e| e.set_mark(Guid::TOP, Some(Mark::Temporary)))
            .is_err()
    );
    assert_eq!(
        disk.edit(|e| e.remove(guid(3))).unwrap_err().kind(),
        Kind::NotFound
    );
    assert_eq!(disk, new_disk());
}

#[test]
fn every_field_that_an_edit_sets_is_read_back() {
    let disk = parse(&chain_of(3)).unwrap();
    let chs = Chs {
        cylinders: 3,
        heads: 2,
        sectors: 1,
    };
    let changed = disk
        .edit(|e| {
            e.set_size(262_144, chs)?;
            e.set_file(guid(1), "a<b>&\"c\"")?;
            e.set_type(guid(1), ImageType::Plain)?;
            e.set_mark(guid(2), Some(Mark::TemporaryZeroSwap))?;
            e.set_parent(guid(2), guid(1))
        })
        .unwrap();
    assert_eq!((changed.sectors(), changed.chs()), (262_144, Some(chs)));
    assert!(text(&changed).contains("<End>262144</End>"));
    assert_eq!(changed.image(guid(1)).unwrap().file, "a<b>&\"c\"");
    assert_eq!(
        changed.shot(guid(2)).unwrap().mark,
        Some(Mark::TemporaryZeroSwap)
    );
    let formats: Vec<_> = changed
        .chain(Guid::TOP)
        .unwrap()
        .iter()
        .map(|i| i.format)
        .collect();
    assert_eq!(
        formats,
        [LayerFormat::Raw, LayerFormat::Ploop, LayerFormat::Ploop]
    );
    let plain = changed.edit(|e| e.set_mark(guid(2), None)).unwrap();
    assert_eq!(plain.shot(guid(2)).unwrap().mark, None);
}

#[test]
fn upper_images_of_a_plain_disk_are_ploop_images() {
    let images = [(guid(1), "Plain", "base"), (Guid::TOP, "Plain", "top")];
    let shots = [(guid(1), Guid::NONE, ""), (Guid::TOP, guid(1), "")];
    let disk = parse(&disk(&images, &shots, "")).unwrap();
    let formats: Vec<_> = disk
        .chain(Guid::TOP)
        .unwrap()
        .iter()
        .map(|i| i.format)
        .collect();
    assert_eq!(formats, [LayerFormat::Raw, LayerFormat::Ploop]);
    let grown = disk.with_snapshot(guid(2), "third").unwrap();
    assert_eq!(grown.image(Guid::TOP).unwrap().kind, ImageType::Plain);
}

#[test]
fn a_new_delta_is_a_qcow2_image_where_the_top_is_one() {
    let top = |disk: &Descriptor| disk.image(Guid::TOP).unwrap().kind;
    for base in ["Plain", "Compressed", "QCow2"] {
        for (old, new) in [
            ("QCow2", ImageType::QCow2),
            ("Compressed", ImageType::Compressed),
        ] {
            let images = [(guid(1), base, "base"), (Guid::TOP, old, "top")];
            let shots = [(guid(1), Guid::NONE, ""), (Guid::TOP, guid(1), "")];
            let disk = parse(&disk(&images, &shots, "")).unwrap();
            // As ploop calls a delta on a raw base.
            let new = match (base, new) {
                ("Plain", ImageType::Compressed) => ImageType::Plain,
                (_, new) => new,
            };
            assert_eq!(top(&disk.with_snapshot(guid(2), "x").unwrap()), new);
            assert_eq!(top(&disk.switched(guid(1), "x").unwrap()), new);
            assert_eq!(top(&disk.cloned(guid(1), "x").unwrap()), new);
        }
    }
}

#[test]
fn a_foreign_top_is_read_and_renamed_when_stored() {
    let top = format!("<TopGUID>{}</TopGUID>", guid(2));
    let images = [(guid(1), "Compressed", "a"), (guid(2), "Compressed", "b")];
    let shots = [(guid(1), Guid::NONE, ""), (guid(2), guid(1), "")];
    let plain = disk(&images, &shots, &top);
    let read = parse(&plain).unwrap();
    assert_eq!(read.top(), guid(2));
    assert_eq!(text(&read), plain);
    assert_eq!(read.edit(|_| Ok(())).unwrap().top(), Guid::TOP);
    assert!(!text(&read.edit(|_| Ok(())).unwrap()).contains(&guid(2).to_string()));

    let volume = plain.replace(
        "<Storage>",
        "<Volume><ReadOnly>0</ReadOnly></Volume><Storage>",
    );
    assert_eq!(
        parse(&volume).unwrap().edit(|_| Ok(())).unwrap().top(),
        guid(2)
    );

    let taken = plain.replace(&guid(1).to_string(), &Guid::TOP.to_string());
    let taken = parse(&taken).unwrap();
    assert_eq!(taken.top(), guid(2));
    assert_eq!(
        taken.edit(|_| Ok(())).unwrap_err().kind(),
        Kind::Unsupported
    );
}

#[test]
fn a_missing_top_shot_is_added() {
    let images = [(guid(1), "Compressed", "a"), (Guid::TOP, "Compressed", "b")];
    let one = [(guid(1), Guid::NONE, "")];
    for top in ["".to_string(), format!("<TopGUID>{}</TopGUID>", guid(1))] {
        let read = parse(&disk(&images, &one, &top)).unwrap();
        assert_eq!(read.top(), Guid::TOP);
        assert_eq!(read.shot(Guid::TOP).unwrap().parent, guid(1));
        let stored = parse(&text(&read.edit(|_| Ok(())).unwrap())).unwrap();
        assert_eq!(stored.shots(), read.shots());
        assert_eq!(text(&stored).matches("<Shot>").count(), 2);
    }
    let alone = [(Guid::TOP, "Compressed", "b")];
    let bare = disk(&alone, &[], "").replace("<Snapshots></Snapshots>", "");
    let read = parse(&bare).unwrap();
    assert_eq!(read.base().guid, Guid::TOP);
    assert!(text(&read.edit(|_| Ok(())).unwrap()).contains("<Shot>"));
}

#[test]
fn trees_that_are_no_tree_are_refused() {
    let (a, b, top) = (guid(1), guid(2), Guid::TOP);
    let image = |g| {
        (
            g,
            "Compressed",
            if g == a {
                "fa"
            } else if g == b {
                "fb"
            } else {
                "ft"
            },
        )
    };
    let two = [image(a), image(top)];
    let three = [image(a), image(b), image(top)];
    let cases: [(&[ImageRow], &[ShotRow], &str); 9] = [
        (&[], &[], "no image"),
        (&two, &[(a, b, ""), (top, a, "")], "each has a parent"),
        (
            &two,
            &[(a, Guid::NONE, ""), (top, Guid::NONE, "")],
            "two shots without a parent",
        ),
        (
            &two,
            &[(a, Guid::NONE, ""), (a, Guid::NONE, "")],
            "two shots have the GUID",
        ),
        (&two, &[(a, Guid::NONE, ""), (b, a, "")], "has no shot"),
        (&two, &[(a, Guid::NONE, ""), (top, b, "")], "is no shot"),
        (
            &three,
            &[(a, Guid::NONE, ""), (b, top, ""), (top, b, "")],
            "circle",
        ),
        (
            &two,
            &[(a, Guid::NONE, ""), (b, a, ""), (top, a, "")],
            "a snapshot has no image",
        ),
        (&three, &[(a, Guid::NONE, "")], "has no shot"),
    ];
    for (images, shots, part) in cases {
        refused(&disk(images, shots, ""), Kind::Damaged, part);
    }
    let good = [(a, Guid::NONE, ""), (top, a, "")];
    refused(
        &disk(&[image(a), image(a)], &good, ""),
        Kind::Damaged,
        "two images have the GUID",
    );
    let same = [(a, "Compressed", "x"), (top, "Compressed", "./x")];
    refused(
        &disk(&same, &good, ""),
        Kind::Damaged,
        "two images name the file",
    );
    let backup = format!("<TopGUID>{}</TopGUID>", Guid::BACKUP);
    refused(
        &disk(&two, &good, &backup),
        Kind::Damaged,
        "reserved for backups",
    );
    let nowhere = format!("<TopGUID>{b}</TopGUID>");
    refused(&disk(&two, &good, &nowhere), Kind::Damaged, "names no shot");
    for mark in ["Temporary", "TemporaryZero", "TemporaryZeroSwap"] {
        let mark = format!("<{mark}/>");
        let marked = [(a, Guid::NONE, ""), (top, a, mark.as_str())];
        refused(&disk(&two, &marked, ""), Kind::Damaged, "marked temporary");
        let lower = [(a, Guid::NONE, mark.as_str()), (top, a, "")];
        assert!(
            parse(&disk(&two, &lower, ""))
                .unwrap()
                .shot(a)
                .unwrap()
                .mark
                .is_some()
        );
    }
}

#[test]
fn the_deepest_legal_chain_is_read_and_one_more_is_refused() {
    let deepest = parse(&chain_of(limits::DEPTH_MAX as u32)).unwrap();
    assert_eq!(deepest.chain(Guid::TOP).unwrap().len(), limits::DEPTH_MAX);
    refused(
        &chain_of(limits::DEPTH_MAX as u32 + 1),
        Kind::Unsupported,
        "stands on 128 images",
    );
}

#[test]
fn file_names_that_leave_the_directory_are_refused() {
    for name in [
        "",
        "/etc/shadow",
        "../x",
        "a/../../x",
        "a/..",
        "..",
        ".",
        "./",
        "a&#0;b",
        "a&#10;b",
    ] {
        let text = disk(
            &[(Guid::TOP, "Compressed", name)],
            &[(Guid::TOP, Guid::NONE, "")],
            "",
        );
        assert_eq!(
            parse(&text).expect_err(name).kind(),
            Kind::Damaged,
            "{name}"
        );
    }
    for name in ["a", "a/b", "..a", "a..", "./a", "a b", "root.hdd.{x}"] {
        let text = disk(
            &[(Guid::TOP, "Compressed", name)],
            &[(Guid::TOP, Guid::NONE, "")],
            "",
        );
        assert_eq!(parse(&text).unwrap().images()[0].file, name);
    }
}

#[test]
fn values_that_make_no_disk_are_refused() {
    let good = disk(
        &[(Guid::TOP, "Compressed", "a")],
        &[(Guid::TOP, Guid::NONE, "")],
        "",
    );
    assert!(parse(&good).is_ok());
    let swap = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1)
    };
    let size = "<Disk_size>131072</Disk_size>";
    for (from, to, kind, part) in [
        (size, "", Kind::Damaged, "no Disk_size"),
        (size, "<Disk_size/>", Kind::Damaged, "is empty"),
        (size, "<Disk_size>0</Disk_size>", Kind::Damaged, "0 sectors"),
        (
            size,
            "<Disk_size>-1</Disk_size>",
            Kind::Damaged,
            "Disk_size",
        ),
        (
            size,
            "<Disk_size>99999999999999999999</Disk_size>",
            Kind::Damaged,
            "Disk_size",
        ),
        (
            size,
            "<Disk_size>18446744073709551615</Disk_size>",
            Kind::Damaged,
            "is not a disk",
        ),
        (
            size,
            "<Disk_size>1<b/></Disk_size>",
            Kind::Damaged,
            "where text is expected",
        ),
        (
            size,
            "<Disk_size>1</Disk_size><Disk_size>2</Disk_size>",
            Kind::Damaged,
            "more than one",
        ),
        (">2048<", ">2047<", Kind::Damaged, "Blocksize"),
        (">2048<", ">32<", Kind::Damaged, "Blocksize"),
        (">2048<", ">262144<", Kind::Damaged, "Blocksize"),
        ("Compressed", "Squeezed", Kind::Unsupported, "Squeezed"),
        ("<Start>0<", "<Start>8<", Kind::Unsupported, "split"),
        (
            "</Storage>",
            "</Storage><Storage></Storage>",
            Kind::Unsupported,
            "split",
        ),
        ("{5fbaabe3", "{5fbaabeg", Kind::Damaged, "is not a GUID"),
        ("<File>a</File>", "", Kind::Damaged, "no File"),
        (
            "<File>a</File>",
            "<File>a</File><File>b</File>",
            Kind::Damaged,
            "more than one",
        ),
    ] {
        refused(&swap(from, to), kind, part);
    }
    assert_eq!(
        parse(&swap(">131072<", ">\n 131072 \n<"))
            .unwrap()
            .sectors(),
        131_072
    );
}

#[test]
fn hostile_xml_is_refused_in_bounded_time_and_memory() {
    let wrap = |inside: &str| format!("<a>{inside}</a>");
    let laughs = "<!DOCTYPE a [<!ENTITY x \"xxxxxxxxxx\"><!ENTITY y \"&x;&x;&x;\">]><a>&y;</a>";
    for (text, part) in [
        (laughs.to_string(), "document type"),
        (wrap("&x;"), "entities are refused"),
        (
            format!("{}{}", "<a>".repeat(40), "</a>".repeat(40)),
            "nested more than 32",
        ),
        ("<a>".repeat(1_000_000), "nested more than 32"),
        (wrap(&"<b/>".repeat(70_000)), "more than 65536"),
        (wrap("<b></c>"), ""),
        ("<a>".into(), "ends inside an element"),
        ("</a>".into(), ""),
        ("<a/><a/>".into(), "a second root"),
        ("<a/>text".into(), "text outside"),
        ("text<a/>".into(), "text outside"),
        ("".into(), "no root"),
        ("<!-- -->".into(), "no root"),
        ("<a".into(), ""),
        ("<![CDATA[x]]>".into(), "text outside"),
        ("<a/>".into(), "no Disk_Parameters"),
        (
            " ".repeat(limits::DESCRIPTOR_MAX as usize + 1),
            "is not read",
        ),
    ] {
        refused(&text, Kind::Damaged, part);
    }
    assert_eq!(
        Descriptor::parse(b"<a>\xFF</a>").unwrap_err().kind(),
        Kind::Damaged
    );
    let many: Vec<_> = (1..10_001).map(|i| (guid(i), "Compressed", "x")).collect();
    refused(&disk(&many, &[], ""), Kind::Damaged, "");
}

#[test]
fn an_error_names_the_line() {
    refused("<a>\n<b>\n&x;</b></a>", Kind::Damaged, "line 3");
    refused("<a>\n<b>\n</c></a>", Kind::Damaged, "line 3");
}

#[test]
fn a_chain_of_ten_thousand_images_is_refused() {
    refused(&chain_of(4000), Kind::Unsupported, "stands on");
    refused(&chain_of(10_000), Kind::Damaged, "more than 65536");
}
