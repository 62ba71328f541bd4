//! The verbs of an operator: what the machine can do, and disks that come and go.

mod common;

use common::Scratch;
use common::json;
use serde_json::Value;
use std::fs;

use std::process::Command;

fn check<'a>(doctor: &'a Value, name: &str) -> &'a Value {
    let checks = doctor["checks"].as_array().expect("checks");
    let found = checks.iter().find(|c| c["name"] == name);
    found.unwrap_or_else(|| panic!("no check {name}: {doctor}"))
}

#[test]
fn the_doctor_says_what_is_missing_and_what_to_do() {
    let doctor = json(&["doctor"]);
    assert_eq!(doctor["serve"], true, "{doctor}");
    for check in doctor["checks"].as_array().expect("checks") {
        assert!(check["detail"].as_str().is_some_and(|d| !d.is_empty()));
        let state = check["state"].as_str().expect("state");
        assert!(["ok", "warning", "missing"].contains(&state), "{check}");
    }
    // Programs are looked for on the PATH: without one there are none, and no mount either.
    let output = Command::new(common::PLOOPCTL)
        .args(["-o", "json", "doctor"])
        .env("PATH", "/nonexistent")
        .output()
        .expect("ploopctl runs");
    assert_eq!(output.status.code(), Some(0));
    let doctor: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let ext4 = check(&doctor, "ext4");
    assert_eq!(ext4["state"], "missing");
    assert!(
        ext4["detail"]
            .as_str()
            .expect("detail")
            .contains("mkfs.ext4")
    );
    assert_eq!(ext4["remedy"], "install e2fsprogs");
    assert_eq!(doctor["mount"], false, "{doctor}");
}

#[test]
fn the_doctor_fails_where_no_disk_can_be_served() {
    let scratch = Scratch::new();
    let alone = scratch.path("ploopctl");
    fs::copy(common::PLOOPCTL, &alone).expect("copy");
    let output = Command::new(&alone)
        .arg("doctor")
        .env("PATH", "/nonexistent")
        .output()
        .expect("ploopctl runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("missing  ploopd"), "{said}");
    assert!(said.contains("put ploopd beside ploopctl"), "{said}");
}
