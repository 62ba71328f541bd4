//! Views: frozen points of a disk that are looked at beside it, each through a throw-away disk.
//!
//! A view is a clone in `.views/POINT-NUMBER` of its disk's directory, so that the links of frozen
//! files protect it from merges, and a journal that the point holds is replayed into a delta that
//! goes with it. Nothing in it is worth anything: whatever nobody serves any more is removed, by the
//! next command that comes by.
//!
//! Who makes a view holds `.views/lock` with others until a keeper serves it; the keeper holds its
//! disk lock as that of any disk. So a view is dead when its disk lock is free and `.views/lock` can
//! be had alone. The lock file goes with the last view: who has locked it looks whether it is still
//! there. Directories are reached beneath open ones, and no link is followed.

use super::target::{DESCRIPTOR, Identity};
use crate::io::beneath;
use crate::io::lock::{self, DISK_LOCK, Held, Hold};
use ploop_formats::guid::Guid;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{AtFlags, Mode, OFlags, fstat, fsync, mkdirat, openat, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Where the views of a disk are, in its directory.
pub const FOLDER: &str = ".views";
/// Who makes one has it with others, who cleans up alone.
const LOCK: &str = "lock";
/// End of the name of a view whose point goes with it.
const TEMPORARY: &str = "-temporary";
/// How long somebody may take to clean up.
const MOMENT: Duration = Duration::from_secs(10);

/// What a view is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The point that is looked at.
    pub point: Guid,
    /// That goes with the view.
    pub temporary: bool,
    number: u32,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.temporary { TEMPORARY } else { "" };
        write!(f, "{}-{:08x}{end}", self.point.bare(), self.number)
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (rest, temporary) = match text.strip_suffix(TEMPORARY) {
                Some(rest) => (rest, true),
                None => (text, false),
            };
            let (point, number) = rest.rsplit_once('-')?;
            let name = Self {
                point: point.parse().ok()?,
                temporary,
                number: u32::from_str_radix(number, 16).ok()?,
            };
            (name.to_string() == text).then_some(name)
        };
        parse().ok_or_else(|| Error::invalid(format!("{text}: not the name of a view")))
    }
}

/// The disk and the name of the view that is at `path`, if one is meant to be there.
pub fn of(path: &Path) -> Option<(&Path, Name)> {
    let name = path.file_name()?.to_str()?.parse().ok()?;
    let folder = path.parent()?;
    let disk = folder.parent()?;
    (folder.file_name()? == OsStr::new(FOLDER)).then_some((disk, name))
}

/// A view of a disk.
#[derive(Debug, Clone)]
pub struct View {
    /// What it is called.
    pub name: Name,
    /// What names it while it is attached.
    pub identity: Identity,
    /// Its files: links to the disk's own, and a delta.
    pub files: Vec<OsString>,
    /// Somebody makes it or serves it.
    pub alive: bool,
    /// Somebody makes a view, this one perhaps.
    pub making: bool,
}

/// The views of a disk. Changes nothing. Who may not look at them is told of none.
pub fn all(dir: impl AsFd) -> Result<Vec<View>> {
    let folder = match folder(&dir) {
        Err(e) if e.kind() == Kind::Privilege => None,
        folder => folder?,
    };
    let Some(folder) = folder else {
        return Ok(Vec::new());
    };
    // In this order: what has its name by now and is still being made is told as such.
    let names = names(&folder)?;
    let making = locked(&folder, LOCK, Hold::Exclusive)?;
    let mut found = Vec::new();
    for name in names {
        if let Some(view) = directory_in(&folder, OsStr::new(&name.to_string()))? {
            let stat = fstat(&view).map_err(io::Error::from)?;
            found.push(View {
                name,
                identity: Identity {
                    dev: stat.st_dev,
                    ino: stat.st_ino,
                },
                files: beneath::entries(&view)?,
                alive: making || locked(&view, DISK_LOCK, Hold::Shared)?,
                making,
            });
        }
    }
    Ok(found)
}

/// How many views have a file of their disk: so many of its links are the disk's own affair.
pub fn links(views: &[View], file: &OsStr) -> u64 {
    let has = |view: &&View| view.files.iter().any(|f| f == file);
    views.iter().filter(has).count() as u64
}

