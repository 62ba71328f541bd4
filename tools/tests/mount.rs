//! `mount` and `umount`: a disk as a directory, through the death of everyone who serves it.

mod common;

use common::{Scratch, can_mount, eventually, fails, json, kill9, noise, ok, text};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// What must not be there once nothing is attached.
fn nothing_is_left(scratch: &Scratch) {
    assert!(scratch.attached().is_empty());
    // Another test may mount on a name that is not UTF-8.
    let mounts = fs::read("/proc/self/mounts").expect("mounts");
    let mounts = String::from_utf8_lossy(&mounts);
    assert!(!mounts.contains(text(&scratch.path(""))), "{mounts}");
    for block in fs::read_dir("/sys/block").expect("sysfs").flatten() {
        let backing = fs::read_to_string(block.path().join("loop/backing_file"));
        let backing = backing.unwrap_or_default();
        let run = backing.trim().strip_suffix("/disk").map(Path::new);
        let dangling = run.is_some_and(|r| r.starts_with("/run/ploop") && !r.exists());
        assert!(!dangling, "{backing}");
    }
}

fn pid(scratch: &Scratch, which: &str) -> u64 {
    scratch.attached()[0][which].as_u64().expect("a process")
}

#[test]
fn a_file_system_is_found_again_after_umount() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "128M"]);
    let point = scratch.mountpoint();
    let state = json(&["mount", text(&disk), text(&point)]);
    for field in ["path", "uuid", "device", "mountpoint", "transport", "state"] {
        assert!(state[field].is_string(), "{field}: {state}");
    }
    for field in ["worker_pid", "keeper_pid", "size"] {
        assert!(state[field].is_u64(), "{field}: {state}");
    }
    assert_eq!(state["size"], 128 << 20);
    let listed = scratch.attached().remove(0);
    for (name, value) in state.as_object().expect("an object") {
        assert_eq!(&listed[name], value, "list shows what mount said: {name}");
    }
    assert_eq!(listed["answers"], true, "and what the keeper says now");
    let doc = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OUTPUT.md");
    let doc = fs::read_to_string(doc).expect("docs/OUTPUT.md");
    for name in state.as_object().expect("an object").keys() {
        assert!(doc.contains(&format!("| `{name}` |")), "{name}");
    }

    let data = noise(20 << 20, 1);
    fs::write(point.join("file"), &data).expect("write");
    ok(&["umount", text(&point)]);
    nothing_is_left(&scratch);
    ok(&["check", text(&disk)]);
    ok(&["mount", text(&disk), text(&point), "--read-only"]);
    assert!(fs::read(point.join("file")).expect("read") == data);
    assert!(fs::write(point.join("other"), "x").is_err());
    let device = scratch.attached()[0]["device"]
        .as_str()
        .expect("device")
        .to_string();
    ok(&["umount", &device]);
    nothing_is_left(&scratch);
}

