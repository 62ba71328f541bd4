//! NBD clients that mean harm, against the shipped server: whatever one does, the others are served,
//! nothing it held stays held, and the server stops cleanly.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::files::Random;
use common::have;
use common::nbd::Client;
use common::process::eventually;
use common::serve::{Disk, Server};
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Clients that connect and then do nothing.
const STALLED: usize = 1000;
const ABUSIVE: u64 = 500;
/// Clients that ask for 400 MiB each and take nothing, one less than there are seats.
const DEAF: u64 = 15;
/// What one of them may make the server hold: a full queue, and some more.
const DEAF_MAX: u64 = 20 << 20;
/// The worker may have grown by so much afterwards.
const KEPT_MAX: u64 = 64 << 20;
/// What one client at a time may make the server hold: a few have left when their memory goes.
const HELD_MAX: u64 = 128 << 20;

fn worker(disk: &Disk) -> u32 {
    eventually("a worker", Duration::from_secs(20), || {
        let pid = common::attach::listed(&disk.path())?["worker_pid"].as_u64()?;
        u32::try_from(pid).ok().filter(|pid| *pid > 0)
    })
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// A number of bytes in /proc/PID/status.
fn memory(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// A new client is served, and sees what was written.
fn good_client(server: &Server, round: u64) {
    let data = Random::new(round).bytes(4096);
    let mut good = Client::connect(server.socket()).unwrap();
    assert_eq!(good.write(4096, &data).unwrap(), 0);
    assert_eq!(good.read(4096, 4096).unwrap(), data);
    good.disconnect().unwrap();
}

#[test]
fn a_thousand_stalled_handshakes_do_not_keep_a_good_client_waiting() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    good_client(&server, 0);
    let worker = worker(&disk);
    let before = descriptors(worker);
    let mut stalled = Vec::new();
    let mut slowest = Duration::ZERO;
    for n in 0..STALLED {
        stalled.push(stall(&server, n));
        if n % 50 == 49 {
            let start = Instant::now();
            good_client(&server, n as u64);
            slowest = slowest.max(start.elapsed());
        }
    }
    println!("COUNT: stalled handshakes: {STALLED}, a good client waited {slowest:?} at most");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    drop(stalled);
    settled(worker, before);
    server.stop();
    if have(
        "a_thousand_stalled_handshakes_do_not_keep_a_good_client_waiting",
        &["qemu-img"],
    ) {
        disk.assert_qemu_finds_it_clean();
    }
}

/// A client that says nothing, or a part of something, and stays.
fn stall(server: &Server, n: usize) -> UnixStream {
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let mut part = hello();
    part.extend(option(7, &[0; 6]));
    // Never the whole of it, or it would be no stalled one.
    let _ = stream.write_all(&part[..n % part.len()]);
    stream
}

#[test]
fn clients_that_take_no_answers_make_the_server_hold_little_each() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    good_client(&server, 0);
    let worker = worker(&disk);
    let held = memory(worker, "VmHWM:");
    let deaf: Vec<UnixStream> = (0..DEAF)
        .map(|_| {
            let mut stream = UnixStream::connect(server.socket()).unwrap();
            let reads = request(0, 0, 0, 1 << 20).repeat(400);
            stream.write_all(&[start(), reads].concat()).unwrap();
            stream
        })
        .collect();
    let mut last = 0;
    eventually(
        "the server to hold no more",
        Duration::from_secs(20),
        || {
            std::thread::sleep(Duration::from_millis(300));
            let now = memory(worker, "VmHWM:");
            (std::mem::replace(&mut last, now) == now).then_some(())
        },
    );
    let grown = last - held;
    println!(
        "COUNT: {DEAF} deaf clients: the worker grew by {} KiB",
        grown >> 10
    );
    assert!(
        grown > DEAF << 18,
        "{grown} bytes: nobody was served at all"
    );
    assert!(grown < DEAF * DEAF_MAX, "{grown} bytes for {DEAF} clients");
    good_client(&server, 1);
    drop(deaf);
    server.stop();
}

#[test]
fn five_hundred_abusive_clients_leave_nothing_behind() {
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    good_client(&server, 0);
    let worker = worker(&disk);
    let (before, held) = (descriptors(worker), memory(worker, "VmRSS:"));
    let mut random = Random::new(5);
    for round in 0..ABUSIVE {
        let way = WAYS[(round as usize) % WAYS.len()];
        if let Err(e) = abuse(&server, way, &mut random) {
            // The server hanging up is what most of them are for; anything else is our own fault.
            let gone = [
                io::ErrorKind::BrokenPipe,
                io::ErrorKind::ConnectionReset,
                io::ErrorKind::UnexpectedEof,
            ];
            assert!(gone.contains(&e.kind()), "{way:?}: {e}");
        }
        if round % 25 == 0 {
            good_client(&server, round);
        }
    }
    good_client(&server, ABUSIVE);
    settled(worker, before);
    let peak = memory(worker, "VmHWM:").saturating_sub(held);
    println!(
        "COUNT: abusive sessions: {ABUSIVE}, the worker grew by {} KiB at most",
        peak >> 10
    );
    assert!(peak < HELD_MAX, "{peak} bytes at the peak");
    let kept = memory(worker, "VmRSS:").saturating_sub(held);
    assert!(kept < KEPT_MAX, "{kept} bytes stayed");
    assert_eq!(
        worker,
        self::worker(&disk),
        "another worker: the first one died"
    );
    server.stop();
    if have(
        "five_hundred_abusive_clients_leave_nothing_behind",
        &["qemu-img"],
    ) {
        disk.assert_qemu_finds_it_clean();
    }
}

