//! The tool `ploop`: scripts that were written for OpenVZ's run with ours. docs/PLOOP.md says what is
//! the same, and names the tests here.

mod common;

use common::place::{
    A, AT_IN_USE, B, CLOSED_V21, IN_USE, NONE, Place, TOP, UNKNOWN, image, number, put,
};
use common::{can_mount, has, noise, text};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// Size option, options, then heads, cylinders, cluster, entries, sectors, first cluster of data, bytes
/// of the file: measured of ploop 1.12.2.
const IMAGES: &[(&str, &[&str], [u64; 7])] = &[
    ("64m", &[], [16, 256, 2048, 64, 131_072, 2048, 1 << 20]),
    ("1g", &[], [16, 2080, 2048, 1024, 2_097_152, 2048, 1 << 20]),
    ("100001k", &[], [16, 392, 2048, 98, 200_704, 2048, 1 << 20]),
    (
        "10g",
        &[],
        [16, 40_960, 2048, 10_240, 20_971_520, 2048, 1 << 20],
    ),
    (
        "100g",
        &[],
        [16, 409_600, 2048, 102_400, 209_715_200, 2048, 1 << 20],
    ),
    (
        "300g",
        &[],
        [16, 1_228_800, 2048, 307_200, 629_145_600, 4096, 2 << 20],
    ),
    (
        "1t",
        &[],
        [
            16,
            4_194_304,
            2048,
            1_048_576,
            2_147_483_648,
            10_240,
            5 << 20,
        ],
    ),
    (
        "4t",
        &["-v2"],
        [
            16,
            16_777_216,
            2048,
            4_194_304,
            8_589_934_592,
            34_816,
            17 << 20,
        ],
    ),
    (
        "64m",
        &["-b", "64"],
        [16, 256, 64, 2048, 131_072, 64, 32 << 10],
    ),
    (
        "64m",
        &["-b131072"],
        [16, 256, 131_072, 1, 131_072, 131_072, 64 << 20],
    ),
    (
        "64m",
        &["-f", "preallocated"],
        [16, 256, 2048, 64, 131_072, 2048, 65 << 20],
    ),
    (
        "64m",
        &["-v", "1"],
        [16, 256, 2048, 64, 131_072, 2048, 1 << 20],
    ),
    ("131072", &[], [16, 256, 2048, 64, 131_072, 2048, 1 << 20]),
    (
        "0x20000",
        &["-b", "0"],
        [16, 256, 2048, 64, 131_072, 2048, 1 << 20],
    ),
    (
        "0400000",
        &["-b", "04000"],
        [16, 256, 2048, 64, 131_072, 2048, 1 << 20],
    ),
];

