//! A device through `/dev/fuse` and a loop device, on this machine's kernel.
//!
//! Needs root, `/dev/fuse` and `/dev/loop-control`; says so and passes elsewhere. Every test owns
//! its mount and its loop device and takes them away, also when it fails.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

use bytes::{Bytes, BytesMut};
use ploop::device::{Device, GuestExtent, Zero};
use ploop::formats::buf;
use ploop::io::exec;
use ploop::serve::fuse::{self, End, Mount, Session};
use ploop::serve::loopdev::{self, Attach, Loop};
use ploop::{Error, Kind, Result};
use std::fs::{self, File, OpenOptions};
use std::future::pending;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const MIB: u64 = 1 << 20;

/// A disk in memory that counts what it is asked.
#[derive(Default)]
struct Disk {
    bytes: Mutex<Vec<u8>>,
    size: AtomicU64,
    read_only: bool,
    /// Writes find no space.
    full: AtomicBool,
    /// Writes never finish: what a killed worker leaves behind.
    stuck: bool,
    flushes: AtomicU64,
    durable_writes: AtomicU64,
    unaligned_writes: AtomicU64,
    zeroes: Mutex<Vec<(u64, u64, Zero)>>,
}

impl Disk {
    fn new(size: u64) -> Self {
        Self {
            bytes: Mutex::new(vec![0; size as usize]),
            size: AtomicU64::new(size),
            ..Self::default()
        }
    }

    fn grow(&self, size: u64) {
        self.bytes.lock().unwrap().resize(size as usize, 0);
        self.size.store(size, Ordering::Release);
    }

    fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[at as usize..][..len].to_vec()
    }
}

impl Device for Disk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn preferred_block(&self) -> u64 {
        64 << 10
    }

    async fn read(&self, at: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let len = buf.len();
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at as usize..][..len]);
        Ok(buf)
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> Result<()> {
        if self.stuck {
            pending::<()>().await;
        }
        if self.full.load(Ordering::Acquire) {
            return Err(Error::new(Kind::NoSpace, "the test says so"));
        }
        let aligned = buf::is_aligned(&data, buf::ALIGN);
        self.unaligned_writes
            .fetch_add(u64::from(!aligned), Ordering::AcqRel);
        self.durable_writes
            .fetch_add(u64::from(fua), Ordering::AcqRel);
        self.bytes.lock().unwrap()[at as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, _fua: bool) -> Result<()> {
        self.zeroes.lock().unwrap().push((at, len, how));
        self.bytes.lock().unwrap()[at as usize..][..len as usize].fill(0);
        Ok(())
    }

    async fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        unreachable!("a hole must read as zeros, which a discard does not promise")
    }

    async fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    async fn extents(&self, _at: u64, _len: u64, _max: usize) -> Result<Vec<GuestExtent>> {
        unreachable!("FUSE does not ask for extents")
    }
}

/// A disk mounted on a file, its keeper's descriptor, and at most one worker thread.
struct Mounted {
    dir: tempfile::TempDir,
    fd: Arc<OwnedFd>,
    session: Session,
    disk: Arc<Disk>,
    engine: exec::Engine,
    worker: Option<(JoinHandle<End>, oneshot::Sender<()>)>,
    attached: Option<Loop>,
}

