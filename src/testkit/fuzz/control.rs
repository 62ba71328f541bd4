//! Any bytes of a client of the control socket, or of the metrics socket.

use crate::counters::Stat;
use crate::rundir::{Phase, State};
use crate::serve::supervise::control::{BACKLOG_MAX, Client, Figures, LINE_MAX, Oracle, Orders};
use serde_json::Value;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

struct Known {
    state: State,
    memory: OwnedFd,
}

impl Oracle for Known {
    fn state(&self) -> &State {
        &self.state
    }

    fn stat(&self) -> Figures {
        Figures {
            counters: Stat::default(),
            footprint: None,
        }
    }

    fn counters(&self) -> Option<BorrowedFd<'_>> {
        Some(self.memory.as_fd())
    }

    fn is_held(&self) -> bool {
        true
    }
}

fn known() -> Known {
    let state = State {
        schema: 1,
        path: "/a \"disk\"\n".into(),
        uuid: "u".into(),
        device: None,
        mountpoint: None,
        transport: "nbd".into(),
        uri: None,
        socket: None,
        worker_pid: None,
        keeper_pid: 1,
        size: 1 << 30,
        state: Phase::Failed,
        read_only: false,
        snapshot: None,
        cache: "none".into(),
        engine: None,
        host_low: false,
        frozen: false,
        log: None,
        restarts: 0,
        error: Some("e".into()),
    };
    let memory = std::fs::File::open("/dev/null").expect("every system has one");
    Known {
        state,
        memory: memory.into(),
    }
}

/// The first byte says which socket, in how large pieces bytes arrive, and whether the client reads
/// now and then or never.
pub fn run(input: &[u8]) {
    let Some((how, input)) = input.split_first() else {
        return;
    };
    let (speaks_http, is_deaf) = (how & 1 == 1, how & 0x80 != 0);
    let piece = 1 + usize::from(how >> 1 & 0x3F) * 97;
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    theirs.set_nonblocking(true).expect("a socket of ours");
    let known = known();
    let mut client = Client::welcome(ours, speaks_http).expect("a user who is heard");
    let (mut orders, mut heard) = (Orders::default(), Vec::new());
    for (n, bytes) in input.chunks(piece).enumerate() {
        // What the socket does not take is lost: bytes are as good as any others.
        let _ = theirs.write(bytes);
        let stays = client.turn(&known, &mut orders);
        let (waits, backlog) = client.holds();
        if !stays {
            break;
        }
        assert!(waits < LINE_MAX && backlog <= BACKLOG_MAX);
        if n % 3 == 2 && !is_deaf {
            drain(&mut theirs, &mut heard);
        }
    }
    drain(&mut theirs, &mut heard);
    if !speaks_http {
        let whole = heard.rsplit(|b| *b == b'\n').skip(1);
        for line in whole {
            let line: Value = serde_json::from_slice(line).expect("lines of JSON");
            assert!(line.is_object());
        }
    }
}

fn drain(from: &mut UnixStream, into: &mut Vec<u8>) {
    let mut buf = [0u8; 65536];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return,
            Ok(n) => into.extend_from_slice(&buf[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Requests of every kind, alone and together, and what is none.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let methods = [
        "state", "stat", "events", "counters", "stop", "recover", "freeze", "thaw",
    ];
    let line = |method: &str| format!("{{\"id\":1,\"method\":\"{method}\"}}\n");
    let all: String = methods.iter().map(|m| line(m)).collect();
    let mut seeds: Vec<(String, Vec<u8>)> = methods
        .iter()
        .map(|m| ((*m).to_string(), format!("\u{2}{}", line(m)).into_bytes()))
        .collect();
    let many = |text: &str, n: usize| format!("\u{7e}{}", text.repeat(n)).into_bytes();
    seeds.push(("all".into(), many(&all, 1)));
    seeds.push(("flood".into(), many(&line("state"), 3000)));
    let deaf = [&b"\xFE"[..], line("state").repeat(6000).as_bytes()].concat();
    seeds.push(("deaf".into(), deaf));
    seeds.push(("passing".into(), many(&line("counters"), 400)));
    seeds.push(("long".into(), many("x", LINE_MAX + 10)));
    seeds.push(("deep".into(), many("[", 4000)));
    seeds.push((
        "http".into(),
        b"\x03GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
    ));
    seeds
}
