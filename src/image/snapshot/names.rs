//! Names: what people call snapshots. A side file of the disk, which may be lost or stale.
//!
//! A snapshot is its UUID; a name is a remark. Of what the file says nothing is believed but that:
//! a name that could not have been given is not shown, one of no snapshot goes with the next write.

use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder::{self, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::{Error, Kind, Result};
use std::collections::BTreeMap;

/// The side file.
pub const FILE: &str = "snapshots.json";
/// Where it is written before it is renamed. Found without its writer, a draft.
pub const ASIDE: &str = "snapshots.json.tmp";
/// Bytes that are read at all.
pub(crate) const FILE_MAX: u64 = 1 << 20;
/// Characters of a name.
const NAME_MAX: usize = 128;

/// Names of snapshots.
#[derive(Debug, Clone, Default)]
pub struct Names(BTreeMap<Guid, String>);

/// Whether snapshots can be called that: `Usage` when it is empty, too long, or not shown as typed.
pub fn check(name: &str) -> Result<()> {
    let shown = !name.is_empty() && name.trim() == name && !name.contains(char::is_control);
    if shown && name.chars().count() <= NAME_MAX {
        return Ok(());
    }
    Err(Error::new(
        Kind::Usage,
        format!("a name has 1 to {NAME_MAX} characters that can be printed"),
    ))
}

impl Names {
    /// Those of a disk; none where the file is lost or is not what it should be.
    pub async fn read<F: Folder>(folder: &F) -> Self {
        let text = folder::load(folder, FILE, FILE_MAX).await.ok();
        let all: Option<BTreeMap<String, String>> =
            text.and_then(|text| serde_json::from_slice(&text).ok());
        let all = all.unwrap_or_default().into_iter();
        let sound = all.filter(|(_, name)| check(name).is_ok());
        Self(
            sound
                .filter_map(|(uuid, name)| Some((uuid.parse().ok()?, name)))
                .collect(),
        )
    }

    /// What a snapshot is called.
    pub fn name(&self, uuid: Guid) -> Option<&str> {
        self.0.get(&uuid).map(String::as_str)
    }

    /// Names a snapshot of `disk`, for good. The caller has the disk to itself, or is the one who
    /// changes it.
    pub async fn set<F: Folder>(
        folder: &F,
        disk: &Descriptor,
        uuid: Guid,
        name: &str,
    ) -> Result<()> {
        check(name)?;
        let mut all = Self::read(folder).await.0;
        all.retain(|uuid, _| disk.shot(*uuid).is_some() && *uuid != disk.top());
        all.insert(uuid, name.to_string());
        let all: BTreeMap<String, String> = all.into_iter().map(|(u, n)| (u.bare(), n)).collect();
        let mut text = serde_json::to_vec_pretty(&all).map_err(std::io::Error::from)?;
        text.push(b'\n');
        folder.remove(ASIDE).await?;
        folder::save(folder, ASIDE, &text).await?;
        folder.rename(ASIDE, FILE).await?;
        folder.sync().await
    }
}
