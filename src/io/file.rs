//! FileStore: the bytes of one file or block device.
//!
//! It never opens a second description of its file: locks on the one it was given fence all its
//! I/O. A write into a full file system fails before it is answered, in both cache modes. A
//! failed flush is final: the kernel tells an error once and then believes in clean pages.

use super::direct::{self, Alignment};
use super::exec::{self, Witness, disk};
use super::fate::{Barrier, Fate, Quiet};
use super::room::{KeepFree, Limit, Room};
use super::space::UNIT;
use bytes::{Buf, Bytes, BytesMut};
use ploop_formats::buf;
use ploop_formats::store::{Reach, Space, Store, StoreInfo};
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{Advice, FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::{Mutex, MutexGuard, RwLock, RwLockWriteGuard};

/// Who keeps copies of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Nobody: O_DIRECT.
    None,
    /// The page cache; written back when it likes, or by a flush.
    Writeback,
}

/// Cached reads from this size on are cheaper copied at once than sent through a ring.
const INLINE_MIN: usize = 128 << 10;
/// Cached writes up to this size are copied at once: most file systems make a ring hand them to a
/// thread of its own, which costs several times the copy. Larger ones are worth a thread.
const INLINE_WRITE_MAX: usize = 128 << 10;
/// Bytes of data that are looked at together when space is taken.
const SPACE_AHEAD: u64 = 8 << 20;
/// Bytes up to which being refused more means that there is no space.
const MODEST: u64 = 4 << 20;
/// Bytes of zeros written at a time where the storage cannot zero by itself.
const ZEROS: u64 = 1 << 20;

/// One file or block device. Clones share it.
#[derive(Clone)]
pub struct FileStore(Arc<Inner>);

struct Inner {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    writable: bool,
    regular: bool,
    /// It lies in memory (tmpfs), where nothing waits and a ring cannot tell.
    in_memory: bool,
    cache: Cache,
    why_cached: Option<String>,
    align: Alignment,
    len: AtomicU64,
    room: OnceLock<Room>,
    /// One change of length at a time.
    sizing: Mutex<()>,
    /// A barrier of cached data has it alone: the kernel tells each error to one caller, who need
    /// not be the one whose data was lost. Direct durable writes share it.
    barriers: RwLock<()>,
    fate: Arc<Fate>,
    quiet: Arc<dyn Witness>,
    barrier: Arc<dyn Witness>,
    /// What this storage turned out to be unable to do, each said once.
    no_space_taking: AtomicBool,
    no_punching: AtomicBool,
    no_zeroing: AtomicBool,
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FileStore({}, {:?})",
            self.0.path.display(),
            self.0.cache
        )
    }
}

