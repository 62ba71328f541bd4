//! The NBD server as a client sees it: bytes over a socket, legal and not.
//!
//! The client here is written from the protocol text, independently of the server's own encoders.
//! Every promise is tested under both engines; a good client connects after each outrage.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ploop::device::{Device, GuestExtent, Zero};
use ploop::io::exec::{self, Engine};
use ploop::serve::nbd::{Export, Options, Server};
use ploop::{Error, Kind};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::watch;

const SIZE: u64 = 80 << 20;
const MIB: u32 = 1 << 20;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

const ACK: u32 = 1;
const ERR_POLICY: u32 = 0x8000_0002;

/// A disk in memory that records what it is asked and can be told to wait or to fail.
struct Disk {
    data: Mutex<Vec<u8>>,
    log: Mutex<Vec<String>>,
    read_only: bool,
    /// Requests wait while it is closed (true).
    gate: watch::Sender<bool>,
    started: AtomicUsize,
    failure: Mutex<Option<Kind>>,
}

impl Disk {
    fn new() -> Self {
        Self {
            data: Mutex::new(vec![0; SIZE as usize]),
            log: Mutex::default(),
            read_only: false,
            gate: watch::Sender::new(false),
            started: AtomicUsize::new(0),
            failure: Mutex::default(),
        }
    }

    fn close_gate(&self) {
        self.gate.send_replace(true);
    }

    fn open_gate(&self) {
        self.gate.send_replace(false);
    }

    async fn enter(&self, what: String) -> ploop::Result<()> {
        self.started.fetch_add(1, Ordering::SeqCst);
        self.gate.subscribe().wait_for(|closed| !closed).await.expect("the gate is ours");
        self.log.lock().unwrap().push(what);
        match *self.failure.lock().unwrap() {
            Some(kind) => Err(Error::new(kind, "the disk was told to fail")),
            None => Ok(()),
        }
    }

    fn fail(&self, kind: Option<Kind>) {
        *self.failure.lock().unwrap() = kind;
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    fn wait_started(&self, count: usize) {
        wait_until("requests to start", || self.started.load(Ordering::SeqCst) >= count);
    }
}

impl Device for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn preferred_block(&self) -> u64 {
        65536
    }