impl Mounted {
    /// Mounts without a worker.
    fn idle(disk: Disk) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("disk");
        File::create(&target).unwrap();
        let how = Mount {
            target: &target,
            source: "a,test",
            read_only: disk.read_only,
        };
        let fd = Arc::new(fuse::mount(&how).unwrap());
        let session = Session::handshake(&fd).unwrap();
        Self {
            dir,
            fd,
            session,
            disk: Arc::new(disk),
            engine: exec::Engine::detect().0,
            worker: None,
            attached: None,
        }
    }

    fn new(disk: Disk) -> Self {
        Self::on(exec::Engine::detect().0, disk)
    }

    fn on(engine: exec::Engine, disk: Disk) -> Self {
        let mut mounted = Self::idle(disk);
        mounted.engine = engine;
        mounted.start();
        mounted
    }

    fn start(&mut self) {
        let (fd, disk) = (Arc::clone(&self.fd), Arc::clone(&self.disk));
        let (engine, session) = (self.engine, self.session.clone());
        let (stop, stopped) = oneshot::channel();
        let worker = thread::spawn(move || {
            let stopped = async { drop(stopped.await) };
            exec::run(engine, fuse::serve(fd, &session, disk, stopped))
                .unwrap()
                .unwrap()
        });
        self.worker = Some((worker, stop));
    }

    fn stop(&mut self) -> Option<End> {
        let (worker, stop) = self.worker.take()?;
        // Fails when the server is done already.
        let _ = stop.send(());
        Some(worker.join().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.file())
            .unwrap()
    }

    fn how<'a>(&self, backing: &'a Path) -> Attach<'a> {
        Attach {
            backing,
            offset: 0,
            size: None,
            block_size: 512,
            read_only: self.disk.read_only,
            direct_io: true,
            autoclear: false,
        }
    }

    fn attach(&mut self) -> PathBuf {
        let file = self.file();
        self.attached = Some(loopdev::attach(&self.how(&file)).unwrap());
        self.attached.as_ref().unwrap().path()
    }

    fn detach(&mut self) {
        if let Some(attached) = self.attached.take() {
            loopdev::detach(attached.number()).unwrap();
        }
    }

    /// Detaches, unmounts and returns how the worker ended.
    fn finish(mut self) -> End {
        self.detach();
        fuse::unmount(&self.file(), false).unwrap();
        self.end()
    }

    /// How the worker ends without being told to.
    fn end(&mut self) -> End {
        let (worker, _stop) = self.worker.take().unwrap();
        worker.join().unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Of a failed test: the loop device first, while there is somebody to answer it.
        if let Some(attached) = self.attached.take() {
            let _ = loopdev::detach(attached.number());
        }
        let _ = fuse::unmount(&self.file(), true);
    }
}

/// A mounted file system, unmounted when dropped.
struct FileSystem(PathBuf);

impl FileSystem {
    fn mount(device: &Path, dir: &Path) -> Self {
        let there = dir.join("mnt");
        fs::create_dir_all(&there).unwrap();
        run(
            "mount",
            &[device.to_str().unwrap(), there.to_str().unwrap()],
        );
        Self(there)
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        run("umount", &[self.0.to_str().unwrap()]);
    }
}

/// Whether the machine can run these tests; says why not.
fn able() -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if File::open("/dev/fuse").is_err() {
        "no /dev/fuse"
    } else if File::open("/dev/loop-control").is_err() {
        "no /dev/loop-control"
    } else {
        return true;
    };
    println!("SKIP: {reason}");
    false
}

