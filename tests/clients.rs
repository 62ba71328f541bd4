//! Foreign NBD clients against `ploopctl serve`: libnbd's tools, QEMU's and fio's. What they see,
//! copy and verify is what a user gets; what QEMU then finds in the image file is the judge of
//! what we wrote. Nothing here is ours but the server.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::files::{Random, assert_same, space_of, sparse_disk};
use common::have;
use common::nbd::{Client, command};
use common::process::{Guard, eventually, fails, ok, ok_within};
use common::programs::{ploopctl, tool};
use common::serve::{Disk, captive};
use serde_json::Value;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const FORMATS: [&str; 2] = ["1", "2"];

fn nbdinfo(uri: &str) -> Value {
    let said = ok(tool("nbdinfo").args(["--json", uri]));
    serde_json::from_str(&said).expect("nbdinfo prints JSON")
}

/// Extents of a meta context as (offset, length, type).
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let said = ok(tool("nbdinfo")
        .arg(format!("--map={context}"))
        .args(["--json", uri]));
    let extents: Value = serde_json::from_str(&said).expect("nbdinfo prints JSON");
    let number = |extent: &Value, field: &str| extent[field].as_u64().expect("a number");
    let extents = extents.as_array().expect("a list").iter();
    extents
        .map(|e| (number(e, "offset"), number(e, "length"), number(e, "type")))
        .collect()
}

/// Runs qemu-io commands in order, in one connection; a wrong pattern is a failure.
fn qemu_io(uri: &str, args: &[&str], commands: &[&str]) {
    let mut qemu = tool("qemu-io");
    qemu.args(["-f", "raw"]).args(args).arg(uri);
    for command in commands {
        qemu.args(["-c", command]);
    }
    let said = ok(&mut qemu);
    assert!(!said.contains("verification failed"), "{said}");
}

fn nbdcopy(from: &OsStr, to: &OsStr) {
    ok(tool("nbdcopy").arg(from).arg(to));
}

/// fio's NBD engine with checksummed blocks.
fn fio(uri: &str, args: &[&str]) {
    let mut fio = tool("fio");
    fio.args([
        "--name=verify",
        "--ioengine=nbd",
        "--verify=crc32c",
        "--verify_fatal=1",
    ]);
    fio.args(["--bs=4k", "--iodepth=16", "--output-format=terse"]);
    ok_within(
        fio.arg(format!("--uri={uri}")).args(args),
        Duration::from_secs(180),
    );
}

/// Whether QEMU, reading the image file itself, sees the same bytes as a raw file holds.
fn qemu_reads_the_same(disk: &Disk, raw: &Path) {
    ok(tool("qemu-img")
        .args(["compare", "-f", "parallels", "-F", "raw"])
        .arg(disk.image())
        .arg(raw));
}

#[test]
fn nbdinfo_sees_every_flag_context_and_size_we_promise() {
    if !have(
        "nbdinfo_sees_every_flag_context_and_size_we_promise",
        &["nbdinfo"],
    ) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let info = nbdinfo(&server.uri());
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 64 * MIB);
    assert_eq!(export["is_read_only"], false);
    for flag in [
        "flush",
        "fua",
        "trim",
        "zero",
        "fast_zero",
        "cache",
        "df",
        "multi_conn",
    ] {
        assert_eq!(export[format!("can_{flag}")], true, "{flag} in {info}");
    }
    let contexts = export["contexts"].as_array().expect("contexts");
    for context in ["base:allocation", "qemu:allocation-depth"] {
        assert!(contexts.iter().any(|c| c == context), "{context} in {info}");
    }
    assert!(
        export["block_size_minimum"]
            .as_u64()
            .is_some_and(|n| n <= 512),
        "{info}"
    );
    assert_eq!(export["block_size_preferred"], 65536, "the cluster");
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    server.stop();
}

#[test]
fn a_named_export_is_found_by_its_name_and_by_no_other() {
    if !have(
        "a_named_export_is_found_by_its_name_and_by_no_other",
        &["nbdinfo"],
    ) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&["--export", "root"]);
    let list = ok(tool("nbdinfo").args(["--json", "--list", &server.uri_of("")]));
    assert!(list.contains("\"export-name\": \"root\""), "{list}");
    assert_eq!(
        nbdinfo(&server.uri_of("root"))["exports"][0]["export-size"],
        64 * MIB
    );
    fails(tool("nbdinfo").arg(server.uri_of("other")));
    server.stop();
}

