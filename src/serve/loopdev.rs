//! Loop devices: a block device over the file that FUSE serves.
//!
//! Attaching, growing and detaching ask the backing file for its size and statistics, so whoever
//! serves that file must be running, and on another thread than the caller's. What was asked for
//! is read back from sysfs, because the kernel is free to ignore it silently.

use crate::{Error, Kind, Result};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::ioctl::{self, Getter, NoArg, Opcode, Setter};
use std::ffi::c_void;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Tries to get a free number: each lost race is another process that got one.
const ATTEMPTS: u32 = 100;
/// How long a detached device may take to let go of its file.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);

/// How to attach a file.
#[derive(Debug, Clone, Copy)]
pub struct Attach<'a> {
    /// The file; `/proc/self/fd/N` for one that is open already. A block device is claimed: `Busy`
    /// when it is mounted or claimed otherwise.
    pub backing: &'a Path,
    /// First byte of the file that the device shows, a multiple of the block size.
    pub offset: u64,
    /// Bytes that the device shows; `None` for all up to the end of the file, growth included.
    pub size: Option<u64>,
    /// Logical block size in bytes: 512, 1024, 2048 or 4096.
    pub block_size: u32,
    /// The device refuses writes.
    pub read_only: bool,
    /// Bypass the page cache of the backing file; an error where that is impossible.
    pub direct_io: bool,
    /// Detach by itself when the last user closes the device; see [`Loop`].
    pub autoclear: bool,
}

/// An attached device. With `autoclear` this value is one of its users: keep it until another has
/// the device open. Without, dropping it changes nothing; only [`detach`] does.
#[derive(Debug)]
pub struct Loop {
    number: u32,
    _user: Option<OwnedFd>,
}

impl Loop {
    /// N of `/dev/loopN`.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> PathBuf {
        node(self.number)
    }
}

/// What sysfs says about an attached device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// The backing file as the kernel names it, with ` (deleted)` behind one that is gone.
    pub backing: PathBuf,
    /// First byte of the file that the device shows.
    pub offset: u64,
    /// Bytes that the device shows at most; `None` without such a limit.
    pub size_limit: Option<u64>,
    /// Size of the device in bytes.
    pub size: u64,
    /// The device refuses writes.
    pub read_only: bool,
    /// The page cache of the backing file is bypassed.
    pub direct_io: bool,
    /// The device goes when its last user does.
    pub autoclear: bool,
    /// Largest discard in bytes; 0 when the backing file cannot free space.
    pub discard_max: u64,
}

/// Attaches a file to a free device, making its node where nobody else does.
///
/// Fails with `Privilege` without CAP_SYS_ADMIN, with `Unsupported` where the kernel has no loop
/// devices or direct I/O did not come about, with `Busy` when other processes won every race.
/// Nothing stays attached on failure.
pub fn attach(how: &Attach<'_>) -> Result<Loop> {
    let place = |e: Error| e.at(format_args!("attaching {}", how.backing.display()));
    let backing = open_backing(how).map_err(place)?;
    for _ in 0..ATTEMPTS {
        let number = free_number().map_err(place)?;
        let device = match open_node(number, OFlags::RDWR) {
            Err(e) if e.kind() == Kind::Busy => continue,
            opened => opened.map_err(place)?,
        };
        match configure(&device, &backing, how) {
            Err(Errno::BUSY) => continue,
            done => done.map_err(|e| place(refused(e).at(node(number).display())))?,
        }
        if let Err(error) = verify(number, &backing, how) {
            drop(device);
            // With autoclear it is gone already.
            if let Err(left) = detach(number)
                && left.kind() != Kind::NotFound
            {
                tracing::error!(%left, "a loop device stays behind");
            }
            return Err(place(error));
        }
        return Ok(Loop {
            number,
            _user: how.autoclear.then_some(device),
        });
    }
    Err(place(Error::new(
        Kind::Busy,
        "other processes took every free loop device",
    )))
}

