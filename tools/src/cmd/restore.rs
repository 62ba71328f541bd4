//! `restore-descriptor`: the DiskDescriptor.xml of images that lost theirs.

use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::size;
use ploop::formats::descriptor::Descriptor;
use ploop::image::change;
use ploop::image::convert::version::copy_name;
use ploop::image::detached::random_guid;
use ploop::image::kept;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::members;
use ploop::image::restore;
use ploop::image::snapshot::names;
use ploop::image::target::{Format, Source};
use ploop::image::views;
use ploop::io::beneath;
use ploop::io::exec::{self, Engine};
use ploop::io::folder::DirFolder;
use ploop::io::lock::{self, DISK_LOCK};
use ploop::sandbox::Files;
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub const EXAMPLE: &str = "\
Example: ploopctl restore-descriptor /var/lib/ct/100 root.hds 'root.hds.{a}'";

/// Make a lost DiskDescriptor.xml anew, from the images in DIR
///
/// Which file stands on which is not in the images: name them base first. The last is the disk as it
/// is now, the others are snapshots, with new UUIDs. A descriptor that is there is never replaced.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of the images
    dir: PathBuf,
    /// Names of the images, base first; may be left out where there is one
    #[arg(value_name = "FILE")]
    files: Vec<String>,
    /// Format of the base
    #[arg(long, default_value = "ploop")]
    format: FormatArg,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let at = |e: std::io::Error| Error::from(e).at(args.dir.display());
    let path = args.dir.canonicalize().map_err(at)?;
    let files = match args.files.is_empty() {
        true => only_image(&path)?,
        false => args.files.clone(),
    };
    let mut meter = Meter::new(global.progress, &cancel);
    let dir = beneath::directory(&path)?;
    confine(&dir, Files::Change)?;
    let place = |e: Error| e.at(path.display());
    let disk = write(args, &files, dir, &mut meter).map_err(place)?;
    let bytes = change::size(&disk);
    let uuids = disk.shots().iter().map(|shot| shot.guid);
    let uuids: Vec<String> = uuids
        .filter(|guid| *guid != disk.top())
        .map(|guid| guid.bare())
        .collect();
    Ok(Answer::new(
        format!(
            "{}: {}, {} snapshots",
            path.display(),
            size::show(bytes),
            uuids.len()
        ),
        json!({
            "path": path.display().to_string(),
            "files": files,
            "snapshots": uuids,
            "size": bytes,
            "cluster": disk.cluster().bytes(),
        }),
    ))
}

fn write(
    args: &Args,
    files: &[String],
    dir: std::os::fd::OwnedFd,
    meter: &mut Meter<'_>,
) -> Result<Descriptor> {
    let _disk = lock::lock_descriptor(&dir, Instant::now())?;
    let folder = DirFolder::new(dir);
    exec::run(Engine::Poll, restore::refuse_described(&folder))??;
    let _top = lock_top(args, files, &folder)?;
    exec::run(Engine::Poll, async {
        let base = args.format.into();
        let disk = restore::describe(&folder, files, base, random_guid, meter).await?;
        restore::write(&folder, &disk).await?;
        Ok(disk)
    })?
}

/// Nobody may write meanwhile to what is going to be the top.
fn lock_top(args: &Args, files: &[String], folder: &DirFolder) -> Result<Option<DiskLocks>> {
    let Some(top) = files.last() else {
        return Ok(None);
    };
    let format = match files.len() {
        1 => args.format.into(),
        _ => Format::Ploop,
    };
    let source = Source::Bare {
        name: top.into(),
        format,
    };
    DiskLocks::take(folder, &source, Access::Read).map(Some)
}

/// The file that the disk is, where there is only one that it can be.
fn only_image(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::from(e).at(dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let side = [names::FILE, names::ASIDE, kept::FILE, kept::ASIDE];
        let moves = [
            members::MIGRATION,
            members::MIGRATION_ASIDE,
            members::WITNESS,
        ];
        let own = [DISK_LOCK, views::FOLDER]
            .into_iter()
            .chain(side)
            .chain(moves);
        let known =
            own.into_iter().any(|own| name == own) || name.starts_with("DiskDescriptor.xml");
        if !known && entry.file_type()?.is_file() {
            found.push(name);
        }
    }
    let copies: Vec<String> = found.iter().map(|name| copy_name(name)).collect();
    found.retain(|name| !copies.contains(name));
    found.sort();
    match found.len() {
        1 => Ok(found),
        0 => Err(Error::new(
            Kind::NotFound,
            format!("{}: holds no image", dir.display()),
        )),
        _ => Err(Error::new(
            Kind::Usage,
            format!(
                "{}: holds {}; name those that are the disk, base first",
                dir.display(),
                found.join(", ")
            ),
        )),
    }
}