impl FileStore {
    /// Opens a file or block device by a path that a person or program stated. Names found inside
    /// of images go through [`super::beneath`].
    pub fn open(path: &Path, write: bool, cache: Cache) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(write).open(path);
        let file = file.map_err(|e| Error::from(e).at(path.display()))?;
        Self::new(file.into(), path, cache)
    }

    /// Takes an open descriptor, readable and perhaps writable. `path` is for messages only.
    /// Where O_DIRECT is impossible the page cache is used and [`FileStore::why_cached`] says why.
    pub fn new(fd: OwnedFd, path: &Path, cache: Cache) -> Result<Self> {
        let place = |e: rustix::io::Errno| Error::from(io::Error::from(e)).at(path.display());
        let stat = rustix::fs::fstat(&fd).map_err(place)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            let what = "is neither a regular file nor a block device";
            return Err(Error::invalid(what).at(path.display()));
        }
        let writable = rustix::fs::fcntl_getfl(&fd)
            .map_err(place)?
            .contains(OFlags::RDWR);
        let len = match kind {
            FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
            _ => rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(place)?,
        };
        let cached = Alignment {
            offset: 1,
            memory: 1,
        };
        let (cache, align, why_cached) = match cache {
            Cache::Writeback => (cache, cached, None),
            Cache::None => match direct::enable(&fd, len) {
                Ok(align) => (Cache::None, align, None),
                Err(why) => (Cache::Writeback, cached, Some(why)),
            },
        };
        if let Some(why) = &why_cached {
            tracing::warn!("{}: the page cache is used, because {why}", path.display());
        }
        let in_memory = rustix::fs::fstatfs(&fd).map_err(place)?.f_type == libc::TMPFS_MAGIC;
        let no_punching = writable && kind == FileType::RegularFile && !punches(&fd, len);
        if no_punching {
            tracing::warn!("{}: the storage cannot punch holes", path.display());
        }
        let fate = Arc::new(Fate::default());
        Ok(Self(Arc::new(Inner {
            fd: Arc::new(fd),
            path: path.to_owned(),
            writable,
            regular: kind == FileType::RegularFile,
            in_memory,
            cache,
            why_cached,
            align,
            len: AtomicU64::new(len),
            room: OnceLock::new(),
            sizing: Mutex::default(),
            barriers: RwLock::default(),
            quiet: Arc::new(Quiet(Arc::clone(&fate))),
            barrier: Arc::new(Barrier(Arc::clone(&fate))),
            fate,
            no_space_taking: AtomicBool::new(false),
            no_punching: AtomicBool::new(no_punching),
            no_zeroing: AtomicBool::new(false),
        })))
    }

    /// From now on no space is taken that the host should keep. Once.
    pub fn keep_free(&self, keep: KeepFree) {
        let room = Room::new(Arc::clone(&self.0.fd), keep);
        let first = self.0.room.set(room).is_ok();
        debug_assert!(first, "a store learns once what to keep free");
    }

    /// From now on the file takes no more of the host than this, beyond what it has; only of a store
    /// that keeps some free.
    pub fn set_limit(&self, limit: Option<Limit>) {
        if let Some(room) = self.0.room.get() {
            room.set_limit(limit);
        }
    }

    /// Returns when space was wanted of a host that is low on it; never for a store that keeps
    /// none free.
    pub async fn low(&self) {
        match self.0.room.get() {
            Some(room) => room.low().await,
            None => std::future::pending().await,
        }
    }

    /// The cache mode in use, which may not be the one asked for.
    pub fn cache(&self) -> Cache {
        self.0.cache
    }

    /// Why the page cache is used although none was asked for.
    pub fn why_cached(&self) -> Option<&str> {
        self.0.why_cached.as_deref()
    }

    /// The path that messages name.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Forgets what the page cache holds of the file: from now on it is read as the storage has it.
    /// After a failed write-back the cache believes in pages that the storage never got.
    ///
    /// What is still to be written is written first. That this fails is told nobody: whoever opens
    /// a file anew takes it as it is. Blocks.
    pub fn forget_cache(&self) -> Result<()> {
        match rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.0.fd)) {
            // Where nothing can be written, nothing is to be.
            Ok(()) | Err(Errno::INVAL | Errno::ROFS) => {}
            Err(e) => {
                let path = self.0.path.display();
                tracing::warn!("{path}: data of its last user is lost: {e}");
            }
        }
        rustix::fs::fadvise(&self.0.fd, 0, None, Advice::DontNeed)
            .map_err(|e| self.0.place("forgetting its pages", e.into()))
    }
}

impl AsFd for FileStore {
    /// The description that all I/O uses: a lock on it is a fence.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl Store for FileStore {
    fn info(&self) -> StoreInfo {
        let inner = &self.0;
        StoreInfo {
            len: inner.len.load(Ordering::Acquire),
            align: inner.align.offset,
            // Without O_DIRECT only file systems that were tested for it may promise this. So
            // far none was.
            fresh_zero: inner.regular && inner.cache == Cache::None,
            punches: !inner.no_punching.load(Ordering::Relaxed),
        }
    }

