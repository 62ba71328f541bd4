//! The snapshots of an attached disk: its keeper has them changed while the guest runs.

use crate::attach::{self, Attached};
use crate::meter::Meter;
use ploop::client::Remote;
use ploop::formats::descriptor::{Descriptor, Mark};
use ploop::formats::guid::Guid;
use ploop::formats::progress::{Progress, Watch};
use ploop::image::chain::read_descriptor;
use ploop::image::detached;
use ploop::image::snapshot::names::Names;
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

    /// Freezes the top under a UUID; what its keeper says of it.
    pub fn freeze(&self, uuid: Guid) -> Result<Value> {
        let frozen = self.remote()?.snapshot(Some(uuid.bare()));
        frozen.map_err(|e| self.place(e))
    }

    /// Keeps the name of a snapshot.
    pub fn set_name(&self, uuid: Guid, name: &str) -> Result<()> {
        let (disk, folder) = (self.descriptor()?, DirFolder::new(self.target.open_dir()?));
        exec::run(Engine::Poll, Names::set(&folder, &disk, uuid, name))?
    }

    /// Takes a point away; what its keeper says of it.
    pub fn remove(
        &self,
        uuid: Guid,
        rate: Option<NonZeroU64>,
        meter: &mut Meter<'_>,
    ) -> Result<Value> {
        let mut far = |far: ploop::serve::supervise::control::Far| {
            meter.tell(Progress {
                phase: "merging",
                done: far.done,
                total: far.total,
            })
        };
        let rate = rate.map(NonZeroU64::get);
        let removed = self.remote()?.remove(uuid.bare(), rate, &mut far);
        removed.map_err(|e| self.place(e))
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
        while let Some(uuid) = ripe(&self.descriptor()?, &tried) {
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

/// A temporary point that the running top does not stand on, nor more than one other.
fn ripe(disk: &Descriptor, tried: &[Guid]) -> Option<Guid> {
    let can_go = |guid| {
        let mut children = disk.children(guid).map(|shot| shot.guid);
        let first = children.next();
        children.next().is_none() && first != Some(disk.top())
    };
    let marked = disk.shots().iter();
    let marked = marked.filter(|shot| shot.mark == Some(Mark::Temporary));
    let mut ripe = marked.map(|shot| shot.guid);
    ripe.find(|guid| !tried.contains(guid) && can_go(*guid))
}
