//! NBD under TLS, against the shipped server: libnbd's tools and QEMU as good clients, and our own
//! raw one for those that have no certificate, that stop half-way, or that mean harm.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../common/mod.rs"]
mod common;

mod abuse;
mod authority;
mod client;

use authority::Authority;
use client::{ask, connect, greeted, message, option, raw, reply, secure};
use common::files::{assert_same, sparse_disk};
use common::have;
use common::nbd::{Client, command};
use common::process::{Guard, eventually, fails, ok, run};
use common::programs::tool;
use common::serve::{Disk, Server};
use rustls::version::{TLS12, TLS13};
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// A disk, an authority, and everybody's folder of credentials.
struct Scene {
    disk: Disk,
    authority: Authority,
    server: PathBuf,
    client: PathBuf,
    /// Believes the server and has no certificate.
    nobody: PathBuf,
    /// Has a certificate of an authority that the server does not know.
    stranger: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let disk = Disk::new("64M", &[]);
        let folder = |name: &str| disk.beside(name);
        let (server, client) = (folder("server"), folder("client"));
        let (nobody, stranger) = (folder("nobody"), folder("stranger"));
        let authority = Authority::new("ours");
        authority.equip_server(&server);
        authority.equip_client(&client, 7);
        authority.introduce(&nobody);
        Authority::new("theirs").equip_client(&stranger, 8);
        authority.introduce(&stranger);
        Self {
            disk,
            authority,
            server,
            client,
            nobody,
            stranger,
        }
    }

    fn serve(&self, args: &[&str]) -> Server {
        let creds = ["--tls-creds", self.server.to_str().unwrap()];
        self.disk.serve(&[&creds, args].concat())
    }
}

/// The URI of a server on a unix socket, for a client with this folder.
fn uri(server: &Server, folder: &Path) -> String {
    let socket = server.socket().display();
    let folder = folder.display();
    format!("nbds+unix:///?socket={socket}&tls-certificates={folder}")
}

#[test]
fn libnbd_copies_every_byte_in_and_out_again_under_tls() {
    let test = "libnbd_copies_every_byte_in_and_out_again_under_tls";
    if !have(test, &["nbdcopy", "nbdinfo"]) {
        return;
    }
    let scene = Scene::new();
    let (source, copy) = (scene.disk.beside("source"), scene.disk.beside("copy"));
    sparse_disk(&source, 64 * MIB, 1);
    let server = scene.serve(&[]);
    let uri = uri(&server, &scene.client);
    let info = ok(tool("nbdinfo").arg(&uri));
    assert!(info.contains("with TLS"), "{info}");
    assert!(info.contains(&format!("{}", 64 * MIB)), "{info}");
    ok(tool("nbdcopy").arg("--flush").arg(&source).arg(&uri));
    ok(tool("nbdcopy").arg(&uri).arg(&copy));
    assert_same(&source, &copy);
    server.stop();
    scene.disk.assert_qemu_finds_it_clean();
}

