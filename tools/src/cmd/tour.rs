//! `tour`: the newcomer's two minutes. Makes a disk, uses it, kills the process that serves it in
//! the middle of a write, freezes it, spoils it, goes back, clones it, moves the clone as if to another
//! host, and finds every byte again.
//! Everything happens in a temporary folder.

use super::doctor::is_on_path;
use super::mount::need_privilege;
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::nbd::Client;
use crate::{attach, size};
use ploop::{Error, Kind, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// See it work: make a disk, kill its server, freeze it, spoil it, go back, find every byte again
///
/// As root the disk is mounted; otherwise it is served over NBD. Needs two minutes at most and
/// leaves nothing.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Virtual size of the tour's disk.
const DISK: u64 = 256 << 20;
/// Written in all, and in one go.
const DATA: u64 = 64 << 20;
const CHUNK: u64 = 1 << 20;
/// Overwritten after the disk was frozen.
const SPOILED: u64 = 8 << 20;

/// What was done, and how long it took.
#[derive(Debug)]
struct Diary<'c> {
    steps: Vec<(String, Duration)>,
    meter: Meter<'c>,
}

impl Diary<'_> {
    fn step<T>(&mut self, what: impl Into<String>, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let what = what.into();
        self.meter.begin(&what)?;
        let start = Instant::now();
        let done = work().map_err(|e| e.at(&what))?;
        self.steps.push((what, start.elapsed()));
        Ok(done)
    }

    fn text(&self) -> String {
        let line = |(what, time): &(String, Duration)| {
            format!("{:>9.1} ms  {what}\n", time.as_secs_f64() * 1000.0)
        };
        let lines: String = self.steps.iter().map(line).collect();
        lines + "every byte was found again\n"
    }

    fn json(&self) -> Value {
        let step = |(what, time): &(String, Duration)| json!({ "what": what, "microseconds": time.as_micros() as u64 });
        json!({ "steps": self.steps.iter().map(step).collect::<Vec<_>>() })
    }
}

/// A temporary folder that detaches its disk before it goes.
struct Folder {
    dir: PathBuf,
    /// The settings that the tour was told to use.
    config: Option<PathBuf>,
}

impl Folder {
    fn new(config: Option<PathBuf>) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("ploop-tour-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(|e| Error::from(e).at(dir.display()))?;
        Ok(Self { dir, config })
    }

    fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// This very program.
    fn command(&self) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        Ok(command)
    }

    /// Runs it to its end, as a person would.
    fn ploopctl(&self, args: &[&str]) -> Result<String> {
        let output = self.command()?.args(args).output()?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout)
                .trim_end()
                .to_string()),
            false => {
                let said = String::from_utf8_lossy(&output.stderr)
                    .trim_end()
                    .to_string();
                Err(Error::new(Kind::Io, said))
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for disk in [self.disk(), self.dir.join("moved")] {
            if let Ok(attached) = attach::find(&disk) {
                let _ = attach::stop(&attached);
            }
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Does it.
pub fn run(_: &Args, global: &Global) -> Result<Answer> {
    global.settings()?;
    let cancel = Cancel::on_signals()?;
    let folder = Folder::new(global.config.clone())?;
    let mut diary = Diary {
        steps: Vec::new(),
        meter: Meter::new(global.progress, &cancel),
    };
    let as_root = need_privilege("tour").is_ok() && is_on_path("mkfs.ext4");
    match as_root {
        true => cancel.or(mounted(&folder, &mut diary))?,
        false => cancel.or(served(&folder, &mut diary))?,
    }
    Ok(Answer::new(diary.text(), diary.json()))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::invalid("the temporary folder's name is not UTF-8"))
}

fn mounted(folder: &Folder, diary: &mut Diary<'_>) -> Result<()> {
    let (disk, point) = (folder.disk(), folder.dir.join("mnt"));
    let (disk, at) = (text(&disk)?, text(&point)?);
    std::fs::create_dir(&point)?;
    let size = size::show(DISK);
    diary.step(format!("ploopctl init -s {size} {disk}"), || {
        folder.ploopctl(&["init", "-s", &size, disk])
    })?;
    diary.step(format!("ploopctl mount {disk} {at}"), || {
        folder.ploopctl(&["mount", disk, at])
    })?;
    let mut file = {
        let path = point.join("file");
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?
    };
    write_while_its_server_dies(folder, diary, &mut file)?;
    let uuid = freeze(folder, diary, disk)?;
    spoil(diary, &mut file)?;
    drop(file);
    diary.step(format!("ploopctl umount {at}"), || {
        folder.ploopctl(&["umount", at])
    })?;
    for disk in go_back(folder, diary, disk, &uuid)? {
        diary.step(format!("ploopctl mount {disk} {at}"), || {
            folder.ploopctl(&["mount", &disk, at])
        })?;
        let mut file = File::open(point.join("file"))?;
        diary.step(format!("read {} again", size::show(DATA)), || {
            verify(&mut file)
        })?;
        drop(file);
        diary.step(format!("ploopctl umount {at}"), || {
            folder.ploopctl(&["umount", at])
        })?;
    }
    Ok(())
}

/// Freezes the disk while it is used; the snapshot's UUID.
fn freeze(folder: &Folder, diary: &mut Diary<'_>, disk: &str) -> Result<String> {
    diary.step(format!("ploopctl snapshot create {disk}"), || {
        folder.ploopctl(&["snapshot", "create", disk])
    })
}

/// Writes something else over a part of the data.
fn spoil(diary: &mut Diary<'_>, place: &mut impl Place) -> Result<()> {
    let chunks = SPOILED / CHUNK;
    let what = format!("write {} of something else over it", size::show(SPOILED));
    diary.step(what, || {
        (0..chunks).try_for_each(|n| place.write(n * CHUNK, &noise(!n)))?;
        place.sync()
    })
}

/// Shows what was spoiled and takes the disk back to the snapshot; it, and a clone of that, which was
/// moved.
fn go_back(folder: &Folder, diary: &mut Diary<'_>, disk: &str, uuid: &str) -> Result<[String; 2]> {
    let (clone, moved) = (folder.dir.join("clone"), folder.dir.join("moved"));
    let (clone, moved) = (text(&clone)?, text(&moved)?);
    let own = std::env::current_exe()?;
    let point = format!("{disk}@{uuid}");
    let verbs: [&[&str]; 5] = [
        &["check", disk],
        &["snapshot", "diff", disk, uuid, "top"],
        &["snapshot", "switch", disk, uuid],
        &["clone", &point, clone],
        &[
            "migrate",
            "send",
            clone,
            "--",
            text(&own)?,
            "migrate",
            "receive",
            moved,
        ],
    ];
    for args in verbs {
        diary.step(format!("ploopctl {}", args.join(" ")), || {
            folder.ploopctl(args)
        })?;
    }
    Ok([disk.to_string(), moved.to_string()])
}

fn served(folder: &Folder, diary: &mut Diary<'_>) -> Result<()> {
    let (disk, socket) = (folder.disk(), folder.dir.join("socket"));
    let disk = text(&disk)?;
    let size = size::show(DISK);
    diary.step(format!("ploopctl init -s {size} --fs none {disk}"), || {
        folder.ploopctl(&["init", "-s", &size, "--fs", "none", disk])
    })?;
    let how = format!("ploopctl serve {disk} --nbd unix:{}", socket.display());
    let server = diary.step(how, || Server::start(folder, disk, &socket))?;
    let mut client = Reconnecting {
        socket: socket.clone(),
        client: Client::connect(&socket)?,
    };
    write_while_its_server_dies(folder, diary, &mut client)?;
    let uuid = freeze(folder, diary, disk)?;
    spoil(diary, &mut client)?;
    drop(client);
    diary.step("SIGTERM to the server", || server.stop())?;
    for disk in go_back(folder, diary, disk, &uuid)? {
        let how = format!("ploopctl serve {disk} --nbd unix:{}", socket.display());
        let server = diary.step(how, || Server::start(folder, &disk, &socket))?;
        let mut client = Reconnecting {
            socket: socket.clone(),
            client: Client::connect(&socket)?,
        };
        diary.step(format!("read {} again", size::show(DATA)), || {
            verify(&mut client)
        })?;
        drop(client);
        server.stop()?;
    }
    Ok(())
}

/// Where the tour keeps its bytes.
trait Place {
    fn write(&mut self, at: u64, data: &[u8]) -> Result<()>;
    fn sync(&mut self) -> Result<()>;
    fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>>;
}

impl Place for File {
    fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        Ok(self.write_all_at(data, at)?)
    }
    fn sync(&mut self) -> Result<()> {
        Ok(self.sync_all()?)
    }
    fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.read_exact_at(&mut data, at)?;
        Ok(data)
    }
}

