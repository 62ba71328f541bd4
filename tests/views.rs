//! Views: frozen points mounted beside their disk, and that nothing of them stays, however they end.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, KernelMark, can_mount, kill, listed};
use common::files::Random;
use common::load::beside_load;
use common::process::{self, Guard, eventually, fails, ok, run};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{descriptor, freeze, mark, remove};
use common::{count, have};
use ploop_formats::descriptor::Mark;
use ploop_formats::guid::Guid;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// mkfs.btrfs looks at every loop device, and gives up at one whose keeper was just killed.
static KEEPERS: Mutex<()> = Mutex::new(());

/// Has the tests that kill keepers, and the one that mkfs.btrfs is for, run one after another.
fn alone() -> MutexGuard<'static, ()> {
    KEEPERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mounted view. Dropping it ends it, however the test ended.
#[derive(Debug)]
struct View {
    folder: PathBuf,
    object: Value,
}

impl View {
    /// `ploopctl snapshot mount DISK UUID`, on a folder beside the disk.
    fn of(disk: &Disk, point: Guid, name: &str) -> Self {
        let folder = place(disk, name);
        let mut command = snapshot("mount", disk);
        command.arg(point.bare()).arg(&folder);
        Self::from(&mut command, folder)
    }

    /// `ploopctl snapshot create DISK --temporary`.
    fn temporary(disk: &Disk, name: &str) -> Self {
        let folder = place(disk, name);
        let mut command = snapshot("create", disk);
        command.arg("--temporary").arg(&folder);
        let mut view = Self::from(&mut command, folder);
        view.object = view.object["view"].take();
        view
    }

    fn from(command: &mut Command, folder: PathBuf) -> Self {
        let said = ok(command.args(["-o", "json"]));
        let object = serde_json::from_str(&said).expect("JSON");
        Self { folder, object }
    }

    fn point(&self) -> Guid {
        self.object["snapshot"].as_str().unwrap().parse().unwrap()
    }

    fn path(&self) -> PathBuf {
        self.object["path"].as_str().unwrap().into()
    }

    /// The number that was written before the point was frozen.
    fn mark(&self) -> String {
        fs::read_to_string(self.folder.join("mark")).unwrap()
    }

    fn keeper(&self) -> u32 {
        number(&self.object["keeper_pid"])
    }

    fn end(self) -> Value {
        serde_json::from_str(&ok(umount(&self.folder).args(["-o", "json"]))).unwrap()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if listed(&self.path()).is_some() {
            run(umount(&self.folder).arg("--force"));
        }
    }
}

fn number(value: &Value) -> u32 {
    value.as_u64().unwrap().try_into().unwrap()
}

