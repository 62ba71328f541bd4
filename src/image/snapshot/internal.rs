//! Internal: the snapshots that a bare qcow2 image keeps in itself, of an image that is not attached.
//!
//! Each is found by its name or its ID. Whoever changes them holds the locks for writing, and the order in
//! which a change becomes true is that of [`ploop_formats::qcow2::snapshots`].

use crate::image::chain::LayerFile;
use crate::image::open;
use ploop_formats::progress::Watch;
use ploop_formats::qcow2::extension::printable;
use ploop_formats::qcow2::snapshot::Snapshot;
use ploop_formats::qcow2::snapshots::{self, Wanted};
use ploop_formats::qcow2::{list_snapshots, read_header};
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};
use std::os::fd::BorrowedFd;
use std::time::{SystemTime, UNIX_EPOCH};

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act<'a> {
    /// One of what the disk is now, with this name.
    Create(&'a str),
    /// The disk becomes what it was at this one, by its name or ID.
    Switch(&'a str),
    /// This one goes, by its name or ID.
    Delete(&'a str),
}

/// Does it; the ID of the snapshot. `NotFound` when there is none of that name or ID, `Invalid` when
/// several have the name. Blocks.
pub async fn change(
    dir: BorrowedFd<'_>,
    layer: &LayerFile,
    act: Act<'_>,
    watch: &mut dyn Watch,
) -> Result<Vec<u8>> {
    let store = open::alone(dir, layer)?;
    let done = act.run(&store, watch).await;
    // What was asked of the file lands before its lock goes.
    store.settle().await;
    done.map_err(|e| e.at(layer.display()))
}

impl Act<'_> {
    async fn run<S: Store>(self, store: &S, watch: &mut dyn Watch) -> Result<Vec<u8>> {
        match self {
            Self::Create(name) => snapshots::create(store, &wanted(name), watch).await,
            Self::Switch(point) => {
                let id = id_of(store, point).await?;
                snapshots::revert(store, &id, watch).await.map(|()| id)
            }
            Self::Delete(point) => {
                let id = id_of(store, point).await?;
                snapshots::delete(store, &id, watch).await.map(|()| id)
            }
        }
    }
}

/// Why a disk of another format has none.
pub fn not_qcow2() -> Error {
    let what = "only bare qcow2 images (--format qcow2) have snapshots of their own";
    Error::new(Kind::Usage, what)
}

/// One that is made now.
fn wanted(name: &str) -> Wanted {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    Wanted {
        name: name.into(),
        // The format counts to 2106.
        seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        nanoseconds: now.subsec_nanos(),
    }
}

/// The ID of the snapshot that is meant by `point`.
async fn id_of<S: Store>(store: &S, point: &str) -> Result<Vec<u8>> {
    let header = read_header(store).await?;
    let (all, _) = list_snapshots(store, &header).await?;
    find(&all, point).map(|snapshot| snapshot.id.clone())
}

/// The snapshot with a name, or else with that ID. `NotFound` when there is none, `Invalid` when several
/// have the name.
pub fn find<'a>(all: &'a [Snapshot], point: &str) -> Result<&'a Snapshot> {
    let is_named = |snapshot: &&Snapshot| snapshot.name == point.as_bytes();
    let mut named = all.iter().filter(is_named);
    let said = printable(point.as_bytes());
    match (named.next(), named.next()) {
        (Some(_), Some(_)) => Err(Error::invalid(format!(
            "several snapshots are called {said}: give the ID of one, which `snapshot list` shows"
        ))),
        (Some(only), None) => Ok(only),
        (None, _) => {
            let of_id = all.iter().find(|s| s.id == point.as_bytes());
            let none = || Error::new(Kind::NotFound, format!("there is no snapshot {said}"));
            of_id.ok_or_else(none)
        }
    }
}