fn direct(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

fn pattern(len: usize, seed: u8) -> BytesMut {
    let mut data = buf::aligned(len);
    data.iter_mut()
        .enumerate()
        .for_each(|(i, b)| *b = (i / 512) as u8 ^ (i as u8) ^ seed);
    data
}

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{program} {args:?}: {text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    text
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("-V").output().is_ok();
    if !found {
        println!("SKIP: no {program}");
    }
    found
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn bytes_of_any_size_and_place_come_back_as_they_were_written() {
    if !able() {
        return;
    }
    for engine in [exec::Engine::detect().0, exec::Engine::Poll] {
        come_back(Mounted::on(engine, Disk::new(8 * MIB)));
    }
}

fn come_back(mounted: Mounted) {
    let file = mounted.open();
    assert_eq!(file.metadata().unwrap().size(), 8 * MIB);
    for (at, len) in [
        (0, 512),
        (4096, 4096),
        (777, 1),
        (65_536 - 3, 65_536 + 7),
        (MIB, 3 << 20),
        (8 * MIB - 1, 1),
    ] {
        let data = pattern(len, at as u8);
        file.write_all_at(&data, at).unwrap();
        assert_eq!(
            mounted.disk.peek(at, len),
            &data[..],
            "{len} bytes at {at} on the disk"
        );
        let mut back = vec![0; len];
        file.read_exact_at(&mut back, at).unwrap();
        assert!(back == data, "{len} bytes at {at} through the file");
    }
    assert_eq!(mounted.disk.unaligned_writes.load(Ordering::Acquire), 0);
    drop(file);
    assert_eq!(mounted.finish(), End::Unmounted);
}

#[test]
fn the_end_of_the_disk_is_the_end_of_the_file() {
    if !able() {
        return;
    }
    let mounted = Mounted::new(Disk::new(MIB));
    let file = mounted.open();
    let mut buf = vec![1; 4096];
    assert_eq!(file.read_at(&mut buf, MIB - 512).unwrap(), 512);
    assert_eq!(file.read_at(&mut buf, MIB).unwrap(), 0);
    assert_eq!(file.write_at(&buf, MIB - 512).unwrap(), 512);
    assert_eq!(
        file.write_at(&buf, MIB).unwrap_err().raw_os_error(),
        Some(libc::EFBIG)
    );
    assert_eq!(
        file.set_len(2 * MIB).unwrap_err().raw_os_error(),
        Some(libc::EPERM)
    );
    file.set_len(MIB).unwrap();
    assert_eq!(mounted.disk.size(), MIB);
    drop(file);
    mounted.finish();
}

#[test]
fn a_flush_and_a_synchronous_write_reach_the_disk_as_such() {
    if !able() {
        return;
    }
    let mounted = Mounted::new(Disk::new(MIB));
    let disk = Arc::clone(&mounted.disk);
    let file = mounted.open();
    file.write_all_at(b"plain", 0).unwrap();
    assert_eq!(disk.durable_writes.load(Ordering::Acquire), 0);
    for flushes in 1..=2 {
        file.sync_all().unwrap();
        assert_eq!(
            disk.flushes.load(Ordering::Acquire),
            flushes,
            "asked for each time"
        );
    }
    let mut options = OpenOptions::new();
    let sync = options
        .write(true)
        .custom_flags(libc::O_DSYNC)
        .open(mounted.file())
        .unwrap();
    sync.write_all_at(b"durable", 0).unwrap();
    assert_eq!(disk.durable_writes.load(Ordering::Acquire), 1);
    drop((file, sync));
    mounted.finish();
}

#[test]
fn a_full_disk_answers_enospc_and_works_again_when_there_is_space() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(MIB));
    let device = mounted.attach();
    let data = pattern(4096, 1);
    for file in [mounted.open(), direct(&device)] {
        mounted.disk.full.store(true, Ordering::Release);
        let error = file.write_all_at(&data, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
        mounted.disk.full.store(false, Ordering::Release);
        file.write_all_at(&data, 0).unwrap();
    }
    mounted.finish();
}

#[test]
fn a_read_only_disk_cannot_be_opened_for_writing_and_its_loop_device_neither() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk {
        read_only: true,
        ..Disk::new(MIB)
    });
    let error = OpenOptions::new()
        .write(true)
        .open(mounted.file())
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let device = mounted.attach();
    let number = mounted.attached.as_ref().unwrap().number();
    assert!(loopdev::status(number).unwrap().read_only);
    let mut buf = [1; 512];
    File::open(&device)
        .unwrap()
        .read_exact_at(&mut buf, 0)
        .unwrap();
    assert_eq!(buf, [0; 512]);
    mounted.finish();
}

