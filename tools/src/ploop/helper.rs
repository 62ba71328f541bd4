//! `mount.ploop` and `umount.ploop`: how mount(8) and umount(8) have this done, and so fstab(5).

use super::code::{Code, Fault};
use super::disk::Which;
use super::{context, mount as verb, umount as ending};
use crate::answer;
use std::ffi::OsString;
use std::path::PathBuf;

/// `mount.ploop XML DIR [-sfnvrw] [-o OPTS] [-t TYPE]`.
pub fn mount(args: Vec<OsString>) -> Result<(), Fault> {
    answer::log_to_stderr();
    let words = Words::of(args)?;
    let [source, point] = words.plain.as_slice() else {
        let what = "usage: mount.ploop XML DIR [-o OPTIONS]";
        return Err(Fault::new(Code::Param, what));
    };
    // Not meant for the file system: mount(8) has done what they say, and gives the rest.
    let mut read_only = words.read_only;
    let options = words.options.split(',').filter(|o| !o.is_empty());
    let (access, rest): (Vec<&str>, Vec<&str>) = options.partition(|o| ["ro", "rw"].contains(o));
    read_only = access.last().map_or(read_only, |last| *last == "ro");
    let options = rest.join(",");
    let args = verb::Args {
        read_only,
        mountpoint: Some(point.clone()),
        options: Some(options).filter(|o| !o.is_empty()),
        files: vec![source.clone()],
        ..verb::Args::default()
    };
    match words.dry {
        true => Ok(()),
        false => verb::run(&args, &context(0)),
    }
}

/// `umount.ploop DIR [-flnrv]`.
pub fn umount(args: Vec<OsString>) -> Result<(), Fault> {
    answer::log_to_stderr();
    let words = Words::of(args)?;
    let [point] = words.plain.as_slice() else {
        return Err(Fault::new(Code::Param, "usage: umount.ploop DIR"));
    };
    let which = Which {
        mountpoint: Some(point.clone()),
        ..Which::default()
    };
    ending::run(&ending::Args { which }, &context(0))
}

/// The arguments that mount(8) gives.
#[derive(Debug, Default)]
struct Words {
    plain: Vec<PathBuf>,
    options: String,
    read_only: bool,
    /// To go through the motions only (-f).
    dry: bool,
}

impl Words {
    fn of(args: Vec<OsString>) -> Result<Self, Fault> {
        let mut words = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let text = arg.to_str().unwrap_or_default();
            let mut value = || args.next().unwrap_or_default();
            match text.strip_prefix('-').filter(|flags| !flags.is_empty()) {
                None => words.plain.push(arg.into()),
                Some("o") => words.options = value().to_string_lossy().into_owned(),
                Some("t" | "N") => drop(value()),
                Some(flags) if flags.chars().all(|f| "sfnvrwl".contains(f)) => {
                    words.read_only |= flags.contains('r');
                    words.dry |= flags.contains('f');
                }
                Some(_) => {
                    let what = format!("{text} is not understood");
                    return Err(Fault::new(Code::Param, what));
                }
            }
        }
        Ok(words)
    }
}
