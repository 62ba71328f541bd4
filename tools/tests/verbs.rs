//! The verbs of an operator: what the machine can do, and disks that come and go.

mod common;

use common::{Scratch, can_mount, eventually, fails, json, kill9, noise, ok, run, skip, text};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn check<'a>(doctor: &'a Value, name: &str) -> &'a Value {
    let checks = doctor["checks"].as_array().expect("checks");
    let found = checks.iter().find(|c| c["name"] == name);
    found.unwrap_or_else(|| panic!("no check {name}: {doctor}"))
}

#[test]
fn the_doctor_says_what_is_missing_and_what_to_do() {
    let doctor = json(&["doctor"]);
    assert_eq!(doctor["serve"], true, "{doctor}");
    documented(&doctor);
    let doc = output_doc();
    for check in doctor["checks"].as_array().expect("checks") {
        assert!(check["detail"].as_str().is_some_and(|d| !d.is_empty()));
        let state = check["state"].as_str().expect("state");
        assert!(["ok", "warning", "missing"].contains(&state), "{check}");
        let name = check["name"].as_str().expect("name");
        assert!(doc.contains(&format!("`{name}`")), "{name}");
    }
    // Programs are looked for on the PATH: without one there are none, and no mount either.
    let output = Command::new(common::PLOOPCTL)
        .args(["-o", "json", "doctor"])
        .env("PATH", "/nonexistent")
        .output()
        .expect("ploopctl runs");
    assert_eq!(output.status.code(), Some(0));
    let doctor: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let ext4 = check(&doctor, "ext4");
    assert_eq!(ext4["state"], "missing");
    assert!(
        ext4["detail"]
            .as_str()
            .expect("detail")
            .contains("mkfs.ext4")
    );
    assert_eq!(ext4["remedy"], "install e2fsprogs");
    assert_eq!(doctor["mount"], false, "{doctor}");
}

#[test]
fn the_doctor_fails_where_no_disk_can_be_served() {
    let scratch = Scratch::new();
    let alone = scratch.path("ploopctl");
    // By another process: what is forked here meanwhile would have our copy open, and it would be busy.
    let copied = Command::new("cp")
        .arg(common::PLOOPCTL)
        .arg(&alone)
        .status();
    assert!(copied.expect("cp runs").success());
    let output = Command::new(&alone)
        .arg("doctor")
        .env("PATH", "/nonexistent")
        .output()
        .expect("ploopctl runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("missing  ploopd"), "{said}");
    assert!(said.contains("put ploopd beside ploopctl"), "{said}");
}

fn output_doc() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OUTPUT.md");
    fs::read_to_string(path).expect("docs/OUTPUT.md")
}

/// Every name in what a program reads is in its documentation.
fn documented(value: &Value) {
    let doc = output_doc();
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                assert!(doc.contains(&format!("`{name}`")), "{name}");
                documented(value);
            }
        }
        Value::Array(items) => items.iter().for_each(documented),
        _ => {}
    }
}

fn plain(scratch: &Scratch, name: &str) -> PathBuf {
    scratch.disk(name, &["-s", "64M", "--fs", "none"])
}

/// Serves over NBD in the background, as anyone can.
fn serve(disk: &Path, socket: &Path) -> Child {
    let uri = format!("unix:{}", text(socket));
    let child = Command::new(common::PLOOPCTL)
        .args(["serve", text(disk), "--nbd", &uri])
        .stdout(Stdio::null())
        .spawn()
        .expect("serve");
    eventually("it serves", || {
        let all = json(&["list"]);
        let disks = all["disks"].as_array().expect("disks").clone();
        disks
            .iter()
            .any(|d| d["path"] == text(disk) && d["state"] == "serving")
    });
    child
}

#[test]
fn a_deleted_disk_is_gone_with_its_directory() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    let deleted = json(&["delete", text(&disk)]);
    assert_eq!(deleted["removed"], serde_json::json!(["root.hds"]));
    assert!(deleted["freed"].as_u64() > Some(0), "{deleted}");
    documented(&deleted);
    assert!(!disk.exists());
    fails(11, &["delete", text(&disk)]);
}

