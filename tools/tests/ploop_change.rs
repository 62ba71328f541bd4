//! The tool `ploop` changes the images of a disk, their descriptor, and its size. docs/PLOOP.md names
//! the tests here.

mod common;

use common::place::{A, B, Place, TOP, UNKNOWN, image, number, put};
use common::{can_mount, noise, text};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Header fields: sectors of the disk, its low half.
const AT_SECTORS: u64 = 0x24;

/// The file of a disk's only image.
fn only_file(place: &Place, xml: &str) -> PathBuf {
    let mut rows = place.list(xml, &[]);
    assert_eq!(rows.len(), 1, "{rows:?}");
    PathBuf::from(rows.remove(0).remove(2))
}

fn length(file: &Path) -> u64 {
    fs::metadata(file).expect("a file").len()
}

#[test]
fn a_disk_is_converted_and_reads_the_same() {
    let place = Place::new();
    let xml = place.disk("d");
    let (said, file) = (|| fs::read_to_string(&xml).expect("read"), image(&xml));
    for (version, signature) in [("1", "WithoutFreeSpace"), ("2", "WithouFreSpacExt")] {
        place.ok(&["convert", "-v", version, &xml]);
        let found = fs::read(&file).expect("read");
        assert!(found.starts_with(signature.as_bytes()), "-v {version}");
    }
    place.ok(&["convert", "-f", "raw", &xml]);
    let flat = only_file(&place, &xml);
    assert!(said().contains("<Type>Plain</Type>") && length(&flat) == 64 << 20);
    let wanted = noise(3 << 20, 11);
    put(&flat, 5 << 20, &wanted);
    let wanted = fs::read(&flat).expect("read");
    // ploop refuses this one.
    place.ok(&["convert", "-f", "expanded", &xml]);
    let grows = only_file(&place, &xml);
    assert!(said().contains("<Type>Compressed</Type>") && !flat.exists());
    assert!(length(&grows) <= 5 << 20, "holes stay holes");
    place.ok(&["convert", "-f", "preallocated", &xml]);
    assert!(said().contains("<Preallocated>1</Preallocated>"));
    assert_eq!(length(&only_file(&place, &xml)), 65 << 20);
    place.ok(&["convert", &xml, "-fploop1"]);
    let grows = only_file(&place, &xml);
    assert!(!said().contains("<Preallocated>1") && length(&grows) <= 5 << 20);
    let again = place.ok(&["convert", "-f", "expanded", &xml]);
    assert!(again.contains("already") && only_file(&place, &xml) == grows);
    place.ok(&["convert", "-f", "raw", &xml]);
    let now = fs::read(only_file(&place, &xml)).expect("read");
    assert!(now == wanted, "the content is another");

    // Not both, not neither, and not what takes snapshots with it.
    let xml = place.disk("s");
    place.ok(&["snapshot", "-u", A, &xml]);
    let kept = fs::read(&xml).expect("read");
    for wrong in [
        &["-f", "raw", "-v", "1"][..],
        &[],
        &["-f", "qcow2"],
        &["-v3"],
        &["-f", "raw"],
    ] {
        place.fails(38, &[&["convert"], wrong, &[&xml]].concat());
    }
    place.fails(4, &["convert", "-f", "raw", text(&place.path("absent"))]);
    assert!(fs::read(&xml).expect("read") == kept);
    assert_eq!(place.list(&xml, &[]).len(), 2);
}

#[test]
fn a_lost_descriptor_is_made_anew() {
    let place = Place::new();
    let xml = place.disk("d");
    let (dir, lost) = (place.path("d"), fs::read_to_string(&xml).expect("read"));
    let restore = ["restore-descriptor", text(&dir)];
    let delta = text(&dir.join("root.hds")).to_string();
    place.fails(38, &[&restore[..], &[&delta]].concat());
    fs::remove_file(&xml).expect("remove");
    place.fails(38, &[&restore[..], &["-b", "2048", &delta]].concat());
    place.fails(38, &[&restore[..], &["/etc/hostname"]].concat());
    place.fails(4, &[&restore[..], &["absent.hds"]].concat());
    assert!(!Path::new(&xml).exists());
    let said = place.ok(&[&restore[..], &[&delta]].concat());
    assert!(said.contains("DiskDescriptor.xml"), "{said}");
    assert_eq!(fs::read_to_string(&xml).expect("read"), lost);
    place.ok(&["check", &xml]);

    let flat = place.path("flat");
    fs::create_dir(&flat).expect("a directory");
    let file = File::create(flat.join("disk.raw")).expect("create");
    file.set_len(3 << 19).expect("a length");
    let restore = ["restore-descriptor", text(&flat), "disk.raw"];
    place.fails(11, &restore);
    place.ok(&[&restore[..], &["-f", "raw"]].concat());
    let info = place.ok(&["info", "-s", text(&flat.join("DiskDescriptor.xml"))]);
    assert!(info.contains("size:\t\t3072\nblocksize:\t1024\n"), "{info}");
}

