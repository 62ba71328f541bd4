//! Any bytes from an NBD client: to the negotiation alone, and to a whole server behind one.

use crate::device::Device;
use crate::disk::Disk;
use crate::io::exec::{self, Engine};
use crate::io::memfd::SharedWords;
use crate::serve::nbd::handshake::{Handshake, Offer, Step, Tls};
use crate::serve::nbd::limits;
use crate::serve::nbd::proto::{IHAVEOPT, OPTION_REPLY, REQUEST, command, option};
use crate::serve::nbd::{Options, Server};
use crate::stack::AnyLayer;
use crate::tracker::{Blocks, Name, Registry};
use bytes::{Buf, BufMut, BytesMut};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::{Header, Ploop, Version, create};
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::units::ClusterSize;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const NAME: &str = "disk";

/// A tracker with a generation.
static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let words = SharedWords::create(2).expect("two words");
    let set = Arc::new(Blocks::new(words, 16).expect("a set"));
    let name: Name = "b0".parse().expect("a name");
    let registry = Registry::default();
    registry.begin(&name, 0, Arc::clone(&set));
    registry.add(&name, 0, 0, set);
    registry
});

fn offer() -> Offer<'static> {
    Offer {
        name: NAME,
        description: "a disk",
        size: SIZE,
        read_only: false,
        preferred: 65536,
        registry: Some(&REGISTRY),
    }
}

/// What a client gets for one option at most: one that lists contexts names three.
const REPLY_MAX: usize = 32 << 10;

/// Bytes of a client from its flags on; the first byte says in how large pieces they arrive.
pub fn handshake(input: &[u8]) {
    let Some((piece, input)) = input.split_first() else {
        return;
    };
    let piece = usize::from(*piece).max(1) * 7;
    for tls in [Tls::Off, Tls::Allowed, Tls::Required] {
        negotiation(tls, piece, input);
    }
}

fn negotiation(tls: Tls, piece: usize, input: &[u8]) {
    let (mut state, mut waiting) = (Handshake::new(tls), BytesMut::new());
    let offer = offer();
    let mut silent = tls == Tls::Required;
    for bytes in input.chunks(piece) {
        waiting.extend_from_slice(bytes);
        loop {
            let mut out = Vec::new();
            let before = waiting.len();
            let step = state.advance(&offer, &mut waiting, &mut out);
            well_formed(&out);
            assert!(out.len() <= REPLY_MAX * (1 + before / 16));
            let told = out.windows(4).any(|w| w == NAME.as_bytes());
            assert!(!silent || !told && !matches!(step, Step::Start(_)));
            match step {
                Step::More => break,
                Step::Abort | Step::Drop(_) => return,
                Step::StartTls => {
                    assert!(waiting.is_empty() && tls != Tls::Off);
                    silent = false;
                }
                Step::Start(start) => {
                    let mut out = Vec::new();
                    state.accept(&offer, &start, &mut out);
                    assert!(!out.is_empty() && out.len() <= REPLY_MAX);
                    // As when all seats are taken: the negotiation goes on where it can.
                    let mut out = Vec::new();
                    if !state.refuse(&start, "full", &mut out) {
                        return;
                    }
                    well_formed(&out);
                }
            }
        }
        let most = 16 + limits::OPTION_DATA_MAX as usize + piece;
        assert!(waiting.len() <= most, "{} bytes wait", waiting.len());
    }
}

/// Nothing but whole option replies.
fn well_formed(mut out: &[u8]) {
    while !out.is_empty() {
        assert!(out.len() >= 20, "a reply that is cut");
        assert_eq!(out.get_u64(), OPTION_REPLY);
        out.advance(8);
        let len = out.get_u32() as usize;
        assert!(len <= out.len() && len <= limits::TEXT_MAX + 64, "{len}");
        out.advance(len);
    }
}

fn put_option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.put_u64(IHAVEOPT);
    out.put_u32(number);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

/// A name, a number, and the strings that it counts.
fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.put_slice(query.as_bytes());
    }
    data
}

/// A negotiation that ends in the transmission phase of a style.
fn agreement(style: u8) -> Vec<u8> {
    let mut out = 3u32.to_be_bytes().to_vec();
    match style % 3 {
        0 => {}
        1 => put_option(&mut out, option::STRUCTURED_REPLY, b""),
        _ => put_option(&mut out, option::EXTENDED_HEADERS, b""),
    }
    if !style.is_multiple_of(3) {
        let contexts = queries("", &["base:allocation", "qemu:"]);
        put_option(&mut out, option::SET_META_CONTEXT, &contexts);
    }
    put_option(&mut out, option::GO, &[0; 6]);
    out
}