#[test]
fn an_attached_disk_is_not_deleted() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    let mut server = serve(&disk, &scratch.path("s"));
    let said = fails(4, &["delete", text(&disk)]);
    assert!(said.contains("umount it first"), "{said}");
    ok(&["umount", text(&disk)]);
    server.wait().expect("serve ends");
    ok(&["delete", text(&disk)]);
}

#[test]
fn a_disk_that_another_program_has_locked_is_not_deleted() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    let locked = fs::File::create(disk.join("DiskDescriptor.xml.lck")).expect("lock file");
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).expect("flock");
    let said = fails(4, &["delete", text(&disk)]);
    assert!(said.contains("DiskDescriptor.xml.lck"), "{said}");
    assert!(said.contains("locked"), "{said}");
    drop(locked);
    ok(&["delete", text(&disk)]);
}

#[test]
fn files_that_are_not_the_disks_are_named_and_kept() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    fs::write(disk.join("notes.txt"), "mine").expect("write");
    fs::create_dir(disk.join("folder")).expect("folder");
    let said = fails(1, &["delete", text(&disk)]);
    assert!(
        said.contains("notes.txt") && said.contains("folder"),
        "{said}"
    );
    ok(&["check", text(&disk)]);
    fs::remove_file(disk.join("notes.txt")).expect("remove");
    fs::remove_dir(disk.join("folder")).expect("remove");
    ok(&["delete", text(&disk)]);
}

#[test]
fn a_link_in_place_of_a_layer_is_neither_followed_nor_removed() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    let outside = scratch.path("outside.hds");
    fs::rename(disk.join("root.hds"), &outside).expect("move");
    std::os::unix::fs::symlink(&outside, disk.join("root.hds")).expect("link");
    fails(1, &["delete", text(&disk)]);
    assert!(outside.exists() && disk.join("DiskDescriptor.xml").exists());
}

#[test]
fn a_layer_that_another_disk_shares_only_loses_a_name() {
    let scratch = Scratch::new();
    let (disk, other) = (plain(&scratch, "d"), scratch.path("other.hds"));
    fs::hard_link(disk.join("root.hds"), &other).expect("link");
    let before = fs::read(&other).expect("read");
    let deleted = json(&["delete", text(&disk)]);
    assert_eq!(deleted["shared"], serde_json::json!(["root.hds"]));
    assert_eq!(
        (&deleted["removed"], &deleted["freed"]),
        (&serde_json::json!([]), &0.into())
    );
    assert!(fs::read(&other).expect("read") == before);
}

#[test]
fn a_half_deleted_disk_is_no_disk_and_the_same_command_finishes_it() {
    let scratch = Scratch::new();
    for layers_gone in [false, true] {
        let disk = plain(&scratch, "d");
        let aside = disk.join("DiskDescriptor.xml.deleted");
        fs::rename(disk.join("DiskDescriptor.xml"), aside).expect("rename");
        if layers_gone {
            fs::remove_file(disk.join("root.hds")).expect("remove");
        }
        let said = fails(11, &["check", text(&disk)]);
        assert!(said.contains("`ploopctl delete` finishes it"), "{said}");
        ok(&["delete", text(&disk)]);
        assert!(!disk.exists());
    }
}

#[test]
fn a_descriptor_that_names_a_file_elsewhere_deletes_nothing() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    let victim = scratch.path("victim");
    fs::write(&victim, "precious").expect("write");
    let descriptor = disk.join("DiskDescriptor.xml");
    let xml = fs::read_to_string(&descriptor).expect("read");
    fs::write(&descriptor, xml.replace("root.hds", "sub/../../victim")).expect("write");
    let output = run(&["delete", text(&disk)]);
    assert!(!output.status.success());
    assert!(victim.exists() && descriptor.exists() && disk.join("root.hds").exists());
}