/// An NBD client sees a disconnect when its server's worker dies, and asks again.
struct Reconnecting {
    socket: PathBuf,
    client: Client,
}

impl Reconnecting {
    fn retry<T>(&mut self, ask: impl Fn(&mut Client) -> Result<T>) -> Result<T> {
        ask(&mut self.client).or_else(|_| {
            self.client = Client::connect(&self.socket)?;
            ask(&mut self.client)
        })
    }
}

impl Place for Reconnecting {
    fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.retry(|c| c.write(at, data))
    }
    fn sync(&mut self) -> Result<()> {
        self.retry(Client::flush)
    }
    fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>> {
        self.retry(|c| c.read(at, len))
    }
}

fn write_while_its_server_dies(
    folder: &Folder,
    diary: &mut Diary<'_>,
    place: &mut impl Place,
) -> Result<()> {
    let half = DATA / CHUNK / 2;
    let much = size::show(DATA / 2);
    let fill = |place: &mut dyn Place, from: u64| {
        (from..from + half).try_for_each(|n| place.write(n * CHUNK, &noise(n)))
    };
    diary.step(format!("write {much}, none of it flushed"), || {
        fill(place, 0)
    })?;
    let worker = attach::find(&folder.disk())?.state.worker_pid;
    let pid = worker.and_then(|p| Pid::from_raw(p as i32));
    let pid = pid.ok_or_else(|| Error::new(Kind::NotFound, "no worker to kill"))?;
    diary.step(
        format!(
            "kill -9 {} (the worker), write {much} more and sync",
            pid.as_raw_pid()
        ),
        || {
            kill_process(pid, Signal::KILL).map_err(std::io::Error::from)?;
            fill(place, half)?;
            place.sync()
        },
    )?;
    diary.step(
        format!("read {} back and compare", size::show(DATA)),
        || verify(place),
    )
}

fn verify(place: &mut impl Place) -> Result<()> {
    for n in 0..DATA / CHUNK {
        if place.read(n * CHUNK, CHUNK as usize)? != noise(n) {
            return Err(Error::damaged(format!(
                "the bytes at {} are not those written",
                n * CHUNK
            )));
        }
    }
    Ok(())
}

/// Chunk `n` of the tour's data: xorshift, so that no two chunks are alike.
fn noise(n: u64) -> Vec<u8> {
    let mut state = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let words = (0..CHUNK / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// `ploopctl serve` in the background; killed when the tour fails.
struct Server {
    child: Child,
}

impl Server {
    fn start(folder: &Folder, disk: &str, socket: &Path) -> Result<Self> {
        let child = folder
            .command()?
            .args([
                "serve",
                disk,
                "--nbd",
                &format!("unix:{}", socket.display()),
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut server = Self { child };
        let mut line = String::new();
        if let Some(out) = server.child.stdout.as_mut() {
            BufReader::new(out).read_line(&mut line)?;
        }
        match line.is_empty() {
            true => Err(Error::new(Kind::Io, "the server ended at once")),
            false => Ok(server),
        }
    }

    fn stop(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).map_err(std::io::Error::from)?;
        let status = self.child.wait()?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Io,
                format!("the server ended with {status}"),
            )),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}