#[test]
fn tls_lets_the_disk_leave_the_machine_and_nothing_else_does() {
    let test = "tls_lets_the_disk_leave_the_machine_and_nothing_else_does";
    let scene = Scene::new();
    let creds = scene.server.to_str().unwrap();
    for args in [
        &[][..],
        &["--tls", "off"],
        &["--tls", "off", "--tls-creds", creds],
        &["--tls", "allow", "--tls-creds", creds],
    ] {
        let said = fails(&mut scene.disk.serve_command("tcp:0.0.0.0:0", args));
        assert_eq!(said.status.code(), Some(7), "{args:?}: {}", said.err);
        assert!(said.err.contains("--tls-creds"), "{args:?}: {}", said.err);
    }
    let mut command = scene
        .disk
        .serve_command("0.0.0.0:0", &["--tls-creds", creds]);
    let mut guard = Guard::spawn(&mut command);
    let mut line = String::new();
    BufReader::new(guard.child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let port = line.trim().strip_prefix("nbds://0.0.0.0:");
    let port = port
        .unwrap_or_else(|| panic!("{line}"))
        .trim_end_matches('/');
    let listed = common::attach::listed(&scene.disk.path()).unwrap();
    assert_eq!(listed["uri"], line.trim());
    if have(test, &["nbdinfo", "qemu-io"]) {
        let client = scene.client.display();
        let uri = format!("nbds://localhost:{port}/?tls-certificates={client}");
        let size = ok(tool("nbdinfo").args(["--size", &uri]));
        assert_eq!(size.trim(), (64 * MIB).to_string());
        let creds = format!("tls-creds-x509,id=tls,endpoint=client,dir={client}");
        let there = format!(
            "driver=nbd,server.type=inet,server.host=localhost,server.port={port},tls-creds=tls"
        );
        let said = ok(tool("qemu-io")
            .args(["-c", "write -P 7 1M 5M", "-c", "read -P 7 1M 5M"])
            .args(["-c", "read -P 0 6M 1M", "-c", "flush"])
            .args(["--object", &creds, "--image-opts", &there]));
        assert!(!said.contains("verification failed"), "{said}");
    }
    guard.signal(rustix::process::Signal::TERM);
    let status = guard.wait_within(PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn only_clients_of_our_authority_are_served() {
    let scene = Scene::new();
    let server = scene.serve(&[]);
    for version in [&TLS12, &TLS13] {
        let good = client::config(&scene.client, &[version]);
        let stream = secure(server.socket(), good).unwrap();
        assert_eq!(stream.conn.protocol_version(), Some(version.version));
        let mut good = Client::go(stream).unwrap();
        assert_eq!(good.write(0, &[3; 4096]).unwrap(), 0);
        good.disconnect().unwrap();
        for folder in [&scene.nobody, &scene.stranger] {
            let bad = client::config(folder, &[version]);
            // The client of TLS 1.3 hears of it only after its part of the handshake.
            let refused = secure(server.socket(), bad).and_then(Client::go);
            let refused = refused.expect_err("a client without our authority's word");
            let text = refused.to_string();
            assert!(text.contains("alert"), "{}: {text}", folder.display());
        }
    }
    if have("only_clients_of_our_authority_are_served", &["nbdinfo"]) {
        for folder in [&scene.nobody, &scene.stranger] {
            let said = fails(tool("nbdinfo").arg(uri(&server, folder)));
            assert!(said.err.contains("alert"), "{}", said.err);
        }
        ok(tool("nbdinfo").arg(uri(&server, &scene.client)));
    }
    server.stop();
}

#[test]
fn a_revoked_certificate_opens_nothing() {
    let scene = Scene::new();
    let other = scene.disk.beside("other");
    scene.authority.equip_client(&other, 9);
    scene.authority.revoke(&scene.server, 9);
    let server = scene.serve(&[]);
    connect(server.socket(), &scene.client).unwrap();
    connect(server.socket(), &other).expect_err("a revoked certificate");
    server.stop();
}

#[test]
fn without_an_authority_everybody_is_served_and_the_log_says_so() {
    let scene = Scene::new();
    fs::remove_file(scene.server.join("ca-cert.pem")).unwrap();
    let socket = scene.disk.beside("socket");
    let on = format!("unix:{}", socket.display());
    let args = ["--tls-creds", scene.server.to_str().unwrap()];
    let mut guard = Guard::spawn(&mut scene.disk.serve_command(&on, &args));
    let mut good = eventually("a server", PATIENCE, || {
        connect(&socket, &scene.nobody).ok()
    });
    assert_eq!(good.read(0, 512).unwrap(), [0; 512]);
    good.disconnect().unwrap();
    guard.signal(rustix::process::Signal::TERM);
    guard.wait_within(PATIENCE).expect("it ends");
    let mut log = String::new();
    let mut pipe = guard.child.stderr.take().unwrap();
    pipe.read_to_string(&mut log).unwrap();
    assert!(log.contains("no ca-cert.pem"), "{log}");
}

#[test]
fn in_the_clear_a_client_learns_that_tls_is_required_and_nothing_else() {
    let scene = Scene::new();
    let server = scene.serve(&["--export", "secret"]);
    let mut stream = greeted(server.socket()).unwrap();
    let named = [&6u32.to_be_bytes()[..], b"secret", &[0; 2]].concat();
    let size = (64 * MIB).to_be_bytes();
    let options = [
        (option::LIST, &b""[..]),
        (option::INFO, &[0; 6]),
        (option::INFO, &named),
        (option::GO, &[0; 6]),
        (option::GO, &named),
        (option::GO, b"nonsense"),
        (option::STRUCTURED_REPLY, b""),
        (option::SET_META_CONTEXT, &[0; 8]),
        (99, b""),
    ];
    for (number, data) in options {
        stream.write_all(&message(number, data)).unwrap();
        let (kind, text) = reply(&mut stream).unwrap();
        assert_eq!(kind, option::ERR_TLS_REQD, "option {number}");
        let told = |what: &[u8]| text.windows(what.len()).any(|part| part == what);
        assert!(
            !told(b"secret") && !told(&size),
            "option {number}: {text:?}"
        );
    }
    assert_eq!(ask(&mut stream, option::ABORT, b"").unwrap(), option::ACK);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    // EXPORT_NAME has no word for an error.
    for name in [&b""[..], b"secret", b"other"] {
        let mut stream = greeted(server.socket()).unwrap();
        stream
            .write_all(&message(option::EXPORT_NAME, name))
            .unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(rest, b"");
    }
    if have(
        "in_the_clear_a_client_learns_that_tls_is_required_and_nothing_else",
        &["nbdinfo"],
    ) {
        let clear = format!("nbd+unix:///?socket={}", server.socket().display());
        let said = fails(tool("nbdinfo").args(["--size", &clear]));
        assert!(said.err.contains("requires TLS"), "{}", said.err);
    }
    server.stop();
}

#[test]
fn what_is_sent_ahead_of_the_handshake_is_never_obeyed() {
    let scene = Scene::new();
    for when in ["allow", "require"] {
        let server = scene.serve(&["--tls", when]);
        for ahead in [
            message(option::ABORT, b""),
            message(option::STRUCTURED_REPLY, b""),
            message(option::GO, &[0; 6]),
            vec![0],
        ] {
            let mut stream = greeted(server.socket()).unwrap();
            let both = [message(option::STARTTLS, b""), ahead].concat();
            stream.write_all(&both).unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            assert_eq!(rest, b"", "an answer to somebody in between");
        }
        // The same behind the answer: no TLS record begins so.
        let mut stream = greeted(server.socket()).unwrap();
        ask(&mut stream, option::STARTTLS, b"").unwrap();
        stream.write_all(&message(option::LIST, b"")).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.starts_with(&[0, 3, 0xe8, 0x89]), "{rest:?}");
        server.stop();
    }
}

#[test]
fn clients_may_choose_where_tls_is_allowed_and_start_it_once() {
    let scene = Scene::new();
    let server = scene.serve(&["--tls", "allow"]);
    let mut clear = Client::connect(server.socket()).unwrap();
    assert_eq!(clear.write(0, &[5; 512]).unwrap(), 0);
    let mut good = connect(server.socket(), &scene.client).unwrap();
    assert_eq!(good.read(0, 512).unwrap(), [5; 512]);
    good.disconnect().unwrap();
    clear.disconnect().unwrap();
    let mut stream = greeted(server.socket()).unwrap();
    let refused = ask(&mut stream, option::STARTTLS, b"now").unwrap();
    assert_eq!(refused, option::ERR_INVALID);
    let config = client::config(&scene.client, rustls::ALL_VERSIONS);
    let mut stream = secure(server.socket(), config).unwrap();
    let refused = ask(&mut stream, option::STARTTLS, b"").unwrap();
    assert_eq!(refused, option::ERR_INVALID);
    // The connection goes on as if it had not been asked for.
    let mut good = Client::go(stream).unwrap();
    assert_eq!(good.read(0, 512).unwrap(), [5; 512]);
    good.disconnect().unwrap();
    server.stop();
    let server = scene.disk.serve(&[]);
    let mut stream = greeted(server.socket()).unwrap();
    let refused = ask(&mut stream, option::STARTTLS, b"").unwrap();
    assert_eq!(refused, option::ERR_UNSUP);
    server.stop();
}

#[test]
fn what_was_agreed_in_the_clear_is_forgotten_under_tls() {
    let scene = Scene::new();
    let server = scene.serve(&["--tls", "allow"]);
    let mut stream = greeted(server.socket()).unwrap();
    let agreed = ask(&mut stream, option::STRUCTURED_REPLY, b"").unwrap();
    assert_eq!(agreed, option::ACK);
    let context = b"base:allocation";
    let mut query = [0u32, 1, context.len() as u32]
        .map(u32::to_be_bytes)
        .concat();
    query.extend(context);
    stream
        .write_all(&message(option::SET_META_CONTEXT, &query))
        .unwrap();
    while reply(&mut stream).unwrap().0 != option::ACK {}
    ask(&mut stream, option::STARTTLS, b"").unwrap();
    let config = client::config(&scene.client, rustls::ALL_VERSIONS);
    let mut stream = client::shake(stream, config);
    let refused = ask(&mut stream, option::SET_META_CONTEXT, &query).unwrap();
    assert_eq!(
        refused,
        option::ERR_INVALID,
        "structured replies are agreed"
    );
    // A simple reply is what this client understands.
    let mut good = Client::go(stream).unwrap();
    assert_eq!(good.read(0, 512).unwrap(), [0; 512]);
    good.disconnect().unwrap();
    server.stop();
}

#[test]
fn a_disconnect_is_answered_with_the_end_of_the_stream() {
    let scene = Scene::new();
    let server = scene.serve(&[]);
    // Without TLS's own word for it this would be a truncated stream.
    let good = connect(server.socket(), &scene.client).unwrap();
    good.disconnect().unwrap();
    let config = client::config(&scene.client, rustls::ALL_VERSIONS);
    let mut stream = secure(server.socket(), config).unwrap();
    let bye = ask(&mut stream, option::ABORT, b"").unwrap();
    assert_eq!(bye, option::ACK);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    server.stop();
}

#[test]
fn an_abrupt_end_is_a_disconnect_and_what_was_answered_stays() {
    let scene = Scene::new();
    let server = scene.serve(&[]);
    for round in 1..16u8 {
        let mut client = connect(server.socket(), &scene.client).unwrap();
        assert_eq!(client.write(0, &[round; 4096]).unwrap(), 0);
        if round % 2 == 0 {
            // In the middle of a request.
            client
                .send(command::WRITE, 0, 1 << 20, &[0xEE; 100])
                .unwrap();
        }
        drop(client);
        let mut other = connect(server.socket(), &scene.client).unwrap();
        assert_eq!(other.read(0, 4096).unwrap(), [round; 4096]);
        other.disconnect().unwrap();
    }
    server.stop();
    scene.disk.assert_qemu_finds_it_clean();
}

#[test]
fn another_worker_has_the_credentials_whatever_became_of_the_files() {
    let scene = Scene::new();
    let server = scene.serve(&[]);
    let mut before = connect(server.socket(), &scene.client).unwrap();
    assert_eq!(before.write(0, &[9; 512]).unwrap(), 0);
    let worker = || {
        let pid = common::attach::listed(&scene.disk.path())?["worker_pid"].as_u64()?;
        Some(pid as u32).filter(|pid| *pid > 0)
    };
    let old = eventually("a worker", PATIENCE, worker);
    fs::remove_dir_all(&scene.server).unwrap();
    common::attach::kill(old);
    eventually("another worker", PATIENCE, || {
        worker().filter(|new| *new != old)
    });
    let mut after = connect(server.socket(), &scene.client).unwrap();
    assert_eq!(after.read(0, 512).unwrap(), [9; 512]);
    after.disconnect().unwrap();
    server.stop();
}

#[test]
fn credentials_that_protect_nothing_are_refused_by_name() {
    let scene = Scene::new();
    let socket = scene.disk.beside("socket");
    let on = format!("unix:{}", socket.display());
    let refused = |code: i32, words: &[&str]| {
        let args = ["--tls-creds", scene.server.to_str().unwrap()];
        let said = fails(&mut scene.disk.serve_command(&on, &args));
        assert_eq!(said.status.code(), Some(code), "{}", said.err);
        for word in words {
            assert!(said.err.contains(word), "no {word} in: {}", said.err);
        }
        assert!(!socket.exists(), "a refused server left its socket");
    };
    let key = scene.server.join("server-key.pem");
    for mode in [0o604, 0o602, 0o660, 0o620, 0o644] {
        fs::set_permissions(&key, Permissions::from_mode(mode)).unwrap();
        refused(1, &["server-key.pem", "chmod 0600"]);
    }
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    let good = fs::read(&key).unwrap();
    fs::copy(scene.client.join("client-key.pem"), &key).unwrap();
    refused(1, &["server-cert.pem", "server-key.pem"]);
    fs::write(&key, "-----BEGIN NONSENSE-----").unwrap();
    refused(1, &["server-key.pem"]);
    fs::write(&key, vec![b'x'; 2 << 20]).unwrap();
    refused(1, &["server-key.pem", "1 MiB"]);
    fs::write(&key, good).unwrap();
    fs::write(scene.server.join("ca-cert.pem"), "nothing").unwrap();
    refused(1, &["ca-cert.pem", "certificate"]);
    scene.authority.introduce(&scene.server);
    fs::write(scene.server.join("ca-crl.pem"), "nothing").unwrap();
    refused(1, &["ca-crl.pem"]);
    fs::remove_file(scene.server.join("ca-crl.pem")).unwrap();
    fs::remove_file(scene.server.join("server-cert.pem")).unwrap();
    refused(11, &["server-cert.pem", "ca-cert.pem"]);
    for when in ["allow", "require"] {
        let said = run(&mut scene.disk.serve_command(&on, &["--tls", when]));
        assert_eq!(said.status.code(), Some(2), "{}", said.err);
        assert!(said.err.contains("--tls-creds"), "{}", said.err);
    }
}

#[test]
fn stalled_tls_handshakes_do_not_keep_a_good_client_waiting() {
    let scene = Scene::new();
    let server = scene.serve(&[]);
    let hello = abuse::client_hello(&scene.nobody);
    let mut slowest = Duration::ZERO;
    let mut stalled = Vec::new();
    for n in 0..300 {
        let mut stream = greeted(server.socket()).unwrap();
        stream.write_all(&message(option::STARTTLS, b"")).unwrap();
        // Those that are there for long enough are evicted by the others.
        if reply(&mut stream).is_ok() {
            let _ = stream.write_all(&hello[..n * 7 % hello.len()]);
        }
        stalled.push(stream);
        if n % 50 == 49 {
            let start = Instant::now();
            let mut good = connect(server.socket(), &scene.client).unwrap();
            assert_eq!(good.read(0, 512).unwrap(), [0; 512]);
            good.disconnect().unwrap();
            slowest = slowest.max(start.elapsed());
        }
    }
    println!("COUNT: stalled TLS handshakes: 300, a good client waited {slowest:?} at most");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    drop(stalled);
    server.stop();
}

#[test]
fn a_tls_handshake_has_no_more_time_than_any_other() {
    let scene = Scene::new();
    let server = scene.serve(&[]);
    let start = Instant::now();
    let mut stream = raw(server.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(40)))
        .unwrap();
    common::nbd::greet(&mut stream).unwrap();
    // The time is counted from the connection on, so this comes out of it.
    std::thread::sleep(Duration::from_secs(6));
    ask(&mut stream, option::STARTTLS, b"").unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset),
    }
    let took = start.elapsed();
    assert!(
        took > Duration::from_secs(9) && took < Duration::from_secs(15),
        "{took:?}"
    );
    server.stop();
}