#[test]
fn a_bare_image_is_deleted_alone_and_only_with_its_format() {
    let scratch = Scratch::new();
    let file = scratch.path("x.raw");
    fs::write(&file, vec![0; 1 << 20]).expect("write");
    fs::write(scratch.path("y"), "other").expect("write");
    fails(2, &["delete", text(&file)]);
    ok(&["delete", text(&file), "--format", "raw"]);
    assert!(!file.exists() && scratch.path("y").exists());
    let disk = plain(&scratch, "d");
    let member = disk.join("root.hds");
    fails(1, &["delete", text(&member), "--format", "ploop"]);
    assert!(member.exists());
}

/// What a dead keeper left of this disk.
fn remains(disk: &Path, options: &[&str]) -> Option<Value> {
    let orphans = json(&[&["list", "--orphans"], options].concat());
    let all = orphans["keepers"].as_array().expect("keepers").clone();
    all.into_iter().find(|k| k["path"] == text(disk))
}

#[test]
fn what_a_dead_keeper_left_is_shown_and_stays_until_it_is_to_go() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let point = scratch.mountpoint();
    // The next command of any other test removes it, too: then it is tried again.
    for _ in 0..30 {
        let state = json(&["mount", text(&disk), text(&point)]);
        assert_eq!(remains(&disk, &[]), None, "it lives");
        kill9(state["keeper_pid"].as_u64().expect("pid"));
        let mut looks = std::iter::repeat_with(|| remains(&disk, &[])).take(50);
        let Some(left) = looks.find_map(|found| found) else {
            continue;
        };
        assert_eq!(left["devices"][0]["device"], state["device"], "{left}");
        assert_eq!(left["devices"][0]["mountpoints"][0], text(&point), "{left}");
        assert_eq!(left["removed"], false);
        documented(&left);
        let Some(again) = remains(&disk, &[]) else {
            continue;
        };
        assert_eq!(again, left, "looking removes nothing");
        let Some(removed) = remains(&disk, &["--remove"]) else {
            continue;
        };
        assert_eq!(removed["removed"], true, "{removed}");
        assert_eq!(remains(&disk, &[]), None);
        let mounts = fs::read("/proc/self/mounts").expect("mounts");
        assert!(!String::from_utf8_lossy(&mounts).contains(text(&point)));
        return;
    }
    panic!("it was never there for a second look");
}

#[test]
fn only_drafts_of_our_own_are_removed_from_a_disks_directory() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    fs::write(disk.join("DiskDescriptor.xml.tmp"), "half").expect("write");
    fs::write(disk.join("root.hds.old"), "somebody's").expect("write");
    let files = |orphans: Value| orphans["files"].as_array().expect("files").clone();
    let kinds = |files: &[Value]| -> Vec<(String, String)> {
        let word = |f: &Value, name: &str| f[name].as_str().unwrap_or_default().to_string();
        files
            .iter()
            .map(|f| (word(f, "file"), word(f, "kind")))
            .collect()
    };
    let draft = ("DiskDescriptor.xml.tmp".to_string(), "draft".to_string());
    let unknown = ("root.hds.old".to_string(), "unknown".to_string());
    let listed = files(json(&["list", "--orphans", text(&disk)]));
    assert_eq!(kinds(&listed), [draft.clone(), unknown.clone()]);
    listed.iter().for_each(documented);
    fails(2, &["list", "--remove"]);
    fails(2, &["list", text(&disk)]);
    let mut server = serve(&disk, &scratch.path("s"));
    fails(4, &["list", "--orphans", text(&disk), "--remove"]);
    ok(&["umount", text(&disk)]);
    server.wait().expect("serve ends");
    ok(&["list", "--orphans", text(&disk), "--remove"]);
    let listed = files(json(&["list", "--orphans", text(&disk)]));
    assert_eq!(kinds(&listed), [unknown]);
    ok(&["check", text(&disk)]);
}

/// Works in a directory, and ends with its test.
struct Bystander(Child);