    async fn read(&self, at: u64, mut buf: BytesMut) -> ploop::Result<BytesMut> {
        assert_eq!(buf.as_ptr() as usize % 4096, 0, "direct I/O reads into aligned memory");
        self.enter(format!("read {at} {}", buf.len())).await?;
        let data = self.data.lock().unwrap();
        let len = buf.len();
        buf.copy_from_slice(&data[at as usize..][..len]);
        Ok(buf)
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> ploop::Result<()> {
        assert_eq!(data.as_ptr() as usize % 4096, 0, "direct I/O writes from aligned memory");
        self.enter(format!("write {at} {} {fua}", data.len())).await?;
        self.data.lock().unwrap()[at as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> ploop::Result<()> {
        self.enter(format!("zero {at} {len} {how:?} {fua}")).await?;
        if how == Zero::Fast {
            return Err(Error::unsupported("not faster here"));
        }
        self.data.lock().unwrap()[at as usize..][..len as usize].fill(0);
        Ok(())
    }

    async fn discard(&self, at: u64, len: u64) -> ploop::Result<()> {
        self.enter(format!("discard {at} {len}")).await
    }

    async fn flush(&self) -> ploop::Result<()> {
        self.enter("flush".into()).await
    }

    /// Blocks of 64 KiB, by number modulo 3: data in the top, data below, hole.
    async fn extents(&self, at: u64, len: u64, max: usize) -> ploop::Result<Vec<GuestExtent>> {
        self.enter(format!("extents {at} {len} {max}")).await?;
        let (mut extents, mut at, end) = (Vec::new(), at, at + len);
        while at < end && extents.len() < max {
            let (block, next) = (at / 65536, end.min((at / 65536 + 1) * 65536));
            let hole = block % 3 == 2;
            let depth = if hole { 0 } else { (block % 3) as u32 + 1 };
            extents.push(GuestExtent { len: next - at, zero: hole, hole, depth });
            at = next;
        }
        Ok(extents)
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A server on its own thread and socket.
struct Serving {
    disk: Arc<Disk>,
    server: Server<Disk>,
    socket: PathBuf,
    thread: Option<JoinHandle<ploop::Result<()>>>,
    _folder: tempfile::TempDir,
}

impl Serving {
    fn new(engine: Engine, disk: Disk, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd");
        let listener = UnixListener::bind(&socket).unwrap();
        let disk = Arc::new(disk);
        let server = Server::new(Arc::clone(&disk), options, engine).unwrap();
        let serving = server.clone();
        let thread = std::thread::spawn(move || {
            exec::run(engine, async move { serving.serve(vec![listener.into()]).await }).unwrap()
        });
        Self { disk, server, socket, thread: Some(thread), _folder: folder }
    }

    fn plain(engine: Engine) -> Self {
        Self::new(engine, Disk::new(), Options::default())
    }

    fn connect(&self) -> Client {
        Client::over(UnixStream::connect(&self.socket).unwrap())
    }

    /// A client in the transmission phase.
    fn client(&self, style: Style) -> Client {
        let mut client = self.connect();
        client.hello(3);
        client.agree(style);
        client.go("").expect("a place");
        client
    }

    /// A good client finds everything in order.
    fn check(&self) {
        let mut client = self.client(Style::Structured);
        client.check_in_step();
        client.send(0, DISC, 1, 0, 0, b"");
        client.expect_end();
    }

    fn join(&mut self) -> ploop::Result<()> {
        let thread = self.thread.take().expect("joined once");
        wait_until("the server to end", || thread.is_finished());
        thread.join().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.server.stop();
        if self.thread.is_some() && !std::thread::panicking() {
            self.join().unwrap();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Style {
    Simple,
    Structured,
    Extended,
}

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

#[derive(Debug, Default, PartialEq, Eq)]
struct Reply {
    cookie: u64,
    errno: u32,
    data: Vec<u8>,
    /// By context: lengths and status words.
    status: Vec<(u32, Vec<(u64, u64)>)>,
}

struct Client {
    stream: UnixStream,
    style: Style,
    size: u64,
    flags: u16,
}

impl Client {
    fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream, style: Style::Simple, size: 0, flags: 0 }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn get(&mut self, len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes.into()
    }

    /// The server closes, whatever it had to say before.
    fn expect_end(&mut self) {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return,
                Err(e) => panic!("the server did not close: {e}"),
            }
        }
    }

    fn hello(&mut self, flags: u32) {
        let mut hello = self.get(18);
        assert_eq!(hello.split_to(16), Bytes::from_static(b"NBDMAGICIHAVEOPT"));
        assert_eq!(hello.get_u16(), 3);
        self.put(&flags.to_be_bytes());
    }

    fn option(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Bytes)> {
        self.put(&option(number, data));
        self.option_replies(number)
    }

    /// Replies up to the one that ends the option: an ACK or an error.
    fn option_replies(&mut self, number: u32) -> Vec<(u32, Bytes)> {
        let mut replies = Vec::new();
        loop {
            let mut head = self.get(20);
            assert_eq!(head.get_u64(), 0x0003_e889_0455_65a9);
            assert_eq!(head.get_u32(), number);
            let (kind, len) = (head.get_u32(), head.get_u32());
            replies.push((kind, self.get(len as usize)));
            if kind == ACK || kind & 0x8000_0000 != 0 {
                return replies;
            }
        }
    }

    fn agree(&mut self, style: Style) {
        let number = match style {
            Style::Simple => return,
            Style::Structured => 8,
            Style::Extended => 11,
        };
        assert_eq!(self.option(number, b""), [(ACK, Bytes::new())]);
        self.style = style;
        let both = ["base:allocation", "qemu:allocation-depth"];
        let replies = self.option(10, &query_data("", &both));
        assert_eq!(replies.len(), 3);
    }

    fn go(&mut self, name: &str) -> Result<(), u32> {
        let replies = self.option(7, &info_data(name, &[]));
        let (end, pieces) = replies.split_last().unwrap();
        if end.0 != ACK {
            return Err(end.0);
        }
        let mut export = pieces.iter().map(|(_, data)| data.clone()).find(|d| d[..2] == [0, 0]).unwrap();
        export.advance(2);
        (self.size, self.flags) = (export.get_u64(), export.get_u16());
        Ok(())
    }

    fn send(&mut self, flags: u16, command: u16, cookie: u64, at: u64, len: u64, payload: &[u8]) {
        let mut bytes = request(self.style, flags, command, cookie, at, len);
        bytes.extend_from_slice(payload);
        self.put(&bytes);
    }

    fn write(&mut self, flags: u16, cookie: u64, at: u64, payload: &[u8]) {
        let flags = flags | if self.style == Style::Extended { PAYLOAD_LEN } else { 0 };
        self.send(flags, WRITE, cookie, at, payload.len() as u64, payload);
    }

    /// Sends a request and takes its reply.
    fn ask(&mut self, flags: u16, command: u16, at: u64, len: u64) -> Reply {
        self.send(flags, command, 0xc00c1e, at, len, b"");
        self.reply(if command == READ { len } else { 0 })
    }

    fn ask_write(&mut self, flags: u16, at: u64, payload: &[u8]) -> Reply {
        self.write(flags, 0xc00c1e, at, payload);
        self.reply(0)
    }

    /// The next reply; `read` bytes follow a simple one that succeeds.
    fn reply(&mut self, read: u64) -> Reply {
        if self.style != Style::Simple {
            return self.chunks();
        }
        let mut head = self.get(16);
        assert_eq!(head.get_u32(), 0x6744_6698);
        let (errno, cookie) = (head.get_u32(), head.get_u64());
        let data = self.get(if errno == 0 { read as usize } else { 0 }).to_vec();
        Reply { cookie, errno, data, ..Reply::default() }
    }

    fn chunks(&mut self) -> Reply {
        let mut reply = Reply::default();
        loop {
            let extended = self.style == Style::Extended;
            let mut head = self.get(if extended { 32 } else { 20 });
            assert_eq!(head.get_u32(), if extended { 0x6e8a_278c } else { 0x668e_33ef });
            let (flags, kind) = (head.get_u16(), head.get_u16());
            reply.cookie = head.get_u64();
            if extended {
                head.advance(8);
            }
            let len = if extended { head.get_u64() } else { u64::from(head.get_u32()) };
            let mut content = self.get(len as usize);
            match kind {
                0 => assert!(flags == 1 && len == 0),
                1 => {
                    assert!(len >= 9, "data is not empty");
                    content.advance(8);
                    reply.data.extend_from_slice(&content);
                }
                5 | 6 => {
                    assert_eq!(kind == 6, extended);
                    reply.status.push(status(content, extended));
                }
                0x8001 => {
                    reply.errno = content.get_u32();
                    assert_eq!(content.get_u16() as usize, content.len());
                    assert!(reply.errno != 0 && std::str::from_utf8(&content).is_ok());
                }
                other => panic!("chunk type {other:#x}"),
            }
            if flags & 1 != 0 {
                return reply;
            }
        }
    }

    /// A write and a read say whether client and server still understand each other.
    fn check_in_step(&mut self) {
        let pattern: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
        assert_eq!(self.ask_write(0, 40 << 20, &pattern).errno, 0);
        let reply = self.ask(0, READ, 40 << 20, 4096);
        assert_eq!((reply.cookie, reply.errno), (0xc00c1e, 0));
        assert!(reply.data == pattern);
    }
}

fn status(mut content: Bytes, extended: bool) -> (u32, Vec<(u64, u64)>) {
    let context = content.get_u32();
    if extended {
        assert_eq!(content.get_u32() as usize * 16, content.len());
    }
    let mut extents = Vec::new();
    while !content.is_empty() {
        extents.push(if extended {
            (content.get_u64(), content.get_u64())
        } else {
            (u64::from(content.get_u32()), u64::from(content.get_u32()))
        });
    }
    assert!(!extents.is_empty() && extents.iter().all(|(len, _)| *len != 0));
    (context, extents)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.put_u32(number);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(data);
    bytes
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.put_slice(name.as_bytes());
    data.put_u16(wanted.len() as u16);
    wanted.iter().for_each(|info| data.put_u16(*info));
    data
}

fn query_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.put_slice(name.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.put_slice(query.as_bytes());
    }
    data
}

fn request(style: Style, flags: u16, command: u16, cookie: u64, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(if style == Style::Extended { 0x21e4_1c71 } else { 0x2560_9513 });
    bytes.put_u16(flags);
    bytes.put_u16(command);
    bytes.put_u64(cookie);
    bytes.put_u64(at);
    match style {
        Style::Extended => bytes.put_u64(len),
        _ => bytes.put_u32(len.try_into().expect("compact lengths have 32 bits")),
    }
    bytes
}

/// Both, where this machine has both.
fn engines() -> Vec<Engine> {
    match Engine::detect().0 {
        Engine::Ring => vec![Engine::Ring, Engine::Poll],
        Engine::Poll => vec![Engine::Poll],
    }
}

fn for_each_engine(test: impl Fn(Engine)) {
    for engine in engines() {
        eprintln!("engine {engine:?}");
        test(engine);
    }
}

fn for_each_style(test: impl Fn(&Serving, Style)) {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        for style in STYLES {
            eprintln!("style {style:?}");
            test(&serving, style);
        }
        serving.check();
    });
}

#[test]
fn unknown_client_flags_end_the_connection() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        for flags in [4, 0x1_0000, u32::MAX] {
            let mut client = serving.connect();
            client.hello(flags);
            client.expect_end();
        }
        serving.check();
    });
}

