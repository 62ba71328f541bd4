//! The tables of docs/PLOOP.md: what they say of the tool `ploop` is so, and they leave nothing out.

mod common;

use common::place::{AT_IN_USE, IN_USE, Place, UNKNOWN, image, put};
use common::{can_mount, skip, text};
use rustix::fs::{FlockOperation, flock};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/PLOOP.md");
    fs::read_to_string(path).expect("docs/PLOOP.md")
}

/// The rows of the table below a heading, as cells.
fn table(heading: &str) -> Vec<Vec<String>> {
    let document = document();
    let (_, part) = document
        .split_once(&format!("\n## {heading}\n"))
        .expect("the heading");
    let part = part.split("\n## ").next().unwrap_or_default();
    let lines = part.lines().filter(|line| line.starts_with('|'));
    let cells = |line: &str| {
        let cells = line
            .trim_matches('|')
            .split('|')
            .map(|c| c.trim().to_string());
        cells.collect::<Vec<_>>()
    };
    // The heads, and the line below them.
    lines.skip(2).map(cells).collect()
}

fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

fn is_test(name: &str) -> bool {
    let sources = [
        include_str!("ploop.rs"),
        include_str!("ploop_change.rs"),
        include_str!("ploop_tables.rs"),
        include_str!("../src/ploop/code.rs"),
    ];
    let head = format!("#[test]\nfn {name}()");
    let plain = |text: &str| text.replace("\n    ", "\n");
    sources.iter().any(|text| plain(text).contains(&head))
}

#[test]
fn every_command_and_choice_is_in_its_table_with_a_test_that_is_there() {
    let usage = Place::new().fails(38, &[]);
    let (_, rest) = usage.split_once("Commands:\n").expect("a list");
    let rest = rest.lines().take_while(|line| !line.trim().is_empty());
    let known: BTreeSet<String> = rest
        .filter_map(|line| line.split_ascii_whitespace().next())
        .map(String::from)
        .collect();
    let rows = table("Commands");
    let documented: BTreeSet<String> = rows
        .iter()
        .flat_map(|row| quoted(&row[0]))
        .map(String::from)
        .collect();
    assert_eq!(documented, known);
    let choices = table("Where 1.12 and 9.x differ");
    assert!(choices.len() > 10);
    let held = rows
        .iter()
        .map(|row| &row[2])
        .chain(choices.iter().map(|row| &row[4]));
    for cell in held {
        assert!(quoted(cell).count() > 0, "{cell}");
        for name in quoted(cell) {
            assert!(is_test(name), "{name} is no test");
        }
    }
}

#[test]
fn what_is_not_offered_says_so_with_the_code_of_its_row() {
    let place = Place::new();
    let rows = table("Not offered");
    let mut documented = BTreeSet::new();
    for row in &rows {
        let name = quoted(&row[0]).next().expect("a command");
        let code = row[2].parse().expect("a code");
        let said = place.fails(code, &[name, "-s", "1g", "--option", "DiskDescriptor.xml"]);
        assert_eq!(said.trim(), format!("ploop: not offered: {}", row[1]));
        documented.insert(name);
    }
    // Nothing is refused that is not in the table.
    let source = include_str!("../src/ploop/absent.rs");
    let lists = source
        .split("names: &[")
        .skip(1)
        .filter_map(|s| s.split(']').next());
    let known: BTreeSet<&str> = lists
        .flat_map(|list| list.split('"').skip(1).step_by(2))
        .collect();
    assert_eq!(documented, known);
}

/// What the words in braces of the table of exit codes stand for.
struct Words {
    disks: BTreeMap<&'static str, String>,
    held: Vec<File>,
}

