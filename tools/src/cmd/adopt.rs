//! `adopt`: a bare image becomes a disk.
//!
//! This process never looks into the image: it asks `check` and `info`, which confine themselves
//! before they do.

use super::FormatArg;
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::size;
use clap::ValueEnum;
use ploop::formats::limits;
use ploop::formats::units::ClusterSize;
use ploop::image::adopt::{Candidate, Shape};
use ploop::serve::supervise::message::Failure;
use ploop::{Error, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// How long a signal may go unnoticed.
const BLINK: Duration = Duration::from_millis(50);

/// Make a disk around a bare image: DIR with the image and a DiskDescriptor.xml
///
/// The image is checked first, then moved into DIR, which must be on its file system. When
/// anything fails, the image is where it was. The disk's snapshots are files of their own; those that a
/// qcow2 image keeps in itself stay in it, and are not among them.
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
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let mut meter = Meter::new(global.progress, &cancel);
    let candidate = Candidate::new(&args.file, args.format.into())?;
    cancel.or(refuse_damaged(candidate.file(), args.format, &mut meter))?;
    let (shape, inner) = cancel.or(shape(candidate.file(), args.format, &mut meter))?;
    drop(meter);
    cancel.check()?;
    let dir = candidate.adopt(&args.dir, shape)?;
    let image = dir.join(ploop::image::init::IMAGE);
    let stays = match inner {
        0 => String::new(),
        n => format!(
            "; {n} snapshots stay inside the image, where only `info` and other programs see them"
        ),
    };
    Ok(Answer::new(
        format!("{}: {}{stays}", dir.display(), size::show(shape.size)),
        json!({
            "path": dir.display().to_string(),
            "image": image.display().to_string(),
            "inner_snapshots": inner,
            "size": shape.size,
            "cluster": shape.cluster.bytes(),
        }),
    ))
}

fn refuse_damaged(file: &Path, format: FormatArg, meter: &mut Meter<'_>) -> Result<()> {
    let report = ask("check", file, format, meter)?;
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

/// What the disk will be, and the number of snapshots that the image keeps in itself.
fn shape(file: &Path, format: FormatArg, meter: &mut Meter<'_>) -> Result<(Shape, usize)> {
    let info = ask("info", file, format, meter)?;
    refuse_others(&info["qcow2"]).map_err(|e| e.at(file.display()))?;
    let own = &info["layers"][0]["cluster"];
    let number = |value: &Value, what: &str| {
        let missing = || Error::invalid(format!("{}: info shows no {what}", file.display()));
        value.as_u64().ok_or_else(missing)
    };
    let cluster = if own.is_null() { &info["cluster"] } else { own };
    let cluster = number(cluster, "cluster")?;
    let shape = Shape {
        size: number(&info["size"], "size")?,
        cluster: ClusterSize::new(cluster).map_err(|_| refuse_cluster(file, cluster))?,
    };
    let inner = info["qcow2"]["snapshots"].as_array();
    Ok((shape, inner.map_or(0, Vec::len)))
}

/// What a disk of its own stands on, its descriptor says, and an image that is adopted is alone there.
fn refuse_others(said: &Value) -> Result<()> {
    let features = said["features"].as_array().into_iter().flatten();
    let is_outside = features.into_iter().any(|f| f == "external-data");
    let what = match (&said["backing_file"], &said["data_file"]) {
        (Value::String(other), _) => format!("stands on another file (\"{other}\")"),
        (_, Value::String(other)) => format!("has its data in another file (\"{other}\")"),
        _ if is_outside => "has its data in another file, which it does not name".into(),
        _ => return Ok(()),
    };
    Err(Error::unsupported(format!(
        "{what}, and only an image that is whole is adopted; `qemu-img convert -O qcow2` makes one of both"
    )))
}

fn refuse_cluster(file: &Path, cluster: u64) -> Error {
    Error::unsupported(format!(
        "{}: clusters of {cluster} bytes, and those of a disk have {} or more; `qemu-img convert -O \
         qcow2 -o cluster_size=64k` makes an image with others",
        file.display(),
        limits::CLUSTER_MIN
    ))
}

/// What a verb of ours says about the image; its error becomes ours, and its progress.
fn ask(verb: &str, file: &Path, format: FormatArg, meter: &mut Meter<'_>) -> Result<Value> {
    let progress = if meter.is_wanted() { "json" } else { "none" };
    let mut child = Command::new(std::env::current_exe()?)
        .args(["-o", "json", "--progress", progress])
        .args([verb, "--format", &name(format), "--"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Error::from(e).at(format!("ploopctl {verb}")))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let said = std::thread::spawn(|| out.map(|mut out| read_all(&mut out)));
    let last = follow(err.map(lines), meter);
    if last.is_err() {
        // A signal to us alone did not reach it, and it would go on to its end.
        let _ = child.kill();
    }
    let status = child.wait();
    let (said, last) = (said.join().ok().flatten().unwrap_or_default(), last?);
    if let Ok(value) = serde_json::from_slice(&said) {
        return Ok(value);
    }
    let word = |field: &str| last["error"][field].as_str().map(str::to_string);
    let failure = Failure {
        kind: word("kind").unwrap_or_default(),
        message: word("message").unwrap_or_else(|| format!("ploopctl {verb}: {status:?}")),
    };
    Err(failure.into())
}

fn read_all(from: &mut impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = from.read_to_end(&mut all);
    all
}

/// Lines as they come.
fn lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (to, lines) = channel();
    std::thread::spawn(move || {
        let from = BufReader::new(from).lines();
        let mut from = from.map_while(std::result::Result::ok);
        from.try_for_each(|line| to.send(line))
    });
    lines
}

/// Tells progress as it comes; the last line that is none. Fails as soon as a signal came.
fn follow(from: Option<Receiver<String>>, meter: &mut Meter<'_>) -> Result<Value> {
    let mut last = Value::Null;
    while let Some(from) = &from {
        match from.recv_timeout(BLINK) {
            Ok(line) if meter.relay(&line)? => {}
            Ok(line) => last = serde_json::from_str(&line).unwrap_or_default(),
            Err(RecvTimeoutError::Timeout) => meter.tick()?,
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(last)
}

fn name(format: FormatArg) -> String {
    let value = format.to_possible_value().expect("every format has a name");
    value.get_name().to_string()
}