/// Whether `.views` holds views and nothing else, as far as one may look.
pub fn are_alone(dir: impl AsFd) -> Result<bool> {
    let folder = match folder(&dir) {
        Err(e) if e.kind() == Kind::Privilege => return Ok(true),
        folder => folder?,
    };
    let Some(folder) = folder else {
        return Ok(false);
    };
    let is_ours = |name: &OsString| {
        let text = name.to_str().unwrap_or_default();
        text == LOCK || text.parse::<Name>().is_ok()
    };
    Ok(beneath::entries(&folder)?.iter().all(is_ours))
}

/// Removes what nobody has any more; `forget` is told first of each view whose point is to go with
/// it. When it fails the view is emptied, so that it is in nobody's way, and comes again the next
/// time. Does nothing while somebody makes a view.
pub fn sweep(dir: impl AsFd, mut forget: impl FnMut(&Name) -> Result<()>) -> Result<()> {
    let Some(folder) = folder(&dir)? else {
        return Ok(());
    };
    let Some(lock) = alone(&dir, &folder)? else {
        return Ok(());
    };
    for name in names(&folder)? {
        let Some(view) = directory_in(&folder, OsStr::new(&name.to_string()))? else {
            continue;
        };
        let _served_by_nobody = match take(&view) {
            Ok(held) => held,
            Err(e) if e.kind() == Kind::Busy => continue,
            Err(e) => {
                // The others are in the way no less.
                tracing::warn!("{name}: this view cannot be removed: {e}");
                continue;
            }
        };
        let forgotten = match name.temporary {
            true => forget(&name),
            false => Ok(()),
        };
        if let Err(e) = empty(&view) {
            tracing::warn!("{name}: this view cannot be removed: {e}");
            continue;
        }
        match forgotten {
            Ok(()) => remove_directory(&folder, &name)?,
            Err(e) => tracing::warn!(
                "snapshot {} was temporary and stays for now: {e}",
                name.point.bare()
            ),
        }
    }
    tidy(&dir, &folder, lock);
    Ok(())
}

/// Removes a view whose keeper is gone.
pub fn remove(dir: impl AsFd, name: &Name) -> Result<()> {
    let Some(folder) = folder(&dir)? else {
        return Ok(());
    };
    if let Some(view) = directory_in(&folder, OsStr::new(&name.to_string()))? {
        let _served_by_nobody = take(&view).map_err(|e| e.at(name))?;
        empty(&view)?;
        remove_directory(&folder, name)?;
    }
    if let Some(lock) = alone(&dir, &folder)? {
        tidy(&dir, &folder, lock);
    }
    Ok(())
}

/// A view that is being made. Dropped before it is kept, it goes.
#[derive(Debug)]
#[must_use = "a view that is not kept goes"]
pub struct Making {
    dir: OwnedFd,
    name: Name,
    path: PathBuf,
    kept: bool,
    lock: Option<OwnedFd>,
}

impl Making {
    /// Makes the directory of a view of `point`, in that of `disk`.
    pub fn begin(disk: &Path, point: Guid, temporary: bool) -> Result<Self> {
        let dir = beneath::directory(disk)?;
        let name = Name {
            point,
            temporary,
            number: uuid::Uuid::new_v4().as_fields().0,
        };
        let at = |e: Errno| Error::from(io::Error::from(e)).at(disk.join(FOLDER).display());
        let due = Instant::now() + MOMENT;
        let (folder, lock) = loop {
            match mkdirat(&dir, FOLDER, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(at(e)),
            }
            let Some(folder) = folder(&dir)? else {
                if Instant::now() > due {
                    return Err(at(Errno::NOTDIR));
                }
                continue;
            };
            match lock_file(&folder, Hold::Shared, due)? {
                Some(lock) if is_there(&dir, &folder, &lock) => break (folder, lock),
                // Whoever had it took the last view away, and the lock with it.
                _ => continue,
            }
        };
        mkdirat(&folder, name.to_string(), Mode::RWXU).map_err(at)?;
        if temporary {
            // Before the point: it tells the next command that this is to go.
            fsync(&folder).map_err(at)?;
        }
        Ok(Self {
            dir,
            path: disk.join(FOLDER).join(name.to_string()),
            name,
            kept: false,
            lock: Some(lock),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells that it is being made, for a process that helps with it.
    pub fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lock.as_ref().map(AsFd::as_fd)
    }

    /// It is served: from now on its keeper answers for it.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.lock = None;
        if !self.kept
            && let Err(e) = remove(&self.dir, &self.name)
        {
            tracing::warn!("{}: goes with the next command: {e}", self.path.display());
        }
    }
}

/// Opens `.views`, if there is one.
fn folder(dir: impl AsFd) -> Result<Option<OwnedFd>> {
    directory_in(dir, OsStr::new(FOLDER))
}

/// A directory in another; none where there is no such directory, whatever else has the name.
fn directory_in(dir: impl AsFd, name: &OsStr) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(e) => Err(Error::from(io::Error::from(e)).at(Path::new(name).display())),
    }
}

