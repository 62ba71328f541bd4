//! Abuse: everything that a program may do with a disk, done with one hostile case.

use super::canary::OUTSIDE;
use super::memory::Meter;
use bytes::{Bytes, BytesMut};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::image::open::{self, Top};
use ploop::image::target::{Format, Source, Target};
use ploop::image::{check, lock, survey};
use ploop::io::exec::{self, Engine};
use ploop::io::file::{Cache, FileStore};
use ploop::{Error, Kind, Result};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::check::{Repair, Report};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a file of a case is.
#[derive(Debug, Clone)]
pub enum Node {
    /// These bytes, and a hole up to the length.
    File(Bytes, u64),
    /// A symbolic link; `OUT` in it stands for the folder of the canary.
    Link(String),
    /// A second name of another file of the case.
    Hard(String),
    /// A named pipe, at which a careless open would wait for ever.
    Pipe,
    /// A folder.
    Folder,
}

/// Stands for the canary's folder in links and texts.
pub const OUT: &str = "@OUT@";

/// One hostile disk.
#[derive(Debug, Clone)]
pub struct Case {
    /// What is wrong with it.
    pub name: String,
    /// A bare image of this name; else the descriptor is read.
    pub bare: Option<&'static str>,
    /// Its files.
    pub files: Vec<(OsString, Node)>,
}

/// What was allowed.
#[derive(Debug, Default)]
pub struct Outcome {
    /// It opened for reading.
    pub read: bool,
    /// It opened for writing.
    pub written: bool,
    /// It needed a repair: whether that was done.
    pub repaired: Option<bool>,
}

/// Runs one case in `place`, which holds the canary.
pub fn run(place: &Path, case: &Case, meter: &mut Meter) -> std::result::Result<Outcome, String> {
    let mut outcome = Outcome::default();
    let dir = place.join("disk");
    lay(&dir, case);
    let before = contents(&dir);
    let seen = meter.watch(|| look(&dir, case));
    outcome.read = seen.is_ok();
    clear(&seen)?;
    let _ = meter.watch(|| checked(&dir, case));
    unchanged("looking", &before, &dir)?;
    match meter.watch(|| write(&dir, case)) {
        Ok(()) => outcome.written = true,
        Err(Failure::Refused(e)) => {
            clear::<()>(&Err(e))?;
            unchanged("a refused open for writing", &before, &dir)?;
        }
        Err(Failure::Broken(text)) => return Err(text),
    }
    if outcome.written {
        keeps(&seen, &look(&dir, case), "a write", Some(0))?;
        lay(&dir, case);
    }
    outcome.repaired = mend(&dir, case, meter, &before, &seen)?;
    fs::remove_dir_all(&dir).unwrap();
    Ok(outcome)
}

/// A refusal says what was wrong; an internal slip would say nothing.
fn clear<T>(result: &Result<T>) -> std::result::Result<(), String> {
    match result {
        Err(e) if e.to_string().len() < 10 => Err(format!("an unclear refusal: {e}")),
        Err(e) if e.to_string().len() > 10_000 => Err("a refusal without end".into()),
        _ => Ok(()),
    }
}

/// Makes the case's files anew.
fn lay(dir: &Path, case: &Case) {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir(dir).unwrap();
    let out = dir.parent().unwrap().join(OUTSIDE);
    let out = out.to_str().unwrap();
    for (name, node) in &case.files {
        let path = dir.join(name);
        match node {
            Node::File(bytes, len) => {
                let text = std::str::from_utf8(bytes).ok();
                let text = text
                    .filter(|t| t.contains(OUT))
                    .map(|t| t.replace(OUT, out));
                let file = File::create(&path).unwrap();
                file.write_all_at(text.as_ref().map_or(&bytes[..], |t| t.as_bytes()), 0)
                    .unwrap();
                if *len > bytes.len() as u64 {
                    file.set_len(*len).unwrap();
                }
            }
            Node::Link(to) => {
                std::os::unix::fs::symlink(to.replace(OUT, out), &path).unwrap();
            }
            Node::Hard(to) => fs::hard_link(dir.join(to), &path).unwrap(),
            Node::Pipe => {
                let mode = rustix::fs::Mode::from_raw_mode(0o600);
                let kind = rustix::fs::FileType::Fifo;
                rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
            }
            Node::Folder => fs::create_dir(&path).unwrap(),
        }
    }
}

type Contents = BTreeMap<PathBuf, (u64, u64)>;