#[test]
fn init_makes_the_images_that_ploop_makes() {
    let place = Place::new();
    for (n, (size, options, expected)) in IMAGES.iter().enumerate() {
        let options = [&["-s", size, "-t", "none"], *options].concat();
        let xml = place.disk_of(&n.to_string(), &options);
        let image = image(&xml);
        let mut found: Vec<u64> = [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30]
            .map(|at| u64::from(number(&image, at)))
            .to_vec();
        found[4] |= u64::from(number(&image, 0x28)) << 32;
        found.push(fs::metadata(&image).expect("a file").len());
        assert_eq!(found, expected, "{options:?}");
        assert_eq!(
            (number(&image, 0x2c), number(&image, 0x34)),
            (0, 1),
            "{options:?}"
        );
        let signature = fs::read(&image).expect("read")[..16].to_vec();
        let old = options.contains(&"1");
        let name: &[u8] = if old {
            b"WithoutFreeSpace"
        } else {
            b"WithouFreSpacExt"
        };
        assert_eq!(signature, name, "{options:?}");
        let said = fs::read_to_string(&xml).expect("read");
        assert!(said.contains("<Parallels_disk_image>"), "{said}");
        assert!(
            said.contains(&format!("<Disk_size>{}</Disk_size>", expected[4])),
            "{said}"
        );
    }
    let raw = place.disk_of("raw", &["-s", "3m", "-t", "none", "-f", "raw", "-S"]);
    assert_eq!(fs::metadata(image(&raw)).expect("a file").len(), 3 << 20);
    assert!(
        fs::read_to_string(&raw)
            .expect("read")
            .contains("<Type>Plain</Type>")
    );
    // What is there already stays.
    let disk = place.disk("there");
    place.fails(
        38,
        &["init", "-s", "64m", "-t", "none", text(&image(&disk))],
    );
    let other = Path::new(&disk).with_file_name("other.hds");
    place.fails(38, &["init", "-s", "64m", "-t", "none", text(&other)]);
    assert!(image(&disk).exists() && !other.exists());
    fs::remove_file(&disk).expect("remove");
    place.fails(1, &["init", "-s", "64m", "-t", "none", text(&image(&disk))]);
    assert!(
        image(&disk).exists(),
        "an image that was there is not removed"
    );
    for wrong in [
        &["-s", "3t", "-v1"][..],
        &["-s", "1k", "-b", "100"],
        &["-s", "10x"],
        &["-s64m", "-Tqcow2"],
    ] {
        let image = text(&other);
        place.fails(38, &[&["init", "-t", "none"], wrong, &[image]].concat());
    }
    assert!(!other.exists());
}

