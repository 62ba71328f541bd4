//! What a new user gets wrong, and what they are told: an exit code that a program understands, and
//! a message that names the thing and the way out.

mod common;

use common::{PLOOPCTL, PLOOPD, Scratch, can_mount, has, ok, text};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A command line in words, the exit code, and what the message says.
type Case = (&'static str, i32, &'static [&'static str]);

/// A directory with everything that can be confused: `good` (a disk), `member` (its image),
/// `x.raw`, `junk` (5 bytes), `empty`, `full`, `badxml`, `link` (to x.raw).
struct Place {
    scratch: Scratch,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        scratch.disk("good", &["-s", "16M", "--fs", "none"]);
        let at = |name: &str| scratch.path(name);
        fs::write(at("x.raw"), [0; 1 << 16]).expect("write");
        fs::write(at("junk"), "junk\n").expect("write");
        for name in ["empty", "full", "badxml"] {
            fs::create_dir(at(name)).expect("mkdir");
        }
        fs::write(at("full/mine"), "").expect("write");
        fs::write(at("badxml/DiskDescriptor.xml"), "<x").expect("write");
        std::os::unix::fs::symlink(at("x.raw"), at("link")).expect("link");
        Self { scratch }
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path("")
    }
}

fn said(command: &mut Command) -> Output {
    let quiet = command.stdin(Stdio::null()).env_remove("PLOOP_CONFIG");
    quiet.output().expect("it runs")
}

/// Runs each case, as text and as JSON, and gives what is not as it should be.
fn judge(dir: &Path, cases: &[Case], command: impl Fn() -> Command) -> Vec<String> {
    let mut wrong = Vec::new();
    for (line, code, words) in cases {
        let args: Vec<&str> = line.split_whitespace().collect();
        let output = said(command().args(&args).current_dir(dir));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let lacks = words.iter().find(|word| !text.contains(**word));
        if output.status.code() != Some(*code) || lacks.is_some() {
            wrong.push(format!(
                "{line}: {:?}, lacks {lacks:?}: {text}",
                output.status.code()
            ));
        }
        let output = said(command().args(["-o", "json"]).args(&args).current_dir(dir));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = text.lines().last().unwrap_or_default();
        let error: Value = serde_json::from_str(last).unwrap_or_default();
        if error["error"]["code"] != *code || !error["error"]["message"].is_string() {
            wrong.push(format!("-o json {line}: {text}"));
        }
    }
    wrong
}

const USAGE: &[Case] = &[
    ("frobnicate", 2, &["unrecognized subcommand 'frobnicate'"]),
    (
        "list --frobnicate",
        2,
        &["unexpected argument '--frobnicate'", "Usage: ploopctl list"],
    ),
    ("-o yaml list", 2, &["'yaml'", "text, json"]),
    ("list good", 2, &["--orphans"]),
    ("init new", 2, &["--size"]),
    ("init -s 1X new", 2, &["'1X'", "K, M, G, T"]),
    ("init -s much new", 2, &["'much'", "K, M, G, T"]),
    ("init -s 0 --fs none new", 2, &["size 0"]),
    (
        "init -s 8T --fs none --format-version 1 new",
        2,
        &["the limit of ploop format V1"],
    ),
    (
        "init -s 1G --fs none --cluster 100K new",
        2,
        &["102400", "power of two"],
    ),
    (
        "init -s 1G --fs none --cluster 1G new",
        2,
        &["power of two", "67108864"],
    ),
    ("init -s 1G --fs zfs new", 2, &["ext4, xfs, btrfs, none"]),
    ("serve good", 2, &["--nbd unix:PATH", "LISTEN_FDS"]),
    (
        "serve good --nbd nowhere",
        2,
        &["unix:PATH, tcp:ADDR:PORT, ADDR:PORT, -"],
    ),
    ("serve good --nbd - --cache wild", 2, &["none, writeback"]),
    ("serve good --nbd - --keep-free 101%", 2, &["0% to 100%"]),
    (
        "serve x.raw --nbd -",
        2,
        &["x.raw", "--format ploop, raw or qcow2"],
    ),
    (
        "serve good --nbd - --format raw",
        2,
        &["leave --format out"],
    ),
    ("info x.raw", 2, &["x.raw", "--format ploop, raw or qcow2"]),
    ("map x.raw --format vmdk", 2, &["ploop, raw"]),
    ("check x.raw", 2, &["--format ploop, raw or qcow2"]),
    ("delete x.raw", 2, &["--format ploop, raw or qcow2"]),
    (
        "list --orphans x.raw",
        2,
        &["x.raw", "name an image directory"],
    ),
    ("adopt x.raw new", 2, &["--format"]),
    (
        "adopt good --format ploop new",
        2,
        &["good", "one image file"],
    ),
    ("umount good --timeout 0", 2, &["0 is not in 1..=86400"]),
    ("top -n 0", 2, &["0"]),
    ("top -d 0", 2, &["0.1 to 3600 seconds"]),
    ("generate completions tcsh", 2, &["bash"]),
    (
        "snapshot good",
        2,
        &["unrecognized subcommand 'good'", "ploopctl snapshot"],
    ),
    ("snapshot delete good", 2, &["<UUID>"]),
    (
        "snapshot switch good first",
        2,
        &["\"first\" is not a GUID"],
    ),
    ("snapshot create good --uuid 1", 2, &["is not a GUID"]),
    (
        "snapshot merge good 00000000-1111-4222-8333-444444444444 --rate 0",
        2,
        &["nothing would ever be copied"],
    ),
    ("snapshot diff good top", 2, &["<B>"]),
    ("clone good", 2, &["<DST>"]),
];

const MISSING: &[Case] = &[
    ("info nothing", 11, &["nothing: No such file or directory"]),
    ("check nothing", 11, &["nothing: No such file"]),
    ("map nothing", 11, &["nothing: No such file"]),
    ("serve nothing --nbd -", 11, &["nothing: No such file"]),
    ("delete nothing", 11, &["nothing: No such file"]),
    (
        "adopt nothing --format raw new",
        11,
        &["nothing: No such file"],
    ),
    ("list --orphans nothing", 11, &["nothing: No such file"]),
    ("info empty", 11, &["empty: no DiskDescriptor.xml here"]),
    ("check empty", 11, &["so this is not a disk"]),
    ("delete full", 11, &["so this is not a disk"]),
    ("delete /", 11, &["so this is not a disk"]),
    (
        "init -s 1G --fs none no/such/new",
        11,
        &["no/such/new: No such file"],
    ),
    (
        "serve good --nbd unix:/no/such/s",
        11,
        &["/no/such/s: No such file"],
    ),
    (
        "serve good --nbd - --config /no/such",
        11,
        &["settings /no/such: No such file"],
    ),
    ("generate man /no/such", 11, &["/no/such: No such file"]),
    (
        "umount nothing",
        11,
        &["nothing: no attached disk", "`ploopctl list`"],
    ),
    ("umount good", 11, &["good: no attached disk"]),
    ("umount /", 11, &["/: no attached disk"]),
    ("stat good", 11, &["no attached disk"]),
    ("events good", 11, &["no attached disk"]),
    ("recover good", 11, &["no attached disk"]),
    ("snapshot create nothing", 11, &["nothing: No such file"]),
    ("snapshot list empty", 11, &["so this is not a disk"]),
    (
        "snapshot delete good 00000000-1111-4222-8333-444444444444",
        11,
        &["good: there is no snapshot 00000000-1111-4222-8333-444444444444"],
    ),
    ("clone nothing new", 11, &["nothing: No such file"]),
    (
        "clone good@00000000-1111-4222-8333-444444444444 new",
        11,
        &["there is no snapshot 00000000-1111-4222-8333-444444444444"],
    ),
    ("clone good no/such/new", 11, &["no/such/new: No such file"]),
];

const REFUSED: &[Case] = &[
    ("init -s 1G --fs none good", 1, &["good: not empty"]),
    (
        "init -s 1G --fs none x.raw",
        1,
        &["x.raw: exists and is not a directory"],
    ),
    (
        "serve good --nbd unix:x.raw",
        1,
        &["x.raw: exists and is not a socket"],
    ),
    (
        "serve good --nbd tcp:192.0.2.1:10809",
        7,
        &["not a loopback address"],
    ),
    (
        "info good/root.hds --format ploop",
        1,
        &["use the directory as DISK"],
    ),
    (
        "check good/root.hds --format ploop",
        1,
        &["use the directory as DISK"],
    ),
    ("adopt link --format raw new", 1, &["link: a symbolic link"]),
    ("adopt x.raw --format raw full", 1, &["full: not empty"]),
    (
        "adopt junk --format raw new",
        1,
        &["junk: 5 bytes", "truncate(1)"],
    ),
    (
        "info /dev/null --format raw",
        7,
        &["/dev/null: neither a directory nor a regular file"],
    ),
    (
        "info junk --format ploop",
        6,
        &["junk", "64-byte ploop header"],
    ),
    (
        "check junk --format ploop",
        6,
        &["junk: 5 bytes are too few"],
    ),
    ("map junk --format ploop", 6, &["junk: 5 bytes are too few"]),
    ("adopt junk --format ploop new", 6, &["5 bytes are too few"]),
    (
        "info badxml",
        6,
        &["badxml: DiskDescriptor.xml: line 1", "mend that file"],
    ),
    ("delete badxml", 6, &["badxml: DiskDescriptor.xml: line 1"]),
    (
        "snapshot create badxml",
        6,
        &["badxml: DiskDescriptor.xml: line 1"],
    ),
    (
        "snapshot list x.raw",
        7,
        &["x.raw: a bare image", "ploopctl adopt"],
    ),
    (
        "clone x.raw new",
        7,
        &["x.raw: a bare image", "ploopctl adopt"],
    ),
    ("clone good full", 1, &["full: not empty"]),
    (
        "clone good x.raw",
        1,
        &["x.raw: exists and is not a directory"],
    ),
    (
        "snapshot switch good 5fbaabe3-6958-40ff-92a7-860e329aab41",
        1,
        &["is the top already"],
    ),
];

#[test]
fn what_is_wrong_is_told_with_the_thing_the_rule_and_an_exit_code() {
    let place = Place::new();
    let cases = [USAGE, MISSING, REFUSED].concat();
    let wrong = judge(&place.dir(), &cases, || Command::new(PLOOPCTL));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let path = format!("unix:{}", "s".repeat(120));
    let output = said(
        Command::new(PLOOPCTL)
            .args(["serve", "good", "--nbd", &path])
            .current_dir(place.dir()),
    );
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(2) && words.contains("at most 107 bytes"),
        "{words}"
    );
    assert!(!place.scratch.path("new").exists(), "and nothing was made");
    let xml = place.scratch.path("good/DiskDescriptor.xml");
    assert!(xml.exists() && place.scratch.path("x.raw").exists());
    ok(&["check", text(&place.scratch.path("good"))]);
}

