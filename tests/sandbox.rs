//! The sandbox from inside: a process that serves tries what an attacker would try.
//!
//! Landlock and seccomp bind a thread and those it starts, so each test confines a thread of its
//! own. A kernel that cannot confine makes a test say that it is skipped.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use bytes::{Bytes, BytesMut};
use common::nbd::Client;
use common::process::eventually;
use common::serve::Disk;
use ploop::device::{Device, GuestExtent, Zero};
use ploop::io::exec::{self, Engine};
use ploop::sandbox::{self, Files, Place};
use ploop::serve::nbd::{Options, Server};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

type Probe = fn(&Path) -> io::Result<()>;

/// What a server never needs: refused everywhere.
const NEVER: &[(&str, Probe)] = &[
    ("open a file elsewhere", |_| {
        File::open("/etc/passwd").map(drop)
    }),
    ("open a file elsewhere, beneath a directory", |_| {
        let how = rustix::fs::ResolveFlags::empty();
        let flags = rustix::fs::OFlags::RDONLY;
        let mode = rustix::fs::Mode::empty();
        let opened = rustix::fs::openat2(rustix::fs::CWD, "/etc/passwd", flags, mode, how);
        Ok(opened.map(drop)?)
    }),
    ("execute a program", |_| {
        Command::new("/bin/true").status().map(drop)
    }),
    ("make a socket", |_| {
        let made = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None);
        Ok(made.map(drop)?)
    }),
    ("connect", |_| {
        TcpStream::connect((Ipv4Addr::LOCALHOST, 1)).map(drop)
    }),
    ("signal a process", |_| {
        let own = rustix::process::getpid();
        Ok(rustix::process::test_kill_process(own)?)
    }),
];

/// What only starting needs: refused to a thread that serves a client.
const NOT_WHILE_SERVING: &[(&str, Probe)] = &[
    ("open a file of the disk", open_own),
    ("start a thread", |_| {
        thread::Builder::new().spawn(|| {}).map(drop)
    }),
    ("make a ring", |_| io_uring::IoUring::new(1).map(drop)),
];

fn open_own(dir: &Path) -> io::Result<()> {
    let flags = rustix::fs::OFlags::RDWR;
    let how = rustix::fs::ResolveFlags::empty();
    let mode = rustix::fs::Mode::empty();
    let path = dir.join("own");
    Ok(rustix::fs::openat2(rustix::fs::CWD, path, flags, mode, how).map(drop)?)
}

/// A disk that runs a probe for each sector that is read, and gives the error number as bytes.
struct Probing {
    dir: PathBuf,
}

impl Device for Probing {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_only(&self) -> bool {
        false
    }

    fn preferred_block(&self) -> u64 {
        4096
    }

    async fn read(&self, at: u64, mut buf: BytesMut) -> ploop::Result<BytesMut> {
        let all = NEVER.iter().chain(NOT_WHILE_SERVING);
        let (_, probe) = all.into_iter().nth((at / 512) as usize).unwrap();
        buf.fill(number(probe(&self.dir)));
        Ok(buf)
    }

    async fn write(&self, _: u64, _: Bytes, _: bool) -> ploop::Result<()> {
        Ok(())
    }

    async fn zero(&self, _: u64, _: u64, _: Zero, _: bool) -> ploop::Result<()> {
        Ok(())
    }

    async fn discard(&self, _: u64, _: u64) -> ploop::Result<()> {
        Ok(())
    }

    async fn flush(&self) -> ploop::Result<()> {
        Ok(())
    }

    async fn extents(&self, _: u64, _: u64, _: usize) -> ploop::Result<Vec<GuestExtent>> {
        Ok(Vec::new())
    }
}

fn number(outcome: io::Result<()>) -> u8 {
    match outcome {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().unwrap_or(255) as u8,
    }
}

fn refused(number: u8) -> bool {
    [Errno::PERM, Errno::ACCESS]
        .map(Errno::raw_os_error)
        .contains(&number.into())
}

/// A folder with the file "own".
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    File::create(folder.path().join("own")).unwrap();
    folder
}

/// Runs `body` on a thread that is confined to `folder`; `None` where that is impossible.
fn confined<T: Send>(folder: &Path, files: Files, body: impl FnOnce() -> T + Send) -> Option<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(
            || match sandbox::enter(File::open(folder).unwrap(), files) {
                Ok(None) => Ok(body()),
                Ok(Some(missing)) => Err(missing),
                Err(e) => Err(e.to_string()),
            },
        );
        let outcome = thread.join().unwrap();
        outcome.map_err(|e| common::skip("the sandbox", &e)).ok()
    })
}