#[test]
fn sockets_of_an_activator_are_served_under_tls() {
    let test = "sockets_of_an_activator_are_served_under_tls";
    if !have(test, &["qemu-io"]) {
        return;
    }
    // On standard input: what inetd does with a connection.
    let scene = Scene::new();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let creds = scene.server.to_str().unwrap();
    let mut command = scene.disk.serve_command("-", &["--tls-creds", creds]);
    let input: std::os::fd::OwnedFd = theirs.try_clone().unwrap().into();
    command
        .stdin(input)
        .stdout(std::os::fd::OwnedFd::from(theirs))
        .stderr(Stdio::piped());
    let mut guard = Guard {
        child: command.spawn().unwrap(),
    };
    drop(command);
    let mut stream = ours;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    common::nbd::greet(&mut stream).unwrap();
    ask(&mut stream, option::STARTTLS, b"").unwrap();
    let config = client::config(&scene.client, rustls::ALL_VERSIONS);
    let mut good = Client::go(client::shake(stream, config)).unwrap();
    assert_eq!(good.write(4096, &[9; 4096]).unwrap(), 0);
    assert_eq!(good.read(4096, 4096).unwrap(), [9; 4096]);
    good.disconnect().unwrap();
    let status = guard
        .wait_within(PATIENCE)
        .expect("it ends with its client");
    assert_eq!(status.code(), Some(0));
}
