//! `snapshot list`: the tree of a disk's snapshots.

use super::views::{self, Shown};
use crate::answer::Answer;
use crate::cmd::{FormatArg, confine};
use crate::size;
use crate::table::{self, Align};
use ploop::image::detached;
use ploop::image::snapshot::listing::{self, Entry};
use ploop::io::exec::{self, Engine};
use ploop::io::folder::DirFolder;
use ploop::sandbox::Files;
use ploop::{Kind, Result};
use serde_json::{Value, json};
use std::path::PathBuf;

/// List the snapshots of a disk, attached or not, as a tree
///
/// The current one, which the disk was last at, is marked *. EXCLUSIVE is what its file takes on
/// the host, SHARED the same of a file that other disks have, too. MOUNTED says where it is being
/// looked at. With --format qcow2 they are those that the image keeps in itself, in the order of its
/// table.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare qcow2 image
    pub(super) disk: PathBuf,
    /// Format of a bare image file: qcow2, whose own snapshots these are
    #[arg(long)]
    pub(super) format: Option<FormatArg>,
}

/// How often it is looked again: a point that goes at this moment may be in the descriptor, and its
/// file not there any more.
const AGAIN: usize = 5;

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let target = detached::resolve(&args.disk)?;
    let dir = target.open_dir()?;
    // Confined, it could not see who serves them.
    let all = ploop::image::views::all(&dir)?;
    let views = views::shown(&target, &all)?;
    confine(&dir, Files::Read)?;
    let folder = DirFolder::new(dir);
    let list = || -> Result<Vec<Entry>> { exec::run(Engine::Poll, listing::list(&folder, &all))? };
    let mut listed = list();
    for _ in 0..AGAIN {
        if !matches!(&listed, Err(e) if e.kind() == Kind::NotFound) {
            break;
        }
        listed = list();
    }
    let all = listed.map_err(|e| e.at(target.path().display()))?;
    let current = all.iter().find(|entry| entry.current);
    let json = json!({
        "path": target.path().display().to_string(),
        "current": current.map(|entry| entry.uuid.bare()),
        "snapshots": all.iter().map(|e| object(e, &views)).collect::<Vec<_>>(),
    });
    let text = match all.as_slice() {
        [] => "no snapshots\n".into(),
        all => text(all, &views),
    };
    Ok(Answer::new(text, json))
}

fn text(all: &[Entry], views: &[Shown]) -> String {
    let heads = [
        ("", Align::Left),
        ("UUID", Align::Left),
        ("NAME", Align::Left),
        ("DATE", Align::Left),
        ("EXCLUSIVE", Align::Right),
        ("SHARED", Align::Right),
        ("FILE", Align::Left),
        ("MOUNTED", Align::Left),
    ];
    let rows: Vec<[String; 8]> = all.iter().map(|e| row(e, views)).collect();
    table::render(heads, &rows)
}

fn row(entry: &Entry, views: &[Shown]) -> [String; 8] {
    let branch = match entry.depth {
        0 => String::new(),
        depth => "  ".repeat(depth - 1) + "+-",
    };
    let temporary = if entry.temporary { " (temporary)" } else { "" };
    let dash = || "-".to_string();
    let bytes = |(_, bytes): (&str, u64)| size::show(bytes);
    let [exclusive, shared] = sizes(entry);
    [
        if entry.current { "*" } else { "" }.into(),
        format!("{branch}{}{temporary}", entry.uuid.bare()),
        entry.name.clone().unwrap_or_else(dash),
        date(entry).unwrap_or_else(dash),
        bytes(exclusive),
        bytes(shared),
        entry.file.clone(),
        match of(entry, views).map(Shown::place).collect::<Vec<_>>() {
            none if none.is_empty() => dash(),
            places => places.join(", "),
        },
    ]
}

/// The views of a snapshot.
fn of<'v>(entry: &Entry, views: &'v [Shown]) -> impl Iterator<Item = &'v Shown> {
    let uuid = entry.uuid;
    views.iter().filter(move |view| view.point == uuid)
}

fn sizes(entry: &Entry) -> [(&'static str, u64); 2] {
    match entry.shared {
        false => [("exclusive", entry.allocated), ("shared", 0)],
        true => [("exclusive", 0), ("shared", entry.allocated)],
    }
}

fn date(entry: &Entry) -> Option<String> {
    let created = entry.created?;
    Some(humantime::format_rfc3339_seconds(created).to_string())
}

fn object(entry: &Entry, views: &[Shown]) -> Value {
    let mut object = json!({
        "uuid": entry.uuid.bare(),
        "parent": entry.parent.map(|parent| parent.bare()),
        "current": entry.current,
        "name": entry.name,
        "created": date(entry),
        "temporary": entry.temporary,
        "file": entry.file,
        "views": of(entry, views).map(Shown::json).collect::<Vec<_>>(),
    });
    for (name, bytes) in sizes(entry) {
        object[name] = bytes.into();
    }
    object
}