fn place(disk: &Disk, name: &str) -> PathBuf {
    let folder = disk.beside(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn snapshot(verb: &str, disk: &Disk) -> Command {
    let mut command = ploopctl();
    command.args(["snapshot", verb]).arg(disk.path());
    command
}

fn umount(what: &Path) -> Command {
    let mut command = ploopctl();
    command.arg("umount").arg(what);
    command
}

fn create(disk: &Disk) -> Guid {
    ok(&mut snapshot("create", disk)).trim().parse().unwrap()
}

/// The point as `snapshot list` shows it.
fn entry(disk: &Disk, point: Guid) -> Value {
    let said = ok(snapshot("list", disk).args(["-o", "json"]));
    let list: Value = serde_json::from_str(&said).unwrap();
    let all = list["snapshots"].as_array().unwrap().iter();
    let mut of = all.filter(|entry| entry["uuid"] == point.bare().as_str());
    of.next().cloned().unwrap_or_default()
}

/// The file of a point.
fn file(disk: &Disk, point: Guid) -> PathBuf {
    disk.path()
        .join(&descriptor(disk).image(point).unwrap().file)
}

fn sealed(disk: &Disk, point: Guid) -> Vec<Vec<u8>> {
    let chain = descriptor(disk).chain(point).unwrap();
    let read = |file: &String| fs::read(disk.path().join(file)).unwrap();
    chain.iter().map(|image| read(&image.file)).collect()
}

fn assert_no_views(disk: &Disk) {
    assert!(!disk.path().join(".views").exists(), "views are left");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let folder = disk.beside("view");
    let mine = mounts
        .lines()
        .find(|l| l.contains(folder.to_str().unwrap()));
    assert_eq!(mine, None, "a view is mounted");
}

/// Two names of the folder's files, one given and one taken just before: only the journal knows.
fn leave_in_journal(folder: &Path) {
    fs::write(folder.join("before"), "x").unwrap();
    fs::rename(folder.join("before"), folder.join("after")).unwrap();
    mark(folder, 1);
}

/// What the kernel says when it replays a journal on this device.
fn replayed(fs: &str, device: &str, since: &str) -> bool {
    let words = match fs {
        "xfs" => "Ending recovery",
        _ => "recovery complete",
    };
    let log = ok(&mut tool("dmesg"));
    let new = log.rsplit_once(since).map_or(log.as_str(), |(_, new)| new);
    new.lines()
        .any(|line| line.contains(device) && line.contains(words))
}

fn sees_the_past(test: &str, fs: &str) {
    if !can_mount(test) || !have(test, &["fio", &format!("mkfs.{fs}")]) {
        return;
    }
    let disk = Disk::with_fs("512M", fs, &[]);
    let attached = Attached::mounted(&disk, &[]);
    let _log = KernelMark::new(test);
    let mark_in_log = format!("ploop test {test}");
    let (frozen, _) = beside_load(attached.folder(), || {
        leave_in_journal(attached.folder());
        let (point, _) = freeze(&disk, 1).unwrap();
        mark(attached.folder(), 2);
        let before = sealed(&disk, point.uuid);
        let view = View::of(&disk, point.uuid, "view");
        let second = View::of(&disk, point.uuid, "view2");
        for view in [&view, &second] {
            assert_eq!(view.mark(), "1");
            assert!(view.folder.join("after").exists() && !view.folder.join("before").exists());
            fs::write(view.folder.join("mine"), "x").expect_err("it is read-only");
        }
        let device = view.object["device"].as_str().unwrap();
        let name = device.trim_start_matches("/dev/");
        assert!(replayed(fs, name, &mark_in_log), "the journal was clean");
        let shown = entry(&disk, point.uuid);
        assert_eq!(shown["shared"], 0, "no other disk has it: {shown}");
        assert_eq!(shown["views"].as_array().map(Vec::len), Some(2), "{shown}");
        second.end();
        assert_eq!(view.mark(), "1");
        let ended = view.end();
        assert_eq!(ended["view_of"].as_str(), disk.path().to_str(), "{ended}");
        assert!(before == sealed(&disk, point.uuid), "a frozen file changed");
        point
    });
    assert_no_views(&disk);
    assert_eq!(
        fs::read_to_string(attached.folder().join("mark")).unwrap(),
        "2"
    );
    attached.detach();
    let view = View::of(&disk, frozen.uuid, "view");
    assert_eq!(view.mark(), "1", "also of a disk that is not attached");
    view.end();
    assert_no_views(&disk);
}

#[test]
fn a_view_of_ext4_under_load_sees_the_past_and_leaves_frozen_files_alone() {
    sees_the_past(
        "a_view_of_ext4_under_load_sees_the_past_and_leaves_frozen_files_alone",
        "ext4",
    );
}

#[test]
fn a_view_of_xfs_under_load_sees_the_past_and_leaves_frozen_files_alone() {
    sees_the_past(
        "a_view_of_xfs_under_load_sees_the_past_and_leaves_frozen_files_alone",
        "xfs",
    );
}

#[test]
fn clones_and_views_mount_beside_their_source_or_say_why_not() {
    let test = "clones_and_views_mount_beside_their_source_or_say_why_not";
    if !can_mount(test) || !have(test, &["mkfs.xfs", "mkfs.btrfs"]) {
        return;
    }
    let _alone = alone();
    for fs in ["xfs", "btrfs"] {
        let disk = Disk::with_fs("512M", fs, &[]);
        let attached = Attached::mounted(&disk, &[]);
        mark(attached.folder(), 1);
        let point = create(&disk);
        mark(attached.folder(), 2);
        let (clone, folder) = (disk.beside("clone"), place(&disk, "view"));
        let source = format!("{}@{}", disk.path().display(), point.bare());
        ok(ploopctl().args(["clone", &source]).arg(&clone));
        let mounted = run(ploopctl().arg("mount").arg(&clone).arg(&folder));
        let twins = fs == "xfs" || Path::new("/sys/fs/btrfs/features/temp_fsid").exists();
        assert_eq!(mounted.status.success(), twins, "{}", mounted.err);
        if twins {
            assert_eq!(fs::read_to_string(folder.join("mark")).unwrap(), "1");
            ok(&mut umount(&folder));
            let view = View::of(&disk, point, "view");
            assert_eq!(view.mark(), "1");
            view.end();
        } else {
            assert!(mounted.err.contains("same UUID"), "{}", mounted.err);
        }
        attached.detach();
        assert_no_views(&disk);
    }
}

#[test]
fn nothing_is_merged_or_deleted_under_a_view_and_it_says_what_is_in_the_way() {
    let test = "nothing_is_merged_or_deleted_under_a_view_and_it_says_what_is_in_the_way";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::with_fs("64M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    mark(attached.folder(), 1);
    let lower = create(&disk);
    mark(attached.folder(), 2);
    let upper = create(&disk);
    mark(attached.folder(), 3);
    let view = View::of(&disk, lower, "view");
    let place = view.folder.display().to_string();
    let blocked = |command: &mut Command| {
        let said = fails(command);
        assert_eq!(said.status.code(), Some(4), "{}", said.err);
        let says = said.err.contains(&format!("umount {place}"));
        assert!(says, "{}", said.err);
    };
    blocked(snapshot("delete", &disk).arg(lower.bare()));
    blocked(snapshot("merge", &disk).arg(upper.bare()));
    let said = remove(&disk, lower).expect_err("the keeper refuses it, too");
    assert!(said.contains("share it"), "{said}");
    assert_eq!(entry(&disk, lower)["temporary"], false, "nor is it marked");
    // The view goes on without the disk.
    ok(&mut umount(&disk.path()));
    drop(attached);
    blocked(ploopctl().arg("delete").arg(disk.path()));
    blocked(snapshot("delete", &disk).arg(lower.bare()));
    let path = view.path();
    let said = fails(ploopctl().args(["snapshot", "create"]).arg(&path));
    assert!(said.err.contains("a view of snapshot"), "{}", said.err);
    assert_eq!(view.mark(), "1");
    let target = file(&disk, lower);
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o444);
    view.end();
    assert_no_views(&disk);
    ok(snapshot("delete", &disk).arg(lower.bare()));
    let now = descriptor(&disk);
    assert!(now.shot(lower).is_none(), "{:?}", now.shots());
    assert_eq!(file(&disk, upper), target, "merged into");
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o600);
    let view = View::of(&disk, upper, "view");
    assert_eq!(view.mark(), "2");
    view.end();
    ok(ploopctl().arg("delete").arg(disk.path()));
}

#[test]
fn a_killed_view_goes_with_the_next_command_and_blocks_nothing() {
    let test = "a_killed_view_goes_with_the_next_command_and_blocks_nothing";
    if !can_mount(test) {
        return;
    }
    let _alone = alone();
    let disk = Disk::with_fs("64M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    mark(attached.folder(), 1);
    let lower = create(&disk);
    create(&disk);
    let killed = || {
        let view = View::of(&disk, lower, "view");
        let worker = number(&view.object["worker_pid"]);
        kill(worker);
        eventually("another worker", PATIENCE, || {
            let worker_now = listed(&view.path())?["worker_pid"].as_u64();
            worker_now.filter(|now| *now != u64::from(worker))
        });
        assert_eq!(view.mark(), "1", "a worker is replaced");
        kill(view.keeper());
        eventually("its end", PATIENCE, || {
            listed(&view.path()).is_none().then_some(())
        });
        assert!(view.path().join("DiskDescriptor.xml").exists());
    };
    let left = || assert_no_views(&disk);
    killed();
    ok(&mut snapshot("list", &disk));
    left();
    killed();
    attached.detach();
    left();
    killed();
    let attached = Attached::mounted(&disk, &[]);
    left();
    killed();
    ok(snapshot("delete", &disk).arg(lower.bare()));
    assert!(descriptor(&disk).shot(lower).is_none(), "it is merged");
    left();
    // Unmounted by other means, it is served for nobody.
    let rest = descriptor(&disk).shots()[0].guid;
    let view = View::of(&disk, rest, "view");
    ok(tool("umount").arg(&view.folder));
    ok(&mut snapshot("list", &disk));
    left();
    assert!(listed(&view.path()).is_none());
    attached.detach();
    let view = View::of(&disk, rest, "view");
    kill(view.keeper());
    eventually("its end", PATIENCE, || {
        listed(&view.path()).is_none().then_some(())
    });
    ok(ploopctl().arg("delete").arg(disk.path()));
}

#[test]
fn a_temporary_snapshot_lives_as_long_as_its_view() {
    let test = "a_temporary_snapshot_lives_as_long_as_its_view";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::with_fs("64M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    mark(attached.folder(), 1);
    let view = View::temporary(&disk, "view");
    let point = view.point();
    mark(attached.folder(), 2);
    assert_eq!(entry(&disk, point)["temporary"], true);
    let before = sealed(&disk, point);
    // The next snapshot merges what is temporary and can go: this one cannot yet.
    create(&disk);
    mark(attached.folder(), 3);
    create(&disk);
    fails(
        snapshot("mount", &disk)
            .arg(point.bare())
            .arg(place(&disk, "view2")),
    );
    // What stands on a temporary point is not shared either, and nothing is made for it in vain.
    let shots = descriptor(&disk).shots().len();
    let said = fails(
        ploopctl()
            .arg("clone")
            .arg(disk.path())
            .arg(place(&disk, "clone")),
    );
    assert!(
        said.err
            .contains(&format!("umount {}", view.folder.display())),
        "{}",
        said.err
    );
    assert_eq!(descriptor(&disk).shots().len(), shots);
    assert_eq!(
        descriptor(&disk).shot(point).unwrap().mark,
        Some(Mark::Temporary)
    );
    assert!(
        before == sealed(&disk, point),
        "it was merged under its view"
    );
    assert_eq!(view.mark(), "1");
    let ended = view.end();
    assert_eq!(ended["outcome"], "merged", "{ended}");
    assert!(descriptor(&disk).shot(point).is_none());
    assert_no_views(&disk);

    // The running top stands on this one: now, or with the next.
    let view = View::temporary(&disk, "view");
    let point = view.point();
    assert_eq!(view.mark(), "3");
    view.end();
    create(&disk);
    create(&disk);
    assert!(descriptor(&disk).shot(point).is_none());
    attached.detach();

    let view = View::temporary(&disk, "view");
    let point = view.point();
    assert_eq!(view.mark(), "3", "of a disk that is not attached");
    let ended = view.end();
    assert_eq!(ended["outcome"], "merged", "{ended}");
    assert!(descriptor(&disk).shot(point).is_none());
    assert_no_views(&disk);
    ok(ploopctl().arg("check").arg(disk.path()));
}

/// Ends the views of a disk that are served: by hand, or by the death of their keeper.
fn end_views(disk: &Disk, mounted: &Path, random: &mut Random) {
    let all: Value = serde_json::from_str(&ok(ploopctl().args(["list", "-o", "json"]))).unwrap();
    let of_us = |d: &&Value| d["view_of"].as_str() == disk.path().to_str();
    for view in all["disks"].as_array().unwrap().iter().filter(of_us) {
        if random.below(2) == 0 {
            kill(number(&view["keeper_pid"]));
        } else {
            let _ = run(tool("umount").arg(mounted));
        }
    }
}

#[test]
fn a_temporary_snapshot_killed_at_any_moment_goes_by_itself() {
    let test = "a_temporary_snapshot_killed_at_any_moment_goes_by_itself";
    if !can_mount(test) {
        return;
    }
    let _alone = alone();
    let disk = Disk::with_fs("64M", "ext4", &[]);
    let mut attached = Some(Attached::mounted(&disk, &[]));
    let mut random = Random::new(5);
    let (mut mine, mut views, mut points) = (Vec::new(), 0, 0);
    for round in 0..count("PLOOP_VIEW_KILLS", 24) {
        let mut command = snapshot("create", &disk);
        let view = place(&disk, "view");
        let mut guard = Guard::spawn(command.arg("--temporary").arg(&view));
        thread::sleep(Duration::from_micros(random.below(80_000)));
        let _ = guard.child.kill();
        guard.wait_within(process::DEADLINE);
        views += u64::from(disk.path().join(".views").exists());
        points += u64::from(descriptor(&disk).shots().len() > mine.len() + 1);
        match (round % 6, attached.take()) {
            // Its helpers may serve the view yet, so more than nothing may be left of the directory.
            (5, Some(_attached)) => drop(ok(ploopctl().arg("umount").arg(disk.path()))),
            (5, None) => attached = Some(Attached::mounted(&disk, &[])),
            (_, was) => attached = was,
        }
        // Who was killed had helpers, which may start and mount it a moment later.
        eventually("the end of the view", PATIENCE, || {
            end_views(&disk, &view, &mut random);
            ok(&mut snapshot("list", &disk));
            (!disk.path().join(".views").exists()).then_some(())
        });
        let is_known = |guid: &Guid| mine.contains(guid);
        for shot in descriptor(&disk).shots() {
            let known = shot.guid == Guid::TOP || is_known(&shot.guid) || shot.mark.is_some();
            assert!(known, "round {round}: {shot:?} stays for ever");
        }
        mine.push(create(&disk));
    }
    mine.push(create(&disk));
    let marked = |shot: &&ploop_formats::descriptor::Shot| shot.mark.is_some();
    let left: Vec<_> = descriptor(&disk)
        .shots()
        .iter()
        .filter(marked)
        .copied()
        .collect();
    assert_eq!(left, [], "temporary ones are merged away");
    println!("COUNT: {test}: {views} views and {points} points were left by the killed");
    assert!(views > 0 && points > 0, "none was killed half-way");
    attached.into_iter().for_each(Attached::detach);
    ok(ploopctl().arg("check").arg(disk.path()));
}