#[test]
fn a_snapshot_gets_another_file_that_holds_the_same() {
    let place = Place::new();
    let xml = place.disk("d");
    for uuid in [A, B] {
        place.ok(&["snapshot", "-u", uuid, &xml]);
    }
    let file = |n: usize| PathBuf::from(place.list(&xml, &[])[n].remove(2));
    let copy = place.path("copy.hds");
    for (n, by) in [(0, "-u"), (1, "-o")] {
        let old = file(n);
        fs::copy(&old, &copy).expect("copy");
        let which = if by == "-u" { A } else { text(&old) };
        let said = place.ok(&["replace", by, which, "-i", text(&copy), &xml]);
        let new = file(n);
        assert!(
            said.contains(text(&old)) && said.contains(text(&new)),
            "{said}"
        );
        assert!(new != old && new.exists() && !old.exists() && !copy.exists());
    }
    let uuids: Vec<String> = place
        .list(&xml, &[])
        .into_iter()
        .map(|mut row| row.remove(1))
        .collect();
    assert_eq!(uuids, [A, B, TOP]);

    // One cluster that it has not.
    let before = place.list(&xml, &[]);
    fs::copy(file(0), &copy).expect("copy");
    let other = File::options().write(true).open(&copy).expect("open");
    other.set_len(2 << 20).expect("a length");
    put(&copy, 1 << 20, b"guest");
    put(&copy, 64, &1u32.to_le_bytes());
    let new = ["-i", text(&copy), &xml];
    let said = place.fails(38, &[&["replace", "-u", A], &new[..]].concat());
    assert!(said.contains("guest offset"), "{said}");
    for (wrong, why) in [
        (&["-u", UNKNOWN][..], "no such snapshot"),
        (&["-u", TOP], "top"),
        (&["-o", text(&copy)], "no image of"),
        (&[], "-u or -o"),
        (&["-u", A, "-k"], "not offered: -k"),
        (&["-u", A, "-w"], "not offered: -w"),
        (&["-l", "0"], "not offered: -l"),
        (&["-u", A, "-d", "/dev/loop0"], "name one disk"),
    ] {
        let said = place.fails(38, &[&["replace"], wrong, &new[..]].concat());
        assert!(said.contains(why), "{wrong:?}: {said}");
    }
    place.fails(
        4,
        &["replace", "-u", A, "-i", text(&place.path("absent")), &xml],
    );
    assert!(copy.exists() && place.list(&xml, &[]) == before);
    if !can_mount() {
        return;
    }
    let xml = place.disk_of("mounted", &["-s", "128m"]);
    let point = place.point("m");
    place.ok(&["mount", "-m", &point, &xml]);
    place.ok(&["snapshot", "-u", A, &xml]);
    let old = PathBuf::from(place.list(&xml, &[])[0].remove(2));
    fs::copy(&old, &copy).expect("copy");
    place.ok(&["replace", "-u", A, "-i", text(&copy), "-m", &point]);
    assert!(!old.exists() && !copy.exists());
    place.ok(&["umount", &xml]);
    place.ok(&["fscheck", &xml]);
}