/// Detaches a device and waits until its file is free.
///
/// Fails with `NotFound` when nothing is attached, with `Busy` when somebody still uses the device:
/// then the kernel detaches it when they stop.
pub fn detach(number: u32) -> Result<()> {
    const LOOP_CLR_FD: Opcode = 0x4c01;
    let place = |e: Error| e.at(node(number).display());
    let device = open_node(number, OFlags::RDONLY)?;
    // SAFETY: LOOP_CLR_FD takes no argument and touches no memory of ours.
    let cleared = unsafe { ioctl::ioctl(&device, NoArg::<LOOP_CLR_FD>::new()) };
    cleared.map_err(|e| place(refused(e)))?;
    // The device is released with the last descriptor, and ours is one.
    drop(device);
    let deadline = Instant::now() + DETACH_TIMEOUT;
    while sysfs(number, "loop/backing_file").exists() {
        if Instant::now() > deadline {
            return Err(place(Error::new(
                Kind::Busy,
                "still in use; it is detached as soon as its last user closes it",
            )));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// What is attached to a device. Fails with `NotFound` when nothing is.
pub fn status(number: u32) -> Result<Status> {
    let place = |e: Error| {
        e.at(format_args!(
            "reading the state of {}",
            node(number).display()
        ))
    };
    read_status(number).map_err(place)
}

/// The devices whose backing file is `path` or lies beneath it, by number.
pub fn attached_under(path: &Path) -> Result<Vec<Status>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").map_err(|e| Error::from(e).at("/sys/block"))? {
        let name = entry?.file_name();
        let number = name
            .to_str()
            .and_then(|n| n.strip_prefix("loop")?.parse().ok());
        let Some(number) = number else { continue };
        match status(number) {
            Ok(status) if status.backing.starts_with(path) => found.push(status),
            Ok(_) => {}
            // Not attached, or detached while we looked.
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    found.sort_unstable_by_key(|status| status.number);
    Ok(found)
}

/// The device that `device`, a loop device, shows a part of; none when it shows a file.
pub fn whole(device: &Path) -> Option<PathBuf> {
    let backing = backing(number(device)?).ok()?;
    backing.starts_with("/dev").then_some(backing)
}

/// N of a path `/dev/loopN`.
pub fn number(device: &Path) -> Option<u32> {
    let name = device.strip_prefix("/dev").ok()?.to_str()?;
    name.strip_prefix("loop")?.parse().ok()
}

/// Makes a device as large as its backing file is now; `size` is the size in bytes that the
/// device must have afterwards.
///
/// An unequal size is an error, not a warning: kernels before 6.18 look at a size of the file that
/// they remember, which is why the file is asked first.
pub fn set_capacity(number: u32, size: u64) -> Result<()> {
    const LOOP_SET_CAPACITY: Opcode = 0x4c07;
    let place = |e: Error| e.at(format_args!("sizing {}", node(number).display()));
    let before = status(number)?;
    let file = fs::metadata(&before.backing).map_err(|e| place(e.into()))?;
    if file.is_file() && file.len() == size {
        keep_size(&before.backing, size).map_err(place)?;
    }
    let device = open_node(number, OFlags::RDONLY)?;
    // SAFETY: LOOP_SET_CAPACITY takes no argument and touches no memory of ours.
    let grown = unsafe { ioctl::ioctl(&device, NoArg::<LOOP_SET_CAPACITY>::new()) };
    grown.map_err(|e| place(refused(e)))?;
    let after = status(number)?;
    if after.size != size {
        return Err(place(Error::new(
            Kind::Io,
            format!(
                "the device has {} bytes and not {size}; {} has {} bytes, of which {} are skipped",
                after.size,
                after.backing.display(),
                file.len(),
                after.offset
            ),
        )));
    }
    Ok(())
}

/// Has a device that shows a part of its file show so many bytes of it.
///
/// The file, which may be a device, has them.
pub fn set_size_limit(number: u32, size: u64) -> Result<()> {
    const LOOP_SET_STATUS64: Opcode = 0x4c04;
    const LOOP_GET_STATUS64: Opcode = 0x4c05;
    let place = |e: Error| e.at(format_args!("resizing {}", node(number).display()));
    let device = open_node(number, OFlags::RDONLY)?;
    // SAFETY: LOOP_GET_STATUS64 writes one `struct loop_info64`, whose layout `LoopInfo64` has, and of
    // which every pattern of bits is a value.
    let info = unsafe { ioctl::ioctl(&device, Getter::<LOOP_GET_STATUS64, LoopInfo64>::new()) };
    let info = LoopInfo64 {
        size_limit: size,
        ..info.map_err(|e| place(refused(e)))?
    };
    // SAFETY: LOOP_SET_STATUS64 reads one `struct loop_info64` and keeps no pointer to it.
    let set = unsafe { ioctl::ioctl(&device, Setter::<LOOP_SET_STATUS64, _>::new(info)) };
    set.map_err(|e| place(refused(e)))?;
    let after = status(number)?;
    match after.size == size {
        true => Ok(()),
        false => Err(place(Error::new(
            Kind::Io,
            format!("the device has {} bytes and not {size}", after.size),
        ))),
    }
}

/// Sets a file to the size that it has. What the kernel asks a FUSE file's size and is answered while
/// a write ends it does not keep, and it reads nothing behind the end that it remembers. A size that it
/// sets it keeps.
fn keep_size(file: &Path, size: u64) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).open(file)?;
    Ok(file.set_len(size)?)
}

fn open_backing(how: &Attach<'_>) -> Result<OwnedFd> {
    let mut access = if how.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    // A device that is shown in part is claimed for as long: else it could be mounted as a whole, or
    // be given other content, below a file system that is mounted from the part.
    let meta = fs::metadata(how.backing)?;
    if meta.file_type().is_block_device() {
        access |= OFlags::EXCL;
    }
    let backing = rustix::fs::open(how.backing, access | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)?;
    // Kernels before 6.18 take the size that they remember, which is 0 for the root of a FUSE file
    // system that nobody asked about.
    rustix::fs::fstat(&backing).map_err(io::Error::from)?;
    Ok(backing)
}

fn free_number() -> Result<u32> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let control =
        rustix::fs::open("/dev/loop-control", flags, Mode::empty()).map_err(|e| match e {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => Error::unsupported(
                "/dev/loop-control: this kernel has no loop devices; try `modprobe loop`",
            ),
            e => refused(e).at("/dev/loop-control"),
        })?;
    // SAFETY: `FreeNumber` describes LOOP_CTL_GET_FREE.
    unsafe { ioctl::ioctl(&control, FreeNumber) }.map_err(|e| refused(e).at("/dev/loop-control"))
}