/// Negotiations of real clients, and every option.
pub fn handshake_seeds() -> Vec<(String, Vec<u8>)> {
    let mut every = 3u32.to_be_bytes().to_vec();
    for number in 3..=12 {
        let data = match number {
            option::INFO | option::GO => vec![0, 0, 0, 4, b'd', b'i', b's', b'k', 0, 1, 0, 3],
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => queries("disk", &["base:"]),
            _ => Vec::new(),
        };
        put_option(&mut every, number, &data);
    }
    put_option(&mut every, option::ABORT, b"");
    let mut old = 0u32.to_be_bytes().to_vec();
    put_option(&mut old, option::EXPORT_NAME, b"disk");
    let styles = (0..3).map(|style| (format!("style-{style}"), agreement(style)));
    let all = styles.chain([("every".into(), every), ("old".into(), old)]);
    let sizes = |(name, bytes): (String, Vec<u8>)| {
        [1, 255].map(|piece| (format!("{name}-{piece}"), [&[piece], &bytes[..]].concat()))
    };
    all.flat_map(sizes).collect()
}

fn disk() -> Disk<MemStore> {
    let store = MemStore::new(0);
    let cluster = ClusterSize::new(64 << 10).expect("a legal cluster");
    let header = Header::new(Version::V2, SIZE, cluster).expect("a legal size");
    let layer = now(async {
        create::create(&store, &header)
            .await
            .expect("memory takes all");
        Ploop::open_write(store, Ledger::local()).await
    });
    let layer = AnyLayer::Ploop(layer.expect("a new image opens"));
    Disk::new(vec![layer], false).expect("one layer")
}

/// Bytes of a client from the transmission phase on, to a whole server over a socket; the first
/// byte chooses the style. The server ends when the client does, and the disk closes cleanly.
pub fn transmission(input: &[u8]) {
    let Some((style, input)) = input.split_first() else {
        return;
    };
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    for stream in [&ours, &theirs] {
        let patience = Some(Duration::from_secs(20));
        stream.set_write_timeout(patience).expect("a socket");
        stream.set_read_timeout(patience).expect("a socket");
    }
    let device = Arc::new(disk());
    std::thread::scope(|scope| {
        let (mut sender, mut receiver) = (&ours, &ours);
        scope.spawn(move || {
            // It may hang up at any time.
            let _ = sender.write_all(&agreement(*style));
            let _ = sender.write_all(input);
            let _ = sender.shutdown(Shutdown::Write);
        });
        let answers = scope.spawn(move || io::copy(&mut receiver, &mut io::sink()));
        let fd: Arc<OwnedFd> = Arc::new(theirs.into());
        let server = Server::new(Arc::clone(&device), Options::default(), Engine::Poll);
        let server = server.expect("default options");
        let session = async {
            server
                .serve_connection(Arc::clone(&fd), Arc::clone(&fd))
                .await
        };
        // A client that breaks the protocol is told of as an error, which is as well.
        let _ = exec::run(Engine::Poll, session).expect("an executor");
        assert_eq!(server.connections(), 0, "a seat is still taken");
        drop(fd);
        if let Err(e) = answers.join().expect("a reader") {
            assert_eq!(
                e.kind(),
                io::ErrorKind::ConnectionReset,
                "no end of answers"
            );
        }
    });
    assert_eq!(device.size(), SIZE);
    now(device.close()).expect("memory takes all");
}

/// One of every command in every style, and one whose payload is missing.
pub fn transmission_seeds() -> Vec<(String, Vec<u8>)> {
    let one = |style: u8| {
        let mut out = vec![style];
        for number in [1, 0, 3, 4, 5, 6, 7, 2u16] {
            let len = if number == command::FLUSH || number == command::DISC {
                0
            } else {
                4096
            };
            let flags = u16::from(style == 2 && number == command::WRITE) << 5;
            out.put_u32(if style == 2 { 0x21e4_1c71 } else { REQUEST });
            out.put_u16(flags);
            out.put_u16(number);
            out.put_u64(u64::from(number));
            out.put_u64(65536 - 512);
            if style == 2 {
                out.put_u64(len);
            } else {
                out.put_u32(len as u32);
            }
            if number == command::WRITE {
                out.put_bytes(0xA5, len as usize);
            }
        }
        out
    };
    (0..3)
        .flat_map(|style| {
            let whole = one(style);
            let mut cut = whole.clone();
            cut.truncate(2000);
            [
                (format!("all-{style}"), whole),
                (format!("cut-{style}"), cut),
            ]
        })
        .collect()
}
