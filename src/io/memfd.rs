//! Memory that outlives the process that writes it: words that change, or bytes that do not.
//!
//! Words are sealed against any change of their size, so that no holder of the descriptor can
//! make another's access fault, and only touched as atomics. Who only watches them gets a descriptor
//! that can be read and no more. Bytes are sealed altogether.

use crate::tracker;
use ploop_formats::ledger::Words;
use ploop_formats::{Error, Result};
use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create, open,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a word.
const WORD: usize = size_of::<u64>();
/// No holder may change the size, or these seals.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// Words shared by all who hold the same memfd.
pub struct SharedWords {
    fd: OwnedFd,
    map: Mapping,
}

/// Words that somebody else changes.
pub struct WatchedWords(Mapping);

/// Words of a memfd in our memory.
struct Mapping {
    words: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the mapping belongs to the value and is only accessed through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a memfd whose size cannot change. Without `WRITE` in `prot` no word may be stored to.
    fn new(fd: &OwnedFd, prot: ProtFlags) -> Result<Self> {
        let seals = fcntl_get_seals(fd)
            .map_err(|_| Error::invalid("shared words: the descriptor is no memfd"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(Error::invalid("shared words: the memfd may still shrink"));
        }
        let bytes = usize::try_from(fstat(fd).map_err(failed)?.st_size).unwrap_or(0);
        if bytes == 0 || bytes % WORD != 0 {
            return Err(Error::invalid(format!(
                "shared words: {bytes} bytes hold no whole words"
            )));
        }
        // SAFETY: a new mapping at an address that the kernel chooses; the memory behind it
        // cannot shrink, so every access within `bytes` is valid until it is unmapped.
        let map = unsafe { mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, fd, 0) };
        let map = map.map_err(failed)?;
        let words = NonNull::new(map.cast()).expect("a mapping is never at address 0");
        Ok(Self {
            words,
            count: bytes / WORD,
        })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned, holds `count` words and lives as long as `self`;
        // every holder accesses it through atomics.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and no borrow is left.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), self.count * WORD) };
    }
}

impl SharedWords {
    /// `count` words, all 0, in new memory. At least one.
    pub fn create(count: usize) -> Result<Self> {
        let bytes = count.checked_mul(WORD).filter(|&bytes| bytes > 0);
        let bytes = bytes.ok_or_else(|| Error::invalid("shared words: none, or too many"))?;
        let made = || {
            let fd = memory("ploop-words")?;
            ftruncate(&fd, bytes as u64)?;
            fcntl_add_seals(&fd, SEALS)?;
            Ok(fd)
        };
        Self::from_fd(made().map_err(failed)?)
    }

    /// The words behind a descriptor that [`SharedWords::create`] made, perhaps in another
    /// process. Anything whose size could still change is refused.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let map = Mapping::new(&fd, ProtFlags::READ | ProtFlags::WRITE)?;
        Ok(Self { fd, map })
    }

    /// A descriptor of the same memory for somebody who may read it and no more: it can neither
    /// be written nor mapped for writing.
    ///
    /// Its own user and root can open it anew for writing through `/proc`, as they could without
    /// it; nobody else can, whoever it is handed on to.
    pub fn read_only(&self) -> Result<OwnedFd> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        open(path.as_str(), flags, Mode::empty()).map_err(failed)
    }

    /// How many.
    #[allow(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(&self) -> usize {
        self.map.count
    }

    /// Adds to a word, with wrap-around. For counters: no other word is ordered by it.
    pub fn add(&self, i: usize, n: u64) {
        self.words()[i].fetch_add(n, Ordering::Relaxed);
    }

    /// A counter's value.
    pub fn at(&self, i: usize) -> u64 {
        self.words()[i].load(Ordering::Relaxed)
    }

    /// Sets a counter.
    pub fn set(&self, i: usize, value: u64) {
        self.words()[i].store(value, Ordering::Relaxed);
    }

    fn words(&self) -> &[AtomicU64] {
        self.map.words()
    }
}

impl WatchedWords {
    /// The words behind a descriptor that [`SharedWords::read_only`] made, perhaps in another
    /// process. Anything whose size could still change is refused.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        Mapping::new(&fd, ProtFlags::READ).map(Self)
    }

    /// How many.
    #[allow(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(&self) -> usize {
        self.0.count
    }

    /// A word's present value; 0 when there is none of that number.
    pub fn at(&self, i: usize) -> u64 {
        let word = self.0.words().get(i);
        word.map_or(0, |word| word.load(Ordering::Relaxed))
    }
}

impl AsFd for SharedWords {
    /// To be handed to whoever shall outlive this process.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for SharedWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedWords({})", self.map.count)
    }
}

impl fmt::Debug for WatchedWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WatchedWords({})", self.0.count)
    }
}

impl Words for SharedWords {
    fn count(&self) -> usize {
        self.map.count
    }

    fn load(&self, i: usize) -> u64 {
        self.words()
            .get(i)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, i: usize, value: u64) {
        if let Some(word) = self.words().get(i) {
            word.store(value, Ordering::Release);
        }
    }
}

