//! `serve`: over NBD, in the foreground, without privileges.

mod common;

use common::{PLOOPCTL, Scratch, eventually, fails, has, json, kill9, noise, ok, text};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A server in the foreground, ended in order when it goes.
struct Server {
    child: Child,
    uri: String,
}

impl Server {
    fn start(disk: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(PLOOPCTL)
            .arg("serve")
            .arg(disk)
            .args(more)
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .expect("ploopctl runs");
        let mut uri = String::new();
        let out = child.stdout.as_mut().expect("piped");
        BufReader::new(out).read_line(&mut uri).expect("a line");
        Self {
            child,
            uri: uri.trim_end().to_string(),
        }
    }

    fn stop(mut self) -> Option<i32> {
        self.terminate();
        self.child.wait().expect("wait").code()
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            self.terminate();
            let _ = self.child.wait();
        }
    }
}

fn nbdcopy(from: &str, to: &str) {
    let done = Command::new("nbdcopy")
        .args(["--", from, to])
        .status()
        .expect("nbdcopy runs");
    assert!(done.success(), "nbdcopy {from} {to}");
}

/// A raw file with data and holes.
fn content(scratch: &Scratch, len: u64) -> std::path::PathBuf {
    use std::os::unix::fs::FileExt;
    let path = scratch.path("content.raw");
    let file = std::fs::File::create(&path).expect("create");
    file.set_len(len).expect("set_len");
    for (n, at) in [0u64, 5 << 20, (17 << 20) + 512, len - 4096]
        .into_iter()
        .enumerate()
    {
        file.write_all_at(&noise(4096, n as u64 + 7), at)
            .expect("write");
    }
    path
}

#[test]
fn what_a_client_wrote_is_found_again_after_sigterm() {
    if !has("nbdcopy") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let content = content(&scratch, 64 << 20);
    let socket = scratch.path("s");
    let at = format!("unix:{}", text(&socket));
    let server = Server::start(&disk, &["--nbd", &at]);
    assert!(
        server.uri.starts_with("nbd+unix:///?socket="),
        "{}",
        server.uri
    );
    let mode = std::fs::metadata(&socket)
        .expect("socket")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    nbdcopy(text(&content), &server.uri);
    let shown = scratch.attached();
    assert_eq!(
        (&shown[0]["transport"], &shown[0]["state"]),
        (&"nbd".into(), &"serving".into())
    );
    fails(4, &["check", text(&disk)]);
    assert_eq!(server.stop(), Some(0));
    assert!(!socket.exists());
    assert!(scratch.attached().is_empty());
    assert_eq!(json(&["info", text(&disk)])["layers"][0]["in_use"], false);
    ok(&["check", text(&disk)]);

    let server = Server::start(&disk, &["--nbd", "tcp:127.0.0.1:0", "--read-only"]);
    let back = scratch.path("back.raw");
    nbdcopy(&server.uri, text(&back));
    assert_eq!(server.stop(), Some(0));
    assert!(std::fs::read(&back).expect("read") == std::fs::read(&content).expect("read"));
}

#[test]
fn a_socket_activator_gets_a_server_that_ends_with_its_client() {
    if !has("nbdcopy") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let content = content(&scratch, 64 << 20);
    let back = scratch.path("back.raw");
    let copy = |args: &[&str]| {
        let done = Command::new("nbdcopy")
            .args(args)
            .status()
            .expect("nbdcopy runs");
        assert!(done.success(), "nbdcopy {args:?}");
    };
    copy(&[
        "--",
        text(&content),
        "[",
        PLOOPCTL,
        "serve",
        text(&disk),
        "]",
    ]);
    eventually("the server ends", || scratch.attached().is_empty());
    copy(&[
        "--",
        "[",
        PLOOPCTL,
        "serve",
        text(&disk),
        "--read-only",
        "]",
        text(&back),
    ]);
    assert!(std::fs::read(&back).expect("read") == std::fs::read(&content).expect("read"));
}

/// One request of the NBD protocol, with its data; the reply must say that it succeeded.
fn ask(child: &mut Child, command: u16, at: u64, len: u32, data: &[u8]) {
    let mut request = Vec::new();
    request.extend(0x2560_9513_u32.to_be_bytes());
    request.extend(u32::from(command).to_be_bytes());
    request.extend(7u64.to_be_bytes());
    request.extend(at.to_be_bytes());
    request.extend(len.to_be_bytes());
    request.extend(data);
    child
        .stdin
        .as_mut()
        .expect("piped")
        .write_all(&request)
        .expect("a request");
    if command != 2 {
        assert_eq!(
            take(child, 16),
            [
                &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..],
                &7u64.to_be_bytes()
            ]
            .concat()
        );
    }
}

