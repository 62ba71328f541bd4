//! Promises of file stores: with every engine, in every cache mode, on several file systems.

use super::*;
use crate::io::exec::{Engine, run, spawn};
use rustix::fs::StatFs;
use std::pin::pin;
use std::process::Command;
use std::task::{Context, Poll, Waker};

/// Files of this size are used where nothing else is said.
const SIZE: u64 = 3 << 20;

/// How operations are driven: by an executor, or on a thread without one.
const DRIVERS: [Option<Engine>; 3] = [Some(Engine::Ring), Some(Engine::Poll), None];

fn drive<T>(driver: Option<Engine>, future: impl Future<Output = T>) -> T {
    match driver {
        Some(engine) => run(engine, future).unwrap(),
        None => {
            let mut future = pin!(future);
            match future
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()))
            {
                Poll::Ready(output) => output,
                Poll::Pending => panic!("without an executor nothing waits"),
            }
        }
    }
}

fn folders() -> Vec<tempfile::TempDir> {
    let mut folders = vec![tempfile::tempdir().unwrap()];
    folders.extend(tempfile::tempdir_in("/dev/shm"));
    folders
}

fn new_file(path: &Path, len: u64, cache: Cache) -> FileStore {
    std::fs::File::create(path).unwrap().set_len(len).unwrap();
    FileStore::open(path, true, cache).unwrap()
}

/// Runs a test on a fresh file of [`SIZE`] with every driver, cache mode and file system.
fn everywhere(test: impl AsyncFn(FileStore)) {
    for folder in folders() {
        for cache in [Cache::None, Cache::Writeback] {
            for driver in DRIVERS {
                let store = new_file(&folder.path().join("f"), SIZE, cache);
                println!("{store:?} {driver:?}, told {:?}", store.why_cached());
                drive(driver, test(store));
            }
        }
    }
}

/// A small generator of numbers: the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % end
    }

    /// An aligned range within `len`, mostly small.
    fn range(&mut self, len: u64, align: u64) -> (u64, u64) {
        let most = [align * 3, 100_000, 1 << 20][self.below(3) as usize];
        let at = self.below(len) / align * align;
        let n = (self.below(most) / align * align).min((len - at) / align * align);
        (at, n)
    }

    fn bytes(&mut self, len: u64) -> BytesMut {
        let mut bytes = buf::aligned(len as usize);
        let seed = self.below(1 << 30) as usize;
        bytes
            .iter_mut()
            .enumerate()
            .for_each(|(i, b)| *b = (seed + i * 31 + i / 256) as u8);
        bytes
    }
}

async fn read(store: &FileStore, at: u64, len: u64) -> BytesMut {
    store.read_at(at, buf::aligned(len as usize)).await.unwrap()
}

fn check_type<T: Send + Sync + Clone + 'static>(_: &T) {}

#[test]
fn what_was_written_is_read_whatever_sizes_and_places() {
    everywhere(async |store| {
        check_type(&store);
        let (mut dice, align) = (Dice(1), store.info().align);
        let mut model = vec![0u8; SIZE as usize];
        for round in 0..300 {
            let (at, len) = dice.range(SIZE, align);
            let span = at as usize..(at + len) as usize;
            if round % 3 == 0 {
                assert!(read(&store, at, len).await == model[span], "round {round}");
                continue;
            }
            let data = dice.bytes(len);
            model[span].copy_from_slice(&data);
            let reach = if round % 10 == 1 {
                Reach::Durable
            } else {
                Reach::Cache
            };
            store.write_at(at, data.freeze(), reach).await.unwrap();
            if round % 50 == 7 {
                store.flush().await.unwrap();
            }
        }
        assert!(read(&store, 0, SIZE).await == model[..]);
        assert!(std::fs::read(store.path()).unwrap() == model);
    });
}