#[test]
fn the_allocation_map_tells_data_from_holes_exactly() {
    if !have(
        "the_allocation_map_tells_data_from_holes_exactly",
        &["nbdinfo", "qemu-io"],
    ) {
        return;
    }
    for version in FORMATS {
        let disk = Disk::new("16M", &["--format-version", version]);
        let server = disk.serve(&[]);
        let (hole_zero, data) = (3, 0);
        assert_eq!(
            map(&server.uri(), "base:allocation"),
            [(0, 16 * MIB, hole_zero)]
        );
        qemu_io(&server.uri(), &[], &["write -P 7 1M 128k", "flush"]);
        let expected = [
            (0, MIB, hole_zero),
            (MIB, 128 << 10, data),
            (MIB + (128 << 10), 15 * MIB - (128 << 10), hole_zero),
        ];
        assert_eq!(map(&server.uri(), "base:allocation"), expected);
        // Depth 1 is the top image, 0 is nobody.
        let depths = map(&server.uri(), "qemu:allocation-depth");
        assert_eq!(
            depths,
            expected.map(|(at, len, kind)| (at, len, u64::from(kind == data)))
        );
        server.stop();
    }
}

#[test]
fn nbdcopy_brings_every_byte_in_and_out_again() {
    if !have(
        "nbdcopy_brings_every_byte_in_and_out_again",
        &["nbdcopy", "qemu-img"],
    ) {
        return;
    }
    for version in FORMATS {
        let disk = Disk::new("96M", &["--format-version", version]);
        let (source, copy) = (disk.beside("source"), disk.beside("copy"));
        sparse_disk(&source, 96 * MIB, 1);
        let server = disk.serve(&[]);
        nbdcopy(source.as_os_str(), server.uri().as_ref());
        nbdcopy(server.uri().as_ref(), copy.as_os_str());
        assert_same(&source, &copy);
        server.stop();
        disk.assert_qemu_finds_it_clean();
        qemu_reads_the_same(&disk, &source);
        // Zeros and holes of the source cost no space: a third of it is data.
        assert!(
            space_of(&disk.image()) < 80 * MIB,
            "{} bytes",
            space_of(&disk.image())
        );
    }
}

#[test]
fn nbdcopy_starts_us_itself_with_a_listening_socket() {
    if !have(
        "nbdcopy_starts_us_itself_with_a_listening_socket",
        &["nbdcopy"],
    ) {
        return;
    }
    let disk = Disk::new("32M", &[]);
    let (source, copy) = (disk.beside("source"), disk.beside("copy"));
    sparse_disk(&source, 32 * MIB, 2);
    captive(
        "nbdcopy",
        &[source.as_os_str(), OsStr::new("[]")],
        &disk,
        &[],
    );
    // The copy's server ends with its client; the next one may start only when it is gone.
    eventually(
        "the end of the captive server",
        Duration::from_secs(10),
        || common::attach::listed(&disk.path()).is_none().then_some(()),
    );
    captive(
        "nbdcopy",
        &[OsStr::new("[]"), copy.as_os_str()],
        &disk,
        &["--read-only"],
    );
    assert_same(&source, &copy);
}