#[test]
fn options_that_fail_leave_the_negotiation_in_step() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.connect();
        client.hello(3);
        let longer = "n".repeat(4097);
        let wrong: Vec<(u32, Vec<u8>, u32)> = vec![
            (3, vec![1], 3),
            (4, vec![], 1),
            (5, vec![], 1),
            (6, info_data("nobody", &[]), 6),
            (6, vec![0xff; 8], 3),
            (7, info_data(&longer, &[]), 9),
            (7, info_data("nobody", &[3]), 6),
            (8, vec![0], 3),
            (9, query_data("", &[]), 3),
            (10, query_data("", &["base:allocation"]), 3),
            (11, vec![0], 3),
            (12, vec![0; 65536], 1),
            (u32::MAX, vec![], 1),
        ];
        for (number, data, error) in wrong {
            let replies = client.option(number, &data);
            assert_eq!(replies.last().unwrap().0, 0x8000_0000 | error, "option {number}");
            let list = client.option(3, b"");
            assert_eq!(list[0], (2, Bytes::from_static(&[0; 4])));
        }
        assert_eq!(client.option(2, b"").len(), 1);
        client.expect_end();
        serving.check();
    });
}

#[test]
fn too_much_negotiation_ends_the_connection() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.connect();
        client.hello(3);
        for _ in 0..32 {
            client.option(3, b"");
        }
        client.put(&option(3, b""));
        client.expect_end();
        let mut client = serving.connect();
        client.hello(3);
        client.put(&[b"IHAVEOPT", &[0, 0, 0, 3, 0, 1, 0, 1][..]].concat());
        client.expect_end();
        serving.check();
    });
}

#[test]
fn an_export_is_listed_described_and_reached_by_both_its_names() {
    for_each_engine(|engine| {
        let export = Export { name: "root".into(), description: "a disk".into() };
        let serving = Serving::new(engine, Disk::new(), Options { export, ..Options::default() });
        let mut client = serving.connect();
        client.hello(3);
        assert_eq!(client.option(3, b"")[0], (2, Bytes::from_static(b"\0\0\0\x04root")));
        let pieces = client.option(6, &info_data("root", &[1, 2, 3]));
        let texts: Vec<_> = pieces.iter().map(|(_, data)| data.clone()).collect();
        assert!(texts.contains(&Bytes::from_static(b"\0\x01root")));
        assert!(texts.contains(&Bytes::from_static(b"\0\x02a disk")));
        assert!(texts.contains(&Bytes::from_static(b"\0\x03\0\0\0\x01\0\x01\0\0\x02\0\0\0")));
        client.go("root").unwrap();
        assert_eq!((client.size, client.flags), (SIZE, 0x0d6d));
        client.check_in_step();
        let mut client = serving.connect();
        client.hello(3);
        client.go("").unwrap();
        client.check_in_step();
    });
}