impl Bystander {
    fn of(dir: &Path) -> Self {
        let mut sleep = Command::new("sleep");
        Self(sleep.arg("600").current_dir(dir).spawn().expect("sleep"))
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_disk_can_be_taken_from_its_users_and_nobody_is_killed() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let point = scratch.mountpoint();
    let state = json(&["mount", text(&disk), text(&point)]);
    let mut user = fs::File::create(point.join("log")).expect("create");
    user.write_all(&noise(4 << 20, 1)).expect("write");
    let mut bystander = Bystander::of(&point);
    let said = fails(4, &["umount", text(&point)]);
    assert!(said.contains("sleep"), "{said}");
    let forced = json(&["umount", text(&point), "--force", "--timeout", "30"]);
    assert_eq!(forced["cut_off"], true, "{forced}");
    documented(&forced);
    assert!(scratch.attached().is_empty());
    assert!(bystander.0.try_wait().expect("wait").is_none(), "it lives");
    user.write_all(&noise(1 << 20, 2)).ok();
    user.sync_all().expect_err("its disk is gone");

    // What was written before is in the image, which can be used at once.
    ok(&["check", text(&disk)]);
    let again = json(&["mount", text(&disk), text(&point)]);
    assert_ne!(
        again["device"], state["device"],
        "the old one waits for its users"
    );
    assert!(fs::read(point.join("log")).expect("read") == noise(4 << 20, 1));
    ok(&["umount", text(&point)]);
    drop((bystander, user));
    let device = state["device"]
        .as_str()
        .expect("device")
        .replace("/dev", "/sys/block");
    eventually("the kernel lets go of the old device", || {
        let backing = fs::read_to_string(Path::new(&device).join("loop/backing_file"));
        !backing.is_ok_and(|b| b.contains("/run/ploop"))
    });
}

#[test]
fn force_is_not_needed_for_a_disk_that_nobody_uses() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    fs::write(point.join("file"), "data").expect("write");
    let forced = json(&["umount", text(&point), "--force"]);
    assert_eq!(forced["cut_off"], false, "{forced}");
    ok(&["mount", text(&disk), text(&point), "--read-only"]);
    assert_eq!(fs::read(point.join("file")).expect("read"), b"data");
    ok(&["umount", text(&point)]);
}

#[test]
fn a_keeper_that_does_not_answer_is_waited_for_as_long_as_said() {
    let scratch = Scratch::new();
    let disk = plain(&scratch, "d");
    let mut server = serve(&disk, &scratch.path("s"));
    let signal = |signal| {
        let pid = rustix::process::Pid::from_child(&server);
        rustix::process::kill_process(pid, signal).expect("kill");
    };
    signal(rustix::process::Signal::STOP);
    let start = Instant::now();
    for force in [&[][..], &["--force"]] {
        let args = [&["umount", text(&disk), "--timeout", "1"][..], force].concat();
        let said = fails(9, &args);
        assert!(said.contains("closing goes on"), "{said}");
    }
    assert!(start.elapsed() < Duration::from_secs(20));
    signal(rustix::process::Signal::CONT);
    server.wait().expect("it stops, as it was told");
    ok(&["check", text(&disk)]);
    fails(2, &["umount", text(&disk), "--timeout", "0"]);
}

#[test]
fn an_adopted_image_is_a_disk_with_the_same_content() {
    let scratch = Scratch::new();
    let data = noise(3 << 20, 7);
    let raw = scratch.path("x.raw");
    fs::write(&raw, &data).expect("write");
    let disk = scratch.path("raw");
    let adopted = json(&["adopt", text(&raw), "--format", "raw", text(&disk)]);
    assert_eq!(adopted["size"], 3 << 20, "{adopted}");
    documented(&adopted);
    assert!(!raw.exists());
    assert!(fs::read(disk.join("root.hds")).expect("read") == data);
    let info = json(&["info", text(&disk)]);
    assert_eq!(
        (&info["size"], &info["layers"][0]["format"]),
        (&(3 << 20).into(), &"raw".into())
    );
    let mut server = serve(&disk, &scratch.path("s"));
    ok(&["umount", text(&disk)]);
    assert!(server.wait().expect("serve ends").success());

    for (version, cluster) in [("1", "1M"), ("2", "32K")] {
        let options = ["-s", "64M", "--fs", "none", "--cluster", cluster];
        let old = scratch.disk(
            "old",
            &[&options[..], &["--format-version", version]].concat(),
        );
        let bare = scratch.path("bare.hds");
        fs::rename(old.join("root.hds"), &bare).expect("move");
        fs::remove_dir_all(&old).expect("remove");
        let disk = scratch.path(version);
        fs::create_dir(&disk).expect("an empty directory does");
        ok(&["adopt", text(&bare), "--format", "ploop", text(&disk)]);
        ok(&["check", text(&disk)]);
        let mut server = serve(&disk, &scratch.path("s"));
        ok(&["umount", text(&disk)]);
        assert!(server.wait().expect("serve ends").success());
        ok(&["delete", text(&disk)]);
    }
}