impl Words {
    /// Disks that need no device.
    fn new(place: &Place) -> Self {
        let mut disks = BTreeMap::new();
        for name in ["disk", "locked", "dirty", "broken", "badxml"] {
            disks.insert(name, place.disk(name));
        }
        let lock = File::create(place.path("locked/DiskDescriptor.xml.lck")).expect("create");
        flock(&lock, FlockOperation::LockExclusive).expect("locked");
        put(&image(&disks["dirty"]), AT_IN_USE, &IN_USE.to_le_bytes());
        put(&image(&disks["broken"]), 64, &77u32.to_le_bytes());
        fs::write(&disks["badxml"], "<Parallels_disk_image>").expect("write");
        disks.insert("uuid", UNKNOWN.into());
        Self {
            disks,
            held: vec![lock],
        }
    }

    /// Those that do.
    fn attach(&mut self, place: &Place) {
        for name in ["mounted", "held", "badfs"] {
            let xml = place.disk_of(name, &["-s", "128m", "-P"]);
            let point = place.point(&format!("{name}-point"));
            if name == "badfs" {
                place.ok(&["mount", &xml]);
                let device = device(place, &xml);
                let wrong = ["-w", "-R", "clri <11>", &device];
                let broken = Command::new("debugfs").args(wrong).output();
                assert!(broken.expect("debugfs").status.success());
                place.ok(&["umount", &xml]);
            } else {
                place.ok(&["mount", "-m", &point, &xml]);
                self.held
                    .extend(File::create(Path::new(&point).join("held")).ok());
            }
            self.disks.insert(name, xml);
        }
        let device = device(place, &self.disks["mounted"]);
        self.disks.insert("device", device);
    }

    /// A command of the table; none when it needs what is not there.
    fn fill(&self, command: &str, dir: &Path) -> Option<Vec<String>> {
        let words = command.split_ascii_whitespace().skip(1).map(|word| {
            let mut word = word.replace("{dir}", text(dir));
            for (name, path) in &self.disks {
                word = word.replace(&format!("{{{name}}}"), path);
            }
            let open = word.starts_with('{') && word != UNKNOWN;
            (!open).then_some(word)
        });
        words.collect()
    }
}

fn device(place: &Place, xml: &str) -> String {
    let said = place.ok(&["info", "-d", xml]);
    let line = said.lines().next().expect("a line");
    line.split_ascii_whitespace()
        .nth(1)
        .expect("a device")
        .to_string()
}

#[test]
fn every_exit_code_is_given_or_cannot_arise() {
    let place = Place::new();
    let mut words = Words::new(&place);
    let attached = can_mount();
    if attached {
        words.attach(&place);
    }
    let rows = table("Exit codes");
    let mut given = 0;
    for (n, row) in rows.iter().enumerate() {
        let code: i32 = row[0].parse().expect("a code");
        let when = &row[2];
        if when.starts_with("cannot arise: ") {
            continue;
        }
        let example = quoted(when).next().expect("a command or a test");
        if when.starts_with("test: ") {
            assert!(is_test(example), "{example} is no test");
            continue;
        }
        let dir = place.path(&format!("dir{n}"));
        fs::create_dir(&dir).expect("a directory");
        // Making file systems needs devices.
        let makes = example.contains("init") && !example.contains("none") && code != 38;
        let command = words.fill(example, &dir).filter(|_| attached || !makes);
        let Some(command) = command else {
            skip(&format!("{example}: needs a device"));
            continue;
        };
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        place.fails(code, &command);
        given += 1;
    }
    assert!(
        given >= if attached { 20 } else { 10 },
        "{given} were tried"
    );
    // All that the tool can give are in the table.
    let source = include_str!("../src/ploop/code.rs");
    let (codes, _) = source
        .split_once("/// What was being done")
        .expect("the list of codes");
    for line in codes
        .lines()
        .filter_map(|line| line.trim().strip_suffix(','))
    {
        if let Some((_, code)) = line.split_once(" = ") {
            assert!(rows.iter().any(|row| row[0] == code), "{line} is in no row");
        }
    }
    words.held.clear();
    for name in ["mounted", "held"].iter().filter(|_| attached) {
        place.ok(&["umount", &words.disks[name]]);
    }
}