#[test]
fn who_mounts_what_cannot_be_mounted_is_told_why() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let cases: &[Case] = &[
        ("mount nothing", 11, &["nothing: No such file"]),
        ("mount empty", 11, &["so this is not a disk"]),
        ("mount good --mount-options ro", 2, &["MOUNTPOINT"]),
        ("mount x.raw", 2, &["--format ploop, raw or qcow2"]),
        ("mount good --format ploop", 2, &["leave --format out"]),
        (
            "mount good /no/such",
            11,
            &["mount point /no/such: No such file"],
        ),
        (
            "mount good x.raw",
            1,
            &["mount point x.raw: not a directory"],
        ),
        (
            "mount junk --format ploop",
            6,
            &["junk: 5 bytes are too few"],
        ),
        ("mount junk --format raw", 6, &["less than one sector"]),
        ("mount badxml", 6, &["DiskDescriptor.xml: line 1"]),
        (
            "mount good empty",
            1,
            &["is not mounted on", "nothing is left attached"],
        ),
        (
            "mount /dev/null --format raw",
            7,
            &["neither a directory nor a regular file"],
        ),
    ];
    let wrong = judge(&place.dir(), cases, || Command::new(PLOOPCTL));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let good = place.scratch.path("good");
    ok(&["mount", text(&good)]);
    let cases: &[Case] = &[
        ("mount good", 4, &["good: attached already"]),
        ("serve good --nbd -", 4, &["good: attached already"]),
        ("check good", 4, &["umount it first"]),
        ("map good", 4, &["umount it first"]),
        ("delete good", 4, &["umount it first"]),
        (
            "snapshot switch good 00000000-1111-4222-8333-444444444444",
            11,
            &["there is no snapshot"],
        ),
        ("recover good", 1, &["has not failed"]),
    ];
    let wrong = judge(&place.dir(), cases, || Command::new(PLOOPCTL));
    ok(&["umount", text(&good)]);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn who_may_not_is_told_what_is_missing_and_what_works_without() {
    if !rustix::process::geteuid().is_root() || !has("setpriv") {
        return;
    }
    let place = Place::new();
    let dir = place.dir();
    // Where somebody else can find the programs, a place of their own, and a disk of root's.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("chmod");
    for program in [PLOOPCTL, PLOOPD] {
        let name = Path::new(program).file_name().expect("a name");
        fs::copy(program, dir.join(name)).expect("copy");
    }
    let own = dir.join("own");
    fs::create_dir(&own).expect("mkdir");
    std::os::unix::fs::chown(&own, Some(65534), Some(65534)).expect("chown");
    let nobody = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command
            .arg(dir.join("ploopctl"))
            .env("XDG_RUNTIME_DIR", &own);
        command
    };
    let made = said(
        nobody()
            .args(["init", "-s", "16M", "--fs", "none", "own/d"])
            .current_dir(&dir),
    );
    assert!(made.status.success(), "{made:?}");
    let cases: &[Case] = &[
        (
            "init -s 16M own/new",
            8,
            &["CAP_SYS_ADMIN", "`init --fs none`"],
        ),
        (
            "mount own/d",
            8,
            &[
                "mount needs root, or the capability CAP_SYS_ADMIN",
                "`serve`",
            ],
        ),
        (
            "init -s 16M --fs none new",
            8,
            &["new: Permission denied", "another user's"],
        ),
        (
            "info good",
            8,
            &[
                "DiskDescriptor.xml: Permission denied",
                "be that user, or root",
            ],
        ),
        (
            "check good",
            8,
            &["Permission denied", "be that user, or root"],
        ),
        ("serve good --nbd -", 8, &["Permission denied"]),
        ("delete good", 8, &["Permission denied"]),
        (
            "umount good",
            11,
            &["no attached disk", "root's is seen by root"],
        ),
    ];
    let wrong = judge(&dir, cases, nobody);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for works in [
        "check own/d",
        "info own/d",
        "map own/d",
        "snapshot create own/d",
        "snapshot list own/d",
        "clone own/d own/c",
        "delete own/c",
        // What was shared is the disk's own again.
        "snapshot delete own/d 5fbaabe3-6958-40ff-92a7-860e329aab41",
        "snapshot create own/d",
        "snapshot merge own/d 5fbaabe3-6958-40ff-92a7-860e329aab41",
        "list",
        "delete own/d",
    ] {
        let output = said(nobody().args(works.split(' ')).current_dir(&dir));
        assert!(output.status.success(), "{works}: {output:?}");
    }
}