#[test]
fn a_client_on_standard_input_is_served_and_its_end_is_ours() {
    let disk = Disk::new("32M", &[]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let input: OwnedFd = theirs.try_clone().unwrap().into();
    let mut command = disk.serve_command("-", &[]);
    command
        .stdin(input)
        .stdout(OwnedFd::from(theirs))
        .stderr(Stdio::piped());
    let mut guard = Guard {
        child: command.spawn().unwrap(),
    };
    // The command keeps copies of the server's end, which would hide its close.
    drop(command);
    let mut client = Client::negotiate(ours).unwrap();
    assert_eq!(client.write(4096, &[9; 4096]).unwrap(), 0);
    assert_eq!(client.read(4096, 4096).unwrap(), [9; 4096]);
    client.disconnect().unwrap();
    let status = guard
        .wait_within(Duration::from_secs(20))
        .expect("the server ends by itself");
    assert_eq!(status.code(), Some(0));
    disk.assert_qemu_finds_it_clean();
}

#[test]
fn qemu_io_finds_every_pattern_it_wrote_zeroed_or_discarded() {
    if !have(
        "qemu_io_finds_every_pattern_it_wrote_zeroed_or_discarded",
        &["qemu-io"],
    ) {
        return;
    }
    for version in FORMATS {
        let disk = Disk::new("64M", &["--format-version", version]);
        let server = disk.serve(&[]);
        let uri = server.uri();
        qemu_io(
            &uri,
            &[],
            &[
                "write -P 0xa1 0 1M",
                "write -P 0xa2 1M 1M",
                "read -P 0xa1 0 1M",
            ],
        );
        // Inside a cluster, across its edge, and one sector.
        qemu_io(
            &uri,
            &[],
            &[
                "write -P 0xb1 1000k 100k",
                "write -P 0xb2 65024 512",
                "read -P 0xa1 0 65024",
                "read -P 0xb2 65024 512",
                "read -P 0xa1 64k 936k",
                "read -P 0xb1 1000k 100k",
                "read -P 0xa2 1100k 948k",
            ],
        );
        // Zeroing, with and without giving space back.
        qemu_io(
            &uri,
            &[],
            &[
                "write -z 128k 70k",
                "write -z -u 256k 192k",
                "read -P 0 128k 70k",
                "read -P 0xa1 198k 58k",
                "read -P 0 256k 192k",
                "write -P 0xc1 300k 4k",
                "read -P 0 256k 44k",
                "read -P 0xc1 300k 4k",
                "read -P 0 304k 144k",
            ],
        );
        // A discarded cluster of a disk without parents reads as zeros.
        qemu_io(
            &uri,
            &[],
            &["discard 512k 128k", "read -P 0 512k 128k", "flush"],
        );
        let cycle = [
            "write -f -P 0xd1 30M 64k",
            "read -P 0xd1 30M 64k",
            "read -P 0 31M 1M",
        ];
        qemu_io(&uri, &[], &cycle);
        server.stop();
        disk.assert_qemu_finds_it_clean();
    }
}

#[test]
fn qemu_io_keeps_many_requests_in_flight_and_finds_them_all() {
    if !have(
        "qemu_io_keeps_many_requests_in_flight_and_finds_them_all",
        &["qemu-io"],
    ) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let blocks: Vec<u64> = (0..200).map(|i| (i * 37) % 200).collect();
    let line =
        |verb: &str, block: u64| format!("{verb} -P {} {}k 60k", 1 + block % 250, block * 60);
    let mut script: Vec<String> = blocks.iter().map(|b| line("aio_write", *b)).collect();
    script.push("aio_flush".into());
    script.extend(blocks.iter().map(|b| line("aio_read", *b)));
    script.push("aio_flush".into());
    let script: Vec<&str> = script.iter().map(String::as_str).collect();
    qemu_io(&server.uri(), &[], &script);
    server.stop();
    disk.assert_qemu_finds_it_clean();
}

#[test]
fn qemu_img_converts_in_both_directions_and_compares_equal() {
    if !have(
        "qemu_img_converts_in_both_directions_and_compares_equal",
        &["qemu-img"],
    ) {
        return;
    }
    for version in FORMATS {
        let disk = Disk::new("64M", &["--format-version", version]);
        let (raw, qcow2, back) = (
            disk.beside("raw"),
            disk.beside("qcow2"),
            disk.beside("back"),
        );
        sparse_disk(&raw, 64 * MIB, 3);
        ok(tool("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .arg(&raw)
            .arg(&qcow2));
        let server = disk.serve(&[]);
        let uri = server.uri();
        let into = ["convert", "-n", "-f", "qcow2", "-O", "raw", "-W", "-m", "8"];
        ok(tool("qemu-img").args(into).arg(&qcow2).arg(&uri));
        ok(tool("qemu-img")
            .args(["compare", "-f", "raw", "-F", "qcow2", &uri])
            .arg(&qcow2));
        ok(tool("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2", &uri])
            .arg(&back));
        server.stop();
        ok(tool("qemu-img")
            .args(["compare", "-f", "qcow2", "-F", "raw"])
            .arg(&back)
            .arg(&raw));
        disk.assert_qemu_finds_it_clean();
        qemu_reads_the_same(&disk, &raw);
    }
}

#[test]
fn fio_verifies_its_checksums_now_and_after_a_restart() {
    if !have(
        "fio_verifies_its_checksums_now_and_after_a_restart",
        &["fio", "qemu-img"],
    ) {
        return;
    }
    for (version, cache) in [("1", "writeback"), ("2", "writeback"), ("2", "none")] {
        let disk = Disk::new("128M", &["--format-version", version]);
        let server = disk.serve(&["--cache", cache]);
        fio(
            &server.uri(),
            &["--rw=randwrite", "--size=64M", "--fsync=64"],
        );
        let raw = disk.beside("raw");
        nbdcopy(server.uri().as_ref(), raw.as_os_str());
        server.stop();
        disk.assert_qemu_finds_it_clean();
        qemu_reads_the_same(&disk, &raw);
        let server = disk.serve(&["--cache", cache, "--read-only"]);
        fio(&server.uri(), &["--rw=randread", "--size=64M"]);
        server.stop();
    }
}

#[test]
fn several_connections_see_one_disk() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut clients: Vec<Client> = (0..4)
        .map(|_| Client::connect(server.socket()).unwrap())
        .collect();
    for round in 0..64u64 {
        let block = [round as u8 + 1; 4096];
        let writer = (round % 4) as usize;
        assert_eq!(clients[writer].write(round * 4096, &block).unwrap(), 0);
        for client in &mut clients {
            assert_eq!(client.read(round * 4096, 4096).unwrap(), block);
        }
    }
    clients.into_iter().for_each(|c| c.disconnect().unwrap());
    server.stop();
}