#[test]
fn old_clients_start_with_export_name() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        for (flags, padding) in [(0, 124), (1, 124), (3, 0)] {
            let mut client = serving.connect();
            client.hello(flags);
            client.put(&option(1, b""));
            let mut export = client.get(10 + padding);
            assert_eq!(export.get_u64(), SIZE);
            client.check_in_step();
        }
        for name in [&b"nobody"[..], &[b'n'; 4097]] {
            let mut client = serving.connect();
            client.hello(3);
            client.put(&option(1, name));
            client.expect_end();
        }
        let mut client = serving.connect();
        client.hello(3);
        client.option(11, b"");
        client.put(&option(1, b""));
        client.expect_end();
        serving.check();
    });
}

#[test]
fn requests_sent_together_with_go_are_served() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.connect();
        client.hello(3);
        let mut all = option(7, &info_data("", &[]));
        all.extend(request(Style::Simple, 0, WRITE, 5, 4096, 3000));
        all.extend([7; 3000]);
        all.extend(request(Style::Simple, 0, FLUSH, 6, 0, 0));
        client.put(&all);
        assert_eq!(client.option_replies(7).last().unwrap().0, ACK);
        let cookies = [client.reply(0), client.reply(0)].map(|reply| (reply.cookie, reply.errno));
        assert_eq!(cookies, [(5, 0), (6, 0)]);
        assert_eq!(client.ask(0, READ, 4096, 3000).data, [7; 3000]);
    });
}

#[test]
fn every_command_reaches_the_device_with_its_flags() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        serving.disk.take_log();
        assert_eq!(client.ask_write(0, 512, &[1; 1024]).errno, 0);
        assert_eq!(client.ask_write(FUA, 1536, &[2; 512]).errno, 0);
        let reply = client.ask(FUA, READ, 1000, 1000);
        assert_eq!(reply.data, [&[1; 536][..], &[2; 464]].concat());
        for (flags, command, at, len) in [
            (FUA, FLUSH, 0, 0),
            (0, TRIM, 4096, 8192),
            (FUA, TRIM, 1, 2),
            (FUA, CACHE, 0, SIZE),
            (0, ZEROES, 0, 512),
            (NO_HOLE | FUA, ZEROES, 512, 100),
            (0, ZEROES, 0, SIZE),
        ] {
            let reply = client.ask(flags, command, at, len);
            assert_eq!((reply.cookie, reply.errno), (0xc00c1e, 0), "command {command}");
        }
        let expected = [
            "write 512 1024 false",
            "write 1536 512 true",
            "read 1000 1000",
            "flush",
            "discard 4096 8192",
            "discard 1 2",
            "flush",
            "zero 0 512 MayFree false",
            "zero 512 100 Allocate true",
            &format!("zero 0 {SIZE} MayFree false"),
        ];
        assert_eq!(serving.disk.take_log(), expected);
        assert_eq!(client.ask(FAST_ZERO, ZEROES, 0, 512).errno, ENOTSUP);
        assert_eq!(client.ask(FAST_ZERO | NO_HOLE, ZEROES, 0, 512).errno, ENOTSUP);
        client.check_in_step();
        client.send(0, DISC, 1, 0, 0, b"");
        client.expect_end();
    });
}

#[test]
fn illegal_requests_fail_with_the_value_of_the_text_and_change_nothing() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        serving.disk.take_log();
        let mut table = vec![
            (0, READ, SIZE - 1, 2, EINVAL),
            (0, READ, u64::MAX, 1, EINVAL),
            (0, READ, 0, 33 << 20, EINVAL),
            (NO_HOLE, READ, 0, 512, EINVAL),
            (0, TRIM, SIZE, 1, EINVAL),
            (NO_HOLE, TRIM, 0, 1, EINVAL),
            (0, CACHE, SIZE, 1, EINVAL),
            (0, ZEROES, SIZE - 511, 512, ENOSPC),
            (0, ZEROES, u64::MAX - 5, 512, ENOSPC),
            (DF, ZEROES, 0, 512, EINVAL),
            (0, FLUSH, 0, 512, EINVAL),
            (0, FLUSH, 512, 0, EINVAL),
            (REQ_ONE, FLUSH, 0, 0, EINVAL),
            (0, STATUS, SIZE, 1, EINVAL),
            (0, STATUS, 0, 0, EINVAL),
            (0, 8, 4096, 0, EINVAL),
            (0, 77, 0, 0, EINVAL),
            (1 << 15, READ, 0, 512, EINVAL),
        ];
        if style == Style::Simple {
            table.extend([(DF, READ, 0, 512, EINVAL), (PAYLOAD_LEN, READ, 0, 512, EINVAL)]);
        }
        for (flags, command, at, len, errno) in table {
            let reply = client.ask(flags, command, at, len);
            let asked = format!("{style:?} command {command} flags {flags} at {at} len {len}");
            assert_eq!((reply.cookie, reply.errno), (0xc00c1e, errno), "{asked}");
        }
        assert_eq!(serving.disk.take_log(), [""; 0]);
        client.check_in_step();
    });
}

#[test]
fn a_refused_write_takes_its_payload_along() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        for (flags, at, len, errno) in [
            (0, SIZE - 4, 5, ENOSPC),
            (0, u64::MAX, 1 << 20, ENOSPC),
            (NO_HOLE, 0, 3000, EINVAL),
            (DF, 0, 300_000, EINVAL),
            (0, SIZE, 32 << 20, ENOSPC),
        ] {
            let reply = client.ask_write(flags, at, &vec![0x25; len]);
            assert_eq!((reply.errno, reply.cookie), (errno, 0xc00c1e));
            client.check_in_step();
        }
    });
}