#[test]
fn an_image_that_is_not_adopted_stays_where_and_what_it_was() {
    let scratch = Scratch::new();
    let old = plain(&scratch, "old");
    let member = old.join("root.hds");
    let refused = |code: i32, file: &Path, format: &str, dir: &Path| {
        let before = fs::read(file).expect("read");
        let said = fails(code, &["adopt", text(file), "--format", format, text(dir)]);
        assert!(fs::read(file).expect("read") == before, "{said}");
        assert!(!dir.join("DiskDescriptor.xml").exists() && !dir.join("root.hds").exists());
        said
    };
    let dir = scratch.path("new");
    let said = refused(1, &member, "ploop", &dir);
    assert!(said.contains("names this file"), "{said}");

    let bare = scratch.path("bare.hds");
    fs::copy(&member, &bare).expect("copy");
    let full = scratch.path("full");
    fs::create_dir(&full).expect("folder");
    fs::write(full.join("mine"), "data").expect("write");
    refused(1, &bare, "ploop", &full);
    assert!(full.join("mine").exists());

    let mut server = Command::new(common::PLOOPCTL)
        .args(["serve", text(&bare), "--format", "ploop", "--nbd"])
        .arg(format!("unix:{}", text(&scratch.path("s"))))
        .stdout(Stdio::null())
        .spawn()
        .expect("serve");
    eventually("it serves", || scratch.path("s").exists());
    let said = fails(4, &["adopt", text(&bare), "--format", "ploop", text(&dir)]);
    assert!(said.contains("umount it first"), "{said}");
    ok(&["umount", text(&bare)]);
    server.wait().expect("serve ends");

    let link = scratch.path("link");
    std::os::unix::fs::symlink(&bare, &link).expect("link");
    refused(1, &link, "ploop", &dir);
    fs::hard_link(&bare, scratch.path("clone")).expect("link");
    let said = refused(7, &bare, "ploop", &dir);
    assert!(said.contains("other disks share it"), "{said}");
    fs::remove_file(scratch.path("clone")).expect("remove");

    let odd = scratch.path("odd.raw");
    fs::write(&odd, [0; 700]).expect("write");
    let said = refused(1, &odd, "raw", &dir);
    assert!(said.contains("700 bytes"), "{said}");

    // Two entries of the table that lead to one cluster.
    let mut image = fs::read(&bare).expect("read");
    image[64..68].copy_from_slice(&1u32.to_le_bytes());
    image[68..72].copy_from_slice(&1u32.to_le_bytes());
    image.resize(image.len() + (64 << 10), 1);
    fs::write(&bare, image).expect("write");
    refused(6, &bare, "ploop", &dir);
    assert!(!dir.exists());
}

#[test]
fn an_image_is_not_adopted_across_file_systems() {
    let scratch = Scratch::new();
    let shm = Path::new("/dev/shm");
    let dev = |path: &Path| fs::metadata(path).map(|m| m.dev()).ok();
    if !shm.is_dir() || dev(shm) == dev(&scratch.path("")) {
        return skip("no second file system at /dev/shm");
    }
    let there = tempfile::tempdir_in(shm).expect("temp dir");
    let raw = there.path().join("x.raw");
    fs::write(&raw, [0; 4096]).expect("write");
    let dir = scratch.path("new");
    let said = fails(7, &["adopt", text(&raw), "--format", "raw", text(&dir)]);
    assert!(
        said.contains("another file system") && said.contains("cp --sparse"),
        "{said}"
    );
    assert!(raw.exists() && !dir.exists());
}