#[test]
fn dying_workers_are_a_pause_and_not_an_error() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "256M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    let writer = std::thread::spawn({
        let point = point.clone();
        move || {
            for n in 0..20u64 {
                let mut file = fs::File::create(point.join(n.to_string())).expect("create");
                file.write_all(&noise(4 << 20, n + 1)).expect("write");
                file.sync_all().expect("fsync");
            }
        }
    });
    for _ in 0..6 {
        let dead = pid(&scratch, "worker_pid");
        kill9(dead);
        eventually("another worker serves", || {
            let disk = &scratch.attached()[0];
            let other = disk["worker_pid"].as_u64().is_some_and(|p| p != dead);
            disk["state"] == "serving" && other
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    writer.join().expect("no write failed");
    assert!(scratch.attached()[0]["restarts"].as_u64() >= Some(6));
    ok(&["umount", text(&point)]);
    ok(&["check", text(&disk)]);
    ok(&["mount", text(&disk), text(&point)]);
    for n in 0..20u64 {
        let found = fs::read(point.join(n.to_string())).expect("read");
        assert!(found == noise(4 << 20, n + 1), "file {n}");
    }
    ok(&["umount", text(&point)]);
    nothing_is_left(&scratch);
}

#[test]
fn a_worker_that_dies_while_closing_is_replaced_to_close() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "128M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    let data = noise(8 << 20, 3);
    fs::write(point.join("file"), &data).expect("write");
    let worker = pid(&scratch, "worker_pid");
    let killer = std::thread::spawn(move || kill9(worker));
    ok(&["umount", text(&disk)]);
    killer.join().expect("killed in time");
    nothing_is_left(&scratch);
    assert_eq!(json(&["info", text(&disk)])["layers"][0]["in_use"], false);
    ok(&["mount", text(&disk), text(&point)]);
    assert!(fs::read(point.join("file")).expect("read") == data);
}

#[test]
fn the_next_command_cleans_up_after_a_dead_keeper() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "128M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    let data = noise(1 << 20, 4);
    fs::write(point.join("file"), &data).expect("write");
    fs::File::open(point.join("file"))
        .and_then(|f| f.sync_all())
        .expect("fsync");
    let worker = pid(&scratch, "worker_pid");
    kill9(pid(&scratch, "keeper_pid"));
    eventually("the worker dies with its keeper", || {
        let stat = fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
    nothing_is_left(&scratch);
    ok(&["mount", text(&disk), text(&point)]);
    assert!(
        fs::read(point.join("file")).expect("read") == data,
        "what was synced is there"
    );
    ok(&["umount", text(&point)]);
    ok(&["check", text(&disk)]);
}

#[test]
fn a_failed_mount_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let point = scratch.mountpoint();
    let said = fails(1, &["mount", text(&disk), text(&point)]);
    assert!(said.contains(text(&point)), "{said}");
    nothing_is_left(&scratch);
    ok(&["check", text(&disk)]);
    fails(11, &["mount", text(&disk), text(&scratch.path("absent"))]);
    let image = disk.join("root.hds");
    let mut bytes = fs::read(&image).expect("read");
    bytes[64..68].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes());
    fs::write(&image, bytes).expect("write");
    let said = fails(6, &["mount", text(&disk)]);
    assert!(said.contains("root.hds") && said.contains("0x40"), "{said}");
    nothing_is_left(&scratch);
}

/// Where a disk is registered while it is attached.
fn run_directory(disk: &Path) -> std::path::PathBuf {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(disk).expect("a disk");
    Path::new("/run/ploop").join(format!("{}-{}", meta.dev(), meta.ino()))
}

/// The loop device of a disk, once there is one.
fn device_of(disk: &Path) -> std::path::PathBuf {
    let file = run_directory(disk).join("disk");
    let mut device = None;
    eventually("a device", || {
        let blocks = fs::read_dir("/sys/block").expect("sysfs").flatten();
        let mut ours = blocks.filter(|block| {
            let backing = fs::read_to_string(block.path().join("loop/backing_file"));
            backing.is_ok_and(|b| Path::new(b.trim()) == file)
        });
        device = ours.next().map(|b| Path::new("/dev").join(b.file_name()));
        device.is_some()
    });
    device.expect("found")
}

#[test]
fn a_failed_mount_leaves_nothing_even_when_somebody_looks_at_its_device_for_long() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let point = scratch.mountpoint();
    let looking = std::thread::spawn({
        let disk = disk.clone();
        move || {
            let glance = fs::File::open(device_of(&disk)).expect("open");
            // Longer than a look at a device is waited for.
            std::thread::sleep(std::time::Duration::from_secs(4));
            drop(glance);
        }
    });
    fails(1, &["mount", text(&disk), text(&point)]);
    looking.join().expect("it looked");
    nothing_is_left(&scratch);
}

/// A PATH on which a shell script comes before the program of that name.
fn path_with(bin: &Path, program: &str, script: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = std::env::var("PATH").expect("a path");
    fs::create_dir(bin).expect("directory");
    let program = bin.join(program);
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("write");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
    format!("{}:{path}", text(bin))
}

#[test]
fn a_mount_that_is_cancelled_in_the_program_it_runs_is_cancelled() {
    if !can_mount() {
        return;
    }
    use std::os::unix::process::CommandExt;
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let (point, bin, here) = (
        scratch.mountpoint(),
        scratch.path("bin"),
        scratch.path("here"),
    );
    let path = path_with(
        &bin,
        "mount",
        &format!(": >'{}'\nexec sleep 60", text(&here)),
    );
    let mut child = Command::new(common::PLOOPCTL)
        .args(["mount", text(&disk), text(&point)])
        .env("PATH", path)
        .process_group(0)
        .stderr(Stdio::null())
        .spawn()
        .expect("ploopctl runs");
    eventually("mount(8) runs", || here.exists());
    let group = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process_group(group, rustix::process::Signal::INT).expect("Ctrl-C");
    assert_eq!(child.wait().expect("wait").code(), Some(10));
    nothing_is_left(&scratch);
}