#[test]
fn a_punched_hole_reads_as_zeros_and_a_zeroed_range_keeps_its_space() {
    if !able() {
        return;
    }
    let mounted = Mounted::new(Disk::new(MIB));
    let disk = Arc::clone(&mounted.disk);
    let file = mounted.open();
    file.write_all_at(&vec![7; MIB as usize], 0).unwrap();
    let call = |mode: i32, at: u64, len: u64| {
        let mode = rustix::fs::FallocateFlags::from_bits_retain(mode as u32);
        rustix::fs::fallocate(&file, mode, at, len)
    };
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    call(keep | libc::FALLOC_FL_PUNCH_HOLE, 1000, 5000).unwrap();
    call(keep | libc::FALLOC_FL_ZERO_RANGE, 65536, 4096).unwrap();
    call(keep | libc::FALLOC_FL_PUNCH_HOLE, MIB - 512, 4096).unwrap();
    let seen = [
        (1000, 5000, Zero::MayFree),
        (65536, 4096, Zero::Allocate),
        (MIB - 512, 512, Zero::MayFree),
    ];
    assert_eq!(*disk.zeroes.lock().unwrap(), seen);
    let mut back = vec![1; 5002];
    file.read_exact_at(&mut back, 999).unwrap();
    assert_eq!((back[0], back[1], back[5000], back[5001]), (7, 0, 0, 7));
    let refused = call(libc::FALLOC_FL_ZERO_RANGE, MIB - 512, 4096);
    assert_eq!(
        refused,
        Err(rustix::io::Errno::FBIG),
        "zeroing never grows a disk"
    );
    let refused = call(0, 0, 4096);
    assert_eq!(refused, Err(rustix::io::Errno::OPNOTSUPP));
    drop(file);
    mounted.finish();
}

#[test]
fn neighbouring_sectors_written_at_once_through_a_loop_device_arrive_intact() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(4 * MIB));
    let device = mounted.attach();
    let status = loopdev::status(mounted.attached.as_ref().unwrap().number()).unwrap();
    assert!(status.direct_io && status.discard_max > 0, "{status:?}");
    assert_eq!((status.size, status.backing), (4 * MIB, mounted.file()));
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for sector in 0..4u64 {
            let (start, device) = (&start, &device);
            scope.spawn(move || {
                let file = direct(device);
                for round in 0..200u64 {
                    start.wait();
                    let data = pattern(512, (round * 4 + sector) as u8);
                    file.write_all_at(&data, round * 2048 + sector * 512)
                        .unwrap();
                }
            });
        }
    });
    for sector in 0..800u64 {
        let expected = pattern(512, sector as u8);
        assert_eq!(
            mounted.disk.peek(sector * 512, 512),
            &expected[..],
            "sector {sector}"
        );
    }
    assert_eq!(mounted.disk.unaligned_writes.load(Ordering::Acquire), 0);
    mounted.finish();
}

#[test]
fn space_of_deleted_files_reaches_the_disk_as_zeros_no_smaller_than_a_cluster() {
    if !able() || !has("mkfs.ext4") {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(64 * MIB));
    let device = mounted.attach();
    let number = mounted.attached.as_ref().unwrap().number();
    let granularity = format!("/sys/block/loop{number}/queue/discard_granularity");
    assert_eq!(fs::read_to_string(granularity).unwrap().trim(), "65536");
    let path = device.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-E", "nodiscard", path]);
    let content = pattern(9 << 20, 3);
    {
        let there = FileSystem::mount(&device, mounted.dir.path());
        fs::write(there.0.join("file"), &content).unwrap();
    }
    let there = FileSystem::mount(&device, mounted.dir.path());
    assert!(fs::read(there.0.join("file")).unwrap() == content);
    assert!(
        mounted.disk.flushes.load(Ordering::Acquire) > 0,
        "journal commits flush"
    );
    fs::remove_file(there.0.join("file")).unwrap();
    mounted.disk.zeroes.lock().unwrap().clear();
    run("fstrim", &[there.0.to_str().unwrap()]);
    let zeroes = mounted.disk.zeroes.lock().unwrap().clone();
    let freed: u64 = zeroes.iter().map(|(_, len, _)| len).sum();
    assert!(freed >= 9 * MIB, "{freed} bytes in {zeroes:?}");
    let large = |(_, len, how): &(u64, u64, Zero)| *len >= 65536 && *how == Zero::MayFree;
    assert!(zeroes.iter().all(large), "{zeroes:?}");
    drop(there);
    run("e2fsck", &["-fn", path]);
    mounted.finish();
}