    fn look_at_len(&self) -> Result<u64> {
        let inner = &self.0;
        if inner.regular && !inner.writable {
            let stat = rustix::fs::fstat(&inner.fd).map_err(io::Error::from)?;
            let len = u64::try_from(stat.st_size).unwrap_or(0);
            inner.len.fetch_max(len, Ordering::AcqRel);
        }
        Ok(self.info().len)
    }

    fn room(&self) -> Result<u64> {
        match self.0.room.get() {
            Some(room) => room.left().map_err(|e| e.at(self.0.path.display())),
            None => Ok(u64::MAX),
        }
    }

    async fn read_at(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        self.0.check("reading", at, buf.len() as u64)?;
        self.0.check_alignment("reading", at, &buf)?;
        self.0.read(at, buf).await
    }

    async fn write_at(&self, at: u64, data: Bytes, reach: Reach) -> Result<()> {
        self.0.check_writable()?;
        self.0.check("writing", at, data.len() as u64)?;
        self.0.check_alignment("writing", at, &data)?;
        self.0.notice_holes(at, data.len() as u64);
        let taken = self.0.take_space(at, data.len() as u64).await;
        self.0.noticed(taken)?;
        let written = match reach {
            Reach::Cache => self.0.write(at, data, false).await,
            Reach::Durable => self.0.write_durably(at, data).await,
        };
        self.0.noticed(written)
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        let (_one, old) = self.0.sized(len).await?;
        if len > old {
            let grown = self.0.grow(old, len).await;
            // More than is needed may be asked for, and then less.
            match len - old > MODEST {
                true => grown?,
                false => self.0.noticed(grown)?,
            }
        } else if self.0.regular {
            self.0.truncate(len, old)?;
        }
        self.0.len.store(len, Ordering::Release);
        Ok(())
    }

    async fn lengthen(&self, len: u64) -> Result<()> {
        let (_one, old) = self.0.sized(len).await?;
        if len > old {
            // What was taken up to the end was taken for the whole of the unit that it is in.
            self.0.fate.backed().lose(old, len);
            self.0.noticed(self.0.ftruncate(len))?;
            self.0.len.store(len, Ordering::Release);
        }
        Ok(())
    }

    async fn punch(&self, at: u64, len: u64, space: Space) -> Result<()> {
        self.0.check_writable()?;
        self.0.check("zeroing", at, len)?;
        if len == 0 {
            return Ok(());
        }
        let done = match space {
            Space::Free => self.0.punch(at, len).await,
            Space::Keep => self.0.zero(at, len).await,
        };
        self.0.noticed(match done {
            Ok(false) => self.0.write_zeros(at, len).await,
            done => done.map(|_| ()),
        })
    }

    async fn flush(&self) -> Result<()> {
        let inner = &self.0;
        let _alone = inner.alone().await?;
        disk::fdatasync(inner.target(&inner.barrier))
            .await
            .map_err(|e| {
                inner.fate.poison(format!("fdatasync: {e}"));
                // Whatever the cause, it is no longer one that goes away: data may be lost.
                Error::new(Kind::Io, format!("fdatasync failed, data may be lost: {e}"))
                    .at(inner.path.display())
            })
    }

    async fn settle(&self) {
        self.0.fate.settle().await;
    }

    async fn extent(&self, at: u64) -> Result<(bool, u64)> {
        self.0.check("looking for data", at, 1)?;
        exec::breathe().await;
        Ok(self.0.extent(at))
    }
}

impl Inner {
    fn target<'a>(&'a self, witness: &'a Arc<dyn Witness>) -> disk::Target<'a> {
        disk::Target {
            fd: &self.fd,
            witness,
            here: self.in_memory,
        }
    }

    fn place(&self, what: &str, error: io::Error) -> Error {
        Error::from(error).at(what).at(self.path.display())
    }

    /// Notices that the storage had less space than it promised.
    fn noticed<T>(&self, outcome: Result<T>) -> Result<T> {
        outcome.inspect_err(|e| {
            if let (Kind::NoSpace, Some(room)) = (e.kind(), self.room.get()) {
                room.ran_out();
            }
        })
    }

