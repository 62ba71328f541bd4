//! What one run of a command costs: its time, its processor time, its memory.

use crate::common::programs::tool;
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One run.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// From its start to its end.
    pub time: Duration,
    /// Peak of its resident memory in bytes.
    pub memory: u64,
}

/// Runs a command that must succeed.
#[expect(
    clippy::zombie_processes,
    reason = "wait4 is a wait, and tells the child's memory"
)]
pub fn of(command: &mut Command) -> Cost {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let child = command.stderr(Stdio::null()).spawn().expect("it starts");
    let pid = i32::try_from(child.id()).expect("a process id");
    let mut status = 0;
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both pointers are to memory of ours that lives longer than the call; the child is
    // ours, and nobody else waits for it.
    let done = unsafe { libc::wait4(pid, &raw mut status, 0, usage.as_mut_ptr()) };
    let time = start.elapsed();
    assert_eq!(done, pid, "{}", io::Error::last_os_error());
    assert_eq!(status, 0, "{command:?} failed");
    // SAFETY: zeros are a legal value, and the call has filled it in.
    let usage = unsafe { usage.assume_init() };
    Cost {
        time,
        memory: usage.ru_maxrss as u64 * 1024,
    }
}

/// Has everything below a folder written back and forgotten, as if the machine had just started.
pub fn forget(folder: &Path) {
    for entry in std::fs::read_dir(folder)
        .expect("a folder of ours")
        .flatten()
    {
        let path = entry.path();
        match entry.file_type().expect("its type") {
            kind if kind.is_dir() => forget(&path),
            kind if kind.is_file() => {
                let file = File::open(&path).expect("a file of ours");
                file.sync_all().expect("fsync");
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            }
            _ => {}
        }
    }
}

/// Copies a file or a folder with all it holds.
pub fn copy(from: &Path, to: &Path) {
    crate::common::process::ok(tool("cp").arg("-a").arg(from).arg(to));
}
