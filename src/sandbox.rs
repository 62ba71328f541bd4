//! Sandbox: what a process that parses foreign bytes may still do.
//!
//! Entered before the first byte of an image is looked at, and never left. Landlock keeps files to
//! one directory and refuses TCP, seccomp keeps system calls to a list, and nothing can be executed
//! with more privileges. A thread that serves gives up, with [`narrow`], what only starting needs.
//!
//! A ring could make calls that seccomp does not see: rings accept only the operations that the
//! executor uses, and a narrowed thread makes no new one.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use ploop_formats::{Error, Kind, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

/// What may be done with the files of the one directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// They are read.
    Read,
    /// They are read, written, made and removed.
    Write,
    /// They are given other names and modes besides.
    Change,
    /// Of them nothing but empty directories that are removed.
    Directories,
    /// Their names may go, also to another directory; none of them is read.
    Leave,
    /// It is no directory, but one file, which is read and written.
    One,
}

/// A directory and what may be done in it.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// It, open; of [`Files::One`] the file.
    pub dir: BorrowedFd<'a>,
    /// What for.
    pub files: Files,
}

/// The newest Landlock that is asked for; an older kernel does what it can.
const LANDLOCK: ABI = ABI::V6;

/// Calls of a thread that serves: descriptors it has, memory, time, and its own end.
const SERVING: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwritev2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_io_uring_enter,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_statx,
    libc::SYS_flock,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What opening an image and starting threads need besides.
const STARTING: &[libc::c_long] = &[
    libc::SYS_openat2,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_newfstatat,
    libc::SYS_fadvise64,
    libc::SYS_unlinkat,
    libc::SYS_fsync,
    libc::SYS_clone3,
    libc::SYS_clone,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sched_getaffinity,
    libc::SYS_eventfd2,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    libc::SYS_seccomp,
];

/// What a change of a disk's tree needs besides.
const CHANGING: &[libc::c_long] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_fchmod,
];

/// Confines this thread and all that it starts from now on: of all files only those beneath `dir`
/// can be opened.
///
/// Says what this kernel could not enforce. `Unsupported` when it enforces nothing at all.
pub fn enter(dir: impl AsFd, files: Files) -> Result<Option<String>> {
    enter_all(&[Place {
        dir: dir.as_fd(),
        files,
    }])
}

/// The same for several directories.
pub fn enter_all(places: &[Place<'_>]) -> Result<Option<String>> {
    rustix::thread::set_no_new_privs(true)
        .map_err(|e| Error::from(std::io::Error::from(e)).at("the sandbox"))?;
    let landlock = confine_files(places);
    let seccomp = match places.iter().any(|place| place.files == Files::Change) {
        true => filter(&[SERVING, STARTING, CHANGING]),
        false => filter(&[SERVING, STARTING]),
    };
    match (landlock, seccomp) {
        (Err(a), Err(b)) => Err(Error::new(
            Kind::Unsupported,
            format!("the sandbox: {a}; {b}; --sandbox=off serves without it"),
        )),
        (Ok(weaker), Ok(())) => Ok(weaker),
        (Err(missing), _) | (_, Err(missing)) => Ok(Some(missing)),
    }
}

/// Takes from this thread what only starting needed: it opens nothing and starts nothing.
pub fn narrow() -> Result<()> {
    filter(&[SERVING]).map_err(|e| Error::new(Kind::Unsupported, format!("the sandbox: {e}")))
}

/// What Landlock leaves of a directory.
fn within(files: Files) -> BitFlags<AccessFs> {
    match files {
        Files::Read => AccessFs::ReadFile | AccessFs::ReadDir,
        Files::Write => {
            AccessFs::from_read(LANDLOCK) & !AccessFs::Execute
                | AccessFs::WriteFile
                | AccessFs::Truncate
                | AccessFs::MakeReg
                | AccessFs::RemoveFile
        }
        Files::Change => within(Files::Write) | AccessFs::Refer,
        Files::Directories => AccessFs::RemoveDir.into(),
        Files::Leave => AccessFs::Refer | AccessFs::RemoveFile,
        Files::One => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate,
    }
}

/// Says what the kernel's Landlock does not know.
fn confine_files(places: &[Place<'_>]) -> std::result::Result<Option<String>, String> {
    let confined = || {
        let rules = places
            .iter()
            .map(|place| PathBeneath::new(place.dir, within(place.files)))
            .map(Ok::<_, landlock::RulesetError>);
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?
            .add_rules(rules)?
            .restrict_self()
    };
    let status = confined().map_err(|e: landlock::RulesetError| format!("Landlock: {e}"))?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(None),
        RulesetStatus::PartiallyEnforced => Ok(Some(weaker(landlock_abi().unwrap_or(0)))),
        RulesetStatus::NotEnforced => Err("this kernel has no Landlock".into()),
    }
}

/// What Landlock of this ABI does not enforce of what is asked for.
fn weaker(abi: i32) -> String {
    let since = [
        (2, "links between folders"),
        (3, "truncation"),
        (4, "TCP"),
        (5, "ioctl(2) on devices"),
        (6, "signals and abstract sockets of other processes"),
    ];
    let missing = since.iter().filter(|(since, _)| abi < *since);
    let missing: Vec<&str> = missing.map(|(_, what)| *what).collect();
    format!(
        "Landlock of ABI {abi} does not govern {}",
        missing.join(", ")
    )
}

/// Signals to threads of our own process, which abort(3) sends.
fn own_process() -> std::result::Result<SeccompRule, seccompiler::BackendError> {
    let own = u64::from(std::process::id());
    let group = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own)?;
    SeccompRule::new(vec![group])
}

