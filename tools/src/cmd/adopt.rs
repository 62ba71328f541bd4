//! `adopt`: a bare image becomes a disk.
//!
//! This process never looks into the image: it asks `check` and `info`, which confine themselves
//! before they do.

use super::FormatArg;
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::size;
use clap::ValueEnum;
use ploop::formats::units::ClusterSize;
use ploop::image::adopt::{Candidate, Shape};
use ploop::serve::supervise::message::Failure;
use ploop::{Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Make a disk around a bare image: DIR with the image and a DiskDescriptor.xml
///
/// The image is checked first, then moved into DIR, which must be on its file system. When
/// anything fails, the image is where it was.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image; it will be DIR/root.hds
    file: PathBuf,
    /// Its format
    #[arg(long)]
    format: FormatArg,
    /// Directory of the disk; must not exist, or be empty
    dir: PathBuf,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let candidate = Candidate::new(&args.file, args.format.into())?;
    cancel.or(refuse_damaged(candidate.file(), args.format))?;
    let shape = cancel.or(shape(candidate.file(), args.format))?;
    cancel.check()?;
    let dir = candidate.adopt(&args.dir, shape)?;
    let image = dir.join(ploop::image::init::IMAGE);
    Ok(Answer::new(
        format!("{}: {}", dir.display(), size::show(shape.size)),
        json!({
            "path": dir.display().to_string(),
            "image": image.display().to_string(),
            "size": shape.size,
            "cluster": shape.cluster.bytes(),
        }),
    ))
}

fn refuse_damaged(file: &Path, format: FormatArg) -> Result<()> {
    let report = ask("check", file, format)?;
    match report["layers"][0]["errors"].as_u64() {
        Some(0) => Ok(()),
        errors => Err(Error::damaged(format!(
            "{}: {} errors, so it is not adopted; `ploopctl check --format {} {}` names them, \
             `--repair` mends what can be mended",
            file.display(),
            errors.unwrap_or(1),
            name(format),
            file.display()
        ))),
    }
}

fn shape(file: &Path, format: FormatArg) -> Result<Shape> {
    let info = ask("info", file, format)?;
    let own = &info["layers"][0]["cluster"];
    let number = |value: &Value, what: &str| {
        let missing = || Error::invalid(format!("{}: info shows no {what}", file.display()));
        value.as_u64().ok_or_else(missing)
    };
    let cluster = if own.is_null() { &info["cluster"] } else { own };
    Ok(Shape {
        size: number(&info["size"], "size")?,
        cluster: ClusterSize::new(number(cluster, "cluster")?)?,
    })
}

/// What a verb of ours says about the image; its error becomes ours.
fn ask(verb: &str, file: &Path, format: FormatArg) -> Result<Value> {
    let output = Command::new(std::env::current_exe()?)
        .args(["-o", "json", verb, "--format", &name(format), "--"])
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::from(e).at(format!("ploopctl {verb}")))?;
    if let Ok(value) = serde_json::from_slice(&output.stdout) {
        return Ok(value);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last: Value = said
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok())
        .unwrap_or_default();
    let word = |field: &str| last["error"][field].as_str().map(str::to_string);
    let failure = Failure {
        kind: word("kind").unwrap_or_default(),
        message: word("message").unwrap_or_else(|| format!("ploopctl {verb}: {}", output.status)),
    };
    Err(failure.into())
}

fn name(format: FormatArg) -> String {
    let value = format.to_possible_value().expect("every format has a name");
    value.get_name().to_string()
}