fn names(folder: impl AsFd) -> Result<Vec<Name>> {
    let all = beneath::entries(folder)?.into_iter();
    let mut names: Vec<Name> = all.filter_map(|name| name.to_str()?.parse().ok()).collect();
    names.sort_by_key(ToString::to_string);
    Ok(names)
}

/// Whether somebody else has locked a file, if it is there, so that it cannot be had in this way.
fn locked(dir: impl AsFd, file: &str, hold: Hold) -> Result<bool> {
    let held = match beneath::open_file(dir, Path::new(file), beneath::Access::Write) {
        // Where nothing can be written nothing is served.
        Err(e) if matches!(e.kind(), Kind::NotFound | Kind::ReadOnly) => return Ok(false),
        opened => lock::whole(opened?, hold, Instant::now()),
    };
    match held {
        Err(e) if e.kind() == Kind::Busy => Ok(true),
        held => held.map(|()| false),
    }
}

/// Takes a view that nobody serves: who starts to serve it meanwhile finds no disk afterwards. `Busy`
/// when somebody does.
fn take(view: impl AsFd) -> Result<Held> {
    lock::lock_descriptor(view, Instant::now())
}

/// The lock file, made and locked; none where its directory is gone.
fn lock_file(folder: impl AsFd, hold: Hold, due: Instant) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(folder, LOCK, flags, Mode::RUSR | Mode::WUSR) {
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(Error::from(io::Error::from(e)).at(LOCK)),
        Ok(file) => lock::whole(&file, hold, due).map(|()| Some(file)),
    }
}

