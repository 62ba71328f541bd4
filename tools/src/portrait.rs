//! Portrait: what a qcow2 image says of itself, for people and for programs.
//!
//! All of it comes from the image, so nothing of it reaches a terminal as it is.

use crate::size;
use ploop::formats::qcow2::bitmap::Bitmap;
use ploop::formats::qcow2::extension::printable;
use ploop::formats::qcow2::header::{
    BITMAPS_VALID, COMPRESSION, CORRUPT, Compression, DIRTY, EXTENDED_L2, EXTERNAL_DATA,
    EXTERNAL_RAW, Header, LAZY_REFCOUNTS,
};
use ploop::formats::qcow2::snapshot::Snapshot;
use ploop::image::survey::qcow2::Said;
use serde_json::{Value, json};
use std::time::{Duration, UNIX_EPOCH};

/// For programs: the value of `qcow2` in the answer of `info`.
pub fn json(said: &Said) -> Value {
    let header = &said.header;
    let raw = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    json!({
        "compression": compression(header),
        "features": features(header),
        "backing_file": header.backing.as_deref().map(raw),
        "backing_format": header.backing_format().map(raw),
        "data_file": header.data_file().map(raw),
        "snapshots": said.snapshots.iter().map(|s| snapshot_json(s, header)).collect::<Vec<_>>(),
        "bitmaps": said.bitmaps.iter().map(bitmap_json).collect::<Vec<_>>(),
    })
}

/// For people: some lines.
pub fn text(said: &Said) -> String {
    let header = &said.header;
    let mut lines = vec![format!("packed by  {}", compression(header))];
    let features = features(header);
    if !features.is_empty() {
        lines.push(format!("features   {}", features.join(", ")));
    }
    if let Some(name) = &header.backing {
        let format = match header.backing_format() {
            Some(format) => printable(format),
            None => "format not stated".into(),
        };
        lines.push(format!("stands on  {} ({format})", printable(name)));
    }
    if header.has_data_file() {
        let name = header.data_file().map(printable);
        lines.push(format!("data in    {}", name.unwrap_or("-".into())));
    }
    for snapshot in &said.snapshots {
        lines.push(format!(
            "snapshot   {}, {}, {}",
            snapshot.printable(),
            size::show(snapshot.size.unwrap_or(header.size)),
            date(snapshot)
        ));
    }
    lines.extend(said.bitmaps.iter().map(bitmap_line));
    lines.iter().map(|line| format!("{line}\n")).collect()
}

const fn compression(header: &Header) -> &'static str {
    match header.compression {
        Compression::Deflate => "deflate",
        Compression::Zstd => "zstd",
    }
}

/// The features that are set: by name, else by bit.
fn features(header: &Header) -> Vec<String> {
    const KINDS: [(&str, &[(u64, &str)]); 3] = [
        (
            "incompatible",
            &[
                (DIRTY, "dirty"),
                (CORRUPT, "corrupt"),
                (EXTERNAL_DATA, "external-data"),
                (COMPRESSION, "compression"),
                (EXTENDED_L2, "extended-l2"),
            ],
        ),
        ("compatible", &[(LAZY_REFCOUNTS, "lazy-refcounts")]),
        (
            "autoclear",
            &[
                (BITMAPS_VALID, "bitmaps"),
                (EXTERNAL_RAW, "raw-external-data"),
            ],
        ),
    ];
    let set = &header.features;
    let sets = [set.incompatible, set.compatible, set.autoclear];
    let mut found = Vec::new();
    for ((kind, names), set) in KINDS.iter().zip(sets) {
        for bit in (0..64).filter(|bit| set >> bit & 1 == 1) {
            let name = names.iter().find(|(mask, _)| *mask == 1 << bit);
            found.push(match name {
                Some((_, name)) => (*name).to_string(),
                None => format!("{kind} bit {bit}"),
            });
        }
    }
    found
}

fn date(snapshot: &Snapshot) -> String {
    let made = UNIX_EPOCH + Duration::from_secs(snapshot.seconds.into());
    humantime::format_rfc3339_seconds(made).to_string()
}

fn snapshot_json(snapshot: &Snapshot, header: &Header) -> Value {
    json!({
        "id": String::from_utf8_lossy(&snapshot.id),
        "name": String::from_utf8_lossy(&snapshot.name),
        "size": snapshot.size.unwrap_or(header.size),
        "created": date(snapshot),
    })
}

fn bitmap_json(bitmap: &Bitmap) -> Value {
    json!({
        "name": String::from_utf8_lossy(&bitmap.name),
        "granularity": bitmap.granularity,
        "in_use": bitmap.in_use,
        "enabled": bitmap.enabled,
    })
}

fn bitmap_line(bitmap: &Bitmap) -> String {
    let state = match (bitmap.in_use, bitmap.enabled) {
        (true, _) => ", not stored properly",
        (false, true) => ", recording",
        (false, false) => "",
    };
    format!(
        "bitmap     {}, of {}{state}",
        printable(&bitmap.name),
        size::show(bitmap.granularity)
    )
}
