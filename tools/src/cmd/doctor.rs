//! `doctor`: what this machine can do, and why not more.
//!
//! Looks, and changes nothing: no mount, no device, no module loaded. One line for each thing, so
//! that the answer can be read aloud on the telephone.

use crate::answer::Answer;
use crate::attach;
use crate::global::Global;
use crate::settings::{PLACE, Settings};
use ploop::Result;
use ploop::io::exec::Engine;
use ploop::rundir::{self, Entry};
use ploop::sandbox::Abilities;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Say what this machine can do, what is missing, and what to do about it
///
/// Exit code 0 when a disk can be mounted or served, 1 when neither works.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// The answer to one question. Field names are stable.
#[derive(Debug, Clone, Serialize)]
struct Finding {
    /// What was looked at.
    name: &'static str,
    /// How it is.
    state: Health,
    /// What was seen.
    detail: String,
    /// What to do about it, where something can be done.
    remedy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    /// It is there.
    Ok,
    /// Works, with less than there could be.
    Warning,
    /// It is not there.
    Missing,
}

impl Finding {
    fn new(name: &'static str, state: Health, detail: impl Into<String>) -> Self {
        Self {
            name,
            state,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Health::Ok, detail)
    }

    fn warning(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Health::Warning, detail)
    }

    fn missing(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Health::Missing, detail)
    }

    fn remedy(self, remedy: impl Into<String>) -> Self {
        Self {
            remedy: Some(remedy.into()),
            ..self
        }
    }

    fn is_there(&self) -> bool {
        self.state != Health::Missing
    }

    fn line(&self) -> String {
        let state = format!("{:?}", self.state).to_lowercase();
        let remedy = self.remedy.as_ref().map(|r| format!("; {r}"));
        let remedy = remedy.unwrap_or_default();
        format!("{state:<8} {:<16} {}{remedy}\n", self.name, self.detail)
    }
}

/// Does it.
pub fn run(_: &Args, global: &Global) -> Result<Answer> {
    let checks = [
        ploopd(),
        run_directory(),
        settings(global),
        node(
            "fuse",
            "/dev/fuse",
            "modprobe fuse, or let the container have the device",
        ),
        node(
            "loop",
            "/dev/loop-control",
            "modprobe loop, or let the container have the device",
        ),
        resend(),
        admin(),
        resource(),
        engine(),
        landlock(),
        seccomp(),
        programs("mount-program", &["mount"], "install util-linux"),
        programs(
            "ext4",
            &["mkfs.ext4", "e2fsck", "resize2fs"],
            "install e2fsprogs",
        ),
        programs(
            "xfs",
            &["mkfs.xfs", "xfs_repair", "xfs_growfs"],
            "install xfsprogs",
        ),
        programs("btrfs", &["mkfs.btrfs", "btrfs"], "install btrfs-progs"),
        unused("ublk", "/dev/ublk-control", "ublk_drv"),
        unused("kernel-nbd", "/dev/nbd0", "nbd"),
        leftovers(),
    ];
    let all = |names: &[&str]| {
        let needed = |f: &&Finding| names.contains(&f.name);
        checks.iter().filter(needed).all(Finding::is_there)
    };
    let serve = all(&["ploopd", "run-directory", "settings"]);
    let mount = serve && all(&["fuse", "loop", "cap-sys-admin", "mount-program"]);
    let verdict = match (mount, serve) {
        (true, _) => "disks can be mounted (FUSE and loop), and served over NBD",
        (false, true) => "disks can be served over NBD, and not be mounted",
        (false, false) => "disks can neither be mounted nor served",
    };
    let lines: String = checks.iter().map(Finding::line).collect();
    Ok(Answer {
        text: format!("{lines}{verdict}\n"),
        json: json!({ "mount": mount, "serve": serve, "verdict": verdict, "checks": checks }),
        code: u8::from(!serve),
    })
}

fn ploopd() -> Finding {
    let program = attach::ploopd();
    let said = Command::new(&program).arg("--version").output();
    let ours = format!("ploopd {}", env!("CARGO_PKG_VERSION"));
    let shown = program.display();
    match said {
        Err(e) => Finding::missing("ploopd", format!("{shown}: {e}"))
            .remedy("put ploopd beside ploopctl, or on the PATH"),
        Ok(output) => match String::from_utf8_lossy(&output.stdout).trim() {
            version if version == ours => Finding::ok("ploopd", format!("{shown}, {version}")),
            version => Finding::warning("ploopd", format!("{shown} is {version:?}, not {ours}"))
                .remedy("install both from one release"),
        },
    }
}

fn run_directory() -> Finding {
    let usable = rundir::root().and_then(|root| {
        let probe = root.join(format!("doctor-{}", std::process::id()));
        std::fs::create_dir(&probe)
            .and_then(|()| std::fs::remove_dir(&probe))
            .map_err(|e| ploop::Error::from(e).at(probe.display()))?;
        Ok(root)
    });
    match usable {
        Ok(root) => Finding::ok("run-directory", root.display().to_string()),
        Err(e) => Finding::missing("run-directory", e.to_string()),
    }
}

/// Which file is in force. One that is wrong stops every verb that starts a server.
fn settings(global: &Global) -> Finding {
    match Settings::read(global.config.as_deref()) {
        Ok((_, Some(path))) => Finding::ok("settings", path.display().to_string()),
        Ok((_, None)) => Finding::ok("settings", format!("no {PLACE}: defaults")),
        Err(e) => Finding::missing("settings", e.to_string()).remedy("mend that file"),
    }
}

