//! Verbs that need no privilege and attach nothing.

mod common;

use common::{Scratch, fails, json, ok, run, text};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;

fn mode(path: &std::path::Path) -> u32 {
    std::fs::metadata(path)
        .expect("metadata")
        .permissions()
        .mode()
        & 0o777
}

#[test]
fn a_new_disk_is_private_and_sound() {
    let scratch = Scratch::new();
    for version in ["1", "2"] {
        let name = format!("v{version}");
        let disk = scratch.disk(
            &name,
            &["-s", "100M", "--fs", "none", "--format-version", version],
        );
        assert_eq!(mode(&disk), 0o700);
        assert_eq!(mode(&disk.join("root.hds")), 0o600);
        assert_eq!(mode(&disk.join("DiskDescriptor.xml")), 0o600);
        let info = json(&["info", text(&disk)]);
        assert_eq!(info["size"], 100 << 20);
        assert_eq!(info["layers"][0]["format_version"].to_string(), version);
        assert_eq!(info["layers"][0]["in_use"], false);
        assert_eq!(info["attached"], Value::Null);
        let check = json(&["check", text(&disk)]);
        assert_eq!(check["clean"], true);
    }
}

#[test]
fn a_large_disk_costs_its_table_and_no_more() {
    let scratch = Scratch::new();
    let disk = scratch.disk("big", &["-s", "1T", "--fs", "none", "--cluster", "1M"]);
    let info = json(&["info", text(&disk)]);
    let allocated = info["allocated"].as_u64().expect("number");
    assert!(
        allocated <= 8 << 20,
        "{allocated} bytes for a table of 4 MiB"
    );
}

#[test]
fn a_preallocated_disk_has_its_space_and_reads_as_zeros() {
    let scratch = Scratch::new();
    let disk = scratch.disk("full", &["-s", "32M", "--fs", "none", "--preallocate"]);
    let info = json(&["info", text(&disk)]);
    assert!(info["allocated"].as_u64() >= Some(32 << 20), "{info}");
    let map = json(&["map", text(&disk)]);
    assert_eq!(map["extents"][0]["file"], "root.hds", "{map}");
    assert_eq!(json(&["check", text(&disk)])["clean"], true);
}

#[test]
fn a_disk_that_cannot_be_made_leaves_nothing() {
    let scratch = Scratch::new();
    let dir = scratch.path("d");
    for bad in [
        &["-s", "0", "--fs", "none"][..],
        &["-s", "1G", "--fs", "none", "--cluster", "100K"],
        &["-s", "8T", "--fs", "none", "--format-version", "1"],
    ] {
        let args: Vec<&str> = ["init"]
            .iter()
            .chain(bad)
            .copied()
            .chain([text(&dir)])
            .collect();
        fails(2, &args);
        assert!(!dir.exists(), "{bad:?}");
    }
    std::fs::create_dir(&dir).expect("mkdir");
    std::fs::write(dir.join("mine"), "precious").expect("write");
    fails(1, &["init", "-s", "1G", "--fs", "none", text(&dir)]);
    let left: Vec<_> = std::fs::read_dir(&dir).expect("list").collect();
    assert_eq!(left.len(), 1);
}

#[test]
fn damage_is_named_and_mended() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let image = disk.join("root.hds");
    let mut bytes = std::fs::read(&image).expect("read");
    bytes[64..68].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes());
    std::fs::write(&image, bytes).expect("write");
    let output = run(&["-o", "json", "check", text(&disk)]);
    assert_eq!(output.status.code(), Some(6));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let finding = &report["layers"][0]["findings"][0];
    assert_eq!(
        (&finding["kind"], &finding["offset"]),
        (&"past-end".into(), &64.into())
    );
    assert_eq!(finding["repair"], "loss");
    // Nothing is given up unasked.
    let before = std::fs::read(&image).expect("read");
    let said = run(&["check", "--repair", text(&disk)]);
    assert_eq!(said.status.code(), Some(6));
    assert!(
        String::from_utf8_lossy(&said.stdout).contains("--force"),
        "{said:?}"
    );
    assert!(std::fs::read(&image).expect("read") == before);
    ok(&["check", "--repair", "--force", text(&disk)]);
    ok(&["check", text(&disk)]);
}

#[test]
fn every_point_of_a_disk_is_checked_and_each_finding_names_its_file() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let point = |name: &str| {
        let said = ok(&[
            "-o",
            "json",
            "snapshot",
            "create",
            text(&disk),
            "--name",
            name,
        ]);
        let said: Value = serde_json::from_str(&said).expect("JSON");
        said["uuid"].as_str().expect("a UUID").to_string()
    };
    let first = point("first");
    let other = point("other");
    ok(&["snapshot", "switch", text(&disk), &first]);
    let listed = ok(&["-o", "json", "snapshot", "list", text(&disk)]);
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    let mut listed = listed["snapshots"].as_array().expect("a list").iter();
    let entry = listed.find(|snapshot| snapshot["uuid"] == *other);
    let file = entry.expect("the snapshot")["file"].clone();
    let image = disk.join(file.as_str().expect("a file"));
    // It is below no top, and says that it is in use.
    let mut bytes = std::fs::read(&image).expect("read");
    bytes[0x2C..0x30].copy_from_slice(&0x746F_6E59u32.to_le_bytes());
    std::fs::write(&image, bytes).expect("write");
    let output = run(&["-o", "json", "check", text(&disk)]);
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let layers = report["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 3);
    assert_eq!(
        (&layers[2]["file"], &layers[2]["errors"]),
        (&file, &1.into())
    );
    assert_eq!(layers[2]["findings"][0]["repair"], "safe");
    ok(&["check", "--repair", text(&disk)]);
    ok(&["check", text(&disk)]);
    ok(&["snapshot", "switch", text(&disk), &other]);
}

