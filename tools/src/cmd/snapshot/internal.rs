//! The snapshots that a bare qcow2 image keeps in itself.

use super::{Verb, cancelled};
use crate::answer::Answer;
use crate::attach;
use crate::cancel::Cancel;
use crate::cmd::{FormatArg, confine};
use crate::global::Global;
use crate::meter::Meter;
use crate::size;
use crate::table::{self, Align};
use ploop::formats::qcow2::extension::printable;
use ploop::formats::qcow2::snapshot::Snapshot;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::snapshot::internal::{self, Act};
use ploop::image::survey::qcow2::read;
use ploop::image::target::{Format, Target};
use ploop::io::exec::{self, Engine};
use ploop::sandbox::Files;
use ploop::{Error, Result};
use serde_json::{Value, json};
use std::os::fd::AsFd;
use std::time::{Duration, UNIX_EPOCH};

/// Does what was asked of the image.
pub fn run(verb: &Verb, format: FormatArg, global: &Global) -> Result<Answer> {
    let target = Target::resolve(verb.disk(), Some(format.into()))?;
    if !matches!(
        target,
        Target::Bare {
            format: Format::Qcow2,
            ..
        }
    ) {
        return Err(internal::not_qcow2());
    }
    match verb {
        Verb::List(_) => list(&target),
        Verb::Create(args) => {
            let name = args.own_name()?;
            let id = change(&target, Act::Create(name), global)?;
            Ok(answer(&target, &id, format!("{id}: {name}"), Some(name)))
        }
        Verb::Switch(args) => {
            let id = change(&target, Act::Switch(args.point.typed()), global)?;
            Ok(answer(&target, &id, format!("switched to {id}"), None))
        }
        Verb::Delete(args) => {
            let id = change(&target, Act::Delete(args.point.typed()), global)?;
            Ok(answer(&target, &id, format!("{id}: deleted"), None))
        }
        Verb::Merge(_) | Verb::Diff(_) | Verb::Mount(_) => Err(Error::unsupported(
            "this is not done with the snapshots of a qcow2 image",
        )),
    }
}

/// Changes the image, which nobody else uses; the ID of the snapshot.
fn change(target: &Target, act: Act<'_>, global: &Global) -> Result<String> {
    let cancel = Cancel::on_signals()?;
    attach::refuse(target)?;
    // Before the sandbox: there a terminal could not be asked for its width.
    let mut meter = Meter::new(global.progress, &cancel);
    let dir = target.open_dir()?;
    confine(&dir, Files::Write)?;
    let chain = target.chain(&dir)?;
    let place = |e: Error| e.at(target.path().display());
    let _locks = DiskLocks::take(&dir, &target.source(), Access::Write).map_err(place)?;
    let done = internal::change(dir.as_fd(), chain.top(), act, &mut meter);
    let left = "nothing is lost; `ploopctl check --repair` gives back what it took";
    let id = exec::run(Engine::Poll, done)?.map_err(|e| cancelled(e, left))?;
    Ok(printable(&id))
}

fn answer(target: &Target, id: &str, text: String, name: Option<&str>) -> Answer {
    let mut json = json!({ "path": target.path().display().to_string(), "id": id });
    if let Some(name) = name {
        json["name"] = name.into();
    }
    Answer::new(text, json)
}

fn list(target: &Target) -> Result<Answer> {
    let dir = target.open_dir()?;
    confine(&dir, Files::Read)?;
    let chain = target.chain(&dir)?;
    let place = |e: Error| e.at(target.path().display());
    let all = exec::run(Engine::Poll, read(&dir, chain.top()))?.map_err(place)?;
    let json = json!({
        "path": target.path().display().to_string(),
        "snapshots": all.snapshots.iter().map(object).collect::<Vec<_>>(),
    });
    let heads = [
        ("ID", Align::Left),
        ("NAME", Align::Left),
        ("DATE", Align::Left),
        ("SIZE", Align::Right),
    ];
    let rows: Vec<[String; 4]> = all.snapshots.iter().map(row).collect();
    let text = match rows.as_slice() {
        [] => "no snapshots\n".into(),
        rows => table::render(heads, rows),
    };
    Ok(Answer::new(text, json))
}

fn date(snapshot: &Snapshot) -> String {
    let made = UNIX_EPOCH + Duration::from_secs(snapshot.seconds.into());
    humantime::format_rfc3339_seconds(made).to_string()
}

fn row(snapshot: &Snapshot) -> [String; 4] {
    [
        printable(&snapshot.id),
        printable(&snapshot.name),
        date(snapshot),
        snapshot.size.map_or_else(|| "-".into(), size::show),
    ]
}

fn object(snapshot: &Snapshot) -> Value {
    json!({
        "id": printable(&snapshot.id),
        "name": printable(&snapshot.name),
        "created": date(snapshot),
        "size": snapshot.size,
    })
}