/// Length and a hash of what every file of a folder holds, but for the lock that writers leave.
fn contents(dir: &Path) -> Contents {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
    files
        .filter(|entry| entry.file_name() != ploop::io::lock::DISK_LOCK)
        .map(|entry| (entry.path(), content(&entry.path())))
        .collect()
}

/// Blocks of zeros and holes are the same.
fn content(path: &Path) -> (u64, u64) {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let mut hash = DefaultHasher::new();
    let (mut at, mut block) = (0, vec![0; 4096]);
    while at < len {
        let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) else {
            break;
        };
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        at = data / 4096 * 4096;
        while at < hole {
            let got = file.read_at(&mut block, at).unwrap();
            if block[..got].iter().any(|b| *b != 0) {
                hash.write_u64(at);
                hash.write(&block[..got]);
            }
            at += 4096;
        }
    }
    (len, hash.finish())
}

fn unchanged(what: &str, before: &Contents, dir: &Path) -> std::result::Result<(), String> {
    let after = contents(dir);
    match *before == after {
        true => Ok(()),
        false => {
            let changed = after.keys().chain(before.keys());
            let changed = changed.filter(|path| after.get(*path) != before.get(*path));
            Err(format!("{what} changed {:?}", changed.collect::<Vec<_>>()))
        }
    }
}

/// What a guest reads: offset, and a hash where reading was possible.
type View = BTreeMap<u64, Option<u64>>;

fn source(dir: &Path, case: &Case) -> Result<(Source, OwnedFd)> {
    let target = match case.bare {
        Some(name) => Target::resolve(&dir.join(name), Some(Format::Ploop))?,
        None => Target::resolve(dir, None)?,
    };
    Ok((target.source(), target.open_dir()?))
}

fn now<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    exec::run(Engine::Poll, work)?
}

/// Opens for reading, maps and reads.
fn look(dir: &Path, case: &Case) -> Result<View> {
    let (source, dir) = source(dir, case)?;
    let _ = survey_of(&source, &dir);
    let chain = ploop::image::chain::Chain::read(&dir, &source)?;
    let _locks = lock::DiskLocks::take(&dir, &source, lock::Access::Read)?;
    now(async {
        let disk = open::open_read(&dir, &chain, Cache::Writeback).await?;
        let size = disk.size();
        let _ = disk.extents(0, size.min(1 << 40), 1000).await;
        let _ = disk.extents(size - 512, 512, 1000).await;
        let mut view = View::new();
        for at in places(&disk) {
            let len = (4096).min(size - at) as usize;
            let read = disk.read(at, BytesMut::zeroed(len)).await;
            view.insert(at, read.ok().map(|bytes| hash(&bytes)));
        }
        Ok(view)
    })
}

fn survey_of(source: &Source, dir: &OwnedFd) -> Result<()> {
    let chain = ploop::image::chain::Chain::read(dir, source)?;
    survey::layers(dir, &chain).map(|_| ())
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hash = DefaultHasher::new();
    hash.write(bytes);
    hash.finish()
}

/// First and last block of the first and the last few clusters.
fn places(disk: &Disk<FileStore>) -> Vec<u64> {
    let (size, cluster) = (disk.size(), disk.preferred_block());
    let last = size.div_ceil(cluster);
    let clusters = (0..48.min(last)).chain(last.saturating_sub(2)..last);
    let ends = clusters.flat_map(|n| [n * cluster, n * cluster + (cluster - 4096)]);
    ends.filter(|at| *at < size).collect()
}

fn checked(dir: &Path, case: &Case) -> Result<Vec<Report>> {
    let (source, dir) = source(dir, case)?;
    let chain = ploop::image::chain::Chain::read(&dir, &source)?;
    now(check::layers(&dir, &chain, &mut ())).map(of_ploop)
}

/// Reports of disks that have no other layers.
fn of_ploop(reports: Vec<check::Report>) -> Vec<Report> {
    let one = |report| match report {
        check::Report::Ploop(report) => report,
        check::Report::Qcow2(report) => panic!("a qcow2 layer: {report:?}"),
    };
    reports.into_iter().map(one).collect()
}

enum Failure {
    /// It was not opened.
    Refused(Error),
    /// It was opened, and then something was wrong.
    Broken(String),
}

/// What is written.
const DATA: [u8; 8192] = [0xD7; 8192];
/// Only one who died is waited for, and here nobody did.
const FENCE: Duration = Duration::from_secs(5);