#[test]
fn an_unexpected_payload_is_swallowed() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.client(Style::Extended);
        for command in [READ, FLUSH, TRIM, CACHE, ZEROES, 8, 99] {
            client.send(PAYLOAD_LEN, command, 9, 0, 5000, &[0x21; 5000]);
            let reply = client.reply(0);
            assert_eq!((reply.cookie, reply.errno), (9, EINVAL), "command {command}");
            client.check_in_step();
        }
        // QEMU's client leaves the flag out on writes.
        client.send(0, WRITE, 9, 0, 600, &[3; 600]);
        assert_eq!(client.reply(0).errno, 0);
        assert_eq!(client.ask(0, READ, 0, 600).data, [3; 600]);
    });
}

#[test]
fn empty_requests_succeed() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        serving.disk.take_log();
        for at in [0, 4096, SIZE] {
            assert_eq!(client.ask_write(FUA, at, b"").errno, 0);
            for command in [READ, TRIM, CACHE, ZEROES] {
                let reply = client.ask(0, command, at, 0);
                assert_eq!((reply.errno, reply.data.len()), (0, 0), "command {command}");
            }
        }
        assert_eq!(client.ask_write(0, SIZE + 1, b"").errno, ENOSPC);
        assert_eq!(serving.disk.take_log(), [""; 0]);
        client.check_in_step();
    });
}

#[test]
fn payloads_up_to_32_mib_work_and_longer_ones_end_the_connection() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let big: Vec<u8> = (0..32 * MIB).map(|i| (i >> 9) as u8 ^ i as u8).collect();
        assert_eq!(client.ask_write(0, 12345, &big).errno, 0);
        let reply = client.ask(0, READ, 12345, u64::from(32 * MIB));
        assert!(reply.errno == 0 && reply.data == big);
        client.check_in_step();
        let flags = if style == Style::Extended { PAYLOAD_LEN } else { 0 };
        client.send(flags, WRITE, 1, 0, u64::from(33 * MIB), b"");
        client.expect_end();
        serving.check();
    });
}

#[test]
fn a_read_only_export_says_so_and_refuses_changes() {
    for_each_engine(|engine| {
        let disk = Disk { read_only: true, ..Disk::new() };
        let serving = Serving::new(engine, disk, Options::default());
        for style in STYLES {
            let mut client = serving.client(style);
            // READ_ONLY, and neither TRIM nor WRITE_ZEROES nor FAST_ZERO.
            assert_eq!(client.flags & (1 << 1 | 1 << 5 | 1 << 6 | 1 << 11), 1 << 1);
            assert_eq!(client.ask_write(0, 0, &[1; 70_000]).errno, EPERM);
            assert_eq!(client.ask(0, TRIM, 0, 512).errno, EPERM);
            assert_eq!(client.ask(0, ZEROES, 0, 512).errno, EPERM);
            assert_eq!(client.ask(0, FLUSH, 0, 0).errno, 0);
            assert_eq!(client.ask(0, READ, 0, 512).data, [0; 512]);
        }
    });
}

#[test]
fn a_device_that_fails_is_reported_and_the_connection_goes_on() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        for (kind, errno) in [
            (Kind::Io, EIO),
            (Kind::NoSpace, ENOSPC),
            (Kind::ReadOnly, EPERM),
            (Kind::Poisoned, EIO),
            (Kind::Unsupported, EINVAL),
        ] {
            serving.disk.fail(Some(kind));
            assert_eq!(client.ask_write(0, 0, &[0; 512]).errno, errno, "{kind:?}");
            assert_eq!(client.ask(0, READ, 0, 512).errno, errno, "{kind:?}");
            assert_eq!(client.ask(0, FLUSH, 0, 0).errno, errno, "{kind:?}");
            assert_eq!(client.ask(FUA, TRIM, 0, 512).errno, errno, "{kind:?}");
            assert_eq!(client.ask(NO_HOLE, ZEROES, 0, 512).errno, errno, "{kind:?}");
            if style != Style::Simple {
                assert_eq!(client.ask(0, STATUS, 0, 512).errno, errno, "{kind:?}");
            }
        }
        serving.disk.fail(None);
        client.check_in_step();
    });
}

/// What `Disk` says about `len` bytes from `at`, joined where neighbours agree.
fn expected(at: u64, len: u64, word: impl Fn(u64) -> u64) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    let (mut at, end) = (at, at + len);
    while at < end {
        let next = end.min((at / 65536 + 1) * 65536);
        let status = word(at / 65536 % 3);
        match joined.last_mut() {
            Some((len, same)) if *same == status => *len += next - at,
            _ => joined.push((next - at, status)),
        }
        at = next;
    }
    joined
}

fn allocation(kind: u64) -> u64 {
    [0, 0, 3][kind as usize]
}

fn depth(kind: u64) -> u64 {
    [1, 2, 0][kind as usize]
}

