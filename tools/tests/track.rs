//! `track`: what its verbs say, and what they refuse.

mod common;

use common::tree::Server;
use common::{Scratch, fails, has, json, ok, skip, text};
use serde_json::Value;
use std::fs;
use std::process::Command;

fn write(server: &Server, what: &str) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "-c", what, &server.uri]);
    assert!(command.status().expect("qemu-io").success());
}

#[test]
fn an_incremental_copy_is_a_few_words_and_each_is_documented() {
    if !has("qemu-io") {
        return skip("qemu-io is missing");
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let d = text(&disk);
    let server = Server::start(&disk);
    let mut said = vec![json(&["track", "start", d, "b0", "--granularity", "4K"])];
    assert_eq!(said[0]["bytes"], 64 << 20);
    ok(&["track", "ack", d, "b0", "0"]);
    write(&server, "write -P 1 1M 8k");
    write(&server, "discard 20M 1M");
    let sealed = json(&["track", "seal", d, "b0"]);
    assert_eq!(
        (&sealed["generation"], &sealed["bytes"]),
        (&1.into(), &((1 << 20) + 8192).into())
    );
    said.push(sealed);
    let listed = ok(&["track", "extents", d, "b0", "1"]);
    assert_eq!(listed, "1048576 +8192  data\n20971520 +1048576  discard\n");
    let listed = ok(&["track", "extents", d, "b0", "1", "--max", "1", "-o", "json"]);
    said.push(serde_json::from_str(&listed).expect("one object"));
    let listed = ok(&["track", "extents", d, "b0", "1", "--from", "1G"]);
    assert_eq!(listed, "");
    let table = ok(&["track", "stat", d]);
    assert!(table.contains("b0       4K       0 B  1 (1.0M)"), "{table}");
    said.push(json(&["track", "stat", d, "b0"]));
    said.push(json(&["track", "nack", d, "b0", "1"]));
    assert_eq!(json(&["track", "seal", d, "b0"])["generation"], 2);
    said.push(json(&["track", "ack", d, "b0", "2"]));
    said.push(json(&["track", "stop", d, "b0"]));
    assert_eq!(ok(&["track", "stat", d]), "no trackers\n");
    let doc = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OUTPUT.md");
    let doc = fs::read_to_string(doc).expect("docs/OUTPUT.md");
    while let Some(value) = said.pop() {
        match value {
            Value::Object(fields) => fields.into_iter().for_each(|(name, value)| {
                assert!(doc.contains(&format!("`{name}`")), "{name}");
                said.push(value);
            }),
            Value::Array(items) => said.extend(items),
            _ => {}
        }
    }
}

#[test]
fn what_cannot_be_tracked_is_refused_by_name_and_nothing_changes() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let d = text(&disk);
    let no = fails(11, &["track", "start", d, "b0"]);
    assert!(no.contains("no attached disk"), "{no}");
    let _server = Server::start(&disk);
    ok(&["track", "start", d, "b0"]);
    for (code, words, why) in [
        (2, ["start", "a b"].as_slice(), "names no tracker"),
        (1, &["start", "b0"], "already"),
        (1, &["start", "b1", "--granularity", "3K"], "power of two"),
        (1, &["start", "b1", "--granularity", "2M"], "4K to 1M"),
        (11, &["seal", "b1"], "no tracker b1"),
        (11, &["extents", "b0", "7"], "no generation 7"),
        (11, &["ack", "b0", "7"], "no generation 7"),
        (11, &["nack", "b1", "0"], "no tracker b1"),
        (11, &["stop", "b1"], "no tracker b1"),
        (11, &["stat", "b1"], "no tracker b1"),
    ] {
        let (verb, rest) = words.split_first().expect("a verb");
        let no = fails(code, &[&["track", verb, d], rest].concat());
        assert!(no.contains(why), "{words:?}: {no}");
    }
    for n in 1..8 {
        ok(&["track", "start", d, &format!("t{n}")]);
    }
    let no = fails(4, &["track", "start", d, "t8"]);
    assert!(no.contains("stop one"), "{no}");
    // Generation 0 is one of them.
    for _ in 0..15 {
        ok(&["track", "seal", d, "b0"]);
    }
    let no = fails(4, &["track", "seal", d, "b0"]);
    assert!(no.contains("acknowledge one"), "{no}");
    ok(&["track", "ack", d, "b0", "3"]);
    assert_eq!(json(&["track", "seal", d, "b0"])["generation"], 16);
}
