//! `clone`: one more disk, of the same frozen files.

use super::snapshot::attached::{self, Running};
use super::snapshot::{create, mount, resolve, views};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use ploop::formats::descriptor::Descriptor;
use ploop::formats::folder::Folder;
use ploop::formats::guid::Guid;
use ploop::image::change;
use ploop::image::clone;
use ploop::image::detached::{self, Detached, random_guid};
use ploop::image::site::Site;
use ploop::image::snapshot::copy::Work;
use ploop::image::snapshot::remove::unknown;
use ploop::image::target::DESCRIPTOR;
use ploop::io::exec::{self, Engine};
use ploop::io::folder::DirFolder;
use ploop::sandbox::{self, Files, Place};
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Make a disk of a snapshot of another, in no time
///
/// Both share the frozen files, which nobody writes to from then on; each can be deleted or moved
/// on the file system without the other. Without a UUID it is the disk as it is, of which a
/// snapshot is made if there is none.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml; with @ and the UUID of a snapshot
    #[arg(value_name = "SRC[@UUID]")]
    source: PathBuf,
    /// Directory of the new disk, on the same file system; must not exist, or be empty
    #[arg(value_name = "DST")]
    to: PathBuf,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let (source, uuid) = parse(&args.source);
    let target = detached::resolve(&source)?;
    mount::refuse_view(&target)?;
    views::settle(&target);
    views::refuse_temporary(&target, uuid)?;
    let running = attached::find(&source)?;
    let target = match &running {
        None => resolve(&source)?,
        Some(running) => running.target.clone(),
    };
    let mut meter = Meter::new(global.progress, &cancel);
    let dir = target.open_dir()?;
    let mut site = Site::new(&args.to)?;
    site.refuse_elsewhere(&dir)?;
    let uuid = match &running {
        None => uuid,
        Some(running) => Some(frozen(running, uuid, &mut meter)?),
    };
    confine(&dir, &site)?;
    let place = |e: Error| e.at(target.path().display());
    let done = match (running, uuid) {
        (Some(_), Some(uuid)) => share(&DirFolder::new(dir), uuid, &mut site),
        _ => {
            let disk = Detached::take(dir).map_err(place)?;
            let mut work = Work::new(&mut meter, &());
            disk.run(make(disk.folder(), uuid, &mut site, &mut work))
        }
    };
    let uuid = done.map_err(place)?.bare();
    let path = site.path().display().to_string();
    site.finish()?;
    let source = target.path().display().to_string();
    Ok(Answer::new(
        format!("{path}: a clone of {source}, snapshot {uuid}"),
        json!({ "path": path, "uuid": uuid, "source": source }),
    ))
}

/// A disk, and the snapshot of it that is meant. What follows the last @ and is no UUID belongs to
/// the path.
fn parse(source: &Path) -> (PathBuf, Option<Guid>) {
    let text = source.to_str().and_then(|text| text.rsplit_once('@'));
    let parsed = text.and_then(|(path, uuid)| Some((path.into(), uuid.parse().ok()?)));
    match parsed {
        Some((path, uuid)) => (path, Some(uuid)),
        None => (source.to_path_buf(), None),
    }
}

/// Leaves this process the two disks, and the removal of a directory that it made in vain.
fn confine(source: impl AsFd, site: &Site) -> Result<()> {
    let place = |dir, files| Place { dir, files };
    let places = [
        place(source.as_fd(), Files::Change),
        place(site.folder().as_fd(), Files::Change),
        place(site.parent(), Files::Directories),
    ];
    match sandbox::enter_all(&places) {
        Err(e) if e.kind() != Kind::Unsupported => Err(e),
        _ => Ok(()),
    }
}

/// Makes the clone; the snapshot that it is of.
async fn make(
    from: &DirFolder,
    uuid: Option<Guid>,
    site: &mut Site,
    work: &mut Work<'_>,
) -> Result<Guid> {
    // Its folder was fsynced when it was locked.
    let disk = change::settle_synced(from).await?;
    let (disk, uuid, made) = match uuid {
        Some(uuid) if disk.shot(uuid).is_none() => return Err(unknown(uuid)),
        Some(uuid) => (disk, uuid, false),
        None => point(from, disk, work).await?,
    };
    match clone_of(from, &disk, uuid, site).await {
        Err(e) if made => Err(e.at(format!(
            "snapshot {} was made for it and stays",
            uuid.bare()
        ))),
        done => done.map(|()| uuid),
    }
}

/// Makes the clone of a disk that is in use, whose snapshots others may change; which it is of.
fn share(from: &DirFolder, uuid: Guid, site: &mut Site) -> Result<Guid> {
    let made = exec::run(Engine::detect().0, async {
        let disk = change::read(from, DESCRIPTOR).await?;
        // Its rename may still be lost, with what it calls frozen.
        from.sync().await?;
        clone_of(from, &disk, uuid, site).await
    });
    made?.map(|()| uuid)
}

async fn clone_of(from: &DirFolder, disk: &Descriptor, uuid: Guid, site: &mut Site) -> Result<()> {
    let random = random_guid();
    site.expect(clone::files(disk, uuid, random)?);
    let made = clone::clone(from, disk, uuid, site.folder(), random);
    site.fill(made).await.map(|_| ())
}

/// The snapshot of an attached disk that is meant: that of this moment where none is named.
fn frozen(running: &Running, uuid: Option<Guid>, meter: &mut Meter<'_>) -> Result<Guid> {
    if let Some(uuid) = uuid {
        return Ok(uuid);
    }
    let uuid = random_guid();
    running.freeze(uuid, false)?;
    // What is temporary cannot be shared, and can go now that no running top stands on it.
    let merged = running.remove_temporaries(None, meter);
    let made = format!("snapshot {} was made for it and stays", uuid.bare());
    merged
        .map(|_| uuid)
        .map_err(|e| Error::new(e.kind(), format!("{e}; {made}")))
}

/// The disk as it is now, as a snapshot, and whether that was made for it.
async fn point(
    from: &DirFolder,
    disk: Descriptor,
    work: &mut Work<'_>,
) -> Result<(Descriptor, Guid, bool)> {
    if let Some(uuid) = clone::as_it_is(from, &disk).await? {
        return Ok((disk, uuid, false));
    }
    let uuid = random_guid();
    Ok((create(from, uuid, work).await?, uuid, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_uuid_after_an_at_sign_names_a_snapshot() {
        let uuid = "9b2c1e60-5f0e-4d1c-8a55-0d5f4e3c2b1a";
        let guid: Guid = uuid.parse().expect("a GUID");
        for text in [format!("a@b@{uuid}"), format!("a@b@{{{uuid}}}")] {
            assert_eq!(parse(Path::new(&text)), ("a@b".into(), Some(guid)));
        }
        for text in ["a", "a@b", "a@"] {
            assert_eq!(parse(Path::new(text)), (text.into(), None));
        }
    }
}