#[test]
fn who_holds_a_busy_disk_is_named_and_it_stays_attached() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    let mut holder = Command::new("sleep")
        .arg("60")
        .current_dir(&point)
        .stdout(Stdio::null())
        .spawn()
        .expect("sleep runs");
    let said = fails(4, &["umount", text(&point)]);
    assert!(
        said.contains("sleep") && said.contains(&holder.id().to_string()),
        "{said}"
    );
    fs::write(point.join("still"), "usable").expect("write");
    fails(4, &["mount", text(&disk)]);
    holder.kill().expect("kill");
    holder.wait().expect("wait");
    ok(&["umount", text(&point)]);
    fails(11, &["umount", text(&disk)]);
    nothing_is_left(&scratch);
}

#[test]
fn a_disk_that_is_busy_in_one_place_stays_mounted_in_all() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let point = scratch.mountpoint();
    let second = scratch.path("second");
    fs::create_dir(&second).expect("directory");
    ok(&["mount", text(&disk), text(&point)]);
    rustix::mount::mount_bind(point.join("lost+found"), &second).expect("bind");
    let held = fs::File::create(point.join("held")).expect("file");
    fails(4, &["umount", text(&disk)]);
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(mounts.contains(text(&second)), "{mounts}");
    drop(held);
    ok(&["umount", text(&disk)]);
    nothing_is_left(&scratch);
}

/// What udev does after a write to a device: looks at it, and goes.
#[test]
fn a_glance_at_the_device_does_not_keep_it() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    ok(&["mount", text(&disk)]);
    let device = scratch.attached()[0]["device"].clone();
    let glance = fs::File::open(device.as_str().expect("device")).expect("open");
    let looking = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(glance);
    });
    ok(&["umount", text(&disk)]);
    looking.join().expect("thread");
    nothing_is_left(&scratch);
}

#[test]
fn a_cancelled_verb_leaves_nothing() {
    if !can_mount() {
        return;
    }
    use std::os::unix::process::CommandExt;
    let scratch = Scratch::new();
    let mounted = scratch.disk("m", &["-s", "64M"]);
    let disk = scratch.path("d");
    let init = ["init", "-s", "64M", text(&disk)];
    let mount = ["mount", text(&mounted)];
    // The first milliseconds belong to the loader: a signal then ends a process that did nothing.
    for pause in (4..60).step_by(4) {
        for args in [&init[..], &mount[..]] {
            let mut child = Command::new(common::PLOOPCTL)
                .args(args)
                .process_group(0)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("ploopctl runs");
            std::thread::sleep(std::time::Duration::from_millis(pause));
            let group = rustix::process::Pid::from_child(&child);
            // It may have ended.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::INT);
            let code = child.wait().expect("wait").code();
            assert!(matches!(code, None | Some(0 | 10)), "{args:?}: {code:?}");
            if code == Some(0) && args[0] == "mount" {
                ok(&["umount", text(&mounted)]);
            }
            if code == Some(0) && args[0] == "init" {
                fs::remove_dir_all(&disk).expect("a finished disk");
            }
            let what = format!("after {pause} ms nothing of {args:?} is left");
            eventually(&what, || scratch.attached().is_empty());
            assert!(!disk.exists() || code.is_none(), "{what}");
            let _ = fs::remove_dir_all(&disk);
        }
    }
    nothing_is_left(&scratch);
}

#[test]
fn names_need_not_be_text() {
    if !can_mount() {
        return;
    }
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let scratch = Scratch::new();
    let odd = scratch.path("").join(OsStr::from_bytes(b"\xff \n\\"));
    let point = odd.join(OsStr::from_bytes(b"m\xfe"));
    fs::create_dir_all(&point).expect("directory");
    let disk = odd.join(OsStr::from_bytes(b"d\xfd"));
    let done = |args: &[&OsStr]| {
        let output = Command::new(common::PLOOPCTL).args(args).output();
        let output = output.expect("ploopctl runs");
        assert!(output.status.success(), "{args:?}: {output:?}");
    };
    let (disk, point) = (disk.as_os_str(), point.as_os_str());
    done(&["init".as_ref(), "-s".as_ref(), "64M".as_ref(), disk]);
    done(&["mount".as_ref(), disk, point]);
    done(&["umount".as_ref(), point]);
    done(&["mount".as_ref(), disk, point]);
    done(&["umount".as_ref(), disk]);
    done(&["check".as_ref(), disk]);
    let wrong = Command::new(common::PLOOPCTL)
        .arg(OsStr::from_bytes(b"--\xff"))
        .output()
        .expect("ploopctl runs");
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
    nothing_is_left(&scratch);
}