/// LOOP_CTL_GET_FREE: no argument, and the number is the result of the call.
struct FreeNumber;

// SAFETY: the kernel reads and writes no memory for this opcode.
unsafe impl ioctl::Ioctl for FreeNumber {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        0x4c82
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        number: ioctl::IoctlOutput,
        _: *mut c_void,
    ) -> rustix::io::Result<u32> {
        u32::try_from(number).map_err(|_| Errno::RANGE)
    }
}

/// Opens `/dev/loopN`; makes the node, root's alone and its group's, where udev and devtmpfs did
/// not, and refuses one that is another device.
fn open_node(number: u32, access: OFlags) -> Result<OwnedFd> {
    let path = node(number);
    let place = |e: Error| e.at(path.display());
    let (major, minor) = device_number(number).map_err(place)?;
    let rdev = rustix::fs::makedev(major, minor);
    if !path.exists() {
        let mode = Mode::from_raw_mode(0o660);
        match rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::BlockDevice, mode, rdev) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(place(refused(e).at("making the device node"))),
        }
    }
    let device = rustix::fs::open(&path, access | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| place(refused(e)))?;
    let meta = fs::metadata(&path)?;
    if !meta.file_type().is_block_device() || meta.rdev() != rdev {
        return Err(Error::invalid(format!(
            "{}: is not block device {major}:{minor}; remove the node and try again",
            path.display()
        )));
    }
    Ok(device)
}

/// `struct loop_info64` of the kernel's public `linux/loop.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`, the argument of LOOP_CONFIGURE (Linux 5.8).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(mem::size_of::<LoopInfo64>() == 232);
const _: () = assert!(mem::size_of::<LoopConfig>() == 304);