/// Opens for writing, writes at the start, closes, and demands that this opens again.
fn write(dir: &Path, case: &Case) -> std::result::Result<(), Failure> {
    let opened = |ledger: Ledger| {
        let (source, dir) = source(dir, case)?;
        let locks = lock::DiskLocks::take(&dir, &source, lock::Access::Write)?;
        let chain = ploop::image::chain::Chain::read(&dir, &source)?;
        let top = Top::fenced(&dir, chain.top(), FENCE)?;
        let top = top.store(chain.top(), Cache::Writeback)?;
        Ok((locks, dir, chain, top, ledger))
    };
    let (_locks, at, chain, top, ledger) = opened(Ledger::local()).map_err(Failure::Refused)?;
    let disk = exec::run(
        Engine::Poll,
        open::open_write(&at, &chain, top, ledger, FENCE),
    )
    .unwrap();
    let disk = disk.map_err(Failure::Refused)?;
    let len = DATA.len().min(disk.size() as usize);
    let wrote = now(async {
        disk.write(0, Bytes::from_static(&DATA).slice(..len), false)
            .await?;
        disk.flush().await
    });
    let closed = now(disk.close());
    drop((disk, _locks));
    // A full table or a file at the end of its format may refuse the write, with a reason.
    let place = |what: &str, e: Error| Failure::Broken(format!("{what} after an open: {e}"));
    match (wrote, closed) {
        (Ok(()), Ok(())) => {}
        (Err(e), _) if e.kind() == Kind::NoSpace => return Ok(()),
        (Err(e), _) => return Err(place("a write failed", e)),
        (_, Err(e)) => return Err(place("closing failed", e)),
    }
    let (_locks, at, chain, top, ledger) =
        opened(Ledger::local()).map_err(|e| place("no second open", e))?;
    let again = now(async {
        let disk = open::open_write(&at, &chain, top, ledger, FENCE).await?;
        let read = disk.read(0, BytesMut::zeroed(len)).await?;
        disk.close().await?;
        Ok(read)
    });
    match again {
        Ok(read) if read[..] == DATA[..len] => Ok(()),
        Ok(_) => Err(Failure::Broken("written data did not stay".into())),
        Err(e) => Err(place("no second open", e)),
    }
}

/// Everything that could be read before can be read now, but for the cluster that was written.
fn keeps(
    before: &Result<View>,
    after: &Result<View>,
    what: &str,
    written: Option<u64>,
) -> std::result::Result<(), String> {
    let Ok(before) = before else { return Ok(()) };
    let after = match after {
        Ok(after) => after,
        Err(e) => return Err(format!("{what} made a disk unreadable: {e}")),
    };
    for (at, was) in before.iter().filter(|(_, was)| was.is_some()) {
        let exempt = written.is_some_and(|from| (from..from + DATA.len() as u64).contains(at));
        if !exempt && after.get(at) != Some(was) {
            return Err(format!("{what} changed what is read at {at}"));
        }
    }
    Ok(())
}

/// Repairs, and demands that data stays, that it is done once for all, and that a refusal changes
/// nothing.
fn mend(
    dir: &Path,
    case: &Case,
    meter: &mut Meter,
    before: &Contents,
    seen: &Result<View>,
) -> std::result::Result<Option<bool>, String> {
    let mend = || {
        let (source, dir) = source(dir, case)?;
        let _locks = lock::DiskLocks::take(&dir, &source, lock::Access::Write)?;
        let chain = ploop::image::chain::Chain::read(&dir, &source)?;
        let all = Repair {
            give_up: true,
            ..Repair::default()
        };
        now(check::mend(&dir, &chain, &all, &mut ())).map(of_ploop)
    };
    let done = meter.watch(mend);
    clear(&done)?;
    let Ok(reports) = done else {
        unchanged("a refused repair", before, dir)?;
        return Ok(Some(false));
    };
    keeps(seen, &look(dir, case), "a repair", None)?;
    let again = checked(dir, case).map_err(|e| format!("no check after a repair: {e}"))?;
    for (said, found) in reports.iter().zip(&again) {
        if (said.errors, said.leaks) != (found.errors, found.leaks) {
            return Err(format!("a repair said {said:?}, a check finds {found:?}"));
        }
    }
    let touched = reports.iter().any(|r| !r.repaired.is_empty());
    if reports.iter().all(|r| r.is_clean())
        && let Err(Failure::Refused(e)) = write(dir, case)
    {
        return Err(format!(
            "clean after a repair, and refused for writing: {e}"
        ));
    }
    Ok(touched.then_some(true))
}