fn filter(lists: &[&[libc::c_long]]) -> std::result::Result<(), String> {
    let refused = |e: &dyn std::fmt::Display| format!("seccomp: {e}");
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| refused(&e))?;
    let calls = lists.iter().flat_map(|list| list.iter());
    let mut rules: BTreeMap<_, _> = calls.map(|call| (*call, Vec::new())).collect();
    let own = own_process().map_err(|e| refused(&e))?;
    rules.insert(libc::SYS_tgkill, vec![own]);
    let otherwise = SeccompAction::Errno(libc::EPERM as u32);
    let program: BpfProgram = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)
        .and_then(BpfProgram::try_from)
        .map_err(|e| refused(&e))?;
    seccompiler::apply_filter(&program).map_err(|e| refused(&e))
}

/// What this kernel can enforce, each or why not.
#[derive(Debug, Clone)]
pub struct Abilities {
    /// The ABI of its Landlock; below 6 some of what is asked for is not enforced.
    pub landlock: std::result::Result<i32, String>,
    /// Filters that refuse a call with an error.
    pub seccomp: std::result::Result<(), String>,
}

impl Abilities {
    /// Asks the kernel; confines nothing.
    pub fn probe() -> Self {
        Self {
            landlock: landlock_abi(),
            seccomp: seccomp_errno(),
        }
    }
}

fn landlock_abi() -> std::result::Result<i32, String> {
    const VERSION: u32 = 1;
    // SAFETY: with this flag the kernel reads no memory and makes no descriptor.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            VERSION,
        )
    };
    let error = || std::io::Error::last_os_error().raw_os_error();
    match i32::try_from(abi) {
        Ok(abi) if abi > 0 => Ok(abi),
        _ if error() == Some(libc::EOPNOTSUPP) => Err("it is not among the kernel's \
             `lsm=` modules"
            .into()),
        _ => Err("this kernel has none (CONFIG_SECURITY_LANDLOCK), or a filter hides it".into()),
    }
}

fn seccomp_errno() -> std::result::Result<(), String> {
    TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    const ACTION_AVAILABLE: libc::c_uint = 2;
    let action: u32 = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the kernel reads the one integer behind the pointer.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, ACTION_AVAILABLE, 0, &raw const action) };
    match answer {
        0 => Ok(()),
        _ => Err("this kernel has none (CONFIG_SECCOMP_FILTER), or a filter hides it".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_lacks_is_named() {
        let said = weaker(3);
        assert!(
            said.contains("TCP") && !said.contains("truncation"),
            "{said}"
        );
    }

    #[test]
    fn a_confined_thread_signals_its_own_process_and_no_other() {
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let victim = other.id().cast_signed();
        let sent = std::thread::spawn(move || {
            filter(&[SERVING, STARTING]).unwrap();
            let own = std::process::id().cast_signed();
            // SAFETY: signal 0 is delivered to nobody.
            let tgkill = |group: i32, thread: i32| unsafe {
                libc::syscall(libc::SYS_tgkill, group, thread, 0)
            };
            (tgkill(victim, victim), tgkill(own, own))
        });
        let sent = sent.join().unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(sent, (-1, 0));
    }

    #[test]
    fn what_the_probe_promises_can_be_entered() {
        let probed = Abilities::probe();
        let entered =
            std::thread::spawn(|| enter(std::fs::File::open("/tmp").unwrap(), Files::Read));
        let entered = entered.join().unwrap();
        assert_eq!(
            entered.is_ok(),
            probed.landlock.is_ok() || probed.seccomp.is_ok(),
            "{probed:?} {entered:?}"
        );
    }
}
