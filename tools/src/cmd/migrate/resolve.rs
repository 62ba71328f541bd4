//! `migrate resolve`: how a side stands, and what to do where the two were parted.

use crate::answer::Answer;
use ploop::image::delete;
use ploop::image::target::Target;
use ploop::io::beneath;
use ploop::io::exec::{self, Engine};
use ploop::io::folder::DirFolder;
use ploop::io::lock;
use ploop::migrate::record::Secret;
use ploop::migrate::resolve::{self, Side, Standing};
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Say how a migration that was cut off stands on this side, or end it
///
/// Each way out takes a word that only the other side can show: so a disk is never used on both sides, and
/// never given up on both.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of the disk
    dir: PathBuf,
    #[command(flatten)]
    way: Way,
}

/// What to do.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Way {
    /// On the target: use the disk here; the word is what the sealed source says
    #[arg(long, value_name = "WORD")]
    go: Option<Secret>,
    /// On the source: use the disk here again; the word is what the target says after --discard
    #[arg(long, value_name = "WORD")]
    back: Option<Secret>,
    /// On the source: the target has the disk; the word is what it says
    #[arg(long, value_name = "WORD")]
    gone: Option<Secret>,
    /// On the target: throw away what was received
    #[arg(long)]
    discard: bool,
    /// On the source: delete a disk that has gone
    #[arg(long)]
    delete: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let place = |e: Error| e.at(args.dir.display());
    let dir = args.dir.canonicalize().map_err(|e| place(e.into()))?;
    let folder = DirFolder::new(beneath::directory(&dir)?);
    let held = lock::lock_descriptor(&folder, Instant::now()).map_err(place)?;
    let way = &args.way;
    let done = match (&way.go, &way.back, &way.gone) {
        (Some(word), ..) => work(resolve::go(&folder, word)),
        (_, Some(word), _) => work(resolve::back(&folder, word)),
        (_, _, Some(word)) => work(resolve::gone(&folder, word)),
        _ if way.discard => work(resolve::discard(&folder)),
        _ if way.delete => work(resolve::give_up(&folder)),
        _ => Ok(()),
    };
    done.map_err(place)?;
    if way.delete {
        drop(held);
        delete::delete(&Target::Bundle { dir: dir.clone() })?;
        let path = dir.display().to_string();
        return Ok(Answer::new(
            format!("{path}: deleted"),
            json!({ "path": path, "side": "deleted" }),
        ));
    }
    match work(resolve::standing(&folder)) {
        Err(e) if way.discard && e.kind() == Kind::NotFound => {
            let path = dir.display().to_string();
            let text = format!("{path}: empty; no source waits for what was here");
            Ok(Answer::new(
                text,
                json!({ "path": path, "side": "discarded", "word": null }),
            ))
        }
        standing => Ok(answer(&dir, &standing.map_err(place)?)),
    }
}

fn work<T>(what: impl Future<Output = Result<T>>) -> Result<T> {
    exec::run(Engine::detect().0, what)?
}

fn answer(dir: &Path, standing: &Standing) -> Answer {
    let path = dir.display();
    let word = standing.word.as_ref().map(ToString::to_string);
    let shown = word.as_deref().unwrap_or_default();
    let way = match standing.side {
        Side::Usable if word.is_none() => String::new(),
        Side::Usable => format!(
            "It came from another host. Should its source be in doubt: `ploopctl migrate resolve DISK --gone \
             {shown}` there.\n"
        ),
        Side::Sealed => format!(
            "It is not known whether the target has the disk. Ask there: `ploopctl migrate resolve DIR`.\n\
             If it can be used there: --gone here with the word that says.\n\
             If it is ready there: `ploopctl migrate resolve DIR --go {shown}` there finishes it; or \
             --discard there, and --back here with the word that says, ends it.\n"
        ),
        Side::Moved => format!("`ploopctl migrate resolve {path} --delete` removes it.\n"),
        Side::Receiving => {
            "The same two commands go on with it; --discard throws it away.\n".into()
        }
        Side::Ready => format!(
            "Ask at the source: `ploopctl migrate resolve DISK`. If it is sealed, it says the word for \
             `ploopctl migrate resolve {path} --go WORD`. If it can be used there, the same two commands go \
             on, or --discard here throws this copy away.\n"
        ),
        Side::Discarded => format!(
            "If the source is sealed, it can be used again: `ploopctl migrate resolve DISK --back {shown}` \
             there. This directory can go then.\n"
        ),
    };
    let text = format!("{path}: {}\n{way}", standing.side.describe());
    let json = json!({
        "path": path.to_string(),
        "session": standing.session.map(|session| session.to_string()),
        "side": standing.side.name(),
        "word": word,
    });
    Answer::new(text, json)
}