#[test]
fn a_file_of_a_disk_is_not_opened_behind_its_back() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let image = disk.join("root.hds");
    fails(2, &["check", text(&image)]);
    let said = fails(1, &["check", "--format", "ploop", text(&image)]);
    assert!(said.contains("DiskDescriptor.xml"), "{said}");
    let copy = scratch.path("copy.img");
    std::fs::copy(&image, &copy).expect("copy");
    ok(&["check", "--format", "ploop", text(&copy)]);
}

#[test]
fn a_descriptor_cannot_reach_out_of_its_directory() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let outside = scratch.path("outside.hds");
    std::fs::rename(disk.join("root.hds"), &outside).expect("move");
    std::os::unix::fs::symlink(&outside, disk.join("root.hds")).expect("link");
    let output = run(&["info", text(&disk)]);
    assert!(
        !output.status.success(),
        "a link out of the directory was followed"
    );
    let xml = disk.join("DiskDescriptor.xml");
    let evil = std::fs::read_to_string(&xml)
        .expect("read")
        .replace("root.hds", text(&outside));
    std::fs::write(&xml, evil).expect("write");
    assert!(!run(&["info", text(&disk)]).status.success());
}

#[test]
fn a_failure_in_json_has_a_code_a_kind_and_a_sentence() {
    let scratch = Scratch::new();
    let nothing = scratch.path("nothing");
    let output = run(&["info", text(&nothing), "-o", "json"]);
    assert_eq!(output.status.code(), Some(11));
    assert!(output.stdout.is_empty());
    let error: Value = serde_json::from_slice(&output.stderr).expect("JSON");
    assert_eq!(
        (&error["schema"], &error["error"]["code"]),
        (&1.into(), &11.into())
    );
    assert_eq!(error["error"]["kind"], "not-found");
    assert!(
        error["error"]["message"]
            .as_str()
            .is_some_and(|m| m.contains("nothing"))
    );
    let usage = run(&["-o", "json", "frobnicate"]);
    assert_eq!(usage.status.code(), Some(2));
    let error: Value = serde_json::from_slice(&usage.stderr).expect("JSON");
    assert_eq!(error["error"]["kind"], "usage");
}

#[test]
fn the_map_of_a_new_disk_is_one_hole() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let map = json(&["map", text(&disk)]);
    let extents = map["extents"].as_array().expect("extents");
    assert_eq!(extents.len(), 1, "{map}");
    assert_eq!(extents[0]["length"], 64 << 20);
    assert_eq!(extents[0]["zero"], true);
    assert_eq!(extents[0]["offset"], Value::Null);
}

/// Every name in a value, at any depth.
fn names(value: &Value, into: &mut std::collections::BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                into.insert(name.clone());
                names(value, into);
            }
        }
        Value::Array(list) => list.iter().for_each(|v| names(v, into)),
        _ => {}
    }
}

#[test]
fn every_name_in_json_is_documented() {
    let doc = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OUTPUT.md");
    let doc = std::fs::read_to_string(doc).expect("docs/OUTPUT.md");
    let scratch = Scratch::new();
    let disk = scratch.path("d");
    let disk = text(&disk);
    let mut found = std::collections::BTreeSet::new();
    names(
        &json(&["init", "-s", "10M", "--fs", "none", disk]),
        &mut found,
    );
    // A cluster that no entry names: a finding.
    let image = std::fs::File::options()
        .append(true)
        .open(format!("{disk}/root.hds"));
    std::io::Write::write_all(&mut image.expect("image"), &[7; 65536]).expect("write");
    for args in [&["info", disk][..], &["map", disk], &["list"]] {
        names(&json(args), &mut found);
    }
    let checked = run(&["check", disk, "-o", "json"]);
    assert_eq!(checked.status.code(), Some(3), "{checked:?}");
    names(
        &serde_json::from_slice(&checked.stdout).expect("JSON"),
        &mut found,
    );
    let failed = run(&["info", "/nonexistent", "-o", "json"]);
    names(
        &serde_json::from_slice(&failed.stderr).expect("JSON"),
        &mut found,
    );
    assert!(
        found.contains("findings") && found.contains("severity"),
        "{found:?}"
    );
    let missing: Vec<_> = found
        .iter()
        .filter(|n| !doc.contains(&format!("`{n}`")))
        .collect();
    assert!(missing.is_empty(), "not in docs/OUTPUT.md: {missing:?}");
}