#[test]
fn a_disk_grows_and_does_not_shrink() {
    let place = Place::new();
    let xml = place.disk("d");
    let sectors = |file: &Path| u64::from(number(file, AT_SECTORS));
    let said = place.ok(&["grow", "-s", "0x40000", &xml]);
    assert!(said.contains("has 262144 sectors, had 131072"), "{said}");
    assert_eq!(sectors(&image(&xml)), 262_144);
    assert!(
        fs::read_to_string(&xml)
            .expect("read")
            .contains("<Disk_size>262144<")
    );
    // The same once more is no harm, and by one of its images it is the disk.
    place.ok(&["grow", "-s128m", text(&image(&xml))]);
    let said = place.fails(38, &["grow", "-s", "64m", &xml]);
    assert!(said.contains("not made smaller"), "{said}");
    assert_eq!(sectors(&image(&xml)), 262_144);
    place.fails(38, &["grow", &xml]);
    place.fails(38, &["grow", "-s", "1g"]);
    place.fails(38, &["grow", "-s", "1g", "-d", "/dev/loop0", &xml]);
    place.fails(4, &["grow", "-s", "1g", text(&place.path("absent"))]);
    place.fails(2, &["grow", "-s", "1g", "-d", "/dev/null"]);

    fs::remove_file(&xml).expect("remove");
    place.ok(&["grow", "-s", "192m", text(&image(&xml))]);
    assert_eq!(sectors(&image(&xml)), 393_216);
    let flat = place.path("flat");
    let file = File::create(&flat).expect("create");
    file.set_len(1 << 20).expect("a length");
    place.fails(11, &["grow", "-s", "2m", text(&flat)]);
    place.ok(&["grow", "-s", "2m", "-f", "raw", text(&flat)]);
    assert_eq!(length(&flat), 2 << 20);
    if !can_mount() {
        return;
    }
    // What is in the partition is as it was, and the disk is not changed under it in other ways.
    let xml = place.disk_of("mounted", &["-s", "128m"]);
    let (device, point) = (
        format!("/dev/ploop{}8", std::process::id()),
        place.point("m"),
    );
    let (content, file) = (noise(8 << 20, 3), Path::new(&point).join("file"));
    place.ok(&["mount", "-d", &device, "-m", &point, &xml]);
    fs::write(&file, &content).expect("write");
    place.ok(&["grow", "-s", "256m", "-d", &device]);
    let real = fs::canonicalize(&device).expect("a device");
    let name = real.file_name().expect("a name");
    let size = fs::read_to_string(Path::new("/sys/block").join(name).join("size"));
    assert_eq!(size.expect("sysfs").trim(), "524288");
    place.fails(17, &["convert", "-v", "1", &xml]);
    let base = place.list(&xml, &[])[0].remove(2);
    place.fails(38, &["replace", "-u", TOP, "-i", &base, &xml]);
    place.ok(&["umount", &xml]);
    place.ok(&["grow", "-s", "300m", &xml]);
    place.ok(&["mount", "-F", "-m", &point, &xml]);
    assert!(fs::read(&file).expect("read") == content);
    place.ok(&["umount", &xml]);
}

/// Sectors of the one partition of a mounted disk, as the kernel has them.
fn partition(place: &Place, xml: &str) -> u64 {
    let said = place.ok(&["info", "-d", xml]);
    let part = said.lines().find_map(|l| l.strip_prefix("partition:\t"));
    let name = part.and_then(|p| p.strip_prefix("/dev/"));
    let size = Path::new("/sys/block").join(name.expect("a partition"));
    let size = fs::read_to_string(size.join("size")).expect("sysfs");
    size.trim().parse().expect("a number")
}

#[test]
fn a_disk_and_its_partition_and_file_system_get_another_size_together() {
    let place = Place::new();
    place.fails(38, &["resize", "-s", "1g"]);
    place.fails(4, &["resize", "-s", "1g", text(&place.path("absent"))]);
    if !can_mount() {
        return;
    }
    for fs in ["xfs", "ext4"] {
        let xml = place.disk_of(fs, &["-s", "512m", "-t", fs]);
        place.fails(38, &["resize", "-b", "-s", "1g", &xml]);
        place.fails(38, &["resize", "-p", "1", "-s", "1g", &xml]);
        place.fails(40, &["resize", "-o", "-s", "1g", &xml]);
        let point = place.point(&format!("m-{fs}"));
        let content = noise(8 << 20, 3);
        let file = Path::new(&point).join("file");
        let room = || {
            let stat = rustix::fs::statvfs(&point).expect("statvfs");
            stat.f_blocks * stat.f_frsize
        };
        place.ok(&["mount", "-m", &point, &xml]);
        fs::write(&file, &content).expect("write");
        assert_eq!(partition(&place, &xml), (511 << 20) / 512 - 2048);
        if fs == "xfs" {
            // As it is mounted.
            place.ok(&["resize", "-o", "-s", "768m", &xml]);
            assert_eq!(partition(&place, &xml), (767 << 20) / 512 - 2048);
            assert!(room() > 650 << 20);
            // Smaller, as far as that goes.
            let free = rustix::fs::statvfs(&point).expect("statvfs").f_bfree;
            place.ok(&["resize", "-s", "600m", &xml]);
            assert_eq!(partition(&place, &xml), (767 << 20) / 512 - 2048);
            let left = rustix::fs::statvfs(&point).expect("statvfs");
            let taken = (free - left.f_bfree) * left.f_frsize;
            // What the file was promised and did not need came back meanwhile.
            assert!(taken >= 152 << 20, "{taken}");
        }
        place.ok(&["umount", &xml]);
        let said = place.ok(&["resize", "-s", "1g", &xml]);
        assert!(said.contains("has 2097152 sectors"), "{said}");
        place.ok(&["mount", "-m", &point, &xml]);
        assert_eq!(partition(&place, &xml), (1023 << 20) / 512 - 2048);
        assert!(room() > 880 << 20, "{}", room());
        assert!(fs::read(&file).expect("read") == content);
        place.ok(&["umount", &xml]);
        place.ok(&["fscheck", &xml]);
        if fs == "xfs" {
            place.fails(26, &["resize", "-s", "700m", &xml]);
            continue;
        }
        place.ok(&["resize", "-s", "700m", &xml]);
        place.ok(&["fscheck", &xml]);
        place.ok(&["mount", "-m", &point, &xml]);
        assert_eq!(partition(&place, &xml), (699 << 20) / 512 - 2048);
        assert!(room() > 580 << 20 && room() < 700 << 20, "{}", room());
        assert!(fs::read(&file).expect("read") == content);
        place.ok(&["umount", &xml]);
    }
}