#[test]
fn block_status_describes_each_selected_context() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        if style == Style::Simple {
            assert_eq!(client.ask(0, STATUS, 0, 4096).errno, EINVAL);
            return client.check_in_step();
        }
        for (at, len) in [(0, SIZE), (5, 65536 * 4), (65535, 2), (SIZE - 1, 1)] {
            let reply = client.ask(0, STATUS, at, len);
            assert_eq!((reply.errno, reply.status.len()), (0, 2));
            assert_eq!(reply.status[0], (1, expected(at, len, allocation)));
            assert_eq!(reply.status[1], (2, expected(at, len, depth)));
        }
        let one = client.ask(REQ_ONE, STATUS, 65536, SIZE - 65536).status;
        assert_eq!(one, [(1, vec![(65536, 0)]), (2, vec![(65536, 2)])]);
        client.check_in_step();
    });
}

#[test]
fn contexts_are_negotiated_for_one_export_and_replace_each_other() {
    for_each_engine(|engine| {
        let export = Export { name: "root".into(), ..Export::default() };
        let serving = Serving::new(engine, Disk::new(), Options { export, ..Options::default() });
        for (first, second, go, works) in [
            ("root", None, "root", true),
            ("", None, "root", false),
            ("root", Some(query_data("root", &[])), "root", false),
            ("root", Some(vec![0xff]), "root", false),
            ("root", Some(query_data("root", &["qemu:allocation-depth"])), "root", true),
        ] {
            let mut client = serving.connect();
            client.hello(3);
            client.option(8, b"");
            client.style = Style::Structured;
            let selected = client.option(10, &query_data(first, &["base:allocation", "base:"]));
            assert_eq!(selected[0].1.slice(4..), Bytes::from_static(b"base:allocation"));
            assert_eq!(selected.len(), 2);
            if let Some(data) = second {
                client.option(10, &data);
            }
            client.go(go).unwrap();
            let reply = client.ask(0, STATUS, 0, 512);
            assert_eq!(reply.errno, if works { 0 } else { EINVAL });
            assert_eq!(reply.status.len(), usize::from(works));
            client.check_in_step();
        }
    });
}

#[test]
fn a_status_payload_restricts_the_contexts() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.client(Style::Extended);
        assert_ne!(client.flags & 1 << 12, 0);
        let payload = |len: u64, ids: &[u32]| {
            let mut payload = len.to_be_bytes().to_vec();
            ids.iter().for_each(|id| payload.put_u32(*id));
            payload
        };
        let mut ask = |payload: Vec<u8>| {
            client.send(PAYLOAD_LEN, STATUS, 3, 65536, payload.len() as u64, &payload);
            let reply = client.reply(0);
            assert_eq!(reply.cookie, 3);
            client.check_in_step();
            reply
        };
        let long = 65536 * 5;
        assert_eq!(ask(payload(long, &[2])).status, [(2, expected(65536, long, depth))]);
        assert_eq!(ask(payload(long, &[2, 1])).status.len(), 2);
        for wrong in [
            payload(long, &[]),
            payload(long, &[1, 1]),
            payload(long, &[1, 2, 1]),
            payload(long, &[3]),
            payload(0, &[1]),
            payload(SIZE, &[1]),
            payload(long, &[1])[..11].to_vec(),
            vec![0; 4],
            vec![0; 100_000],
        ] {
            assert_eq!(ask(wrong).errno, EINVAL);
        }
        let mut client = serving.connect();
        client.hello(3);
        client.option(11, b"");
        client.style = Style::Extended;
        client.go("").unwrap();
        assert_eq!(client.flags & 1 << 12, 0, "no contexts, no payload");
    });
}

#[test]
fn a_status_reply_is_bounded() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.client(Style::Extended);
        client.ask(0, STATUS, 0, SIZE);
        let asked = serving.disk.take_log();
        assert_eq!(asked.last().unwrap(), &format!("extents 0 {SIZE} 131072"));
    });
}

#[test]
fn a_stream_that_is_no_request_ends_the_connection() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        client.check_in_step();
        client.put(&[0x55; 64]);
        client.expect_end();
        serving.check();
    });
}

#[test]
fn a_client_that_vanishes_in_any_phase_harms_nobody() {
    for_each_style(|serving, style| {
        let mut good = serving.client(Style::Structured);
        let mut whole = Vec::new();
        whole.put_u32(3);
        let agree = if style == Style::Extended { 11 } else { 8 };
        if style != Style::Simple {
            whole.extend(option(agree, b""));
        }
        whole.extend(option(7, &info_data("", &[3])));
        whole.extend(request(style, 0, READ, 1, 0, 65536));
        let flags = if style == Style::Extended { PAYLOAD_LEN } else { 0 };
        whole.extend(request(style, flags, WRITE, 2, 0, 6000));
        whole.extend([9; 6000]);
        whole.extend(request(style, 0, FLUSH, 3, 0, 0));
        let cuts = (0..whole.len()).filter(|cut| *cut < 200 || cut % 501 == 0);
        for cut in cuts {
            let mut client = serving.connect();
            client.put(&whole[..cut]);
            drop(client);
        }
        good.check_in_step();
        drop(good);
        wait_until("everybody to leave", || serving.server.connections() == 0);
    });
}

#[test]
fn a_client_that_stalls_harms_nobody() {
    for_each_style(|serving, style| {
        let stalled: Vec<_> = [0, 3, 4, 11, 20]
            .into_iter()
            .map(|cut| {
                let mut client = serving.connect();
                let whole = [&3u32.to_be_bytes()[..], &option(7, &info_data("", &[]))].concat();
                client.put(&whole[..cut]);
                client
            })
            .collect();
        let mut half_header = serving.client(style);
        half_header.put(&request(style, 0, READ, 1, 0, 1)[..13]);
        let mut half_payload = serving.client(style);
        half_payload.send(0, WRITE, 1, 0, 100_000, &[1; 50_000]);
        serving.check();
        drop(stalled);
        half_payload.put(&[1; 50_000]);
        assert_eq!(half_payload.reply(0).errno, 0);
        half_payload.check_in_step();
    });
}

