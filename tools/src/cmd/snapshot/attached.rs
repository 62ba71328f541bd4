//! The snapshots of an attached disk: its keeper has them changed while the guest runs.

use crate::attach::{self, Attached};
use crate::meter::Meter;
use ploop::client::Remote;
use ploop::formats::descriptor::Descriptor;
use ploop::formats::guid::Guid;
use ploop::image::chain::read_descriptor;
use ploop::image::detached;
use ploop::image::replace::{Replaced, Way};
use ploop::image::snapshot::names::Names;
use ploop::image::snapshot::remove::ripe;
use ploop::image::target::Target;
use ploop::io::exec::{self, Engine};
use ploop::io::folder::DirFolder;
use ploop::{Error, Kind, Result};
use serde_json::Value;
use std::num::NonZeroU64;
use std::path::Path;

/// A disk whose keeper is asked.
pub struct Running {
    pub target: Target,
    attached: Attached,
}

/// The disk, when it is attached.
pub fn find(disk: &Path) -> Result<Option<Running>> {
    let target = detached::resolve(disk)?;
    let attached = attach::by_identity(&target.identity()?)?;
    Ok(attached.map(|attached| Running { target, attached }))
}

impl Running {
    /// Its descriptor, as it is now.
    pub fn descriptor(&self) -> Result<Descriptor> {
        let read = read_descriptor(self.target.open_dir()?);
        read.map_err(|e| self.place(e))
    }

    fn place(&self, e: Error) -> Error {
        e.at(self.target.path().display())
    }

    fn remote(&self) -> Result<Remote> {
        Remote::connect(&self.attached.run).map_err(|e| self.place(e))
    }

    /// Freezes the top under a UUID, and with `files` its file system meanwhile; what its keeper says
    /// of it.
    pub fn freeze(&self, uuid: Guid, files: bool) -> Result<Value> {
        let frozen = self.remote()?.snapshot(Some(uuid.bare()), files);
        frozen.map_err(|e| self.place(e))
    }

    /// Goes back to a point.
    pub fn switch(&self, uuid: Guid) -> Result<()> {
        let switched = self.remote()?.switch(uuid.bare());
        switched.map(drop).map_err(|e| self.place(e))
    }

    /// Keeps the name of a snapshot.
    pub fn set_name(&self, uuid: Guid, name: &str) -> Result<()> {
        let (disk, folder) = (self.descriptor()?, DirFolder::new(self.target.open_dir()?));
        exec::run(Engine::Poll, Names::set(&folder, &disk, uuid, name))?
    }

    /// Marks a point temporary.
    pub fn mark(&self, uuid: Guid) -> Result<()> {
        let marked = self.remote()?.mark(uuid.bare());
        marked.map(|_| ()).map_err(|e| self.place(e))
    }

    /// Takes a point away; what its keeper says of it.
    pub fn remove(
        &self,
        uuid: Guid,
        rate: Option<NonZeroU64>,
        meter: &mut Meter<'_>,
    ) -> Result<Value> {
        let mut far = |far| meter.hear("merging", far);
        let rate = rate.map(NonZeroU64::get);
        let removed = self.remote()?.remove(uuid.bare(), rate, &mut far);
        removed.map_err(|e| self.place(e))
    }

    /// Gives a point another file.
    pub fn replace(
        &self,
        uuid: Guid,
        file: &Path,
        rate: Option<NonZeroU64>,
        meter: &mut Meter<'_>,
    ) -> Result<Replaced> {
        // Of the file itself, and not of what a link names, it is judged there.
        let file = std::path::absolute(file)?;
        let path = file.to_str().ok_or_else(|| {
            Error::unsupported(format!("{}: a path that is not UTF-8", file.display()))
        })?;
        let mut far = |far| meter.hear("comparing", far);
        let rate = rate.map(NonZeroU64::get);
        let said = self
            .remote()?
            .replace(uuid.bare(), path.into(), rate, &mut far)
            .map_err(|e| self.place(e))?;
        let name = |which: &str| said[which].as_str().unwrap_or_default().to_string();
        Ok(Replaced {
            old: name("old"),
            new: name("new"),
            way: match said["way"].as_str() {
                Some("copied") => Way::Copied,
                _ => Way::Moved,
            },
        })
    }

    /// Takes away what is temporary and can go; how many that were. What cannot go now is no reason
    /// to fail.
    pub fn remove_temporaries(
        &self,
        rate: Option<NonZeroU64>,
        meter: &mut Meter<'_>,
    ) -> Result<usize> {
        let mut tried = Vec::new();
        let mut done = 0;
        while let Some(uuid) = ripe(&self.descriptor()?, &tried, true) {
            tried.push(uuid);
            match self.remove(uuid, rate, meter) {
                Ok(_) => done += 1,
                Err(e) if e.kind() == Kind::Cancelled => return Err(e),
                Err(e) => tracing::warn!("a temporary snapshot stays for now: {e}"),
            }
        }
        Ok(done)
    }
}