#[test]
fn clients_that_die_half_way_do_not_hurt_a_good_one() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut good = Client::connect(server.socket()).unwrap();
    assert_eq!(good.write(0, &[1; 8192]).unwrap(), 0);
    for round in 0..32 {
        // Those before are counted until the server has seen that they are gone.
        let connect = || Client::connect(server.socket()).ok();
        let mut bad = eventually(
            "there is room for one more",
            Duration::from_secs(20),
            connect,
        );
        // A megabyte announced, less arrives: the range must not change beyond what was sent.
        bad.send(
            command::WRITE,
            32 * MIB,
            MIB as u32,
            &vec![0xEE; 1000 * round],
        )
        .unwrap();
        bad.send(command::READ, 0, MIB as u32, &[]).ok();
        drop(bad);
        assert_eq!(good.read(0, 8192).unwrap(), [1; 8192]);
    }
    let mut garbage = UnixStream::connect(server.socket()).unwrap();
    garbage.write_all(&[0xFF; 4096]).ok();
    drop(garbage);
    assert_eq!(good.write(4096, &[2; 4096]).unwrap(), 0);
    assert_eq!(good.read(4096, 4096).unwrap(), [2; 4096]);
    good.disconnect().unwrap();
    server.stop();
    disk.assert_qemu_finds_it_clean();
}

#[test]
fn a_client_killed_under_load_leaves_a_disk_that_works() {
    if !have(
        "a_client_killed_under_load_leaves_a_disk_that_works",
        &["fio"],
    ) {
        return;
    }
    let disk = Disk::new("128M", &[]);
    let server = disk.serve(&[]);
    let mut load = tool("fio");
    load.args([
        "--name=load",
        "--ioengine=nbd",
        "--rw=randrw",
        "--bs=16k",
        "--iodepth=32",
    ]);
    load.args(["--size=64M", "--offset=64M", "--time_based", "--runtime=60"]);
    load.arg(format!("--uri={}", server.uri()));
    for _ in 0..3 {
        let guard = Guard::spawn(&mut load);
        std::thread::sleep(Duration::from_millis(700));
        drop(guard);
        fio(&server.uri(), &["--rw=randwrite", "--size=8M"]);
    }
    server.stop();
    disk.assert_qemu_finds_it_clean();
}

#[test]
fn a_hundred_silent_clients_do_not_keep_a_good_one_out() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let silent: Vec<UnixStream> = (0..100)
        .filter_map(|_| UnixStream::connect(server.socket()).ok())
        .collect();
    assert!(
        silent.len() > 16,
        "only {} connections were taken",
        silent.len()
    );
    let start = Instant::now();
    let mut good = Client::connect(server.socket()).unwrap();
    assert_eq!(good.write(0, &[3; 512]).unwrap(), 0);
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    good.disconnect().unwrap();
    drop(silent);
    server.stop();
}

#[test]
fn a_stalled_handshake_is_hung_up_on() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut silent = UnixStream::connect(server.socket()).unwrap();
    silent
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let start = Instant::now();
    let mut rest = Vec::new();
    // The greeting arrives, and then the end, when the server loses patience (10 s).
    silent.read_to_end(&mut rest).expect("the server hangs up");
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    server.stop();
}