#[test]
fn a_flood_of_requests_is_answered_in_full() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let mut stream = client.stream.try_clone().unwrap();
        let count = 3000u64;
        let flags = if style == Style::Extended { PAYLOAD_LEN } else { 0 };
        let writer = std::thread::spawn(move || {
            for cookie in 0..count {
                let at = cookie % 1000 * 4096;
                let len = 1 + cookie * 37 % 4096;
                let mut bytes = match cookie % 3 {
                    0 => request(style, 0, READ, cookie, at, 4096),
                    1 => request(style, flags, WRITE, cookie, at, len),
                    _ => request(style, 0, FLUSH, cookie, 0, 0),
                };
                if cookie % 3 == 1 {
                    bytes.resize(bytes.len() + len as usize, 0);
                }
                stream.write_all(&bytes).unwrap();
            }
        });
        let mut seen = vec![false; count as usize];
        for expected in 0..count {
            // The disk answers at once, so answers keep the order of requests.
            let reply = client.reply(if expected % 3 == 0 { 4096 } else { 0 });
            assert_eq!(reply.errno, 0);
            assert!(!std::mem::replace(&mut seen[reply.cookie as usize], true));
        }
        writer.join().unwrap();
        client.check_in_step();
    });
}

#[test]
fn requests_that_wait_do_not_hold_up_others_and_are_answered_when_done() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let before = serving.disk.started.load(Ordering::SeqCst);
        serving.disk.close_gate();
        for cookie in 0..100 {
            client.write(0, cookie, cookie * 4096, &[cookie as u8; 4096]);
        }
        serving.disk.wait_started(before + 100);
        let mut other = serving.client(style);
        other.send(0, CACHE, 1, 0, 512, b"");
        assert_eq!(other.reply(0).errno, 0);
        serving.disk.open_gate();
        let mut cookies: Vec<_> = (0..100).map(|_| client.reply(0).cookie).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..100).collect::<Vec<_>>());
        client.check_in_step();
    });
}

#[test]
fn what_one_client_can_make_the_server_hold_is_bounded() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        serving.disk.close_gate();
        let mut many = serving.client(Style::Simple);
        for cookie in 0..200 {
            many.send(0, READ, cookie, 0, 512, b"");
        }
        serving.disk.wait_started(128);
        let mut large = serving.client(Style::Simple);
        for cookie in 0..10 {
            large.send(0, READ, cookie, 0, u64::from(16 * MIB), b"");
        }
        serving.disk.wait_started(128 + 4);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(serving.disk.started.load(Ordering::SeqCst), 128 + 4);
        serving.disk.open_gate();
        for _ in 0..200 {
            assert_eq!(many.reply(512).errno, 0);
        }
        for _ in 0..10 {
            assert_eq!(large.reply(u64::from(16 * MIB)).errno, 0);
        }
        serving.check();
    });
}

#[test]
fn a_client_that_does_not_read_its_answers_is_not_read_from() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut deaf = serving.client(Style::Simple);
        for cookie in 0..400 {
            deaf.send(0, READ, cookie, 0, u64::from(MIB), b"");
        }
        std::thread::sleep(Duration::from_millis(200));
        let started = serving.disk.started.load(Ordering::SeqCst);
        assert!(started < 64, "{started} MiB were read for somebody who takes none");
        serving.check();
        for _ in 0..400 {
            assert_eq!(deaf.reply(u64::from(MIB)).errno, 0);
        }
        deaf.check_in_step();
    });
}

#[test]
fn what_was_admitted_is_done_though_its_client_is_gone() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let before = serving.disk.started.load(Ordering::SeqCst);
        serving.disk.close_gate();
        let pattern = [style as u8 + 1; 8192];
        for cookie in 0..8 {
            client.write(0, cookie, cookie * 8192, &pattern);
        }
        serving.disk.wait_started(before + 8);
        drop(client);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(serving.server.connections(), 1, "a session ends after its requests");
        serving.disk.open_gate();
        wait_until("the session to end", || serving.server.connections() == 0);
        assert!(serving.disk.data.lock().unwrap()[..65536].iter().all(|b| *b == pattern[0]));
    });
}

#[test]
fn disconnect_finishes_and_answers_what_is_in_flight() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let before = serving.disk.started.load(Ordering::SeqCst);
        serving.disk.close_gate();
        client.write(0, 1, 0, &[1; 512]);
        client.send(0, DISC, 2, 0, 0, b"");
        client.send(0, READ, 3, 0, 512, b"");
        serving.disk.wait_started(before + 1);
        serving.disk.open_gate();
        assert_eq!(client.reply(0).cookie, 1);
        client.expect_end();
    });
}

#[test]
fn stop_answers_what_is_in_flight_and_closes_every_connection() {
    for_each_engine(|engine| {
        let mut serving = Serving::plain(engine);
        let mut silent = serving.connect();
        let mut idle = serving.client(Style::Structured);
        let mut busy = serving.client(Style::Extended);
        serving.disk.close_gate();
        busy.write(0, 77, 0, &[1; 4096]);
        serving.disk.wait_started(1);
        serving.server.stop();
        silent.expect_end();
        idle.expect_end();
        assert!(!serving.thread.as_ref().unwrap().is_finished());
        serving.disk.open_gate();
        let reply = busy.reply(0);
        assert_eq!((reply.cookie, reply.errno), (77, 0));
        busy.expect_end();
        serving.join().unwrap();
        assert_eq!(Arc::strong_count(&serving.disk), 2, "the test's own, and the server handle's");
    });
}