#[test]
fn a_new_disk_has_a_partition_and_a_file_system() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    // Behind the disk, as getopt(3) has it.
    let dir = place.path("d");
    fs::create_dir(&dir).expect("a directory");
    let said = place.ok(&["init", text(&dir.join("root.hds")), "-s", "1g"]);
    assert!(said.contains("bs=2048 size=2097152 sectors v2"), "{said}");
    let xml = text(&dir.join("DiskDescriptor.xml")).to_string();
    let point = place.point("m");
    let device = format!("/dev/ploop{}", std::process::id());
    let component = format!("component-{}", std::process::id());
    place.fails(40, &["info", &xml]);
    let said = place.ok(&[
        "mount",
        "-d",
        &device,
        "-m",
        &point,
        "-c",
        &component,
        "-onoatime",
        &xml,
    ]);
    assert!(
        said.contains("Adding delta dev=/dev/loop") && said.contains("(rw)"),
        "{said}"
    );
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mount = mounts
        .lines()
        .find(|l| l.contains(&format!(" {point} ")))
        .expect("it is mounted");
    assert!(
        mount.contains(" ext4 ") && mount.contains("noatime"),
        "{mount}"
    );
    let part = mount.split(' ').next().expect("a source");

    assert_eq!(
        place.ok(&["info", "-s", "-d", &xml]),
        format!(
            "size:\t\t2097152\nblocksize:\t2048\nfmt_version:\t2\ndevice:\t\t{device}\npartition:\t{part}\n"
        )
    );
    assert_eq!(
        begin_of(part),
        2048,
        "the partition begins with the second cluster"
    );
    fs::write(Path::new(&point).join("file"), noise(8 << 20, 5)).expect("write");
    let usage = place.ok(&["info", &xml]);
    let rows: Vec<&str> = usage.lines().collect();
    assert_eq!(rows[0], "   resource           Size           Used");
    assert!(
        rows[1].starts_with("  1k-blocks ") && rows[2].starts_with("     inodes "),
        "{usage}"
    );
    assert!(rows.iter().all(|row| row.len() == 41), "{usage}");
    let line = format!(
        "{device}\t{}\t{point}\t{component}",
        text(&dir.join("root.hds"))
    );
    assert!(place.ok(&["list", "-a"]).lines().any(|l| l == line));
    let two = format!("{device}\t{}", text(&dir.join("root.hds")));
    assert!(place.ok(&["list"]).lines().any(|l| l == two));

    rustix::fs::sync();
    let stat = place.ok(&["stat", "-d", &device]);
    let stat: Vec<(&str, u64)> = stat
        .lines()
        .map(|l| l.split_once(' ').expect("two columns"))
        .map(|(name, n)| (name, n.parse().expect("a number")))
        .collect();
    assert_eq!(stat.len(), 47);
    let of: BTreeMap<_, _> = stat.into_iter().collect();
    assert!(
        of["bio_in"] > 8 && of["bio_fsync"] > 0 && of["coal_back"] == 0,
        "{of:?}"
    );

    // What is frozen with its file system is whole, also in a partition.
    place.ok(&["snapshot", "-F", "-u", A, &xml]);
    let (before, said) = (
        place.ok(&["info", &xml]),
        common::fails(4, &["snapshot", "switch", text(&dir), &A[1..37]]),
    );
    assert!(said.contains("device") || said.contains("use"), "{said}");
    let trimmed = Command::new("fstrim").arg(&point).output().expect("fstrim");
    assert!(trimmed.status.success(), "{trimmed:?}");
    place.fails(21, &["mount", &xml]);
    place.ok(&["umount", "-c", &component]);
    for gone in [&device, &format!("/run/ploop.components/{component}")] {
        assert!(fs::symlink_metadata(gone).is_err(), "{gone}");
    }
    assert!(place.scratch.attached().is_empty());
    assert_eq!(
        place.ok(&["info", &xml]),
        before,
        "what it was like is kept"
    );
    assert_eq!(fs::metadata(dir.join(".statfs")).expect("kept").len(), 40);
    place.fails(40, &["umount", &xml]);

    // The same file system by our own verb, and by a name that fstab(5) could have.
    common::ok(&["mount", text(&dir), &point, "--read-only"]);
    let file = fs::read(Path::new(&point).join("file")).expect("read");
    assert!(file == noise(8 << 20, 5));
    let listed = place.scratch.attached().remove(0);
    assert_eq!(listed["mountpoint"], point);
    place.ok(&["umount", "-m", &point]);
    place.ok(&["mount", "-F", "-t", "ext4", "-m", &point, &xml]);
    assert!(
        !dir.join(".statfs").exists(),
        "it is forgotten when it may change"
    );
    place.ok(&["umount", text(&dir.join("root.hds"))]);
    place.ok(&["mount", "-r", "-m", &point, &xml]);
    assert!(fs::write(Path::new(&point).join("other"), "x").is_err());
    place.ok(&["umount", &xml]);
    common::ok(&["delete", text(&dir)]);
    assert!(!dir.exists());

    if has("mkfs.xfs") {
        let xfs = place.disk_of("x", &["-s", "400m", "-t", "xfs", "-L", "label", "-P"]);
        place.ok(&["mount", "-m", &point, &xfs]);
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        assert!(mounts.contains(&format!(" {point} xfs ")), "{mounts}");
        place.ok(&["umount", &xfs]);
    }
}

/// The sector of its disk with which a loop device begins.
fn begin_of(device: &str) -> u64 {
    let name = device.strip_prefix("/dev/").expect("a device");
    let offset = fs::read_to_string(format!("/sys/block/{name}/loop/offset")).expect("sysfs");
    offset.trim().parse::<u64>().expect("a number") / 512
}

