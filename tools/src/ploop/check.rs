//! `check`: are the images of a disk sound, and what ploop's options let be done about it.

use super::code::{Code, During, Fault, Step};
use super::disk::{self, Bare};
use super::{Context, absent, size, verb};
use ploop::image::target::Target;
use serde_json::Value;
use std::ffi::OsStr;
use std::path::PathBuf;

/// Check the images of a disk that is not attached
///
/// Without -f an image that was closed is taken for sound. A descriptor without any option stands for
/// what a mount does: what was not closed is looked at, and mended where nothing is lost.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check also what was closed, and mend what loses nothing
    #[arg(short, long)]
    force: bool,
    /// Mend also what ploop calls fatal
    #[arg(short = 'F', long = "hard-force")]
    hard: bool,
    /// Look for clusters that are used twice: accepted, they always are looked for
    #[arg(short, long = "check")]
    clusters: bool,
    /// Change nothing
    #[arg(short, long = "ro")]
    read_only: bool,
    /// Say nothing
    #[arg(short, long)]
    silent: bool,
    /// Take the mark away that says that an image is in use
    #[arg(short, long = "drop-inuse")]
    drop: bool,
    /// An image without a descriptor is raw
    #[arg(short = 'R', long)]
    raw: bool,
    /// Cluster of a raw image, in sectors: accepted, nothing depends on it
    #[arg(short, long = "blocksize", value_name = "SECTORS", value_parser = size::parse)]
    block: Option<u64>,
    /// Fill holes: accepted, holes are no harm here
    #[arg(short = 'S', long = "repair-sparse")]
    sparse: bool,
    /// Snapshot (not offered)
    #[arg(short, value_name = "UUID")]
    uuid: Option<String>,
    /// DiskDescriptor.xml, or an image
    #[arg(value_name = "XML|DELTA")]
    file: PathBuf,
}

/// What a check found.
#[derive(Debug, Default)]
struct Found {
    /// What ploop mends without being forced to.
    soft: usize,
    /// What it mends when forced hard, or not at all.
    fatal: usize,
    leaks: u64,
    converting: bool,
    lines: Vec<String>,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    if args.uuid.is_some() {
        return Err(absent::option(
            "-u",
            "the disk is checked with all that it stands on",
        ));
    }
    let disk = disk::resolve(&args.file, args.raw.then_some(Bare::Raw))?;
    let place = disk.path().display();
    if disk::of(&disk)?.is_some() {
        let what = format!("{place}: in use, which a check must not disturb");
        return Err(Fault::new(Code::PloopInUse, what));
    }
    let say = |text: &str| {
        if !args.silent {
            context.say(text);
        }
    };
    let forced = args.force || args.hard;
    let drop = args.drop || args.is_default(&disk);
    let dirty = is_dirty(&disk)?;
    if !dirty && !forced {
        say(&format!("{place}: closed cleanly, check is skipped"));
        return Ok(());
    }
    let found = Found::of(&check(&disk, &[])?);
    found.lines.iter().for_each(|line| say(line));
    if let Some(fault) = verdict(args, &found, dirty, drop) {
        return Err(Fault::new(fault.code, format!("{place}: {}", fault.text)));
    }
    if !dirty && found.soft + found.fatal == 0 && found.leaks == 0 || args.read_only {
        return Ok(());
    }
    let words: &[&str] = match args.hard {
        true => &["--repair", "--force"],
        false => &["--repair"],
    };
    let left = Found::of(&check(&disk, words)?);
    match left.soft + left.fatal {
        0 => Ok(()),
        n => Err(Fault::new(
            Code::PloopFmt,
            format!("{place}: {n} errors are left"),
        )),
    }
}

impl Args {
    /// Whether ploop's own choice of options holds.
    fn is_default(&self, disk: &Target) -> bool {
        let given = self.force || self.hard || self.clusters || self.read_only || self.sparse;
        matches!(disk, Target::Bundle { .. }) && !given
    }
}

/// What stands against mending it, if anything does.
fn verdict(args: &Args, found: &Found, dirty: bool, drop: bool) -> Option<Fault> {
    let fault = |code, text| Some(Fault::new(code, text));
    if found.converting {
        return fault(Code::Ebusy, "a conversion of it was interrupted");
    }
    if found.fatal > 0 && (!args.hard || args.read_only) {
        return fault(Code::PloopFmt, "it is damaged; -F mends it");
    }
    if found.soft > 0 && args.read_only {
        return fault(Code::PloopFmt, "it is damaged, and nothing may be written");
    }
    match (dirty, drop, args.read_only) {
        (true, false, _) => fault(Code::PloopInUse, "in use, or not closed; -d mends that"),
        (true, true, true) => fault(Code::Write, "not closed, and nothing may be written"),
        _ => None,
    }
}

fn check(disk: &Target, more: &[&str]) -> Result<Value, Fault> {
    let mut words = vec![OsStr::new("check"), disk.path().as_os_str()];
    words.extend(format(disk).iter().chain(more).map(OsStr::new));
    verb(&words).during(Step::Check)
}

fn format(disk: &Target) -> &'static [&'static str] {
    use ploop::image::target::Format;
    match disk {
        Target::Bundle { .. } => &[],
        Target::Bare {
            format: Format::Raw,
            ..
        } => &["--format", "raw"],
        Target::Bare { .. } => &["--format", "ploop"],
    }
}

/// Whether an image was not closed.
fn is_dirty(disk: &Target) -> Result<bool, Fault> {
    let mut words = vec![OsStr::new("info"), disk.path().as_os_str()];
    words.extend(format(disk).iter().map(OsStr::new));
    let said = verb(&words).during(Step::Check)?;
    let layers = said["layers"].as_array().cloned().unwrap_or_default();
    Ok(layers.iter().any(|layer| layer["in_use"] == true))
}

impl Found {
    fn of(said: &Value) -> Self {
        let mut found = Self::default();
        for layer in said["layers"].as_array().into_iter().flatten() {
            let file = layer["file"].as_str().unwrap_or_default();
            found.leaks += layer["leaks"].as_u64().unwrap_or(0);
            for finding in layer["findings"].as_array().into_iter().flatten() {
                found.count(file, finding);
            }
        }
        found
    }

    fn count(&mut self, file: &str, finding: &Value) {
        let text = |name: &str| finding[name].as_str().unwrap_or_default();
        self.lines.push(format!("{file}: {}", text("message")));
        match (text("kind"), text("severity")) {
            ("unclean", _) => {}
            ("converting", _) => self.converting = true,
            ("beyond-device" | "ragged-tail", "error") => self.soft += 1,
            (_, "error") => self.fatal += 1,
            _ => {}
        }
    }
}