/// Opens a device as its user would, and does nothing with it.
fn node(name: &'static str, path: &str, remedy: &str) -> Finding {
    match openat(CWD, path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Finding::ok(name, path),
        Err(e @ (Errno::NOENT | Errno::NODEV | Errno::NXIO)) => {
            Finding::missing(name, format!("{path}: {}", said(e))).remedy(remedy)
        }
        Err(Errno::ACCESS | Errno::PERM) => {
            Finding::missing(name, format!("{path}: permission denied"))
                .remedy("mount as root; in a container, allow the device")
        }
        Err(e) => Finding::missing(name, format!("{path}: {}", said(e))),
    }
}

fn said(e: Errno) -> String {
    std::io::Error::from(e).to_string()
}

/// FUSE notification 7 came with Linux 6.9.
fn resend() -> Finding {
    let name = "resend";
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    if kernel(&release) >= Some((6, 9)) {
        return Finding::ok(
            name,
            format!("Linux {release}: a server that dies is a pause"),
        );
    }
    Finding::warning(
        name,
        format!("Linux {release}: a server that dies is an I/O error for a mounted disk"),
    )
    .remedy("Linux 6.9 or later makes it a pause")
}

/// Major and minor number of a kernel release.
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn holds(capability: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|c| c.effective.contains(capability))
}

fn admin() -> Finding {
    match holds(CapabilitySet::SYS_ADMIN) {
        true => Finding::ok("cap-sys-admin", "mount and umount are allowed"),
        false => Finding::missing(
            "cap-sys-admin",
            "mount, umount, init with a file system fail",
        )
        .remedy("run as root; init --fs none, serve, check, info, map need no root"),
    }
}

fn resource() -> Finding {
    match holds(CapabilitySet::SYS_RESOURCE) {
        true => Finding::ok(
            "cap-sys-resource",
            "servers are marked as I/O flushers; a mounted ext4 can grow",
        ),
        false => Finding::warning(
            "cap-sys-resource",
            "servers are not marked as I/O flushers: under memory pressure a mounted disk may \
             stall; a mounted ext4 cannot grow",
        )
        .remedy("run as root with CAP_SYS_RESOURCE; containers often lack it"),
    }
}

fn engine() -> Finding {
    match Engine::detect() {
        (Engine::Ring, _) => Finding::ok("io-engine", "io_uring"),
        (Engine::Poll, why) => Finding::warning(
            "io-engine",
            format!("poll, which is slower: {}", why.unwrap_or_default()),
        ),
    }
}

fn landlock() -> Finding {
    match Abilities::probe().landlock {
        Ok(abi @ 6..) => Finding::ok("landlock", format!("ABI {abi}")),
        Ok(abi) => Finding::warning("landlock", format!("ABI {abi}: not all is enforced"))
            .remedy("Linux 6.12 or later has ABI 6"),
        Err(why) => Finding::warning("landlock", format!("{why}: seccomp alone confines"))
            .remedy("boot with lsm=landlock among the others"),
    }
}

fn seccomp() -> Finding {
    match Abilities::probe().seccomp {
        Ok(()) => Finding::ok("seccomp", "filters can be loaded"),
        Err(why) => Finding::warning("seccomp", why)
            .remedy("where Landlock is missing, too, only --sandbox=off serves"),
    }
}

fn programs(name: &'static str, wanted: &[&str], remedy: &str) -> Finding {
    let missing: Vec<&str> = wanted.iter().copied().filter(|p| !is_on_path(p)).collect();
    match missing.is_empty() {
        true => Finding::ok(name, wanted.join(", ")),
        false => Finding::missing(name, format!("not on the PATH: {}", missing.join(", ")))
            .remedy(remedy),
    }
}

/// Whether a program of this name can be started.
pub(super) fn is_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// A driver that this version makes no use of, and whose absence costs nothing.
fn unused(name: &'static str, node: &str, module: &str) -> Finding {
    if Path::new(node).exists() {
        return Finding::ok(name, format!("{node}; not used by this version"));
    }
    let detail = match has_module(module) {
        true => format!("no {node}, though the kernel has the module {module}"),
        false => format!("no {node}, and the kernel has no module {module}"),
    };
    Finding::missing(name, detail).remedy("nothing to do: this version does not use it")
}

fn has_module(module: &str) -> bool {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let dir = PathBuf::from("/lib/modules").join(release);
    let named = |list: &str| {
        let text = std::fs::read_to_string(dir.join(list)).unwrap_or_default();
        text.lines().any(|line| {
            line.split(':')
                .next()
                .is_some_and(|p| p.contains(&format!("/{module}.ko")))
        })
    };
    Path::new("/sys/module").join(module).exists()
        || named("modules.dep")
        || named("modules.builtin")
}

fn leftovers() -> Finding {
    let name = "leftovers";
    match rundir::entries() {
        Err(e) => Finding::missing(name, e.to_string()),
        Ok(entries) => {
            let dead = |e: &&Entry| matches!(e, Entry::Leftover(_));
            match entries.iter().filter(dead).count() {
                0 => Finding::ok(name, "none"),
                n => Finding::warning(name, format!("{n} of dead keepers"))
                    .remedy("`ploopctl list --orphans` shows them, --remove removes them"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_release_is_compared_by_its_numbers() {
        assert_eq!(kernel("6.18.44-amd64"), Some((6, 18)));
        assert_eq!(kernel("6.9-rc1"), Some((6, 9)));
        assert!(kernel("6.12.1") > kernel("6.9.0"));
        assert_eq!(kernel("nonsense"), None);
    }

    #[test]
    fn a_missing_device_says_what_to_do() {
        let finding = node("fuse", "/dev/no-such-device", "modprobe it");
        assert!(!finding.is_there());
        assert!(finding.line().ends_with("; modprobe it\n"), "{finding:?}");
    }
}