    fn fail(&self, what: &str, at: u64, len: u64, error: io::Error) -> Error {
        self.place(&format!("{what} {len} bytes at offset {at}"), error)
    }

    fn check(&self, what: &str, at: u64, len: u64) -> Result<()> {
        let now = self.len.load(Ordering::Acquire);
        if at.checked_add(len).is_some_and(|end| end <= now) {
            return Ok(());
        }
        let why = format!("{what} {len} bytes at offset {at}: it has only {now} bytes");
        Err(Error::invalid(why).at(self.path.display()))
    }

    fn check_alignment(&self, what: &str, at: u64, data: &[u8]) -> Result<()> {
        let Alignment { offset, memory } = self.align;
        let len = data.len() as u64;
        let fits = at.is_multiple_of(offset) && len.is_multiple_of(offset);
        if fits && (data.is_empty() || buf::is_aligned(data, memory)) {
            return Ok(());
        }
        let why = format!(
            "{what} {len} bytes at offset {at}: direct I/O wants multiples of {offset}, \
             in memory of {memory}"
        );
        Err(Error::invalid(why).at(self.path.display()))
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(Kind::ReadOnly, "it is open read-only").at(self.path.display()))
    }

    fn check_poison(&self) -> Result<()> {
        self.fate.check().map_err(|e| e.at(self.path.display()))
    }

    /// No other barrier is under way, and none has failed.
    async fn alone(&self) -> Result<RwLockWriteGuard<'_, ()>> {
        let alone = self.barriers.write().await;
        self.fate.settle().await;
        self.check_poison()?;
        Ok(alone)
    }

    fn fixed_len(&self, len: u64, old: u64) -> Error {
        let why = format!("a block device has its length, {old} bytes; it cannot become {len}");
        Error::unsupported(why).at(self.path.display())
    }

    async fn read(&self, at: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let len = buf.len();
        let mut done = 0;
        if self.cache == Cache::Writeback && !self.in_memory && len >= INLINE_MIN && exec::on_ring()
        {
            // What is not in memory comes through the ring; so does every error.
            let inline = disk::read_cached(self.target(&self.quiet), &mut buf, 0, at).await;
            done = inline.unwrap_or(0);
        }
        while done < len {
            let result;
            let from = at + done as u64;
            (buf, result) = disk::read(self.target(&self.quiet), buf, done, from).await;
            let got = result.map_err(|e| self.fail("reading", at, len as u64, e))?;
            if got == 0 || !(got as u64).is_multiple_of(self.align.offset) {
                let end = from + got as u64;
                let why = format!("reading {len} bytes at offset {at}: it ends at {end}");
                return Err(Error::new(Kind::Io, why).at(self.path.display()));
            }
            done += got;
        }
        Ok(buf)
    }

    async fn write(&self, at: u64, mut data: Bytes, durable: bool) -> Result<()> {
        let len = data.len() as u64;
        let mut from = at;
        let witness = if durable { &self.barrier } else { &self.quiet };
        let small = data.len() <= INLINE_WRITE_MAX;
        let cached = !durable && self.cache == Cache::Writeback;
        while !data.is_empty() {
            let mut target = self.target(witness);
            target.here = small && (cached || self.in_memory);
            let result = disk::write(target, data.clone(), from, durable).await;
            let result = result.and_then(|n| match n {
                0 => Err(io::ErrorKind::WriteZero.into()),
                n => Ok(n),
            });
            let written = result.map_err(|e| self.fail("writing", at, len, e))?;
            data.advance(written);
            from += written as u64;
        }
        Ok(())
    }

    async fn write_durably(&self, at: u64, data: Bytes) -> Result<()> {
        let (_shared, _alone);
        if self.cache == Cache::None {
            // A direct write is told its own error.
            _shared = self.barriers.read().await;
            self.check_poison()?;
        } else {
            _alone = self.alone().await?;
        }
        let result = self.write(at, data, true).await;
        if let Err(e) = &result {
            // A direct write that found no space has lost nothing. Any other failure may be that
            // of earlier, cached data, and no flush would be told again.
            if self.cache == Cache::Writeback || e.kind() != Kind::NoSpace {
                self.fate.poison(e.to_string());
            }
        }
        // A poisoned store gives nobody reason to wait for space.
        result.map_err(|e| match self.cache {
            Cache::Writeback => e.into_final(),
            Cache::None => e,
        })
    }

    /// Before a buffered write: takes the space it may need, so that a full file system answers
    /// the write, and not the flush.
    async fn take_space(&self, at: u64, len: u64) -> Result<()> {
        let end = at + len;
        let losses = {
            let backed = self.fate.backed();
            if !self.takes_space() || len == 0 || backed.covers(at, end) {
                return Ok(());
            }
            backed.losses()
        };
        let first = at - at % UNIT;
        let past = end
            .next_multiple_of(UNIT)
            .max(self.data_from(first))
            .min(self.len.load(Ordering::Acquire))
            .max(end);
        match self.allocate(first, past).await {
            Err(e) if e.kind() == Kind::NoSpace => {
                // Not for the whole units, but perhaps for what is written.
                self.allocate(at, end).await
            }
            Err(e) => Err(e),
            Ok(()) => {
                self.fate
                    .backed()
                    .add(first, past.next_multiple_of(UNIT), losses);
                Ok(())
            }
        }
    }

    /// Before a direct write: a cluster that an image has takes its space as it is written to.
    fn notice_holes(&self, at: u64, len: u64) {
        let has_hole = || {
            let (is_data, until) = self.extent(at);
            !is_data || until < at + len
        };
        if let (Cache::None, Some(room)) = (self.cache, self.room.get()) {
            room.notice(|| !self.in_memory && has_hole());
        }
    }

    /// Where the data that begins at `at` ends, within limits: what has its space already costs one
    /// call for all of it, not one for each unit. Not in memory, where looking means counting pages.
    fn data_from(&self, at: u64) -> u64 {
        if self.in_memory {
            return at;
        }
        match self.extent(at) {
            (true, until) => until.min(at + SPACE_AHEAD) / UNIT * UNIT,
            (false, _) => at,
        }
    }

    fn takes_space(&self) -> bool {
        let able = !self.no_space_taking.load(Ordering::Relaxed);
        self.cache == Cache::Writeback && self.regular && able
    }

    /// Allocates `at..end` without changing the length or any byte.
    async fn allocate(&self, at: u64, end: u64) -> Result<()> {
        let mode = FallocateFlags::KEEP_SIZE;
        match disk::fallocate(self.target(&self.quiet), mode, at, end - at).await {
            Err(e) if unsupported(&e) => {
                self.say_once(
                    &self.no_space_taking,
                    "take space ahead: when it is full, \
                     a flush will fail, not a write",
                    &e,
                );
                Ok(())
            }
            result => result.map_err(|e| self.fail("taking space for", at, end - at, e)),
        }
    }

    /// The length, which nobody else changes meanwhile, of a file that can have this one.
    async fn sized(&self, len: u64) -> Result<(MutexGuard<'_, ()>, u64)> {
        self.check_writable()?;
        let one = self.sizing.lock().await;
        let old = self.len.load(Ordering::Acquire);
        match self.regular || len == old {
            true => Ok((one, old)),
            false => Err(self.fixed_len(len, old)),
        }
    }

    async fn grow(&self, old: u64, len: u64) -> Result<()> {
        if !self.takes_space() {
            return self.ftruncate(len);
        }
        let losses = self.fate.backed().losses();
        let grown = match self.allocate(old, len).await {
            Ok(()) => self.ftruncate(len),
            failed => failed,
        };
        if grown.is_err() {
            // Gives back what was allocated past the end; without effect, it is only space.
            let _ = self.ftruncate(old);
        } else if self.takes_space() {
            self.fate.backed().add(old, len, losses);
        }
        grown
    }

    fn truncate(&self, len: u64, old: u64) -> Result<()> {
        self.fate.backed().lose(len, old);
        let result = self.ftruncate(len);
        self.fate.backed().lose(len, old);
        result
    }

    fn ftruncate(&self, len: u64) -> Result<()> {
        rustix::io::retry_on_intr(|| rustix::fs::ftruncate(&self.fd, len))
            .map_err(|e| self.place(&format!("setting its length to {len} bytes"), e.into()))
    }

    /// False when the storage cannot.
    async fn punch(&self, at: u64, len: u64) -> Result<bool> {
        self.fate.backed().lose(at, at + len);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let done = self
            .zero_in_place(&self.no_punching, "punch holes", mode, at, len)
            .await;
        self.fate.backed().lose(at, at + len);
        done
    }

    /// False when the storage cannot.
    async fn zero(&self, at: u64, len: u64) -> Result<bool> {
        let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        self.zero_in_place(&self.no_zeroing, "zero ranges", mode, at, len)
            .await
    }

    async fn zero_in_place(
        &self,
        unable: &AtomicBool,
        what: &str,
        mode: FallocateFlags,
        at: u64,
        len: u64,
    ) -> Result<bool> {
        if unable.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match disk::fallocate(self.target(&self.quiet), mode, at, len).await {
            Ok(()) => Ok(true),
            Err(e) if unsupported(&e) => {
                self.say_once(unable, &format!("{what}: zeros are written instead"), &e);
                Ok(false)
            }
            // A block device wants whole sectors.
            Err(e) if !self.regular && e.kind() == io::ErrorKind::InvalidInput => Ok(false),
            Err(e) => Err(self.fail("zeroing", at, len, e)),
        }
    }

    fn say_once(&self, said: &AtomicBool, what: &str, error: &io::Error) {
        if !said.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{}: the storage cannot {what} ({error})",
                self.path.display()
            );
        }
    }

    /// Zeros by writing them. A block that the range covers in part is read and written back:
    /// callers keep other writes away from it, as for every request below the alignment.
    async fn write_zeros(&self, at: u64, len: u64) -> Result<()> {
        let block = self.align.offset;
        let end = at + len;
        let zeros = buf::zeros(ZEROS.min(len.next_multiple_of(block)) as usize);
        let mut at = at;
        while at < end {
            let start = at - at % block;
            let step = if at > start || end - at < block {
                let stop = end.min(start + block);
                let mut edge = self.read(start, buf::aligned(block as usize)).await?;
                edge[(at - start) as usize..(stop - start) as usize].fill(0);
                self.write(start, edge.freeze(), false).await?;
                stop - at
            } else {
                let step = (zeros.len() as u64).min(end - at) / block * block;
                self.take_space(at, step).await?;
                self.write(at, zeros.slice(..step as usize), false).await?;
                step
            };
            at += step;
        }
        Ok(())
    }

    /// Where storage does not tell, everything is data.
    fn extent(&self, at: u64) -> (bool, u64) {
        let len = self.len.load(Ordering::Acquire);
        if !self.regular {
            return (true, len);
        }
        match rustix::fs::seek(&self.fd, SeekFrom::Data(at)) {
            Ok(data) if data > at => return (false, data.min(len)),
            Ok(_) => {}
            Err(rustix::io::Errno::NXIO) => return (false, len),
            Err(_) => return (true, len),
        }
        match rustix::fs::seek(&self.fd, SeekFrom::Hole(at)) {
            Ok(hole) if hole > at => (true, hole.min(len)),
            _ => (true, len),
        }
    }
}

/// Whether the file system knows holes. Asked past the end of the file, where nothing is.
fn punches(fd: &OwnedFd, len: u64) -> bool {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let past = len.next_multiple_of(UNIT);
    match rustix::fs::fallocate(fd, mode, past, UNIT) {
        Err(e) => !unsupported(&e.into()),
        Ok(()) => true,
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

#[cfg(test)]
mod tests;