#[test]
fn a_flush_is_asked_of_the_device_after_writes_answered_on_other_connections() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let (mut one, mut two) = (serving.client(Style::Simple), serving.client(Style::Extended));
        assert_ne!(one.flags & two.flags & 1 << 8, 0, "CAN_MULTI_CONN");
        assert_eq!(one.ask_write(0, 0, &[5; 512]).errno, 0);
        assert_eq!(two.ask(0, READ, 0, 512).data, [5; 512]);
        assert_eq!(two.ask(0, FLUSH, 0, 0).errno, 0);
        assert_eq!(serving.disk.take_log(), ["write 0 512 false", "read 0 512", "flush"]);
    });
}

#[test]
fn connections_are_counted_and_a_seat_is_free_again_when_one_leaves() {
    for_each_engine(|engine| {
        let options = Options { max_connections: 2, ..Options::default() };
        let serving = Serving::new(engine, Disk::new(), options);
        let first = serving.client(Style::Simple);
        let mut second = serving.client(Style::Structured);
        let mut third = serving.connect();
        third.hello(3);
        assert_eq!(third.go(""), Err(ERR_POLICY));
        let mut old = serving.connect();
        old.hello(3);
        old.put(&option(1, b""));
        old.expect_end();
        drop(first);
        wait_until("a seat", || serving.server.connections() == 1);
        third.go("").expect("the seat that became free");
        third.check_in_step();
        second.check_in_step();
    });
}

#[test]
fn silent_connections_make_room_for_new_ones_oldest_first() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut good = serving.client(Style::Simple);
        let mut silent: Vec<_> = (0..64).map(|_| serving.connect()).collect();
        silent.iter_mut().for_each(|client| client.hello(3));
        let mut late = serving.connect();
        late.hello(3);
        silent[0].expect_end();
        silent[1].option(3, b"");
        late.go("").unwrap();
        late.check_in_step();
        good.check_in_step();
    });
}

#[test]
fn a_negotiation_has_ten_seconds() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut good = serving.client(Style::Simple);
        let mut slow = serving.connect();
        slow.hello(3);
        let begin = Instant::now();
        slow.expect_end();
        let waited = begin.elapsed();
        assert!((9..15).contains(&waited.as_secs()), "{waited:?}");
        good.check_in_step();
    });
}

#[test]
fn a_server_may_end_with_its_last_client() {
    for_each_engine(|engine| {
        let options = Options { end_with_last_client: true, ..Options::default() };
        let mut serving = Serving::new(engine, Disk::new(), options);
        drop(serving.connect());
        let (first, second) = (serving.client(Style::Simple), serving.client(Style::Simple));
        drop(first);
        wait_until("one to leave", || serving.server.connections() == 1);
        assert!(!serving.thread.as_ref().unwrap().is_finished());
        drop(second);
        serving.join().unwrap();
    });
}

/// Serves one connection on a thread of its own, as a server on standard input does.
fn serve_one(engine: Engine, input: OwnedFd, output: OwnedFd) -> JoinHandle<ploop::Result<()>> {
    std::thread::spawn(move || {
        let server = Server::new(Arc::new(Disk::new()), Options::default(), engine).unwrap();
        let (input, output) = (Arc::new(input), Arc::new(output));
        exec::run(engine, async move { server.serve_connection(input, output).await }).unwrap()
    })
}

#[test]
fn one_client_is_served_over_a_socket_pair_until_it_leaves() {
    for_each_engine(|engine| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let copy = theirs.try_clone().unwrap();
        let served = serve_one(engine, theirs.into(), copy.into());
        let mut client = Client::over(ours);
        client.hello(3);
        client.agree(Style::Extended);
        client.go("").unwrap();
        client.check_in_step();
        client.send(0, DISC, 1, 0, 0, b"");
        client.expect_end();
        served.join().unwrap().unwrap();
    });
}

#[test]
fn one_client_is_served_over_a_pair_of_pipes() {
    for_each_engine(|engine| {
        let (from_client, mut to_server) = std::io::pipe().unwrap();
        let (mut from_server, to_client) = std::io::pipe().unwrap();
        let served = serve_one(engine, from_client.into(), to_client.into());
        let mut all = 3u32.to_be_bytes().to_vec();
        all.extend(option(7, &info_data("", &[])));
        all.extend(request(Style::Simple, 0, WRITE, 1, 0, 100_000));
        all.extend(vec![8; 100_000]);
        all.extend(request(Style::Simple, 0, READ, 2, 99_999, 2));
        to_server.write_all(&all).unwrap();
        drop(to_server);
        let mut answer = Vec::new();
        from_server.read_to_end(&mut answer).unwrap();
        assert_eq!(answer[answer.len() - 2..], [8, 0]);
        served.join().unwrap().unwrap();
    });
}

#[test]
fn a_server_without_a_socket_or_with_an_impossible_name_is_an_error() {
    let server = Server::new(Arc::new(Disk::new()), Options::default(), Engine::Poll).unwrap();
    let result = exec::run(Engine::Poll, async { server.serve(vec![]).await }).unwrap();
    assert_eq!(result.unwrap_err().kind(), Kind::Invalid);
    let export = Export { name: "a\0b".into(), ..Export::default() };
    let options = Options { export, ..Options::default() };
    assert!(Server::new(Arc::new(Disk::new()), options, Engine::Poll).is_err());
}