/// Zeroing by the kernel, and by writing zeros where `unable`.
fn zeroed_ranges_read_zero(unable: bool) {
    everywhere(async |store| {
        store.0.no_punching.store(unable, Ordering::Relaxed);
        store.0.no_zeroing.store(unable, Ordering::Relaxed);
        let mut dice = Dice(2);
        let mut model = dice.bytes(SIZE).to_vec();
        let all = Bytes::copy_from_slice(&model);
        store
            .write_at(0, aligned_copy(&all), Reach::Cache)
            .await
            .unwrap();
        for round in 0..60 {
            let (at, len) = dice.range(SIZE, 1);
            let space = if round % 2 == 0 {
                Space::Free
            } else {
                Space::Keep
            };
            store.punch(at, len, space).await.unwrap();
            model[at as usize..(at + len) as usize].fill(0);
            let (at, len) = dice.range(SIZE, store.info().align);
            let data = dice.bytes(len);
            model[at as usize..(at + len) as usize].copy_from_slice(&data);
            store
                .write_at(at, data.freeze(), Reach::Cache)
                .await
                .unwrap();
            if round % 10 == 0 {
                assert!(read(&store, 0, SIZE).await == model[..], "round {round}");
            }
        }
        assert!(read(&store, 0, SIZE).await == model[..]);
    });
}

fn aligned_copy(data: &[u8]) -> Bytes {
    let mut copy = buf::aligned(data.len());
    copy.copy_from_slice(data);
    copy.freeze()
}

#[test]
fn zeroed_ranges_read_zero_also_at_unaligned_edges() {
    zeroed_ranges_read_zero(false);
}

#[test]
fn zeroed_ranges_read_zero_also_where_the_storage_cannot_zero() {
    zeroed_ranges_read_zero(true);
}

#[test]
fn a_new_length_adds_zeros_and_forgets_what_was_cut_off() {
    everywhere(async |store| {
        let full = Bytes::from(BytesMut::from(&buf::zeros(1 << 16)[..]));
        let data = aligned_copy(&vec![7u8; full.len()]);
        store
            .write_at(SIZE - (1 << 16), data, Reach::Cache)
            .await
            .unwrap();
        store.set_len(SIZE - (1 << 15)).await.unwrap();
        assert_eq!(store.info().len, SIZE - (1 << 15));
        store.set_len(2 * SIZE).await.unwrap();
        assert_eq!(std::fs::metadata(store.path()).unwrap().len(), 2 * SIZE);
        let tail = read(&store, SIZE - (1 << 16), 1 << 16).await;
        assert!(tail[..1 << 15].iter().all(|&b| b == 7) && tail[1 << 15..].iter().all(|&b| b == 0));
        assert!(read(&store, SIZE, SIZE).await.iter().all(|&b| b == 0));
        store.flush().await.unwrap();
    });
}