#[test]
fn nothing_is_left_after_detach_and_unmount() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(MIB));
    let dir = mounted.dir.path().to_owned();
    mounted.attach();
    let number = mounted.attached.as_ref().unwrap().number();
    let found = loopdev::attached_under(&dir).unwrap();
    assert_eq!(found.iter().map(|s| s.number).collect::<Vec<_>>(), [number]);
    assert!(
        loopdev::attached_under(Path::new("/nonexistent"))
            .unwrap()
            .is_empty()
    );
    let busy = fuse::unmount(&mounted.file(), false).unwrap_err();
    assert_eq!(busy.kind(), Kind::Busy, "{busy}");
    mounted.detach();
    assert!(loopdev::attached_under(&dir).unwrap().is_empty());
    fuse::unmount(&mounted.file(), false).unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()));
    assert_eq!(
        fs::metadata(mounted.file()).unwrap().size(),
        0,
        "the empty file is back"
    );
    assert_eq!(mounted.end(), End::Unmounted);
}

#[test]
fn a_device_in_use_is_not_torn_away() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(MIB));
    let device = mounted.attach();
    let number = mounted.attached.as_ref().unwrap().number();
    let user = direct(&device);
    let busy = loopdev::detach(number).unwrap_err();
    assert_eq!(busy.kind(), Kind::Busy, "{busy}");
    user.write_all_at(&pattern(512, 9), 0).unwrap();
    drop(user);
    wait_for("the detach", || loopdev::status(number).is_err());
    mounted.attached = None;
    mounted.finish();
}

#[test]
fn a_device_with_autoclear_goes_with_its_last_user() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(MIB));
    let file = mounted.file();
    let how = Attach {
        autoclear: true,
        offset: 4096,
        size: Some(8192),
        ..mounted.how(&file)
    };
    let attached = loopdev::attach(&how).unwrap();
    let number = attached.number();
    let status = loopdev::status(number).unwrap();
    assert_eq!(
        (status.offset, status.size_limit, status.size),
        (4096, Some(8192), 8192)
    );
    assert!(status.autoclear);
    drop(attached);
    wait_for("the detach", || loopdev::status(number).is_err());
    assert_eq!(loopdev::detach(number).unwrap_err().kind(), Kind::NotFound);
    mounted.detach();
    mounted.finish();
}

#[test]
fn growth_is_seen_by_the_file_and_by_the_loop_device_at_once() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(4 * MIB));
    let device = mounted.attach();
    let number = mounted.attached.as_ref().unwrap().number();
    for size in [8 * MIB, 9 * MIB] {
        mounted.disk.grow(size);
        assert_eq!(fs::metadata(mounted.file()).unwrap().size(), size);
        loopdev::set_capacity(number, size).unwrap();
        assert_eq!(loopdev::status(number).unwrap().size, size);
        direct(&device)
            .write_all_at(&pattern(512, 1), size - 512)
            .unwrap();
        assert_eq!(mounted.disk.peek(size - 512, 512), &pattern(512, 1)[..]);
    }
    let error = loopdev::set_capacity(number, 10 * MIB).unwrap_err();
    assert!(
        error.to_string().contains("9437184"),
        "an unequal size is an error: {error}"
    );
    mounted.finish();
}

#[test]
fn what_is_new_of_a_grown_disk_is_read_at_once_also_while_others_write() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(MIB));
    let device = mounted.attach();
    let number = mounted.attached.as_ref().unwrap().number();
    let writing = AtomicBool::new(true);
    thread::scope(|scope| {
        for writer in 0..4u64 {
            let (writing, device) = (&writing, &device);
            scope.spawn(move || {
                let (file, data) = (direct(device), pattern(4096, 7));
                while writing.load(Ordering::Acquire) {
                    file.write_all_at(&data, writer * 4096).unwrap();
                }
            });
        }
        let stop = SetFalse(&writing);
        let file = direct(&device);
        for step in 1..=200 {
            let size = MIB + step * 65_536;
            mounted.disk.grow(size);
            loopdev::set_capacity(number, size).unwrap();
            let mut end = buf::aligned(4096);
            file.read_exact_at(&mut end, size - 4096).unwrap();
            assert!(end.iter().all(|byte| *byte == 0), "step {step}");
        }
        drop(stop);
    });
    mounted.finish();
}

/// Ends other threads when it is dropped, also by a panic.
struct SetFalse<'a>(&'a AtomicBool);

