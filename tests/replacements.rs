//! Replacements: a frozen file of an attached disk is exchanged for a copy of it, while its guest works.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, assert_fsck_clean, can_mount, changer_of, kill};
use common::files::Random;
use common::load::beside_load;
use common::process::{Said, eventually, ok_within, run_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{amid, assert_holds, descriptor, freeze, mark, remove};
use common::{count, have};
use ploop_formats::guid::Guid;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(300);

/// The file of a point.
fn file_of(disk: &Disk, point: Guid) -> PathBuf {
    let file = descriptor(disk).image(point).unwrap().file.clone();
    disk.path().join(file)
}

/// A copy of a point's file.
fn copy(disk: &Disk, point: Guid, to: &Path) -> PathBuf {
    let mut copy = tool("cp");
    copy.arg("--sparse=always")
        .arg(file_of(disk, point))
        .arg(to);
    ok_within(&mut copy, PATIENCE);
    to.to_path_buf()
}

fn replace(disk: &Disk, point: Guid, new: &Path) -> Command {
    let mut replace = ploopctl();
    replace.arg("replace").arg(disk.path()).arg(point.bare());
    replace.arg(new).args(["-o", "json"]);
    replace
}

fn said(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_default()
}

/// Names of image files in a disk's directory.
fn images(disk: &Disk) -> usize {
    let files = fs::read_dir(disk.path()).unwrap().flatten();
    let names = files.map(|f| f.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("root")).count()
}

fn can_run(test: &str) -> bool {
    can_mount(test) && have(test, &["fio", "mkfs.xfs"])
}

#[test]
fn frozen_files_are_replaced_under_verified_load_from_here_and_from_elsewhere() {
    let test = "frozen_files_are_replaced_under_verified_load_from_here_and_from_elsewhere";
    if !can_run(test) {
        return;
    }
    let (disk, elsewhere) = (
        Disk::with_fs("512M", "xfs", &[]),
        TempDir::new_in("/dev/shm").unwrap(),
    );
    let attached = Attached::mounted(&disk, &[]);
    let rounds = count("PLOOP_REPLACEMENTS", 8);
    let worker = attached.worker();
    let ((), loads) = beside_load(attached.folder(), || {
        for number in 0..rounds {
            mark(attached.folder(), number);
            let (point, _) = freeze(&disk, number).unwrap();
            let old = file_of(&disk, point.uuid);
            let (new, way) = match number % 2 {
                0 => (disk.beside("new"), "moved"),
                _ => (elsewhere.path().join("new"), "copied"),
            };
            copy(&disk, point.uuid, &new);
            let made = run_within(&mut replace(&disk, point.uuid, &new), PATIENCE);
            assert!(made.status.success(), "{}", made.err);
            assert_eq!(said(&made)["way"], way);
            assert!(!old.exists() && file_of(&disk, point.uuid).exists());
            assert_eq!(new.exists(), way == "copied");
            assert_eq!(fs::metadata(file_of(&disk, point.uuid)).unwrap().nlink(), 1);
            assert_eq!(attached.worker(), worker, "it was told, and not replaced");
            // What has a new file can be merged into as ever.
            if number % 3 == 2 {
                remove(&disk, point.uuid).unwrap();
            }
        }
    });
    assert_eq!(images(&disk), descriptor(&disk).images().len());
    attached.detach();
    println!("COUNT: {test}: {rounds} files replaced, {loads} verified rounds");
    assert_holds(&disk, "xfs", rounds - 1);
}

#[test]
fn workers_and_changers_killed_while_a_file_is_replaced_cost_a_pause_and_nothing_else() {
    let test = "workers_and_changers_killed_while_a_file_is_replaced_cost_a_pause_and_nothing_else";
    if !can_run(test) {
        return;
    }
    let disk = Disk::with_fs("512M", "xfs", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (mut random, mut cut) = (Random::new(11), 0);
    let rounds = count("PLOOP_REPLACEMENT_KILLS", 12);
    mark(attached.folder(), 0);
    let (point, _) = freeze(&disk, 0).unwrap();
    let ((), loads) = beside_load(attached.folder(), || {
        for number in 0..rounds {
            let new = copy(&disk, point.uuid, &disk.beside("new"));
            let inode = fs::metadata(&new).unwrap().ino();
            let kill_one = || match number % 3 {
                0 => attached.kill_worker(),
                _ => changer_of(attached.keeper).into_iter().for_each(kill),
            };
            let wait = Duration::from_micros(random.below(200_000));
            let once = || run_within(&mut replace(&disk, point.uuid, &new), PATIENCE);
            let first = amid(wait, kill_one, once);
            if !first.status.success() {
                cut += 1;
                done_by_the_same_command(&disk, point.uuid, &new);
            }
            assert!(!new.exists(), "{}", first.err);
            let has = fs::metadata(file_of(&disk, point.uuid)).unwrap().ino();
            assert_eq!(has, inode, "{}", first.err);
            assert_eq!(fs::metadata(file_of(&disk, point.uuid)).unwrap().nlink(), 1);
            assert_eq!(images(&disk), descriptor(&disk).images().len());
        }
    });
    attached.detach();
    println!("COUNT: {test}: {rounds} files replaced, {cut} times cut, {loads} verified rounds");
    assert!(rounds < 30 || cut > 0, "nothing was hit");
    assert_holds(&disk, "xfs", 0);
}

/// Repeats a command that was cut: it does the whole, or says that only the name is left, which goes. A
/// kill behind the last step left nothing to do: it took the answer.
fn done_by_the_same_command(disk: &Disk, point: Guid, new: &Path) {
    eventually("the same command does it", Duration::from_secs(60), || {
        if !new.exists() {
            return Some(());
        }
        let again = run_within(&mut replace(disk, point, new), PATIENCE);
        let committed = again.err.contains("has this very file already");
        if committed {
            fs::remove_file(new).unwrap();
        } else if !again.status.success() {
            println!("still: {}", again.err);
        }
        (committed || again.status.success()).then_some(())
    });
}

#[test]
fn a_file_that_differs_does_not_get_into_a_running_disk() {
    let test = "a_file_that_differs_does_not_get_into_a_running_disk";
    if !can_run(test) {
        return;
    }
    let disk = Disk::with_fs("128M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    mark(attached.folder(), 5);
    let (point, _) = freeze(&disk, 5).unwrap();
    let (old, before) = (file_of(&disk, point.uuid), images(&disk));
    let new = copy(&disk, point.uuid, &disk.beside("new"));
    let bytes = fs::read(&new).unwrap();
    let at = bytes.iter().rposition(|b| *b != 0).unwrap();
    let image = fs::File::options().write(true).open(&new).unwrap();
    image.write_all_at(&[!bytes[at]], at as u64).unwrap();
    let refused = run_within(&mut replace(&disk, point.uuid, &new), PATIENCE);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.err);
    assert!(refused.err.contains("is no copy"), "{}", refused.err);
    assert!(new.exists() && old.exists() && images(&disk) == before);
    // Neither does the top, nor one that another disk has.
    let top = descriptor(&disk).top();
    let refused = run_within(&mut replace(&disk, top, &new), PATIENCE);
    assert!(refused.err.contains("is the top"), "{}", refused.err);
    let refused = run_within(&mut replace(&disk, point.uuid, &old), PATIENCE);
    assert!(refused.err.contains("names this file"), "{}", refused.err);
    assert!(old.exists());
    mark(attached.folder(), 6);
    attached.detach();
    assert_fsck_clean("ext4", &disk);
}

#[test]
fn a_second_name_of_the_same_file_is_named_and_left_to_its_owner() {
    let disk = Disk::new("64M", &[]);
    let uuid = ok_within(
        ploopctl()
            .args(["snapshot", "create", "-o", "json"])
            .arg(disk.path()),
        PATIENCE,
    );
    let uuid: Value = serde_json::from_str(&uuid).unwrap();
    let point: Guid = uuid["uuid"].as_str().unwrap().parse().unwrap();
    let (file, new) = (file_of(&disk, point), disk.beside("new"));
    // What a kill leaves, or who wants a copy that costs nothing: the file with two names.
    fs::hard_link(&file, &new).unwrap();
    let said = run_within(&mut replace(&disk, point, &new), PATIENCE);
    assert_eq!(said.status.code(), Some(1), "{}", said.err);
    assert!(
        said.err.contains("has this very file already"),
        "{}",
        said.err
    );
    assert!(new.exists() && fs::metadata(&file).unwrap().nlink() == 2);
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
}