#[test]
fn a_snapshot_or_the_base_is_mounted_beside_the_disk() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let xml = place.disk_of("d", &["-s", "256m"]);
    let (point, view) = (place.point("m"), place.point("v"));
    place.ok(&["mount", "-m", &point, &xml]);
    let file = Path::new(&point).join("file");
    for (uuid, content) in [(A, "one"), (B, "two")] {
        fs::write(&file, content).expect("write");
        place.ok(&["snapshot", "-F", "-u", uuid, &xml]);
    }
    fs::write(&file, "three").expect("write");
    for (uuid, content) in [("base", "one"), (A, "one"), (B, "two")] {
        let said = place.ok(&["mount", "-u", uuid, "-m", &view, &xml]);
        assert!(said.contains(&view), "{said}");
        assert_eq!(
            fs::read_to_string(Path::new(&view).join("file")).expect("read"),
            content
        );
        assert!(
            fs::write(Path::new(&view).join("file"), "x").is_err(),
            "read-only"
        );
        place.ok(&["umount", "-m", &view]);
    }
    place.fails(43, &["mount", "-u", UNKNOWN, "-m", &view, &xml]);
    place.fails(38, &["mount", "-u", A, &xml]);
    assert_eq!(fs::read_to_string(&file).expect("read"), "three");
    place.ok(&["umount", &xml]);
    place.ok(&["mount", "-u", TOP, "-m", &point, &xml]);
    assert_eq!(fs::read_to_string(&file).expect("read"), "three");
    place.ok(&["umount", &xml]);
}

#[test]
fn a_disk_is_mounted_by_its_images_or_by_the_helper() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let xml = place.disk_of("d", &["-s", "128m"]);
    place.ok(&["snapshot", "-u", A, &xml]);
    let files: Vec<String> = place
        .list(&xml, &[])
        .into_iter()
        .map(|mut row| row.remove(2))
        .collect();
    let [base, top] = [&files[0], &files[1]];
    let point = place.point("m");
    let said = place.fails(38, &["mount", "-m", &point, top, base]);
    assert!(said.contains("base first"), "{said}");
    place.ok(&["mount", "-m", &point, base, top]);
    assert_eq!(place.scratch.attached()[0]["path"], text(&place.path("d")));
    place.ok(&["umount", top]);

    let mounted = place.tool("mount.ploop", &[&xml, &point, "-s", "-o", "ro,noatime"]);
    assert!(mounted.status.success(), "{mounted:?}");
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(
        mounts.contains(&format!(" {point} ext4 ro,noatime")),
        "{mounts}"
    );
    let unmounted = place.tool("umount.ploop", &[&point, "-l"]);
    assert!(unmounted.status.success(), "{unmounted:?}");
    assert!(place.scratch.attached().is_empty());
    assert_eq!(place.tool("mount.ploop", &[&xml]).status.code(), Some(38));
    assert_eq!(
        place.tool("umount.ploop", &[&point]).status.code(),
        Some(40)
    );
}

#[test]
fn a_device_is_stopped_only_when_it_is_not_mounted() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let xml = place.disk_of("d", &["-s", "128m"]);
    let device = format!("/dev/ploop{}9", std::process::id());
    place.fails(2, &["start", "-d", &device]);
    for wrong in ["/dev/null", "/tmp/ploop1", "/dev/sda", "/dev/loop0"] {
        place.fails(38, &["mount", "-d", wrong, &xml]);
    }
    place.ok(&["mount", "-m", &place.point("m"), "-d", &device, &xml]);
    place.ok(&["start", "-d", &device]);
    place.fails(17, &["stop", "-d", &device]);
    place.ok(&["umount", "-d", &device]);
    place.ok(&["mount", "-d", &device, &xml]);
    place.ok(&["stop", "-d", &device]);
    place.fails(2, &["stop", "-d", &device]);
    assert!(place.scratch.attached().is_empty());
}