/// What a client did is over when its descriptors are closed.
fn settled(worker: u32, before: usize) {
    let last = std::cell::Cell::new(0);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        last.set(descriptors(worker));
        if last.get() <= before {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{} descriptors are open, {before} were before", last.get());
}

/// Ways to abuse a server.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Bytes instead of a negotiation.
    Noise,
    /// Bytes instead of requests.
    LateNoise,
    /// A word at the head of a frame that is not its own.
    Magic,
    /// A frame that ends too early.
    Cut,
    /// A length that no server should believe.
    Length,
    /// A payload that never comes, half closed.
    HalfClosed,
    /// Options without end.
    Flood,
    /// Options whose data contradicts itself.
    Inside,
    /// Reads whose answers nobody takes.
    Deaf,
    /// Commands, flags and ranges at random.
    Requests,
}

const WAYS: [Way; 10] = [
    Way::Noise,
    Way::LateNoise,
    Way::Magic,
    Way::Cut,
    Way::Length,
    Way::HalfClosed,
    Way::Flood,
    Way::Inside,
    Way::Deaf,
    Way::Requests,
];

fn hello() -> Vec<u8> {
    3u32.to_be_bytes().to_vec()
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

fn request(command: u16, flags: u16, at: u64, len: u32) -> Vec<u8> {
    let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend(77u64.to_be_bytes());
    out.extend(at.to_be_bytes());
    out.extend(len.to_be_bytes());
    out
}

/// Hello and GO: the transmission phase.
fn start() -> Vec<u8> {
    [hello(), option(7, &[0; 6])].concat()
}

fn abuse(server: &Server, way: Way, random: &mut Random) -> io::Result<()> {
    let mut stream = UnixStream::connect(server.socket())?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    let words = 1 + random.below(2000) as usize;
    let noise = random.bytes(8 * words);
    match way {
        Way::Noise => stream.write_all(&noise)?,
        Way::LateNoise => stream.write_all(&[start(), noise].concat())?,
        Way::Magic => {
            let magics = [
                0x1256_0953u32,
                0x9674_4668,
                0x2560_9514,
                0x21e4_1c71,
                0,
                u32::MAX,
            ];
            let mut wrong = request(0, 0, 0, 512);
            let magic = magics[random.below(magics.len() as u64) as usize];
            wrong[..4].copy_from_slice(&magic.to_be_bytes());
            stream.write_all(&[start(), wrong].concat())?;
        }
        Way::Cut => {
            let all = [
                start(),
                request(1, 0, 0, 4096),
                vec![7; 4096],
                request(3, 0, 0, 0),
            ]
            .concat();
            let len = random.below(all.len() as u64) as usize;
            stream.write_all(&all[..len])?;
        }
        Way::Length => {
            let lens = [u32::MAX, 1 << 31, (32 << 20) + 1, (64 << 10) + 1];
            let len = lens[random.below(4) as usize];
            let frame = match random.below(3) {
                0 => {
                    let mut long = option(7, &[0; 6]);
                    long[12..16].copy_from_slice(&len.to_be_bytes());
                    [hello(), long].concat()
                }
                1 => [start(), request(1, 0, 0, len)].concat(),
                _ => [start(), request(0, 0, 0, len)].concat(),
            };
            stream.write_all(&frame)?;
        }
        Way::HalfClosed => {
            stream.write_all(&[start(), request(1, 0, 0, 32 << 20)].concat())?;
            stream.write_all(&noise)?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new())?;
        }
        Way::Flood => {
            stream.write_all(&hello())?;
            let one = option(random.below(20) as u32 + 8, &noise[..8]);
            for _ in 0..200 {
                stream.write_all(&one)?;
            }
        }
        Way::Inside => {
            stream.write_all(&[hello(), option(8, b"")].concat())?;
            for number in [6, 9, 10, 7] {
                let mut data = random.bytes(64);
                // Small counts and lengths reach further than large ones.
                data[..4].copy_from_slice(&(random.below(80) as u32).to_be_bytes());
                stream.write_all(&option(number, &data))?;
            }
        }
        Way::Deaf => {
            stream.write_all(&start())?;
            stream.set_write_timeout(Some(Duration::from_millis(20)))?;
            let reads = request(0, 0, 0, 1 << 20).repeat(400);
            // A full socket is the server's refusal to take more.
            let _ = stream.write_all(&reads);
        }
        Way::Requests => {
            let mut all = start();
            for _ in 0..50 {
                // No writes: the good client's data must stay.
                let command = [0, 3, 5, 7, 8, 99][random.below(6) as usize];
                let at = [0, random.next(), u64::MAX, 64 << 20][random.below(4) as usize];
                all.extend(request(
                    command,
                    random.next() as u16,
                    at,
                    random.below(9000) as u32,
                ));
            }
            stream.write_all(&all)?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new())?;
        }
    }
    Ok(())
}