#[test]
fn volumes_share_what_is_frozen_and_go_in_any_order() {
    let place = Place::new();
    let path = |name: &str| text(&place.path(name)).to_string();
    let volume = |args: &[&str]| {
        let output = place.tool("ploop-volume", args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let tree = |name: &str| {
        let said: serde_json::Value =
            serde_json::from_str(&volume(&["tree", &path(name)])).expect("JSON");
        assert_eq!(said["path"], path(name));
        let children = said["children"].as_array().expect("children").iter();
        let names = children.map(|c| c["path"].as_str().expect("a path").to_string());
        names.collect::<Vec<_>>()
    };
    volume(&["create", &path("one"), "-s", "256m", "-t", "none"]);
    let said: serde_json::Value =
        serde_json::from_str(&volume(&["info", &path("one")])).expect("JSON");
    assert_eq!(said["size"], length(&place.path("one").join("root.hds")));
    place.fails(
        38,
        &["volume", "create", "--image", "x", &path("x"), "-s", "64m"],
    );
    assert!(!place.path("x").exists());
    place.fails(38, &["volume"]);
    place.fails(4, &["volume", "info", &path("absent")]);

    assert!(tree("one").is_empty());
    volume(&["snapshot", &path("one"), &path("shot")]);
    volume(&["clone", &path("shot"), &path("two")]);
    assert_eq!(tree("one"), [path("shot"), path("two")]);
    assert_eq!(tree("shot"), [path("two")]);
    place.fails(38, &["volume", "snapshot", &path("shot"), &path("x")]);
    place.fails(38, &["volume", "switch", &path("shot"), &path("one")]);
    volume(&["delete", &path("shot")]);
    volume(&["delete", &path("one")]);
    place.ok(&["check", &format!("{}/DiskDescriptor.xml", path("two"))]);
    volume(&["delete", &path("two")]);

    if !can_mount() {
        return;
    }
    volume(&["create", &path("one"), "-s", "256m"]);
    let xml = |name: &str| format!("{}/DiskDescriptor.xml", path(name));
    let point = |name: &str| place.point(&format!("m-{name}"));
    let mark = |name: &str| fs::read_to_string(Path::new(&point(name)).join("mark"));
    place.ok(&["mount", "-m", &point("one"), &xml("one")]);
    fs::write(Path::new(&point("one")).join("mark"), "first").expect("write");
    rustix::fs::sync();
    volume(&["snapshot", &path("one"), &path("shot")]);
    fs::write(Path::new(&point("one")).join("mark"), "second").expect("write");
    // For reading, though its journal has to be replayed.
    place.ok(&["mount", "-m", &point("shot"), &xml("shot")]);
    assert_eq!(mark("shot").expect("a mark"), "first");
    let refused = fs::write(Path::new(&point("shot")).join("mark"), "third");
    let refused = refused.expect_err("it is for reading").kind();
    assert_eq!(refused, std::io::ErrorKind::ReadOnlyFilesystem);
    place.ok(&["umount", &xml("shot")]);
    place.fails(17, &["volume", "switch", &path("one"), &path("shot")]);
    place.ok(&["umount", &xml("one")]);
    // What a switch that was cut has left goes with the next.
    volume(&["clone", &path("one"), &path(".one.switch")]);
    volume(&["switch", &path("one"), &path("shot")]);
    assert!(!place.path(".one.switch").exists());
    place.ok(&["mount", "-m", &point("one"), &xml("one")]);
    assert_eq!(mark("one").expect("a mark"), "first");
    fs::write(Path::new(&point("one")).join("mark"), "fourth").expect("write");
    place.ok(&["umount", &xml("one")]);
    volume(&["delete", &path("shot")]);
    volume(&["delete", &path("one")]);
}

#[test]
fn a_file_system_is_held_to_less_than_its_disk_and_gives_back_what_it_frees() {
    let place = Place::new();
    place.fails(38, &["balloon"]);
    place.fails(38, &["balloon", "clear", "-d", "/dev/loop0"]);
    if !can_mount() {
        return;
    }
    let xml = place.disk_of("d", &["-s", "512m"]);
    let point = place.point("m");
    place.fails(40, &["balloon", "show", &xml]);
    place.fails(40, &["balloon", "discard", &xml]);
    place.ok(&["mount", "-m", &point, &xml]);
    let said = place.ok(&["balloon", "show", &xml]);
    assert_eq!(said, "Current size of hidden balloon is 0 bytes\n");
    place.ok(&["balloon", "change", "-s", "128m", "-m", &point]);
    let said = place.ok(&["balloon", "show", "-m", &point]);
    assert_eq!(said, "Current size of hidden balloon is 134217728 bytes\n");
    place.fails(38, &["balloon", "change", "-s", "600m", &xml]);
    // The limit goes when the disk is made larger.
    place.ok(&["resize", "-s", "448m", &xml]);
    let said = place.ok(&["balloon", "show", &xml]);
    assert_eq!(said, "Current size of hidden balloon is 67108864 bytes\n");
    place.ok(&["balloon", "change", "-s", "0", &xml]);
    assert!(place.ok(&["balloon", "status", &xml]).contains("OFF"));

    let image = image(&xml);
    let file = |n: u64| Path::new(&point).join(format!("file-{n}"));
    for n in 0..8 {
        fs::write(file(n), noise(16 << 20, n)).expect("write");
        rustix::fs::sync();
    }
    for n in 0..7 {
        fs::remove_file(file(n)).expect("remove");
    }
    rustix::fs::sync();
    let full = length(&image);
    place.fails(38, &["balloon", "discard", "--to-free", "1g", &xml]);
    place.fails(38, &["balloon", "discard", "--defrag", &xml]);
    let said = place.ok(&["balloon", "discard", "--stat", &xml]);
    let names: Vec<&str> = said.lines().filter_map(|l| l.split(':').next()).collect();
    assert_eq!(
        names,
        ["Balloon size", "Data size", "Ploop size", "Image size"]
    );
    assert!(said.contains("Ploop size:        512MB\n"), "{said}");
    place.ok(&["balloon", "discard", &xml]);
    let less = length(&image);
    assert!(less + (80 << 20) < full, "{less} of {full}");
    assert!(fs::read(file(7)).expect("read") == noise(16 << 20, 7));
    fs::remove_file(file(7)).expect("remove");
    place.ok(&["umount", &xml]);
    place.ok(&["balloon", "discard", "--automount", &xml]);
    assert!(
        length(&image) + (8 << 20) < less,
        "{} of {less}",
        length(&image)
    );
    place.fails(40, &["umount", &xml]);
    place.ok(&["fscheck", &xml]);
}

#[test]
fn a_disk_that_another_tool_has_locked_is_not_changed() {
    let place = Place::new();
    let xml = place.disk("d");
    let lock = File::create(place.path("d/DiskDescriptor.xml.lck")).expect("create");
    flock(&lock, FlockOperation::LockExclusive).expect("locked");
    let kept = fs::read(&xml).expect("read");
    for change in [
        &["grow", "-s", "128m"][..],
        &["convert", "-v", "1"],
        &["convert", "-f", "raw"],
    ] {
        place.fails(23, &[change, &[&xml]].concat());
    }
    assert!(fs::read(&xml).expect("read") == kept);
    drop(lock);
    place.ok(&["grow", "-s", "128m", &xml]);
}