#[test]
fn the_socket_is_for_its_owner_only() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mode = std::fs::metadata(server.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    server.stop();
}

#[test]
fn tcp_is_served_on_loopback_and_refused_elsewhere() {
    let disk = Disk::new("64M", &[]);
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let said = fails(&mut disk.serve_command(&format!("tcp:0.0.0.0:{port}"), &[]));
    assert!(
        said.err.contains("loopback") || said.err.contains("TLS"),
        "{}",
        said.err
    );
    let mut guard = Guard::spawn(&mut disk.serve_command(&format!("tcp:127.0.0.1:{port}"), &[]));
    eventually("a server on loopback", Duration::from_secs(20), || {
        TcpStream::connect(("127.0.0.1", port)).ok()
    });
    if have(
        "tcp_is_served_on_loopback_and_refused_elsewhere",
        &["nbdinfo"],
    ) {
        let info = nbdinfo(&format!("nbd://127.0.0.1:{port}/"));
        assert_eq!(info["exports"][0]["export-size"], 64 * MIB);
    }
    guard.signal(rustix::process::Signal::TERM);
    let status = guard.wait_within(Duration::from_secs(20)).expect("it ends");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_read_only_export_says_so_refuses_writes_and_touches_nothing() {
    let disk = Disk::new("64M", &[]);
    let writer = disk.serve(&[]);
    let mut client = Client::connect(writer.socket()).unwrap();
    assert_eq!(client.write(0, &Random::new(4).bytes(65536)).unwrap(), 0);
    client.disconnect().unwrap();
    writer.stop();
    let before = std::fs::read(disk.image()).unwrap();
    let server = disk.serve(&["--read-only"]);
    let mut client = Client::connect(server.socket()).unwrap();
    assert_eq!(client.read(0, 65536).unwrap(), Random::new(4).bytes(65536));
    let eperm = 1;
    assert_eq!(client.write(0, &[0; 512]).unwrap(), eperm);
    client.disconnect().unwrap();
    if have(
        "a_read_only_export_says_so_refuses_writes_and_touches_nothing",
        &["nbdinfo"],
    ) {
        assert_eq!(nbdinfo(&server.uri())["exports"][0]["is_read_only"], true);
    }
    server.stop();
    assert!(
        std::fs::read(disk.image()).unwrap() == before,
        "the image changed"
    );
}

#[test]
fn a_disk_in_use_is_refused_to_a_second_server() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let other = disk.beside("other");
    let said = fails(&mut disk.serve_command(&format!("unix:{}", other.display()), &[]));
    let busy = 4;
    assert_eq!(said.status.code(), Some(busy), "{}", said.err);
    assert!(!other.exists(), "a refused server left its socket");
    // The first one never noticed.
    let mut client = Client::connect(server.socket()).unwrap();
    assert_eq!(client.write(0, &[5; 512]).unwrap(), 0);
    client.disconnect().unwrap();
    server.stop();
}

#[test]
fn a_served_disk_is_listed_while_it_is_served_and_not_after() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    // Clients may connect before the disk is open: they wait in the socket's queue.
    let object = eventually("a served disk in the list", Duration::from_secs(20), || {
        common::attach::listed(&disk.path()).filter(|object| object["state"] == "serving")
    });
    assert_eq!(object["size"], 64 * MIB, "{object}");
    assert_eq!(object["keeper_pid"], Value::from(server.pid()), "{object}");
    server.stop();
    assert_eq!(common::attach::listed(&disk.path()), None);
    common::attach::assert_nothing_left(&disk.path(), &[]);
}

#[test]
fn a_bad_disk_or_socket_is_refused_with_a_reason() {
    let disk = Disk::new("64M", &[]);
    let folder = disk.beside("nothing");
    let said = fails(
        ploopctl()
            .arg("serve")
            .arg(&folder)
            .args(["--nbd", "unix:/tmp/x"]),
    );
    assert!(said.err.contains("nothing"), "{}", said.err);
    let said = fails(&mut disk.serve_command("unix:/no/such/folder/socket", &[]));
    assert!(said.err.contains("/no/such/folder"), "{}", said.err);
    std::fs::write(disk.image(), b"this is not an image").unwrap();
    let said = fails(&mut disk.serve_command(&format!("unix:{}", folder.display()), &[]));
    assert!(said.err.contains("root.hds"), "{}", said.err);
    assert!(!folder.exists(), "a failed start left its socket");
    common::attach::assert_nothing_left(&disk.path(), &[]);
}