#[test]
fn without_a_sandbox_no_probe_is_refused() {
    let folder = folder();
    for (what, probe) in NEVER.iter().chain(NOT_WHILE_SERVING) {
        let forbidden = *what == "make a ring" && Engine::detect().0 == Engine::Poll;
        assert!(
            forbidden || !refused(number(probe(folder.path()))),
            "{what}"
        );
    }
}

#[test]
fn a_confined_process_reaches_its_own_files_and_nothing_else() {
    let folder = folder();
    confined(folder.path(), Files::Write, || {
        assert_eq!(number(open_own(folder.path())), 0);
        for (what, probe) in NEVER {
            let number = number(probe(folder.path()));
            assert!(refused(number), "{what}: {number}");
        }
    });
}

#[test]
fn a_process_that_only_reads_cannot_write_its_own_files() {
    let folder = folder();
    let opened = confined(folder.path(), Files::Read, || {
        number(open_own(folder.path()))
    });
    assert!(opened.is_none_or(refused));
}

#[test]
fn a_process_that_changes_two_disks_reaches_those_and_nothing_else() {
    let [one, two, other] = [folder(), folder(), folder()];
    let parent = two.path().parent().unwrap();
    let open = |path: &Path| File::open(path).unwrap();
    let (first, second, above) = (open(one.path()), open(two.path()), open(parent));
    let places = [
        (first.as_fd(), Files::Change),
        (second.as_fd(), Files::Change),
        (above.as_fd(), Files::Directories),
    ];
    let places = places.map(|(dir, files)| Place { dir, files });
    let outcome = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            match sandbox::enter_all(&places) {
                Ok(None) => {}
                Ok(Some(missing)) => return Err(missing),
                Err(e) => return Err(e.to_string()),
            }
            let link = |to: &TempDir| {
                let done = rustix::fs::linkat(
                    &first,
                    "own",
                    rustix::fs::CWD,
                    to.path().join("linked"),
                    rustix::fs::AtFlags::empty(),
                );
                number(done.map_err(io::Error::from))
            };
            let rename =
                |to: &TempDir| number(fs::rename(one.path().join("own"), to.path().join("moved")));
            // Landlock says of a place where one may not that it is on another file system.
            let elsewhere =
                |number| refused(number) || i32::from(number) == Errno::XDEV.raw_os_error();
            assert!(elsewhere(link(&other)) && elsewhere(rename(&other)));
            assert_eq!((link(&two), rename(&one)), (0, 0));
            for (what, probe) in NEVER {
                let number = number(probe(one.path()));
                assert!(refused(number), "{what}: {number}");
            }
            Ok(())
        });
        thread.join().unwrap()
    });
    if let Err(missing) = outcome {
        common::skip("the sandbox", &missing);
        return;
    }
    assert!(two.path().join("linked").exists() && other.path().join("own").exists());
    assert!(!other.path().join("moved").exists() && !other.path().join("linked").exists());
}

#[test]
fn a_thread_that_serves_a_client_can_do_nothing_else() {
    for engine in [Engine::detect().0, Engine::Poll] {
        let folder = folder();
        let socket = folder.path().join("nbd");
        let listener = UnixListener::bind(&socket).unwrap();
        let client = thread::spawn(move || {
            let mut client = Client::connect(&socket)?;
            let count = NEVER.len() + NOT_WHILE_SERVING.len();
            let numbers = (0..count).map(|n| Ok(client.read(n as u64 * 512, 512)?[0]));
            let numbers: io::Result<Vec<u8>> = numbers.collect();
            client.disconnect()?;
            numbers
        });
        let dir = folder.path().to_owned();
        let served = confined(folder.path(), Files::Write, move || {
            let options = Options {
                confined: true,
                end_with_last_client: true,
                ..Options::default()
            };
            let server = Server::new(Arc::new(Probing { dir }), options, engine).unwrap();
            let served = exec::run(engine, server.serve(vec![listener.into()]));
            served.unwrap().unwrap();
        });
        if served.is_none() {
            return;
        }
        let numbers = client.join().unwrap().unwrap();
        let probes = NEVER.iter().chain(NOT_WHILE_SERVING);
        for ((what, _), number) in probes.zip(numbers) {
            assert!(refused(number), "{engine:?}: {what}: {number}");
        }
    }
}

#[test]
fn every_thread_of_a_serving_process_is_confined() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut client = Client::connect(server.socket()).unwrap();
    client.read(0, 512).unwrap();
    let worker = eventually("a worker", Duration::from_secs(20), || {
        common::attach::listed(&disk.path())?["worker_pid"].as_u64()
    });
    let tasks = fs::read_dir(format!("/proc/{worker}/task")).unwrap();
    let states: Vec<String> = tasks
        .map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .collect();
    assert!(states.len() >= 2, "the worker and its client's thread");
    for state in states {
        assert!(state.contains("NoNewPrivs:\t1\n"), "{state}");
        assert!(state.contains("Seccomp:\t2\n"), "{state}");
    }
}
