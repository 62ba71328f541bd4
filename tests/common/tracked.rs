//! Tracked: the trackers of an attached disk, asked as programs do, and copies that follow them.

use super::attach::run_directory;
use super::nbd::Client;
use super::process::{eventually, ok};
use super::programs::tool;
use super::serve::{Disk, Server};
use ploop::client::Remote;
use ploop::serve::supervise::control::TrackAsk;
use ploop::tracker::Name;
use ploop::{Kind, Result};
use serde_json::Value;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// The tracker of these tests.
pub fn name() -> Name {
    "b0".parse().unwrap()
}

/// Asks the keeper of a disk, whose worker may just be dead.
pub fn ask(disk: &Disk, ask: &TrackAsk) -> Result<Value> {
    Remote::connect(&run_directory(&disk.path()))?.track(ask.clone())
}

/// Starts a tracker, of a disk whose worker may just begin to serve, or die.
pub fn start(disk: &Disk, granularity: u64) {
    let name = name();
    let granularity = Some(granularity);
    let start = TrackAsk::Start { name, granularity };
    eventually("a tracker", PATIENCE, || match ask(disk, &start) {
        Err(e) if [Kind::Busy, Kind::Io].contains(&e.kind()) => None,
        started => Some(started.unwrap()),
    });
}

/// What a generation has was copied.
pub fn done_with(disk: &Disk, generation: u64) {
    let name = name();
    ask(disk, &TrackAsk::Ack { name, generation }).unwrap();
}

/// Makes a generation: its number.
pub fn seal(disk: &Disk) -> Result<u64> {
    let said = ask(disk, &TrackAsk::Seal { name: name() })?;
    Ok(said["generation"].as_u64().unwrap())
}

/// What a generation has, asked for in pieces of so many extents.
pub fn extents(disk: &Disk, generation: u64, max: u32) -> Result<Vec<(Range<u64>, String)>> {
    let (mut found, mut from) = (Vec::new(), Some(0));
    while let Some(next) = from {
        let said = ask(
            disk,
            &TrackAsk::Extents {
                name: name(),
                generation,
                from: next,
                max: Some(max),
            },
        )?;
        for extent in said["extents"].as_array().unwrap() {
            let number = |name: &str| extent[name].as_u64().unwrap();
            let (offset, kind) = (number("offset"), extent["kind"].as_str().unwrap());
            found.push((offset..offset + number("length"), kind.to_string()));
        }
        from = said["next"].as_u64();
    }
    Ok(found)
}

/// The blocks that a range is in.
pub fn blocks_of(range: Range<u64>, granularity: u64) -> Range<u64> {
    range.start / granularity..range.end.div_ceil(granularity)
}

/// What nbdinfo says of a bitmap.
pub fn map_of(server: &Server, bitmap: &str) -> Vec<Range<u64>> {
    let mut command = tool("nbdinfo");
    command.arg(format!("--map=qemu:dirty-bitmap:{bitmap}"));
    let said = ok(command.arg("--json").arg(server.uri()));
    let runs: Value = serde_json::from_str(&said).unwrap();
    let dirty = runs.as_array().unwrap().iter().filter(|r| r["type"] == 1);
    let range = |run: &Value| {
        let start = run["offset"].as_u64().unwrap();
        start..start + run["length"].as_u64().unwrap()
    };
    dirty.map(range).collect()
}

/// A copy of a disk, brought up to date by generations.
pub struct Copy {
    /// Where it is.
    pub file: File,
    /// Bytes that were copied.
    pub bytes: u64,
}

impl Copy {
    /// An empty one, beside its disk.
    pub fn new(disk: &Disk) -> Self {
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true);
        Self {
            file: file.open(disk.beside("copy")).unwrap(),
            bytes: 0,
        }
    }

    /// Copies what a generation has. Fails where the worker died: then it is to be done again.
    pub fn take(&mut self, disk: &Disk, server: &Server, generation: u64) -> Result<()> {
        let found = extents(disk, generation, 100)?;
        let mut client = Client::connect(server.socket())?;
        for (range, _) in found {
            for at in range.clone().step_by(MIB as usize) {
                let len = (range.end - at).min(MIB);
                let data = client.read(at, len as u32)?;
                self.file.write_all_at(&data, at)?;
                self.bytes += len;
            }
        }
        Ok(())
    }

    /// Which byte is not what the disk has.
    pub fn difference(&self, server: &Server, size: u64) -> Option<u64> {
        let mut client = Client::connect(server.socket()).unwrap();
        for at in (0..size).step_by(MIB as usize) {
            let data = client.read(at, MIB as u32).unwrap();
            let mut ours = vec![0; MIB as usize];
            let got = self.file.read_at(&mut ours, at).unwrap();
            ours[got..].fill(0);
            if let Some(n) = (0..data.len()).find(|n| data[*n] != ours[*n]) {
                return Some(at + n as u64);
            }
        }
        None
    }
}