/// Whether `lock` is still the lock file, and `folder` still where the views are.
fn is_there(dir: impl AsFd, folder: impl AsFd, lock: impl AsFd) -> bool {
    let same = |dir: &dyn Fn() -> rustix::io::Result<rustix::fs::Stat>, fd| {
        let (there, ours) = (dir(), fstat(fd));
        matches!((there, ours), (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
    };
    let folder = folder.as_fd();
    same(&|| statat(&dir, FOLDER, AtFlags::SYMLINK_NOFOLLOW), folder)
        && same(
            &|| statat(folder, LOCK, AtFlags::SYMLINK_NOFOLLOW),
            lock.as_fd(),
        )
}

/// The lock of who cleans up; none when somebody makes a view or cleans up already.
fn alone(dir: impl AsFd, folder: impl AsFd) -> Result<Option<OwnedFd>> {
    match lock_file(&folder, Hold::Exclusive, Instant::now()) {
        Err(e) if e.kind() == Kind::Busy => Ok(None),
        locked => Ok(locked?.filter(|lock| is_there(dir, folder, lock))),
    }
}

/// Removes the files of a view, its descriptor first: what loses its files must be no disk before.
fn empty(view: impl AsFd) -> Result<()> {
    let first = [OsString::from(DESCRIPTOR)].into_iter();
    for file in first.chain(beneath::entries(&view)?) {
        match unlinkat(&view, &file, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(Error::from(io::Error::from(e)).at(Path::new(&file).display())),
        }
    }
    Ok(())
}

fn remove_directory(folder: impl AsFd, name: &Name) -> Result<()> {
    match unlinkat(folder, name.to_string(), AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(Error::from(io::Error::from(e)).at(name)),
    }
}

/// Takes the empty folder away. The lock is given back afterwards.
fn tidy(dir: impl AsFd, folder: impl AsFd, lock: OwnedFd) {
    let only = beneath::entries(&folder).is_ok_and(|all| all == [LOCK]);
    if only && unlinkat(&folder, LOCK, AtFlags::empty()).is_ok() {
        let _ = unlinkat(dir, FOLDER, AtFlags::REMOVEDIR);
    }
    drop(lock);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::detached::random_guid;

    #[test]
    fn the_name_of_a_view_says_whose_it_is_and_nothing_else_is_one() {
        let point = random_guid();
        for temporary in [false, true] {
            let name = Name {
                point,
                temporary,
                number: 0xA1,
            };
            assert_eq!(name.to_string().parse::<Name>().unwrap(), name);
            let path = format!("/d/.views/{name}");
            let (disk, found) = of(Path::new(&path)).expect("a view");
            assert_eq!((disk, found), (Path::new("/d"), name.clone()));
            assert!(of(Path::new(&format!("/d/views/{name}"))).is_none());
        }
        let bare = point.bare();
        for text in [
            bare.clone(),
            format!("{bare}-"),
            format!("{bare}-a1"),
            format!("{bare}-000000A1"),
            format!("{{{bare}}}-000000a1"),
            format!("{bare}-000000a1-temporarily"),
            "lock".into(),
        ] {
            text.parse::<Name>().expect_err(&text);
        }
    }

    #[test]
    fn what_nobody_has_goes_and_what_is_being_made_or_served_stays() {
        let disk = tempfile::tempdir().unwrap();
        let dir = beneath::directory(disk.path()).unwrap();
        let folder = disk.path().join(FOLDER);
        let sweep = || super::sweep(&dir, |_| Ok(())).unwrap();
        let alive = || all(&dir).unwrap().iter().filter(|v| v.alive).count();
        let making = Making::begin(disk.path(), random_guid(), false).unwrap();
        let path = making.path().to_path_buf();
        std::fs::write(path.join("root.hds"), "x").unwrap();
        sweep();
        assert_eq!((path.exists(), alive()), (true, 1), "made");
        let view = beneath::directory(&path).unwrap();
        let keeper = lock::lock_descriptor(&view, Instant::now()).unwrap();
        making.keep();
        sweep();
        assert_eq!((path.exists(), alive()), (true, 1), "served");
        let linked = |file| links(&all(&dir).unwrap(), OsStr::new(file));
        assert_eq!((linked("root.hds"), linked("root")), (1, 0));
        drop(keeper);
        assert_eq!(alive(), 0);
        sweep();
        assert!(!folder.exists(), "gone, and the folder with the last one");
        drop(Making::begin(disk.path(), random_guid(), false).unwrap());
        assert!(!folder.exists(), "given up");
    }

    #[test]
    fn a_point_that_cannot_be_forgotten_is_told_of_again_and_its_files_go() {
        let disk = tempfile::tempdir().unwrap();
        let dir = beneath::directory(disk.path()).unwrap();
        let point = random_guid();
        let making = Making::begin(disk.path(), point, true).unwrap();
        let path = making.path().to_path_buf();
        std::fs::write(path.join("root.hds"), "x").unwrap();
        making.keep();
        let busy = || Err(Error::new(Kind::Busy, "not now"));
        super::sweep(&dir, |_| busy()).unwrap();
        assert_eq!(std::fs::read_dir(&path).expect("it stays").count(), 0);
        let mut told = Vec::new();
        super::sweep(&dir, |name| {
            told.push(name.point);
            Ok(())
        })
        .unwrap();
        assert_eq!(told, [point]);
        assert!(!disk.path().join(FOLDER).exists());
    }

    #[test]
    fn what_is_no_view_and_what_a_link_leads_to_is_left_alone() {
        let disk = tempfile::tempdir().unwrap();
        let dir = beneath::directory(disk.path()).unwrap();
        let other = tempfile::tempdir().unwrap();
        std::fs::write(other.path().join("precious"), "x").unwrap();
        let folder = disk.path().join(FOLDER);
        let sweep = || super::sweep(&dir, |_| Ok(())).unwrap();
        let name = format!("{}-000000a1", random_guid().bare());
        std::os::unix::fs::symlink(other.path(), &folder).unwrap();
        sweep();
        std::fs::remove_file(&folder).unwrap();
        std::fs::create_dir_all(folder.join("mine")).unwrap();
        std::os::unix::fs::symlink(other.path(), folder.join(name)).unwrap();
        sweep();
        assert!(other.path().join("precious").exists() && folder.join("mine").exists());
    }
}