#[test]
fn the_tree_of_snapshots_is_made_listed_and_cut() {
    let place = Place::new();
    let xml = place.disk("d");
    let base = text(&image(&xml)).to_string();
    assert_eq!(
        place.ok(&["snapshot-list", &xml]),
        format!(
            "PARENT_UUID                            C UUID                                   \
             FNAME                           \n{NONE} * {TOP} {base:<32}\n"
        )
    );
    let said = place.ok(&["snapshot", &xml, "-u", A]);
    assert!(
        said.contains(&format!("ploop snapshot {A} has been successfully created")),
        "{said}"
    );
    place.fails(38, &["snapshot", "-u", A, &xml]);
    place.fails(38, &["snapshot", "-u", "nonsense", &xml]);
    // Without braces as well.
    place.ok(&["snapshot", "-u", &B[1..37], &xml]);
    let rows = place.list(&xml, &[]);
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0], [NONE, A, &base]);
    assert_eq!(rows[1][..2], [A, B]);
    assert_eq!(rows[2][..2], [B, TOP]);
    assert_eq!(rows[2].last().map(String::as_str), Some("*"));
    let name = rows[2][2]
        .strip_prefix(&format!("{base}.{{"))
        .expect("behind the base's name");
    assert_eq!(name.len(), 37);
    // Without the top, the mark is where that stands.
    let rows = place.list(&xml, &["-s"]);
    assert_eq!(
        (rows.len(), rows[1].last().map(String::as_str)),
        (2, Some("*"))
    );
    assert_eq!(
        place.ok(&["snapshot-list", "-H", "-ouuid", "--id", B, &xml]),
        format!("{B}\n")
    );
    assert_eq!(
        place
            .ok(&["snapshot-list", "-o", "uuid,current", "-u", TOP, &xml])
            .lines()
            .count(),
        2
    );
    for wrong in [
        &["-o", "name", &xml][..],
        &["-x", &xml],
        &["/nonexistent/DiskDescriptor.xml"],
        &[],
    ] {
        place.fails(1, &[&["snapshot-list"], wrong].concat());
    }

    place.fails(38, &["snapshot-switch", "-u", UNKNOWN, &xml]);
    place.fails(38, &["snapshot-switch", "-u", TOP, &xml]);
    place.ok(&["snapshot-switch", "-u", A, &xml]);
    assert_eq!(
        place
            .list(&xml, &[])
            .iter()
            .filter(|row| row[0] == A)
            .count(),
        2
    );
    place.fails(43, &["snapshot-delete", "-u", UNKNOWN, &xml]);
    place.fails(38, &["snapshot-merge", "-u", UNKNOWN, &xml]);
    // Two stand on it: it stays for now, and the second goes.
    let said = place.ok(&["snapshot-delete", "-u", A, &xml]);
    assert!(said.contains("marked temporary"), "{said}");
    assert!(
        fs::read_to_string(&xml)
            .expect("read")
            .contains("<Temporary")
    );
    place.ok(&["snapshot-delete", &xml, "-u", B]);
    assert_eq!(place.list(&xml, &[]), [[NONE, TOP, &base, "*"]]);
    place.fails(38, &["snapshot-merge", &xml]);

    for uuid in [A, B] {
        place.ok(&["-v0", "snapshot", "-u", uuid, &xml]);
    }
    place.ok(&["snapshot-merge", "-u", B, &xml]);
    assert_eq!(place.list(&xml, &[])[0][..2], [NONE, B]);
    place.ok(&["snapshot", "-u", A, &xml]);
    place.ok(&["snapshot-merge", "-A", &xml]);
    assert_eq!(place.list(&xml, &[]), [[NONE, TOP, &base, "*"]]);
    let kept: Vec<_> = fs::read_dir(place.path("d"))
        .expect("list")
        .flatten()
        .collect();
    assert_eq!(
        kept.iter()
            .filter(|e| text(&e.path()).contains("root.hds"))
            .count(),
        1
    );
}

#[test]
fn images_are_merged_by_their_names() {
    let place = Place::new();
    let xml = place.disk("d");
    for uuid in [A, B] {
        place.ok(&["snapshot", "-u", uuid, &xml]);
    }
    let files: Vec<String> = place
        .list(&xml, &[])
        .into_iter()
        .map(|mut row| row.remove(2))
        .collect();
    let [base, middle, top] = [&files[0], &files[1], &files[2]];
    place.fails(38, &["merge", top]);
    place.fails(38, &["merge", base, middle]);
    place.fails(38, &["merge", top, base]);
    place.fails(38, &["merge", "-d", "/dev/ploop1", "-l", "1"]);
    assert_eq!(place.list(&xml, &[]).len(), 3);
    place.ok(&["merge", top, middle, base]);
    assert_eq!(place.list(&xml, &[]), [[NONE, TOP, base, "*"]]);
    assert!(!Path::new(middle).exists() && !Path::new(top).exists());
}