impl Drop for SetFalse<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[test]
fn a_stopped_server_can_be_followed_by_another_without_anybody_noticing() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::new(Disk::new(MIB));
    let device = mounted.attach();
    let writing = Arc::new(AtomicBool::new(true));
    let writer = {
        let writing = Arc::clone(&writing);
        thread::spawn(move || {
            let file = direct(&device);
            let mut round = 0u64;
            while writing.load(Ordering::Acquire) {
                let data = pattern(4096, round as u8);
                file.write_all_at(&data, round % 256 * 4096).unwrap();
                let mut back = buf::aligned(4096);
                file.read_exact_at(&mut back, round % 256 * 4096).unwrap();
                assert!(back == data, "round {round}");
                round += 1;
            }
            round
        })
    };
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(10));
        assert_eq!(mounted.stop(), Some(End::Stopped));
        mounted.start();
    }
    writing.store(false, Ordering::Release);
    assert!(writer.join().unwrap() > 20);
    mounted.finish();
}

/// Not a test of its own: the worker process that the next test kills.
#[test]
fn worker_process() {
    let Ok(session) = std::env::var("PLOOP_TEST_SESSION") else {
        return;
    };
    let session = serde_json::from_str(&session).unwrap();
    // Its standard input is the keeper's descriptor.
    let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let disk = Arc::new(Disk {
        stuck: true,
        ..Disk::new(4 * MIB)
    });
    exec::run(
        exec::Engine::detect().0,
        fuse::serve(Arc::new(fd), &session, disk, pending()),
    )
    .unwrap()
    .unwrap();
}

fn spawn_worker(mounted: &Mounted) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["worker_process", "--exact", "--test-threads=1"]);
    command.env(
        "PLOOP_TEST_SESSION",
        serde_json::to_string(&mounted.session).unwrap(),
    );
    command.stdin(mounted.fd.try_clone().unwrap());
    command.spawn().unwrap()
}

#[test]
fn a_write_in_the_hands_of_a_killed_worker_is_finished_by_the_next_one() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::idle(Disk::new(4 * MIB));
    if !mounted.session.resends() {
        println!("SKIP: this kernel has no RESEND");
        return;
    }
    let mut child = spawn_worker(&mounted);
    let device = mounted.attach();
    let small = pattern(4096, 1);
    let large = pattern(1 << 20, 2);
    thread::scope(|scope| {
        let writers = [(0u64, &small), (MIB, &large)].map(|(at, data)| {
            let device = &device;
            scope.spawn(move || direct(device).write_all_at(data, at))
        });
        // Both are in the worker's hands once the device counts them in flight.
        let number = mounted.attached.as_ref().unwrap().number();
        let inflight = format!("/sys/block/loop{number}/inflight");
        wait_for("the writes", || {
            let text = fs::read_to_string(&inflight).unwrap();
            text.split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u32>()
                .unwrap()
                >= 2
        });
        thread::sleep(Duration::from_millis(50));
        assert!(
            writers.iter().all(|w| !w.is_finished()),
            "nobody has answered"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        thread::sleep(Duration::from_millis(50));
        assert!(
            writers.iter().all(|w| !w.is_finished()),
            "the session outlives its worker"
        );
        let killed = Instant::now();
        fuse::resend(&mounted.fd, &mounted.session).unwrap();
        mounted.start();
        writers.into_iter().for_each(|w| w.join().unwrap().unwrap());
        println!("the writers waited {:?}", killed.elapsed());
    });
    assert!(mounted.disk.peek(0, 4096) == small);
    assert!(mounted.disk.peek(MIB, 1 << 20) == large);
    mounted.finish();
}

#[test]
fn a_session_without_any_worker_ends_when_its_last_descriptor_does() {
    if !able() {
        return;
    }
    let mut mounted = Mounted::idle(Disk::new(MIB));
    let file = mounted.file();
    let asker = thread::spawn(move || fs::metadata(file));
    thread::sleep(Duration::from_millis(20));
    assert!(!asker.is_finished());
    mounted.fd = Arc::new(File::open("/dev/null").unwrap().into());
    let error = asker.join().unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED), "{error}");
    fuse::unmount(&mounted.file(), false).unwrap();
}
