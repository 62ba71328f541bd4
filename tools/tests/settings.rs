//! Settings of a host: what they change, what wins over them, and what is refused.

mod common;

use common::{PLOOPCTL, Scratch, can_mount, eventually, json, kill9, ok, run, text};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A settings file with this text.
fn settings(scratch: &Scratch, text: &str) -> PathBuf {
    let path = scratch.path("ploop.toml");
    fs::write(&path, text).expect("write");
    path
}

/// Runs a verb under settings.
fn under(config: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(PLOOPCTL);
    command.args(["--config", text(config)]).args(args);
    command.output().expect("ploopctl runs")
}

fn doctor(config: &Path) -> (Option<i32>, Value) {
    let output = under(config, &["-o", "json", "doctor"]);
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = said["checks"].as_array().expect("checks");
    let check = checks.iter().find(|c| c["name"] == "settings").cloned();
    (output.status.code(), check.expect("a check"))
}

fn documentation() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/SETTINGS.md");
    fs::read_to_string(path).expect("docs/SETTINGS.md")
}

/// The table's rows: key and the values that it names.
fn documented() -> Vec<(String, Vec<String>)> {
    let quoted = |cell: &str| -> Vec<String> {
        let parts = cell.split('`').skip(1).step_by(2);
        parts.map(str::to_string).collect()
    };
    let text = documentation();
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.split('|').collect::<Vec<_>>());
    cells
        .map(|cells| (quoted(cells[1])[0].clone(), quoted(cells[2])))
        .collect()
}

#[test]
fn the_documented_keys_and_values_are_those_that_are_accepted() {
    let scratch = Scratch::new();
    let rows = documented();
    assert!(rows.len() >= 5, "{rows:?}");
    for (key, values) in &rows {
        assert!(!values.is_empty(), "{key}");
        for value in values {
            let (code, check) = doctor(&settings(&scratch, &format!("{key} = {value}\n")));
            assert_eq!(
                (code, &check["state"]),
                (Some(0), &"ok".into()),
                "{key} {value}"
            );
        }
        let (code, check) = doctor(&settings(&scratch, &format!("{key} = \"nonsense\"\n")));
        assert_eq!(
            (code, &check["state"]),
            (Some(1), &"missing".into()),
            "{key}"
        );
    }
    // What the program itself says that there is, in the file and in its tables.
    for (table, prefix) in [("", ""), ("[mount]", "mount."), ("[serve]", "serve.")] {
        let (_, check) = doctor(&settings(&scratch, &format!("{table}\nno-such = 1\n")));
        let said = check["detail"].as_str().expect("detail");
        let (_, expected) = said.split_once("expected ").expect("the known keys");
        let known: Vec<String> = expected
            .split('`')
            .skip(1)
            .step_by(2)
            .map(|k| format!("{prefix}{k}"))
            .collect();
        assert!(!known.is_empty(), "{said}");
        for key in known {
            let is_table = rows.iter().any(|(k, _)| k.starts_with(&format!("{key}.")));
            assert!(
                is_table || rows.iter().any(|(k, _)| *k == key),
                "{key} is not documented"
            );
        }
    }
    let example = documentation()
        .split_once("\n    keep-free")
        .expect("an example")
        .1
        .to_string();
    let example = format!("keep-free{example}");
    assert_eq!(
        doctor(&settings(&scratch, &example)).1["state"],
        "ok",
        "{example}"
    );
}

#[test]
fn what_is_wrong_is_named_by_file_line_and_key_and_stops_what_would_be_misled() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "16M", "--fs", "none"]);
    let config = settings(&scratch, "sandbox = \"on\"\n[serve]\ncahce = \"none\"\n");
    let socket = format!("unix:{}", text(&scratch.path("s")));
    let output = under(&config, &["serve", text(&disk), "--nbd", &socket]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    let place = format!(
        "{}: line 3: `cahce = \"none\"`: unknown key `cahce`",
        text(&config)
    );
    assert!(said.contains(&place), "{said}");
    assert!(
        under(&config, &["list"]).status.success(),
        "which reads no settings"
    );
    let absent = scratch.path("absent.toml");
    let output = under(&absent, &["serve", text(&disk), "--nbd", &socket]);
    assert_eq!(output.status.code(), Some(11));
    let (code, check) = doctor(&absent);
    assert_eq!((code, &check["state"]), (Some(1), &"missing".into()));
    let by_variable = Command::new(PLOOPCTL)
        .args(["serve", text(&disk), "--nbd", &socket])
        .env("PLOOP_CONFIG", &config)
        .output()
        .expect("ploopctl runs");
    assert_eq!(by_variable.status.code(), Some(2));
    assert!(
        run(&["doctor"]).status.success(),
        "absent settings are defaults"
    );
}

/// Serves until a client left, and gives the log.
fn served(config: &Path, disk: &Path, options: &[&str]) -> String {
    let args = [&["serve", text(disk), "--nbd", "-"], options].concat();
    let output = under(config, &args);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{log}");
    log
}

