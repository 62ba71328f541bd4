//! Rules about the sources themselves: who may import what, what a file begins with, which
//! licences are linked. A rule that a reader must remember is a rule that is broken in a month.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files under `place` (a folder or one file) must not say any of `words`.
struct Rule {
    place: &'static str,
    words: &'static [&'static str],
    why: &'static str,
}

const SYSTEM: &[&str] = &[
    "libc::",
    "rustix::",
    "std::fs",
    "std::net",
    "std::os",
    "std::process",
];

const RULES: &[Rule] = &[
    Rule {
        place: "formats/src",
        words: SYSTEM,
        why: "formats make no system call",
    },
    Rule {
        place: "formats/src/ploop",
        words: &["crate::raw", "crate::qcow2", "crate::descriptor"],
        why: "formats do not know each other",
    },
    Rule {
        place: "formats/src/qcow2",
        words: &["crate::ploop", "crate::raw", "crate::descriptor"],
        why: "formats do not know each other",
    },
    Rule {
        place: "formats/src/raw.rs",
        words: &["crate::ploop", "crate::qcow2", "crate::descriptor"],
        why: "formats do not know each other",
    },
    Rule {
        place: "formats/src/descriptor",
        words: &["crate::ploop", "crate::raw", "crate::store"],
        why: "the descriptor is text and knows no image",
    },
    Rule {
        place: "src/disk.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/stack.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/merged.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/cow.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/flight.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/compact.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/hold.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/flush.rs",
        words: SYSTEM,
        why: "the engine reaches files through Store",
    },
    Rule {
        place: "src/migrate/send.rs",
        words: SYSTEM,
        why: "either side of a migration reaches files through Folder",
    },
    Rule {
        place: "src/migrate/receive.rs",
        words: SYSTEM,
        why: "either side of a migration reaches files through Folder",
    },
    Rule {
        place: "src/migrate/record.rs",
        words: SYSTEM,
        why: "either side of a migration reaches files through Folder",
    },
    Rule {
        place: "src/migrate/resolve.rs",
        words: SYSTEM,
        why: "either side of a migration reaches files through Folder",
    },
    Rule {
        place: "src/serve/nbd",
        words: TRANSPORT,
        why: "a transport knows Device only",
    },
    Rule {
        place: "src/serve/fuse",
        words: TRANSPORT,
        why: "a transport knows Device only",
    },
];

const TRANSPORT: &[&str] = &[
    "crate::disk",
    "crate::stack",
    "crate::cow",
    "crate::flush",
    "crate::image",
    "crate::io::file",
    "formats::ploop",
    "formats::raw",
    "formats::descriptor",
    "formats::layer",
    "formats::store",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file under a place; none when it does not exist.
fn sources(place: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut places = vec![root().join(place)];
    while let Some(path) = places.pop() {
        if path.is_dir() {
            places.extend(
                fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// What ships: without comments, and without the tests at the end of a file.
fn shipped(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text
        .lines()
        .enumerate()
        .take_while(|(_, line)| *line != "#[cfg(test)]");
    lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn offences(rule: &Rule, name: &str, text: &str) -> Vec<String> {
    let said = |line: &str| rule.words.iter().find(|word| line.contains(*word)).copied();
    let found = shipped(text).filter_map(|(n, line)| Some((n, said(line)?)));
    found
        .map(|(n, word)| format!("{name}:{}: {word} ({})", n + 1, rule.why))
        .collect()
}

#[test]
fn each_part_imports_only_what_its_place_allows() {
    let mut found = Vec::new();
    for rule in RULES {
        // Instruments and tests may do what they like.
        let is_test = |p: &Path| {
            p.components().any(|c| c.as_os_str() == "testkit")
                || p.file_name().is_some_and(|n| n == "tests.rs")
        };
        for path in sources(rule.place).iter().filter(|p| !is_test(p)) {
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            found.extend(offences(rule, &name, &fs::read_to_string(path).unwrap()));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn an_offence_is_found_in_code_and_not_in_comments_or_tests() {
    let rule = Rule {
        place: "",
        words: &["std::fs"],
        why: "no",
    };
    assert_eq!(
        offences(&rule, "x", "//! a\nuse std::fs;\n"),
        ["x:2: std::fs (no)"]
    );
    assert!(offences(&rule, "x", "// use std::fs;\n#[cfg(test)]\nuse std::fs;\n").is_empty());
}

#[test]
fn every_source_file_says_what_it_owns_and_is_plain_text() {
    let places = [
        "src",
        "formats",
        "tools",
        "tests",
        "benches",
        "fuzz/fuzz_targets",
        "fuzz/src",
    ];
    for path in places.iter().flat_map(|place| sources(place)) {
        let text = fs::read_to_string(&path).unwrap();
        let name = path.display();
        assert!(
            text.starts_with("//!"),
            "{name} does not begin with what it owns (//!)"
        );
        let odd = text.chars().find(|c| !c.is_ascii());
        assert_eq!(odd, None, "{name} holds a character that is not ASCII");
    }
}

/// Names in backquotes that look like those of tests: several words joined by underscores.
fn tests_named(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|word| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        word.chars().all(plain) && word.matches('_').count() >= 2
    })
}

#[test]
fn every_test_that_a_promise_names_exists() {
    let places = ["tests", "formats", "src", "tools"];
    let all: Vec<String> = places
        .iter()
        .flat_map(|place| sources(place))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let promises = fs::read_to_string(root().join("docs/PROMISES.md")).unwrap();
    let missing: Vec<&str> = tests_named(&promises)
        .filter(|name| !all.iter().any(|text| text.contains(&format!("fn {name}("))))
        .collect();
    assert!(
        tests_named(&promises).count() >= 5 && missing.is_empty(),
        "{missing:?}"
    );
}

/// Licences that we link: all of them let a user do what ours let them do.
const LICENCES: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "0BSD",
    "Unlicense",
    "CC0-1.0",
    "BSL-1.0",
    "MIT-0",
];

/// Whether an SPDX expression offers an allowed way: one side of every OR, all sides of every AND.
fn allowed(expression: &str) -> bool {
    let plain = expression.replace(['(', ')'], " ").replace('/', " OR ");
    let plain = plain.replace(" WITH LLVM-exception", "");
    plain
        .split(" AND ")
        .all(|part| part.split(" OR ").any(|one| LICENCES.contains(&one.trim())))
}

#[test]
fn every_linked_crate_has_a_permissive_licence() {
    let said = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .arg(format!(
            "--filter-platform={}-unknown-linux-gnu",
            std::env::consts::ARCH
        ))
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        said.status.success(),
        "{}",
        String::from_utf8_lossy(&said.stderr)
    );
    let metadata: Value = serde_json::from_slice(&said.stdout).unwrap();
    for package in metadata["packages"].as_array().unwrap() {
        let licence = package["license"].as_str().unwrap_or("none stated");
        assert!(allowed(licence), "{}: {licence}", package["name"]);
    }
}

#[test]
fn a_copyleft_licence_is_refused_and_a_choice_is_not() {
    assert!(allowed("MIT OR GPL-2.0") && allowed("MIT/Apache-2.0") && allowed("(MIT) AND ISC"));
    assert!(!allowed("GPL-2.0-or-later") && !allowed("MIT AND GPL-3.0") && !allowed("none stated"));
}