fn take(child: &mut Child, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    child
        .stdout
        .as_mut()
        .expect("piped")
        .read_exact(&mut data)
        .expect("a reply");
    data
}

#[test]
fn one_client_is_served_on_standard_input_and_output() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let mut child = Command::new(PLOOPCTL)
        .args(["serve", text(&disk), "--nbd", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("ploopctl runs");
    assert_eq!(take(&mut child, 18)[..16], *b"NBDMAGICIHAVEOPT");
    let hello = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0";
    child
        .stdin
        .as_mut()
        .expect("piped")
        .write_all(hello)
        .expect("options");
    let export = take(&mut child, 10);
    assert_eq!(export[..8], (64u64 << 20).to_be_bytes());
    ask(&mut child, 1, 1024, 512, &noise(512, 5));
    ask(&mut child, 3, 0, 0, &[]);
    ask(&mut child, 0, 1024, 512, &[]);
    assert!(take(&mut child, 512) == noise(512, 5));
    ask(&mut child, 2, 0, 0, &[]);
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    assert!(scratch.attached().is_empty());
    assert_eq!(json(&["map", text(&disk)])["extents"][0]["length"], 65536);
    ok(&["check", text(&disk)]);
}

#[test]
fn a_dead_worker_is_replaced_and_its_answers_are_kept() {
    if !has("nbdcopy") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let content = content(&scratch, 64 << 20);
    let at = format!("unix:{}", text(&scratch.path("s")));
    let server = Server::start(&disk, &["--nbd", &at]);
    nbdcopy(text(&content), &server.uri);
    let before = scratch.attached()[0]["worker_pid"]
        .as_u64()
        .expect("worker");
    kill9(before);
    eventually("another worker serves", || {
        let now = &scratch.attached()[0];
        now["state"] == "serving" && now["worker_pid"].as_u64() != Some(before)
    });
    let back = scratch.path("back.raw");
    nbdcopy(&server.uri, text(&back));
    assert!(std::fs::read(&back).expect("read") == std::fs::read(&content).expect("read"));
    assert_eq!(scratch.attached()[0]["restarts"], 1);
    assert_eq!(server.stop(), Some(0));
    ok(&["check", text(&disk)]);
}

#[test]
fn a_server_that_cannot_say_where_it_is_ends_and_closes_the_image() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let child = Command::new(PLOOPCTL)
        .args(["serve", text(&disk), "--nbd"])
        .arg(format!("unix:{}", text(&scratch.path("s"))))
        .stdout(full.expect("/dev/full"))
        .stderr(Stdio::null())
        .stdin(Stdio::null())
        .spawn()
        .expect("ploopctl runs");
    let mut server = Server {
        child,
        uri: String::new(),
    };
    let mut end = None;
    eventually("the server ends", || {
        end = server.child.try_wait().expect("wait");
        end.is_some()
    });
    assert!(!end.expect("ended").success());
    assert!(!scratch.path("s").exists());
    assert_eq!(json(&["info", text(&disk)])["layers"][0]["in_use"], false);
}

#[test]
fn a_disk_has_one_server() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let at = format!("unix:{}", text(&scratch.path("s")));
    let server = Server::start(&disk, &["--nbd", &at]);
    let other = format!("unix:{}", text(&scratch.path("t")));
    fails(4, &["serve", text(&disk), "--nbd", &other]);
    assert_eq!(server.stop(), Some(0));
    fails(7, &["serve", text(&disk), "--nbd", "tcp:0.0.0.0:10809"]);
    assert!(scratch.attached().is_empty());
}

#[test]
fn qemu_keeps_its_hands_off_a_served_image() {
    if !has("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M", "--fs", "none"]);
    let image = disk.join("root.hds");
    let check = || {
        let args = ["check", "-f", "parallels", text(&image)];
        Command::new("qemu-img")
            .args(args)
            .output()
            .expect("qemu-img runs")
    };
    let at = format!("unix:{}", text(&scratch.path("s")));
    let server = Server::start(&disk, &["--nbd", &at]);
    let refused = check();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("lock"), "{said}");
    assert_eq!(server.stop(), Some(0));
    assert!(check().status.success());
}

#[test]
fn a_server_that_cannot_say_where_it_is_ends() {
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "10M", "--fs", "none"]);
    let full = std::fs::File::options().write(true).open("/dev/full");
    let mut server = Command::new(common::PLOOPCTL)
        .args(["serve", text(&disk), "--nbd"])
        .arg(format!("unix:{}", scratch.path("s").display()))
        .stdout(full.expect("/dev/full"))
        .spawn()
        .expect("ploopctl runs");
    eventually("it ends", || server.try_wait().expect("wait").is_some());
    assert_eq!(server.wait().expect("wait").code(), Some(5));
    assert!(scratch.attached().is_empty());
    assert!(!scratch.path("s").exists());
}