#[test]
fn a_temporary_snapshot_stays_until_it_is_deleted() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let xml = place.disk_of("d", &["-s", "128m"]);
    let (point, view) = (place.point("m"), place.point("v"));
    place.ok(&["mount", "-m", &point, &xml]);
    fs::write(Path::new(&point).join("file"), "then").expect("write");
    let component = format!("backup-{}", std::process::id());
    place.fails(38, &["tsnapshot", "-u", A, "-c", &component, &xml]);
    place.fails(38, &["tsnapshot", "-u", A, "-c", "../x", "-m", &view, &xml]);
    place.ok(&[
        "tsnapshot",
        "-F",
        "-u",
        A,
        "-c",
        &component,
        "-m",
        &view,
        &xml,
    ]);
    fs::write(Path::new(&point).join("file"), "now").expect("write");
    assert_eq!(
        fs::read_to_string(Path::new(&view).join("file")).expect("read"),
        "then"
    );
    let said = place.fails(17, &["snapshot-delete", "-u", A, &xml]);
    assert!(said.contains(&view), "{said}");
    place.ok(&["umount", "-c", &component]);
    assert_eq!(
        place.list(&xml, &[]).len(),
        2,
        "ploop's scripts delete it themselves"
    );
    place.ok(&["snapshot-delete", "-u", A, &xml]);
    assert_eq!(place.list(&xml, &[]).len(), 1);
    // And when nobody does, it goes with a snapshot once it is not what the disk stands on.
    place.ok(&["tsnapshot", "-u", A, "-c", &component, "-m", &view, &xml]);
    place.ok(&["umount", "-m", &view]);
    for uuid in [B, UNKNOWN] {
        place.ok(&["snapshot", "-u", uuid, &xml]);
    }
    let rows = place.list(&xml, &[]).into_iter();
    let uuids: Vec<String> = rows.map(|mut row| row.remove(1)).collect();
    assert_eq!(uuids, [B, UNKNOWN, TOP]);
    assert_eq!(
        fs::read_to_string(Path::new(&point).join("file")).expect("read"),
        "now"
    );
    place.ok(&["umount", &xml]);
}

#[test]
fn a_file_system_is_checked_in_use_and_left_alone() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let xml = place.disk_of("d", &["-s", "128m"]);
    let point = place.point("m");
    place.ok(&["mount", "-m", &point, &xml]);
    fs::write(Path::new(&point).join("file"), noise(1 << 20, 3)).expect("write");
    let said = place.ok(&["fscheck", &xml]);
    assert!(said.contains("Pass 5"), "{said}");
    assert_eq!(place.list(&xml, &[]).len(), 1, "nothing is left of it");
    assert_eq!(place.scratch.attached().len(), 1);
    place.ok(&["umount", &xml]);
    place.ok(&["fscheck", &xml]);
    assert!(place.scratch.attached().is_empty());
}

