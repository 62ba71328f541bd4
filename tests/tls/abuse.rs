//! TLS clients that mean harm: whatever one does, the others are served and nothing stays held.

use crate::client::{self, Secure, ask, connect, greeted, message, option, secure};
use crate::common::files::Random;
use crate::common::process::eventually;
use crate::common::serve::Server;
use crate::{PATIENCE, Scene};
use rustls::{ClientConnection, pki_types::ServerName};
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

const ABUSIVE: u64 = 500;
/// The worker may have grown by so much.
const KEPT_MAX: u64 = 64 << 20;

/// Ways to abuse a server.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Bytes instead of a handshake.
    Noise,
    /// A record that says what it is and is longer than a record may be.
    LongRecord,
    /// A handshake message that claims to be of 16 MiB.
    LongMessage,
    /// A handshake that stops half-way.
    Half,
    /// A handshake whose bytes are not as they were.
    Flipped,
    /// Alerts without end.
    Alerts,
    /// No certificate, and requests all the same.
    Nobody,
    /// Bytes in the clear after a good handshake.
    LateNoise,
    /// Nonsense under TLS.
    Inside,
    /// A good client that vanishes in the middle of a write.
    Vanishing,
    /// Reads whose answers nobody takes.
    Deaf,
}

const WAYS: [Way; 11] = [
    Way::Noise,
    Way::LongRecord,
    Way::LongMessage,
    Way::Half,
    Way::Flipped,
    Way::Alerts,
    Way::Nobody,
    Way::LateNoise,
    Way::Inside,
    Way::Vanishing,
    Way::Deaf,
];

/// The first message of a client.
pub fn client_hello(folder: &Path) -> Vec<u8> {
    let config = client::config(folder, rustls::ALL_VERSIONS);
    let name = ServerName::try_from("localhost").unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

fn started(server: &Server) -> io::Result<UnixStream> {
    let mut stream = greeted(server.socket())?;
    ask(&mut stream, option::STARTTLS, b"")?;
    Ok(stream)
}

fn agreed(scene: &Scene, server: &Server) -> io::Result<Secure> {
    let config = client::config(&scene.client, rustls::ALL_VERSIONS);
    let mut stream = secure(server.socket(), config)?;
    stream.write_all(&message(option::GO, &[0; 6]))?;
    stream.flush()?;
    Ok(stream)
}

fn request(command: u16, len: u32) -> Vec<u8> {
    let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
    out.extend([0, 0]);
    out.extend(command.to_be_bytes());
    out.extend([7; 8]);
    // Away from what the good client keeps.
    out.extend((32u64 << 20).to_be_bytes());
    out.extend(len.to_be_bytes());
    out
}

fn abuse(scene: &Scene, server: &Server, way: Way, random: &mut Random) -> io::Result<()> {
    let words = 1 + random.below(2000) as usize;
    let noise = random.bytes(8 * words);
    let hear_out = |mut stream: UnixStream| {
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new()).map(drop)
    };
    match way {
        Way::Noise => {
            let mut stream = started(server)?;
            stream.write_all(&noise)?;
            hear_out(stream)
        }
        Way::LongRecord => {
            let mut stream = started(server)?;
            let kind = [20, 21, 22, 23, 24][random.below(5) as usize];
            stream.write_all(&[kind, 3, 3, 0xff, 0xff])?;
            stream.write_all(&noise)?;
            hear_out(stream)
        }
        Way::LongMessage => {
            let mut stream = started(server)?;
            stream.write_all(&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff])?;
            stream.write_all(&vec![0; 0x4000 - 4])?;
            for _ in 0..64 {
                stream.write_all(&[22, 3, 1, 0x40, 0])?;
                stream.write_all(&vec![0; 0x4000])?;
            }
            hear_out(stream)
        }
        Way::Half => {
            let mut stream = started(server)?;
            let hello = client_hello(&scene.nobody);
            stream.write_all(&hello[..random.below(hello.len() as u64) as usize])
        }
        Way::Flipped => {
            let mut stream = started(server)?;
            let mut hello = client_hello(&scene.nobody);
            for _ in 0..3 {
                let at = random.below(hello.len() as u64) as usize;
                hello[at] ^= 1 << random.below(8);
            }
            stream.write_all(&hello)?;
            hear_out(stream)
        }
        Way::Alerts => {
            let mut stream = started(server)?;
            stream.write_all(&[21, 3, 3, 0, 2, 1, 90].repeat(1000))?;
            hear_out(stream)
        }
        Way::Nobody => {
            let config = client::config(&scene.nobody, rustls::ALL_VERSIONS);
            let mut stream = secure(server.socket(), config)?;
            stream.write_all(&message(option::GO, &[0; 6]))?;
            stream.write_all(&request(1, 4096))?;
            stream.write_all(&[0xEE; 4096])?;
            stream.read_to_end(&mut Vec::new()).map(drop)
        }
        Way::LateNoise => {
            let mut stream = agreed(scene, server)?;
            stream.sock.write_all(&noise)?;
            hear_out(stream.sock)
        }
        Way::Inside => {
            let mut stream = agreed(scene, server)?;
            stream.write_all(&noise)?;
            stream.flush()?;
            hear_out(stream.sock)
        }
        Way::Vanishing => {
            let mut stream = agreed(scene, server)?;
            stream.write_all(&request(1, 8 << 20))?;
            stream.write_all(&noise)
        }
        Way::Deaf => {
            let mut stream = agreed(scene, server)?;
            let reads = request(0, 1 << 20).repeat(100);
            let _ = stream.write_all(&reads);
            stream.flush()
        }
    }
}

#[test]
fn five_hundred_abusive_tls_sessions_leave_nothing_behind() {
    let scene = Scene::new();
    let server = scene.serve(&[]);
    good_client(&scene, &server, 1);
    let worker = || {
        let pid = crate::common::attach::listed(&scene.disk.path())?["worker_pid"].as_u64()?;
        Some(pid).filter(|pid| *pid > 0)
    };
    let first = eventually("a worker", PATIENCE, worker);
    let descriptors = || fs::read_dir(format!("/proc/{first}/fd")).unwrap().count();
    let (before, held) = (descriptors(), memory(first));
    let mut random = Random::new(5);
    let mut refused = 0;
    for round in 0..ABUSIVE {
        let way = WAYS[(round as usize) % WAYS.len()];
        if let Err(e) = abuse(&scene, &server, way, &mut random) {
            let hangs = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
            assert!(!hangs.contains(&e.kind()), "{way:?}: {e}");
            refused += 1;
        }
        if round % 25 == 0 {
            good_client(&scene, &server, round);
        }
    }
    good_client(&scene, &server, ABUSIVE);
    eventually("the end of all that they held", PATIENCE, || {
        (descriptors() <= before).then_some(())
    });
    let kept = memory(first).saturating_sub(held);
    println!(
        "COUNT: abusive TLS sessions: {ABUSIVE}, {refused} hung up on, the worker grew by {} KiB",
        kept >> 10
    );
    assert!(kept < KEPT_MAX, "{kept} bytes stayed");
    assert_eq!(worker(), Some(first), "another worker: the first one died");
    server.stop();
    scene.disk.assert_qemu_finds_it_clean();
}

fn good_client(scene: &Scene, server: &Server, round: u64) {
    let data = Random::new(round).bytes(4096);
    let mut good = connect(server.socket(), &scene.client).unwrap();
    assert_eq!(good.write(4096, &data).unwrap(), 0);
    assert_eq!(good.read(4096, 4096).unwrap(), data);
    good.disconnect().unwrap();
}

/// Bytes of memory that a process has, now.
fn memory(pid: u64) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}