fn configure(device: &OwnedFd, backing: &OwnedFd, how: &Attach<'_>) -> rustix::io::Result<()> {
    const LOOP_CONFIGURE: Opcode = 0x4c0a;
    let config = LoopConfig {
        fd: backing.as_raw_fd() as u32,
        block_size: how.block_size,
        info: LoopInfo64 {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: how.offset,
            size_limit: how.size.unwrap_or(0),
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: flags(how),
            file_name: file_name(how.backing),
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, whose layout `LoopConfig` has, and
    // keeps no pointer to it.
    unsafe { ioctl::ioctl(device, Setter::<LOOP_CONFIGURE, _>::new(config)) }
}

fn flags(how: &Attach<'_>) -> u32 {
    const READ_ONLY: u32 = 1;
    const AUTOCLEAR: u32 = 4;
    const DIRECT_IO: u32 = 16;
    let chosen = [
        (how.read_only, READ_ONLY),
        (how.autoclear, AUTOCLEAR),
        (how.direct_io, DIRECT_IO),
    ];
    chosen
        .into_iter()
        .filter(|(on, _)| *on)
        .map(|(_, flag)| flag)
        .sum()
}

/// The name that the kernel hands out with LOOP_GET_STATUS64: as much as fits, and a zero.
fn file_name(path: &Path) -> [u8; 64] {
    let mut name = [0; 64];
    name.iter_mut()
        .zip(path.as_os_str().as_bytes().iter().take(63))
        .for_each(|(to, b)| *to = *b);
    name
}

/// Compares what came about with what was asked for.
fn verify(number: u32, backing: &OwnedFd, how: &Attach<'_>) -> Result<()> {
    let now = status(number)?;
    let place = |e: Error| e.at(node(number).display());
    if now.direct_io != how.direct_io {
        return Err(place(Error::unsupported(
            "the kernel did not switch direct I/O on; the file, its offset or the block size \
             does not allow it",
        )));
    }
    if now.read_only && !how.read_only {
        return Err(place(Error::new(
            Kind::ReadOnly,
            "the kernel made the device read-only",
        )));
    }
    let file = length(backing)?;
    let shown = how
        .size
        .unwrap_or(u64::MAX)
        .min(file.saturating_sub(how.offset))
        / 512
        * 512;
    if now.size != shown {
        return Err(place(Error::new(
            Kind::Io,
            format!("the device has {} bytes and should have {shown}", now.size),
        )));
    }
    if now.discard_max == 0 && !how.read_only {
        tracing::warn!(device = %node(number).display(), "discard is off: space is never freed");
    }
    Ok(())
}

/// Bytes of a file or a block device.
fn length(backing: &OwnedFd) -> Result<u64> {
    let stat = rustix::fs::fstat(backing.as_fd()).map_err(io::Error::from)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => {
            let end = rustix::fs::seek(backing, SeekFrom::End(0));
            Ok(end.map_err(io::Error::from)?)
        }
        _ => Ok(stat.st_size as u64),
    }
}

/// The backing file as the kernel names it.
fn backing(number: u32) -> io::Result<PathBuf> {
    let mut backing = fs::read(sysfs(number, "loop/backing_file"))?;
    backing.pop_if(|last| *last == b'\n');
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(&backing)))
}

fn read_status(number: u32) -> Result<Status> {
    let limit = read_number(number, "loop/sizelimit")?;
    Ok(Status {
        number,
        backing: backing(number)?,
        offset: read_number(number, "loop/offset")?,
        size_limit: (limit != 0).then_some(limit),
        size: read_number(number, "size")?.saturating_mul(512),
        read_only: read_number(number, "ro")? != 0,
        direct_io: read_number(number, "loop/dio")? != 0,
        autoclear: read_number(number, "loop/autoclear")? != 0,
        discard_max: read_number(number, "queue/discard_max_bytes")?,
    })
}

fn read_number(number: u32, attribute: &str) -> Result<u64> {
    let path = sysfs(number, attribute);
    let place = |e: Error| e.at(path.display());
    let text = fs::read_to_string(&path).map_err(|e| place(e.into()))?;
    let text = text.trim();
    text.parse()
        .map_err(|_| place(Error::damaged(format!("'{text}' is not a number"))))
}

/// Major and minor number; the minor is not N where the module was loaded with `max_part`.
fn device_number(number: u32) -> Result<(u32, u32)> {
    let path = sysfs(number, "dev");
    let text = fs::read_to_string(&path).map_err(|e| Error::from(e).at(path.display()))?;
    let parse = |(major, minor): (&str, &str)| Some((major.parse().ok()?, minor.parse().ok()?));
    let numbers = text.trim().split_once(':').and_then(parse);
    numbers.ok_or_else(|| Error::damaged(format!("'{}' is not a device number", text.trim())))
}

fn sysfs(number: u32, attribute: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{number}/{attribute}"))
}

/// `/dev/loopN`.
pub fn node(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn refused(errno: Errno) -> Error {
    match errno {
        Errno::PERM | Errno::ACCESS => Error::new(
            Kind::Privilege,
            "loop devices need root, or CAP_SYS_ADMIN and the node",
        ),
        Errno::NXIO => Error::new(Kind::NotFound, "nothing is attached"),
        errno => io::Error::from(errno).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_and_still_ends_in_a_zero() {
        let name = file_name(Path::new(&"x".repeat(100)));
        assert_eq!((name[62], name[63]), (b'x', 0));
    }

    #[test]
    fn an_attachment_of_nothing_names_the_file() {
        let how = Attach {
            backing: Path::new("/nonexistent/disk"),
            offset: 0,
            size: None,
            block_size: 512,
            read_only: false,
            direct_io: true,
            autoclear: false,
        };
        let error = attach(&how).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("/nonexistent/disk"), "{error}");
    }
}