#[test]
fn a_check_does_what_its_options_let_it() {
    let place = Place::new();
    let xml = place.disk("d");
    let file = image(&xml);
    let mark = |value: u32| put(&file, AT_IN_USE, &value.to_le_bytes());
    let entry = |n: u64, cluster: u32| put(&file, 64 + 4 * n, &cluster.to_le_bytes());
    let length = |bytes: u64| {
        let file = File::options().write(true).open(&file).expect("open");
        file.set_len(bytes).expect("a length");
    };
    let said = place.ok(&["check", &xml]);
    assert!(said.contains("check is skipped"), "{said}");
    assert_eq!(place.ok(&["check", "-s", &xml]), "");
    mark(CLOSED_V21);
    assert!(
        place
            .ok(&["check", text(&file)])
            .contains("check is skipped")
    );

    mark(IN_USE);
    place.fails(37, &["check", text(&image(&xml)), "-c"]);
    place.fails(37, &["check", "-fc", &xml]);
    place.fails(37, &["fsck", "--force", &xml]);
    place.fails(7, &["check", "-rd", &xml]);
    assert_eq!(number(&file, AT_IN_USE), IN_USE, "nothing is written");
    place.ok(&["check", "--drop-inuse", &xml]);
    assert_eq!(number(&file, AT_IN_USE), 0);
    mark(IN_USE);
    place.ok(&["check", &xml]);
    assert_eq!(
        number(&file, AT_IN_USE),
        0,
        "a descriptor alone means what a mount does"
    );

    // A tail that no cluster ends with.
    length((1 << 20) + 1000);
    place.ok(&["check", "-r", &xml]);
    place.ok(&["check", "-f", &xml]);
    assert_eq!(fs::metadata(&file).expect("a file").len(), 1 << 20);
    length((2 << 20) + 1000);
    put(&file, 2 << 20, b"guest");
    entry(0, 2);
    place.ok(&["check", "-fS", &xml]);
    assert_eq!(fs::metadata(&file).expect("a file").len(), 3 << 20);
    assert_eq!(number(&file, 64), 2);

    // An entry beyond the file: fatal, and taken away only by force.
    entry(1, 40);
    place.ok(&["check", &xml]);
    place.fails(11, &["check", "-f", &xml]);
    place.fails(11, &["check", "-Fr", &xml]);
    assert_eq!(number(&file, 68), 40, "nothing is written");
    place.ok(&["check", "-F", &xml]);
    assert_eq!((number(&file, 64), number(&file, 68)), (2, 0));

    // One cluster for two: each gets its own.
    entry(1, 2);
    place.fails(11, &["check", "-fc", &xml]);
    place.ok(&["check", "--hard-force", &xml]);
    let (a, b) = (number(&file, 64), number(&file, 68));
    assert!(a != b && a > 0 && b > 0, "{a} {b}");
    place.ok(&["check", "-f", &xml]);
    place.fails(
        11,
        &[
            "check",
            "-f",
            text(&{
                fs::write(place.path("garbage"), noise(1 << 20, 7)).expect("write");
                place.path("garbage")
            }),
        ],
    );
    place.fails(4, &["check", text(&place.path("absent"))]);
}

#[test]
fn options_stand_anywhere_and_other_commands_are_programs() {
    let place = Place::new();
    let xml = place.disk("d");
    // Long ones may be cut short, and the last of two counts.
    let said = place.ok(&[
        "snapshot-list",
        &xml,
        "--no-h",
        "--out",
        "fname",
        "-o",
        "uuid",
    ]);
    assert_eq!(said.trim(), TOP);
    assert_eq!(place.ok(&["-v0", "snapshot", &xml]), "");
    assert!(!place.ok(&["-vv", "-v4", "snapshot", &xml]).is_empty());
    let said = place.fails(38, &[]);
    assert!(said.contains("Usage: ploop"), "{said}");
    let said = place.fails(38, &["snapshot-switch"]);
    assert!(said.contains("ploop snapshot-switch"), "{said}");

    let program = place.bin.join("ploop-hello");
    fs::write(&program, "#!/bin/sh\necho \"$0 $*\"; exit 7\n").expect("write");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&program, mode).expect("mode");
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(place.bin.join("ploop"))
        .args(["hello", "-x", "there"])
        .env("PATH", format!("{}:{path}", text(&place.bin)))
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(7));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.ends_with("ploop-hello -x there\n"), "{said}");
    let said = place.fails(38, &["hello"]);
    assert!(
        said.contains("ploop-hello") && said.contains("Usage"),
        "{said}"
    );
}