#[test]
fn every_file_system_that_init_offers_can_be_mounted() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let point = scratch.mountpoint();
    for (fs, mkfs) in [
        ("ext4", "mkfs.ext4"),
        ("xfs", "mkfs.xfs"),
        ("btrfs", "mkfs.btrfs"),
    ] {
        if !common::has(mkfs) {
            continue;
        }
        let disk = scratch.disk(fs, &["-s", "400M", "--fs", fs]);
        ok(&["mount", text(&disk), text(&point)]);
        let data = noise(3 << 20, 9);
        std::fs::write(point.join("file"), &data).expect("write");
        ok(&["umount", text(&point)]);
        ok(&["mount", text(&disk), text(&point)]);
        assert!(std::fs::read(point.join("file")).expect("read") == data);
        ok(&["umount", text(&point)]);
        ok(&["check", text(&disk)]);
    }
    nothing_is_left(&scratch);
}

/// mkfs.btrfs looks at the file behind every mounted loop device, and fails where one is dead.
#[test]
fn a_file_system_is_made_while_another_disk_dies() {
    if !can_mount() || !common::has("mkfs.btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let dying = scratch.disk("dying", &["-s", "128M"]);
    ok(&["mount", text(&dying), text(&scratch.mountpoint())]);
    // Another test's command may clean up before mkfs.btrfs itself has failed once.
    let script = format!(
        "[ -e '{first}' ] && PATH=${{PATH#*:}} exec mkfs.btrfs \"$@\"\n\
         : >'{first}'\n\
         kill -9 {keeper}\n\
         echo 'ERROR: cannot check mount status of it' >&2\n\
         exit 1",
        first = text(&scratch.path("first")),
        keeper = pid(&scratch, "keeper_pid"),
    );
    let path = path_with(&scratch.path("bin"), "mkfs.btrfs", &script);
    let disk = scratch.path("d");
    let output = Command::new(common::PLOOPCTL)
        .args(["init", "-s", "400M", "--fs", "btrfs", text(&disk)])
        .env("PATH", path)
        .output()
        .expect("ploopctl runs");
    assert!(output.status.success(), "{output:?}");
    ok(&["check", text(&disk)]);
    nothing_is_left(&scratch);
}

#[test]
fn init_with_a_file_system_it_cannot_hold_leaves_nothing() {
    if !can_mount() || !common::has("mkfs.xfs") {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("small");
    fails(5, &["init", "-s", "1M", "--fs", "xfs", text(&dir)]);
    assert!(!dir.exists());
    nothing_is_left(&scratch);
}

#[test]
fn four_neighbouring_sectors_written_at_once_arrive_intact() {
    if !can_mount() {
        return;
    }
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let device = ok(&["mount", text(&disk)]).trim_end().to_string();
    let open = || {
        let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(&device);
        file.expect("device")
    };
    for round in 0..50u64 {
        let writers: Vec<_> = (0..4u64)
            .map(|n| {
                let file = open();
                std::thread::spawn(move || {
                    let mut buf = ploop_formats::buf::aligned(512);
                    buf.copy_from_slice(&noise(512, round * 4 + n + 1));
                    file.write_all_at(&buf, round * 65536 + n * 512)
                        .expect("write");
                })
            })
            .collect();
        writers.into_iter().for_each(|w| w.join().expect("written"));
    }
    ok(&["umount", &device]);
    let device = ok(&["mount", text(&disk), "--read-only"])
        .trim_end()
        .to_string();
    let file = fs::File::open(&device).expect("device");
    for round in 0..50u64 {
        for n in 0..4u64 {
            let mut found = vec![0; 512];
            file.read_exact_at(&mut found, round * 65536 + n * 512)
                .expect("read");
            assert!(
                found == noise(512, round * 4 + n + 1),
                "round {round}, sector {n}"
            );
        }
    }
    drop(file);
    ok(&["umount", &device]);
}
