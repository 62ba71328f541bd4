//! Direct I/O: switching a descriptor to O_DIRECT and learning what alignment it wants.

use ploop_formats::buf;
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};
use rustix::io::{Errno, pread};
use std::os::fd::OwnedFd;

/// What direct I/O on a file must be multiples of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Offsets and lengths.
    pub(super) offset: u64,
    /// Addresses.
    pub(super) memory: usize,
}

/// Alignment where the kernel does not tell and the file is too short to try.
const SAFE: u64 = 4096;

/// Switches `fd` to direct I/O, or says why that cannot be; then nothing has changed.
pub(super) fn enable(fd: &OwnedFd, len: u64) -> Result<Alignment, String> {
    let flags = fcntl_getfl(fd).map_err(|e| e.to_string())?;
    fcntl_setfl(fd, flags | OFlags::DIRECT)
        .map_err(|e| format!("the file system refuses O_DIRECT: {e}"))?;
    let found = told(fd).unwrap_or_else(|| tried(fd, len));
    let found = found.and_then(|align| usable(align, len));
    if found.is_err() {
        fcntl_setfl(fd, flags).map_err(|e| e.to_string())?;
    }
    found
}

/// Refuses what the engine cannot keep to. Buffers are as aligned as offsets, pages at most; the
/// last bytes of a file that no block divides cannot be read directly.
fn usable(align: Alignment, len: u64) -> Result<Alignment, String> {
    let offset = align.offset.max(align.memory as u64);
    if offset > SAFE || !offset.is_power_of_two() {
        return Err(format!("direct I/O wants blocks of {offset} bytes"));
    }
    if !len.is_multiple_of(offset) {
        return Err(format!(
            "{len} bytes are no multiple of its blocks of {offset}"
        ));
    }
    Ok(Alignment { offset, ..align })
}

/// What statx(2) says, from Linux 6.1 on and where the file system knows.
fn told(fd: &OwnedFd) -> Option<Result<Alignment, String>> {
    let stat = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return None;
    }
    if stat.stx_dio_offset_align == 0 {
        return Some(Err("the file system has no direct I/O for this file".into()));
    }
    let offset = u64::from(stat.stx_dio_offset_align);
    Some(Ok(Alignment {
        offset,
        memory: stat.stx_dio_mem_align.max(1) as usize,
    }))
}

/// The smallest of the usual alignments that a read succeeds with.
fn tried(fd: &OwnedFd, len: u64) -> Result<Alignment, String> {
    for align in [512, SAFE] {
        // Reads at the end of a file answer "nothing" before alignment is looked at.
        if len < 2 * SAFE && align < SAFE {
            continue;
        }
        match pread(fd, &mut *buf::aligned(align as usize), align) {
            Ok(_) => {
                return Ok(Alignment {
                    offset: align,
                    memory: align as usize,
                });
            }
            Err(Errno::INVAL) => {}
            Err(e) => return Err(format!("a direct read fails: {e}")),
        }
    }
    Err("direct I/O takes no usual alignment".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trying_finds_an_alignment_that_the_kernel_takes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let fd = OwnedFd::from(file);
        let told = enable(&fd, 1 << 20).unwrap();
        assert!(tried(&fd, 1 << 20).unwrap().offset >= told.offset);
        assert_eq!(tried(&fd, 100).unwrap().offset, SAFE);
    }

    #[test]
    fn blocks_that_do_not_fit_the_file_or_a_page_are_refused() {
        let align = |offset, memory| Alignment { offset, memory };
        assert_eq!(usable(align(512, 4), 512), Ok(align(512, 4)));
        assert_eq!(usable(align(512, 4096), 8192), Ok(align(4096, 4096)));
        assert!(usable(align(4096, 512), 8192 + 512).is_err());
        assert!(usable(align(16384, 512), 1 << 20).is_err());
    }

    #[test]
    fn a_refused_descriptor_is_left_as_it_was() {
        let fd = OwnedFd::from(std::fs::File::open("/proc/self/status").unwrap());
        assert!(enable(&fd, 0).is_err());
        assert!(!fcntl_getfl(&fd).unwrap().contains(OFlags::DIRECT));
    }
}