impl tracker::Words for SharedWords {
    fn count(&self) -> usize {
        self.map.count
    }

    fn load(&self, i: usize) -> u64 {
        Words::load(self, i)
    }

    fn add(&self, i: usize, bits: u64) {
        if let Some(word) = self.words().get(i) {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }
}

/// New memory of this user's: who gets a descriptor of it that cannot write cannot open it anew
/// for writing, either, and nobody can execute it.
fn memory(name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3 there is no such flag.
        Err(rustix::io::Errno::INVAL) => memfd_create(name, flags)?,
        made => made?,
    };
    fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    Ok(fd)
}

/// Bytes that nobody can change any more, for whoever holds the descriptor.
pub fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let made = || {
        let file = File::from(memory(name)?);
        file.write_all_at(bytes, 0)?;
        fcntl_add_seals(&file, SEALS | SealFlags::WRITE)?;
        Ok(OwnedFd::from(file))
    };
    made().map_err(|e: io::Error| Error::from(e).at(name))
}

/// The bytes of a descriptor that [`sealed`] made, perhaps in another process.
pub fn contents(fd: &OwnedFd) -> Result<Vec<u8>> {
    let len = fstat(fd).map_err(io::Error::from)?.st_size;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let mut filled = 0;
    // At offsets: all holders share one position.
    while let Some(room) = bytes.get_mut(filled..).filter(|room| !room.is_empty()) {
        match rustix::io::pread(fd, room, filled as u64).map_err(io::Error::from)? {
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            got => filled += got,
        }
    }
    Ok(bytes)
}

fn failed(error: rustix::io::Errno) -> Error {
    Error::from(io::Error::from(error)).at("shared words")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop_formats::ledger::Ledger;
    use ploop_formats::units::VirtCluster;
    use std::sync::Arc;

    #[test]
    fn what_one_holder_stores_another_finds_after_the_first_is_gone() {
        let first = SharedWords::create(100).unwrap();
        let kept = first.as_fd().try_clone_to_owned().unwrap();
        let ledger = Ledger::new(Arc::new(first));
        ledger.put(7, VirtCluster(3), 42);
        ledger.poison();
        drop(ledger);
        let next = Ledger::new(Arc::new(SharedWords::from_fd(kept).unwrap()));
        assert_eq!(next.slots(), 99);
        assert_eq!(
            next.entries().collect::<Vec<_>>(),
            [(7, VirtCluster(3), 42)]
        );
        assert!(next.is_poisoned());
    }

    #[test]
    fn words_that_are_not_there_read_zero_and_ignore_stores() {
        let words = SharedWords::create(2).unwrap();
        words.store(2, 9);
        words.store(1, 5);
        assert_eq!(
            (words.count(), words.load(0), words.load(1), words.load(2)),
            (2, 0, 5, 0)
        );
    }

    #[test]
    fn memory_that_could_shrink_or_is_none_is_refused() {
        let fd = memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 64).unwrap();
        assert!(SharedWords::from_fd(fd).is_err());
        assert!(SharedWords::from_fd(tempfile::tempfile().unwrap().into()).is_err());
        let odd = memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&odd, 12).unwrap();
        fcntl_add_seals(&odd, SEALS).unwrap();
        assert!(SharedWords::from_fd(odd).is_err());
        assert!(SharedWords::create(0).is_err() && SharedWords::create(usize::MAX).is_err());
    }

    #[test]
    fn who_watches_sees_every_change_and_can_make_none() {
        let words = SharedWords::create(8).unwrap();
        let fd = words.read_only().unwrap();
        assert!(rustix::io::pwrite(&fd, &[1; 8], 0).is_err() && ftruncate(&fd, 64).is_err());
        assert!(SharedWords::from_fd(fd.try_clone().unwrap()).is_err());
        let watched = WatchedWords::from_fd(fd).unwrap();
        words.set(7, 3);
        assert_eq!((watched.len(), watched.at(7), watched.at(8)), (8, 3, 0));
    }

    #[test]
    fn no_other_user_can_open_the_memory_anew() {
        let words = SharedWords::create(8).unwrap();
        let (fd, bytes) = (words.read_only().unwrap(), sealed("t", b"the key").unwrap());
        for fd in [&fd, &bytes] {
            let mode = fstat(fd).unwrap().st_mode;
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn sealed_bytes_are_read_by_all_holders_and_changed_by_none() {
        let fd = sealed("t", b"the key").unwrap();
        let other = fd.try_clone().unwrap();
        for holder in [&fd, &other, &fd] {
            assert_eq!(contents(holder).unwrap(), b"the key");
        }
        assert!(rustix::io::pwrite(&other, b"x", 0).is_err());
        assert!(ftruncate(&other, 1).is_err());
        assert!(contents(&sealed("t", b"").unwrap()).unwrap().is_empty());
    }

    #[test]
    fn nobody_can_change_the_size_of_shared_words() {
        let words = SharedWords::create(8).unwrap();
        assert!(ftruncate(&words, 8).is_err() && ftruncate(&words, 8192).is_err());
    }
}