#[test]
fn an_adoption_that_fails_half_way_gives_the_image_back() {
    let scratch = Scratch::new();
    let (raw, dir) = (scratch.path("x.raw"), scratch.path("new"));
    fs::write(&raw, noise(8192, 3)).expect("write");
    // No file may grow: the image is moved, and its descriptor cannot be written.
    let script = "trap '' XFSZ; ulimit -f 0; exec \"$0\" adopt \"$1\" --format raw \"$2\"";
    let output = Command::new("sh")
        .args(["-c", script, common::PLOOPCTL, text(&raw), text(&dir)])
        .output()
        .expect("sh");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("DiskDescriptor.xml.tmp"), "{said}");
    assert!(fs::read(&raw).expect("given back") == noise(8192, 3));
    assert!(!dir.exists());
}

/// The verbs that `--help` shows, and those beneath `snapshot`.
fn verbs() -> Vec<String> {
    let beneath = ["migrate", "snapshot", "track"].map(|parent| {
        let verbs = shown(&[parent, "--help"]).into_iter();
        verbs.map(|verb| format!("{parent} {verb}")).collect()
    });
    [shown(&["--help"])]
        .into_iter()
        .chain(beneath)
        .flatten()
        .collect()
}

fn shown(help: &[&str]) -> Vec<String> {
    let help = ok(help);
    let commands = help.lines().skip_while(|l| *l != "Commands:").skip(1);
    let verbs = commands.take_while(|l| !l.is_empty());
    let first = |line: &str| line.split_whitespace().next().map(str::to_string);
    verbs.filter_map(first).filter(|v| v != "help").collect()
}

#[test]
fn every_verb_has_a_man_page_with_an_example() {
    let scratch = Scratch::new();
    fails(11, &["generate", "man", text(&scratch.path("absent"))]);
    let dir = scratch.mountpoint();
    ok(&["generate", "man", text(&dir)]);
    let verbs = verbs();
    assert!(verbs.len() >= 12, "{verbs:?}");
    for verb in &verbs {
        let page = fs::read_to_string(dir.join(format!("ploopctl-{}.1", verb.replace(' ', "-"))));
        let page = page
            .unwrap_or_else(|e| panic!("{verb}: {e}"))
            .replace('\\', "");
        assert!(
            page.contains(&format!("Example: ploopctl {verb}")),
            "{verb}: {page}"
        );
    }
    let main = fs::read_to_string(dir.join("ploopctl.1")).expect("the main page");
    assert!(main.contains("Exit codes"), "{main}");
    let pages = fs::read_dir(&dir).expect("pages").flatten();
    let names: Vec<String> = pages
        .filter_map(|page| page.file_name().into_string().ok())
        .collect();
    let ours = names.iter().filter(|name| name.starts_with("ploopctl"));
    assert_eq!(ours.count(), verbs.len() + 1, "and none of a hidden verb");
    for page in ["ploop.1", "ploop-snapshot-list.1"] {
        assert!(names.iter().any(|name| name == page), "{page}: {names:?}");
    }
}

#[test]
fn every_verb_can_be_completed_in_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let script = ok(&["generate", "completions", shell]);
        for verb in verbs() {
            let last = verb.split(' ').next_back().expect("a word");
            assert!(script.contains(last), "{shell}: {verb}");
        }
    }
    let other = ok(&["generate", "completions", "bash", "--of", "ploop"]);
    assert!(
        other.contains("snapshot-switch") && other.contains("_ploop()"),
        "{other}"
    );
    fails(2, &["generate", "completions", "tcsh"]);
    assert!(ok(&["--version"]).starts_with("ploopctl "));
}