#[test]
fn settings_change_defaults_and_options_change_settings() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "16M", "--fs", "none"]);
    let config = settings(&scratch, "sandbox = \"off\"\n");
    assert!(served(&config, &disk, &[]).contains("without a sandbox"));
    assert!(!served(&config, &disk, &["--sandbox", "on"]).contains("without a sandbox"));
    let config = settings(&scratch, "");
    assert!(!served(&config, &disk, &[]).contains("without a sandbox"));
    if !can_mount() {
        return;
    }
    let cache = |config: &str, options: &[&str]| {
        let config = settings(&scratch, config);
        let args = [&["-o", "json", "mount", text(&disk)], options].concat();
        let output = under(&config, &args);
        let state: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        ok(&["umount", text(&disk)]);
        state["cache"].clone()
    };
    // A file system without O_DIRECT allows nothing but `writeback`.
    let default = cache("", &[]);
    let writeback = "[mount]\ncache = \"writeback\"\n";
    assert_eq!(cache(writeback, &[]), "writeback");
    assert_eq!(cache(writeback, &["--cache", "none"]), default);
    assert_eq!(cache("", &["--cache", "writeback"]), "writeback");
}

#[test]
fn what_is_no_text_file_is_refused_like_a_wrong_key() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "16M", "--fs", "none"]);
    let binary = scratch.path("binary.toml");
    fs::write(&binary, b"log = \"\xff\"\n").expect("write");
    for config in [binary, scratch.path("")] {
        let output = under(&config, &["serve", text(&disk), "--nbd", "-"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(text(&config)), "{said}");
    }
}

#[test]
fn a_tour_uses_the_settings_that_it_is_given() {
    let scratch = Scratch::new();
    let good = settings(&scratch, "sandbox = \"on\"\n");
    let bad = scratch.path("bad.toml");
    fs::write(&bad, "nonsense = 1\n").expect("write");
    let tour = |config: &Path| {
        let mut command = Command::new(PLOOPCTL);
        command.args(["--config", text(config), "tour"]);
        command.env("PLOOP_CONFIG", &bad).output().expect("a tour")
    };
    assert_eq!(tour(&bad).status.code(), Some(2));
    let output = tour(&good);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn the_log_of_a_failure_is_found_until_the_disk_is_attached_again() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "16M", "--fs", "none"]);
    let config = settings(&scratch, "log = \"file\"\n");
    let mounted = || {
        let output = under(&config, &["-o", "json", "mount", text(&disk)]);
        let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (output.status.code(), said)
    };
    let (_, state) = mounted();
    let run = Path::new(state["log"].as_str().expect("a file"))
        .parent()
        .expect("a run directory");
    let kept = run.with_extension("log");
    kill9(state["keeper_pid"].as_u64().expect("a keeper"));
    eventually("it is cleaned up after", || {
        scratch.attached().is_empty() && !run.exists()
    });
    let said = || fs::read_to_string(&kept).unwrap_or_default();
    assert!(said().contains("attached as"), "{}", said());
    let image = disk.join("root.hds");
    let whole = fs::read(&image).expect("read");
    let mut bytes = whole.clone();
    bytes[64..68].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes());
    fs::write(&image, bytes).expect("write");
    assert_eq!(mounted().0, Some(6));
    assert!(said().contains("giving up"), "{}", said());
    fs::write(&image, whole).expect("write");
    assert_eq!(mounted().0, Some(0));
    assert!(!kept.exists(), "the disk is in use again");
    ok(&["umount", text(&disk)]);
    assert!(!kept.exists(), "nothing failed");
}

#[test]
fn a_mounted_disk_logs_where_it_is_told_one_line_an_event_with_its_name() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "16M", "--fs", "none"]);
    let config = settings(&scratch, "log = \"file\"\n");
    let output = under(&config, &["-o", "json", "mount", text(&disk)]);
    let state: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let log = PathBuf::from(state["log"].as_str().expect("a file"));
    assert!(
        log.ends_with("log") && log.starts_with("/run/ploop"),
        "{state}"
    );
    kill9(state["worker_pid"].as_u64().expect("a worker"));
    eventually("another worker", || {
        let disks = json(&["list"])["disks"].clone();
        let disks = disks.as_array().expect("disks");
        disks
            .iter()
            .any(|d| d["path"] == text(&disk) && d["restarts"] == 1 && d["state"] == "serving")
    });
    let said = fs::read_to_string(&log).expect("log");
    ok(&["umount", text(&disk)]);
    for line in said.lines() {
        let (time, rest) = line.split_once(' ').expect("a time");
        assert!(time.len() == 24 && time.ends_with('Z'), "{line}");
        let (word, rest) = rest.split_at(8);
        assert!(
            ["ERROR", "WARNING", "INFO"].contains(&word.trim_end()),
            "{line}"
        );
        assert!(rest.starts_with(&format!("{}: ", text(&disk))), "{line}");
    }
    assert!(
        said.contains("I/O engine"),
        "the worker's lines are there: {said}"
    );
    assert!(
        said.contains("ERROR ") && said.contains("the worker died"),
        "{said}"
    );
}