#[test]
fn hundreds_of_operations_at_once_all_complete() {
    everywhere(async |store| {
        let done = Arc::new(AtomicU64::new(0));
        if super::super::exec::on_ring() {
            for i in 0..SIZE / 4096 {
                let (store, done) = (store.clone(), Arc::clone(&done));
                spawn(async move {
                    let data = aligned_copy(&[i as u8; 4096]);
                    store.write_at(i * 4096, data, Reach::Cache).await.unwrap();
                    assert!(
                        read(&store, i * 4096, 4096)
                            .await
                            .iter()
                            .all(|&b| b == i as u8)
                    );
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
            while done.load(Ordering::Relaxed) < SIZE / 4096 {
                exec::sleep(std::time::Duration::from_millis(1)).await;
            }
        }
    });
}

#[test]
fn requests_that_break_the_contract_are_refused_and_change_nothing() {
    everywhere(async |store| {
        let kind = |r: Result<()>| r.unwrap_err().kind();
        let page = || aligned_copy(&[1; 4096]);
        let past = store
            .read_at(SIZE - 4096, buf::aligned(8192))
            .await
            .unwrap_err();
        assert_eq!(past.kind(), Kind::Invalid);
        assert!(
            past.to_string()
                .contains(&format!("offset {}", SIZE - 4096)),
            "{past}"
        );
        assert!(past.to_string().contains("/f: "), "{past}");
        assert_eq!(
            kind(store.write_at(SIZE, page(), Reach::Cache).await),
            Kind::Invalid
        );
        assert_eq!(
            kind(store.write_at(u64::MAX - 100, page(), Reach::Cache).await),
            Kind::Invalid
        );
        assert_eq!(
            kind(store.punch(SIZE - 1, 2, Space::Free).await),
            Kind::Invalid
        );
        assert!(store.extent(SIZE).await.is_err());
        if store.cache() == Cache::None {
            let odd = store.write_at(100, page(), Reach::Cache).await;
            assert_eq!(kind(odd), Kind::Invalid);
            let odd = store.write_at(0, page().slice(..100), Reach::Cache).await;
            assert_eq!(kind(odd), Kind::Invalid);
        }
        assert_eq!(std::fs::metadata(store.path()).unwrap().len(), SIZE);
        assert!(std::fs::read(store.path()).unwrap().iter().all(|&b| b == 0));
        store
            .write_at(SIZE, Bytes::new(), Reach::Durable)
            .await
            .unwrap();
        store.punch(SIZE, 0, Space::Free).await.unwrap();
    });
}

#[test]
fn a_file_open_for_reading_is_never_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    new_file(&path, 8192, Cache::Writeback);
    for cache in [Cache::None, Cache::Writeback] {
        let store = FileStore::open(&path, false, cache).unwrap();
        drive(None, async {
            read(&store, 0, 8192).await;
            let kind = |r: Result<()>| r.unwrap_err().kind();
            let page = aligned_copy(&[1; 4096]);
            assert_eq!(
                kind(store.write_at(0, page, Reach::Cache).await),
                Kind::ReadOnly
            );
            assert_eq!(kind(store.set_len(0).await), Kind::ReadOnly);
            assert_eq!(kind(store.punch(0, 1, Space::Keep).await), Kind::ReadOnly);
            store.flush().await.unwrap();
        });
    }
}

#[test]
fn a_file_that_shrank_behind_our_back_is_an_error_and_not_old_memory() {
    everywhere(async |store| {
        std::fs::File::options()
            .write(true)
            .open(store.path())
            .unwrap()
            .set_len(4096)
            .unwrap();
        let error = store.read_at(0, buf::aligned(8192)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.to_string().contains("ends at 4096"), "{error}");
    });
}

#[test]
fn only_direct_files_promise_fresh_zeros() {
    everywhere(async |store| {
        assert_eq!(store.info().fresh_zero, store.cache() == Cache::None);
        assert!(store.info().align == 1 || store.cache() == Cache::None);
    });
}

#[test]
fn without_direct_io_the_page_cache_is_used_and_the_reason_told() {
    let store = FileStore::open(Path::new("/proc/version"), false, Cache::None).unwrap();
    assert_eq!(store.cache(), Cache::Writeback);
    assert!(store.why_cached().is_some());
    assert!(!store.info().fresh_zero);
    let error = FileStore::open(Path::new("/dev/null"), true, Cache::Writeback).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    let error = FileStore::open(Path::new("/no/such/file"), true, Cache::None).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
}

#[test]
fn holes_are_told_from_data() {
    everywhere(async |store| {
        let step = 1 << 20;
        store
            .write_at(step, aligned_copy(&vec![1; step as usize]), Reach::Cache)
            .await
            .unwrap();
        store.flush().await.unwrap();
        assert_eq!(store.extent(0).await.unwrap(), (false, step));
        assert_eq!(store.extent(step + 5).await.unwrap(), (true, 2 * step));
        assert_eq!(store.extent(2 * step).await.unwrap(), (false, SIZE));
        store.punch(step, step, Space::Free).await.unwrap();
        assert_eq!(store.extent(0).await.unwrap(), (false, SIZE));
    });
}

/// Polls once, as if somebody gave up right after.
fn begin(future: &mut std::pin::Pin<Box<impl Future>>) -> bool {
    future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
        .is_pending()
}

#[test]
fn an_abandoned_direct_write_lands_before_settle_returns() {
    let folder = tempfile::tempdir().unwrap();
    let store = new_file(&folder.path().join("f"), SIZE, Cache::None);
    run(Engine::Ring, async {
        let data = aligned_copy(&vec![9; SIZE as usize]);
        let mut write = Box::pin(store.write_at(0, data.clone(), Reach::Cache));
        assert!(begin(&mut write));
        exec::yield_now().await;
        assert!(begin(&mut write));
        drop(write);
        assert!(!data.is_unique(), "the driver keeps the buffer");
        store.settle().await;
        assert!(data.is_unique());
        assert!(read(&store, 0, SIZE).await.iter().all(|&b| b == 9));
    })
    .unwrap();
}

#[test]
fn a_failed_flush_that_nobody_waited_for_still_poisons() {
    everywhere(async |store| {
        store.0.barrier.abandoned();
        store.0.barrier.landed(-libc::EIO);
        let page = || aligned_copy(&[1; 4096]);
        assert_eq!(store.flush().await.unwrap_err().kind(), Kind::Poisoned);
        assert_eq!(store.flush().await.unwrap_err().kind(), Kind::Poisoned);
        let durable = store.write_at(0, page(), Reach::Durable).await;
        assert_eq!(durable.unwrap_err().kind(), Kind::Poisoned);
        store.write_at(0, page(), Reach::Cache).await.unwrap();
        assert!(read(&store, 0, 4096).await.iter().all(|&b| b == 1));
    });
}

#[test]
fn two_threads_with_their_own_executors_share_a_store() {
    let folder = tempfile::tempdir().unwrap();
    for cache in [Cache::None, Cache::Writeback] {
        let store = new_file(&folder.path().join("f"), SIZE, cache);
        let threads: Vec<_> = [Engine::Ring, Engine::Ring, Engine::Poll]
            .into_iter()
            .enumerate()
            .map(|(n, engine)| {
                let store = store.clone();
                std::thread::spawn(move || {
                    run(engine, async {
                        for i in 0..80u64 {
                            let at = (i * 3 + n as u64) * 4096;
                            let data = aligned_copy(&[n as u8 + 1; 4096]);
                            let reach = if i % 4 == 0 {
                                Reach::Durable
                            } else {
                                Reach::Cache
                            };
                            store.write_at(at, data, reach).await.unwrap();
                            if i % 7 == 0 {
                                store.flush().await.unwrap();
                            }
                        }
                    })
                    .unwrap();
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        let all = std::fs::read(store.path()).unwrap();
        assert!((0..240).all(|i| all[i * 4096] == (i % 3) as u8 + 1));
    }
}

/// A small mounted file system; `None` where this process may not mount.
struct Small {
    at: tempfile::TempDir,
    _image: Option<tempfile::TempDir>,
}

fn command(line: &str) -> bool {
    let out = Command::new("sh").args(["-c", line]).output().unwrap();
    if !out.status.success() {
        eprintln!("{line}: {}", String::from_utf8_lossy(&out.stderr));
    }
    out.status.success()
}

fn wait_until(what: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !what() && start.elapsed().as_secs() < 10 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

impl Small {
    fn tmpfs(size: &str) -> Option<Self> {
        let at = tempfile::tempdir().unwrap();
        let mounted = command(&format!(
            "mount -t tmpfs -o size={size} t {}",
            at.path().display()
        ));
        mounted.then_some(Self { at, _image: None })
    }

    /// ext4 with delayed allocation, as containers' hosts have it.
    fn ext4(within: Option<&Path>, size: &str) -> Option<Self> {
        let (at, image) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = within.unwrap_or(image.path()).join("image");
        let (file, to) = (file.display(), at.path().display());
        let mounted = command(&format!(
            "truncate -s {size} {file} && mkfs.ext4 -q -O ^has_journal {file} \
             && mount -o loop {file} {to}"
        ));
        mounted.then_some(Self {
            at,
            _image: Some(image),
        })
    }

    fn all() -> Vec<Self> {
        let all: Vec<_> = [Self::tmpfs("1m"), Self::ext4(None, "2m")]
            .into_iter()
            .flatten()
            .collect();
        if all.is_empty() {
            eprintln!("skipped: no right to mount");
        }
        all
    }

    fn path(&self) -> std::path::PathBuf {
        self.at.path().join("f")
    }

    fn free(&self) -> u64 {
        let stat: StatFs = rustix::fs::statfs(self.at.path()).unwrap();
        stat.f_bfree * stat.f_bsize as u64
    }

    /// Removes the file and waits for its space: after an operation on a ring the kernel may hold
    /// the file for a moment longer than we.
    fn clean(&self, free: u64) {
        std::fs::remove_file(self.path()).unwrap();
        wait_until(|| self.free() >= free);
    }

    /// Takes all space but `left` bytes.
    fn fill(&self, left: u64) -> std::path::PathBuf {
        let path = self.at.path().join("filler");
        let file = std::fs::File::create(&path).unwrap();
        let mode = FallocateFlags::empty();
        let want = self.free().saturating_sub(left);
        // The file system needs some for itself: come close from below.
        for cut in 0..64 {
            let len = want.saturating_sub(cut * 8192);
            if rustix::fs::fallocate(&file, mode, 0, len).is_ok() {
                break;
            }
        }
        rustix::fs::fsync(&file).unwrap();
        path
    }

    /// Removes what [`Small::fill`] made and waits for its space: a process that another test is
    /// just starting may hold the file for a moment.
    fn relieve(&self, filler: &Path) {
        let taken = filler.metadata().unwrap().len();
        let free = self.free() + taken;
        std::fs::remove_file(filler).unwrap();
        wait_until(|| self.free() >= free);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmount = format!("umount {}", self.at.path().display());
        wait_until(|| command(&unmount));
    }
}

/// Writes 16 KiB pieces until there is no space; how many were taken.
async fn write_until_full(store: &FileStore) -> u64 {
    let piece = 16 << 10;
    for i in 0..store.info().len / piece {
        let data = aligned_copy(&vec![i as u8 | 1; piece as usize]);
        match store.write_at(i * piece, data, Reach::Cache).await {
            Ok(()) => {}
            Err(e) => {
                assert_eq!(e.kind(), Kind::NoSpace, "{e}");
                let text = e.to_string();
                assert!(text.contains("/f: ") && text.contains("offset"), "{text}");
                return i;
            }
        }
    }
    panic!("it never got full");
}

#[test]
fn a_full_file_system_answers_the_write_and_never_the_flush() {
    for small in Small::all() {
        for cache in [Cache::None, Cache::Writeback] {
            for driver in DRIVERS {
                let free = small.free();
                // Sparse: every write needs space.
                let store = new_file(&small.path(), 64 << 20, cache);
                drive(driver, async {
                    let taken = write_until_full(&store).await;
                    assert!(taken > 10);
                    store.flush().await.unwrap();
                    store.forget_cache().unwrap();
                    for i in 0..taken {
                        let got = read(&store, i * (16 << 10), 16 << 10).await;
                        assert!(got.iter().all(|&b| b == i as u8 | 1), "{store:?} piece {i}");
                    }
                    // What has its space can be written again and again.
                    let data = aligned_copy(&[5; 8192]);
                    store
                        .write_at(0, data.clone(), Reach::Durable)
                        .await
                        .unwrap();
                    // Space that came back is used again.
                    store.punch(0, 128 << 10, Space::Free).await.unwrap();
                    store.write_at(48 << 20, data, Reach::Cache).await.unwrap();
                    store.flush().await.unwrap();
                });
                drop(store);
                small.clean(free);
            }
        }
    }
}

#[test]
fn growth_beyond_the_space_fails_at_once_in_the_page_cache_mode() {
    for small in Small::all() {
        for driver in DRIVERS {
            let free = small.free();
            let store = new_file(&small.path(), 64 << 10, Cache::Writeback);
            drive(driver, async {
                let error = store.set_len(32 << 20).await.unwrap_err();
                assert_eq!(error.kind(), Kind::NoSpace, "{error}");
                assert_eq!(store.info().len, 64 << 10);
                assert_eq!(std::fs::metadata(store.path()).unwrap().len(), 64 << 10);
                assert!(small.free() + (32 << 10) >= free, "the space came back");
                // What growth promised, others cannot take.
                store.set_len(512 << 10).await.unwrap();
                let filler = small.fill(0);
                for i in 4..32 {
                    let data = aligned_copy(&[i as u8; 16 << 10]);
                    store
                        .write_at(i * (16 << 10), data, Reach::Cache)
                        .await
                        .unwrap();
                }
                store.flush().await.unwrap();
                small.relieve(&filler);
            });
            drop(store);
            small.clean(free);
        }
    }
}

#[test]
fn a_file_that_is_lengthened_takes_its_space_as_it_is_written_to() {
    for small in Small::all() {
        for driver in DRIVERS {
            let free = small.free();
            let store = new_file(&small.path(), 64 << 10, Cache::Writeback);
            drive(driver, async {
                store.lengthen(32 << 20).await.unwrap();
                assert_eq!(store.info().len, 32 << 20);
                assert!(small.free() + (32 << 10) >= free, "it took space");
                let data = aligned_copy(&[3; 16 << 10]);
                store.write_at(31 << 20, data, Reach::Cache).await.unwrap();
                store.flush().await.unwrap();
            });
            drop(store);
            small.clean(free);
        }
    }
}

#[test]
fn a_punched_range_needs_space_again() {
    for small in Small::all() {
        for driver in DRIVERS {
            let free = small.free();
            let store = new_file(&small.path(), 512 << 10, Cache::Writeback);
            drive(driver, async {
                store
                    .write_at(0, aligned_copy(&[1; 128 << 10]), Reach::Cache)
                    .await
                    .unwrap();
                store.punch(0, 64 << 10, Space::Free).await.unwrap();
                store.punch(64 << 10, 64 << 10, Space::Keep).await.unwrap();
                store.flush().await.unwrap();
                let filler = small.fill(0);
                let data = aligned_copy(&[2; 64 << 10]);
                let error = store
                    .write_at(0, data.clone(), Reach::Cache)
                    .await
                    .unwrap_err();
                assert_eq!(error.kind(), Kind::NoSpace, "{error}");
                store
                    .write_at(64 << 10, data.clone(), Reach::Cache)
                    .await
                    .unwrap();
                store.flush().await.unwrap();
                small.relieve(&filler);
                store.write_at(0, data, Reach::Cache).await.unwrap();
                store.flush().await.unwrap();
            });
            drop(store);
            small.clean(free);
        }
    }
}

#[test]
fn a_failed_flush_is_final() {
    for driver in DRIVERS {
        // A file system on a loop device whose own file finds no space: data is lost at writeback.
        let Some((_below, small)) = hollow() else {
            return;
        };
        let store = new_file(&small.path(), 32 << 20, Cache::Writeback);
        drive(driver, async {
            fill(&store).await;
            let error = store.flush().await.unwrap_err();
            assert_eq!(error.kind(), Kind::Io, "{error}");
            for _ in 0..3 {
                assert_eq!(store.flush().await.unwrap_err().kind(), Kind::Poisoned);
            }
        });
    }
}

/// A file system that believes in 64 MiB, and what it lies in, which has 4.
fn hollow() -> Option<(Small, Small)> {
    let below = Small::tmpfs("4m")?;
    let small = Small::ext4(Some(below.at.path()), "64m")?;
    Some((below, small))
}

/// Writes 32 MiB of ones, which only the page cache can take in a [`hollow`] file system.
async fn fill(store: &FileStore) {
    for i in 0..32 {
        let data = aligned_copy(&vec![1; 1 << 20]);
        store.write_at(i << 20, data, Reach::Cache).await.unwrap();
    }
}

#[test]
fn data_that_a_durable_write_reported_lost_is_not_forgotten_by_the_next_worker() {
    use crate::device::Device;
    use crate::disk::Disk;
    use crate::stack::AnyLayer;
    use ploop_formats::ledger::Ledger;
    use ploop_formats::raw::Raw;
    use ploop_formats::units::ClusterSize;
    for driver in DRIVERS {
        let Some((_below, small)) = hollow() else {
            return;
        };
        let ledger = Ledger::local();
        let open = |store| {
            let cluster = ClusterSize::new(64 << 10).unwrap();
            let raw = Raw::open_write(store, cluster, ledger.clone()).unwrap();
            Disk::new(vec![AnyLayer::Raw(raw)], false).unwrap()
        };
        let disk = open(new_file(&small.path(), 32 << 20, Cache::Writeback));
        drive(driver, async {
            for i in 0..32 {
                let data = aligned_copy(&vec![1; 1 << 20]);
                disk.write(i << 20, data, false).await.unwrap();
            }
            // The kernel writes back, and tells those who hold the file open, each once.
            command(&format!("sync -f {}", small.at.path().display()));
            let data = aligned_copy(&[2; 1 << 20]);
            disk.write(31 << 20, data, true).await.unwrap_err();
        });
        drop(disk);
        let next = FileStore::open(&small.path(), true, Cache::Writeback).unwrap();
        let error = drive(driver, open(next).flush()).unwrap_err();
        assert_eq!(error.kind(), Kind::Poisoned, "{error}");
    }
}

#[test]
fn a_description_of_its_own_learns_of_losses_that_a_dead_process_was_told_of() {
    use crate::image::open::has_lost_data;
    let Some((_below, small)) = hollow() else {
        return;
    };
    let store = new_file(&small.path(), 32 << 20, Cache::Writeback);
    let witness = std::fs::File::open(small.path()).unwrap();
    assert!(!has_lost_data(&witness));
    drive(None, async {
        fill(&store).await;
        store.flush().await.unwrap_err();
    });
    drop(store);
    assert!(has_lost_data(&witness));
}

#[test]
fn who_opens_a_file_anew_reads_what_the_disk_has_and_not_what_was_to_be_written() {
    let Some((_below, small)) = hollow() else {
        return;
    };
    let store = new_file(&small.path(), 32 << 20, Cache::Writeback);
    let intact = |store: FileStore| {
        drive(None, async move {
            let mut intact = 0;
            for i in 0..32 {
                let got = store.read_at(i << 20, buf::aligned(1 << 20)).await;
                intact += u64::from(got.is_ok_and(|got| got.iter().all(|&b| b == 1)));
            }
            intact
        })
    };
    drive(None, async {
        fill(&store).await;
        store.flush().await.unwrap_err();
    });
    assert_eq!(intact(store.clone()), 32, "the page cache believes in it");
    store.forget_cache().unwrap();
    assert!(intact(store) < 8, "the disk has room for 4 MiB");
}

#[test]
fn free_clusters_are_not_written_full_of_zeros_where_there_are_no_holes() {
    use ploop_formats::layer::Layer;
    use ploop_formats::ledger::Ledger;
    use ploop_formats::ploop::{Header, Ploop, Version, create};
    use ploop_formats::units::{ClusterSize, VirtCluster};
    for cache in [Cache::None, Cache::Writeback] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let store = new_file(&path, 0, Cache::Writeback);
        let size = ClusterSize::new(64 << 10).unwrap();
        let header = Header::new(Version::V2, 64 << 20, size).unwrap();
        drive(None, create::create(&store, &header)).unwrap();
        drop(store);
        // Its last user left 32 MiB of free clusters.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(32 << 20).unwrap();
        let used = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
        drive(Some(Engine::Poll), async {
            let store = FileStore::open(&path, true, cache).unwrap();
            assert!(store.info().punches);
            store.0.no_punching.store(true, Ordering::Relaxed);
            store.0.no_space_taking.store(true, Ordering::Relaxed);
            let image = Ploop::open_write(store.clone(), Ledger::local())
                .await
                .unwrap();
            let before = used();
            image.sync().await.unwrap();
            store.flush().await.unwrap();
            assert!(used() < before + 128, "{} blocks more", used() - before);
            // What is wanted is zeroed.
            let taken = image.reserve(VirtCluster(0)).await.unwrap();
            drop(taken);
            image.close().await.unwrap();
        });
    }
}

/// A loop device over a file.
struct Device(String, #[allow(dead_code)] tempfile::TempDir);

impl Device {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let out = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(path)
            .output()
            .ok()?;
        let name = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        out.status.success().then_some(Self(name, folder))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        assert!(command(&format!("losetup -d {}", self.0)));
    }
}

#[test]
fn a_block_device_is_a_store_of_fixed_length_that_promises_less() {
    let Some(device) = Device::new() else {
        eprintln!("skipped: no loop devices");
        return;
    };
    for cache in [Cache::None, Cache::Writeback] {
        for driver in DRIVERS {
            let store = FileStore::open(Path::new(&device.0), true, cache).unwrap();
            drive(driver, async {
                let info = store.info();
                assert_eq!((info.len, info.fresh_zero), (SIZE, false));
                let data = aligned_copy(&vec![3; SIZE as usize]);
                store.write_at(0, data, Reach::Cache).await.unwrap();
                for space in [Space::Free, Space::Keep] {
                    store.punch(1000, 100_000, space).await.unwrap();
                    store
                        .punch(200_000 / 4096 * 4096, 1 << 20, space)
                        .await
                        .unwrap();
                }
                let all = read(&store, 0, SIZE).await;
                assert!(
                    all[..1000]
                        .iter()
                        .chain(&all[101_000..150_000])
                        .all(|&b| b == 3)
                );
                assert!(all[1000..101_000].iter().all(|&b| b == 0));
                assert!(all[200_000..1 << 20].iter().all(|&b| b == 0));
                assert_eq!(store.extent(1000).await.unwrap(), (true, SIZE));
                store.set_len(SIZE).await.unwrap();
                assert_eq!(
                    store.set_len(2 * SIZE).await.unwrap_err().kind(),
                    Kind::Unsupported
                );
                store.flush().await.unwrap();
            });
        }
    }
}

/// A running disk reads a layer that another process merges into.
#[test]
fn tables_that_another_process_puts_behind_the_end_are_read() {
    use ploop_formats::layer::{Below, Extent, Layer, Reservation};
    use ploop_formats::ledger::Ledger;
    use ploop_formats::qcow2::Qcow2;
    use ploop_formats::qcow2::create::{Create, create};
    use ploop_formats::units::{ClusterSize, VirtCluster};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let store = new_file(&path, 0, Cache::Writeback);
    let wanted = Create::new(64 << 20, ClusterSize::new(64 << 10).unwrap());
    drive(Some(Engine::Poll), async {
        create(&store, &wanted).await.unwrap();
        let reader = FileStore::open(&path, false, Cache::Writeback).unwrap();
        let reader = Qcow2::open_read(reader, None).await.unwrap();
        let writer = Qcow2::open_write(store, None, Ledger::local());
        let writer = writer.await.unwrap();
        let cluster = VirtCluster(3);
        let mut reserved = writer.reserve(cluster).await.unwrap();
        reserved.submitted();
        writer.publish(cluster, reserved, Below::Zeros);
        writer.close().await.unwrap();
        for (n, there) in [(2, false), (3, true)] {
            let extent = reader.map(n * (64 << 10), 512).await.unwrap();
            assert_eq!(matches!(extent, Extent::Data { .. }), there, "{extent:?}");
        }
    });
}
